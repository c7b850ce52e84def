"""What a user can change: the one kind of error that commands print alone, without a traceback."""

from __future__ import annotations


class Refusal(ValueError):
    """One sentence for the user: what is wrong, what is right, the way out. Commands end with code 2 after it."""
