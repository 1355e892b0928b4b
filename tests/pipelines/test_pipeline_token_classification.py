"""Token classification gives transformers' results under every aggregation strategy."""

import warnings

import pytest

from gpt2rt import BertTokenizer, pipeline

from .conftest import TEXTS, make_tokenizer

pytestmark = pytest.mark.proves("L6")
KIND = "ForTokenClassification"
LABELS = {0: "O", 1: "B-PER", 2: "I-PER", 3: "B-LOC", 4: "I-LOC"}
STRATEGIES = ["none", "simple", "first", "average", "max"]


@pytest.fixture
def model(make_model):
    return make_model(KIND, id2label=LABELS)


@pytest.fixture(autouse=True)
def quiet():
    """Both warn that GPT-2's tokenizer does not mark the tokens inside words; see the test of that warning."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_equals_transformers(both, model, tokenizer, same, strategy):
    ours, theirs = both("token-classification", model, tokenizer, aggregation_strategy=strategy)
    results = ours(TEXTS)
    assert any(results)
    same(results, theirs(TEXTS))
    same(ours(TEXTS[0]), theirs(TEXTS[0]))
    same(ours(TEXTS, ignore_labels=["PER", "B-LOC"]), theirs(TEXTS, ignore_labels=["PER", "B-LOC"]))
    same(ours(TEXTS[1], ignore_labels=[]), theirs(TEXTS[1], ignore_labels=[]))


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_words_equal_transformers(both, model, same, strategy):
    ours, theirs = both("ner", model, make_tokenizer(add_prefix_space=True), aggregation_strategy=strategy)
    words = [["the", "rain", "in", "town"], ["on", "Grüße"]]
    for options in ({}, {"delimiter": "--"}):
        options = {"is_split_into_words": True, "ignore_labels": [], **options}
        same(ours(words, **options), theirs(words, **options))
        same(ours(words[0], **options), theirs(words[0], **options))


@pytest.mark.parametrize("strategy", STRATEGIES[1:])
def test_stride_equals_transformers(both, make_model, same, strategy):
    # transformers pads the pieces and needs a pad token for it
    tokenizer = make_tokenizer(model_max_length=16, pad_token="<pad>")
    model = make_model(KIND, id2label=LABELS)
    ours, theirs = both("token-classification", model, tokenizer, aggregation_strategy=strategy)
    for stride in (0, 5):
        same(ours(TEXTS, stride=stride, ignore_labels=[]), theirs(TEXTS, stride=stride, ignore_labels=[]))
    # without it a text is cut
    same(ours(TEXTS[2]), theirs(TEXTS[2]))
    assert max(entity["end"] for entity in ours(TEXTS[2], ignore_labels=[])) < len(TEXTS[2])


def test_batches_do_not_change_results(model):
    tokenizer = make_tokenizer(model_max_length=16)
    pipe = pipeline("ner", model=model, tokenizer=tokenizer, aggregation_strategy="simple", stride=4)
    alone = [pipe(text) for text in TEXTS]
    for batch_size in (2, 3, 50):
        assert pipe(TEXTS, batch_size=batch_size) == alone
    assert list(pipe((text for text in TEXTS), batch_size=2)) == alone


def test_own_offsets(both, model, tokenizer, same):
    ours, theirs = both("token-classification", model, tokenizer)
    count = len(tokenizer(TEXTS[1])["input_ids"])
    offsets = [(index, index + 1) for index in range(count)]
    same(ours(TEXTS[1], offset_mapping=offsets), theirs(TEXTS[1], offset_mapping=offsets))


def test_words_can_be_set_once(model, tokenizer):
    pipe = pipeline("ner", model=model, tokenizer=tokenizer, is_split_into_words=True, ignore_labels=[])
    assert pipe([["on", "fire"]]) == pipe(["on", "fire"]) == pipe([["on", "fire"]], is_split_into_words=True)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_word_pieces_equal_transformers(both, make_model, same, strategy, tmp_path):
    """A tokenizer that marks the tokens inside words and adds special tokens, as that of Chinese GPT-2."""
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "the", "rain", "##s", "##y", "in", "##ner", "town", ",", "on", "##e"]
    (tmp_path / "vocab.txt").write_text("\n".join(pieces) + "\n")
    tokenizer = BertTokenizer(vocab_file=tmp_path / "vocab.txt", model_max_length=8)
    model = make_model(KIND, id2label=LABELS, vocab_size=len(pieces))
    ours, theirs = both("ner", model, tokenizer, aggregation_strategy=strategy, ignore_labels=[])
    texts = ["The rains, one inner town", "rainy snow in the town"]
    same(ours(texts), theirs(texts))
    if strategy != "none":
        same(ours(texts, stride=2), theirs(texts, stride=2))
        assert ours(texts, batch_size=2) == ours(texts)


def test_numbers_are_plain(model, tokenizer):
    pipe = pipeline("ner", model=model, tokenizer=tokenizer, ignore_labels=[])
    assert {type(entity["score"]) for entity in pipe(TEXTS[0])} == {float}
    assert {type(entity["start"]) for entity in pipe(TEXTS[0])} == {int}


def test_words_are_guessed_with_a_warning(model, tokenizer):
    pipe = pipeline("ner", model=model, tokenizer=tokenizer, aggregation_strategy="first")
    with pytest.warns(UserWarning, match="words are told by the spaces of the text"):
        pipe(TEXTS[0])


def test_refusals(model, tokenizer):
    pipe = pipeline("ner", model=model, tokenizer=tokenizer)
    with pytest.raises(ValueError, match="At least one input is required"):
        pipe([])
    with pytest.raises(ValueError, match="an input is a text, got int"):
        pipe(1)
    with pytest.raises(ValueError, match="aggregation_strategy = 'sum', but it must be one of none, simple, first"):
        pipe("a", aggregation_strategy="sum")
    with pytest.raises(ValueError, match="stride reads a text in overlapping pieces"):
        pipe("a", stride=3)
    with pytest.raises(ValueError, match="stride = 96, but it must be an integer from 0 to 95"):
        pipe("a", stride=96, aggregation_strategy="simple")
    with pytest.raises(ValueError, match="an input is a text, got list; pass is_split_into_words=True"):
        pipe([["a", "b"]])
    with pytest.raises(ValueError, match="an input is a list of words, got str"):
        pipe(["a", "b"], is_split_into_words=True, batch_size=1) and pipe("ab", is_split_into_words=True)
