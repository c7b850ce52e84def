"""`triton` equals `reference` in Triton's interpreter, outputs, lse and all gradients; its accesses are in bounds."""

from __future__ import annotations

import pytest
import torch
from interpreted import guarded
from kernel_cases import (
    Sizes,
    Tables,
    assert_equal_results,
    assert_equals_reference,
    dropout,
    inputs,
    random_layout,
    results,
)

from lightsparse.kernels import block_sparse_attention
from lightsparse.kernels.triton import call
from lightsparse.patterns import GlobalTokens, LocalWindow, Strided

pytestmark = pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
FINE = torch.float64


def compare(sizes: Sizes, tables: Tables, *, tolerance: float = 1e-10, dtype: torch.dtype = FINE, **options) -> None:
    assert_equals_reference(
        "triton", inputs(sizes, dtype), random_layout(sizes, tables), tolerance=tolerance, **options
    )


def bias_for(sizes: Sizes, tables: Tables, batch: int = 1, heads: int | None = None) -> torch.Tensor:
    shape = random_layout(sizes, tables).kv_indices.shape
    generator = torch.Generator().manual_seed(4)
    of_heads = sizes.heads if heads is None else heads
    return torch.randn(batch, of_heads, *shape[2:], generator=generator, dtype=FINE).requires_grad_()


@pytest.mark.parametrize("rule", ["causal", "both", "documents", "intervals"])
@pytest.mark.parametrize("table_heads", ["1", "Hkv", "H"])
@pytest.mark.parametrize("q_block", [16, 1])
def test_tables_of_every_shape_under_every_rule(q_block, table_heads, rule):
    sizes = Sizes(batch=2, heads=4, kv_heads=2, nq=18, nkv=35, dim=16)
    heads = {"1": 1, "Hkv": sizes.kv_heads, "H": sizes.heads}[table_heads]
    batch = 1 + (rule in ("both", "documents"))
    compare(sizes, Tables(batch, heads, q_block, 16, most=3, rule=rule, seed=batch))


@pytest.mark.parametrize("group", [1, 3, 4, 8, 16])
@pytest.mark.parametrize("q_block", [1, 16])
def test_groups_of_any_size(group, q_block):
    sizes = Sizes(batch=1, heads=group, kv_heads=1, nq=7, nkv=40, dim=16)
    for table_heads in {1, group}:
        compare(sizes, Tables(1, table_heads, q_block, 16, most=3, rule="causal"))


@pytest.mark.parametrize("dim", [32, 64, 80, 128, 256])
@pytest.mark.parametrize("q_block", [1, 16])
def test_head_dims(dim, q_block):
    compare(Sizes(batch=1, heads=2, kv_heads=1, nq=18, nkv=40, dim=dim), Tables(1, 1, q_block, 16, most=3))


@pytest.mark.parametrize(("q_block", "kv_block"), [(16, 48), (20, 16), (64, 64), (128, 32), (8, 16), (1, 32), (1, 128)])
def test_blocks_need_neither_be_equal_nor_divide_the_length(q_block, kv_block):
    sizes = Sizes(batch=1, heads=2, kv_heads=1, nq=20 if q_block == 1 else 63, nkv=63, dim=16)
    compare(sizes, Tables(1, 1, q_block, kv_block, most=4, rule="documents"))


@pytest.mark.parametrize("dense_rows", [(0,), (1, 3)])
@pytest.mark.parametrize("table_heads", [1, 2, 4])
def test_dense_rows_are_rows_like_others(table_heads, dense_rows):
    sizes = Sizes(batch=1, heads=4, kv_heads=2, nq=63, nkv=63, dim=16)
    tables = Tables(1, table_heads, 16, 16, most=2, dense_rows=dense_rows)
    compare(sizes, tables, bias=bias_for(sizes, tables))


def test_dense_rows_among_single_queries_of_many_heads():
    compare(Sizes(1, 16, 1, 12, 40, 16), Tables(1, 1, 1, 16, dense_rows=(1, 3)))


@pytest.mark.parametrize(("bias_batch", "bias_heads"), [(1, 1), (1, 2), (2, 4), (2, 1)])
@pytest.mark.parametrize("q_block", [16, 1])
def test_a_block_bias_and_its_gradient(q_block, bias_batch, bias_heads):
    sizes = Sizes(batch=2, heads=4, kv_heads=2, nq=18, nkv=35, dim=16)
    tables = Tables(1, {1: 2, 2: 4, 4: 1}[bias_heads], q_block, 16, most=3)
    compare(sizes, tables, bias=bias_for(sizes, tables, bias_batch, bias_heads))


@pytest.mark.parametrize("q_block", [16, 1])
@pytest.mark.parametrize("table_heads", [1, 2, 4])
def test_dropout_drops_what_the_reference_drops(table_heads, q_block):
    sizes = Sizes(batch=2, heads=4, kv_heads=2, nq=18, nkv=35, dim=16)
    tables = Tables(1, table_heads, q_block, 16, most=3)
    compare(sizes, tables, dropout=dropout(sizes), bias=bias_for(sizes, tables))


@pytest.mark.parametrize(("most", "q_block"), [(0, 16), (0, 1), (2, 16), (2, 1)])
def test_rows_with_nothing_to_read_are_zero(most, q_block):
    sizes = Sizes(batch=1, heads=4, kv_heads=2, nq=20, nkv=35, dim=16)
    tables = Tables(1, 2, q_block, 16, most=most, rule="intervals")
    layout = random_layout(sizes, tables)
    empty = ~layout.to_dense().any(-1).repeat_interleave(2, 1)
    assert empty.any()
    found = assert_equals_reference("triton", inputs(sizes, FINE), layout, tolerance=1e-10)
    assert (found["out"][empty] == 0).all() and (found["gradient of q"][empty] == 0).all()


