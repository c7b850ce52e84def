"""SeerAttention-R against its definition written out: the choice, the loss and its gradient, the gate's rotation.

tests/battery.py runs over it as over every variant; here stands what only a distilled gate has.
"""

from __future__ import annotations

import pytest
import torch
from battery import ROTARY, Inputs, Shape, _Largest, close, context, dense_attention, documents_at, gradients
from torch import Tensor

from lightsparse.attention.core import AttentionResult, AttentionShape
from lightsparse.attention.seer import SeerAttention, SeerConfig
from lightsparse.attention.selection import block_kl
from lightsparse.attention.selection.block_gate import BlockGate, pooled_keys, unrotated

SHAPES = [Shape(63, 1, 2, 2, 32), Shape(51, 2, 4, 2, 16), Shape(43, 2, 4, 1, 16)]  # groups of 1, 2 and 4
BORDERS = ((), (30, 48), (5, 37, 38))


def make(shape: Shape, top_k: int = 3, block: int = 8, **fields) -> SeerAttention:
    """Its gate drawn at random: what it starts with uses the mean key alone."""
    torch.manual_seed(0)
    of = AttentionShape(shape.heads, shape.kv_heads, shape.dim, shape.heads * shape.dim)
    core = SeerAttention(SeerConfig(block=block, top_k=top_k, gate_dim=8, **fields), of).double()
    for parameter in core.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return core


def run(core: SeerAttention, given: Inputs, documents: Tensor | None = None) -> AttentionResult:
    return core(*given.tensors()[:3], x=given.x, ctx=context(given.x.shape[1], documents))


def drawn(shape: Shape, borders: tuple[int, ...]) -> tuple[Inputs, Tensor | None]:
    """Samples that are packed differently; q large enough that attention prefers some blocks."""
    given, documents = Inputs.random(shape, dtype=torch.float64), None
    if borders:
        of_sample = [documents_at(shape.n, *borders[: None if b == 0 else 1]) for b in range(shape.batch)]
        documents = torch.cat(of_sample)
    return Inputs(3 * given.q, *given.tensors()[1:]), documents


