"""use_ftfy_spacy: OpenAI GPT's tokens as the paper made them, against a plain restatement of the published code."""

import itertools
import pickle
import re
import sys

import pytest

from gpt2rt import OpenAIGPTTokenizer

pytestmark = pytest.mark.proves("T12")

SENTENCES = [
    "I don't know…\n\n“Nothing”, he said.",
    "She'd paid $3.50 (roughly) for it -- can't believe it!!!",
    "  white   space\tand\r\nlines\n \n end ",
    "dashes — – ― quotes ´a´ ‘b’ “c”",
    "a/b\\c|d_e[f]{g}*h+i;j~k",
    "cafÃ© naïve ÉTÉ ﬁne",
    "U.S. Mr. Smith's 10km e-mail: x@y.com http://a.b/c?d=e",
    "",
    "\n",
]


class Restated:
    """The published tokenizer in the plainest form: the whole word as characters, the best pair merged until none is
    left."""

    def __init__(self, vocab, merges):
        import ftfy
        from spacy.lang.en import English

        self.fix, self.words = ftfy.fix_text, English().tokenizer
        self.vocab, self.ranks = vocab, {pair: rank for rank, pair in enumerate(merges)}

    def standardize(self, text):
        for old, new in (("—", "-"), ("–", "-"), ("―", "-"), ("…", "..."), ("´", "'")):
            text = text.replace(old, new)
        for mark in '~!";?+,)(\\/*[]}{|_':
            text = re.sub(f"({re.escape(mark)}+)", r" \1 ", text)
        text = re.sub(r"\s*\n\s*", " \n ", text)
        return re.sub(r"[^\S\n]+", " ", text).strip()

    def pieces(self, word):
        parts = [*word[:-1], word[-1] + "</w>"]
        while len(parts) > 1:
            pairs = list(itertools.pairwise(parts))
            best = min(pairs, key=lambda pair: self.ranks.get(pair, float("inf")))
            if best not in self.ranks:
                break
            merged, at = [], 0
            while at < len(parts):
                if tuple(parts[at : at + 2]) == best:
                    merged.append(parts[at] + parts[at + 1])
                    at += 2
                else:
                    merged.append(parts[at])
                    at += 1
            parts = merged
        text = " ".join(parts)
        return ("\n</w>" if text == "\n  </w>" else text).split(" ")

    def ids(self, text):
        tokens = []
        for word in self.words(self.standardize(self.fix(text))):
            tokens += self.pieces(word.text.lower())
        return [self.vocab.get(token, self.vocab["<unk>"]) for token in tokens]


@pytest.fixture(scope="module")
def published(openai_files):
    return OpenAIGPTTokenizer(*openai_files, use_ftfy_spacy=True)


@pytest.fixture(scope="module")
def restated(published):
    return Restated(published._vocab, published._merges)


def test_ids_of_sentences(published, restated):
    for text in SENTENCES:
        assert published.encode(text) == restated.ids(text), text
    # an added token is one id, whatever stands around it
    assert published.encode("😀 東京 <unk>") == [*restated.ids("😀 東京"), published.unk_token_id]
    assert published.encode("x <unk>", split_special_tokens=True) == restated.ids("x <unk>")


def test_ids_of_random_text_and_of_shakespeare(published, restated, texts, test_data):
    lines = (test_data / "text" / "tinyshakespeare.txt").read_text(encoding="utf-8")[:6000].split("\n\n")
    batch = [text for text in [*texts[:700], *lines] if "<" not in text]
    assert published(batch)["input_ids"] == [restated.ids(text) for text in batch]


def test_the_line_break_has_its_own_token(published, openai_gpt):
    assert published.tokenize("one\n\n two") == ["one</w>", "\n</w>", "two</w>"]
    assert "\n</w>" not in openai_gpt.tokenize("one\n\n two"), "which is what the option is for"
    assert published.decode(published.encode("One\ntwo.")) == "one \n two ."


def test_calls(published):
    encoding = published(["Don't", "stop"], ["me now", "!"], return_token_type_ids=True)
    assert encoding.tokens(0) == ["do</w>", "n't</w>", "me</w>", "now</w>"]
    assert encoding["token_type_ids"] == [[0, 0, 1, 1], [0, 1]]
    assert encoding.word_ids(0) == [0, 1, 0, 1]
    assert published("one two three", truncation=True, max_length=2).tokens() == ["one</w>", "two</w>"]


def test_what_cannot_be_known_is_refused(published):
    with pytest.raises(ValueError, match="offsets are not known with use_ftfy_spacy"):
        published("text", return_offsets_mapping=True)
    encoding = published("text")
    for ask in (encoding.char_to_token, encoding.char_to_word, encoding.token_to_chars, encoding.word_to_chars):
        with pytest.raises(ValueError, match="offsets are not known"):
            ask(0)
    with pytest.raises(ValueError, match="is_split_into_words=True: with use_ftfy_spacy the words are spaCy's"):
        published(["two", "words"], is_split_into_words=True)
    with pytest.raises(ValueError, match="use_ftfy_spacy = 'yes', but it must be True or False"):
        OpenAIGPTTokenizer({"<unk>": 0}, [], use_ftfy_spacy="yes")


def test_the_option_is_saved(published, tmp_path):
    published.save_pretrained(tmp_path)
    loaded = OpenAIGPTTokenizer.from_pretrained(tmp_path)
    assert loaded.use_ftfy_spacy
    assert loaded.encode(SENTENCES[0]) == published.encode(SENTENCES[0])
    assert pickle.loads(pickle.dumps(loaded)).encode(SENTENCES[0]) == published.encode(SENTENCES[0])
    plain = OpenAIGPTTokenizer.from_pretrained(tmp_path, use_ftfy_spacy=False)
    assert plain.encode(SENTENCES[0]) != published.encode(SENTENCES[0])
    assert plain.backend_tokenizer.encode("A\nb").ids == published.backend_tokenizer.encode("A\nb").ids


@pytest.mark.parametrize("package", ["ftfy", "spacy"])
def test_without_the_packages(package, monkeypatch):
    for name in [name for name in sys.modules if name.split(".")[0] == package]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=r"needs the packages ftfy and spacy; .* pip install 'gpt2rt\["):
        OpenAIGPTTokenizer({"<unk>": 0}, [], use_ftfy_spacy=True)
    assert OpenAIGPTTokenizer({"<unk>": 0}, []).encode("a") == [0]
