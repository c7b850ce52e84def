"""PyTorch has, does and says what compat/torch.py names, each shown on the installed one."""

from __future__ import annotations

import importlib
import inspect
import pickle
import resource
import warnings
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.powerSGD_hook import PowerSGDState
from torch.distributed.checkpoint.storage import WriteResult
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.fsdp import fully_shard
from torch.nn.attention import SDPBackend, sdpa_kernel

from lightsparse.utils.compat import torch as compat

# ---- gradients --------------------------------------------------------------------------------------------------


def test_silu_backward_is_autograds_and_in_place() -> None:
    x, grad = torch.randn(7, 5, requires_grad=True), torch.randn(7, 5)
    (wanted,) = torch.autograd.grad(nn.functional.silu(x), x, grad)
    found = compat.silu_backward_(grad, x.detach())
    assert found is grad
    torch.testing.assert_close(found, wanted)


def test_softmax_backward_is_autograds() -> None:
    x, grad = torch.randn(7, 5, requires_grad=True), torch.randn(7, 5)
    p = x.softmax(-1)
    (wanted,) = torch.autograd.grad(p, x, grad)
    torch.testing.assert_close(compat.softmax_backward(grad, p.detach()), wanted)


def test_foreach_mul_scales_each_in_place() -> None:
    tensors = [torch.ones(3), torch.full((2, 2), 2.0)]
    compat.scale_(iter(tensors), 0.5)  # type: ignore[arg-type]
    assert [float(x.sum()) for x in tensors] == [1.5, 4.0]


# ---- objects ----------------------------------------------------------------------------------------------------


def test_tree_leaves_finds_tensors_in_any_nesting() -> None:
    assert compat.tree_leaves({"a": [1, (2,)], "b": {"c": 3}}) == [1, 2, 3]


def test_torch_dispatch_mode_sees_every_operator() -> None:
    names: list[tuple[str, str]] = []

    class Watch(compat.TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            names.append((function.namespace, function.name()))
            return function(*args, **(kwargs or {}))

    with Watch():
        torch.ones(2) + 1
    assert ("aten", "aten::add.Tensor") in names


def test_weak_tensor_key_dictionary_goes_by_identity_and_forgets() -> None:
    kept: Any = compat.WeakTensorKeyDictionary()
    one, other = torch.ones(2), torch.ones(2)
    kept[one] = 1
    assert one in kept and other not in kept
    del one
    assert len(kept) == 0


@pytest.mark.parametrize("kind", [nn.MultiheadAttention, compat.UnfusedMultiheadAttention])
def test_qkv_same_embed_dim_decides_whether_an_encoder_calls_its_attention(kind: type[nn.MultiheadAttention]) -> None:
    """The fused path is still there to be kept away from, and False still does."""
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    layer.self_attn = kind(8, 2, batch_first=True)
    encoder = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False).eval()
    calls: list[int] = []
    encoder.layers[0].self_attn.forward = lambda query, *more, **options: calls.append(1) or (query, None)
    with torch.inference_mode():
        encoder(torch.randn(2, 5, 8))
    assert bool(calls) == (kind is compat.UnfusedMultiheadAttention)


@pytest.mark.parametrize("name", ["_reset_parameters", "merge_masks"])
def test_an_overridden_method_has_pytorchs_signature(name: str) -> None:
    ours, theirs = (
        list(inspect.signature(getattr(kind, name)).parameters)
        for kind in (compat.UnfusedMultiheadAttention, nn.MultiheadAttention)
    )
    assert ours == theirs


def test_the_kernel_of_dense_attention_is_known_beforehand() -> None:
    q, wide = torch.ones(1, 2, 8, 16), torch.ones(1, 2, 8, 16, dtype=torch.float16)
    assert compat.fused_attention_kernel(q, q, q, is_causal=True, enable_gqa=False) == SDPBackend.FLASH_ATTENTION
    with sdpa_kernel(SDPBackend.MATH):
        assert compat.fused_attention_kernel(wide, wide, wide, is_causal=True, enable_gqa=False) == SDPBackend.MATH


