"""What forward returns: records that are also dictionaries and tuples, with transformers' names and order.

A field that is None is absent from the dictionary and from the tuple, and reads as None as an attribute.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections import OrderedDict
from collections.abc import Iterable
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.utils import _pytree as pytree


class ModelOutput(OrderedDict):
    """Base of all outputs. Subclasses list their fields as annotations and carry ``@dataclasses.dataclass``.

    ``out.logits``, ``out["logits"]``, ``out[0]``, ``out[:2]``, ``out.to_tuple()`` and ``"logits" in out`` work;
    iteration gives the names, as in transformers. The order is that of the fields, whenever they are set. Subclasses
    are registered with torch's pytree, so torch.compile, torch.export and data-parallel wrappers see what is inside.

    Args:
        *args: at most one: a mapping or an iterable of (name, value) pairs, as ``dict`` takes them, or the value of
            the first field.
        **kwargs: values by field name.

    Raises:
        TypeError: a name is not a field, or there is more than one positional argument.
    """

    _names: ClassVar[tuple[str, ...]] = ()

    # not a field: what the model's own head may use instead of last_hidden_state, see lm_head.token_logits
    shared_rows: Any = None

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls._names = (*cls._names, *(name for name in inspect.get_annotations(cls) if name[0] != "_"))
        pytree.register_pytree_node(
            cls,
            _flatten,
            lambda values, names: cls(zip(names, values, strict=True)),
            flatten_with_keys_fn=_flatten_with_keys,
            serialized_type_name=f"{cls.__module__}.{cls.__qualname__}",
        )

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__()
        if len(args) > 1:
            raise TypeError(f"{type(self).__name__} takes one positional argument, got {len(args)}; name the others")
        values: dict[str, Any] = {}
        for arg in args:
            if isinstance(arg, Iterable) and not isinstance(arg, Tensor | tuple):
                values.update(arg)
            else:
                values[self._names[0]] = arg
        values.update(kwargs)
        unknown = [name for name in values if name not in self._names]
        if unknown:
            raise TypeError(f"{type(self).__name__} has no field {unknown[0]!r}; it has {', '.join(self._names)}")
        for name in self._names:
            setattr(self, name, values.get(name))

    def __setattr__(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)
        if name not in self._names:
            return
        if value is None:
            if name in self:
                super().__delitem__(name)
            return
        is_new = name not in self
        super().__setitem__(name, value)
        if is_new:
            # a field set late still takes its own place: the tuple order is part of the contract
            for later in self._names[self._names.index(name) + 1 :]:
                if later in self:
                    self.move_to_end(later)

    def __setitem__(self, name: str, value: Any) -> None:
        if name not in self._names:
            raise KeyError(f"{type(self).__name__} has no field {name!r}; it has {', '.join(self._names)}")
        setattr(self, name, value)

    def __getitem__(self, key: str | int | slice) -> Any:
        return super().__getitem__(key) if isinstance(key, str) else self.to_tuple()[key]

    def __delitem__(self, key: Any) -> None:
        raise TypeError(f"the fields of a {type(self).__name__} are fixed; set one to None to drop it")

    def pop(self, *args: Any, **kwargs: Any) -> Any:
        self.__delitem__(None)

    def popitem(self, *args: Any, **kwargs: Any) -> Any:
        self.__delitem__(None)

    def clear(self) -> None:
        self.__delitem__(None)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{name}={value!r}' for name, value in self.items())})"

    def __reduce__(self) -> Any:
        return type(self), (dict(self),)

    def to_tuple(self) -> tuple[Any, ...]:
        """The values that are not None, in the order of the fields."""
        return tuple(self.values())


def _flatten(output: ModelOutput) -> tuple[list[Any], list[str]]:
    return list(output.values()), list(output.keys())


def _flatten_with_keys(output: ModelOutput) -> tuple[list[tuple[Any, Any]], list[str]]:
    return [(pytree.MappingKey(name), value) for name, value in output.items()], list(output.keys())


@dataclasses.dataclass(init=False, repr=False, eq=False)
class BaseModelOutputWithPastAndCrossAttentions(ModelOutput):
    """What the bare model returns.

    Attributes:
        last_hidden_state: [*leading, seq_len, n_embd], after the final norm.
        past_key_values: the cache, when ``use_cache``.
        hidden_states: n_layer + 1 tensors when asked for: the embeddings, the output of each block but the last, and
            ``last_hidden_state``; entries that were not selected are None.
        attentions: per block [batch, n_head, query_len, key_len], probabilities, when asked for.
        cross_attentions: the same over the encoder's states.
    """

    last_hidden_state: torch.Tensor | None = None
    past_key_values: Any = None
    hidden_states: tuple[torch.Tensor | None, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None
    cross_attentions: tuple[torch.Tensor, ...] | None = None


@dataclasses.dataclass(init=False, repr=False, eq=False)
class CausalLMOutputWithCrossAttentions(ModelOutput):
    """What the language model returns.

    Attributes:
        loss: scalar float32, when labels were given.
        logits: [*leading, kept positions, vocab_size], in the dtype of the weights.
        past_key_values, hidden_states, attentions, cross_attentions: as in
            :class:`BaseModelOutputWithPastAndCrossAttentions`.
    """

    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    past_key_values: Any = None
    hidden_states: tuple[torch.Tensor | None, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None
    cross_attentions: tuple[torch.Tensor, ...] | None = None


@dataclasses.dataclass(init=False, repr=False, eq=False)
class GPT2DoubleHeadsModelOutput(ModelOutput):
    """What the model with a language-modelling and a multiple-choice head returns.

    Attributes:
        loss: of the language model, scalar float32, when ``labels`` were given.
        mc_loss: of the choice, scalar float32, when ``mc_labels`` were given.
        logits: [*leading, seq_len, vocab_size]; ``leading`` is usually [batch, num_choices].
        mc_logits: [*leading], the score of each choice; other summaries than ``cls_index`` have other shapes.
        past_key_values, hidden_states, attentions: as in :class:`BaseModelOutputWithPastAndCrossAttentions`.
    """

    loss: torch.Tensor | None = None
    mc_loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    mc_logits: torch.Tensor | None = None
    past_key_values: Any = None
    hidden_states: tuple[torch.Tensor | None, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None


@dataclasses.dataclass(init=False, repr=False, eq=False)
class SequenceClassifierOutputWithPast(ModelOutput):
    """What a model that classifies whole sequences returns.

    Attributes:
        loss: scalar float32, when labels were given.
        logits: [*leading, num_labels]; for regression the predicted values.
        past_key_values, hidden_states, attentions: as in :class:`BaseModelOutputWithPastAndCrossAttentions`.
    """

    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    past_key_values: Any = None
    hidden_states: tuple[torch.Tensor | None, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None


@dataclasses.dataclass(init=False, repr=False, eq=False)
class TokenClassifierOutput(ModelOutput):
    """What a model that classifies every token returns.

    Attributes:
        loss: scalar float32, when labels were given.
        logits: [*leading, seq_len, num_labels].
        hidden_states, attentions: as in :class:`BaseModelOutputWithPastAndCrossAttentions`.
    """

    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    hidden_states: tuple[torch.Tensor | None, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None


@dataclasses.dataclass(init=False, repr=False, eq=False)
class QuestionAnsweringModelOutput(ModelOutput):
    """What a model that marks an answer in the text returns.

    Attributes:
        loss: scalar float32, the mean of those of start and end, when both positions were given.
        start_logits, end_logits: [*leading, seq_len], the scores of each token to be the first and the last of the
            answer.
        hidden_states, attentions: as in :class:`BaseModelOutputWithPastAndCrossAttentions`.
    """

    loss: torch.Tensor | None = None
    start_logits: torch.Tensor | None = None
    end_logits: torch.Tensor | None = None
    hidden_states: tuple[torch.Tensor | None, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None


@dataclasses.dataclass(init=False, repr=False, eq=False)
class BaseModelOutput(ModelOutput):
    """What the bare OpenAI GPT returns.

    Attributes:
        last_hidden_state: [*leading, seq_len, n_embd], after the norm of the last block.
        hidden_states: n_layer + 1 tensors when asked for: the embeddings and the output of each block, the last of
            which is ``last_hidden_state``; entries that were not selected are None.
        attentions: per block [batch, n_head, query_len, key_len], probabilities, when asked for.
        past_key_values: the cache, when ``use_cache``. transformers has none here; it stands last, so that the order of
            the others is transformers' with and without it.
    """

    last_hidden_state: torch.Tensor | None = None
    hidden_states: tuple[torch.Tensor | None, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None
    past_key_values: Any = None


@dataclasses.dataclass(init=False, repr=False, eq=False)
class CausalLMOutput(ModelOutput):
    """What the OpenAI GPT language model returns.

    Attributes:
        loss: scalar float32, when labels were given.
        logits: [*leading, kept positions, vocab_size], in the dtype of the weights.
        hidden_states, attentions, past_key_values: as in :class:`BaseModelOutput`.
    """

    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    hidden_states: tuple[torch.Tensor | None, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None
    past_key_values: Any = None


@dataclasses.dataclass(init=False, repr=False, eq=False)
class OpenAIGPTDoubleHeadsModelOutput(ModelOutput):
    """What the OpenAI GPT with a language-modelling and a multiple-choice head returns.

    Attributes:
        loss: of the language model, scalar float32, when ``labels`` were given.
        mc_loss: of the choice, scalar float32, when ``mc_labels`` were given.
        logits: [*leading, seq_len, vocab_size]; ``leading`` is usually [batch, num_choices].
        mc_logits: [*leading], the score of each choice; other summaries than ``cls_index`` have other shapes.
        hidden_states, attentions, past_key_values: as in :class:`BaseModelOutput`.
    """

    loss: torch.Tensor | None = None
    mc_loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    mc_logits: torch.Tensor | None = None
    hidden_states: tuple[torch.Tensor | None, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None
    past_key_values: Any = None


@dataclasses.dataclass(init=False, repr=False, eq=False)
class SequenceClassifierOutput(ModelOutput):
    """What an OpenAI GPT that classifies whole sequences returns.

    Attributes:
        loss: scalar float32, when labels were given.
        logits: [*leading, num_labels]; for regression the predicted values.
        hidden_states, attentions, past_key_values: as in :class:`BaseModelOutput`.
    """

    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    hidden_states: tuple[torch.Tensor | None, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None
    past_key_values: Any = None
