"""Decay goes where it belongs, and MuonAdamW is one optimizer that saves and resumes like any other."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.optim import AdamW, Muon, Optimizer

from lightsparse.optim.optimizers import FREE, HIDDEN, OUTER, MuonAdamW, parameter_groups


class Toy(nn.Module):
    def __init__(self, tied: bool = False) -> None:
        super().__init__()
        self.embed = nn.Embedding(12, 8)
        self.layers = nn.ModuleList([nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 8)), nn.LayerNorm(8)])
        self.norm = nn.LayerNorm(8)
        self.head = nn.Linear(8, 12, bias=False)
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        for layer in self.layers:
            x = x + layer(x)
        return self.head(self.norm(x))


def names_by_role(model: Toy) -> dict[str, set[str]]:
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return {g["role"]: {names[id(p)] for p in g["params"]} for g in parameter_groups(model, model.layers)}


def trained(model: Toy, optimizer: Optimizer, steps: int) -> list[float]:
    losses = []
    for step in range(steps):
        tokens = torch.arange(20).view(2, 10).add(step) % 12
        loss = nn.functional.cross_entropy(model(tokens).flatten(0, 1), tokens.roll(-1, 1).flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def test_only_matrices_decay_and_each_parameter_is_in_one_group() -> None:
    groups = names_by_role(Toy())
    assert groups[HIDDEN] == {"layers.0.0.weight", "layers.0.1.weight"}
    assert groups[OUTER] == {"head.weight"}
    assert set.union(*groups.values()) == {name for name, _ in Toy().named_parameters()}
    model = Toy()
    decay = {group["role"]: group.get("weight_decay") for group in parameter_groups(model, model.layers)}
    assert decay == {HIDDEN: None, OUTER: None, FREE: 0.0}


def test_a_tied_head_is_an_embedding_and_does_not_decay() -> None:
    groups = names_by_role(Toy(tied=True))
    assert OUTER not in groups
    assert "embed.weight" in groups[FREE]


def test_frozen_parameters_are_left_out() -> None:
    model = Toy()
    model.head.weight.requires_grad_(False)
    assert OUTER not in names_by_role(model)


def test_it_equals_muon_and_adamw_side_by_side() -> None:
    torch.manual_seed(0)
    one, two = Toy(), Toy()
    two.load_state_dict(one.state_dict())
    joint = MuonAdamW(parameter_groups(one, one.layers), lr=0.01, adamw_lr=0.02)
    hidden, *others = parameter_groups(two, two.layers)
    muon = Muon(hidden["params"], lr=0.01, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    adamw = AdamW(others, lr=0.02, betas=(0.9, 0.95), weight_decay=0.1)
    for _ in range(4):
        for model, optimizers in ((one, [joint]), (two, [muon, adamw])):
            tokens = torch.arange(10)[None]
            loss = nn.functional.cross_entropy(model(tokens)[0], tokens[0])
            model.zero_grad()
            loss.backward()
            for optimizer in optimizers:
                optimizer.step()
    for (name, a), (_, b) in zip(one.named_parameters(), two.named_parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0, msg=name)


def test_saved_and_loaded_it_takes_the_same_next_steps_bit_for_bit(tmp_path: Path) -> None:
    torch.manual_seed(0)
    one = Toy()
    first = MuonAdamW(parameter_groups(one, one.layers))
    trained(one, first, 3)
    torch.save(first.state_dict(), tmp_path / "state.pt")
    two = copy.deepcopy(one)
    second = MuonAdamW(parameter_groups(two, two.layers))
    second.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert trained(one, first, 3) == trained(two, second, 3)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))


@pytest.mark.parametrize("reload", [False, True], ids=["fresh", "loaded"])
def test_a_schedule_reaches_both_parts(reload: bool) -> None:
    model = Toy()
    optimizer = MuonAdamW(parameter_groups(model, model.layers), lr=0.1, adamw_lr=0.2)
    if reload:
        optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.0)
    before = copy.deepcopy(model.state_dict())
    trained(model, optimizer, 1)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_it_learns() -> None:
    torch.manual_seed(0)
    model = Toy()
    losses = trained(model, MuonAdamW(parameter_groups(model, model.layers), lr=0.01, adamw_lr=0.01), 60)
    assert losses[-1] < 0.5 * losses[0]


def test_a_model_without_hidden_matrices_is_refused_with_the_way_out() -> None:
    model = nn.Sequential(nn.Embedding(4, 4), nn.LayerNorm(4))
    with pytest.raises(ValueError, match="optimizer=adamw"):
        MuonAdamW(parameter_groups(model, model[1]))
