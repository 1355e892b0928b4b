"""Attention in forward: what each query may see, and softmax(q k^T) v over it.

    out = softmax(scale * q k^T + bias, over allowed keys) v

Source: Vaswani et al., arXiv:1706.03762, eq. 1. Scores and softmax are float32 (float64 for float64 models). A mask is
a predicate: a key that is not allowed gets probability 0 whatever the scores are, and a query with no allowed key at
all gets zeros (or a plain mean, in OpenAI GPT), never NaN. Tensors are [batch, n_head, query_len or key_len, head_dim].
"""

from __future__ import annotations

import dataclasses

import torch
import torch.nn.functional as F
from torch import Tensor

from .layers import is_traced, is_transformed
from .ragged import RaggedLayout

# additive masks mark a forbidden key with -inf or with the lowest value of some dtype; float16 has the highest lowest
FORBIDDEN = -65504.0


def causal_allowed(query_len: int, key_len: int, device: torch.device) -> Tensor:
    """bool [query_len, key_len]: the last query sees all keys, the one before it one less, and so on."""
    return torch.ones(query_len, key_len, dtype=torch.bool, device=device).tril(key_len - query_len)


def values_readable(x: Tensor) -> bool:
    """Whether Python may look at the values: not on an accelerator (it would wait for the device), not when tracing.

    Nor inside torch.func's transforms, where a tensor may stand for a whole batch of them.
    """
    return x.device.type == "cpu" and not is_traced() and not is_transformed()


@dataclasses.dataclass(frozen=True)
class AttentionMask:
    """What the queries of one call may attend to.

    A query with no allowed key is ``dead`` in GPT-2, whose masks are meant as -inf, and ``level`` in OpenAI GPT, whose
    masks are finite numbers that leave a plain mean.

    Attributes:
        visible: bool, [batch or 1, n_head or 1, query_len or 1, key_len], or None: every key. All true in dead rows,
            for the softmax over a row of -inf is NaN, and so is its gradient; what comes out of them is zeroed instead.
        bias: float32 added to the scores, broadcastable like ``visible``, or None.
        dead: bool, [batch or 1, n_head or 1, query_len or 1, 1]: queries with no allowed key; None: there are none.
        level: bool, shaped like ``dead``: queries that weigh all their visible keys alike; None: there are none.
        causal: query i sees keys 0..i; only where query_len == key_len, and then the others are None.
        kept: bool, [batch, key_len]: the mask is causality and these keys, nothing else; None: it may be more.
        layout: the same for the paged kernels, see :func:`gpt2rt.models.ragged.with_layout`, or None.
    """

    visible: Tensor | None = None
    bias: Tensor | None = None
    dead: Tensor | None = None
    level: Tensor | None = None
    causal: bool = False
    kept: Tensor | None = None
    layout: RaggedLayout | None = None

    @classmethod
    def of(cls, allowed: Tensor, bias: Tensor | None = None) -> AttentionMask:
        """The mask for these flags, shaped like ``visible`` above."""
        dead = ~allowed.any(dim=-1, keepdim=True)
        if values_readable(dead) and not bool(dead.any()):
            return cls(allowed, bias)
        return cls(allowed | dead, bias, dead)

    @classmethod
    def leveled(cls, allowed: Tensor, flags: Tensor) -> AttentionMask:
        """The mask of OpenAI GPT for ``allowed``, which is ``flags`` (one per key, broadcastable to it) and causal.

        The model was written with additive masks: -1e4 on keys that come later, the lowest float32 on keys without a
        flag. A query that sees nothing therefore falls back on the keys that come later, if any of them has a flag, and
        else on all keys; either way what was added is so large that the scores are lost in its rounding.
        """
        lost = ~allowed.any(dim=-1, keepdim=True)
        if values_readable(lost) and not bool(lost.any()):
            return cls(allowed)
        return cls(allowed | (lost & (flags | ~flags.any(dim=-1, keepdim=True))), level=lost)


