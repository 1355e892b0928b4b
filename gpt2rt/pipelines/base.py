"""What all pipelines share: inputs of every form, lazy results, batches, and the checks of keywords and models.

A pipeline turns each input into one or several features (:meth:`Pipeline.preprocess`), runs the model on batches of
features (:meth:`Pipeline.forward`), and makes the result of an input from the outputs of its features
(:meth:`Pipeline.postprocess`). Rows of a batch are padded on the right under a mask, where no token of a causal model
sees them, and cut to their own length again, so results do not depend on ``batch_size``.
"""

from __future__ import annotations

import dataclasses
import inspect
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from gpt2rt.errors import RequestError


@dataclasses.dataclass
class Feature:
    """One row for the model.

    Attributes:
        inputs: the model's inputs by name, each a list of ints as long as ``input_ids``.
        extra: whatever the pipeline needs for the result.
    """

    inputs: dict[str, list[int]]
    extra: Any = None


class Results:
    """The results of a lazy input, computed as they are asked for.

    Args:
        results: yields them.
        length: how many there will be, if that is known.
    """

    def __init__(self, results: Iterator[Any], length: int | None) -> None:
        self._results = results
        self._length = length

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Any:
        return next(self._results)

    def __len__(self) -> int:
        if self._length is None:
            raise TypeError("the number of results is unknown, because the input has no length")
        return self._length


