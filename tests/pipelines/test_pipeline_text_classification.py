"""Text classification and zero-shot classification give transformers' results."""

import pytest
import torch

from gpt2rt import pipeline

from .conftest import TEXTS

pytestmark = pytest.mark.proves("L5")
KIND = "ForSequenceClassification"
PAIR = {"text": "the rain", "text_pair": "in a town"}
LABELS = {0: "NEGATIVE", 1: "NEUTRAL", 2: "POSITIVE"}


@pytest.mark.parametrize(
    "fields",
    [
        {"id2label": LABELS},
        {"num_labels": 1},
        {"num_labels": 3, "problem_type": "regression"},
        {"num_labels": 3, "problem_type": "multi_label_classification"},
    ],
    ids=["softmax", "one label", "regression", "multi label"],
)
def test_equals_transformers(both, make_model, tokenizer, same, fields):
    ours, theirs = both("text-classification", make_model(KIND, **fields), tokenizer)
    for inputs in (TEXTS[0], TEXTS, PAIR, [PAIR, {"text": "on"}], [[["the rain", "in a town"]]]):
        same(ours(inputs), theirs(inputs))
        for options in ({"top_k": 2}, {"top_k": None}, {"top_k": 1}, {"function_to_apply": "sigmoid"}):
            same(ours(inputs, **options), theirs(inputs, **options))
    same(ours(TEXTS[2], truncation=True, max_length=4), theirs(TEXTS[2], truncation=True, max_length=4))


def test_top_k_of_the_pipeline(both, make_model, tokenizer, same):
    options = {"top_k": None, "function_to_apply": "none"}
    ours, theirs = both("sentiment-analysis", make_model(KIND, id2label=LABELS), tokenizer, **options)
    assert ours.task == "text-classification"
    same(ours(TEXTS), theirs(TEXTS))
    same(ours(TEXTS[0]), theirs(TEXTS[0]))
    same(ours(TEXTS[0], top_k=1), theirs(TEXTS[0], top_k=1))


@pytest.mark.parametrize("pad", [None, 266], ids=["no pad token", "pad token"])
def test_batches_do_not_change_results(make_model, tokenizer, pad):
    model = make_model(KIND, id2label=LABELS, pad_token_id=pad)
    pipe = pipeline("text-classification", model=model, tokenizer=tokenizer, top_k=None, function_to_apply="none")
    alone = [pipe(text)[0] for text in TEXTS]
    for batch_size in (1, 2, 3, 8):
        assert pipe(TEXTS, batch_size=batch_size) == alone


def test_low_precision(both, make_model, tokenizer, same):
    model = make_model(KIND, id2label=LABELS).to(torch.bfloat16)
    ours, theirs = both("text-classification", model, tokenizer, top_k=None)
    same(sorted_by_label(ours(TEXTS[0])), sorted_by_label(theirs(TEXTS[0])), 2e-2)


def sorted_by_label(result):
    [labels] = result
    return sorted(labels, key=lambda label: label["label"])


def test_refusals(make_model, tokenizer):
    pipe = pipeline("text-classification", model=make_model(KIND), tokenizer=tokenizer)
    with pytest.raises(ValueError, match=r'a pair is \{"text": ..., "text_pair": ...\}, got list'):
        pipe([["the rain", "in a town"]])
    with pytest.raises(ValueError, match="got the keys 'text', 'pair'"):
        pipe({"text": "a", "pair": "b"})
    with pytest.raises(ValueError, match="function_to_apply = 'tanh', but it must be one of sigmoid, softmax, none"):
        pipe("a", function_to_apply="tanh")
    with pytest.raises(ValueError, match="top_k = 0"):
        pipe("a", top_k=0)
    with pytest.raises(
        TypeError, match=r"no keyword 'max_new_tokens'; its own are function_to_apply, top_k, and the tok"
    ):
        pipe("a", max_new_tokens=3)
    with pytest.raises(ValueError, match="a text has no tokens"):
        pipe("")
    with pytest.warns(UserWarning, match="a text has 97 tokens"), pytest.raises(ValueError, match="n_positions"):
        pipe("x" * 97)


# ---- zero-shot -----------------------------------------------------------------------------------------------------

CANDIDATES = ["weather", "a town", "fire"]
NLI = {0: "contradiction", 1: "neutral", 2: "Entailment"}


@pytest.mark.parametrize("names", [NLI, {0: "entailment", 1: "neutral", 2: "contradiction"}], ids=["last", "first"])
@pytest.mark.parametrize("multi_label", [False, True])
def test_zero_shot_equals_transformers(both, make_model, padded_tokenizer, same, names, multi_label):
    model = make_model(KIND, id2label=names)
    ours, theirs = both("zero-shot-classification", model, padded_tokenizer, multi_label=multi_label)
    options = {"candidate_labels": CANDIDATES}
    same(ours(TEXTS[0], **options), theirs(TEXTS[0], **options))
    same(ours(TEXTS[:3], "fire, on , "), theirs(TEXTS[:3], "fire, on , "))
    options = {"candidate_labels": "fire", "hypothesis_template": "on {} then"}
    same(ours(TEXTS[1], **options), theirs(TEXTS[1], **options))


def test_zero_shot_batches(make_model, tokenizer):
    model = make_model(KIND, id2label=NLI)
    pipe = pipeline("zero-shot-classification", model=model, tokenizer=tokenizer, candidate_labels=CANDIDATES)
    alone = [pipe(text) for text in TEXTS]
    assert {key: type(value) for key, value in alone[0].items()} == {"sequence": str, "labels": list, "scores": list}
    for batch_size in (2, 5, 99):
        assert pipe(TEXTS, batch_size=batch_size) == alone
    assert tokenizer.pad_token is None
    assert model.config.pad_token_id is None


def test_zero_shot_refusals(make_model, tokenizer):
    pipe = pipeline("zero-shot-classification", model=make_model(KIND, id2label=NLI), tokenizer=tokenizer)
    with pytest.raises(ValueError, match="candidate_labels is missing"):
        pipe("the rain")
    with pytest.raises(ValueError, match="candidate_labels is empty"):
        pipe("the rain", [])
    with pytest.raises(ValueError, match=r"has no \{\} where the label should go"):
        pipe("the rain", "fire", hypothesis_template="This is rain.")
    with pytest.raises(ValueError, match="there is no text to classify"):
        pipe([], "fire")
    with pytest.raises(TypeError, match="one positional argument, got 3"):
        pipe("the rain", "fire", "more")
    with pytest.warns(UserWarning, match="no label of the model begins with 'entail'"):
        pipeline("zero-shot-classification", model=make_model(KIND), tokenizer=tokenizer)
