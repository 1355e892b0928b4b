"""Hostile tokenizer files (fault F32) for the classes that read any tokenizer.json: refused by name, never a panic."""

import base64
import copy
import json
import random
import warnings

import pytest

from gpt2rt import (
    AutoTokenizer,
    BertTokenizer,
    GPT2Tokenizer,
    OpenAIGPTTokenizer,
    PreTrainedTokenizerFast,
    TokenizerError,
)
from gpt2rt.errors import CheckpointError
from gpt2rt.tokenizers.patterns import check_pattern

pytestmark = pytest.mark.proves("fault:F32")

GOOD = {
    "normalizer": {"type": "Sequence", "normalizers": [{"type": "NFC"}, {"type": "Lowercase"}]},
    "pre_tokenizer": {"type": "Whitespace"},
    "model": {
        "type": "BPE",
        "unk_token": "<unk>",
        "vocab": {"<unk>": 0, "a": 1, "b": 2, "ab": 3},
        "merges": [["a", "b"]],
    },
    "post_processor": {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "<unk>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"<unk>": {"id": "<unk>", "ids": [0], "tokens": ["<unk>"]}},
    },
    "decoder": {"type": "Sequence", "decoders": [{"type": "Fuse"}]},
    "added_tokens": [{"id": 4, "content": "<new>", "special": True}],
}
UNIGRAM = {"type": "Unigram", "unk_id": 0, "vocab": [["<unk>", 0], ["a", -1.5]]}
WORDPIECE = {
    "type": "WordPiece",
    "unk_token": "<unk>",
    "continuing_subword_prefix": "##",
    "max_input_chars_per_word": 100,
    "vocab": {"<unk>": 0},
}


def change(path, value):
    content = copy.deepcopy(GOOD)
    spot = content
    for key in path[:-1]:
        spot = spot[key]
    spot[path[-1]] = value
    return content


