"""Weights of transformers in our model and back: equal logits, equal bits, an error for whatever cannot be equal."""

import json
import re
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
    SmolLM3Config,
)

from lightsparse import hf
from lightsparse.attention.adaptive import AdaptiveConfig, BlockSparseAdaptive
from lightsparse.config.targets import ConfigError
from lightsparse.models import ModelConfig, RopeConfig, context_for

VOCAB = 61
ROPES = {
    "default": {"rope_type": "default", "rope_theta": 5e4},
    "linear": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0},
    "yarn": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 24},
    "llama3": {
        "rope_type": "llama3",
        "rope_theta": 1e4,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    },
}


def config(kind=LlamaConfig, kv_heads=2, rope="default", **more):
    return kind(
        **{
            "vocab_size": VOCAB,
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": kv_heads,
            "head_dim": 24,
            "max_position_embeddings": 96,
            "rms_norm_eps": 1e-5,
            "tie_word_embeddings": False,
            "rope_parameters": ROPES[rope],
            "attn_implementation": "eager",
            **({"sliding_window": None} if kind is MistralConfig else {}),
        }
        | more
    )


def saved(folder, config, dtype=torch.float32, **options):
    """A random model on disk: weights and biases large and distinct."""
    model = AutoModelForCausalLM.from_config(config).eval()
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(("norm" in name) + 0.2 * torch.randn(parameter.shape))
    model.to(dtype).save_pretrained(folder, **options)
    return model


def tokens():
    return torch.randint(0, VOCAB, (2, 90), generator=torch.Generator().manual_seed(0))


def our_logits(model):
    with torch.no_grad():
        return model.logits(model(tokens(), context_for(tokens())).hidden)


def their_logits(model):
    with torch.no_grad():
        return model(tokens()).logits


