import torch

from lightsparse.models.cache import KVCache


def test_everything_appended_comes_back_in_order():
    cache, keys, values = KVCache(), torch.randn(2, 3, 23, 4), torch.randn(2, 3, 23, 4)
    for start, stop in [(0, 5), (5, 6), (6, 7), (7, 20), (20, 23)]:
        k, v = cache.append(keys[:, :, start:stop], values[:, :, start:stop])
        assert cache.length == stop
        assert torch.equal(k, keys[:, :, :stop])
        assert torch.equal(v, values[:, :, :stop])


def test_growing_token_by_token_rarely_copies():
    cache, token = KVCache(), torch.zeros(1, 1, 1, 2)
    buffers = {cache.append(token, token)[0].data_ptr() for _ in range(256)}
    assert len(buffers) <= 9  # 1, 2, 4, … 256
