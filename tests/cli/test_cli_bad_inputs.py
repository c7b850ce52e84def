"""Everything a user may get wrong: one sentence with the way out, the right exit code, and no earlier run touched.

Every row goes through the command's own entry, beside a finished run that must stay as it is, byte for byte.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections import namedtuple
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import HfApi

from lightsparse.cli import train as command
from lightsparse.training import run
from lightsparse.training.checkpoints import run_directory
from lightsparse.training.metrics.metrics_file import read_metrics
from lightsparse.training.module import LanguageModel
from lightsparse.utils import atomic_files

ROOT = Path(__file__).parents[2]
TINY = (
    "precision=32",
    "attention=sliding_window",
    "attention.window=32",
    "attention.block=16",
    "data=files",
    "model.depth=1",
    "model.embed_dim=32",
    "model.heads=2",
    "data.context=64",
    "eval.tokens=128",
    "eval.sample_tokens=0",
    "checkpoint.every_n_steps=2",
    "trainer.max_steps=4",
    "trainer.progress=false",
    "trainer.log_every_n_steps=1",
    "threads=1",
    "name=new",
)
EARLIER = ("name=earlier", "trainer.max_steps=8")  # goes on with the run that is there


@dataclass
class Place:
    """Where one row plays: `runs` with a finished run in it, and `spare`, the working folder, with `text` in it."""

    runs: Path
    spare: Path
    patch: pytest.MonkeyPatch
    held: list[Any] = field(default_factory=list)  # open as long as the row

    @property
    def earlier(self) -> Path:
        return self.runs / "earlier"

    def words(self, *more: str) -> list[str]:
        """The command line of a tiny run; a row that chooses a group does without the words that set keys of it."""
        chosen = [word.partition("=")[0] for word in more if re.match(r"(data|attention)=", word)]
        given = [*TINY, f"runs_dir={self.runs}", "data.path='text/*.txt'"]
        return [word for word in given if not re.match(rf"({'|'.join(chosen) or '$'})[.=]", word)] + list(more)


Prepare = Callable[[Place], tuple[str, ...]]


def content(name: str, held: bytes) -> Prepare:
    """Train on one file with this content."""

    def prepare(place: Place) -> tuple[str, ...]:
        (place.spare / name).write_bytes(held)
        return (f"data.path='{place.spare / name}'",)

    return prepare


def changed_text(place: Place) -> tuple[str, ...]:
    (place.spare / "text" / "03.txt").write_text("another document" * 20)
    return EARLIER


def changed_vocabulary(place: Place) -> tuple[str, ...]:
    for path in place.earlier.glob("checkpoints/*.ckpt"):
        saved = torch.load(path, weights_only=True)
        saved["state_dict"]["model.embed_tokens.weight"] = saved["state_dict"]["model.embed_tokens.weight"][:100]
        torch.save(saved, path)
    return EARLIER


def validation_overlap(place: Place) -> tuple[str, ...]:
    return ("data.val_path='text/0*.txt'",)


def unreachable_hub(place: Place) -> tuple[str, ...]:
    def refuse(*given: Any, **named: Any) -> None:
        raise ConnectionError("no route to host")

    place.patch.setattr("datasets.config.HF_HUB_OFFLINE", False)
    place.patch.setattr(HfApi, "dataset_info", refuse)
    return ("data=hub", "data.context=64", "data.name=some/text")


def runs_dir_is_a_file(place: Place) -> tuple[str, ...]:
    (place.spare / "notes").write_text("mine")
    return (f"runs_dir={place.spare / 'notes'}",)


def read_only(place: Place) -> tuple[str, ...]:
    place.patch.setattr(os, "access", lambda path, mode: False)  # root may write everywhere
    return ()


def full_disk(place: Place) -> tuple[str, ...]:
    usage = namedtuple("usage", "total used free")
    place.patch.setattr(shutil, "disk_usage", lambda path: usage(10, 9, 1))
    return ()


def odd_file_system(place: Place) -> tuple[str, ...]:
    """It has room and lets everyone write, but makes no folders."""
    usage = namedtuple("usage", "total used free")
    place.patch.setattr(shutil, "disk_usage", lambda path: usage(2**50, 0, 2**50))
    return ("runs_dir=/proc/runs",)


def disk_fills_up(place: Place) -> tuple[str, ...]:
    """The system itself says that there is no space, at the first checkpoint."""
    remove = atomic_files.remove_partial_files

    def then_fill(folder: Path) -> None:
        remove(folder)
        if folder.name == "checkpoints":
            (folder / f".step-6.ckpt.{os.getpid()}.partial").symlink_to("/dev/full")

    place.patch.setattr(run_directory, "remove_partial_files", then_fill)
    return EARLIER


def two_writers(place: Place) -> tuple[str, ...]:
    lock = (place.earlier / ".lock").open("w")
    lock.write("77\nelsewhere\n")
    lock.flush()
    fcntl.flock(lock, fcntl.LOCK_EX)
    place.held.append(lock)
    return EARLIER


def damaged(name: str, held: bytes) -> Prepare:
    def prepare(place: Place) -> tuple[str, ...]:
        (place.earlier / name).write_bytes(held)
        return EARLIER

    return prepare


def in_training_step(step: int, act: Callable[[torch.Tensor], torch.Tensor], *words: str) -> Prepare:
    whole = LanguageModel.training_step

    def broken(self: LanguageModel, batch: Any, batch_idx: int) -> torch.Tensor:
        loss = whole(self, batch, batch_idx)
        return act(loss) if self.global_step == step else loss

    def prepare(place: Place) -> tuple[str, ...]:
        place.patch.setattr(LanguageModel, "training_step", broken)
        return words

    return prepare


def too_much(loss: torch.Tensor) -> torch.Tensor:
    return loss + torch.empty(10**15).sum()  # the allocator's own error


@dataclass(frozen=True)
class Row:
    sentence: str  # regular expression, from its beginning
    given: tuple[str, ...] | Prepare = ()
    code: int = 2
    begins: bool = False  # training has begun before it goes wrong: checkpoints stay


LINES = json.dumps({"text": "a line of text " * 30}) + "\n"
BAD = {
    # text
    "empty file": Row(r"training has 0 tokens .* data\.context", content("a.txt", b"")),
    "empty documents": Row(r"training has 0 tokens .* give more text", content("a.jsonl", b'{"text": ""}\n' * 9)),
    "binary file": Row(
        r".*a\.bin is not UTF-8 text \(byte 0\); convert it", content("a.bin", bytes(range(255, 0, -1)))
    ),
    "invalid UTF-8": Row(r".*a\.txt is not UTF-8 text \(byte 3\)", content("a.txt", "caféteria".encode("latin-1"))),
    "broken line": Row(r".*a\.jsonl cannot be read as json", content("a.jsonl", LINES.encode() * 3 + b"{oops\n")),
    "no column": Row(
        r"data\.column is 'text' but .*a\.jsonl has the columns body", content("a.jsonl", b'{"body": "x"}\n')
    ),
    "numbers": Row(r"column 'text' of .*a\.jsonl holds int, not text; set", content("a.jsonl", b'{"text": 7}\n')),
    "corrupt parquet": Row(r".*a\.parquet cannot be read as parquet", content("a.parquet", b"PAR1 and no more")),
    "too little text": Row(
        r"training has \d+ tokens .* = 1000001; lower data\.context",
        ("data.context=1000000", "eval.tokens=1000000", "data.val_fraction=0.5"),
    ),
    "no validation text": Row(r"validation has 0 tokens .* use data\.val_fraction=0\.\d+", ("data.val_fraction=1e-9",)),
    "missing path": Row(r"data\.path is 'gone/' and no file is there; give", ("data.path=gone/",)),
    "glob of nothing": Row(r"data\.path is '\*\.nothing' and no file", ("data.path='*.nothing'",)),
    "validation overlap": Row(
        r"data\.path and data\.val_path share 10 files such as .*name them apart", validation_overlap
    ),
    "hub offline": Row(r"the hub is not reachable for data set 'some/text'", unreachable_hub),
    # the run that is there
    "changed text": Row(r".* data with fingerprint [0-9a-f]{16}, this run has [0-9a-f]{16}; restore", changed_text),
    "changed vocabulary": Row(
        r".*ckpt is of another vocabulary .*: model\.embed_tokens\.weight is of shape \[100, 32\] there and of shape "
        r"\[256, 32\] in this run's model; restore it",
        changed_vocabulary,
    ),
    "changed config": Row(
        r".*another config; use the old values .*\n  model\.depth: 1 there, 2 here\n  seed: 0 there, 3",
        (*EARLIER, "seed=3", "model.depth=2"),
    ),
    "must without run": Row(r".*new holds no checkpoint and resume is must; use resume=auto", ("resume=must",)),
    "never with run": Row(r".*earlier already holds a run at step 4; use resume=auto", (*EARLIER, "resume=never")),
    "two writers": Row(r".*earlier is being written by process 77 on elsewhere; wait", two_writers),
    "summary damaged": Row(r".*summary\.json is damaged \(", damaged("summary.json", b"{")),
    "config damaged": Row(r".*config\.yaml is damaged \(", damaged("config.yaml", b"a: [1\n\xff")),
    # the disk
    "runs_dir is a file": Row(r"runs_dir is .*notes, but .*notes is no folder; set runs_dir=", runs_dir_is_a_file),
    "read-only": Row(r"runs_dir is .* cannot be written to; set runs_dir=", read_only),
    "no such file system": Row(
        r"runs_dir is /proc/runs, where .* cannot be made \(.*\); set runs_dir=", odd_file_system
    ),
    "small disk": Row(r"runs_dir is .* GiB are free, and checkpoints of .*; keep fewer", full_disk),
    "disk fills up": Row(
        r".*step-6\.ckpt could not be written: its disk has [\d,]+ MiB free; .* continues from step 4$",
        disk_fills_up,
        code=75,
        begins=True,
    ),
    # keys and types
    "unknown key": Row(r"sede is not a key; did you mean seed\?", ("sede=1",)),
    "unknown key below": Row(
        r"trainer\.max_step is not a key; did you mean trainer\.max_steps\?", ("trainer.max_step=1",)
    ),
    "unknown key deep": Row(r"model\.rope\.bse is not a key; did you mean model\.rope\.base\?", ("model.rope.bse=1",)),
    "unknown choice": Row(r"attention is dens; conf/attention has .*; did you mean dense\?", ("attention=dens",)),
    "text for a number": Row(r"trainer\.max_steps is 'many'; it must be an integer", ("trainer.max_steps=many",)),
    "bool for a number": Row(r"data\.context is true; it must be an integer", ("data.context=true",)),
    "list for a number": Row(r"seed is \[1, 2\]; it must be an integer", ("seed=[1,2]",)),
    "group for a value": Row(r"checkpoint is 3; it must be a group of keys: every_n_steps, keep", ("checkpoint=3",)),
    "not a number": Row(r"optimizer\.lr is nan; it must be a", ("optimizer.lr=nan",)),
    # ranges and combinations
    "negative seed": Row(r"seed is -1; it must lie in", ("seed=-1",)),
    "negative rate": Row(r"optimizer\.lr is -1; it must be at least 0", ("optimizer.lr=-1",)),
    "share of one": Row(r"attention\.dropout is 1.*must lie in \[0, 1\)", ("attention.dropout=1",)),
    "no time": Row(r"trainer\.max_time is 0; it counts seconds", ("trainer.max_time=0",)),
    "name with a slash": Row(r"name is \.\./new; it names one directory", ("name=../new",)),
    "short validation": Row(r"eval\.tokens is 10; it must hold one sample of data\.context=64", ("eval.tokens=10",)),
    "segment no multiple": Row(
        r"attention: BlockDilated\.segment_lengths is \(100, 200\); every entry must be a multiple",
        ("attention=block_sparse", "attention.segment_lengths=[100,200]"),
    ),
    "nothing chosen by summaries": Row(
        r"attention\.top_n is 0; it counts the 1 first and 2 local blocks, so it must be at least 3",
        ("attention=nsa", "attention.top_n=0"),
    ),
    "summaries that do not fit": Row(
        r"attention\.select_block is 24; it must be a multiple of attention\.compress_stride, which is 16",
        ("attention=nsa", "attention.select_block=24"),
    ),
    "no token chosen": Row(r"attention\.top_k is 0; it must be at least 1", ("attention=dsa", "attention.top_k=0")),
    "entries of no token": Row(
        r"attention\.stride is 0; it counts tokens per entry", ("attention=csa", "attention.stride=0")
    ),
    "gate of no width": Row(
        r"attention\.gate_dim is 0; the gate rotates pairs, .* at least 2", ("attention=seer", "attention.gate_dim=0")
    ),
    "never sparse": Row(
        r"attention\.dense_from is 3 and attention\.dense_steps 5; there must be sparse steps in between",
        ("attention=moba", "attention.dense_steps=5", "attention.dense_from=3"),
    ),
    "selection less than never": Row(
        r"trainer\.selector_only_steps is -2; .* -1 is the whole run",
        ("attention=seer", "trainer.selector_only_steps=-2"),
    ),
    "selection without parameters": Row(
        r"trainer\.selector_only_steps is 3, and attention=moba has no parameters that select.*; set it to 0",
        ("attention=moba", "trainer.selector_only_steps=3"),
    ),
    "local layers of no token": Row(
        r"model\.local_window is 0; it counts tokens", ("model.layer_pattern=L", "model.local_window=0")
    ),
    "local layers without a window": Row(
        r"model\.layer_pattern is 'L' and model\.local_window null; .* set both or neither", ("model.layer_pattern=L",)
    ),
    "unknown row of the shootout": Row(
        r"shootout is nope; conf/shootout has adaptive, ", ("experiment=shootout_mqar", "shootout=nope")
    ),
    "recall nearer than possible": Row(
        r"data\.nearest is 0; 64 keys of 2 tokens", ("data=recall_stream", "data.context=256", "data.nearest=0")
    ),
    "density out of reach": Row(r".*density 0\.0001 is out of reach", ("attention.density=0.0001",)),
    "ranks without strategy": Row(
        r"the job has 2 ranks .* strategy=single takes 1; use strategy=ddp", ("trainer.devices=2",)
    ),
    "too many ranks": Row(
        r"data\.context is 64, that is 4 units .* fewer ranks per sequence", ("strategy=context", "trainer.devices=64")
    ),
    "ranks do not divide": Row(
        r"strategy\.context_parallel_size is 3, which does not divide the job's 4 ranks",
        ("strategy=context", "strategy.context_parallel_size=3", "trainer.devices=4"),
    ),
    "hook without its key": Row(
        r"strategy\.topk_share is 0\.1, which strategy\.comm_hook=bf16 does not read",
        ("strategy=ddp", "trainer.devices=2", "strategy.comm_hook=bf16", "strategy.topk_share=0.1"),
    ),
    "hook of bf16 in bf16": Row(
        r"strategy\.comm_hook is bf16 and precision is bf16-true",
        ("strategy=ddp", "trainer.devices=2", "strategy.comm_hook=bf16", "precision=bf16-true"),
    ),
    "backend without device": Row(
        r"kernels\.backend .*flex.* has no backward on CPU; use backend=blocked", ("kernels.backend=flex",)
    ),
    # what must not be run
    "evil target": Row(
        r"callbacks\.x\._target_ is os\.system; a config may name classes of", ("+callbacks.x._target_=os.system",)
    ),
    "target through a module": Row(
        r"callbacks\.x\._target_ is lightning\.pytorch\.os\.system;",
        ("+callbacks.x._target_=lightning.pytorch.os.system",),
    ),
    "interpolation to nowhere": Row(r"name: Interpolation key 'nowhere' not found", ("name=${nowhere}",)),
    "second interpolation": Row(
        r".*an interpolation may not give another interpolation",
        (r"+logger.x={_target_:lightning.pytorch.loggers.CSVLogger,prefix:'\${oc.env:HOME}'}",),
    ),
    # memory and numbers
    "context beyond memory": Row(
        r"data\.context is 1000000000000; .* takes at least .*; lower data\.context",
        ("data.context=1000000000000", "eval.tokens=1000000000000"),
    ),
    "out of memory": Row(
        r"out of memory: this run takes about \d.*weights .* were free .*; "
        r"set (\S+=\S+ )+\(about .*\), or (\S+=\S+ )+\(about .*\), or (\S+=\S+ )+\(about",
        in_training_step(1, too_much, "data.context=256", "data.batch_size=8", "eval.tokens=256"),
        begins=True,
    ),
    "loss not a number": Row(
        r"the gradient's norm is nan at step 6, after .*; lower optimizer\.lr",
        in_training_step(5, lambda loss: loss * float("nan"), *EARLIER, "health.skip_steps=0"),
        begins=True,
    ),
}


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpus") / "text"
    folder.mkdir()
    for i in range(20):
        words = " ".join(f"{i * j % 17} times {j} is {i * j}," for j in range(30))
        (folder / f"{i:02}.txt").write_text(f"Document {i}. {words}\n")
    return folder


@pytest.fixture(scope="session")
def finished(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of runs with one that has finished at step 4."""
    runs = tmp_path_factory.mktemp("finished")
    with pytest.MonkeyPatch.context() as patch:
        _quick(patch)
        patch.chdir(text.parent)
        _call(patch, Place(runs, runs, patch).words("name=earlier"))
    assert (runs / "earlier" / "summary.json").exists()
    return runs


