"""The two wide steps of a long sequence, the MLP and the loss, in chunks of tokens.

A residual stream of T tokens takes T · E numbers. The MLP's intermediates take about 11 · T · E and the logits T · V;
here they exist for one chunk at a time, forward and backward.

Shapes: T tokens of all sequences, E embed_dim, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import FunctionCtx
from torch.utils.checkpoint import checkpoint

from lightsparse.kernels.compute_dtype import as_autocast, keeps_fp32

IGNORED = -100  # label of a token that has no loss


def map_chunks(function: Callable[[Tensor], Tensor], x_BNE: Tensor, chunk: int, *, recompute: bool) -> Tensor:
    """function(x), for a function of single tokens, over at most `chunk` tokens at a time.

    Several chunks are recomputed in the backward pass: it costs a second forward without the last matrix product, and
    without it the intermediates of all chunks would stay. One chunk is kept, unless `recompute`.
    """
    num_tokens = x_BNE.shape[0] * x_BNE.shape[1]
    chunks = max(1, -(-num_tokens // chunk))
    if torch.is_grad_enabled() and (chunks > 1 or recompute):
        # Measured (E 512, MLP 1408, 8192 tokens, chunk 2048, one thread): 1.08 × the time without chunks. A custom
        # autograd.Function with the same recompute, written out by hand, was not faster.
        run: Callable[[Tensor], Tensor] = partial(checkpoint, function, use_reentrant=False, preserve_rng_state=False)
    else:
        run = function
    if chunks == 1:
        return run(x_BNE)
    pieces = x_BNE.flatten(0, 1).split(-(-num_tokens // chunks))  # of equal size: no small rest
    return torch.cat([run(piece_TE) for piece_TE in pieces]).view_as(x_BNE)


def cross_entropy_sum(hidden_TE: Tensor, weight_VE: Tensor, labels_T: Tensor, chunk: int) -> Tensor:
    """Sum over labels ≠ −100 of −log softmax(hidden · weightᵀ)[label], in nats: fp32 scalar with gradients.

    F.linear_cross_entropy (torch 2.13) has the same chunks and takes the same time and memory in fp32 on CPU (0.22 s
    against 0.20 s for 16384 × 512 × 256). But its sum comes back in the inputs' dtype, in bf16 with three digits, it
    does not follow autocast, and in bf16 it takes twice the time of plain products. Hence this loop.
    """
    if not torch.is_grad_enabled():
        return token_cross_entropy(hidden_TE, weight_VE, labels_T, chunk).sum()
    rows = _few_asked(labels_T)
    if rows is not None:
        hidden_TE, labels_T = hidden_TE[rows], labels_T[rows]
    hidden_TE, weight_VE = _autocast(hidden_TE), _autocast(weight_VE)
    with torch.autocast(hidden_TE.device.type, enabled=False):
        return _CrossEntropySum.apply(hidden_TE, weight_VE, labels_T, chunk)


@torch.no_grad()
def token_cross_entropy(hidden_TE: Tensor, weight_VE: Tensor, labels_T: Tensor, chunk: int) -> Tensor:
    """−log softmax(hidden · weightᵀ)[label] of every token in nats, 0 where it is −100: fp32 [T], no gradient."""
    rows = _few_asked(labels_T)
    if rows is not None:
        few = token_cross_entropy(hidden_TE[rows], weight_VE, labels_T[rows], chunk)
        return few.new_zeros(len(labels_T)).index_put((rows,), few)
    losses = [
        F.cross_entropy(F.linear(piece_TE, weight_VE).float(), piece_T, ignore_index=IGNORED, reduction="none")
        for piece_TE, piece_T in zip(hidden_TE.split(chunk), labels_T.split(chunk), strict=True)
    ]
    return torch.cat(losses)


def _few_asked(labels_T: Tensor) -> Tensor | None:
    """The tokens with a label, where they are less than half of all (masked tokens, a task's answers), else None.

    The others need no logits, which are most of the work of a small model with a large vocabulary.
    """
    rows = (labels_T != IGNORED).nonzero().squeeze(1)
    return rows if 2 * len(rows) < len(labels_T) else None


class _CrossEntropySum(torch.autograd.Function):
    """Takes the gradient while a chunk's logits exist, in the forward pass, so that nothing is computed twice.

    d loss / d logits = softmax(logits) − onehot(label), 0 for ignored tokens.
    """

    @staticmethod
    def forward(ctx: FunctionCtx, hidden_TE: Tensor, weight_VE: Tensor, labels_T: Tensor, chunk: int) -> Tensor:
        loss = torch.zeros((), dtype=torch.float32, device=hidden_TE.device)
        grad_hidden_TE = torch.empty_like(hidden_TE)
        grad_weight_VE = torch.zeros_like(weight_VE, dtype=torch.float32)
        pieces = zip(hidden_TE.split(chunk), labels_T.split(chunk), grad_hidden_TE.split(chunk), strict=True)
        for piece_TE, label_T, grad_TE in pieces:
            logp_TV = F.linear(piece_TE, weight_VE).log_softmax(-1, dtype=torch.float32)
            loss += F.nll_loss(logp_TV, label_T, ignore_index=IGNORED, reduction="sum")
            label_T1 = label_T[:, None].clamp(min=0)
            grad_TV = logp_TV.exp_().scatter_add_(1, label_T1, -torch.ones_like(label_T1, dtype=torch.float32))
            grad_TV = grad_TV.mul_((label_T != IGNORED)[:, None]).to(weight_VE.dtype)
            torch.mm(grad_TV, weight_VE, out=grad_TE)
            grad_weight_VE += grad_TV.T @ piece_TE
        ctx.save_for_backward(grad_hidden_TE, grad_weight_VE.to(weight_VE.dtype))
        return loss

    @staticmethod
    def backward(ctx, grad_loss: Tensor):
        grad_hidden_TE, grad_weight_VE = ctx.saved_tensors
        return grad_hidden_TE * grad_loss, grad_weight_VE * grad_loss, None, None


def _autocast(x: Tensor) -> Tensor:
    """x in the dtype that a matrix product gets here under autocast."""
    return x.float() if keeps_fp32(x.device) else as_autocast(x)
