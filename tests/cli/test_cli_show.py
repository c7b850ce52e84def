import matplotlib.image
import pytest
import torch
from omegaconf import OmegaConf

from lightsparse.cli.show import main
from lightsparse.config.build import AttentionChoice
from lightsparse.config.compose import compose_raw, conf_dir
from lightsparse.config.parse import parse
from lightsparse.data.tokens import ByteTokenizer
from lightsparse.models.transformer import Transformer
from lightsparse.training.module import LanguageModel

VARIANTS = sorted(path.stem for path in (conf_dir() / "attention").glob("*.yaml"))


@pytest.mark.parametrize("attention", VARIANTS)
def test_every_variant_is_drawn_to_the_named_file(attention, tmp_path, capsys):
    out = tmp_path / f"{attention}.png"
    assert main([f"attention={attention}", "model=nano", "data.context=1024", f"out={out}"]) == 0
    assert matplotlib.image.imread(out).shape[2] in (3, 4)
    said = capsys.readouterr().out
    assert attention in said and "density" in said
    core = AttentionChoice.of(
        OmegaConf.to_container(OmegaConf.load(conf_dir() / "attention" / f"{attention}.yaml"))
    ).core
    assert ("untrained, random input" in said) == core.selects_from_input


def test_all_variants_fit_into_one_picture(tmp_path, capsys):
    out = tmp_path / "variants.png"
    assert main(["attention=all", "data.context=512", f"out={out}"]) == 0
    height, width = matplotlib.image.imread(out).shape[:2]
    assert width >= 1200 and height < 1.5 * width
    said = capsys.readouterr().out
    assert all(variant in said for variant in VARIANTS) and "dense 1" in said and said.count("\n") == 1


def test_a_variant_that_cannot_is_left_out_of_the_gallery_and_named(tmp_path, capsys):
    assert main(["attention=all", "data.context=256", "objective=mlm", f"out={tmp_path / 'all.png'}"]) == 0
    said = capsys.readouterr().out.splitlines()
    assert "dense 1" in said[0] and "hierarchical" not in said[0]
    left_out = {line.split(" is left out: ")[0] for line in said[1:] if "causal only" in line}
    assert {"hierarchical", "csa"} <= left_out


@pytest.fixture
def run(tmp_path):
    """A run directory of adaptive attention whose older checkpoint's router opens no gate, the newer one's every."""
    for name in ("text", "held_out"):
        (tmp_path / f"{name}.txt").write_text(f"to be or not to be, that is the {name}. " * 40)
    raw = compose_raw(
        [
            "attention=adaptive",
            "attention.k_max=8",
            "attention.block=16",
            "model.depth=2",
            "model.layer_pattern=DS",
            "data=files",
            f"data.path={tmp_path / 'text.txt'}",
            f"data.val_path={tmp_path / 'held_out.txt'}",
            "data.context=100",
        ]
    )
    config, tokenizer = parse(raw), ByteTokenizer()
    model = Transformer(config.model, config.attention.build, vocab_size=tokenizer.vocab_size, context=100)
    module = LanguageModel(model, config, token_bytes=tokenizer.token_bytes(), mask_id=tokenizer.mask)
    folder = tmp_path / "run"
    (folder / "checkpoints").mkdir(parents=True)
    OmegaConf.save(raw, folder / "config.yaml")
    for step, offset in ((5, -50.0), (10, 50.0)):
        model.layers[1].self_attn.core.router.offset.data.fill_(offset)
        torch.save({"state_dict": module.state_dict()}, folder / "checkpoints" / f"step-{step}.ckpt")
    return folder


def said_about(run, capsys, *words):
    assert main([f"run={run}", f"out={run / 'plots' / 'read.png'}", *words]) == 0
    assert matplotlib.image.imread(run / "plots" / "read.png").shape[2] in (3, 4)
    return capsys.readouterr().out.strip().rpartition("read.png: ")[2]


def test_a_run_shows_what_its_newest_checkpoint_reads(run, capsys):
    assert said_about(run, capsys) == "adaptive · layer 1 · step 10, density 1"
    assert said_about(run, capsys, "layer=0") == "dense · layer 0 · step 10, density 1"
    (run / "checkpoints" / "step-10.ckpt").unlink()
    # 7 blocks of 16, 16, …, 4 tokens: of the area of the lower triangle, the diagonal
    own, past = 6 * 256 + 4 * 4, 256 * 21 + 4 * (96 + 4)
    assert said_about(run, capsys) == f"adaptive · layer 1 · step 5, density {own / past:.4g}"


def test_what_is_wrong_with_a_run_is_said_in_one_line(run, capsys):
    (run / "empty").mkdir()
    (run / "empty" / "config.yaml").write_bytes((run / "config.yaml").read_bytes())
    wrong = {
        (f"run={run / 'nowhere'}",): "no config.yaml",
        (f"run={run / 'empty'}",): "no whole checkpoint",
        (f"run={run}", "layer=2"): "layers 0 … 1",
        (f"run={run}", "layer=-1"): "layers 0 … 1",
        (f"run={run}", "seed=3"): "seed=3",
        (f"run={run}", "runn=3"): "runn=3",
    }
    for words, about in wrong.items():
        assert main(words) == 2
        said = capsys.readouterr()
        assert about in said.err and said.err.count("\n") == 1 and said.out == ""


@pytest.mark.parametrize(
    ("words", "about"),
    [
        (["attention=blok_sparse"], "block_sparse"),
        (["attention.windw=3"], "windw"),
        (["attention.density=2"], "density"),
        (["out=pattern.txt"], "PNG"),
        (["layer=2"], "run="),
        (["pattern.png"], "key=value"),
        (["attention=all", "attention.window=3"], "attention.window=3"),
        (["attention=all", "model.heads=7"], "model.heads"),
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
    said = capsys.readouterr().out
    assert all(word in said for word in ("out=", "attention=all", "run=", "layer="))
