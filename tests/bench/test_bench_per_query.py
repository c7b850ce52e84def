import json

import torch

from lightsparse.bench import command
from lightsparse.bench.per_query import chosen_at_random


def test_every_token_reads_its_own_block_and_distinct_ones_of_its_past():
    table = chosen_at_random(150, kv_heads=2, block=16, chosen=4).kv_indices[0]
    own = torch.arange(150) // 16
    assert table.shape == (2, 150, 4) and not torch.equal(table[0], table[1])
    for row, block in zip(table.transpose(0, 1), own.tolist(), strict=True):
        for ids in row:
            ids = ids[ids >= 0].tolist()
            assert ids == sorted(set(ids)) and ids[-1] == block and len(ids) == min(4, block + 1)


def test_a_run_leaves_a_row_per_length_and_dtype(tmp_path, capsys):
    file = tmp_path / "per_query.json"
    words = ["per_query", "--seq", "90,160", "--heads", "4", "--kv-heads", "2", "--head-dim", "32", "--block", "16"]
    assert command.main([*words, "--chosen", "3", "--repeats", "1", "--json", str(file)]) == 0
    rows = json.loads(file.read_text())["rows"]
    assert [(row["dtype"], row["seq"]) for row in rows] == [(d, n) for d in ("fp32", "bf16") for n in (90, 160)]
    assert all(row["us_per_token"] > 0 and 0 < row["error"] < 0.01 for row in rows)
    assert "us_per_token" in capsys.readouterr().out
