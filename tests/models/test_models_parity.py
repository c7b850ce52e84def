"""The model against transformers' own, with the same weights under the same names."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

from lightsparse.models import RopeConfig, context_for

VOCAB, CONTEXT = 53, 48


def fields_of(config) -> dict:
    return {
        "depth": config.num_hidden_layers,
        "embed_dim": config.hidden_size,
        "heads": config.num_attention_heads,
        "kv_heads": config.num_key_value_heads,
        "head_dim": config.head_dim,
        "mlp_dim": config.intermediate_size,
        "norm_eps": config.rms_norm_eps,
        "tie_embeddings": config.tie_word_embeddings,
        "qk_norm": isinstance(config, Qwen3Config),
    }


def their_config(kind=LlamaConfig, heads=4, kv_heads=2, head_dim=16, tied=False, rope=None):
    return kind(
        vocab_size=VOCAB,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=tied,
        rope_parameters={"rope_theta": 10_000.0} | (rope or {"rope_type": "default"}),
        attn_implementation="eager",
    )


def with_random_weights(model):
    """Large and distinct, norms too: at their usual start the logits are almost zero and hide mistakes."""
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            centre = 1.0 if "norm" in name else 0.0
            parameter.copy_(centre + 0.2 * torch.randn(parameter.shape))
    return model.eval()


def assert_same_logits(make_model, theirs, **more):
    ours = make_model(vocab_size=VOCAB, **fields_of(theirs.config), **more).eval()
    weights = {name.removeprefix("model."): weight for name, weight in theirs.state_dict().items()}
    if theirs.config.tie_word_embeddings:
        weights.pop("lm_head.weight", None)
    ours.load_state_dict(weights)  # strict: every name is theirs
    tokens = torch.randint(0, VOCAB, (2, CONTEXT))
    with torch.no_grad():
        expected = theirs(input_ids=tokens).logits
        logits = ours.logits(ours(tokens, context_for(tokens)).hidden)
    assert expected.std() > 0.3
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(4, 4, 16), (4, 2, 16), (4, 1, 16), (2, 1, 24)])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_logits_are_those_of_llama(make_model, heads, kv_heads, head_dim, tied):
    config = their_config(heads=heads, kv_heads=kv_heads, head_dim=head_dim, tied=tied)
    assert_same_logits(make_model, with_random_weights(LlamaForCausalLM(config)))


def test_logits_with_qk_norm_are_those_of_qwen3(make_model):
    theirs = with_random_weights(Qwen3ForCausalLM(their_config(Qwen3Config)))
    assert_same_logits(make_model, theirs)


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ({"rope_type": "linear", "factor": 4.0}, {"scaling": "linear", "factor": 4.0}),
        (
            {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 12},
            {"scaling": "yarn", "factor": 4.0, "original_context": 12},
        ),
    ],
    ids=["linear", "yarn"],
)
def test_logits_with_stretched_positions_are_those_of_llama(make_model, theirs, ours):
    model = with_random_weights(LlamaForCausalLM(their_config(rope=theirs)))
    assert_same_logits(make_model, model, rope=RopeConfig(**ours))


def test_the_loss_is_that_of_llama(make_model):
    theirs = with_random_weights(LlamaForCausalLM(their_config()))
    ours = make_model(vocab_size=VOCAB, **fields_of(theirs.config))
    ours.load_state_dict({name.removeprefix("model."): weight for name, weight in theirs.state_dict().items()})
    tokens = torch.randint(0, VOCAB, (2, CONTEXT))
    labels = torch.cat((tokens[:, 1:], torch.full((2, 1), -100)), dim=1)
    loss = ours.loss_sum(ours(tokens, context_for(tokens)).hidden, labels) / (labels != -100).sum()
    torch.testing.assert_close(loss, theirs(input_ids=tokens, labels=tokens).loss, rtol=1e-5, atol=1e-5)
