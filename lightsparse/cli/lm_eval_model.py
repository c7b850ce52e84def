"""A trained run as a model of EleutherAI's evaluation harness: pip install 'lightsparse[eval]'.

    from lm_eval import simple_evaluate
    from lightsparse.cli.lm_eval_model import RunLM
    from lightsparse.training.checkpoints.load_run import load_run

    simple_evaluate(model=RunLM(load_run("runs/<name>")), tasks=["lambada_openai"])

Nothing else of lightsparse imports the harness.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from lightsparse.models.sampling import Sampling
from lightsparse.models.text_stream import document_of, stream_texts
from lightsparse.models.transformer import context_for
from lightsparse.training.checkpoints.load_run import TrainedRun

_MAX_GEN_TOKS = 256  # the harness's own default
_READ = ("until", "max_gen_toks", "do_sample", "temperature", "top_k", "top_p")

Scored = tuple[tuple[str, str], list[int], list[int]]  # (context, continuation) as text, and as tokens


class RunLM(TemplateLM):
    """Log-likelihoods and texts of a trained run, on the device where its model is.

    Every request is a document of its own, which begins with the tokenizer's bos. What does not fit into the context
    that the model was trained on loses its beginning; longer texts are scored in windows, as the harness does it.

    batch_size  requests computed together, those of similar length
    seed        of drawn texts (do_sample: true)
    Raises ValueError for a run with objective=mlm.
    """

    def __init__(self, run: TrainedRun, batch_size: int = 8, seed: int = 0) -> None:
        super().__init__()
        if run.config.objective != "causal":
            raise ValueError(
                f"the run has objective={run.config.objective}, which gives no probability of a text; "
                "evaluate one with objective=causal"
            )
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}; it must be at least 1")
        self.run, self.batch_size, self.max_length = run, batch_size, run.config.data.context
        self._device = run.model.head_weight.device
        self._generator = torch.Generator(self._device).manual_seed(seed)

    @property
    def eot_token_id(self) -> int:
        return self.run.tokenizer.bos  # it ends a document by opening the next

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Tokens of a text; with its bos unless add_special_tokens is false."""
        tokens = document_of(self.run.tokenizer, string)
        return tokens[1:] if add_special_tokens is False else tokens

    @torch.no_grad()
    def _loglikelihood_tokens(self, requests: list[Scored], **kwargs: Any) -> list[tuple[float, bool]]:
        """Of each continuation: the sum of its log-probabilities, and whether each token is the likeliest."""
        results: dict[int, tuple[float, bool]] = {}
        model = self.run.model.eval()
        rows = []
        for _, context, continuation in requests:
            if len(continuation) > self.max_length:
                raise ValueError(
                    f"a continuation has {len(continuation)} tokens and the model a context of {self.max_length}; "
                    "choose a task with shorter ones, or loglikelihood_rolling"
                )
            rows.append((context + continuation)[-self.max_length - 1 :])
        for batch in self._batches([len(row) for row in rows]):
            longest = max(len(rows[i]) for i in batch) - 1
            # Padded behind the end, where a causal model does not look.
            tokens_BN = torch.tensor([rows[i][:-1] + [0] * (longest + 1 - len(rows[i])) for i in batch])
            tokens_BN = tokens_BN.to(self._device)
            hidden = model(tokens_BN, context_for(tokens_BN)).hidden
            for row, i in enumerate(batch):
                count, end = len(requests[i][2]), len(rows[i]) - 1
                targets = torch.tensor(rows[i][len(rows[i]) - count :], device=self._device)
                log_p = model.logits(hidden[row, end - count : end]).float().log_softmax(-1)
                score = log_p.gather(1, targets[:, None]).double().sum()
                results[i] = float(score), bool((log_p.argmax(-1) == targets).all())
        return [results[i] for i in range(len(requests))]

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """The log-probability of each whole text; each token once, with as much of the text before it as fits."""
        totals = []
        for request in requests:
            (text,) = request.args
            windows = map(
                make_disjoint_window,
                get_rolling_token_windows(
                    token_list=self.tok_encode(text, add_special_tokens=False),
                    prefix_token=self.prefix_token_id,
                    max_seq_len=self.max_length,
                    context_len=1,
                ),
            )
            scored = self._loglikelihood_tokens([(("", text), before, tokens) for before, tokens in windows])
            totals.append(sum(score for score, _ in scored))
        return totals

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """The text after each context, up to a stop string of `until`, the document's end, or max_gen_toks tokens."""
        results: dict[int, str] = {}
        alike: dict[str, list[int]] = {}
        for i, request in enumerate(requests):
            alike.setdefault(repr(sorted(request.args[1].items())), []).append(i)
        for members in alike.values():
            options = requests[members[0]].args[1]
            sampling, stop, most = _generation(options, self.max_length)
            prompts = [self.tok_encode(requests[i].args[0])[most - self.max_length :] for i in members]
            for batch in self._batches([len(prompt) for prompt in prompts]):
                steps = stream_texts(
                    self.run.model,
                    self.run.tokenizer,
                    [prompts[i] for i in batch],
                    most,
                    sampling=sampling,
                    generator=self._generator,
                    stop=stop,
                )
                for i, pieces in zip(batch, zip(*steps, strict=True), strict=True):
                    results[members[i]] = "".join(piece or "" for piece in pieces)
        return [results[i] for i in range(len(requests))]

    def _batches(self, lengths: Sequence[int]) -> Iterator[list[int]]:
        """Indices of requests, similar lengths together, the longest first: what does not fit fails at once."""
        order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
        for start in range(0, len(order), self.batch_size):
            yield order[start : start + self.batch_size]


def _generation(options: dict[str, Any], context: int) -> tuple[Sampling, list[str], int]:
    """How to draw, where to stop, and tokens at most, from a task's generation_kwargs. Raises ValueError."""
    unknown = sorted(set(options) - set(_READ))
    if unknown:
        raise ValueError(f"generation_kwargs has {', '.join(unknown)}, which is not read here; use {', '.join(_READ)}")
    until = options.get("until") or []
    most = int(options.get("max_gen_toks", _MAX_GEN_TOKS))
    if not 1 <= most < context:
        raise ValueError(f"max_gen_toks is {most}; it must be at least 1 and below the context of {context} tokens")
    temperature = float(options.get("temperature", 1.0)) if options.get("do_sample", False) else 0.0
    sampling = Sampling(temperature, options.get("top_k"), options.get("top_p"))
    return sampling, [until] if isinstance(until, str) else [stop for stop in until if stop], most
