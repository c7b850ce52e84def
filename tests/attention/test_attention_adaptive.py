"""The adaptive core: what its rows may choose from and do choose, in training, evaluation, chunks and decoding.

tests/battery.py runs over it as over every variant; here stands what only a router has.
"""

from __future__ import annotations

import math

import pytest
import torch
from adaptive_case import BLOCK, BORDERS, CONFIG, KV_HEADS, N, context, documents, inputs, make, run, select
from torch import Tensor

from lightsparse.attention import adaptive


@torch.no_grad()
def chosen_by_the_definition(core, q, k, ids, causal) -> tuple[list[set[int]], dict, float]:
    """Sample 0, head by head, from the words of the docstrings: chosen sets, gate of each pair, mean gate."""
    n, router, sets, gates = q.shape[2], core.router, [], {}
    blocks = -(-n // BLOCK)
    doc = torch.zeros(n, dtype=torch.int32) if ids is None else ids[0]

    def mean(x: Tensor, block: int, document: int) -> Tensor:
        tokens = [t for t in range(block * BLOCK, min((block + 1) * BLOCK, n)) if doc[t] == document]
        unit = x[tokens].mean(0)
        return unit / (unit.square().mean() + 1e-6).sqrt()

    for h in range(KV_HEADS):
        group = q[0, h * 2 : h * 2 + 2].mean(0)
        tau = 0.5 * math.exp(float(router.theta[h]))
        for row in range(blocks):
            ends = {int(doc[row * BLOCK]), int(doc[min((row + 1) * BLOCK, n) - 1])}
            chosen: set[int] = set()
            ranked: dict[int, list[tuple[float, int]]] = {document: [] for document in ends}
            for column in range(blocks):
                held = set(doc[column * BLOCK : (column + 1) * BLOCK].tolist())
                for document in sorted(ends & held):
                    goes_on = int(doc[row * BLOCK]) == document if column < row else True
                    if column == row or (column > row and causal) or not goes_on:
                        continue
                    asked = mean(group, row - 1 if causal else row, document)
                    offered = mean(k[0, h], column, document)
                    s = (asked @ router.query[h]) @ (offered @ router.key[h]) / math.sqrt(6) + router.offset[h]
                    gates[h, row, column] = torch.sigmoid(s / tau)
                    if gates[h, row, column] >= 0.5:
                        ranked[document].append((-float(s), column))
            for pairs in ranked.values():
                chosen |= {column for _, column in sorted(pairs)[:3]}
            sets.append(chosen | {row})
    return sets, gates, float(torch.stack(list(gates.values())).mean())


@pytest.mark.parametrize("borders", BORDERS)
@pytest.mark.parametrize("causal", [True, False])
def test_the_choice_its_bias_and_the_budget_are_what_the_definition_says(causal, borders):
    core, qkv, ids = make(causal=causal), inputs(), documents(borders)
    found = select(core, qkv, context(N, ids))
    sets, gates, mean_gate = chosen_by_the_definition(core, qkv[0], qkv[1], ids, causal)
    table = found.layout.kv_indices[0].flatten(0, 1)
    assert [{j for j in row if j >= 0} for row in table.tolist()] == sets
    assert any(len(chosen) > 2 for chosen in sets) and len({frozenset(chosen) for chosen in sets}) > 9
    for h, row, entry in (found.layout.kv_indices[0] >= 0).nonzero().tolist():
        column = int(found.layout.kv_indices[0, h, row, entry])
        expected = 0.0 if column == row else float(gates[h, row, column].log())
        assert float(found.bias[0, h, row, entry].detach()) == pytest.approx(expected, abs=1e-9)
    alone = select(core, [t[:1] for t in qkv], context(N, None if ids is None else ids[:1]))
    assert float(alone.aux_loss.detach()) == pytest.approx(CONFIG.budget_weight * (mean_gate - 0.4) ** 2, abs=1e-9)
    assert float(alone.stats["router_gate"]) == pytest.approx(mean_gate, abs=1e-9)


@pytest.mark.parametrize("training", [False, True])
def test_the_choice_of_a_row_depends_only_on_tokens_before_its_block(training):
    core, qkv = make(training=training), inputs()
    before = select(core, qkv, context())
    for t in (8, 9, 15, 16, 40, 74):
        other = [torch.cat([x[:, :, :t], 5 * torch.randn_like(x[:, :, t:]) + 2], 2) for x in qkv]
        after = select(core, other, context())
        rows = slice(0, t // BLOCK + 1)  # that of t included
        assert torch.equal(after.layout.kv_indices[:, :, rows], before.layout.kv_indices[:, :, rows])
        assert torch.equal(after.bias[:, :, rows], before.bias[:, :, rows])
        later = slice(t // BLOCK + 1, None)
        assert t > 72 or not torch.equal(after.bias[:, :, later], before.bias[:, :, later])


@pytest.mark.parametrize("causal", [True, False])
def test_another_document_changes_neither_choice_nor_output_in_training(causal):
    core, qkv = make(causal=causal, training=True), inputs()
    for borders in BORDERS[1:]:
        ids = documents(borders)
        before, out = select(core, qkv, context(N, ids)), run(core, qkv, context(N, ids)).out
        for document in range(len(borders) + 1):
            mine = ids[0] == document
            other = [x.clone() for x in qkv]
            for x in other:
                x[0, :, mine] = 3 * x[0, :, mine].flip(-1) + 1
            after = select(core, other, context(N, ids))
            torch.testing.assert_close(run(core, other, context(N, ids)).out[0, :, ~mine], out[0, :, ~mine])
            whole = [row for row in range(10) if not mine[row * BLOCK : (row + 1) * BLOCK].any()]
            assert torch.equal(after.layout.kv_indices[0, :, whole], before.layout.kv_indices[0, :, whole])


def test_only_training_has_noise_and_it_is_a_function_of_seed_sample_and_place_alone():
    core, qkv = make(), inputs()
    assert torch.equal(*(select(core, qkv, context(seed=s)).layout.kv_indices for s in (5, 6)))
    core.train()
    state = torch.get_rng_state()
    first, again, other = (select(core, qkv, context(seed=s)) for s in (5, 5, 6))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first.layout.kv_indices, again.layout.kv_indices) and torch.equal(first.bias, again.bias)
    assert not torch.equal(first.layout.kv_indices, other.layout.kv_indices)
    # The samples of a batch, apart and in any order, choose as they do together.
    ids = torch.tensor([70, 41])
    together = select(core, qkv, context(sample_ids=ids))
    swapped = select(core, [x.flip(0) for x in qkv], context(sample_ids=ids.flip(0)))
    assert torch.equal(together.layout.kv_indices, swapped.layout.kv_indices.flip(0))
    assert not torch.equal(together.layout.kv_indices, first.layout.kv_indices)


@pytest.mark.parametrize("borders", BORDERS)
@pytest.mark.parametrize("causal", [True, False])
def test_rows_in_chunks_equal_rows_at_once_and_keep_no_scores(causal, borders, monkeypatch):
    core, ctx = make(causal=causal, training=True), context(N, documents(borders))
    choose, inside, results, kept = core.router.choose, [False], [], []

    def watched(*args, **options):
        inside[0] = True
        choice = choose(*args, **options)
        inside[0] = False
        return choice

    monkeypatch.setattr(core.router, "choose", watched)
    for chunk in (1 << 20, 80):
        monkeypatch.setattr(adaptive, "_CHUNK", chunk)
        qkv, saved = [t.requires_grad_() for t in inputs()], []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, s=saved: s.append(inside[0]) or t, lambda t: t):
            found = select(core, qkv, ctx)
        kept.append(sum(saved))
        total = (found.bias * torch.arange(found.bias.shape[-1])).sum() + found.aux_loss
        grads = torch.autograd.grad(total, [*qkv[:2], *core.parameters()])
        results.append([found.layout.kv_indices, found.bias, *found.stats.values(), *grads])
    for ours, right in zip(*results, strict=True):
        torch.testing.assert_close(ours, right)
    assert kept[0] > 0 and kept[1] == 0


@pytest.mark.parametrize("borders", [None, (32, 48), (5, 37, 38, 61)])
def test_decoding_chooses_what_the_whole_sequence_chooses(borders):
    core, qkv, ids = make(), inputs(), documents(borders)
    whole, out = select(core, qkv, context(N, ids)), run(core, qkv, context(N, ids)).out
    states: dict[int, dict[str, Tensor]] = {2: {}}
    steps = [(0, 3), (3, 7), (7, 8), (8, 29), (29, 45), *((t, t + 1) for t in range(45, N))]
    for start, stop in steps:
        part = [qkv[0][:, :, start:stop], *(x[:, :, :stop] for x in qkv[1:])]
        ctx = context(stop, None if ids is None else ids[:, :stop], q_start=start, states=states)
        found = select(core, part, ctx)
        assert found.layout.q_block == (1 if start % BLOCK else BLOCK)
        for i in range(start, stop):
            row = (i - start) // found.layout.q_block
            of_whole = whole.layout.kv_indices[:, :, i // BLOCK]
            of_step = found.layout.kv_indices[:, :, row]
            width = min(of_whole.shape[-1], of_step.shape[-1])  # a short sequence has a narrower table
            assert torch.equal(of_step[..., :width], of_whole[..., :width]) and (of_whole[..., width:] < 0).all()
            torch.testing.assert_close(found.bias[:, :, row, ..., :width], whole.bias[:, :, i // BLOCK, ..., :width])
        torch.testing.assert_close(run(core, part, ctx).out, out[:, :, start:stop])
    assert states[2]["router_queries"].shape[2] < 2 * BLOCK and states[2]["router_keys"].shape[2] == N // BLOCK


def test_decoding_without_what_was_kept_is_refused():
    core, qkv = make(), inputs()
    for states in (None, {2: {}}):
        with pytest.raises(ValueError, match=r"ctx\.q_start is 74 but ctx\.states holds no router state"):
            run(core, [qkv[0][:, :, 74:], *qkv[1:]], context(q_start=74, states=states))
    with pytest.raises(ValueError, match="use objective=causal"):
        run(make(causal=False), [qkv[0][:, :, 74:], *qkv[1:]], context(q_start=74, states={2: {}}))


def test_scores_are_fp32_whatever_autocast_says():
    core, qkv = make(dtype=torch.float32), inputs(dtype=torch.float32)
    plain = select(core, qkv, context())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = select(core, qkv, context())
    assert torch.equal(plain.layout.kv_indices, cast.layout.kv_indices)
    assert cast.bias.dtype == torch.float32 and torch.equal(plain.bias, cast.bias)
