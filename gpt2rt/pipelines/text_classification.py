"""Classes of texts, and zero-shot classification on top of a model that judges entailment."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from gpt2rt.models.layers import project

from .base import Feature, Pipeline, choose, only_given

FUNCTIONS = ("sigmoid", "softmax", "none")


class SequenceClassifier(Pipeline):
    """What both pipelines share: the logits of a batch of texts."""

    model_kinds: ClassVar[tuple[str, ...]] = ("ForSequenceClassification",)

    def _forward(self, features: list[Feature], **parameters: Any) -> list[Any]:
        inputs = self._model_inputs(features)
        if self.model.config.pad_token_id is not None or len(features) == 1:
            logits = self.model(**inputs).logits
        else:
            # without a pad token the class cannot tell where the rows of a batch end; the mask can
            hidden = self.model.base_model(**inputs).last_hidden_state
            ends = torch.tensor([len(feature.inputs["input_ids"]) - 1 for feature in features], device=hidden.device)
            rows = torch.arange(len(features), device=hidden.device)
            logits = project(self.model.score, hidden[rows, ends])
        return [(feature.extra, row) for feature, row in zip(features, logits.float().cpu(), strict=True)]


class TextClassificationPipeline(SequenceClassifier):
    """Labels of texts, with a sequence classification model.

    Keywords of the pipeline and of its calls:
        top_k: the k best labels, None for all; a list of labels comes for each text. Without it the best label of each.
        function_to_apply: "sigmoid", "softmax" or "none"; by default none for regression, the sigmoid for one label or
            ``problem_type`` "multi_label_classification", else the softmax.
        **others: options of the tokenizer, such as ``truncation`` and ``max_length``.
    """

    # "" means not given, as None means all labels
    def _sanitize_parameters(
        self, function_to_apply: str | None = None, top_k: int | str | None = "", **tokenizer_kwargs: Any
    ) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
        after: dict[str, Any] = {}
        if top_k != "":
            if top_k is not None and (type(top_k) is not int or top_k < 1):
                raise ValueError(f"top_k = {top_k!r}, but it must be an integer >= 1, or None for all labels")
            after["top_k"] = top_k
        if function_to_apply is not None:
            after["function_to_apply"] = choose("function_to_apply", function_to_apply, FUNCTIONS)
        return tokenizer_kwargs, {}, after

    def parameter_names(self) -> set[str]:
        return self._named_parameters() | self._tokenizer_keywords()

    def _further_keywords(self) -> str:
        return f", and the tokenizer's {', '.join(sorted(self._tokenizer_keywords()))}"

    def __call__(self, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """The labels of one or several texts.

        Args:
            inputs: a text; a pair as ``{"text": ..., "text_pair": ...}``; a list of either; or a generator or data set.
            **kwargs: see the class, and ``batch_size``.
        Returns:
            for one text ``[{"label": str, "score": float}]``; for a list such a dictionary for each text. With
            ``top_k`` in this call or at construction, lists of them from the best to the worst.
        """
        result = self._call(inputs, *args, **kwargs)
        # transformers puts the result of a single text into a list, unless this call says how many labels it wants
        return [result] if isinstance(inputs, str) and "top_k" not in kwargs else result

    def preprocess(self, inputs: Any, **tokenizer_kwargs: Any) -> list[Feature]:
        if isinstance(inputs, Mapping):
            extra = sorted(set(inputs) - {"text", "text_pair"})
            if extra or "text" not in inputs:
                raise ValueError(
                    f'a pair of texts is {{"text": ..., "text_pair": ...}}, got the keys {", ".join(map(repr, inputs))}'
                )
            text, pair = inputs["text"], inputs.get("text_pair")
        elif isinstance(inputs, list) and len(inputs) == 1 and isinstance(inputs[0], list) and len(inputs[0]) == 2:
            # transformers' older form of a pair
            text, pair = inputs[0]
        elif isinstance(inputs, str):
            text, pair = inputs, None
        else:
            raise ValueError(
                f'a text is a string and a pair is {{"text": ..., "text_pair": ...}}, got {type(inputs).__name__}'
            )
        pairs = None if pair is None else [pair]
        return self._features_of(self.tokenizer([text], pairs, **tokenizer_kwargs))

    def postprocess(
        self, outputs: list[Any], function_to_apply: str | None = None, top_k: int | str | None = ""
    ) -> Any:
        [(_, logits)] = outputs
        scores = _apply(function_to_apply or self._default_function(), logits).tolist()
        names = self.model.config.id2label
        labels = [{"label": names[index], "score": score} for index, score in enumerate(scores)]
        if isinstance(top_k, str):
            return max(labels, key=lambda label: label["score"])
        return sorted(labels, key=lambda label: label["score"], reverse=True)[:top_k]

    def _default_function(self) -> str:
        config = self.model.config
        if config.problem_type == "regression":
            return "none"
        if config.problem_type == "multi_label_classification" or config.num_labels == 1:
            return "sigmoid"
        return "softmax"


def _apply(function: str, logits: Tensor) -> Tensor:
    """[num_labels] float32 scores."""
    if function == "none":
        return logits
    return logits.sigmoid() if function == "sigmoid" else logits.softmax(-1)


class ZeroShotClassificationPipeline(SequenceClassifier):
    """Which of any labels fit a text, by a model trained to judge whether a premise entails a hypothesis.

    Each label is put into a hypothesis, and the pair (text, hypothesis) is judged (Yin et al. 2019, arXiv:1909.00161).
    The model's ``label2id`` must name the entailment label; a name that begins with "entail" is looked for.

    Keywords of the pipeline and of its calls:
        candidate_labels: a list of labels, or a string of labels with commas between.
        hypothesis_template: the hypothesis, with ``{}`` for the label.
        multi_label: False: the scores of all labels sum to 1. True: labels are independent, and each score is the
            probability of entailment against contradiction.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.entailment_id == -1:
            warnings.warn(
                f"no label of the model begins with 'entail' ({', '.join(self.model.config.label2id)}), so the last "
                "one is taken for entailment; set config.label2id",
                stacklevel=3,
            )

    @property
    def entailment_id(self) -> int:
        """The number of the entailment label; -1 if no label is named so."""
        ids = self.model.config.label2id.items()
        return next((number for label, number in ids if label.lower().startswith("entail")), -1)

    def _sanitize_parameters(
        self,
        candidate_labels: str | list[str] | None = None,
        hypothesis_template: str | None = None,
        multi_label: bool | None = None,
    ) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
        if isinstance(candidate_labels, str):
            candidate_labels = [label.strip() for label in candidate_labels.split(",") if label.strip()]
        if candidate_labels is not None and len(candidate_labels) == 0:
            raise ValueError("candidate_labels is empty; give at least one label")
        if hypothesis_template is not None and hypothesis_template.format("x") == hypothesis_template:
            raise ValueError(
                f"hypothesis_template = {hypothesis_template!r} has no {{}} where the label should go, so all labels "
                "would be the same hypothesis"
            )
        before = only_given(candidate_labels=candidate_labels, hypothesis_template=hypothesis_template)
        return before, {}, only_given(multi_label=multi_label)

    def __call__(self, sequences: Any, *args: Any, **kwargs: Any) -> Any:
        """The labels of one or several texts, from the likeliest to the least likely.

        Args:
            sequences: a text, a list of texts, or a generator or data set.
            *args: ``candidate_labels`` may follow by position.
            **kwargs: see the class, and ``batch_size``.
        Returns:
            ``{"sequence": str, "labels": list[str], "scores": list[float]}`` for each text.
        """
        if len(args) == 1 and "candidate_labels" not in kwargs:
            kwargs["candidate_labels"], args = args[0], ()
        if isinstance(sequences, str | list | tuple) and len(sequences) == 0:
            raise ValueError("there is no text to classify; give at least one")
        return self._call(sequences, *args, **kwargs)

    def preprocess(
        self,
        inputs: str,
        candidate_labels: list[str] | None = None,
        hypothesis_template: str = "This example is {}.",
    ) -> Iterator[Feature]:
        if candidate_labels is None:
            raise ValueError("candidate_labels is missing; name the labels to choose from")
        if not isinstance(inputs, str):
            raise ValueError(f"a text is a string, got {type(inputs).__name__}")
        for label in candidate_labels:
            # the hypothesis is never cut
            encoding = self.tokenizer([inputs], [hypothesis_template.format(label)], truncation="only_first")
            yield from self._features_of(encoding, [(inputs, label)])

    def postprocess(self, outputs: list[Any], multi_label: bool = False) -> dict[str, Any]:
        sequence = outputs[0][0][0]
        labels = [label for (_, label), _ in outputs]
        logits = torch.stack([row for _, row in outputs])  # [num_candidates, num_labels]
        entailment = self.entailment_id
        if multi_label or len(labels) == 1:
            contradiction = -1 if entailment == 0 else 0
            scores = logits[:, [contradiction, entailment]].softmax(-1)[:, 1]
        else:
            scores = logits[:, entailment].softmax(0)
        order = scores.argsort(descending=True, stable=True).tolist()
        return {"sequence": sequence, "labels": [labels[i] for i in order], "scores": scores[order].tolist()}
