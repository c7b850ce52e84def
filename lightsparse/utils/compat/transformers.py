"""transformers (5): what it does around attentions that are registered by name, beyond what is documented."""

from __future__ import annotations

from typing import TYPE_CHECKING

# The mask function of plain causality, compared by identity: nothing else tells that a mask is that and no more.
from transformers.masking_utils import causal_mask_function as causal_mask_function

if TYPE_CHECKING:
    from torch import nn

# Words of a model's forward that reach every attention and change nothing of its result; there is no list of them.
WITHOUT_EFFECT = frozenset(
    (
        *("use_cache", "cache_position", "num_items_in_batch"),
        *("output_hidden_states", "output_router_logits", "return_dict"),
    )
)
KERNEL_WORD = "flash"  # a name that holds it is taken for a kernel, to be fetched from the hub


def layer_of(module: nn.Module) -> int:
    """Which layer an attention of a model belongs to; 0 where it does not say. Attentions are told nothing else."""
    return getattr(module, "layer_idx", None) or 0


def reads_the_past_alone(module: nn.Module, given: bool | None) -> bool:
    """Whether an attention reads the past alone: as the call says, else its module, else yes."""
    return getattr(module, "is_causal", True) if given is None else given
