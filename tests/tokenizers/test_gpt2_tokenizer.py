"""GPT2Tokenizer: what transformers 5 lost or gets wrong, and what is refused (T1-T10; defects D1-D3)."""

import copy
import json
import pickle
import warnings

import pytest
import torch

from gpt2rt import GPT2Tokenizer, GPT2TokenizerFast, TokenizerError
from gpt2rt.errors import CheckpointError

END = "<|endoftext|>"


# ---- construction ----------------------------------------------------------------------------------------------------


@pytest.mark.proves("T1", "D1")
def test_both_spellings_and_both_kinds(tokenizer, small, tmp_path):
    vocab, merges = small
    paths = tokenizer.save_vocabulary(tmp_path)
    tokenizer.save_pretrained(tmp_path / "all")
    made = [
        GPT2Tokenizer(vocab, merges),
        GPT2Tokenizer(vocab=vocab, merges=[" ".join(pair) for pair in merges]),
        GPT2Tokenizer(*paths),
        GPT2Tokenizer(vocab_file=paths[0], merges_file=paths[1]),
        GPT2Tokenizer(tokenizer_file=tmp_path / "all" / "tokenizer.json"),
    ]
    expected = tokenizer("to be or not")
    assert len(expected["input_ids"]) > 2
    for other in made:
        assert other("to be or not") == expected
        assert len(other) == other.vocab_size == 300
    assert GPT2TokenizerFast is GPT2Tokenizer


@pytest.mark.proves("T1", "D1")
@pytest.mark.parametrize("arguments", [{}, {"vocab": {"a": 0}}, {"merges_file": "merges.txt"}], ids=str)
def test_half_a_vocabulary_is_an_error_not_an_empty_tokenizer(arguments):
    with pytest.raises(TokenizerError, match="is missing: pass vocab and merges"):
        GPT2Tokenizer(**arguments)


def test_missing_files(tmp_path):
    with pytest.raises(CheckpointError, match="does not exist"):
        GPT2Tokenizer(tmp_path / "vocab.json", tmp_path / "merges.txt")
    with pytest.raises(CheckpointError, match=r"has no tokenizer: expected tokenizer.json"):
        GPT2Tokenizer.from_pretrained(tmp_path)


@pytest.mark.proves("T2")
def test_defaults(tokenizer):
    assert tokenizer.model_max_length == int(1e30)
    assert (tokenizer.padding_side, tokenizer.truncation_side) == ("right", "right")
    assert tokenizer.model_input_names == ["input_ids", "attention_mask"]
    assert tokenizer.special_tokens_map == {"bos_token": END, "eos_token": END, "unk_token": END}
    assert tokenizer.all_special_tokens == [END]
    assert tokenizer.all_special_ids == [tokenizer.eos_token_id] == [299]
    assert tokenizer.pad_token is tokenizer.pad_token_id is None
    assert tokenizer.is_fast
    with pytest.raises(AttributeError, match="no attribute 'bos_tokne'"):
        _ = tokenizer.bos_tokne


def test_copies(tokenizer):
    tokenizer.add_special_tokens({"pad_token": "<|pad|>"})
    for twin in (copy.deepcopy(tokenizer), pickle.loads(pickle.dumps(tokenizer))):
        assert twin(["to be", "or"], padding=True) == tokenizer(["to be", "or"], padding=True)
        twin.add_tokens("<more>")
        assert len(twin) == len(tokenizer) + 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"add_bos_token": "yes"}, r"add_bos_token = 'yes', but it must be True or False"),
        ({"model_max_length": "long"}, r"model_max_length = 'long'"),
        ({"model_max_length": -5}, r"model_max_length = -5"),
        ({"errors": "repalce"}, r"errors = 'repalce' is no codec error handler"),
        ({"padding_side": "up"}, r"padding_side = 'up', but it must be 'left' or 'right'"),
        ({"bos_token": 7}, r"7 is no token"),
        ({"added_tokens_decoder": {"400": {"content": "<x>"}}}, r"'<x>' is listed with id 400, but .* its id is 300"),
    ],
)
def test_bad_arguments(small, arguments, message):
    with pytest.raises(TokenizerError, match=message):
        GPT2Tokenizer(*small, **arguments)


