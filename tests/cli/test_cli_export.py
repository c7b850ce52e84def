"""A run as a folder of transformers: the same logits with the same attention, text through the tokenizer, a card."""

import json
import shutil

import pytest
import torch
import transformers
from omegaconf import OmegaConf
from tokenizer_kinds import CORPUS, KINDS, LINES, tokenizer_of_kind
from transformers import AutoModelForCausalLM, AutoTokenizer

from lightsparse import hf
from lightsparse.cli.export import main
from lightsparse.config.compose import compose_raw, conf_dir
from lightsparse.config.parse import parse
from lightsparse.config.targets import ConfigError
from lightsparse.data import ByteTokenizer
from lightsparse.data.subwords import train_bpe
from lightsparse.hf.tokenizer_files import save_tokenizer
from lightsparse.models import ModelConfig, context_for
from lightsparse.models.text_stream import document_of
from lightsparse.training.module import language_model

SPARSE = ("attention=sliding_window", "attention.window=9", "attention.sinks=2", "attention.block=16")
VARIANTS = sorted(path.stem for path in (conf_dir() / "attention").glob("*.yaml"))
TEXT = "to bé or not to be, that is the question"


@pytest.fixture
def run(tmp_path):
    """run(*overrides) → the directory of a run with a checkpoint of step 7, and its model."""

    def made(*overrides, tokenizer=None):
        directory = tmp_path / "run"
        raw = compose_raw(
            [
                *("name=tiny", "model.depth=2", "model.embed_dim=64", "model.heads=4", "model.kv_heads=2"),
                *("data.context=128", *overrides),
            ]
        )
        config = parse(raw)
        torch.manual_seed(2)
        module = language_model(config, tokenizer or ByteTokenizer()).eval()
        with torch.no_grad():
            for name, parameter in module.named_parameters():
                parameter.copy_(("norm" in name) + 0.2 * torch.randn(parameter.shape))
        (directory / "checkpoints").mkdir(parents=True)
        OmegaConf.save(raw, directory / "config.yaml")
        torch.save({"state_dict": module.state_dict()}, directory / "checkpoints" / "step-7.ckpt")
        return directory, module.model

    return made


def exported(directory, *words):
    out = directory.parent / "out"
    assert main([f"run={directory}", f"out={out}", *words]) == 0
    return out


