"""Outputs are records, dictionaries and tuples at once."""

import copy
import dataclasses
import pickle

import pytest
import torch
from torch.utils import _pytree as pytree

from gpt2rt.models import BaseModelOutputWithPastAndCrossAttentions, CausalLMOutputWithCrossAttentions, ModelOutput


@pytest.fixture
def out():
    return CausalLMOutputWithCrossAttentions(logits=torch.arange(3.0), hidden_states=(torch.ones(2),))


@pytest.mark.proves("F13", "H1")
@pytest.mark.parametrize("name", ["BaseModelOutputWithPastAndCrossAttentions", "CausalLMOutputWithCrossAttentions"])
def test_fields_and_order_are_those_of_transformers(hf, name):
    theirs = getattr(__import__("transformers.modeling_outputs", fromlist=[name]), name)
    ours = {
        "BaseModelOutputWithPastAndCrossAttentions": BaseModelOutputWithPastAndCrossAttentions,
        "CausalLMOutputWithCrossAttentions": CausalLMOutputWithCrossAttentions,
    }[name]
    assert [field.name for field in dataclasses.fields(ours)] == [field.name for field in dataclasses.fields(theirs)]


def test_access_by_name_key_index_and_slice(out):
    assert out.logits is out["logits"] is out[0] is out.to_tuple()[0]
    assert out[-1] is out.hidden_states
    assert out[:1] == (out.logits,)
    assert len(out) == 2
    assert list(out) == ["logits", "hidden_states"]
    assert "loss" not in out
    assert out.loss is None
    assert out.get("loss") is None
    assert isinstance(out, dict)
    assert dict(**out).keys() == {"logits", "hidden_states"}
    with pytest.raises(KeyError):
        out["loss"]
    with pytest.raises(IndexError):
        out[2]
    with pytest.raises(AttributeError):
        out.logit  # noqa: B018


def test_a_field_set_late_takes_its_own_place(out):
    """The order of the tuple is part of the contract; transformers appends at the end."""
    out.loss = torch.tensor(1.0)
    out["past_key_values"] = "cache"
    assert list(out) == ["loss", "logits", "past_key_values", "hidden_states"]
    assert out[2] == "cache"
    assert out.past_key_values == "cache"
    out.loss = None
    assert list(out) == ["logits", "past_key_values", "hidden_states"]
    assert out[0] is out.logits


def test_made_from_a_mapping_from_pairs_or_from_its_first_field(out):
    for made in (
        CausalLMOutputWithCrossAttentions(dict(out)),
        CausalLMOutputWithCrossAttentions(out.items()),
        CausalLMOutputWithCrossAttentions((name, out[name]) for name in out),
        CausalLMOutputWithCrossAttentions(**out),
        dataclasses.replace(out),
    ):
        assert made.to_tuple() == out.to_tuple()
    assert BaseModelOutputWithPastAndCrossAttentions(torch.ones(1)).last_hidden_state.item() == 1.0


def test_copies_and_pickles(out):
    for made in (copy.copy(out), copy.deepcopy(out), pickle.loads(pickle.dumps(out))):
        assert type(made) is type(out)
        assert list(made) == list(out)
        assert torch.equal(made.logits, out.logits)


def test_is_a_pytree(out):
    doubled = pytree.tree_map(lambda x: x * 2, out)
    assert type(doubled) is type(out)
    assert torch.equal(doubled.logits, out.logits * 2)
    assert torch.equal(doubled.hidden_states[0], out.hidden_states[0] * 2)
    assert doubled.loss is None
    keys = [pytree.keystr(path) for path, _ in pytree.tree_flatten_with_path(out)[0]]
    assert keys == ["['logits']", "['hidden_states'][0]"]


def test_fields_are_fixed(out):
    for change in (out.popitem, out.clear, lambda: out.pop("logits"), lambda: out.__delitem__("logits")):
        with pytest.raises(TypeError, match="fixed"):
            change()
    with pytest.raises(KeyError, match="no field 'logit'"):
        out["logit"] = 1
    with pytest.raises(TypeError, match="no field 'logit'; it has loss, logits"):
        CausalLMOutputWithCrossAttentions(logit=1)
    with pytest.raises(TypeError, match="one positional"):
        CausalLMOutputWithCrossAttentions(torch.ones(1), torch.ones(1))
    assert list(out) == ["logits", "hidden_states"]


def test_a_subclass_adds_fields_after_those_of_its_base():
    @dataclasses.dataclass(init=False, repr=False, eq=False)
    class Extended(CausalLMOutputWithCrossAttentions):
        extra: torch.Tensor | None = None

    made = Extended(extra=torch.ones(1), logits=torch.zeros(1))
    assert list(made) == ["logits", "extra"]
    assert isinstance(made, ModelOutput)
