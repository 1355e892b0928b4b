"""Builds GPT-2's plan.

Block order and scaling: Radford et al., "Language Models are Unsupervised Multitask Learners", section 2.3
(pre-norm blocks, final norm), and transformers' ``GPT2Config`` flags.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

from torch import Tensor

from gpt2rt.config import GPT2Config
from gpt2rt.quantization.weight import QuantizedWeight

from .plan import Attention, Head, LinearResidual, Node, NormLinearAct, NormQKV, Plan
from .weights import PlanWeights


def attention_scale(config: GPT2Config, layer: int) -> float:
    """The one factor that the query of ``layer`` (0-based) is multiplied by.

    ``scale_attn_weights`` gives 1/sqrt(head_dim), ``scale_attn_by_inverse_layer_idx`` 1/(layer + 1).
    ``reorder_and_upcast_attn`` changes nothing here: scores are always scaled first and kept in float32.
    """
    scale = 1.0 / math.sqrt(config.n_embd // config.n_head) if config.scale_attn_weights else 1.0
    return scale / (layer + 1) if config.scale_attn_by_inverse_layer_idx else scale


def build_plan(
    config: GPT2Config, weights: Mapping[str, Tensor | QuantizedWeight], activation: Callable[[Tensor], Tensor]
) -> Plan:
    """The plan of a GPT-2, as a language model if ``weights`` holds an output layer.

    Args:
        config: sizes and flags.
        weights: by checkpoint name without prefix: ``wte.weight`` [vocab_size, n_embd], ``h.0.attn.c_attn.weight``
            [n_embd, 3 * n_embd] as ``Conv1D`` stores it, ..., and, if logits are wanted, ``lm_head.weight``
            [vocab_size, n_embd]. Quantised ones are [out, in]. All of one dtype and device, as :class:`PlanWeights`
            says. The plan keeps views: a change of the tensors in place is seen by the eager executor, not by one that
            has packed them.
        activation: the plain torch form of ``config.activation_function``.

    Returns:
        The plan; no weight is copied.

    Raises:
        ValueError: the model attends to an encoder, or the weights differ in dtype or device.
    """
    if config.add_cross_attention:
        raise ValueError(
            "a GPT-2 with add_cross_attention=True cannot run on the paged graph yet; call the model's forward instead"
        )
    held = PlanWeights(weights, "wte.weight", "wpe.weight")
    eps = config.layer_norm_epsilon
    head_dim = config.n_embd // config.n_head
    nodes: list[Node] = [held.embed()]
    for layer in range(config.n_layer):
        block = f"h.{layer}"
        nodes += [
            NormQKV(layer, held.norm(f"{block}.ln_1", eps), held.conv1d(f"{block}.attn.c_attn")),
            Attention(layer, config.n_head, head_dim, attention_scale(config, layer)),
            LinearResidual(held.conv1d(f"{block}.attn.c_proj")),
            NormLinearAct(
                held.norm(f"{block}.ln_2", eps),
                held.conv1d(f"{block}.mlp.c_fc"),
                config.activation_function,
                activation,
            ),
            LinearResidual(held.conv1d(f"{block}.mlp.c_proj")),
        ]
    nodes.append(Head(held.norm("ln_f", eps), held.head()))
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
