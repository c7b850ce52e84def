"""Warnings of a configuration that is not what its name says."""

from __future__ import annotations

import logging
from functools import lru_cache

log = logging.getLogger(__name__)


@lru_cache(maxsize=64)  # once, not for every layer
def warn_if_dense(what: str, tokens: int, context: int | None) -> None:
    """Say so where a selection of `tokens` tokens per query covers the whole context."""
    if context is not None and tokens >= context:
        log.warning(
            "%s is %s tokens per query and the context has %s: this configuration computes everything, it is dense; "
            "lower it, or use attention=dense",
            what,
            f"{tokens:,}",
            f"{context:,}",
        )
