"""Strategies as a user meets them: what a kind reads, what it refuses and in which words, what names a run."""

from __future__ import annotations

import pytest
from rank_processes import pool_fixture
from rank_runs import members

from lightsparse.config.compose import compose_raw, conf_dir
from lightsparse.config.parse import compose, on_this_machine
from lightsparse.config.run_identity import config_hash, differences
from lightsparse.config.targets import ConfigError
from lightsparse.distributed.environment import launched_ranks
from lightsparse.distributed.mesh import RankGrid
from lightsparse.distributed.strategies import ReplicatedStrategy, ShardedStrategy, strategy_for
from lightsparse.training.preflight.check import check

four = pool_fixture(4)

SMALL = ["attention=sliding_window", "model=nano", "data.context=512"]
WRONG = {
    "trainer.devices=2": "the job has 2 ranks (trainer.devices × trainer.num_nodes, or those of the launcher) and "
    "strategy=single takes 1; use strategy=ddp, fsdp, context or fsdp_context",
    "strategy=context strategy.context_parallel_size=3 trainer.devices=4": "which does not divide the job's 4",
    "strategy=context strategy.context_parallel_size=0": "context_parallel_size is 0; it counts ranks per sequence",
    "strategy=context trainer.num_nodes=128": "data.context is 512, that is ",
    "strategy=context strategy.split=even": "strategy.split is 'even'; it must be one of contiguous, head_tail, ",
    "strategy=context strategy.key_exchange=post": "key_exchange is 'post'; it must be one of auto, sparse, ring, ",
    "strategy=ddp strategy.timeout=0": "strategy.timeout is 0; it counts seconds",
    "strategy=ddp strategy.context_parallel_size=2": "is 2, which strategy=ddp does not read; use strategy=context ",
    "strategy=fsdp strategy.comm_hook=bf16": "strategy.comm_hook is bf16, which strategy=fsdp does not read; "
    "use strategy=context or ddp",
    "strategy=fsdp strategy.tiemout=3": "strategy.tiemout is not a key; did you mean strategy.timeout?",
    "strategy=ddp strategy.comm_hook=zip": "strategy.comm_hook is 'zip'; it must be one of none, bf16, powersgd, topk",
    "strategy=ddp strategy.topk_share=0.1": "strategy.topk_share is 0.1, which strategy.comm_hook=none does not read",
    "strategy=ddp strategy.comm_hook=topk strategy.topk_share=0": "strategy.topk_share is 0",
    "strategy=ddp strategy.comm_hook=topk strategy.powersgd_rank=2": "strategy.powersgd_rank is 2, which ",
    "strategy=ddp strategy.comm_hook=powersgd strategy.powersgd_start=1": "strategy.powersgd_start is 1",
    "strategy=ddp strategy.comm_hook=bf16 precision=bf16-true": "strategy.comm_hook is bf16 and precision is bf16-true",
    "strategy=spread": "strategy is spread; conf/strategy has ",
    "strategy._target_=lightsparse.config.schema.Config": "it must be a subclass of StrategyConfig",
}


