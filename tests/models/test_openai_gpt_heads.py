"""OpenAI GPT's task heads: every option and every edge against transformers, and what is refused."""

import warnings

import pytest
import torch
from openai_gpt_models import copy_of, make, random_ids

from gpt2rt import (
    InputRangeError,
    OpenAIGPTConfig,
    OpenAIGPTDoubleHeadsModel,
    OpenAIGPTForSequenceClassification,
    OpenAIGPTLMHeadModel,
)
from gpt2rt.errors import ConfigError

TOLERANCE = {"rtol": 0.0, "atol": 2e-5}


@pytest.fixture
def pair(hf):
    def build(kind, **fields):
        model = make(kind, **fields)
        return model, copy_of(hf, model)

    return build


def assert_same(ours, theirs):
    assert list(ours.keys()) == list(theirs.keys())
    for name in theirs:
        torch.testing.assert_close(ours[name], theirs[name], **TOLERANCE)


# ---- ranking choices -------------------------------------------------------------------------------------------------


@pytest.mark.proves("O4")
@pytest.mark.parametrize(
    "fields",
    [
        {"summary_type": "last"},
        {"summary_type": "first"},
        {"summary_type": "mean"},
        {"summary_use_proj": False},
        {"summary_proj_to_labels": False},
        {"summary_activation": "tanh"},
        {"summary_activation": "gelu", "summary_first_dropout": 0.0},
    ],
    ids=str,
)
def test_summaries(pair, path, fields):
    ours, theirs = pair(OpenAIGPTDoubleHeadsModel, **fields)
    ids = random_ids(2, 3, 7)
    assert_same(ours(ids), theirs(ids))
    assert list(ours.state_dict()) == list(theirs.state_dict())


@pytest.mark.proves("O4")
def test_which_token_a_choice_is_scored_at(pair, path):
    ours, theirs = pair(OpenAIGPTDoubleHeadsModel)
    ids = random_ids(2, 3, 7)
    places = torch.tensor([[0, 6, 3], [2, 2, 5]])
    assert_same(ours(ids, mc_token_ids=places), theirs(ids, mc_token_ids=places))
    last = ours(ids, mc_token_ids=torch.full((2, 3), 6)).mc_logits
    torch.testing.assert_close(ours(ids).mc_logits, last, **TOLERANCE)
    # a batch without choices has one score a row
    assert_same(ours(ids[:, 0]), theirs(ids[:, 0]))


