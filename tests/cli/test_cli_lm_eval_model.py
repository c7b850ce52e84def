"""The harness's requests against a run's model, each written out with full forwards."""

import math

import pytest
import torch
from lm_eval.api.instance import Instance

from lightsparse.attention.sliding_window import SlidingWindowAttention, SlidingWindowConfig
from lightsparse.cli.lm_eval_model import RunLM
from lightsparse.config.parse import compose
from lightsparse.data import ByteTokenizer
from lightsparse.models import ModelConfig, Transformer, context_for
from lightsparse.training.checkpoints.load_run import TrainedRun

TOKENIZER, CONTEXT = ByteTokenizer(), 32


@pytest.fixture(scope="module")
def lm():
    torch.manual_seed(0)
    sizes = ModelConfig(depth=2, embed_dim=32, heads=4, kv_heads=2, mlp_dim=48)
    attention = SlidingWindowConfig(window=12, sinks=2, block=8)
    model = Transformer(sizes, lambda shape: SlidingWindowAttention(attention, shape), vocab_size=256, context=CONTEXT)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(6 if parameter.dim() > 1 else 1)
        model.head_weight[128:] = 0
    return RunLM(TrainedRun(compose([f"data.context={CONTEXT}"]), model.eval(), TOKENIZER, 3), batch_size=3)


def instances(kind, *arguments):
    return [Instance(request_type=kind, doc={}, arguments=each, idx=i) for i, each in enumerate(arguments)]


def log_p(lm, tokens: list[int]) -> torch.Tensor:
    """Log-probabilities after each token, [N, V]."""
    given = torch.tensor([tokens])
    with torch.no_grad():
        return lm.run.model.logits(lm.run.model(given, context_for(given)).hidden)[0].double().log_softmax(-1)


def likeliest(lm, tokens: list[int], count: int) -> list[int]:
    for _ in range(count):
        tokens = [*tokens, int(log_p(lm, tokens)[-1].argmax())]
    return tokens[-count:]


def test_a_continuation_scores_the_sum_of_its_log_probabilities(lm):
    pairs = [("the cat", " sat"), ("", "abc"), ("a much longer context,", " x"), ("né", "e"), ("q", "uite long")]
    scores = lm.loglikelihood(instances("loglikelihood", *pairs), disable_tqdm=True)
    for (context, continuation), (score, greedy) in zip(pairs, scores, strict=True):
        before, after = (list(TOKENIZER.encode(text)) for text in (context, continuation))
        tokens = [TOKENIZER.bos, *map(int, before + after)]
        of_tokens = log_p(lm, tokens[:-1])[-len(after) :]
        assert score == pytest.approx(sum(float(row[token]) for row, token in zip(of_tokens, after, strict=True)))
        assert greedy == (of_tokens.argmax(-1).tolist() == after)


def test_the_likeliest_continuation_is_told(lm):
    best = TOKENIZER.decode(likeliest(lm, lm.tok_encode("so it is"), 3))
    (_, greedy), (_, other) = lm.loglikelihood(
        instances("loglikelihood", ("so it is", best), ("so it is", best[:-1] + "~")), disable_tqdm=True
    )
    assert greedy and not other


def test_a_context_that_is_too_long_loses_its_beginning(lm):
    context = "0123456789" * 6
    (score, _), (same, _) = lm.loglikelihood(
        instances("loglikelihood", (context, "ab"), ("x" * 40 + context[-40:], "ab")), disable_tqdm=True
    )
    assert score == pytest.approx(same)
    with pytest.raises(ValueError, match="has 33 tokens"):
        lm.loglikelihood(instances("loglikelihood", ("a", "b" * 33)), disable_tqdm=True)


@pytest.mark.parametrize("length", [10, 75])
def test_a_whole_text_scores_every_token_once(lm, length):
    text = "a text of some length, longer than what the model reads at once, is cut "[:length].ljust(length, "z")
    (score,) = lm.loglikelihood_rolling(instances("loglikelihood_rolling", (text,)), disable_tqdm=True)
    tokens, expected = lm.tok_encode(text), 0.0
    for start in range(1, len(tokens), CONTEXT):
        stop = min(start + CONTEXT, len(tokens))
        first = max(stop - 1 - CONTEXT, 0)  # the last window reaches back as far as it can
        of_tokens = log_p(lm, tokens[first : stop - 1])[start - 1 - first :]
        expected += sum(float(of_tokens[i][token]) for i, token in enumerate(tokens[start:stop]))
    assert score == pytest.approx(expected) and math.isfinite(score)


def test_texts_are_the_likeliest_ones_up_to_a_stop(lm):
    contexts = ["the cat", "", "a context that is a good deal longer than the model's", "dog"]
    greedy = [likeliest(lm, lm.tok_encode(context)[-(CONTEXT - 8) :], 8) for context in contexts]
    texts = [TOKENIZER.decode(row) for row in greedy]
    stop = texts[0][3:5]
    arguments = [(context, {"until": [stop, "\n\n"], "max_gen_toks": 8}) for context in contexts]
    found = lm.generate_until(instances("generate_until", *arguments), disable_tqdm=True)
    assert found == [text.partition(stop)[0] for text in texts]
    shorter = lm.generate_until(
        instances("generate_until", ("the cat", {"until": "\n\n", "max_gen_toks": 2}), arguments[3]), disable_tqdm=True
    )
    assert shorter == [texts[0][:2], found[3]]


def test_options_that_are_not_read_are_refused(lm):
    with pytest.raises(ValueError, match="num_beams, which is not read here"):
        lm.generate_until(instances("generate_until", ("a", {"num_beams": 4})), disable_tqdm=True)
    with pytest.raises(ValueError, match="max_gen_toks is 256"):
        lm.generate_until(instances("generate_until", ("a", {})), disable_tqdm=True)


def test_a_run_that_reads_both_ways_is_refused(lm):
    config = compose(["objective=mlm", "attention=dense"])
    with pytest.raises(ValueError, match="objective=causal"):
        RunLM(TrainedRun(config, lm.run.model, TOKENIZER, 0))


def test_the_harness_evaluates_a_task_with_it(lm):
    from datasets import Dataset
    from lm_eval import simple_evaluate
    from lm_eval.api.task import ConfigurableTask
    from lm_eval.tasks import TaskManager

    questions = Dataset.from_list([{"q": "one, two,", "a": " three"}, {"q": "a, b,", "a": " c"}])
    task = ConfigurableTask(
        config={
            "task": "tiny",
            "custom_dataset": lambda **_: {"test": questions},
            "test_split": "test",
            "output_type": "loglikelihood",
            "doc_to_text": "{{q}}",
            "doc_to_target": "{{a}}",
            "metric_list": [{"metric": "perplexity"}, {"metric": "acc"}],
        }
    )
    alone = TaskManager(include_defaults=False)  # else it reads the YAML of all its tasks
    found = simple_evaluate(model=lm, tasks=[task], task_manager=alone, bootstrap_iters=0)["results"]["tiny"]
    pairs = instances("loglikelihood", ("one, two,", " three"), ("a, b,", " c"))
    scores = lm.loglikelihood(pairs, disable_tqdm=True)
    assert found["perplexity,none"] == pytest.approx(math.exp(-sum(score for score, _ in scores) / 2))
    assert found["acc,none"] == pytest.approx(sum(greedy for _, greedy in scores) / 2)