@pytest.mark.parametrize("words", WRONG)
def test_a_wrong_combination_is_one_sentence_before_any_compute(words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        check(compose([*SMALL, *words.split()]))
    assert WRONG[words] in str(caught.value) and "\n" not in str(caught.value)


def test_an_exchange_that_some_layer_cannot_use_is_refused_with_those_it_can(monkeypatch: pytest.MonkeyPatch) -> None:
    config = compose([*SMALL, "strategy=context", "trainer.devices=2", "strategy.key_exchange=ring"])
    monkeypatch.setattr(config.attention.core, "context_parallel", ("sparse", "gather"))
    with pytest.raises(ConfigError, match=r"^strategy\.key_exchange is ring, and .* by sparse or gather only; use"):
        check(config)
    monkeypatch.setattr(config.attention.core, "context_parallel", ())
    with pytest.raises(ConfigError, match=r"can split a sequence over ranks by none; use strategy=ddp$"):
        check(config)


@pytest.mark.parametrize("kind", sorted(path.stem for path in (conf_dir() / "strategy").glob("*.yaml")))
def test_every_kind_has_its_file_and_its_lightning_strategy(kind: str) -> None:
    config = compose([f"strategy={kind}"])
    assert config.strategy.kind == kind
    made = strategy_for(config.strategy, 1)
    wanted = ShardedStrategy if config.strategy.sharded else ReplicatedStrategy
    assert made == "auto" if kind == "single" else isinstance(made, wanted)


@pytest.mark.parametrize(("context", "rows"), [(1, [0, 1, 2, 3]), (2, [0, 0, 1, 1]), (4, [0, 0, 0, 0])])
def test_the_ranks_of_a_sequence_are_neighbours_and_read_the_same_samples(context: int, rows: list[int]) -> None:
    grid = RankGrid(4, context)
    assert grid.data == len(set(rows))
    assert [grid.data_rank(rank) for rank in range(4)] == rows


def test_what_is_trained_does_not_depend_on_who_holds_it() -> None:
    alone = compose_raw(["data.batch_size=2"])
    for words in (
        ["strategy=context", "trainer.devices=4"],
        ["strategy=context", "trainer.devices=2", "trainer.num_nodes=2", "strategy.split=head_tail"],
        ["strategy=fsdp_context", "trainer.devices=8", "strategy.timeout=7"],
    ):
        spread = compose_raw(["data.batch_size=2", *words])
        assert config_hash(spread) == config_hash(alone) and differences(alone, spread) == []
    two = compose_raw(["strategy=ddp", "trainer.devices=2"])
    same = compose_raw(["strategy=fsdp_context", "strategy.context_parallel_size=4", "trainer.devices=8"])
    assert config_hash(two) == config_hash(same) != config_hash(compose_raw([]))


def test_the_global_batch_and_the_hook_do_count() -> None:
    two = compose_raw(["strategy=ddp", "trainer.devices=2"])
    assert differences(compose_raw([]), two) == ["samples per optimizer step: 1 there, 2 here"]
    hooked = compose_raw(["strategy=ddp", "trainer.devices=2", "strategy.comm_hook=topk"])
    assert differences(two, hooked) == ["strategy.comm_hook: absent there, topk here"]


LAUNCHERS = {
    "torchrun": ({"WORLD_SIZE": "6", "LOCAL_WORLD_SIZE": "3", "RANK": "4", "LOCAL_RANK": "1"}, (3, 2)),
    "slurm": ({"SLURM_NTASKS": "8", "SLURM_NNODES": "2", "SLURM_JOB_NAME": "train", "SLURM_PROCID": "5"}, (4, 2)),
    "lightning": ({"WORLD_SIZE": "2", "LOCAL_RANK": "1", "NODE_RANK": "0"}, None),
    "nobody": ({}, None),
}


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_ranks_follow_from_the_launcher_and_the_run_s_name_does_not(
    launcher: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE", "SLURM_NTASKS", "SLURM_NNODES", "SLURM_JOB_NAME", "SLURM_PROCID"):
        monkeypatch.delenv(name, raising=False)
    name_before = compose(["strategy=context"]).name
    environment, ranks = LAUNCHERS[launcher]
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert launched_ranks() == ranks
    config = compose(["strategy=context"])
    assert (config.trainer.devices, config.trainer.num_nodes) == (ranks or (1, 1))
    assert config.name == name_before
    if ranks:
        raw = on_this_machine(compose_raw([f"trainer.devices={ranks[0]}"]))  # the same said twice
        assert raw["trainer"]["num_nodes"] == ranks[1]
        with pytest.raises(ConfigError, match=r"^trainer\.devices is 5 and the launcher has started"):
            compose(["strategy=context", "trainer.devices=5"])


@pytest.mark.multiprocess
def test_context_groups_are_disjoint_and_the_flat_mesh_is_everybody(four) -> None:
    assert four.run(members) == [([0, 1], 1.0, 6.0), ([0, 1], 1.0, 6.0), ([2, 3], 5.0, 6.0), ([2, 3], 5.0, 6.0)]
