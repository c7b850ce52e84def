"""The Python standard library's own source: long, real text that is already on every machine.

It differs between Python versions, which is why documents are split by the hash of their path and why a run's
checkpoint carries a fingerprint of the corpus.
"""

from __future__ import annotations

import os
import sysconfig
from collections import defaultdict
from collections.abc import Hashable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from lightsparse.data.documents import Document, utf8_text
from lightsparse.data.files import files_digest, same_file
from lightsparse.data.source import DataError
from lightsparse.data.text import TextConfig

# Not the library itself (installed packages), not typical source (tests, tables), or not UTF-8 (lib2to3's fixtures).
EXCLUDED_FOLDERS = {"site-packages", "dist-packages", "test", "tests", "idle_test", "encodings", "lib2to3"}
EXCLUDED_FILES = "_sysconfigdata"  # generated tables; the name continues with the platform
MIN_BYTES = 8192  # shorter documents teach nothing about a long context


@dataclass(frozen=True, kw_only=True)
class StdlibData(TextConfig):
    pack: Literal["isolate", "concat"] = "concat"  # one stream of source: a sixth less time a step
    unit: Literal["file", "package"] = "file"  # one document per file, or per top-level package (for > 32k contexts)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.unit not in ("file", "package"):
            raise ValueError(f"data.unit is {self.unit!r}; it must be file or package, what one document is made of")

    def identity(self) -> dict[str, Any]:
        return {**super().identity(), "files": files_digest(source_files(library()).items())}

    def held_out_by(self) -> dict[Hashable, object]:
        root = library()
        return {same_file(path): (self._document(name), self.val_fraction) for name, path in source_files(root).items()}

    def documents(self) -> Iterator[Document]:
        """Documents of at least MIN_BYTES, named by their path below the library's folder."""
        root = library()
        files_of = defaultdict(list)
        for name, path in source_files(root).items():
            files_of[self._document(name)].append(path)
        if not files_of:
            raise DataError(f"this Python has no source files below {root}; train on your own text with data=files")
        for name, paths in files_of.items():
            if sum(path.stat().st_size for path in paths) >= MIN_BYTES:
                yield Document(name, "".join(utf8_text(path) for path in paths))

    def _document(self, name: str) -> str:
        return name if self.unit == "file" else name.partition("/")[0]


def library() -> Path:
    """The folder it lies in."""
    return Path(sysconfig.get_paths()["stdlib"])


def source_files(root: Path) -> dict[str, Path]:
    """The library's Python files by their names below `root`, sorted; a file with several names counts once. Folders
    of installed packages are not even entered."""
    found = []
    for folder, subfolders, files in os.walk(root):
        subfolders[:] = set(subfolders) - EXCLUDED_FOLDERS
        found += [Path(folder, name) for name in files if name.endswith(".py") and not name.startswith(EXCLUDED_FILES)]
    first = {same_file(Path(os.path.realpath(path))): path for path in sorted(found, reverse=True)}
    return {path.relative_to(root).as_posix(): path for path in sorted(first.values())}
