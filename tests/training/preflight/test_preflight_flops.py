"""The peak is a speed this machine reaches, the error that of its fp32 setting."""

from __future__ import annotations

import pytest
import torch

from lightsparse.training.preflight.flops import matmul_error, matmul_peak


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_peak_is_of_the_order_of_a_processor(dtype: torch.dtype) -> None:
    assert 1e8 < matmul_peak(torch.device("cpu"), dtype) < 1e14


def test_the_error_of_full_fp32_is_that_of_fp32() -> None:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        assert 0 < matmul_error(torch.device("cpu")) < 2e-6
    finally:
        torch.set_float32_matmul_precision(before)
