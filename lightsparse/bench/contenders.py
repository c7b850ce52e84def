"""The models of `bench train`: one shape, three implementations that start from the same weights.

lightsparse         our decoder with block-sparse attention
lightsparse-dense   the same with dense attention
transformers        a Llama with attn_implementation="sdpa"
"""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from lightsparse.attention.block_sparse import BlockSparseConfig, BlockSparseRingDilatedAttention
from lightsparse.attention.core import AttentionCore, AttentionShape, SequenceContext
from lightsparse.attention.dense import DenseAttention, DenseConfig
from lightsparse.bench.choice import pattern_at
from lightsparse.bench.options import DTYPES
from lightsparse.data.packing import PackedSamples
from lightsparse.data.stdlib import StdlibData
from lightsparse.models.transformer import ModelConfig, Transformer, context_for
from lightsparse.optim.optimizers import MuonAdamW, parameter_groups
from lightsparse.patterns import BlockLayout, LocalWindow, Pattern

NAMES = ("lightsparse", "lightsparse-dense", "transformers")
VOCABULARY = 256
CHUNK = ModelConfig().chunk  # tokens at a time where ours recomputes

OPTIMIZERS: dict[str, Callable[[list], Optimizer]] = {
    "adamw": lambda groups: AdamW(groups, lr=3e-4, weight_decay=0.1, fused=True),
    "muon": lambda groups: MuonAdamW(groups, lr=3e-4, adamw_lr=3e-4, weight_decay=0.1),
}


@dataclass(frozen=True)
class Setup:
    """What all contenders share; it travels to child processes."""

    context: int  # tokens; batch 1
    density: float  # of the sparse one, at most
    block: int  # tokens, of the sparse one
    dtype: str  # fp32; bf16 = fp32 parameters under autocast
    optimizer: str
    threads: int
    matmul_precision: str
    depth: int = 4  # layers
    embed_dim: int = 512
    heads: int = 8  # of 64
    kv_heads: int = 2
    mlp_dim: int = 1408
    window: int | None = None  # tokens, of the sparse one, in place of density: the same pattern at every context
    documents: int | None = None  # tokens of a packed document on average, other borders in every step; None = one
    recompute: bool = False  # model.activation_checkpointing, ours only
    text: str = "random"  # tokens: random, or stdlib, the source of Python's standard library

    @property
    def model(self) -> ModelConfig:
        """Like transformers, ours recomputes nothing unless asked to: `chunk` is out of reach then."""
        return ModelConfig(
            depth=self.depth,
            embed_dim=self.embed_dim,
            heads=self.heads,
            kv_heads=self.kv_heads,
            head_dim=64,
            mlp_dim=self.mlp_dim,
            qk_norm=False,  # as Llama
            activation_checkpointing=self.recompute,
            chunk=CHUNK if self.recompute else 1 << 30,
        )


