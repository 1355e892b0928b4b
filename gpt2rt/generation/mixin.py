"""GenerationMixin: ``model.generate`` with transformers' arguments and results."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from gpt2rt.errors import RequestError
from gpt2rt.graph import Executor

from .beams import BeamDecoder
from .config import GenerationConfig
from .custom import call_custom, split_arguments
from .decode import finished_sequences
from .modes import Loop, make_decoder
from .outputs import GenerateBeamDecoderOnlyOutput, GenerateDecoderOnlyOutput
from .prepare import make_plan
from .prompts import Prompts
from .replay import Replay
from .runtime import executor_for
from .scoring import ScoreOutput, score
from .starts import extend_past
from .transitions import transition_scores


class GenerationMixin:
    """Adds ``generate`` to a model class with ``config``, ``device`` and ``build_graph()``."""

    config: Any

    #: makes the ``past_key_values`` of a result from (keys, values) of each layer; models set their cache class here
    cache_class: ClassVar[Callable[..., Any]] = tuple
    #: whether each step of ``attentions`` and ``hidden_states`` holds the whole row, as in transformers' class that has
    #: no cache
    whole_steps: ClassVar[bool] = False

    @property
    def generation_config(self) -> GenerationConfig:
        """The model's own settings; made from its config if its checkpoint had none."""
        config = self.__dict__.get("_generation_config")
        if config is None:
            config = self.__dict__["_generation_config"] = GenerationConfig.from_model_config(self.config)
        return config

    @generation_config.setter
    def generation_config(self, value: Any) -> None:
        self.__dict__["_generation_config"] = None if value is None else GenerationConfig.read(value)

    def generation_executor(self, name: str | None = None, *, rebuild: bool = False) -> Executor:
        """The executor that ``generate`` runs on; its ``name`` is "cpu", "cuda" or "eager".

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
    def score(
        self,
        texts: Any,
        tokenizer: Any = None,
        *,
        stride: int | None = None,
        max_length: int | None = None,
        batch_size: int = 8,
        add_bos: bool = False,
    ) -> ScoreOutput:
        """The log-probability of texts, token by token, and their perplexity; see ``scoring.py`` for the definitions.

        Args:
            texts: one text or several, or token ids: [[...], ...] of any lengths, or a tensor [length] or [num_texts,
                length]. Ids are taken as they are, so a tensor must not be padded.
            tokenizer: turns texts into ids; not needed with ids.
            stride: tokens between the beginnings of the windows of a long text, 1 to ``max_length``; half of it unless
                given. A smaller stride gives tokens more context and takes more time.
            max_length: tokens in a window, 2 to ``n_positions``, which is the default.
            batch_size: windows that are computed side by side; it changes the memory taken, not the numbers.
            add_bos: put the bos token before each text, so that its first token is scored too.

        Returns:
            A ScoreOutput.

        Raises:
            RequestError: (a ValueError) an argument is wrong, or a text has nothing to score; found before anything is
                computed.
            NumericsError: (a RuntimeError) the model's logits hold NaN or infinity.
        """
        bos = self.generation_config.bos_token_id
        return score(
            executor_for(self),
            texts,
            tokenizer,
            stride=stride,
            max_length=max_length,
            batch_size=batch_size,
            add_bos=add_bos,
            bos_token_id=self.config.bos_token_id if bos is None else bos,
        )

    @torch.no_grad()
    def generate(
        self,
        inputs: Any = None,
        generation_config: Any = None,
        logits_processor: Sequence[Any] | None = None,
        stopping_criteria: Sequence[Any] | None = None,
        prefix_allowed_tokens_fn: Callable[[int, Tensor], Sequence[int]] | None = None,
        synced_gpus: bool | None = None,
        assistant_model: Any = None,
        streamer: Any = None,
        negative_prompt_ids: Any = None,
        negative_prompt_attention_mask: Any = None,
        custom_generate: Any = None,
        **kwargs: Any,
    ) -> Any:
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
            prefix_allowed_tokens_fn: ``(batch_id, input_ids) -> list of ids``, the only tokens allowed next in a row;
                ``batch_id`` is the number of the row divided by ``num_beams``.
            negative_prompt_ids, negative_prompt_attention_mask: [batch, length], what ``guidance_scale`` moves away
                from, a prompt for each prompt or one for all; None: the last token of each prompt.
            assistant_model: a smaller model that proposes tokens, which are checked several at a time; the result is
                the same as without it. One with another vocabulary needs ``tokenizer`` and ``assistant_tokenizer``.
            custom_generate: a decoding loop of your own, called as described at :func:`custom.call_custom`; its result
                is returned. The name of one in a repository is refused: such code is never run.
            synced_gpus: must be None or False.
            **kwargs: any field of :class:`GenerationConfig`, and:

                - ``attention_mask`` [batch, length], 1 = token, 0 = padding.
                - ``past_key_values``: continue from a filled cache (ours, transformers', or tuples per layer), given
                  the ids of the whole sequence or only the new ones. A mask, if there is one, covers the whole
                  sequence in either case. A cache object grows by the new tokens, as in transformers.
                - ``inputs_embeds`` [batch, length, n_embd] instead of ids, or beside the ids they stand for.
                - ``token_type_ids`` like the ids or embeddings: their embeddings are added; new tokens get the last
                  type, which must be the same for all prompts.
                - ``position_ids``: accepted if they number each row's tokens from 0.
                - ``tokenizer``, ``assistant_tokenizer``: for stop_strings, token_healing, and assistants with another
                  vocabulary.

        Returns:
            [batch * num_return_sequences, length] int64 on the device of ``inputs``: the prompts as given (lists are
            padded on the left), the new tokens, and ``pad_token_id`` after a row's end. With ``inputs_embeds`` and no
            ids, the new tokens alone. With ``return_dict_in_generate`` a GenerateDecoderOnlyOutput, or with
            ``num_beams`` a GenerateBeamDecoderOnlyOutput.

        Raises:
            RequestError: (a ValueError) something in the call is wrong; found before anything is computed.
            NumericsError: (a RuntimeError) the model's logits hold NaN or infinity.
        """
        own, kwargs = split_arguments(custom_generate, kwargs, streamer=streamer, assistant_model=assistant_model)
        past_key_values = kwargs.get("past_key_values")
        plan, config, prompts = make_plan(
            self,
            inputs,
            generation_config,
            logits_processor,
            stopping_criteria,
            kwargs
            | {
                "prefix_allowed_tokens_fn": prefix_allowed_tokens_fn,
                "synced_gpus": synced_gpus or None,
                "assistant_model": assistant_model,
                "negative_prompt_ids": negative_prompt_ids,
                "negative_prompt_attention_mask": negative_prompt_attention_mask,
            },
        )
        if streamer is not None and plan.num_beams > 1:
            raise RequestError(
                "`streamer` cannot be used with beam search, whose beams change until the last step. Make sure that "
                "`num_beams` is set to 1."
            )
        if custom_generate is not None:
            if plan.kv_cache_dtype is not None:
                raise RequestError(
                    "custom_generate fills a cache of its own, in the model's dtype; leave kv_cache_dtype out"
                )
            cache = self.cache_class(()) if past_key_values is None else past_key_values
            return call_custom(self, custom_generate, plan, config, own, cache, kwargs.get("tokenizer"))
        decoder = make_decoder(plan)
        try:
            _run(decoder, streamer)
        finally:
            plan.processors.close()
        if decoder.past is not None and past_key_values is not None and not extend_past(past_key_values, decoder.past):
            past_key_values = None
        sequences = finished_sequences(decoder).to(prompts.device)
        if not config.get("return_dict_in_generate"):
            return sequences
        return self._output(decoder, config, prompts, sequences, past_key_values)

    def _output(
        self, decoder: Loop, config: GenerationConfig, prompts: Prompts, sequences: Tensor, past_key_values: Any
    ) -> GenerateDecoderOnlyOutput | GenerateBeamDecoderOnlyOutput:
        """The result as a dict; ``past_key_values`` is the caller's cache if it has grown, else None."""
        attentions, hidden_states = config.get("output_attentions"), config.get("output_hidden_states")
        common: dict[str, Any] = {
            "sequences": sequences,
            "scores": tuple(decoder.scores) if config.get("output_scores") else None,
            "logits": tuple(decoder.logits) if config.get("output_logits") else None,
            "past_key_values": past_key_values,
        }
        if past_key_values is None and decoder.past is not None:
            common["past_key_values"] = self.cache_class(decoder.past)
        if attentions or hidden_states:
            whole = prompts.given is None and (self.whole_steps or not decoder.plan.use_cache)
            replay = Replay(
                self, decoder, prompts.given, attentions=attentions, hidden_states=hidden_states, whole=whole
            )
            common |= {"attentions": replay.attentions, "hidden_states": replay.hidden_states}
        if not isinstance(decoder, BeamDecoder):
            return GenerateDecoderOnlyOutput(**common)
        longest = max(map(len, decoder.origins))
        indices = [origins + [-1] * (longest - len(origins)) for origins in decoder.origins]
        scores = None
        if config.get("output_scores"):
            scores = torch.tensor(decoder.sequences_scores, device=sequences.device)
        return GenerateBeamDecoderOnlyOutput(
            **common,
            sequences_scores=scores,
            beam_indices=torch.tensor(indices, dtype=torch.int32, device=sequences.device),
        )

    def compute_transition_scores(
        self,
        sequences: Tensor,
        scores: Sequence[Tensor],
        beam_indices: Tensor | None = None,
        normalize_logits: bool = False,
    ) -> Tensor:
        """The score that each new token had when it was chosen, from what ``generate`` recorded.

        Args:
            sequences: [num_rows, length] int64, of the output.
            scores: of the output, with ``output_scores``; for each step [num_rows or batch * num_beams, vocab_size].
            beam_indices: of the output of beam search; None: row i of the sequences is row i of the scores.
            normalize_logits: take the log-softmax of the scores; beam search has done so already.

        Returns:
            [num_rows, steps] float32, as many steps as the longest row has new tokens; 0 after the end of a row that
            beam search returned. With beams, a row's sum over length**length_penalty is its ``sequences_scores``.

        Raises:
            RequestError: there are no scores, or they do not belong to these sequences.
        """
        return transition_scores(sequences, scores, beam_indices, normalize_logits)


def _run(decoder: Loop, streamer: Any) -> None:
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
