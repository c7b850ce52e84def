"""How much memory a training step takes, from the config alone: a formula, and settings that would take less.

On the busiest rank, with P parameters, T = batch_size · (its share of the context) tokens per micro-batch, L layers,
E = embed_dim, A = heads · head_dim, K = kv_heads · head_dim, M = mlp_dim, V the vocabulary, C = min(T, model.chunk);
s and c are the bytes of a number in the residual stream and in what matrix products give (4 and 4 in fp32, 4 and 2
under bf16-mixed, 2 and 2 under bf16-true), w those of a parameter:

    weights      w P, and under bf16-mixed 2 P for autocast's copies (none where products stay in fp32, see below)
    gradients    w P, twice that under DDP, whose buckets hold them once more
    optimizer    what its state holds after one step, counted on tensors without memory
    activations  kept for the backward pass, L T (attention + MLP) + T E (8 + c), where
                 attention = 8 E + r E c + 8 q (A + K) + b (3 A + 2 K) c + 4 heads
                 MLP       = 8 E + r' E c + 3 M c
                 A norm keeps its input and the normed one in fp32, each product its input (under autocast a copy each:
                 r = 3, r' = 2, else 1), the norms of queries and keys only with qk_norm (q = 1, else 0), the kernel q,
                 k, v and the output, which comes once more in the order of tokens, for b branches (dilated only).
                 Where products stay in fp32 under bf16-mixed (kernels/compute_dtype.py), c is 2 for what the kernel
                 takes and gives and 4 elsewhere, and r = r' = 1.
                 model.activation_checkpointing leaves E s of the layer, with dropout of each half; more than one
                 chunk of tokens leaves as much of the MLP. With offload only the last layer leaves it here.
    working      what exists for one layer or chunk at a time, the larger of
                 the backward pass of a layer  T (2 E s + 3 (A + K) c) + C (3 M + 2 E) c, with what is recomputed of it:
                                               attention for T tokens, the MLP for C;
                                               with model.activation_checkpointing but no dropout only
                                               T (E s + (4 A + 4 K) c + 24 K) + C (attention + MLP + (3 M + 2 E) c),
                                               24 K of it what the native kernel holds of keys and values in fp32,
                                               less the T E (8 + c), which are gone by then
                 the loss of a chunk           12 V tokens + 4 V E
                 Keys and values of other ranks come on top, of the whole context for key_exchange=gather, else as many
                 as its own; two layers at full size where parameters are sharded (fsdp); and with offload T E s for
                 the input of the layer at work, beside which the next one comes.
    saving       on a CPU with checkpoint.background, a copy of weights and optimizer state
    process      on a CPU, what libraries take beside their code once they are used: 50 MiB

and beside that, in the main memory of a GPU's machine and not in the sum:

    main_memory  with model.activation_checkpointing=offload what every layer but the last leaves, each in a pinned
                 block of a power of two bytes, as PyTorch allocates it

Weights, gradients, optimizer state and their copy are divided by the ranks under fsdp. The text and what the imports
hold are not counted, nor what a core keeps beside q, k, v and the output: for the summaries of nsa and hca a fifth of
the activations at a context of 512, for csa's two fifths. Fused norms (CUDA) keep 4 E and 4 (A + K) less.
Measured peaks are in tests/training/preflight/test_preflight_estimate.py: it is right within a factor of 1.5.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import NamedTuple

import torch

from lightsparse.attention.dilated import DilatedConfig
from lightsparse.config.context_split import context_split
from lightsparse.config.schema import Config
from lightsparse.config.targets import ConfigError
from lightsparse.distributed.strategy_config import Context, ContextRanks, Replicas, Single
from lightsparse.kernels.compute_dtype import compute_dtype
from lightsparse.models.transformer import Transformer
from lightsparse.optim.optimizers import parameter_groups
from lightsparse.training.preflight.check import meta_model
from lightsparse.utils.text import size

GIB = 2**30
_PROCESS = 50 * 2**20  # bytes


@dataclass(frozen=True)
class Estimate:
    """Bytes on the busiest rank at the peak of a training step, by what they are for."""

    weights: float
    gradients: float
    optimizer: float
    activations: float
    working: float
    saving: float
    process: float
    main_memory: float = 0  # beside the device's

    @property
    def parts(self) -> dict[str, float]:
        """What the device holds, by name."""
        return {field.name: getattr(self, field.name) for field in fields(self) if field.name != "main_memory"}

    @property
    def total(self) -> float:
        """Bytes on the device."""
        return sum(self.parts.values())

    def __str__(self) -> str:
        parts = ", ".join(f"{name} {size(taken)}" for name, taken in self.parts.items())
        beside = f" and {size(self.main_memory)} of main memory" if self.main_memory else ""
        return f"{size(self.total)} ({parts}){beside}"


def estimate(config: Config) -> Estimate:
    """The formula above, for a config that `config.parse` accepts.

    Raises ConfigError where the attention cannot take the shape or the split over ranks.
    """
    model = meta_model(config)
    split = context_split(config, model)
    tokens = config.data.context if split is None else max(split.counts)
    return _formula(config, _sizes(config, model), config.data.batch_size * tokens)


class _Sizes(NamedTuple):
    """What follows from model and optimizer alone."""

    parameters: int
    of_a_layer: int  # parameters
    optimizer: int  # bytes
    vocabulary: int


def _sizes(config: Config, model: Transformer) -> _Sizes:
    whole, layer = (sum(parameter.numel() for parameter in part.parameters()) for part in (model, model.layers[0]))
    return _Sizes(whole, layer, optimizer_bytes(config, model), model.vocab_size)


def _formula(config: Config, of: _Sizes, tokens: int) -> Estimate:
    """`tokens` of a micro-batch on the busiest rank."""
    mixed = config.precision == "bf16-mixed" and not _products_stay_fp32(config)
    weight_bytes = 2 if config.precision == "bf16-true" else 4
    shards = config.ranks if config.strategy.sharded else 1
    kept, working, main_memory = _activations(config, of.vocabulary, tokens)
    if config.strategy.sharded:
        working += 2 * 2 * weight_bytes * of.of_a_layer
    buckets = 2 if isinstance(config.strategy, Replicas) and config.ranks > 1 else 1
    on_cpu = not torch.cuda.is_available()
    optimizer = of.optimizer * weight_bytes / 4 / shards
    copied = weight_bytes * of.parameters / shards + optimizer
    return Estimate(
        weights=(weight_bytes + 2 * mixed) * of.parameters / shards,
        gradients=buckets * weight_bytes * of.parameters / shards,
        optimizer=optimizer,
        activations=kept,
        working=working,
        saving=copied if on_cpu and config.checkpoint.background else 0,
        process=_PROCESS if on_cpu else 0,
        main_memory=main_memory,
    )


def optimizer_bytes(config: Config, model: Transformer) -> int:
    """Bytes of the optimizer's state over fp32 parameters on the meta device: one step there takes no memory."""
    optimizer = config.optimizer.build(parameter_groups(model, model.layers))
    for parameter in model.parameters():
        parameter.grad = torch.empty_like(parameter)
    optimizer.step()
    states = (value for state in optimizer.state.values() for value in state.values())
    return sum(value.numel() * value.element_size() for value in states if isinstance(value, torch.Tensor))


