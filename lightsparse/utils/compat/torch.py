"""PyTorch (2.13, 2.14): private and undocumented names that we touch, and its messages that we match."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend
from torch.utils._python_dispatch import TorchDispatchMode as TorchDispatchMode  # the one way to see every operator run
from torch.utils._pytree import tree_leaves as tree_leaves  # of what any module returns; there is no torch.utils.pytree
from torch.utils.weak import (
    WeakTensorKeyDictionary as WeakTensorKeyDictionary,  # weakref's compares keys by their values
)

# ---- gradients without a graph ----------------------------------------------------------------------------------


def silu_backward_(grad: Tensor, x: Tensor) -> Tensor:
    """grad · silu'(x), in place of grad. Autograd's own would need the graph of silu, and one more tensor."""
    return torch.ops.aten.silu_backward.grad_input(grad, x, grad_input=grad)


def softmax_backward(grad: Tensor, p: Tensor) -> Tensor:
    """The gradient of the scores whose softmax over the last dimension is p: p · (grad − Σ grad · p), in one pass."""
    return torch.ops.aten._softmax_backward_data(grad, p, -1, p.dtype)


def fused_attention_kernel(q: Tensor, k: Tensor, v: Tensor, *, is_causal: bool, enable_gqa: bool) -> SDPBackend:
    """Which of its kernels scaled_dot_product_attention takes for these tensors; it tells no one in public."""
    choice = torch._fused_sdp_choice(q, k, v, is_causal=is_causal, enable_gqa=enable_gqa)
    return SDPBackend(choice)


def scale_(tensors: Sequence[Tensor], factor: float) -> None:
    """Multiply each in place: on CUDA a few kernels for all, where a loop would start one for each."""
    torch._foreach_mul_(list(tensors), factor)


# ---- objects ----------------------------------------------------------------------------------------------------


class UnfusedMultiheadAttention(nn.MultiheadAttention):
    """An attention whose `forward` PyTorch's encoder layers call in evaluation, too.

    nn.TransformerEncoderLayer takes its fused dense path, and nn.TransformerEncoder nested tensors, only for an
    attention whose `_qkv_same_embed_dim` is True. torch.backends.mha.set_fastpath_enabled is for the whole process.
    """

    def _reset_parameters(self) -> None:
        self._qkv_same_embed_dim = self.in_proj_weight is not None  # read here, and nowhere else in this class
        super()._reset_parameters()
        self._qkv_same_embed_dim = False

    def merge_masks(self, attn_mask: Tensor | None, key_padding_mask: Tensor | None, query: Tensor):
        """Only the fused dense path of PyTorch's encoder layer asks for this, so it must never be reached.

        Raises RuntimeError: a loud end is better than attention that is silently dense.
        """
        raise RuntimeError(
            f"torch {torch.__version__} took its fused dense path around {type(self).__name__}; "
            "call torch.backends.mha.set_fastpath_enabled(False)"
        )


def compilation_error() -> type[Exception]:
    """What torch.compile raises where it cannot; imports the compiler."""
    from torch._dynamo.exc import TorchDynamoException

    return TorchDynamoException


# Attributes without an underscore or a promise, of objects that we get or extend, by their class.
UNDOCUMENTED = {
    # distributed/comm_hooks.py: what a checkpoint must hold of the hook, which only documents its constructor
    "torch.distributed.algorithms.ddp_comm_hooks.powerSGD_hook.PowerSGDState": (
        *("process_group", "iter", "start_powerSGD_iter", "total_numel_after_compression"),
        *("error_dict", "p_memory_dict", "q_memory_dict"),
    ),
    # distributed/sharded_files.py: checksums of what a rank has written; its index read without running it
    "torch.distributed.checkpoint.FileSystemWriter": ("path", "rank"),
    "torch.distributed.checkpoint.FileSystemReader": ("path", "load_id"),
    "torch.distributed.checkpoint.storage.WriteResult": ("storage_data",),
}

# What the index of a distributed checkpoint, a pickle, may name; anything else in it is not ours. Nothing public reads
# the index without unpickling it.
DCP_INDEX_CLASSES = {
    *((module, name) for module in ("pathlib", "pathlib._local") for name in ("PosixPath", "WindowsPath")),
    ("collections", "OrderedDict"),
    ("torch", "Size"),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("torch.serialization", "_get_layout"),
    ("torch.distributed.checkpoint.metadata", "_MEM_FORMAT_ENCODING"),
    *(
        ("torch.distributed.checkpoint.metadata", name)
        for name in (
            *("Metadata", "MetadataIndex", "TensorStorageMetadata", "TensorProperties", "ChunkStorageMetadata"),
            *("BytesStorageMetadata", "StorageMeta"),
        )
    ),
}
DCP_INDEX = ".metadata"  # its name in the folder

# ---- variables of torchrun ---------------------------------------------------------------------------------------

# Set by its agent for its ranks. The first two are documented, and no function of PyTorch answers for them.
TORCHRUN_ID, TORCHRUN_ATTEMPT = "TORCHELASTIC_RUN_ID", "TORCHELASTIC_RESTART_COUNT"
TORCHRUN_OWNS_STORE = "TORCHELASTIC_USE_AGENT_STORE"  # "True" where ranks join the agent's store, which outlives them

# ---- messages ---------------------------------------------------------------------------------------------------

# Of gloo, NCCL and the store in a plain RuntimeError or DistError, in lower case: the other rank is late, or gone.
LATE = ("timed out", "timeout", "timed_out")
GONE = (
    "connection closed by peer",
    "connection was likely closed",
    "connection reset",
    "connection refused",
    "broken pipe",
    "remote process exited",
)
# Whose words they must be in a RuntimeError: gloo names its file, except for what is tried after a timeout.
SPEAKERS = ("gloo", "nccl", "pair closure")

# Of allocators in a plain RuntimeError: torch has a type for CUDA's caching one alone.
OUT_OF_MEMORY = ("can't allocate memory", "out of memory", "std::bad_alloc", "Cannot allocate memory")

# Of torch.load(weights_only=True), before what it refuses to make; a pickle.UnpicklingError has no field for it.
REFUSED_OBJECT = "WeightsUnpickler error: "

# Warnings that nothing turns off: a distributed checkpoint is read by one process, as it is meant; FSDP2 fears that a
# view is written to.
READS_ALONE = "torch.distributed is disabled"
FSDP_VIEW = r"FSDP2-wrapped module .* returned a view tensor.*"
