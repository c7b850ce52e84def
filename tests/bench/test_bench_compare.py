import json

import pytest

from lightsparse.bench import command, compare
from lightsparse.bench.report import RESULTS, Report


def saved(path, rows, kind="train", **fields):
    report = Report(kind, "lightsparse bench train", rows)
    for name, value in fields.items():
        getattr(report, name).update(value)
    report.save(path)
    return str(path)


def row(model="lightsparse", context=4096, ms=100.0, **more):
    return {"model": model, "context": context, "dtype": "fp32", "density": 0.1, "ms_per_step": ms, **more}


def test_every_number_of_equal_settings_gets_its_ratio(tmp_path, capsys):
    a = saved(tmp_path / "a.json", [row(ms=100.0), row(context=8192, ms=10.0), row("transformers", ms=7.0)])
    b = saved(tmp_path / "b.json", [row(context=8192, ms=30.0), row(ms=50.0, density=0.1000001)])
    assert command.main(["compare", a, b]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines() if "ms_per_step" in line]
    assert [(line[0], line[-1]) for line in lines] == [("4096", "0.500"), ("8192", "3.000")]


def test_rows_of_one_file_alone_are_counted_by_its_name(tmp_path, capsys):
    a = saved(tmp_path / "a.json", [row(), row(context=1)])
    b = saved(tmp_path / "b.json", [row()])
    command.main(["compare", a, b])
    said = " ".join(capsys.readouterr().out.split())
    assert "1 of 2 rows are in" in said and "a.json only" in said and "b.json only" not in said


def test_other_machines_and_versions_are_named(tmp_path, capsys):
    a = saved(tmp_path / "a.json", [row()], hardware={"cpu": "Slow 1"}, versions={"torch": "2.12"})
    b = saved(tmp_path / "b.json", [row()], hardware={"cpu": "Quick 2"})
    command.main(["compare", a, b])
    out = capsys.readouterr().out
    assert "cpu: Slow 1 | Quick 2" in out and "torch: 2.12 |" in out and "memory_gib" not in out


def test_rows_beside_another_yardstick_are_compared_and_the_yardsticks_named(tmp_path, capsys):
    rows = [{"backend": "flex", "seq": 64, "density": 0.1, "ms": 2.0, "dense_ms": 9.0, "dense_kernel": "flash"}]
    a = saved(tmp_path / "a.json", rows, "kernels")
    b = saved(tmp_path / "b.json", [{**rows[0], "ms": 1.0, "dense_kernel": "cuDNN"}], "kernels")
    assert command.main(["compare", a, b]) == 0
    out = capsys.readouterr().out
    assert "dense_kernel: flash | cuDNN" in out and "0.500" in out


@pytest.mark.parametrize(
    ("rows", "kind", "sentence"),
    [
        ([row(context=1, dtype="bf16")], "train", "share no row: they differ in context, dtype;"),
        ([{"work": "read"}], "data", "`bench data`"),
    ],
)
def test_files_without_a_common_row_are_refused(tmp_path, capsys, rows, kind, sentence):
    a, b = saved(tmp_path / "a.json", [row()]), saved(tmp_path / "b.json", rows, kind)
    assert command.main(["compare", a, b]) == 2
    assert sentence in capsys.readouterr().err


def test_every_kind_of_report_has_something_to_compare():
    for kind, names in RESULTS.items():
        assert compare.measured(kind) and set(compare.measured(kind)) <= {*names}


def test_settings_that_an_older_file_does_not_know_do_not_part_rows(tmp_path):
    a = saved(tmp_path / "a.json", [row()])
    b = saved(tmp_path / "b.json", [row(depth=4)])
    assert command.main(["compare", a, b]) == 0
    assert "depth" in json.dumps(json.loads((tmp_path / "b.json").read_text())["rows"])
