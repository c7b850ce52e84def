import matplotlib.image
import pytest

from lightsparse.show import main


@pytest.mark.parametrize("attention", ["dense", "sliding_window", "block_sparse"])
def test_every_variant_is_drawn_to_the_named_file(attention, tmp_path, capsys):
    out = tmp_path / f"{attention}.png"
    assert main([f"attention={attention}", "model=nano", "data.context=1024", f"out={out}"]) == 0
    assert matplotlib.image.imread(out).shape[2] in (3, 4)
    said = capsys.readouterr().out
    assert attention in said and "density" in said


@pytest.mark.parametrize(
    ("words", "about"),
    [
        (["attention=blok_sparse"], "block_sparse"),
        (["attention.windw=3"], "windw"),
        (["attention.density=2"], "density"),
        (["out=pattern.txt"], "PNG"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(words, about, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main([*words, "data.context=1024"]) == 2
    said = capsys.readouterr().err
    assert about in said and said.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_help_says_how(capsys):
    assert main(["--help"]) == 0
    assert "out=" in capsys.readouterr().out