# ---- settings that transformers 5 ignores ----------------------------------------------------------------------------


@pytest.mark.proves("T3", "D3")
def test_errors_is_honoured(small):
    # the first byte of a two-byte character alone
    half = GPT2Tokenizer(*small).encode("ß")[:1]
    broken = [half[0], *GPT2Tokenizer(*small).encode(" ok")]
    assert GPT2Tokenizer(*small).decode(broken) == "\ufffd ok"
    assert GPT2Tokenizer(*small, errors="ignore").decode(broken) == " ok"
    with pytest.raises(UnicodeDecodeError):
        GPT2Tokenizer(*small, errors="strict").decode(broken)
    assert GPT2Tokenizer(*small, errors="backslashreplace").decode(broken) == "\\xc3 ok"


@pytest.mark.proves("T4", "D3")
def test_add_prefix_space_at_both_places(small):
    plain, prefixed = GPT2Tokenizer(*small), GPT2Tokenizer(*small, add_prefix_space=True)
    assert prefixed.encode("be") == plain.encode(" be") != plain.encode("be")
    assert plain.encode("be", add_prefix_space=True) == plain.encode(" be")
    assert prefixed.encode("be", add_prefix_space=False) == plain.encode("be")
    assert prefixed.encode(" be") == plain.encode(" be")
    assert plain.encode("be") != plain.encode(" be"), "the call changed nothing for good"


@pytest.mark.proves("T5", "D3")
def test_words_get_a_space_each(tokenizer):
    words = ["to", "be", "question"]
    encoding = tokenizer(words, is_split_into_words=True)
    assert encoding["input_ids"] == tokenizer.encode(" to be question")
    assert [word for i, word in enumerate(encoding.word_ids()) if i == 0 or word != encoding.word_ids()[i - 1]] == [
        0,
        1,
        2,
    ]
    batch = tokenizer([words, ["or"]], is_split_into_words=True)["input_ids"]
    assert batch == [tokenizer.encode(" to be question"), tokenizer.encode(" or")]
    with pytest.raises(TokenizerError, match="text 0 is str, expected a list of words"):
        tokenizer("to be", is_split_into_words=True)
    with pytest.raises(TokenizerError, match="pass is_split_into_words=True"):
        tokenizer([words, words])


@pytest.mark.proves("T9")
def test_split_special_tokens(tokenizer, small):
    assert tokenizer.encode(f"be{END}") == [*tokenizer.encode("be"), 299]
    pieces = tokenizer.encode(f"be{END}", split_special_tokens=True)
    assert 299 not in pieces
    assert tokenizer.decode(pieces) == f"be{END}"
    assert GPT2Tokenizer(*small, split_special_tokens=True).encode(END) == tokenizer.encode(
        END, split_special_tokens=True
    )
    assert tokenizer.encode(END) == [299]


# ---- special tokens --------------------------------------------------------------------------------------------------


@pytest.mark.proves("T6")
def test_bos_and_eos(tokenizer):
    text, pair = tokenizer.encode("be"), tokenizer.encode("or")
    tokenizer.add_bos_token = True
    assert tokenizer.encode("be") == [299, *text]
    assert tokenizer.encode("be", "or") == [299, *text, 299, *pair]
    tokenizer.add_eos_token = True
    encoding = tokenizer("be", "or", return_token_type_ids=True, return_special_tokens_mask=True)
    assert encoding["input_ids"] == [299, *text, 299, 299, *pair, 299]
    assert encoding["token_type_ids"] == [0] * (len(text) + 2) + [1] * (len(pair) + 2)
    assert sum(encoding["special_tokens_mask"]) == 4 == tokenizer.num_special_tokens_to_add(pair=True)
    assert tokenizer.encode("be", add_special_tokens=False) == text
    tokenizer.add_special_tokens({"bos_token": "<s>"})
    assert tokenizer.encode("be") == [300, *text, 299]
    tokenizer.bos_token = None
    with pytest.raises(TokenizerError, match="add_bos_token is on without a bos_token"):
        tokenizer("be")


