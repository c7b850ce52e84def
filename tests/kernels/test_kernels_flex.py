"""The conversion to FlexAttention's lists is checked for every pattern without compiling; one kernel is compiled."""

import gc
import itertools
import weakref
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters
from torch._inductor.select_algorithm import AlgorithmSelectorCache
from torch._inductor.template_heuristics.triton import CUDAConfigHeuristic
from torch.nn.attention.flex_attention import FlexKernelOptions, _ordered_to_dense

from lightsparse.config.parse import compose
from lightsparse.config.targets import ConfigError
from lightsparse.kernels import (
    block_sparse_attention,
    block_sparse_attention_with_lse,
    dispatch,
    flash,
    flex,
    set_backend,
    use_backend,
)
from lightsparse.kernels.flex_tiles import tile_options
from lightsparse.kernels.reference import reference_attention
from lightsparse.patterns import (
    BigBird,
    BlockDilated,
    BlockLayout,
    GlobalTokens,
    Hierarchical,
    LocalWindow,
    PerHead,
    PooledHierarchy,
    RandomBlocks,
    Strided,
    interval_mask,
)
from lightsparse.training.run import set_machine

HEADS, KV_HEADS = 4, 2
PATTERNS = {
    "window": LocalWindow(40),
    "globals": GlobalTokens(20),
    "strided": Strided(3),
    "dilated": BlockDilated((64, 128), (2, 4)),
    "random": RandomBlocks(2, seed=1),
    "bigbird": BigBird(window=33, global_tokens=5, random=1, seed=2),
    "hierarchical": Hierarchical(((32, 1), (64, 2), (None, 4))),
    "union": LocalWindow(20) | GlobalTokens(3) | Strided(4),
    "intersection": LocalWindow(90) & Strided(2),
    "per kv head": PerHead((LocalWindow(20), Strided(2))),
    "per head": PerHead((LocalWindow(20), Strided(2), GlobalTokens(1), RandomBlocks(3))),
    "pooled": PooledHierarchy(window=24, coarser=((48, 4), (None, 8))),
}
CASES = [
    (name, causal, documents, length)
    for name in PATTERNS
    for causal in (True, False)
    for documents in (False, True)
    for length in (63, 111, 160)
    if causal or name != "pooled"
]


def layout_of(name: str, causal: bool = True, documents: bool = False, length: int = 111) -> BlockLayout:
    ids = None
    if documents:
        ids = torch.zeros(2, length, dtype=torch.int32)
        ids[0, 17:] = 1
        ids[1, 32:] = 1
        ids[1, length - 5 :] = 2
    return PATTERNS[name].layout(length, block=16, heads=HEADS, kv_heads=KV_HEADS, causal=causal, documents=ids)


