"""Which layer has which attention: one letter each, S the chosen one, D and L the same whatever is chosen."""

from __future__ import annotations

from lightsparse.attention.core import AttentionCore, AttentionShape
from lightsparse.attention.dense import DenseAttention, DenseConfig
from lightsparse.attention.sliding_window import SlidingWindowAttention, SlidingWindowConfig


def check_layers(pattern: str, local_window: int | None, prefix: str = "model.") -> None:
    """Raises ValueError for letters that mean nothing, and where L layers have no window or a window no L layer."""
    if not pattern or set(pattern) - set("SDL"):
        raise ValueError(
            f"{prefix}layer_pattern is {pattern!r}; use the letters S (the chosen attention), D (dense) and L (local), "
            "for example SSSD"
        )
    if local_window is not None and local_window < 1:
        raise ValueError(f"{prefix}local_window is {local_window}; it counts tokens and must be at least 1")
    if ("L" in pattern) != (local_window is not None):
        raise ValueError(
            f"{prefix}layer_pattern is {pattern!r} and {prefix}local_window "
            f"{'null' if local_window is None else local_window}; L layers need a window in tokens, and only they have "
            "one: set both or neither"
        )


def common_core(letter: str, shape: AttentionShape, local_window: int | None, dropout: float = 0.0) -> AttentionCore:
    """The attention of a D or L layer.

    An L layer reads the last local_window tokens, exactly (Gemma 3's local layers, arXiv 2503.19786, section 2).
    """
    if letter == "D":
        return DenseAttention(DenseConfig(dropout=dropout), shape)
    assert letter == "L" and local_window is not None  # check_layers
    block = min(64, max(16, 1 << (local_window - 1).bit_length()))  # tiles that waste little of a short window
    return SlidingWindowAttention(
        SlidingWindowConfig(window=local_window, sinks=0, block=block, dropout=dropout), shape
    )
