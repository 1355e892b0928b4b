"""The visible text of a continuation: whole characters, cut exactly at the stop string that is complete first."""

import random

import pytest

from gpt2rt import GPT2Tokenizer
from gpt2rt.engine.output_text import OutputText
from gpt2rt.engine.params import SamplingParams
from gpt2rt.tokenizers import AutoTokenizer, StreamDecoder
from gpt2rt.tokenizers.bytelevel import byte_to_char


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained("gpt2rt/tiny-gpt2")


@pytest.fixture(scope="module")
def byte_tokenizer():
    """A token for each byte, and pairs of letters, so that one text has many spellings."""
    vocab = {char: byte for byte, char in byte_to_char().items()}
    merges = [(left, right) for left in "ab" for right in "ab"]
    for left, right in merges:
        vocab[left + right] = len(vocab)
    vocab["<|endoftext|>"] = len(vocab)
    return GPT2Tokenizer(vocab, merges, eos_token="<|endoftext|>", bos_token="<|endoftext|>")


def feed(tokenizer, ids, prompt_ids=(), min_tokens=0, **settings):
    """The text after each token, the final text, the stop reason, and how many tokens were read."""
    output = OutputText(tokenizer, prompt_ids, SamplingParams(**settings))
    shown, used = [], 0
    for used, token in enumerate(ids, 1):
        done = output.put(token, counts=used >= min_tokens)
        shown.append(output.text)
        assert done == (output.stop_reason is not None)
        if done:
            break
    output.end()
    assert all(output.text.startswith(text) for text in shown)
    return shown, output.text, output.stop_reason, used


def reference(text, stops, include=False):
    """(text, stop) by the definition: the stop string whose last character comes first, the longest of several."""
    places = [(text.find(stop) + len(stop), -len(stop), stop) for stop in stops if stop in text]
    if not places:
        return text, None
    end, length, stop = min(places)
    return text[: end if include else end + length], stop


def spell(tokenizer, text, rng):
    """Some tokens for a text of letters a and b."""
    ids, place = [], 0
    while place < len(text):
        pair = tokenizer.convert_tokens_to_ids(text[place : place + 2]) if place + 2 <= len(text) else None
        width = 2 if pair is not None and rng.random() < 0.5 else 1
        ids.append(pair if width == 2 else tokenizer.convert_tokens_to_ids(text[place]))
        place += width
    return ids


@pytest.mark.proves("fault:F39")
def test_the_cut_does_not_depend_on_the_tokens(byte_tokenizer):
    rng = random.Random(0)
    stopped = 0
    for _ in range(600):
        text = "".join(rng.choice("ab") for _ in range(rng.randint(1, 24)))
        stops = ["".join(rng.choice("ab") for _ in range(rng.randint(1, 6))) for _ in range(rng.randint(1, 4))]
        include = rng.random() < 0.3
        expected, stop = reference(text, stops, include)
        stopped += stop is not None
        shown, final, reason, _ = feed(
            byte_tokenizer, spell(byte_tokenizer, text, rng), stop=stops, include_stop_str_in_output=include
        )
        assert (final, reason) == (expected, stop), (text, stops)
        # nothing of the stop string was ever seen
        assert all(expected.startswith(piece) for piece in shown)
    assert 100 < stopped < 590


@pytest.mark.proves("fault:F39")
def test_a_stop_string_over_tokens_and_characters(tokenizer):
    text = "Once there was a 🌶️ fire.\nEND of it"
    ids = tokenizer.encode(text, add_special_tokens=False)
    for stop in ("\nEND", "🌶️", "️ fire.", "there was", "é", "Once", "it"):
        shown, final, reason, used = feed(tokenizer, ids, stop=[stop])
        assert (final, reason) == reference(text, [stop])
        assert all("\ufffd" not in piece for piece in shown)
        if reason:
            # the token that completes it is the last
            assert stop in tokenizer.decode(ids[:used])
            assert stop not in tokenizer.decode(ids[: used - 1])


def test_text_that_could_become_a_stop_string_is_held_back_and_shown_at_the_end(byte_tokenizer):
    ids = byte_tokenizer.encode("xSTOx", add_special_tokens=False)
    shown, final, reason, _ = feed(byte_tokenizer, ids, stop="STOP")
    assert shown == ["x", "x", "x", "x", "xSTOx"]
    assert (final, reason) == ("xSTOx", None)
    shown, final, reason, _ = feed(byte_tokenizer, ids[:-1], stop="STOP")
    assert shown[-1] == "x"
    assert (final, reason) == ("xSTO", None)


