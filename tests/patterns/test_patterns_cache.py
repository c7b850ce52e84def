from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from threading import Barrier

import pytest
import torch

from lightsparse.kernels import block_sparse_attention
from lightsparse.patterns import CacheStats, LayoutKey, LocalWindow, Pattern, PersistentPatternCache
from lightsparse.patterns.cache import size_in_bytes

CPU = torch.device("cpu")
BASE = LayoutKey(LocalWindow(20), 111, 16, 4, 2, True, CPU, range(7))


def of_length(seq_len):
    return replace(BASE, seq_len=seq_len, rows=range(-(-seq_len // 16)))


def counts(cache):
    stats = cache.stats()
    return stats.hits, stats.misses, stats.evictions, stats.entries


def test_a_layout_is_built_once_and_equals_the_patterns():
    cache = PersistentPatternCache()
    first = cache.layout(BASE)
    assert cache.layout(replace(BASE)) is first
    assert counts(cache) == (1, 1, 0, 1)
    assert torch.equal(first.to_dense(), LocalWindow(20).layout(111, block=16).to_dense())


@pytest.mark.parametrize(
    "other",
    [
        {"pattern": LocalWindow(21)},
        {"seq_len": 110},
        {"block": 18},
        {"heads": 8},
        {"kv_heads": 4},
        {"causal": False},
        {"device": torch.device("meta")},
        {"rows": range(1, 7)},
    ],
    ids=lambda other: next(iter(other)),
)
def test_every_field_of_the_key_tells_layouts_apart(other):
    @dataclass(frozen=True)
    class Nothing(Pattern):  # builds on a device without values too
        def layout(self, seq_len, **fields):
            return LocalWindow(1).layout(16)

    cache, base = PersistentPatternCache(), replace(BASE, pattern=Nothing())
    assert cache.layout(base) is not cache.layout(replace(base, **other))
    assert counts(cache) == (0, 2, 0, 2)


def test_the_least_recently_used_goes_first():
    cache = PersistentPatternCache(max_entries=2)
    a, b, c = (of_length(n) for n in (16, 32, 48))
    kept = cache.layout(a)
    cache.layout(b)
    assert cache.layout(a) is kept  # now b is the oldest
    cache.layout(c)
    assert counts(cache) == (1, 3, 1, 2)
    assert cache.layout(a) is kept
    cache.layout(b)  # gone, comes back for c
    assert counts(cache) == (2, 4, 2, 2)
    assert cache.layout(a) is kept


def test_bytes_are_bounded_and_counted():
    sizes = [size_in_bytes(of_length(n).build()) for n in (1600, 1616, 1632)]
    cache = PersistentPatternCache(max_bytes=sizes[1] + sizes[2])
    for n in (1600, 1616):
        cache.layout(of_length(n))
    assert cache.stats().bytes == sizes[0] + sizes[1]
    cache.layout(of_length(1632))
    assert cache.stats() == CacheStats(hits=0, misses=3, evictions=1, entries=2, bytes=sizes[1] + sizes[2])


def test_a_layout_larger_than_the_bound_is_given_but_not_kept():
    cache = PersistentPatternCache(max_bytes=size_in_bytes(of_length(160).build()))
    small = cache.layout(of_length(160))
    large = cache.layout(of_length(16_000))
    assert large.num_keys == 16_000 and cache.layout(of_length(160)) is small
    assert counts(cache) == (1, 2, 0, 1)


def test_the_size_counts_storage_once_and_the_lazy_mask_too():
    layout = of_length(160).build()
    token = 4 * 160  # bytes of one int32 per token: positions, which visible_from shares, and visible_until
    assert size_in_bytes(layout) == 2 * token + 5 * layout.kv_indices.numel()
    part = replace(of_length(160), rows=range(9, 10)).build()
    assert size_in_bytes(part) == 2 * token + 5 * part.kv_indices.numel()  # a view keeps all of its storage


def test_clear_forgets_layouts_and_keeps_counts():
    cache = PersistentPatternCache()
    first = cache.layout(BASE)
    cache.clear()
    assert cache.stats() == CacheStats(misses=1)
    assert cache.layout(BASE) is not first
    assert counts(cache) == (0, 2, 0, 1)


def test_devices_have_their_own_bounds_counts_and_clear():
    @dataclass(frozen=True)
    class Sized(Pattern):
        def layout(self, seq_len, **fields):
            return LocalWindow(1).layout(seq_len)

    cache = PersistentPatternCache(max_entries=1)
    on_cpu, on_meta = (replace(BASE, pattern=Sized(), device=torch.device(name)) for name in ("cpu", "meta"))
    kept = cache.layout(on_cpu)
    cache.layout(on_meta)
    assert cache.layout(on_cpu) is kept and cache.stats().evictions == 0
    assert cache.stats("meta").misses == 1 and cache.stats("cpu").hits == 1
    cache.clear("cpu")
    assert cache.stats("cpu").entries == 0 and cache.stats("meta").entries == 1


def test_what_a_variant_adds_is_part_of_the_key_and_done_once():
    calls = []

    def wider(layout, pattern, documents):
        calls.append((pattern, documents))
        return replace(layout, mask=replace(layout.mask, causal=False))

    cache = PersistentPatternCache()
    plain, finished = cache.layout(BASE), cache.layout(BASE, wider)
    assert plain.mask.causal and not finished.mask.causal
    assert cache.layout(BASE, wider) is finished and cache.layout(BASE) is plain
    assert calls == [(BASE.pattern, None)]


def test_threads_build_each_layout_once_and_every_call_is_counted():
    cache, threads, calls = PersistentPatternCache(max_entries=64), 8, 50
    start = Barrier(threads)

    def ask(thread):
        start.wait()
        return [id(cache.layout(of_length(16 * (1 + (thread + n) % 10)))) for n in range(calls)]

    with ThreadPoolExecutor(threads) as pool:
        seen = {layout for found in pool.map(ask, range(threads)) for layout in found}
    assert len(seen) == 10
    assert counts(cache) == (threads * calls - 10, 10, 0, 10)


def test_a_failed_build_leaves_the_cache_usable():
    cache = PersistentPatternCache()
    with pytest.raises(ValueError, match="rows"):
        cache.layout(replace(BASE, rows=range(8)))
    cache.layout(BASE)
    assert counts(cache) == (0, 2, 0, 1)


def test_a_layout_first_built_in_inference_mode_serves_training():
    cache = PersistentPatternCache()
    with torch.inference_mode():
        cache.layout(BASE)
    q = torch.randn(1, 4, 111, 32, requires_grad=True)
    block_sparse_attention(q, q[:, :2], q[:, :2], cache.layout(BASE)).sum().backward()
    assert q.grad is not None and bool(q.grad.isfinite().all())


@pytest.mark.parametrize("bound", ["max_entries", "max_bytes"])
def test_a_bound_of_nothing_is_refused(bound):
    with pytest.raises(ValueError, match=f"{bound} is 0"):
        PersistentPatternCache(**{bound: 0})
