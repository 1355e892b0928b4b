"""The task heads against transformers: numbers, losses, gradients, shapes, files; and what is refused."""

import dataclasses
import inspect
import warnings

import pytest
import torch

import gpt2rt
from gpt2rt import (
    GPT2Config,
    GPT2DoubleHeadsModel,
    GPT2ForQuestionAnswering,
    GPT2ForSequenceClassification,
    GPT2ForTokenClassification,
    GPT2LMHeadModel,
    GPT2Model,
    InputRangeError,
)
from gpt2rt.models import SequenceSummary

TOLERANCE = {"rtol": 0.0, "atol": 2e-5}
PAD = 96

# pad ids never occur in the ids that the tests draw
HEADS = {
    "double": {"kind": GPT2DoubleHeadsModel},
    "sequence": {"kind": GPT2ForSequenceClassification, "num_labels": 3, "pad_token_id": PAD},
    "token": {"kind": GPT2ForTokenClassification, "num_labels": 4},
    "question": {"kind": GPT2ForQuestionAnswering},
}
LABELS = {
    "double": {
        "labels": torch.arange(18).view(2, 9),
        "mc_token_ids": torch.tensor([8, 4]),
        "mc_labels": torch.tensor([1]),
    },
    "sequence": {"labels": torch.tensor([2, 0])},
    "token": {"labels": torch.tensor([[0, 1, 2, 3, -100, 0, 1, 2, 3], [3, 3, -100, 1, 1, 0, 0, 2, 2]])},
    "question": {"start_positions": torch.tensor([1, 7]), "end_positions": torch.tensor([4, 8])},
}
NEW_WEIGHTS = {
    "double": ["multiple_choice_head.summary.weight", "multiple_choice_head.summary.bias"],
    "sequence": ["score.weight"],
    "token": ["classifier.weight", "classifier.bias"],
    "question": ["qa_outputs.weight", "qa_outputs.bias"],
}
NO_DROPOUT = dict.fromkeys(
    ("attn_pdrop", "resid_pdrop", "embd_pdrop", "summary_first_dropout", "classifier_dropout"), 0.0
)


@pytest.fixture
def ids():
    """[2, 9] token ids without the pad."""
    return draw(2, 9)


def draw(*shape):
    return torch.randint(0, PAD, shape, generator=torch.Generator().manual_seed(1))


def assert_same(ours, theirs):
    assert list(ours) == list(theirs)
    for name, value in theirs.items():
        if name != "past_key_values":
            torch.testing.assert_close(ours[name], value, **TOLERANCE)


def gradients(model, loss):
    loss.backward()
    found = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad()
    return found


def assert_same_gradients(ours, theirs, loss_of):
    got, want = gradients(ours, loss_of(ours)), gradients(theirs, loss_of(theirs))
    assert got.keys() == want.keys()
    for name, gradient in want.items():
        torch.testing.assert_close(got[name], gradient, rtol=1e-4, atol=2e-6)
    return want


def total_loss(out):
    return out.loss + (out.mc_loss if "mc_loss" in out else 0.0)


# ---- all heads -----------------------------------------------------------------------------------------------------


@pytest.mark.proves("H2", "H4", "H6", "H7")
@pytest.mark.parametrize("head", HEADS)
def test_weights_modules_and_arguments_are_those_of_transformers(pair, head):
    ours, theirs = pair(**HEADS[head])
    assert type(ours).__name__ == type(theirs).__name__
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert [name for name, _ in ours.named_parameters()] == [name for name, _ in theirs.named_parameters()]
    assert {name for name, _ in ours.named_modules()} == {name for name, _ in theirs.named_modules()}
    parameters = inspect.signature(ours.forward).parameters
    # generate() needs logits_to_keep of every class that has it; transformers' class with two heads takes no such name
    added = ["logits_to_keep"] if head == "double" else []
    assert [name for name in parameters if name not in added] == list(inspect.signature(theirs.forward).parameters)
    assert all(parameters[name].kind is inspect.Parameter.KEYWORD_ONLY for name in added)
    assert ours.can_generate() == (head == "double")
    # transformers' Trainer passes num_items_in_batch where this is not False
    assert ours.accepts_loss_kwargs is False
    assert getattr(gpt2rt, type(ours).__name__) is type(ours)


@pytest.mark.proves("H2", "H4", "H6", "H7")
@pytest.mark.parametrize(
    "name",
    [
        "GPT2DoubleHeadsModelOutput",
        "SequenceClassifierOutputWithPast",
        "TokenClassifierOutput",
        "QuestionAnsweringModelOutput",
    ],
)
def test_fields_of_outputs_are_those_of_transformers(hf, name):
    where = "models.gpt2.modeling_gpt2" if name.startswith("GPT2") else "modeling_outputs"
    theirs = getattr(__import__(f"transformers.{where}", fromlist=[name]), name)
    ours = getattr(gpt2rt, name)
    assert [field.name for field in dataclasses.fields(ours)] == [field.name for field in dataclasses.fields(theirs)]


