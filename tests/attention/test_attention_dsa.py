"""DSA against its definition (dsa_case.py): what is chosen, the output, the parts of a long sequence, the two stages.

tests/battery.py runs over it as over every variant; how its indexer learns is in test_attention_dsa_loss.py.
"""

from __future__ import annotations

import logging

import pytest
import torch
from battery import Inputs, Shape, close, context, dense_attention, documents_at, gradients
from dsa_case import make, run, written_out

from lightsparse.attention import dsa
from lightsparse.attention.core import AttentionShape
from lightsparse.attention.dsa import DsaAttention, DsaConfig
from lightsparse.attention.selection import dense_warning
from lightsparse.attention.selection.indexer import chosen_columns
from lightsparse.kernels import use_backend

SHAPES = [Shape(63, 1, 2, 2, 32), Shape(111, 2, 4, 2, 16), Shape(90, 1, 4, 1, 32)]
BORDERS = ((), (5, 37, 38, 61))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("borders", BORDERS, ids=["one document", "documents"])
@pytest.mark.parametrize("top_k", [1, 7, 24])
def test_it_reads_what_the_definition_chooses(shape: Shape, borders: tuple[int, ...], top_k: int) -> None:
    documents = documents_at(shape.n, *borders, batch=shape.batch) if borders else None
    core, given = make(shape, top_k), Inputs.random(shape).leaves()
    result, right = run(core, given, documents), written_out(core, given, top_k, documents)
    layout = core.select(*given.tensors()[:3:2], given.x, context(shape.n, documents)).layout
    assert torch.equal(layout.to_dense()[:, 0], right.chosen)
    close(result.out, right.out, 1e-5, "the output")
    found, wanted = (gradients(out, *given.tensors()[:3]) for out in (result.out, right.out))
    for name, grad, expected in zip("qkv", found, wanted, strict=True):
        close(grad, expected, 1e-5, f"the gradient of {name}")


def test_all_that_is_visible_is_dense_attention() -> None:
    shape = Shape(75, 2, 4, 2, 32)
    core, given = make(shape, top_k=75), Inputs.random(shape).leaves()
    out, right = run(core, given).out, dense_attention(given, causal=True)
    close(out, right, 1e-5, "the output")
    for found, wanted in zip(gradients(out, *given.tensors()[:3]), gradients(right, *given.tensors()[:3]), strict=True):
        close(found, wanted, 1e-5, "a gradient")


@pytest.mark.parametrize("backend", ["auto", "per_query", "blocked"])
def test_one_token_is_one_token(backend: str) -> None:
    """A public trap: a selection of one falls back to full attention."""
    shape = Shape(70, 2, 4, 2, 32)
    core, given = make(shape, top_k=1), Inputs.random(shape)
    with use_backend(backend):
        result = run(core, given)
    table = core.select(given.q, given.k, given.x, context(shape.n)).layout.kv_indices
    assert table.shape == (2, 1, 70, 1) and (table >= 0).all()
    read = given.v.repeat_interleave(2, 1).gather(2, table.long().expand(-1, 4, -1, 32))
    close(result.out, read, 1e-6, "the value of the one token")
    assert float(result.stats["density"]) == pytest.approx(70 / (70 * 71 / 2))


def test_equal_scores_go_to_the_earlier_token() -> None:
    """Without input every score is an exact zero."""
    shape = Shape(40, 1, 2, 1, 16)
    given = Inputs.random(shape)
    given.x.zero_()
    table = make(shape, top_k=5).select(given.q, given.k, given.x, context(shape.n)).layout.kv_indices[0, 0]
    assert table[-1].tolist() == [0, 1, 2, 3, 4] and table[2].tolist() == [0, 1, 2, -1, -1]


def test_negative_zero_is_zero_and_a_table_is_padded_behind() -> None:
    scores = torch.tensor([[[0.0, -0.0, 1.0, 0.0], [-1.0, 5.0, 2.0, 2.0]]])
    among = torch.tensor([[[True, True, True, True], [True, False, True, True]]])
    chosen, table = chosen_columns(scores, among, 2, 3)
    assert table.tolist() == [[[0, 2, -1], [2, 3, -1]]] and chosen.sum(-1).tolist() == [[2, 2]]


