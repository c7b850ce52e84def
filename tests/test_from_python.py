"""What `import lightsparse` offers, used as a stranger would: every variant in one line, an ordinary module."""

from __future__ import annotations

import ast
import copy
import dataclasses
import inspect
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from battery import Variant, variants
from torch import Tensor, nn

import lightsparse
from lightsparse import AttentionShape, GlobalTokens, LocalWindow, SequenceContext, patterns
from lightsparse.attention.core import AttentionCore
from lightsparse.config.compose import conf_dir
from lightsparse.config.variants import build_attention
from lightsparse.models import ModelConfig, Transformer, context_for
from lightsparse.models.rope import RopeConfig, RotaryEmbedding

# As a caller may write what small() has as tuples, or leave to a preset.
IN_OTHER_WORDS: dict[str, dict[str, object]] = {
    "block_sparse": {"dilation_rates": [1, 2], "pattern": LocalWindow(20) | GlobalTokens(4)},
    "dilated": {"segment_lengths": (16, 40), "dilation_rates": (1, 2), "branches": "partition"},
    "hierarchical": {"preset": None, "levels": [(9, 1), (25, 4), (None, 16)]},
}


def words(variant: Variant) -> dict[str, object]:
    """The fields in which the variant at a hundred tokens differs from its defaults."""
    defaults = variant.choice.config
    small, fields = defaults.small(), [field.name for field in dataclasses.fields(defaults)]
    differing = {name: getattr(small, name) for name in fields if getattr(small, name) != getattr(defaults, name)}
    return differing | IN_OTHER_WORDS.get(variant.name, {})


VARIANTS = {variant.name: words(variant) for variant in variants()}
READS_X = {variant.name for variant in variants() if variant.core_class.needs_hidden_states}
CAUSAL_ONLY = {variant.name for variant in variants() if not variant.core_class.supports_bidirectional}
every_variant = pytest.mark.parametrize("name", VARIANTS)


def built(name: str, **others: object) -> nn.Module:
    torch.manual_seed(0)
    return lightsparse.attention(name, heads=4, kv_heads=2, head_dim=32, **VARIANTS[name], **others)


def inputs(name: str, n: int = 111, seed: int = 1) -> tuple[list[Tensor], dict[str, Tensor]]:
    """q, k, v, and x for those that read it."""
    g = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(2, heads, n, 32, generator=g) for heads in (4, 2, 2))
    return [q, k, v], {"x": torch.randn(2, n, 128, generator=g)} if name in READS_X else {}


# ---- the names ------------------------------------------------------------------------------------------------------


