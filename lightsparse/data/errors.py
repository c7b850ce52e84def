"""What goes wrong with data, in words for the user."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from lightsparse.utils.refusal import Refusal
from lightsparse.utils.text import first_line

T = TypeVar("T")


class DataError(Refusal):
    """The data cannot be used as asked."""


@contextmanager
def reading(path: str | os.PathLike[str]) -> Iterator[None]:
    """DataError in place of the system's own error (no permission, a failing disk) while a file or folder is read."""
    try:
        yield
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror or error}); see to that, or leave it out") from error


def read_json(path: Path, build: Callable[[Any], T]) -> T:
    """What `build` makes of a JSON file of ours. DataError where it is not as it was written."""
    try:
        with reading(path):
            return build(json.loads(path.read_bytes()))
    except DataError:
        raise
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path} is damaged ({first_line(error)}); prepare the folder again") from error