def of_every_head(tiles: Tensor, batch: int) -> Tensor:
    """[B|1, H|Hkv|1, …] → [batch, HEADS, …]."""
    return tiles.repeat_interleave(HEADS // tiles.shape[1], 1).expand(batch, -1, -1, -1)


def listed(layout: BlockLayout) -> dict[str, Tensor]:
    """Which tiles each of the four lists names, bool [2, HEADS, NQ, NKVB]."""
    tiles = flex.block_mask(layout, HEADS)
    nq, nkv = layout.num_q_blocks, layout.num_kv_blocks
    lists = {
        "partial": _ordered_to_dense(tiles.kv_num_blocks, tiles.kv_indices, nkv),
        "full": _ordered_to_dense(tiles.full_kv_num_blocks, tiles.full_kv_indices, nkv),
        "partial, transposed": _ordered_to_dense(tiles.q_num_blocks, tiles.q_indices, nq).mT,
        "full, transposed": _ordered_to_dense(tiles.full_q_num_blocks, tiles.full_q_indices, nq).mT,
    }
    return {name: of_every_head(found.bool(), 2) for name, found in lists.items()}


@pytest.mark.parametrize(("name", "causal", "documents", "length"), CASES)
def test_the_lists_name_the_tiles_of_the_layout_and_their_transpose(name, causal, documents, length):
    layout = layout_of(name, causal, documents, length)
    lists = listed(layout)
    assert torch.equal(lists["partial"] | lists["full"], of_every_head(layout.block_map(), 2))
    assert not (lists["partial"] & lists["full"]).any()
    assert torch.equal(lists["partial, transposed"], lists["partial"])
    assert torch.equal(lists["full, transposed"], lists["full"])


@pytest.mark.parametrize(("name", "causal", "documents", "length"), CASES)
def test_the_rule_of_flex_is_the_layout_inside_its_tiles_and_no_full_tile_needs_it(name, causal, documents, length):
    layout = layout_of(name, causal, documents, length)
    b, h, i, j = torch.meshgrid(
        *(torch.arange(n) for n in (2, HEADS, layout.num_queries, layout.num_keys)), indexing="ij"
    )
    allowed = flex.block_mask(layout, HEADS).mask_mod(b, h, i, j)
    dense, lists = of_every_head(layout.to_dense(), 2), listed(layout)

    def of_tokens(tiles: Tensor) -> Tensor:
        return tiles.repeat_interleave(16, 2).repeat_interleave(16, 3)[:, :, : layout.num_queries, : layout.num_keys]

    inside = of_tokens(lists["partial"] | lists["full"])
    assert torch.equal(allowed & inside, dense)
    assert dense[of_tokens(lists["full"])].all()


def test_a_row_that_reads_everything_is_listed_like_any_other():
    layout = layout_of("globals", causal=False)
    assert len(layout.dense_rows)
    lists = listed(layout)
    assert (lists["partial"] | lists["full"])[:, :, layout.dense_rows.long()].all()


@pytest.mark.parametrize("name", ["window", "dilated", "per head"])
@pytest.mark.parametrize("documents", [False, True])
def test_the_stated_bytes_are_those_of_the_lists_and_shared_tables_stay_shared(name, documents):
    layout = layout_of(name, documents=documents)
    tiles = flex.block_mask(layout, HEADS)
    lists = (tiles.kv_indices, tiles.full_kv_indices, tiles.q_indices, tiles.full_q_indices)
    assert sum(x.nbytes for x in lists) == flex.list_bytes(layout, HEADS)
    assert tiles.kv_indices.shape[:2] == (2 if documents else 1, 1 if name == "window" else HEADS)
    assert all(x.is_contiguous() and x.dtype == torch.int32 for x in lists)


def test_lists_are_made_once_per_layout_and_go_with_it():
    layout = layout_of("window")
    tiles = flex.block_mask(layout, HEADS)
    assert flex.block_mask(layout, HEADS) is tiles
    gone = weakref.ref(tiles)
    del tiles, layout
    gc.collect()
    assert gone() is None


def qkv(layout: BlockLayout, dim: int = 32, dtype: torch.dtype = torch.float32, device: str = "cpu"):
    generator = torch.Generator().manual_seed(0)
    shapes = ((HEADS, layout.num_queries), (KV_HEADS, layout.num_keys), (KV_HEADS, layout.num_keys))
    return [torch.randn(2, *shape, dim, generator=generator).to(device, dtype) for shape in shapes]


def one_kernel_for_all(layout: BlockLayout) -> BlockLayout:
    """The same layout written so that all of them share one compilation: a table per head, documents per sample."""
    mask, table = layout.mask, layout.kv_indices.repeat_interleave(HEADS // layout.kv_indices.shape[1], 1)
    if mask.q_doc is None:
        zeros = torch.zeros(2, layout.num_keys, dtype=torch.int32)
        mask = replace(mask, q_doc=zeros, kv_doc=zeros.clone())  # one tensor twice would be another kernel
    return replace(layout, kv_indices=table, mask=mask)


def hidden_keys() -> BlockLayout:
    """Keys 0 … 40 are hidden, so that the first queries read nothing."""
    layout = layout_of("window")
    visible_from = layout.mask.visible_from.clone()
    visible_from[:, :41] = torch.iinfo(torch.int32).max
    return replace(layout, mask=replace(layout.mask, visible_from=visible_from))


def window_and_sinks() -> BlockLayout:
    layout = layout_of("union")
    return replace(layout, mask=interval_mask(layout.num_keys, window=20, sinks=3))


def test_the_compiled_forward_equals_the_reference_and_one_kernel_serves_every_layout_of_a_shape():
    layouts = [
        layout_of("dilated", documents=True),
        layout_of("per head"),
        layout_of("random", causal=False),
        layout_of("globals", causal=False),
        window_and_sinks(),
        hidden_keys(),
    ]
    before = counters["stats"]["unique_graphs"]
    for layout in map(one_kernel_for_all, layouts):
        q, k, v = qkv(layout)
        out = block_sparse_attention(q, k, v, layout, backend="flex", scale=0.3)
        expected = block_sparse_attention(q, k, v, layout, backend="reference", scale=0.3)
        assert torch.allclose(out, expected, atol=1e-5)
    assert not out[:, :, :41].any()  # rows with nothing to read
    assert counters["stats"]["unique_graphs"] == before + 1


@pytest.mark.slow
@pytest.mark.parametrize("name", PATTERNS)
@pytest.mark.parametrize("length", [63, 1000])
def test_the_compiled_forward_equals_the_reference_for_every_pattern(name, length):
    layout = layout_of(name, documents=length == 1000, length=length)
    q, k, v = qkv(layout)
    out = block_sparse_attention(q, k, v, layout, backend="flex")
    assert torch.allclose(out, block_sparse_attention(q, k, v, layout, backend="reference"), atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("block", [1, 4, 64, 128])
def test_any_block_does_on_the_cpu(block):
    layout = LocalWindow(40).layout(150, block=block)
    q, k, v = qkv(layout)
    out = block_sparse_attention(q, k, v, layout, backend="flex")
    assert torch.allclose(out, block_sparse_attention(q, k, v, layout, backend="reference"), atol=1e-5)


@pytest.mark.slow
def test_a_compiled_model_around_it_changes_nothing():
    layout = layout_of("union")
    q, k, v = qkv(layout)

    def model(q: Tensor) -> Tensor:
        return 2 * block_sparse_attention(q * 1.5, k, v, layout, backend="flex")

    assert torch.allclose(torch.compile(model)(q), model(q), atol=1e-6)


def test_where_compiling_is_switched_off_it_refuses_rather_than_read_too_much():
    layout = layout_of("strided")
    with torch.compiler.set_stance("force_eager"), pytest.raises(RuntimeError, match="use backend=blocked"):
        block_sparse_attention(*qkv(layout), layout, backend="flex")


@pytest.fixture
def uncompiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """FlexAttention traced and differentiated, and then run by PyTorch's slow dense form of it, which has a backward on
    CPU and reads the mask alone, not the lists."""
    monkeypatch.setattr("torch.nn.attention.flex_attention._validate_device", lambda *qkv: None)
    monkeypatch.setattr(flex, "_compiled", lambda device: torch.compile(flex._attend, backend="aot_eager"))


@pytest.mark.usefixtures("uncompiled")
def test_output_and_lse_have_the_gradients_of_the_reference():
    layout = LocalWindow(111).layout(111, block=16)  # all tiles, so that the mask alone says everything
    visible_from = layout.mask.visible_from.clone()
    visible_from[:, :9] = torch.iinfo(torch.int32).max  # rows 0 … 8 read nothing
    layout = replace(layout, mask=replace(layout.mask, visible_from=visible_from))
    q, k, v = (x.requires_grad_() for x in qkv(layout))
    out, lse = flex.flex_with_lse(q, k, v, layout, 0.3, None, None)
    assert not out[:, :, :9].any() and (lse[:, :, :9] == float("-inf")).all()
    merged = torch.logaddexp(lse, lse)  # of two branches that both read nothing: its gradient there is NaN
    loss = (out * out.sin()).sum() + torch.where(merged > float("-inf"), merged, 0.0).sin().sum()
    grads = torch.autograd.grad(loss, (q, k, v))

    out, lse = reference_attention(q[:, :, 9:], k, v, layout.per_token(9, 111), 0.3, None, None)
    loss = (out * out.sin()).sum() + torch.logaddexp(lse, lse).sin().sum()
    for mine, expected in zip(grads, torch.autograd.grad(loss, (q, k, v)), strict=True):
        assert torch.allclose(mine, expected, atol=1e-4)


REFUSED = {
    "has no backward on CPU; use backend=blocked or auto, or move the tensors to CUDA": {"grad": True},
    "returns no lse on CPU; use backend=blocked": {"lse": True},
    "takes no block_bias; use backend=blocked": {"block_bias": True},
    "takes no dropout; use backend=blocked": {"dropout": True},
    "takes no mask.dense; use backend=blocked": {"dense": True},
    "computes in fp32, bf16 and fp16, not in float64; use backend=blocked": {"dtype": torch.float64},
}


@pytest.mark.parametrize("sentence", REFUSED)
def test_what_it_cannot_do_is_refused_with_the_way_out(sentence):
    asked = REFUSED[sentence]
    layout = layout_of("window")
    if "dense" in asked:
        layout = replace(layout, mask=replace(layout.mask, dense=torch.ones(1, 1, 111, 111, dtype=torch.bool)))
    q, k, v = qkv(layout, dtype=asked.get("dtype", torch.float32))
    q.requires_grad_("grad" in asked)
    bias = torch.zeros(1, 1, *layout.kv_indices.shape[2:]) if "block_bias" in asked else None
    dropout = dispatch.Dropout(0.5, torch.zeros(2, dtype=torch.int64)) if "dropout" in asked else None
    attend = block_sparse_attention_with_lse if "lse" in asked else block_sparse_attention
    with pytest.raises(ValueError) as refused:
        attend(q, k, v, layout, backend="flex", block_bias=bias, dropout=dropout)
    assert str(refused.value).startswith(f'backend "flex" {sentence}')


def test_lists_beyond_the_limit_are_refused_with_their_size(monkeypatch):
    layout, q = layout_of("window"), torch.zeros(2, HEADS, 111, 32)
    assert flex.refusal(q, layout, gradients=False, lse=False) is None
    monkeypatch.setattr(flex, "LIST_BYTES_LIMIT", flex.list_bytes(layout, HEADS) - 1)
    assert "lists tiles at full width" in flex.refusal(q, layout, gradients=False, lse=False)
    million = LocalWindow(256).layout(1 << 20, block=128)
    assert flex.list_bytes(million, heads=32) == 1 << 30  # 1,048,576 tokens at block 128 just fit, one table for all


class OnCuda:
    """As much of a CUDA tensor as refusals look at."""

    device = torch.device("cuda")

    def __init__(self, dim: int = 64, dtype: torch.dtype = torch.bfloat16):
        self.shape, self.dtype = (2, HEADS, 256, dim), dtype


@pytest.mark.parametrize("block", [16, 24, 32, 48, 64, 96, 128, 192, 256])
def test_blocks_that_cuda_has_tiles_for_are_taken_and_others_refused(block):
    layout = LocalWindow(40).layout(256, block=block)
    refused = flex.refusal(OnCuda(), layout, gradients=True, lse=True)
    assert (refused is None) == (block in (32, 64, 96, 128, 192, 256))
    if refused is not None:
        assert refused == f"needs blocks in multiples of 32 on CUDA, not {block} × {block}"
        return
    # Or FlexAttention leaves out all backward kernels: it looks at the list's own tiles, not at those it was given.
    listed = CUDAConfigHeuristic().flex_attn_bwd_autotune_configs
    assert any(block % max(tile.block_m1, tile.block_n1) == 0 for tile in listed)


CAPABILITIES = [(7, 5), (8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (10, 3), (12, 0)]
BLOCKS = [32, 48, 64, 96, 128, 160, 192, 256]


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("dim", [16, 64, 80, 128, 192, 256, 512])
def test_tiles_divide_the_blocks_and_each_other_as_the_kernels_ask(dim, dtype, capability):
    for q_block, kv_block in itertools.product(BLOCKS, BLOCKS):
        of = tile_options(q_block, kv_block, dim, dtype, capability)
        for name, block in (("M", q_block), ("M1", q_block), ("M2", q_block), ("N", kv_block)):
            size = of[f"{'fwd' if name in 'MN' else 'bwd'}_BLOCK_{name}"]
            assert block % size == 0 and size >= 16 and size & -size == size
        assert kv_block % of["bwd_BLOCK_N1"] == 0 and kv_block % of["bwd_BLOCK_N2"] == 0
        assert of["bwd_BLOCK_N1"] % of["bwd_BLOCK_M1"] == 0 and of["bwd_BLOCK_M2"] % of["bwd_BLOCK_N2"] == 0
        for of_pass in ("fwd", "bwd"):
            assert of[f"{of_pass}_num_warps"] in (4, 8) and of[f"{of_pass}_num_stages"] in (1, 2, 3)


@pytest.mark.parametrize(
    ("capability", "kib"), [((8, 0), 163), ((8, 9), 99), ((9, 0), 227), ((10, 0), 227), ((12, 0), 99)]
)
@pytest.mark.parametrize("dim", [64, 128, 256])
def test_forward_tiles_fit_into_the_shared_memory_of_the_chip(dim, capability, kib):
    """A tile of queries, and the keys and values of every stage."""
    for dtype in (torch.bfloat16, torch.float32):
        of = tile_options(128, 128, dim, dtype, capability)
        numbers = (of["fwd_BLOCK_M"] + 2 * of["fwd_BLOCK_N"] * of["fwd_num_stages"]) * dim
        assert numbers * dtype.itemsize <= kib * 1024


def test_every_option_is_one_that_flexattention_knows():
    known = FlexKernelOptions.__annotations__
    for name in tile_options(64, 64, 64, torch.bfloat16, (9, 0)):
        assert name.removeprefix("fwd_").removeprefix("bwd_") in known


def test_larger_blocks_have_larger_tiles():
    small, large = (tile_options(block, block, 128, torch.bfloat16, (9, 0)) for block in (64, 128))
    assert (large["fwd_BLOCK_M"], large["bwd_BLOCK_N1"]) == (128, 128)
    assert (small["fwd_BLOCK_M"], small["bwd_BLOCK_N1"]) == (64, 64)


def test_on_cuda_nothing_is_timed_to_find_a_tile():
    """The first kernel of the list is taken: all have the tiles of the table."""

    class Kernel:
        def __init__(self, name: str):
            self.name = name

        def output_node(self) -> str:
            return self.name

    def never(*_, **__):
        raise AssertionError("a search")

    select = AlgorithmSelectorCache()
    select.make_precompile_fn = never
    with torch._inductor.config.patch(flex._WITHOUT_SEARCH):
        assert select("flex_attention", [Kernel("first"), Kernel("second")], [], None, input_gen_fns={})[0] == "first"


def test_torch_compile_takes_the_options_that_keep_it_from_searching(monkeypatch):
    given = []
    compiler = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, **options: given.append(options) or compiler(f, **options))
    flex._compiled.__wrapped__("cuda")
    assert given[0]["options"] == flex._WITHOUT_SEARCH and given[0].get("mode") is None


@pytest.fixture
def gpu(monkeypatch) -> Iterator[Callable[..., None]]:
    """A GPU of some compute capability, with FlashAttention 4 installed or not."""

    def install(major: int, minor: int = 0, fa4: bool = True) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (major, minor))
        monkeypatch.setattr(flash, "_is_installed", lambda module: fa4)

    yield install
    flex.use_kernel("auto")


@pytest.mark.parametrize(
    ("install", "why"),
    [
        (None, "FA4 runs on CUDA only and there is no CUDA device here"),
        ((8, 0), "FA4 needs a GPU of compute capability 9.x or 10.x and this one has 8.0"),
        ((12, 0), "FA4 needs a GPU of compute capability 9.x or 10.x and this one has 12.0"),
        ((9, 0, False), "FA4 needs the Python module flash_attn.cute.interface, which is not installed"),
    ],
)
def test_flash_is_refused_where_it_cannot_run(install, why, gpu, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    if install is not None:
        gpu(*install)
    with pytest.raises(ValueError) as refused:
        flex.use_kernel("flash")
    assert str(refused.value) == f"kernels.flex_backend is flash; {why}; use kernels.flex_backend=triton"
    with pytest.raises(ConfigError, match=r"^kernels\.flex_backend is flash; FA4"):
        set_machine(compose(["kernels.flex_backend=flash", "threads=1", "matmul_precision=highest", "precision=32"]))


def test_an_unknown_kernel_is_refused():
    with pytest.raises(ValueError, match=r"kernels\.flex_backend is 'cudnn'; choose auto, triton or flash"):
        flex.use_kernel("cudnn")


def test_the_config_chooses_the_kernel_and_triton_is_the_default(gpu):
    gpu(9)
    layout, words = LocalWindow(40).layout(256, block=128), ["threads=1", "matmul_precision=highest", "precision=32"]
    for choice, backend in (("flash", "FLASH"), ("triton", "TRITON"), ("auto", "TRITON")):
        set_machine(compose([f"kernels.flex_backend={choice}", *words]))
        options = flex.kernel_options(OnCuda(), layout)
        assert options["BACKEND"] == backend
        assert ("fwd_BLOCK_M" in options) == (backend == "TRITON")


@pytest.mark.parametrize(
    ("major", "block", "asked", "why"),
    [
        (9, 128, {"dtype": torch.float32}, "it computes in bf16 and fp16, not in float32"),
        (9, 128, {"dim": 192}, "it takes head dims in multiples of 8 up to 128, not 192"),
        (9, 64, {}, "on this GPU it takes blocks of 128 keys and of queries in multiples of 128, not 64 × 64"),
        (9, 256, {}, "on this GPU it takes blocks of 128 keys and of queries in multiples of 128, not 256 × 256"),
        (9, 128, {"dim": 20}, "it takes head dims in multiples of 8 up to 128, not 20"),
        (10, 128, {}, "on this GPU it takes blocks of 128 keys and of queries in multiples of 256, not 128 × 128"),
        (9, 128, {"lse": True}, "its lse has no gradient"),
        (
            9,
            128,
            {"deterministic": True},
            "its backward is not deterministic here, and deterministic algorithms are asked for",
        ),
    ],
)
def test_what_flash_cannot_serve_is_an_error_and_never_another_kernel(major, block, asked, why, gpu, monkeypatch):
    gpu(major)
    flex.use_kernel("flash")
    layout, lse = LocalWindow(40).layout(256, block=block), asked.get("lse", False)
    q = OnCuda(asked.get("dim", 64), asked.get("dtype", torch.bfloat16))
    if "deterministic" in asked:
        monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    with pytest.raises(ValueError) as refused:
        flex.refusal(q, layout, gradients=True, lse=lse)
    assert str(refused.value) == f"kernels.flex_backend is flash and {why}; use kernels.flex_backend=triton"
    flex.use_kernel("triton")
    assert flex.refusal(q, layout, gradients=True, lse=lse) is None


def test_flash_serves_whole_blocks_in_half_precision(gpu):
    gpu(9)
    flex.use_kernel("flash")
    layout = LocalWindow(40).layout(256, block=128)
    assert flex.refusal(OnCuda(), layout, gradients=True, lse=False) is None
    assert flex.refusal(OnCuda(), layout, gradients=False, lse=True) is None


def test_small_heads_are_refused_on_cuda():
    layout = LocalWindow(40).layout(256, block=64)
    assert flex.refusal(OnCuda(dim=8), layout, gradients=False, lse=False) == (
        "needs a head dim of at least 16 on CUDA, not 8"
    )


def asked_on_cuda(layout: BlockLayout, bias: bool = False, dtype: torch.dtype = torch.bfloat16) -> dispatch.Request:
    return dispatch.Request(layout, bias, False, False, OnCuda(dtype=dtype), kv_heads=1, gradients=True)


def test_on_cuda_dense_goes_to_sdpa_tiles_to_flex_single_queries_to_per_query_and_the_rest_to_blocked():
    tiles, dense = LocalWindow(40).layout(256, block=64), LocalWindow(256).layout(256, block=64)
    assert dispatch._automatic(asked_on_cuda(dense)) == "sdpa"
    assert dispatch._automatic(asked_on_cuda(tiles)) == "flex"
    assert dispatch._automatic(asked_on_cuda(tiles, bias=True)) == "blocked"
    assert dispatch._automatic(asked_on_cuda(LocalWindow(40).layout(256, block=16))) == "blocked"
    assert dispatch._automatic(asked_on_cuda(tiles.per_token(3, 4))) == "per_query"


@pytest.fixture
def backend_of_process() -> Iterator[None]:
    yield
    set_backend("auto")


@pytest.mark.usefixtures("backend_of_process")
def test_the_backend_of_the_process_holds_until_a_block_of_code_says_otherwise():
    layout = layout_of("window")
    q, k, v = qkv(layout)
    set_backend("sdpa")
    with pytest.raises(ValueError, match='backend "sdpa" takes only layouts'):
        block_sparse_attention(q, k, v, layout)
    with use_backend("auto"):
        block_sparse_attention(q, k, v, layout)
    with pytest.raises(ValueError, match="backend is 'flx'"):
        set_backend("flx")


@pytest.mark.usefixtures("backend_of_process")
def test_the_config_sets_the_backend_and_a_machine_that_cannot_says_so():
    layout = layout_of("window")
    set_machine(compose(["kernels.backend=sdpa", "threads=1", "matmul_precision=highest"]))
    with pytest.raises(ValueError, match='backend "sdpa" takes only layouts'):
        block_sparse_attention(*qkv(layout), layout)
    if not torch.cuda.is_available():
        with pytest.raises(ConfigError, match=r'^kernels\.backend "flex" has no backward on CPU; use backend=blocked'):
            set_machine(compose(["kernels.backend=flex", "threads=1", "matmul_precision=highest"]))


if torch.cuda.is_available():

    @pytest.mark.slow
    @pytest.mark.parametrize("name", PATTERNS)
    @pytest.mark.parametrize("block", [32, 64, 128])
    @pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 5e-3), (torch.bfloat16, 3e-2)])
    def test_on_cuda_output_lse_and_gradients_equal_the_reference(name, block, dtype, bound):
        pattern = BlockDilated((256, 512), (2, 4)) if name == "dilated" else PATTERNS[name]
        layout = pattern.layout(1000, block=block, heads=HEADS, kv_heads=KV_HEADS, device="cuda")
        results = []
        for backend in ("flex", "reference"):
            q, k, v = (x.requires_grad_() for x in qkv(layout, 64, dtype, "cuda"))
            out, lse = block_sparse_attention_with_lse(q, k, v, layout, backend=backend)
            grads = torch.autograd.grad(out.float().sin().sum() + lse.sin().sum(), (q, k, v))
            results.append([x.float() for x in (out, lse, *grads)])
        for mine, expected in zip(*results, strict=True):
            assert (mine - expected).norm() <= bound * expected.norm()
