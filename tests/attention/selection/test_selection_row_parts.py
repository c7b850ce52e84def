"""Queries in parts: the last query of every block is known from where a part begins, without a look at it."""

import battery
import pytest
import torch

from lightsparse.attention.selection.row_parts import block_ends


@pytest.mark.parametrize("first", [0, 1, 15, 16, 40])
@pytest.mark.parametrize("count", [1, 15, 16, 17, 60])
@pytest.mark.parametrize("left", [0, 1, 16])
def test_the_last_queries_of_blocks_are_those_at_a_blocks_or_the_sequences_last_token(left, count, first):
    """left: tokens of the sequence behind the part."""
    tokens, length, block = torch.arange(first, first + count), first + count + left, 16
    wanted = (tokens % block == block - 1) | (tokens == length - 1)
    found = block_ends(tokens, first, block, length, battery.context(length))
    assert found.tolist() == wanted.nonzero().flatten().tolist()
    assert block_ends(tokens.to("meta"), first, block, length, battery.context(length)).shape == found.shape