def in_a_new_process(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout


@pytest.mark.multiprocess
def test_the_import_brings_nothing_along_and_still_lists_every_name():
    code = "import sys; known = set(sys.modules); import os, importlib; known = set(sys.modules)\n"
    code += "import lightsparse; print(set(sys.modules) - known, set(lightsparse.__all__) - set(dir(lightsparse)))"
    assert in_a_new_process(code).strip() == "{'lightsparse'} set()"


def test_every_name_is_the_object_it_names():
    assert {
        "attention",
        "variants",
        "block_sparse_attention",
        "BlockSparseRingDilatedAttention",
        "BlockSparseRingMultiheadDilatedAttention",
        "BlockSparseRingDistributedDilatedAttention",
        "BlockSparseHierarchical",
        "BlockSparseAdaptive",
        "DilatedAttention",
        "PersistentPatternCache",
        *patterns.__all__,
    } <= set(lightsparse.__all__)
    for name in set(lightsparse.__all__) - {"attention"}:
        assert getattr(lightsparse, name).__name__ == name
    with pytest.raises(AttributeError, match="module lightsparse has no attribute BlockSparse"):
        _ = lightsparse.BlockSparse


def test_type_checkers_know_the_same_names():
    stub = ast.parse(Path(lightsparse.__file__).with_suffix(".pyi").read_text())
    imported = [alias for node in stub.body if isinstance(node, ast.ImportFrom) for alias in node.names]
    names = {alias.asname for alias in imported if alias.asname} | {"attention", *patterns.__all__}
    assert names == set(lightsparse.__all__) and [alias.name for alias in imported if not alias.asname] == [
        "build_attention",
        "*",
    ]


@pytest.mark.multiprocess
def test_attention_is_one_thing_whatever_is_imported_before():
    code = "import lightsparse; first = lightsparse.attention; import lightsparse.attention.core as core\n"
    code += "from lightsparse import attention; print(first is attention is lightsparse.attention, callable(first))\n"
    code += "print(attention.core is core)"
    assert in_a_new_process(code).split() == ["True"] * 3


# ---- every variant --------------------------------------------------------------------------------------------------


def test_the_names_are_those_of_the_command_line_with_their_defaults():
    listed = lightsparse.variants()
    assert list(listed) == sorted(VARIANTS) == sorted(path.stem for path in (conf_dir() / "attention").glob("*.yaml"))
    for name, defaults in listed.items():
        core = lightsparse.attention(name, heads=4, head_dim=16, context=1 << 20)
        assert defaults == {field.name: getattr(core.config, field.name) for field in dataclasses.fields(core.config)}
        assert core.shape == AttentionShape(4, 4, 16, 64, context=1 << 20)


def test_no_field_of_a_variant_hides_behind_a_word_of_the_shape():
    taken = set(inspect.signature(build_attention).parameters) - {"fields"}
    assert not {(name, key) for name, fields in lightsparse.variants().items() for key in fields if key in taken}


@every_variant
def test_it_is_the_core_and_gives_what_the_core_gives(name: str):
    attn = built(name)
    shape = AttentionShape(heads=4, kv_heads=2, head_dim=32, embed_dim=128)
    torch.manual_seed(0)
    core = type(attn)(attn.config, shape)
    assert isinstance(attn, AttentionCore) and attn.shape == shape
    (q, k, v), more = inputs(name)
    documents = torch.tensor([[0] * 40 + [1] * 71, [3] * 111])
    for given in (None, documents):
        context = SequenceContext.plain(111, given)
        result = core.eval()(q, k, v, x=more.get("x", q), ctx=context)
        assert torch.equal(attn.eval()(q, k, v, documents=given, **more), result.out)
    assert "density" in result.stats


@every_variant
def test_training_it_takes_its_own_loss_along(name: str):
    attn = built(name, dropout=0.1)
    qkv, more = inputs(name)
    for tensor in (*qkv, *more.values()):
        tensor.requires_grad_()
    leaves = [*qkv, *more.values(), *attn.parameters()]
    weights = torch.randn(2, 4, 111, 32)
    torch.manual_seed(7)
    out = attn(*qkv, **more)
    found = torch.autograd.grad((out * weights).sum(), leaves, allow_unused=True)

    torch.manual_seed(7)
    result = attn(*qkv, **more, ctx=attn.context(qkv[0]))
    loss = (result.out * weights).sum() + (0 if result.aux_loss is None else result.aux_loss)
    assert torch.equal(out, result.out)
    for grad, expected in zip(found, torch.autograd.grad(loss, leaves, allow_unused=True), strict=True):
        assert (grad is None) == (expected is None)
        if grad is not None:
            torch.testing.assert_close(grad, expected, rtol=1e-5, atol=1e-6)
    assert all(grad is not None and bool(grad.any()) for grad in found[:3])
    of_parameters = found[len(qkv) + len(more) :]
    assert all(grad is not None for grad in of_parameters), "a parameter without a gradient makes DDP wait"


class Layer(nn.Module):
    """A layer as one writes it: no word of this package but `attention`."""

    def __init__(self, name: str):
        super().__init__()
        self.norm = nn.LayerNorm(128)
        self.qkv = nn.Linear(128, 256)
        self.attn = lightsparse.attention(name, heads=4, kv_heads=2, head_dim=32, **VARIANTS[name])
        self.out = nn.Linear(128, 128)

    def forward(self, x: Tensor) -> Tensor:
        normed = self.norm(x)
        q, k, v = (t.unflatten(-1, (-1, 32)).transpose(1, 2) for t in self.qkv(normed).split([128, 64, 64], -1))
        return x + self.out(self.attn(q, k, v, x=normed).transpose(1, 2).flatten(2))


@every_variant
def test_layers_around_it_learn(name: str):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(17, 128), Layer(name), nn.Linear(128, 17))
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    tokens = (torch.randint(0, 17, (2, 1)) + torch.arange(64) ** 2) % 17
    losses = []
    for _ in range(6):
        loss = nn.functional.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        assert all(parameter.grad is not None for parameter in model.parameters())
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.7 * losses[0]


@every_variant
def test_documents_are_apart(name: str):
    attn = built(name).eval()
    (q, k, v), more = inputs(name)
    documents = torch.tensor([[0] * 43 + [1] * 68] * 2)
    out = attn(q, k, v, documents=documents, **more)
    for tensor in (t.transpose(1, 2) for t in (q, k, v)):
        tensor[:, :43] = tensor[:, :43].flip(1) + 3
    for tensor in more.values():
        tensor[:, :43] = tensor[:, :43].flip(1) + 3
    changed = attn(q, k, v, documents=documents, **more)
    assert torch.equal(changed[:, :, 43:], out[:, :, 43:]) and not torch.equal(changed, out)


