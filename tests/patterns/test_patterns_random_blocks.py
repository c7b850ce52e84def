from itertools import pairwise
from math import comb

import pytest
import torch

from lightsparse.patterns import AtDensity, RandomBlocks
from lightsparse.patterns.random_blocks import permuted
from lightsparse.utils.hashing import chain

DOCUMENTS = torch.zeros(2, 1000, dtype=torch.int32)  # borders inside blocks, on them, two in one block, one token
for sample, borders in enumerate([(5, 6, 500, 999), (320, 640)]):
    for border in borders:
        DOCUMENTS[sample, border:] += 1


def drawn(pattern, seq_len=1000, block=64, **fields):
    """Sets of key blocks: [sample][head][row]."""
    table = pattern.layout(seq_len, block=block, **fields).kv_indices.tolist()
    return [[[{J for J in row if J >= 0} for row in head] for head in sample] for sample in table]


def allowed(row, seq_len, block, causal, documents):
    """Blocks J that hold a token of a document that the row holds too, up to the row's own if causal."""
    blocks = documents.split(block)
    return {
        J
        for J in range(len(blocks))
        if (row >= J or not causal) and set(blocks[J].tolist()) & set(blocks[row].tolist())
    }


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("n", [1, 3, 9, 16, 500])
def test_a_row_reads_n_different_blocks_of_those_it_may(n, packed, causal):
    documents = DOCUMENTS if packed else torch.zeros(1, 1000, dtype=torch.int32)
    table = drawn(RandomBlocks(n, seed=5), causal=causal, documents=documents if packed else None)
    for sample, ids in zip(table, documents, strict=True):
        for row, blocks in enumerate(sample[0]):
            may = allowed(row, 1000, 64, causal, ids)
            assert blocks <= may and len(blocks) == min(n, len(may))


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("documents", [None, DOCUMENTS])
@pytest.mark.parametrize("rows", [range(3, 4), range(5, 16), range(7, 7)])
def test_a_part_of_the_rows_draws_what_the_whole_draws(rows, documents, causal):
    pattern = RandomBlocks(3, seed=1, per_head=True)
    whole = drawn(pattern, heads=4, kv_heads=2, causal=causal, documents=documents)
    part = drawn(pattern, heads=4, kv_heads=2, causal=causal, documents=documents, rows=rows)
    assert part == [[head[rows.start : rows.stop] for head in sample] for sample in whole]


def test_a_causal_row_draws_the_same_in_a_longer_sequence():
    pattern = RandomBlocks(3, seed=1)
    longest = drawn(pattern, 5000)[0][0]
    for seq_len in (1, 63, 64, 65, 1000, 4999):
        rows = drawn(pattern, seq_len)[0][0]
        assert rows == longest[: len(rows)]


@pytest.mark.parametrize("causal", [True, False])
def test_packed_documents_that_start_on_blocks_draw_what_they_draw_alone(causal):
    pattern, lengths = RandomBlocks(2, seed=3), [320, 64, 600]
    packed = torch.repeat_interleave(torch.arange(3, dtype=torch.int32), torch.tensor(lengths))[None]
    rows = drawn(pattern, sum(lengths), causal=causal, documents=packed)[0][0]
    for length, start in zip(lengths, (0, 5, 6), strict=True):
        alone = drawn(pattern, length, causal=causal)[0][0]
        assert rows[start : start + len(alone)] == [{start + J for J in blocks} for blocks in alone]


def test_a_larger_n_keeps_what_was_drawn():
    rows = [drawn(RandomBlocks(n), causal=False)[0][0] for n in range(1, 17)]
    for fewer, more in pairwise(rows):
        assert all(a < b for a, b in zip(fewer, more, strict=True))


def test_seeds_differ_and_heads_only_where_asked():
    def table(**fields):
        return drawn(RandomBlocks(3, **fields), heads=4, kv_heads=2, causal=False)[0]

    assert table(seed=0) == table() != table(seed=1)
    assert len(table()) == 1
    first, second = table(per_head=True)
    assert first != second and first == table()[0]


def test_the_draw_is_the_same_on_every_machine_and_release():
    expected = [{0}, {0, 1}, {0, 2}, {0, 2}, {0, 1}, {0, 3}, {0, 3}, {1, 5}, {2, 3}, {2, 4}]
    assert drawn(RandomBlocks(2, seed=42), 640)[0][0] == expected


@pytest.mark.parametrize("count", [2, 3, 5, 16])
def test_every_pair_of_blocks_is_drawn_equally_often(count):
    samples = 20_000
    key = chain(7, torch.arange(samples))[:, None]
    pairs = permuted(torch.arange(2), torch.tensor(count), key).sort(1).values
    times = torch.bincount(pairs[:, 0] * count + pairs[:, 1], minlength=count**2)
    times = times[times > 0].double()
    expected = samples / comb(count, 2)
    assert len(times) == comb(count, 2)
    freedom = max(len(times) - 1, 1)
    chi_square = ((times - expected) ** 2 / expected).sum()
    assert chi_square < freedom + 5 * (2 * freedom) ** 0.5  # five standard deviations


def test_neighbouring_rows_draw_independently():
    rows = drawn(RandomBlocks(4), 64 * 256, causal=False)[0][0]
    shared = sum(len(a & b) for a, b in pairwise(rows))
    expected = 255 * 4 * 4 / 256
    assert abs(shared - expected) < 5 * expected**0.5


@pytest.mark.parametrize("count", [1, 2, 7, 64, 1000])
def test_the_shuffle_permutes_a_range_of_any_length(count):
    keys = chain(0, torch.arange(20))[:, None]
    images = permuted(torch.arange(count), torch.tensor(count), keys)
    assert (images.sort(1).values == torch.arange(count)).all()


def test_the_shuffle_is_swap_or_not_as_published():
    """Round by round with Python's integers: x and its partner K − x change places if their larger one's bit is set."""

    def image(x, count, key):
        for number in range(16):
            round_key = chain(key, torch.tensor(number))
            partner = (int(round_key) % (1 << 63) - x) % count
            if int(chain(round_key, torch.tensor(max(x, partner)))) < 0:
                x = partner
        return x

    for count in (3, 11):
        key = chain(123, torch.tensor(count))
        expected = [image(x, count, key) for x in range(count)]
        assert permuted(torch.arange(count), torch.tensor(count), key).tolist() == expected


def test_a_million_tokens_need_memory_linear_in_the_blocks(largest_tensor):
    blocks, n = 8192, 3
    most = largest_tensor(lambda: RandomBlocks(n, per_head=True).layout(blocks * 128, block=128, heads=2))
    assert most <= max(2 * n * blocks, blocks * 128)  # the table, or a number per token


def test_the_number_of_blocks_can_be_solved_for_a_density():
    layout = AtDensity(RandomBlocks(1), 0.3, solve="n").layout(4096, block=64, causal=False)
    assert layout.density() == pytest.approx(0.3, rel=0.02)


def test_zero_blocks_are_refused():
    with pytest.raises(ValueError, match=r"RandomBlocks.n is 0; .* at least 1"):
        RandomBlocks(0)
