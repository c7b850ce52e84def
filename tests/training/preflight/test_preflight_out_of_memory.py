"""Too little memory: which errors mean it, what is said, and what is refused or warned of before."""

from __future__ import annotations

import errno
import logging
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

from lightsparse.config.parse import compose
from lightsparse.config.targets import ConfigError
from lightsparse.training.preflight import out_of_memory
from lightsparse.training.preflight.estimate import GIB, estimate
from lightsparse.training.preflight.out_of_memory import (
    MemoryShortError,
    check_memory,
    is_out_of_memory,
    memory_named,
    memory_per_rank,
    warn_of_memory,
)

WORDS = ("attention=sliding_window", "data.context=2048", "data.batch_size=4")


def real_error() -> Exception:
    with pytest.raises(RuntimeError) as failed:
        torch.empty(10**15)
    return failed.value


@pytest.mark.parametrize(
    ("error", "means_it"),
    [
        (MemoryError("no memory for its bookkeeping"), True),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."), True),
        (RuntimeError("std::bad_alloc"), True),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), True),
        (OSError(errno.ENOSPC, "No space left on device"), False),
        (RuntimeError("size mismatch"), False),
        (ValueError("out of memory"), False),
    ],
)
def test_failed_allocations_are_told_from_other_errors(error: Exception, means_it: bool) -> None:
    assert is_out_of_memory(error) == means_it
    wrapped = KeyError("step")
    wrapped.__cause__ = error
    assert is_out_of_memory(wrapped) == means_it


def test_the_allocators_own_error_becomes_a_sentence_with_three_settings() -> None:
    assert is_out_of_memory(real_error())
    config = compose(WORDS)
    needed = estimate(config)
    with pytest.raises(MemoryShortError) as said, memory_named(config, needed):
        raise real_error()
    sentence = str(said.value)
    assert sentence.startswith(f"out of memory: this run takes about {needed}, and ") and "\n" not in sentence
    assert sentence.count("(about ") == 3 and "data.batch_size=" in sentence


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU of 80 GiB in a machine of 64, as far as memory is asked for."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (80 * GIB, 80 * GIB))
    monkeypatch.setattr(out_of_memory, "main_memory_per_rank", lambda config: (64 * GIB, 50 * GIB))


DEEP = ("precision=32", "attention=sliding_window", "data.context=262144", "eval.tokens=262144", "model.depth=24",
        "model.embed_dim=1024", "optimizer=adamw")  # fmt: skip


@pytest.mark.usefixtures("gpu")
def test_on_a_gpu_the_sentence_names_offload_after_activation_checkpointing() -> None:
    def said(*words: str) -> str:
        config = compose([*DEEP, *words])
        with pytest.raises(MemoryShortError) as failed, memory_named(config, estimate(config)):
            raise torch.OutOfMemoryError("CUDA out of memory")
        return str(failed.value)

    assert "set model.activation_checkpointing=true (about " in said()
    assert "set model.activation_checkpointing=offload (about " in said("model.activation_checkpointing=true")
    assert " of main memory), or data." in said("model.activation_checkpointing=true")
    last = said("model.activation_checkpointing=offload")
    assert "activation_checkpointing" not in last.split("; ")[-1]
    assert " of main memory, and 80.0 GiB of 80.0 GiB on a GPU were free when it started, beside 50.0 GiB of" in last


@pytest.mark.usefixtures("gpu")
def test_main_memory_that_cannot_hold_the_layers_inputs_is_refused_or_warned_of(
    caplog: pytest.LogCaptureFixture,
) -> None:
    offload = "model.activation_checkpointing=offload"
    with pytest.raises(ConfigError, match=r"_checkpointing is offload; the inputs of 99 layers take at "):
        check_memory(compose([*DEEP, offload, "model.depth=100"]))
    check_memory(compose([*DEEP, "model.activation_checkpointing=true", "model.depth=100"]))
    check_memory(compose([*DEEP, offload]))
    wide = compose([*DEEP, offload, "data.context=400000", "eval.tokens=400000", "model.depth=40"])
    with caplog.at_level(logging.WARNING):
        warn_of_memory(compose([*DEEP, offload]), estimate(compose([*DEEP, offload])))
        assert caplog.text == ""
        warn_of_memory(wide, estimate(wide))
    assert "the main memory has 64.0 GiB" in caplog.text


def test_other_errors_pass_unchanged() -> None:
    config = compose(WORDS)
    with pytest.raises(ZeroDivisionError), memory_named(config, estimate(config)):
        _ = 1 / 0


def test_a_context_that_cannot_fit_is_refused_before_its_layout_is_made() -> None:
    with pytest.raises(ConfigError, match=r"^data\.context is 10000000000000; .* takes at least .*; lower data\."):
        check_memory(compose([*WORDS, "data.context=10000000000000", "eval.tokens=10000000000000"]))
    check_memory(compose(WORDS))


def test_an_estimate_far_above_the_memory_is_a_warning_and_no_refusal(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    config = compose(WORDS)
    needed = estimate(config)
    with caplog.at_level(logging.WARNING):
        monkeypatch.setattr(out_of_memory, "memory_per_rank", lambda config: (int(needed.total / 1.9), 0))
        warn_of_memory(config, needed)
        assert caplog.text == ""
        monkeypatch.setattr(out_of_memory, "memory_per_rank", lambda config: (int(needed.total / 2.1), 0))
        warn_of_memory(config, needed)
    assert "THIS WILL PROBABLY NOT FIT" in caplog.text and "(about " in caplog.text


def test_ranks_of_one_machine_share_its_memory() -> None:
    one = memory_per_rank(compose(WORDS))[0]
    assert memory_per_rank(compose([*WORDS, "strategy=ddp", "trainer.devices=4"]))[0] == one // 4


@pytest.mark.multiprocess
def test_a_process_that_reaches_its_limit_says_so_and_ends_with_2(tmp_path: Path) -> None:
    """The system's own refusal, under a limit that holds the imports and the text but no pass of this batch."""
    for i in range(6):
        (tmp_path / f"{i}.txt").write_text("some words " * 2000)
    script = f"""
        import resource, sys
        from lightsparse.cli import train as main
        from lightsparse.training import run
        import psutil, torch
        torch.set_num_threads(1)
        limit = psutil.Process().memory_info().vms + {GIB}
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        run.matmul_peak = lambda *given: 1e11
        sys.argv = ["train.py", "attention=sliding_window", "data=files", "data.path='{tmp_path}/*.txt'",
            "data.context=4096", "data.batch_size=64", "data.val_fraction=0.5", "eval.tokens=4096", "threads=1",
            "trainer.progress=false", "kernels.backend=blocked", "runs_dir={tmp_path}/runs", "name=large"]
        main.main()
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, timeout=400, check=False
    )
    assert done.returncode == 2, done.stderr
    last = done.stderr.splitlines()[-1]
    assert last.startswith("out of memory: this run takes about ") and "data.batch_size=" in last, done.stderr
