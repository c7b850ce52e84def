"""The hub over HTTP: the very code that talks to huggingface.co, against a stand-in on this machine."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hub_server import hub_of

CARD = "---\nconfigs:\n- config_name: default\n  data_files:\n  - {split: train, path: data/train-*.parquet}\n---\n"

# The address of the hub is read when its package is imported: hence a process of its own, one for all that is asked.
SCRIPT = """
import json, sys
from pathlib import Path
from lightsparse.data.errors import DataError
from lightsparse.data.hub import HubData
from lightsparse.data.prepare import prepare

def refusal(**fields):
    try:
        list(HubData(**fields).documents())
    except DataError as error:
        return str(error)

def texts(**fields):
    return [document.text for document in HubData(name="org/books", **fields).documents()]

def prepared(folder, kill_after=None):
    pieces = 0
    def report(*_):
        nonlocal pieces
        pieces += 1
        if pieces == kill_after:
            raise KeyboardInterrupt
    try:
        prepare(HubData(name="org/books", max_characters=None), out / folder, shard_tokens=60, report=report)
    except KeyboardInterrupt:
        pass
    return {path.name: path.read_bytes().hex() for path in sorted((out / folder).glob("[sm]*"))}

out = Path(sys.argv[1])
found = {
    "main": texts(), "main downloaded": texts(streaming=False),
    "v1": texts(revision="v1"), "v1 downloaded": texts(revision="v1", streaming=False),
    "commits": [HubData(name="org/books", revision=each).identity()["commit"] for each in (None, "v1")],
    "no revision": refusal(name="org/books", revision="v9"), "no data set": refusal(name="org/films"),
}
one, cut = prepared("one"), prepared("killed", kill_after=6)
found["kept"], found["continued"] = sum(name.endswith(".tokens") for name in cut), prepared("killed") == one
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What a process saw of a hub with two revisions of one data set."""
    root = tmp_path_factory.mktemp("hub")
    for revision in ("main", "v1"):
        (root / revision / "data").mkdir(parents=True)
        (root / revision / "README.md").write_text(CARD)
        for part in range(2):
            rows = [f"{revision} {part}.{row} " + "word " * row for row in range(5)]
            pq.write_table(pa.table({"text": rows}), root / revision / "data" / f"train-{part}.parquet")
    with hub_of("org/books", {revision: root / revision for revision in ("main", "v1")}) as (address, asked):
        settings = {"HF_ENDPOINT": address, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
        folders = {"HF_HOME": str(root / "home"), "PYTHONPATH": str(Path(__file__).parents[2])}
        command, environment = [sys.executable, "-c", SCRIPT, str(root / "out")], {**os.environ, **settings, **folders}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    return {**json.loads(done.stdout), "asked": asked}


@pytest.mark.multiprocess
@pytest.mark.parametrize("revision", ["main", "v1"])
def test_a_revision_is_read_as_it_is_streamed_or_downloaded(found, revision):
    rows = [f"{revision} {part}.{row} " + "word " * row for part in range(2) for row in range(5)]
    assert found[revision] == found[f"{revision} downloaded"] == rows


@pytest.mark.multiprocess
def test_each_revision_is_told_apart_by_its_commit(found):
    assert len({*found["commits"]}) == 2 and all(len(commit) == 40 for commit in found["commits"])


@pytest.mark.multiprocess
def test_an_interrupted_stream_from_the_hub_is_continued_without_loss_or_repetition(found):
    assert found["continued"] and found["kept"] >= 1


@pytest.mark.multiprocess
def test_what_the_hub_does_not_have_is_one_sentence(found):
    assert found["no revision"].startswith("data set 'org/books', revision v9, cannot be read: ")
    assert found["no data set"].startswith("data set 'org/films', revision main, cannot be read: ")
    assert "\n" not in found["no revision"] + found["no data set"]


@pytest.mark.multiprocess
def test_no_code_of_a_data_set_is_ever_fetched(found):
    assert not [each for each in found["asked"] if each.startswith("GET") and each.endswith(".py")]
