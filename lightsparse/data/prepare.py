"""A source of text as prepared shards in a folder: begun, continued after a kill, or found finished."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from lightsparse.data.documents import Document, divided
from lightsparse.data.errors import DataError, read_json
from lightsparse.data.shards import MANIFEST, SHARD_TOKENS, Manifest, complete_shards, read_manifest, write_shards
from lightsparse.data.subwords import TOKENIZER, SubwordTokenizer
from lightsparse.data.tokenizer import TokenizerConfig, load_folder
from lightsparse.data.tokens import Tokenizer
from lightsparse.utils.atomic_files import remove_partial_files, write_text
from lightsparse.utils.file_lock import LockHeldError, sign, take

log = logging.getLogger(__name__)


class TextSource(Protocol):
    """What is asked of a source of text (text.py has them)."""

    @property
    def val_fraction(self) -> float: ...
    @property
    def tokenizer(self) -> TokenizerConfig: ...
    def identity(self) -> dict[str, Any]: ...
    def documents_after(self, done: int) -> Iterator[Document]: ...
    def build_tokenizer(self) -> Tokenizer: ...


def prepare(
    data: TextSource,
    folder: Path,
    *,
    shard_tokens: int = SHARD_TOKENS,
    verify: bool = True,
    begin: Callable[[int, int], None] = lambda text_bytes, tokens: None,
    report: Callable[[int, int], None] = lambda text_bytes, tokens: None,
) -> tuple[Manifest, bool]:
    """The shards of `data` in `folder`, and whether they were all there before.

    verify  whether a finished folder is checked against its checksums
    begin   called with the bytes of text and the tokens of the complete shards that were found
    report  see write_shards
    A folder that is finished is left as it is. Others that prepare the same folder
    are waited for. DataError where it holds another source, another tokenizer or anything else.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with _alone(folder):
        documents = divided(data.documents_after, data.val_fraction)
        source = data.identity()
        if documents != data.documents_after:
            source["held out"] = data.val_fraction  # of one document: decided here, not when it is read
        tokenizer_asked = data.tokenizer.identity()
        _claim(folder, {"source": source, "tokenizer": tokenizer_asked, "shard_tokens": shard_tokens})
        if (folder / MANIFEST).is_file():
            manifest = read_manifest(folder)
            if verify:
                manifest.verify()
            return manifest, True
        remove_partial_files(folder)
        kept = (folder / TOKENIZER).is_file()
        tokenizer: Tokenizer = load_folder(folder) if kept else data.build_tokenizer()
        if isinstance(tokenizer, SubwordTokenizer) and not kept:
            tokenizer.save(folder)
        found = complete_shards(folder)
        begin(sum(shard.text_bytes for shard in found), sum(shard.tokens for shard in found))
        return write_shards(documents, tokenizer, folder, shard_tokens=shard_tokens, report=report), False


def cached(data: TextSource, folder: Path) -> Manifest:
    """The shards of `data` in a folder of their own below `folder`, prepared where they are not there yet."""
    key = repr((data.identity(), data.tokenizer.identity(), data.val_fraction))
    digest = hashlib.blake2b(key.encode(), digest_size=8).hexdigest()
    manifest, was_there = prepare(data, folder / digest, verify=False)
    log.info("data: tokens %s in %s", "found" if was_there else "written", manifest.folder)
    return manifest


def _claim(folder: Path, asked: dict[str, object]) -> None:
    """Write what is prepared here, or compare it with what was."""
    path = folder / "source.json"
    if path.is_file():
        there = read_json(path, lambda content: {key: content[key] for key in asked})
        for key, value in asked.items():
            if there[key] != value:
                raise DataError(
                    f"{folder} was begun with another {key}: {there[key]} there, {value} here; name another folder, or "
                    "remove that one"
                )
        return
    others = [each.name for each in folder.iterdir() if not each.name.startswith(".")]
    if others:
        raise DataError(f"{folder} holds other files such as {min(others)}; name a new folder, or an empty one")
    write_text(path, json.dumps(asked, indent=1) + "\n")


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """No other process prepares this folder meanwhile."""
    try:
        lock = take(folder, DataError)
    except LockHeldError as error:
        log.info("data: %s prepares %s; waiting for it", error, folder)
        lock = take(folder, DataError, wait=True)
    sign(lock)
    try:
        yield
    finally:
        lock.release()