def assert_equal(found, expected):
    assert expected.std() > 0.3
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", [LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config])
@pytest.mark.parametrize(("kv_heads", "tied"), [(4, False), (2, True), (1, False)])
def test_logits_are_those_of_transformers_there_and_back(kind, kv_heads, tied, tmp_path):
    theirs = saved(tmp_path / "there", config(kind, kv_heads, tie_word_embeddings=tied))
    ours = hf.load_model(tmp_path / "there").eval()
    assert_equal(our_logits(ours), their_logits(theirs))
    hf.save_model(ours, hf.their_config(ours.config, VOCAB, context=96), tmp_path / "back", dtype=torch.float32)
    back, info = AutoModelForCausalLM.from_pretrained(tmp_path / "back", output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert_equal(their_logits(back.eval()), their_logits(theirs))
    expected = "Llama" if kind is MistralConfig else kind.__name__.removesuffix("Config")
    assert type(back).__name__ == f"{expected}ForCausalLM"


@pytest.mark.parametrize("rope", ROPES)
def test_stretched_positions_are_those_of_transformers_there_and_back(rope, tmp_path):
    theirs = saved(tmp_path / "there", config(rope=rope))
    ours = hf.load_model(tmp_path / "there").eval()
    assert ours.config.rope.scaling == rope.replace("default", "none")
    assert_equal(our_logits(ours), their_logits(theirs))
    hf.save_model(ours, hf.their_config(ours.config, VOCAB, context=96), tmp_path / "back", dtype=torch.float32)
    assert_equal(their_logits(AutoModelForCausalLM.from_pretrained(tmp_path / "back")), their_logits(theirs))
    assert hf.described(tmp_path / "back").model == ours.config


def test_a_constant_ntk_is_exported_as_another_base(tmp_path):
    saved(tmp_path / "there", config())
    plain = hf.load_model(tmp_path / "there")
    stretched = replace(plain.config, rope=RopeConfig(base=5e4, scaling="ntk", factor=4.0))
    ours = type(plain)(stretched, lambda shape: plain.layers[0].self_attn.core, vocab_size=VOCAB).eval()
    hf.load_weights(ours, tmp_path / "there")
    hf.save_model(ours, hf.their_config(stretched, VOCAB, context=384), tmp_path / "back", dtype=torch.float32)
    assert_equal(their_logits(AutoModelForCausalLM.from_pretrained(tmp_path / "back")), our_logits(ours))


def test_a_config_json_of_older_versions_is_read_too(tmp_path):
    saved(tmp_path, config(rope="llama3"))
    stored = json.loads((tmp_path / "config.json").read_text())
    rope = stored.pop("rope_parameters")
    stored |= {"rope_theta": rope.pop("rope_theta"), "rope_scaling": rope, "torch_dtype": stored.pop("dtype")}
    expected = hf.described(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(stored))
    assert hf.described(tmp_path) == expected


# Two places for the same thing, older names, keys without effect: what transformers' model makes of each decides.
OTHERWISE = ("a factor from the contexts", "part of a head, scaled", "unrounded ends")  # than ours can turn
TWO_PLACES = {
    "the context beside the scaling": {
        "rope_scaling": {"type": "yarn", "factor": 4.0},
        "original_max_position_embeddings": 24,
    },
    "the context in both": {
        "rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 48},
        "original_max_position_embeddings": 12,
    },
    "llama3, the context in both": {
        "rope_scaling": {key: value for key, value in ROPES["llama3"].items() if key != "rope_theta"},
        "original_max_position_embeddings": 8,
    },
    "the base in both": {"rope_parameters": {"rope_type": "default", "rope_theta": 300.0}, "rope_theta": 7e4},
    "scaling and parameters": {
        "rope_parameters": ROPES["linear"],
        "rope_scaling": {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 20},
    },
    "both names of the type": {"rope_scaling": {"type": "linear", "rope_type": "yarn", "factor": 3.0}},
    "a factor from the contexts": {
        "rope_scaling": {"type": "yarn", "factor": None},
        "original_max_position_embeddings": 24,
    },
    "part of a head, unscaled": {"partial_rotary_factor": 0.5},
    "part of a head, scaled": {"partial_rotary_factor": 0.5, "rope_scaling": {"type": "linear", "factor": 4.0}},
    "unrounded ends": {"rope_scaling": ROPES["yarn"] | {"truncate": False}},
    "a context that linear does not read": {"rope_scaling": ROPES["linear"] | {"original_max_position_embeddings": 9}},
}


@pytest.mark.parametrize(
    ("kind", "case"),
    [
        *((LlamaConfig, case) for case in TWO_PLACES),
        *((kind, "the context in both") for kind in (MistralConfig, Qwen2Config, Qwen3Config)),
    ],
)
def test_positions_turn_as_in_the_model_transformers_builds_or_are_refused(kind, case, tmp_path):
    saved(tmp_path, config(kind))
    stored = json.loads((tmp_path / "config.json").read_text())
    base = stored.pop("rope_parameters")["rope_theta"]
    (tmp_path / "config.json").write_text(json.dumps(stored | {"rope_theta": base} | TWO_PLACES[case]))
    if case in OTHERWISE:
        with pytest.raises(ConfigError, match=r"by which transformers turns positions otherwise than our [^\n]*$"):
            hf.load_model(tmp_path)
        return
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert_equal(our_logits(hf.load_model(tmp_path).eval()), their_logits(theirs))


UNREADABLE = {
    "cut": b'{"model_type": "llama", ',
    "no object": b"[1]",
    "no UTF-8": b'{"model_type": "llama", "name": "\xe9"}',
    "a scaling without its factor": {"rope_scaling": {"type": "yarn"}},
    "a width in words": {"hidden_size": "wide"},
    "no heads": {"num_attention_heads": 0},
    "an unknown scaling": {"rope_scaling": {"rope_type": "spiral", "factor": 2.0}},
}


@pytest.mark.parametrize("content", UNREADABLE.values(), ids=UNREADABLE)
def test_a_config_json_that_nobody_can_read_is_one_sentence(content, tmp_path):
    config().save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    if isinstance(content, dict):
        content = json.dumps({**json.loads(path.read_text()), "rope_parameters": None, **content}).encode()
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=r"config\.json (is refused by transformers|cannot be read)[^\n]+$"):
        hf.described(tmp_path)


def test_looking_at_a_folder_draws_no_random_number(tmp_path):
    config().save_pretrained(tmp_path)
    before = torch.random.get_rng_state()
    hf.described(tmp_path)
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shard", ["5GB", "40KB"], ids=["one file", "several"])
def test_a_round_trip_changes_no_bit(dtype, shard, tmp_path):
    saved(tmp_path / "there", config(Qwen2Config), dtype, max_shard_size=shard)
    ours = hf.load_model(tmp_path / "there")
    assert ours.head_weight.dtype == torch.float32
    again = hf.their_config(ours.config, VOCAB, context=96, dtype=str(dtype).removeprefix("torch."))
    hf.save_model(ours, again, tmp_path / "back", dtype=dtype, shard=shard)
    there, back = (weights(tmp_path / side) for side in ("there", "back"))
    assert there.keys() == back.keys() and all(weight.dtype == dtype for weight in back.values())
    assert all(torch.equal(weight, back[name]) for name, weight in there.items())
    assert (len(list((tmp_path / "back").glob("*.safetensors"))) > 1) == (shard == "40KB")
    assert next(AutoModelForCausalLM.from_pretrained(tmp_path / "back").parameters()).dtype == dtype


