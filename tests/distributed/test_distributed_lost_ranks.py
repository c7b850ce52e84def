"""A rank that dies or hangs ends its job: one readable sentence, code 75, nobody left, and the same command goes on."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest
from rank_runs import command, environment, free_port, ranks_of, torchrun, words

from lightsparse.config.compose import compose_raw
from lightsparse.config.parse import parse
from lightsparse.training.checkpoints.files import checkpoint_steps
from lightsparse.training.metrics.metrics_file import read_metrics
from lightsparse.training.run import fit

TIMEOUT = 3.0  # seconds: strategy.timeout of these runs
LONG = ("trainer.max_steps=5000", "checkpoint.every_n_steps=5", "eval.every_n_steps=5000", "schedule=constant")
WAITS = f"strategy.timeout={TIMEOUT:g}"
SENTENCES = ("has lost another rank", "has waited for another rank", "has ended with code", "which started this rank")


@contextmanager
def started(line: list[str], log: Path, **more: str) -> Iterator[subprocess.Popen]:
    """A process of a job; whatever the test leaves of its session is killed."""
    with log.open("w") as file:
        process = subprocess.Popen(line, stdout=file, stderr=file, env=environment(**more), start_new_session=True)
        try:
            yield process
        finally:
            for left in psutil.process_iter(["pid"]):
                try:
                    if os.getsid(left.pid) == process.pid:
                        left.kill()
                except (ProcessLookupError, psutil.NoSuchProcess):
                    continue
            process.wait()


def wait_for(what: str, condition: Callable[[], Any], seconds: float, log: Path) -> Any:
    """The first true value of condition()."""
    until = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < until, f"no {what} within {seconds:g} s:\n{log.read_text()}"
        time.sleep(0.05)
    return value


def trained(folder: Path, name: str, steps: int) -> bool:
    return bool(checkpoint_steps(folder / "runs" / name / "checkpoints")) and (
        len(read_metrics(folder / "runs" / name / "metrics.csv")) > steps
    )


@pytest.mark.multiprocess
@pytest.mark.parametrize("stopped", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "stopped"])
@pytest.mark.parametrize("lost", [0, 1], ids=["the-first", "the-second"])
def test_a_lost_rank_ends_the_others_with_a_sentence_and_leaves_no_process(
    stopped: signal.Signals, lost: int, tmp_path: Path
) -> None:
    """The ranks are those that the first one starts; the moment is a random one in a step. Then it goes on."""
    name, log = f"lost-{lost}-{stopped.name}", tmp_path / "log"
    line = words(tmp_path, f"name={name}", "data.batch_size=1", *LONG)
    with started(command([*line, "strategy=context", "trainer.devices=2", WAITS]), log) as process:
        wait_for("training", lambda: trained(tmp_path, name, 8), 120, log)
        ranks = ranks_of(f"name={name}")
        assert len(ranks) == 2 and ranks[0].pid == process.pid
        time.sleep(random.random() * 0.3)
        ranks[lost].send_signal(stopped)
        began = time.monotonic()
        wait_for("end of all ranks", lambda: not ranks_of(f"name={name}"), TIMEOUT + 15, log)
        assert time.monotonic() - began < TIMEOUT + 12
        text = log.read_text()
        assert any(sentence in text for sentence in SENTENCES) and "the same command continues from" in text, text
        assert "Traceback" not in text, text
        if lost == 1:
            assert process.wait() == 75
    step = max(checkpoint_steps(tmp_path / "runs" / name / "checkpoints"))
    fit(parse(compose_raw([*line, f"trainer.max_steps={step + 3}"])))  # one rank will do: it is the same run
    rows = read_metrics(tmp_path / "runs" / name / "metrics.csv")
    assert [row["step"] for row in rows] == list(range(step + 4))


@pytest.mark.multiprocess
def test_two_machines_lose_one_and_go_on_when_both_are_started_again(tmp_path: Path) -> None:
    """Two torchrun agents on loopback; the second is killed, its rank an orphan then."""
    name, logs = "machines", [tmp_path / "log0", tmp_path / "log1"]
    line = words(tmp_path, f"name={name}", "strategy=ddp", WAITS, "checkpoint.every_n_steps=5", "schedule=constant")

    def agents(steps: int) -> list[list[str]]:
        port = free_port()
        where = ("--nnodes=2", "--nproc-per-node=1", "--master-addr=127.0.0.1", f"--master-port={port}")
        return [torchrun([*line, f"trainer.max_steps={steps}"], *where, f"--node-rank={node}") for node in range(2)]

    first, second = agents(5000)
    with started(first, logs[0]) as one, started(second, logs[1]) as other:
        wait_for("training", lambda: trained(tmp_path, name, 8), 120, logs[0])
        other.kill()
        wait_for("end of all ranks", lambda: not ranks_of(f"name={name}"), TIMEOUT + 15, logs[0])
        assert one.wait() != 0
        text = logs[0].read_text() + logs[1].read_text()
        assert any(sentence in text for sentence in SENTENCES), text
    step = max(checkpoint_steps(tmp_path / "runs" / name / "checkpoints"))
    first, second = agents(step + 5)
    with started(first, logs[0]) as one, started(second, logs[1]) as other:
        assert one.wait(120) == other.wait(120) == 0, logs[0].read_text() + logs[1].read_text()
    assert f"continues from step {step} " in logs[0].read_text()
    rows = read_metrics(tmp_path / "runs" / name / "metrics.csv")
    assert [row["step"] for row in rows] == list(range(step + 6))
