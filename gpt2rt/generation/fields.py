"""The fields of GenerationConfig: which ``generate`` honours, with what default, and which it refuses, and why."""

from __future__ import annotations

from typing import Any, NamedTuple

#: fields that ``generate`` honours, with the value they have when nobody sets them
DEFAULTS: dict[str, Any] = {
    # length
    "max_length": 20,
    "max_new_tokens": None,
    "min_length": 0,
    "min_new_tokens": None,
    "early_stopping": False,
    "max_time": None,
    "stop_strings": None,
    "context_policy": "stop",
    "context_stride": None,
    # how
    "do_sample": False,
    "num_beams": 1,
    "num_return_sequences": 1,
    "seed": None,
    # cache and computation
    "use_cache": True,
    "cache_implementation": None,
    "cache_config": None,
    "kv_cache_dtype": "auto",
    "max_cache_len": None,
    "prefill_chunk_size": None,
    "low_memory": False,
    "compile_config": None,
    "disable_compile": False,
    # scores
    "temperature": 1.0,
    "top_k": 50,
    "top_p": 1.0,
    "min_p": None,
    "top_h": None,
    "typical_p": 1.0,
    "epsilon_cutoff": 0.0,
    "eta_cutoff": 0.0,
    "repetition_penalty": 1.0,
    "encoder_repetition_penalty": 1.0,
    "length_penalty": 1.0,
    "no_repeat_ngram_size": 0,
    "encoder_no_repeat_ngram_size": 0,
    "bad_words_ids": None,
    "renormalize_logits": False,
    "forced_bos_token_id": None,
    "forced_eos_token_id": None,
    "remove_invalid_values": False,
    "exponential_decay_length_penalty": None,
    "suppress_tokens": None,
    "begin_suppress_tokens": None,
    "sequence_bias": None,
    "token_healing": False,
    "guidance_scale": None,
    # assisted decoding
    "is_assistant": False,
    "num_assistant_tokens": 20,
    "num_assistant_tokens_schedule": "constant",
    "assistant_confidence_threshold": 0.4,
    "prompt_lookup_num_tokens": None,
    "max_matching_ngram_size": None,
    "assistant_early_exit": None,
    "assistant_lookbehind": 10,
    "target_lookbehind": 10,
    # output
    "return_dict_in_generate": False,
    "output_scores": False,
    "output_logits": False,
    "output_attentions": False,
    "output_hidden_states": False,
    # special tokens
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
}


class Refusal(NamedTuple):
    """Why a field is refused.

    Attributes:
        neutral: values that ask for nothing, besides None; with one of them the field is accepted.
        reason: half a sentence.
    """

    neutral: tuple[Any, ...]
    reason: str


#: fields of transformers that ``generate`` refuses by name when they ask for something
UNSUPPORTED: dict[str, Refusal] = {
    "penalty_alpha": Refusal((0.0,), "contrastive search is not built; transformers too has it only as hub code"),
    "dola_layers": Refusal((), "DoLa decoding is not built; transformers too has it only as hub code"),
    "num_beam_groups": Refusal((1,), "diverse beam search is not built; transformers too has it only as hub code"),
    "diversity_penalty": Refusal((0.0,), "diverse beam search is not built; transformers too has it only as hub code"),
    "constraints": Refusal((), "constrained beam search is not built; transformers too has it only as hub code"),
    "force_words_ids": Refusal((), "constrained beam search is not built; transformers too has it only as hub code"),
    "watermarking_config": Refusal((), "watermarking is not built"),
    "decoder_start_token_id": Refusal((), "it starts the decoder of an encoder-decoder model, and there is none here"),
    "use_mtp": Refusal((False,), "multi-token prediction needs heads that GPT-2 and OpenAI GPT do not have"),
    "assistant_ensemble_weight": Refusal((), "it lets a draft model change the output; here that is exact"),
    "speculation_type": Refusal((), "it needs draft heads that were trained for it; pass assistant_model instead"),
    "continuous_batching_config": Refusal((), "generate computes the batch it is given, from first to last token"),
}

