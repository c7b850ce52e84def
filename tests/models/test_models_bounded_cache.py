"""What decoding keeps in memory when it has gone many windows beyond its prompt."""

from collections.abc import Callable

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lightsparse.attention.adaptive import AdaptiveConfig, BlockSparseAdaptive
from lightsparse.attention.big_bird import BigBirdAttention, BigBirdConfig
from lightsparse.attention.block_sparse import BlockSparseConfig, BlockSparseRingDilatedAttention
from lightsparse.attention.core import AttentionConfig, AttentionCore
from lightsparse.attention.dense import DenseAttention, DenseConfig
from lightsparse.attention.dilated import DilatedAttention, DilatedConfig
from lightsparse.attention.hierarchical import BlockSparseHierarchical, HierarchicalConfig
from lightsparse.attention.sliding_window import SlidingWindowAttention, SlidingWindowConfig
from lightsparse.models import Generation, ModelConfig, Transformer
from lightsparse.models.sampling import GREEDY
from lightsparse.patterns import GlobalTokens, LocalWindow

BLOCK, WINDOW, NEW = 4, 16, 170  # tokens: the new ones are more than ten windows
PER_TOKEN = 2 * 2 * 16 * 4  # bytes: keys and values of two heads of 16, fp32

# Blocks that a query reads at most: a window that begins within a block, and the first block with the sinks.
WINDOWED = (
    (SlidingWindowAttention, SlidingWindowConfig(window=WINDOW, sinks=3, block=BLOCK), 1 + WINDOW // BLOCK + 1),
    (
        BlockSparseRingDilatedAttention,
        BlockSparseConfig(
            block=BLOCK, segment_lengths=(), dilation_rates=(), pattern={"w": LocalWindow(WINDOW), "s": GlobalTokens(3)}
        ),
        1 + WINDOW // BLOCK + 1,
    ),
    (BigBirdAttention, BigBirdConfig(block=BLOCK, window=WINDOW, global_tokens=3, random=0), 1 + WINDOW // BLOCK + 1),
    (
        BlockSparseRingDilatedAttention,
        BlockSparseConfig(block=BLOCK, segment_lengths=(8, 32), dilation_rates=(1, 2), pattern={}),
        32 // BLOCK,
    ),
    (DilatedAttention, DilatedConfig(segment_lengths=(8, 32), dilation_rates=(1, 2), block=BLOCK), 32 // BLOCK),
    (DenseAttention, DenseConfig(pattern=LocalWindow(WINDOW), block=BLOCK), WINDOW // BLOCK + 1),
)


def decoding(core: type[AttentionCore], config: AttentionConfig, prompt: int = 25) -> Generation:
    torch.manual_seed(0)
    sizes = ModelConfig(depth=1, embed_dim=32, heads=2, kv_heads=2, head_dim=16, mlp_dim=32)
    model = Transformer(sizes, lambda shape: core(config, shape), vocab_size=29, context=256)
    return Generation(model, torch.zeros(1, prompt, dtype=torch.int64), NEW, sampling=GREEDY)


class _LargestFloats(TorchDispatchMode):
    largest = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        made = [leaf for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor) and leaf.is_floating_point()]
        self.largest = max([self.largest, *(leaf.numel() for leaf in made)])
        return result


def largest(function: Callable[[], object]) -> int:
    with _LargestFloats() as watch:
        function()
    return watch.largest


@pytest.mark.parametrize(("core", "config", "blocks"), WINDOWED, ids=lambda each: getattr(each, "__name__", ""))
def test_a_windows_cache_and_the_work_of_a_step_stay_as_small_as_the_window(core, config, blocks):
    steps, held, sizes = decoding(core, config), [], []
    next(steps)
    for _ in range(1, NEW):
        sizes.append(largest(lambda: next(steps)))
        held.append(steps.caches[0].nbytes)
    assert max(held) <= blocks * BLOCK * PER_TOKEN
    assert max(held[100:]) <= max(held[:50])
    assert max(sizes[100:]) <= max(sizes[:50])


@pytest.mark.parametrize(
    ("core", "config"),
    [
        (DenseAttention, DenseConfig()),
        (BlockSparseAdaptive, AdaptiveConfig(block=BLOCK, k_max=2)),
    ],
)
def test_a_core_that_may_read_anything_keeps_everything(core, config):
    steps = decoding(core, config)
    for _ in steps:
        assert steps.caches[0].nbytes >= steps.caches[0].length * PER_TOKEN


def test_a_hierarchy_keeps_its_near_tokens_and_one_summary_per_stride():
    levels = ((8, 1), (32, 4), (None, 16))
    steps = decoding(BlockSparseHierarchical, HierarchicalConfig(preset=None, levels=levels, block=BLOCK))
    for _ in steps:
        cache = steps.caches[0]
        tokens = 8 + 4 + 2 * BLOCK  # the near window and a stride, that begin and end within blocks
        assert cache.nbytes <= (tokens + cache.length // 4 + cache.length // 16) * PER_TOKEN


def test_summaries_of_forgotten_tokens_that_are_lost_are_missed():
    steps = decoding(BlockSparseHierarchical, HierarchicalConfig(preset=None, levels=((8, 1), (None, 4)), block=BLOCK))
    for _ in range(40):
        next(steps)
    steps.caches[0].state.clear()
    with pytest.raises(ValueError, match="has forgotten tokens of a summary of 4"):
        list(steps)


def test_random_blocks_stay_as_long_as_some_row_to_come_has_drawn_them():
    steps = decoding(BigBirdAttention, BigBirdConfig(block=BLOCK, window=4, global_tokens=0, random=2))
    held = [steps.caches[0].nbytes // PER_TOKEN for _ in steps]
    assert max(held) < 25 + NEW - 1  # some are never drawn
    assert held[-1] <= 5 * BLOCK  # the last row reads its own, the window's and two drawn blocks


def test_a_long_prompts_keys_are_not_all_kept_until_the_last_layer_is_done():
    steps = decoding(SlidingWindowAttention, SlidingWindowConfig(window=WINDOW, sinks=0, block=BLOCK), prompt=3000)
    next(steps)
    assert steps.caches[0].length == 3000
    assert steps.caches[0].nbytes <= (WINDOW // BLOCK + 1) * BLOCK * PER_TOKEN
