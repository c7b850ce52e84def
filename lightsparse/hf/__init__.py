"""Hugging Face: our attention inside transformers' models, and their weights in ours, both ways.

    from lightsparse import hf

    hf.register()                                               # every variant that needs no parameters of its own
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="lightsparse_block_sparse")

Training, generate() with any cache, grouped queries, padding and packed position_ids work as with sdpa, without an
N × N mask. What a model asks for beside them (a sliding window, soft caps, sinks, cross-attention) is refused.

    ours = hf.load_model(folder)                                # a lightsparse Transformer: equal logits
    python train.py init_from=<folder> attention=block_sparse … # or go on training with any attention
    lightsparse export run=runs/<name> out=<folder>   # and back

Needs the extra: pip install 'lightsparse[hf]'.
"""

from lightsparse.hf.families import described, differences, family_of, their_config
from lightsparse.hf.register import register, register_exported, register_variant
from lightsparse.hf.weights import load_model, load_weights, save_model

__all__ = [
    "described",
    "differences",
    "family_of",
    "load_model",
    "load_weights",
    "register",
    "register_exported",
    "register_variant",
    "save_model",
    "their_config",
]
