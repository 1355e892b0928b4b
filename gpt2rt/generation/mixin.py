"""GenerationMixin: ``model.generate`` with transformers' arguments and results."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from gpt2rt.errors import RequestError
from gpt2rt.graph import Executor

from .config import GenerationConfig
from .decode import Decoder, finished_sequences
from .outputs import GenerateDecoderOnlyOutput
from .prepare import prepare
from .runtime import executor_for


class GenerationMixin:
    """Adds ``generate`` to a model class with ``config``, ``device`` and ``build_graph()``."""

    config: Any

    @property
    def generation_config(self) -> GenerationConfig:
        """The model's own settings; made from its config if its checkpoint had none."""
        config = self.__dict__.get("_generation_config")
        if config is None:
            config = self.__dict__["_generation_config"] = GenerationConfig.from_model_config(self.config)
        return config

    @generation_config.setter
    def generation_config(self, value: GenerationConfig | None) -> None:
        self.__dict__["_generation_config"] = value

    def generation_executor(self, name: str | None = None, *, rebuild: bool = False) -> Executor:
        """The executor that ``generate`` runs on; its ``name`` is "cpu" or "eager".

        It packs the weights when first needed and again when they were changed, moved or cast. Changes are noticed by
        torch's version counters and by comparing a few elements of each parameter, so only writes through ``.data``
        that touch single elements can be missed: pass ``rebuild=True`` after those.

        Args:
            name: choose this executor from now on; None keeps the choice, at first the fastest that can run the model.
            rebuild: make it anew.

        Raises:
            ValueError: there is no such executor, or it cannot run this model.
        """
        return executor_for(self, name, rebuild)

    @torch.no_grad()
    def generate(
        self,
        inputs: Any = None,
        generation_config: Any = None,
        logits_processor: Sequence[Any] | None = None,
        stopping_criteria: Sequence[Any] | None = None,
        prefix_allowed_tokens_fn: None = None,
        synced_gpus: bool | None = None,
        assistant_model: None = None,
        streamer: Any = None,
        negative_prompt_ids: None = None,
        negative_prompt_attention_mask: None = None,
        custom_generate: None = None,
        **kwargs: Any,
    ) -> Tensor | GenerateDecoderOnlyOutput:
        """Continue prompts.

        Weights are used as in eval mode, without gradients. Each row is computed without its padding, so a prompt's
        continuation is the same alone, in a batch, and padded on either side.

        Args:
            inputs: [batch, length] token ids, also accepted as ``input_ids=``; a list of lists of ids of any lengths;
                or None, to start from ``bos_token_id``.
            generation_config: settings; keyword arguments go before it, the model's own settings come after it.
            logits_processor: callables ``(input_ids, scores) -> scores``, applied after the built-in processors and
                before temperature, top_k, top_p and min_p. They see all rows of the call.
            stopping_criteria: callables ``(input_ids, scores) -> [num_rows] bool``; each can end a row.
            streamer: gets the prompts, then the tokens of each step: ``put(tensor)``, ``end()``.
            prefix_allowed_tokens_fn, assistant_model, negative_prompt_ids, negative_prompt_attention_mask,
                custom_generate, synced_gpus: not supported yet; must be None.
            **kwargs: ``attention_mask`` [batch, length] (1 = token, 0 = padding); ``tokenizer``, which stop_strings
                need; and any field of :class:`GenerationConfig`.

        Returns:
            [batch * num_return_sequences, length] int64 on the device of ``inputs``: the prompts as given (lists are
            padded on the left), the new tokens, and ``pad_token_id`` after a row's end. With
            ``return_dict_in_generate`` a GenerateDecoderOnlyOutput.

        Raises:
            RequestError: (a ValueError) something in the call is wrong; found before anything is computed.
            NumericsError: (a RuntimeError) the model's logits hold NaN or infinity.
        """
        refused = {
            "prefix_allowed_tokens_fn": prefix_allowed_tokens_fn,
            "synced_gpus": synced_gpus or None,
            "assistant_model": assistant_model,
            "negative_prompt_ids": negative_prompt_ids,
            "negative_prompt_attention_mask": negative_prompt_attention_mask,
            "custom_generate": custom_generate,
        }
        for name, value in refused.items():
            if value is not None:
                raise RequestError(f"generate does not support {name} yet; leave it out")
        decoder, config, prompts = prepare(self, inputs, generation_config, logits_processor, stopping_criteria, kwargs)
        _run(decoder, streamer)
        sequences = finished_sequences(decoder).to(prompts.device)
        if not config.get("return_dict_in_generate"):
            return sequences
        return GenerateDecoderOnlyOutput(
            sequences=sequences,
            scores=tuple(decoder.scores) if config.get("output_scores") else None,
            logits=tuple(decoder.logits) if config.get("output_logits") else None,
        )


def _run(decoder: Decoder, streamer: Any) -> None:
    """Run the loop to its end and show each step to the streamer."""
    try:
        if streamer is not None:
            streamer.put(decoder.plan.columns.repeat_interleave(decoder.plan.num_return_sequences, dim=0))
        with contextlib.closing(decoder.steps()) as steps:
            for step in steps:
                if streamer is not None:
                    streamer.put(torch.tensor(step, dtype=torch.int64))
    except BaseException as error:
        _abort(streamer, error)
        raise
    if streamer is not None:
        streamer.end()


def _abort(streamer: Any, error: BaseException) -> None:
    """Let nobody wait for a stream that has failed."""
    if streamer is None:
        return
    # the first error is the one to report, whatever the streamer makes of it
    with contextlib.suppress(Exception):
        if hasattr(streamer, "abort"):
            streamer.abort(error)
        else:
            streamer.end()