@every_variant
@pytest.mark.parametrize("n", [1, 17, 63])
def test_any_length_and_the_past_does_not_change(name: str, n: int):
    attn = built(name).eval()
    (q, k, v), more = inputs(name, 111)
    whole = attn(q, k, v, **more)
    part = attn(*(t[:, :, :n] for t in (q, k, v)), **{key: t[:, :n] for key, t in more.items()})
    torch.testing.assert_close(part, whole[:, :, :n], rtol=1e-5, atol=1e-5)


@every_variant
def test_both_ways_where_the_variant_can(name: str):
    if name in CAUSAL_ONLY:
        with pytest.raises(ValueError, match=r"causal only; use objective=causal \(causal=True\)"):
            built(name, causal=False)
        return
    attn = built(name, causal=False).eval()
    (q, k, v), more = inputs(name)
    out = attn(q, k, v, **more)
    v[:, :, -8:] += 1
    assert not torch.equal(attn(q, k, v, **more)[:, :, :-8], out[:, :, :-8])


@every_variant
def test_it_is_saved_copied_and_pickled(name: str):
    attn = built(name).eval()
    qkv, more = inputs(name)
    out = attn(*qkv, **more)
    with torch.no_grad():
        for parameter in attn.parameters():
            parameter.add_(0.01)
    torch.manual_seed(1)
    other = lightsparse.attention(name, heads=4, kv_heads=2, head_dim=32, **VARIANTS[name]).eval()
    out = attn(*qkv, **more)
    other.load_state_dict(attn.state_dict())
    for again in (other, copy.deepcopy(attn), pickle.loads(pickle.dumps(attn))):
        assert torch.equal(again(*qkv, **more), out)


@every_variant
def test_it_goes_to_bf16(name: str):
    attn = built(name).to(torch.bfloat16)
    qkv, more = inputs(name)
    low = [t.to(torch.bfloat16).requires_grad_() for t in (*qkv, *more.values())]
    out = attn(*low[:3], **dict(zip(more, low[3:], strict=True)))
    out.float().square().sum().backward()
    assert out.dtype == torch.bfloat16 and bool(out.isfinite().all())
    assert all(t.grad is not None and bool(t.grad.isfinite().all()) for t in (*low[:3], *attn.parameters()))


@every_variant
def test_x_is_asked_for_where_it_is_read(name: str):
    attn = built(name).eval()
    qkv, more = inputs(name)
    if name not in READS_X:
        assert torch.equal(attn(*qkv), attn(*qkv, x=torch.randn(2, 111, 128)))
        return
    with pytest.raises(ValueError, match=rf"{type(attn).__name__} reads the input of its layer; give x=, of shape \[B"):
        attn(*qkv)
    with pytest.raises(ValueError, match=r"x is \(2, 111, 64\); it must be \[B, N, embed_dim\], \(2, 111, 128\)"):
        attn(*qkv, x=more["x"][..., :64])
    wide = built(name, embed_dim=64).eval()
    assert wide(*qkv, x=more["x"][..., :64]).shape == (2, 4, 111, 32)


@every_variant
def test_a_transformer_takes_the_very_object(name: str):
    attn = built(name)
    config = ModelConfig(depth=1, embed_dim=128, heads=4, kv_heads=2)
    model = Transformer(config, lambda shape: attn, vocab_size=61).eval()
    assert model.cores == [attn]
    seen: dict[str, object] = {}

    def keep(_: nn.Module, args: tuple[Tensor, ...], more: dict[str, Tensor], result: object) -> None:
        seen.update(args=args, x=more["x"], out=result.out)

    handle = attn.register_forward_hook(keep, with_kwargs=True)
    tokens = torch.randint(0, 61, (2, 75), generator=torch.Generator().manual_seed(2))
    documents = torch.tensor([[0] * 30 + [1] * 45] * 2)
    with torch.no_grad():
        model(tokens, context_for(tokens, documents))
        handle.remove()
        out = attn(*seen["args"], x=seen["x"], documents=documents, rotary=model.rotary.rotated)
    assert torch.equal(out, seen["out"])


@pytest.mark.parametrize(("name", "more"), [("csa", {}), ("dsa", {}), ("seer", {}), ("nsa", {"branch_kv": "own"})])
def test_positions_count_where_keys_of_its_own_are_rotated(name: str, more: dict[str, str]):
    attn = built(name, **more).eval()
    qkv, x = inputs(name)
    rotary, positions = RotaryEmbedding(RopeConfig(), 32).rotated, torch.arange(111)[None]
    out = attn(*qkv, **x, rotary=rotary)
    assert torch.equal(attn(*qkv, **x, rotary=rotary, positions=positions), out)
    assert not torch.allclose(attn(*qkv, **x, rotary=rotary, positions=7 * positions), out)
    assert not torch.allclose(attn(*qkv, **x), out)


