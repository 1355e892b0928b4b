"""Feature extraction gives transformers' numbers."""

import pytest
import torch

from gpt2rt import pipeline

from .conftest import TEXTS

pytestmark = pytest.mark.proves("L6")


def test_equals_transformers(both, make_model, tokenizer, same):
    ours, theirs = both("feature-extraction", make_model("Model"), tokenizer)
    same(ours(TEXTS[0]), theirs(TEXTS[0]))
    same(ours(TEXTS), theirs(TEXTS))
    options = {"truncation": True, "tokenize_kwargs": {"max_length": 3}}
    same(ours(TEXTS[2], **options), theirs(TEXTS[2], **options))
    mine, other = ours(TEXTS[0], return_tensors=True), theirs(TEXTS[0], return_tensors=True)
    assert mine.shape == other.shape
    torch.testing.assert_close(mine, other, rtol=0, atol=2e-5)


def test_batches_hold_no_padding(make_model, tokenizer):
    pipe = pipeline("feature-extraction", model=make_model("Model"), tokenizer=tokenizer, return_tensors=True)
    alone = [pipe(text) for text in TEXTS]
    assert [state.shape[1] for state in alone] == [len(tokenizer(text)["input_ids"]) for text in TEXTS]
    for batch_size in (2, 3, 8):
        for mine, other in zip(pipe(TEXTS, batch_size=batch_size), alone, strict=True):
            torch.testing.assert_close(mine, other, rtol=0, atol=1e-6)


def test_a_model_with_a_head_gives_its_first_output(make_model, tokenizer):
    model = make_model("LMHeadModel")
    pipe = pipeline("feature-extraction", model=model, tokenizer=tokenizer)
    with torch.no_grad():
        logits = model(**tokenizer(TEXTS[1], return_tensors="pt")).logits
    assert pipe(TEXTS[1]) == logits.tolist()


def test_no_gradients_and_the_mode_of_the_caller(make_model, tokenizer):
    pipe = pipeline("feature-extraction", model=make_model("Model"), tokenizer=tokenizer, return_tensors=True)
    assert torch.is_grad_enabled()
    results = pipe(text for text in TEXTS)
    assert not next(results).requires_grad
    # between two results nothing of the pipeline's own mode remains
    assert torch.is_grad_enabled()


def test_refusals(make_model, tokenizer):
    pipe = pipeline("feature-extraction", model=make_model("Model"), tokenizer=tokenizer)
    with pytest.raises(ValueError, match="truncation was given twice"):
        pipe("a", truncation=True, tokenize_kwargs={"truncation": True})
    with pytest.raises(TypeError, match=r"tokenize_kwargs holds 'max_len'; the tokenizer's options are .*max_length"):
        pipe("a", tokenize_kwargs={"max_len": 3})
    with pytest.raises(TypeError, match="no keyword 'top_k'; its own are return_tensors, tokenize_kwargs, truncation"):
        pipe("a", top_k=3)
    with pytest.raises(ValueError, match="a text is a string, got int"):
        pipe([1, 2])
