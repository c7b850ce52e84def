"""What `lightsparse replay` does: the batches of a step once more, and where what is no number arises."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightsparse.config.targets import ConfigError
from lightsparse.data.run_tokenizer import tokenizer_of
from lightsparse.training.checkpoints.load_run import stored_config
from lightsparse.training.health import replay_file
from lightsparse.training.module import LanguageModel, language_model
from lightsparse.utils.compat.torch import tree_leaves


def replay(file: Path) -> list[str]:
    """What happened then and what happens now, a line each. Raises ConfigError for a file that is not one of a run."""
    if not file.is_file() or file.parent.name != "replay":
        raise ConfigError(f"file is {file}; it must be a file of a run's replay folder, where a run left one")
    folder, content = file.parents[1], torch.load(file, map_location="cpu", weights_only=True)
    config = stored_config(folder)
    if config.model.activation_checkpointing == "offload":  # the same numbers on the CPU, where nothing can be moved
        config = replace(config, model=replace(config.model, activation_checkpointing=True))
    module = language_model(config, tokenizer_of(config.data, folder))
    if not replay_file(folder, content["step"], 0).is_file():
        raise ConfigError(f"{replay_file(folder, content['step'], 0)} is missing, which holds the weights of the step")
    weights = torch.load(replay_file(folder, content["step"], 0), map_location="cpu", weights_only=True)["state_dict"]
    module.load_state_dict(weights)
    lines = [f"step {content['step']}: {content['reason']}; {len(content['batches'])} micro-batches of {file.name}"]
    broken = [name for name, weight in weights.items() if not weight.isfinite().all()]
    if broken:
        lines.append(f"weights that are not finite before the step: {', '.join(broken)}")
    for number, batch in enumerate(content["batches"]):
        lines.append(f"micro-batch {number}: {_taken(module, batch, content['step'] - 1)}")
    return lines


def _taken(module: LanguageModel, batch: dict[str, Tensor], step: int) -> str:
    """One micro-batch forward and backward, in words."""
    found: list[str] = []

    def watch(name: str) -> Any:
        def look(part: nn.Module, args: Any, output: Any) -> None:
            wrong = sum(int((~leaf.isfinite()).sum()) for leaf in _floats(output))
            if wrong and not found:  # the innermost module that gives it comes first
                entries = sum(leaf.numel() for leaf in _floats(output))
                found.append(f"first in the output of {name} ({type(part).__name__}), {wrong} of {entries} entries")

        return look

    hooks = [part.register_forward_hook(watch(name)) for name, part in module.model.named_modules() if name]
    try:
        module.zero_grad()
        module.train()
        module.model.set_step(step, module.config.trainer.max_steps)
        labels_BN, _, output = module._forward(batch, module.objective.training_key(step))
        nats = module.model.loss_sum(output.hidden, labels_BN)
        nats.backward()
    finally:
        for hook in hooks:
            hook.remove()
    targets = int(module._targets_and_bytes(labels_BN)[0])
    gradients = [name for name, p in module.model.named_parameters() if p.grad is not None and not _is_finite(p.grad)]
    parts = [f"loss {float(nats.detach()) / max(targets, 1):.6g} over {targets} targets", *found]
    if gradients:
        parts.append(f"gradients not finite: {', '.join(gradients[:8])}{', …' if len(gradients) > 8 else ''}")
    if not found and not gradients:
        parts.append("all outputs and gradients are finite here")
    return "; ".join(parts)


def _floats(output: Any) -> list[Tensor]:
    values = vars(output) if hasattr(output, "__dataclass_fields__") else output
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor) and leaf.is_floating_point()]


def _is_finite(tensor: Tensor) -> bool:
    return bool(tensor.isfinite().all())