#: what each honoured field does, in a sentence
MEANINGS: dict[str, str] = {
    "max_length": "The most tokens of prompt and continuation together.",
    "max_new_tokens": "The most tokens to add; goes before max_length.",
    "min_length": "No end token before as many tokens, prompt included.",
    "min_new_tokens": "No end token before as many new tokens; goes before min_length.",
    "early_stopping": "When beam search ends: True, False or 'never'.",
    "max_time": "Seconds after which no further token is begun.",
    "stop_strings": "Texts that end a row; needs tokenizer=.",
    "context_policy": "What happens when positions end: 'stop', 'error', 'truncate_left' or 'sliding'; gpt2rt's own.",
    "context_stride": "By how many tokens 'sliding' moves the window; gpt2rt's own.",
    "do_sample": "Draw from the distribution instead of taking the likeliest token.",
    "num_beams": "Beams of beam search; 1 is none.",
    "num_return_sequences": "Continuations of each prompt; more than one needs sampling or as many beams.",
    "seed": "Makes sampling repeatable; gpt2rt's own.",
    "use_cache": "False recomputes the whole row for every token.",
    "cache_implementation": "All mean the paged cache, 'quantized' in int8; offloaded ones are refused.",
    "cache_config": "With 'quantized': {'nbits': 8}, or None for the same; other settings are refused.",
    "kv_cache_dtype": "What keys and values are stored in: 'auto' or a name; gpt2rt's own.",
    "max_cache_len": "The most tokens of a row in the cache, with cache_implementation='static'.",
    "prefill_chunk_size": "The most tokens of a prompt in one step; the numbers do not change.",
    "low_memory": "Without effect: beams share blocks, so there is nothing to save.",
    "compile_config": "Without effect: nothing is compiled at run time.",
    "disable_compile": "Without effect: nothing is compiled at run time.",
    "temperature": "Divides the logits before sampling.",
    "top_k": "Sampling keeps the k likeliest tokens; 0 keeps all.",
    "top_p": "Sampling keeps the likeliest tokens that together have this probability.",
    "min_p": "Sampling keeps tokens at least this fraction as likely as the likeliest.",
    "top_h": "Sampling keeps the likeliest tokens up to this fraction of the entropy.",
    "typical_p": "Sampling keeps the most typical tokens that together have this probability.",
    "epsilon_cutoff": "Sampling drops tokens less likely than this.",
    "eta_cutoff": "Sampling drops tokens less likely than a bound that depends on the entropy.",
    "repetition_penalty": "Above 1 makes tokens already in the row less likely; padding does not count.",
    "encoder_repetition_penalty": "Above 1 makes tokens of the prompt more likely.",
    "length_penalty": "Exponent of the length that divides a beam's score.",
    "no_repeat_ngram_size": "No n-gram of this length twice in a row.",
    "encoder_no_repeat_ngram_size": "No n-gram of this length that stands in the prompt.",
    "bad_words_ids": "Token sequences that must not appear.",
    "renormalize_logits": "Makes the final scores log-probabilities.",
    "forced_bos_token_id": "The only token allowed after a prompt of one token.",
    "forced_eos_token_id": "The only tokens allowed at the last place of a row.",
    "remove_invalid_values": "Replaces NaN and infinity in the scores instead of raising.",
    "exponential_decay_length_penalty": "End tokens gain exponentially: (start, factor), from so many new tokens on.",
    "suppress_tokens": "Ids that are never chosen.",
    "begin_suppress_tokens": "Ids that are not chosen as the first new token.",
    "sequence_bias": "Adds a number to the score of tokens that complete given sequences.",
    "token_healing": "Replaces the last token of a prompt by one that extends it; needs tokenizer=.",
    "guidance_scale": "Classifier-free guidance, away from negative_prompt_ids.",
    "is_assistant": "Ends rows when a token is less likely than assistant_confidence_threshold; needs output_scores.",
    "num_assistant_tokens": "Tokens that the draft proposes at a time.",
    "num_assistant_tokens_schedule": "How that number changes: 'constant', 'heuristic' or 'heuristic_transient'.",
    "assistant_confidence_threshold": "The draft stops proposing below this probability.",
    "prompt_lookup_num_tokens": "Proposes as many tokens from where the last n-gram occurred before.",
    "max_matching_ngram_size": "The longest n-gram that prompt lookup looks for.",
    "assistant_early_exit": "Drafts with the first layers of the model, as many as this.",
    "assistant_lookbehind": "Without effect: a draft with another tokenizer is given the whole row, encoded anew.",
    "target_lookbehind": "Tokens of a row that are encoded together with a draft of another tokenizer.",
    "return_dict_in_generate": "Return an output object instead of the sequences.",
    "output_scores": "Return the processed scores of each step.",
    "output_logits": "Return the model's logits of each step.",
    "output_attentions": "Return attention probabilities of each step.",
    "output_hidden_states": "Return hidden states of each step.",
    "pad_token_id": "Fills rows that ended early.",
    "bos_token_id": "The prompt when none is given.",
    "eos_token_id": "The token, or tokens, that end a row.",
}

#: every field: "honoured" or "refused", and a sentence; the table in the documentation is made from it
FIELD_STATUS: dict[str, tuple[str, str]] = {
    **{name: ("honoured", MEANINGS[name]) for name in DEFAULTS},
    **{name: ("refused", f"{r.reason[0].upper()}{r.reason[1:]}.") for name, r in UNSUPPORTED.items()},
}

#: fields of gpt2rt that transformers does not have
OWN_FIELDS = ("seed", "context_policy", "context_stride", "kv_cache_dtype")

#: all fields
FIELDS = (*DEFAULTS, *UNSUPPORTED)
