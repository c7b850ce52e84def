import pytest
import torch

from lightsparse.models import Generation, Sampling, context_for, generate
from lightsparse.models.sampling import GREEDY

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


def likeliest(model, tokens: list[int], documents=None) -> list[int]:
    """The argmax after every token, by a full forward."""
    given = torch.tensor([tokens])
    with torch.no_grad():
        return model.logits(model(given, context_for(given, documents)).hidden)[0].argmax(-1).tolist()


def test_greedy_text_is_the_argmax_of_the_full_forward_at_every_step(model):
    for begun, new in zip(prompt().tolist(), generate(model, prompt(), 12, sampling=GREEDY), strict=True):
        assert new == likeliest(model, begun + new)[5:-1]
        assert len(set(new)) > 3


def test_prompts_of_different_lengths_get_what_each_gets_alone(model):
    prompts = [row[:length] for row, length in zip(prompt(4, 40), (7, 1, 40, 9), strict=True)]
    together = generate(model, prompts, 10, sampling=GREEDY)
    assert together == [generate(model, [alone], 10, sampling=GREEDY)[0] for alone in prompts]
    assert all(len(new) == 10 for new in together)


def test_a_long_prompt_is_read_in_one_pass_once_the_shorter_rows_have_ended(model):
    steps = Generation(model, [[1, 2], list(range(30))], 3, sampling=GREEDY)
    lengths, given = [], []
    for tokens in steps:
        lengths.append(steps.caches[0].length)
        given.append([token is not None for token in tokens])
    assert lengths == [2, 3, 4, 30, 31, 32]
    assert given == [[True, False]] * 3 + [[False, True]] * 3


def test_new_tokens_belong_to_the_last_document_of_a_packed_prompt(model):
    prompts = [[3, 1, 4, 1, 5, 9, 2, 6], [2, 7, 1, 8, 2]]
    documents = [[0, 0, 0, 1, 1, 1, 1, 1], [0, 0, 2, 2, 2]]
    packed = generate(model, prompts, 9, sampling=GREEDY, documents=documents)
    assert packed == [generate(model, [last], 9, sampling=GREEDY)[0] for last in (prompts[0][3:], prompts[1][2:])]
    assert packed != generate(model, prompts, 9, sampling=GREEDY)
    for begun, of, new in zip(prompts, documents, packed, strict=True):
        ids = torch.tensor([of + of[-1:] * 9], dtype=torch.int32)
        assert new == likeliest(model, begun + new, ids)[len(begun) - 1 : -1]


def test_the_same_generator_writes_the_same_text(model):
    texts = [generate(model, prompt(), 20, generator=torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)]
    assert texts[0] == texts[1]
    assert texts[0] != texts[2]


def test_sampling_leaves_the_global_generator_alone(model):
    torch.manual_seed(0)
    before = torch.get_rng_state()
    generate(model, prompt(), 3, sampling=Sampling(top_k=4), generator=torch.Generator().manual_seed(1))
    assert torch.equal(torch.get_rng_state(), before)


def test_a_stop_token_ends_its_row_alone_and_is_not_given(model):
    greedy = generate(model, prompt(), 12, sampling=GREEDY)
    stops = (greedy[0][2], greedy[1][7])
    ended = generate(model, prompt(), 12, sampling=GREEDY, stop_tokens=stops)
    for new, whole in zip(ended, greedy, strict=True):
        before = [token in stops for token in whole]
        assert new == whole[: before.index(True)] if any(before) else new == whole
    steps = Generation(model, prompt()[:1], 12, sampling=GREEDY, stop_tokens=stops)
    assert list(steps)[-1] == [None] and len(steps.caches[0].state) == 0
    assert steps.caches[0].length == 6 + len(ended[0])


def test_a_row_that_is_ended_gets_no_more_and_the_others_go_on(model):
    whole, steps, seen = generate(model, prompt(), 6, sampling=GREEDY), None, []
    steps = Generation(model, prompt(), 6, sampling=GREEDY)
    for tokens in steps:
        seen.append(tokens)
        if len(seen) == 2:
            steps.end(1)
    assert [row[1] for row in seen] == [*whole[1][:2], None, None, None, None]
    assert [row[2] for row in seen] == whole[2]


def test_the_model_keeps_its_mode_and_writes_without_dropout(make_model):
    model = make_model(dropout=0.5).train()
    steps = Generation(model, prompt(), 8, sampling=GREEDY)
    next(steps)
    assert model.training
    dropping = generate(model, prompt(), 8, sampling=GREEDY)
    assert dropping == generate(model.eval(), prompt(), 8, sampling=GREEDY)
    assert not model.training


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
        ({"prompts": torch.zeros(1, 0, dtype=torch.int64)}, "prompt has 0 tokens"),
        ({"prompts": []}, "prompt has 0 tokens"),
        ({"documents": [[0]]}, "one id per token"),
    ],
)
def test_arguments_out_of_range_are_refused(model, arguments, words):
    with pytest.raises(ValueError, match=words):
        generate(**{"model": model, "prompts": prompt(), "max_new_tokens": 4} | arguments)


def test_a_bidirectional_model_does_not_generate(make_model):
    with pytest.raises(ValueError, match="use objective=causal"):
        generate(make_model(causal=False), prompt(), 4)