@pytest.mark.parametrize("q_block", [16, 1])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 4e-2), (torch.float16, 5e-3)])
def test_other_dtypes(dtype, tolerance, q_block):
    compare(Sizes(1, 4, 2, 18, 35, 32), Tables(1, 2, q_block, 16, most=3), dtype=dtype, tolerance=tolerance)


@pytest.mark.parametrize("q_block", [16, 1])
def test_the_queries_of_a_decoding_step(q_block):
    compare(Sizes(batch=2, heads=4, kv_heads=2, nq=1, nkv=40, dim=16), Tables(1, 1, q_block, 16, most=3))


@pytest.mark.parametrize("q_block", [16, 1])
def test_long_columns_are_cut_and_heads_taken_in_portions_without_changing_a_bit(q_block, monkeypatch):
    """But for those of keys, whose sums are taken in another order."""
    sizes = Sizes(batch=1, heads=4, kv_heads=2, nq=20, nkv=35, dim=16)
    layout = random_layout(sizes, Tables(1, 4, q_block, 16, most=3))
    found = results("triton", inputs(sizes, FINE), layout)
    monkeypatch.setattr(call, "_SEGMENT", 1)
    monkeypatch.setattr(call, "_PART_BYTES", 1)
    monkeypatch.setattr(call.Call, "_longest", lambda self, rows: 1)
    cut = results("triton", inputs(sizes, FINE), random_layout(sizes, Tables(1, 4, q_block, 16, most=3)))
    assert torch.equal(found["out"], cut["out"]) and torch.equal(found["gradient of q"], cut["gradient of q"])
    assert_equal_results(found, cut, 1e-12)
    if q_block == 1:  # of two rows the order does not matter
        assert not torch.equal(found["gradient of k"], cut["gradient of k"])


@pytest.mark.parametrize("q_block", [16, 1])
def test_the_same_bits_every_time(q_block):
    sizes = Sizes(batch=1, heads=4, kv_heads=2, nq=18, nkv=35, dim=16)
    layout = random_layout(sizes, Tables(1, 2, q_block, 16, most=3))
    first, second = (results("triton", inputs(sizes, torch.float32), layout) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize(
    ("sizes", "tables"),
    [
        (Sizes(2, 4, 2, 35, 35, 16), Tables(1, 1, 16, 16, most=3, rule="documents", dense_rows=(1,))),
        (Sizes(2, 4, 2, 35, 35, 24), Tables(2, 4, 20, 48, most=3, rule="intervals")),
        (Sizes(1, 4, 2, 18, 35, 24), Tables(1, 4, 1, 16, most=3, rule="intervals")),
        (Sizes(1, 16, 1, 9, 40, 16), Tables(1, 1, 1, 16, most=3, rule="causal", dense_rows=(3,))),
        (Sizes(1, 3, 1, 20, 40, 16), Tables(1, 1, 1, 32, most=3, rule="causal")),
    ],
)
def test_every_access_is_inside_its_tensor_and_programs_do_not_meet(sizes, tables, monkeypatch):
    monkeypatch.setattr(call.Call, "_longest", lambda self, rows: 2)  # several segments for a block
    layout, bias = random_layout(sizes, tables), bias_for(sizes, tables)
    with guarded() as launches:
        results("triton", inputs(sizes), layout, bias=bias, dropout=dropout(sizes))
    assert {launch.name for launch in launches} >= {"columns_backward", "add_segments"}
    assert all(launch.read and launch.written for launch in launches)


@pytest.mark.parametrize("fault", ["outside", "twice", "another's"])
def test_the_guard_sees_a_fault(fault):
    import triton
    import triton.language as tl

    @triton.jit
    def kernel(x, y, FAULT: tl.constexpr):
        program = tl.program_id(0)
        if FAULT == "outside":
            tl.store(y + program, tl.load(x + 4 * program))
        if FAULT == "twice":
            tl.store(y + program // 2, tl.load(x + program))
        if FAULT == "another's":
            tl.store(y + program, tl.load(y + (program + 1) % 4))

    messages = {"outside": "outside every tensor", "twice": "write one address", "another's": "reads what"}
    with guarded(), pytest.raises(Exception, match=messages[fault]):
        kernel[(4,)](torch.zeros(4), torch.zeros(4), FAULT=fault)


@pytest.mark.slow
@pytest.mark.parametrize("q_block", [64, 1])
@pytest.mark.parametrize("packed", [False, True])
def test_patterns_at_some_hundred_tokens(packed, q_block):
    sizes = Sizes(batch=2, heads=4, kv_heads=2, nq=363, nkv=363, dim=32)
    ids = torch.stack([torch.arange(363) // 100, torch.arange(363) // 77]).int() if packed else None
    pattern = LocalWindow(100) | GlobalTokens(4) | Strided(4)
    layout = pattern.layout(363, block=64, heads=4, kv_heads=2, documents=ids)
    if q_block == 1:
        layout = layout.per_token(0, 363)
    assert_equals_reference("triton", inputs(sizes, FINE), layout, tolerance=1e-10)


def test_single_keys_are_left_to_per_query():
    sizes = Sizes(1, 2, 1, 20, 20, 16)
    layout = random_layout(sizes, Tables(1, 1, 1, 1, most=3))
    with pytest.raises(
        ValueError, match='backend "triton" takes key blocks in multiples of 16, not of 1; use backend='
    ):
        block_sparse_attention(*inputs(sizes), layout, backend="triton")