def load(tmp_path, content):
    (tmp_path / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    return PreTrainedTokenizerFast.from_pretrained(tmp_path)


def test_the_good_file(tmp_path):
    tokenizer = load(tmp_path, GOOD)
    assert tokenizer.encode("AB b<new>") == [0, 3, 2, 4]


def split(pattern):
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


def template(**changes):
    return {**GOOD["post_processor"], **changes}


BAD = {
    # each of the first three loads in the tokenizers library and panics, or never ends, when a text is encoded
    "fixed length 0": (("pre_tokenizer",), {"type": "FixedLength", "length": 0}, "pre_tokenizer is 'FixedLength'"),
    "missing special": (("post_processor", "special_tokens"), {}, "adds '<unk>', which special_tokens does not list"),
    "endless pattern": (("pre_tokenizer",), split("(a+)+$"), r"'\+' repeats something that itself repeats"),
    "unknown part": (("normalizer",), {"type": "Exec", "code": "x"}, "normalizer is 'Exec', which is not run; known:"),
    "part of another kind": (("decoder",), {"type": "CTC"}, "decoder is 'CTC'"),
    "no part": (("decoder",), 7, "decoder is '7'"),
    "unknown field": (("pre_tokenizer", "shell"), "rm", "pre_tokenizer has unknown fields: 'shell'"),
    "nested sequence": (("normalizer", "normalizers", 0), GOOD["normalizer"], r"normalizer\[0\] is 'Sequence'"),
    "empty sequence": (("normalizer", "normalizers"), [], "must have 1 to 64 normalizers"),
    "no list": (("normalizer", "normalizers"), {"a": 1}, "must have 1 to 64 normalizers"),
    "missing field": (("normalizer",), {"type": "Strip", "strip_left": True}, "normalizer has no 'strip_right'"),
    "wrong flag": (
        ("normalizer",),
        {"type": "Strip", "strip_left": 1, "strip_right": True},
        "strip_left = 1",
    ),
    "empty pattern": (
        ("normalizer",),
        {"type": "Replace", "pattern": {"String": ""}, "content": "a"},
        "expected a non-empty",
    ),
    "no base64": (("normalizer",), {"type": "Precompiled", "precompiled_charsmap": "?"}, "is no base64 text"),
    "damaged charsmap": (
        ("normalizer",),
        {"type": "Precompiled", "precompiled_charsmap": base64.b64encode(b"\xff" * 99).decode()},
        "tokenizer library gave up|make no tokenizer",
    ),
    "two characters": (("pre_tokenizer",), {"type": "Metaspace", "replacement": "ab"}, "expected one character"),
    "model": (("model",), [], "model is list, expected an object"),
    "model type": (("model", "type"), "Neural", "model is 'Neural', which is not run"),
    "model without type": (("model",), {}, "model is None"),
    "dropout": (("model", "dropout"), 0.1, "model.dropout = 0.1, expected none"),
    "hole": (("model", "vocab", "ab"), 9, "token 'ab' has id 9, expected an integer from 0 to 3"),
    "huge id": (("model", "vocab", "ab"), 10**9, "has id 1000000000"),
    "negative id": (("model", "vocab", "ab"), -1, "has id -1"),
    "no text": (("model", "vocab"), {"<unk>": 0, "\ud800": 1}, r"token 1 holds the lone surrogate '\\ud800'"),
    "two owners": (("model", "vocab", "ab"), 2, "both have id 2"),
    "vocabulary": (("model", "vocab"), [["a", 1]], "must be a non-empty object"),
    "merges": (("model", "merges"), None, "merges must be a list"),
    "merge": (("model", "merges"), [["a", "c"]], "needs the token 'c'"),
    "half a merge": (("model", "merges"), ["a"], "is not a pair of tokens"),
    "unknown token": (("model", "unk_token"), "<no>", "unk_token = '<no>' is not among the 4 tokens"),
    "unknown token's type": (("model", "unk_token"), 3, "unk_token = 3, expected a string or null"),
    "unigram score": (("model",), {**UNIGRAM, "vocab": [["a", "b"]]}, r"vocab\[0\] = \['a', 'b'\]"),
    "unigram NaN": (("model",), {**UNIGRAM, "vocab": [["a", float("nan")]]}, "expected .token, finite score"),
    "unigram unk": (("model",), {**UNIGRAM, "unk_id": 7}, "unk_id = 7, expected a number below 2"),
    "unigram twice": (("model",), {**UNIGRAM, "vocab": [["a", 0], ["a", 1]]}, "token 'a' has the ids 0 and 1"),
    "unigram empty": (("model",), {**UNIGRAM, "vocab": []}, "must be a non-empty list"),
    "word length": (("model",), {**WORDPIECE, "max_input_chars_per_word": 0}, "expected an integer from 1 to 100000"),
    "template": (("post_processor",), template(single="A"), "single must be a list"),
    "template item": (("post_processor",), template(single=[{"Run": {"id": "A"}}]), "expected a Sequence or a Special"),
    "template text": (("post_processor",), template(single=[{"Sequence": {"id": "C", "type_id": 0}}]), "text 'C'"),
    "template ids": (
        ("post_processor",),
        template(special_tokens={"<unk>": {"id": "<unk>", "ids": [0, 1], "tokens": ["<unk>"]}}),
        "expected as many ids as tokens",
    ),
    "template id": (
        ("post_processor",),
        template(special_tokens={"<unk>": {"id": "<unk>", "ids": [77], "tokens": ["<unk>"]}}),
        "adds '<unk>' as id 77, but the vocabulary has it as 0",
    ),
    "sep": (
        ("post_processor",),
        {"type": "BertProcessing", "sep": ["[SEP]", 5], "cls": ["a", 1]},
        r"adds '\[SEP\]' as id 5, but the vocabulary has it as None",
    ),
    "added list": (("added_tokens",), {}, "added_tokens must be a list"),
    "added id": (("added_tokens", 0, "id"), 2**40, "has id 1099511627776, expected 4"),
    "added content": (("added_tokens", 0, "content"), "", "has no content"),
    "decoder pattern": (
        ("decoder",),
        {"type": "Replace", "pattern": {"Regex": "a"}, "content": ""},
        "must be a plain string",
    ),
    "decoder count": (("decoder",), {"type": "Strip", "content": "a", "start": 10**9, "stop": 0}, "0 to 100000"),
}


@pytest.mark.parametrize(("path", "value", "message"), BAD.values(), ids=BAD)
def test_bad_files(tmp_path, path, value, message):
    with pytest.raises(TokenizerError, match=message) as caught:
        load(tmp_path, change(path, value))
    assert "tokenizer" in str(caught.value)


@pytest.mark.parametrize("text", ["", "[1]", "nonsense", "[" * 100_000, '{"a": '])
def test_no_json_object(tmp_path, text):
    (tmp_path / "tokenizer.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"tokenizer.json"):
        AutoTokenizer.from_pretrained(tmp_path)


def test_files_that_are_too_large(tmp_path, monkeypatch):
    with open(tmp_path / "tokenizer.json", "wb") as file:
        file.truncate(257 * 2**20)
    with pytest.raises(CheckpointError, match="has 269484032 bytes, expected at most"):
        AutoTokenizer.from_pretrained(tmp_path)
    for name in ("vocab.txt", "tokenizer.model"):
        (tmp_path / "tokenizer.json").rename(tmp_path / name)
        with pytest.raises(CheckpointError, match="expected at most"):
            AutoTokenizer.from_pretrained(tmp_path)
        (tmp_path / name).rename(tmp_path / "tokenizer.json")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"bos_token": 7}, r"tokenizer_config.json: bos_token is 7, expected str or dict"),
        ({"pad_token": {"text": "a"}}, "is no token"),
        ({"added_tokens_decoder": ["a"]}, "added_tokens_decoder is .*expected dict"),
        ({"added_tokens_decoder": {"x": "a"}}, "has the id 'x', expected a number"),
        ({"added_tokens_decoder": {"9": {"content": "z"}}}, "'z' is listed with id 9, but .* its id is"),
        ({"model_max_length": "long"}, "model_max_length is 'long'"),
        ({"model_max_length": [1]}, r"model_max_length is \[1\]"),
        ({"additional_special_tokens": "abc"}, "additional_special_tokens is 'abc', expected list"),
        ({"additional_special_tokens": [5]}, "5 is no token"),
        ({"tokenizer_class": ["GPT2Tokenizer"]}, "tokenizer_class is|asks for"),
        ({"padding_side": 5}, "padding_side is 5, expected str"),
        ({"clean_up_tokenization_spaces": "no"}, "clean_up_tokenization_spaces = 'no'"),
        ({"model_input_names": "ids"}, "model_input_names is 'ids', expected list"),
        ({"chat_template": 5}, "chat_template is 5"),
        ({"chat_template": [{"name": "a"}]}, "each item must have 'name' and 'template'"),
    ],
    ids=str,
)
def test_bad_settings(tmp_path, config, message):
    (tmp_path / "tokenizer.json").write_text(json.dumps(GOOD))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(TokenizerError, match=message):
        AutoTokenizer.from_pretrained(tmp_path)


