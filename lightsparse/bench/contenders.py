"""The models of `bench train`: one shape, three implementations that start from the same weights.

lightsparse         our decoder with block-sparse attention
lightsparse-dense   the same with dense attention
transformers        a Llama with attn_implementation="sdpa"
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from lightsparse.attention.block_sparse import BlockSparseConfig, BlockSparseRingDilatedAttention
from lightsparse.attention.core import AttentionCore, AttentionShape
from lightsparse.attention.dense import DenseAttention, DenseConfig
from lightsparse.bench.choice import pattern_at
from lightsparse.bench.options import DTYPES
from lightsparse.models.transformer import ModelConfig, Transformer, context_for
from lightsparse.training.optimizers import MuonAdamW, parameter_groups

NAMES = ("lightsparse", "lightsparse-dense", "transformers")
VOCABULARY = 256
# Like transformers, ours recomputes nothing here: `chunk` is out of reach.
MODEL = ModelConfig(depth=4, embed_dim=512, heads=8, kv_heads=2, head_dim=64, mlp_dim=1408, chunk=1 << 20)

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


class Contender:
    """One model with its optimizer, and the same batch for everyone.

    density  share of dense tiles that its attention computes
    Raises ImportError for transformers when the extra `hf` is not installed.
    """

    def __init__(self, name: str, setup: Setup):
        self.setup = setup
        self.density = 1.0
        self.model = self._transformers() if name == "transformers" else self._ours(sparse=name == "lightsparse")
        layers = self.model.get_submodule("model.layers" if name == "transformers" else "layers")
        self.optimizer = OPTIMIZERS[setup.optimizer](parameter_groups(self.model, layers))
        stream = torch.randint(VOCABULARY, (1, setup.context + 1), generator=torch.Generator().manual_seed(0))
        self.tokens, self.labels = stream[:, :-1].contiguous(), stream[:, 1:].contiguous()

    def loss(self) -> Tensor:
        """Mean cross-entropy over all tokens, nats."""
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=DTYPES[self.setup.dtype] is torch.bfloat16):
            if isinstance(self.model, Transformer):
                hidden = self.model(self.tokens, context_for(self.tokens)).hidden
                return self.model.loss_sum(hidden, self.labels) / self.labels.numel()
            # shift_labels: the labels are next tokens already, so that both sides average over the same ones.
            return self.model(input_ids=self.tokens, labels=self.labels, shift_labels=self.labels).loss

    def step(self) -> None:
        """Forward, loss, backward, optimizer."""
        self.optimizer.zero_grad(set_to_none=True)
        self.loss().backward()
        self.optimizer.step()

    def _ours(self, *, sparse: bool) -> Transformer:
        torch.manual_seed(0)
        setup = self.setup
        if not sparse:
            return Transformer(MODEL, lambda shape: DenseAttention(DenseConfig(), shape), vocab_size=VOCABULARY)
        pattern = pattern_at("window", setup.density, setup.context, setup.block, at_most=True)
        self.density = pattern.layout(setup.context, block=setup.block).density()
        config = BlockSparseConfig(
            block=setup.block, segment_lengths=(), dilation_rates=(), pattern={"window": pattern}, density=None
        )

        def core(shape: AttentionShape) -> AttentionCore:
            return BlockSparseRingDilatedAttention(config, shape)

        return Transformer(MODEL, core, vocab_size=VOCABULARY)

    def _transformers(self) -> nn.Module:
        from transformers import AutoModelForCausalLM, LlamaConfig

        widths = MODEL.widths
        config = LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=widths.embed_dim,
            intermediate_size=widths.mlp_dim,
            num_hidden_layers=MODEL.depth,
            num_attention_heads=widths.heads,
            num_key_value_heads=widths.kv_heads,
            head_dim=widths.head_dim,
            rms_norm_eps=MODEL.norm_eps,
            max_position_embeddings=self.setup.context,
            rope_parameters={"rope_type": "default", "rope_theta": MODEL.rope.base},
            tie_word_embeddings=False,
            use_cache=False,
        )
        llama = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")
        weights = self._ours(sparse=False).state_dict()  # our parameters bear Llama's names
        llama.load_state_dict({name if name == "lm_head.weight" else f"model.{name}": w for name, w in weights.items()})
        return llama.train()


def installed() -> tuple[str, ...]:
    """The contenders that can be built here."""
    return NAMES if importlib.util.find_spec("transformers") else NAMES[:2]
