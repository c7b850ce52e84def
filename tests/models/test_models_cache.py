import pytest
import torch

from lightsparse.attention.core import KeyExpiry
from lightsparse.models.cache import KVCache

BLOCK = 4
# Seven blocks: block 0 is read to the end, each other one by its own row and the next; nobody reads block 3 later.
LIFETIMES = KeyExpiry(until=27, block=BLOCK, last_row=[6, 2, 3, 3, 5, 6, 6])


def test_everything_appended_comes_back_in_order():
    cache, keys, values = KVCache(), torch.randn(2, 3, 23, 4), torch.randn(2, 3, 23, 4)
    for start, stop in [(0, 5), (5, 6), (6, 7), (7, 20), (20, 23)]:
        k, v, held = cache.append(keys[:, :, start:stop], values[:, :, start:stop])
        assert cache.length == stop and held is None
        assert torch.equal(k, keys[:, :, :stop])
        assert torch.equal(v, values[:, :, :stop])


def test_growing_token_by_token_rarely_copies():
    cache, token = KVCache(), torch.zeros(1, 1, 1, 2)
    buffers = {cache.append(token, token).k.data_ptr() for _ in range(256)}
    assert len(buffers) <= 9  # 1, 2, 4, … 256


@pytest.mark.parametrize("steps", [[1] * 27, [5, 3, 1, 11, 1, 1, 1, 4], [27], [8, 8, 8, 3]])
def test_a_pass_reads_exactly_the_blocks_that_its_rows_or_later_ones_read(steps):
    cache, keys, values = KVCache(LIFETIMES), torch.randn(2, 3, 27, 4), torch.randn(2, 3, 27, 4)
    start = 0
    for count in steps:
        stop = start + count
        k, v, held = cache.append(keys[:, :, start:stop], values[:, :, start:stop])
        first_row, begun = start // BLOCK, -(-stop // BLOCK)
        blocks = [j for j in range(begun) if LIFETIMES.last_row[j] >= first_row or j >= first_row]
        assert (list(range(begun)) if held is None else held.tolist()) == blocks
        tokens = [t for j in blocks for t in range(j * BLOCK, min((j + 1) * BLOCK, stop))]
        assert torch.equal(k, keys[:, :, tokens]) and torch.equal(v, values[:, :, tokens])
        start = stop


def test_memory_is_given_back_at_once():
    cache = KVCache(LIFETIMES)
    cache.append(*(torch.zeros(1, 1, 24, 2) for _ in "kv"))  # the next row is 6: blocks 1 to 4 are done
    assert cache.nbytes == 2 * 2 * BLOCK * 2 * 4  # keys and values of two blocks, fp32
    for _ in range(3):
        cache.append(*(torch.zeros(1, 1, 1, 2) for _ in "kv"))
    assert cache.nbytes == 2 * 3 * BLOCK * 2 * 4


def test_more_tokens_than_the_cache_was_made_for_are_refused():
    cache = KVCache(LIFETIMES)
    cache.append(*(torch.zeros(1, 1, 27, 2) for _ in "kv"))
    with pytest.raises(ValueError, match="made for 27 tokens and is given 28"):
        cache.append(*(torch.zeros(1, 1, 1, 2) for _ in "kv"))