@pytest.mark.proves("T9")
def test_adding_tokens(tokenizer):
    assert tokenizer.add_tokens(["<new>", "be", "<new>"]) == 1
    assert tokenizer.add_tokens("<other>") == 1
    assert tokenizer.add_tokens([]) == 0
    ids = tokenizer.encode("to<new>be<other>")
    assert [i for i in ids if i >= 300] == [300, 301]
    assert tokenizer.decode(ids) == "to<new>be<other>"
    assert tokenizer.decode(ids, skip_special_tokens=True) == "to<new>be<other>"
    assert tokenizer.get_added_vocab() == tokenizer.added_tokens_encoder
    assert tokenizer.get_added_vocab()["<other>"] == 301
    assert tokenizer.added_tokens_decoder[300].content == "<new>"
    assert tokenizer.vocab_size == 300
    assert len(tokenizer) == len(tokenizer.get_vocab()) == len(tokenizer.vocab) == 302
    with pytest.raises(TokenizerError, match="lone surrogate"):
        tokenizer.add_tokens("\ud800")


@pytest.mark.proves("T9")
def test_an_added_token_keeps_its_characters(tokenizer):
    # outside the byte alphabet or inside it, an added token is plain text
    for token in ("né", "two words", "東", "Ġ"):
        tokenizer.add_tokens(token)
        assert tokenizer.decode(tokenizer.encode(f"to{token}be")) == f"to{token}be"


@pytest.mark.proves("T9")
def test_special_tokens_by_name(tokenizer):
    assert tokenizer.add_special_tokens({"pad_token": "<|pad|>", "additional_special_tokens": ["<a>", "<b>"]}) == 3
    assert (tokenizer.pad_token, tokenizer.pad_token_id) == ("<|pad|>", 300)
    assert tokenizer.additional_special_tokens == tokenizer.extra_special_tokens == ["<a>", "<b>"]
    assert tokenizer.additional_special_tokens_ids == [301, 302]
    assert tokenizer.all_special_tokens == [END, "<|pad|>", "<a>", "<b>"]
    assert tokenizer.decode(tokenizer.encode("to<a>be<|pad|>"), skip_special_tokens=True) == "tobe"
    tokenizer.add_special_tokens({"extra_special_tokens": ["<c>"]}, replace_extra_special_tokens=False)
    assert tokenizer.additional_special_tokens == ["<a>", "<b>", "<c>"]
    with pytest.raises(ValueError, match="'pda_token' is no special token; known: bos_token"):
        tokenizer.add_special_tokens({"pda_token": "x"})


def test_setting_special_tokens(tokenizer):
    tokenizer.pad_token = tokenizer.eos_token
    assert tokenizer.pad_token_id == 299
    tokenizer.pad_token_id = 5
    assert tokenizer.pad_token == tokenizer.convert_ids_to_tokens(5)
    tokenizer.pad_token = None
    assert tokenizer.pad_token_id is None
    with pytest.raises(ValueError, match="no token has that id; ids go from 0 to 299"):
        tokenizer.pad_token_id = 300
    with pytest.warns(UserWarning, match=r"pad_token = '\[PAD\]' is not in the vocabulary.*add_special_tokens"):
        tokenizer.pad_token = "[PAD]"
    assert tokenizer.pad_token_id == tokenizer.unk_token_id == 299


def test_conversions(tokenizer):
    ids = tokenizer.encode(" to be")
    tokens = tokenizer.convert_ids_to_tokens(ids)
    assert tokens == tokenizer.tokenize(" to be")
    assert tokenizer.convert_tokens_to_ids(tokens) == ids
    assert tokenizer.convert_tokens_to_ids("nowhere") == tokenizer.unk_token_id
    assert tokenizer.convert_tokens_to_string(tokens) == " to be"
    assert tokenizer.convert_ids_to_tokens([299, *ids], skip_special_tokens=True) == tokens
    assert tokenizer.convert_ids_to_tokens(10**6) is None
    assert tokenizer.get_special_tokens_mask([299, *ids]) == [1] + [0] * len(ids)
    with pytest.raises(ValueError, match="call the tokenizer with return_special_tokens_mask=True"):
        tokenizer.get_special_tokens_mask(ids, already_has_special_tokens=False)
    assert tokenizer.tokenize("to", "be") == tokenizer.tokenize("to") + tokenizer.tokenize("be")


