"""SentencePiece models: ids and texts are those of the sentencepiece package itself."""

import io
import random
import struct
import unicodedata

import pytest
import sentencepiece

from gpt2rt import AutoTokenizer, PreTrainedTokenizerFast, TokenizerError
from gpt2rt.errors import CheckpointError
from gpt2rt.tokenizers.sentencepiece import read_sentencepiece

pytestmark = pytest.mark.proves("T13", "I16")

SENTENCES = [
    "First Citizen: before we proceed any further, hear me speak.",
    "All: speak, speak.",
    "東京 大学 est là",
    "You are all resolved rather to die than to famish?",
    "naïve café 123 45",
    "Nay, but speak not maliciously.",
]
OPTIONS = {
    "defaults": {},
    "bytes": {"byte_fallback": True},
    "as it is": {
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
        "add_dummy_prefix": False,
    },
    "own symbols": {"user_defined_symbols": ["<x>"], "pad_id": 3},
    "over spaces": {"split_by_whitespace": False},
    "other ids": {"unk_id": 2, "bos_id": -1, "eos_id": 0, "pad_id": 1},
}


def train(kind, **options):
    out = io.BytesIO()
    size = 330 if options.get("byte_fallback") else 75
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(SENTENCES * 3), model_writer=out, vocab_size=size, model_type=kind,
        character_coverage=0.99, hard_vocab_limit=False, minloglevel=2, num_threads=1, **options,
    )  # fmt: skip
    return out.getvalue()


@pytest.fixture(scope="module")
def batch(texts):
    rng = random.Random(3)
    chars = [*"abcdefghij    ABCDé東京😀,.'!?-\n\t\u00a0Ⅳﬁ①가▁", "the ", "speak", "  "]
    # the library's normalizer, which transformers uses too, loses a mark that follows a character which it replaces
    plain = [text for text in texts[:600] if not any(unicodedata.category(c) in ("Mn", "Me", "Cf") for c in text)]
    assert len(plain) > 200
    return [*("".join(rng.choice(chars) for _ in range(rng.randrange(25))) for _ in range(400)), *plain, *SENTENCES]


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("kind", ["unigram", "bpe"])
def test_ids_and_texts(kind, options, batch, tmp_path):
    path = tmp_path / "tokenizer.model"
    path.write_bytes(train(kind, **options))
    theirs = sentencepiece.SentencePieceProcessor(model_file=str(path))
    ours = AutoTokenizer.from_pretrained(tmp_path)
    assert type(ours) is PreTrainedTokenizerFast
    assert len(ours) == theirs.vocab_size()
    rows = [theirs.encode(text) for text in batch]
    assert ours(batch)["input_ids"] == rows
    known = [row for row in rows if theirs.unk_id() not in row]
    assert len(known) > 5
    assert ours.batch_decode(known) == [theirs.decode(row) for row in known]
    for name in ("unk", "bos", "eos", "pad"):
        token_id = getattr(theirs, f"{name}_id")()
        assert getattr(ours, f"{name}_token_id") == (None if token_id < 0 else token_id)
    if "user_defined_symbols" in options:
        assert ours.encode("a<x>b") == [*ours.encode("a"), ours.get_vocab()["<x>"], *ours.encode("b")[-1:]]
    # and through tokenizer.json
    ours.save_pretrained(tmp_path / "saved")
    assert AutoTokenizer.from_pretrained(tmp_path / "saved")(batch)["input_ids"] == rows


def test_transformers_reads_what_was_saved(hf, batch, tmp_path):
    (tmp_path / "spiece.model").write_bytes(train("unigram"))
    ours = AutoTokenizer.from_pretrained(tmp_path, add_eos_token=True)
    ours.save_pretrained(tmp_path / "saved")
    theirs = hf.module.AutoTokenizer.from_pretrained(tmp_path / "saved")
    assert ours(batch)["input_ids"] == theirs(batch)["input_ids"]
    assert ours.encode("speak")[-1] == theirs.eos_token_id == 2


def field(number, value):
    if isinstance(value, int):
        return bytes([*varint(number << 3), *varint(value)])
    return bytes([*varint(number << 3 | 2), *varint(len(value))]) + value


def varint(value):
    while value >= 0x80:
        yield value & 0x7F | 0x80
        value >>= 7
    yield value


def piece(text, score=-1.0, kind=1):
    data = field(1, text.encode()) + bytes([2 << 3 | 5]) + struct.pack("<f", score) + field(3, kind)
    return field(1, data)


GOOD = piece("<unk>", 0, 2) + piece("<s>", 0, 3) + piece("</s>", 0, 3) + piece("▁") + piece("a")


def test_a_model_made_by_hand(tmp_path):
    path = tmp_path / "tokenizer.model"
    path.write_bytes(GOOD + field(2, field(3, 1)))
    assert PreTrainedTokenizerFast(vocab_file=path).encode("aza") == [3, 4, 0, 4]


@pytest.mark.proves("fault:F32")
@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "it has no pieces"),
        (b"\xff" * 40, "a number has more than ten bytes"),
        (b"\x80", "is no SentencePiece model, or damaged"),
        (GOOD[:-3], "reaches over the end"),
        (b"{}", "is no SentencePiece model, or damaged"),
        (GOOD + piece("nan", float("nan")), "a piece has the score nan"),
        (GOOD + field(1, field(1, b"\xff\xfe")), "is no SentencePiece model, or damaged"),
        (GOOD + field(1, 7), "a number stands where text should be"),
        (GOOD + field(2, field(3, 3)), "is a word or character model"),
        (GOOD + field(2, field(40, 99)), "unk_id = 99, but there are 5 pieces"),
        (GOOD + field(2, field(40, 2**64 - 1)), "has no unknown piece"),
        (GOOD + piece("a"), "token 'a' has the ids 4 and 5"),
        (GOOD + piece("a") + field(2, field(3, 2)), "some of the 6 pieces are equal"),
        (GOOD + field(3, field(2, b"\x01\x02\x03")), "the parts make no tokenizer|the tokenizer library gave up"),
        (GOOD + field(3, field(2, b"\xff" * 64)), "the parts make no tokenizer|the tokenizer library gave up"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_damaged_models(tmp_path, data, message):
    path = tmp_path / "spiece.model"
    path.write_bytes(data)
    with pytest.raises(TokenizerError, match=message):
        AutoTokenizer.from_pretrained(tmp_path)


@pytest.mark.proves("fault:F32")
def test_unreadable_models(tmp_path):
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_sentencepiece(tmp_path / "nothing.model")


@pytest.mark.proves("fault:F32")
def test_a_model_cut_anywhere_is_refused_or_whole(tmp_path):
    data = train("unigram")
    rng = random.Random(0)
    path = tmp_path / "tokenizer.model"
    refused = 0
    for _ in range(60):
        damaged = bytearray(data[: rng.randrange(len(data))])
        for _ in range(rng.randrange(3)):
            if damaged:
                damaged[rng.randrange(len(damaged))] = rng.randrange(256)
        path.write_bytes(damaged)
        try:
            PreTrainedTokenizerFast(vocab_file=path).encode("speak, speak")
        except TokenizerError:
            refused += 1
    assert refused > 20
