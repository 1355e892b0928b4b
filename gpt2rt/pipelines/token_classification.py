"""Classes of tokens, and tokens put together to words and entities."""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Sequence
from typing import Any, ClassVar

import torch

from .base import Feature, Pipeline, choose

AGGREGATION_STRATEGIES = ("none", "simple", "first", "average", "max")
_BY_WORD = ("first", "average", "max")


@dataclasses.dataclass
class _Chunk:
    """What is known of a row beside its token ids."""

    sentence: str
    special: list[int]  # 1 = special token or padding
    offsets: list[tuple[int, int]]  # characters of the sentence


class TokenClassificationPipeline(Pipeline):
    """Labels of tokens, or entities made of tokens, with a token classification model.

    Keywords of the pipeline and of its calls:
        aggregation_strategy: "none" (also the default): a result for each token. "simple": neighbours with the same
            label, or with "B-" and "I-" in front of it, become one entity. "first", "average", "max": the tokens of a
            word get one label before: that of the first token, that of the mean of their scores, or that of the token
            with the largest score.
        ignore_labels: results with these labels are left out, ``["O"]`` by default.
        stride: read texts of any length, in pieces of the tokenizer's ``model_max_length`` tokens that share this many
            tokens; without it a text is cut there. Needs a strategy other than "none".
        offset_mapping: (start, end) of each token, instead of the tokenizer's own.
        is_split_into_words: inputs are lists of words.
        delimiter: stands between the words in the text that ``start`` and ``end`` refer to, a space by default.
    """

    model_kinds: ClassVar[tuple[str, ...]] = ("ForTokenClassification",)

    def _sanitize_parameters(
        self,
        ignore_labels: Sequence[str] | None = None,
        aggregation_strategy: str | None = None,
        offset_mapping: list[tuple[int, int]] | None = None,
        is_split_into_words: bool | None = None,
        stride: int | None = None,
        delimiter: str | None = None,
    ) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
        before: dict[str, Any] = {}
        after: dict[str, Any] = {}
        if aggregation_strategy is not None:
            strategy = choose("aggregation_strategy", aggregation_strategy, AGGREGATION_STRATEGIES)
            after["aggregation_strategy"] = strategy
        if ignore_labels is not None:
            after["ignore_labels"] = list(ignore_labels)
        if stride is not None:
            limit = self.tokenizer.model_max_length
            if type(stride) is not int or not 0 <= stride < limit:
                raise ValueError(
                    f"stride = {stride!r}, but it must be an integer from 0 to {limit - 1}, below the tokenizer's "
                    f"model_max_length"
                )
            before["stride"] = stride
        if offset_mapping is not None:
            # transformers also takes the mapping of one text in a list
            wrapped = bool(offset_mapping) and isinstance(offset_mapping[0], list)
            before["offset_mapping"] = offset_mapping[0] if wrapped else offset_mapping
        if is_split_into_words is not None:
            before["is_split_into_words"] = is_split_into_words
        if delimiter is not None:
            before["delimiter"] = delimiter
        strategy = {**self._postprocess_params, **after}.get("aggregation_strategy", "none")
        if {**self._preprocess_params, **before}.get("stride") is not None and strategy == "none":
            raise ValueError(
                "stride reads a text in overlapping pieces, whose results only an aggregation_strategy puts together; "
                f"pass one of {', '.join(AGGREGATION_STRATEGIES[1:])}"
            )
        return before, {}, after

    def __call__(self, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """The labels of the tokens of one or several texts.

        Args:
            inputs: a text, a list of texts, or a generator or data set; with ``is_split_into_words`` lists of words
                take the place of texts.
            **kwargs: see the class, and ``batch_size``.
        Returns:
            for each text a list of dictionaries: ``entity`` (``entity_group`` with a strategy), ``score``, ``word``,
            ``start`` and ``end`` in characters, and ``index`` of the token without a strategy.
        """
        words = kwargs.get("is_split_into_words", self._preprocess_params.get("is_split_into_words"))
        if inputs is None or (isinstance(inputs, str | list | tuple) and len(inputs) == 0):
            raise ValueError("At least one input is required.")
        if words and isinstance(inputs, list | tuple) and not isinstance(inputs[0], list | tuple):
            [result] = self._call([inputs], *args, **kwargs)
            # a list of one, as transformers gives it
            return [result]
        return self._call(inputs, *args, **kwargs)

    def preprocess(
        self,
        inputs: Any,
        is_split_into_words: bool = False,
        delimiter: str = " ",
        stride: int | None = None,
        offset_mapping: list[tuple[int, int]] | None = None,
    ) -> list[Feature]:
        starts: list[int] = []
        text: str | list[str]
        if is_split_into_words:
            if not isinstance(inputs, list | tuple):
                raise ValueError(
                    f"with is_split_into_words=True an input is a list of words, got {type(inputs).__name__}"
                )
            sentence, text = delimiter.join(inputs), list(inputs)
            position = 0
            for word in inputs:
                starts.append(position)
                position += len(word) + len(delimiter)
        else:
            if not isinstance(inputs, str):
                raise ValueError(
                    f"an input is a text, got {type(inputs).__name__}; pass is_split_into_words=True for lists of words"
                )
            sentence, text = inputs, inputs
        encoding = self.tokenizer(
            [text],
            truncation=True,
            is_split_into_words=is_split_into_words,
            return_special_tokens_mask=True,
            return_offsets_mapping=True,
            **({} if stride is None else {"return_overflowing_tokens": True, "stride": stride}),
        )
        chunks = []
        for row, (special, offsets) in enumerate(
            zip(encoding["special_tokens_mask"], encoding["offset_mapping"], strict=True)
        ):
            places = [tuple(pair) for pair in (offsets if offset_mapping is None else offset_mapping)]
            if is_split_into_words:
                # offsets count from the start of each word
                shifts = [0 if word is None else starts[word] for word in encoding.word_ids(row)]
                places = [(a + shift, b + shift) for (a, b), shift in zip(places, shifts, strict=True)]
            chunks.append(_Chunk(sentence, list(special), places))
        return self._features_of(encoding, chunks)

    def _forward(self, features: list[Feature], **parameters: Any) -> list[Any]:
        logits = self.model(**self._model_inputs(features)).logits.float().cpu()
        outputs = []
        for feature, row in zip(features, logits, strict=True):
            ids = feature.inputs["input_ids"]
            outputs.append((feature.extra, ids, row[: len(ids)].softmax(-1)))
        return outputs

    def postprocess(
        self, outputs: list[Any], aggregation_strategy: str = "none", ignore_labels: Sequence[str] = ("O",)
    ) -> list[dict[str, Any]]:
        entities = []
        for chunk, ids, scores in outputs:
            tokens = self._tokens(chunk, ids, scores, aggregation_strategy)
            entities += [
                entity
                for entity in self._aggregate(tokens, aggregation_strategy)
                if entity.get("entity", entity.get("entity_group")) not in ignore_labels
            ]
        return _without_overlaps(entities) if len(outputs) > 1 else entities

    def _tokens(self, chunk: _Chunk, ids: list[int], scores: torch.Tensor, strategy: str) -> list[dict[str, Any]]:
        """What is known of each token that is not special."""
        prefix = _subword_prefix(self.tokenizer)
        if strategy in _BY_WORD and not prefix:
            warnings.warn(
                "the tokenizer does not mark the tokens inside words, so words are told by the spaces of the text",
                stacklevel=2,
            )
        unknown = self.tokenizer.unk_token_id
        tokens = []
        for index, (token_id, row) in enumerate(zip(ids, scores, strict=True)):
            if chunk.special[index]:
                continue
            word = self.tokenizer.convert_ids_to_tokens(token_id)
            start, end = chunk.offsets[index]
            surface = chunk.sentence[start:end]
            if token_id == unknown:
                word, inside = surface, False
            elif prefix:
                inside = len(word) != len(surface)
            else:
                inside = start > 0 and " " not in chunk.sentence[start - 1 : start + 1]
            tokens.append({"word": word, "scores": row, "start": start, "end": end, "index": index, "inside": inside})
        return tokens

    def _aggregate(self, tokens: list[dict[str, Any]], strategy: str) -> list[dict[str, Any]]:
        if strategy in _BY_WORD:
            words: list[list[dict[str, Any]]] = []
            for token in tokens:
                if words and token["inside"]:
                    words[-1].append(token)
                else:
                    words.append([token])
            return self._group([self._word(word, strategy) for word in words])
        entities = []
        for token in tokens:
            label, score = self._best(token["scores"])
            keep = {name: token[name] for name in ("index", "word", "start", "end")}
            entities.append({"entity": label, "score": score, **keep})
        return entities if strategy == "none" else self._group(entities)

    def _best(self, scores: torch.Tensor) -> tuple[str, float]:
        index = int(scores.argmax())
        return self.model.config.id2label[index], float(scores[index])

    def _word(self, tokens: list[dict[str, Any]], strategy: str) -> dict[str, Any]:
        """One entity for the tokens of a word."""
        if strategy == "first":
            scores = tokens[0]["scores"]
        elif strategy == "max":
            scores = max((token["scores"] for token in tokens), key=lambda row: float(row.max()))
        else:
            scores = torch.stack([token["scores"] for token in tokens]).mean(0)
        label, score = self._best(scores)
        word = self.tokenizer.convert_tokens_to_string([token["word"] for token in tokens])
        return {"entity": label, "score": score, "word": word, "start": tokens[0]["start"], "end": tokens[-1]["end"]}

    def _group(self, entities: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Neighbours with the same label as one; a "B-" begins a new one."""
        groups: list[list[dict[str, Any]]] = []
        for entity in entities:
            begins, label = _split_label(entity["entity"])
            if groups and not begins and label == _split_label(groups[-1][-1]["entity"])[1]:
                groups[-1].append(entity)
            else:
                groups.append([entity])
        return [
            {
                "entity_group": group[0]["entity"].split("-", 1)[-1],
                "score": math.fsum(entity["score"] for entity in group) / len(group),
                "word": self.tokenizer.convert_tokens_to_string([entity["word"] for entity in group]),
                "start": group[0]["start"],
                "end": group[-1]["end"],
            }
            for group in groups
        ]


def _split_label(label: str) -> tuple[bool, str]:
    """(does it begin an entity, the label without "B-" and "I-")."""
    if label.startswith(("B-", "I-")):
        return label[0] == "B", label[2:]
    return False, label


def _subword_prefix(tokenizer: Any) -> str | None:
    """What marks tokens inside words ("##" of WordPiece), or None."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    return getattr(getattr(backend, "model", None), "continuing_subword_prefix", None)


def _without_overlaps(entities: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of entities that overlap, which pieces of one text give, the longest; of equally long ones the likeliest."""
    kept: list[dict[str, Any]] = []
    for entity in sorted(entities, key=lambda item: item["start"]):
        if not kept or not kept[-1]["start"] <= entity["start"] < kept[-1]["end"]:
            kept.append(entity)
            continue
        old = kept[-1]
        length, old_length = entity["end"] - entity["start"], old["end"] - old["start"]
        if length > old_length or (length == old_length and entity["score"] > old["score"]):
            kept[-1] = entity
    return kept


NerPipeline = TokenClassificationPipeline
