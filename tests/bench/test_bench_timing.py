import pytest
import torch

from lightsparse.bench.timing import Lap, alternate, cpu_speedup, median_ms, runtime, speedup


def test_contenders_take_turns_and_the_order_turns_round():
    calls = []
    laps = alternate({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, rounds=3)
    assert "".join(calls) == "ab" + "ab" + "ba" + "ab"  # a warm-up of each, then the rounds
    assert len(laps["a"]) == len(laps["b"]) == 3


def test_a_disturbed_round_does_not_move_the_ratio():
    ours = [Lap(1.0, 1.0), Lap(50.0, 1.0), Lap(1.0, 1.0)]
    baseline = [Lap(4.0, 3.0), Lap(4.0, 3.0), Lap(4.0, 3.0)]
    assert speedup(ours, baseline) == 4.0
    assert cpu_speedup(ours, baseline) == 3.0
    assert median_ms(ours) == 1000.0


def test_rounds_compare_like_with_like_when_the_machine_slows_down():
    ours, baseline = ([Lap(factor * s, 1.0) for s in (1.0, 2.0, 8.0)] for factor in (1, 5))
    assert speedup(ours, baseline) == 5.0


def test_runtime_settings_hold_inside_and_are_restored():
    before = torch.get_num_threads(), torch.get_float32_matmul_precision()
    with pytest.raises(RuntimeError, match="inside"), runtime(1, "medium"):
        assert (torch.get_num_threads(), torch.get_float32_matmul_precision()) == (1, "medium")
        raise RuntimeError("inside")
    assert (torch.get_num_threads(), torch.get_float32_matmul_precision()) == before


def test_no_rounds_are_refused():
    with pytest.raises(ValueError, match="at least 1"):
        alternate({"a": lambda: None}, rounds=0)
