"""What goes wrong with data, in words for the user."""

from lightsparse.utils.refusal import Refusal


class DataError(Refusal):
    """The data cannot be used as asked."""
