"""Keys and values kept between calls of forward.

``generate`` uses the paged cache of ``gpt2rt.cache``; these classes are what ``model(..., use_cache=True)`` returns,
with the protocol of transformers' caches: ``update`` and ``get_seq_length``, one object changed in place.
Tensors are [batch, n_head, seq_len, head_dim].
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor


class DynamicLayer:
    """One block's keys and values, appended to in place.

    Room for new tokens doubles when it runs out, so n appends copy O(n) tokens in all, where concatenation would copy
    O(n^2). When gradients flow through the cache, and inside torch.compile, it does concatenate: autograd and graphs
    need tensors that are never written again.
    """

    def __init__(self, max_length: int | None = None) -> None:
        self.max_length = max_length
        self._keys: Tensor | None = None  # [batch, n_head, capacity, head_dim]
        self._values: Tensor | None = None
        self._length = 0

    @property
    def keys(self) -> Tensor | None:
        """[batch, n_head, seq_len, head_dim], or None before the first update."""
        return None if self._keys is None else self._keys[:, :, : self._length]

    @property
    def values(self) -> Tensor | None:
        """[batch, n_head, seq_len, head_dim], or None before the first update."""
        return None if self._values is None else self._values[:, :, : self._length]

    def get_seq_length(self) -> int:
        """Tokens held."""
        return self._length

    def set(self, keys: Tensor, values: Tensor) -> None:
        """Hold exactly these tensors. They are never written to: the next append moves to a buffer of its own."""
        if keys.dim() != 4 or keys.shape != values.shape:
            raise ValueError(
                f"keys and values must both be [batch, n_head, seq_len, head_dim], got {list(keys.shape)} and "
                f"{list(values.shape)}"
            )
        self._keys, self._values, self._length = keys, values, keys.size(2)

    def update(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Append, and return everything held; see :meth:`DynamicCache.update`."""
        old_keys, old_values = self.keys, self.values
        if old_keys is None or old_values is None:
            # copies, for these are views into the whole qkv matrix, which would stay alive with them
            self.set(keys.contiguous(), values.contiguous())
            return keys, values
        _check_appendable(old_keys, keys)
        if torch.compiler.is_compiling() or (
            torch.is_grad_enabled() and any(t.requires_grad for t in (old_keys, old_values, keys, values))
        ):
            self.set(torch.cat([old_keys, keys], dim=2), torch.cat([old_values, values], dim=2))
        else:
            self._append(keys, values)
        assert self.keys is not None
        assert self.values is not None
        return self.keys, self.values

    def _append(self, keys: Tensor, values: Tensor) -> None:
        assert self._keys is not None
        assert self._values is not None
        start, end = self._length, self._length + keys.size(2)
        # a tensor made in inference mode may not be written outside it
        frozen = self._keys.is_inference() and not torch.is_inference_mode_enabled()
        if end > self._keys.size(2) or frozen:
            capacity = max(end, min(2 * end, self.max_length or 2 * end))
            self._keys, self._values = (_moved(buffer, self._length, capacity) for buffer in (self._keys, self._values))
        self._keys[:, :, start:end] = keys
        self._values[:, :, start:end] = values
        self._length = end


def _moved(buffer: Tensor, length: int, capacity: int) -> Tensor:
    batch, n_head, _, head_dim = buffer.shape
    moved = buffer.new_empty(batch, n_head, capacity, head_dim)
    moved[:, :, :length] = buffer[:, :, :length].detach()
    return moved


def _check_appendable(old: Tensor, new: Tensor) -> None:
    if old.shape[:2] != new.shape[:2] or old.size(3) != new.size(3):
        raise ValueError(
            f"past_key_values holds keys of shape {list(old.shape)} (batch, n_head, seq_len, head_dim), the new ones "
            f"have {list(new.shape)}; use the cache with the batch it was made from, or reorder_cache() first"
        )
    if old.dtype != new.dtype or old.device != new.device:
        raise ValueError(
            f"past_key_values is {old.dtype} on {old.device}, the model computes in {new.dtype} on {new.device}; "
            "make the cache with the same model"
        )