class Contender:
    """One model with its optimizer, and the same batch for everyone.

    density         share of dense tiles that its attention computes
    layout_seconds  spent so far on building and looking up block layouts
    Raises ImportError for transformers when the extra `hf` is not installed, ValueError where the text is too short.
    """

    def __init__(self, name: str, setup: Setup):
        self.setup, self.layout_seconds = setup, 0.0
        self.density = 1.0
        self.model = self._transformers() if name == "transformers" else self._ours(sparse=name == "lightsparse")
        layers = self.model.get_submodule("model.layers" if name == "transformers" else "layers")
        self.optimizer = OPTIMIZERS[setup.optimizer](parameter_groups(self.model, layers))
        stream = tokens(setup.text, setup.context + 1)[None]
        self.tokens, self.labels = stream[:, :-1].contiguous(), stream[:, 1:].contiguous()
        self._borders = torch.Generator().manual_seed(1)

    @property
    def parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.model.parameters())

    def loss(self) -> Tensor:
        """Mean cross-entropy over all tokens, nats."""
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=DTYPES[self.setup.dtype] is torch.bfloat16):
            if isinstance(self.model, Transformer):
                hidden = self.model(self.tokens, context_for(self.tokens, self._documents())).hidden
                return self.model.loss_sum(hidden, self.labels) / self.labels.numel()
            # shift_labels: the labels are next tokens already, so that both sides average over the same ones.
            return self.model(input_ids=self.tokens, labels=self.labels, shift_labels=self.labels).loss

    def step(self) -> float:
        """Forward, loss, backward, optimizer; the loss before it."""
        self.optimizer.zero_grad(set_to_none=True)
        loss = self.loss()
        loss.backward()
        self.optimizer.step()
        return float(loss.detach())

    def _documents(self) -> Tensor | None:
        """int32 [1, context]: ids of documents whose borders are drawn anew on each call; None = one document."""
        if self.setup.documents is None:
            return None
        starts = torch.rand(self.setup.context, generator=self._borders) < 1 / self.setup.documents
        return starts.cumsum(0, dtype=torch.int32)[None]

    def _ours(self, *, sparse: bool) -> Transformer:
        torch.manual_seed(0)
        setup = self.setup
        if not sparse:
            return Transformer(setup.model, lambda shape: DenseAttention(DenseConfig(), shape), vocab_size=VOCABULARY)
        pattern: Pattern = LocalWindow(setup.window or 1)
        if setup.window is None:
            pattern = pattern_at("window", setup.density, setup.context, setup.block, at_most=True)
        config = BlockSparseConfig(
            block=setup.block, segment_lengths=(), dilation_rates=(), pattern={"window": pattern}, density=None
        )

        def core(shape: AttentionShape) -> AttentionCore:
            return _Timed(config, shape, self)

        return Transformer(setup.model, core, vocab_size=VOCABULARY)

    def _transformers(self) -> nn.Module:
        from transformers import AutoModelForCausalLM, LlamaConfig

        model = self.setup.model
        widths = model.widths
        config = LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=widths.embed_dim,
            intermediate_size=widths.mlp_dim,
            num_hidden_layers=model.depth,
            num_attention_heads=widths.heads,
            num_key_value_heads=widths.kv_heads,
            head_dim=widths.head_dim,
            rms_norm_eps=model.norm_eps,
            max_position_embeddings=self.setup.context,
            rope_parameters={"rope_type": "default", "rope_theta": model.rope.base},
            tie_word_embeddings=False,
            use_cache=False,
        )
        llama = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")
        weights = self._ours(sparse=False).state_dict()  # our parameters bear Llama's names
        llama.load_state_dict({name if name == "lm_head.weight" else f"model.{name}": w for name, w in weights.items()})
        return llama.train()


class _Timed(BlockSparseRingDilatedAttention):
    """Says how long its layouts take, with what training looks up in them once."""

    def __init__(self, config: BlockSparseConfig, shape: AttentionShape, of: Contender):
        super().__init__(config, shape)
        self.of = (of,)  # in a tuple: the contender's model would else be a part of this one

    def layout(self, num_keys: int, ctx: SequenceContext, device: torch.device) -> BlockLayout:
        start = time.perf_counter()
        layout = super().layout(num_keys, ctx, device)
        self.of[0].density = layout.density()
        self.of[0].layout_seconds += time.perf_counter() - start
        return layout


def tokens(text: str, count: int) -> Tensor:
    """int64 [count] tokens. Raises ValueError where the text has fewer."""
    if text == "random":
        return torch.randint(VOCABULARY, (count,), generator=torch.Generator().manual_seed(0))
    samples = StdlibData(context=256).samples(0, 256).train
    assert isinstance(samples, PackedSamples)
    found = torch.from_numpy(samples.stream[0:count].astype("int64"))
    if len(found) < count:
        raise ValueError(f"--text is {text}, which has {len(found)} tokens here and {count} are asked for; use random")
    return found


def installed() -> tuple[str, ...]:
    """The contenders that can be built here."""
    return NAMES if importlib.util.find_spec("transformers") else NAMES[:2]
