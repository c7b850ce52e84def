"""What is particular to the compiled kernel: its instruction sets, exp, dropout bits, threads, decoding."""

from dataclasses import replace

import pytest
import torch
from kernel_cases import Sizes, Tables, assert_equals_reference, dropout, inputs, random_layout, results

from lightsparse.kernels import block_sparse_attention, block_sparse_attention_with_lse
from lightsparse.kernels.dropout import keep_scale
from lightsparse.kernels.native import build
from lightsparse.patterns import BlockLayout, ElementMask, GlobalTokens, LocalWindow
from lightsparse.patterns.mask import ALWAYS


@pytest.mark.parametrize("dim", [16, 24, 40, 64, 72, 80, 100, 128, 5])
def test_any_head_dim(dim):
    sizes = Sizes(batch=1, heads=4, kv_heads=2, nq=70, nkv=70, dim=dim)
    for kv_block in (24, 4):  # packed ahead, gathered
        layout = random_layout(sizes, Tables(1, 2, 32, kv_block, most=4, rule="both"))
        assert_equals_reference("native", inputs(sizes), layout)


@pytest.mark.parametrize(("q_block", "kv_block"), [(100, 200), (200, 100), (300, 16), (130, 130), (7, 300)])
def test_blocks_larger_than_the_tiles_of_the_kernel(q_block, kv_block):
    sizes = Sizes(batch=1, heads=8, kv_heads=2, nq=300, nkv=301, dim=16)
    for rule in ("causal", "documents", "intervals"):
        tables = Tables(1, 2, q_block, kv_block, most=6, rule=rule, dense_rows=(0,))
        assert_equals_reference("native", inputs(sizes), random_layout(sizes, tables))


@pytest.mark.parametrize("capability", ["AVX512", "AVX2", "DEFAULT"])
def test_every_instruction_set_and_compiler_gives_the_same_answer(capability, compiler, monkeypatch):
    order = ["DEFAULT", "AVX2", "AVX512"]
    here = torch.backends.cpu.get_cpu_capability()
    if here not in order or order.index(capability) > order.index(here):
        capability = "DEFAULT"  # what this machine cannot run is tested on those that can
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    loaded = build.load(build.build(compiler))
    monkeypatch.setattr(build, "library", lambda: loaded)
    for sizes in (Sizes(batch=1, nq=100, nkv=100, dim=64), Sizes(batch=1, nq=50, nkv=50, dim=24)):
        layout = random_layout(sizes, Tables(1, 2, 32, 16, most=4, rule="documents"))
        assert_equals_reference("native", inputs(sizes), layout, dropout=dropout(sizes))


def test_weights_from_all_to_nothing_are_exact():
    """One key each: the weight against a second key of score 0 is the logistic function, over all of exp's range."""
    scores = torch.linspace(-120, 120, 4801, dtype=torch.float64)
    q = scores.float()[None, None, :, None].contiguous()
    k = torch.tensor([1.0, 0.0])[None, None, :, None]
    v = torch.tensor([1.0, 0.0])[None, None, :, None]
    layout = random_layout(Sizes(1, 1, 1, 1, 2, 1), Tables(rule="both", q_block=1, kv_block=1))
    mask = replace(layout.mask, q_pos=torch.zeros(1, 4801, dtype=torch.int32))
    table = torch.tensor([0, 1], dtype=torch.int32).expand(1, 1, 4801, 2).contiguous()
    layout = replace(layout, kv_indices=table, mask=mask)
    out, lse = block_sparse_attention_with_lse(q, k, v, layout, scale=1.0, backend="native")
    exact = torch.sigmoid(q.double().flatten())
    normal = exact > 1e-37
    torch.testing.assert_close(out.flatten().double()[normal], exact[normal], rtol=5e-7, atol=0)
    assert out.flatten()[~normal].abs().max() <= 1e-37
    right = torch.logaddexp(q.double().flatten(), torch.zeros(()).double())
    torch.testing.assert_close(lse.flatten().double(), right, rtol=3e-7, atol=3e-7)


