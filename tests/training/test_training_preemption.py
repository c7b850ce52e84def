"""Which signals ask a run to stop, and when SLURM is asked to start its job again."""

from __future__ import annotations

import os
import signal

import pytest

from lightsparse.training.preemption import _TIME_IS_UP, Preemption, job_to_requeue


@pytest.fixture
def hangup():
    """Whatever a test does with SIGHUP is undone, and nobody else hears it: tests before may have called a command."""
    before, wakeup = signal.getsignal(signal.SIGHUP), signal.set_wakeup_fd(-1)
    yield
    signal.signal(signal.SIGHUP, before)
    signal.set_wakeup_fd(wakeup)


def test_the_end_of_the_terminal_asks_to_stop_unless_nohup_has_it_ignored(hangup) -> None:
    for ignored in (False, True):
        signal.signal(signal.SIGHUP, signal.SIG_IGN if ignored else signal.SIG_DFL)
        preemption = Preemption()
        preemption.listen()
        signal.raise_signal(signal.SIGHUP)
        preemption.stop_listening()
        assert preemption.asked == (0 if ignored else signal.SIGHUP)
        assert signal.getsignal(signal.SIGHUP) == (signal.SIG_IGN if ignored else signal.SIG_DFL)


STEP = {"SLURM_JOB_ID": "78", "SLURM_JOB_NAME": "train", "SLURM_PROCID": "0", "SLURM_NTASKS": "1"}
SELF, PARENT = {"SLURM_TASK_PID": str(os.getpid())}, {"SLURM_TASK_PID": str(os.getppid())}
ARRAY = {"SLURM_ARRAY_JOB_ID": "70", "SLURM_ARRAY_TASK_ID": "8"}
TORCHRUN = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}
TIME, USR1 = _TIME_IS_UP, signal.SIGUSR1


@pytest.mark.parametrize(
    ("asked", "variables", "job"),
    [
        (TIME, STEP, "78"),
        (TIME, STEP | SELF, "78"),
        (TIME, STEP | SELF | ARRAY, "70_8"),
        (USR1, STEP | ARRAY, "70_8"),
        (USR1, STEP | PARENT, "78"),  # the job's time is up, whatever else its script does
        (TIME, STEP | PARENT | TORCHRUN, "78"),  # torchrun is the step
        (TIME, STEP | PARENT, None),  # a command among others of a script
        (TIME, STEP | {"SLURM_JOB_NAME": "bash"}, None),
        (USR1, STEP | {"SLURM_JOB_NAME": "interactive"}, None),
        (TIME, {"SLURM_JOB_ID": "78"}, None),  # as a trial of a sweep sees it
        (signal.SIGTERM, STEP, None),
        (USR1, STEP | {"SLURM_PROCID": "1", "SLURM_NTASKS": "2"}, None),
        (TIME, {}, None),
    ],
)
def test_a_job_is_started_again_where_its_time_is_up_and_it_does_nothing_else(
    asked: int, variables: dict[str, str], job: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "environ", {"PATH": os.environ["PATH"]} | variables)
    assert job_to_requeue(asked) == job
