"""Tasks in text: what is asked can be read off the text, within the context, in any tokenizer."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from tokenizer_kinds import KINDS, LOSSLESS, raw, tokenizer_of_kind

from lightsparse.data.errors import DataError
from lightsparse.data.files import FilesData
from lightsparse.data.source import IGNORED
from lightsparse.data.subwords import SubwordTokenizer
from lightsparse.data.tasks.counting import CommonWords, FrequentWords
from lightsparse.data.tasks.draws import Draws
from lightsparse.data.tasks.needles import Needles
from lightsparse.data.tasks.passkey import Passkey
from lightsparse.data.tasks.text_task import TextTask
from lightsparse.data.tasks.variables import VariableTracking
from lightsparse.data.tokenizer import BPE, Bytes, Given, Own
from lightsparse.data.tokens import ByteTokenizer

BYTES = ByteTokenizer()


@pytest.fixture
def essays(tmp_path: Path) -> FilesData:
    for i in range(20):
        (tmp_path / f"{i}.txt").write_text("".join(f"Line {j} of document {i}.\n" for j in range(60)))
    return FilesData(path=f"{tmp_path}/*.txt", val_fraction=0.5)


def words_of(task: TextTask, index: int = 0) -> tuple[str, tuple[str, ...]]:
    question = task.question(Draws(5, 1, index))
    return BYTES.decode(question.prompt[1:]), question.references


TASKS = [
    Passkey(context=1500),
    Needles(context=1500),
    Needles(context=1500, keys=4),
    Needles(context=1500, haystack="needles"),
    Needles(context=1500, haystack="needles", key="uuids", value="uuids"),
    Needles(context=1500, values=4),
    Needles(context=1500, keys=4, queries=4),
    VariableTracking(context=1500, chains=2),
    CommonWords(context=3000, common=3, repeats=12),
    FrequentWords(context=1500),
]


@pytest.mark.parametrize("task", TASKS, ids=lambda task: type(task).__name__)
def test_a_text_fits_its_context_ends_with_the_answer_and_holds_it_at_the_evidence(task: TextTask):
    for index in range(5):
        example, (prompt, references) = task.example(Draws(5, 1, index)), words_of(task, index)
        asked = np.flatnonzero(example.evidence >= 0)
        assert BYTES.decode(example.labels[asked]) == " " + ", ".join(references)
        assert asked[-1] < task.context and asked[-1] > 0.75 * task.context  # filled up
        assert (example.labels[asked[-1] + 1 :] == IGNORED).all()
        evidence = prompt[asked[0] - example.evidence[asked[0]] - 1 :]
        assert all(reference in evidence for reference in references)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("task", [Passkey, Needles, VariableTracking, FrequentWords], ids=lambda task: task.__name__)
def test_prompt_and_answer_are_the_tokens_of_running_text_and_fill_the_context(task, kind, monkeypatch):
    texts: list[str] = []
    encode_parts = SubwordTokenizer.encode_parts
    monkeypatch.setattr(
        SubwordTokenizer, "encode_parts", lambda self, parts: texts.append("".join(parts)) or encode_parts(self, parts)
    )
    tokenizer = tokenizer_of_kind(kind)
    for index, depth in enumerate((None, None) if task is FrequentWords else (0.0, 0.4, 1.0)):
        here = task(context=2100, depth=depth, tokenizer=Given(tokenizer=tokenizer))
        question = here.question(Draws(5, 1, index))
        tokens = np.concatenate([question.prompt, question.answer]).tolist()
        assert tokens == [tokenizer.bos, *raw(kind).encode(texts[-1], add_special_tokens=False).ids]
        assert len(tokens) <= 2101 and (len(tokens) > 1900 or task is FrequentWords)
        if kind in LOSSLESS and task is not FrequentWords:  # whose text needs all of its words
            text, longest = texts[-1], 4  # characters of a token that reaches into answer or evidence
            head, evidence = (tokenizer.decode(question.prompt[:end]) for end in (None, question.evidence))
            assert 0 <= text.rindex(" " + question.references[0]) - len(head) <= longest and text.startswith(head)
            needle = re.search(r"The pass key is|One of the special|VAR ", text)
            assert needle is not None and 0 <= needle.start() - len(evidence) <= longest
            assert tokenizer.decode(question.answer).endswith(question.references[-1])


@pytest.mark.parametrize("depth", [0.0, 0.5, 1.0])
def test_a_passkey_stands_at_its_depth(depth: float):
    prompt, (key,) = words_of(Passkey(context=4000, depth=depth))
    assert 1 <= int(key) <= 50_000
    assert prompt.count(key) == 2 and f"The pass key is {key}. Remember it. {key} is the pass key." in prompt
    filler = re.sub(r"The pass key is \d.*\n", "", prompt)
    start = prompt.index(f"The pass key is {key}") - prompt.index("The grass" if depth else "The pass")
    assert start / (len(filler) - 230) == pytest.approx(depth, abs=0.06)


def test_the_depth_moves_the_needle_and_nothing_else():
    near, far = (words_of(Passkey(context=2000, depth=depth)) for depth in (0.0, 1.0))
    assert near[1] == far[1] and len(near[0]) == len(far[0]) and near[0] != far[0]


def test_all_values_of_the_asked_keys_are_right_and_no_others():
    for task in (Needles(context=2000, keys=4), Needles(context=2000, keys=4, values=2, queries=2)):
        prompt, references = words_of(task)
        hidden = dict.fromkeys(re.findall(r"magic numbers for (\S+) is: (\d{7})\.", prompt))
        asked = re.search(r"for ([\w, -]+) mentioned in the provided text\?", prompt)
        assert asked is not None and len(hidden) == task.keys * task.values
        names = re.split(r", and |, ", asked[1])
        assert sorted(references) == sorted(value for key, value in hidden if key in names)


def test_a_haystack_of_needles_is_made_of_needles_and_holds_the_key_once():
    prompt, (value,) = words_of(Needles(context=4000, haystack="needles"))
    lines = prompt.splitlines()[1:-1]
    assert len(lines) > 30 and all(
        re.fullmatch(r"One of the special magic numbers for \S+ is: \d+\.", x) for x in lines
    )
    key = next(line.split()[7] for line in lines if value in line)
    assert sum(f" {key} " in line for line in lines) == 1


def test_an_essay_is_validation_text_of_the_corpus(essays: FilesData):
    prompt, _ = words_of(Needles(context=1500, haystack="essay", essays=essays))
    held_out = {n for n in range(20) if f"of document {n}." in "".join(read(essays))}
    used = {int(n) for n in re.findall(r"of document (\d+)\.", prompt)}
    assert used and used <= held_out


def read(source: FilesData) -> list[str]:
    samples = source.samples(0, 10**6)
    stream = np.concatenate([samples.val[i]["tokens"].numpy() for i in range(len(samples.val))])
    return BYTES.decode(stream).split("�")


def test_a_chain_of_assignments_leads_from_the_value_to_every_name():
    prompt, names = words_of(VariableTracking(context=3000, chains=3, hops=4))
    value = re.search(r"assigned the value (\d+) in the text", prompt)
    assignments = re.findall(r"VAR (\w+) = (?:VAR )?(\w+)\.", prompt)
    assert value is not None and len(assignments) == 15
    held, found = {value[1]}, []
    for name, source in assignments:  # in the order of the text: nothing is used before it is set
        if source in held:
            held.add(name)
            found.append(name)
    assert tuple(found) == names


def test_the_common_words_are_those_of_the_list():
    prompt, references = words_of(CommonWords(context=4000, common=3, repeats=12, others_repeats=2))
    counts = Counter(re.findall(r"\d+\. (\w+)", prompt))
    assert {word for word, _ in counts.most_common(3)} == set(references)
    assert sorted(set(counts.values())) == [2, 12] and len(counts) > 50


@pytest.mark.parametrize("alpha", [2.0, 3.0])
def test_the_frequent_words_are_the_three_below_the_noise(alpha):
    prompt, references = words_of(FrequentWords(context=4000, alpha=alpha))
    counts = Counter(prompt.split("\n")[1].split())
    assert [word for word, _ in counts.most_common(4)] == ["....", *references]
    assert counts["...."] / counts[references[0]] == pytest.approx(2**alpha, rel=0.1)  # Zipf's law


def test_a_passkey_is_looked_for_in_ten_tokens():
    task = Passkey(context=1500)
    assert task.new_tokens(task.question(Draws(5, 1, 0))) == 10


def test_scores_are_those_of_the_papers():
    assert Passkey().score(" 123. The pass key is 4", ["123"]) == 1.0
    assert Passkey().score(" 12 123", ["123"]) == 0.0
    assert Needles().score("They are ABC and 7.", ["abc", "8"]) == 0.5


def test_a_context_too_short_is_one_sentence_before_the_training():
    with pytest.raises(DataError, match=r"data.context is 200, too short for a problem of Passkey"):
        Passkey(context=200).samples(0, 400)
    with pytest.raises(DataError, match=r"data.context is 2000, too short for 10 words 30 times"):
        CommonWords(context=2000).samples(0, 4000)


def test_a_task_takes_a_tokenizer_that_is_there_and_trains_none():
    assert Passkey().choose_tokenizer(Bytes()).vocab_size == 256
    for choice in (BPE(), Own()):
        with pytest.raises(ValueError, match="use tokenizer=bytes, or tokenizer=hf"):
            Passkey().choose_tokenizer(choice)


def test_counting_has_no_depth():
    with pytest.raises(ValueError, match=r"data\.depth is 0\.5"):
        replace(FrequentWords(), depth=0.5)
