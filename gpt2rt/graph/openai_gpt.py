"""Builds OpenAI GPT's plan.

Block order: Radford et al., "Improving Language Understanding by Generative Pre-Training" (2018), section 3.1: norms
stand after the residual additions, and there is no final one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

from torch import Tensor

from gpt2rt.config import OpenAIGPTConfig, openai_gpt_activation
from gpt2rt.quantization.weight import QuantizedWeight

from .plan import Attention, Head, LinearResidual, Node, NormLinearAct, NormQKV, NormResidual, Plan
from .weights import PlanWeights


def build_openai_gpt_plan(
    config: OpenAIGPTConfig, weights: Mapping[str, Tensor | QuantizedWeight], activation: Callable[[Tensor], Tensor]
) -> Plan:
    """The plan of an OpenAI GPT, as a language model if ``weights`` holds an output layer.

    Args:
        config: sizes.
        weights: by checkpoint name without prefix: ``tokens_embed.weight`` [vocab_size, n_embd],
            ``positions_embed.weight``, ``h.0.attn.c_attn.weight`` [n_embd, 3 * n_embd] as ``Conv1D`` stores it, ...,
            and, if logits are wanted, ``lm_head.weight`` [vocab_size, n_embd]. Quantised ones are [out, in]. All of
            one dtype and device, as :class:`PlanWeights` says. The plan keeps views: a change of the tensors in place
            is seen by the eager executor, not by one that has packed them.
        activation: the plain torch form of ``config.afn``.

    Returns:
        The plan; no weight is copied.

    Raises:
        ValueError: the weights differ in dtype or device.
    """
    held = PlanWeights(weights, "tokens_embed.weight", "positions_embed.weight")
    eps = config.layer_norm_epsilon
    head_dim = config.n_embd // config.n_head
    name = openai_gpt_activation(config.afn)
    nodes: list[Node] = [held.embed()]
    for layer in range(config.n_layer):
        block = f"h.{layer}"
        nodes += [
            NormQKV(layer, None, held.conv1d(f"{block}.attn.c_attn")),
            Attention(layer, config.n_head, head_dim, 1.0 / math.sqrt(head_dim)),
            LinearResidual(held.conv1d(f"{block}.attn.c_proj")),
            NormResidual(held.norm(f"{block}.ln_1", eps)),
            NormLinearAct(None, held.conv1d(f"{block}.mlp.c_fc"), name, activation),
            LinearResidual(held.conv1d(f"{block}.mlp.c_proj")),
            NormResidual(held.norm(f"{block}.ln_2", eps)),
        ]
    nodes.append(Head(None, held.head()))
    return Plan(
        nodes=tuple(nodes),
        n_layer=config.n_layer,
        n_head=config.n_head,
        head_dim=head_dim,
        n_embd=config.n_embd,
        vocab_size=held.vocab_size,
        n_positions=config.n_positions,
        dtype=held.dtype,
        device=held.device,
    )