def test_a_value_that_is_no_number_is_not_hidden():
    sizes = Sizes(batch=1, heads=1, kv_heads=1, nq=64, nkv=64, dim=16)
    q, k, v = (x.detach().clone() for x in inputs(sizes))
    layout = LocalWindow(16).layout(64, block=16)
    q[0, 0, 20, 3] = k[0, 0, 40, 1] = float("nan")
    out = block_sparse_attention(q, k, v, layout, backend="native")
    touched = layout.to_dense()[0, 0, :, 40] | (torch.arange(64) == 20)
    assert 2 < touched.sum() < 40
    assert torch.equal(out.isnan().any(-1)[0, 0], touched)


@pytest.mark.parametrize("q_block", [32, 1])
@pytest.mark.parametrize("factor", [1e4, 1e8])
def test_a_row_that_is_much_larger_takes_no_bits_from_the_others(factor, q_block):
    """Of v the last one, of the output's gradient the first: each row's error against fp64, relative to that row."""
    torch.manual_seed(0)
    q, k, v, grad = torch.randn(4, 1, 2, 160, 64).bfloat16()
    v[:, :, -1] *= factor
    grad[:, :, 0] *= factor
    layout = random_layout(Sizes(1, 2, 2, 160, 160, 64), Tables(1, 1, q_block, 32, most=5, rule="causal"))
    for rows in (slice(0, -1), slice(1, None)):  # without either, so that one large factor at a time meets the rest
        found = []
        for dtype, backend in ((torch.bfloat16, "native"), (torch.float64, "reference")):
            leaves = [x.to(dtype).clone().requires_grad_() for x in (q, k, v)]
            out = block_sparse_attention(*leaves, layout, backend=backend)
            assert isinstance(out, torch.Tensor)
            (out * grad.to(dtype))[:, :, rows].sum().backward()
            found.append([out.detach()[:, :, :-1], leaves[2].grad[:, :, 1:]])
        for name, ours, exact in zip(("out", "dv"), *found, strict=True):
            error = (ours.double() - exact).norm(dim=-1) / exact.norm(dim=-1).clamp(min=1e-30)
            assert error.max() < 0.02, (name, error.max())


@pytest.mark.parametrize("factor", [1e-30, 1e-12, 1e12, 1e30])
def test_numbers_as_large_and_as_small_as_bf16_has_them(factor):
    torch.manual_seed(0)
    q, k, v, grad = torch.randn(4, 1, 2, 130, 64).bfloat16()
    layout = LocalWindow(100).layout(130, block=32)
    for large in (v, grad):
        large *= factor
        found = []
        for dtype, backend in ((torch.bfloat16, "native"), (torch.float64, "reference")):
            leaves = [x.to(dtype).clone().requires_grad_() for x in (q, k, v)]
            out = block_sparse_attention(*leaves, layout, backend=backend)
            assert isinstance(out, torch.Tensor)
            out.backward(grad.to(dtype))
            found.append([out.detach(), *(x.grad for x in leaves)])
        for name, ours, exact in zip(("out", "dq", "dk", "dv"), *found, strict=True):
            assert (ours.double() - exact).norm() < 0.01 * exact.norm(), name
        large /= factor