def weights(folder):
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def test_the_weights_are_those_that_transformers_takes(tmp_path):
    """Whole and sharded files of several models in one folder; names in two shards; what config.json names itself."""
    saved(tmp_path, config(), max_shard_size="40KB")
    index = tmp_path / "model.safetensors.index.json"
    ours = hf.load_model(tmp_path).eval()

    def check():
        hf.load_weights(ours, tmp_path)
        assert_equal(our_logits(ours), their_logits(AutoModelForCausalLM.from_pretrained(tmp_path).eval()))
        return our_logits(ours)

    sharded = check()
    first, *_, last = sorted(tmp_path.glob("*-of-*"))
    name, weight = next(iter(load_file(first).items()))
    save_file(load_file(last) | {name: weight.flip(0)}, last, {"format": "pt"})  # the index says first
    twice = check()
    assert not torch.allclose(sharded, twice)
    whole = {name: weight.roll(1, 0) for name, weight in weights(tmp_path).items()}
    save_file(whole, tmp_path / "model.safetensors", {"format": "pt"})
    assert not torch.allclose(check(), twice)
    stored = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(stored | {"transformers_weights": index.name}))
    assert torch.allclose(check(), twice)
    (tmp_path / "config.json").write_text(json.dumps(stored))
    for file in tmp_path.glob("*-of-*"):  # the index is stale
        file.unlink()
    assert not torch.allclose(check(), twice)


@pytest.mark.parametrize(
    ("name", "content", "what"),
    [
        ("model.safetensors", b"no header", "cannot be read: "),
        ("model.safetensors.index.json", b"{", "cannot be read: "),
        ("model.safetensors.index.json", b'{"metadata": {}}', "cannot be read: 'weight_map'"),
        ("model.safetensors.index.json", b'{"weight_map": {"a": "../a.safetensors"}}', "names ../a.safetensors among"),
        ("model.safetensors.index.json", b'{"weight_map": {"a": "a.safetensors"}}', "lacks a.safetensors"),
    ],
)
def test_weights_that_cannot_be_read_are_one_sentence(name, content, what, tmp_path):
    saved(tmp_path, config())
    ours = hf.load_model(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigError, match=f"{re.escape(what)}[^\n]*$"):
        hf.load_weights(ours, tmp_path)


@pytest.mark.parametrize("content", [b"{", b"[]", b'{"attention": {}}', b"\xff"])
def test_an_attention_file_that_is_damaged_is_one_sentence(content, tmp_path):
    (tmp_path / "lightsparse.json").write_bytes(content)
    with pytest.raises(ConfigError, match=r"lightsparse\.json is not as an export leaves it [^\n]*$"):
        hf.register_exported(tmp_path)


def test_what_an_attention_trains_for_itself_starts_fresh_and_stays_here(tmp_path):
    saved(tmp_path / "there", config())
    core = AdaptiveConfig(block=16, k_max=2)
    ours = hf.load_model(tmp_path / "there", lambda shape: BlockSparseAdaptive(core, shape))
    fresh = hf.load_weights(ours, tmp_path / "there")
    assert fresh and all(".core.router." in name for name in fresh)
    hf.save_model(ours, hf.their_config(ours.config, VOCAB, context=96), tmp_path / "back", dtype=torch.float32)
    assert weights(tmp_path / "back").keys() == weights(tmp_path / "there").keys()


@pytest.mark.parametrize(
    ("made", "what"),
    [
        (config(attention_bias=True), "attention_bias=True; our model knows only attention_bias=False"),
        (config(mlp_bias=True), "mlp_bias=True"),
        (config(hidden_act="gelu"), "hidden_act='gelu'"),
        (config(MistralConfig, sliding_window=32), "sliding_window=32"),
        (config(Qwen2Config, use_sliding_window=True, sliding_window=32, max_window_layers=1), "sliding_window=32"),
        (config(Qwen3Config, attention_bias=True), "attention_bias=True"),
        (config(Qwen3Config, layer_types=["full_attention", "sliding_attention", "full_attention"]), "layer_types"),
        (config(rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}), "rope_type='dynamic'"),
        (config(rope_parameters=ROPES["yarn"] | {"mscale": 0.7, "mscale_all_dim": 0.5}), "mscale"),
        (
            config(rope_parameters=ROPES["linear"] | {"partial_rotary_factor": 0.5}),
            "partial_rotary_factor in rope_parameters",
        ),
        (config(SmolLM3Config), "layers without RoPE"),
    ],
)
def test_what_our_model_cannot_represent_is_refused_by_name(made, what, tmp_path):
    made.save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=what):
        hf.described(tmp_path)


