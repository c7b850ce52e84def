"""Hidden tokens are a function of the names of a batch: nothing is drawn, nothing else decides."""

from __future__ import annotations

import pytest
import torch

from lightsparse.data.source import IGNORED
from lightsparse.training.objectives import Objective, hiding_chance
from lightsparse.utils.hashing import mixed

MASK = 255


def batch(ids: list[int], length: int = 512) -> dict[str, torch.Tensor]:
    tokens = torch.arange(len(ids) * length).view(len(ids), length) % 200
    return {"tokens": tokens, "labels": tokens.roll(-1, 1), "sample_ids": torch.tensor(ids)}


def test_causal_takes_the_data_modules_labels() -> None:
    data = batch([1, 2])
    tokens, labels = Objective("causal", 0, MASK).inputs_and_labels(data, key=3)
    assert torch.equal(tokens, data["tokens"]) and torch.equal(labels, data["labels"])


def test_mlm_asks_for_exactly_the_hidden_tokens() -> None:
    data = batch([1, 2])
    tokens, labels = Objective("mlm", 0, MASK, 0.3).inputs_and_labels(data, key=3)
    hidden = tokens == MASK
    assert torch.equal(labels != IGNORED, hidden)
    assert torch.equal(labels[hidden], data["tokens"][hidden])
    assert torch.equal(tokens[~hidden], data["tokens"][~hidden])


def test_a_label_that_does_not_count_is_not_asked_for() -> None:
    data = batch([1])
    data["labels"][:, :100] = IGNORED
    _, labels = Objective("mlm", 0, MASK, 0.5).inputs_and_labels(data, key=3)
    assert (labels[:, :100] == IGNORED).all()
    assert (labels[:, 100:] != IGNORED).any()


def test_hidden_tokens_depend_on_the_sample_and_not_on_its_batch() -> None:
    objective = Objective("mlm", 0, MASK, 0.3)
    together, _ = objective.inputs_and_labels(batch([5, 9]), key=3)
    alone, _ = objective.inputs_and_labels(batch([9]), key=3)
    assert torch.equal(together[1] == MASK, alone[0] == MASK)
    assert not torch.equal(together[0] == MASK, together[1] == MASK)


def test_no_generator_is_consumed() -> None:
    state = torch.random.get_rng_state()
    Objective("mlm", 0, MASK).inputs_and_labels(batch([1]), key=3)
    assert torch.equal(state, torch.random.get_rng_state())


def test_keys_differ_by_seed_step_and_micro_batch_and_validation_has_one() -> None:
    one, other = Objective("mlm", 0, MASK), Objective("mlm", 1, MASK)
    keys = [one.training_key(step) for step in range(200)]
    assert len({*keys, one.validation_key(), other.training_key(0)}) == 202
    assert one.validation_key() == Objective("mlm", 0, MASK).validation_key()


@pytest.mark.parametrize("ratio", [0.05, 0.15, 0.6])
def test_the_share_of_hidden_tokens_is_the_ratio(ratio: float) -> None:
    values = hiding_chance(mixed(1, 2), torch.arange(64), 2048)
    share = (values < ratio).float().mean().item()
    assert share == pytest.approx(ratio, abs=4 * (ratio * (1 - ratio) / values.numel()) ** 0.5)


def test_hash_values_fill_the_unit_interval_evenly_over_samples_and_places() -> None:
    values = hiding_chance(7, torch.arange(256), 256)
    assert values.min() >= 0 and values.max() < 1
    assert values.mean(0).std() < 0.03 and values.mean(1).std() < 0.03  # 0.29 / √256 = 0.018 when independent
    neighbours = torch.corrcoef(torch.stack([values[:, :-1].flatten(), values[:, 1:].flatten()]))[0, 1]
    assert abs(neighbours) < 0.02
