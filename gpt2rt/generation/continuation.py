"""Prompts that are more than ids: what a cache holds already, or embeddings in their place.

Either way the call begins with keys and values that no step of the executor has computed, a :class:`Starts`.
"""

from __future__ import annotations

import dataclasses
import hashlib
from typing import Any

import torch
from torch import Tensor

from gpt2rt.errors import RequestError
from gpt2rt.graph import Plan

from .evaluating import evaluating
from .prompts import Prompts, as_tensor, full_mask, read_mask, read_prompts
from .starts import LayerPairs, Start, Starts, past_length, read_past


@dataclasses.dataclass
class Given:
    """What a call gives besides ids.

    Attributes:
        keep: [batch, columns] bool on CPU: which columns of the prompts, as the cache counts them, hold tokens.
        hidden: for each prompt, how many tokens come before the ids, or instead of them.
        past: the keys and values in the caller's cache, or None.
        embeds: [batch, columns, n_embd], or None.
        token_type: of all new tokens, or None.
    """

    keep: Tensor
    hidden: list[int]
    past: LayerPairs | None = None
    embeds: Tensor | None = None
    token_type: int | None = None

    @property
    def past_columns(self) -> int:
        """Columns that were in the caller's cache."""
        return 0 if self.past is None else self.past[0][0].size(2)

    def starts(self, model: Any, prompts: Prompts, with_keys: bool) -> Starts:
        """What the paged cache begins with; embeddings are run through the model's forward here.

        Args:
            model: a language model.
            prompts: the ids.
            with_keys: tell prompts with equal ids apart by what else they have, for their random numbers.
        """
        if self.embeds is not None:
            rows = [
                _embedded(model, embeds[flags], len(ids), with_keys)
                for embeds, flags, ids in zip(self.embeds, self.keep.to(self.embeds.device), prompts.rows, strict=True)
            ]
        else:
            assert self.past is not None
            rows = [self._cached(self.past, index, ids, with_keys) for index, ids in enumerate(prompts.rows)]
        return Starts(rows, self.keep, self.past_columns)

    def _cached(self, past: LayerPairs, index: int, ids: list[int], with_keys: bool) -> Start:
        hidden = self.hidden[index]
        places = self.keep[index, : self.past_columns].nonzero().flatten()
        # the logits after the last token are needed, so that token at least is computed
        length = min(len(places), hidden + len(ids) - 1)
        places = places[:length].to(past[0][0].device)
        pairs = [(keys[index][:, places], values[index][:, places]) for keys, values in past]
        return Start(pairs, length, hidden, key=_key(pairs[0][0]) if hidden and with_keys else 0)


def _embedded(model: Any, embeds: Tensor, num_ids: int, with_keys: bool) -> Start:
    """The start of a prompt given as [length, n_embd]; alone, so that it does not depend on its neighbours."""
    with torch.no_grad(), evaluating(model):
        output = model.base_model(inputs_embeds=embeds[None], use_cache=True, return_dict=True)
        logits = model.get_output_embeddings()(output.last_hidden_state[0, -1])
    pairs = [(keys[0], values[0]) for keys, values, *_ in output.past_key_values]
    length = len(embeds)
    return Start(pairs, length, length - num_ids, logits.float(), _key(embeds) if with_keys else 0)


def _key(content: Tensor) -> int:
    """64 bits that name a tensor's content."""
    data = content.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes()
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little")


