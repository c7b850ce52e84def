"""Which signals ask a run to stop, and when SLURM is asked to start its job again."""

from __future__ import annotations

import signal

import pytest

from lightsparse.training.preemption import Preemption


@pytest.fixture
def hangup():
    """Whatever a test does with SIGHUP is undone."""
    before = signal.getsignal(signal.SIGHUP)
    yield
    signal.signal(signal.SIGHUP, before)


def test_the_end_of_the_terminal_asks_to_stop_unless_nohup_has_it_ignored(hangup) -> None:
    for ignored in (False, True):
        signal.signal(signal.SIGHUP, signal.SIG_IGN if ignored else signal.SIG_DFL)
        preemption = Preemption()
        preemption.listen()
        signal.raise_signal(signal.SIGHUP)
        preemption.stop_listening()
        assert preemption.asked == (0 if ignored else signal.SIGHUP)
        assert signal.getsignal(signal.SIGHUP) == (signal.SIG_IGN if ignored else signal.SIG_DFL)
