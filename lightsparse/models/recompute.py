"""One layer that keeps nothing but its input for the backward pass, and works through the tokens in pieces.

Where the input is kept is the caller's to say: on the device, or in main memory (offload.py).

Between two pieces of work that every token does alone (norm, projections and rotation before the attention; output
projection and MLP after it) only q, k, v and the attention's output exist for the whole sequence, in the dtype of the
attention. In the backward pass they are computed once more; then the gradients of each piece are taken as soon as its
values are there. So each product runs twice forward and once backward, but for those of q, k and v, which are computed
a third time rather than kept.

Shapes: B batch, N tokens, n tokens of a piece, E embed_dim, H heads, D head_dim.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from lightsparse.attention.core import AttentionResult, SequenceContext
from lightsparse.models.offload import Keep
from lightsparse.models.rope import Rotation


class Layer(Protocol):
    """What is asked of a layer (layers.py has it)."""

    chunk: int  # tokens of a piece
    input_layernorm: Any
    self_attn: Any
    mlp: Any

    @property
    def mlp_parts(self) -> tuple[nn.Module, ...]: ...
    def feed_forward(self, x: Tensor) -> Tensor: ...
    def parameters(self) -> Iterator[nn.Parameter]: ...


class Recomputed:
    """A layer on one pass: what forward and backward share. Calling it gives the new residual stream and the result.

    The result's `out` is let go: only aux_loss, stats and choice remain.
    keep  takes the input until the backward pass; None = it stays on the device
    """

    def __init__(self, layer: Layer, rotation: Rotation | None, ctx: SequenceContext, keep: Keep | None = None):
        self.layer, self.rotation, self.ctx, self.keep = layer, rotation, ctx, keep
        self.learns = torch.is_grad_enabled()  # a core may have its loss only then, and forward() always runs without
        self.result: AttentionResult | None = None

    def __call__(self, x_BNE: Tensor) -> tuple[Tensor, AttentionResult]:
        parameters = [p for p in self.layer.parameters() if p.requires_grad]
        y_BNE, aux_loss = _RecomputedLayer.apply(self, x_BNE, *parameters)
        assert self.result is not None
        result, self.result = self.result, None
        result.aux_loss = aux_loss
        return y_BNE, result

    def pieces(self, x_BNE: Tensor) -> Iterator[slice]:
        """Slices of equal size along N, of at most `layer.chunk` tokens of all samples."""
        batch, length = x_BNE.shape[:2]
        count = max(1, min(length, -(-batch * length // self.layer.chunk)))
        size = -(-length // count)
        return (slice(start, min(start + size, length)) for start in range(0, length, size))

    def heads(self, x_BnE: Tensor, piece: slice) -> tuple[Tensor, ...]:
        """q, k, v [B, n, H, D] of a piece and, where the core reads it, the normed input [B, n, E]."""
        normed_BnE = self.layer.input_layernorm(x_BnE)
        rotation = None if self.rotation is None else Rotation(*(part[:, piece] for part in self.rotation))
        found = self.layer.self_attn.heads(normed_BnE, rotation)
        return (*found, normed_BnE) if self.layer.self_attn.core.needs_hidden_states else found

    @torch.no_grad()
    def all_heads(self, x_BNE: Tensor) -> list[Tensor]:
        """`heads` of all tokens."""
        whole: list[Tensor] = []
        for piece in self.pieces(x_BNE):
            parts = self.heads(x_BNE[:, piece], piece)
            if not whole:
                whole = [part.new_empty(part.shape[0], x_BNE.shape[1], *part.shape[2:]) for part in parts]
            for part, of_all in zip(parts, whole, strict=True):
                of_all[:, piece] = part
        return whole

    def attend(self, heads: list[Tensor], x_BNE: Tensor) -> AttentionResult:
        q, k, v = (part.transpose(1, 2) for part in heads[:3])
        return self.layer.self_attn.core(q, k, v, x=heads[3] if len(heads) > 3 else x_BNE, ctx=self.ctx)

    def after(self, x_BnE: Tensor, out_BHnD: Tensor) -> Tensor:
        """The residual stream behind the layer, [B, n, E]."""
        x_BnE = x_BnE + self.layer.self_attn.o_proj(out_BHnD.transpose(1, 2).flatten(2))
        return x_BnE if self.layer.mlp is None else x_BnE + self.layer.feed_forward(x_BnE)


class _RecomputedLayer(torch.autograd.Function):
    """Parameters are arguments, and their gradients results, so that hooks on them (DDP, FSDP2) see the usual thing."""

    @staticmethod
    def forward(ctx, of: Recomputed, x_BNE: Tensor, *parameters: Tensor) -> tuple[Tensor, Tensor | None]:
        device = x_BNE.device.type
        ctx.of = of
        ctx.autocast = (device, torch.get_autocast_dtype(device), torch.is_autocast_enabled(device))
        # Not by hooks on what autograd saves: they would meet what a kernel keeps in `attend`, too.
        ctx.kept = of.keep(x_BNE) if of.keep is not None and any(ctx.needs_input_grad) else None
        if ctx.kept is None or ctx.kept.stays:
            ctx.save_for_backward(x_BNE)
        with _autocast(ctx):
            heads = of.all_heads(x_BNE)
            with torch.set_grad_enabled(of.learns):  # of what comes, only the core's own parameters require gradients
                result = of.attend(heads, x_BNE.detach())
            out_BHND = result.out.detach()
            aux_loss = None if result.aux_loss is None else result.aux_loss.detach().clone()
            stats = {name: value.detach() for name, value in result.stats.items()}
            of.result = AttentionResult(out_BHND.new_empty(0), None, stats, result.choice)
            del heads, result
            y_BNE = torch.empty_like(x_BNE)
            for piece in of.pieces(x_BNE):
                y_BNE[:, piece] = of.after(x_BNE[:, piece], out_BHND[:, :, piece])
        return y_BNE, aux_loss

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_BNE: Tensor, grad_aux: Tensor | None):
        here: Any = next(iter(ctx.saved_tensors), None)
        x_BNE: Tensor = here if ctx.kept is None else ctx.kept.back(here)
        of: Recomputed = ctx.of
        attention = of.layer.self_attn
        sums = _Sums(p for p in of.layer.parameters() if p.requires_grad)
        core = sums.of(attention.core.parameters())
        behind = sums.of(p for part in (attention.o_proj, *of.layer.mlp_parts) for p in part.parameters())
        before = sums.others(core, behind)
        with _autocast(ctx), torch.enable_grad():
            heads = [part.requires_grad_() for part in of.all_heads(x_BNE)]
            result = of.attend(heads, x_BNE)
            grad_out = torch.empty_like(result.out)
            # The gradient that comes in is nobody else's: a layer's output has one reader. So it is turned in place
            # from that of the output into that of the input.
            grad_BNE = grad_BNE.contiguous()
            for piece in of.pieces(x_BNE):
                x_BnE = x_BNE[:, piece].detach().requires_grad_()
                out_BHnD = result.out.detach()[:, :, piece].requires_grad_()
                y_BnE = of.after(x_BnE, out_BHnD)
                grad_x, grad_out[:, :, piece] = sums.add(y_BnE, grad_BNE[:, piece], (x_BnE, out_BHnD), behind)
                grad_BNE[:, piece] = grad_x
            outputs, gradients = [result.out], [grad_out]
            if result.aux_loss is not None and grad_aux is not None and result.aux_loss.requires_grad:
                outputs.append(result.aux_loss)
                gradients.append(grad_aux)
            grad_heads = sums.add(outputs, gradients, heads, core)
            del result, outputs, gradients, grad_out, heads
            for piece in of.pieces(x_BNE):
                x_BnE = x_BNE[:, piece].detach().requires_grad_()
                parts = of.heads(x_BnE, piece)
                (grad_x,) = sums.add(parts, [part[:, piece] for part in grad_heads], (x_BnE,), before)
                grad_BNE[:, piece] += grad_x
        return None, grad_BNE, *sums.gradients()


class _Sums:
    """The gradients of some parameters, summed over calls."""

    def __init__(self, parameters: Iterable[nn.Parameter]):
        self.parameters = list(parameters)
        self.found: dict[int, Tensor] = {}

    def of(self, some: Iterable[nn.Parameter]) -> list[nn.Parameter]:
        """Those of `some` that are among the parameters."""
        ids = {id(p) for p in some}
        return [p for p in self.parameters if id(p) in ids]

    def others(self, *groups: list[nn.Parameter]) -> list[nn.Parameter]:
        ids = {id(p) for group in groups for p in group}
        return [p for p in self.parameters if id(p) not in ids]

    def add(self, outputs, gradients, inputs, parameters: list[nn.Parameter]) -> tuple[Tensor, ...]:
        """The gradients of `inputs`; those of `parameters` are added up here."""
        with torch.autocast(inputs[0].device.type, enabled=False):  # a backward pass runs outside of it
            found = torch.autograd.grad(outputs, (*inputs, *parameters), gradients, allow_unused=True)
        for parameter, gradient in zip(parameters, found[len(inputs) :], strict=True):
            if gradient is not None:
                held = self.found.get(id(parameter))
                self.found[id(parameter)] = gradient if held is None else held.add_(gradient)
        pairs = zip(found, inputs, strict=False)
        return tuple(torch.zeros_like(given) if gradient is None else gradient for gradient, given in pairs)

    def gradients(self) -> list[Tensor | None]:
        return [self.found.get(id(parameter)) for parameter in self.parameters]


def _autocast(ctx) -> torch.autocast:
    """Autocast as in the forward pass, without its cache: a cast made without gradients must not be met again."""
    device, dtype, enabled = ctx.autocast
    return torch.autocast(device, dtype=dtype, enabled=enabled, cache_enabled=False)
