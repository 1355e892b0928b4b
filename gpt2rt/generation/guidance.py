"""Classifier-free guidance: scores that move away from what another prompt would make the model say.

    scores = log p(token | row)                        the conditional branch
    other  = log p(token | negative prompt + new ids)  the unconditional branch
    result = other + guidance_scale * (scores - other)

Source: Sanchez et al., "Stay on topic with Classifier-Free Guidance", arXiv:2306.17806, equation 7.

The unconditional branch has a paged cache of its own. Its sequences are found by the tokens they hold, so it does not
matter in which order rows come, how many of them are left, or that beams fork.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence as ListLike
from typing import Any

import torch
from torch import Tensor

from gpt2rt.cache import PagedKVCache, Sequence
from gpt2rt.errors import RequestError
from gpt2rt.graph import Executor

from .cache_names import kv_cache_dtype
from .config import GenerationConfig
from .processors import LogitsProcessor
from .prompts import as_tensor
from .reserve import new_cache
from .runtime import executor_for
from .starts import BLOCK_SIZE, compute


class GuidanceProcessor(LogitsProcessor):
    """Guidance for the rows of one call.

    Args:
        guidance_scale: 1 leaves the probabilities as they are, above 1 moves away from the unconditional branch.
        executor: runs the unconditional branch.
        prompts: the ids of the negative prompts, no padding: as many as the rows divide into evenly, neighbours
            sharing one. None: each row has the last token of its own prompt.
        prompt_columns: columns of ``input_ids`` that are no new tokens.
        num_rows: rows of the call.
        max_new_tokens: the most new tokens of a row; None: as many as positions allow.
        use_cache: False computes the unconditional branch anew in each step.

    Raises:
        RequestError: the prompts do not fit the rows, or the new tokens the model's positions.
    """

    def __init__(
        self,
        guidance_scale: float,
        executor: Executor,
        prompts: ListLike[ListLike[int]] | None,
        *,
        prompt_columns: int,
        num_rows: int,
        max_new_tokens: int | None = None,
        use_cache: bool = True,
        kv_cache_dtype: torch.dtype | None = None,
    ) -> None:
        if prompts is not None and num_rows % len(prompts):
            raise RequestError(
                f"there are {len(prompts)} negative prompts for {num_rows} rows; pass one for each prompt, or a single "
                "one for all"
            )
        longest = 1 if prompts is None else max(len(ids) for ids in prompts)
        n_positions = executor.plan.n_positions
        # nothing is computed from the last new token
        needed = longest if max_new_tokens is None else longest + max_new_tokens - 1
        if needed > n_positions:
            raise RequestError(
                f"the longest negative prompt has {longest} tokens and may be followed by {needed - longest} new ones, "
                f"but the model has n_positions={n_positions}; shorten it or lower max_new_tokens"
            )
        self.guidance_scale = float(guidance_scale)
        self._executor = executor
        self._prompts = prompts
        self._prompt_columns = prompt_columns
        self._num_rows = num_rows
        self._max_tokens = n_positions if max_new_tokens is None else needed
        self._use_cache = use_cache
        self._kv_cache_dtype = kv_cache_dtype
        self._cache: PagedKVCache | None = None
        self._capacity = 0
        # by the tokens they hold
        self._sequences: dict[tuple[int, ...], Sequence] = {}

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        return self.for_rows(input_ids, scores, range(scores.size(0)))

    def for_rows(self, input_ids: Tensor, scores: Tensor, rows: ListLike[int]) -> Tensor:
        """As a call, for some rows of the call.

        Raises:
            RequestError: a row has more new tokens than the model has positions for after the negative prompt.
        """
        scores = torch.log_softmax(scores, dim=-1)
        if self.guidance_scale == 1.0:
            return scores
        texts = [
            tuple(self._prompt(ids, row)) + tuple(ids[self._prompt_columns :])
            for ids, row in zip(input_ids.tolist(), rows, strict=True)
        ]
        other = torch.log_softmax(self._logits(texts).to(scores.device), dim=-1)
        return self.guidance_scale * (scores - other) + other

    def close(self) -> None:
        """Free all blocks, and the cache; the next call starts anew."""
        self._keep({})
        self._cache = None

    def _prompt(self, ids: list[int], row: int) -> ListLike[int]:
        """The negative prompt of a row."""
        if self._prompts is not None:
            return self._prompts[row * len(self._prompts) // self._num_rows]
        return next([token] for token in reversed(ids[: self._prompt_columns]) if token >= 0)

    def _logits(self, texts: list[tuple[int, ...]]) -> Tensor:
        """[len(texts), vocab_size] float32: the logits after each text."""
        longest = max(len(text) for text in texts)
        if longest > self._max_tokens:
            raise RequestError(
                f"guidance needs {longest} positions for the negative prompt and the new tokens, but there are "
                f"{self._max_tokens}; shorten negative_prompt_ids or generate fewer tokens"
            )
        unique = list(dict.fromkeys(texts))
        cache = self._cache_for(len(unique))
        if not self._use_cache:
            self._keep({})
        sequences = {text: self._longest_known(text, cache) for text in unique}
        self._keep(sequences)
        rest = [text[len(sequences[text]) :] for text in unique]
        logits = compute(self._executor, cache, rest, list(sequences.values()))
        if len(unique) == len(texts):
            return logits
        place = {text: index for index, text in enumerate(unique)}
        return logits[[place[text] for text in texts]]

    def _longest_known(self, text: tuple[int, ...], cache: PagedKVCache) -> Sequence:
        """A fork of the sequence that has computed most of a text, all but its last token at most."""
        for length in range(len(text), 0, -1) if self._sequences else ():
            known = self._sequences.get(text[:length])
            if known is not None:
                sequence = known.fork()
                sequence.truncate(min(length, len(text) - 1))
                return sequence
        return Sequence(cache)

    def _keep(self, sequences: dict[tuple[int, ...], Sequence]) -> None:
        """Free the sequences of the last step, and keep these instead."""
        before, self._sequences = self._sequences, sequences
        for sequence in before.values():
            sequence.free()

    def _cache_for(self, count: int) -> PagedKVCache:
        """A cache with room for so many sequences at their full length."""
        if self._cache is None or count > self._capacity:
            self._keep({})
            self._capacity = max(count, self._num_rows)
            self._cache = new_cache(
                self._executor,
                self._capacity * -(-self._max_tokens // BLOCK_SIZE),
                f"the unconditional branches of {self._capacity} rows",
                "ask for fewer or shorter rows",
                self._kv_cache_dtype,
            )
        return self._cache


def make_guidance(
    config: GenerationConfig,
    executor: Executor,
    negative_prompt_ids: Any,
    negative_prompt_attention_mask: Any,
    *,
    prompt_columns: int,
    num_rows: int,
    max_new_tokens: int,
) -> GuidanceProcessor | None:
    """The guidance that a call of ``generate`` asks for, or None.

    Args:
        config: with ``guidance_scale``.
        executor: of the model.
        negative_prompt_ids: [batch, length] ids, as many as prompts or one for all, or None.
        negative_prompt_attention_mask: [batch, length], 0 = padding; None: no padding.
        prompt_columns: length of the padded prompts.
        num_rows: rows of the call: prompts times num_return_sequences or num_beams.
        max_new_tokens: the most new tokens of a row.

    Raises:
        RequestError: the negative prompts are malformed, too many or too few, or too long.
    """
    scale = config.guidance_scale
    if scale is None or scale == 1:
        if negative_prompt_ids is not None:
            warnings.warn("negative_prompt_ids only matter with guidance_scale, which is not set", stacklevel=4)
        return None
    prompts = None
    if negative_prompt_ids is not None:
        prompts = read_negative_prompts(negative_prompt_ids, negative_prompt_attention_mask, executor.plan.vocab_size)
    elif negative_prompt_attention_mask is not None:
        raise RequestError("negative_prompt_attention_mask was given without negative_prompt_ids; pass both or neither")
    elif prompt_columns == 0:
        raise RequestError(
            "guidance without negative_prompt_ids starts from the last id of each prompt, and prompts given as "
            "embeddings have no ids; pass negative_prompt_ids"
        )
    return GuidanceProcessor(
        scale,
        executor,
        prompts,
        prompt_columns=prompt_columns,
        num_rows=num_rows,
        max_new_tokens=max_new_tokens,
        use_cache=config.get("use_cache"),
        kv_cache_dtype=kv_cache_dtype(config, executor),
    )


def read_negative_prompts(ids: Any, mask: Any, vocab_size: int) -> list[list[int]]:
    """The ids of each negative prompt, without padding.

    Args:
        ids: [batch, length] integers: a tensor, an array or lists of equal length.
        mask: [batch, length], 0 = padding; None: no padding.
        vocab_size: ids are below.

    Raises:
        RequestError: shapes or ids are wrong, or a prompt is empty.
    """
    found = as_tensor("negative_prompt_ids", ids).cpu()
    if found.dim() != 2 or found.numel() == 0 or found.is_floating_point() or found.dtype == torch.bool:
        raise RequestError(
            f"negative_prompt_ids is {found.dtype} of shape {list(found.shape)}, expected integers [batch, length]"
        )
    keep = torch.ones_like(found) if mask is None else as_tensor("negative_prompt_attention_mask", mask).cpu()
    if keep.shape != found.shape:
        raise RequestError(
            f"negative_prompt_attention_mask has shape {list(keep.shape)}, expected {list(found.shape)}, the shape of "
            "negative_prompt_ids"
        )
    rows = [row[kept].tolist() for row, kept in zip(found, keep != 0, strict=True)]
    for index, row in enumerate(rows):
        bad = [token for token in row if not 0 <= token < vocab_size]
        if bad:
            raise RequestError(
                f"negative prompt {index} holds the token id {bad[0]}, but the vocabulary has ids 0 to {vocab_size - 1}"
            )
        if not row:
            raise RequestError(f"negative prompt {index} holds no token: its attention mask is 0 everywhere")
    return rows


class UnbatchedClassifierFreeGuidanceLogitsProcessor(LogitsProcessor):
    """Guidance as a processor that a caller passes to ``generate`` himself.

    It takes the columns of its first call as the prompt, and starts anew when a call has no more columns than the one
    before. ``generate(guidance_scale=...)`` is the shorter way.

    Args:
        guidance_scale: 1 leaves the probabilities as they are, above 1 moves away from the unconditional branch.
        model: one of ours, with a language modelling head; it computes the unconditional branch.
        unconditional_ids: [batch, length] the negative prompts; None: the last token of each row's prompt.
        unconditional_attention_mask: [batch, length], 0 = padding.
        use_cache: False computes the unconditional branch anew in each step.

    Raises:
        TypeError: the model is not one of ours.
        RequestError: the negative prompts are malformed.
    """

    def __init__(
        self,
        guidance_scale: float,
        model: Any,
        unconditional_ids: Tensor | None = None,
        unconditional_attention_mask: Tensor | None = None,
        use_cache: bool = True,
        kv_cache_dtype: torch.dtype | None = None,
    ) -> None:
        if not hasattr(model, "build_graph"):
            raise TypeError(
                f"{type(self).__name__} needs a language model of gpt2rt, got {type(model).__name__}; load it with "
                "GPT2LMHeadModel.from_pretrained"
            )
        self.guidance_scale = guidance_scale
        self.model = model
        self._use_cache = use_cache
        self._kv_cache_dtype = kv_cache_dtype
        self._prompts: list[list[int]] | None = None
        if unconditional_ids is not None:
            vocab_size = model.config.vocab_size
            self._prompts = read_negative_prompts(unconditional_ids, unconditional_attention_mask, vocab_size)
        self._branch: GuidanceProcessor | None = None
        self._columns = 0

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        columns = input_ids.size(1)
        if self._branch is None or columns <= self._columns:
            self.close()
            self._branch = GuidanceProcessor(
                self.guidance_scale,
                executor_for(self.model),
                self._prompts,
                prompt_columns=columns,
                num_rows=scores.size(0),
                use_cache=self._use_cache,
            )
        self._columns = columns
        return self._branch(input_ids, scores)

    def close(self) -> None:
        """Give back the cache of the unconditional branch; the next call starts anew."""
        if self._branch is not None:
            self._branch.close()
        self._branch = None
