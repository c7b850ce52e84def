"""Which backend serves a call, what it says when it cannot, and that a layout taken for dense is dense."""

import logging
from dataclasses import replace

import pytest
import torch
from kernel_cases import Sizes, Tables, dropout, fitting, inputs, random_layout, results, with_dense_mask

from lightsparse.kernels import (
    BACKENDS,
    Dropout,
    block_sparse_attention,
    block_sparse_attention_with_lse,
    dispatch,
    sample_keys,
    sdpa,
    use_backend,
)
from lightsparse.kernels.native import call as native_call
from lightsparse.patterns import BlockLayout, GlobalTokens, LocalWindow, Strided, interval_mask
from lightsparse.patterns.layout import no_dense_rows

SIZES = Sizes(dim=16)
DENSE = LocalWindow(63).layout(63, block=16)
SPARSE = LocalWindow(20).layout(63, block=16)
EVERYTHING = GlobalTokens(63).layout(63, block=16, causal=False)


@pytest.fixture
def served(monkeypatch):
    """The backends called, in order."""
    calls: list[str] = []

    def noted(name, function):
        return function and (lambda *arguments: calls.append(name) or function(*arguments))

    for name, of in list(BACKENDS.items()):
        counted = replace(of, with_lse=noted(name, of.with_lse), alone=noted(name, of.alone))
        monkeypatch.setitem(BACKENDS, name, counted)
    return calls


