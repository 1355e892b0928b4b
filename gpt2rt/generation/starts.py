"""Keys and values that come from elsewhere into the paged cache, and out of it again.

``generate`` continues from a cache that the caller has, or from prompts given as embeddings; both put keys and values
into the paged cache that no step of the executor has computed. The way back makes ``past_key_values`` of the result.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence as ListLike
from typing import Any

import torch
from torch import Tensor

from gpt2rt.cache import PagedKVCache, Sequence
from gpt2rt.errors import RequestError
from gpt2rt.graph import Executor, Plan, StepBatch

#: tokens in a block of the cache
BLOCK_SIZE = 16

# the most prompt tokens of a step; as many take 230 MB of scratch memory in a 124M model
_MAX_STEP_TOKENS = 8192

#: (keys, values) of each layer
LayerPairs = list[tuple[Tensor, Tensor]]


@dataclasses.dataclass
class Start:
    """What is in the cache of one prompt before any step.

    Attributes:
        pairs: of each layer, keys and values [n_head, length, head_dim] of the prompt's first tokens.
        length: how many tokens these are.
        hidden: how many of them the prompt's ids do not show: they came without ids.
        logits: [vocab_size] float32 after the last of them, where that is the end of the prompt; else None.
        key: names them for the random numbers, 0 where the ids say everything.
    """

    pairs: LayerPairs
    length: int
    hidden: int
    logits: Tensor | None = None
    key: int = 0


@dataclasses.dataclass
class Starts:
    """The starts of all prompts of a call.

    Attributes:
        rows: one for each prompt.
        keep: [batch, columns] bool on CPU: which columns of the prompts, as the cache counts them, hold tokens.
        past_columns: how many of the columns were in the caller's cache.
    """

    rows: list[Start]
    keep: Tensor
    past_columns: int


def write_start(start: Start, sequence: Sequence) -> None:
    """Put a prompt's first keys and values into the cache of an empty sequence, which grows by ``start.length``.

    Raises:
        OutOfBlocksError: the pool has too few blocks.
    """
    cache = sequence.cache
    slots = torch.tensor(sequence.append(start.length), dtype=torch.int64, device=cache.data.device)
    for layer, (keys, values) in enumerate(start.pairs):
        cache.write(layer, keys.transpose(0, 1), values.transpose(0, 1), slots)


def read_sequences(
    sequences: ListLike[Sequence | None], columns: Tensor, cache: PagedKVCache, dtype: torch.dtype
) -> LayerPairs:
    """The keys and values of rows, out of the paged cache.

    Args:
        sequences: one for each row; None leaves the row 0.
        columns: [num_rows, width] bool on CPU: where a row's tokens go, at least as many as it has. The rest is 0.
        cache: where they live.
        dtype: the model's, which its forward wants.

    Returns:
        Of each layer, keys and values [num_rows, n_head, width, head_dim].
    """
    n_layer, _, _, n_head, _, head_dim = cache.data.shape
    rows, width = columns.shape
    result = cache.data.new_zeros((n_layer, 2, rows, n_head, width, head_dim), dtype=dtype)
    for row, sequence in enumerate(sequences):
        if sequence is None or not sequence.length:
            continue
        places = columns[row].nonzero().flatten()[: sequence.length].to(cache.data.device)
        blocks = torch.tensor([sequence.blocks], device=cache.data.device)
        tokens = cache.read(blocks, sequence.length, dtype)[:, :, 0]
        result[:, :, row].index_copy_(3, places, tokens)
    return [(layer[0], layer[1]) for layer in result]


def compute(
    executor: Executor,
    cache: PagedKVCache,
    tokens: ListLike[ListLike[int]],
    sequences: ListLike[Sequence],
    chunk_size: int | None = None,
) -> Tensor:
    """Compute the next tokens of some sequences, in as few steps as the scratch memory of a step allows.

    Args:
        executor: runs the steps.
        cache: where the sequences live.
        tokens: for each sequence, its next ids, at least one.
        sequences: they grow by as many.
        chunk_size: at most as many tokens of a sequence in one step; None: all of them.

    Returns:
        [len(sequences), vocab_size] float32, the logits after each sequence's last token.
    """
    lengths = [len(ids) for ids in tokens]
    chunk = chunk_size or max(lengths)
    found: list[tuple[list[int], Tensor]] = []
    for start in range(0, max(lengths), chunk):
        rows = [row for row, length in enumerate(lengths) if length > start]
        for group in _groups(rows, [min(chunk, lengths[row] - start) for row in rows]):
            batch = StepBatch.build(
                [tokens[row][start : start + chunk] for row in group],
                [sequences[row] for row in group],
                device=executor.plan.device,
            )
            logits = executor.step(batch, cache).logits
            assert logits is not None
            last = [place for place, row in enumerate(group) if lengths[row] <= start + chunk]
            if last:
                found.append(([group[place] for place in last], logits if len(last) == len(group) else logits[last]))
    if len(found) == 1:
        return found[0][1]
    result = found[0][1].new_empty((len(lengths), found[0][1].size(1)))
    for rows, logits in found:
        result[rows] = logits
    return result


def _groups(rows: list[int], sizes: list[int]) -> list[list[int]]:
    """Rows in their order, as many to a step as fit."""
    groups: list[list[int]] = []
    room = 0
    for row, size in zip(rows, sizes, strict=True):
        if not groups or size > room:
            groups.append([])
            room = _MAX_STEP_TOKENS
        groups[-1].append(row)
        room -= size
    return groups


def prefill(
    executor: Executor,
    cache: PagedKVCache,
    prompts: ListLike[ListLike[int]],
    sequences: ListLike[Sequence],
    starts: Starts | None,
    chunk_size: int | None,
) -> Tensor:
    """Bring the prompts into the cache.

    Args:
        executor: runs the steps.
        cache: where the sequences live.
        prompts: the ids of each prompt.
        sequences: an empty one for each prompt.
        starts: what need not be computed, or None.
        chunk_size: as for :func:`compute`.

    Returns:
        [len(prompts), vocab_size] float32, the logits after each prompt.
    """
    if starts is None:
        return compute(executor, cache, prompts, sequences, chunk_size)
    for start, sequence in zip(starts.rows, sequences, strict=True):
        if start.length:
            write_start(start, sequence)
    rest = [row for row, start in enumerate(starts.rows) if start.logits is None]
    logits: list[Tensor | None] = [start.logits for start in starts.rows]
    if rest:
        ids = [prompts[row][starts.rows[row].length - starts.rows[row].hidden :] for row in rest]
        computed = compute(executor, cache, ids, [sequences[row] for row in rest], chunk_size)
        for place, row in enumerate(rest):
            logits[row] = computed[place]
    return torch.stack([values for values in logits if values is not None])


# ---- a caller's cache ----------------------------------------------------------------------------------------------


def past_length(past_key_values: Any) -> int:
    """Columns in a caller's cache: ours, transformers', or a tuple of (keys, values) per layer.

    Raises:
        RequestError: it is something else.
    """
    if hasattr(past_key_values, "get_seq_length"):
        return int(past_key_values.get_seq_length())
    if not isinstance(past_key_values, tuple | list):
        raise RequestError(
            f"past_key_values is a {type(past_key_values).__name__}; pass the past_key_values that generate or forward "
            "returned, a transformers cache, or a tuple of (keys, values) per layer"
        )
    return past_key_values[0][0].shape[2] if len(past_key_values) else 0


def read_past(past_key_values: Any, plan: Plan, batch: int, rows_per_prompt: int) -> LayerPairs:
    """The keys and values in a caller's cache.

    Args:
        past_key_values: our DynamicCache, one of transformers' caches, or a tuple of (keys, values) per layer.
        plan: of the model.
        batch: prompts in the call.
        rows_per_prompt: rows of the result for each prompt; a cache that was already repeated for them is accepted, as
            transformers wants it.

    Returns:
        Of each layer, keys and values [batch, n_head, columns, head_dim].

    Raises:
        RequestError: it is something else, or does not fit the model or the prompts.
    """
    if hasattr(past_key_values, "cross_attention_cache"):
        raise RequestError(
            "past_key_values is the cache of a model with cross attention, which generate does not run; pass the "
            "cache of a decoder-only model"
        )
    length = past_length(past_key_values)
    if hasattr(past_key_values, "layers"):
        entries = [(layer.keys, layer.values) for layer in past_key_values.layers]
    else:
        entries = [(entry[0], entry[1]) for entry in past_key_values]
    if len(entries) != plan.n_layer:
        raise RequestError(f"past_key_values has {len(entries)} layers, but the model has {plan.n_layer}")
    repeats = rows_per_prompt if entries[0][0].shape[0] == batch * rows_per_prompt else 1
    expected = [batch, plan.n_head, "columns", plan.head_dim]
    pairs = []
    for index, entry in enumerate(entries):
        for tensor in entry:
            shape = list(tensor.shape)
            if len(shape) != 4 or [shape[0] // repeats, shape[1], "columns", shape[3]] != expected:
                raise RequestError(
                    f"past_key_values holds keys or values of shape {shape} in layer {index}, expected {expected} for "
                    f"{batch} prompts; use it with the model and the batch it was made from"
                )
            if tensor.dtype != plan.dtype or tensor.device != plan.device:
                raise RequestError(
                    f"past_key_values is {tensor.dtype} on {tensor.device}, the model computes in {plan.dtype} on "
                    f"{plan.device}; make the cache with the same model"
                )
        # a static cache is longer than what it holds
        keys, values = (tensor.detach()[::repeats, :, :length] for tensor in entry)
        pairs.append((keys, values))
    return pairs


def extend_past(past_key_values: Any, pairs: LayerPairs) -> bool:
    """Append to a caller's cache what it lacks, as transformers does in place; False if its batch does not allow that.

    Args:
        past_key_values: as for :func:`read_past`.
        pairs: the whole of it, from :func:`read_sequences`.
    """
    if not hasattr(past_key_values, "update"):
        return False
    length = past_length(past_key_values)
    layers = getattr(past_key_values, "layers", [])
    if length and layers[0].keys.shape[0] != pairs[0][0].size(0):
        return False
    for index, (keys, values) in enumerate(pairs):
        past_key_values.update(keys[:, :, length:], values[:, :, length:], index)
    return True