def test_an_architecture_of_another_kind_is_refused(tmp_path):
    config(architectures=["LlamaForSequenceClassification"]).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="our model takes LlamaForCausalLM"):
        hf.described(tmp_path)
    with pytest.raises(ConfigError, match=r"has no config\.json"):
        hf.described(tmp_path / "nowhere")


def test_files_that_do_not_hold_the_model_are_refused_and_change_nothing(tmp_path):
    saved(tmp_path, config())
    ours, file = hf.load_model(tmp_path), tmp_path / "model.safetensors"
    right, before = load_file(file), ours.head_weight.clone()
    for weight in ours.parameters():
        weight.data += 1
    name = "model.layers.1.mlp.up_proj.weight"
    for wrong, what in (
        ({key: value for key, value in right.items() if key != name}, f"lacks {name}"),
        (right | {"model.layers.0.self_attn.q_proj.bias": torch.zeros(96)}, "has model.layers.0.self_attn.q_proj.bias"),
        (right | {name: torch.zeros(96, 63)}, r"of shape \(96, 63\); here it is \(96, 64\)"),
        (right | {name: torch.zeros(96, 64, dtype=torch.int8)}, "in I8; quantised"),
    ):
        save_file(wrong, file)
        with pytest.raises(ConfigError, match=what):
            hf.load_weights(ours, tmp_path)
    file.unlink()
    with pytest.raises(ConfigError, match=r"lacks model\.safetensors; weights are read from safetensors"):
        hf.load_weights(ours, tmp_path)
    assert torch.equal(ours.head_weight, before + 1)


def test_a_tied_model_takes_a_file_with_a_head_only_where_it_is_the_embedding(tmp_path):
    theirs = saved(tmp_path, config(tie_word_embeddings=True))
    file = tmp_path / "model.safetensors"
    held = load_file(file)
    save_file(held | {"lm_head.weight": held["model.embed_tokens.weight"].clone()}, file)
    assert_equal(our_logits(hf.load_model(tmp_path).eval()), their_logits(theirs))
    save_file(held | {"lm_head.weight": held["model.embed_tokens.weight"] + 1}, file)
    with pytest.raises(ConfigError, match="no embedding"):
        hf.load_model(tmp_path)


def test_differences_are_the_overrides_that_remove_them(tmp_path):
    saved(tmp_path, config(tie_word_embeddings=True))
    there = hf.described(tmp_path).model
    assert hf.differences(there, there) == []
    words = hf.differences(ModelConfig(depth=3, embed_dim=64, qk_norm=True), there)
    assert words == [
        *("model.heads=4", "model.kv_heads=2", "model.head_dim=24", "model.mlp_dim=96", "model.qk_norm=false"),
        *("model.tie_embeddings=true", "model.norm_eps=1e-05", "model.rope.base=50000.0"),
    ]
    # All of them: kv_heads is right only as long as it follows from heads.
    words = hf.differences(ModelConfig(depth=3, embed_dim=64, heads=2, rope=there.rope), there)
    assert {"model.heads=4", "model.kv_heads=2"} <= set(words) and "model.embed_dim=64" not in words


@pytest.mark.parametrize(
    ("rope", "fits"),
    [
        (RopeConfig(base=1e4, scaling="linear", factor=4.0), True),
        (RopeConfig(base=1e4, scaling="linear", factor=8.0), True),  # stretched further
        (RopeConfig(base=1e4, scaling="linear", factor=2.0), False),
        (RopeConfig(base=1e4, scaling="ntk", factor=8.0), False),
        (RopeConfig(base=2e4, scaling="linear", factor=4.0), False),
        (RopeConfig(base=1e4), False),
    ],
)
def test_positions_may_only_be_stretched(rope, fits, tmp_path):
    saved(tmp_path, config(rope="linear"))
    there = hf.described(tmp_path).model
    assert (hf.differences(replace(there, rope=rope), there) == []) == fits
    plain = replace(there, rope=RopeConfig(base=1e4))
    assert (hf.differences(replace(there, rope=rope), plain) == []) == (rope.base == 1e4)


def test_a_model_without_a_family_is_not_exported():
    with pytest.raises(ConfigError, match="no family of transformers has"):
        hf.their_config(ModelConfig(depth=1, qk_norm=True, qkv_bias=True), VOCAB, context=96)
    theirs = hf.their_config(ModelConfig(depth=1, qk_norm=False), VOCAB, context=96)
    assert LlamaForCausalLM(theirs).config.hidden_size == 64