# ---- calls -----------------------------------------------------------------------------------------------------------


@pytest.mark.proves("T7")
def test_padding_needs_a_token(tokenizer):
    with pytest.raises(ValueError, match="Asking to pad but the tokenizer does not have a padding token"):
        tokenizer(["to", "be or"], padding=True)
    with pytest.raises(ValueError, match="Asking to pad"):
        tokenizer.pad([{"input_ids": [1]}])


@pytest.mark.proves("T10")
def test_shapes_of_results(tokenizer):
    assert isinstance(tokenizer("be")["input_ids"][0], int)
    assert isinstance(tokenizer(["be"])["input_ids"][0], list)
    assert tokenizer([])["input_ids"] == []
    assert tokenizer("") == {"input_ids": [], "attention_mask": []}
    encoding = tokenizer("be", return_tensors="pt")
    assert encoding.input_ids.shape == encoding["input_ids"].shape == (1, len(tokenizer.encode("be")))
    assert encoding.to("cpu")["input_ids"].dtype == torch.int64
    assert {**encoding}.keys() == {"input_ids", "attention_mask"}
    pairs = tokenizer([("to", "be"), ("or", "not")])["input_ids"]
    assert pairs == tokenizer(["to", "or"], ["be", "not"])["input_ids"]
    assert tokenizer(["to"], text_target=["be"])["labels"] == tokenizer(["be"])["input_ids"]
    assert tokenizer(text_target="be")["input_ids"] == tokenizer.encode("be")
    assert tokenizer.batch_encode_plus(["to", "be"]) == tokenizer(["to", "be"])
    assert tokenizer.encode_plus("to", "be") == tokenizer("to", "be")


@pytest.mark.proves("fault:F42")
@pytest.mark.parametrize(
    ("text", "call", "message"),
    [
        (None, {}, r"pass text or text_target"),
        (7, {}, r"text 0 is int, expected a string"),
        (["to", None], {}, r"text 1 is NoneType, expected a string"),
        ("to", {"text_pair": 5}, r"text_pair 0 is int"),
        (["to"], {"text_pair": ["be", "or"]}, r"text has 1 rows and text_pair has 2"),
        ("be\ud800", {}, r"text 0 holds the lone surrogate '\\ud800' at character 2"),
        ("to", {"padding": "longst"}, r"padding = 'longst', but it must be True"),
        ("to", {"truncation": "first"}, r"truncation = 'first', but it must be"),
        ("to", {"max_length": -1}, r"max_length = -1"),
        ("to", {"max_length": 2.5}, r"max_length = 2.5"),
        ("to", {"stride": -2}, r"stride = -2"),
        ("to", {"pad_to_multiple_of": 0}, r"pad_to_multiple_of = 0"),
        ("to", {"padding_side": "top"}, r"padding_side = 'top'"),
        ("to", {"return_tensors": "tf"}, r"return_tensors = 'tf', but it must be 'pt'"),
        (["to", "to be or"], {"return_tensors": "pt"}, r"'input_ids' has rows of \d+ to \d+ tokens.*padding=True"),
        ("to be or not", {"max_length": 3, "truncation": True, "stride": 3}, r"stride = 3 must be smaller than the 3"),
        ("to be or", {"max_length": 1, "truncation": "only_second"}, r"'only_second' needs a pair"),
        (
            "to",
            {"text_pair": "be or not to be", "max_length": 2, "truncation": "only_first"},
            r"must remove \d+ tokens",
        ),
    ],
    ids=lambda value: str(value)[:30],
)
def test_bad_calls(tokenizer, text, call, message):
    with pytest.raises(ValueError, match=message):
        tokenizer(text, **call)


