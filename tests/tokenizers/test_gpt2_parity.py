"""GPT2Tokenizer against transformers' on the real vocabulary, and against ids written down once."""

import random

import pytest
import torch

from gpt2rt import GPT2Tokenizer
from gpt2rt.tokenizers import StreamDecoder

# from transformers 5.23.0 with the published vocabulary
GOLDEN = {
    "": [],
    "Hello world": [15496, 995],
    " Hello world": [18435, 995],
    "Hello, y'all! How are you 😁 ?": [15496, 11, 331, 6, 439, 0, 1374, 389, 345, 30325, 223, 5633],
    "<|endoftext|>": [50256],
    "a<|endoftext|> b": [64, 50256, 275],
    "   three  spaces\n\n\ttab": [220, 220, 1115, 220, 9029, 628, 197, 8658],
    "été naïve Größe": [25125, 2634, 41492, 1902, 9101, 39683, 68],
    "12345 3.14 I'll don't WE'LL": [10163, 2231, 513, 13, 1415, 314, 1183, 836, 470, 12887, 6, 3069],
}


@pytest.fixture(scope="module")
def id_rows():
    rng = random.Random(1)
    return [[rng.randrange(50257) for _ in range(rng.randrange(1, 20))] for _ in range(2000)]


@pytest.mark.proves("T2", "I17")
@pytest.mark.parametrize(("text", "ids"), GOLDEN.items(), ids=repr)
def test_golden_ids(gpt2, text, ids):
    assert gpt2(text)["input_ids"] == gpt2.encode(text) == ids
    assert gpt2.decode(ids) == text


@pytest.mark.proves("T2")
def test_ids_of_random_text(gpt2, theirs, texts):
    ours = gpt2(texts)["input_ids"]
    assert ours == theirs(texts)["input_ids"]
    assert gpt2.batch_decode(ours) == texts


@pytest.mark.proves("T2")
def test_text_of_random_ids(gpt2, theirs, id_rows):
    for skip in (False, True):
        assert gpt2.batch_decode(id_rows, skip) == theirs.batch_decode(id_rows, skip_special_tokens=skip)


@pytest.mark.proves("T3")
def test_streamed_text_of_random_ids(gpt2, id_rows):
    for ids in id_rows:
        stream = StreamDecoder(gpt2, skip_special_tokens=False)
        assert "".join(stream.put([token]) for token in ids) + stream.end() == gpt2.decode(ids)


CALLS = [
    {"padding": True},
    {"padding": "max_length", "max_length": 40, "truncation": True, "padding_side": "left"},
    {"padding": True, "pad_to_multiple_of": 8, "return_token_type_ids": True},
    {"truncation": True, "max_length": 9, "return_offsets_mapping": True, "return_special_tokens_mask": True},
    {"truncation": True, "max_length": 9, "stride": 2, "return_overflowing_tokens": True, "return_length": True},
    {"max_length": 5},
    {"add_special_tokens": False, "return_attention_mask": False},
    {"split_special_tokens": True},
]


@pytest.mark.proves("T6", "T10")
@pytest.mark.parametrize("bos", [False, True], ids=["plain", "bos"])
@pytest.mark.parametrize("call", CALLS, ids=lambda call: ",".join(call))
def test_calls(gpt2, theirs, texts, call, bos):
    for tokenizer in (gpt2, theirs):
        tokenizer.pad_token = "<|endoftext|>"
        tokenizer.add_bos_token = bos
    batch = [*texts[:40], "<|endoftext|> end"]
    assert dict(gpt2(batch, **call)) == dict(theirs(batch, **call))
    for text in batch[:10]:
        assert dict(gpt2(text, **call)) == dict(theirs(text, **call))
    pairs = [text or "?" for text in texts[40:81]]
    if "stride" not in call:
        assert dict(gpt2(batch, pairs, **call)) == dict(theirs(batch, pairs, **call))


@pytest.mark.proves("T10")
@pytest.mark.parametrize("strategy", ["longest_first", "only_first", "only_second"])
@pytest.mark.parametrize("side", ["right", "left"])
def test_truncation_of_pairs(gpt2, theirs, texts, strategy, side):
    compared = 0
    theirs.truncation_side = side
    for first, second in zip(texts[:80], texts[80:160], strict=True):
        lengths = [len(gpt2.encode(first)), len(gpt2.encode(second))]
        for room in (7, 20):
            cut = {"only_first": lengths[0], "only_second": lengths[1], "longest_first": 10**9}[strategy]
            call = {"truncation": strategy, "max_length": room, "return_offsets_mapping": True}
            if not second or cut <= sum(lengths) - room:
                continue
            assert dict(gpt2(first, second, truncation_side=side, **call)) == dict(theirs(first, second, **call))
            compared += 1
    assert compared > 20


def test_tensors(gpt2, theirs, texts):
    import numpy as np
    import torch

    for tokenizer in (gpt2, theirs):
        tokenizer.pad_token = tokenizer.eos_token
    for kind, same in (("pt", torch.equal), ("np", np.array_equal)):
        for batch in (texts[:9], "one text", [""]):
            ours, other = (
                gpt2(batch, padding=True, return_tensors=kind),
                theirs(batch, padding=True, return_tensors=kind),
            )
            assert ours.keys() == other.keys()
            for name in ours:
                assert ours[name].dtype == other[name].dtype
                assert same(ours[name], other[name])


