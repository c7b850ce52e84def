"""What gloo and the store say when a rank is lost or late becomes an error with a name; nothing else does."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist
from rank_processes import RankPool, pool_fixture
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from lightsparse.distributed.comm_hooks import gradient_hook
from lightsparse.utils.rank_errors import LostRankError, RankError, RankTimeoutError, named_error, ranks_named

pool = pool_fixture(2)
SECONDS = 1.0  # timeout of the groups


def all_reduce(group: dist.ProcessGroup) -> None:
    dist.all_reduce(torch.ones(3), group=group)


def all_to_all(group: dist.ProcessGroup) -> None:
    dist.all_to_all_single(torch.empty(4), torch.ones(4), group=group)


def send_and_receive(group: dist.ProcessGroup) -> None:
    other = 1 - dist.get_rank()
    there = dist.P2POp(dist.isend, torch.ones(3), other, group)
    back = dist.P2POp(dist.irecv, torch.empty(3), other, group)
    for work in dist.batch_isend_irecv([there, back]):
        work.wait()


def receive(group: dist.ProcessGroup) -> None:
    dist.recv(torch.empty(3), 1 - dist.get_rank(), group=group)


def all_gather_later(group: dist.ProcessGroup) -> None:
    work = dist.all_gather([torch.empty(3), torch.empty(3)], torch.ones(3), group=group, async_op=True)
    work.wait()


def objects(group: dist.ProcessGroup) -> None:
    dist.all_gather_object([None, None], {"rank": dist.get_rank()}, group=group)


def barrier(group: dist.ProcessGroup) -> None:
    dist.barrier(group=group)


JOINT = (all_reduce, all_to_all, send_and_receive, receive, all_gather_later, objects, barrier)
HOOKS = ("none", "bf16", "powersgd", "topk")
STEPS = [step.__name__ for step in JOINT] + [f"backward_{hook}" for hook in HOOKS]


def prepared() -> dict[str, Callable[[], None]]:
    """What two ranks do together, each on a group of its own, so that one loss does not follow from another."""
    steps: dict[str, Callable[[], None]] = {}
    for step in JOINT:
        group = dist.new_group(timeout=timedelta(seconds=SECONDS))
        steps[step.__name__] = lambda step=step, group=group: step(group)
    for hook in HOOKS:
        group = dist.new_group(timeout=timedelta(seconds=SECONDS))
        ddp = DistributedDataParallel(nn.Linear(3, 2), process_group=group)
        pair = gradient_hook(hook, group=group)
        if pair is not None:
            ddp.register_comm_hook(*pair)
        steps[f"backward_{hook}"] = lambda ddp=ddp: ddp(torch.ones(5, 3)).sum().backward()
    for step in steps.values():
        step() if step is not steps["receive"] else None
    dist.barrier()
    return steps


Outcome = tuple[str, str, str, float]


def outcome(step: Callable[[], Any]) -> Outcome:
    """How a step ends: kind of error, its words, the library's, and seconds until then."""
    start = time.monotonic()
    try:
        with ranks_named(SECONDS):
            step()
    except RankError as error:
        return type(error).__name__, str(error), str(error.__cause__), time.monotonic() - start
    except RuntimeError as error:
        return "unnamed", str(error), "", time.monotonic() - start
    return "done", "", "", time.monotonic() - start


