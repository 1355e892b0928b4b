"""OpenAIGPTTokenizer: against transformers' on the real vocabulary, against ids written down once, files, refusals."""

import json
import pickle
import random

import pytest

from gpt2rt import AutoTokenizer, OpenAIGPTTokenizer, OpenAIGPTTokenizerFast, StreamDecoder, TokenizerError
from gpt2rt.errors import CheckpointError

# from transformers 5.23.0 with the published vocabulary
GOLDEN = {
    "": [],
    "Hello world": [3570, 1276],
    "Hello, y'all! How are you 😁 ?": [3570, 240, 253, 256, 589, 267, 718, 640, 512, 0, 257],
    "été naïve Größe": [15821, 13391, 1697, 208, 243],
    "<unk>": [0],
    "a\n\tb": [246, 259],
    "東京": [0, 0],
    "I'll don't WE'LL 3.14": [249, 256, 665, 2310, 256, 241, 606, 256, 665, 281, 239, 7765],
}
WORDS = ["the", "cat", "sat", "on", "mat"]


@pytest.fixture
def tiny():
    """Letters and one merge, as constructor arguments."""
    letters = sorted(set("".join(WORDS)))
    tokens = ["<unk>", *letters, *(f"{letter}</w>" for letter in letters), "th", "the</w>"]
    return {token: i for i, token in enumerate(tokens)}, [("t", "h"), ("th", "e</w>")]


@pytest.fixture
def small_gpt(tiny):
    return OpenAIGPTTokenizer(*tiny)


@pytest.mark.proves("T11", "I17")
@pytest.mark.parametrize(("text", "ids"), GOLDEN.items(), ids=repr)
def test_golden_ids(openai_gpt, text, ids):
    assert openai_gpt(text)["input_ids"] == openai_gpt.encode(text) == ids


@pytest.mark.proves("T11")
def test_ids_of_random_text(openai_gpt, their_openai_gpt, texts):
    ours, theirs = openai_gpt(texts), their_openai_gpt(texts)
    assert dict(ours) == dict(theirs)
    assert ours.tokens(7) == theirs.tokens(7)


@pytest.mark.proves("T11")
def test_text_of_random_ids(openai_gpt, their_openai_gpt):
    rng = random.Random(1)
    rows = [[rng.randrange(40478) for _ in range(rng.randrange(20))] for _ in range(1000)]
    for skip in (False, True):
        assert openai_gpt.batch_decode(rows, skip) == their_openai_gpt.batch_decode(rows, skip_special_tokens=skip)
    for row in rows[:100]:
        tokens = openai_gpt.convert_ids_to_tokens(row)
        assert openai_gpt.convert_tokens_to_string(tokens) == their_openai_gpt.convert_tokens_to_string(tokens)


CALLS = [
    {"return_token_type_ids": True, "return_offsets_mapping": True, "return_special_tokens_mask": True},
    {"truncation": True, "max_length": 9, "return_offsets_mapping": True},
    {"truncation": True, "max_length": 9, "stride": 2, "return_overflowing_tokens": True, "return_length": True},
    {"split_special_tokens": True},
]


@pytest.mark.proves("T11")
@pytest.mark.parametrize("call", CALLS, ids=lambda call: ",".join(call))
def test_calls(openai_gpt, their_openai_gpt, texts, call):
    batch, pairs = [*texts[:60], "a <unk> b"], [text or "?" for text in texts[60:121]]
    assert dict(openai_gpt(batch, **call)) == dict(their_openai_gpt(batch, **call))
    if "stride" not in call:
        assert dict(openai_gpt(batch, pairs, **call)) == dict(their_openai_gpt(batch, pairs, **call))
    for text in batch[:10]:
        assert dict(openai_gpt(text, **call)) == dict(their_openai_gpt(text, **call))
    words = [["Hello", "wörld!"], ["two words"]]
    assert openai_gpt(words, is_split_into_words=True) == dict(their_openai_gpt(words, is_split_into_words=True))


