"""Damaged and hostile tokenizer files (faults F32, F33): refused at load, never a panic or an endless pattern."""

import copy
import json

import pytest

from gpt2rt import GPT2Tokenizer, TokenizerError
from gpt2rt.errors import CheckpointError
from gpt2rt.tokenizers.base import guarded


@pytest.fixture
def whole(tokenizer, tmp_path):
    """The content of a good tokenizer.json with one added token."""
    tokenizer.add_tokens("<new>")
    tokenizer.save_pretrained(tmp_path / "good")
    return json.loads((tmp_path / "good" / "tokenizer.json").read_text(encoding="utf-8"))


def change(content, path, value):
    content = copy.deepcopy(content)
    spot = content
    for key in path[:-1]:
        spot = spot[key]
    spot[path[-1]] = value
    return content


def load(tmp_path, content):
    file = tmp_path / "tokenizer.json"
    file.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return GPT2Tokenizer(tokenizer_file=file)


def test_the_good_file(whole, tmp_path, tokenizer):
    assert load(tmp_path, whole)("to<new>be") == tokenizer("to<new>be")


PANICS = {
    # each of these loads in the tokenizers library and panics when a text is encoded
    "fixed length 0": (("pre_tokenizer",), {"type": "FixedLength", "length": 0}),
    "missing special": (
        ("post_processor",),
        {
            "type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": "[NO]", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {},
        },
    ),
    "endless pattern": (
        ("pre_tokenizer",),
        {"type": "Split", "pattern": {"Regex": "(a+)+$"}, "behavior": "Isolated", "invert": False},
    ),
}


@pytest.mark.proves("fault:F32")
@pytest.mark.parametrize(("path", "value"), PANICS.values(), ids=PANICS)
def test_f32_files_that_make_the_library_panic(whole, tmp_path, path, value):
    with pytest.raises(TokenizerError, match=r"tokenizer.json: (pre_tokenizer is|post_processor has the template)"):
        load(tmp_path, change(whole, path, value))


@pytest.mark.proves("fault:F32")
@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("model", "type"), "WordPiece", r"model is 'WordPiece', but a GPT-2 tokenizer has BPE"),
        (("model",), None, r"model is None"),
        (("model",), [1], r"model is '\[1\]'"),
        (("model", "dropout"), 0.1, r"model.dropout = 0.1, but GPT-2's BPE does not use it"),
        (("model", "byte_fallback"), True, r"model.byte_fallback = True"),
        (("model", "end_of_word_suffix"), "</w>", r"model.end_of_word_suffix = '</w>'"),
        (("model", "merges"), {"a": "b"}, r"model.merges must be a list"),
        (("model", "merges", 0), ["a"], r"merge 0: \['a'\] is not a pair"),
        (("model", "merges", 0), "a b c", r"merge 0: 'a b c' is not a pair"),
        (("model", "merges", 0), ["q", "@@"], r"merge 0 \('q' \+ '@@'\) needs the token '@@'"),
        (("model", "vocab"), [], r"the vocabulary must be a non-empty object"),
        (("model", "vocab", "extra"), 5, r"tokens .* both have id 5"),
        (("model", "vocab", "extra"), 10**9, r"token 'extra' has id 1000000000, expected an integer from 0 to 300"),
        (("model", "vocab", "extra"), -1, r"token 'extra' has id -1"),
        (("model", "vocab", "extra"), "7", r"token 'extra' has id '7'"),
        (("normalizer",), {"type": "Lowercase"}, r"normalizer is 'Lowercase', but a GPT-2 tokenizer has None"),
        (
            ("normalizer",),
            {"type": "Replace", "pattern": {"Regex": "(a+)+$"}, "content": ""},
            r"normalizer is 'Replace'",
        ),
        (("pre_tokenizer",), None, r"pre_tokenizer is None, but a GPT-2 tokenizer has ByteLevel"),
        (("pre_tokenizer", "use_regex"), False, r"use_regex = false"),
        (("pre_tokenizer", "add_prefix_space"), "yes", r"add_prefix_space = 'yes', expected true or false"),
        (("decoder",), {"type": "Metaspace"}, r"decoder is 'Metaspace'"),
        (("post_processor", "single"), "A", r"post_processor.single must be a list"),
        (("post_processor", "single"), ["A"], r"post_processor.single holds 'A'"),
        (("post_processor", "pair"), [], r"knows only an optional token before and after each text"),
        (("added_tokens",), {}, r"added_tokens must be a list"),
        (("added_tokens", 0), {"id": 3}, r"has no content"),
        (("added_tokens", 1, "id"), 400, r"added token '<new>' has id 400, expected 300"),
        (("added_tokens", 1, "id"), None, r"added token '<new>' has id None"),
        (("added_tokens", 1, "special"), "no", r"special = 'no'"),
    ],
    ids=lambda value: ".".join(map(str, value)) if isinstance(value, tuple) else "",
)
def test_f32_only_known_parts_are_accepted(whole, tmp_path, path, value, message):
    with pytest.raises(TokenizerError, match=message) as caught:
        load(tmp_path, change(whole, path, value))
    assert "tokenizer.json" in str(caught.value)


@pytest.mark.proves("fault:F32")
def test_f32_a_hole_in_the_vocabulary(whole, tmp_path):
    content = copy.deepcopy(whole)
    vocab = content["model"]["vocab"]
    token = next(token for token, token_id in vocab.items() if token_id == 299)
    vocab[token] = 300
    with pytest.raises(
        TokenizerError, match=r"has id 300, expected an integer from 0 to 299, .*does the vocabulary have a gap"
    ):
        load(tmp_path, content)