@pytest.mark.proves("H2", "H4", "H6", "H7")
@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("with_labels", [False, True])
def test_everything_returned(pair, path, ids, head, with_labels):
    ours, theirs = pair(**HEADS[head])
    types = torch.zeros_like(ids)
    types[:, 4:] = 3
    given = {"token_type_ids": types, "position_ids": torch.arange(20, 29).unsqueeze(0)}
    given |= {"attention_mask": torch.ones_like(ids), "output_attentions": True, "output_hidden_states": True}
    if with_labels:
        given |= LABELS[head]
    got = ours(ids, **given)
    assert_same(got, theirs(ids, **given))
    assert len(got.hidden_states) == 3
    assert [a.shape for a in got.attentions] == [(2, 3, 9, 9)] * 2


@pytest.mark.parametrize("head", HEADS)
def test_tuples_and_config_defaults(pair, build, path, ids, head):
    ours, theirs = pair(**HEADS[head])
    given = {**LABELS[head], "output_attentions": True, "output_hidden_states": True, "return_dict": False}
    got, want = ours(ids, **given), theirs(ids, **given)
    assert type(got) is tuple
    assert len(got) == len(want)
    for a, b in zip(got, want, strict=True):
        if isinstance(b, torch.Tensor | tuple):
            torch.testing.assert_close(a, b, **TOLERANCE)
    quiet = build(return_dict=False, use_cache=False, **HEADS[head])
    assert type(quiet(ids)) is tuple
    assert "past_key_values" not in quiet(ids, return_dict=True)


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_the_gradient_of_every_parameter(hf, build, ids, head, training):
    ours = build(**HEADS[head], **NO_DROPOUT)
    theirs = hf.copy_of(ours)
    ours.train(training)
    theirs.train(training)
    given = dict(LABELS[head])
    sequences = ids
    if head == "double":
        sequences = torch.stack([ids, ids.flip(1)], dim=1)
        given = {"labels": sequences, "mc_token_ids": torch.tensor([[8, 3], [5, 0]]), "mc_labels": torch.tensor([1, 0])}
    want = assert_same_gradients(ours, theirs, lambda model: total_loss(model(sequences, **given)))
    # what is added to every choice, or to every place in a text, cannot change which of them wins
    shared = {"double": {"multiple_choice_head.summary.bias"}, "question": {"qa_outputs.bias", "transformer.ln_f.bias"}}
    assert {name for name, gradient in want.items() if gradient.abs().max() < 1e-6} == shared.get(head, set())


@pytest.mark.parametrize("head", HEADS)
def test_a_frozen_trunk_trains_its_head(build, ids, head):
    """The trunk then runs on the kernels, the head on torch's functions."""
    model = build(**HEADS[head])
    want = gradients(model, total_loss(model(ids, **LABELS[head])))
    model.transformer.requires_grad_(False)
    got = gradients(model, total_loss(model(ids, **LABELS[head])))
    trained = [name for name, p in got.items() if p is not None]
    assert trained == [name for name in want if not name.startswith("transformer.")]
    for name in trained:
        torch.testing.assert_close(got[name], want[name], rtol=1e-4, atol=2e-6)


@pytest.mark.proves("H2", "D8")
@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("leading", [(), (1,), (3, 2), (2, 1, 2)], ids=str)
def test_leading_dimensions(build, pair, path, head, leading):
    """transformers takes (batch, seq_len), and (batch, choices, seq_len) for the double heads only."""
    model, _ = pair(**HEADS[head])
    ids = draw(*leading, 7)
    mask = torch.ones_like(ids)
    mask[..., :2] = 0
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    flat = {"attention_mask": mask.view(-1, 7), "position_ids": positions.view(-1, 7)}
    want = model(ids.view(-1, 7), **flat)
    given = {"attention_mask": mask, "position_ids": positions}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        runs = [model(ids, **given), model(inputs_embeds=model.transformer.wte(ids), **given)]
    for got in runs:
        for name in {"logits", "mc_logits", "start_logits", "end_logits"} & set(want):
            rest = want[name].shape[1:]
            torch.testing.assert_close(got[name], want[name].reshape((*leading, *rest)), **TOLERANCE)


@pytest.mark.proves("H2")
@pytest.mark.parametrize("head", HEADS)
def test_labels_of_choices_give_the_loss_of_the_flat_batch(pair, path, head):
    model, _ = pair(**HEADS[head])
    ids = draw(2, 1, 9)
    if head == "double":
        got = model(ids, labels=ids).loss
        torch.testing.assert_close(got, model(ids[:, 0], labels=ids[:, 0]).loss, **TOLERANCE)
        return
    flat = LABELS[head]
    got = model(ids, **{name: value.unsqueeze(1) for name, value in flat.items()})
    torch.testing.assert_close(got.loss, model(ids[:, 0], **flat).loss, **TOLERANCE)


