"""conf/shootout/: one row per attention, all on the same task, model and budget, none of them dense in disguise."""

import re

import pytest
import torch

from lightsparse.config.compose import compose_raw, conf_dir
from lightsparse.config.parse import compose
from lightsparse.data.tasks.recall_stream import RecallStream
from lightsparse.models import context_for
from lightsparse.training.module import language_model
from lightsparse.training.preflight.check import check

ROWS = sorted(path.stem for path in (conf_dir() / "shootout").glob("*.yaml"))


def row(name):
    return compose(["experiment=shootout_mqar", f"shootout={name}"])


def test_the_sweep_runs_every_row():
    text = (conf_dir() / "experiment/shootout_mqar.yaml").read_text(encoding="utf-8")
    assert sorted(re.findall(r"^ +shootout: ([\w,]+)$", text, re.MULTILINE)[0].split(",")) == ROWS


@pytest.mark.parametrize("name", ROWS)
def test_rows_differ_in_their_attention_alone(name):
    check(row(name))
    one, dense = (compose_raw(["experiment=shootout_mqar", f"shootout={each}"]) for each in (name, "dense"))
    assert {key for key in one if one[key] != dense[key]} <= {"attention"}
    assert one["attention"]["_target_"].split(".")[2] == name


@pytest.mark.parametrize("name", ROWS)
def test_no_row_but_dense_computes_more_than_half(name):
    config = row(name)
    torch.manual_seed(0)
    model = language_model(config, config.data.build_tokenizer()).model.eval()
    model.set_step(config.trainer.max_steps - 1, config.trainer.max_steps)  # after a dense stage at the start
    tokens = config.data.samples(0, 2 * config.data.context).val[0]["tokens"][None]
    with torch.no_grad():
        density = float(model(tokens, context_for(tokens)).stats["chosen_density"])
    assert density == 1 if name == "dense" else density <= 0.5
    assert tokens.shape[1] >= 512 and 4 <= getattr(config.attention.config, "block", 16) <= 16


def test_the_window_reaches_no_answer():
    config = row("sliding_window")
    window, local, data = config.attention.config, config.model.local_window, config.data
    assert isinstance(data, RecallStream) and window.sinks == 0 and config.model.layers == "LS"
    assert (window.window - 1) + (local - 1) < data.nearest - 1  # of the value, one token nearer than its key
