"""One forward and backward pass, timed, and what it costs by the model's own count."""

from __future__ import annotations

import gc
import time
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from lightsparse.config.schema import Config
from lightsparse.training.module import LanguageModel
from lightsparse.training.preflight.check import fixed_layout
from lightsparse.utils.machine import current_rss, peak_rss


@dataclass(frozen=True)
class Pass:
    """One timed forward and backward pass."""

    tokens: int
    context: int
    seconds: float
    peak: int  # bytes beyond what the process had before


def timed(config: Config, module: LanguageModel, batch: Mapping[str, Tensor], samples: int, context: int) -> Pass:
    """Forward, loss and backward of the first `samples` samples, cut to `context` tokens."""
    part = {name: value[:samples] if value.dim() == 1 else value[:samples, :context] for name, value in batch.items()}
    device = next(module.parameters()).device
    gc.collect()
    before = current_rss()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    autocast = config.precision == "bf16-mixed"
    started = time.perf_counter()
    with torch.autocast(device.type, torch.bfloat16, enabled=autocast):
        module.model.set_step(0, config.trainer.max_steps)
        labels_BN, _, output = module._forward(part, module.objective.training_key(0))
        loss = module.model.loss_sum(output.hidden, labels_BN)
        loss = loss if output.aux_loss is None else loss + output.aux_loss
    loss.backward()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    seconds = time.perf_counter() - started
    module.zero_grad()
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else max(peak_rss() - before, 0)
    return Pass(samples * context, context, seconds, peak)


def flops(config: Config, module: LanguageModel, samples: int, context: int) -> float:
    """Of a pass, by the density that the attention has at the run's own context."""
    layout = fixed_layout(config)
    per_token, _ = module.model.flops_per_token(context, 1.0 if layout is None else layout.density())
    return per_token * samples * context
