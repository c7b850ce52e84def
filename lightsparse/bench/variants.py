"""Attention variants as `bench kernels --variants` runs them: built from their YAML for a shape, in training mode."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from omegaconf import OmegaConf
from torch import Tensor

from lightsparse.attention.core import AttentionConfig, AttentionCore, AttentionResult, AttentionShape, SequenceContext
from lightsparse.bench.verify import Inputs, inputs
from lightsparse.config.build import AttentionChoice
from lightsparse.config.compose import conf_dir

SPARSE = 0.2  # share of dense tiles: a variant that is denser than this at a length is also asked for this
# A grid of few blocks reaches few densities within the 2% that cores ask for: these shares of the wanted one are tried.
_NEARBY = (1.0, 0.98, 0.94, 0.9, 0.86, 0.82)
_ABOVE = 1.25  # times the wanted density: a row beyond that would not be about it


def chosen(names: Sequence[str]) -> dict[str, AttentionChoice]:
    """The YAMLs of conf/attention/ by name, in that order; "all" stands for every one, "learned" for those that choose.

    Raises ValueError for a name that has no YAML.
    """
    files = {path.stem: path for path in sorted((conf_dir() / "attention").glob("*.yaml"))}
    groups = ("all", "learned")
    unknown = [name for name in names if name not in groups and name not in files]
    if unknown:
        raise ValueError(f"--variants names {unknown[0]!r}; choose all, learned, or any of {', '.join(files)}")
    wanted = list(files) if set(groups) & set(names) else list(dict.fromkeys(names))
    found = {name: AttentionChoice.of(OmegaConf.to_container(OmegaConf.load(files[name]))) for name in wanted}
    if "all" in names:
        return found
    return {name: choice for name, choice in found.items() if name in names or choice.core.selects_from_input}


@dataclass(frozen=True)
class LayerInputs(Inputs):
    """What a layer hands to its attention, and the gradient of the output."""

    x: Tensor  # [B, N, E], the layer's input


def layer_inputs(shape: AttentionShape, seq: int, dtype: torch.dtype) -> LayerInputs:
    """Normal numbers, batch 1, the same on every call."""
    x = torch.randn(1, seq, shape.embed_dim, generator=torch.Generator().manual_seed(2)).to(dtype).requires_grad_()
    return LayerInputs(**vars(inputs(seq, shape.heads, shape.kv_heads, shape.head_dim, dtype)), x=x)


@dataclass(frozen=True, eq=False)
class Contender:
    """A variant at one density."""

    core: AttentionCore
    asked: float | None  # density asked for; None = as the YAML has it
    density: float  # share of dense tiles that it computes


def build(choice: AttentionChoice, shape: AttentionShape, config: AttentionConfig | None = None) -> AttentionCore:
    """The core in training mode, its parameters from a fixed seed. config: in place of the YAML's."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return replace(choice, config=config or choice.config).build(shape).train()


def forward(core: AttentionCore, given: LayerInputs) -> AttentionResult:
    """One pass; with bf16 inputs under autocast over fp32 parameters, as in training."""
    ctx = SequenceContext(torch.arange(given.q.shape[2])[None])
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=given.q.dtype is torch.bfloat16):
        return core(given.q, given.k, given.v, x=given.x, ctx=ctx)


def forward_backward(core: AttentionCore, given: LayerInputs) -> dict[str, Tensor | None]:
    """The output and the gradients by q, k, v, x and the parameters, the auxiliary loss included; None = no path."""
    result = forward(core, given)
    leaves = {"q": given.q, "k": given.k, "v": given.v, "x": given.x, **dict(core.named_parameters())}
    outputs: list[Tensor] = [result.out]
    of_outputs: list[Tensor | None] = [given.grad]
    if result.aux_loss is not None and result.aux_loss.requires_grad:
        outputs.append(result.aux_loss)
        of_outputs.append(None)
    grads = torch.autograd.grad(outputs, tuple(leaves.values()), of_outputs, allow_unused=True)
    named = {f"the gradient of {name}": grad for name, grad in zip(leaves, grads, strict=True)}
    return {"the output": result.out.detach(), **named}


def as_configured(choice: AttentionChoice, shape: AttentionShape, given: LayerInputs) -> Contender:
    """The variant with its YAML's fields. Raises ValueError when it cannot take the shape."""
    core = build(choice, shape)
    return Contender(core, None, _density(core, given))


def at_density(choice: AttentionChoice, asked: float, shape: AttentionShape, given: LayerInputs) -> Contender:
    """The variant solved for a density of at most `asked`; a little above where what it always reads comes on top.

    Raises ValueError, the variant's own where it has one, when it has nothing to solve or reaches nothing near.
    """
    refusal: ValueError | None = None
    found: Contender | None = None
    for share in _NEARBY:
        try:
            core = build(choice, shape, replace(choice.config, density=asked * share))
        except ValueError as error:
            refusal = refusal or error
            continue
        found = Contender(core, asked, _density(core, given))
        if found.density <= asked:
            return found
    if found is None:
        assert refusal is not None
        raise refusal
    if found.density > _ABOVE * asked:
        raise ValueError(f"it computes {found.density:.3g} when its density is set to {asked * share:.3g}")
    return found


@torch.no_grad()
def _density(core: AttentionCore, given: LayerInputs) -> float:
    return float(forward(core, given).stats["density"])
