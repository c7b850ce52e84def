import random

import pytest
import torch

from lightsparse.data import ByteTokenizer
from lightsparse.models.sampling import GREEDY
from lightsparse.models.text_stream import TextStream, document_of, stream_texts

TOKENIZER = ByteTokenizer()


def pieces(ids, stop=()) -> list[str]:
    stream, found = TextStream(TOKENIZER, stop), []
    for token in ids:
        if not stream.ended:
            found.append(stream.add(token))
    return [*found, stream.finish()]


def test_no_character_is_cut_and_each_comes_with_its_last_byte():
    text = "aé€😀"
    assert pieces(TOKENIZER.encode(text).tolist()) == ["a", "", "é", "", "", "€", "", "", "", "😀", ""]


def test_the_pieces_are_the_text_whatever_the_bytes():
    draw = random.Random(0)
    fragments = [
        b"\xf0\x9f\x98\x80",
        b"\xe2\x82\xac",
        b"a",
        b"\x80",
        b"\xe2\x82",
        b"\xff",
        b"\xf0\x9f",
        b"\xef\xbf\xbd",
    ]
    for _ in range(300):
        ids = list(b"".join(draw.choices(fragments, k=6)))
        found = pieces(ids)
        assert "".join(found) == TOKENIZER.decode(ids)
        assert "".join(found).count("😀") == sum(piece.count("😀") for piece in found)


@pytest.mark.parametrize("text", ["one two END three", "an E, an EN and an END", "END", "no stop at all: EN"])
def test_text_ends_before_a_stop_string_and_nothing_of_it_is_shown(text):
    found = pieces(TOKENIZER.encode(text).tolist(), stop=["END", "never"])
    assert "".join(found) == text.partition("END")[0]
    for shown in range(len(found)):
        assert text.startswith("".join(found[:shown]))


def test_what_cannot_begin_a_stop_string_does_not_wait():
    assert pieces(list(b"aab!"), stop=["aaab"]) == ["", "", "aab", "!", ""]


def test_the_earliest_of_several_stop_strings_counts():
    assert "".join(pieces(list(b"abcdef"), stop=["de", "cdef", "b"])) == "a"


def test_an_empty_stop_string_is_refused():
    with pytest.raises(ValueError, match="empty string"):
        TextStream(TOKENIZER, ["x", ""])


def test_texts_of_a_batch_are_what_each_prompt_gets_alone(make_model):
    model = make_model(vocab_size=256)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(8 if parameter.dim() > 1 else 1)

    def texts(prompts, stop=()):
        begun = [document_of(TOKENIZER, prompt) for prompt in prompts]
        steps = list(stream_texts(model, TOKENIZER, begun, 12, sampling=GREEDY, stop=stop))
        return ["".join(piece or "" for piece in row) for row in zip(*steps, strict=True)], steps

    prompts = ["", "hello wor", "né"]
    together, _ = texts(prompts)
    assert together == [texts([alone])[0][0] for alone in prompts]
    stop = together[1][3:5]
    stopped, steps = texts(prompts, [stop])
    assert stopped == [text.partition(stop)[0] for text in together]
    over = [row[1] is None for row in steps]
    assert over == sorted(over)  # once None, always None