@pytest.mark.proves("fault:F33")
@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a\nb\na\n[UNK]\n", r"vocab.txt: token 'a' stands on the lines 1 and 3"),
        ("a\nb\n", r"unk_token = '\[UNK\]' is not among the 2 tokens"),
        ("", r"the vocabulary must be a non-empty object"),
    ],
)
def test_bad_vocab_txt(tmp_path, text, message):
    (tmp_path / "vocab.txt").write_text(text)
    with pytest.raises(TokenizerError, match=message):
        BertTokenizer.from_pretrained(tmp_path)
    (tmp_path / "vocab.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(CheckpointError, match="is not UTF-8 text"):
        BertTokenizer.from_pretrained(tmp_path)


def test_a_lone_surrogate_in_a_vocabulary(tmp_path):
    for cls, names in ((GPT2Tokenizer, "vocab.json"), (OpenAIGPTTokenizer, "vocab.json")):
        (tmp_path / names).write_text('{"<unk>": 0, "\\ud800": 1}')
        (tmp_path / "merges.txt").write_text("#version: 0.2\n")
        with pytest.raises(TokenizerError, match=r"vocab.json: token 1 holds the lone surrogate"):
            cls.from_pretrained(tmp_path)
    with pytest.raises(TokenizerError, match="vocab: token 1 holds the lone surrogate"):
        BertTokenizer({"[UNK]": 0, "\ud800": 1})


def test_bad_added_tokens_json(small, tmp_path):
    GPT2Tokenizer(*small).save_vocabulary(tmp_path)
    (tmp_path / "added_tokens.json").write_text('{"<b>": "300"}')
    with pytest.raises(TokenizerError, match="token '<b>' has id '300', expected a number"):
        GPT2Tokenizer.from_pretrained(tmp_path)


def test_names_in_files_reach_no_other_folder(tokenizer, tmp_path):
    """A config cannot point to a vocabulary elsewhere, and a prefix cannot write elsewhere."""
    tokenizer.save_pretrained(tmp_path / "m")
    config = json.loads((tmp_path / "m" / "tokenizer_config.json").read_text())
    for name in ("vocab_file", "tokenizer_file", "merges_file"):
        config[name] = "/etc/passwd"
    (tmp_path / "m" / "tokenizer_config.json").write_text(json.dumps(config))
    assert AutoTokenizer.from_pretrained(tmp_path / "m").encode("to be") == tokenizer.encode("to be")
    for prefix in ("../x", "/x", "a/b"):
        with pytest.raises(TokenizerError, match="must be a plain name without folders"):
            tokenizer.save_pretrained(tmp_path / "m", filename_prefix=prefix)
        with pytest.raises(TokenizerError, match="must be a plain name without folders"):
            tokenizer.save_vocabulary(tmp_path / "m", filename_prefix=prefix)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m"]


VALUES = [
    None,
    True,
    0,
    -1,
    2**40,
    1.5,
    float("nan"),
    "",
    "a",
    "<unk>",
    [],
    [None],
    {},
    {"a": {}},
    [["a", "b"]],
    "x" * 99,
]


def mutate(value, rng):
    """A copy with one value, somewhere, replaced, removed or repeated."""
    if isinstance(value, dict) and value and rng.random() < 0.9:
        key = rng.choice(sorted(value))
        if rng.random() < 0.1:
            return {k: v for k, v in value.items() if k != key}
        return {**value, key: mutate(value[key], rng)}
    if isinstance(value, list) and value and rng.random() < 0.9:
        at = rng.randrange(len(value))
        if rng.random() < 0.1:
            return [*value, value[at]]
        return [*value[:at], mutate(value[at], rng), *value[at + 1 :]]
    return rng.choice(VALUES)


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    """(class, tokenizer.json, tokenizer_config.json) of every kind."""
    out = [
        (PreTrainedTokenizerFast, GOOD, {"unk_token": "<unk>", "chat_template": "x", "bos_token": "a"}),
        (PreTrainedTokenizerFast, {"model": UNIGRAM, "pre_tokenizer": {"type": "Metaspace", "replacement": "▁"}}, {}),
    ]
    for number, one in enumerate(
        (
            BertTokenizer({"[UNK]": 0, "a": 1, "##b": 2}),
            OpenAIGPTTokenizer({"<unk>": 0, "a": 1, "b</w>": 2, "ab</w>": 3}, [("a", "b</w>")], bos_token="<s>"),
            GPT2Tokenizer({"a": 0, "b": 1, "ab": 2, "<|endoftext|>": 3}, [("a", "b")], add_bos_token=True),
        )
    ):
        folder = tmp_path_factory.mktemp(f"sound{number}")
        one.save_pretrained(folder)
        files = [json.loads((folder / name).read_text()) for name in ("tokenizer.json", "tokenizer_config.json")]
        out.append((type(one), *files))
    return out


def test_random_changes_are_refused_or_harmless(sound, tmp_path):
    rng = random.Random(0)
    refused = 0
    for round_number in range(600):
        cls, content, config = sound[round_number % len(sound)]
        if rng.random() < 0.7:
            content = mutate(content, rng)
        else:
            config = mutate(config, rng)
        (tmp_path / "tokenizer.json").write_text(json.dumps(content))
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
        for load_as in (AutoTokenizer, cls):
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    tokenizer = load_as.from_pretrained(tmp_path)
                    tokenizer.decode(tokenizer("ab b<s>", "a")["input_ids"])
            except (TokenizerError, CheckpointError):
                refused += 1
    assert 400 < refused < 1200


# ---- patterns --------------------------------------------------------------------------------------------------------

GPT2_PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
GPT4O = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|"
    r"\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@pytest.mark.parametrize(
    "pattern",
    [GPT2_PATTERN, GPT4O, " {2,}", "^ +| +$", r"\d{3}", "(?:abc)+", "[]a]+", "[^]]+", r"[[a-z]&&[^b]]+", r"\(",
     "a{2}b?", r"\x{4e00}-\u9fff|\p{Han}", "a++", "(?<=a)b", "(?>a+)b", "{"],
)  # fmt: skip
def test_patterns_that_are_run(pattern):
    from tokenizers import Regex

    assert check_pattern(pattern, "here") == pattern
    if pattern != "{":
        Regex(pattern)


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("(a+)+$", "repeats something that itself repeats"),
        ("(a|aa)+$", "repeats something that itself repeats or chooses"),
        ("(?:a|b)*c", "repeats something"),
        ("((a{2})*)*", "repeats something"),
        ("(a?){99}", "repeats something"),
        ("(?:(?:a{9}){9}){9}", "repeats something"),
        ("a*a*a*a*b", "4 unlimited repetitions in a row"),
        ("a{0,99}a{1,}a+a*", "4 unlimited repetitions"),
        (r"(?=a*a*b)a", "2 unlimited repetitions"),
        (r"(\s*[\r\n]+)x", "2 unlimited repetitions"),
        ("(x+)x+(x+)x+y", "4 unlimited repetitions"),
        (r"(a)\1", "refers back to a group"),
        (r"\k<n>", "refers back"),
        (r"\g<1>", "refers back"),
        ("(?P<n>a)", r"it has the group '\(\?P<'"),
        ("(?R)", "it has the group"),
        ("(", "a group is not closed"),
        ("a)", "a bracket too many"),
        ("[a", "a character class is not closed"),
        ("*a", "has nothing to repeat"),
        ("a**", "has nothing to repeat"),
        ("a\\", "ends with a backslash"),
        ("", "0 characters"),
        ("a" * 5000, "5000 characters"),
        ("(" * 50 + ")" * 50, "nested too deep"),
    ],
)
def test_patterns_that_are_refused(pattern, message):
    with pytest.raises(TokenizerError, match=message) as caught:
        check_pattern(pattern, "file: pre_tokenizer")
    assert str(caught.value).startswith("file: pre_tokenizer")