def gate_scores(core: SeerAttention, given: Inputs, documents: Tensor | None) -> tuple[Tensor, Tensor]:
    """The gate's scores and where a block can be chosen, [B, Hkv, N, blocks], pair by pair."""
    q, k, block = given.q.detach(), given.k.detach(), core.options.block
    (batch, heads, n, _), kv_heads, blocks = q.shape, k.shape[1], -(-q.shape[2] // block)
    ids = documents_at(n, batch=batch) if documents is None else documents
    scores = torch.zeros(batch, kv_heads, n, blocks, dtype=q.dtype)
    can = torch.zeros(batch, kv_heads, n, blocks, dtype=torch.bool)

    def turned(x: Tensor, position: int) -> Tensor:
        return ROTARY.rotated(x.reshape(1, 1, 1, -1), torch.tensor([[position]])).reshape(-1)

    for b in range(batch):
        places = [int((ids[b, :t] == ids[b, t]).sum()) for t in range(n)]  # from the document's start
        for g in range(kv_heads):
            of_group = range(g * heads // kv_heads, (g + 1) * heads // kv_heads)
            features = []
            for t in range(n):
                side_by_side = torch.cat([turned(q[b, h, t], -places[t]) for h in of_group])
                features.append(turned(side_by_side @ core.gate.query[g], places[t]))
            for j in range(blocks):
                last = min((j + 1) * block, n) - 1
                own = [s for s in range(j * block, last + 1) if ids[b, s] == ids[b, last]]
                keys = torch.stack([turned(k[b, g, s], -places[s]) for s in own])
                pooled = torch.cat([keys.amax(0), keys.amin(0), keys.mean(0)])
                of_block = turned(pooled @ core.gate.key[g], places[own[0]])
                for t in range(n):
                    scores[b, g, t, j] = features[t] @ of_block / core.gate.query.shape[-1] ** 0.5
                    can[b, g, t, j] = j < t // block and ids[b, t] == ids[b, last]
    return scores, can


def written_out(core: SeerAttention, given: Inputs, documents: Tensor | None) -> dict[str, Tensor]:
    """What is read, bool [B, Hkv, N, blocks], and the losses."""
    scores, can = gate_scores(core, given, documents)
    block, top_k, n = core.options.block, core.options.top_k, given.q.shape[2]
    ids = documents_at(n, batch=len(given.q)) if documents is None else documents
    own = torch.arange(n) // block
    ranked = scores.masked_fill(~can, -torch.inf)
    ranked = ranked.scatter(-1, own.expand(*ranked.shape[:2], n)[..., None], torch.inf)
    best = ranked.topk(min(top_k, ranked.shape[-1])).indices
    read = torch.zeros_like(can).scatter(-1, best, True) & (ranked > -torch.inf)

    q, k = given.q.detach(), given.k.detach().repeat_interleave(given.q.shape[1] // given.k.shape[1], 1)
    visible = torch.ones(n, n).tril().bool() & (ids[:, None, :, None] == ids[:, None, None])
    weights = (q @ k.mT / q.shape[-1] ** 0.5).masked_fill(~visible, -torch.inf).softmax(-1)
    weights = torch.nn.functional.pad(weights, (0, -n % block)).unflatten(-1, (-1, block)).amax(-1)
    target = weights.unflatten(1, (given.k.shape[1], -1)).amax(2) * can
    target = target / target.sum(-1, keepdim=True)
    log_gate = scores.masked_fill(~can, -torch.inf).log_softmax(-1)
    rows = can.sum(-1) > 1
    kl = torch.where(can, target * (target.log() - log_gate), 0.0).sum(-1)
    uniform = torch.where(can, target * (target.log() + can.sum(-1, keepdim=True).double().log()), 0.0).sum(-1)
    return {"read": read, "kl": kl[rows].mean(), "uniform": uniform[rows].mean()}


@pytest.mark.parametrize("borders", BORDERS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_the_definition_in_choice_output_and_gradients(shape, borders):
    core = make(shape)
    given, documents = drawn(shape, borders)
    right = written_out(core, given, documents)
    layout = core.select(given.q, given.k, given.x, context(shape.n, documents)).layout
    assert torch.equal(layout.block_map().expand_as(right["read"]), right["read"])
    given = given.leaves()
    out = run(core, given, documents).out
    allowed = right["read"][..., torch.arange(shape.n) // 8]
    if documents is not None:
        allowed = allowed & (documents[:, None, :, None] == documents[:, None, None])
    expected = dense_attention(given, True, allowed)
    close(out, expected, 1e-9, "the output")
    found, wanted = (gradients(result, *given.tensors()[:3]) for result in (out, expected))
    for name, grad, of_reference in zip("qkv", found, wanted, strict=True):
        close(grad, of_reference, 1e-9, f"the gradient of {name}")


@pytest.mark.parametrize(("borders", "weights"), [(BORDERS[0], 3000), (BORDERS[1], 1 << 20), (BORDERS[2], 3000)])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_loss_and_its_gradient_are_those_of_the_written_out_divergence(shape, borders, weights, monkeypatch):
    monkeypatch.setattr(block_kl, "_WEIGHTS", weights)
    core = make(shape).train()
    given, documents = drawn(shape, borders)
    result, right = run(core, given, documents), written_out(core, given, documents)
    close(result.aux_loss, right["kl"], 1e-9, "the divergence")
    close(result.stats["selection_kl"], right["kl"], 1e-9, "what is logged")
    close(result.stats["uniform_kl"], right["uniform"], 1e-9, "the divergence of a uniform gate")
    found, wanted = (torch.autograd.grad(loss, tuple(core.parameters())) for loss in (result.aux_loss, right["kl"]))
    for grad, expected in zip(found, wanted, strict=True):
        assert expected.abs().max() > 1e-4
        close(grad, expected, 1e-9, "the gradient of the gate")


def test_the_loss_trains_the_gate_alone_and_only_the_loss_trains_it():
    shape = Shape(111, 1, 4, 2, 32)
    core, given = make(shape).train(), drawn(shape, ())[0].leaves()
    result = run(core, given)
    of_loss = torch.autograd.grad(result.aux_loss, given.tensors(), allow_unused=True, retain_graph=True)
    assert of_loss == (None,) * 4
    assert torch.autograd.grad(result.out.sum(), tuple(core.parameters()), allow_unused=True) == (None, None)
    assert float(run(core.eval(), given).aux_loss.detach()) == 0
    assert core.selector_parameters() == list(core.parameters())


def test_a_row_whose_own_block_has_all_the_weight_still_teaches():
    """The others' weights are below the smallest fp32 number; their ratios are not lost."""
    shape = Shape(64, 1, 1, 1, 8)
    core = make(shape, block=16).float().train()
    q = torch.zeros(1, 1, 64, 8)
    k = torch.zeros(1, 1, 64, 8)
    q[..., 0] = 1e3
    k[:, :, 48:, 0] = 1.0  # the last block's keys: scores of 353 against 0, and of 35 for block 1
    k[:, :, 16:32, 0] = 0.1
    result = core(q, k, k, x=q[0], ctx=context(64))
    kl, uniform = result.stats["selection_kl"], result.stats["uniform_kl"]
    assert torch.isfinite(kl) and float(uniform) > 0.5  # block 1 alone has the weight in the last 16 rows


@pytest.mark.parametrize("borders", BORDERS)
def test_neither_choice_nor_loss_depends_on_a_later_token(borders):
    shape = Shape(111, 2, 4, 2, 32)
    core = make(shape).train()
    given, documents = drawn(shape, borders)

    def found(of: Inputs, n: int) -> tuple[Tensor, Tensor]:
        cut = of.tokens(0, n)
        of_tokens = None if documents is None else documents[:, :n]
        ctx = context(n, of_tokens)
        return core.select(cut.q, cut.k, cut.x, ctx).layout.block_map(), run(core, cut, of_tokens).aux_loss

    whole, _ = found(given, 111)
    for t in (33, 64, 97):
        changed = given.perturbed(t, 111)
        assert torch.equal(found(changed, 111)[0][:, :, :t], whole[:, :, :t])
        assert torch.equal(found(changed, t)[1], found(given, t)[1])
    assert not torch.equal(found(given.perturbed(64, 80), 111)[0], whole)


def test_one_block_is_the_own_one_and_no_other():
    shape = Shape(63, 1, 2, 1, 32)
    choice = run(make(shape, top_k=1), drawn(shape, ())[0]).choice
    assert choice[0, 0].tolist() == [[row] for row in range(8)]


def test_the_first_block_of_the_document_comes_when_it_is_asked_for_and_counts():
    shape = Shape(160, 1, 2, 1, 32)
    given, documents = drawn(shape, (64, 65))[0], documents_at(160, 64)
    free = run(make(shape, block=16), given, documents).choice[0, 0].tolist()
    forced = run(make(shape, block=16, first_block=True), given, documents).choice[0, 0].tolist()
    assert free != forced
    for row, blocks in enumerate(forced):
        own_first = 0 if row < 4 else 4
        blocks = [j for j in blocks if j >= 0]
        assert {own_first, row} <= set(blocks) and len(blocks) == min(row - own_first + 1, 3)


@pytest.mark.parametrize("threshold", [0.1, 0.3, 0.9])
def test_a_threshold_leaves_out_blocks_of_a_smaller_share(threshold):
    shape = Shape(80, 1, 2, 2, 32)
    core, given = make(shape, top_k=4, threshold=threshold), drawn(shape, ())[0]
    scores, can = gate_scores(core, given, None)
    share = scores.masked_fill(~can, -torch.inf).softmax(-1)
    of_all = written_out(core, given, None)["read"]
    own = torch.nn.functional.one_hot(torch.arange(80) // 8, 10).bool()
    found = core.select(given.q, given.k, given.x, context(80)).layout.block_map()
    assert torch.equal(found, of_all & (own | (share >= threshold)))
    assert not torch.equal(found, of_all.expand_as(found))


def test_equal_scores_go_to_the_lower_block():
    shape = Shape(320, 1, 2, 1, 16)
    given = Inputs.random(shape, dtype=torch.float64)
    core = make(shape, top_k=5, block=16)
    torch.nn.init.zeros_(core.gate.query)
    for row, blocks in enumerate(run(core, given).choice[0, 0].tolist()):
        assert [j for j in blocks if j >= 0] == [*range(min(row, 4)), row]


def test_the_gate_undoes_the_rotation_of_the_model_and_scores_depend_on_distances():
    x = torch.randn(2, 3, 20, 16, dtype=torch.float64)
    positions = torch.arange(1000, 1020)[None]
    close(unrotated(ROTARY.rotated(x, positions), positions, ROTARY.rotated), x, 1e-6, "q before the rotation")
    gate = BlockGate(AttentionShape(3, 3, 16, 48), 8).double()

    def scores(shift: int) -> Tensor:
        at = torch.arange(20)[None] + shift
        queries = gate.of_queries(ROTARY.rotated(x, at), at, ROTARY.rotated)
        pooled = pooled_keys(x, 5, None)
        return queries @ gate.of_blocks(pooled, at[:, ::5], ROTARY.rotated).mT

    close(scores(500), scores(0), 1e-3, "scores after a shift of all positions")
    at = torch.arange(20)[None]
    plain = gate.of_queries(x, at, None) @ gate.of_blocks(pooled_keys(x, 5, None), at[:, ::5], None).mT
    assert (plain - scores(0)).abs().max() > 0.1


def test_the_untrained_gate_is_better_than_none():
    """It starts as a projection of MoBA's affinity; on keys that share a direction within a block that finds them."""
    shape, g = Shape(512, 4, 2, 2, 32), torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    core = SeerAttention(SeerConfig(block=16, top_k=4, gate_dim=32), AttentionShape(2, 2, 32, 64)).train()
    code = torch.randn(4, 2, 32, 32, generator=g).repeat_interleave(16, 2)
    wanted = code[:, :, torch.randperm(512, generator=g)]
    given = Inputs(wanted, code, code, torch.zeros(4, 512, 64))
    ctx = context(512)
    ctx.rotary = None
    stats = core(*given.tensors()[:3], x=given.x, ctx=ctx).stats
    assert float(stats["kept_mass"]) > 0.5 and shape.n == 512


def test_decoding_keeps_the_features_of_complete_blocks_only():
    shape = Shape(75, 2, 4, 2, 32)
    core, given = make(shape).eval(), Inputs.random(shape, dtype=torch.float64)
    whole, states = core.scored(given.q, given.k, context(75)).blocks, {0: {}}
    for start, stop in ((0, 29), (29, 33), (33, 34), (34, 75)):
        new, held = given.tokens(start, stop), given.tokens(0, stop)
        result = core(new.q, held.k, held.v, x=new.x, ctx=context(stop, q_start=start, states=states))
        assert not start or not result.stats
        torch.testing.assert_close(states[0]["gate_keys"], whole[:, :, : stop // 8])


def test_a_dense_stage_is_dense_attention_and_teaches_the_gate_the_same():
    shape = Shape(111, 1, 4, 2, 32)
    given = drawn(shape, ())[0].leaves()
    core = make(shape, dense_steps=2).train()
    sparse = run(make(shape).train(), given)
    core.set_step(1, 10)
    result = run(core, given)
    right = dense_attention(given, True)
    close(result.out, right, 1e-9, "the output")
    found, expected = (gradients(out, *given.tensors()[:3]) for out in (result.out, right))
    for grad, dense in zip(found, expected, strict=True):
        close(grad, dense, 1e-9, "a gradient")
    assert float(result.stats["density"]) == 1 and torch.equal(result.choice, sparse.choice)
    assert torch.equal(result.aux_loss, sparse.aux_loss) and result.stats["kept_mass"] == sparse.stats["kept_mass"]
    core.set_step(2, 10)
    assert torch.equal(run(core, given).out, sparse.out)


def test_training_holds_no_map_of_all_pairs(monkeypatch):
    monkeypatch.setattr(block_kl, "_WEIGHTS", 1 << 17)
    largest = []
    for n in (1024, 2048):
        shape = Shape(n, 1, 2, 1, 16)
        core = make(shape, block=16).float().train()
        given = Inputs.random(shape).leaves()
        with _Largest() as watch:
            result = run(core, given)
            (result.out.sum() + result.aux_loss).backward()
        largest.append(watch.largest)
    assert largest[1] < 2048 * 2048 / 8 and largest[1] <= 2.3 * largest[0]


def test_scores_are_fp32_whatever_autocast_says():
    shape = Shape(111, 1, 4, 2, 32)
    core, given = make(shape).float().train(), Inputs.random(shape)
    plain = run(core, given)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = run(core, given)
    assert torch.equal(cast.choice, plain.choice) and torch.equal(cast.aux_loss, plain.aux_loss)


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"threshold": 1.0}, "attention.threshold is 1.0; a share of the gate must lie in"),
        ({"gate_dim": 7}, "attention.gate_dim is 7; the gate rotates pairs, so it must be even"),
        ({"top_k": 1, "first_block": True}, "attention.first_block is true and attention.top_k 1; the own block and"),
        ({"density": 0.5}, "attention.density is 0.5; a query reads top_k blocks whatever the context"),
        ({"dense_from": 0}, "attention.dense_from is 0"),
    ],
)
def test_what_cannot_work_is_refused_at_construction(fields, sentence):
    with pytest.raises(ValueError, match=sentence):
        SeerConfig(**fields)


def test_both_ways_is_refused():
    with pytest.raises(ValueError, match="SeerAttention is causal only"):
        SeerAttention(SeerConfig(), AttentionShape(2, 2, 16, 32, causal=False))