@pytest.mark.parametrize("borders", BORDERS, ids=["one document", "documents"])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_a_long_sequence_in_parts_gives_the_same(borders, dropout, monkeypatch: pytest.MonkeyPatch) -> None:
    shape = Shape(111, 2, 4, 2, 16)
    documents = documents_at(shape.n, *borders, batch=shape.batch) if borders else None
    core, given = make(shape, top_k=9, dtype=torch.float64, dropout=dropout), Inputs.random(shape, dtype=torch.float64)
    found = []
    for table in (1 << 24, 2 * 9 * 32):
        monkeypatch.setattr(dsa, "_TABLE", table)
        leaves = given.leaves()
        result = run(core, leaves, documents)
        weights = torch.linspace(-1, 1, result.out.numel()).view_as(result.out)
        of = [*leaves.tensors()[:3], *core.parameters()]
        grads = torch.autograd.grad((result.out * weights).sum() + result.aux_loss, of)
        found.append((result, grads))
    (whole, grads), (parts, of_parts) = found
    close(parts.out, whole.out, 1e-12, "the output")
    for grad, wanted in zip(of_parts, grads, strict=True):
        close(grad, wanted, 1e-12, "a gradient")
    for name, value in whole.stats.items():
        close(parts.stats[name], value, 1e-6, name)
    assert torch.equal(parts.choice, whole.choice)


def test_the_dense_stage_is_dense_and_says_what_the_indexer_would_keep() -> None:
    shape = Shape(111, 2, 4, 2, 32)
    core, given = make(shape, top_k=9, dense_steps=2, dense_from=4), Inputs.random(shape)
    for step, dense in enumerate([True, True, False, False, True]):
        core.set_step(step, 5)
        result = run(core, given)
        right = dense_attention(given, causal=True)
        assert torch.allclose(result.out, right, atol=1e-5) == dense
        assert (float(result.stats["density"]) == 1.0) == dense and (result.choice is None) == dense
        assert 0 < float(result.stats["kept_mass"]) < 1
        assert float(result.aux_loss.detach()) == float(result.stats["selection_kl"]) > 0
    assert [id(p) for p in core.selector_parameters()] == [id(p) for p in core.parameters()]


def test_without_gradients_nothing_is_spent_on_the_loss() -> None:
    shape = Shape(40, 1, 2, 1, 16)
    with torch.no_grad():
        result = run(make(shape, top_k=5), Inputs.random(shape))
    assert result.aux_loss is None and set(result.stats) == {"density", "kept_mass"}


def test_decoding_without_the_index_keys_of_the_past_is_refused() -> None:
    shape = Shape(40, 1, 2, 1, 16)
    core, given = make(shape, top_k=5), Inputs.random(shape)
    new = given.tokens(30, 40)
    for states in (None, {0: {}}):
        with pytest.raises(ValueError, match=r"ctx.states holds no index keys of 30 tokens for layer 0; decode with"):
            core(new.q, given.k, given.v, x=new.x, ctx=context(40, q_start=30, states=states))


def test_a_choice_of_everything_is_named(caplog: pytest.LogCaptureFixture) -> None:
    dense_warning.warn_if_dense.cache_clear()
    with caplog.at_level(logging.WARNING, logger="lightsparse"):
        for layer in range(2):
            DsaAttention(DsaConfig(top_k=512), AttentionShape(2, 1, 16, 32, layer=layer, context=512))
    assert len(caplog.records) == 1 and "attention.top_k is 512 tokens per query" in caplog.text


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"top_k": 0}, "attention.top_k is 0; it must be at least 1"),
        ({"index_heads": 0}, "attention.index_heads is 0"),
        ({"index_dim": 7}, "attention.index_dim is 7; pairs of it are rotated, so it must be even"),
        ({"kl_weight": 0.0}, "attention.kl_weight is 0.0; nothing else trains the indexer"),
        ({"density": 0.1}, "attention.density is 0.1; a query reads top_k tokens whatever the context"),
        ({"dense_steps": -2}, "attention.dense_steps is -2"),
    ],
)
def test_wrong_values_are_refused_in_one_sentence(fields, sentence) -> None:
    with pytest.raises(ValueError, match=sentence):
        DsaConfig(**fields)
