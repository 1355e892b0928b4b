"""Logits processors: each takes the scores of the next token and returns changed ones.

All have transformers' names, arguments and call signature ``processor(input_ids, scores)``; its own processors work in
our lists and ours in its. What a processor does to a row depends on that row alone, bit for bit.

``input_ids`` is [num_rows, length] int64, the tokens so far; negative ids are padding and count as no token.
``scores`` is [num_rows, vocab_size] float32; an excluded token has -inf. Processors return a new tensor or ``scores``.

Here all of them are gathered, and put in order for the settings of a call.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from gpt2rt.errors import RequestError

from .config import GenerationConfig
from .penalties import (
    EncoderNoRepeatNGramLogitsProcessor,
    EncoderRepetitionPenaltyLogitsProcessor,
    ExponentialDecayLengthPenalty,
    NoBadWordsLogitsProcessor,
    NoRepeatNGramLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
)
from .processors import LogitsProcessor, LogitsProcessorList, as_list
from .rules import (
    ForcedBOSTokenLogitsProcessor,
    ForcedEOSTokenLogitsProcessor,
    InfNanRemoveLogitsProcessor,
    MinLengthLogitsProcessor,
    MinNewTokensLengthLogitsProcessor,
    PrefixConstrainedLogitsProcessor,
    SuppressTokensAtBeginLogitsProcessor,
    SuppressTokensLogitsProcessor,
)
from .warpers import (
    EpsilonLogitsWarper,
    EtaLogitsWarper,
    LogitNormalization,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopHLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)

__all__ = [
    "EncoderNoRepeatNGramLogitsProcessor",
    "EncoderRepetitionPenaltyLogitsProcessor",
    "EpsilonLogitsWarper",
    "EtaLogitsWarper",
    "ExponentialDecayLengthPenalty",
    "ForcedBOSTokenLogitsProcessor",
    "ForcedEOSTokenLogitsProcessor",
    "InfNanRemoveLogitsProcessor",
    "LogitNormalization",
    "LogitsProcessor",
    "LogitsProcessorList",
    "MinLengthLogitsProcessor",
    "MinNewTokensLengthLogitsProcessor",
    "MinPLogitsWarper",
    "NoBadWordsLogitsProcessor",
    "NoRepeatNGramLogitsProcessor",
    "PrefixConstrainedLogitsProcessor",
    "RepetitionPenaltyLogitsProcessor",
    "SequenceBiasLogitsProcessor",
    "SuppressTokensAtBeginLogitsProcessor",
    "SuppressTokensLogitsProcessor",
    "TemperatureLogitsWarper",
    "TopHLogitsWarper",
    "TopKLogitsWarper",
    "TopPLogitsWarper",
    "TypicalLogitsWarper",
    "as_list",
    "build_processors",
]


def build_processors(
    config: GenerationConfig,
    prompt_columns: int,
    eos: Sequence[int],
    *,
    prefix_allowed_tokens_fn: Callable[[int, Tensor], Sequence[int]] | None = None,
    guidance: LogitsProcessor | None = None,
    max_length: int | Sequence[int] | None = None,
    pad_token_id: int = 0,
    user_processors: Sequence[Any] = (),
) -> tuple[LogitsProcessorList, LogitsProcessorList]:
    """The processors and warpers that a config asks for, in transformers' order.

    A caller's own processors run between the two lists. Rows are those of the call: each prompt's
    ``num_return_sequences`` or ``num_beams`` rows are neighbours. The first list must be called with ``rows=`` when
    some of them are left out, and closed at the end.

    Args:
        config: complete and validated; fields at their neutral value add nothing.
        prompt_columns: length of the padded prompts; 0 if the prompts are embeddings, which hold no ids.
        eos: the end tokens that are in the vocabulary.
        prefix_allowed_tokens_fn: as ``generate`` got it.
        guidance: mixes in the scores of a negative prompt, see ``guidance.py``; runs first.
        max_length: how many columns rows have at their end, for all or for each: where forced_eos_token_id applies.
        pad_token_id: what ``prefix_allowed_tokens_fn`` sees in place of padding.
        user_processors: the caller's own; one of the same class as a built-in processor takes its place.

    Returns:
        What goes before the caller's processors, and what comes after them: warpers if ``do_sample`` is set, and the
        normalization.

    Raises:
        RequestError: a setting needs an end token, and there is none.
    """
    processors = _penalties(config, prompt_columns, eos, guidance)
    processors += _rules(config, prompt_columns, eos, prefix_allowed_tokens_fn, max_length, pad_token_id)
    processors = _without_replaced(processors, user_processors)
    warpers = _warpers(config, eos) if config.get("do_sample") else []
    if config.get("renormalize_logits"):
        warpers.append(LogitNormalization())
    return LogitsProcessorList(processors), LogitsProcessorList(warpers)


def _penalties(
    config: GenerationConfig, prompt_columns: int, eos: Sequence[int], guidance: LogitsProcessor | None
) -> list[LogitsProcessor]:
    """What looks at the tokens so far."""
    found: list[LogitsProcessor] = [] if guidance is None else [guidance]
    if config.sequence_bias is not None:
        found.append(SequenceBiasLogitsProcessor(config.sequence_bias))
    ngram = config.get("encoder_no_repeat_ngram_size")
    if prompt_columns == 0 and (config.get("encoder_repetition_penalty") != 1.0 or ngram > 0):
        warnings.warn(
            "encoder_repetition_penalty and encoder_no_repeat_ngram_size do nothing here: they look at the ids of the "
            "prompt, and it has none",
            stacklevel=6,
        )
    elif config.get("encoder_repetition_penalty") != 1.0:
        penalty = config.get("encoder_repetition_penalty")
        found.append(EncoderRepetitionPenaltyLogitsProcessor(penalty, None, prompt_length=prompt_columns))
    if config.get("repetition_penalty") != 1.0:
        found.append(RepetitionPenaltyLogitsProcessor(config.get("repetition_penalty")))
    if config.get("no_repeat_ngram_size") > 0:
        found.append(NoRepeatNGramLogitsProcessor(config.get("no_repeat_ngram_size")))
    if prompt_columns > 0 and ngram > 0:
        found.append(EncoderNoRepeatNGramLogitsProcessor(ngram, None, prompt_length=prompt_columns))
    if config.bad_words_ids is not None:
        found.append(NoBadWordsLogitsProcessor(config.bad_words_ids, eos))
    return found


def _rules(
    config: GenerationConfig,
    prompt_columns: int,
    eos: Sequence[int],
    prefix_allowed_tokens_fn: Callable[[int, Tensor], Sequence[int]] | None,
    max_length: int | Sequence[int] | None,
    pad_token_id: int,
) -> list[LogitsProcessor]:
    """What allows and excludes tokens by place."""
    found: list[LogitsProcessor] = []
    min_length = config.get("min_length")
    if config.min_new_tokens is not None:
        min_length = config.min_new_tokens + prompt_columns
    if min_length > 0 and eos:
        found.append(MinLengthLogitsProcessor(min_length, eos))
    if prefix_allowed_tokens_fn is not None:
        num_beams = config.get("num_beams")
        found.append(PrefixConstrainedLogitsProcessor(prefix_allowed_tokens_fn, num_beams, pad_token_id=pad_token_id))
    if config.forced_bos_token_id is not None:
        found.append(ForcedBOSTokenLogitsProcessor(config.forced_bos_token_id))
    if config.forced_eos_token_id is not None:
        if max_length is None:
            new = config.max_new_tokens
            max_length = config.get("max_length") if new is None else prompt_columns + new
        found.append(ForcedEOSTokenLogitsProcessor(max_length, config.forced_eos_token_id))
    if config.get("remove_invalid_values"):
        found.append(InfNanRemoveLogitsProcessor())
    if config.exponential_decay_length_penalty is not None:
        if not eos:
            raise RequestError(
                "exponential_decay_length_penalty raises the scores of end tokens, but there is none; set eos_token_id"
            )
        found.append(ExponentialDecayLengthPenalty(config.exponential_decay_length_penalty, eos, prompt_columns))
    if config.suppress_tokens:
        found.append(SuppressTokensLogitsProcessor(config.suppress_tokens))
    if config.begin_suppress_tokens:
        # after a single column the first new token may be the forced one
        forced = prompt_columns <= 1 and config.forced_bos_token_id is not None
        found.append(SuppressTokensAtBeginLogitsProcessor(config.begin_suppress_tokens, prompt_columns + forced))
    return found


def _warpers(config: GenerationConfig, eos: Sequence[int]) -> list[LogitsProcessor]:
    """What shapes the distribution; with beams, one token that does not end the row must be left."""
    least = 1 if config.get("num_beams") == 1 else max(2, len(eos) + 1)
    found: list[LogitsProcessor] = []
    if config.get("temperature") != 1.0:
        found.append(TemperatureLogitsWarper(config.get("temperature")))
    if config.top_h is not None:
        found.append(TopHLogitsWarper(config.top_h))
    if config.get("top_k") > 0:
        found.append(TopKLogitsWarper(config.get("top_k"), min_tokens_to_keep=least))
    if config.get("top_p") < 1.0:
        found.append(TopPLogitsWarper(config.get("top_p"), min_tokens_to_keep=least))
    if config.get("min_p"):
        found.append(MinPLogitsWarper(config.get("min_p"), min_tokens_to_keep=least))
    if config.get("typical_p") < 1.0:
        found.append(TypicalLogitsWarper(config.get("typical_p"), min_tokens_to_keep=least))
    if config.get("epsilon_cutoff") > 0:
        found.append(EpsilonLogitsWarper(config.get("epsilon_cutoff"), min_tokens_to_keep=least))
    if config.get("eta_cutoff") > 0:
        found.append(EtaLogitsWarper(config.get("eta_cutoff"), min_tokens_to_keep=least))
    return found


def _without_replaced(processors: list[LogitsProcessor], user_processors: Sequence[Any]) -> list[LogitsProcessor]:
    """The processors of which the caller has not passed one of his own."""
    own = {type(processor).__name__ for processor in user_processors}
    replaced = [type(processor).__name__ for processor in processors if type(processor).__name__ in own]
    if replaced:
        warnings.warn(
            f"logits_processor holds {', '.join(replaced)}, and the settings ask for one too; the one in "
            "logits_processor counts",
            stacklevel=6,
        )
    return [processor for processor in processors if type(processor).__name__ not in own]