def self_attention_mask(
    attention_mask: Tensor | None,
    leading: tuple[int, ...],
    query_len: int,
    past_len: int,
    n_head: int,
    packed_positions: Tensor | None,
    device: torch.device,
    *,
    level: bool = False,
) -> AttentionMask:
    """The mask of a causal model, from what the caller passed.

    The rule, with T = past_len + query_len and N the product of ``leading``:

    - [*leading, T]: one flag per key, nonzero = attend; causality is added. This includes (batch, choices, T) for
      inputs of (batch, choices, query_len).
    - [N, query_len, T], where that is not the shape above: one flag per query and key.
    - [N or 1, n_head or 1, query_len or 1, T]: the same with heads. Boolean and integer masks are flags; floating ones
      are added to the scores, and -65504 or less forbids the key.
    - A mask with a query dimension says everything: causality is not added to it.

    Args:
        attention_mask: as above, or None.
        leading: leading dimensions of the input, before query_len.
        query_len: new tokens.
        past_len: tokens in the cache.
        n_head: number of heads.
        packed_positions: [N or 1, query_len] position ids of sequences that may be packed into one row, or None: where
            they do not go up by one, a new sequence starts, and no token sees another sequence.
        device: of the model.
        level: a query for which the flags of the keys leave nothing weighs keys alike, see
            :meth:`AttentionMask.leveled`; False: it gets zeros. With a mask per query it gets zeros either way.

    Raises:
        ValueError: the shape fits none of these.
    """
    key_len = past_len + query_len
    batch = 1
    for size in leading:
        batch *= size
    if attention_mask is None:
        return _without_mask(query_len, key_len, packed_positions, device)
    if attention_mask.is_complex():
        raise ValueError(f"attention_mask must be boolean, integer or floating, got {attention_mask.dtype}")
    mask = attention_mask.to(device)
    if mask.dim() == len(leading) + 1 and mask.shape[:-1] == leading:
        _check_key_len(mask, past_len, query_len)
        flags = mask.reshape(batch, 1, 1, key_len) != 0
        if values_readable(flags) and bool(flags.all()):
            return _without_mask(query_len, key_len, None, device)
        allowed = flags if query_len == 1 else flags & causal_allowed(query_len, key_len, device)
        result = AttentionMask.leveled(allowed, flags) if level else AttentionMask.of(allowed)
        return dataclasses.replace(result, kept=flags.view(batch, key_len))
    if mask.dim() in (3, 4):
        _check_key_len(mask, past_len, query_len)
        return _complete_mask(mask.unsqueeze(1) if mask.dim() == 3 else mask, batch, n_head, query_len, attention_mask)
    raise _shape_error(attention_mask, batch, n_head, query_len, key_len)


def cross_attention_mask(
    attention_mask: Tensor | None, batch: int, n_head: int, query_len: int, key_len: int, device: torch.device
) -> AttentionMask:
    """The mask over an encoder's states, from [batch, key_len], [batch, query_len, key_len] or 4 dimensions.

    Raises:
        ValueError: another shape.
    """
    if attention_mask is None:
        return AttentionMask()
    mask = attention_mask.to(device)
    if mask.size(-1) != key_len:
        raise ValueError(
            f"encoder_attention_mask covers {mask.size(-1)} states, but encoder_hidden_states has {key_len}"
        )
    if mask.dim() == 2 and mask.size(0) == batch:
        return AttentionMask.of(mask[:, None, None, :] != 0)
    if mask.dim() in (3, 4):
        return _complete_mask(mask.unsqueeze(1) if mask.dim() == 3 else mask, batch, n_head, query_len, attention_mask)
    raise _shape_error(attention_mask, batch, n_head, query_len, key_len)


def as_mask(mask: AttentionMask | Tensor | None, query: Tensor, key_len: int, causal: bool) -> AttentionMask:
    """The mask of one attention module, which callers may also run by itself.

    Args:
        mask: from the model; or of 4 dimensions as :func:`self_attention_mask` takes them; None: causality alone.
        query: [batch, n_head, query_len, head_dim].
        key_len: keys, past ones included.
        causal: False: None stands for no mask at all.

    Raises:
        ValueError: a tensor that does not fit.
    """
    if isinstance(mask, AttentionMask):
        return mask
    batch, n_head, query_len, _ = query.shape
    if mask is None:
        return _without_mask(query_len, key_len, None, query.device) if causal else AttentionMask()
    if mask.dim() != 4 or mask.size(-1) != key_len:
        raise _shape_error(mask, batch, n_head, query_len, key_len)
    return _complete_mask(mask.to(query.device), batch, n_head, query_len, mask)


def _without_mask(query_len: int, key_len: int, packed_positions: Tensor | None, device: torch.device) -> AttentionMask:
    if query_len == 1:
        return AttentionMask()
    if packed_positions is not None:
        starts = packed_positions.diff(dim=-1) != 1
        if not values_readable(starts) or bool(starts.any()):
            sequence = F.pad(starts.cumsum(-1), (1, 0))  # [batch or 1, query_len], the number of its packed sequence
            same = sequence[:, None, :, None] == sequence[:, None, None, :]
            return AttentionMask(same & causal_allowed(query_len, key_len, device))
    if query_len == key_len:
        return AttentionMask(causal=True)
    return AttentionMask(causal_allowed(query_len, key_len, device)[None, None])


