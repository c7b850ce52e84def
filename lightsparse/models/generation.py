"""Text from a trained model: one pass over the prompt, then one token at a time from the cache."""

from __future__ import annotations

import torch
from torch import Tensor

from lightsparse.models.cache import KVCache
from lightsparse.models.transformer import Transformer, context_for


@torch.no_grad()
def generate(
    model: Transformer,
    tokens_BN: Tensor,
    max_new_tokens: int,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    generator: torch.Generator | None = None,
    stop_token: int | None = None,
) -> Tensor:
    """int64 prompts [B, N] of one length → [B, N + up to max_new_tokens], the prompts included.

    temperature  divides the logits; 0 takes the likeliest token
    top_k        samples among the k likeliest tokens only
    stop_token   ends a sequence; the rest of its row repeats it, and when every row has it the result ends
    The model runs without dropout and goes back to the mode it was in. How far beyond its training context it still
    makes sense is the caller's matter. Raises ValueError for arguments out of range or a bidirectional model.
    """
    if not model.causal:
        raise ValueError("this model reads both ways (objective=mlm) and cannot write a text; train objective=causal")
    if tokens_BN.shape[1] < 1:
        raise ValueError("the prompt has 0 tokens; give at least one, such as the tokenizer's bos")
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens is {max_new_tokens}; it must be at least 1")
    if temperature < 0:
        raise ValueError(f"temperature is {temperature}; it must be at least 0 (0 takes the likeliest token)")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k is {top_k}; it must be at least 1, or None for all tokens")

    was_training = model.training
    model.eval()
    try:
        return _continue(model, tokens_BN, max_new_tokens, temperature, top_k, generator, stop_token)
    finally:
        model.train(was_training)


def _continue(
    model: Transformer,
    tokens_BN: Tensor,
    max_new_tokens: int,
    temperature: float,
    top_k: int | None,
    generator: torch.Generator | None,
    stop_token: int | None,
) -> Tensor:
    caches = [KVCache() for _ in model.layers]
    pieces, new_BN = [tokens_BN], tokens_BN
    ended_B1 = torch.zeros_like(tokens_BN[:, :1], dtype=torch.bool)
    for _ in range(max_new_tokens):
        hidden = model(new_BN, context_for(new_BN, q_start=caches[0].length), caches).hidden[:, -1]
        new_BN = sample(model.logits(hidden), temperature, top_k, generator)
        if stop_token is not None:
            new_BN = new_BN.masked_fill(ended_B1, stop_token)
            ended_B1 = ended_B1 | (new_BN == stop_token)
        pieces.append(new_BN)
        if stop_token is not None and bool(ended_B1.all()):
            break
    return torch.cat(pieces, dim=1)


def sample(
    logits_BV: Tensor, temperature: float = 1.0, top_k: int | None = None, generator: torch.Generator | None = None
) -> Tensor:
    """One token per row, int64 [B, 1]."""
    if temperature == 0:
        return logits_BV.argmax(-1, keepdim=True)
    logits_BV = logits_BV.float() / temperature
    if top_k is None or top_k >= logits_BV.shape[1]:
        return torch.multinomial(logits_BV.softmax(-1), 1, generator=generator)
    top = logits_BV.topk(top_k)
    choice_B1 = torch.multinomial(top.values.softmax(-1), 1, generator=generator)
    return top.indices.gather(1, choice_B1)
