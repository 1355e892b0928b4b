"""StreamDecoder: text as it comes, never half a character, and together exactly what decode gives."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpt2rt import GPT2Tokenizer
from gpt2rt.tokenizers import IncrementalDetokenizer, StreamDecoder


@pytest.fixture(scope="module")
def bytewise():
    """A tokenizer whose tokens are single bytes, so that every character of several bytes is spread out."""
    return GPT2Tokenizer.train_from_iterator([], 257)


def stream(tokenizer, ids, prompt=(), chunks=None, **keywords):
    """(pieces, with the flush last)."""
    decoder = StreamDecoder(tokenizer, prompt, **keywords)
    pieces = (
        [decoder.put(ids[i : i + 1]) for i in range(len(ids))] if chunks is None else [decoder.put(c) for c in chunks]
    )
    return [*pieces, decoder.end()]


@pytest.mark.proves("T3")
def test_a_character_comes_whole_with_its_last_token(bytewise):
    ids = bytewise.encode("a😀é東b")
    assert len(ids) == 1 + 4 + 2 + 3 + 1
    assert stream(bytewise, ids) == ["a", "", "", "", "😀", "", "é", "", "", "東", "b", ""]


@pytest.mark.parametrize("errors", ["replace", "ignore", "backslashreplace"])
def test_what_is_left_comes_at_the_end(errors):
    tokenizer = GPT2Tokenizer.train_from_iterator([], 257, errors=errors)
    ids = tokenizer.encode("ab😀")[:-1]
    pieces = stream(tokenizer, ids)
    assert pieces[:2] == ["a", "b"]
    assert pieces[2:-1] == ["", "", ""]
    assert "".join(pieces) == tokenizer.decode(ids)


@pytest.mark.proves("T3")
def test_strict_errors(bytewise):
    strict = GPT2Tokenizer.train_from_iterator([], 257, errors="strict")
    decoder = StreamDecoder(strict)
    assert decoder.put(strict.encode("é")[:1]) == ""
    with pytest.raises(UnicodeDecodeError):
        decoder.end()


def test_a_decoder_can_be_used_again(bytewise):
    decoder = StreamDecoder(bytewise)
    assert decoder.put(bytewise.encode("é")[:1]) == ""
    assert decoder.end() == "\ufffd"
    assert decoder.put(bytewise.encode("ok")) == "ok"
    assert decoder.end() == ""


def test_special_tokens(bytewise):
    ids = [*bytewise.encode("a"), 256, *bytewise.encode("b")]
    assert "".join(stream(bytewise, ids)) == "ab" == bytewise.decode(ids, skip_special_tokens=True)
    assert "".join(stream(bytewise, ids, skip_special_tokens=False)) == "a<|endoftext|>b"
    # a skipped token inside a character does not break it
    first, second = bytewise.encode("é")
    assert stream(bytewise, [first, 256, second]) == ["", "", "é", ""]


@pytest.mark.proves("T3")
@given(st.lists(st.integers(0, 256), max_size=40), st.integers(1, 5), st.booleans())
@settings(max_examples=300, deadline=None)
def test_any_bytes_in_any_pieces(ids, size, skip):
    tokenizer = test_any_bytes_in_any_pieces.tokenizer
    chunks = [ids[i : i + size] for i in range(0, len(ids), size)]
    pieces = stream(tokenizer, ids, chunks=chunks, skip_special_tokens=skip)
    assert "".join(pieces) == tokenizer.decode(ids, skip_special_tokens=skip)


test_any_bytes_in_any_pieces.tokenizer = GPT2Tokenizer.train_from_iterator([], 257)


@pytest.mark.parametrize("cut", [1, 2, 3])
def test_a_prompt_that_ends_inside_a_character(bytewise, cut):
    """The prompt is never shown again; the character that it began is, once it is complete."""
    ids = bytewise.encode("Hello world 🌶")
    prompt, new = ids[:-cut], ids[-cut:]
    assert "".join(stream(bytewise, [*new, *bytewise.encode(" hot")], prompt)) == "🌶 hot"
    # another character instead: the prompt's half was shown with the prompt
    assert "".join(stream(bytewise, bytewise.encode(" cold"), prompt)) == " cold"
    assert stream(bytewise, [], prompt) == [""]
    assert "".join(stream(bytewise, bytewise.encode("é"), prompt)) == "é"


def test_a_prompt_that_ends_between_characters(bytewise):
    for text in ("", "a", "é", "😀", "a😀"):
        prompt = bytewise.encode(text)
        for answer in ("x", "é", "😀😀"):
            assert "".join(stream(bytewise, bytewise.encode(answer), prompt)) == answer


def test_a_prompt_of_stray_bytes_belongs_to_itself(bytewise):
    stray = bytewise.encode("😀")[1:]
    assert "".join(stream(bytewise, bytewise.encode("ok"), stray)) == "ok"
    ids = bytewise.encode("😀")[1:]
    assert "".join(stream(bytewise, ids, bytewise.encode("a"))) == bytewise.decode(ids)


def test_only_the_end_of_a_long_prompt_is_looked_at(bytewise):
    asked = []

    class Counting:
        errors = "replace"

        def id_to_bytes(self, token_id, skip_special_tokens=False):
            asked.append(token_id)
            return bytewise.id_to_bytes(token_id, skip_special_tokens)

    StreamDecoder(Counting(), bytewise.encode("x" * 10_000))
    assert len(asked) <= 4


def test_random_text_over_learned_tokens(tokenizer):
    rng = random.Random(0)
    alphabet = "to be é東😀🌶\n<|endoftext|>"
    for _ in range(100):
        text = "".join(rng.choice(alphabet) for _ in range(30))
        ids = tokenizer.encode(text)
        assert "".join(stream(tokenizer, ids, skip_special_tokens=False)) == text
    assert IncrementalDetokenizer is StreamDecoder
