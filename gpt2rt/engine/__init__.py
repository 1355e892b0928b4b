"""Many requests at once: scheduler, prefix cache, and the two ways in, :class:`LLM` and :class:`AsyncLLM`."""

from .async_llm import AsyncLLM
from .config import EngineConfig
from .llm import LLM
from .outputs import (
    ClassificationRequestOutput,
    CompletionOutput,
    EmbeddingRequestOutput,
    Logprob,
    PoolingRequestOutput,
    RequestMetrics,
    RequestOutput,
    ScoringRequestOutput,
)
from .params import PoolingParams, RequestLimits, RequestOutputKind, SamplingParams
from .stats import EngineStats, FinishedRequest, IterationStats

__all__ = [
    "LLM",
    "AsyncLLM",
    "ClassificationRequestOutput",
    "CompletionOutput",
    "EmbeddingRequestOutput",
    "EngineConfig",
    "EngineStats",
    "FinishedRequest",
    "IterationStats",
    "Logprob",
    "PoolingParams",
    "PoolingRequestOutput",
    "RequestLimits",
    "RequestMetrics",
    "RequestOutput",
    "RequestOutputKind",
    "SamplingParams",
    "ScoringRequestOutput",
]
