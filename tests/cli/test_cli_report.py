"""The report of runs: what is grouped, the numbers in table, CSV and page, and that nothing of a run becomes markup."""

import csv
import io
import json
import re
import statistics
from html.parser import HTMLParser
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from lightsparse.analysis.report_page import page
from lightsparse.analysis.report_table import Run, Spread, csv_text, front, groups
from lightsparse.cli.report import main
from lightsparse.cli.work.report import report
from lightsparse.sweep.record import SweepRecord, TrialRecord

EVIL = "</script><script>alert(1)</script>&\"'"
ROWS = "step,tokens,wall_s,train_bits_per_byte,val_bits_per_byte\n0,0,0.1,,8.0\n2,64,0.5,4.5,\n4,128,1.0,4.0,3.9\n"


def write_run(folder, seed, density, bits, **more):
    folder.mkdir(parents=True)
    config = {"seed": seed, "name": folder.name, "attention": {"_target_": "a.B", "density": density}, **more}
    (folder / "config.yaml").write_text(OmegaConf.to_yaml(OmegaConf.create(config)))
    summary = {
        **{"finished": True, "seed": seed, "attention": "b", "steps": 4, "parameters": 10, "train_s": 1.0},
        **{"val_bits_per_byte": bits, "attention_density": density, "tokens_per_s": 100.0 / density},
        "peak_memory_mib": 5.0,
    }
    (folder / "summary.json").write_text(json.dumps(summary))
    (folder / "metrics.csv").write_text(ROWS)
    return folder


@pytest.fixture
def runs(tmp_path):
    """Two densities × three seeds."""
    return [
        write_run(tmp_path / f"runs/d{density}-s{seed}", seed, density, 2 + density + 0.1 * seed)
        for density in (0.2, 0.5)
        for seed in (1, 2, 3)
    ]


class Page(HTMLParser):
    """Cells of every table, ids, and all that would load something."""

    def __init__(self, text):
        super().__init__()
        self.tables, self.loads, self.scripts = [], [], 0
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        values = dict(attributes)
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")
        self.scripts += tag == "script"
        self.loads += [value for key, value in values.items() if key in ("src", "href")]

    def handle_data(self, data):
        if self.lasttag in ("td", "button") and self.tables and self.tables[-1]:
            self.tables[-1][-1][-1] += data.strip()


def test_runs_that_differ_in_their_seed_only_are_a_group_with_mean_and_deviation(runs, tmp_path, capsys):
    assert main([*map(str, runs), f"out={tmp_path / 'out'}"]) == 0
    read = list(csv.DictReader(io.StringIO((tmp_path / "out/report.csv").read_text())))
    assert [(row["density"], row["runs"], row["seeds"]) for row in read] == [
        ("0.2", "3", "1 2 3"),
        ("0.5", "3", "1 2 3"),
    ]
    bits = [2.3, 2.4, 2.5]
    assert float(read[0]["val_bits_per_byte"]) == pytest.approx(2.4)
    assert float(read[0]["val_bits_per_byte_std"]) == pytest.approx(statistics.stdev(bits))
    assert "2.40 ± 0.10" in capsys.readouterr().out
    assert (tmp_path / "out/report.png").read_bytes().startswith(b"\x89PNG")


def test_the_page_holds_the_numbers_and_loads_nothing(runs, tmp_path):
    main([*map(str, runs), f"out={tmp_path}"])
    text = (tmp_path / "report.html").read_text()
    found = Page(text)
    table = found.tables[0]
    assert table[0][:4] == ["front", "density", "runs", "bits per byte"]
    assert table[1][1:4] == ["0.2", "3", "2.40 ± 0.10"] and table[2][1:4] == ["0.5", "3", "2.70 ± 0.10"]
    assert table[1][0] == "●" and table[2][0] == ""  # less dense and better
    assert len(found.tables[-1]) == 1 + len(runs)
    assert found.loads and all(one.startswith("data:image/png;base64,") for one in found.loads)
    assert "http" not in re.sub(r'http-equiv|data:[^"]*', "", text)
    curves = json.loads(re.search(r'id="curves">(.*?)</script>', text, re.S)[1])
    assert [row["val_bits_per_byte"] for row in curves[0]["rows"] if "val_bits_per_byte" in row] == [8.0, 3.9]


def test_what_a_run_calls_itself_never_becomes_markup():
    made = [
        Run(path, {"note": note}, {"seed": 0, "attention": EVIL, "val_bits_per_byte": 1.0}, [])
        for path, note in ((Path("a"), EVIL), (Path("b"), "plain"))
    ]
    text = page(EVIL, groups(made), [EVIL])
    assert Page(text).scripts == 2 and "<script>alert" not in text  # the data's and ours
    assert json.loads(re.search(r'id="curves">(.*?)</script>', text, re.S)[1])[0]["group"] == f"note {EVIL}"


