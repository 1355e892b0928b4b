"""What gpt2rt is measured against: torch's own kernels in a graph, and transformers as people run it."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .models import MODELS

COMPILED = "transformers static + compile"
#: name -> settings of a transformers model and of its generate
TRANSFORMERS_MODES: dict[str, tuple[str, dict[str, Any]]] = {
    "transformers eager": ("eager", {}),
    "transformers sdpa": ("sdpa", {}),
    COMPILED: ("sdpa", {"cache_implementation": "static"}),
}
#: what stands beside quantised rows instead of quantised peers
NO_QUANTISED_PEERS = (
    "transformers quantises with bitsandbytes, torchao, gptqmodel and other packages that are not part of it, and this "
    "run installs none: its times and those of torch's chain beside quantised rows are of float16 models, and say so"
)


def note_quantised_peers(session: Any) -> None:
    """A row that says why quantised rows have peers in float16."""
    session.note("quantised peers of whole models", NO_QUANTISED_PEERS)


class TorchStep:
    """A step by torch's kernels: layer_norm, addmm, scaled_dot_product_attention over keys and values in one piece.

    Args:
        model: whose weights; not quantised.
        num_seqs: sequences.
        num_tokens: new tokens of each.
        context: tokens of each after the step. With more than one new token they are the whole context.
    """

    def __init__(self, model: Any, num_seqs: int, num_tokens: int, context: int) -> None:
        config, weight = model.config, model.transformer.wte.weight
        self.model, self.heads = model, config.n_head
        shape = num_seqs, config.n_head, context, config.n_embd // config.n_head
        self.caches = [
            [torch.randn(shape, device=weight.device).to(weight.dtype) for _ in range(2)] for _ in range(config.n_layer)
        ]
        self.first, self.last = context - num_tokens, context
        self.ids = torch.randint(0, config.vocab_size, (num_seqs, num_tokens), device=weight.device)
        self.positions = torch.arange(self.first, self.last, device=weight.device)

    @torch.no_grad()
    def __call__(self, _: int = 0) -> Tensor:
        body = self.model.transformer
        x = F.embedding(self.ids, body.wte.weight) + F.embedding(self.positions, body.wpe.weight)
        batch, length, width = x.shape

        def norm(module: Any, rows: Tensor) -> Tensor:
            return F.layer_norm(rows, (width,), module.weight, module.bias, module.eps)

        def product(module: Any, rows: Tensor) -> Tensor:
            return torch.addmm(module.bias, rows.flatten(0, 1), module.weight).unflatten(0, (batch, length))

        for block, (keys, values) in zip(body.h, self.caches, strict=True):
            qkv = product(block.attn.c_attn, norm(block.ln_1, x))
            q, k, v = (part.unflatten(2, (self.heads, -1)).transpose(1, 2) for part in qkv.chunk(3, dim=2))
            keys[:, :, self.first : self.last] = k
            values[:, :, self.first : self.last] = v
            y = F.scaled_dot_product_attention(q, keys, values, is_causal=length > 1)
            x = x + product(block.attn.c_proj, y.transpose(1, 2).flatten(2))
            y = F.gelu(product(block.mlp.c_fc, norm(block.ln_2, x)), approximate="tanh")
            x = x + product(block.mlp.c_proj, y)
        logits = F.linear(norm(body.ln_f, x[:, -1]), body.wte.weight)
        return logits.argmax(dim=-1)


def transformers_model(name: str, dtype: torch.dtype, device: torch.device, attention: str) -> Any:
    """A random model of transformers of one of :data:`MODELS`."""
    import transformers

    transformers.logging.set_verbosity_error()
    config = transformers.GPT2Config(
        **{**MODELS[name], "bos_token_id": 0, "eos_token_id": None}, attn_implementation=attention
    )
    torch.manual_seed(0)
    with torch.device(device):
        model = transformers.GPT2LMHeadModel(config)
    return model.to(dtype=dtype, device=device).eval()


def generate_us(
    model: Any, ids: Tensor, new_tokens: int, rounds: int, wait: Callable[[], None], warm: int = 1, **options: Any
) -> tuple[list[float], list[float]]:
    """Times by the clock of greedy generation as a user calls it, microseconds.

    Args:
        model: of gpt2rt or transformers.
        ids: [1, prompt] int64.
        new_tokens: 1 measures the first token alone.
        rounds: that are measured; 0 measures the first call of all.
        wait: until the device is done.
        warm: rounds before, which compile and warm up.
        options: of ``generate``.

    Returns:
        (to the first token, a token after the first) for each round; the second is empty with one new token.
    """
    first, each = [], []
    for number in range(rounds + warm if rounds else 1):
        spans = []
        for count in dict.fromkeys((1, new_tokens)):
            wait()
            start = time.perf_counter()
            with torch.no_grad():
                model.generate(ids, max_new_tokens=count, do_sample=False, pad_token_id=0, **options)
            wait()
            spans.append((time.perf_counter() - start) * 1e6)
        if number >= warm or not rounds:
            first.append(spans[0])
            each += [(span - spans[0]) / (new_tokens - 1) for span in spans[1:]]
    return first, each
