"""Answers that are marked in a text.

transformers removed this pipeline in version 5; keywords, defaults and results are those of its version 4. The score of
an answer is the product of the probabilities of its first and its last token, each a softmax over the tokens of the
context in one window; windows of a long context overlap (Devlin et al. 2018, arXiv:1810.04805, section 4.2, and the
preprocessing that was published with it).
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from .base import Feature, Pipeline, is_lazy, only_given

_MAX_SEQ_LEN = 384
_MAX_STRIDE = 128
_ASKS = 'a question is {"question": ..., "context": ...}'


@dataclasses.dataclass
class _Window:
    """What is known of a row beside its token ids.

    Attributes:
        context: the whole context.
        encoding: of the row, for its words and characters.
        sequence: which text of the pair the context is, 0 or 1.
        allowed: [tokens] bool, the tokens that an answer may begin or end with.
        null: the token that stands for "no answer", or None.
    """

    context: str
    encoding: Any
    sequence: int
    allowed: Tensor
    null: int | None


class QuestionAnsweringPipeline(Pipeline):
    """Answers to questions, marked in a context, with a question answering model.

    Keywords of the pipeline and of its calls:
        top_k: how many answers, 1 by default. ``topk`` is an older name.
        max_answer_len: the most tokens of an answer, 15 by default.
        max_seq_len: tokens of a window with question and context, by default 384 or what model and tokenizer allow.
        doc_stride: tokens that neighbouring windows share, by default 128 or half a window.
        max_question_len: cut questions to this many tokens; by default they are not cut.
        handle_impossible_answer: let "no answer" compete: an empty answer, with the score of the first token of a
            window. GPT-2's tokenizers put no token there for it, and its score is then 0.
        align_to_words: widen answers to whole words, by default yes, where the tokenizer knows words.
        padding: pad windows, as in calling the tokenizer; results do not change.
    """

    model_kinds: ClassVar[tuple[str, ...]] = ("ForQuestionAnswering",)
    default_input_names = "question,context"

    def _sanitize_parameters(
        self,
        padding: bool | str | None = None,
        topk: int | None = None,
        top_k: int | None = None,
        doc_stride: int | None = None,
        max_answer_len: int | None = None,
        max_seq_len: int | None = None,
        max_question_len: int | None = None,
        handle_impossible_answer: bool | None = None,
        align_to_words: bool | None = None,
    ) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
        if topk is not None:
            warnings.warn("topk is an older name of top_k; pass top_k", stacklevel=4)
            top_k = topk if top_k is None else top_k
        numbers = {
            "top_k": (top_k, 1),
            "doc_stride": (doc_stride, 0),
            "max_answer_len": (max_answer_len, 1),
            "max_seq_len": (max_seq_len, 1),
            "max_question_len": (max_question_len, 1),
        }
        for name, (value, low) in numbers.items():
            if value is not None and (type(value) is not int or value < low):
                raise ValueError(f"{name} = {value!r}, but it must be an integer >= {low}")
        before = only_given(
            padding=padding, doc_stride=doc_stride, max_seq_len=max_seq_len, max_question_len=max_question_len
        )
        after = only_given(
            top_k=top_k,
            max_answer_len=max_answer_len,
            handle_impossible_answer=handle_impossible_answer,
            align_to_words=align_to_words,
        )
        return before, {}, after

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Answers to one or several questions.

        Args:
            *args: ``{"question": ..., "context": ...}``, a list of such dictionaries, or a generator or data set of
                them; or a question and its context.
            **kwargs: ``question`` and ``context`` instead: two texts, a list of questions about one context, or two
                lists of the same length; see the class for the others.
        Returns:
            for one question ``{"score": float, "start": int, "end": int, "answer": str}``, with ``start`` and ``end``
            in characters of the context; a list of them from the best to the worst if ``top_k`` gives more than one. A
            list of such results for several questions.
        Raises:
            KeyError: a dictionary lacks question or context.
            ValueError: one of them is empty or None, or lists differ in length.
        """
        inputs = _read_arguments(args, kwargs)
        if is_lazy(inputs):
            return self._call(inputs, **kwargs)
        examples = [_read_example(item) for item in ([inputs] if isinstance(inputs, Mapping) else inputs)]
        # transformers gives a list of one question without the list
        return self._call(examples[0] if len(examples) == 1 else examples, **kwargs)

    def preprocess(
        self,
        inputs: Any,
        padding: bool | str = "do_not_pad",
        doc_stride: int | None = None,
        max_seq_len: int | None = None,
        max_question_len: int | None = None,
    ) -> list[Feature]:
        example = _read_example(inputs)
        question, context = example["question"], example["context"]
        if max_seq_len is None:
            max_seq_len = min(self.tokenizer.model_max_length, self.model.config.n_positions, _MAX_SEQ_LEN)
        if doc_stride is not None and doc_stride > max_seq_len:
            raise ValueError(f"doc_stride = {doc_stride} is larger than max_seq_len = {max_seq_len}")
        if max_question_len is not None:
            question = self._shorten(question, max_question_len)
        asked = len(self.tokenizer(question, add_special_tokens=False, verbose=False)["input_ids"])
        room = max_seq_len - asked - self.tokenizer.num_special_tokens_to_add(pair=True)
        if room < 1:
            raise ValueError(
                f"the question has {asked} tokens and leaves no room for its context in max_seq_len = {max_seq_len}; "
                "pass max_question_len or a larger max_seq_len"
            )
        if doc_stride is None:
            # each window must bring something new
            doc_stride = min(max_seq_len // 2, _MAX_STRIDE, room - 1)
        question_first = self.tokenizer.padding_side == "right"
        texts = (question, context) if question_first else (context, question)
        encoding = self.tokenizer(
            [texts[0]],
            [texts[1]],
            padding=padding,
            truncation="only_second" if question_first else "only_first",
            max_length=max_seq_len,
            stride=doc_stride,
            return_overflowing_tokens=True,
        )
        sequence = int(question_first)
        windows = []
        for row, ids in enumerate(encoding["input_ids"]):
            allowed = torch.tensor([kind == sequence for kind in encoding.sequence_ids(row)])
            # a [CLS] may stand for "no answer" and then shares in the softmax
            cls_id = getattr(self.tokenizer, "cls_token_id", None)
            if cls_id is not None:
                allowed |= torch.tensor(list(ids)) == cls_id
            null = None if encoding.token_to_sequence(row, 0) == sequence else 0
            windows.append(_Window(context, encoding[row], sequence, allowed, null))
        return self._features_of(encoding, windows)

    def _shorten(self, text: str, count: int) -> str:
        """The beginning of a text, of at most ``count`` tokens."""
        offsets = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
        return text if len(offsets) <= count else text[: offsets[count - 1][1]]

    def _forward(self, features: list[Feature], **parameters: Any) -> list[Any]:
        output = self.model(**self._model_inputs(features))
        starts, ends = output.start_logits.float().cpu(), output.end_logits.float().cpu()
        lengths = [len(feature.inputs["input_ids"]) for feature in features]
        return [
            (feature.extra, starts[row, :length], ends[row, :length])
            for row, (feature, length) in enumerate(zip(features, lengths, strict=True))
        ]

    def postprocess(
        self,
        outputs: list[Any],
        top_k: int = 1,
        max_answer_len: int = 15,
        handle_impossible_answer: bool = False,
        align_to_words: bool = True,
    ) -> Any:
        answers: dict[str, dict[str, Any]] = {}
        null_scores: list[float] = []
        # several spans of tokens can be the same words
        wanted = 2 * top_k + 10 if align_to_words else top_k
        for window, start_logits, end_logits in outputs:
            start, end = (_probabilities(logits, window.allowed) for logits in (start_logits, end_logits))
            allowed = window.allowed.clone()
            if window.null is not None:
                null_scores.append(float(start[window.null] * end[window.null]))
                allowed[window.null] = False
            for first, last, score in _best_spans(start, end, allowed, wanted, max_answer_len):
                begin, stop = _characters(window, first, last, align_to_words)
                text = window.context[begin:stop]
                found = answers.setdefault(text.lower(), {"score": 0.0, "start": begin, "end": stop, "answer": text})
                found["score"] += score
        results = list(answers.values())
        if handle_impossible_answer:
            results.append({"score": min(null_scores, default=0.0), "start": 0, "end": 0, "answer": ""})
        results = sorted(results, key=lambda answer: answer["score"], reverse=True)[:top_k]
        return results[0] if len(results) == 1 else results


def _probabilities(logits: Tensor, allowed: Tensor) -> Tensor:
    """[tokens] float32, the softmax over the tokens that are allowed; 0 elsewhere."""
    if not bool(allowed.any()):
        return torch.zeros_like(logits)
    return logits.masked_fill(~allowed, -torch.inf).softmax(-1)


def _best_spans(
    start: Tensor, end: Tensor, allowed: Tensor, count: int, max_answer_len: int
) -> list[tuple[int, int, float]]:
    """(first token, last token, score) of the ``count`` likeliest spans of at most ``max_answer_len`` tokens."""
    places = allowed.nonzero().flatten()
    scores = start[places, None] * end[None, places]  # [candidates, candidates]
    length = places[None, :] - places[:, None]
    scores = scores.masked_fill((length < 0) | (length >= max_answer_len), -1.0).flatten()
    best, order = scores.topk(min(count, scores.numel()))
    return [
        (int(places[index // places.numel()]), int(places[index % places.numel()]), score)
        for score, index in zip(best.tolist(), order.tolist(), strict=True)
        if score >= 0
    ]


def _characters(window: _Window, first: int, last: int, align_to_words: bool) -> tuple[int, int]:
    """Where in the context the answer begins and ends."""
    encoding = window.encoding
    if align_to_words:
        words = encoding.token_to_word(first), encoding.token_to_word(last)
        if None not in words:
            spans = [encoding.word_to_chars(word, window.sequence) for word in words]
            if None not in spans:
                return spans[0][0], spans[1][1]
    # a tokenizer without words
    return encoding.offsets[first][0], encoding.offsets[last][1]


def _read_arguments(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The questions of a call; takes those among ``kwargs`` out of it."""
    named = {name: kwargs.pop(name) for name in ("question", "context", "data", "X") if name in kwargs}
    if args:
        if named:
            raise ValueError(f"questions were given by position and as {', '.join(named)}; give them once")
        if len(args) == 2 and all(isinstance(arg, str) for arg in args):
            return {"question": args[0], "context": args[1]}
        return args[0] if len(args) == 1 else list(args)
    if "X" in named or "data" in named:
        return named.get("X", named.get("data"))
    if set(named) != {"question", "context"}:
        raise ValueError(f"{_ASKS}, or the keywords question= and context=; got {', '.join(named) or 'neither'}")
    questions, contexts = named["question"], named["context"]
    if isinstance(questions, list) and isinstance(contexts, str):
        contexts = [contexts] * len(questions)
    if isinstance(questions, list) and isinstance(contexts, list):
        if len(questions) != len(contexts):
            raise ValueError(
                f"there are {len(questions)} questions and {len(contexts)} contexts; give as many of both, or one "
                "context"
            )
        return [{"question": q, "context": c} for q, c in zip(questions, contexts, strict=True)]
    return {"question": questions, "context": contexts}


def _read_example(item: Any) -> Mapping[str, str]:
    if not isinstance(item, Mapping):
        raise ValueError(f"{_ASKS}, got {type(item).__name__}")
    for name in ("question", "context"):
        if name not in item:
            raise KeyError(f"{_ASKS}, and {name!r} is missing")
        if not isinstance(item[name], str) or not item[name]:
            raise ValueError(f"{name} = {item[name]!r}, but it must be a text that is not empty")
    return item
