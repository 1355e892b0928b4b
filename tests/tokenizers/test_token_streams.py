"""Decoders as streams: what the tokenizers library and transformers make of the whole sequence, piece by piece."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders

from gpt2rt import BertTokenizer, OpenAIGPTTokenizer, PreTrainedTokenizerFast, StreamDecoder, TokenizerError
from gpt2rt.tokenizers.components import build_components
from gpt2rt.tokenizers.decoding import TokenStream, clean_up, inner_bytes

LLAMA = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
DECODERS = {
    "WordPiece": decoders.WordPiece(),
    "WordPiece as it is": decoders.WordPiece(cleanup=False),
    "end of word": decoders.BPEDecoder(),
    "Metaspace": decoders.Metaspace(),
    "Metaspace without prefix": decoders.Metaspace(prepend_scheme="never"),
    "bytes": decoders.ByteLevel(),
    "fallback": decoders.Sequence(LLAMA),
    "fallback, strip more": decoders.Sequence([*LLAMA[:3], decoders.Strip(" ", 2, 0)]),
    "fallback, Metaspace": decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()]),
}
TOKENS = ["a", "##b", "##", "</w>", "x</w>", "a</w>b", "▁a", "▁", "▁▁b", "<0xE6>", "<0x9D>", "<0xB1>", "<0xFF>",
          "<0x+1>", "<0x4g>", " ", ".", "'", "n't", "'s", "do", "not", "n", "t",
          "Ġa", "Ã", "©", "[SEP]", "!", "", "aa"]  # fmt: skip
token_lists = st.lists(st.sampled_from(TOKENS), max_size=9)


def spec_of(decoder):
    return json.loads(decoder.__getstate__())


def streamed(stream, tokens):
    return "".join(map(stream.put, tokens)) + stream.end()


@pytest.mark.proves("T3", "T11", "T13")
@pytest.mark.parametrize("decoder", DECODERS.values(), ids=DECODERS)
@given(tokens=token_lists)
@settings(max_examples=150, deadline=None, derandomize=True)
def test_pieces_together_are_what_the_library_decodes(decoder, tokens):
    assert streamed(TokenStream(spec_of(decoder)), tokens) == decoder.decode(tokens)
    assert streamed(TokenStream(None), tokens) == " ".join(tokens)


@pytest.mark.proves("T9")
@given(pieces=st.lists(st.text(alphabet=" .,'ntsmrev!?a", max_size=5), max_size=6))
@settings(max_examples=400, deadline=None, derandomize=True)
def test_cleaned_text(pieces):
    stream = TokenStream({"type": "WordPiece", "prefix": "", "cleanup": False}, cleaned=True)
    # an empty prefix joins the pieces as they are
    assert streamed(stream, pieces) == clean_up("".join(pieces))


def test_text_comes_as_soon_as_it_is_sure():
    stream = TokenStream({"type": "BPEDecoder", "suffix": "</w>"})
    assert [stream.put(token) for token in ("hel", "lo</w>", "you</w>")] == ["hel", "lo", " you"]
    assert stream.end() == ""
    stream = TokenStream(spec_of(DECODERS["fallback"]))
    assert [stream.put(token) for token in ("▁a", "<0xC3>", "<0xA9>", "b", "<0xC3>")] == ["a", "", "", "éb", ""]
    assert stream.end() == "\ufffd"


@pytest.fixture(scope="module")
def wordpiece():
    tokens = [
        "[PAD]",
        "[UNK]",
        "[CLS]",
        "[SEP]",
        "[MASK]",
        "the",
        "cat",
        "##s",
        "n",
        "t",
        "'",
        ".",
        ",",
        "東",
        "do",
        "not",
    ]
    return BertTokenizer({token: i for i, token in enumerate(tokens)}, clean_up_tokenization_spaces=True)


@pytest.fixture(scope="module")
def metaspace():
    vocab = [["<unk>", 0.0], *([token, -1.0] for token in TOKENS if token)]
    content = {
        "model": {"type": "Unigram", "unk_id": 0, "vocab": vocab},
        "pre_tokenizer": spec_of(decoders.Metaspace()),
        "decoder": spec_of(decoders.Sequence(LLAMA)),
    }
    from tokenizers import Tokenizer

    components = build_components(content, "test")
    components.backend.decoder = decoders.Sequence(LLAMA)
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(components.backend.to_str()))


@pytest.fixture(scope="module")
def end_of_word():
    tokens = ["<unk>", "a", "b", "a</w>", "b</w>", "ab</w>"]
    return OpenAIGPTTokenizer(
        {token: i for i, token in enumerate(tokens)}, [("a", "b</w>")], additional_special_tokens=["<x>", "</w>y"]
    )


@pytest.mark.proves("T3", "T11", "T13")
@pytest.mark.parametrize("kind", ["wordpiece", "metaspace", "end_of_word"])
@given(data=st.data())
@settings(max_examples=120, deadline=None, derandomize=True)
def test_stream_decoder_on_any_chunks(kind, data, wordpiece, metaspace, end_of_word):
    tokenizer = {"wordpiece": wordpiece, "metaspace": metaspace, "end_of_word": end_of_word}[kind]
    ids = data.draw(st.lists(st.integers(0, len(tokenizer) + 2), max_size=14))
    skip = data.draw(st.booleans())
    cuts = sorted(data.draw(st.lists(st.integers(0, len(ids)), max_size=4)))
    stream = StreamDecoder(tokenizer, skip_special_tokens=skip)
    chunks = [ids[a:b] for a, b in zip([0, *cuts], [*cuts, len(ids)], strict=True)]
    assert "".join(map(stream.put, chunks)) + stream.end() == tokenizer.decode(ids, skip_special_tokens=skip)
    # ready for another text
    assert stream.put(ids) + stream.end() == tokenizer.decode(ids, skip_special_tokens=skip)


@pytest.mark.parametrize("kind", ["wordpiece", "end_of_word"])
@given(data=st.data())
@settings(max_examples=80, deadline=None, derandomize=True)
def test_what_new_ids_add_to_a_prompt(kind, data, wordpiece, end_of_word):
    tokenizer = {"wordpiece": wordpiece, "end_of_word": end_of_word}[kind]
    ids = data.draw(st.lists(st.sampled_from([5, 6, 7] if kind == "wordpiece" else [1, 3, 5]), min_size=1, max_size=9))
    cut = data.draw(st.integers(0, len(ids)))
    stream = StreamDecoder(tokenizer, ids[:cut])
    assert tokenizer.decode(ids[:cut]) + stream.put(ids[cut:]) + stream.end() == tokenizer.decode(ids)


def test_bytes_in_the_middle_of_a_text(wordpiece, end_of_word, metaspace):
    assert [wordpiece.id_to_bytes(i) for i in (6, 7, 11, 13, 99)] == [b" cat", b"s", b".", " 東".encode(), b""]
    assert wordpiece.id_to_bytes(3) == b" [SEP]"
    assert wordpiece.id_to_bytes(3, skip_special_tokens=True) == b""
    assert [end_of_word.id_to_bytes(i) for i in (1, 5)] == [b"a", b"ab "]
    vocab = metaspace.get_vocab()
    assert [metaspace.id_to_bytes(vocab[token]) for token in ("▁a", "<0xFF>", "aa")] == [b" a", b"\xff", b"aa"]
    assert inner_bytes(None, "word") == b" word"
    assert inner_bytes({"type": "ByteLevel"}, "Ã") == b"\xc3"


@pytest.mark.parametrize(
    "parts",
    [[decoders.BPEDecoder(), decoders.Fuse()], [decoders.ByteLevel(), decoders.Metaspace()],
     [decoders.Strip("a", 1, 1)], [decoders.Fuse(), decoders.Metaspace()]],
    ids=["BPEDecoder", "ByteLevel", "Strip", "Fuse"],
)  # fmt: skip
def test_orders_that_a_stream_cannot_follow_are_refused(parts):
    content = {"model": {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"}}
    with pytest.raises(TokenizerError, match=r"file: decoder: .*(must|may)"):
        build_components({**content, "decoder": spec_of(decoders.Sequence(parts))}, "file")