class DynamicCache:
    """Keys and values of every block, growing with each call of forward.

    Reads like transformers' older tuples too: ``len(cache)`` blocks, ``cache[i]`` and iteration give
    ``(keys, values)``.

    Args:
        data: (keys, values) of each block, each [batch, n_head, seq_len, head_dim]; None for an empty cache.
        config: a model config; its ``n_positions`` bounds the room that is reserved ahead.
    """

    def __init__(self, data: Iterable[Any] | None = None, config: Any = None) -> None:
        self._max_length = None if config is None else int(config.n_positions)
        self.layers: list[DynamicLayer] = []
        for entry in data or ():
            # transformers' own caches yield a third item, about sliding windows, which GPT-2 does not have
            keys, values, *_ = entry
            layer = DynamicLayer(self._max_length)
            layer.set(keys, values)
            self.layers.append(layer)

    @classmethod
    def from_legacy_cache(cls, past_key_values: Iterable[Any] | None = None) -> DynamicCache:
        """A cache that starts from a tuple of (keys, values) per block; those tensors are not written to."""
        return cls(past_key_values)

    def to_legacy_cache(self) -> tuple[tuple[Tensor, Tensor], ...]:
        """(keys, values) of each block. Later updates of the cache do not change these tensors."""
        return tuple(self)

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, cache_kwargs: dict[str, Any] | None = None
    ) -> tuple[Tensor, Tensor]:
        """Append the tokens of one block.

        Args:
            key_states, value_states: [batch, n_head, num_new_tokens, head_dim].
            layer_idx: the block, from 0.
            cache_kwargs: part of transformers' protocol; this cache needs nothing from it.

        Returns:
            All keys and all values of the block, [batch, n_head, seq_len, head_dim].

        Raises:
            ValueError: batch, heads, dtype or device differ from what the cache holds.
        """
        while len(self.layers) <= layer_idx:
            self.layers.append(DynamicLayer(self._max_length))
        return self.layers[layer_idx].update(key_states, value_states)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens held by a block; 0 for a block not seen yet."""
        return self.layers[layer_idx].get_seq_length() if layer_idx < len(self.layers) else 0

    def crop(self, max_length: int) -> None:
        """Keep the first ``max_length`` tokens, or, if it is negative, drop the last ``-max_length``."""
        for layer in self.layers:
            if layer.keys is None or layer.values is None:
                continue
            length = layer.get_seq_length()
            kept = max(0, length + max_length) if max_length < 0 else min(max_length, length)
            # through set(): tensors handed out before must not change when the place is written again
            layer.set(layer.keys[:, :, :kept], layer.values[:, :, :kept])

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Let row i of the batch continue from what row ``beam_idx[i]`` holds; ``beam_idx`` [new batch] int64."""
        for layer in self.layers:
            if layer.keys is not None and layer.values is not None:
                index = beam_idx.to(layer.keys.device)
                layer.set(layer.keys.index_select(0, index), layer.values.index_select(0, index))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Let each row of the batch stand ``repeats`` times, one copy behind the other."""
        for layer in self.layers:
            if layer.keys is not None and layer.values is not None:
                layer.set(layer.keys.repeat_interleave(repeats, 0), layer.values.repeat_interleave(repeats, 0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these rows of the batch; the same as :meth:`reorder_cache`."""
        self.reorder_cache(indices)

    def reset(self) -> None:
        """Forget all tokens."""
        self.layers.clear()

    def __len__(self) -> int:
        return len(self.layers)

    def __bool__(self) -> bool:
        # an empty cache is still a cache: `cache or other` must not replace it
        return True

    def __getitem__(self, layer_idx: int) -> tuple[Tensor, Tensor]:
        layer = self.layers[layer_idx]
        if layer.keys is None or layer.values is None:
            raise IndexError(f"block {layer_idx} of the cache is empty")
        return layer.keys, layer.values

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return (self[i] for i in range(len(self.layers)))

    def __repr__(self) -> str:
        return f"{type(self).__name__}(n_layer={len(self.layers)}, seq_length={self.get_seq_length()})"