def _complete_mask(mask: Tensor, batch: int, n_head: int, query_len: int, given: Tensor) -> AttentionMask:
    fits = mask.size(0) in (1, batch) and mask.size(1) in (1, n_head) and mask.size(2) in (1, query_len)
    if not fits:
        raise _shape_error(given, batch, n_head, query_len, mask.size(-1))
    if not mask.is_floating_point():
        return AttentionMask.of(mask != 0)
    allowed = mask > FORBIDDEN
    return AttentionMask.of(allowed, mask.float().masked_fill(~allowed, 0.0))


def _check_key_len(mask: Tensor, past_len: int, query_len: int) -> None:
    if mask.size(-1) != past_len + query_len:
        raise ValueError(
            f"attention_mask covers {mask.size(-1)} keys, but {past_len} past and {query_len} new tokens make "
            f"{past_len + query_len}; extend it by ones for the tokens in past_key_values"
        )


def _shape_error(mask: Tensor, batch: int, n_head: int, query_len: int, key_len: int) -> ValueError:
    return ValueError(
        f"attention mask has shape {list(mask.shape)}; use [{batch}, {key_len}] (one flag per key), "
        f"[{batch}, {query_len}, {key_len}] (per query and key) or [{batch}, {n_head} or 1, {query_len}, {key_len}]"
    )


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: AttentionMask,
    scale: float,
    *,
    dropout_p: float = 0.0,
    head_mask: Tensor | None = None,
    want_probs: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Attention as defined at the top of the file.

    Args:
        query: [batch, n_head, query_len, head_dim].
        key, value: [batch, n_head, key_len, head_dim].
        mask: what may be seen.
        scale: applied to the query before the product, so that float16 scores cannot overflow.
        dropout_p: probability of dropping a key's weight.
        head_mask: [n_head], factors on the probabilities of each head.
        want_probs: return the probabilities too.

    Returns:
        [batch, n_head, query_len, head_dim] in the dtype of ``value``; and, if wanted, the probabilities
        [batch, n_head, query_len, key_len] in that dtype, after dropout and ``head_mask``, else None.
    """
    if mask.level is not None:
        # a query of zeros scores every key alike
        query = query.masked_fill(mask.level, 0.0)
    # a bias must reach the scores unrounded, and torch's fused form takes it in the dtype of the query
    exact_bias = mask.bias is None or query.dtype in (torch.float32, torch.float64)
    if want_probs or head_mask is not None or not exact_bias:
        out, probs = _attend_explicit(query, key, value, mask, scale, dropout_p, head_mask)
        return out, probs if want_probs else None
    attn_mask = mask.visible
    if mask.bias is not None and attn_mask is not None:
        attn_mask = mask.bias.to(query.dtype).masked_fill(~attn_mask, float("-inf"))
    out = F.scaled_dot_product_attention(
        query, key, value, attn_mask=attn_mask, dropout_p=dropout_p, is_causal=mask.causal, scale=scale
    )
    return (out if mask.dead is None else out.masked_fill(mask.dead, 0.0)), None


def _attend_explicit(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: AttentionMask,
    scale: float,
    dropout_p: float,
    head_mask: Tensor | None,
) -> tuple[Tensor, Tensor]:
    wide = torch.promote_types(query.dtype, torch.float32)
    visible = causal_allowed(query.size(2), key.size(2), query.device) if mask.causal else mask.visible
    # autocast would take the products back to 16 bits
    with torch.autocast(query.device.type, enabled=False):
        scores = (query.to(wide) * scale) @ key.to(wide).transpose(-1, -2)
        if mask.bias is not None:
            scores = scores + mask.bias
        if visible is not None:
            scores = scores.masked_fill(~visible, float("-inf"))
        probs = scores.softmax(dim=-1)
        if mask.dead is not None:
            probs = probs.masked_fill(mask.dead, 0.0)
        probs = F.dropout(probs, p=dropout_p, training=dropout_p > 0.0)
        if head_mask is not None:
            probs = probs * head_mask.to(wide).view(-1, 1, 1)
        out = (probs @ value.to(wide)).to(value.dtype)
    return out, probs.to(value.dtype)
