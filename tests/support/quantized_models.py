"""Quantised models to test with, and what their numbers are, restated without the code under test."""

import math

import numpy as np
import torch

#: a quantised model of each kind: name -> what from_pretrained takes as ``quantization``
FORMATS = {
    "int8": "int8",
    "int8-exact": {"scheme": "int8", "activations": "float32"},
    "int4": "int4",
    "int4-g32-zeros": {"scheme": "int4", "group_size": 32, "symmetric": False, "embeddings": "int4"},
    "int4-g128-exact": {"scheme": "int4", "group_size": 128, "activations": "float32", "embeddings": "float16"},
    "nf4": "nf4",
    "nf4-double": {"scheme": "nf4", "double_quant": True, "embeddings": "none"},
    "fp4": {"scheme": "fp4", "group_size": 128, "embeddings": "bfloat16"},
}
#: those whose products multiply float activations
EXACT = ("int8-exact", "int4-g128-exact", "nf4", "nf4-double", "fp4")


def numbers(weight):
    """[N, K] float64 of a QuantizedWeight."""
    rows, columns = weight.shape
    codes = weight.codes.numpy()
    if weight.scheme == "int8":
        return codes.astype(np.float64) * weight.scales.numpy().astype(np.float64)[:, None]
    flat = np.empty((rows, 2 * codes.shape[1]), dtype=np.int64)
    flat[:, 0::2], flat[:, 1::2] = codes // 16, codes % 16
    flat = flat[:, :columns]
    group = np.arange(columns) // weight.group_size
    scales = weight.scales.numpy().astype(np.float64)[:, group]
    if weight.scheme == "int4":
        zeros = 8 if weight.zeros is None else weight.zeros.numpy().astype(np.int64)[:, group]
        return (flat - zeros) * scales
    return weight.codebook.numpy().astype(np.float64)[flat] * scales


def product(x, weight, bias):
    """``x @ w.T + bias`` [rows, N] float64 by the definition, with int8 activations where the weight says so.

    Args:
        x: [rows, K] float32.
        weight: a QuantizedWeight.
        bias: [N], or None.
    """
    w, values = numbers(weight), x.numpy().astype(np.float32)
    if weight.activations == "int8":
        size = 64 if weight.scheme == "int8" else weight.group_size
        rounded = np.zeros_like(values, dtype=np.float64)
        for begin in range(0, values.shape[1], size):
            part = values[:, begin : begin + size]
            for row, elements in enumerate(part):
                largest = np.abs(elements).max()
                if largest > 0:
                    codes = np.rint(elements * np.float32(np.float32(127) / largest))
                    rounded[row, begin : begin + size] = codes * np.float64(np.float32(largest / np.float32(127)))
        values = rounded
    y = values.astype(np.float64) @ w.T
    return torch.from_numpy(y if bias is None else y + bias.detach().double().numpy())


def layer_norm(x, module):
    mean, variance = x.mean(-1, keepdim=True), x.var(-1, keepdim=True, unbiased=False)
    return (x - mean) / torch.sqrt(variance + module.eps) * module.weight.double() + module.bias.double()


def plain_logits(model, ids):
    """The logits [batch, seq_len, vocab_size] of a language model of either family with float layers, in float64."""
    trunk, config = model.transformer, model.config
    is_gpt2 = hasattr(trunk, "wte")
    tokens, places = (trunk.wte, trunk.wpe) if is_gpt2 else (trunk.tokens_embed, trunk.positions_embed)
    table = tokens.weight.double()
    x = table[ids] + places.weight.double()[: ids.size(1)]

    def conv1d(x, layer):
        return x @ layer.weight.double() + layer.bias.double()

    def attention(x, block):
        heads = conv1d(x, block.attn.c_attn).unflatten(-1, (3, config.n_head, -1)).permute(2, 0, 3, 1, 4)
        scores = heads[0] @ heads[1].transpose(-1, -2) / math.sqrt(heads.size(-1))
        hidden = torch.triu(torch.ones(ids.size(1), ids.size(1), dtype=torch.bool), 1)
        probs = scores.masked_fill(hidden, -torch.inf).softmax(-1)
        return conv1d((probs @ heads[2]).transpose(1, 2).flatten(2), block.attn.c_proj)

    def mlp(x, block):
        u = conv1d(x, block.mlp.c_fc)
        u = 0.5 * u * (1 + torch.tanh(math.sqrt(2 / math.pi) * (u + 0.044715 * u**3)))
        return conv1d(u, block.mlp.c_proj)

    for block in trunk.h:
        if is_gpt2:
            x = x + attention(layer_norm(x, block.ln_1), block)
            x = x + mlp(layer_norm(x, block.ln_2), block)
        else:
            x = layer_norm(x + attention(x, block), block.ln_1)
            x = layer_norm(x + mlp(x, block), block.ln_2)
    if is_gpt2:
        x = layer_norm(x, trunk.ln_f)
    return x @ model.lm_head.weight.double().T


def greedy(model, ids, count):
    """[1, length + count]: the likeliest tokens, by forward calls without a cache."""
    for _ in range(count):
        with torch.no_grad():
            ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], dim=1)
    return ids


# ---- files in AutoGPTQ's layout --------------------------------------------------------------------------------------


def pack_int32(values, axis):
    """4-bit numbers, eight of them along ``axis`` in each int32, the first in the lowest bits."""
    values = np.moveaxis(np.asarray(values, dtype=np.uint64), axis, 0)
    words = np.zeros((values.shape[0] // 8, *values.shape[1:]), dtype=np.uint64)
    for place in range(8):
        words |= values[place::8] << np.uint64(4 * place)
    words = np.moveaxis(words.astype(np.uint32).view(np.int32), 0, axis)
    return torch.from_numpy(np.ascontiguousarray(words))


def gptq_layer(rng, inputs, outputs, group_size, *, zero_offset=1, order=None, symmetric=False):
    """The tensors of one layer with random numbers, and the matrix [inputs, outputs] float32 that they mean.

    Args:
        rng: a numpy generator.
        inputs, outputs: of the layer.
        group_size: -1 for one group.
        zero_offset: 1 for "gptq", 0 for "gptq_v2".
        order: [inputs], the group of each input; None: in order.
        symmetric: all zero points are 8.
    """
    size = inputs if group_size == -1 else group_size
    groups = -(-inputs // size)
    index = np.arange(inputs) // size if order is None else order
    codes = rng.integers(0, 16, (inputs, outputs))
    # "gptq" cannot tell a zero point of 0 from one of 16
    zeros = np.full((groups, outputs), 8) if symmetric else rng.integers(zero_offset, 16, (groups, outputs))
    scales = rng.uniform(0.01, 0.05, (groups, outputs)).astype(np.float16)
    matrix = (codes - zeros[index]).astype(np.float32) * scales[index].astype(np.float32)
    tensors = {
        "qweight": pack_int32(codes, 0),
        "qzeros": pack_int32(zeros - zero_offset, 1),
        "scales": torch.from_numpy(scales),
        "g_idx": torch.from_numpy(index.astype(np.int32)),
    }
    return tensors, torch.from_numpy(matrix)