class Pipeline:
    """Base class of the pipelines; :func:`gpt2rt.pipeline` makes them.

    Args:
        model: a model of gpt2rt, of the kind that the task needs.
        tokenizer: the model's tokenizer.
        task: name of the task.
        device: where to move the model: a number (-1 = CPU, n = ``cuda:n``), a name or a ``torch.device``; None leaves
            it where it is.
        batch_size: rows of a batch, unless a call says otherwise; 1 by default.
        num_workers: accepted without effect: texts need no loading.
        **kwargs: the task's own keywords, as defaults of all calls.
    Raises:
        ValueError: the model is of the wrong kind, or a keyword has an invalid value.
        TypeError: a keyword is not the task's.
    """

    #: ends of the names of the model classes that the task can use; empty: all
    model_kinds: ClassVar[tuple[str, ...]] = ()
    #: names of the inputs, as ``gpt2rt run --column`` takes them by default
    default_input_names: ClassVar[str | None] = None
    framework = "pt"

    def __init__(
        self,
        model: Any,
        tokenizer: Any = None,
        *,
        task: str = "",
        device: int | str | torch.device | None = None,
        batch_size: int | None = None,
        num_workers: int | None = None,
        **kwargs: Any,
    ) -> None:
        self.task, self.model, self.tokenizer = task, model, tokenizer
        self._check_model()
        if tokenizer is None:
            raise ValueError(f"the {task or type(self).__name__} pipeline needs a tokenizer; pass tokenizer=")
        if device is not None:
            place = torch_device(device)
            if place != self.model.device:
                self.model.to(place)
        self._batch_size = _check_batch_size(batch_size)
        self._preprocess_params: dict[str, Any] = {}
        self._forward_params: dict[str, Any] = {}
        self._postprocess_params: dict[str, Any] = {}
        given = self._own_parameters(kwargs)
        self._preprocess_params, self._forward_params, self._postprocess_params = given

    def _check_model(self) -> None:
        names = [kind.__name__ for kind in type(self.model).__mro__]
        if self.model_kinds and not any(name.endswith(self.model_kinds) for name in names):
            raise ValueError(
                f"the {self.task or type(self).__name__} pipeline cannot use a {names[0]}; it needs a model whose "
                f"class name ends in {' or '.join(self.model_kinds)}"
            )

    # ---- what a task defines ---------------------------------------------------------------------------------------

    # *args and **kwargs let the task name its own parameters

    def _sanitize_parameters(self, *args: Any, **kwargs: Any) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
        """The task's keywords, sorted into those of ``preprocess``, ``_forward`` and ``postprocess``.

        Only what the caller gave is returned, so that defaults stand in the signatures of these three.
        """
        raise NotImplementedError(f"{type(self).__name__} must define _sanitize_parameters")

    def preprocess(self, *args: Any, **kwargs: Any) -> Iterable[Feature]:
        """The features of one input, which is the first argument; at least one."""
        raise NotImplementedError(f"{type(self).__name__} must define preprocess")

    def _forward(self, *args: Any, **kwargs: Any) -> list[Any]:
        """An output for each feature of a batch, which is the first argument; called without gradients."""
        raise NotImplementedError(f"{type(self).__name__} must define _forward")

    def postprocess(self, *args: Any, **kwargs: Any) -> Any:
        """The result of one input, from the list of the outputs of its features, which is the first argument."""
        raise NotImplementedError(f"{type(self).__name__} must define postprocess")

    # ---- keywords --------------------------------------------------------------------------------------------------

    def _own_parameters(self, kwargs: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
        known = self.parameter_names()
        unknown = [name for name in kwargs if name not in known]
        if unknown:
            raise TypeError(
                f"the {self.task or type(self).__name__} pipeline has no keyword {', '.join(map(repr, unknown))}; its "
                f"own are {', '.join(sorted(self._named_parameters()))}{self._further_keywords()}"
            )
        return self._sanitize_parameters(**kwargs)

    def _merged(self, given: tuple[dict[str, Any], ...]) -> list[dict[str, Any]]:
        """The parameters of a call, on top of those of the pipeline."""
        own = (self._preprocess_params, self._forward_params, self._postprocess_params)
        return [{**mine, **theirs} for mine, theirs in zip(own, given, strict=True)]

    def _named_parameters(self) -> set[str]:
        parameters = inspect.signature(self._sanitize_parameters).parameters.values()
        return {p.name for p in parameters if p.kind is not p.VAR_KEYWORD}

    def parameter_names(self) -> set[str]:
        """Every keyword that a call accepts."""
        return self._named_parameters()

    def _further_keywords(self) -> str:
        """The end of the message about unknown keywords: what else is accepted."""
        return ""

    def _tokenizer_keywords(self) -> set[str]:
        """The options of calling the tokenizer that a caller may set."""
        parameters = inspect.signature(type(self.tokenizer).__call__).parameters
        ours = {"self", "text", "text_pair", "text_target", "text_pair_target", "return_tensors", "kwargs"}
        return set(parameters) - ours

    # ---- running ---------------------------------------------------------------------------------------------------

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The results of one input, of a list, or lazily of a generator or dataset.

        Args:
            *args: one input; a list or tuple of them (a list of results comes back); or a generator, another iterable
                or a data set (results are computed as they are asked for, in order).
            **kwargs: ``batch_size``, in place of the pipeline's own; ``num_workers``, without effect; and the task's
                own keywords, for this call.
        Raises:
            TypeError: a keyword is not the task's, or there are more positional arguments than it takes.
            ValueError: an input or a keyword is invalid.
        """
        return self._call(*args, **kwargs)

    def _call(
        self, inputs: Any, *args: Any, num_workers: int | None = None, batch_size: int | None = None, **kwargs: Any
    ) -> Any:
        """What every ``__call__`` ends in; see there."""
        if args:
            raise TypeError(f"the {self.task} pipeline takes one positional argument, got {1 + len(args)}")
        size = self._batch_size if batch_size is None else _check_batch_size(batch_size)
        parameters = self._merged(self._own_parameters(kwargs))
        if isinstance(inputs, list | tuple):
            return list(self._stream(inputs, size, *parameters))
        if is_lazy(inputs):
            length = len(inputs) if hasattr(inputs, "__len__") else None
            return Results(self._stream(_items(inputs), size, *parameters), length)
        return next(self._stream([inputs], size, *parameters))

    def _stream(
        self,
        inputs: Iterable[Any],
        batch_size: int,
        preprocess: dict[str, Any],
        forward: dict[str, Any],
        postprocess: dict[str, Any],
    ) -> Iterator[Any]:
        """The results in order. An input is read only when the results before it were taken, or to fill a batch."""
        batch: list[tuple[Feature, bool]] = []
        outputs: list[Any] = []

        def flush() -> Iterator[Any]:
            nonlocal outputs
            made = self.forward([feature for feature, _ in batch], **forward)
            for (_, last), output in zip(batch, made, strict=True):
                outputs.append(output)
                if last:
                    yield self.postprocess(outputs, **postprocess)
                    outputs = []
            batch.clear()

        for item in inputs:
            for feature, last in _mark_last(self.preprocess(item, **preprocess)):
                batch.append((feature, last))
                if len(batch) == batch_size:
                    yield from flush()
        if batch:
            yield from flush()

    def forward(self, features: list[Feature], **parameters: Any) -> list[Any]:
        """An output for each feature, computed without gradients."""
        with torch.no_grad():
            return self._forward(features, **parameters)

    def _features_of(self, encoding: Any, extra: Sequence[Any] | None = None) -> list[Feature]:
        """A feature for each row of a batch encoding, with what the model takes of it."""
        names = [name for name in self.tokenizer.model_input_names if name in encoding]
        count = len(encoding["input_ids"])
        rows = [{name: list(encoding[name][i]) for name in names} for i in range(count)]
        return [Feature(row, None if extra is None else extra[i]) for i, row in enumerate(rows)]

    def _model_inputs(self, features: list[Feature]) -> dict[str, Tensor]:
        """{name: [rows, longest] int64} on the model's device, padded on the right under a mask."""
        lengths = [len(feature.inputs["input_ids"]) for feature in features]
        if min(lengths) == 0:
            raise RequestError("a text has no tokens, and the model needs at least one; leave empty texts out")
        longest = max(lengths)
        names = list(features[0].inputs)
        rows: dict[str, list[list[int]]] = {name: [] for name in names}
        fills = {"input_ids": self._fill_token()}
        for feature, length in zip(features, lengths, strict=True):
            for name in names:
                rows[name].append(feature.inputs[name] + [fills.get(name, 0)] * (longest - length))
        if min(lengths) < longest and "attention_mask" not in rows:
            rows["attention_mask"] = [[1] * length + [0] * (longest - length) for length in lengths]
        return {name: torch.tensor(value, device=self.model.device) for name, value in rows.items()}

    def _fill_token(self) -> int:
        """What stands in padding: the pad token of the model, which its heads look for, if it has one."""
        pad = self.model.config.pad_token_id
        return 0 if pad is None else pad

    # ---- the rest of transformers' interface -----------------------------------------------------------------------

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self.model.device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the model's weights."""
        return self.model.dtype

    @property
    def torch_dtype(self) -> torch.dtype:
        """transformers' older name of ``dtype``."""
        return self.dtype

    def save_pretrained(self, save_directory: str | os.PathLike[str], **kwargs: Any) -> None:
        """Write model and tokenizer into a folder; ``kwargs`` are those of the model's ``save_pretrained``."""
        self.model.save_pretrained(save_directory, **kwargs)
        self.tokenizer.save_pretrained(save_directory)

    def transform(self, X: Any) -> Any:
        """scikit-learn's name for calling the pipeline."""
        return self(X)

    def predict(self, X: Any) -> Any:
        """scikit-learn's name for calling the pipeline."""
        return self(X)

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}(task={self.task!r}, model={type(self.model).__name__}, device={self.device}, "
            f"dtype={str(self.dtype).removeprefix('torch.')})"
        )