def test_unknown_keywords(tokenizer):
    with pytest.raises(TypeError, match="max_lenght"):
        tokenizer("to", max_lenght=3)
    with pytest.raises(TypeError, match="skip_specials"):
        tokenizer.decode([1], skip_specials=True)


def test_a_long_text_warns_once(small):
    tokenizer = GPT2Tokenizer(*small, model_max_length=4)
    with pytest.warns(UserWarning, match=r"a text has \d+ tokens, more than the 4 positions of the model") as seen:
        tokenizer(["to be or not to be", "to be or not"])
    assert len(seen) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tokenizer("to be or not to be")
    assert len(tokenizer("to be or not to be", truncation=True)["input_ids"]) == 4
    tokenizer.pad_token = END
    assert len(tokenizer("to", padding="max_length")["input_ids"]) == 4
    tokenizer.add_bos_token = True
    assert (tokenizer.max_len_single_sentence, tokenizer.max_len_sentences_pair) == (3, 2)
    assert repr(tokenizer).startswith("GPT2Tokenizer(name_or_path='', vocab_size=300, model_max_length=4, special_tok")


def test_calls_with_different_settings_do_not_disturb_each_other(tokenizer):
    """One tokenizer, many threads, as in a server."""
    from concurrent.futures import ThreadPoolExecutor

    tokenizer.pad_token = END
    calls = [
        {"add_prefix_space": True},
        {"padding": "max_length", "max_length": 30},
        {"truncation": True, "max_length": 2},
        {"split_special_tokens": True},
        {},
    ]
    text = f"to be{END} or not to be"
    expected = [tokenizer(text, **call) for call in calls]
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(lambda i: tokenizer(text, **calls[i % 5]), range(200)))
    assert all(result == expected[i % 5] for i, result in enumerate(results))


# ---- decoding --------------------------------------------------------------------------------------------------------


def test_what_decode_takes(tokenizer):
    ids = tokenizer.encode("to be")
    for form in (ids, tuple(ids), torch.tensor(ids), torch.tensor(ids).numpy(), {"input_ids": ids}):
        assert tokenizer.decode(form) == "to be"
    assert tokenizer.decode(ids[0]) == tokenizer.decode([ids[0]])
    assert tokenizer.decode([ids, ids]) == tokenizer.decode(torch.tensor([ids, ids])) == ["to be", "to be"]
    assert tokenizer.batch_decode([ids, []]) == ["to be", ""]
    assert tokenizer.decode([]) == ""
    assert tokenizer.decode([*ids, 10**7]) == "to be", "a model's padded vocabulary has ids without a token"
    assert tokenizer.decode(ids, clean_up_tokenization_spaces=True) == "to be"
    with pytest.raises(ValueError, match="token id -1 is negative"):
        tokenizer.decode([-1])


# ---- files -----------------------------------------------------------------------------------------------------------


@pytest.mark.proves("T8", "D2")
def test_save_vocabulary_writes_the_two_files(tokenizer, tmp_path):
    paths = tokenizer.save_vocabulary(tmp_path, filename_prefix="my")
    assert [path.rsplit("/", 1)[1] for path in paths] == ["my-vocab.json", "my-merges.txt"]
    vocab = json.loads((tmp_path / "my-vocab.json").read_text(encoding="utf-8"))
    assert list(vocab.values()) == list(range(300))
    lines = (tmp_path / "my-merges.txt").read_text(encoding="utf-8").splitlines()
    assert lines[0] == "#version: 0.2"
    assert len(lines) == 1 + len(tokenizer._merges)


