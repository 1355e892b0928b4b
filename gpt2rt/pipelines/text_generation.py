"""Continuations of texts and of chats."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from gpt2rt.errors import RequestError
from gpt2rt.generation import GenerationConfig
from gpt2rt.generation.config import DEFAULTS, FIELDS

from .base import Feature, Pipeline, only_given

# what applies where neither the caller nor the model's generation config says otherwise
DEFAULT_MAX_NEW_TOKENS = 256
_DEFAULTS: dict[str, Any] = {"max_new_tokens": DEFAULT_MAX_NEW_TOKENS, "do_sample": True, "temperature": 0.7}

# further arguments of generate that belong to no prompt
_GENERATE_EXTRAS = ("tokenizer", "assistant_tokenizer", "negative_prompt_ids", "negative_prompt_attention_mask")
# arguments of generate that the pipeline fills itself
_OWN_ARGUMENTS = ("self", "inputs", "kwargs", "synced_gpus", "custom_generate")


class TextGenerationPipeline(Pipeline):
    """Continuations of texts, with a language model.

    Unless the caller or the model's generation config says otherwise, tokens are drawn (``do_sample=True``) with
    ``temperature=0.7``, at most ``max_new_tokens=256``. Rows of a batch do not influence each other, and greedy results
    do not depend on ``batch_size``. For draws that can be repeated pass ``seed``: a prompt's draws then depend on the
    seed and the prompt, and equal prompts of one batch draw different numbers.

    Keywords of the pipeline and of its calls:
        return_full_text: give prompt and continuation (the default), or the continuation alone.
        return_tensors: give ``generated_token_ids``, prompt included, instead of text.
        return_text: give text; the opposite of ``return_tensors``.
        clean_up_tokenization_spaces, skip_special_tokens (True by default): as in decoding.
        prefix: stands in front of every prompt, but not in the result.
        stop_sequence: a text or a list of them; generation ends after one, which is part of the result.
        handle_long_generation: "hole": of a prompt too long for the new tokens keep only its end. None: leave it.
        truncation, padding, add_special_tokens, max_length: options of the tokenizer; ``max_length`` is also the most
            tokens of prompt and continuation together.
        tokenizer_encode_kwargs: a dictionary of further options of the tokenizer, or of ``apply_chat_template``.
        continue_final_message: of a chat: continue its last message instead of beginning one; by default if that is the
            assistant's.
        tools, documents: of a chat: for its template.
        **others: arguments of ``generate``, such as ``num_return_sequences``, ``streamer`` or ``assistant_model`` (a
            model or the name of one), and fields of :class:`GenerationConfig`.
    """

    model_kinds: ClassVar[tuple[str, ...]] = ("LMHeadModel", "DoubleHeadsModel")

    def __init__(self, model: Any, tokenizer: Any = None, **kwargs: Any) -> None:
        config_prefix = getattr(getattr(model, "config", None), "prefix", None)
        if config_prefix is not None:
            kwargs.setdefault("prefix", config_prefix)
        super().__init__(model, tokenizer, **kwargs)

    def parameter_names(self) -> set[str]:
        generate = set(inspect.signature(self.model.generate).parameters) - set(_OWN_ARGUMENTS)
        return self._named_parameters().union(generate, FIELDS, _GENERATE_EXTRAS)

    def _further_keywords(self) -> str:
        return ", and the arguments of generate and fields of GenerationConfig"

    def _sanitize_parameters(
        self,
        return_full_text: bool | None = None,
        return_tensors: bool | None = None,
        return_text: bool | None = None,
        clean_up_tokenization_spaces: bool | None = None,
        prefix: str | None = None,
        handle_long_generation: str | None = None,
        stop_sequence: str | Sequence[str] | None = None,
        truncation: bool | str | None = None,
        padding: bool | str | None = None,
        add_special_tokens: bool | None = None,
        max_length: int | None = None,
        continue_final_message: bool | None = None,
        skip_special_tokens: bool | None = None,
        tokenizer_encode_kwargs: dict[str, Any] | None = None,
        tools: list[Any] | None = None,
        documents: list[Any] | None = None,
        **generate_kwargs: Any,
    ) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
        if handle_long_generation not in (None, "hole"):
            raise ValueError(f"handle_long_generation = {handle_long_generation!r}, but it must be 'hole' or None")
        if return_tensors and (return_text or return_full_text is not None):
            other = "return_text" if return_text else "return_full_text"
            raise ValueError(f"return_tensors gives token ids and {other} gives text; pass one of them")
        if max_length is not None:
            generate_kwargs["max_length"] = max_length
        if isinstance(generate_kwargs.get("assistant_model"), str):
            from gpt2rt.models.auto import AutoModelForCausalLM

            generate_kwargs["assistant_model"] = AutoModelForCausalLM.from_pretrained(
                generate_kwargs["assistant_model"]
            ).to(self.model.device)
        if stop_sequence is not None:
            stops = [stop_sequence] if isinstance(stop_sequence, str) else list(stop_sequence)
            generate_kwargs["stop_strings"] = stops
        options = only_given(
            truncation=truncation, padding=padding, add_special_tokens=add_special_tokens, max_length=max_length
        )
        before = only_given(
            prefix=prefix,
            handle_long_generation=handle_long_generation,
            continue_final_message=continue_final_message,
            tools=tools,
            documents=documents,
        )
        if options or tokenizer_encode_kwargs:
            before["options"] = {**options, **(tokenizer_encode_kwargs or {})}
        after = only_given(
            clean_up_tokenization_spaces=clean_up_tokenization_spaces,
            skip_special_tokens=skip_special_tokens,
            continue_final_message=continue_final_message,
        )
        if return_tensors:
            after["result"] = "tensors"
        elif return_full_text is not None:
            after["result"] = "full" if return_full_text else "new"
        return before, generate_kwargs, after

    def _merged(self, given: tuple[dict[str, Any], ...]) -> list[dict[str, Any]]:
        before, generate, after = super()._merged(given)
        if "generation_config" in given[1]:
            # the settings of a call replace those of the pipeline
            generate = given[1]
        # how far a prompt is cut depends on them
        return [{**before, "generate_kwargs": generate}, generate, after]

    def __call__(self, text_inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """Continue one or several texts or chats.

        Args:
            text_inputs: a text, a chat (a list of ``{"role": ..., "content": ...}``), a list of either, or a generator
                or data set of them.
            **kwargs: see the class, and ``batch_size``.
        Returns:
            for each input a list with a dictionary for each returned sequence: ``generated_text`` (a text; of a chat
            the list of its messages with the new one) or ``generated_token_ids``; for several inputs a list of those.
        """
        if is_chat(text_inputs):
            [result] = self._call([text_inputs], *args, **kwargs)
            return result
        return self._call(text_inputs, *args, **kwargs)

    # ---- before ----------------------------------------------------------------------------------------------------

    def preprocess(
        self,
        inputs: Any,
        prefix: str = "",
        handle_long_generation: str | None = None,
        continue_final_message: bool | None = None,
        tools: list[Any] | None = None,
        documents: list[Any] | None = None,
        options: Mapping[str, Any] | None = None,
        generate_kwargs: Mapping[str, Any] | None = None,
    ) -> list[Feature]:
        options = dict(options or {})
        if is_chat(inputs):
            # messages end themselves: special tokens come from the template
            options.pop("add_special_tokens", None)
            continues = _continues(inputs, continue_final_message)
            encoding = self.tokenizer.apply_chat_template(
                [dict(message) for message in inputs],
                add_generation_prompt=not continues,
                continue_final_message=continues,
                tokenize=True,
                return_dict=True,
                **only_given(tools=tools, documents=documents),
                **options,
            )
        elif isinstance(inputs, str):
            encoding = self.tokenizer(prefix + inputs, **options)
        else:
            raise ValueError(
                f"a prompt is a text or a chat, a list of dictionaries with role and content; got "
                f"{type(inputs).__name__}"
            )
        ids = list(encoding["input_ids"])
        if "attention_mask" in encoding:
            ids = [token for token, kept in zip(ids, encoding["attention_mask"], strict=True) if kept]
        if handle_long_generation == "hole":
            ids = self._cut(ids, self._settings(generate_kwargs or {}))
        if prefix and not is_chat(inputs):
            length = len(
                self.tokenizer(prefix, add_special_tokens=bool(options.get("add_special_tokens")))["input_ids"]
            )
            return [Feature({"input_ids": ids}, (inputs, length))]
        return [Feature({"input_ids": ids}, (inputs, 0))]

    def _cut(self, ids: list[int], settings: Mapping[str, Any]) -> list[int]:
        """The end of a prompt that leaves room for the new tokens."""
        limit = min(self.tokenizer.model_max_length, self.model.config.n_positions)
        new = settings.get("max_new_tokens")
        if new is None and settings.get("max_length") is None:
            new = DEFAULTS["max_length"]
        elif new is None:
            new = settings["max_length"] - len(ids)
            if new < 0:
                raise ValueError(
                    f"the prompt has {len(ids)} tokens and max_length is {settings['max_length']}, so how many new "
                    "tokens are wanted is unknown; set max_new_tokens"
                )
        if len(ids) + new <= limit:
            return ids
        if new >= limit:
            raise ValueError(
                f"handle_long_generation='hole' cannot make room for {new} new tokens: the model reads {limit} tokens; "
                "lower max_new_tokens"
            )
        return ids[new - limit :]

    def _settings(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """Everything that is set for ``generate``: by the model, by the caller, by the pipeline."""
        settings = self._set_by_user(given)
        return {**settings, **self._added(settings)}

    def _set_by_user(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """What the model's generation config, a ``generation_config`` and keywords set, the last ones first."""
        settings = _fields_of(self.model.generation_config)
        if given.get("generation_config") is not None:
            settings |= _fields_of(given["generation_config"])
        return {**settings, **given}

    def _added(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        """The pipeline's defaults for what nobody has set."""
        added = {name: value for name, value in _DEFAULTS.items() if name not in settings}
        if "max_length" in settings:
            # a default must not go before a limit that somebody chose
            added.pop("max_new_tokens", None)
        if not {**settings, **added}.get("do_sample"):
            added.pop("temperature", None)
        pad = self.tokenizer.pad_token_id
        if "pad_token_id" not in settings and pad is not None and pad < self.model.config.vocab_size:
            added["pad_token_id"] = pad
        return added

    # ---- the model -------------------------------------------------------------------------------------------------

    def _forward(self, features: list[Feature], **generate_kwargs: Any) -> list[Any]:
        chosen = self._set_by_user(generate_kwargs)
        added = self._added(chosen)
        settings = {**chosen, **added}
        outputs: list[Any] = [None] * len(features)
        groups: dict[tuple[int | None, tuple[tuple[str, int], ...]], list[int]] = {}
        for index, feature in enumerate(features):
            groups.setdefault(self._group(feature, settings, added), []).append(index)
        for (_, limits), members in groups.items():
            rows = [features[index].inputs["input_ids"] or [self._first_token(settings)] for index in members]
            arguments = {"tokenizer": self.tokenizer, **generate_kwargs, **added, **dict(limits)}
            made = self.model.generate(rows, **arguments)
            for index, output in zip(members, self._split(made, rows, settings), strict=True):
                outputs[index] = (features[index], *output)
        return outputs

    def _group(
        self, feature: Feature, settings: Mapping[str, Any], added: Mapping[str, Any]
    ) -> tuple[int | None, tuple[tuple[str, int], ...]]:
        """Which prompts are generated together: those of one length, or of any (None), that share limits.

        Limits on the total length count from the longest prompt of a call, so only prompts of one length share them.
        """
        length = max(1, len(feature.inputs["input_ids"]))
        pairs = (("max_length", "max_new_tokens"), ("min_length", "min_new_tokens"))
        totals = [total for total, new in pairs if settings.get(total) and settings.get(new) is None]
        # the prefix is no part of what the caller measured
        prefix = feature.extra[1]
        limits = [(total, settings[total] + prefix) for total in totals if prefix]
        if "max_new_tokens" in added and settings.get("context_policy") in (None, "stop"):
            # nobody asked for as many, so the end of the positions is no surprise worth a warning
            room = self.model.config.n_positions + 1 - length
            limits.append(("max_new_tokens", max(1, min(DEFAULT_MAX_NEW_TOKENS, room))))
        return length if totals else None, tuple(limits)

    def _first_token(self, settings: Mapping[str, Any]) -> int:
        """What stands for an empty prompt."""
        bos = settings.get("bos_token_id")
        bos = self.model.config.bos_token_id if bos is None else bos
        if bos is None:
            raise RequestError("the prompt is empty and the model has no bos_token_id to start from; give a text")
        return bos

    def _split(
        self, made: Any, rows: list[list[int]], settings: Mapping[str, Any]
    ) -> list[tuple[list[list[int]], int, dict[str, list[Any]]]]:
        """For each prompt: the ids of its sequences, how many of them are the prompt, and what else was asked for."""
        sequences = (made if isinstance(made, Tensor) else made.sequences).cpu()
        others = {} if isinstance(made, Tensor) else _per_row(made, sequences.size(0))
        columns = max(len(row) for row in rows)
        each = sequences.size(0) // len(rows)
        eos = settings.get("eos_token_id")
        ends = set() if eos is None else {eos} if isinstance(eos, int) else set(eos)
        pad = settings.get("pad_token_id")
        pad = min(ends, default=None) if pad is None else pad
        result = []
        for index, row in enumerate(rows):
            mine = range(index * each, (index + 1) * each)
            # alone, a prompt's sequences would be as long as the longest of them
            longest = max(_length(sequences[i, columns:].tolist(), ends, pad) for i in mine)
            ids = [sequences[i, columns - len(row) : columns + longest].tolist() for i in mine]
            values = {name: [_cut_steps(value[i], longest) for i in mine] for name, value in others.items()}
            result.append((ids, len(row), values))
        return result

    # ---- after -----------------------------------------------------------------------------------------------------

    def postprocess(
        self,
        outputs: list[Any],
        result: str = "full",
        clean_up_tokenization_spaces: bool | None = None,
        continue_final_message: bool | None = None,
        skip_special_tokens: bool = True,
    ) -> list[dict[str, Any]]:
        [(feature, sequences, prompt_length, others)] = outputs
        prompt = feature.extra[0]
        if not feature.inputs["input_ids"]:
            # the token that stands for an empty prompt is part of the result
            prompt_length = 0
        records = []
        for index, ids in enumerate(sequences):
            if result == "tensors":
                records.append({"generated_token_ids": ids})
                continue
            text: Any = self.tokenizer.decode(
                ids[prompt_length:],
                skip_special_tokens=skip_special_tokens,
                clean_up_tokenization_spaces=clean_up_tokenization_spaces,
            )
            if result == "full":
                text = prompt + text if isinstance(prompt, str) else _with_answer(prompt, text, continue_final_message)
            records.append({"generated_text": text, **{name: value[index] for name, value in others.items()}})
        return records


def is_chat(inputs: Any) -> bool:
    """Whether an input is a list of messages with role and content."""
    return (
        isinstance(inputs, list | tuple)
        and len(inputs) > 0
        and all(isinstance(item, Mapping) and {"role", "content"} <= set(item) for item in inputs)
    )


def _continues(chat: Sequence[Mapping[str, Any]], asked: bool | None) -> bool:
    """Whether the last message is continued."""
    return chat[-1]["role"] == "assistant" if asked is None else asked


def _with_answer(chat: Sequence[Mapping[str, Any]], text: str, asked: bool | None) -> list[Any]:
    """The messages of a chat, with the new text in or after the last one."""
    if _continues(chat, asked):
        return [*chat[:-1], {"role": chat[-1]["role"], "content": chat[-1]["content"] + text}]
    return [*chat, {"role": "assistant", "content": text}]


def _fields_of(config: Any) -> dict[str, Any]:
    """The fields that a generation config sets, ours or transformers'."""
    if not isinstance(config, GenerationConfig):
        config = GenerationConfig.from_dict(config.to_dict())
    return {name: getattr(config, name) for name in FIELDS if getattr(config, name) is not None}


def _length(ids: list[int], ends: set[int], pad: int | None) -> int:
    """How many of a row's new tokens were generated, not filled in."""
    for index, token in enumerate(ids):
        if token in ends:
            return index + 1
    length = len(ids)
    while length and ids[length - 1] == pad:
        length -= 1
    return length


def _per_row(output: Any, rows: int) -> dict[str, Tensor]:
    """What else ``generate`` returned for each row: {name: [rows, ...]}; scores of steps are [rows, steps, vocab]."""
    values = {}
    for name, value in output.items():
        if name == "sequences":
            continue
        if isinstance(value, tuple) and value and all(isinstance(v, Tensor) and v.size(0) == rows for v in value):
            value = torch.stack(value, dim=1)
        if isinstance(value, Tensor) and value.dim() and value.size(0) == rows:
            values[name] = value.cpu()
    return values


def _cut_steps(value: Tensor, steps: int) -> Any:
    """The first steps of a row's scores [steps, vocab]; another value as it is."""
    return (value[:steps] if value.dim() == 2 else value).tolist()
