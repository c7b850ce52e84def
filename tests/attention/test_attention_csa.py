"""CSA and HCA against their definition written out, CSA's choice, what it learns from, and what it keeps.

tests/battery.py runs over both as over every variant; test_attention_csa_oracle.py compares with transformers.
"""

from __future__ import annotations

import logging
from dataclasses import replace

import pytest
import torch
from battery import ROTARY, Inputs, Shape, close, context, documents_at, gradients
from compressed_case import read_by_definition, written_out
from torch import Tensor

from lightsparse.attention import csa
from lightsparse.attention.core import AttentionShape, SequenceContext
from lightsparse.attention.csa import CsaAttention, CsaConfig
from lightsparse.attention.hca import HcaAttention, HcaConfig
from lightsparse.attention.pooling.compressed import CompressedAttention, Entries
from lightsparse.attention.selection import dense_warning

SHAPES = [Shape(63, 1, 2, 2, 32), Shape(111, 2, 4, 2, 16), Shape(50, 1, 8, 1, 16)]
BORDERS = ((32, 48), (5, 37, 38, 61), (1, 62))


def make(kind: str, shape: Shape, context_length: int | None = None, **fields) -> CompressedAttention:
    """In evaluation mode, with parameters large enough to matter."""
    torch.manual_seed(0)
    of = AttentionShape(shape.heads, shape.kv_heads, shape.dim, shape.heads * shape.dim, context=context_length)
    small = {"window": 7, "block": 8} | fields
    if kind == "csa":
        core = CsaAttention(CsaConfig(**{"top_k": 3, "index_heads": 6, "index_dim": 8, "stride": 4} | small), of)
    else:
        core = HcaAttention(HcaConfig(**{"stride": 8} | small), of)
    with torch.no_grad():
        for parameter in core.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    return core.eval()


def run(core: CompressedAttention, given: Inputs, documents: Tensor | None = None):
    return core(*given.tensors()[:3], x=given.x, ctx=context(given.x.shape[1], documents))


def equals(core: CompressedAttention, given: Inputs, documents: Tensor | None = None) -> None:
    found, (right, loss) = run(core, given, documents), written_out(core, given, documents)
    close(found.out, right, 1e-5, "the output")
    of_main = [p for name, p in core.named_parameters() if not name.startswith("indexer")]
    leaves = [*given.tensors(), *of_main]
    for i, (grad, expected) in enumerate(zip(gradients(found.out, *leaves), gradients(right, *leaves), strict=True)):
        close(grad, expected, 1e-5, f"gradient {i} (q, k, v, x, sink, compressor)")
    if isinstance(core, CsaAttention):
        close(found.aux_loss, loss, 1e-5, "the indexer's loss")
        of_index = core.selector_parameters()
        for grad, expected in zip(gradients(found.aux_loss, *of_index), gradients(loss, *of_index), strict=True):
            close(grad, expected, 1e-5, "a gradient of the indexer's loss")
        others = torch.autograd.grad(run(core, given).aux_loss, leaves, allow_unused=True)
        assert all(grad is None for grad in others), "the indexer's loss trains something else"


@pytest.mark.parametrize("top_k", [1, 3, 8, 99])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_csa_equals_the_definition_in_output_loss_and_gradients(shape, top_k):
    equals(make("csa", shape, top_k=top_k), Inputs.random(shape).leaves())


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_hca_equals_the_definition_in_output_and_gradients(shape):
    equals(make("hca", shape), Inputs.random(shape).leaves())


@pytest.mark.parametrize("borders", [(), *BORDERS])
def test_in_the_dense_stage_every_entry_is_read_and_imitated(borders):
    shape = Shape(63, 2, 4, 2, 16)
    documents = torch.cat([documents_at(63, *borders), documents_at(63)]) if borders else None
    core, given = make("csa", shape, dense_steps=2), Inputs.random(shape).leaves()
    equals(core, given, documents)
    assert run(core, given, documents).choice is None
    core.set_step(2, 9)
    assert run(core, given, documents).choice is not None
    equals(core, given, documents)


@pytest.mark.parametrize("borders", BORDERS)
@pytest.mark.parametrize("kind", ["csa", "hca"])
def test_documents_equal_the_definition_wherever_a_border_cuts_a_stride(kind, borders):
    shape = Shape(63, 2, 4, 2, 16)
    documents = torch.cat([documents_at(63, *borders), documents_at(63, borders[0])])
    equals(make(kind, shape), Inputs.random(shape).leaves(), documents)


