"""The blocks of OpenAI GPT: attention and MLP, each added to its input and normalised afterwards.

    n = ln_1(x + attn(x));  x = ln_2(n + mlp(n))

Source: Radford et al., "Improving Language Understanding by Generative Pre-Training" (2018), section 3.1, with the
block of Vaswani et al., arXiv:1706.03762. Attention and MLP are those of GPT-2, which only moved the norms. Names of
modules and parameters are transformers'.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from gpt2rt.config import GPT2Config, OpenAIGPTConfig, openai_gpt_activation

from .attention import AttentionMask
from .gpt2_blocks import GPT2MLP, GPT2Attention
from .layers import LayerNorm, is_plain


def gpt2_parts(config: OpenAIGPTConfig) -> GPT2Config:
    """The config of a GPT-2 whose attention and MLP are those of this OpenAI GPT."""
    return GPT2Config(
        n_embd=config.n_embd,
        n_head=config.n_head,
        n_layer=config.n_layer,
        activation_function=openai_gpt_activation(config.afn),
        attn_pdrop=config.attn_pdrop,
        resid_pdrop=config.resid_pdrop,
    )


class OpenAIGPTBlock(nn.Module):
    """Attention and MLP, each beside a residual connection and before a norm.

    Args:
        config: of the model.
        layer_idx: the block, from 0.
    """

    def __init__(self, config: OpenAIGPTConfig, layer_idx: int = 0) -> None:
        super().__init__()
        n_embd, eps, parts = config.n_embd, config.layer_norm_epsilon, gpt2_parts(config)
        self.attn = GPT2Attention(parts, layer_idx=layer_idx)
        self.ln_1 = LayerNorm(n_embd, eps=eps)
        self.mlp = GPT2MLP(4 * n_embd, parts)
        self.ln_2 = LayerNorm(n_embd, eps=eps)

    def forward(
        self,
        hidden_states: Tensor,
        past_key_values: Any = None,
        attention_mask: AttentionMask | Tensor | None = None,
        head_mask: Tensor | None = None,
        output_attentions: bool = False,
    ) -> tuple[Tensor, ...]:
        """
        Args:
            hidden_states: [batch, seq_len, n_embd].
            past_key_values: the cache, which is appended to, or None.
            attention_mask: what the tokens may see, of the past too.
            head_mask: [n_head], factors on the probabilities.
            output_attentions: return the probabilities.
        Returns:
            [batch, seq_len, n_embd], and if wanted the probabilities [batch, n_head, seq_len, key_len].
        """
        arguments: dict[str, Any] = {"head_mask": head_mask, "output_attentions": output_attentions}
        # a hook on a module sees its own output, so the residual is added inside plain modules only
        if is_plain(self.attn, GPT2Attention):
            added, probs = self.attn(
                hidden_states, past_key_values, attention_mask, **arguments, residual=hidden_states
            )
        else:
            branch, probs = self.attn(hidden_states, past_key_values, attention_mask, **arguments)
            added = branch + hidden_states
        normed = self.ln_1(added)
        added = self.mlp(normed, normed) if is_plain(self.mlp, GPT2MLP) else normed + self.mlp(normed)
        hidden_states = self.ln_2(added)
        return (hidden_states,) if probs is None else (hidden_states, probs)