@pytest.mark.proves("T10")
def test_maps_between_tokens_words_and_characters(gpt2, theirs):
    text = "Hello, wörld 😀 again"
    ours, other = gpt2(text, "second one"), theirs(text, "second one")
    assert ours.tokens() == other.tokens()
    assert ours.word_ids() == other.word_ids()
    assert ours.sequence_ids() == other.sequence_ids()
    for index in range(len(ours["input_ids"])):
        assert ours.token_to_chars(index) == other.token_to_chars(index)
        assert ours.token_to_word(index) == other.token_to_word(index)
        assert ours.token_to_sequence(index) == other.token_to_sequence(index)
    assert ours.token_to_word(-1) == other.token_to_word(len(ours["input_ids"]) - 1)
    for index in range(len(text)):
        assert ours.char_to_token(index) == other.char_to_token(index)
        assert ours.char_to_word(index) == other.char_to_word(index)
    for word in range(4):
        assert ours.word_to_tokens(word) == other.word_to_tokens(word)
        assert ours.word_to_chars(word) == other.word_to_chars(word)
        assert ours.word_to_tokens(0, word, 1) == other.word_to_tokens(0, word, 1)


@pytest.mark.proves("T10")
def test_pad(gpt2, theirs):
    for tokenizer in (gpt2, theirs):
        tokenizer.pad_token = tokenizer.eos_token
    rows = [{"input_ids": [1, 2, 3]}, {"input_ids": [4]}]
    for call in ({}, {"padding_side": "left"}, {"padding": "max_length", "max_length": 6}, {"pad_to_multiple_of": 4}):
        assert dict(gpt2.pad(rows, **call)) == dict(theirs.pad(rows, **call))
    assert dict(gpt2.pad({"input_ids": [1, 2]}, "max_length", 4)) == dict(
        theirs.pad({"input_ids": [1, 2]}, "max_length", 4)
    )
    ours = gpt2.pad(rows, return_tensors="pt")
    assert ours["input_ids"].tolist() == [[1, 2, 3], [4, 50256, 50256]]
    assert ours["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]


@pytest.mark.proves("T8")
def test_files_travel_both_ways(gpt2, theirs, texts, tmp_path, hf):
    for tokenizer in (gpt2, theirs):
        tokenizer.add_tokens(["<fun>", "two words"])
        tokenizer.add_special_tokens({"pad_token": "<|pad|>"})
        tokenizer.add_bos_token = True
    gpt2.save_pretrained(tmp_path / "ours")
    theirs.save_pretrained(tmp_path / "theirs")
    read_back = [
        hf.module.GPT2Tokenizer.from_pretrained(tmp_path / "ours"),
        hf.module.AutoTokenizer.from_pretrained(tmp_path / "ours"),
        GPT2Tokenizer.from_pretrained(tmp_path / "ours"),
        GPT2Tokenizer.from_pretrained(tmp_path / "theirs"),
    ]
    batch = [*texts[:100], "a <fun> two words<|pad|>x<|endoftext|>"]
    expected = theirs(batch)["input_ids"]
    assert gpt2(batch)["input_ids"] == expected
    for tokenizer in read_back:
        assert tokenizer(batch)["input_ids"] == expected
        assert (tokenizer.pad_token, tokenizer.pad_token_id, len(tokenizer)) == ("<|pad|>", 50259, 50260)
        assert tokenizer.decode(expected[-1], skip_special_tokens=True) == "a <fun> two wordsx"


def test_arguments_by_position(gpt2, theirs):
    for tokenizer in (gpt2, theirs):
        tokenizer.add_special_tokens({"pad_token": "<|pad|>"})
        tokenizer.add_bos_token = True
    call = (["one two three four", "five"], None, None, None, False, "max_length", True, 6, 0, False, 6, "left", "np")
    ours, expected = gpt2(*call), theirs(*call)
    assert ours.keys() == expected.keys()
    assert all((ours[name] == expected[name]).all() for name in expected)
    encode = ("one two three", "four", False, "max_length", "only_first", 3, 0, "left", "pt")
    assert gpt2.encode(*encode).tolist() == theirs.encode(*encode).tolist()
    assert gpt2.encode("one two", None, False) == theirs.encode("one two", None, False)
    assert gpt2.batch_decode([[11, 50256], [12]], True, False) == theirs.batch_decode([[11, 50256], [12]], True, False)


def test_a_single_row_is_decoded_as_one_text(gpt2, theirs):
    ids = gpt2("Hello world")["input_ids"]
    for row in (ids, torch.tensor(ids), [torch.tensor(i) for i in ids]):
        assert gpt2.batch_decode(row) == theirs.batch_decode(row) == ["Hello world"]


@pytest.mark.parametrize("ids", [[1.5], torch.tensor([1.0]), "a"])
def test_ids_that_are_no_integers_are_refused(gpt2, openai_gpt, ids):
    for tokenizer in (gpt2, openai_gpt):
        with pytest.raises(TypeError, match="cannot be interpreted as an integer"):
            tokenizer.decode(ids)
