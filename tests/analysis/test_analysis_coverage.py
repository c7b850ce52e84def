import pytest
import torch
from torch import Tensor

from lightsparse.analysis.coverage import coverage, reached
from lightsparse.analysis.rows import chunks, dense_would_read, evenly, read_by
from lightsparse.cli.reach import main
from lightsparse.patterns import (
    BlockDilated,
    BlockLayout,
    GlobalTokens,
    LocalWindow,
    PerHead,
    PooledHierarchy,
    RandomBlocks,
    Strided,
)

PATTERNS = {
    "window": LocalWindow(20),
    "globals": GlobalTokens(3) | LocalWindow(5),
    "dilated": BlockDilated((32, 64), (2, 4)),
    "per head": PerHead((LocalWindow(9), Strided(2))),
    "random": RandomBlocks(1, seed=3),
}
DOCUMENTS = torch.tensor([[0] * 30 + [1] * 41, [0] * 5 + [1] * 60 + [2] * 6], dtype=torch.int32)


def layout_of(name: str, causal: bool = True, documents: bool = False) -> BlockLayout:
    return PATTERNS[name].layout(
        71, block=8, heads=4, kv_heads=2, causal=causal, documents=DOCUMENTS if documents else None
    )


def reached_by_hand(layout: BlockLayout, layers: int, sample: int) -> Tensor:
    """Bool [N, N]: the power of the dense matrix of one layer, the residual stream on its diagonal."""
    dense = layout.to_dense()
    one = dense[min(sample, len(dense) - 1)].any(0) | torch.eye(layout.num_tokens, dtype=torch.bool)
    through = one
    for _ in range(layers - 1):
        through = (through.float() @ one.float()) > 0
    return through


def past_by_hand(causal: bool, documents: bool, sample: int) -> Tensor:
    past = torch.ones(71, 71, dtype=torch.bool)
    past = past.tril() if causal else past
    return past & (DOCUMENTS[sample][:, None] == DOCUMENTS[sample][None]) if documents else past


@pytest.mark.parametrize("name", PATTERNS)
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("documents", [True, False])
def test_rows_are_those_of_the_dense_matrix(name, causal, documents):
    layout, queries = layout_of(name, causal, documents), torch.tensor([0, 7, 8, 33, 70])
    assert torch.equal(read_by(layout, queries), layout.to_dense()[:, :, queries])
    for sample, past in enumerate(dense_would_read(layout, queries)[:, 0]):
        assert torch.equal(past, past_by_hand(causal, documents, sample)[queries])


@pytest.mark.parametrize("name", PATTERNS)
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("documents", [True, False])
@pytest.mark.parametrize("layers", [1, 2, 3])
def test_what_reaches_a_query_is_the_power_of_the_dense_matrix(name, causal, documents, layers):
    layout, queries = layout_of(name, causal, documents), torch.tensor([0, 12, 69, 70])
    for sample in (0, 1):
        assert torch.equal(reached(layout, queries, layers, sample), reached_by_hand(layout, layers, sample)[queries])


@pytest.mark.parametrize("name", PATTERNS)
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("documents", [True, False])
def test_shares_are_those_counted_pair_by_pair(name, causal, documents):
    layout = layout_of(name, causal, documents)
    for one in coverage(layout, (3, 1), queries=71, sample=1):
        covered, past = reached_by_hand(layout, one.layers, 1), past_by_hand(causal, documents, 1)
        assert torch.allclose(one.per_query, (covered & past).sum(1) / past.sum(1))
        for (start, stop), share in zip(one.distances, one.by_distance, strict=True):
            pairs = [(i, j) for i in range(71) for j in range(71) if start <= abs(i - j) < stop and past[i, j]]
            expected = sum(bool(covered[i, j]) for i, j in pairs) / len(pairs) if pairs else float("nan")
            assert share == pytest.approx(expected, nan_ok=True)


def test_a_window_reaches_one_window_further_with_every_layer():
    layout = LocalWindow(8).layout(256, block=8)  # whole blocks: two of them
    far = [int(torch.nonzero(reached(layout, torch.tensor([255]), n)[0])[0]) for n in (1, 2, 3)]
    assert far == [240, 232, 224]
    assert coverage(LocalWindow(256).layout(256, block=8))[0].mean == 1.0


def test_appended_summaries_do_not_count_as_tokens():
    layout = PooledHierarchy(window=16, coarser=((None, 4),)).layout(80, block=8)
    assert layout.num_keys > 80
    assert coverage(layout, (1, 2))[0].per_query.shape == (64,)
    assert reached(layout, torch.tensor([79])).shape == (1, 80)


def test_samples_are_even_and_hold_the_last_query():
    layout = LocalWindow(8).layout(101, block=8)
    assert evenly(layout, 5).tolist() == [0, 25, 50, 75, 100]
    assert evenly(layout, 1).tolist() == [100]
    assert evenly(layout, 1000).tolist() == list(range(101))
    with pytest.raises(ValueError, match="count is 0"):
        evenly(layout, 0)


def test_chunks_keep_to_their_budget_and_lose_nothing():
    queries = torch.arange(10)
    parts = list(chunks(queries, elements_per_query=100, budget=399))
    assert [len(part) for part in parts] == [3, 3, 3, 1] and torch.equal(torch.cat(parts), queries)
    assert len(list(chunks(queries, 100, budget=1))) == 10


def test_several_layers_need_every_row():
    layout = LocalWindow(8).layout(64, block=8, rows=range(2, 4))
    assert coverage(layout)[0].mean > 0
    with pytest.raises(ValueError, match=r"16 queries and 64 tokens; several layers need a row for every token"):
        coverage(layout, (2,))
    with pytest.raises(ValueError, match=r"layers is \(0,\)"):
        coverage(layout, (0,))


def test_the_command_prints_a_table_that_rises_with_the_layers(capsys):
    words = [
        "attention=sliding_window",
        "attention.window=64",
        "attention.sinks=0",
        "data.context=512",
        "model.depth=4",
    ]
    assert main(words) == 0
    first, head, *rows = capsys.readouterr().out.splitlines()
    assert "sliding_window, density" in first and "512 tokens" in first
    assert head.split() == ["distance", "(tokens)", "1", "layer", "2", "layers", "4", "layers"]
    shares = {row.rsplit(maxsplit=3)[0]: [float(x) for x in row.split()[-3:]] for row in rows if row.strip()}
    assert shares["0"] == [1, 1, 1] and shares["32 … 63"] == [1, 1, 1]
    assert shares["64 … 127"][0] == 0 and 0.9 < shares["64 … 127"][1] < 1 and shares["64 … 127"][2] == 1
    assert shares["all"] == sorted(shares["all"])


def test_the_command_says_what_is_wrong_in_one_line(capsys):
    assert main(["attention.windw=3"]) == 2
    said = capsys.readouterr().err
    assert "windw" in said and said.count("\n") == 1
    assert main(["--help"]) == 0