def test_the_first_that_is_complete_wins(byte_tokenizer):
    ids = byte_tokenizer.encode("xabcd", add_special_tokens=False)
    assert feed(byte_tokenizer, ids, stop=["abcd", "bc"])[1:3] == ("xa", "bc")
    assert feed(byte_tokenizer, ids, stop=["c", "abc", "bc"])[1:3] == ("x", "abc")


def test_stop_strings_before_min_tokens_are_passed_over(byte_tokenizer):
    ids = byte_tokenizer.encode("a.b.c.d", add_special_tokens=False)
    assert feed(byte_tokenizer, ids, stop=".")[1:] == ("a", ".", 2)
    assert feed(byte_tokenizer, ids, stop=".", min_tokens=3)[1:] == ("a.b", ".", 4)
    # the beginning may lie where nothing counts yet
    assert feed(byte_tokenizer, ids, stop=".c", min_tokens=5)[1:] == ("a.b", ".c", 5)
    assert feed(byte_tokenizer, ids, stop=".b", min_tokens=4)[1:] == ("a.b.c.d", None, 7)
    twice = byte_tokenizer.encode("xxxx", add_special_tokens=False)
    assert feed(byte_tokenizer, twice, stop="xx", min_tokens=3)[1:] == ("x", "xx", 3)


def test_the_prompt_is_not_searched(byte_tokenizer):
    prompt = byte_tokenizer.encode("say st", add_special_tokens=False)
    ids = byte_tokenizer.encode("op now", add_special_tokens=False)
    assert feed(byte_tokenizer, ids, prompt, stop="stop")[1:3] == ("op now", None)


def test_half_characters_are_never_shown(byte_tokenizer):
    ids = byte_tokenizer.encode("é🌶", add_special_tokens=False)
    shown, final, _, _ = feed(byte_tokenizer, ids)
    assert shown == ["", "é", "é", "é", "é", "é🌶"]
    assert final == "é🌶"
    # unfinished at the end: as decode shows it
    shown, final, _, _ = feed(byte_tokenizer, ids[:4])
    assert shown[-1] == "é"
    assert final == byte_tokenizer.decode(ids[:4]) == "é\ufffd"


def test_a_character_that_the_prompt_began(byte_tokenizer):
    ids = byte_tokenizer.encode("Hello 🌶!", add_special_tokens=False)
    shown, final, _, _ = feed(byte_tokenizer, ids[8:], ids[:8])
    assert shown == ["", "🌶", "🌶!"]
    assert final == "🌶!"


@pytest.mark.parametrize("name", ["gpt2rt/tiny-gpt2", "gpt2rt/tiny-gpt1"])
def test_without_stop_strings_the_text_is_the_decoders(name):
    tokenizer = AutoTokenizer.from_pretrained(name)
    ids = tokenizer.encode("the king went to the river , and there he saw a ship .")
    prompt, ids = ids[:3], ids[3:]
    decoder = StreamDecoder(tokenizer, prompt)
    _, final, reason, _ = feed(tokenizer, ids, prompt)
    assert final == decoder.put(ids) + decoder.end()
    assert reason is None
    stop = final[8:12]
    assert feed(tokenizer, ids, prompt, stop=stop)[1:3] == reference(final, [stop])


def test_special_tokens(tokenizer):
    ids = [*tokenizer.encode("a b", add_special_tokens=False), tokenizer.eos_token_id]
    assert feed(tokenizer, ids)[1] == "a b"
    assert feed(tokenizer, ids, skip_special_tokens=False)[1] == "a b" + tokenizer.eos_token
    assert feed(tokenizer, ids, skip_special_tokens=False, stop="oftext")[1:3] == ("a b<|end", "oftext")


def test_without_detokenization_there_is_no_text(tokenizer):
    ids = tokenizer.encode("a b", add_special_tokens=False)
    assert feed(tokenizer, ids, detokenize=False)[1:3] == ("", None)
    assert feed(None, ids)[1:3] == ("", None)


def test_a_tokenizer_that_only_decodes(byte_tokenizer):
    class Other:
        def decode(self, ids, skip_special_tokens=False):
            return byte_tokenizer.decode(ids, skip_special_tokens=skip_special_tokens)

    ids = byte_tokenizer.encode("né STOP x", add_special_tokens=False)
    shown, final, reason, _ = feed(Other(), ids, stop="STOP")
    assert (final, reason) == ("né ", "STOP")
    assert all("\ufffd" not in piece for piece in shown)


def test_after_the_stop_nothing_changes(byte_tokenizer):
    output = OutputText(byte_tokenizer, (), SamplingParams(stop="b"))
    tokens = byte_tokenizer.encode("xbc", add_special_tokens=False)
    done = [output.put(token) for token in tokens]
    output.end()
    assert (output.text, output.stop_reason) == ("x", "b")
    assert done == [False, True, True]
