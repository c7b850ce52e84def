"""MoBA against ten lines that say what it is, its choice, its parts, what it reports and what it warns of.

tests/battery.py runs over it as over every variant; here stands what only a choice per query has.
"""

from __future__ import annotations

import logging

import pytest
import torch
from battery import Inputs, Shape, close, context, documents_at, gradients
from torch import Tensor

from lightsparse.attention.core import AttentionShape
from lightsparse.attention.moba import MobaAttention, MobaConfig
from lightsparse.attention.selection import dense_warning, row_parts
from lightsparse.attention.selection.router import best, listed
from lightsparse.attention.selection.top_blocks import _highest, top_blocks


def make(shape: Shape, top_k: int = 3, block: int = 16, **fields) -> MobaAttention:
    of = AttentionShape(shape.heads, shape.kv_heads, shape.dim, shape.heads * shape.dim)
    return MobaAttention(MobaConfig(block=block, top_k=top_k, **fields), of)


def run(core: MobaAttention, given: Inputs, documents: Tensor | None = None):
    return core(*given.tensors()[:3], x=given.x, ctx=context(given.x.shape[1], documents))


def written_out(given: Inputs, block: int, top_k: int, documents: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The definition: (output, bool [B, H, N, blocks] of what is read)."""
    q, (k, v) = given.q, (t.repeat_interleave(given.q.shape[1] // t.shape[1], 1) for t in (given.k, given.v))
    n, ids = q.shape[2], documents_at(q.shape[2], batch=len(q)) if documents is None else documents
    own, column = torch.arange(n) // block, torch.arange(-(-n // block))
    of_block = ids[:, ((column + 1) * block - 1).clamp(max=n - 1)]  # whose tokens a block's mean is about
    member = (own[:, None] == column) & (ids[..., None] == of_block[:, None])
    means = torch.einsum("bnj,bhnd->bhjd", member / member.sum(1, keepdim=True).to(q.dtype), k.detach())
    may_choose = (column < own[:, None]) & (of_block[:, None] == ids[..., None])
    scores = (q.detach() @ means.mT).masked_fill(~may_choose[:, None], -torch.inf)
    scores = scores.masked_fill(column == own[:, None], torch.inf)
    read = torch.zeros_like(scores, dtype=torch.bool).scatter(-1, scores.topk(min(top_k, len(column))).indices, True)
    read &= scores > -torch.inf
    allowed = read[..., own] & torch.ones(n, n).tril().bool() & (ids[:, None, :, None] == ids[:, None, None])
    return (q @ k.mT / q.shape[-1] ** 0.5).masked_fill(~allowed, -torch.inf).softmax(-1) @ v, read


SHAPES = [Shape(63, 1, 2, 2, 32), Shape(111, 2, 4, 2, 64), Shape(333, 1, 8, 2, 16), Shape(200, 2, 4, 1, 32)]
BORDERS = ((), (32, 48), (5, 37, 38, 61))


def equals(core: MobaAttention, given: Inputs, block: int, top_k: int, documents: Tensor | None = None) -> None:
    out, (right, _) = run(core, given, documents).out, written_out(given, block, top_k, documents)
    close(out, right, 1e-5, "the output")
    found, wanted = (gradients(result, *given.tensors()[:3]) for result in (out, right))
    for name, grad, expected in zip("qkv", found, wanted, strict=True):
        close(grad, expected, 1e-5, f"the gradient of {name}")


@pytest.mark.parametrize("top_k", [1, 2, 3, 7, 99])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_the_definition_in_output_and_gradients(shape, top_k):
    equals(make(shape, top_k), Inputs.random(shape).leaves(), 16, top_k)


@pytest.mark.parametrize("borders", BORDERS[1:])
@pytest.mark.parametrize("top_k", [1, 3, 6])
def test_documents_choose_among_their_own_blocks(top_k, borders):
    shape = Shape(111, 2, 4, 2, 32)
    documents = torch.cat([documents_at(111, *borders), documents_at(111, borders[0])])
    equals(make(shape, top_k, block=8), Inputs.random(shape).leaves(), 8, top_k, documents)


@pytest.mark.parametrize("borders", BORDERS)
def test_the_choice_depends_on_no_later_token(borders):
    shape = Shape(111, 2, 4, 2, 32)
    core, given = make(shape), Inputs.random(shape, dtype=torch.float64)
    documents = documents_at(111, *borders, batch=2) if borders else None

    def chosen(of: Inputs) -> Tensor:
        ctx = context(111, documents)
        return core.choose(of.q, core._block_means(of.k, ctx), torch.arange(111), ctx)

    table = chosen(given)
    assert not torch.equal(table, chosen(given.perturbed(64, 80)))
    for t in (1, 15, 16, 17, 33, 96, 110):
        assert torch.equal(chosen(given.perturbed(t, 111))[:, :, :t], table[:, :, :t])


def test_the_picture_shows_what_forward_reads():
    shape = Shape(111, 2, 4, 2, 32)
    core, given = make(shape), Inputs.random(shape)
    layout = core.select(given.q, given.k, given.x, context(111)).layout
    _, read = written_out(given, 16, 3)
    assert torch.equal(layout.block_map(), read)
    assert layout.density() == pytest.approx(float(run(core, given).stats["density"]))


def test_one_block_is_the_own_one_and_no_other():
    shape = Shape(63, 1, 2, 1, 32)
    choice = run(make(shape, top_k=1), Inputs.random(shape)).choice
    assert choice[0, 0].tolist() == [[0], [1], [2], [3]]


@pytest.mark.parametrize("top_k", [3, 9])
def test_equal_scores_go_to_the_lower_block(top_k):
    shape = Shape(320, 1, 2, 1, 16)
    given = Inputs.random(shape)
    same = Inputs(given.q, torch.ones_like(given.k), given.v, given.x)
    choice = run(make(shape, top_k), same).choice
    for row, blocks in enumerate(choice[0, 0].tolist()):
        assert [j for j in blocks if j >= 0] == [*range(min(row, top_k - 1)), row]


@pytest.mark.parametrize("most", [1, 4, 5, 20])
def test_the_quick_way_to_the_highest_is_the_exact_one(most):
    scores = torch.randn(3, 2, 40, 30, generator=torch.Generator().manual_seed(0))
    scores = scores.masked_fill(torch.arange(30) > torch.arange(40)[:, None] - 5, -torch.inf)
    wanted = listed(best(scores, scores > -torch.inf, most), most)
    found = _highest(scores, most)
    assert torch.equal(torch.where(found < 0, 99, found).sort(-1).values, torch.where(wanted < 0, 99, wanted))
    tied = (scores * 2).round()
    exact = listed(best(tied, tied > -torch.inf, most), most)
    quick = _highest(tied, most)
    if quick is None:
        assert most > 4  # then the exact way is taken
    else:
        assert torch.equal(torch.where(quick < 0, 99, quick).sort(-1).values, torch.where(exact < 0, 99, exact))


def test_a_long_row_of_scores_is_cut_and_the_choice_stays(monkeypatch):
    g = torch.Generator().manual_seed(2)
    q, means = torch.randn(2, 4, 100, 8, generator=g), torch.randn(2, 2, 13, 8, generator=g)
    whole = top_blocks(q, means, torch.arange(100) // 8, 4, 4)
    monkeypatch.setattr("lightsparse.attention.selection.top_blocks._SCORES", 500)
    assert torch.equal(top_blocks(q, means, torch.arange(100) // 8, 4, 4), whole)


@pytest.mark.parametrize("borders", BORDERS)
def test_a_sequence_in_parts_equals_the_whole_and_keeps_no_table(borders, monkeypatch):
    shape = Shape(111, 2, 4, 2, 16)
    documents = documents_at(111, *borders, batch=2) if borders else None
    core, results, kept = make(shape, dropout=0.2).train(), [], []
    for table in (1 << 24, 300):
        monkeypatch.setattr(row_parts, "_TABLE", table)
        given, saved = Inputs.random(shape, dtype=torch.float64).leaves(), []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, s=saved: s.append(t.dtype) or t, lambda t: t):
            found = run(core, given, documents)
        kept.append(saved.count(torch.int32))
        results.append([found.out, found.choice, *found.stats.values(), *gradients(found.out, *given.tensors()[:3])])
    assert kept[0] > 0 and kept[1] == 0
    for ours, right in zip(*results, strict=True):
        torch.testing.assert_close(ours, right)


def test_kept_mass_is_dense_attentions_weight_on_what_is_read():
    shape = Shape(200, 2, 4, 2, 16)
    given = Inputs.random(shape)
    strong = Inputs(given.q * 3, given.k, given.v, given.x)  # more to win and lose than among equal weights
    _, read = written_out(strong, 16, 3)
    k = strong.k.repeat_interleave(2, 1)
    scores = (strong.q @ k.mT / 4).masked_fill(~torch.ones(200, 200).tril().bool(), -torch.inf)
    mass = (scores.softmax(-1) * read[..., torch.arange(200) // 16]).sum(-1)[:, :, 24::25]
    kept = float(run(make(shape), strong).stats["kept_mass"])
    assert kept == pytest.approx(float(mass.mean()), abs=1e-5) and 0.3 < kept < 0.95
    assert float(run(make(shape, top_k=99), strong).stats["kept_mass"]) == pytest.approx(1)


def test_decoding_keeps_the_means_of_complete_blocks_only():
    shape = Shape(75, 2, 4, 2, 32)
    core, given = make(shape), Inputs.random(shape, dtype=torch.float64)
    whole, states = core._block_means(given.k, context(75)), {0: {}}
    for start, stop in ((0, 29), (29, 33), (33, 34), (34, 75)):
        new, held = given.tokens(start, stop), given.tokens(0, stop)
        result = core(new.q, held.k, held.v, x=new.x, ctx=context(stop, q_start=start, states=states))
        assert not start or not result.stats
        torch.testing.assert_close(states[0]["block_means"], whole[:, :, : stop // 16])


def test_scores_are_fp32_whatever_autocast_says():
    shape = Shape(111, 1, 4, 2, 32)
    core, given = make(shape), Inputs.random(shape)
    plain = run(core, given).choice
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(run(core, given).choice, plain)


def test_a_configuration_that_computes_everything_says_so_once(caplog):
    dense_warning.warn_if_dense.cache_clear()
    of = AttentionShape(2, 2, 16, 32, context=512)
    with caplog.at_level(logging.WARNING, logger="lightsparse"):
        MobaAttention(MobaConfig(block=64, top_k=7), of)
        assert not caplog.records
        for _ in range(3):
            MobaAttention(MobaConfig(block=64, top_k=8), of)
    assert [record.getMessage() for record in caplog.records] == [
        "attention.top_k × attention.block is 512 tokens per query and the context has 512: this configuration "
        "computes everything, it is dense; lower it, or use attention=dense"
    ]


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"block": 0}, "attention.block is 0; it counts tokens and must be at least 1"),
        ({"top_k": 0}, "attention.top_k is 0; it counts blocks, the own one included, and must be at least 1"),
        ({"density": 0.5}, "attention.density is 0.5; a query reads top_k blocks whatever the context"),
    ],
)
def test_what_cannot_work_is_refused_at_construction(fields, sentence):
    with pytest.raises(ValueError, match=sentence):
        MobaConfig(**fields)
