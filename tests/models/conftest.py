from collections.abc import Callable

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lightsparse.attention.dense import DenseAttention, DenseConfig
from lightsparse.models import ModelConfig, Transformer


@pytest.fixture
def make_model() -> Callable[..., Transformer]:
    """make_model(vocab_size=…, causal=…, dropout=…, seed=…, **ModelConfig fields): a small dense model.

    dropout is that of the attention, stream_dropout that of the residual stream; context as of Transformer.
    """

    def make(
        *,
        vocab_size: int = 37,
        causal: bool = True,
        dropout: float = 0.0,
        stream_dropout: float = 0.0,
        context: int | None = None,
        seed: int = 0,
        **fields,
    ) -> Transformer:
        torch.manual_seed(seed)
        sizes = {"depth": 2, "embed_dim": 32, "heads": 4, "kv_heads": 2, "mlp_dim": 48, "qk_norm": False} | fields
        config, dense = ModelConfig(**sizes, dropout=stream_dropout), DenseConfig(dropout=dropout)
        return Transformer(
            config,
            lambda shape: DenseAttention(dense, shape),
            vocab_size=vocab_size,
            causal=causal,
            context=context,
        )

    return make


@pytest.fixture
def largest_tensor() -> Callable[[Callable[[], object]], int]:
    """largest_tensor(function): entries of the largest tensor any operation of function() makes, backward included."""

    class Watch(TorchDispatchMode):
        largest = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            made = [leaf.numel() for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
            self.largest = max([self.largest, *made])
            return result

    def measure(function: Callable[[], object]) -> int:
        with Watch() as watch:
            function()
        return watch.largest

    return measure