@pytest.mark.proves("fault:F32")
@pytest.mark.parametrize(
    "text", ["", "{", "[]", "[" * 100_000, "\ud800".encode("utf-8", "surrogatepass").decode("latin-1")]
)
def test_f32_no_json_object(tmp_path, text):
    with pytest.raises(CheckpointError, match=r"tokenizer.json"):
        load(tmp_path, text)


@pytest.mark.proves("fault:F32")
def test_f32_a_panic_of_the_library_is_an_ordinary_error():
    from tokenizers import Tokenizer, models, pre_tokenizers

    trap = Tokenizer(models.BPE(vocab={"a": 0}, merges=[]))
    trap.pre_tokenizer = pre_tokenizers.FixedLength(length=0)
    with pytest.raises(TokenizerError, match="the tokenizer library gave up"):
        guarded(trap.encode, "aaa")
    with pytest.raises(KeyboardInterrupt):
        guarded(lambda: (_ for _ in ()).throw(KeyboardInterrupt()))


# ---- vocab.json and merges.txt (F33) ---------------------------------------------------------------------------------


@pytest.fixture
def pair(tokenizer, tmp_path):
    tokenizer.save_vocabulary(tmp_path)
    return tmp_path / "vocab.json", tmp_path / "merges.txt"


@pytest.mark.proves("fault:F33")
@pytest.mark.parametrize(
    "edit",
    [
        lambda raw: b"\xef\xbb\xbf" + raw,
        lambda raw: raw.replace(b"\n", b"\r\n"),
        lambda raw: raw.replace(b"\n", b"\n\n") + b"\n\n",
        lambda raw: raw.split(b"\n", 1)[1],
        lambda raw: raw.rstrip(b"\n"),
    ],
    ids=["byte order mark", "CRLF", "blank lines", "no version", "no last newline"],
)
def test_f33_harmless_differences_in_merges(pair, tokenizer, edit):
    pair[1].write_bytes(edit(pair[1].read_bytes()))
    assert GPT2Tokenizer(*pair)("to be, or not") == tokenizer("to be, or not")


@pytest.mark.proves("fault:F33")
def test_f33_a_byte_order_mark_in_the_vocabulary(pair, tokenizer):
    pair[0].write_bytes(b"\xef\xbb\xbf" + pair[0].read_bytes())
    assert GPT2Tokenizer(*pair)("to be, or not") == tokenizer("to be, or not")


@pytest.mark.proves("fault:F33")
def test_f33_a_version_line_that_is_a_merge(small, tmp_path):
    """A pair that begins like a comment, on a later line, is a merge."""
    vocab, merges = small
    vocab = {**vocab, "##": len(vocab)}
    tokenizer = GPT2Tokenizer(vocab, [*merges, ("#", "#")])
    paths = tokenizer.save_vocabulary(tmp_path)
    assert GPT2Tokenizer(*paths).encode("##") == [vocab["##"]]


@pytest.mark.proves("fault:F33")
@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("one", r"merges.txt, line 5: 'one' is not a pair of tokens"),
        ("a b c", r"'a b c' is not a pair"),
        ("a  b", r"'a  b' is not a pair"),
        ("zz zz", r"needs the token 'zz', which is not among the 300 .* do vocab.json and merges.txt come from one"),
    ],
)
def test_f33_merges_that_do_not_fit(pair, line, message):
    lines = pair[1].read_text(encoding="utf-8").split("\n")
    lines[4] = line
    pair[1].write_text("\n".join(lines), encoding="utf-8")
    with pytest.raises(TokenizerError, match=message):
        GPT2Tokenizer(*pair)


@pytest.mark.proves("fault:F33")
def test_f33_merges_that_are_no_text(pair):
    pair[1].write_bytes(b"#version: 0.2\n\xff\xfe")
    with pytest.raises(CheckpointError, match="is not UTF-8 text"):
        GPT2Tokenizer(*pair)
    pair[1].unlink()
    pair[1].mkdir()
    with pytest.raises(CheckpointError, match="cannot be read"):
        GPT2Tokenizer(*pair)


# ---- tokenizers of other kinds ---------------------------------------------------------------------------------------


@pytest.mark.proves("T13")
def test_other_tokenizers_are_named(tmp_path):
    (tmp_path / "vocab.txt").write_text("[PAD]\n[UNK]\n")
    with pytest.raises(TokenizerError, match=r"has vocab.txt, a WordPiece vocabulary \(BertTokenizer\); GPT2Tokenizer"):
        GPT2Tokenizer.from_pretrained(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "BertTokenizer"}')
    with pytest.raises(TokenizerError, match="asks for 'BertTokenizer', which GPT2Tokenizer cannot replace"):
        GPT2Tokenizer.from_pretrained(tmp_path)


def test_one_of_the_two_files(pair):
    pair[1].unlink()
    with pytest.raises(
        CheckpointError, match=r"expected tokenizer.json, or vocab.json and merges.txt; only vocab.json"
    ):
        GPT2Tokenizer.from_pretrained(pair[0].parent)


def test_bytes_outside_a_small_vocabulary_become_the_unknown_token():
    tokenizer = GPT2Tokenizer({"a": 0, "b": 1, "ab": 2, "<|endoftext|>": 3}, [("a", "b")])
    assert tokenizer.encode("abxb") == [2, 3, 1]


@pytest.mark.proves("fault:F23")
def test_remote_code(pair):
    with pytest.raises(ValueError, match="never runs code"):
        GPT2Tokenizer.from_pretrained(pair[0].parent, trust_remote_code=True)
    (pair[0].parent / "tokenizer_config.json").write_text('{"auto_map": {"AutoTokenizer": ["evil.T", null]}}')
    with pytest.warns(UserWarning, match="auto_map"):
        GPT2Tokenizer.from_pretrained(pair[0].parent)