def logits(model):
    tokens = torch.randint(0, 254, (2, 100), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        if hasattr(model, "head_weight"):
            return model.logits(model(tokens, context_for(tokens)).hidden)
        return model(tokens).logits


@pytest.mark.parametrize("layers", ["S", "DS", "LS"])
@pytest.mark.parametrize("form", [("model.qk_norm=true",), ("model.qk_norm=false", "model.qkv_bias=true")])
def test_the_exported_model_with_the_attention_of_the_run_has_the_runs_logits(run, layers, form):
    local = ["model.local_window=3"] if "L" in layers else []
    directory, ours = run(*SPARSE, f"model.layer_pattern={layers}", *local, "attention.dropout=0.1", *form)
    out = exported(directory)
    attention = hf.register_exported(out)
    theirs = AutoModelForCausalLM.from_pretrained(out, attn_implementation=attention)
    assert theirs.config.attention_dropout == 0.1
    expected = logits(ours)
    torch.testing.assert_close(logits(theirs), expected, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(logits(AutoModelForCausalLM.from_pretrained(out)), expected, atol=0.1)  # dense


@pytest.mark.parametrize(
    "attention",
    [
        ("attention=sliding_window", "attention.window=1", "attention.density=0.58"),
        (
            "attention=block_sparse",
            "attention.segment_lengths=[]",
            "attention.dilation_rates=[]",
            "attention.density=0.7",
        ),
    ],
)
def test_a_density_means_the_same_there(run, attention):
    directory, ours = run(*attention, "attention.block=16")
    theirs = AutoModelForCausalLM.from_pretrained(
        out := exported(directory), attn_implementation=hf.register_exported(out, "lightsparse_density")
    )
    torch.testing.assert_close(logits(theirs), logits(ours), rtol=1e-4, atol=1e-4)


def test_the_tokenizer_gives_the_ids_of_training_and_generation_ends_with_the_document(run):
    directory, _ = run("attention=dense")
    out = exported(directory)
    tokenizer = AutoTokenizer.from_pretrained(out)
    ids = tokenizer(TEXT)["input_ids"]
    assert ids == [ByteTokenizer.bos, *TEXT.encode()]
    assert tokenizer.decode(ids, skip_special_tokens=True) == TEXT
    every_byte = bytes(range(32, 256)).decode("latin-1") + "\n\t\0 日本"
    assert tokenizer(every_byte)["input_ids"][1:] == list(every_byte.encode())
    assert len(tokenizer) == 256 and tokenizer.mask_token_id == ByteTokenizer.mask
    model = AutoModelForCausalLM.from_pretrained(out)
    assert model.config.eos_token_id == model.generation_config.eos_token_id == tokenizer.eos_token_id
    batch = tokenizer([TEXT, TEXT[:9]], return_tensors="pt", padding=True)
    assert model.generate(**batch, max_new_tokens=3, do_sample=False).shape[1] > batch["input_ids"].shape[1]


def test_a_tokenizer_kept_in_the_run_comes_along(run):
    bpe = train_bpe(iter(["some words to learn from, and some more"]), 300)
    directory, _ = run("attention=dense", "tokenizer=bpe", "tokenizer.vocab_size=300", tokenizer=bpe)
    bpe.save(directory)
    out = exported(directory)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (out / name).read_bytes() == (directory / name).read_bytes()


FORMS = {
    "LlamaForCausalLM": {"qk_norm": False},
    "Qwen3ForCausalLM": {"qk_norm": True},
    "Qwen2ForCausalLM": {"qk_norm": False, "qkv_bias": True},
}


@pytest.mark.parametrize("architecture", FORMS)
@pytest.mark.parametrize("kind", [*KINDS, "bpe", "bytes"])
def test_transformers_begins_and_reads_a_text_as_our_generation_does(architecture, kind, tmp_path):
    tokenizer = {"bpe": lambda: train_bpe([CORPUS], 400), "bytes": ByteTokenizer}.get(
        kind, lambda: tokenizer_of_kind(kind)
    )()
    model = ModelConfig(depth=1, embed_dim=64, heads=4, **FORMS[architecture])
    hf.their_config(model, tokenizer.vocab_size, context=96).save_pretrained(tmp_path)
    name = save_tokenizer(tmp_path, tokenizer)
    assert name == "AutoTokenizer" or architecture == "Qwen2ForCausalLM"
    theirs = getattr(transformers, name).from_pretrained(tmp_path)
    for text in (*LINES, "", " a", "two  spaces\n\n e\u0301 日本"):
        ids = document_of(tokenizer, text)
        assert theirs(text)["input_ids"] == ids
        assert theirs.decode(ids, skip_special_tokens=True) == tokenizer.decode(ids[1:])
    batch = theirs(["The pass", "The pass key is"], padding=True)["input_ids"]
    assert batch[0][-len(document_of(tokenizer, "The pass")) :] == document_of(tokenizer, "The pass")
    assert theirs.eos_token_id == theirs.bos_token_id == tokenizer.bos


def test_a_folder_whose_tokenizer_transformers_reads_by_other_rules_says_with_which_class_to_read_it(run, capsys):
    bpe = train_bpe(iter(["some words to learn from, and some more"]), 300)
    form = ("model.qk_norm=false", "model.qkv_bias=true")
    directory, _ = run("attention=dense", *form, "tokenizer=bpe", "tokenizer.vocab_size=300", tokenizer=bpe)
    bpe.save(directory)
    out = exported(directory)
    assert "its tokenizer is for transformers.PreTrainedTokenizerFast.from_pretrained; Auto" in capsys.readouterr().out
    assert "tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)" in (out / "README.md").read_text()


def test_weights_come_in_the_dtype_and_the_number_of_files_asked_for(run, capsys):
    directory, ours = run("attention=dense")
    out = exported(directory, "dtype=bfloat16", "shard=100KB", "step=7")
    assert "Qwen3ForCausalLM of step 7" in capsys.readouterr().out
    theirs = AutoModelForCausalLM.from_pretrained(out)
    assert (out / "model.safetensors.index.json").is_file()
    assert torch.equal(theirs.lm_head.weight, ours.head_weight.to(torch.bfloat16))


def test_the_card_says_what_was_trained_and_how_to_use_it(run):
    directory, _ = run(*SPARSE)
    summary = {"steps": 7, "tokens": 12345, "attention_density": 0.25, "val_bits_per_byte": 2.5, "val_loss": 1.7}
    (directory / "summary.json").write_text(json.dumps(summary))
    card = (exported(directory) / "README.md").read_text()
    for part in ("sliding_window, layers SS", "0.250 of dense", "128 tokens", "2.5000 bits per byte", "12,345"):
        assert part in card
    assert "perplexity" not in card and "hf.register_exported(folder)" in card
    code = (
        card.split("```python\n")[1]
        .split("```")[0]
        .replace('folder = "."', f"folder = {str(directory.parent / 'out')!r}")
    )
    exec(compile(code, "card", "exec"), (names := {}))  # noqa: S102
    assert names["model"].config._attn_implementation == "lightsparse_exported"


def test_a_summary_of_other_weights_is_not_on_the_card(run):
    directory, _ = run(*SPARSE)
    (directory / "summary.json").write_text(json.dumps({"steps": 9, "tokens": 12345, "val_bits_per_byte": 2.5}))
    card = (exported(directory) / "README.md").read_text()
    assert "bits per byte" not in card and "12,345" not in card


def test_a_learned_attention_stays_behind_and_that_is_said(run, capsys):
    directory, _ = run("attention=adaptive", "attention.block=16")
    out = exported(directory)
    said = capsys.readouterr().out
    assert "its own attention stays behind: attention=adaptive has parameters of its own" in said
    assert "8 parameters of that attention are not in the folder" in said
    assert "register_exported" not in (card := (out / "README.md").read_text())
    assert "not what the model was trained with" in card
    with pytest.raises(ConfigError, match="parameters of its own"):
        hf.register_exported(out)
    AutoModelForCausalLM.from_pretrained(out)


@pytest.mark.parametrize("attention", VARIANTS)
def test_every_attention_comes_along_or_one_sentence_says_why_not_and_the_rest_is_whole(run, capsys, attention):
    directory, ours = run(f"attention={attention}")
    own = {name for name, _ in ours.named_parameters() if ".self_attn.core." in name}
    out = exported(directory)
    said = capsys.readouterr().out.splitlines()
    assert len([line for line in said if "stays behind: " in line]) == bool(own)
    if own:
        assert any(line.startswith(f"{len(own)} parameters of that attention are not in the folder") for line in said)
        with pytest.raises(ConfigError, match=f"attention={attention} has parameters of its own"):
            hf.register_exported(out)
    else:
        theirs = AutoModelForCausalLM.from_pretrained(out, attn_implementation=hf.register_exported(out))
        torch.testing.assert_close(logits(theirs), logits(ours), rtol=1e-4, atol=1e-4)
    again = hf.load_model(out).state_dict()
    weights = dict(ours.named_parameters())
    assert weights.keys() - own <= again.keys()
    assert all(torch.equal(again[name], weight) for name, weight in weights.items() if name not in own)


def test_a_learned_attention_that_no_layer_uses_is_none(run):
    directory, ours = run("attention=adaptive", "attention.block=16", "model.layer_pattern=D")
    out = exported(directory)
    theirs = AutoModelForCausalLM.from_pretrained(out, attn_implementation=hf.register_exported(out))
    torch.testing.assert_close(logits(theirs), logits(ours), rtol=1e-4, atol=1e-4)


def test_a_dense_model_needs_no_more_than_transformers_and_one_with_a_pattern_does(run, capsys):
    directory, ours = run("attention=dense")
    out = exported(directory)
    torch.testing.assert_close(logits(AutoModelForCausalLM.from_pretrained(out)), logits(ours), rtol=1e-4, atol=1e-4)
    assert "register_exported" not in (out / "README.md").read_text() + capsys.readouterr().out
    shutil.rmtree(directory), shutil.rmtree(out)
    pattern = "attention.pattern={_target_: lightsparse.patterns.LocalWindow, window: 16}"
    directory, ours = run("attention=dense", "attention.block=16", pattern)
    out = exported(directory)
    theirs = AutoModelForCausalLM.from_pretrained(out, attn_implementation=hf.register_exported(out))
    torch.testing.assert_close(logits(theirs), logits(ours), rtol=1e-4, atol=1e-4)
    assert "register_exported" in (out / "README.md").read_text()


def test_an_exported_run_is_a_start_for_another(run):
    directory, ours = run(*SPARSE)
    again = hf.load_model(exported(directory))
    assert all(torch.equal(weight, again.state_dict()[name]) for name, weight in ours.state_dict().items())


def test_what_cannot_be_exported_is_said_in_one_line_and_leaves_nothing(run, capsys):
    directory, _ = run("attention=dense", "objective=mlm")
    out = directory.parent / "out"
    (directory.parent / "full").mkdir()
    (directory.parent / "full" / "file").touch()
    for words, what in (
        ((f"run={directory}", f"out={out}"), "objective=mlm"),
        ((f"run={directory}", f"out={out}", "dtype=int8"), "dtype is 'int8'; it must be one of float32"),
        ((f"run={directory}", f"out={out}", "shard=5"), "shard is 5"),
        ((f"run={directory}", f"out={out}", "step=x"), "step is 'x'"),
        ((f"run={directory}", f"out={out}", "step=8"), "step is 8"),
        ((f"run={directory}", f"out={directory.parent / 'full'}"), "something lies already"),
        ((f"run={directory}", f"out={out}/deeper"), "make it first"),
        ((f"run={directory.parent}", f"out={out}"), "no config.yaml"),
        ((f"run={directory}",), "out is missing; write lightsparse export run="),
        ((f"run={directory}", f"out={out}", "to=x"), "to is not a key"),
    ):
        assert main(list(words)) == 2
        said = capsys.readouterr().err
        assert what in said and said.count("\n") == 1
    assert not out.exists() and not list(directory.parent.glob(".*partial"))
