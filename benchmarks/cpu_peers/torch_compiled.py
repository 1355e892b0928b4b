"""What torch itself can do: a bare GPT-2 with a cache of fixed size, ``torch.compile`` with frozen weights.

float32, bfloat16, and int8 weights of torchao (``pip install torchao``; measured with 0.18.0 and torch 2.13.0). No
generation library stands between: a step is one call of a compiled function that ends in argmax. Inductor needs a C++
compiler and half a minute for each shape that is new to it; that is counted as loading.
"""

from __future__ import annotations

import math
import pathlib
import time

from .weights import read_checkpoint

REQUIRES = {"torch": "torch"}
OPTION_REQUIRES = {"int8": {"torchao": "torchao"}}


def _modules():
    """The model's classes; in a function, since this file is imported where there is no torch."""
    import torch
    from torch import nn
    from torch.nn import functional

    class Block(nn.Module):
        def __init__(self, width: int, heads: int, eps: float) -> None:
            super().__init__()
            self.heads = heads
            self.ln_1, self.ln_2 = nn.LayerNorm(width, eps), nn.LayerNorm(width, eps)
            self.c_attn, self.c_proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
            self.c_fc, self.c_out = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

        def forward(self, x, keys, values, position, mask):
            batch, length, width = x.shape
            qkv = self.c_attn(self.ln_1(x)).view(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
            query, key, value = qkv[0], qkv[1], qkv[2]
            keys.index_copy_(2, position, key)
            values.index_copy_(2, position, value)
            if length == 1:
                y = functional.scaled_dot_product_attention(query, keys, values, attn_mask=mask)
            else:
                y = functional.scaled_dot_product_attention(query, key, value, is_causal=True)
            x = x + self.c_proj(y.transpose(1, 2).reshape(batch, length, width))
            return x + self.c_out(functional.gelu(self.c_fc(self.ln_2(x)), approximate="tanh"))

    class Model(nn.Module):
        def __init__(self, config: dict) -> None:
            super().__init__()
            width, eps = config["n_embd"], config.get("layer_norm_epsilon", 1e-5)
            self.wte, self.wpe = nn.Embedding(config["vocab_size"], width), nn.Embedding(config["n_positions"], width)
            self.blocks = nn.ModuleList(Block(width, config["n_head"], eps) for _ in range(config["n_layer"]))
            self.ln_f = nn.LayerNorm(width, eps)
            self.head = nn.Linear(width, config["vocab_size"], bias=False)

        def forward(self, ids, position, cache):
            x = self.wte(ids) + self.wpe(position)
            mask = (torch.arange(cache[0][0].shape[2]) <= position[-1])[None, None, None]
            for block, (keys, values) in zip(self.blocks, cache, strict=True):
                x = block(x, keys, values, position, mask)
            return self.head(self.ln_f(x[:, -1])).argmax(-1, keepdim=True)

    return Model


def _load(checkpoint: str):
    import torch

    source = read_checkpoint(checkpoint)
    with torch.device("meta"):
        model = _modules()(source.config)
    names = {"attn.c_attn": "c_attn", "attn.c_proj": "c_proj", "mlp.c_fc": "c_fc", "mlp.c_proj": "c_out"}
    state = {"head.weight": source["wte.weight"]}
    for name in ("wte.weight", "wpe.weight", "ln_f.weight", "ln_f.bias"):
        state[name] = source[name]
    for layer in range(source.config["n_layer"]):
        for norm in ("ln_1", "ln_2"):
            for part in ("weight", "bias"):
                state[f"blocks.{layer}.{norm}.{part}"] = source[f"h.{layer}.{norm}.{part}"]
        for name, ours in names.items():
            weight, bias = source.linear(f"h.{layer}.{name}")
            state[f"blocks.{layer}.{ours}.weight"], state[f"blocks.{layer}.{ours}.bias"] = weight, bias
    model.load_state_dict({name: torch.tensor(value) for name, value in state.items()}, assign=True)
    return source.config, model.eval()


class Runner:
    """A loaded model; ``generate`` answers (tokens of each row, seconds from the start to each token)."""

    def __init__(self, checkpoint: str, converted: pathlib.Path, options: dict) -> None:
        import torch
        import torch._inductor.config as inductor

        torch.set_num_threads(options["threads"])
        inductor.freezing = True
        self.config, self.model = _load(checkpoint)
        self.dtype = getattr(torch, options["dtype"])
        self.model.to(self.dtype)
        if options.get("int8"):
            from torchao.quantization import Int8WeightOnlyConfig, quantize_

            quantize_(self.model, Int8WeightOnlyConfig())
        # one compiled graph for each shape; a shape is compiled when it is first asked for
        self.step = torch.compile(self.model, mode="max-autotune-no-cudagraphs", dynamic=False)
        torch._dynamo.config.cache_size_limit = 64

    def generate(self, prompts: list[list[int]], new_tokens: int) -> tuple[list[list[int]], list[float]]:
        import torch

        ids = torch.tensor(prompts)
        num_rows, length = ids.shape
        config = self.config
        # whole multiples, so that runs of nearly equal length share a graph
        room = math.ceil((length + new_tokens) / 128) * 128
        head_dim = config["n_embd"] // config["n_head"]
        times, steps = [], []
        with torch.no_grad():
            start = time.perf_counter()
            # tensors of their own: Inductor copies a whole cache of which a layer writes a part
            size = (num_rows, config["n_head"], room, head_dim)
            cache = [
                (torch.zeros(size, dtype=self.dtype), torch.zeros(size, dtype=self.dtype))
                for _ in range(config["n_layer"])
            ]
            position = torch.arange(length)
            for number in range(new_tokens):
                ids = self.step(ids, position, cache)
                steps.append(ids[:, 0].tolist())
                times.append(time.perf_counter() - start)
                position = torch.tensor([length + number])
        return [list(row) for row in zip(*steps, strict=True)], times
