"""NSA against its equations written out, branch by branch and whole; its choice, its parts and what it reports.

tests/battery.py runs over it as over every variant; branch_kv=own and compress=mean are in test_attention_nsa_kinds.py.
"""

from __future__ import annotations

import logging

import pytest
import torch
from battery import Inputs, Shape, close, context, dense_attention, documents_at, gradients
from nsa_case import as_map, make, only, run, softmax_under, squeezed, written_out

from lightsparse.attention.core import AttentionShape
from lightsparse.attention.nsa import BRANCHES, NsaAttention, NsaConfig
from lightsparse.attention.selection import dense_warning, nsa_select, row_parts
from lightsparse.attention.selection.nsa_select import Selector
from lightsparse.attention.sliding_window import SlidingWindowAttention, SlidingWindowConfig

SHAPES = [Shape(63, 1, 2, 2, 32), Shape(111, 2, 4, 2, 16), Shape(333, 1, 4, 1, 16)]
BORDERS = ((), (32, 48), (5, 37, 38, 61))


def choice_of(core: NsaAttention, given: Inputs, documents: torch.Tensor | None = None) -> torch.Tensor:
    """Of all queries."""
    n = given.x.shape[1]
    ctx = context(n, documents)
    keys = core.summaries(given.k, given.v, given.x, n, ctx).k
    return core.choose(given.q, keys, torch.arange(n), n, ctx)


def equal(core: NsaAttention, given: Inputs, documents: torch.Tensor | None = None) -> None:
    found, (right, chosen) = run(core, given, documents), written_out(core, given, documents)
    close(found.out, right, 1e-5, "the output")
    assert torch.equal(as_map(choice_of(core, given, documents), chosen.shape[-1]), chosen)
    of = (*given.tensors(), *core.parameters())
    for i, (grad, expected) in enumerate(zip(gradients(found.out, *of), gradients(right, *of), strict=True)):
        close(grad, expected, 1e-5, f"gradient {i} (q, k, v, x, parameters)")


@pytest.mark.parametrize("top_n", [3, 5, 99])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_the_equations_in_output_and_gradients(shape, top_n):
    equal(make(shape, top_n=top_n), Inputs.random(shape).leaves())


@pytest.mark.parametrize("fields", [{"first": 0, "local": 1, "top_n": 2}, {"first": 2, "local": 3, "top_n": 6}])
def test_forced_blocks_can_be_others(fields):
    equal(make(SHAPES[1], **fields), Inputs.random(SHAPES[1]).leaves())


@pytest.mark.parametrize(("block", "stride", "select"), [(16, 16, 16), (4, 4, 16), (12, 4, 8), (16, 2, 32)])
def test_any_blocks_and_strides_that_divide(block, stride, select):
    fields = {"compress_block": block, "compress_stride": stride, "select_block": select}
    equal(make(SHAPES[1], **fields), Inputs.random(SHAPES[1]).leaves())


@pytest.mark.parametrize("borders", BORDERS[1:])
def test_documents_have_their_own_summaries_first_blocks_and_choices(borders):
    documents = torch.cat([documents_at(111, *borders), documents_at(111, borders[0])])
    equal(make(SHAPES[1], select_block=8, window=9), Inputs.random(SHAPES[1]).leaves(), documents)


def test_the_compressed_branch_alone_is_attention_over_the_summaries():
    shape = SHAPES[1]
    core, given = only(make(shape), "compressed"), Inputs.random(shape).leaves()
    k, v = (squeezed(f, x, 8, 4) for f, x in ((core.summaries.of_keys, given.k), (core.summaries.of_values, given.v)))
    right = softmax_under(given.q, k, v, (torch.arange(k.shape[2]) * 4 + 7 <= torch.arange(111)[:, None])[None, None])
    out = run(core, given).out
    close(out, right, 1e-5, "the output")
    assert bool((out[:, :, :7] == 0).all()) and bool((out[:, :, 7] != 0).all())  # no summary is complete before token 7
    of = (given.q, given.k, given.v, *core.summaries.parameters())
    for grad, expected in zip(gradients(out, *of), gradients(right, *of), strict=True):
        close(grad, expected, 1e-5, "a gradient")


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_selected_branch_alone_with_all_blocks_is_dense_attention(shape):
    given = Inputs.random(shape).leaves()
    out, right = run(only(make(shape, top_n=99), "selected"), given).out, dense_attention(given, True)
    close(out, right, 1e-5, "the output")
    for grad, expected in zip(
        gradients(out, *given.tensors()[:3]), gradients(right, *given.tensors()[:3]), strict=True
    ):
        close(grad, expected, 1e-5, "a gradient")


