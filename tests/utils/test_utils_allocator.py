"""Memory that is freed and taken again: kept where there is room, which saves the system's work."""

import resource

import pytest
import torch

from lightsparse.training.preflight import out_of_memory
from lightsparse.training.preflight.estimate import estimate
from lightsparse.utils.allocator import _glibc, keep_freed
from lightsparse.utils.machine import in_child


def faults_of_five_tensors(kept: bool) -> int:
    """Page faults while a tensor of 64 MiB is made, written and freed five times. Meant for a fresh process."""
    if kept:
        assert keep_freed() == (_glibc() is not None)
    for _ in range(2):  # what there is to keep first has to be there
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        for _ in range(5):
            torch.ones(1 << 24).sum()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


def test_a_tensor_made_of_kept_memory_asks_the_system_for_no_pages():
    if _glibc() is not None:
        assert in_child(faults_of_five_tensors, True) < 0.1 * in_child(faults_of_five_tensors, False)


@pytest.mark.parametrize(("free", "keeps"), [(1.9, False), (2.1, True)])
def test_a_run_keeps_what_it_frees_only_where_memory_holds_it_twice(tiny, monkeypatch, free, keeps):
    config = tiny()
    needed = estimate(config)
    asked = []
    monkeypatch.setattr(out_of_memory, "memory_per_rank", lambda config: (1 << 40, int(free * needed.total)))
    monkeypatch.setattr(out_of_memory, "keep_freed", lambda: asked.append(1) or True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert out_of_memory.keep_freed_where_there_is_room(config, needed) == keeps
    assert len(asked) == keeps