def test_a_sweep_reports_its_finished_trials_and_names_the_others(runs, tmp_path, capsys):
    record = SweepRecord(tmp_path / "runs/s", ["seed=1,2"])
    record.trials = [
        TrialRecord([], ["seed=1"], "elsewhere/d0.2-s1", 1, "finished"),  # moved: found beside the sweep
        TrialRecord([], ["seed=2"], str(runs[1]), 1, "failed", error="code 1: <no> memory"),
        TrialRecord([], ["seed=4"], str(tmp_path / "runs/none"), 1, "stopped"),
    ]
    record.directory.mkdir()
    record.save()
    assert main([str(record.directory)]) == 0
    said = capsys.readouterr().out
    assert "Failed: seed=2: code 1: <no> memory" in said and "Not finished and left out: " in said
    text = (record.directory / "report.html").read_text()
    assert "code 1: &lt;no&gt; memory" in text and "1 runs in 1 groups" in text


def test_keys_that_only_one_variant_has_make_no_group_of_their_own():
    def run(name, config):
        summary = {"seed": 0, "attention": name, "val_bits_per_byte": 1.0}
        return Run(Path(name), config, summary, [])

    made = groups(
        [run("a", {"attention._target_": "x.A", "attention.window": 4}), run("b", {"attention._target_": "x.B"})]
    )
    assert [group.label for group in made] == ["attention A", "attention B"]
    assert csv_text(made).startswith("attention,runs,seeds,val_bits_per_byte,val_bits_per_byte_std,")


def test_the_front_keeps_what_no_other_beats_in_both():
    points = [(0.1, 3.0), (0.2, 2.5), (0.3, 2.6), (0.1, 3.1)]
    assert front(points, -1) == [0, 1]
    assert front([(x * 100, y) for x, y in points], 1) == [1, 2]


def test_one_number_has_no_deviation_and_none_no_mean():
    pairs = {(7.7, 7.8): "7.750 ± 0.071", (3280.0, 3450.0): "3,360 ± 120", (9.86, 10.14): "10.00 ± 0.20"}
    assert all(str(Spread.of(values)) == text for values, text in pairs.items())
    assert str(Spread.of([0.5, 0.5 + 1e-9])) == "0.5 ± 7.1e-10"
    assert str(Spread.of([2.5])) == "2.5" and str(Spread.of([])) == "–" and str(Spread.of([1.0, 1.0])) == "1"


@pytest.mark.parametrize(("words", "sentence"), [("nowhere", "nowhere holds neither"), ("empty", "none of empty has")])
def test_what_is_no_run_is_refused_in_one_sentence(tmp_path, monkeypatch, capsys, words, sentence):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty/config.yaml").write_text("seed: 1\n")
    assert main([words]) == 2
    said = capsys.readouterr().err
    assert said.startswith(sentence) and said.count("\n") == 1


def test_runs_that_minimise_wrong_answers_are_compared_by_them(tmp_path):
    for seed, accuracy in ((1, 0.5), (2, 0.75)):
        folder = write_run(tmp_path / f"s{seed}", seed, 0.2, 3.0)
        summary = json.loads((folder / "summary.json").read_text())
        summary |= {"val_accuracy": accuracy, "minimised": "1 - val_accuracy"}
        (folder / "summary.json").write_text(json.dumps(summary))
    found, _, _ = report([tmp_path / "s1", tmp_path / "s2"], tmp_path)
    assert found[0].spread("sweep_metric").mean == 0.375 and found[0].spread("val_accuracy").mean == 0.625
    assert "1 - accuracy" in (tmp_path / "report.html").read_text()


def test_a_run_without_a_wrong_answer_stands_first_and_only_curves_that_some_run_has_are_offered(tmp_path):
    for density, accuracy in ((0.2, 0.75), (0.5, 1.0)):
        folder = write_run(tmp_path / f"d{density}", 1, density, 3.0)
        summary = json.loads((folder / "summary.json").read_text())
        summary |= {"val_accuracy": accuracy, "minimised": "1 - val_accuracy"}
        (folder / "summary.json").write_text(json.dumps(summary))
        (folder / "metrics.csv").write_text("step,tokens,wall_s,val_bits_per_byte,val_accuracy\n0,0,0.1,,0.5\n")
    found, _, _ = report([tmp_path / "d0.2", tmp_path / "d0.5"], tmp_path)
    assert [group.spread("val_accuracy").mean for group in found] == [1.0, 0.75]
    offered = re.findall(r'<option value="(\w+)">', (tmp_path / "report.html").read_text())
    assert offered == ["val_accuracy", "tokens", "step", "wall_s"]
