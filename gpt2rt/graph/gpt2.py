"""Builds GPT-2's plan.

Block order and scaling: Radford et al., "Language Models are Unsupervised Multitask Learners", section 2.3
(pre-norm blocks, final norm), and transformers' ``GPT2Config`` flags.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

from torch import Tensor

from gpt2rt.config import GPT2Config

from .plan import Attention, Embed, Head, Linear, LinearResidual, Node, Norm, NormLinearAct, NormQKV, Plan


def attention_scale(config: GPT2Config, layer: int) -> float:
    """The one factor that the query of ``layer`` (0-based) is multiplied by.

    ``scale_attn_weights`` gives 1/sqrt(head_dim), ``scale_attn_by_inverse_layer_idx`` 1/(layer + 1).
    ``reorder_and_upcast_attn`` changes nothing here: scores are always scaled first and kept in float32.
    """
    scale = 1.0 / math.sqrt(config.n_embd // config.n_head) if config.scale_attn_weights else 1.0
    return scale / (layer + 1) if config.scale_attn_by_inverse_layer_idx else scale


def build_plan(config: GPT2Config, weights: Mapping[str, Tensor], activation: Callable[[Tensor], Tensor]) -> Plan:
    """The plan of a GPT-2, as a language model if ``weights`` holds an output layer.

    Args:
        config: sizes and flags.
        weights: by checkpoint name without prefix: ``wte.weight`` [vocab_size, n_embd], ``h.0.attn.c_attn.weight``
            [n_embd, 3 * n_embd] as ``Conv1D`` stores it, ..., and, if logits are wanted, ``lm_head.weight``
            [vocab_size, n_embd]. All of one dtype and device. The plan keeps views: a change of the tensors in place is
            seen by the eager executor, not by one that has packed them.
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
    wte = weights["wte.weight"]
    for name, tensor in weights.items():
        if tensor.dtype != wte.dtype or tensor.device != wte.device:
            raise ValueError(
                f"{name} is {tensor.dtype} on {tensor.device}, but wte.weight is {wte.dtype} on {wte.device}; "
                "move the whole model to one dtype and device with model.to(...)"
            )

    def norm(prefix: str) -> Norm:
        return Norm(weights[f"{prefix}.weight"], weights[f"{prefix}.bias"], config.layer_norm_epsilon)

    def conv1d(prefix: str) -> Linear:
        return Linear(weights[f"{prefix}.weight"].t(), weights[f"{prefix}.bias"])

    head_dim = config.n_embd // config.n_head
    nodes: list[Node] = [Embed(wte, weights["wpe.weight"])]
    for layer in range(config.n_layer):
        block = f"h.{layer}"
        nodes += [
            NormQKV(layer, norm(f"{block}.ln_1"), conv1d(f"{block}.attn.c_attn")),
            Attention(layer, config.n_head, head_dim, attention_scale(config, layer)),
            LinearResidual(conv1d(f"{block}.attn.c_proj")),
            NormLinearAct(norm(f"{block}.ln_2"), conv1d(f"{block}.mlp.c_fc"), config.activation_function, activation),
            LinearResidual(conv1d(f"{block}.mlp.c_proj")),
        ]
    lm_head = weights.get("lm_head.weight")
    nodes.append(Head(norm("ln_f"), None if lm_head is None else Linear(lm_head, None)))
    return Plan(
        nodes=tuple(nodes),
        n_layer=config.n_layer,
        n_head=config.n_head,
        head_dim=head_dim,
        n_embd=config.n_embd,
        vocab_size=(wte if lm_head is None else lm_head).size(0),
        n_positions=config.n_positions,
        dtype=wte.dtype,
        device=wte.device,
    )
