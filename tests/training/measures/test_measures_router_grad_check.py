"""A router without a gradient is named; one that learns, and a choice without parameters, are left in peace."""

import logging

import pytest
import torch

from lightsparse.attention.adaptive import AdaptiveConfig, BlockSparseAdaptive
from lightsparse.attention.core import AttentionCore, AttentionShape, SequenceContext
from lightsparse.attention.moba import MobaAttention, MobaConfig
from lightsparse.training.measures.router_grad_check import STEPS, RouterWatch


def adaptive(layer: int, **fields) -> BlockSparseAdaptive:
    config = AdaptiveConfig(block=8, k_max=2, router_dim=4, **fields)
    return BlockSparseAdaptive(config, AttentionShape(2, 1, 8, 16, layer=layer)).train()


def steps(watch: RouterWatch, cores: list[AttentionCore], count: int, scale: float = 1.0) -> None:
    q, k, v = (torch.randn(1, heads, 64, 8, requires_grad=True) for heads in (2, 1, 1))
    for _ in range(count):
        for core in cores:
            core.zero_grad()
            result = core(q, k, v, x=q, ctx=SequenceContext(torch.arange(64)[None]))
            loss = result.out.square().sum() + (0 if result.aux_loss is None else result.aux_loss)
            (loss * scale).backward()
        watch.look(lambda x: x)


@pytest.mark.parametrize(("scale", "wanted"), [(0.0, 1), (1.0, 0)])
def test_a_router_is_named_when_its_gradient_is_zero_in_all_of_the_first_steps(scale, wanted, caplog):
    cores = [adaptive(0), adaptive(3)]
    watch = RouterWatch(cores)
    with caplog.at_level(logging.WARNING, logger="lightsparse"):
        steps(watch, cores, STEPS - 1, scale)
        assert not caplog.records
        steps(watch, cores, 5, scale)
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == wanted
    assert all("the router has received no gradient in 10 steps, in layers [0, 3]: " in text for text in said)


def test_one_step_with_a_gradient_is_enough(caplog):
    cores = [adaptive(0)]
    watch = RouterWatch(cores)
    with caplog.at_level(logging.WARNING, logger="lightsparse"):
        steps(watch, cores, 1)
        steps(watch, cores, STEPS, 0.0)
    assert not caplog.records


def test_what_other_ranks_found_counts(caplog):
    cores = [adaptive(0)]
    watch = RouterWatch(cores)
    with caplog.at_level(logging.WARNING, logger="lightsparse"):
        for _ in range(STEPS):
            watch.look(lambda x: x + 1)
    assert not caplog.records


def test_a_choice_without_parameters_raises_no_false_alarm(caplog):
    cores: list[AttentionCore] = [MobaAttention(MobaConfig(block=8, top_k=2), AttentionShape(2, 1, 8, 16))]
    watch = RouterWatch(cores)
    with caplog.at_level(logging.WARNING, logger="lightsparse"):
        steps(watch, cores, STEPS)
    assert not caplog.records and not watch.left
