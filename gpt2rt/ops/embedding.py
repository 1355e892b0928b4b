"""Token and position embeddings, gathered and added in one pass."""

from __future__ import annotations

import torch
from torch import Tensor

from gpt2rt.kernels import refs

from ._checks import check_index, check_like, check_storage_dtype
from ._library import define


def _embedding_fake(input_ids: Tensor, position_ids: Tensor, wte: Tensor, wpe: Tensor) -> Tensor:
    return torch.empty((input_ids.size(0), wte.size(1)), dtype=wte.dtype, device=wte.device)


_embedding = define(
    "embedding",
    "(Tensor input_ids, Tensor position_ids, Tensor wte, Tensor wpe) -> Tensor",
    reference=refs.embedding_ref,
    triton="embedding:embedding_triton",
    fake=_embedding_fake,
)


def embedding(input_ids: Tensor, position_ids: Tensor, wte: Tensor, wpe: Tensor) -> Tensor:
    """``wte[input_ids] + wpe[position_ids]``; Radford et al., "Language Models are Unsupervised Multitask Learners".

    Args:
        input_ids: [num_tokens], int64, each in [0, vocab_size).
        position_ids: [num_tokens], int64, each in [0, n_positions).
        wte: [vocab_size, n_embd], float32, float16 or bfloat16, contiguous.
        wpe: [n_positions, n_embd], likewise.

    Returns:
        [num_tokens, n_embd] in the dtype of ``wte``; added in float32.

    Raises:
        ValueError, TypeError: a shape, dtype, stride or device does not fit.
        IndexError: an id lies outside its table (CPU; on CUDA its row is NaN instead, for a check would wait for the
            device).
    """
    check_storage_dtype("embedding", "wte", wte)
    if wte.dim() != 2 or not wte.is_contiguous():
        raise ValueError(f"embedding: wte must be a contiguous [vocab_size, n_embd], got shape {list(wte.shape)}")
    if wpe.dim() != 2:
        raise ValueError(f"embedding: wpe must be a contiguous [n_positions, n_embd], got shape {list(wpe.shape)}")
    check_like("embedding", "wpe", wpe, (wpe.size(0), wte.size(1)), wte)
    if not wpe.is_contiguous():
        raise ValueError("embedding: wpe must be contiguous; call .contiguous()")
    if input_ids.dim() != 1:
        raise ValueError(f"embedding: input_ids must be [num_tokens], got {list(input_ids.shape)}; flatten them")
    check_index("embedding", "input_ids", input_ids, tuple(input_ids.shape), torch.int64, wte)
    check_index("embedding", "position_ids", position_ids, tuple(input_ids.shape), torch.int64, wte)
    return _embedding(input_ids, position_ids, wte, wpe)
