"""Builds OpenAI GPT's plan.

Block order: Radford et al., "Improving Language Understanding by Generative Pre-Training" (2018), section 3.1: norms
stand after the residual additions, and there is no final one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

from torch import Tensor

from gpt2rt.config import OpenAIGPTConfig, openai_gpt_activation

from .plan import Attention, Embed, Head, Linear, LinearResidual, Node, Norm, NormLinearAct, NormQKV, NormResidual, Plan


def build_openai_gpt_plan(
    config: OpenAIGPTConfig, weights: Mapping[str, Tensor], activation: Callable[[Tensor], Tensor]
) -> Plan:
    """The plan of an OpenAI GPT, as a language model if ``weights`` holds an output layer.

    Args:
        config: sizes.
        weights: by checkpoint name without prefix: ``tokens_embed.weight`` [vocab_size, n_embd],
            ``positions_embed.weight``, ``h.0.attn.c_attn.weight`` [n_embd, 3 * n_embd] as ``Conv1D`` stores it, ...,
            and, if logits are wanted, ``lm_head.weight`` [vocab_size, n_embd]. All of one dtype and device. The plan
            keeps views: a change of the tensors in place is seen by the eager executor, not by one that has packed
            them.
        activation: the plain torch form of ``config.afn``.

    Returns:
        The plan; no weight is copied.

    Raises:
        ValueError: the weights differ in dtype or device.
    """
    tokens = weights["tokens_embed.weight"]
    for name, tensor in weights.items():
        if tensor.dtype != tokens.dtype or tensor.device != tokens.device:
            raise ValueError(
                f"{name} is {tensor.dtype} on {tensor.device}, but tokens_embed.weight is {tokens.dtype} on "
                f"{tokens.device}; move the whole model to one dtype and device with model.to(...)"
            )

    def norm(prefix: str) -> NormResidual:
        return NormResidual(Norm(weights[f"{prefix}.weight"], weights[f"{prefix}.bias"], config.layer_norm_epsilon))

    def conv1d(prefix: str) -> Linear:
        return Linear(weights[f"{prefix}.weight"].t(), weights[f"{prefix}.bias"])

    head_dim = config.n_embd // config.n_head
    name = openai_gpt_activation(config.afn)
    nodes: list[Node] = [Embed(tokens, weights["positions_embed.weight"])]
    for layer in range(config.n_layer):
        block = f"h.{layer}"
        nodes += [
            NormQKV(layer, None, conv1d(f"{block}.attn.c_attn")),
            Attention(layer, config.n_head, head_dim, 1.0 / math.sqrt(head_dim)),
            LinearResidual(conv1d(f"{block}.attn.c_proj")),
            norm(f"{block}.ln_1"),
            NormLinearAct(None, conv1d(f"{block}.mlp.c_fc"), name, activation),
            LinearResidual(conv1d(f"{block}.mlp.c_proj")),
            norm(f"{block}.ln_2"),
        ]
    lm_head = weights.get("lm_head.weight")
    nodes.append(Head(None, None if lm_head is None else Linear(lm_head, None)))
    return Plan(
        nodes=tuple(nodes),
        n_layer=config.n_layer,
        n_head=config.n_head,
        head_dim=head_dim,
        n_embd=config.n_embd,
        vocab_size=(tokens if lm_head is None else lm_head).size(0),
        n_positions=config.n_positions,
        dtype=tokens.dtype,
        device=tokens.device,
    )