@pytest.mark.parametrize("kv_block", [16, 4])
def test_dropout_decides_bit_by_bit_as_keep_scale_does(kv_block):
    """With values that are rows of the identity, the output is the weights: zero exactly where one is dropped."""
    sizes = Sizes(batch=2, heads=4, kv_heads=2, nq=48, nkv=48, dim=48)
    q, k, v = (x.detach().clone() for x in inputs(sizes))
    v.copy_(torch.eye(48).expand_as(v))
    layout = GlobalTokens(48).layout(48, block=kv_block, causal=False)
    for ids in (None, torch.randint(0, 1 << 40, (48,))):
        drop = replace(dropout(sizes, 0.4), key_ids=ids)
        out = block_sparse_attention(0.1 * q, k, v, layout, dropout=drop, backend="native")
        kept = keep_scale(drop, torch.arange(4), layout.mask.q_pos, torch.arange(48)[None, None], torch.float32)
        assert torch.equal(out != 0, kept != 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("heads", [(3, 3), (6, 2), (1, 1)])
def test_two_threads_repeat_their_bits_and_agree_with_one(threads, heads, dtype):
    sizes = Sizes(batch=1, heads=heads[0], kv_heads=heads[1], nq=500, nkv=500, dim=64)
    layout = (LocalWindow(200) | GlobalTokens(4)).layout(500, block=32, heads=heads[0], kv_heads=heads[1])
    options = {"dropout": dropout(sizes), "bias": torch.randn(1, 1, *layout.kv_indices.shape[2:]).requires_grad_()}
    threads(1)
    one = results("native", inputs(sizes, dtype), layout, **options)
    threads(2)
    two, again = (results("native", inputs(sizes, dtype), layout, **options) for _ in range(2))
    tolerance = 2e-5 if dtype == torch.float32 else 2e-2
    for name in one:
        assert torch.equal(two[name], again[name]), name
        torch.testing.assert_close(two[name], one[name], rtol=tolerance, atol=tolerance)
    assert torch.equal(one["out"], two["out"])  # a row's sums do not depend on who computes it


def test_decoding_one_query_gives_the_row_of_the_whole():
    sizes = Sizes(batch=2, heads=4, kv_heads=2, nq=300, nkv=300, dim=32)
    q, k, v = (x.detach() for x in inputs(sizes))
    layout = (LocalWindow(60) | GlobalTokens(4)).layout(300, block=16, heads=4, kv_heads=2)
    whole = block_sparse_attention(q, k, v, layout, backend="native")
    for at in (0, 17, 255, 299):
        row = block_sparse_attention(q[:, :, at : at + 1], k, v, layout.per_token(at, at + 1), backend="native")
        torch.testing.assert_close(row, whole[:, :, at : at + 1], rtol=1e-5, atol=1e-5)


def test_no_queries_and_no_keys():
    empty = torch.zeros(1, 2, 0, 16)
    full = torch.randn(1, 2, 32, 16)
    layout = LocalWindow(16).layout(32, block=16)
    none = replace(
        layout,
        kv_indices=layout.kv_indices[:, :, :0],
        mask=layout.mask.queries(0, 0),
    )
    keys = full.clone().requires_grad_()
    out = block_sparse_attention(empty, keys, keys, none, backend="native")
    assert out.shape == (1, 2, 0, 16)
    assert torch.equal(torch.autograd.grad(out.sum(), keys)[0], torch.zeros_like(keys))


@pytest.mark.parametrize("kind", ["normal", "large scores", "uneven channels", "tiny gradients"])
@pytest.mark.parametrize("dim", [64, 96, 128, 40])
def test_bf16_errs_no_more_than_dense_attention_in_bf16(dim, kind):
    """Output and gradients. Where the CPU can, some products are in fp16 (head dims that are multiples of 32)."""
    n = 700
    q, k, v = (x.detach().float() for x in inputs(Sizes(batch=1, heads=2, kv_heads=2, nq=n, nkv=n, dim=dim)))
    grad = torch.randn(q.shape, generator=torch.Generator().manual_seed(5))
    if kind == "large scores":
        q *= 8
    elif kind == "uneven channels":
        k[..., 3] *= 200
        q[..., 3] *= 0.01
        v[..., 5] *= 1000
        grad[..., 5] *= 0.001
    elif kind == "tiny gradients":
        grad *= 1e-8
    q, k, v, grad = (x.bfloat16() for x in (q, k, v, grad))
    layout = LocalWindow(n).layout(n, block=64)

    def outcome(attend, dtype):
        given = [x.detach().to(dtype).requires_grad_() for x in (q, k, v)]
        out = attend(*given)
        return [x.double() for x in (out.detach(), *torch.autograd.grad(out, given, grad.to(dtype)))]

    def dense(*given):
        return torch.nn.functional.scaled_dot_product_attention(*given, is_causal=True)

    exact, usual = outcome(dense, torch.float64), outcome(dense, torch.bfloat16)
    ours = outcome(lambda *given: block_sparse_attention(*given, layout, backend="native"), torch.bfloat16)
    for name, found, of_dense, wanted in zip(["out", "q", "k", "v"], ours, usual, exact, strict=True):
        assert (found - wanted).norm() <= 1.01 * (of_dense - wanted).norm(), name


def _rule_with_edges(rule: str, sizes: Sizes) -> ElementMask:
    """Borders of what is visible everywhere: within tiles, at no multiple of anything, with holes."""
    generator = torch.Generator().manual_seed(3)
    key = torch.arange(sizes.nkv, dtype=torch.int32)[None]
    query = key[:, sizes.nkv - sizes.nq :]
    always = torch.full_like(key, ALWAYS)

    def numbers(low: int, high: int) -> torch.Tensor:
        return torch.randint(low, high, (sizes.batch, sizes.nkv), generator=generator, dtype=torch.int32)

    if rule == "window":
        return ElementMask(query, key, key + 37)
    if rule == "both sides":
        return ElementMask(query, key - 20, key + 21, causal=False)
    if rule == "intervals":  # short ones, anywhere
        opens = numbers(-5, sizes.nkv)
        return ElementMask(query, opens, opens + numbers(0, 25), causal=False)
    if rule == "neighbours":  # around every 48th position: panels that no row sees between panels that some see
        opens = (key // 16 * 48 % sizes.nkv).expand(sizes.batch, -1) + numbers(0, 9)
        return ElementMask(query, opens, opens + numbers(1, 7), causal=False)
    if rule == "shuffled queries":
        order = torch.randperm(sizes.nq, generator=generator)
        return ElementMask(query[:, order], key, key + 37)
    ids = (torch.rand(sizes.batch, sizes.nkv, generator=generator) < 0.1).cumsum(1).to(torch.int32)
    if rule == "documents":
        return ElementMask(query, key, always, ids[:, sizes.nkv - sizes.nq :], ids)
    assert rule == "documents of both sides"
    return ElementMask(query, key - 30, key + 31, ids[:, sizes.nkv - sizes.nq :], ids, causal=False)


_EDGES = ("window", "both sides", "intervals", "neighbours", "shuffled queries", "documents", "documents of both sides")


def _layout_with_edges(rule: str, sizes: Sizes, q_block: int, kv_block: int) -> BlockLayout:
    """Every row reads every block, so that each border is met."""
    rows, blocks = -(-sizes.nq // q_block), -(-sizes.nkv // kv_block)
    table = torch.arange(blocks, dtype=torch.int32).expand(1, 1, rows, -1).contiguous()
    none = torch.zeros(0, dtype=torch.int32)
    return BlockLayout(table, q_block, kv_block, _rule_with_edges(rule, sizes), none)


@pytest.mark.parametrize(("q_block", "kv_block"), [(64, 64), (100, 48), (32, 200), (128, 16), (7, 20), (1, 64)])
@pytest.mark.parametrize("rule", _EDGES)
def test_what_is_skipped_beside_an_edge_is_hidden(rule, q_block, kv_block):
    """Panels of keys that no row of a group sees are not computed: forward and gradients, with and without extras."""
    sizes = Sizes(batch=2, heads=4, kv_heads=2, nq=203, nkv=211, dim=32)
    layout = _layout_with_edges(rule, sizes, q_block, kv_block)
    bias = torch.randn(1, 2, *layout.kv_indices.shape[2:], generator=torch.Generator().manual_seed(1)).requires_grad_()
    for options in ({}, {"bias": bias, "dropout": dropout(sizes)}):
        # A bias has the gradients of thousands of scores in one sum.
        exact = assert_equals_reference("native", inputs(sizes), layout, tolerance=5e-5, **options)
        rounded = inputs(sizes, torch.bfloat16)
        found = results("native", rounded, layout, **options)
        wanted = results("reference", tuple(x.detach().float().requires_grad_() for x in rounded), layout, **options)
        assert exact["lse"].isfinite().any()
        assert torch.equal(found["lse"].isinf(), wanted["lse"].isinf())
        for name in found.keys() - {"lse"}:
            for ours, right in zip(found[name].float().unbind(1), wanted[name].unbind(1), strict=True):
                assert (ours - right).norm() < 0.02 * right.norm(), name


@pytest.mark.parametrize("where", [0, 1, 2])
def test_a_bf16_input_that_is_no_number_is_not_hidden(where):
    sizes = Sizes(batch=1, heads=1, kv_heads=1, nq=64, nkv=64, dim=32)
    q, k, v = qkv = [x.detach().clone() for x in inputs(sizes, torch.bfloat16)]
    layout = LocalWindow(16).layout(64, block=16)
    qkv[where][0, 0, 20, 3] = float("nan")
    out = block_sparse_attention(q, k, v, layout, backend="native")
    touched = layout.to_dense()[0, 0, :, 20] if where else torch.arange(64) == 20
    assert out.isnan().any(-1)[0, 0, touched].all()


@pytest.mark.parametrize("q_block", [16, 1])
def test_bf16_with_dropout_and_bias_is_fp32_but_for_rounding(q_block):
    sizes = Sizes(1, 4, 2, nq=200, nkv=210, dim=64)
    layout = random_layout(sizes, Tables(1, 2, q_block, 32, most=5, rule="documents", dense_rows=(3,)))
    bias = torch.randn(1, 2, *layout.kv_indices.shape[2:]).requires_grad_()
    given = inputs(sizes, torch.bfloat16)
    found = results("native", given, layout, bias=bias, dropout=dropout(sizes, 0.4))
    exact = tuple(x.detach().float().requires_grad_() for x in given)
    wanted = results("native", exact, layout, bias=bias, dropout=dropout(sizes, 0.4))
    for name in found.keys() - {"lse"}:
        assert (found[name].float() - wanted[name]).norm() < 0.02 * wanted[name].norm(), name


def test_a_table_that_names_keys_which_are_not_there_is_refused_and_not_read() -> None:
    layout = LocalWindow(64).layout(256, block=32)
    layout = replace(layout, kv_indices=layout.kv_indices.clone().fill_(8))
    q = torch.zeros(1, 1, 256, 16)
    with pytest.raises(ValueError, match="kv_indices names key block 8 and the keys have 8 blocks of 32"):
        block_sparse_attention(q, q, q, layout, backend="native")


@pytest.mark.parametrize(("rule", "kv_block"), [("causal", 16), ("both", 24), ("documents", 200), ("intervals", 16)])
@pytest.mark.parametrize(("heads", "kv_heads"), [(2, 2), (4, 2), (8, 1)])
def test_rows_of_single_queries_by_key_block(heads, kv_heads, kv_block, rule, threads):
    """Long enough for the walk by key block, on one thread and with rows cut between threads."""
    sizes = Sizes(2, heads, kv_heads, nq=150, nkv=161, dim=20 if kv_block == 24 else 32)
    for count, table_heads in enumerate(sorted({1, kv_heads, heads}), 1):
        threads(count)
        layout = random_layout(sizes, Tables(2, table_heads, 1, kv_block, most=5, dense_rows=(3, 7), rule=rule))
        bias = torch.randn(2, heads, *layout.kv_indices.shape[2:]).requires_grad_()
        assert_equals_reference("native", inputs(sizes), layout, bias=bias, dropout=dropout(sizes))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_more_rows_than_a_portion_holds(dtype, threads):
    """The walk by key block takes some thousand rows at a time; `per_query` takes others, with the same results."""
    sizes = Sizes(1, 4, 1, nq=2500, nkv=2500, dim=32)
    layout = random_layout(sizes, Tables(1, 4, 1, 64, most=6, rule="documents"))
    wanted = results("per_query", inputs(sizes, dtype), layout)
    tolerance = 2e-2 if dtype == torch.bfloat16 else 1e-5
    for count in (1, 3):
        threads(count)
        found, again = (results("native", inputs(sizes, dtype), layout) for _ in range(2))
        for name in found:
            torch.testing.assert_close(found[name], wanted[name], rtol=tolerance, atol=tolerance)
            assert torch.equal(found[name], again[name])