class EncoderDecoderCache:
    """The cache of a model with cross attention: its own tokens, and the encoder's, computed once.

    Iteration gives (keys, values, cross keys, cross values) per block.

    Args:
        self_attention_cache: keys and values of the tokens.
        cross_attention_cache: keys and values of the encoder's states.
    """

    def __init__(self, self_attention_cache: Any, cross_attention_cache: Any) -> None:
        self.self_attention_cache = self_attention_cache
        self.cross_attention_cache = cross_attention_cache
        # block -> its cross keys and values are there and are used as they are
        self.is_updated = {
            i: int(cross_attention_cache.get_seq_length(i)) > 0 for i in range(len(cross_attention_cache))
        }

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens held by a block, not counting the encoder's."""
        return self.self_attention_cache.get_seq_length(layer_idx)

    def to_legacy_cache(self) -> tuple[tuple[Tensor, ...], ...]:
        """(keys, values, cross keys, cross values) of each block; without the last two where there are none."""
        return tuple(self)

    def crop(self, max_length: int) -> None:
        """As :meth:`DynamicCache.crop`, on the tokens; the encoder's keys stay."""
        self.self_attention_cache.crop(max_length)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """As :meth:`DynamicCache.reorder_cache`, on both halves."""
        self.self_attention_cache.reorder_cache(beam_idx)
        self.cross_attention_cache.reorder_cache(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """As :meth:`DynamicCache.batch_repeat_interleave`, on both halves."""
        self.self_attention_cache.batch_repeat_interleave(repeats)
        self.cross_attention_cache.batch_repeat_interleave(repeats)

    def batch_select_indices(self, indices: Tensor) -> None:
        """As :meth:`DynamicCache.batch_select_indices`, on both halves."""
        self.self_attention_cache.batch_select_indices(indices)
        self.cross_attention_cache.batch_select_indices(indices)

    def reset(self) -> None:
        """Forget all tokens, and the encoder's states."""
        self.self_attention_cache.reset()
        self.cross_attention_cache.reset()
        self.is_updated = dict.fromkeys(self.is_updated, False)

    def __len__(self) -> int:
        return len(self.self_attention_cache)

    def __bool__(self) -> bool:
        return True

    def __getitem__(self, layer_idx: int) -> tuple[Tensor, ...]:
        own = self.self_attention_cache[layer_idx]
        return (*own, *self.cross_attention_cache[layer_idx]) if self.is_updated.get(layer_idx) else own

    def __iter__(self) -> Iterator[tuple[Tensor, ...]]:
        return (self[i] for i in range(len(self)))

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.self_attention_cache!r}, {self.cross_attention_cache!r})"


def as_cache(past_key_values: Any, n_layer: int, batch: int, config: Any) -> Any:
    """The cache that forward works with.

    Args:
        past_key_values: None; an object with ``update`` and ``get_seq_length``, returned as it is; or a tuple of
            (keys, values) per block, or (keys, values, cross keys, cross values), which becomes a new cache.
        n_layer: blocks of the model.
        batch: rows of the input.
        config: of the model.

    Raises:
        TypeError: something else.
        ValueError: a tuple that does not fit the model or the input.
    """
    if past_key_values is None or (hasattr(past_key_values, "get_seq_length") and _has_update(past_key_values)):
        return past_key_values
    if not isinstance(past_key_values, tuple | list):
        raise TypeError(
            f"past_key_values is a {type(past_key_values).__name__}; pass the past_key_values that the model returned, "
            "a gpt2rt DynamicCache, a transformers Cache, or a tuple of (keys, values) per block"
        )
    if len(past_key_values) != n_layer:
        raise ValueError(f"past_key_values has {len(past_key_values)} entries, but the model has {n_layer} blocks")
    expected = [batch, config.n_head, "seq_len", config.n_embd // config.n_head]
    for i, entry in enumerate(past_key_values):
        keys = entry[0] if len(entry) in (2, 4) else None
        if not isinstance(keys, Tensor) or [*keys.shape[:2], "seq_len", *keys.shape[3:]] != expected:
            found = list(keys.shape) if isinstance(keys, Tensor) else f"{len(entry)} items"
            raise ValueError(
                f"past_key_values[{i}] must be (keys, values), each {expected}, got {found}; does its batch differ "
                "from that of the input?"
            )
    own = DynamicCache((entry[:2] for entry in past_key_values), config)
    if len(past_key_values[0]) == 4:
        return EncoderDecoderCache(own, DynamicCache((entry[2:] for entry in past_key_values), config))
    return own


def _has_update(cache: Any) -> bool:
    return hasattr(cache, "update") or hasattr(cache, "self_attention_cache")
