"""Hugging Face: our attention inside transformers' models, and their weights in ours, both ways.

    from lightsparse.models import hf

    hf.register()                                               # every variant that needs no parameters of its own
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="lightsparse_block_sparse")

Training, generate() with any cache, grouped queries, padding and packed position_ids work as with sdpa, without an
N × N mask. What a model asks for beside them (a sliding window, soft caps, sinks, cross-attention) is refused.

Needs the extra: pip install 'lightsparse[hf]'.
"""

from lightsparse.models.hf.register import register, register_exported, register_variant

__all__ = ["register", "register_exported", "register_variant"]
