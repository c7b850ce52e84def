"""Our attention inside transformers' models: sdpa's where dense, and the same alone, cached, padded and packed."""

import inspect
from dataclasses import replace

import pytest
import torch
from omegaconf import OmegaConf
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import (
    AttentionInterface,
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
    StaticCache,
)

from lightsparse import hf
from lightsparse.attention.core import AttentionResult, AttentionShape
from lightsparse.attention.dense import DenseAttention
from lightsparse.config.build import AttentionChoice
from lightsparse.config.compose import conf_dir
from lightsparse.config.targets import ConfigError
from lightsparse.hf.attention import Variant
from lightsparse.hf.register import refusal, register_as

VOCAB = 61
CACHE = "cache" if "cache" in inspect.signature(LlamaForCausalLM.forward).parameters else "past_key_values"
OLD_NAME = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable:FutureWarning")  # that of before 5.24
SHAPE = AttentionShape(8, 8, 64, 512)


def small_variants():
    """Every variant of conf/attention/ that suits, scaled to a hundred tokens: a new YAML is tested by being there."""
    found = {}
    for path in sorted((conf_dir() / "attention").glob("*.yaml")):
        choice = AttentionChoice.of(OmegaConf.to_container(OmegaConf.load(path)))
        choice = replace(choice, config=choice.config.small())
        if refusal(choice, SHAPE) is None:
            found[path.stem] = choice
    return found


SMALL = small_variants()


@pytest.fixture(scope="module", autouse=True)
def registered():
    hf.register()
    for name, choice in SMALL.items():
        register_as(Variant(f"lightsparse_small_{name}", choice))


def config(kind=LlamaConfig, heads=4, kv_heads=2, **more):
    return kind(
        vocab_size=VOCAB,
        hidden_size=16 * heads,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=16,
        max_position_embeddings=512,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=None,
        **more,
    )


def model(attention, kind=LlamaConfig, **more):
    """The same large random weights whatever the attention."""
    made = AutoModelForCausalLM.from_config(config(kind, **more), attn_implementation=attention).eval()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            centre = 1.0 if "norm" in name else 0.0
            parameter.copy_(centre + 0.2 * torch.randn(parameter.shape, generator=generator))
    return made


def tokens(*shape, seed=0):
    return torch.randint(2, VOCAB, shape, generator=torch.Generator().manual_seed(seed))


def logits(made, *args, **kwargs):
    with torch.no_grad():
        return made(*args, **kwargs).logits


def gradients(made, ids):
    made(input_ids=ids, labels=ids).loss.backward()
    return {name: parameter.grad for name, parameter in made.named_parameters()}


def test_every_suitable_variant_of_conf_is_registered_and_the_rest_is_refused_with_its_reason(caplog):
    with caplog.at_level("INFO"):
        names = hf.register()
    assert set(names) == {f"lightsparse_{name}" for name in SMALL} and "lightsparse_adaptive" not in names
    assert {"dense", "sliding_window", "block_sparse", "big_bird", "dilated", "hierarchical"} <= SMALL.keys()
    assert "attention=adaptive has parameters of its own (router." in caplog.text
    assert all("/" not in name and name in AttentionInterface().valid_keys() for name in names)


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("kind", [LlamaConfig, Qwen2Config, Qwen3Config])
def test_dense_gives_the_logits_and_gradients_of_sdpa(kind, kv_heads):
    ids = tokens(2, 75)
    ours, theirs = (model(name, kind, kv_heads=kv_heads) for name in ("lightsparse_dense", "sdpa"))
    torch.testing.assert_close(logits(ours, ids), logits(theirs, ids), rtol=1e-5, atol=1e-5)
    expected = gradients(theirs, ids)
    for name, grad in gradients(ours, ids).items():
        torch.testing.assert_close(grad, expected[name], rtol=1e-4, atol=1e-5, msg=name)