@every_variant
def test_dropout_follows_torchs_seed_and_only_in_training(name: str):
    attn = built(name, dropout=0.3)
    qkv, more = inputs(name)

    def drawn(seed: int) -> Tensor:
        torch.manual_seed(seed)
        return attn(*qkv, **more)

    assert torch.equal(drawn(1), drawn(1)) and not torch.allclose(drawn(1), drawn(2))
    attn.eval()
    before = torch.random.get_rng_state()
    assert torch.equal(attn(*qkv, **more), attn(*qkv, **more))
    assert torch.equal(torch.random.get_rng_state(), before)


def test_a_pattern_may_be_written_as_in_a_yaml():
    written = {"_target_": "lightsparse.patterns.LocalWindow", "window": 20}
    sizes = {"heads": 2, "head_dim": 8, "block": 16, "segment_lengths": (), "dilation_rates": ()}
    for pattern in (LocalWindow(20), {"near": LocalWindow(20), "far": None}, {"near": written}, written):
        core = lightsparse.attention("block_sparse", **sizes, pattern=pattern)
        assert core.config.parts() == (LocalWindow(20),)
    assert lightsparse.attention("dense", heads=2, head_dim=8, pattern=written).config.pattern == LocalWindow(20)


def test_a_density_is_that_of_the_context():
    attn = lightsparse.attention("sliding_window", heads=2, head_dim=8, block=16, density=0.205, context=1024)
    qkv = [torch.randn(1, 2, 1024, 8) for _ in "qkv"]
    assert abs(float(attn(*qkv, ctx=attn.context(qkv[0])).stats["density"]) - 0.205) < 0.004


# ---- what is refused ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "words", "says"),
    [
        ("mobaa", {}, r"^attention is 'mobaa'; it must be one of adaptive, .*, sliding_window; did you mean moba\?$"),
        ("core", {}, r"^attention is 'core'; it must be one of"),
        (3, {}, r"^attention is 3; it must be one of"),
        ("moba", {"top": 3}, r"^attention moba has no keyword top; did you mean top_k\?$"),
        ("moba", {"kv_head": 3}, r"^attention moba has no keyword kv_head; did you mean kv_heads\?$"),
        ("moba", {"zzz": 3}, r"^attention moba has no keyword zzz; it has density, dropout, .*top_k$"),
        ("moba", {"top_k": "3"}, r"^attention\.top_k is '3'; it must be an integer$"),
        ("moba", {"top_k": 0}, r"^attention\.top_k is 0; it counts blocks"),
        ("moba", {"heads": "3"}, r"^attention\.heads is '3'; it must be an integer$"),
        ("moba", {"head_dim": 0}, r"^attention: head_dim is 0; it must be at least 1$"),
        ("moba", {"kv_heads": 3}, r"^attention: heads is 4 and kv_heads is 3; kv_heads must divide heads$"),
        ("adaptive", {}, r"^attention\.k_max is null, .*; give context, or attention\.k_max$"),
        ("sliding_window", {"density": 0.1}, r"^attention\.density is 0\.1; give context, the length it refers to$"),
    ],
)
def test_a_wrong_word_is_one_sentence_with_the_nearest_right_one(name, words, says):
    with pytest.raises(ValueError, match=says):
        lightsparse.attention(name, **{"heads": 4, "head_dim": 8, **words})


def test_a_call_that_does_not_fit_is_one_sentence():
    attn = built("moba")
    (q, k, v), _ = inputs("moba")
    for wrong, says in (
        ((q[:, :2], k, v), r"q is \(2, 2, 111, 32\); it must be \[B, 4, N, 32\], with the same B and N for q, k and v"),
        ((q[:, :, -1:], k, v), r"k is \(2, 2, 111, 32\); it must be \[B, 2, N, 32\]"),
        ((q[0], k, v), r"q is \(4, 111, 32\)"),
        ((q, k, v[..., :16]), r"v is \(2, 2, 111, 16\)"),
    ):
        with pytest.raises(ValueError, match=says):
            attn(*wrong)
    with pytest.raises(ValueError, match=r"documents is \(2, 110\); it must be \[B, 111\]"):
        attn(q, k, v, documents=torch.zeros(2, 110, dtype=torch.int32))
    with pytest.raises(ValueError, match="document ids decrease"):
        attn(q, k, v, documents=torch.arange(111).flip(0).expand(2, -1), positions=torch.arange(111)[None])
    with pytest.raises(ValueError, match="ctx is given, which has documents"):
        attn(q, k, v, ctx=attn.context(q), positions=torch.arange(111)[None])