def test_one_entry_is_one_entry_beside_the_window_and_never_all():
    shape = Shape(63, 1, 2, 1, 32)
    core, given = make("csa", shape, top_k=1, block=1), Inputs.random(shape)
    table = run(core, given).choice[0, 0]
    assert table.shape == (63, 1)
    assert (table[:3] < 0).all() and (table[3:] >= 0).all()
    assert (table[:, 0] * 4 + 3 <= torch.arange(63))[3:].all()


@pytest.mark.parametrize("kind", ["csa", "hca"])
def test_without_a_sink_the_weights_sum_to_one_and_with_it_to_less(kind, monkeypatch):
    shape = Shape(63, 1, 4, 2, 16)
    core = make(kind, shape)
    ones = replace(Inputs.random(shape), v=torch.ones(1, 2, 63, 16))
    made = core.entries

    def of_ones(x: Tensor, dtype: torch.dtype, ctx: SequenceContext) -> Entries:
        entries = made(x, dtype, ctx)
        return replace(entries, values=torch.ones_like(entries.values))

    monkeypatch.setattr(core, "entries", of_ones)
    assert (run(core, ones).out < 0.999).all()
    with torch.no_grad():
        core.sink.fill_(-torch.inf)
    close(run(core, ones).out, torch.ones(1, 4, 63, 16), 1e-5, "a mean of ones")