@OLD_NAME
def test_a_model_loads_by_name_and_trains_under_block_sparse(tmp_path):
    LlamaForCausalLM(config()).save_pretrained(tmp_path)
    made = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="lightsparse_small_block_sparse")
    made.gradient_checkpointing_enable()
    made.train()
    optimizer = torch.optim.AdamW(made.parameters(), lr=3e-3)
    ids, losses = tokens(2, 100), []
    for _ in range(12):
        loss = made(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.7 * losses[0]


@pytest.mark.parametrize("name", SMALL)
def test_generation_with_every_cache_equals_generation_without(name):
    made, prompt = model(f"lightsparse_small_{name}"), tokens(2, 37)
    mask = torch.ones_like(prompt)
    mask[0, :5] = 0

    def written(**options):
        return made.generate(prompt, attention_mask=mask, max_new_tokens=14, do_sample=False, **options)

    without = written(use_cache=False)
    assert without[:, 37:].unique().numel() > 4  # no constant answer that anything would equal
    assert torch.equal(written(), without)
    assert torch.equal(written(cache_implementation="static"), without)


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
def test_decoding_a_few_tokens_at_once_equals_the_full_pass(kv_heads):
    made, ids = model("lightsparse_small_block_sparse", kv_heads=kv_heads), tokens(2, 70)
    whole = logits(made, ids)
    for cache in (None, StaticCache(config(kv_heads=kv_heads), max_cache_len=96)):
        parts, start = [], 0
        for stop in (33, 34, 41, 48, 70):
            with torch.no_grad():
                found = made(ids[:, start:stop], use_cache=True, **{CACHE: cache})
            cache, start = found[CACHE], stop
            parts.append(found.logits)
        torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_padded_sample_gives_what_it_gives_alone(name, side):
    """Whatever the padding, though the blocks of a pattern count from the sample's first token."""
    made, lengths = model(f"lightsparse_small_{name}"), (61, 80, 53, 0)
    ids, mask = tokens(4, 80), torch.zeros(4, 80, dtype=torch.int64)
    for row, length in enumerate(lengths):
        mask[row, 80 - length :] = 1
    mask = mask if side == "left" else mask.flip(1)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    padded = logits(made, ids, attention_mask=mask, position_ids=positions)
    assert bool(padded.isfinite().all())
    for row, length in enumerate(lengths[:3]):
        real = slice(80 - length, 80) if side == "left" else slice(0, length)
        alone = logits(made, ids[row : row + 1, real])
        torch.testing.assert_close(padded[row, real], alone[0], rtol=1e-4, atol=1e-4)


def test_padding_changes_no_gradient():
    made, ids = model("lightsparse_small_block_sparse"), tokens(2, 64)
    mask = torch.ones_like(ids)
    mask[1, :11] = 0
    labels = ids.clone()
    labels[1, :12] = -100  # the first token is no target: it would be predicted from padding
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    made(input_ids=ids, attention_mask=mask, position_ids=positions, labels=labels).loss.backward()
    found = {name: parameter.grad.clone() for name, parameter in made.named_parameters()}
    made.zero_grad()
    count = 63 + 52  # targets
    (made(ids[:1], labels=ids[:1]).loss * 63 / count).backward()
    (made(ids[1:, 11:], labels=ids[1:, 11:]).loss * 52 / count).backward()
    for name, parameter in made.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad, rtol=1e-3, atol=1e-5, msg=name)


@pytest.mark.parametrize("name", SMALL)
def test_packed_position_ids_keep_documents_apart(name):
    """As sdpa reads them; documents on block borders give what they give alone."""
    made, ids = model(f"lightsparse_small_{name}"), tokens(2, 96)
    positions = torch.stack([torch.cat([torch.arange(48), torch.arange(48)]), torch.arange(96)])
    packed = logits(made, ids, position_ids=positions, use_cache=False)
    if name == "dense":
        theirs = logits(model("sdpa"), ids, position_ids=positions, use_cache=False)
        torch.testing.assert_close(packed, theirs, rtol=1e-4, atol=1e-4)
    other = ids.clone()
    other[0, :48] = tokens(48, seed=9)
    changed = logits(made, other, position_ids=positions, use_cache=False)
    torch.testing.assert_close(changed[0, 48:], packed[0, 48:], rtol=0, atol=1e-6)
    if name in ("dense", "sliding_window"):
        torch.testing.assert_close(packed[0, 48:], logits(made, ids[:1, 48:])[0], rtol=1e-4, atol=1e-4)


