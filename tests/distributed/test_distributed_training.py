"""The same training whoever holds it: loss curves, validations and checkpoints agree over strategies and ranks."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from rank_processes import RankPool, pool_fixture
from rank_runs import fitted, words

from lightsparse.config.compose import conf_dir
from lightsparse.training.checkpoints.files import checkpoint_path, read_checkpoint

two, four = pool_fixture(2, timeout=120.0), pool_fixture(4, timeout=120.0)

TIMED = {"wall_s", "tokens_per_s", "flops_per_s", "dense_flops_per_s", "mfu"}
Rows = list[dict[str, float]]

# The global batch is four samples; `batch` per group of ranks that read different ones.
PLAIN = ("optimizer=adamw", "data.pack=isolate")
TWO = ("strategy.context_parallel_size=2",)
ON_TWO = {
    "ddp": ("strategy=ddp", "data.batch_size=2"),
    "fsdp": ("strategy=fsdp", "data.batch_size=2"),
    "context": ("strategy=context", "data.batch_size=4", "strategy.split=head_tail"),
    "fsdp_context": ("strategy=fsdp_context", "data.batch_size=4", "strategy.key_exchange=gather"),
}
ON_FOUR = {
    "ddp": ("strategy=ddp", "data.batch_size=1"),
    "fsdp": ("strategy=fsdp", "data.batch_size=1"),
    "2 x context 2": (
        "strategy=context",
        "strategy.context_parallel_size=2",
        "data.batch_size=2",
        "strategy.split=contiguous",
    ),
    "context 4": ("strategy=context", "data.batch_size=4"),
    "2 x fsdp_context 2": ("strategy=fsdp_context", *TWO, "data.batch_size=2"),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("training")


@pytest.fixture(scope="module")
def one() -> Iterator[RankPool]:
    with RankPool(1, 120.0) as pool:
        yield pool


def run(pool: RankPool, folder: Path, name: str, *more: str) -> tuple[dict[str, Any], Rows]:
    """Summary of every rank (they agree), and the rows without what the clock decides."""
    answers = pool.run(fitted, words(folder, f"name={name.replace(' ', '-')}", *more))
    summary, rows = answers[0]
    for other, _ in answers[1:]:
        assert (other["val_loss"], other["tokens"]) == (summary["val_loss"], summary["tokens"])
    return summary, [{key: value for key, value in row.items() if key not in TIMED} for row in rows]


def assert_same_curve(rows: Rows, wanted: Rows, rel: float = 1e-4) -> None:
    assert [row["step"] for row in rows] == [row["step"] for row in wanted]
    for ours, theirs in zip(rows, wanted, strict=True):
        assert ours == pytest.approx(theirs, rel=rel), ours["step"]


@pytest.fixture(scope="module")
def alone(one: RankPool, folder: Path) -> tuple[dict[str, Any], Rows]:
    summary, rows = run(one, folder, "alone", *PLAIN, "data.batch_size=4")
    losses = [row["train_loss"] for row in rows[1:]]
    assert len(losses) == 20 and losses[-1] < 0.9 * losses[0]  # it learns: equal curves say something
    return summary, rows


@pytest.mark.multiprocess
@pytest.mark.parametrize("kind", ON_TWO)
def test_two_ranks_have_the_loss_curve_of_one(kind: str, two: RankPool, folder: Path, alone: Any) -> None:
    summary, rows = run(two, folder, f"two {kind}", *PLAIN, *ON_TWO[kind])
    assert_same_curve(rows, alone[1])
    assert summary["tokens"] == alone[0]["tokens"] == 20 * 4 * 256
    assert summary["val_tokens"] == alone[0]["val_tokens"] and summary["devices"] == 2
    assert summary["strategy"] == kind and summary["ranks_per_sequence"] == (2 if "context" in kind else 1)


@pytest.mark.multiprocess
@pytest.mark.parametrize("kind", ON_FOUR)
def test_four_ranks_have_the_loss_curve_of_one(kind: str, four: RankPool, folder: Path, alone: Any) -> None:
    summary, rows = run(four, folder, f"four {kind}", *PLAIN, *ON_FOUR[kind])
    assert_same_curve(rows, alone[1])
    assert summary["tokens"] == alone[0]["tokens"]


ACCUMULATED = (
    "trainer.accumulate_grad_batches=2",
    "data.pack=concat",
    "optimizer=muon",
    "trainer.grad_clip=0.5",
    "eval.tokens=1280",
    "model.activation_checkpointing=true",
    "model.chunk=100",
)


@pytest.fixture(scope="module")
def accumulated(one: RankPool, folder: Path) -> Rows:
    return run(one, folder, "alone accumulated", *ACCUMULATED, "data.batch_size=2", "trainer.max_steps=8")[1]


@pytest.mark.multiprocess
@pytest.mark.parametrize("kind", ON_TWO)
def test_accumulation_muon_clipping_recomputing_and_one_stream_agree_too(
    kind: str, two: RankPool, folder: Path, accumulated: Rows
) -> None:
    strategy, batch, *more = ON_TWO[kind]
    batch = batch.replace("2", "1").replace("4", "2")
    name = f"two {kind} accumulated"
    rows = run(two, folder, name, *ACCUMULATED, strategy, batch, *more, "trainer.max_steps=8")[1]
    # Muon orthogonalises in bf16, which makes much of a last bit: seen in the norm of the gradient first.
    found, wanted = ([row["grad_norm"] for row in of if "grad_norm" in row] for of in (rows, accumulated))
    assert found == pytest.approx(wanted, rel=1e-3) and len(found) == 8
    without = [[{k: v for k, v in row.items() if k != "grad_norm"} for row in of] for of in (rows, accumulated)]
    assert_same_curve(*without)


@pytest.mark.multiprocess
@pytest.mark.parametrize("attention", sorted(path.stem for path in (conf_dir() / "attention").glob("*.yaml")))
def test_layers_recomputed_in_pieces_on_a_split_sequence_have_the_curve_of_one_rank_that_keeps_them(
    attention: str, one: RankPool, two: RankPool, folder: Path
) -> None:
    common = (
        *(f"attention={attention}", "~attention.window", "~attention.block", "optimizer=adamw", "data.batch_size=1"),
        *("data.pack=isolate", "trainer.max_steps=2", "eval.every_n_steps=2", "data.context=1024"),
        "data.val_fraction=0.2",
    )
    wanted = run(one, folder, f"alone keeps {attention}", *common)[1]
    pieces = ("model.activation_checkpointing=true", "model.chunk=200", "strategy=context", "strategy.split=contiguous")
    assert_same_curve(run(two, folder, f"two recompute {attention}", *common, *pieces)[1], wanted)


@pytest.mark.multiprocess
def test_a_split_sequence_hides_the_same_tokens_and_trains_both_ways(
    one: RankPool, two: RankPool, folder: Path
) -> None:
    common = ("objective=mlm", "optimizer=adamw", "trainer.max_steps=4", "data.batch_size=2", "data.pack=isolate")
    wanted = run(one, folder, "alone mlm", *common)[1]
    assert_same_curve(run(two, folder, "two mlm", *common, "strategy=context")[1], wanted)


@pytest.mark.multiprocess
def test_a_router_learns_and_reports_the_same_on_a_split_sequence(one: RankPool, two: RankPool, folder: Path) -> None:
    """Its budget loss, its columns and its churn are sums or means over all rows, whoever holds them."""
    common = ("optimizer=adamw", "trainer.max_steps=6", "data.batch_size=2", "data.context=512", "eval.every_n_steps=3")
    routed = ("attention=adaptive", "~attention.window", "~attention.block")
    wanted = run(one, folder, "alone adaptive", *routed, *common)[1]
    assert all("choice_churn" in row for row in wanted if row["step"] in (3, 6))
    assert_same_curve(run(two, folder, "two adaptive", *routed, *common, "strategy=context")[1], wanted)


@pytest.mark.multiprocess
def test_ranks_train_only_the_selection_in_step_with_one(one: RankPool, two: RankPool, folder: Path) -> None:
    """Also where parameters and their gradients are shards, and where the run goes on in the middle of it."""
    common = (
        *("attention=adaptive", "~attention.window", "~attention.block", "optimizer=adamw", "schedule=constant"),
        *("attention.tau_end=1.0", "trainer.selector_only_steps=4", "trainer.max_steps=6", "eval.every_n_steps=3"),
        *("optimizer.weight_decay=0.5", "checkpoint.every_n_steps=3", "data.pack=concat"),
    )
    wanted = run(one, folder, "alone selects", *common, "data.batch_size=4")[1]
    for kind in ("ddp", "fsdp"):
        rows = run(two, folder, f"two {kind} selects", *common, *ON_TWO[kind])[1]
        assert_same_curve(rows, wanted)
    parts = [word for word in common if not word.startswith("trainer.max_steps")]
    run(two, folder, "parts select", *parts, *ON_TWO["fsdp"], "trainer.max_steps=3")
    moved = run(one, folder, "parts select", *common, "data.batch_size=4")[1]
    without = [[{k: v for k, v in row.items() if k != "choice_churn"} for row in of] for of in (moved, wanted)]
    assert_same_curve(*without)  # what the other ranks chose before is not compared


def checkpoint(folder: Path, name: str, step: int) -> dict[str, Any]:
    return read_checkpoint(checkpoint_path(folder / "runs" / name / "checkpoints", step))


@pytest.mark.multiprocess
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_run_goes_on_under_any_strategy_and_number_of_ranks(
    optimizer: str, one: RankPool, two: RankPool, four: RankPool, folder: Path
) -> None:
    """Four steps each: one rank, sharded over two, replicas on two, sharded over four, one rank."""
    common = (f"optimizer={optimizer}", "schedule=constant", "eval.every_n_steps=4", "data.pack=isolate")
    stages = [
        (one, ("data.batch_size=4",)),
        (two, ("strategy=fsdp_context", "data.batch_size=4")),
        (two, ("strategy=context", "data.batch_size=4")),
        (four, ("strategy=fsdp_context", "data.batch_size=4")),
        (one, ("data.batch_size=4",)),
    ]
    wanted = run(one, folder, f"whole-{optimizer}", *common, "data.batch_size=4", "trainer.max_steps=20")[1]
    rows: Rows = []
    for stage, (pool, more) in enumerate(stages, start=1):
        rows = run(pool, folder, f"moved-{optimizer}", *common, *more, f"trainer.max_steps={4 * stage}")[1]
    assert_same_curve(rows, wanted, rel=1e-4 if optimizer == "adamw" else 5e-4)
    ours, theirs = (checkpoint(folder, f"{name}-{optimizer}", 20) for name in ("moved", "whole"))
    assert ours["DataModule"] == theirs["DataModule"]
    for key, value in theirs["state_dict"].items():
        torch.testing.assert_close(ours["state_dict"][key], value, rtol=0, atol=2e-3, msg=key)
    mine, their = ours["optimizer_states"][0], theirs["optimizer_states"][0]
    assert [group["params"] for group in mine["param_groups"]] == [group["params"] for group in their["param_groups"]]
    assert mine["state"].keys() == their["state"].keys()
    for number, entries in their["state"].items():
        for name, value in entries.items():
            assert mine["state"][number][name].shape == value.shape, (number, name)


@pytest.mark.multiprocess
def test_a_sharded_checkpoint_is_that_of_one_rank(one: RankPool, two: RankPool, folder: Path, alone: Any) -> None:
    run(two, folder, "two fsdp", *PLAIN, *ON_TWO["fsdp"])  # finished already when the tests run in order
    ours, theirs = checkpoint(folder, "two-fsdp", 20), checkpoint(folder, "alone", 20)
    assert ours.keys() == theirs.keys()
    for key, value in theirs["state_dict"].items():
        torch.testing.assert_close(ours["state_dict"][key], value, rtol=0, atol=1e-4, msg=key)
    for number, entries in theirs["optimizer_states"][0]["state"].items():
        for name, value in entries.items():
            mine = ours["optimizer_states"][0]["state"][number][name]
            torch.testing.assert_close(mine, value, rtol=1e-3, atol=1e-6, msg=f"{number} {name}")


@pytest.mark.multiprocess
def test_a_sharded_model_writes_its_sample_and_keeps_a_low_precision(two: RankPool, folder: Path) -> None:
    for precision in ("bf16-mixed", "bf16-true"):
        more = (f"precision={precision}", "eval.sample_tokens=16", "trainer.max_steps=4", "strategy=fsdp")
        summary, _ = run(two, folder, precision, *more)
        assert "════ continuation" in (folder / "runs" / precision / "sample.txt").read_text()
        assert math.isfinite(summary["val_loss"])
        weights = checkpoint(folder, precision, 4)["state_dict"].values()
        assert {value.dtype for value in weights} == {torch.float32 if precision == "bf16-mixed" else torch.bfloat16}


@pytest.mark.multiprocess
@pytest.mark.parametrize("hook", ["bf16", "topk", "powersgd"])
def test_hooks_train_and_what_they_owe_survives_a_restart(hook: str, two: RankPool, folder: Path) -> None:
    options = {"topk": ["strategy.topk_share=0.2"], "powersgd": ["strategy.powersgd_start=2"], "bf16": []}[hook]
    common = ("strategy=ddp", f"strategy.comm_hook={hook}", *options, "schedule=constant", "optimizer=adamw")
    _, whole = run(two, folder, f"{hook}-whole", *common, "trainer.max_steps=8")
    assert whole[-1]["train_loss"] < whole[1]["train_loss"]
    run(two, folder, f"{hook}-parts", *common, "trainer.max_steps=4")
    owed = checkpoint(folder, f"{hook}-parts", 4)["residuals"]
    assert len(owed) == 2 and all(bool(state["residuals"]) == (hook != "bf16") for state in owed)
    _, parts = run(two, folder, f"{hook}-parts", *common, "trainer.max_steps=8")
    # PowerSGD averages its first steps in full again and draws its factors anew: near, but not the same.
    losses, wanted = ([row["train_loss"] for row in rows[1:]] for rows in (parts, whole))
    assert losses == pytest.approx(wanted, rel=1e-5 if hook != "powersgd" else 1e-2)