@pytest.mark.parametrize("head", HEADS)
def test_a_past_given_is_read_and_appended_to(pair, path, ids, head):
    ours, theirs = pair(**HEADS[head])
    results = []
    for model in (ours, theirs):
        past = model.transformer(ids[:, :5]).past_key_values
        results.append(model(ids[:, 5:], past_key_values=past))
        assert past.get_seq_length() == 9
    assert_same(*results)
    assert ("past_key_values" in results[0]) == (head in ("double", "sequence"))


@pytest.mark.parametrize("head", ["token", "question"])
def test_no_cache_is_made_that_would_be_dropped(pair, ids, head):
    model, _ = pair(**HEADS[head])
    seen = []
    hook = model.transformer.register_forward_hook(lambda module, arguments, output: seen.append(output))
    model(ids)
    hook.remove()
    assert "past_key_values" not in seen[0]


@pytest.mark.parametrize("head", HEADS)
def test_an_encoder_can_be_attended_to(pair, path, ids, head):
    """Through the keywords that every forward passes on, as in transformers."""
    ours, theirs = pair(**HEADS[head], add_cross_attention=True)
    states = torch.randn(2, 5, 48, generator=torch.Generator().manual_seed(4))
    assert_same(ours(ids, encoder_hidden_states=states), theirs(ids, encoder_hidden_states=states))


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_other_dtypes(hf, build, path, ids, head, dtype):
    """Losses are float32 at least, where transformers rounds them to the dtype of the logits."""
    ours = build(**HEADS[head]).to(dtype)
    theirs = hf.copy_of(ours).double()
    got, want = ours(ids, **LABELS[head]), theirs(ids, **LABELS[head])
    atol = 5e-2 if dtype == torch.bfloat16 else 1e-5
    for name, value in want.items():
        if name != "past_key_values":
            expected = torch.promote_types(dtype, torch.float32) if "loss" in name else dtype
            assert got[name].dtype == (torch.float32 if (head, name) == ("double", "loss") else expected)
            torch.testing.assert_close(got[name].double(), value, rtol=0.0, atol=atol)


@pytest.mark.parametrize("head", HEADS)
def test_compiled_forward_equals_eager(build, ids, head):
    model = build(**HEADS[head], n_layer=1)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        got, want = compiled(ids, **LABELS[head]), model(ids, **LABELS[head])
    assert list(got) == list(want)
    for name in want:
        if name != "past_key_values":
            torch.testing.assert_close(got[name], want[name], **TOLERANCE)


@pytest.mark.parametrize("head", HEADS)
def test_gradient_checkpointing_and_dropout(build, ids, head):
    model = build(**HEADS[head], **NO_DROPOUT).train()
    want = gradients(model, total_loss(model(ids, **LABELS[head])))
    model.gradient_checkpointing_enable()
    got = gradients(model, total_loss(model(ids, use_cache=False, **LABELS[head])))
    for name, gradient in want.items():
        torch.testing.assert_close(got[name], gradient, rtol=1e-5, atol=1e-7)


def test_dropout_of_the_heads_acts_in_training_only(build, ids):
    trunk = {**NO_DROPOUT, "classifier_dropout": None}
    for kind, options in (
        (GPT2DoubleHeadsModel, {"summary_first_dropout": 0.5}),
        (GPT2DoubleHeadsModel, {"summary_last_dropout": 0.5, "summary_proj_to_labels": False}),
        (GPT2ForTokenClassification, {"hidden_dropout": 0.5}),
        (GPT2ForTokenClassification, {"classifier_dropout": 0.5, "hidden_dropout": 0.0}),
        (GPT2ForTokenClassification, {}),
    ):
        model = build(kind=kind, **{**trunk, **options})
        name = "mc_logits" if kind is GPT2DoubleHeadsModel else "logits"
        with torch.no_grad():
            assert torch.equal(model(ids)[name], model(ids)[name])
            model.train()
            assert not torch.equal(model(ids)[name], model(ids)[name])
    assert build(kind=GPT2ForTokenClassification, hidden_dropout=0.3).dropout.p == 0.3
    assert build(kind=GPT2ForTokenClassification).dropout.p == 0.1


# ---- files ---------------------------------------------------------------------------------------------------------