class LargestTensor(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        found = [leaf.numel() for leaf in tree_leaves(out) if isinstance(leaf, torch.Tensor)]
        self.numel = max(self.numel, *found, 0)
        return out


@pytest.mark.parametrize("padded", [False, True])
def test_no_n_by_n_mask_is_built(padded):
    n = 2048
    made, ids, mask = model("lightsparse_sliding_window"), tokens(1, n), torch.ones(1, n, dtype=torch.int64)
    mask[0, : n // 4 if padded else 0] = 0
    with torch.no_grad(), LargestTensor() as largest:
        made.model(ids, attention_mask=mask, use_cache=False)
    assert largest.numel < n * n / 8
    sdpa = model("sdpa")
    with torch.no_grad(), LargestTensor() as largest:
        sdpa.model(ids, attention_mask=mask, use_cache=False)
    assert (largest.numel >= n * n) == padded  # the measure sees such a mask


def test_dropout_is_that_of_the_config_and_follows_torchs_generator():
    made, ids = model("lightsparse_small_block_sparse", attention_dropout=0.4), tokens(2, 64)
    plain = logits(made, ids)
    assert torch.equal(plain, logits(model("lightsparse_small_block_sparse"), ids))
    made.train()
    torch.manual_seed(5)
    first, second = logits(made, ids), logits(made, ids)
    torch.manual_seed(5)
    assert torch.equal(logits(made, ids), first) and not torch.equal(first, second)
    assert not torch.equal(first, plain)


@OLD_NAME
def test_recomputed_layers_drop_the_same_weights():
    ids, found = tokens(2, 64), []
    for recompute in (False, True):
        made = model("lightsparse_small_block_sparse", attention_dropout=0.4).train()
        if recompute:
            made.gradient_checkpointing_enable()
        torch.manual_seed(5)
        found.append(gradients(made, ids))
    for name, grad in found[0].items():
        torch.testing.assert_close(found[1][name], grad, rtol=1e-5, atol=1e-6, msg=name)


@pytest.mark.parametrize("half", ["autocast", "parameters"])
def test_half_precision_errs_no_more_than_sdpas(half):
    ids, errors = tokens(2, 75), []
    exact = logits(model("sdpa"), ids)
    for name in ("lightsparse_dense", "sdpa", "lightsparse_small_block_sparse"):
        made = model(name)
        if half == "parameters":
            made.to(torch.bfloat16)
        with torch.autocast("cpu", torch.bfloat16, enabled=half == "autocast"):
            found = logits(made, ids).float()
        if name.startswith("lightsparse_small"):  # no dense layout
            assert (found - logits(model(name), ids)).norm() <= 1.5 * errors[1]
        errors.append(float((found - exact).norm()))
    assert errors[0] <= 1.1 * errors[1]


def test_layers_follow_the_layer_pattern():
    hf.register_variant("lightsparse_sd", "attention=sliding_window", "attention.window=4", layer_pattern="SD")
    hf.register_variant("lightsparse_dd", "attention=sliding_window", "attention.window=4", layer_pattern="D")
    ids = tokens(1, 40)
    dense, mixed, all_dense = (logits(model(name), ids) for name in ("sdpa", "lightsparse_sd", "lightsparse_dd"))
    torch.testing.assert_close(all_dense, dense, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(mixed, dense, atol=1e-2)
    assert not torch.allclose(mixed, logits(model("lightsparse_small_sliding_window"), ids), atol=1e-2)


def test_other_scales_of_the_scores_are_honoured():
    ids, found = tokens(1, 40), []
    for name in ("lightsparse_dense", "sdpa"):
        made = model(name)
        for layer in made.model.layers:
            layer.self_attn.scaling = 0.11
        found.append(logits(made, ids))
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-5)


def test_what_cannot_be_honoured_is_refused():
    made, ids = model("lightsparse_small_block_sparse"), tokens(2, 40)
    gap, square = torch.ones_like(ids), torch.ones(2, 1, 40, 40, dtype=torch.bool)
    gap[0, 7] = 0
    restart = torch.arange(40).remainder(20)[None]
    for given, what in (
        ({"attention_mask": gap}, "hides tokens between visible ones"),
        ({"attention_mask": square}, "builds no N × N mask"),
        ({"position_ids": restart, "attention_mask": torch.ones_like(ids)}, "leave attention_mask out"),
        ({"position_ids": restart, "use_cache": True}, "use_cache=False"),
        ({"output_attentions": True}, "output_attentions"),
        ({"softcap": 30.0}, "softcap, which"),
        ({"cu_seq_lens_q": torch.tensor([0, 40])}, "cu_seq_lens_q is given"),
        ({"is_causal": False}, "later ones"),
    ):
        with pytest.raises(ValueError, match=what):
            made(ids, **given)
    windowed = model("lightsparse_small_block_sparse", MistralConfig, sliding_window=16)
    with pytest.raises(ValueError, match="local, 16 tokens wide"):
        windowed(ids)
    both_ways = model("lightsparse_small_block_sparse")
    both_ways.model.layers[1].self_attn.is_causal = False
    with pytest.raises(ValueError, match="LlamaAttention reads both ways"):
        both_ways(ids)
    assert logits(model("lightsparse_dense", MistralConfig, sliding_window=None), ids).shape == (2, 40, VOCAB)


def test_a_loss_of_an_attention_is_not_lost(monkeypatch):
    made, ids = model("lightsparse_small_dense"), tokens(1, 20)
    monkeypatch.setattr(DenseAttention, "forward", lambda self, q, *_, **__: AttentionResult(q, torch.ones(())))
    with pytest.raises(ValueError, match="a loss of its own"):
        made(ids)


@pytest.mark.parametrize(
    ("arguments", "what"),
    [
        (("lightsparse_x", "attention=adaptive"), "parameters of its own"),
        (("lightsparse_x", "attention=nowhere"), "attention is nowhere; conf/attention has"),
        (("lightsparse_x", "attention=dense", "attention.blok=3"), "did you mean attention.block"),
        (("lightsparse_x", "attention=dense", "attention.dropout=0.1"), "config.attention_dropout"),
        (("lightsparse_x", "attention=sliding_window", "attention.density=0.1"), "the length it refers to"),
        (("lightsparse_x", "model=base"), "only attention="),
        (("mine/dense", "attention=dense"), "looks for other names on the hub"),
        (("lightsparse_flash", "attention=dense"), "without the word flash"),
    ],
)
def test_a_registration_that_does_not_fit_is_refused(arguments, what):
    with pytest.raises(ConfigError, match=what):
        hf.register_variant(*arguments)