@pytest.mark.parametrize(
    ("layout", "options", "backend"),
    [
        (DENSE, {}, "sdpa"),
        (EVERYTHING, {}, "sdpa"),
        (SPARSE, {}, "native"),
        (DENSE, {"dropout": dropout(SIZES)}, "native"),
        (DENSE, {"block_bias": torch.zeros(1, 1, 4, 4)}, "native"),
        (LocalWindow(63).layout(63, block=16, documents=(torch.arange(63) // 20)[None]), {}, "native"),
    ],
)
def test_auto_takes_pytorchs_kernel_for_what_is_dense_and_the_compiled_one_for_the_rest(
    served, layout, options, backend
):
    found = block_sparse_attention(*inputs(SIZES), layout, **options)
    exact = block_sparse_attention(*inputs(SIZES), layout, backend="reference", **options)
    assert served == [backend, "reference"]
    torch.testing.assert_close(found, exact, rtol=1e-5, atol=1e-5)


def test_with_the_lse_auto_takes_a_backend_that_has_one(served):
    found = block_sparse_attention_with_lse(*inputs(SIZES), DENSE)
    exact = block_sparse_attention_with_lse(*inputs(SIZES), DENSE, backend="reference")
    assert served == ["native", "reference"]
    for a, b in zip(found, exact, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", [name for name in BACKENDS if name not in ("flex", "sdpa")])
def test_the_output_is_the_same_with_and_without_the_lse(name):
    layout = fitting(name, SPARSE)
    out, lse = block_sparse_attention_with_lse(*inputs(SIZES), layout, backend=name)
    assert torch.equal(out, block_sparse_attention(*inputs(SIZES), layout, backend=name))
    assert lse.shape == out.shape[:3]


def test_auto_takes_blocked_where_the_compiled_kernel_cannot_serve(served, monkeypatch):
    masked = with_dense_mask(SPARSE, torch.ones(1, 1, 63, 63, dtype=torch.bool))
    for dtype in (torch.float64, torch.float16):
        block_sparse_attention(*inputs(SIZES, dtype), SPARSE)
    block_sparse_attention(*inputs(SIZES), masked)
    monkeypatch.setattr(native_call, "available", lambda: False)
    block_sparse_attention(*inputs(SIZES), SPARSE)
    assert served == ["blocked"] * 4
    block_sparse_attention(*inputs(SIZES), SPARSE.per_token(0, 63))
    assert served.pop() == "per_query"  # made for rows of single queries


def test_a_named_backend_is_taken_and_use_backend_decides_for_auto_only(served):
    q, k, v = inputs(SIZES)
    for name in ("reference", "blocked", "sdpa"):
        block_sparse_attention(q, k, v, DENSE, backend=name)
    with use_backend("reference"):
        block_sparse_attention(q, k, v, DENSE)
        block_sparse_attention(q, k, v, DENSE, backend="blocked")
        with use_backend("auto"):
            block_sparse_attention(q, k, v, DENSE)
        with pytest.raises(KeyError), use_backend("blocked"):
            raise KeyError
        block_sparse_attention(q, k, v, DENSE)
    block_sparse_attention(q, k, v, DENSE)
    assert served == ["reference", "blocked", "sdpa", "reference", "blocked", "sdpa", "reference", "sdpa"]


def test_the_choice_is_logged_once(caplog, monkeypatch):
    monkeypatch.setattr(dispatch, "_logged", set())
    with caplog.at_level(logging.INFO, logger="lightsparse"):
        for _ in range(3):
            block_sparse_attention(*inputs(SIZES), SPARSE)
            block_sparse_attention(*inputs(SIZES), DENSE)
    assert [record.getMessage() for record in caplog.records] == [
        "attention backend on cpu: native",
        "attention backend on cpu: sdpa",
    ]


def attend(layout: BlockLayout = SPARSE, sizes: Sizes = SIZES, **options):
    return block_sparse_attention(*inputs(sizes), layout, **options)


def with_inputs(change, layout: BlockLayout = SPARSE):
    return block_sparse_attention(*change(*inputs(SIZES)), layout)


def masked(**fields) -> BlockLayout:
    return replace(SPARSE, mask=replace(SPARSE.mask, **fields))


REFUSED = {
    'backend "sdpa" takes only layouts in which every query reads every key it may see; use backend=blocked': lambda: (
        attend(backend="sdpa")
    ),
    'backend "sdpa" takes no block_bias; use backend=blocked': lambda: attend(
        DENSE, backend="sdpa", block_bias=torch.zeros(1, 1, 4, 4)
    ),
    'backend "sdpa" takes no dropout; use backend=blocked': lambda: attend(
        DENSE, backend="sdpa", dropout=dropout(SIZES)
    ),
    'backend "sdpa" returns no differentiable lse; use backend=blocked': lambda: block_sparse_attention_with_lse(
        *inputs(SIZES), DENSE, backend="sdpa"
    ),
    'backend "native" takes no mask.dense; use backend=blocked': lambda: attend(
        masked(dense=torch.zeros(1, 1, 63, 63)), backend="native"
    ),
    'backend "native" takes torch.float32 and torch.bfloat16, not torch.float64; use backend=blocked': lambda: (
        block_sparse_attention(*inputs(SIZES, torch.float64), SPARSE, backend="native")
    ),
    'backend "per_query" takes layouts with a row per query (q_block = 1), and this one has 16; use backend=blocked': (
        lambda: attend(backend="per_query")
    ),
    'backend "per_query" takes no mask.dense; use backend=blocked': lambda: attend(
        masked(dense=torch.zeros(1, 1, 63, 63)), backend="per_query"
    ),
    'backend "blocked" gives mask.dense no gradient; detach it or use backend=reference': lambda: attend(
        masked(dense=torch.zeros(1, 1, 63, 63, requires_grad=True))
    ),
    f"backend is 'fast'; choose auto, {', '.join(BACKENDS)}": lambda: attend(backend="fast"),
    "backend is 'slow'; choose auto": lambda: use_backend("slow").__enter__(),
    "they must be [B, H, Nq, D] and twice [B, Hkv, Nkv, D]": lambda: with_inputs(lambda q, k, v: (q, k, v[:, :1])),
    "q is (2, 4, 63, 16), k (1, 2, 63, 16), v (1, 2, 63, 16)": lambda: with_inputs(lambda q, k, v: (q, k[:1], v[:1])),
    "q is (4, 63, 16), k (2, 2, 63, 16)": lambda: with_inputs(lambda q, k, v: (q[0], k, v)),
    "k (2, 2, 63, 8)": lambda: with_inputs(lambda q, k, v: (q, k[..., :8], v[..., :8])),
    "q has 3 heads and k has 2; the query heads must be a multiple": lambda: with_inputs(
        lambda q, k, v: (q[:, :3], k, v)
    ),
    "q, k, v are torch.float64, torch.float32, torch.float32; they must share": lambda: with_inputs(
        lambda q, k, v: (q.double(), k, v)
    ),
    "q, k, v are torch.int64": lambda: with_inputs(lambda *qkv: [x.long() for x in qkv]),
    "q, k, v are on cpu, meta and cpu; they must share one device": lambda: with_inputs(
        lambda q, k, v: (q, k.to("meta"), v)
    ),
    "the layout is on cpu and q on meta; build it with device=q.device": lambda: with_inputs(
        lambda *qkv: [x.to("meta") for x in qkv]
    ),
    "the layout is for 63 queries and 63 keys; q has 62 and k 63": lambda: with_inputs(
        lambda q, k, v: (q[:, :, 1:], k, v)
    ),
    "the layout's table is for batch 3 and 1 heads": lambda: attend(
        replace(SPARSE, kv_indices=SPARSE.kv_indices.expand(3, -1, -1, -1))
    ),
    "the layout's table is for batch 1 and 3 heads; q, k have batch 2, 4 and 2 heads": lambda: attend(
        replace(SPARSE, kv_indices=SPARSE.kv_indices.expand(-1, 3, -1, -1))
    ),
    "block_bias is (1, 1, 4, 2); it must be [B|1, H|Hkv|1, NQ, K] with NQ, K = (4, 3)": lambda: attend(
        block_bias=torch.zeros(1, 1, 4, 2)
    ),
    "block_bias is (3, 1, 4, 3)": lambda: attend(block_bias=torch.zeros(3, 1, 4, 3)),
    "block_bias is (1, 3, 4, 3)": lambda: attend(block_bias=torch.zeros(1, 3, 4, 3)),
    "dropout.keys has shape (1,); q has batch 2, a key per sample": lambda: attend(
        dropout=Dropout(0.1, sample_keys(0, 0, torch.arange(1)))
    ),
    "mask.q_doc is for batch 4; q has batch 2, of which it takes 1 or all": lambda: attend(
        masked(q_doc=torch.zeros(4, 63, dtype=torch.int32), kv_doc=torch.zeros(4, 63, dtype=torch.int32))
    ),
    "mask.visible_until is for batch 3": lambda: attend(masked(visible_until=torch.full((3, 63), 99))),
    "mask.dense is (1, 2, 63, 63); it must be [B|1, H|1, Nq, Nkv], here with B, H, Nq, Nkv = (2, 4, 63, 63)": lambda: (
        attend(masked(dense=torch.ones(1, 2, 63, 63)))
    ),
    "mask.dense is (1, 1, 63, 62)": lambda: attend(masked(dense=torch.ones(1, 1, 63, 62))),
    "dropout rate is 1.0; it is a share of the weights and must lie in [0, 1)": lambda: Dropout(1.0, torch.zeros(1)),
    "dropout rate is -0.1": lambda: Dropout(-0.1, torch.zeros(1)),
}


@pytest.mark.parametrize("sentence", REFUSED)
def test_what_does_not_fit_is_one_sentence(sentence):
    with pytest.raises(ValueError) as refused:
        REFUSED[sentence]()
    assert sentence in str(refused.value) and "\n" not in str(refused.value)


@pytest.mark.parametrize("backend", ["blocked", "native", "per_query", "reference", "sdpa"])
@pytest.mark.parametrize(
    ("layout", "sizes"),
    [
        (DENSE, SIZES),
        (EVERYTHING, SIZES),
        (DENSE.per_token(62, 63), Sizes(nq=1, dim=16)),
        (EVERYTHING.per_token(20, 40), Sizes(nq=20, dim=16)),
        (LocalWindow(111).layout(111, block=64), Sizes(batch=1, heads=8, kv_heads=1, nq=111, nkv=111, dim=32)),
    ],
    ids=["causal", "both", "decoding", "part", "one-kv-head"],
)
def test_every_backend_is_dense_attention_where_the_layout_is(layout, sizes, backend):
    def grads_of(attention):
        qkv = inputs(sizes)
        out = attention(*qkv)
        generator = torch.Generator().manual_seed(1)
        return out.detach(), *torch.autograd.grad(out, qkv, torch.randn(out.shape, generator=generator))

    fit = fitting(backend, layout)
    found = grads_of(lambda *qkv: block_sparse_attention(*qkv, fit, backend=backend, scale=0.3))
    wanted = grads_of(
        lambda *qkv: torch.nn.functional.scaled_dot_product_attention(
            *qkv, attn_mask=layout.mask.to_dense(), scale=0.3, enable_gqa=True
        )
    )
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def one_too_many_and_one_too_few() -> BlockLayout:
    """Row 1 lists its future block 2 (of no effect), row 3 lacks block 0: the same area as dense attention."""
    table = torch.tensor([[0, -1, -1], [0, 1, 2], [0, 1, 2], [1, 2, 3]], dtype=torch.int32)[None, None]
    return BlockLayout(table, 16, 16, interval_mask(64), no_dense_rows("cpu"))


def one_head_too_many_and_one_too_few() -> BlockLayout:
    table = torch.tensor([[[0, 1], [0, 1]], [[0, -1], [0, 1]]], dtype=torch.int32)[None]
    return BlockLayout(table, 16, 16, interval_mask(32), no_dense_rows("cpu"))


NOT_DENSE = {
    "window": SPARSE,
    "token-exact window": replace(DENSE, mask=interval_mask(63, window=40)),
    "strided": Strided(2).layout(63, block=16, causal=False),
    "documents": LocalWindow(63).layout(63, block=16, documents=(torch.arange(63) // 20)[None]),
    "explicit mask": with_dense_mask(DENSE, torch.ones(1, 1, 63, 63, dtype=torch.bool)),
    "hidden key": replace(
        EVERYTHING, mask=replace(EVERYTHING.mask, visible_from=torch.where(torch.arange(63) == 5, 999, 0)[None])
    ),
    "later queries": DENSE.per_token(40, 63),
    "an earlier query": DENSE.per_token(30, 31),
    "equal area": one_too_many_and_one_too_few(),
    "random": random_layout(SIZES, Tables(1, 2, 16, 16, most=3)),
}


@pytest.mark.parametrize("name", NOT_DENSE)
def test_a_layout_that_leaves_something_out_is_never_taken_for_dense(name):
    assert not sdpa.is_dense(NOT_DENSE[name])


def test_a_block_of_the_future_changes_nothing():
    layout = one_head_too_many_and_one_too_few()
    assert sdpa.is_dense(layout)
    sizes = Sizes(batch=1, heads=2, kv_heads=2, nq=32, nkv=32, dim=8)
    exact = results("reference", inputs(sizes), layout)["out"]
    torch.testing.assert_close(block_sparse_attention(*inputs(sizes), layout).detach(), exact)


@pytest.mark.parametrize(
    "layout",
    [DENSE, EVERYTHING, DENSE.per_token(62, 63), EVERYTHING.per_token(3, 9), LocalWindow(63).layout(63, block=64)],
    ids=["causal", "both", "last query", "any queries", "one block"],
)
def test_a_layout_that_leaves_nothing_out_is_taken_for_dense(layout):
    assert sdpa.is_dense(layout)