def read_call(
    inputs: Any,
    attention_mask: Any,
    past_key_values: Any,
    inputs_embeds: Any,
    *,
    plan: Plan,
    rows_per_prompt: int,
    **limits: Any,
) -> tuple[Prompts, Given | None]:
    """The prompts of a call, whatever they are given as.

    Args:
        inputs: ids, as :func:`read_prompts` takes them. With a cache: of the whole sequence, or only of the tokens that
            are not in the cache; a mask says which, by its length, and without one ids are the whole sequence where
            there are more of them than the cache has. With embeddings: what they stand for, shown in the result and to
            the processors, or None.
        attention_mask: over the ids; with a cache, over the whole sequence; with embeddings, over these.
        past_key_values: a filled cache, see :func:`read_past`, or None.
        inputs_embeds: [batch, length, n_embd] in the dtype of the model, or None.
        plan: of the model.
        rows_per_prompt: rows of the result for each prompt.
        **limits: see :func:`read_prompts`.

    Returns:
        The prompts, and what comes besides their ids, if anything does.

    Raises:
        RequestError: something is malformed, does not fit together, or is too long.
    """
    filled = past_key_values is not None and past_length(past_key_values) > 0
    if inputs_embeds is not None:
        if filled:
            raise RequestError("inputs_embeds and a filled past_key_values were both given; pass one of them")
        return _with_embeds(inputs, attention_mask, inputs_embeds, plan, limits)
    if not filled:
        return read_prompts(inputs, attention_mask, **limits), None
    if inputs is None:
        raise RequestError("past_key_values was given without input_ids; pass the tokens that come next")
    num_past, mask, whole = past_length(past_key_values), None, False
    if attention_mask is None:
        prompts = read_prompts(inputs, None, **limits)
        batch, columns = prompts.columns.shape
        whole = columns > num_past
    else:
        shape = as_tensor("input_ids", inputs).shape
        batch, columns = shape if len(shape) == 2 else (1, 1)
        mask = read_mask(attention_mask, (batch, columns), (batch, num_past + columns))
        whole = mask.size(1) == columns
        prompts = read_prompts(inputs, mask if whole else mask[:, num_past:], **limits)
    past = read_past(past_key_values, plan, batch, rows_per_prompt)
    if whole:
        keep = full_mask(prompts.columns, prompts.keep)
        shorter = [(keys[:, :, : columns - 1], values[:, :, : columns - 1]) for keys, values in past]
        return prompts, Given(keep, [0] * batch, shorter)
    before = torch.ones(batch, num_past, dtype=torch.bool) if mask is None else mask[:, :num_past] != 0
    after = full_mask(prompts.columns, prompts.keep)
    hidden = before.sum(dim=1).tolist()
    _check_positions(prompts, hidden, limits["n_positions"], "in past_key_values")
    return prompts, Given(torch.cat([before, after], dim=1), hidden, past)


def _with_embeds(
    inputs: Any, attention_mask: Any, inputs_embeds: Any, plan: Plan, limits: dict[str, Any]
) -> tuple[Prompts, Given]:
    embeds = inputs_embeds
    width = plan.n_head * plan.head_dim
    if not isinstance(embeds, Tensor) or embeds.dim() != 3 or embeds.size(2) != width or 0 in embeds.shape:
        found = f"of shape {list(embeds.shape)}" if isinstance(embeds, Tensor) else f"a {type(embeds).__name__}"
        raise RequestError(f"inputs_embeds is {found}, expected a tensor [batch, length, {width}] with a token or more")
    if embeds.dtype != plan.dtype or embeds.device != plan.device:
        raise RequestError(
            f"inputs_embeds is {embeds.dtype} on {embeds.device}, the model is {plan.dtype} on {plan.device}; use "
            "inputs_embeds.to(model.device, model.dtype)"
        )
    batch, length = embeds.shape[:2]
    mask = None if attention_mask is None else read_mask(attention_mask, (batch, length))
    if inputs is None:
        prompts = Prompts([[] for _ in range(batch)], torch.zeros(batch, 0, dtype=torch.int64), None, embeds.device)
    else:
        # a mask is about the embeddings; it says something about the ids only where there are as many of them
        same = as_tensor("input_ids", inputs).shape[-1] == length
        prompts = read_prompts(inputs, mask if same else None, **limits)
        if prompts.columns.size(0) != batch:
            raise RequestError(
                f"input_ids has {prompts.columns.size(0)} rows, inputs_embeds {batch}; pass as many ids as embeddings"
            )
        if mask is None and same:
            mask = prompts.keep
    keep = torch.ones(batch, length, dtype=torch.bool) if mask is None else mask != 0
    hidden = [count - len(ids) for count, ids in zip(keep.sum(dim=1).tolist(), prompts.rows, strict=True)]
    if not bool(keep.any(dim=1).all()):
        raise RequestError("attention_mask is 0 in all of a row of inputs_embeds: that prompt would hold no token")
    if min(hidden) < 0:
        raise RequestError(
            f"input_ids has {prompts.columns.size(1)} tokens, inputs_embeds {length}; there must be at "
            "least as many embeddings as ids that they stand for"
        )
    _check_positions(prompts, hidden, limits["n_positions"], "in inputs_embeds")
    return prompts, Given(keep, hidden, embeds=embeds)


