"""What every attention variant must do, whatever it is: properties as functions of a Variant, run by test_battery.py.

A variant is a YAML of conf/attention/, scaled down by its config's `small()`. Nothing is listed by hand: a new YAML is
tested by being there. What a core declares it cannot do is not run, and its construction must refuse it instead.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from omegaconf import OmegaConf
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

from lightsparse.attention.core import AttentionCore, AttentionShape, SequenceContext
from lightsparse.config.build import AttentionChoice
from lightsparse.config.compose import conf_dir
from lightsparse.kernels import use_backend
from lightsparse.models import KVCache, ModelConfig, Transformer, context_for, generate
from lightsparse.models.rope import RopeConfig, RotaryEmbedding
from lightsparse.models.sampling import GREEDY
from lightsparse.patterns.mask import document_starts

Documents = Tensor | None
ROTARY = RotaryEmbedding(RopeConfig(), 32)  # for keys and queries of a core's own, of any width


@dataclass(frozen=True)
class Shape:
    """Sizes of one case: tokens, samples, query heads, key/value heads, head dim."""

    n: int = 111
    batch: int = 2
    heads: int = 4
    kv_heads: int = 2
    dim: int = 32

    def __str__(self) -> str:
        return f"n{self.n}-b{self.batch}-h{self.heads}/{self.kv_heads}-d{self.dim}"


# Odd lengths; one sample and two; query groups of 1, 2 and 8; head dims 32, 64 and 128.
SHAPES = (Shape(63, 1, 2, 2, 32), Shape(111, 2, 4, 2, 64), Shape(1000, 1, 8, 1, 32), Shape(111, 1, 2, 1, 128))


@dataclass(frozen=True)
class Variant:
    name: str

    @cached_property
    def choice(self) -> AttentionChoice:
        return AttentionChoice.of(
            OmegaConf.to_container(OmegaConf.load(conf_dir() / "attention" / f"{self.name}.yaml"))
        )

    @property
    def core_class(self) -> type[AttentionCore]:
        return self.choice.core

    def core(
        self,
        shape: Shape,
        *,
        causal: bool = True,
        full: bool = False,
        dtype: torch.dtype = torch.float32,
        **fields: Any,
    ) -> AttentionCore:
        """The small core in evaluation mode, its parameters drawn from a fixed seed."""
        torch.manual_seed(0)
        config = replace(self.choice.config.small(), **fields)
        embed = shape.heads * shape.dim
        of = AttentionShape(shape.heads, shape.kv_heads, shape.dim, embed, causal=causal, context=shape.n)
        return self.core_class(config.full() if full else config, of).to(dtype).eval()

    def directions(self) -> list[bool]:
        """Values of `causal` that the core declares."""
        return [True] * self.core_class.supports_causal + [False] * self.core_class.supports_bidirectional


def variants() -> list[Variant]:
    return [Variant(path.stem) for path in sorted((conf_dir() / "attention").glob("*.yaml"))]


@dataclass(frozen=True)
class Inputs:
    q: Tensor  # [B, H, N, D]
    k: Tensor  # [B, Hkv, N, D]
    v: Tensor
    x: Tensor  # [B, N, E]

    @classmethod
    def random(cls, shape: Shape, *, dtype: torch.dtype = torch.float32, seed: int = 1) -> Inputs:
        g = torch.Generator().manual_seed(seed)

        def normal(*size: int) -> Tensor:
            return torch.randn(*size, generator=g, dtype=torch.float64).to(dtype)

        b, n, d = shape.batch, shape.n, shape.dim
        q, k, v = (normal(b, heads, n, d) for heads in (shape.heads, shape.kv_heads, shape.kv_heads))
        return cls(q, k, v, normal(b, n, shape.heads * d))

    def tensors(self) -> tuple[Tensor, ...]:
        return self.q, self.k, self.v, self.x

    def map(self, function: Callable[[Tensor], Tensor]) -> Inputs:
        return Inputs(*(function(t) for t in self.tensors()))

    def tokens(self, start: int, stop: int) -> Inputs:
        return Inputs(*(t[:, :, start:stop] for t in self.tensors()[:3]), self.x[:, start:stop])

    def perturbed(self, start: int, stop: int) -> Inputs:
        """Other values, much larger ones, for tokens start … stop − 1."""
        other = self.map(torch.clone)
        for t in (*(t.transpose(1, 2) for t in other.tensors()[:3]), other.x):
            t[:, start:stop] = 7 * t[:, start:stop].flip(0).roll(1, -1) + 3
        return other

    def leaves(self) -> Inputs:
        return self.map(lambda t: t.detach().clone().requires_grad_())


def attend(core: AttentionCore, given: Inputs, documents: Documents = None, *, seed: int = 5) -> Tensor:
    """The core over whole sequences: [B, H, N, D]."""
    return core(*given.tensors()[:3], x=given.x, ctx=context(given.x.shape[1], documents, seed=seed)).out


def context(n: int, documents: Documents = None, *, seed: int = 5, q_start: int = 0, states=None) -> SequenceContext:
    positions = torch.arange(n)[None]
    if documents is not None:
        positions = positions - document_starts(documents)
    return SequenceContext(
        positions[:, q_start:], documents, q_start=q_start, seed=seed, states=states, rotary=ROTARY.rotated
    )


def documents_at(n: int, *borders: int, batch: int = 1) -> Tensor:
    """Document ids int32 [batch, n] of documents that start at 0 and at each border."""
    ids = torch.zeros(batch, n, dtype=torch.int32)
    for border in borders:
        ids[:, border:] += 1
    return ids


def dense_attention(given: Inputs, causal: bool, allowed: Tensor | None = None) -> Tensor:
    """Softmax attention written out. allowed: bool [B|1, H'|1, N, N]; a row without a key gives 0."""
    q, heads = given.q, given.q.shape[1]
    k, v = (t.repeat_interleave(heads // t.shape[1], 1) for t in (given.k, given.v))
    mask = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool)
    mask = mask.tril() if causal else mask
    if allowed is not None:
        mask = mask & allowed.repeat_interleave(heads // allowed.shape[1], 1)
    scores = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).masked_fill(~mask, float("-inf"))
    return torch.nan_to_num(scores.softmax(-1)) @ v


def gradients(out: Tensor, *of: Tensor) -> list[Tensor]:
    """Gradients of a weighted sum of `out`; zeros for what it does not depend on."""
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64).to(out.dtype)
    found = torch.autograd.grad((out * weights).sum(), of, allow_unused=True)
    return [torch.zeros_like(t) if g is None else g for g, t in zip(found, of, strict=True)]


def close(found: Tensor, expected: Tensor, tolerance: float, what: str) -> None:
    error = float((found.detach().double() - expected.detach().double()).abs().max())
    size = max(1.0, float(expected.detach().abs().max()))
    assert error <= tolerance * size, f"{what} is off by {error:.3g}, allowed {tolerance * size:.3g}"


# ---- the properties; each takes a variant and raises AssertionError -------------------------------------------------


def equals_the_reference(variant: Variant, shape: Shape) -> None:
    """Forward and all gradients, parameters included, equal the same core on the slow backend; fp32 ≤ 1e-5.

    Where the layout is known before the input, also equal to a softmax written out under the layout's own mask.
    """
    for causal in variant.directions():
        core, given = variant.core(shape, causal=causal), Inputs.random(shape).leaves()
        parameters = list(core.parameters())
        out = attend(core, given)
        grads = gradients(out, *given.tensors(), *parameters)
        with use_backend("reference"):
            slow = attend(core, given)
        close(out, slow, 1e-5, "the output")
        for i, (grad, right) in enumerate(zip(grads, gradients(slow, *given.tensors(), *parameters), strict=True)):
            close(grad, right, 1e-5, f"gradient {i} (q, k, v, x, parameters)")
        written_out = _under_its_layout(core, given, causal)
        if written_out is not None:
            close(out, written_out, 1e-5, "the output against a softmax under the layout's mask")
            for name, grad, right in zip("qkv", grads, gradients(written_out, *given.tensors()[:3]), strict=False):
                close(grad, right, 1e-5, f"the gradient of {name} against a softmax under the layout's mask")


def _under_its_layout(core: AttentionCore, given: Inputs, causal: bool) -> Tensor | None:
    n = given.q.shape[2]
    try:
        layout = core.layout(n, context(n), torch.device("cpu"))
    except NotImplementedError:
        return None  # chosen from the input
    if layout.num_keys != n:
        return None  # keys beside the tokens
    return dense_attention(given, causal, layout.to_dense())


def passes_gradcheck(variant: Variant) -> None:
    """fp64 finite differences of the output by q, k, v on a tiny size."""
    shape = Shape(21, 1, 2, 1, 4)
    core, given = variant.core(shape, dtype=torch.float64), Inputs.random(shape, dtype=torch.float64).leaves()

    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attend(core, Inputs(q, k, v, given.x.detach()))

    torch.autograd.gradcheck(function, given.tensors()[:3], atol=1e-6, rtol=1e-5, fast_mode=True)


def rounds_like_dense_in_bf16(variant: Variant) -> None:
    """bf16 errors of output and gradients against fp64 are at most twice those of dense SDPA in bf16."""
    shape = Shape(111, 1, 4, 2, 64)
    rounded = Inputs.random(shape, dtype=torch.bfloat16)
    exact = rounded.map(torch.Tensor.double)

    def errors(function: Callable[[Inputs], Tensor], fine: Callable[[Inputs], Tensor]) -> list[float]:
        results = []
        for attention, given in ((function, rounded.leaves()), (fine, exact.leaves())):
            out = attention(given)
            results.append([out, *gradients(out, *given.tensors()[:3])])
        return [float(((a.double() - b).norm() / b.norm()).detach()) for a, b in zip(*results, strict=True)]

    core, fine = (variant.core(shape, dtype=dtype) for dtype in (torch.bfloat16, torch.float64))
    fine.load_state_dict(core.state_dict())  # the weights as they are rounded, or another choice would be right
    ours = errors(lambda given: attend(core, given), lambda given: attend(fine, given))

    def sdpa(given: Inputs) -> Tensor:
        return torch.nn.functional.scaled_dot_product_attention(
            given.q, given.k, given.v, is_causal=True, enable_gqa=True
        )

    for name, error, allowed in zip(("output", "q", "k", "v"), ours, errors(sdpa, sdpa), strict=True):
        assert error <= 2 * allowed + 2e-3, f"{name}: bf16 error {error:.3g}, dense SDPA's {allowed:.3g}"


def averages_values(variant: Variant, shape: Shape) -> None:
    """v = 1 gives 1 on every row with a key (in causal attention every row has its own token)."""
    for causal in variant.directions():
        given = replace(Inputs.random(shape), v=torch.ones(shape.batch, shape.kv_heads, shape.n, shape.dim))
        out = attend(variant.core(shape, causal=causal), given)
        close(out, torch.ones_like(out), 1e-5, "a mean of ones")


def never_sees_the_future(variant: Variant) -> None:
    """Perturbing the tokens from t on changes nothing before t, whether t is on a block border or not."""
    shape = Shape(111, 2, 4, 2, 32)
    core, given = variant.core(shape, dtype=torch.float64), Inputs.random(shape, dtype=torch.float64)
    out = attend(core, given)
    for t in (1, 15, 16, 17, 47, 64, 95, 110):
        changed = attend(core, given.perturbed(t, shape.n))
        close(changed[:, :, :t], out[:, :, :t], 1e-12, f"what comes before token {t}")
        assert not torch.allclose(changed[:, :, t:], out[:, :, t:]), "the perturbation has no effect at all"


def never_sees_the_future_while_training(variant: Variant) -> None:
    """The same in training mode, gradients too: no output before t depends on q, k, v or x from t on."""
    shape = Shape(63, 1, 4, 2, 32)
    core, given = variant.core(shape, dtype=torch.float64).train(), Inputs.random(shape, dtype=torch.float64).leaves()
    for t in (16, 33, 62):
        for name, grad in zip("qkv", gradients(attend(core, given)[:, :, :t], *given.tensors()[:3]), strict=True):
            close(grad[:, :, t:], torch.zeros_like(grad[:, :, t:]), 0.0, f"the gradient of later {name}")
        (grad_x,) = gradients(attend(core, given)[:, :, :t], given.x)
        close(grad_x[:, t:], torch.zeros_like(grad_x[:, t:]), 0.0, "the gradient of later x")


def keeps_documents_apart(variant: Variant) -> None:
    """Perturbing one document changes nothing in the others, wherever the borders fall."""
    shape = Shape(111, 2, 4, 2, 32)
    given = Inputs.random(shape, dtype=torch.float64)
    for causal in variant.directions():
        core = variant.core(shape, causal=causal, dtype=torch.float64)
        for borders in ((1,), (16, 48), (37, 38, 90), (63,), (110,)):
            documents = documents_at(shape.n, *borders, batch=shape.batch)
            out = attend(core, given, documents)
            edges = (0, *borders, shape.n)
            for start, stop in itertools.pairwise(edges):
                changed = attend(core, given.perturbed(start, stop), documents)
                outside = torch.ones(shape.n, dtype=torch.bool)
                outside[start:stop] = False
                close(changed[:, :, outside], out[:, :, outside], 1e-12, f"documents beside {start}…{stop}")


def packs_like_separate_documents(variant: Variant) -> None:
    """Documents that start on multiples of every block, segment and stride in use give what each gives alone.

    The samples of a batch are packed differently, so that layouts per sample are used.
    """
    shape = Shape(256 + 77, 2, 4, 2, 32)
    documents = torch.cat([documents_at(shape.n, 128, 256), documents_at(shape.n, 256)])
    given = Inputs.random(shape, dtype=torch.float64)
    for causal in variant.directions():
        core = variant.core(shape, causal=causal, dtype=torch.float64)
        packed = attend(core, given, documents)
        for sample, edges in enumerate(((0, 128, 256, shape.n), (0, 256, shape.n))):
            for start, stop in itertools.pairwise(edges):
                alone = attend(core, given.tokens(start, stop).map(lambda t, s=sample: t[s : s + 1]))
                close(packed[sample, :, start:stop], alone[0], 1e-9, f"sample {sample}, document {start}…{stop}")


def is_dense_at_full_budget(variant: Variant, shape: Shape) -> None:
    """A budget of everything equals dense attention, forward and gradients."""
    for causal in variant.directions():
        given = Inputs.random(shape).leaves()
        out = attend(variant.core(shape, causal=causal, full=True), given)
        right = dense_attention(given, causal)
        close(out, right, 1e-5, "the output")
        found, expected = (gradients(result, *given.tensors()[:3]) for result in (out, right))
        for name, grad, dense in zip("qkv", found, expected, strict=True):
            close(grad, dense, 1e-5, f"the gradient of {name}")


def decodes_token_by_token(variant: Variant) -> None:
    """A prompt, then one token at a time (and a few at once) with the keys so far, equals the full forward."""
    shape = Shape(75, 2, 4, 2, 32)
    core, given = variant.core(shape, dtype=torch.float64), Inputs.random(shape, dtype=torch.float64)
    for documents in (None, documents_at(shape.n, 40, batch=2)):
        whole, states, pieces = attend(core, given, documents), {core.shape.layer: {}}, []
        for start, stop in _steps(shape.n):
            ctx = context(stop, None if documents is None else documents[:, :stop], q_start=start, states=states)
            new, held = given.tokens(start, stop), given.tokens(0, stop)
            pieces.append(core(new.q, held.k, held.v, x=new.x, ctx=ctx).out)
        close(torch.cat(pieces, 2), whole, 1e-9, "decoding")


def decodes_from_a_cache(variant: Variant, shape: Shape) -> None:
    """The same with a cache that forgets what no later query reads, ten windows long, documents packed or not.

    The output is that of the full forward, and after every pass the cache holds what it was told to and no more.
    """
    core, given = variant.core(shape, dtype=torch.float64), Inputs.random(shape, dtype=torch.float64)
    packed = torch.cat([documents_at(shape.n, 11, 50), documents_at(shape.n, 37)])[: shape.batch]
    for documents in (None, packed):
        key_expiry = core.key_expiry(shape.n, documents)
        cache, pieces = KVCache(key_expiry), []
        for start, stop in _steps(shape.n):
            new = given.tokens(start, stop)
            k, v, cached_block_ids = cache.append(new.k, new.v)
            of_tokens = None if documents is None else documents[:, :stop]
            ctx = context(stop, of_tokens, q_start=start, states={core.shape.layer: cache.state})
            pieces.append(core(new.q, k, v, x=new.x, ctx=replace(ctx, cached_block_ids=cached_block_ids)).out)
            if key_expiry is not None:
                row, block = start // key_expiry.block, key_expiry.block
                wanted = [j for j in range(-(-stop // block)) if j >= row or key_expiry.last_row[j] >= row]
                assert k.shape[2] == sum(min(block, stop - j * block) for j in wanted)
        close(torch.cat(pieces, 2), attend(core, given, documents), 1e-9, "decoding")


def generates_like_the_full_forward(variant: Variant) -> None:
    """Logits of a model's cached decoding equal those of its full forward, fp32 ≤ 1e-4, after packed prompts too."""
    model, n = _model(variant), 150
    tokens = torch.randint(0, model.vocab_size, (2, n), generator=torch.Generator().manual_seed(3))
    for documents in (None, torch.cat([documents_at(n, 40), documents_at(n, 9, 30)])):
        caches, pieces = model.caches(n, documents), []
        with torch.no_grad():
            whole = model.logits(model(tokens, context_for(tokens, documents)).hidden)
            for start, stop in _steps(n):
                new, of_tokens = tokens[:, start:stop], None if documents is None else documents[:, :stop]
                hidden = model(new, context_for(new, of_tokens, q_start=start), caches).hidden
                pieces.append(model.logits(hidden))
        close(torch.cat(pieces, 1), whole, 1e-4, "the logits of cached decoding")


def batches_prompts_of_any_lengths(variant: Variant) -> None:
    """Each row of a batch of packed prompts of different lengths gets the tokens that it gets alone."""
    model, draw = _model(variant).double(), torch.Generator().manual_seed(4)
    prompts = [torch.randint(0, model.vocab_size, (length,), generator=draw) for length in (50, 3, 33)]
    documents = [
        documents_at(len(row), *borders)[0] for row, borders in zip(prompts, ((20, 48), (), (16,)), strict=True)
    ]
    together = generate(model, prompts, 12, sampling=GREEDY, documents=documents)
    for row, (alone, of_row) in enumerate(zip(prompts, documents, strict=True)):
        assert generate(model, [alone], 12, sampling=GREEDY, documents=[of_row]) == [together[row]]
        tokens = torch.cat([alone, torch.tensor(together[row])])[None]
        ids = torch.cat([of_row, of_row[-1:].expand(12)])[None]
        with torch.no_grad():
            logits = model.logits(model(tokens, context_for(tokens, ids)).hidden)[0]
        assert logits.argmax(-1)[len(alone) - 1 : -1].tolist() == together[row]


def _model(variant: Variant) -> Transformer:
    """Two layers of the variant around a dense one, queries in groups of two."""
    torch.manual_seed(0)
    config = ModelConfig(depth=3, embed_dim=64, heads=4, kv_heads=2, mlp_dim=64, layer_pattern="SDS")
    core = variant.choice.config.small()
    model = Transformer(config, lambda of: variant.core_class(core, of), vocab_size=61, context=150).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(6 if parameter.dim() > 1 else 1)  # so that the attention matters to the logits
    return model


def _steps(n: int) -> Iterator[tuple[int, int]]:
    """A prompt, a few tokens, single ones over several blocks, then one and six by turns."""
    yield 0, 29
    yield 29, 34
    start, counts = 34, itertools.chain([1] * 42, itertools.cycle((6, 1)))
    while start < n:
        stop = min(start + next(counts), n)
        yield start, stop
        start = stop


def chooses_again_what_it_chose(variant: Variant) -> None:
    """Two runs and a recompute under activation checkpointing give the same bits, in training with dropout too."""
    shape = Shape(111, 2, 4, 2, 32)
    for rate in (0.0, 0.3):
        core, given = variant.core(shape, dropout=rate).train(), Inputs.random(shape).leaves()
        plain = attend(core, given)
        again = checkpoint(lambda g=given, c=core: attend(c, g), use_reentrant=False)
        assert torch.equal(plain, again)
        for first, second in zip(gradients(plain, *given.tensors()), gradients(again, *given.tensors()), strict=True):
            assert torch.equal(first, second)
        if rate:
            assert not torch.allclose(plain, attend(core, given, seed=6)), "dropout does not depend on the seed"
            assert not torch.allclose(plain, attend(core.eval(), given)), "dropout does nothing"


def trains_the_same_recomputed_layer_by_layer(variant: Variant) -> None:
    """With activation checkpointing, in pieces: all parameters have the same gradients, of the core's own loss too."""
    for fields in ({"dense_steps": 0}, {"dense_steps": -1}) if hasattr(variant.choice.config, "dense_steps") else ({},):
        core, found = replace(variant.choice.config.small(), **fields), []
        tokens = torch.arange(2 * 111).view(2, 111) ** 2 % 61
        for recompute in (False, True):
            torch.manual_seed(0)
            config = ModelConfig(
                depth=2, embed_dim=32, heads=4, kv_heads=2, mlp_dim=32, activation_checkpointing=recompute, chunk=50
            )
            model = Transformer(config, lambda of, c=core: variant.core_class(c, of), vocab_size=61).double().train()
            output = model(tokens, context_for(tokens))
            loss = model.loss_sum(output.hidden, tokens.roll(1, 1))
            (loss if output.aux_loss is None else loss + 100 * output.aux_loss).backward()
            found.append({name: p.grad for name, p in model.named_parameters()} | output.stats)
        assert found[0].keys() == found[1].keys()
        for name, expected in found[0].items():
            assert expected is not None and found[1][name] is not None, f"{name} has no gradient"
            close(found[1][name], expected, 1e-6, name)


def compiles(variant: Variant) -> None:
    """torch.compile (traced by AOTAutograd, run eagerly) gives what eager gives."""
    shape = Shape(63, 1, 4, 2, 32)
    core, given = variant.core(shape), Inputs.random(shape).leaves()
    torch._dynamo.reset()
    compiled = torch.compile(core, backend="aot_eager")
    out, right = attend(compiled, given), attend(core, given)
    close(out, right, 1e-6, "the output")
    for grad, expected in zip(gradients(out, *given.tensors()), gradients(right, *given.tensors()), strict=True):
        close(grad, expected, 1e-6, "a gradient")


def grows_linearly(variant: Variant) -> None:
    """Doubling N at most doubles the largest tensor that forward and backward make, and a bit; no N × N tensor."""
    largest = []
    for n in (1024, 2048):
        shape = Shape(n, 1, 2, 1, 16)
        core, given = variant.core(replace(shape, n=1024)), Inputs.random(shape).leaves()
        with _Largest() as watch:
            gradients(attend(core, given), *given.tensors())
        largest.append(watch.largest)
        assert watch.largest < n * n / 4
    assert largest[1] <= 2.3 * largest[0], f"the largest tensor grows from {largest[0]} to {largest[1]} elements"


class _Largest(TorchDispatchMode):
    largest = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        # A view of an existing tensor (an expanded mask, say) takes no memory: storage counts.
        made = [leaf.untyped_storage().nbytes() // 4 for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        self.largest = max([self.largest, *made])
        return result


def takes_a_batch_of_none(variant: Variant) -> None:
    """No sequences: an empty output of the same shape, empty gradients, in training and in evaluation."""
    shape = Shape(90, 0, 4, 4, 32)
    core = variant.core(shape)
    for training in (True, False):
        given = Inputs.random(shape).leaves()
        out = attend(core.train(training), given)
        assert out.shape == given.q.shape
        assert all(
            grad.shape == x.shape for grad, x in zip(gradients(out, *given.tensors()), given.tensors(), strict=True)
        )


def reports_its_density(variant: Variant) -> None:
    """stats["density"] is there, a share of dense (repeats and summaries may push it above 1), and no gradient."""
    shape = Shape(1000, 1, 4, 2, 32)
    given = Inputs.random(shape)
    core = variant.core(shape)
    stats = core(*given.tensors()[:3], x=given.x, ctx=context(shape.n)).stats
    density = stats["density"]
    assert not density.requires_grad and 0 < float(density) <= 2
    try:
        layout = core.layout(shape.n, context(shape.n), torch.device("cpu"))
    except NotImplementedError:
        return
    assert abs(layout.density() - float(density)) < 1e-6


def density_is_a_target_or_refused(variant: Variant) -> None:
    """Another `attention.density` changes what is read or the loss that teaches it, or the field is refused by name."""
    shape = Shape(1000, 1, 4, 2, 32)
    given, found = Inputs.random(shape), []
    for density in (0.3, 0.6):
        try:
            core = variant.core(shape, density=density).train()
        except ValueError as error:
            assert "density" in str(error) and str(density) in str(error)
            return
        result = core(*given.tensors()[:3], x=given.x, ctx=context(shape.n))
        found.append((result.stats["density"], 0.0 if result.aux_loss is None else result.aux_loss.detach()))
    assert found[0] != found[1], "attention.density changes nothing"


def refuses_what_it_declares_it_cannot(variant: Variant) -> None:
    """A capability that is declared missing is an error at construction that names the alternative."""
    declared = {
        "causal only": (variant.core_class.supports_bidirectional, Shape(), False),
        "bidirectional only": (variant.core_class.supports_causal, Shape(), True),
        "as many key/value heads": (variant.core_class.supports_gqa, Shape(heads=4, kv_heads=2), True),
    }
    for sentence, (supported, shape, causal) in declared.items():
        try:
            variant.core(shape, causal=causal)
        except ValueError as error:
            assert not supported and sentence in str(error)
        else:
            assert supported
