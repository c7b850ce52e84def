import pytest
import torch

from lightsparse.models import context_for, generate
from lightsparse.models.generation import sample

VOCAB = 37


def prompt(batch: int = 3, length: int = 6) -> torch.Tensor:
    return torch.randint(0, VOCAB, (batch, length), generator=torch.Generator().manual_seed(5))


@pytest.fixture
def model(make_model):
    made = make_model(vocab_size=VOCAB)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.mul_(8 if parameter.dim() > 1 else 1)  # so that likeliest tokens differ clearly
    return made


def test_greedy_text_is_the_argmax_of_the_full_forward_at_every_step(model):
    tokens = generate(model, prompt(), 12, temperature=0)
    assert torch.equal(tokens[:, :6], prompt())
    with torch.no_grad():
        likeliest = model.logits(model(tokens, context_for(tokens)).hidden).argmax(-1)
    assert torch.equal(tokens[:, 6:], likeliest[:, 5:-1])
    assert len(set(tokens[:, 6:].flatten().tolist())) > 3


def test_rows_of_a_batch_do_not_disturb_each_other(model):
    together = generate(model, prompt(), 9, temperature=0)
    for row in range(3):
        assert torch.equal(together[row : row + 1], generate(model, prompt()[row : row + 1], 9, temperature=0))


def test_the_same_generator_writes_the_same_text(model):
    texts = [generate(model, prompt(), 20, generator=torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)]
    assert torch.equal(texts[0], texts[1])
    assert not torch.equal(texts[0], texts[2])


def test_sampling_leaves_the_global_generator_alone(model):
    torch.manual_seed(0)
    before = torch.get_rng_state()
    generate(model, prompt(), 3, top_k=4, generator=torch.Generator().manual_seed(1))
    assert torch.equal(torch.get_rng_state(), before)


def test_top_k_draws_only_from_the_likeliest():
    logits = torch.randn(4, VOCAB, generator=torch.Generator().manual_seed(0))
    allowed = logits.topk(5).indices
    generator = torch.Generator().manual_seed(0)
    draws = torch.cat([sample(logits, 2.0, 5, generator) for _ in range(200)], dim=1)
    for row in range(4):
        assert set(draws[row].tolist()) == set(allowed[row].tolist())
    assert torch.equal(sample(logits, 1.0, 1), sample(logits, 0.0))


def test_temperature_sharpens_the_draw():
    logits, generator = torch.tensor([[2.0, 1.0, 0.0]]).expand(4000, 3), torch.Generator().manual_seed(0)
    for temperature in (0.5, 1.0, 2.0):
        share = (sample(logits, temperature, None, generator) == 0).float().mean().item()
        assert share == pytest.approx((logits[0] / temperature).softmax(0)[0].item(), abs=0.03)


def test_a_stop_token_ends_its_row_and_all_rows_end_the_text(model):
    greedy = generate(model, prompt(), 12, temperature=0)
    stop = int(greedy[0, 8])  # the first row has it as its third new token, or before
    ended = generate(model, prompt(), 12, temperature=0, stop_token=stop)
    for row in range(3):
        new = greedy[row, 6:].tolist()
        kept = new[: new.index(stop) + 1] if stop in new else new
        written = ended[row, 6:].tolist()
        assert written == (kept + [stop] * 12)[: len(written)]
    alone = generate(model, prompt()[:1], 12, temperature=0, stop_token=stop)
    assert alone.shape[1] <= 9
    assert alone[0, -1] == stop


def test_the_model_keeps_its_mode_and_writes_without_dropout(make_model):
    model = make_model(dropout=0.5).train()
    dropping = generate(model, prompt(), 8, temperature=0)
    assert model.training
    assert torch.equal(dropping, generate(model.eval(), prompt(), 8, temperature=0))
    assert not model.training


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
        ({"temperature": -1.0}, "temperature is -1.0"),
        ({"top_k": 0}, "top_k is 0"),
        ({"tokens_BN": torch.zeros(1, 0, dtype=torch.int64)}, "prompt has 0 tokens"),
    ],
)
def test_arguments_out_of_range_are_refused(model, arguments, words):
    with pytest.raises(ValueError, match=words):
        generate(**{"model": model, "tokens_BN": prompt(), "max_new_tokens": 4} | arguments)


def test_a_bidirectional_model_does_not_generate(make_model):
    with pytest.raises(ValueError, match="train objective=causal"):
        generate(make_model(causal=False), prompt(), 4)