@pytest.mark.proves("L1", "fault:F12")
@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("base", [GPT2Model, GPT2LMHeadModel])
def test_a_head_on_a_base_checkpoint_is_new_and_said_to_be(build, tmp_path, ids, head, base):
    saved = build(kind=base)
    saved.save_pretrained(tmp_path)
    options = dict(HEADS[head])
    kind = options.pop("kind")
    with pytest.warns(UserWarning, match="newly initialised, train before use") as seen:
        model, info = kind.from_pretrained(tmp_path, output_loading_info=True, **options)
    assert len(seen) == 1
    assert info["missing_keys"] == set(NEW_WEIGHTS[head])
    for name in NEW_WEIGHTS[head]:
        assert name in str(seen[0].message)
        assert bool(model.state_dict()[name].isfinite().all())
    trunk = saved.transformer if base is GPT2LMHeadModel else saved
    assert torch.equal(model.transformer(ids)[0], trunk(ids)[0])
    assert model.config.num_labels == options.get("num_labels", 1 if head == "double" else 2)


@pytest.mark.proves("L3")
@pytest.mark.parametrize("head", HEADS)
def test_files_go_to_transformers_and_back(hf, build, tmp_path, ids, head):
    ours = build(**HEADS[head])
    ours.save_pretrained(tmp_path / "ours")
    kind = getattr(hf.module, type(ours).__name__)
    theirs, info = kind.from_pretrained(tmp_path / "ours", attn_implementation="eager", output_loading_info=True)
    assert not any(info[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert theirs.config.num_labels == ours.config.num_labels
    theirs.save_pretrained(tmp_path / "theirs")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        back = type(ours).from_pretrained(tmp_path / "theirs", strict=True)
    assert back.config.num_labels == ours.config.num_labels
    assert back.state_dict().keys() == ours.state_dict().keys()
    for name, tensor in ours.state_dict().items():
        assert torch.equal(back.state_dict()[name], tensor)
    with torch.no_grad():
        assert_same(back(ids, **LABELS[head]), theirs(ids, **LABELS[head]))


def test_label_names_and_problem_type_are_saved(build, tmp_path, ids):
    model = build(**HEADS["sequence"])
    model.config.id2label = {0: "sad", 1: "glad", 2: "neither"}
    model(ids, labels=torch.tensor([0, 1]))
    model.save_pretrained(tmp_path)
    config = GPT2ForSequenceClassification.from_pretrained(tmp_path).config
    assert config.id2label[2] == "neither"
    assert config.problem_type == "single_label_classification"


# ---- double heads --------------------------------------------------------------------------------------------------

SUMMARIES = {
    "cls_index": {},
    "no_proj": {"summary_use_proj": False},
    "proj_to_hidden": {"summary_proj_to_labels": False, "summary_activation": "tanh"},
    "relu": {"summary_activation": "relu"},
    "last": {"summary_type": "last"},
    "first": {"summary_type": "first", "summary_activation": "gelu_new"},
    "mean": {"summary_type": "mean"},
    "mean_no_proj": {"summary_type": "mean", "summary_use_proj": False, "summary_last_dropout": 0.5},
}


@pytest.mark.proves("H3")
@pytest.mark.parametrize("option", SUMMARIES)
@pytest.mark.parametrize("shape", [(2, 3, 5), (2, 5)], ids=str)
def test_choices_and_summaries(pair, path, option, shape):
    """ "last", "first" and "mean" work along dimension 1, which is that of the choices; so they do in transformers."""
    ours, theirs = pair(kind=GPT2DoubleHeadsModel, **SUMMARIES[option])
    ids = draw(*shape)
    places = torch.tensor([[4, 0, 2], [1, 3, 4]]) if len(shape) == 3 else torch.tensor([4, 1])
    for given in ({}, {"mc_token_ids": places}):
        want = theirs(ids, output_hidden_states=True, **given)
        assert_same(ours(ids, output_hidden_states=True, **given), want)
        rows = want.mc_logits.size(-1)
        labels = torch.arange(want.mc_logits.numel() // rows) % rows
        labels[0] = -100 if labels.numel() > 1 else 0
        given = {**given, "mc_labels": labels, "labels": ids}
        assert_same(ours(ids, **given), theirs(ids, **given))


@pytest.mark.proves("H3")
@pytest.mark.parametrize("option", ["proj_to_hidden", "mean"])
def test_gradients_of_summaries(hf, build, option):
    ours = build(kind=GPT2DoubleHeadsModel, **SUMMARIES[option])
    theirs = hf.copy_of(ours)
    ids = draw(2, 3, 5)
    assert_same_gradients(
        ours, theirs, lambda model: model(ids).mc_logits.square().mean() + model(ids, labels=ids).loss
    )


@pytest.mark.proves("D8")
def test_masks_of_choices(pair, path):
    ours, theirs = pair(kind=GPT2DoubleHeadsModel)
    ids = draw(2, 3, 5)
    mask = torch.ones_like(ids)
    mask[0, 1, 3:] = 0
    places = mask.sum(-1) - 1
    got, want = (model(ids, attention_mask=mask, mc_token_ids=places) for model in (ours, theirs))
    torch.testing.assert_close(got.mc_logits, want.mc_logits, **TOLERANCE)
    torch.testing.assert_close(got.logits[mask.bool()], want.logits[mask.bool()], **TOLERANCE)


@pytest.mark.proves("D8")
def test_positions_and_embeddings_of_choices(pair, path):
    """transformers raises for 3-D position_ids and 4-D inputs_embeds."""
    ours, theirs = pair(kind=GPT2DoubleHeadsModel)
    ids = draw(2, 3, 5)
    places = torch.tensor([[4, 0, 2], [1, 3, 4]])
    positions = torch.arange(30).view(2, 3, 5)
    want = theirs(ids.view(6, 5), position_ids=positions.view(6, 5), mc_token_ids=places.view(6))
    embeds = ours.transformer.wte(ids)
    for given in ({"input_ids": ids}, {"inputs_embeds": embeds}):
        got = ours(position_ids=positions, mc_token_ids=places, mc_labels=torch.tensor([0, 2]), **given)
        torch.testing.assert_close(got.logits, want.logits.view(2, 3, 5, 97), **TOLERANCE)
        torch.testing.assert_close(got.mc_logits, want.mc_logits.view(2, 3), **TOLERANCE)
        loss = torch.nn.functional.cross_entropy(want.mc_logits.view(2, 3), torch.tensor([0, 2]))
        torch.testing.assert_close(got.mc_loss, loss, **TOLERANCE)


@pytest.mark.proves("H2")
def test_double_heads_set_num_labels_to_one():
    """In the config object given, like transformers; num_labels cannot be chosen."""
    config = GPT2Config(n_embd=48, n_head=3, n_layer=1, vocab_size=97, num_labels=5)
    model = GPT2DoubleHeadsModel(config)
    assert config.num_labels == model.config.num_labels == 1
    assert model.multiple_choice_head.summary.weight.shape == (1, 48)
    assert model.lm_head.weight is model.transformer.wte.weight


@pytest.mark.proves("H2")
def test_double_heads_generate_like_the_language_model(build, hf, ids):
    model = build(kind=GPT2DoubleHeadsModel)
    language_model = build()
    state = {name: value for name, value in model.state_dict().items() if not name.startswith("multiple_choice")}
    language_model.load_state_dict(state)
    got = model.generate(ids, max_new_tokens=6, do_sample=False, pad_token_id=0)
    assert torch.equal(got, language_model.generate(ids, max_new_tokens=6, do_sample=False, pad_token_id=0))
    assert torch.equal(got, hf.copy_of(model).generate(ids, max_new_tokens=6, do_sample=False, pad_token_id=0))
    assert model.graph_weights().keys() == language_model.graph_weights().keys()


@pytest.mark.proves("H3")
def test_summary_by_attention_is_refused():
    with pytest.raises(NotImplementedError, match="'attn' is not implemented; use 'cls_index'"):
        GPT2DoubleHeadsModel(GPT2Config(n_embd=48, n_head=3, n_layer=1, vocab_size=97, summary_type="attn"))


def test_summary_of_one_sequence_without_a_batch(build):
    model = build(kind=GPT2DoubleHeadsModel, summary_type="last", n_layer=1)
    assert isinstance(model.multiple_choice_head, SequenceSummary)
    with pytest.raises(ValueError, match=r"summary_type = 'last' works along dimension 1 .* \[5, 48\]"):
        model(draw(5))


# ---- sequences -----------------------------------------------------------------------------------------------------

PROBLEMS = {
    # name: num_labels, given problem_type, labels, what it is taken for
    "regression": (1, None, torch.tensor([0.3, -2.0]), "regression"),
    "regression_column": (1, None, torch.tensor([[0.3], [-2.0]]), "regression"),
    "regression_wide": (3, "regression", torch.tensor([[0.3, 1.0, -1.0], [2.0, 0.0, 5.0]]), "regression"),
    "classes": (3, None, torch.tensor([2, 0]), "single_label_classification"),
    "classes_column": (3, None, torch.tensor([[2], [-100]]), "single_label_classification"),
    "classes_given": (3, "single_label_classification", torch.tensor([1, 1]), "single_label_classification"),
    "many": (3, None, torch.tensor([[1.0, 0.0, 1.0], [0.0, 0.0, 0.5]]), "multi_label_classification"),
    "many_given": (
        3,
        "multi_label_classification",
        torch.tensor([[1.0, 0, 1], [0, 0, 1]]),
        "multi_label_classification",
    ),
    "many_of_one": (1, "multi_label_classification", torch.tensor([[1.0], [0.0]]), "multi_label_classification"),
}


@pytest.mark.proves("H5")
@pytest.mark.parametrize("problem", PROBLEMS)
def test_problem_types(hf, build, ids, problem):
    num_labels, given, labels, taken = PROBLEMS[problem]
    ours = build(kind=GPT2ForSequenceClassification, num_labels=num_labels, pad_token_id=PAD, problem_type=given)
    theirs = hf.copy_of(ours)
    with torch.no_grad():
        assert_same(ours(ids, labels=labels), theirs(ids, labels=labels))
    assert ours.config.problem_type == theirs.config.problem_type == taken
    assert_same_gradients(ours, theirs, lambda model: model(ids, labels=labels).loss)


@pytest.mark.parametrize("num_labels", [1, 3])
def test_one_sequence(hf, build, path, num_labels):
    ours = build(kind=GPT2ForSequenceClassification, num_labels=num_labels)
    theirs = hf.copy_of(ours)
    ids, labels = draw(1, 9), torch.tensor([0.5] if num_labels == 1 else [2])
    assert_same(ours(ids, labels=labels), theirs(ids, labels=labels))


@pytest.mark.proves("H5")
def test_labels_that_transformers_cannot_take(build, path, ids):
    """int32 classes, and integers or booleans as the flags of several labels."""
    model = build(**HEADS["sequence"])
    want = model(ids, labels=torch.tensor([2, 0])).loss
    model.config.problem_type = None
    torch.testing.assert_close(model(ids, labels=torch.tensor([2, 0], dtype=torch.int32)).loss, want)
    flags = torch.tensor([[1, 0, 1], [0, 0, 1]])
    model.config.problem_type = "multi_label_classification"
    want = model(ids, labels=flags.float()).loss
    torch.testing.assert_close(model(ids, labels=flags).loss, want)
    model.config.problem_type = None
    torch.testing.assert_close(model(ids, labels=flags.bool()).loss, want)
    assert model.config.problem_type == "multi_label_classification"


@pytest.mark.proves("H5")
def test_the_problem_type_is_written_into_the_config_that_models_share(build, ids):
    """As in transformers; but not by labels that turn out to be wrong."""
    first = build(**HEADS["sequence"])
    second = GPT2ForSequenceClassification(first.config).eval()
    with pytest.raises(InputRangeError):
        first(ids, labels=torch.tensor([3, 0]))
    assert first.config.problem_type is None
    first(ids, labels=torch.tensor([2, 0]))
    assert second.config.problem_type == "single_label_classification"
    with pytest.raises(TypeError, match="labels must be int64 or int32"):
        second(ids, labels=torch.ones(2, 3))


PADDINGS = {
    "none": lambda ids: None,
    "left": lambda ids: ids[0, :4].fill_(PAD),
    "right": lambda ids: ids[0, 5:].fill_(PAD),
    "both": lambda ids: (ids[0, :2].fill_(PAD), ids[1, 7:].fill_(PAD)),
    "middle": lambda ids: ids[0, 3:5].fill_(PAD),
    "all_but_first": lambda ids: ids[1, 1:].fill_(PAD),
    "all": lambda ids: ids[1].fill_(PAD),
}


@pytest.mark.proves("H4")
@pytest.mark.parametrize("padding", PADDINGS)
def test_the_last_token_is_the_rightmost_that_is_no_pad(pair, path, ids, padding):
    ours, theirs = pair(**HEADS["sequence"])
    PADDINGS[padding](ids)
    assert_same(ours(ids), theirs(ids))
    mask = (ids != PAD).long()
    if padding in ("left", "right"):
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        got = ours(ids, attention_mask=mask, position_ids=positions).logits
        torch.testing.assert_close(got[:1], ours(ids[:1, mask[0].bool()]).logits, **TOLERANCE)
        torch.testing.assert_close(got, theirs(ids, attention_mask=mask, position_ids=positions).logits, **TOLERANCE)


@pytest.mark.proves("H4")
def test_without_a_pad_token_one_sequence_only(pair, path, ids):
    ours, theirs = pair(kind=GPT2ForSequenceClassification, num_labels=3)
    assert_same(ours(ids[:1]), theirs(ids[:1]))
    embeds = ours.transformer.wte(ids)
    assert_same(ours(inputs_embeds=embeds[:1]), theirs(inputs_embeds=embeds[:1]))
    for given in ({"input_ids": ids}, {"inputs_embeds": embeds}):
        for model in (ours, theirs):
            with pytest.raises(ValueError, match=r"Cannot handle batch sizes > 1 if no padding token is defined\."):
                model(**given)


def test_padding_in_embeddings_cannot_be_seen(pair, path, ids):
    ours, theirs = pair(**HEADS["sequence"])
    ids[0, 5:] = PAD
    embeds = ours.transformer.wte(ids)
    with pytest.warns(UserWarning, match="cannot tell padding in inputs_embeds") as seen:
        got = ours(inputs_embeds=embeds)
    assert seen[0].filename == __file__
    assert_same(got, theirs(inputs_embeds=embeds))


# ---- answers -------------------------------------------------------------------------------------------------------

ANSWERS = {
    "inside": ([0, 3], [8, 5]),
    "columns": ([[0], [3]], [[8], [5]]),
    "one_beyond": ([2, 9], [8, 100]),
    "negative": ([-1, 3], [-100, 5]),
    "all_beyond": ([9, 9], [1, 2]),
}


@pytest.mark.proves("H7")
@pytest.mark.parametrize("answer", ANSWERS)
def test_answers(pair, path, ids, answer):
    """Positions beyond the text are ignored, negative ones count as 0; NaN where nothing is left."""
    ours, theirs = pair(**HEADS["question"])
    start, end = (torch.tensor(positions) for positions in ANSWERS[answer])
    got = ours(ids, start_positions=start, end_positions=end)
    want = theirs(ids, start_positions=start, end_positions=end)
    torch.testing.assert_close(got.loss, want.loss, equal_nan=True, **TOLERANCE)
    assert bool(got.loss.isnan()) == (answer == "all_beyond")


@pytest.mark.proves("H7")
def test_answers_have_two_scores_whatever_num_labels_says(build, ids):
    model = build(kind=GPT2ForQuestionAnswering, num_labels=7)
    assert model.qa_outputs.weight.shape == (2, 48)
    out = model(ids)
    assert out.start_logits.shape == out.end_logits.shape == (2, 9)
    assert out.start_logits.is_contiguous()
    assert out.end_logits.is_contiguous()


# ---- what is refused -----------------------------------------------------------------------------------------------

CHOICES = torch.zeros(2, 3, 5, dtype=torch.long)
IDS = torch.zeros(2, 9, dtype=torch.long)

BAD = {
    "place_beyond": (
        "double",
        {"mc_token_ids": torch.tensor([9, 0])},
        InputRangeError,
        "mc_token_ids holds 9.* 0 to 8",
    ),
    "place_negative": ("double", {"mc_token_ids": torch.tensor([0, -1])}, InputRangeError, "mc_token_ids holds -1"),
    "place_shape": ("double", {"mc_token_ids": IDS}, ValueError, r"mc_token_ids has shape \[2, 9\], expected \[2\]"),
    "place_float": ("double", {"mc_token_ids": torch.ones(2)}, TypeError, "mc_token_ids must be int64 or int32"),
    "place_list": ("double", {"mc_token_ids": [1, 2]}, TypeError, "mc_token_ids must be a tensor, got list"),
    "choice_beyond": ("double", {"mc_labels": torch.tensor([2])}, InputRangeError, "mc_labels holds 2.*2 classes"),
    "choice_shape": ("double", {"mc_labels": torch.tensor([0, 1])}, ValueError, r"mc_labels has shape \[2\]"),
    "choice_of_one": ("double", {"input_ids": IDS[0], "mc_labels": torch.tensor(0)}, ValueError, "a single sequence"),
    "text_label_beyond": ("double", {"labels": IDS + 97}, InputRangeError, "labels hold 97"),
    "text_label_list": ("double", {"labels": [1]}, TypeError, "labels must be a tensor, got list"),
    "class_beyond": (
        "sequence",
        {"labels": torch.tensor([0, 3])},
        InputRangeError,
        "labels holds 3.* 3 classes; use 0",
    ),
    "class_negative": ("sequence", {"labels": torch.tensor([0, -1])}, InputRangeError, "holds -1.*or -100 for"),
    "class_shape": ("sequence", {"labels": torch.tensor([0, 1, 2])}, ValueError, r"\[3\], expected \[2\]"),
    "class_list": (
        "sequence",
        {"labels": [0, 1]},
        TypeError,
        "labels must be a tensor of integers or floats, got list",
    ),
    "flags_shape": (
        "sequence",
        {"labels": torch.ones(2, 4)},
        ValueError,
        r"\[2, 4\], expected \[2, 3\] for .*multi_lab",
    ),
    "flags_range": ("sequence", {"labels": torch.full((2, 3), 2.0)}, InputRangeError, "labels hold 2.0.*'multi_label"),
    "flags_nan": ("sequence", {"labels": torch.full((2, 3), torch.nan)}, InputRangeError, "labels hold nan"),
    "token_class_beyond": ("token", {"labels": IDS + 4}, InputRangeError, "labels holds 4, but there are 4 classes"),
    "token_shape": ("token", {"labels": IDS.t()}, ValueError, r"labels has shape \[9, 2\], expected \[2, 9\]"),
    "token_float": ("token", {"labels": IDS.float()}, TypeError, r"labels must be int64 or int32.*labels.long\(\)"),
    "start_alone": ("question", {"start_positions": IDS[:, 0]}, ValueError, "end_positions is missing"),
    "end_alone": ("question", {"end_positions": IDS[:, 0]}, ValueError, "start_positions is missing"),
    "start_shape": (
        "question",
        {"start_positions": IDS, "end_positions": IDS[:, 0]},
        ValueError,
        r"start_positions has shape \[2, 9\], expected \[2\]",
    ),
    "end_float": (
        "question",
        {"start_positions": IDS[:, 0], "end_positions": torch.ones(2)},
        TypeError,
        "end_positions must be int64",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_arguments(pair, build, path, case):
    head, arguments, error, message = BAD[case]
    # inference of the problem type needs a config of its own
    model = build(**HEADS[head]) if head == "sequence" else pair(**HEADS[head])[0]
    with pytest.raises(error, match=message):
        model(**{"input_ids": IDS, **arguments})


@pytest.mark.parametrize("head", HEADS)
def test_bad_arguments_of_the_bare_model(pair, head):
    model, _ = pair(**HEADS[head])
    for given, error, message in (
        ({}, ValueError, "You have to specify either input_ids or inputs_embeds"),
        ({"input_ids": IDS, "inputs_embeds": torch.ones(2, 9, 48)}, ValueError, "You cannot specify both"),
        ({"input_ids": IDS + 97}, InputRangeError, "input_ids holds 97"),
        ({"input_ids": IDS[:, :0]}, ValueError, "input_ids is empty"),
        ({"input_ids": IDS, "position_ids": IDS + 64}, InputRangeError, "position_ids holds 64"),
    ):
        with pytest.raises(error, match=message):
            model(**given)


@pytest.mark.proves("D7")
@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize(
    ("wrong", "near"),
    [("atention_mask", "attention_mask"), ("head_masks", "head_mask"), ("output_attention", "output_att")],
)
def test_unknown_arguments_name_the_nearest_and_all_there_are(pair, head, wrong, near):
    model, _ = pair(**HEADS[head])
    with pytest.raises(TypeError, match=f"no argument '{wrong}'. Did you mean '{near}") as error:
        model(IDS, **{wrong: None})
    assert "encoder_hidden_states" in str(error.value)
    assert ("start_positions" in str(error.value)) == (head == "question")
    for absent in ("logits_to_keep", "num_items_in_batch") if head != "double" else ("num_items_in_batch",):
        with pytest.raises(TypeError, match=f"no argument '{absent}'"):
            model(IDS, **{absent: 1})


@pytest.mark.parametrize(
    ("head", "wrong"),
    [
        ("double", {"mc_labels": torch.tensor([2, 0])}),
        *((None, {"labels": labels}) for labels in (IDS + 97, IDS.float())),
        *(("double", {"labels": labels}) for labels in (IDS + 97, IDS.float())),
    ],
    ids=str,
)
def test_a_cache_does_not_grow_for_a_bad_label(build, head, wrong):
    model = build(**HEADS[head]) if head else build()
    ids = IDS[:, None].expand(2, 2, IDS.size(-1)) if "mc_labels" in wrong else IDS
    past = model(ids).past_key_values
    before = past.get_seq_length()
    with pytest.raises((ValueError, TypeError)):
        model(ids, past_key_values=past, **wrong)
    assert past.get_seq_length() == before


@pytest.mark.parametrize("arguments", [{"labels": torch.tensor([0, 3])}, {"use_cash": True}], ids=str)
def test_nothing_is_computed_for_a_bad_call(build, arguments):
    model = build(**HEADS["sequence"])
    past = model(IDS).past_key_values
    with pytest.raises((ValueError, TypeError)):
        model(IDS, past_key_values=past, **arguments)
    assert past.get_seq_length() == 9


def test_a_problem_type_assigned_wrongly(build):
    model = build(**HEADS["sequence"])
    model.config.problem_type = "ranking"
    with pytest.raises(ValueError, match="problem_type = 'ranking', but it must be 'regression'"):
        model(IDS, labels=torch.tensor([0, 1]))


def test_head_mask_reaches_the_trunk(build, path, ids):
    for options in HEADS.values():
        model = build(**options)
        out = model(ids, head_mask=torch.tensor([1.0, 0.0, 0.5]), output_attentions=True)
        assert out.attentions[0][:, 1].count_nonzero() == 0


def test_a_problem_type_that_one_label_does_not_allow_is_refused_when_the_model_is_made(build):
    with pytest.raises(gpt2rt.ConfigError, match="needs num_labels >= 2, got 1"):
        build(kind=GPT2DoubleHeadsModel, problem_type="single_label_classification")
