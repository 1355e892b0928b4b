"""Calls of ``generate`` that together need every kernel there is to choose tokens, for ``gpt2rt warmup``."""

from __future__ import annotations

import contextlib
import itertools
from typing import Any

import torch

from gpt2rt.errors import RequestError

_PROMPT, _NEW = 4, 3
_FILTERS: dict[str, Any] = {"temperature": 0.8, "top_k": 5, "top_p": 0.9, "min_p": 0.1}

#: what brings kernels of its own: filters are compiled in combination; processors change scores on their way, and some
#: exclude tokens
_WAYS: tuple[dict[str, Any], ...] = (
    {"do_sample": False},
    {"do_sample": False, "repetition_penalty": 1.1},
    {"do_sample": True, "top_k": 0, "repetition_penalty": 1.1},
    {"do_sample": False, "no_repeat_ngram_size": 2},
    {"do_sample": True, "top_k": 0, "no_repeat_ngram_size": 2},
    *(
        {"do_sample": True, "top_k": 0, **dict(chosen)}
        for count in range(len(_FILTERS) + 1)
        for chosen in itertools.combinations(_FILTERS.items(), count)
    ),
)


def run_each_way(model: Any, kv_cache_dtype: str) -> None:
    """Generate some tokens in each way; steps of every size are the executor's own ``warm_up``.

    Args:
        model: a language model.
        kv_cache_dtype: as ``generate`` takes it.
    """
    length = max(1, min(_PROMPT, model.config.n_positions - _NEW))
    # a row's logits lie otherwise in memory than several rows', which triton compiles by
    for rows, way in itertools.product((1, 2), _WAYS):
        ids = torch.zeros((rows, length), dtype=torch.int64, device=model.device)
        # a model whose own settings do not go with these does not take them from callers either
        with contextlib.suppress(RequestError):
            model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=_NEW,
                seed=0,
                kv_cache_dtype=kv_cache_dtype,
                **way,
            )
