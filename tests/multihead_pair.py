"""What the multihead tests share: nn.MultiheadAttention and ours with the same weights, inputs, masks, comparison."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lightsparse.attention.core import SequenceContext
from lightsparse.attention.modules.multihead import BlockSparseRingMultiheadDilatedAttention as Multihead
from lightsparse.patterns import GlobalTokens, LocalWindow

B, H, E = 2, 4, 32
F32, F64 = torch.float32, torch.float64
SPARSE = {
    "block": 8,
    "segment_lengths": (16, 32),
    "dilation_rates": (1, 2),
    "pattern": LocalWindow(7) | GlobalTokens(2),
}
FULL = {"block": 16, "density": 1.0}


def pair(sparse: dict, dtype: torch.dtype = F64, **arguments) -> tuple[nn.MultiheadAttention, Multihead]:
    """nn.MultiheadAttention and ours with the same weights; biases are not zero."""
    torch.manual_seed(0)
    dense = nn.MultiheadAttention(E, H, dtype=dtype, **arguments)
    for parameter in dense.parameters():
        if parameter.dim() == 1:
            nn.init.normal_(parameter)
    ours = Multihead(E, H, dtype=dtype, **arguments, **sparse)
    ours.load_state_dict(dense.state_dict())
    return dense, ours


def tokens(n: int, features: int = E, seed: int = 1, *, batch_first: bool = True, dtype: torch.dtype = F64) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    size = (B, n) if batch_first else (n, B)
    return torch.randn(*size, features, generator=g, dtype=dtype).requires_grad_()


def padding(n: int) -> Tensor:
    """[B, n]: the first sample whole, the second padded at its end and in its middle."""
    hidden = torch.zeros(B, n, dtype=torch.bool)
    hidden[1, n - n // 3 :] = hidden[1, 5:9] = True
    return hidden


def attn_mask(kind: str, n: int, m: int | None = None, dtype: torch.dtype = F64) -> Tensor | None:
    """True hides. Every query keeps key 0, so that nn.MultiheadAttention gives no NaN."""
    g = torch.Generator().manual_seed(2)
    if kind == "none":
        return None
    if kind == "causal":
        return torch.ones(n, m or n, dtype=torch.bool).triu(1)
    size = (B * H, n, m or n) if "3-D" in kind else (n, m or n)
    if "bool" in kind:
        hidden = torch.rand(size, generator=g) < 0.4
        hidden[..., 0] = False
        return hidden
    added = torch.randn(size, generator=g, dtype=dtype)
    added[..., 3] = float("-inf")
    return added


def added(hidden: Tensor, dtype: torch.dtype = F64) -> Tensor:
    """A bool mask in its float form."""
    return torch.zeros(hidden.shape, dtype=dtype).masked_fill(hidden, float("-inf"))


MASKS = ("none", "causal", "bool", "float", "bool 3-D", "float 3-D")


def pattern_of(ours: Multihead, n: int) -> Tensor:
    """Bool [1, H|1, n, n]: what the pattern reads."""
    return ours.core.layout(n, SequenceContext(torch.arange(n)[None]), torch.device("cpu")).to_dense()


def results(module: nn.Module, inputs: tuple[Tensor, ...], call: dict) -> list[Tensor | None]:
    """Outputs, weights, and the gradients of a weighted mean of both."""
    out, weights = module(*inputs, **call)
    loss = (out * torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)).mean()
    if weights is not None:
        loss = loss + (weights * torch.linspace(-1, 1, weights.numel(), dtype=out.dtype).view_as(weights)).mean()
    grads = torch.autograd.grad(100 * loss, [*dict.fromkeys(inputs), *module.parameters()])
    return [out, weights, *grads]


def assert_same(
    ours: nn.Module,
    dense: nn.Module,
    inputs: tuple[Tensor, ...],
    call: dict,
    dense_call: dict | None = None,
    tolerance: float = 1e-12,
) -> None:
    found, right = results(ours, inputs, call), results(dense, inputs, call if dense_call is None else dense_call)
    for a, b in zip(found, right, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, atol=tolerance, rtol=0)
