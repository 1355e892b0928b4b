"""The blocks of GPT-2: attention, MLP, and the two behind norms and beside residual connections.

    x = x + attn(ln_1(x));  [x = x + crossattention(ln_cross_attn(x));]  x = x + mlp(ln_2(x))

Source: Radford et al., "Language Models are Unsupervised Multitask Learners" (2019), section 2.3. Names of modules and
parameters are transformers'.
"""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor, nn

from gpt2rt import ops
from gpt2rt.config import GPT2Config

from .attention import AttentionMask, as_mask, attend
from .layers import Activation, Conv1D, LayerNorm, as_rows, end_branch, is_plain, runs_kernels


class GPT2Attention(nn.Module):
    """Multi-head attention over the tokens so far, or over an encoder's states.

    Args:
        config: of the model.
        is_cross_attention: attend to an encoder: ``q_attn`` makes the queries, ``c_attn`` keys and values.
        layer_idx: the block, from 0; the place in the cache.
    """

    def __init__(self, config: GPT2Config, is_cross_attention: bool = False, layer_idx: int = 0) -> None:
        super().__init__()
        self.config = config
        self.embed_dim = self.split_size = config.n_embd
        self.num_heads = config.n_head
        self.head_dim = config.n_embd // config.n_head
        self.is_cross_attention = is_cross_attention
        self.layer_idx = layer_idx
        # the config's flags come down to one factor; reorder_and_upcast_attn asks for the float32 scores of every model
        self.scaling = 1.0
        if config.scale_attn_weights:
            self.scaling /= math.sqrt(self.head_dim)
        if config.scale_attn_by_inverse_layer_idx:
            self.scaling /= layer_idx + 1
        if is_cross_attention:
            self.c_attn = Conv1D(2 * self.embed_dim, self.embed_dim)
            self.q_attn = Conv1D(self.embed_dim, self.embed_dim)
        else:
            self.c_attn = Conv1D(3 * self.embed_dim, self.embed_dim)
        self.c_proj = Conv1D(self.embed_dim, self.embed_dim)
        self.attn_dropout = nn.Dropout(config.attn_pdrop)
        self.resid_dropout = nn.Dropout(config.resid_pdrop)

    def _heads(self, x: Tensor, parts: int) -> tuple[Tensor, ...]:
        """[batch, seq_len, parts * n_embd] as that many views [batch, n_head, seq_len, head_dim]."""
        split = x.view(*x.shape[:2], parts, self.num_heads, self.head_dim)
        return split.permute(2, 0, 3, 1, 4).unbind(0)

    def forward(
        self,
        hidden_states: Tensor,
        past_key_values: Any = None,
        attention_mask: AttentionMask | Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        head_mask: Tensor | None = None,
        output_attentions: bool = False,
        residual: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """
        Args:
            hidden_states: [batch, seq_len, n_embd], normalised.
            past_key_values: the cache, which is appended to, or None.
            attention_mask: what the tokens may see, of the past too; see :func:`gpt2rt.models.attention.as_mask`.
            encoder_hidden_states: [batch, encoder_len, n_embd], for cross attention.
            head_mask: [n_head], factors on the probabilities.
            output_attentions: return the probabilities.
            residual: [batch, seq_len, n_embd], added to the result.
        Returns:
            [batch, seq_len, n_embd], and the probabilities [batch, n_head, seq_len, key_len] or None.
        """
        layout = None
        if self.is_cross_attention:
            (query,) = self._heads(self.q_attn(hidden_states), 1)
            key, value = self._encoder_keys(encoder_hidden_states, past_key_values)
        else:
            qkv = self.c_attn(hidden_states)
            query, key, value = self._heads(qkv, 3)
            wants_more = output_attentions or head_mask is not None
            if isinstance(attention_mask, AttentionMask) and not wants_more and runs_kernels(self, qkv):
                layout = attention_mask.layout
            if past_key_values is not None:
                key_len = int(past_key_values.get_seq_length(self.layer_idx)) + key.size(2)
                own = getattr(past_key_values, "self_attention_cache", past_key_values)
                key, value = own.update(key, value, self.layer_idx)
                # caches of a fixed size return all of their room
                key, value = key[:, :, :key_len], value[:, :, :key_len]
        if layout is not None:
            queries, keys, values = qkv.view(-1, 3, self.num_heads, self.head_dim).unbind(1)
            out = layout.attend(queries, keys, values, self.scaling).view(hidden_states.shape)
            return end_branch(self.c_proj, self.resid_dropout, out, residual), None
        out, probs = attend(
            query,
            key,
            value,
            as_mask(attention_mask, query, key.size(2), causal=not self.is_cross_attention),
            self.scaling,
            dropout_p=self.attn_dropout.p if self.training else 0.0,
            head_mask=head_mask,
            want_probs=output_attentions,
        )
        out = out.transpose(1, 2).reshape(hidden_states.shape)
        return end_branch(self.c_proj, self.resid_dropout, out, residual), probs

    def _encoder_keys(self, encoder_hidden_states: Tensor | None, cache: Any) -> tuple[Tensor, ...]:
        if cache is not None and cache.is_updated.get(self.layer_idx):
            layer = cache.cross_attention_cache.layers[self.layer_idx]
            return layer.keys, layer.values
        assert encoder_hidden_states is not None
        key, value = self._heads(self.c_attn(encoder_hidden_states), 2)
        if cache is not None:
            key, value = cache.cross_attention_cache.update(key, value, self.layer_idx)
            cache.is_updated[self.layer_idx] = True
        return key, value


class GPT2MLP(nn.Module):
    """``c_proj(act(c_fc(x)))``.

    Args:
        intermediate_size: width between the two.
        config: of the model.
    """

    def __init__(self, intermediate_size: int, config: GPT2Config) -> None:
        super().__init__()
        self.c_fc = Conv1D(intermediate_size, config.n_embd)
        self.c_proj = Conv1D(config.n_embd, intermediate_size)
        self.act = Activation(config.activation_function)
        self.dropout = nn.Dropout(config.resid_pdrop)

    def forward(self, hidden_states: Tensor, residual: Tensor | None = None) -> Tensor:
        """[..., n_embd] to [..., n_embd]; ``residual``, of that shape, is added."""
        return end_branch(self.c_proj, self.dropout, self._inner(hidden_states), residual)

    def _inner(self, x: Tensor) -> Tensor:
        fc, act = self.c_fc, self.act
        if (
            act.name == "gelu_new"
            and is_plain(fc, Conv1D)
            and is_plain(act, Activation)
            and runs_kernels(fc, x, fc.weight, fc.bias)
        ):
            # the widest tensor of the model is written once
            rows = ops.linear_gelu_new(as_rows(x), fc.weight.t(), fc.bias)
            return rows.view(*x.shape[:-1], fc.nf)
        return act(fc(x))


class GPT2Block(nn.Module):
    """Attention and MLP, each behind a norm and beside a residual connection.

    Args:
        config: of the model.
        layer_idx: the block, from 0.
    """

    def __init__(self, config: GPT2Config, layer_idx: int = 0) -> None:
        super().__init__()
        n_embd, eps = config.n_embd, config.layer_norm_epsilon
        self.ln_1 = LayerNorm(n_embd, eps=eps)
        self.attn = GPT2Attention(config, layer_idx=layer_idx)
        self.ln_2 = LayerNorm(n_embd, eps=eps)
        if config.add_cross_attention:
            self.crossattention = GPT2Attention(config, is_cross_attention=True, layer_idx=layer_idx)
            self.ln_cross_attn = LayerNorm(n_embd, eps=eps)
        self.mlp = GPT2MLP(config.n_inner if config.n_inner is not None else 4 * n_embd, config)

    def forward(
        self,
        hidden_states: Tensor,
        past_key_values: Any = None,
        attention_mask: AttentionMask | Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: AttentionMask | Tensor | None = None,
        head_mask: Tensor | None = None,
        attentions: list[tuple[Tensor, Tensor | None]] | None = None,
    ) -> Tensor:
        """
        Args:
            hidden_states: [batch, seq_len, n_embd].
            attentions: where to append the probabilities over the tokens and over the encoder's states, or None.
            **others: as in :meth:`GPT2Attention.forward`.
        Returns:
            [batch, seq_len, n_embd], the one thing that hooks on a block see, as in transformers.
        """
        arguments: dict[str, Any] = {"head_mask": head_mask, "output_attentions": attentions is not None}
        normed = self.ln_1(hidden_states)
        # a hook on a module sees its own output, so the residual is added inside plain modules only
        if is_plain(self.attn, GPT2Attention):
            hidden_states, probs = self.attn(
                normed, past_key_values, attention_mask, **arguments, residual=hidden_states
            )
        else:
            attn_out, probs = self.attn(normed, past_key_values, attention_mask, **arguments)
            hidden_states = attn_out + hidden_states
        cross_probs = None
        if encoder_hidden_states is not None:
            cross_out, cross_probs = self.crossattention(
                self.ln_cross_attn(hidden_states),
                past_key_values,
                encoder_attention_mask,
                encoder_hidden_states,
                **arguments,
            )
            hidden_states = hidden_states + cross_out
        normed = self.ln_2(hidden_states)
        if is_plain(self.mlp, GPT2MLP):
            hidden_states = self.mlp(normed, hidden_states)
        else:
            hidden_states = hidden_states + self.mlp(normed)
        if attentions is not None:
            assert probs is not None
            attentions.append((probs, cross_probs))
        return hidden_states