def with_token_types(prompts: Prompts, given: Given | None, token_type_ids: Any, wte: Any) -> Given:
    """Add the embeddings of token types to a call; they are looked up where tokens are.

    The prompts become embeddings, beside their ids. New tokens get the type that prompts end with.

    Args:
        prompts: the ids.
        given: what comes besides them, or None.
        token_type_ids: [batch, columns], one for each id or embedding.
        wte: the token embedding.

    Raises:
        RequestError: they do not fit, or prompts end with different types.
    """
    if given is not None and given.embeds is None:
        raise RequestError("token_type_ids and a filled past_key_values were both given; pass one of them")
    columns = prompts.columns if given is None else given.keep
    keep = full_mask(columns, prompts.keep) if given is None else given.keep
    types = as_tensor("token_type_ids", token_type_ids).detach().cpu()
    if types.shape != columns.shape or types.is_floating_point() or types.dtype == torch.bool:
        raise RequestError(
            f"token_type_ids is {types.dtype} of shape {list(types.shape)}, expected integers of shape "
            f"{list(columns.shape)}, one for each token of the prompts"
        )
    bad = types[(types < 0) | (types >= wte.num_embeddings)]
    if bad.numel():
        raise RequestError(
            f"token_type_ids holds {int(bad[0])}, but types are looked up in the vocabulary, from 0 to "
            f"{wte.num_embeddings - 1}"
        )
    last = sorted({int(types[row, flags.nonzero().max()]) for row, flags in enumerate(keep)})
    if len(last) > 1:
        raise RequestError(
            f"the prompts end with token types {last}; new tokens get the type of the last one, which must be the same "
            "for all prompts of a call"
        )
    device = wte.weight.device
    embeds = table_rows(wte, prompts.columns.to(device)) if given is None or given.embeds is None else given.embeds
    hidden = [0] * len(prompts.rows) if given is None else given.hidden
    return Given(keep, hidden, embeds=embeds + table_rows(wte, types.to(device).long()), token_type=last[0])


def table_rows(wte: Any, ids: Tensor) -> Tensor:
    """Rows of a token embedding, detached: ids [...] to [..., n_embd] in the model's dtype."""
    # a quantised table holds codes
    return wte(ids) if hasattr(wte, "quantized") else wte.weight.detach()[ids]


def _check_positions(prompts: Prompts, hidden: list[int], n_positions: int, where: str) -> None:
    for index, (ids, before) in enumerate(zip(prompts.rows, hidden, strict=True)):
        if before + len(ids) > n_positions:
            raise RequestError(
                f"prompt {index} has {before} tokens {where} besides {len(ids)} ids, together {before + len(ids)}, but "
                f"the model has n_positions={n_positions}; shorten it"
            )


def check_position_ids(position_ids: Any, prompts: Prompts, given: Given | None) -> None:
    """Positions that a caller passes must be the ones that generate counts itself: each row's tokens from 0.

    Raises:
        RequestError: they are others.
    """
    keep = full_mask(prompts.columns, prompts.keep) if given is None else given.keep
    expected = (keep.long().cumsum(dim=1) - 1).clamp(min=0)
    ids = as_tensor("position_ids", position_ids).detach().cpu()
    count = ids.size(-1) if ids.dim() else 0
    if ids.dim() == 2 and 0 < count <= keep.size(1) and ids.size(0) in (1, keep.size(0)):
        flags = keep[:, -count:]
        if torch.equal(ids.expand(keep.size(0), -1)[flags].long(), expected[:, -count:][flags]):
            return
    raise RequestError(
        "position_ids must number each row's tokens from 0, without its padding, as generate does by itself; leave "
        "position_ids out, or call forward for other positions"
    )
