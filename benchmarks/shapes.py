"""The shapes that are measured, random checkpoints of them, and what a token must read."""

from __future__ import annotations

SHAPES = {
    "124M": dict(n_layer=12, n_embd=768, n_head=12, vocab_size=50257, n_positions=1024),
    "355M": dict(n_layer=24, n_embd=1024, n_head=16, vocab_size=50257, n_positions=1024),
    "1.5B": dict(n_layer=48, n_embd=1600, n_head=25, vocab_size=50257, n_positions=1024),
    "overhead": dict(n_layer=12, n_embd=32, n_head=2, vocab_size=97, n_positions=1024, bos_token_id=0, eos_token_id=0),
    "tiny": dict(n_layer=2, n_embd=64, n_head=2, vocab_size=97, n_positions=256, bos_token_id=0, eos_token_id=0),
}


def random_checkpoint(shape: dict, folder: str) -> None:
    """Save a float32 model of this shape, the same each time."""
    import torch

    from gpt2rt import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    # one file: the converters read model.safetensors
    GPT2LMHeadModel(GPT2Config(**shape)).save_pretrained(folder, max_shard_size="20GB")


def weight_counts(shape: dict) -> tuple[int, int]:
    """Matrix weights that one step reads: those of the layers, and those of the head."""
    return 12 * shape["n_layer"] * shape["n_embd"] ** 2, shape["vocab_size"] * shape["n_embd"]


def step_bytes(shape: dict, bits: tuple[float, float]) -> int:
    """Bytes of weights that one step reads; ``bits`` per weight of the layers and of the head."""
    body, head = weight_counts(shape)
    return round((body * bits[0] + head * bits[1]) / 8)


def prefill_operations(shape: dict, num_tokens: int) -> int:
    """Multiplications and additions of reading a prompt: layers, causal attention, the head for the last token."""
    body, head = weight_counts(shape)
    attention = 2 * shape["n_layer"] * shape["n_embd"] * num_tokens * (num_tokens + 1)
    return 2 * body * num_tokens + attention + 2 * head