def test_what_cannot_be_compiled_is_a_compilation_error() -> None:
    def breaks(x: Tensor) -> Tensor:
        torch._dynamo.graph_break()
        return x

    with pytest.raises(compat.compilation_error()):
        torch.compile(breaks, fullgraph=True, backend="eager")(torch.ones(2))
    torch.compiler.reset()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A distributed checkpoint."""
    folder = tmp_path_factory.mktemp("dcp")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that this is one process
        dcp.save({"w": torch.arange(6.0)}, checkpoint_id=folder, no_dist=True)
    return folder


@pytest.mark.parametrize(
    ("kind", "name"), [(kind, name) for kind, names in compat.UNDOCUMENTED.items() for name in names]
)
def test_an_undocumented_attribute_is_there(kind: str, name: str, folder: Path) -> None:
    module, _, short = kind.rpartition(".")
    cls = getattr(importlib.import_module(module), short)
    if cls is PowerSGDState:
        thing: Any = PowerSGDState(None, matrix_approximation_rank=1)
    elif cls is WriteResult:
        thing = WriteResult(index=None, size_in_bytes=0, storage_data=None)  # type: ignore[arg-type]
    else:
        thing = cls(folder)
    assert hasattr(thing, name)


def test_the_writer_knows_its_rank_and_the_reader_marks_what_it_reads(folder: Path) -> None:
    writer = dcp.FileSystemWriter(folder)
    writer.set_up_storage_writer(True, rank=3)
    assert writer.rank == 3
    reader = dcp.FileSystemReader(folder)
    assert reader.read_metadata().storage_meta.load_id == reader.load_id is not None


def test_the_index_names_no_other_class(folder: Path) -> None:
    named: set[tuple[str, str]] = set()

    class Watch(pickle.Unpickler):
        def find_class(self, module: str, name: str) -> Any:
            named.add((module, name))
            return super().find_class(module, name)

    with (folder / compat.DCP_INDEX).open("rb") as file:
        Watch(file).load()
    plain = {pair for pair in named if isinstance(getattr(torch, pair[1], None), torch.dtype)}
    assert named - plain <= compat.DCP_INDEX_CLASSES
    assert ("torch.distributed.checkpoint.filesystem", "_StorageInfo") in named


@pytest.mark.parametrize(
    ("module", "name"), sorted(pair for pair in compat.DCP_INDEX_CLASSES if pair[0].startswith("torch"))
)
def test_a_class_of_the_index_is_there(module: str, name: str) -> None:
    assert hasattr(importlib.import_module(module), name)


@pytest.mark.parametrize("name", [compat.TORCHRUN_ID, compat.TORCHRUN_ATTEMPT, compat.TORCHRUN_OWNS_STORE])
def test_torchruns_agent_sets_the_variable(name: str) -> None:
    assert f'"{name}"' in inspect.getsource(LocalElasticAgent)


# ---- messages ---------------------------------------------------------------------------------------------------


def unmappable(path: Path) -> None:
    """A file is mapped where no addresses are left."""
    limits = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (psutil.Process().memory_info().vms + (1 << 26), limits[1]))
    try:
        torch.UntypedStorage.from_file(str(path / "sparse"), shared=True, nbytes=1 << 31)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)


SHORT = {
    "can't allocate memory": lambda path: torch.empty(10**15),
    "std::bad_alloc": lambda path: torch.ones(1).tensor_split(10**13),
    "Cannot allocate memory": unmappable,
}
ON_CUDA = {"out of memory"}  # a plain RuntimeError of the driver or of cuBLAS


@pytest.mark.parametrize("words", SHORT)
def test_a_failed_allocation_says(words: str, tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=words) as failed:
        SHORT[words](tmp_path)
    assert not isinstance(failed.value, torch.OutOfMemoryError)


def test_every_word_for_a_failed_allocation_is_tried() -> None:
    assert set(SHORT) | ON_CUDA == set(compat.OUT_OF_MEMORY)


def test_a_refused_object_is_named_behind_the_words(tmp_path: Path) -> None:
    torch.save({"state": Path("x")}, tmp_path / "a.pt")
    with pytest.raises(pickle.UnpicklingError) as refused:
        torch.load(tmp_path / "a.pt", weights_only=True)
    assert "pathlib" in str(refused.value).partition(compat.REFUSED_OBJECT)[2][:120]


def test_a_store_that_is_asked_in_vain_is_late() -> None:
    """Gloo's words are provoked in tests/distributed/test_distributed_errors.py."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=0.1))
    with pytest.raises(dist.DistError) as late:
        store.get("never")
    assert any(word in str(late.value).lower() for word in compat.LATE)


def test_one_process_that_reads_a_distributed_checkpoint_is_warned(folder: Path) -> None:
    with pytest.warns(UserWarning, match=compat.READS_ALONE):
        dcp.load({"w": torch.empty(6)}, checkpoint_id=folder, no_dist=True)


@pytest.fixture
def one_rank() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_fsdp_warns_of_a_view(one_rank: None) -> None:
    class View(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return super().forward(input).view(-1)

    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        warnings.filterwarnings("error", message=compat.FSDP_VIEW)
        with pytest.raises(UserWarning, match=compat.FSDP_VIEW):
            fully_shard(View(3, 3), mesh=dist.init_device_mesh("cpu", (1,)))(torch.ones(2, 3))
    assert not any("view tensor" in str(each.message) for each in said)