def test_one_label_is_written_into_the_config():
    config = OpenAIGPTConfig(n_embd=8, n_head=1, n_layer=1, vocab_size=9, n_positions=4, num_labels=5)
    OpenAIGPTDoubleHeadsModel(config)
    assert config.num_labels == 1
    config = OpenAIGPTConfig(n_embd=8, n_head=1, problem_type="single_label_classification")
    with pytest.raises(ConfigError, match="needs num_labels >= 2"):
        OpenAIGPTDoubleHeadsModel(config)


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"mc_token_ids": torch.tensor([[0, 7, 0]])}, InputRangeError, "mc_token_ids holds 7"),
        ({"mc_token_ids": torch.tensor([0])}, ValueError, r"mc_token_ids has shape \[1\], expected \[1, 3\]"),
        ({"mc_labels": torch.tensor([3])}, InputRangeError, "mc_labels holds 3, but there are 3 classes"),
        ({"labels": torch.zeros(1, 3, 7)}, TypeError, "labels must be integers"),
        ({"labels": torch.zeros(1, 3, 6, dtype=torch.long)}, ValueError, "do not match logits"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_bad_choices_are_named(given, error, message):
    with pytest.raises(error, match=message):
        make(OpenAIGPTDoubleHeadsModel)(random_ids(1, 3, 7), **given)


# ---- classifying sequences -------------------------------------------------------------------------------------------


@pytest.mark.proves("O4")
@pytest.mark.parametrize(
    ("num_labels", "labels", "problem_type"),
    [
        (1, torch.tensor([0.5, -1.0, 2.0]), "regression"),
        (1, torch.tensor([1, 0, 1]), "regression"),
        (3, torch.tensor([2, 0, 1]), "single_label_classification"),
        (3, torch.tensor([[1.0, 0.0, 1.0], [0.0, 0.0, 0.0], [0.0, 1.0, 0.5]]), "multi_label_classification"),
    ],
    ids=["regression", "integers of one label", "classes", "several"],
)
def test_losses_and_the_problem_they_are_of(pair, path, num_labels, labels, problem_type):
    ours, theirs = pair(OpenAIGPTForSequenceClassification, num_labels=num_labels, pad_token_id=0)
    ids = random_ids(3, 8)
    # transformers cannot subtract integers from floats here
    for_theirs = labels.float() if problem_type == "regression" else labels
    assert_same(ours(ids, labels=labels), theirs(ids, labels=for_theirs))
    assert ours.config.problem_type == theirs.config.problem_type == problem_type


@pytest.mark.proves("O4")
def test_regression_of_several_values(pair, path):
    fields = {"num_labels": 2, "pad_token_id": 0, "problem_type": "regression"}
    ours, theirs = pair(OpenAIGPTForSequenceClassification, **fields)
    ids, labels = random_ids(3, 8), torch.randn(3, 2, generator=torch.Generator().manual_seed(0))
    assert_same(ours(ids, labels=labels), theirs(ids, labels=labels))


@pytest.mark.proves("O4")
def test_the_token_that_is_classified(pair, path):
    """The rightmost that is no pad: for pads on either side, in the middle, and a row of pads."""
    ours, theirs = pair(OpenAIGPTForSequenceClassification, pad_token_id=0)
    ids = random_ids(5, 8)
    ids[0, 5:] = 0
    ids[1, :3] = 0
    ids[2, 3] = 0
    ids[3] = 0
    for mask in (None, (ids != 0).long()):
        given = {} if mask is None else {"attention_mask": mask}
        assert_same(ours(ids, **given), theirs(ids, **given))
    embeds = ours.transformer.tokens_embed(ids)
    with pytest.warns(UserWarning, match="cannot tell padding in inputs_embeds"):
        got = ours(inputs_embeds=embeds)
    assert_same(got, theirs(inputs_embeds=embeds))


@pytest.mark.proves("O8")
def test_a_batch_needs_a_pad_token(pair, path):
    ours, theirs = pair(OpenAIGPTForSequenceClassification)
    ids = random_ids(2, 8)
    with pytest.raises(ValueError, match=r"Cannot handle batch sizes > 1 if no padding token is defined\."):
        ours(ids)
    assert_same(ours(ids[:1]), theirs(ids[:1]))
    ours.config.pad_token_id = 99
    assert ours(ids).logits.shape == (2, 2)


def test_leading_dimensions(path):
    model = make(OpenAIGPTForSequenceClassification, pad_token_id=0, num_labels=3)
    ids = random_ids(2, 3, 6)
    got = model(ids, labels=torch.tensor([[0, 1, 2], [2, -100, 0]]))
    flat = model(ids.view(6, 6), labels=torch.tensor([0, 1, 2, 2, -100, 0]))
    torch.testing.assert_close(got.logits.view(6, 3), flat.logits, **TOLERANCE)
    torch.testing.assert_close(got.loss, flat.loss, **TOLERANCE)


@pytest.mark.parametrize(
    ("labels", "error", "message"),
    [
        (torch.tensor([0, 3]), InputRangeError, "labels holds 3, but there are 3 classes"),
        (torch.tensor([0, 1, 2]), ValueError, "labels has shape"),
        (torch.tensor([[1.0, 0.0, 2.0]] * 2), InputRangeError, "labels hold 2.0"),
        ([0, 1], TypeError, "labels must be a tensor"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_bad_labels_are_named_before_the_model_runs(labels, error, message):
    model = make(OpenAIGPTForSequenceClassification, num_labels=3, pad_token_id=0)
    model.transformer.register_forward_pre_hook(lambda *_: pytest.fail("the model ran"))
    with pytest.raises(error, match=message):
        model(random_ids(2, 5), labels=labels)
    assert model.config.problem_type is None


def test_no_warnings_in_ordinary_calls():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for kind in (OpenAIGPTLMHeadModel, OpenAIGPTDoubleHeadsModel, OpenAIGPTForSequenceClassification):
            make(kind, pad_token_id=0)(random_ids(2, 5))