def test_the_window_branch_alone_is_sliding_window():
    shape = SHAPES[1]
    given = Inputs.random(shape)
    window = SlidingWindowAttention(
        SlidingWindowConfig(window=21, sinks=0, block=16), AttentionShape(shape.heads, shape.kv_heads, shape.dim, 64)
    )
    documents = documents_at(111, 40, batch=2)
    out = run(only(make(shape), "window"), given, documents).out
    assert torch.equal(out, window(*given.tensors()[:3], x=given.x, ctx=context(111, documents)).out)


def test_gates_add_up_without_being_normalised():
    shape = SHAPES[0]
    given = Inputs.random(shape)
    parts = [run(only(make(shape), branch), given).out for branch in BRANCHES]
    close(run(only(make(shape), *BRANCHES), given).out, sum(parts), 1e-6, "the sum of all branches")


def test_importance_weighs_summaries_by_the_tokens_that_they_share_with_a_block():
    """Of 32, 16 and 64 tokens: summary i covers 16 i … 16 i + 31, block 1 covers 64 … 127."""
    selector = Selector(32, 16, 64, top=16, first=1, local=2)
    weights = selector.importance(torch.eye(11), 3)  # [summaries, blocks]
    assert weights[:, 1].tolist() == [0, 0, 0, 1, 2, 2, 2, 1, 0, 0, 0]
    assert weights[:, 0].tolist() == [2, 2, 2, 1, 0, 0, 0, 0, 0, 0, 0]
    assert weights.sum(1).tolist() == [2] * 11