def torch_device(device: int | str | torch.device) -> torch.device:
    """The device meant by -1 (CPU), n (``cuda:n``), a name or a device.

    Raises:
        ValueError: there is no such device.
    """
    if (
        isinstance(device, bool)
        or not isinstance(device, int | str | torch.device)
        or (isinstance(device, int) and device < -1)
    ):
        raise ValueError(f"device = {device!r}, but it must be -1 for the CPU, n for cuda:n, or a name like 'cuda:0'")
    if isinstance(device, int):
        device = "cpu" if device == -1 else f"cuda:{device}"
    try:
        place = torch.device(device)
    except RuntimeError as error:
        raise ValueError(f"device = {device!r} is no torch device: {str(error).splitlines()[0]}") from None
    if place.type == "cuda" and (not torch.cuda.is_available() or (place.index or 0) >= torch.cuda.device_count()):
        raise ValueError(
            f"device = {str(place)!r}, but torch sees {torch.cuda.device_count()} CUDA devices; use device=-1 for the "
            "CPU"
        )
    return place


def is_lazy(inputs: Any) -> bool:
    """Whether an input is an iterator or a data set, whose results are computed as they are asked for."""
    if isinstance(inputs, str | bytes | Mapping | list | tuple):
        return False
    return isinstance(inputs, Iterable) or _has_items(inputs)


def _has_items(inputs: Any) -> bool:
    return hasattr(inputs, "__getitem__") and hasattr(inputs, "__len__")


def _items(inputs: Any) -> Iterator[Any]:
    # a data set need not be iterable
    return (inputs[index] for index in range(len(inputs))) if _has_items(inputs) else iter(inputs)


def _mark_last(features: Iterable[Feature]) -> Iterator[tuple[Feature, bool]]:
    """Each feature, and whether it is the last one."""
    previous: Feature | None = None
    for feature in features:
        if previous is not None:
            yield previous, False
        previous = feature
    if previous is not None:
        yield previous, True


def _check_batch_size(value: int | None) -> int:
    if value is None:
        return 1
    if type(value) is not int or value < 1:
        raise ValueError(f"batch_size = {value!r}, but it must be an integer >= 1")
    return value


def only_given(**parameters: Any) -> dict[str, Any]:
    """The parameters that are not None."""
    return {name: value for name, value in parameters.items() if value is not None}


def choose(name: str, value: str, choices: Sequence[str]) -> str:
    """``value`` in lower case, if it is one of ``choices``.

    Raises:
        ValueError: it is not.
    """
    # an enumeration of transformers counts as its value
    value = getattr(value, "value", value)
    lowered = value.lower() if isinstance(value, str) else value
    if lowered not in choices:
        raise ValueError(f"{name} = {value!r}, but it must be one of {', '.join(choices)}")
    return lowered
