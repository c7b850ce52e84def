import json

import pytest
import torch

from lightsparse.bench import command, memory
from lightsparse.utils.machine import MIB, current_rss, in_child, peak_rss


def test_rows_hold_the_increase_and_its_growth(monkeypatch, tmp_path):
    increases = iter([(10 * MIB, 300 * MIB), (41 * MIB, 340 * MIB)])
    asked = []

    def measured(function, case):
        asked.append((function, case.seq, case.window, case.dtype))
        return next(increases)

    monkeypatch.setattr(memory, "in_child", measured)
    file = tmp_path / "memory.json"
    words = ["--seq", "4096,1024", "--block", "64", "--window", "256", "--json", str(file)]
    assert command.main(["memory", *words]) == 0
    first, second = json.loads(file.read_text())["rows"]
    assert asked == [(memory.peak_of_pass, 1024, 256, "fp32"), (memory.peak_of_pass, 4096, 256, "fp32")]
    assert (first["increase_mib"], first["growth"], first["bytes_per_token"]) == (10, None, 10 * MIB / 1024)
    assert (second["increase_mib"], second["growth"], second["peak_rss_mib"]) == (41, 4.1, 340)


@pytest.mark.multiprocess
@pytest.mark.parametrize("backend", ["native", "blocked"])
def test_a_pass_in_a_fresh_process_takes_at_least_its_outputs_and_no_square(backend):
    case = memory.Case(8192, 4, 4, 64, 64, 256, backend, "fp32", 1, "highest")
    increase, peak = in_child(memory.peak_of_pass, case)
    outputs = 4 * 4 * 8192 * 64 * 4  # out and three gradients, fp32
    assert 0.9 * outputs < increase < 4 * outputs  # one matrix of scores would be 4 · 8192² · 4 = 1 GiB
    assert increase < peak


@pytest.mark.multiprocess
def test_a_child_does_not_inherit_its_parents_peak():
    ballast = torch.ones(700 * MIB // 4)
    del ballast
    assert peak_rss() > 700 * MIB
    assert in_child(peak_rss) < 700 * MIB


def test_peak_is_never_below_what_is_resident():
    block = torch.ones(50 * MIB // 4)
    assert peak_rss() >= current_rss() - MIB
    assert current_rss() > block.nbytes
