import json
import multiprocessing

import pytest

from lightsparse.bench import command


@pytest.mark.multiprocess
def test_what_ranks_send_is_what_the_layout_predicts(tmp_path):
    """Three ranks count; a difference to the prediction would be an error. Sparse sends least, in every row."""
    file = tmp_path / "comm.json"
    words = ["--seq", "1000", "--ranks", "3", "--pattern", "window,block_sparse,dense", "--window", "100"]
    words += ["--heads", "4", "--kv-heads", "2", "--head-dim", "8", "--block", "16", "--dtype", "bf16"]
    assert command.main(["comm", *words, "--json", str(file)]) == 0
    rows = json.loads(file.read_text())["rows"]
    assert len(rows) == 9
    for row in rows:
        assert row["counted_bytes"] == row["predicted_bytes"] > 0
    of_ring = {(row["pattern"], row["exchange"]): row["of_ring"] for row in rows}
    assert of_ring["window", "sparse"] < 0.2 < of_ring["window", "gather"] < of_ring["window", "ring"] == 1
    assert of_ring["dense", "sparse"] < of_ring["dense", "gather"]
    assert not multiprocessing.active_children()


def test_on_paper_no_rank_runs_and_a_window_costs_the_same_on_any_number_of_ranks(tmp_path, monkeypatch):
    monkeypatch.setattr("lightsparse.bench.comm.on_ranks", None)
    file = tmp_path / "comm.json"
    words = ["--seq", "262144,1048576", "--ranks", "8,256", "--window", "4096", "--measure", "0", "--json", str(file)]
    assert command.main(["comm", *words, "--exchange", "sparse"]) == 0
    rows = json.loads(file.read_text())["rows"]
    assert all(row["counted_mib"] is None for row in rows)
    window = 4096 * 4 * 2 * 64 * 4 / 2**20  # keys and values of a window, fp32, 4 heads × 64
    for row in rows:  # the first rank also sends the block of the sinks to all but itself
        sinks = 64 * 4 * 2 * 64 * 4 / 2**20 * (row["ranks"] - 2)
        assert row["predicted_mib"] == pytest.approx(max(window + sinks, 2 * window), rel=0.1)
