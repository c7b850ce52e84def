"""Inputs, layouts and the comparison that the kernel tests share. `reference` is the truth; it has tests of its own."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lightsparse.kernels import Dropout, block_sparse_attention_with_lse, sample_keys
from lightsparse.patterns import BlockLayout, ElementMask
from lightsparse.patterns.mask import ALWAYS, NEVER


@dataclass(frozen=True)
class Sizes:
    """One call: B samples, H query heads over Hkv, Nq queries over Nkv keys."""

    batch: int = 2
    heads: int = 4
    kv_heads: int = 2
    nq: int = 63
    nkv: int = 63
    dim: int = 32

    def __str__(self) -> str:
        return f"b{self.batch}-h{self.heads}of{self.kv_heads}-q{self.nq}-k{self.nkv}-d{self.dim}"


@dataclass(frozen=True)
class Tables:
    """A random layout: rows of 0 … `most` blocks, some tables longer than others."""

    batch: int = 1  # 1 or B
    heads: int = 1  # 1, Hkv or H
    q_block: int = 16
    kv_block: int = 16
    most: int = 3
    dense_rows: tuple[int, ...] = ()
    rule: str = "causal"  # causal, both, intervals (random), documents
    seed: int = 0


def random_layout(sizes: Sizes, tables: Tables) -> BlockLayout:
    generator = torch.Generator().manual_seed(tables.seed)
    rows, blocks = -(-sizes.nq // tables.q_block), -(-sizes.nkv // tables.kv_block)
    shape = (tables.batch, tables.heads, rows)
    order = torch.rand(*shape, blocks, generator=generator).argsort(-1)[..., : tables.most]
    count = torch.randint(0, min(tables.most, blocks) + 1, shape, generator=generator)
    kept = torch.arange(order.shape[-1]) < count[..., None]
    dense = torch.tensor(tables.dense_rows, dtype=torch.int32)
    kept &= ~torch.isin(torch.arange(rows), dense)[:, None]
    ids = torch.where(kept, order, blocks).sort(-1).values
    table = torch.where(ids == blocks, -1, ids).to(torch.int32)
    return BlockLayout(table, tables.q_block, tables.kv_block, _rule(sizes, tables.rule, generator), dense)


def _rule(sizes: Sizes, rule: str, generator: torch.Generator) -> ElementMask:
    key = torch.arange(sizes.nkv, dtype=torch.int32)[None]
    query = key[:, sizes.nkv - sizes.nq :]
    opens, closes = torch.full_like(key, NEVER), torch.full_like(key, ALWAYS)
    if rule == "both":
        return ElementMask(query, opens, closes, causal=False)
    if rule == "causal":
        return ElementMask(query, key, closes)
    if rule == "intervals":  # every sample its own, some never open
        opens = torch.randint(-5, sizes.nkv, (sizes.batch, sizes.nkv), generator=generator, dtype=torch.int32)
        length = torch.randint(0, sizes.nkv, (sizes.batch, sizes.nkv), generator=generator, dtype=torch.int32)
        return ElementMask(query, opens, opens + length, causal=False)
    assert rule == "documents"
    ids = (torch.rand(sizes.batch, sizes.nkv, generator=generator) < 0.05).cumsum(1).to(torch.int32)
    return ElementMask(query, key, closes, ids[:, sizes.nkv - sizes.nq :], ids)


def finest(backend: str) -> tuple[torch.dtype, float]:
    """The most exact dtype a backend takes, and how far it may be from the reference then."""
    return (torch.float32, 1e-5) if backend == "native" else (torch.float64, 1e-10)


def fitting(backend: str, layout: BlockLayout) -> BlockLayout:
    """The layout in the form that the backend takes: `per_query` wants a row per query."""
    return layout.per_token(0, layout.num_queries) if backend == "per_query" else layout


def with_dense_mask(layout: BlockLayout, dense: Tensor) -> BlockLayout:
    return replace(layout, mask=replace(layout.mask, dense=dense))


def inputs(sizes: Sizes, dtype: torch.dtype = torch.float32, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def normal(heads: int, tokens: int) -> Tensor:
        shape = (sizes.batch, heads, tokens, sizes.dim)
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()

    return normal(sizes.heads, sizes.nq), normal(sizes.kv_heads, sizes.nkv), normal(sizes.kv_heads, sizes.nkv)


def dropout(sizes: Sizes, rate: float = 0.3, seed: int = 0) -> Dropout:
    return Dropout(rate, sample_keys(seed, 1, torch.arange(sizes.batch)))


def results(
    backend: str, qkv: tuple[Tensor, ...], layout: BlockLayout, *, bias: Tensor | None = None, **options
) -> dict[str, Tensor]:
    """Output, lse and the gradients of all inputs, for output and lse gradients that are the same on every call."""
    own = bias
    if backend == "per_query" and bias is not None:
        own = bias[:, :, torch.arange(layout.num_queries) // layout.q_block]
    layout = fitting(backend, layout)
    out, lse = block_sparse_attention_with_lse(*qkv, layout, block_bias=own, backend=backend, **options)
    generator = torch.Generator().manual_seed(7)
    of_out, of_lse = (torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x.dtype) for x in (out, lse))
    of_lse = of_lse.masked_fill(lse == float("-inf"), 0.0)
    wanted = {"q": qkv[0], "k": qkv[1], "v": qkv[2]} | ({} if bias is None else {"block_bias": bias})
    grads = torch.autograd.grad((out, lse), list(wanted.values()), (of_out, of_lse))
    named = {f"gradient of {name}": grad for name, grad in zip(wanted, grads, strict=True)}
    return {"out": out.detach(), "lse": lse.detach(), **named}


def assert_equal_results(found: dict[str, Tensor], wanted: dict[str, Tensor], tolerance: float) -> None:
    assert found.keys() == wanted.keys()
    for name in found:
        assert found[name].dtype == wanted[name].dtype, name
        torch.testing.assert_close(
            found[name], wanted[name], rtol=tolerance, atol=tolerance, msg=lambda text, name=name: f"{name}: {text}"
        )


def assert_equals_reference(
    backend: str, qkv: tuple[Tensor, ...], layout: BlockLayout, *, tolerance: float = 1e-5, **options
) -> dict[str, Tensor]:
    found = results(backend, qkv, layout, **options)
    assert_equal_results(found, results("reference", qkv, layout, **options), tolerance)
    return found