@pytest.mark.proves("T11")
def test_padding(openai_files, hf, texts):
    ours, theirs = OpenAIGPTTokenizer(*openai_files), hf.module.OpenAIGPTTokenizer(*map(str, openai_files))
    with pytest.raises(ValueError, match="Asking to pad but the tokenizer does not have a padding token") as error:
        ours(["a", "b c"], padding=True)
    with pytest.raises(ValueError) as their_error:
        theirs(["a", "b c"], padding=True)
    assert str(error.value)[:60] == str(their_error.value)[:60]
    for tokenizer in (ours, theirs):
        tokenizer.add_special_tokens({"pad_token": "<pad>"})
        tokenizer.add_tokens(["NewWord"])
    batch = [*texts[:40], "a newword<pad>", "NewWord"]
    for call in ({"padding": True}, {"padding": "max_length", "max_length": 30, "padding_side": "left"}):
        assert dict(ours(batch, **call, truncation=True)) == dict(theirs(batch, **call, truncation=True))
    assert (len(ours), ours.pad_token_id, ours.vocab_size) == (len(theirs), theirs.pad_token_id, theirs.vocab_size)


@pytest.mark.proves("T11")
def test_maps_between_tokens_words_and_characters(openai_gpt, their_openai_gpt):
    text = "Hello, Wörld again"
    ours, theirs = openai_gpt(text, "second one"), their_openai_gpt(text, "second one")
    assert (ours.tokens(), ours.word_ids(), ours.sequence_ids()) == (
        theirs.tokens(), theirs.word_ids(), theirs.sequence_ids(),
    )  # fmt: skip
    for index in range(len(text)):
        assert ours.char_to_token(index) == theirs.char_to_token(index)
        assert ours.char_to_word(index) == theirs.char_to_word(index)


@pytest.mark.proves("T11")
def test_defaults(small_gpt, tiny, tmp_path):
    assert small_gpt.special_tokens_map == {"unk_token": "<unk>"}
    assert small_gpt.bos_token_id is small_gpt.eos_token_id is small_gpt.pad_token_id is None
    assert small_gpt.model_input_names == ["input_ids", "attention_mask"]
    assert small_gpt.do_lower_case
    assert not small_gpt.use_ftfy_spacy
    assert OpenAIGPTTokenizerFast is OpenAIGPTTokenizer
    assert small_gpt.tokenize("The CAT, t") == ["the</w>", "c", "a", "t</w>", "<unk>", "t</w>"]
    assert small_gpt.decode(small_gpt.encode("The CAT t")) == "the cat t"
    paths = small_gpt.save_vocabulary(tmp_path)
    assert paths == (str(tmp_path / "vocab.json"), str(tmp_path / "merges.txt"))
    assert (tmp_path / "merges.txt").read_text() == "#version: 0.2\nt h\nth e</w>\n"
    assert json.loads((tmp_path / "vocab.json").read_text()) == tiny[0]
    for made in (
        OpenAIGPTTokenizer(*paths),
        OpenAIGPTTokenizer(vocab_file=paths[0], merges_file=paths[1]),
        pickle.loads(pickle.dumps(small_gpt)),
    ):
        assert made("the mat").data == small_gpt("the mat").data


@pytest.mark.proves("T11", "T8")
def test_files_travel_both_ways(openai_files, hf, texts, tmp_path):
    ours, theirs = OpenAIGPTTokenizer(*openai_files), hf.module.OpenAIGPTTokenizer(*map(str, openai_files))
    for tokenizer in (ours, theirs):
        tokenizer.add_special_tokens({"pad_token": "<pad>", "eos_token": "<end>"})
        tokenizer.add_tokens(["plainword"])
    ours.save_pretrained(tmp_path / "ours")
    theirs.save_pretrained(tmp_path / "theirs")
    read_back = [
        OpenAIGPTTokenizer.from_pretrained(tmp_path / "ours"),
        AutoTokenizer.from_pretrained(tmp_path / "theirs"),
        hf.module.AutoTokenizer.from_pretrained(tmp_path / "ours"),
    ]
    batch = [*texts[:100], "a plainword<pad>thing<end>"]
    expected = theirs(batch)["input_ids"]
    for tokenizer in read_back:
        assert tokenizer(batch)["input_ids"] == expected
        assert (tokenizer.pad_token_id, tokenizer.eos_token_id, len(tokenizer)) == (40478, 40479, 40481)
        assert tokenizer.decode(expected[-1], skip_special_tokens=True) == theirs.decode(
            expected[-1], skip_special_tokens=True
        )


