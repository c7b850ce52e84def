"""A run that starts from the weights of a transformers model."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from lightsparse import hf
from lightsparse.config.compose import conf_dir
from lightsparse.config.run_identity import config_hash, differences
from lightsparse.config.targets import ConfigError
from lightsparse.data import ByteTokenizer
from lightsparse.models import context_for
from lightsparse.training import run
from lightsparse.training.init_from import load_start
from lightsparse.training.module import language_model
from lightsparse.training.preflight.check import check
from lightsparse.training.run import fit

FORM = ("model.depth=2", "model.mlp_dim=48", "model.kv_heads=1", "model.qk_norm=false")  # beside those of `tiny`


@pytest.fixture
def llama(tmp_path):
    """llama(vocab) → the folder of a Llama of the form FORM."""

    def made(vocab=256):
        config = LlamaConfig(
            vocab_size=vocab,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
        )
        torch.manual_seed(11)
        LlamaForCausalLM(config).save_pretrained(tmp_path / "llama")
        return tmp_path / "llama"

    return made


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(run, "draw_plots", lambda *given: None)
    monkeypatch.setattr(run, "matmul_peak", lambda *given: 1e11)


@pytest.mark.parametrize("attention", sorted(path.stem for path in (conf_dir() / "attention").glob("*.yaml")))
def test_the_weights_are_those_of_the_folder_whatever_the_attention(tiny, llama, attention):
    folder = llama()
    config = tiny(f"init_from={folder}", f"attention={attention}", *FORM)
    check(config)
    model = language_model(config, ByteTokenizer()).model
    fresh = {name: weight.clone() for name, weight in model.named_parameters() if ".core." in name}
    line = load_start(config, model)
    theirs = LlamaForCausalLM.from_pretrained(folder).state_dict()
    found = dict(model.named_parameters())
    for name, weight in theirs.items():
        assert torch.equal(found.pop(name.removeprefix("model.")), weight)
    assert found.keys() == fresh.keys() and all(torch.equal(found[name], weight) for name, weight in fresh.items())
    assert str(folder) in line and "\n" not in line
    assert (f"{len(fresh)} of the attention's own" in line) == ("start fresh" in line) == bool(fresh)


def test_a_run_continues_from_its_own_checkpoint_and_not_from_the_folder_again(tiny, llama, quick, capsys):
    folder = llama()
    words = (f"init_from={folder}", *FORM)
    first = tiny(*words, "name=parts", "trainer.max_steps=5")
    fit(first)
    assert f"weights  {folder} · LlamaForCausalLM" in capsys.readouterr().out
    for file in folder.iterdir():
        file.unlink()
    second = tiny(*words, "name=parts", "trainer.max_steps=7")
    capsys.readouterr()
    check(second)  # the folder is needed no more
    assert fit(second)["steps"] == 7
    assert "weights  " not in capsys.readouterr().out


def test_where_a_run_starts_from_is_part_of_what_it_is(tiny, llama):
    without, given = tiny(*FORM).composed, tiny(f"init_from={llama()}", *FORM).composed
    assert config_hash(without) != config_hash(given)
    assert [line.partition(":")[0] for line in differences(without, given)] == ["init_from"]


def test_a_longer_context_stretches_the_positions_and_says_so(tiny, llama):
    config = tiny(f"init_from={llama()}", *FORM, "model.rope.scaling=ntk", "model.rope.factor=4")
    check(config)
    assert "positions stretched: ntk, factor 4" in load_start(config, language_model(config, ByteTokenizer()).model)


STRETCHED = {  # overrides → what transformers calls the same
    "unscaled": ((), {"rope_type": "default"}),
    "linear": (("scaling=linear", "factor=4"), {"rope_type": "linear", "factor": 4.0}),
    "yarn": (
        ("scaling=yarn", "factor=4", "original_context=24"),
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 24},
    ),
    "llama3": (
        ("scaling=llama3", "factor=8", "original_context=24"),
        {
            "rope_type": "llama3",
            "factor": 8.0,
            "original_max_position_embeddings": 24,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
        },
    ),
    # dynamic's base follows the length of the text; ntk is what it has at one length L, here 96 = 4 · 24 with factor 1
    "ntk": (("scaling=ntk", "factor=4"), {"rope_type": "dynamic", "factor": 1.0}),
}


@pytest.mark.parametrize("rope", STRETCHED)
def test_stretched_weights_give_the_logits_of_transformers_under_the_same_rope_and_go_back(tiny, llama, rope, tmp_path):
    words, theirs = STRETCHED[rope]
    folder = llama()
    weights = load_file(folder / "model.safetensors")  # large, so that positions matter
    generator = torch.Generator().manual_seed(3)
    weights = {name: ("norm" in name) + 0.3 * torch.randn(w.shape, generator=generator) for name, w in weights.items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    given = (f"init_from={folder}", "attention=dense", *FORM, *(f"model.rope.{word}" for word in words))
    config = tiny(*given, "data.context=96")
    check(config)
    model = language_model(config, ByteTokenizer()).model.eval()
    load_start(config, model)
    tokens = torch.randint(0, 256, (2, 96), generator=generator)

    def logits_under(parameters, source):
        kept = LlamaConfig.from_pretrained(source)
        if parameters is not None:
            kept.rope_parameters, kept.max_position_embeddings = {"rope_theta": 10_000.0, **parameters}, 24
        with torch.no_grad():
            return LlamaForCausalLM.from_pretrained(source, config=kept).eval()(tokens).logits

    with torch.no_grad():
        ours = model.logits(model(tokens, context_for(tokens)).hidden)
    assert ours.std() > 0.3
    torch.testing.assert_close(ours, logits_under(theirs, folder), rtol=1e-4, atol=1e-4)
    assert torch.allclose(ours, logits_under(None, folder), atol=0.1) == (rope == "unscaled")
    out = tmp_path / "out"
    hf.save_model(model, hf.their_config(config.model, 256, context=96), out, dtype=torch.float32)
    torch.testing.assert_close(ours, logits_under(None, out), rtol=1e-4, atol=1e-4)


def test_what_does_not_fit_is_refused_before_the_run_with_the_overrides_that_help(tiny, llama, tmp_path):
    folder = llama()
    config = tiny(f"init_from={folder}")
    with pytest.raises(ConfigError) as refused:
        check(config)
    words = [word for word in str(refused.value).split() if word.startswith("model.")]
    assert set(words) == set(FORM)
    check(tiny(f"init_from={folder}", *words))
    with pytest.raises(ConfigError, match=r"has no config\.json"):
        check(tiny(f"init_from={folder}/nowhere", *words))
    (tmp_path / "a_run" / "checkpoints").mkdir(parents=True)
    with pytest.raises(ConfigError, match=r"is a run; export it first: lightsparse export run="):
        check(tiny(f"init_from={tmp_path / 'a_run'}", *words))
    with pytest.raises(ConfigError, match="embeddings of 300 tokens, and the data's tokenizer has 256"):
        check(tiny(f"init_from={llama(300)}", *words))
    stored = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(stored | {"mlp_bias": True}))
    with pytest.raises(ConfigError, match="mlp_bias=True"):
        check(tiny(f"init_from={folder}", *words))
