import io
import logging

import pytest
from rich.console import Console

from lightsparse.bench import command
from lightsparse.bench.report import RESULTS, SETTINGS, Report, cell, load


@pytest.fixture
def report():
    rows = [
        {"seq": seq, "window": 64, "dtype": "fp32", "block": 16, "increase_mib": 1.5 * seq, "growth": growth}
        for seq, growth in ((1024, None), (4096, 4.0))
    ]
    return Report("memory", "lightsparse bench memory --window 64", rows, ["A note."])


def test_a_report_comes_back_from_its_file(report, tmp_path):
    report.save(tmp_path / "x.json")
    assert load(tmp_path / "x.json") == report


def test_markdown_has_command_machine_notes_and_rows(report, tmp_path, capsys):
    report.save(tmp_path / "x.json")
    assert command.main(["table", str(tmp_path / "x.json")]) == 0
    text = capsys.readouterr().out
    head, _, table = text.partition("| seq |")
    for part in (f"```bash\n{report.command}\n```\n\n", report.machine(), report.software(), "\n- A note.\n"):
        assert part in head
    assert "\n|---:|---:|" in table  # numbers stand to the right
    assert "window 64" in head  # the same in all rows, so it is no column
    assert [line.count("|") for line in ("| seq |" + table).strip().splitlines()] == [len(report.columns()) + 1] * 4
    assert "| 4096 | 6,144 |" in table


def test_the_widest_table_fits_a_terminal_of_120_columns():
    """Two of each setting that one run can vary, the longest names and numbers."""
    rows = [
        {
            **{"dtype": dtype, "seq": 131072, "variant": variant, "block": block, "asked": "default", "density": 0.123},
            **{"ms": 123456.0, "dense_ms": 123456.0, "speedup": 12.34, "cpu_speedup": 12.34},
            **{"flop_ratio": 12.34, "efficiency": 0.1234, "heads": 4, "matmul_precision": "highest"},
        }
        for dtype, variant, block in (("fp32", "a_variant_with_a_name", 64), ("bf16", "sliding_window", 128))
    ]
    rows[0]["seq"] = 1024
    wide = Report("kernels", "…", rows)
    console = Console(width=120, record=True, file=io.StringIO())
    wide.show(console)
    lines = console.export_text().splitlines()
    (row,) = (line for line in lines if "a_variant_with_a_name" in line)
    assert max(map(len, lines)) <= 120
    assert "0.123 123,456 123,456 12.3 12.3 12.3 0.123" in " ".join(row.split())  # no cell is cut or folded
    assert "matmul precision highest" in "\n".join(lines) and "pattern" not in "\n".join(lines)


def test_the_recorded_command_does_not_say_where_its_result_went():
    words = ["kernels", "--json", "a.json", "--seq", "64", "--json=b.json"]
    assert command._without_json(words) == "kernels --seq 64"


def test_a_sentence_is_logged_once():
    once = command._Once()
    said = [once.filter(logging.makeLogRecord({"msg": "%s heads", "args": (heads,)})) for heads in (2, 2, 4)]
    assert said == [True, False, True]


def test_settings_that_differ_are_columns(report):
    report.rows[1]["block"] = 32
    assert report.columns() == ("block", *RESULTS["memory"])
    assert set(SETTINGS) == set(RESULTS)


@pytest.mark.parametrize("text", ["{}", "[1]", '{"kind": "weather"}'])
def test_another_file_is_refused_by_name(text, tmp_path, capsys):
    (tmp_path / "x.json").write_text(text)
    assert command.main(["table", str(tmp_path / "x.json")]) == 2
    assert "x.json" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("value", "shown"),
    [(None, "–"), (0.05011, "0.0501"), (14.26, "14.3"), (123.4, "123"), (12345.6, "12,346"), (64, "64")],
)
def test_cells_are_short(value, shown):
    assert cell(value) == shown
