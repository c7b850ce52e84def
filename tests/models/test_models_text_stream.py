import random

import pytest
import torch
from tokenizer_kinds import KINDS, LINES, LOSSLESS, tokenizer_of_kind

from lightsparse.data import ByteTokenizer
from lightsparse.data.tasks.symbols import SymbolTokenizer
from lightsparse.models.sampling import GREEDY
from lightsparse.models.text_stream import TextStream, document_of, stream_texts, text_after

TOKENIZER = ByteTokenizer()


def pieces(ids, stop=(), tokenizer=TOKENIZER, before=()) -> list[str]:
    stream, found = TextStream(tokenizer, stop, before), []
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


@pytest.mark.parametrize("kind", KINDS)
def test_the_pieces_are_the_text_of_all_tokens_whatever_the_tokenizer(kind):
    tokenizer, draw = tokenizer_of_kind(kind), random.Random(1)
    ids = range(tokenizer.vocab_size)
    bytes_ = [id for token, id in tokenizer._vocabulary.items() if token.startswith("<0x")]
    rows = [[draw.choice(bytes_ if bytes_ and draw.random() < 0.4 else ids) for _ in range(40)] for _ in range(60)]
    texts = ["".join(draw.choices(LINES, k=3)), " two  spaces", "naïve 日本語 🙂🙂\n\n🙂 end", "\n", ""]
    for row in [*rows, *(tokenizer.encode(text).tolist() for text in texts)]:
        assert "".join(pieces(row, tokenizer=tokenizer)) == tokenizer.decode(row)
    for row in rows:
        for cut in (1, 7, 20):
            whole, head = tokenizer.decode(row), tokenizer.decode(row[:cut])
            if whole.startswith(head) and not head.endswith("\ufffd"):  # the prompt is text, not half a character
                assert head + text_after(tokenizer, [tokenizer.bos, *row[:cut]], row[cut:]) == whole


@pytest.mark.parametrize("kind", KINDS)
def test_text_comes_word_by_word(kind):
    tokenizer = tokenizer_of_kind(kind)
    ids = tokenizer.encode("The lazy dog jumps over the quick brown fox again and again").tolist()
    found = pieces(ids, tokenizer=tokenizer)
    assert all(found[1:-1]) and found[-1] == ""


def test_a_byte_waits_for_the_end_of_its_run_since_another_may_make_it_unreadable():
    tokenizer = tokenizer_of_kind("llama 2")
    byte = {value: tokenizer._vocabulary[f"<0x{value:02X}>"] for value in (0x0A, 0xC3, 0xA9, 0xFF)}
    word = tokenizer.encode("dog").tolist()
    assert pieces([*word, byte[0xC3], byte[0xA9], *word], tokenizer=tokenizer)[len(word) :][:3] == ["", "", "é do"]
    assert "".join(pieces([byte[0x0A], byte[0xFF], *word], tokenizer=tokenizer)) == "\ufffd\ufffd dog"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("stop", [" over the", "fox ju", "again. The"])
def test_a_stop_string_with_a_space_is_found(kind, stop):
    tokenizer = tokenizer_of_kind(kind)
    ids = tokenizer.encode("The quick brown fox jumps over the lazy dog again. The end").tolist()
    whole, wanted = tokenizer.decode(ids), stop.lower() if kind == "word piece" else stop
    assert wanted in whole
    assert "".join(pieces(ids, [wanted], tokenizer)) == whole.partition(wanted)[0]


@pytest.mark.parametrize("kind", LOSSLESS)
def test_a_prompt_and_what_follows_it_are_the_text(kind):
    tokenizer = tokenizer_of_kind(kind)
    text = "".join(LINES)
    ids = document_of(tokenizer, text)
    for cut in range(1, len(ids), 5):
        assert tokenizer.decode(ids[:cut]) + text_after(tokenizer, ids[:cut], ids[cut:]) == text


def test_symbols_keep_the_spaces_between_them():
    tokenizer = SymbolTokenizer(30)
    assert "".join(pieces([7, 29, 7], tokenizer=tokenizer, before=[3])) == " 7 29 7"


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