@pytest.mark.proves("T11", "T8")
@pytest.mark.parametrize("legacy", [None, True, False])
def test_everything_survives_saving(tiny, tmp_path, legacy):
    original = OpenAIGPTTokenizer(
        *tiny, pad_token="<pad>", model_max_length=7, padding_side="left", add_eos_token=False
    )
    original.add_tokens("plain")
    original.save_pretrained(tmp_path, legacy_format=legacy)
    assert (tmp_path / "tokenizer.json").exists() == (legacy is not True)
    assert (tmp_path / "vocab.json").exists() == (legacy is not False)
    loaded = OpenAIGPTTokenizer.from_pretrained(tmp_path)
    assert loaded.get_vocab() == original.get_vocab()
    batch = ["the plain<pad>", "mat"]
    assert loaded(batch, padding=True) == original(batch, padding=True)
    for name in ("model_max_length", "padding_side", "special_tokens_map", "init_kwargs", "add_eos_token"):
        assert getattr(loaded, name) == getattr(original, name), name


@pytest.mark.proves("T11")
def test_tokens_before_and_after_texts(tiny, tmp_path):
    tokenizer = OpenAIGPTTokenizer(*tiny, bos_token="<s>", eos_token="<e>", add_bos_token=True, add_eos_token=True)
    assert tokenizer.tokenize("the", "the", add_special_tokens=True) == ["<s>", "the</w>", "<e>"] * 2
    tokenizer.save_pretrained(tmp_path)
    from_file = OpenAIGPTTokenizer(tokenizer_file=tmp_path / "tokenizer.json")
    for loaded in (OpenAIGPTTokenizer.from_pretrained(tmp_path), from_file):
        assert loaded("the", "mat") == tokenizer("the", "mat")


@pytest.mark.proves("T11")
def test_streams(openai_gpt):
    rng = random.Random(2)
    for _ in range(200):
        ids = [rng.randrange(40478) for _ in range(rng.randrange(1, 15))]
        cut = rng.randrange(len(ids))
        stream = StreamDecoder(openai_gpt, ids[:cut], skip_special_tokens=False)
        text = "".join(stream.put([token]) for token in ids[cut:]) + stream.end()
        assert openai_gpt.decode(ids[:cut]) + text == openai_gpt.decode(ids)
    assert b"".join(map(openai_gpt.id_to_bytes, openai_gpt.encode("Hello, world"))) == b"hello , world "


@pytest.mark.proves("T11", "fault:F33")
def test_refusals(tiny, small, tokenizer, small_gpt, tmp_path):
    vocab, merges = tiny
    with pytest.raises(TokenizerError, match=r"unk_token = '<nope>' is not among the \d+ tokens"):
        OpenAIGPTTokenizer(vocab, merges, unk_token="<nope>")
    with pytest.raises(TokenizerError, match=r"needs the token 'xy', which is not among"):
        OpenAIGPTTokenizer({**vocab, "x": len(vocab), "y": len(vocab) + 1}, [("x", "y")])
    with pytest.raises(TokenizerError, match=r"merges is missing.*OpenAIGPTTokenizer.from_pretrained"):
        OpenAIGPTTokenizer(vocab)
    with pytest.raises(TypeError, match="unexpected keyword argument 'lower'"):
        OpenAIGPTTokenizer(vocab, merges, lower=True)
    # the other class's folder
    tokenizer.save_pretrained(tmp_path / "gpt2")
    with pytest.raises(TokenizerError, match="asks for 'GPT2Tokenizer', which OpenAIGPTTokenizer cannot replace; use"):
        OpenAIGPTTokenizer.from_pretrained(tmp_path / "gpt2")
    with pytest.raises(TokenizerError, match=r"end_of_word_suffix = None, but OpenAI GPT's BPE marks.*AutoTokenizer"):
        OpenAIGPTTokenizer(tokenizer_file=tmp_path / "gpt2" / "tokenizer.json")
    small_gpt.save_pretrained(tmp_path / "gpt1")
    good = json.loads((tmp_path / "gpt1" / "tokenizer.json").read_text())
    for part, value, message in (
        ("normalizer", {**good["normalizer"], "lowercase": False}, "normalizer.lowercase = False"),
        ("normalizer", {**good["normalizer"], "strip_accents": False}, "normalizer.strip_accents = False"),
        ("normalizer", None, "normalizer is None, but an OpenAI GPT tokenizer has BertNormalizer"),
        ("pre_tokenizer", {"type": "Whitespace"}, "pre_tokenizer is 'Whitespace'"),
        ("decoder", None, "decoder is None"),
    ):
        (tmp_path / "tokenizer.json").write_text(json.dumps({**good, part: value}))
        with pytest.raises(TokenizerError, match=message):
            OpenAIGPTTokenizer(tokenizer_file=tmp_path / "tokenizer.json")
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match=r"has no tokenizer: expected tokenizer.json, or vocab.json"):
        OpenAIGPTTokenizer.from_pretrained(tmp_path / "empty")
