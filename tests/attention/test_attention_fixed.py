"""What every variant over a pattern has without saying so: its errors."""

import pytest
import torch

from lightsparse.attention.core import AttentionConfig, AttentionShape, SequenceContext
from lightsparse.attention.fixed import FixedPatternAttention
from lightsparse.patterns import LocalWindow


class Plain(FixedPatternAttention):
    """A variant of a user's own, whose config checks nothing."""

    Config = AttentionConfig
    block = 0

    def pattern_at(self, num_keys):
        return LocalWindow(8)


def test_a_block_without_tokens_is_one_sentence_whatever_the_variant_checks():
    core = Plain(AttentionConfig(), AttentionShape(heads=1, kv_heads=1, head_dim=8, embed_dim=8))
    with pytest.raises(ValueError, match=r"attention\.block is 0; it counts tokens and must be at least 1"):
        core.layout(32, SequenceContext(torch.arange(32)[None]), torch.device("cpu"))
