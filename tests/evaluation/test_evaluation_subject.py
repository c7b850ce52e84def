"""Our model and a model of transformers answer the same three questions."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from lightsparse.attention.dense import DenseAttention, DenseConfig
from lightsparse.data.source import IGNORED
from lightsparse.data.tasks.passkey import Passkey
from lightsparse.evaluation.retrieval import retrieval
from lightsparse.evaluation.subject import HuggingFaceModel, OwnModel, Subject
from lightsparse.models import ModelConfig, Transformer


def own() -> Subject:
    config = ModelConfig(depth=1, embed_dim=32, heads=2, head_dim=16)
    return OwnModel(Transformer(config, lambda shape: DenseAttention(DenseConfig(), shape), vocab_size=256))


def llama() -> Subject:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    return HuggingFaceModel(LlamaForCausalLM(LlamaConfig(vocab_size=256, max_position_embeddings=512, **sizes)))


@pytest.mark.parametrize("make", [own, llama])
def test_losses_logits_and_greedy_text_agree(make):
    torch.manual_seed(0)
    subject, tokens = make(), torch.arange(60).view(2, 30) * 7 % 256
    asked = torch.zeros(2, 30, dtype=torch.bool)
    asked[0, 4] = asked[1, 9] = asked[1, -1] = True
    labels = torch.where(asked, 65, IGNORED)
    logits = subject.logits(tokens, asked)
    assert logits.shape == (3, 256) and subject.vocab_size == 256
    expected = torch.nn.functional.cross_entropy(logits, torch.full((3,), 65), reduction="none")
    torch.testing.assert_close(subject.losses(tokens, labels)[asked], expected, rtol=1e-4, atol=1e-4)
    assert (subject.losses(tokens, labels)[~asked] == 0).all()
    written = subject.generate(tokens[1], 3)
    assert len(written) == 3 and written[0] == logits[2].argmax().item()


@pytest.mark.parametrize("make", [own, llama])
def test_a_task_runs_on_either(make):
    (row,) = retrieval(make(), Passkey(), lengths=[480], depths=[0.5], examples=1)
    assert row["score"] == 0.0 and row["exact_match"] == 0.0  # untrained