def _activations(config: Config, vocabulary: int, tokens: int) -> tuple[float, float, float]:
    """(kept, working, main memory) in bytes, as in the formula."""
    embed, heads, kv_heads, head_dim, mlp = config.model.widths
    wide, narrow = heads * head_dim, kv_heads * head_dim
    chunk = config.model.chunk
    fp32 = _products_stay_fp32(config)
    mixed, true = config.precision == "bf16-mixed" and not fp32, config.precision == "bf16-true"
    s, c = (2 if true else 4), (2 if mixed or true else 4)
    kernel = 2 if fp32 else c
    chunked, recomputed = tokens > chunk, bool(config.model.activation_checkpointing)
    offload = config.model.activation_checkpointing == "offload"
    in_pieces = recomputed and not config.model.dropout
    at_once = min(tokens, chunk)

    own = (3 * wide + 2 * narrow) * (_dilated_share(config) or 1.0)
    attention: float = 8 * embed + embed * (3 if mixed else 1) * c + 8 * config.model.qk_norm * (wide + narrow)
    attention += own * kernel + (c - kernel) * wide + 4 * heads
    feed_forward = 8 * embed + embed * (2 if mixed else 1) * c + 3 * mlp * c
    layer = (embed * s if recomputed else attention) + (embed * s if recomputed or chunked else feed_forward)
    layer = embed * s if in_pieces else layer
    here = 1 if offload else config.model.depth  # layers
    kept: float = here * tokens * layer + tokens * embed * (8 + c)

    backward: float = tokens * (2 * embed * s + 3 * (wide + narrow) * c) + at_once * (3 * mlp + 2 * embed) * c
    backward += tokens * attention * recomputed + at_once * feed_forward * (recomputed or chunked)
    if in_pieces:
        backward = tokens * (embed * s + 4 * (wide + narrow) * kernel * (_dilated_share(config) or 1.0) + 24 * narrow)
        backward += at_once * (attention + feed_forward + (3 * mlp + 2 * embed) * c)
        backward = max(0.0, backward - tokens * embed * (8 + c))  # what the loss has kept is gone by then
    away = 0.0
    if offload:
        stream = tokens * embed * s
        backward += stream
        away = (config.model.depth - 1) * layer / (embed * s) * 2 ** math.ceil(math.log2(stream))
    if isinstance(config.strategy, ContextRanks) and config.grid.context > 1:
        foreign = config.data.context * config.data.batch_size if config.strategy.key_exchange == "gather" else tokens
        backward += 2 * foreign * narrow * c
    loss_chunk = min(tokens, chunk, max(1, chunk * mlp // vocabulary))
    loss = 12 * loss_chunk * vocabulary + 4 * vocabulary * embed
    return kept, max(backward, loss), away


def _products_stay_fp32(config: Config) -> bool:
    """Whether autocast's matrix products run in fp32 on this machine."""
    if config.precision != "bf16-mixed" or torch.cuda.is_available():
        return False
    return compute_dtype(torch.bfloat16, torch.device("cpu")) is torch.float32


def _dilated_share(config: Config) -> float | None:
    """Branches of a dilated attention, each as much of one as it keeps tokens; None for other variants."""
    fields_ = config.attention.config
    return sum(1 / rate for rate in fields_.dilation_rates) if isinstance(fields_, DilatedConfig) else None


# ---- settings that take less ------------------------------------------------------------------------------------

_Setting = tuple[str, Config]  # as on the command line, and the config under it


def remedies(
    config: Config, budget: float, *, several_devices: bool, main_memory: float = 0
) -> list[tuple[str, Estimate]]:
    """Three settings under which the run would take at most `budget` bytes per rank, with what it would take.

    First those that change nothing but time, then those that train something else, then several together. Fewer than
    three where even these do not help.
    several_devices  whether this machine has several GPUs: then more ranks share a sequence there, else more machines
    main_memory      bytes per rank that are free beside the device's, for what layers keep; 0 on a CPU, which has none
    """
    room = _Room(budget, main_memory)
    over_ranks = partial(_over_ranks, field="devices" if several_devices else "num_nodes")
    last = (over_ranks, _shorter) if several_devices else (_shorter, over_ranks)
    ways = (partial(_recomputed, offload=main_memory > 0), _in_smaller_batches, *last, _less_deep)
    of = _sizes(config, meta_model(config))
    fitting: list[tuple[str, Estimate]] = []
    for way in ways:
        if len(fitting) < 3:
            fitting += _first_that_fits(way(config), room, None if way is _less_deep else of)
    if len(fitting) < 3:
        words, least = "", config
        for way in ways[:2]:
            for more, smaller in list(way(least))[-1:]:
                words, least = f"{words}{more} ", smaller
        if words:
            for way in ways[2:]:
                together = ((words + more, smaller) for more, smaller in way(least))
                fitting += _first_that_fits(together, room, None if way is _less_deep else of)
    return fitting[:3]


class _Room(NamedTuple):
    """Bytes per rank that are there."""

    device: float
    main_memory: float

    def holds(self, needed: Estimate) -> bool:
        return needed.total <= self.device and needed.main_memory <= self.main_memory


def _first_that_fits(settings: Iterable[_Setting], room: _Room, of: _Sizes | None) -> list[tuple[str, Estimate]]:
    """The first that takes no more than there is, alone in a list, or none.

    of  sizes where all settings share them: then only what fits by an even split of the tokens is looked at closely
    """
    for words, config in settings:
        tokens = config.data.batch_size * -(-config.data.context // config.grid.context)
        if of is not None and not room.holds(_formula(config, of, tokens)):
            continue
        try:
            needed = estimate(config)
        except ConfigError:  # the attention does not take this length, or so many ranks
            continue
        if room.holds(needed):
            return [(words, needed)]
    return []


def _recomputed(config: Config, offload: bool) -> Iterator[_Setting]:
    """First with what layers keep on the device; then, where that is possible, in main memory."""
    before = config.model.activation_checkpointing
    if not before:
        model = replace(config.model, activation_checkpointing=True)
        yield "model.activation_checkpointing=true", replace(config, model=model)
    if offload and before != "offload" and config.model.depth > 1 and not config.compile:
        model = replace(config.model, activation_checkpointing="offload")
        yield "model.activation_checkpointing=offload", replace(config, model=model)


def _in_smaller_batches(config: Config) -> Iterator[_Setting]:
    """The same samples per optimizer step in more micro-batches."""
    samples = config.data.batch_size
    for batch in range(samples - 1, 0, -1):
        if samples % batch == 0:
            steps = config.accumulate_grad_batches * samples // batch
            words, data, trainer = f"data.batch_size={batch}", replace(config.data, batch_size=batch), config.trainer
            if trainer.global_batch is None:
                words += f" trainer.accumulate_grad_batches={steps}"
                trainer = replace(trainer, accumulate_grad_batches=steps)
            yield words, replace(config, data=data, trainer=trainer)


def _over_ranks(config: Config, field: str) -> Iterator[_Setting]:
    if not isinstance(config.strategy, Single | ContextRanks):
        return  # a choice of the user's for the parameters
    strategy, words = config.strategy, ""
    if isinstance(strategy, Single):
        strategy, words = Context(), "strategy=context "
    elif strategy.context_parallel_size is not None and config.trainer.global_batch is not None:
        return  # fewer ranks would read different samples
    elif strategy.context_parallel_size is not None:
        strategy, words = replace(strategy, context_parallel_size=None), "strategy.context_parallel_size=null "
    ranks = getattr(config.trainer, field)
    for factor in (2, 4, 8, 16, 32, 64):
        trainer = replace(config.trainer, **{field: factor * ranks})
        yield f"{words}trainer.{field}={factor * ranks}", replace(config, strategy=strategy, trainer=trainer)


def _shorter(config: Config) -> Iterator[_Setting]:
    context = config.data.context // 2
    while context >= 64:
        yield f"data.context={context}", replace(config, data=replace(config.data, context=context))
        context //= 2


def _less_deep(config: Config) -> Iterator[_Setting]:
    depth = config.model.depth // 2
    least = 2 if config.model.activation_checkpointing == "offload" else 1  # one layer has nothing to move
    while depth >= max(least, len(config.model.layer_pattern)):
        yield f"model.depth={depth}", replace(config, model=replace(config.model, depth=depth))
        depth //= 2