def test_equal_scores_go_to_the_lower_entry():
    shape = Shape(63, 1, 2, 1, 16)
    core = make("csa", shape, block=1)
    with torch.no_grad():
        core.indexer.weight.weight.zero_()
    for token, row in enumerate(run(core, Inputs.random(shape)).choice[0, 0].tolist()):
        assert [entry for entry in row if entry >= 0] == list(range(min((token + 1) // 4, 3)))


@pytest.mark.parametrize("borders", [(), *BORDERS])
def test_the_choice_depends_on_no_later_token(borders):
    shape = Shape(111, 2, 4, 2, 16)
    core, given = make("csa", shape, block=1), Inputs.random(shape, dtype=torch.float64)
    core, documents = core.double(), documents_at(111, *borders, batch=2) if borders else None
    table = run(core, given, documents).choice
    assert not torch.equal(table, run(core, given.perturbed(64, 80), documents).choice)
    for t in (1, 15, 16, 17, 33, 96, 110):
        assert torch.equal(run(core, given.perturbed(t, 111), documents).choice[:, :, :t], table[:, :, :t])


def test_scores_are_fp32_whatever_autocast_says():
    shape = Shape(111, 1, 4, 2, 32)
    core, given = make("csa", shape), Inputs.random(shape)
    plain = run(core, given)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(run(core, given).choice, plain.choice)


@pytest.mark.parametrize("borders", [(), *BORDERS])
def test_a_sequence_in_parts_equals_the_whole_and_keeps_no_table(borders, monkeypatch):
    shape = Shape(111, 2, 4, 2, 16)
    documents = documents_at(111, *borders, batch=2) if borders else None
    core, results, kept = make("csa", shape, dropout=0.2).double().train(), [], []
    for table in (1 << 22, 100):
        monkeypatch.setattr(csa, "_TABLE", table)
        given, saved = Inputs.random(shape, dtype=torch.float64).leaves(), []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, s=saved: s.append(t.dtype) or t, lambda t: t):
            found = run(core, given, documents)
        kept.append(saved.count(torch.int32))
        loss = (found.out.sin().sum() + found.aux_loss)[None]
        results.append([found.out, found.choice, *found.stats.values(), *gradients(loss, *given.tensors())])
    assert kept[1] < kept[0]
    for ours, right in zip(*results, strict=True):
        torch.testing.assert_close(ours, right)


@pytest.mark.parametrize(("kind", "stride", "most"), [("csa", 4, 7), ("hca", 8, 7)])
def test_decoding_keeps_entries_and_the_tokens_of_the_unfinished_stride(kind, stride, most):
    shape = Shape(75, 2, 4, 2, 16)
    core, given, states = make(kind, shape).double(), Inputs.random(shape, dtype=torch.float64), {0: {}}
    whole = core.entries(given.x, torch.float64, context(75)).values
    for start, stop in ((0, 3), (3, 30), (30, 31), (31, 32), (32, 75)):
        new, held = given.tokens(start, stop), given.tokens(0, stop)
        result = core(new.q, held.k, held.v, x=new.x, ctx=context(stop, q_start=start, states=states))
        assert not start or not result.stats
        torch.testing.assert_close(states[0]["entries"], whole[:, :, : stop // stride])
        assert states[0]["entries_x"].shape[1] <= most


def test_decoding_without_the_state_of_the_tokens_before_is_refused():
    shape = Shape(20, 1, 2, 1, 16)
    core, given = make("hca", shape), Inputs.random(shape)
    with pytest.raises(ValueError, match=r"ctx.q_start is 19 but ctx.states holds no compressed entries of 19 tokens"):
        core(given.q[:, :, 19:], given.k, given.v, x=given.x[:, 19:], ctx=context(20, q_start=19, states={0: {}}))


@pytest.mark.parametrize("kind", ["csa", "hca"])
def test_a_sequence_shorter_than_a_stride_is_a_window_with_a_sink_and_every_parameter_has_a_gradient(kind):
    shape = Shape(3, 1, 2, 1, 16)
    core, given = make(kind, shape).train(), Inputs.random(shape)
    found = run(core, given)
    logits = (given.q @ given.k.mT / 4).masked_fill(~torch.ones(3, 3).tril().bool(), -torch.inf)
    weights = torch.cat([logits, core.sink[:, None, None].expand(1, -1, 3, 1)], -1).softmax(-1)
    close(found.out, weights[..., :-1] @ given.v, 1e-5, "the output")
    torch.autograd.grad(found.out.sum() + found.aux_loss, list(core.parameters()))  # raises where one is left out
    assert set(found.stats) == {"density", *core.logged}


def test_without_rotary_positions_nothing_is_turned():
    shape = Shape(40, 1, 2, 1, 16)
    core, given = make("hca", shape), Inputs.random(shape)
    entries = core.entries(given.x, torch.float32, replace(context(40), rotary=None))
    assert torch.equal(entries.keys, entries.values)
    turned = core.entries(given.x, torch.float32, context(40))
    torch.testing.assert_close(turned.keys, ROTARY.rotated(entries.keys, torch.arange(0, 40, 8)[None]))


def test_density_counts_window_tiles_and_entries_read():
    shape = Shape(64, 1, 2, 1, 16)
    found = run(make("csa", shape, window=8, block=8, top_k=2), Inputs.random(shape))
    dense = 64 * sum(range(1, 9))
    window = 64 * (1 + 2 * 7)
    pairs = sum(min((t + 1) // 4, 2) for t in range(64))
    assert float(found.stats["density"]) == pytest.approx((window + pairs) / dense)


@pytest.mark.parametrize("kind", ["csa", "hca"])
@pytest.mark.parametrize("borders", [(), *BORDERS])
def test_the_picture_shows_what_forward_reads(kind, borders):
    shape = Shape(63, 2, 4, 2, 16)
    documents = torch.cat([documents_at(63, *borders), documents_at(63)]) if borders else None
    core, given, ctx = make(kind, shape), Inputs.random(shape), context(63, documents)
    if isinstance(core, CsaAttention):
        layout = core.select(given.q, given.k, given.x, ctx).layout
    else:
        layout = core.layout(63, ctx, torch.device("cpu"))
    read = layout.to_dense().expand(2, -1, -1, -1)[:, 0]
    near, entries = read_by_definition(core, given, documents)
    assert torch.equal(read[:, :, :63], near)
    assert torch.equal(read[:, :, layout.num_keys - entries.shape[2] :], entries)
    density = float(run(core, given, documents).stats["density"])
    if kind == "hca" or not borders:  # csa counts dense attention by tokens here, by tiles there
        assert layout.density() == pytest.approx(density, rel=0.15 if kind == "csa" else 1e-6)


def test_a_configuration_that_reads_everything_says_so(caplog):
    dense_warning.warn_if_dense.cache_clear()
    with caplog.at_level(logging.WARNING, logger="lightsparse"):
        make("csa", Shape(), 512, top_k=127)
        assert not caplog.records
        make("csa", Shape(), 512, top_k=128)
    assert "attention.top_k × attention.stride is 512 tokens per query and the context has 512" in caplog.text


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"window": 0}, "attention.window is 0; it counts tokens and must be at least 1"),
        ({"stride": 0}, "attention.stride is 0; it counts tokens per entry and must be at least 1"),
        ({"top_k": 0}, "attention.top_k is 0; it counts entries and must be at least 1"),
        ({"index_heads": 0}, "attention.index_heads is 0; it counts heads and must be at least 1"),
        ({"index_dim": 7}, "attention.index_dim is 7; it is turned in pairs and must be even and at least 4"),
        ({"index_weight": 0.0}, "attention.index_weight is 0.0; nothing else trains the indexer"),
        ({"density": 0.5}, "attention.density is 0.5; window and stride set it here"),
    ],
)
def test_what_cannot_work_is_refused_at_construction(fields, sentence):
    with pytest.raises(ValueError, match=sentence):
        CsaConfig(**fields)
