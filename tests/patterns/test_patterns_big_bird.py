import pytest
import torch

from lightsparse.patterns import AtDensity, BigBird, RandomBlocks

BLOCK = 16


def window_and_global_blocks(row, seq_len, window, global_tokens, causal):
    """The definition, token by token: key blocks of one row without the random ones."""
    read = set()
    for i in range(row * BLOCK, min((row + 1) * BLOCK, seq_len)):
        for j in range(seq_len):
            near = 0 <= i - j < window if causal else abs(i - j) < window
            leading = j < global_tokens
            trailing = not causal and (j >= seq_len - global_tokens)
            row_is_global = not causal and (i < global_tokens or i >= seq_len - global_tokens)
            if near or leading or trailing or row_is_global:
                read.add(j // BLOCK)
    return {J for J in read if row >= J} if causal else read


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("seq_len", [63, 111, 200])
@pytest.mark.parametrize(
    ("window", "global_tokens", "random"), [(1, 1, 1), (16, 16, 3), (40, 5, 0), (17, 0, 2), (1, 0, 0)]
)
def test_a_row_reads_its_window_the_global_tokens_and_its_draws(window, global_tokens, random, seq_len, causal):
    fields = {"block": BLOCK, "heads": 2, "causal": causal}
    read = BigBird(window, global_tokens, random, seed=9, per_head=True).layout(seq_len, **fields).block_map()[0]
    for row in range(read.shape[1]):
        expected = window_and_global_blocks(row, seq_len, window, global_tokens, causal)
        for head in range(2):
            draws = set()
            if random:
                table = RandomBlocks(random, seed=9, per_head=True).layout(seq_len, **fields).kv_indices
                draws = set(table[0, head, row].tolist()) - {-1}
            found = read[head if len(read) > 1 else 0, row].nonzero().flatten().tolist()
            assert set(found) == expected | draws


def test_the_papers_base_model_reads_three_window_two_global_and_three_random_blocks():
    table = BigBird(window=64, global_tokens=64, random=3).layout(4096, block=64, causal=False)
    assert table.dense_rows.tolist() == [0, 63]
    widths = (table.kv_indices >= 0).sum(-1)[0, 0, 1:-1]
    assert widths.max() == 3 + 2 + 3
    assert widths.double().mean() > 7  # a draw seldom falls on the window


def test_a_causal_model_has_no_trailing_global_block_and_no_dense_rows():
    layout = BigBird(window=1, global_tokens=16, random=0).layout(160, block=16)
    assert len(layout.dense_rows) == 0
    assert layout.block_map()[0, 0].sum(-1).tolist() == [1] + [2] * 9  # the first block and the own one


def test_documents_have_their_own_global_tokens():
    documents = (torch.arange(160) // 80).int()[None]
    read = BigBird(window=1, global_tokens=1, random=0).layout(160, block=16, documents=documents).block_map()[0, 0]
    assert read[9].nonzero().flatten().tolist() == [5, 9]


@pytest.mark.parametrize("solve", ["window", "random", "global_tokens"])
@pytest.mark.parametrize("causal", [True, False])
def test_each_field_can_be_solved_for_a_density(solve, causal):
    layout = AtDensity(BigBird(16, 16, 1), 0.4, solve=solve).layout(2048, block=16, causal=causal)
    assert layout.density() == pytest.approx(0.4, rel=0.02)


@pytest.mark.parametrize("wrong", [{"window": 0}, {"global_tokens": -1}, {"random": -1}])
def test_impossible_sizes_are_refused_by_name(wrong):
    (name,) = wrong
    with pytest.raises(ValueError, match=rf"BigBird\.{name} is -?\d+; .* at least"):
        BigBird(**{"window": 8, "global_tokens": 8, "random": 1} | wrong)