@pytest.mark.parametrize(("block", "stride", "select"), [(16, 16, 16), (24, 8, 16), (8, 4, 32)])
def test_importance_is_the_overlap_for_other_sizes(block, stride, select):
    weights = Selector(block, stride, select, 9, 1, 2).importance(torch.eye((5 * select - block) // stride + 1), 5)
    for i, row in enumerate(weights.tolist()):
        covered = range(i * stride, i * stride + block)
        assert row == [len(set(covered) & set(range(j * select, (j + 1) * select))) / stride for j in range(5)]


def test_query_heads_of_a_group_choose_together_by_the_sum_of_their_attention():
    """One head alone would choose block 1, the other block 2, which the first finds second best."""
    keys = torch.zeros(1, 1, 5, 2)
    keys[0, 0, 1], keys[0, 0, 2], keys[0, 0, 3] = (
        torch.tensor([3.0, 0.0]),
        torch.tensor([2.8, 2.0]),
        torch.tensor([0, 3]),
    )
    q = torch.tensor([[2.0, 0.0], [0.0, 0.6]]).view(1, 2, 1, 2)
    selector = Selector(16, 16, 16, top=2, first=0, local=1)
    alone = [selector.table(q[:, h : h + 1], keys, torch.tensor([79]), 80, None).tolist()[0][0][0] for h in (0, 1)]
    assert alone == [[1, 4], [3, 4]]
    assert selector.table(q, keys, torch.tensor([79]), 80, None).tolist() == [[[[2, 4]]]]


def test_the_least_budget_reads_the_first_and_the_local_blocks_and_no_others():
    choice = run(make(SHAPES[1], top_n=3), Inputs.random(SHAPES[1])).choice
    assert choice.shape == (2, 2, 7, 3)
    for row, blocks in enumerate(choice[1, 1].tolist()):
        assert [j for j in blocks if j >= 0] == sorted({0, max(row - 1, 0), row})


@pytest.mark.parametrize("top_n", [4, 9])
def test_equally_important_blocks_are_chosen_from_the_lowest(top_n):
    shape = Shape(320, 1, 2, 1, 16)
    given = Inputs.random(shape)
    same = Inputs(given.q, torch.ones_like(given.k), given.v, given.x)
    # Without overlap all blocks that are complete are equally important.
    core = make(shape, top_n=top_n, compress="mean", compress_block=16, compress_stride=16, select_block=16)
    for row, blocks in enumerate(run(core, same).choice[0, 0].tolist()):
        assert [j for j in blocks if j >= 0] == sorted({*range(min(row + 1, top_n - 2)), max(row - 1, 0), row})


@pytest.mark.parametrize("borders", BORDERS)
def test_the_choice_depends_on_no_later_token(borders):
    shape = SHAPES[1]
    core, given = make(shape, top_n=4, select_block=8), Inputs.random(shape, dtype=torch.float64)
    documents = documents_at(111, *borders, batch=2) if borders else None
    table = choice_of(core, given, documents)
    assert not torch.equal(table, choice_of(core, given.perturbed(64, 80), documents))
    for t in (1, 15, 16, 17, 33, 96, 110):
        assert torch.equal(choice_of(core, given.perturbed(t, 111), documents)[:, :, :t], table[:, :, :t])


def test_the_choice_gives_no_gradient():
    """The compression learns by what is read of it, not by what is chosen with it."""
    core = only(make(SHAPES[1]), "selected", "window")
    out = run(core, Inputs.random(SHAPES[1])).out
    assert all(not grad.any() for grad in gradients(out, *core.summaries.parameters()))
    assert core.selector_parameters() == []


def test_long_rows_of_scores_are_cut_and_the_choice_stays(monkeypatch):
    core, given = make(SHAPES[2], top_n=6), Inputs.random(SHAPES[2])
    whole = run(core, given)
    monkeypatch.setattr(nsa_select, "_SCORES", 3000)
    cut = run(core, given)
    assert torch.equal(cut.choice, whole.choice) and torch.equal(cut.out, whole.out)


@pytest.mark.parametrize("borders", BORDERS)
def test_a_sequence_in_parts_equals_the_whole_and_keeps_no_table(borders, monkeypatch):
    shape = SHAPES[1]
    documents = documents_at(111, *borders, batch=2) if borders else None
    core, results, kept = make(shape, dropout=0.2).double().train(), [], []
    for table in (1 << 24, 300):
        monkeypatch.setattr(row_parts, "_TABLE", table)
        given, saved = Inputs.random(shape, dtype=torch.float64).leaves(), []

        def save(t: torch.Tensor, of=saved) -> torch.Tensor:
            of.append(t.dtype == torch.int32 and t.dim() == 4 and t.shape[2] > 7)  # a row per query
            return t

        with torch.autograd.graph.saved_tensors_hooks(save, lambda t: t):
            found = run(core, given, documents)
        kept.append(sum(saved))
        results.append([found.out, found.choice, *found.stats.values(), *gradients(found.out, *given.tensors()[:3])])
    assert kept[0] > 0 and kept[1] == 0
    for ours, right in zip(*results, strict=True):
        torch.testing.assert_close(ours, right)


def test_branches_drop_different_weights():
    """A window and a selection that read everything would drop the same pairs if they drew alike."""
    shape = SHAPES[0]
    given = Inputs.random(shape)
    outs = [
        run(only(make(shape, top_n=99, window=999, dropout=0.5), branch).train(), given).out
        for branch in ("selected", "window")
    ]
    assert not torch.allclose(*outs)


def test_the_picture_shows_all_three_branches():
    shape = SHAPES[2]
    core, given = make(shape), Inputs.random(shape)
    _, chosen = written_out(core, given)
    layout = core.select(given.q, given.k, given.x, context(333)).layout
    tiles, t = layout.block_map()[0, 0], torch.arange(333)
    near = torch.stack([(t.clamp(max=20) >= 0) & (t // 16 == j) for j in range(21)], 1)
    window = torch.stack([near[max(i - 20, 0) // 16 * 16 : i + 1].any(0) for i in range(333)])
    read = chosen[0, 0] | window  # the kernel's tiles of the window are those of a whole row of blocks
    assert bool((tiles[:, :21] >= read).all())
    assert tiles[:, :21].sum() <= read.sum() + 333 * 2
    complete = ((t - 7) // 4 + 1).clamp(min=0)
    assert torch.equal(tiles[::16, 21:].sum(1) >= -(-complete[::16] // 16), torch.ones(21, dtype=torch.bool))
    assert layout.num_tokens == 333 and layout.density() > float(
        core.window.layout(333, context(333), t.device).density()
    )


def test_stats_say_what_the_gates_do_and_what_is_kept():
    shape = SHAPES[2]
    given = Inputs.random(shape)
    core = make(shape)
    stats = run(core, given).stats
    gates = (
        torch.nn.functional.linear(given.x, core.gate.weight, core.gate.bias).sigmoid().unflatten(-1, (3, -1)).detach()
    )
    for i, branch in enumerate(BRANCHES):
        assert float(stats[f"gate_{branch}"]) == pytest.approx(float(gates[:, :, i].mean()), abs=1e-6)
    assert set(core.logged) | {"density"} == set(stats)
    assert 0.1 < float(stats["kept_mass"]) < 0.95
    assert float(run(make(shape, top_n=99), given).stats["kept_mass"]) == pytest.approx(1)


def test_density_counts_every_branch():
    """320 tokens in blocks of 16: 20 rows of tiles of the window, a row per token of the choice, and the summaries."""
    shape = Shape(320, 1, 2, 1, 16)
    core, given = make(shape, window=16, top_n=3), Inputs.random(shape)
    dense = sum(i + 1 for i in range(20)) * 256
    window = (1 + 19 * 2) * 256
    selected = (1 + 2 + 18 * 3) * 256
    rows = [max((16 * i + 15 - 7) // 4 + 1, 0) for i in range(20)]
    summaries = sum(min(-(-seen // 16) * 16, 79) for seen in rows) * 16
    expected = (window + selected + summaries) / dense
    assert float(run(core, given).stats["density"]) == pytest.approx(expected, rel=1e-6)


def test_scores_are_fp32_whatever_autocast_says():
    core, given = make(SHAPES[2]), Inputs.random(SHAPES[2])
    plain = run(core, given).choice
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(run(core, given).choice, plain)


def test_every_parameter_is_in_the_loss_of_texts_too_short_for_a_summary():
    shape = Shape(5, 1, 2, 1, 16)
    core = make(shape)
    torch.autograd.grad(run(core, Inputs.random(shape)).out.sum(), list(core.parameters()))  # an unused one is an error


def test_a_selection_of_everything_says_so(caplog):
    dense_warning.warn_if_dense.cache_clear()
    with caplog.at_level(logging.WARNING, logger="lightsparse"):
        make(SHAPES[0], context=65, top_n=4)
        assert not caplog.records
        make(SHAPES[0], context=64, top_n=4)
    assert "attention.top_n × attention.select_block is 64 tokens per query and the context has 64" in caplog.text


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"window": 0}, "attention.window is 0; it must be at least 1"),
        ({"local": 0}, "attention.local is 0; it must be at least 1"),
        ({"first": -1}, "attention.first is -1; it counts blocks and must be at least 0"),
        ({"compress_block": 40}, "attention.compress_block is 40; it must be a multiple of attention.compress_stride"),
        ({"select_block": 24}, "attention.select_block is 24; it must be a multiple of attention.compress_stride"),
        ({"top_n": 2}, "attention.top_n is 2; it counts the 1 first and 2 local blocks, so it must be at least 3"),
        ({"compress": "max"}, "attention.compress is 'max'; use mlp or mean"),
        ({"branch_kv": "both"}, "attention.branch_kv is 'both'; use shared or own"),
        ({"compress": "mean", "compress_hidden": 8}, "attention.compress_hidden is 8; it is the width of compress=mlp"),
        ({"density": 0.5}, "attention.density is 0.5; a query reads top_n blocks and a window whatever the context"),
    ],
)
def test_what_cannot_work_is_refused_at_construction(fields, sentence):
    with pytest.raises(ValueError, match=sentence):
        NsaConfig(**fields)