def all_at_once(steps: dict[str, Callable[[], None]]) -> dict[str, Outcome]:
    outcomes: dict[str, Outcome] = {}
    threads = [
        threading.Thread(target=lambda name=name, step=step: outcomes.update({name: outcome(step)}))
        for name, step in steps.items()
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return outcomes


def beside_a_rank_killed_before(rank: int, world: int) -> dict[str, Outcome]:
    steps = prepared()
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(0.2)
    return {name: outcome(step) for name, step in steps.items()}


def beside_a_rank_killed_meanwhile(rank: int, world: int) -> dict[str, Outcome]:
    steps = prepared()
    if rank == 1:
        time.sleep(0.2)
        os.kill(os.getpid(), signal.SIGKILL)
    return all_at_once(steps)


def beside_a_late_rank(rank: int, world: int) -> list[dict[str, Outcome]]:
    """Of rank 0: each step, and the same step once more. Of rank 1: the step that rank 0 no longer waits for."""
    steps = prepared()
    if rank == 1:
        time.sleep(SECONDS + 0.5)
        return [{"all_reduce": outcome(steps["all_reduce"])}]
    steps["new_group"] = lambda: dist.new_group(timeout=timedelta(seconds=SECONDS))
    twice = [all_at_once(steps), {name: outcome(steps[name]) for name in ("all_reduce", "send_and_receive")}]
    time.sleep(0.5)  # this rank stays, while the other comes
    return twice


@pytest.fixture(scope="module")
def killed_before(pool: RankPool) -> dict[str, Outcome]:
    return pool.run(beside_a_rank_killed_before, dies=(1,))[0]


@pytest.fixture(scope="module")
def killed_meanwhile(pool: RankPool) -> dict[str, Outcome]:
    return pool.run(beside_a_rank_killed_meanwhile, dies=(1,))[0]


@pytest.fixture(scope="module")
def late(pool: RankPool) -> tuple[list[dict[str, Outcome]], list[dict[str, Outcome]]]:
    first, second = pool.run(beside_a_late_rank)
    return first, second


@pytest.mark.multiprocess
@pytest.mark.parametrize("step", STEPS)
def test_a_rank_that_is_gone_is_lost_at_once(killed_before, step):
    kind, words, theirs, seconds = killed_before[step]
    assert kind == "LostRankError", (words, theirs)
    assert words.startswith("rank 0 of 2 has lost another rank")
    assert seconds < SECONDS / 2


@pytest.mark.multiprocess
@pytest.mark.parametrize("step", STEPS)
def test_a_rank_that_dies_while_it_is_awaited_is_lost_at_once(killed_meanwhile, step):
    kind, words, theirs, seconds = killed_meanwhile[step]
    assert kind == "LostRankError", (words, theirs)
    assert seconds < SECONDS - 0.1  # 0.2 until the kill; the timeout would be later


@pytest.mark.multiprocess
@pytest.mark.parametrize("step", [*STEPS, "new_group"])
def test_a_rank_that_does_not_come_is_named_late_when_the_timeout_is_over(late, step):
    kind, words, theirs, seconds = late[0][0][step]
    assert kind == "RankTimeoutError", (words, theirs)
    assert "did not come to the same step within 1 s (strategy.timeout)" in words
    assert SECONDS - 0.1 < seconds < SECONDS + 2


@pytest.mark.multiprocess
@pytest.mark.parametrize("step", ["all_reduce", "send_and_receive"])
def test_what_is_tried_after_a_timeout_is_named_too(late, step):
    kind, words, theirs, _ = late[0][1][step]
    assert kind in ("RankTimeoutError", "LostRankError"), (words, theirs)


@pytest.mark.multiprocess
def test_the_late_rank_has_lost_the_one_that_no_longer_waits(late):
    kind, words, theirs, _ = late[1][0]["all_reduce"]
    assert kind == "LostRankError", (words, theirs)


def beside_a_store_that_dies(rank: int, world: int, port: int) -> list[Outcome]:
    if rank == 0:
        store = dist.TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False)
        dist.barrier()
        store.get("ready")
        time.sleep(0.1)
        os.kill(os.getpid(), signal.SIGKILL)
    dist.barrier()
    store = dist.TCPStore("127.0.0.1", port, is_master=False, timeout=timedelta(seconds=5))
    store.set("ready", "yes")
    return [
        outcome(lambda: store.wait(["never"])),
        outcome(lambda: store.get("ready")),
        outcome(lambda: store.add("n", 1)),
    ]


@pytest.mark.multiprocess
def test_a_store_that_dies_is_a_lost_rank(pool):
    """The store is in the first rank's process, or in its launcher's."""
    free = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    port = free.port
    del free
    for kind, words, theirs, seconds in pool.run(beside_a_store_that_dies, port, dies=(0,))[1]:
        assert kind == "LostRankError", (words, theirs)
        assert seconds < 2


def test_a_key_that_nobody_writes_is_a_timeout():
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=0.2))
    assert outcome(lambda: store.get("never"))[0] == "RankTimeoutError"


def test_a_rank_that_never_starts_is_a_timeout():
    def wait_for_two() -> None:
        dist.TCPStore("127.0.0.1", 0, 2, is_master=True, timeout=timedelta(seconds=0.1))

    assert outcome(wait_for_two)[0] == "RankTimeoutError"


# From peers that died while they connected, and from NCCL, which needs a GPU: neither can be had here at will.
@pytest.mark.parametrize(
    ("words", "kind"),
    [
        ("Gloo connectFullMesh failed with [gloo/transport/tcp/pair.cc:144] Connection refused", LostRankError),
        ("Gloo connectFullMesh failed with [gloo/transport/tcp/pair.h:311] Connect timeout [none]", RankTimeoutError),
        ("NCCL error: remote process exited or there was a network error, NCCL version 2.27", LostRankError),
        ("NCCL watchdog thread: Watchdog caught collective operation timeout: WorkNCCL(SeqNum=3)", RankTimeoutError),
    ],
)
def test_other_words_for_a_lost_or_late_rank(words, kind):
    assert type(named_error(RuntimeError(words))) is kind


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("mat1 and mat2 shapes cannot be multiplied (3x4 and 5x6)"),
        RuntimeError("DataLoader timed out after 5 seconds"),
        RuntimeError("[gloo/allreduce.cc:28] invalid tensor type"),
        dist.DistBackendError("NCCL error: invalid usage"),
        BrokenPipeError(32, "Broken pipe"),  # of `train.py | head`, say
        ConnectionResetError("the logger's server"),
        ValueError("gloo timed out"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_an_error_about_something_else_passes_unchanged(error):
    with pytest.raises(type(error)) as raised, ranks_named(1.0):
        raise error
    assert raised.value is error


def test_a_named_error_is_not_named_again():
    error = LostRankError("rank 3 has lost gloo; timed out")
    with pytest.raises(LostRankError) as raised, ranks_named(1.0):
        raise error
    assert raised.value is error


def test_the_words_name_the_field_and_its_value():
    late = named_error(RuntimeError("gloo: Timed out waiting 90000ms"), 90.0)
    assert str(late) == (
        "this rank has waited for another rank, which did not come to the same step within 90 s (strategy.timeout)"
    )
    assert "within" not in str(named_error(RuntimeError("gloo: Timed out waiting 90000ms")))