@pytest.mark.proves("T8")
@pytest.mark.parametrize("legacy", [None, True, False])
def test_everything_survives_saving(small, tmp_path, legacy):
    original = GPT2Tokenizer(
        *small,
        errors="ignore",
        pad_token="<|pad|>",
        add_prefix_space=True,
        add_bos_token=True,
        model_max_length=77,
        padding_side="left",
        truncation_side="left",
        additional_special_tokens=["<sep>"],
        init_kwargs={"own_setting": {"a": 1}},
    )
    original.add_tokens("<plain>")
    original.save_pretrained(tmp_path, legacy_format=legacy)
    assert (tmp_path / "tokenizer.json").exists() == (legacy is not True)
    assert (tmp_path / "merges.txt").exists() == (legacy is not False)
    loaded = GPT2Tokenizer.from_pretrained(tmp_path)
    assert loaded.get_vocab() == original.get_vocab()
    texts = ["to be<sep>", "<plain>or<|pad|>", f"é{END}"]
    assert loaded(texts, padding=True) == original(texts, padding=True)
    for name in ("errors", "add_prefix_space", "add_bos_token", "add_eos_token", "model_max_length", "padding_side",
                 "truncation_side", "additional_special_tokens", "special_tokens_map", "init_kwargs"):  # fmt: skip
        assert getattr(loaded, name) == getattr(original, name), name
    assert loaded.decode([*loaded.encode("be"), 301], skip_special_tokens=True) == " be"
    assert GPT2Tokenizer.from_pretrained(tmp_path, errors="strict", use_fast=False).errors == "strict"
    with pytest.raises(TypeError, match=r"unknown keywords: 'add_prefix_spaces'"):
        GPT2Tokenizer.from_pretrained(tmp_path, add_prefix_spaces=True)
    with pytest.raises(ValueError, match=r"proxies is not supported: set the environment variable HTTPS_PROXY"):
        GPT2Tokenizer.from_pretrained(tmp_path, proxies={"http": "x"})


@pytest.mark.proves("T8")
def test_files_of_old_versions(small, tmp_path):
    """added_tokens.json and special_tokens_map.json of transformers 2 to 4."""
    GPT2Tokenizer(*small).save_vocabulary(tmp_path)
    (tmp_path / "added_tokens.json").write_text('{"<b>": 301, "<a>": 300}')
    special = {"pad_token": "<a>", "bos_token": {"content": END, "lstrip": False}, "additional_special_tokens": ["<b>"]}
    (tmp_path / "special_tokens_map.json").write_text(json.dumps(special))
    (tmp_path / "tokenizer_config.json").write_text('{"max_len": 1024, "model_type": "gpt2"}')
    tokenizer = GPT2Tokenizer.from_pretrained(tmp_path)
    assert (tokenizer.pad_token_id, tokenizer.model_max_length, len(tokenizer)) == (300, 1024, 302)
    assert tokenizer.decode(tokenizer.encode("to<a>be<b>"), skip_special_tokens=True) == "tobe"


# ---- training --------------------------------------------------------------------------------------------------------


def test_training():
    texts = ["the cat sat on the mat"] * 5 + ["the dog 😀"]
    tokenizer = GPT2Tokenizer.train_from_iterator(iter(texts), 270, special_tokens=("<|endoftext|>", "<|pad|>"))
    assert tokenizer.vocab_size == len(tokenizer) == 270
    assert tokenizer.convert_ids_to_tokens([268, 269]) == [END, "<|pad|>"]
    assert len(tokenizer.encode("the cat")) < 7
    for text in ("anything, at all: é東😀\0", *texts):
        assert tokenizer.decode(tokenizer.encode(text)) == text
    again = GPT2Tokenizer.train_from_iterator(texts, 270, special_tokens=("<|endoftext|>", "<|pad|>"))
    assert again.get_vocab() == tokenizer.get_vocab()
    with pytest.raises(ValueError, match="vocab_size = 256, but it must be at least 257"):
        GPT2Tokenizer.train_from_iterator(texts, 256)


@pytest.mark.proves("fault:F42")
@pytest.mark.parametrize(
    "text", ["a\0b", "\0", "x" * 200_000, "\u202eabc\u202c \u200f"], ids=["nul", "only", "long", "rtl"]
)
def test_strange_texts_survive_the_round_trip(text):
    tokenizer = GPT2Tokenizer.from_pretrained("gpt2rt/tiny-gpt2")
    assert tokenizer.decode(tokenizer.encode(text), clean_up_tokenization_spaces=False) == text
