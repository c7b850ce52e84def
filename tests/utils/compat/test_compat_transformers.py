"""transformers hands to masks and attentions what compat/transformers.py and hf/ read, shown on a model of its own."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from transformers import AttentionInterface, AttentionMaskInterface, AutoModelForCausalLM, LlamaConfig
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.utils.generic import is_flash_attention_requested

from lightsparse.hf.attention import Variant
from lightsparse.hf.key_mask import key_mask
from lightsparse.utils.compat import transformers as compat

OPTIONS = {"use_cache": False, "output_hidden_states": True, "return_dict": True, "num_items_in_batch": 8}


@pytest.fixture(scope="module")
def seen() -> dict[str, list[Any]]:
    """What a forward pass has handed to a mask function and to each layer's attention."""
    found: dict[str, list[Any]] = {"masks": [], "modules": [], "words": []}

    def mask(**given: Any) -> None:
        found["masks"].append(given)

    def attend(module: Any, *given: Any, **words: Any) -> Any:
        found["modules"].append(module)
        found["words"].append(words)
        return sdpa_attention_forward(module, *given, **words)

    AttentionInterface.register("lightsparse_spy", attend)
    AttentionMaskInterface.register("lightsparse_spy", mask)
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 2, "num_hidden_layers": 2}
    config = LlamaConfig(vocab_size=31, **sizes)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="lightsparse_spy")
    model(torch.zeros(1, 8, dtype=torch.int64), **OPTIONS)
    return found


def test_plain_causality_is_this_very_function(seen: dict[str, list[Any]]) -> None:
    assert [given["mask_function"] for given in seen["masks"]] == [compat.causal_mask_function]


def test_a_mask_is_asked_for_by_the_words_that_ours_takes(seen: dict[str, list[Any]]) -> None:
    (given,) = seen["masks"]
    assert set(given) <= set(inspect.signature(key_mask).parameters)
    assert {"batch_size", "q_length", "kv_length", "q_offset", "kv_offset", "attention_mask", "use_vmap"} <= set(given)


def test_each_layer_says_its_number_and_that_it_reads_the_past(seen: dict[str, list[Any]]) -> None:
    assert [compat.layer_of(module) for module in seen["modules"]] == [0, 1]
    assert all(module.is_causal and compat.reads_the_past_alone(module, None) for module in seen["modules"])
    assert not compat.reads_the_past_alone(seen["modules"][0], False)
    assert compat.layer_of(torch.nn.Linear(1, 1)) == 0 and compat.reads_the_past_alone(torch.nn.Linear(1, 1), None)


def test_every_word_that_reaches_an_attention_is_known(seen: dict[str, list[Any]]) -> None:
    known = set(inspect.signature(Variant.__call__).parameters) | compat.WITHOUT_EFFECT
    for words in seen["words"]:
        assert {name for name, value in words.items() if value is not None and value is not False} <= known


def test_a_name_with_the_word_is_taken_for_a_kernel() -> None:
    for name, taken in ((f"lightsparse_{compat.KERNEL_WORD}", True), ("lightsparse_dense", False)):
        assert is_flash_attention_requested(requested_attention_implementation=name) == taken
