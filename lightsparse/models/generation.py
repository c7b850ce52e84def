"""Text from a trained model, as tokens: a pass over the prompts, then one token at a time from the caches."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from lightsparse.models.sampling import Sampling, sample
from lightsparse.models.transformer import Transformer, context_for


class Generation:
    """An iterator over the steps that continue a batch of prompts; a step gives each row's next token, or None.

    Rows may differ in length. All are read from their first token on at the same positions: first as many tokens as
    the shortest prompt has, then a shorter row's new token beside a longer row's next token of the prompt. So nothing
    is padded, and a row gets what it would get alone, whatever the attention. Only where every shorter row has ended
    the longer ones are read in one pass again. None stands for a row whose prompt is not read to its end yet, and for
    one that has ended: by a stop token (which is not given), after max_new_tokens, or by `end`.

    prompts        token ids, at least one per row: [B, N] or B sequences of any lengths
    generator      of the draws; the model's randomness is off, and it goes back to the mode it was in after each step
    stop_tokens    end their row
    documents      of the prompts' tokens, non-decreasing, in the form of `prompts`: packed documents do not see each
                   other. New tokens belong to the last one. None = a row is one document
    ended          of each row, whether it gets no more tokens
    How far beyond its training context a model still makes sense is the caller's matter. Raises ValueError for
    arguments out of range or a bidirectional model.
    """

    def __init__(
        self,
        model: Transformer,
        prompts: Tensor | Sequence[Sequence[int] | Tensor],
        max_new_tokens: int,
        *,
        sampling: Sampling | None = None,
        generator: torch.Generator | None = None,
        stop_tokens: Collection[int] = (),
        documents: Tensor | Sequence[Sequence[int] | Tensor] | None = None,
    ):
        if not model.causal:
            raise ValueError("this model reads both ways (objective=mlm) and cannot write a text; use objective=causal")
        if max_new_tokens < 1:
            raise ValueError(f"max_new_tokens is {max_new_tokens}; it must be at least 1")
        self.model, self.sampling, self.generator = model, sampling or Sampling(), generator
        self.stop_tokens = frozenset(stop_tokens)
        rows = [torch.as_tensor(row, dtype=torch.int64) for row in prompts]
        if not rows or min(map(len, rows)) < 1:
            raise ValueError("a prompt has 0 tokens; give at least one, such as the tokenizer's bos")
        self._known = [len(row) for row in rows]  # tokens of each row so far
        self._most = [length + max_new_tokens for length in self._known]
        self.ended = [False] * len(rows)
        until, device = max(self._most), model.head_weight.device
        self._tokens_BL = _continued(rows, until).to(device)
        self._documents_BL = None if documents is None else _documents(documents, rows, until).to(device)
        self.caches = model.caches(until, self._documents_BL)

    def __iter__(self) -> Iterator[list[int | None]]:
        return self

    def __next__(self) -> list[int | None]:
        if all(self.ended):
            raise StopIteration
        start = self.caches[0].length
        stop = min(known for known, ended in zip(self._known, self.ended, strict=True) if not ended)
        new_BN = self._tokens_BL[:, start:stop]
        documents = None if self._documents_BL is None else self._documents_BL[:, :stop]
        with torch.no_grad(), _evaluating(self.model):
            ctx = context_for(new_BN, documents, q_start=start)
            logits_BV = self.model.logits(self.model(new_BN, ctx, self.caches).hidden[:, -1])
            drawn = sample(logits_BV, self.sampling, self.generator).tolist()
        return [self._take(row, token, stop) for row, token in enumerate(drawn)]

    def end(self, row: int) -> None:
        """Give no more tokens to this row."""
        self.ended[row] = True

    def _take(self, row: int, token: int, position: int) -> int | None:
        if self.ended[row] or self._known[row] > position:
            return None
        self.ended[row] = token in self.stop_tokens or position + 1 == self._most[row]
        if token in self.stop_tokens:
            return None
        self._tokens_BL[row, position] = token
        self._known[row] += 1
        return token


def generate(
    model: Transformer,
    prompts: Tensor | Sequence[Sequence[int] | Tensor],
    max_new_tokens: int,
    *,
    sampling: Sampling | None = None,
    generator: torch.Generator | None = None,
    stop_tokens: Collection[int] = (),
    documents: Tensor | Sequence[Sequence[int] | Tensor] | None = None,
) -> list[list[int]]:
    """The new tokens of each row, without the stop token that ended it; arguments as for Generation."""
    steps = Generation(
        model,
        prompts,
        max_new_tokens,
        sampling=sampling,
        generator=generator,
        stop_tokens=stop_tokens,
        documents=documents,
    )
    of_rows = zip(*steps, strict=True)
    return [[token for token in row if token is not None] for row in of_rows]


def _continued(rows: Sequence[Tensor], until: int) -> Tensor:
    """The rows, each with its last entry repeated up to `until`: [B, until]."""
    return torch.stack([torch.cat([row, row[-1:].expand(until - len(row))]) for row in rows])


def _documents(documents: Tensor | Sequence[Sequence[int] | Tensor], rows: Sequence[Tensor], until: int) -> Tensor:
    given = [torch.as_tensor(row, dtype=torch.int32) for row in documents]
    ids, tokens = [[len(row) for row in each] for each in (given, rows)]
    if ids != tokens:
        raise ValueError(f"documents have {ids} ids and the prompts {tokens} tokens; give one id per token")
    return _continued(given, until)


@contextmanager
def _evaluating(model: Transformer) -> Iterator[None]:
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)
