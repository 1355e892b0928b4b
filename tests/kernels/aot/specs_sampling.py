"""Sampling, penalties and log-probabilities for the ahead-of-time check, see specs.py.

Rows of GPT-2's vocabulary are not a multiple of 16 bytes long, so their loads are narrow; a warp still reads 128
neighbouring bytes at a time.
"""

import torch
from spec import Spec
from torch import Tensor

from gpt2rt.kernels.log_probabilities import log_probabilities_into_triton
from gpt2rt.kernels.penalties import count_tokens_triton, penalties_into_triton, reset_counts_triton
from gpt2rt.kernels.sampling import argmax_triton, sample_into_triton, sampling_weights_triton, select_workspace
from gpt2rt.kernels.uniforms import uniforms_into_triton

R, V = 4, 50257


def _empty(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


SCORES = _empty(R, V, dtype=torch.float32)
NUMBERS = _empty(R, dtype=torch.float64)
IDS = _empty(R, dtype=torch.int64)


def _sample(name: str, num_launches: int, **settings: Tensor) -> Spec:
    work = select_workspace(R, V, "meta")
    return Spec(
        f"sample {name}", lambda: sample_into_triton(SCORES, NUMBERS, IDS, work, **settings), (0,) * num_launches
    )


def _penalties() -> None:
    counts = _empty(8, V, dtype=torch.int32)
    penalties_into_triton(SCORES, counts, IDS, SCORES, repetition=NUMBERS, frequency=NUMBERS, presence=NUMBERS)
    count_tokens_triton(counts, IDS, IDS)
    reset_counts_triton(counts, IDS, _empty(900, dtype=torch.int64), _empty(R + 1, dtype=torch.int64), IDS, 700)


def _log_probabilities(k: int) -> Spec:
    best, best_ids = _empty(R, k, dtype=torch.float32), _empty(R, k, dtype=torch.int64)
    chosen, work = _empty(R, dtype=torch.float32), select_workspace(R, V, "meta")
    return Spec(
        f"log_probabilities k={k}",
        lambda: log_probabilities_into_triton(SCORES, IDS, chosen, IDS, best, best_ids, work),
        (0,) * (4 if k else 3),
    )


SPECS = [
    Spec("argmax", lambda: argmax_triton(SCORES, True), (0, 0)),
    Spec("sampling_weights", lambda: sampling_weights_triton(SCORES), (0, 0)),
    _sample("plain", 3),
    _sample("temperature", 3, temperature=NUMBERS),
    _sample("top_p", 4, top_p=NUMBERS),
    _sample("all filters", 4, temperature=NUMBERS, top_k=IDS, top_p=NUMBERS, min_p=NUMBERS),
    Spec("uniforms", lambda: uniforms_into_triton(IDS, IDS, IDS, IDS, NUMBERS, advance=1), (0,)),
    # counts are whole rows of zeros, and read beside the scores
    Spec("penalties", _penalties, (0, 0, 0, 0)),
    _log_probabilities(20),
]
