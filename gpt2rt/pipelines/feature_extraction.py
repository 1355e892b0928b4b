"""Hidden states of texts."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .base import Feature, Pipeline, only_given


class FeatureExtractionPipeline(Pipeline):
    """The last hidden states of texts; of a model with a head, its first output.

    Keywords of the pipeline and of its calls:
        truncation: as in calling the tokenizer.
        tokenize_kwargs: a dictionary of further options of the tokenizer.
        return_tensors: give tensors instead of nested lists.
    """

    def _sanitize_parameters(
        self,
        truncation: bool | str | None = None,
        tokenize_kwargs: dict[str, Any] | None = None,
        return_tensors: bool | None = None,
    ) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
        before = dict(tokenize_kwargs or {})
        unknown = sorted(set(before) - self._tokenizer_keywords())
        if unknown:
            raise TypeError(
                f"tokenize_kwargs holds {', '.join(map(repr, unknown))}; the tokenizer's options are "
                f"{', '.join(sorted(self._tokenizer_keywords()))}"
            )
        if truncation is not None:
            if "truncation" in before:
                raise ValueError("truncation was given twice, as a keyword and in tokenize_kwargs; give it once")
            before["truncation"] = truncation
        return before, {}, only_given(return_tensors=return_tensors)

    def preprocess(self, inputs: Any, **tokenize_kwargs: Any) -> list[Feature]:
        if not isinstance(inputs, str):
            raise ValueError(f"a text is a string, got {type(inputs).__name__}")
        return self._features_of(self.tokenizer([inputs], **tokenize_kwargs))

    def _forward(self, features: list[Feature], **parameters: Any) -> list[Tensor]:
        states = self.model(**self._model_inputs(features))[0].cpu()
        # [1, tokens, n_embd] each, without the padding of the batch
        return [row[None, : len(feature.inputs["input_ids"])] for feature, row in zip(features, states, strict=True)]

    def postprocess(self, outputs: list[Tensor], return_tensors: bool = False) -> Any:
        """[1, tokens, n_embd] in the model's dtype, as nested lists or as a tensor."""
        [states] = outputs
        return states if return_tensors else states.tolist()