@pytest.fixture
def place(text: Path, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Place:
    _quick(monkeypatch)
    shutil.copytree(text, tmp_path / "spare" / "text")
    shutil.copytree(finished, tmp_path / "runs")
    monkeypatch.chdir(tmp_path / "spare")
    return Place(tmp_path / "runs", tmp_path / "spare", monkeypatch)


def _quick(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(run, "draw_plots", lambda *given: None)
    patch.setattr(run, "matmul_peak", lambda *given: 1e11)


def _call(patch: pytest.MonkeyPatch, words: list[str]) -> None:
    patch.setattr(sys, "argv", ["train.py", *words])
    command.main()


def hashes(folder: Path) -> dict[str, str]:
    """Of every file but the lock, whose content is the last writer's name."""
    found = (path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != ".lock")
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in found}


@pytest.mark.parametrize("name", BAD)
def test_a_wrong_input_is_one_sentence_and_touches_no_earlier_run(
    name: str, place: Place, capsys: pytest.CaptureFixture[str]
) -> None:
    row = BAD[name]
    words = row.given(place) if callable(row.given) else row.given
    before, folders = hashes(place.runs), sorted(place.runs.iterdir())
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        _call(place.patch, place.words(*words))
    said = capsys.readouterr().err
    assert re.match(row.sentence, said.rstrip("\n")), said
    assert stopped.value.code == row.code
    lines = said.splitlines()
    assert said.endswith("\n") and all(line.startswith("  ") for line in lines[1:]), said  # a list of keys may follow
    assert sorted(place.runs.iterdir()) == folders or row.begins
    after = hashes(place.runs)
    if row.begins:
        before, after = ({k: v for k, v in of.items() if "earlier/checkpoints" in k} for of in (before, after))
    assert after == before


# ---- what must simply work -----------------------------------------------------------------------------------------


def huge_line(place: Place) -> tuple[str, ...]:
    (place.spare / "one.txt").write_text("word " * 2_000_000)
    (place.spare / "two.txt").write_text("other " * 1000)
    return (f"data.path='{place.spare}/*.txt'", "data.val_fraction=0.6")


def huge_json_line(place: Place) -> tuple[str, ...]:
    lines = [json.dumps({"text": "word " * 2_000_000}), *(json.dumps({"text": "short " * 99}) for _ in range(20))]
    (place.spare / "a.jsonl").write_text("\n".join(lines))
    return (f"data.path='{place.spare}/a.jsonl'", "data.val_fraction=0.5")


def nan_in_the_newest(place: Place) -> tuple[str, ...]:
    path = place.earlier / "checkpoints" / "step-4.ckpt"
    saved = torch.load(path, weights_only=True)
    saved["state_dict"]["model.embed_tokens.weight"][7, 3] = float("nan")
    torch.save(saved, path)
    return EARLIER


def folder_for_a_checkpoint(place: Place) -> tuple[str, ...]:
    (place.earlier / "checkpoints" / "step-9.ckpt").mkdir()
    return EARLIER


def older_looks_newer(place: Place) -> tuple[str, ...]:
    """As after the clock was set back between the two checkpoints."""
    for step, stamp in ((2, 2e9), (4, 1e9)):
        os.utime(place.earlier / "checkpoints" / f"step-{step}.ckpt", (stamp, stamp))
    return EARLIER


def clock_goes_back(place: Place) -> tuple[str, ...]:
    """An hour at every look."""
    now, looks = time.time(), iter(range(10**9))
    place.patch.setattr(time, "time", lambda: now - 3600 * next(looks))
    return EARLIER


GOOD = {
    "one huge line": (huge_line, "new", 0),
    "one huge line of JSON": (huge_json_line, "new", 0),
    "NaN in the newest checkpoint": (nan_in_the_newest, "earlier", 2),
    "a folder for a checkpoint": (folder_for_a_checkpoint, "earlier", 4),
    "file times the wrong way round": (older_looks_newer, "earlier", 4),
    "clock going backwards": (clock_goes_back, "earlier", 4),
}


@pytest.mark.parametrize("name", GOOD)
def test_odd_but_sound_input_trains_on(name: str, place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    prepare, run_name, step = GOOD[name]
    _call(place.patch, place.words(*prepare(place)))
    folder = place.runs / run_name
    beginning = f"{folder} continues from step {step} " if step else f"{folder} starts"
    assert beginning in capsys.readouterr().out.replace("\n", " ")
    assert json.loads((folder / "summary.json").read_text())["finished"]
    rows = read_metrics(folder / "metrics.csv")
    assert [row["step"] for row in rows] == list(range(len(rows)))
    walls = [row["wall_s"] for row in rows]
    assert walls == sorted(walls) and walls[0] >= 0


# ---- and as processes of their own -----------------------------------------------------------------------------------


@pytest.mark.multiprocess
@pytest.mark.parametrize("name", ["binary file", "never with run", "unknown key deep"])
def test_the_real_command_says_it_last_and_ends_with_2(name: str, place: Place) -> None:
    row = BAD[name]
    words = place.words(*(row.given(place) if callable(row.given) else row.given))
    before = hashes(place.runs)
    done = subprocess.run(
        [sys.executable, str(ROOT / "train.py"), *words],
        cwd=place.spare,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert re.match(row.sentence, done.stderr.splitlines()[-1]), done.stderr
    assert hashes(place.runs) == before
