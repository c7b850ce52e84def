"""Dropout of the residual stream as a pure function of where a number stands: sample, site, token, feature.

No generator state is consumed, so recomputation, ranks, batch splits and restarts agree bit for bit. One 64-bit hash
decides for four features, 16 bits each: hashing every feature alone would take longer than a small layer does.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lightsparse.attention.core import SequenceContext
from lightsparse.utils.hashing import chain, mix, mixed, signed

_COLUMN = signed(0x9FB21C651E98DF25)  # an odd constant, so that columns differ before they are mixed
_STEPS = 1 << 16  # a rate is rounded to 1/65536


def dropped(x_BNE: Tensor, rate: float, site: int, ctx: SequenceContext) -> Tensor:
    """x_BNE with a share `rate` of its numbers set to 0 and the others divided by 1 − rate (Srivastava et al. 2014).

    site  names the place in the model: 0 the embedding, 2i + 1 and 2i + 2 what layer i adds by attention and by MLP
    """
    batch, length, width = x_BNE.shape
    device = x_BNE.device
    samples_B = torch.arange(batch, device=device) if ctx.sample_ids is None else ctx.sample_ids
    if ctx.shard is None:
        places_N = torch.arange(ctx.q_start, ctx.q_start + length, device=device)
    else:
        places_N = ctx.shard.tokens.to(device)
    below = round(rate * _STEPS)
    row_BN = chain(mixed(ctx.seed, site, below), samples_B[:, None], places_N)
    column_G = mix(torch.arange(-(-width // 4), device=device) * _COLUMN)
    bits_BNE = mix(row_BN[..., None] ^ column_G).view(torch.int16)[..., :width]
    # Numbers, not booleans: a product of the two kinds takes PyTorch several times as long.
    return x_BNE * (bits_BNE >= below - _STEPS // 2).to(x_BNE.dtype).mul_(_STEPS / (_STEPS - below))
