"""What ``/metrics`` shows, with vLLM's names behind ``gpt2rt:``.

The engine's thread adds to plain numbers after each step (:meth:`Metrics.observe`, a few microseconds); the text that
Prometheus reads is made from them when somebody asks.
"""

from __future__ import annotations

import bisect
import threading
from collections.abc import Iterable, Iterator
from typing import Any

from prometheus_client import CollectorRegistry, ProcessCollector
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.exposition import generate_latest
from prometheus_client.registry import Collector

from gpt2rt import ops

#: finished_reason of every request that ends
REASONS = ("stop", "length", "abort", "error")
#: why a request was not taken
REJECTIONS = ("queue_full", "in_flight", "shutting_down")

_TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000)
_TO_FIRST = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80)
_BETWEEN = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5)
_LATENCY = (0.005, 0.01, 0.025, 0.05, 0.1, 0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 600)

_HISTOGRAMS: dict[str, tuple[str, tuple[float, ...]]] = {
    "time_to_first_token_seconds": ("Seconds to the first token of a request.", _TO_FIRST),
    "inter_token_latency_seconds": ("Seconds between tokens.", _BETWEEN),
    "request_time_per_output_token_seconds": ("Mean seconds of a token after the first, per request.", _BETWEEN),
    "e2e_request_latency_seconds": ("Seconds from arrival to the end of a request.", _LATENCY),
    "request_queue_time_seconds": ("Seconds that a request waited.", _LATENCY),
    "request_prefill_time_seconds": ("Seconds from its first step to a request's first token.", _LATENCY),
    "request_decode_time_seconds": ("Seconds from a request's first token to its last.", _LATENCY),
    "request_prompt_tokens": ("Prompt tokens of a request.", _TOKENS),
    "request_generation_tokens": ("New tokens of a request.", _TOKENS),
    "iteration_tokens_total": ("Tokens that a step computed.", _TOKENS),
}
_COUNTERS = {
    "prompt_tokens": "Prompt tokens of requests whose prompts have been computed.",
    "generation_tokens": "New tokens.",
    "prefix_cache_queries": "Prompt tokens that were looked up in the prefix cache.",
    "prefix_cache_hits": "Prompt tokens that it held.",
    "num_preemptions": "Sequences that gave their blocks to others.",
    "corrupted_requests": "Requests whose numbers were not finite.",
}
_GAUGES = {
    "num_requests_running": "Sequences that are being computed.",
    "num_requests_waiting": "Sequences that wait.",
    "kv_cache_usage_perc": "Share of the KV cache's blocks that are in use; 1 is all.",
}


class _Histogram:
    """Counts of values by bounds; a value on a bound belongs below it."""

    __slots__ = ("bounds", "counts", "total")

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.total = 0.0

    def add(self, value: float) -> None:
        self.counts[bisect.bisect_left(self.bounds, value)] += 1
        self.total += value

    def buckets(self) -> list[tuple[str, float]]:
        """Upper bound, and how many values are not above it."""
        found, sums = 0, []
        for bound, count in zip((*self.bounds, float("inf")), self.counts, strict=True):
            found += count
            sums.append(("+Inf" if bound == float("inf") else repr(float(bound)), float(found)))
        return sums


class Metrics(Collector):
    """Counts what an engine does and what a server refuses.

    Args:
        engine: its ``observer`` becomes :meth:`observe`.
        model_name: the label that all numbers bear.
    """

    def __init__(self, engine: Any, model_name: str) -> None:
        self._engine = engine
        self._model = model_name
        self._lock = threading.Lock()
        self._histograms = {name: _Histogram(tuple(map(float, bounds))) for name, (_, bounds) in _HISTOGRAMS.items()}
        self._counters = dict.fromkeys(_COUNTERS, 0)
        self._finished = dict.fromkeys(REASONS, 0)
        self._rejected = dict.fromkeys(REJECTIONS, 0)
        self._registry = CollectorRegistry()
        self._registry.register(self)
        ProcessCollector(registry=self._registry)
        engine.observer = self.observe

    def observe(self, step: Any) -> None:
        """Add an ``IterationStats``; called in the engine's thread."""
        with self._lock:
            counters, histograms = self._counters, self._histograms
            counters["prompt_tokens"] += step.num_prompt_tokens
            counters["generation_tokens"] += step.num_generation_tokens
            counters["prefix_cache_queries"] += step.prefix_cache_queries
            counters["prefix_cache_hits"] += step.prefix_cache_hits
            counters["num_preemptions"] += step.num_preemptions
            counters["corrupted_requests"] += step.corrupted
            if step.num_tokens:
                histograms["iteration_tokens_total"].add(step.num_tokens)
            for value in step.time_to_first_token:
                histograms["time_to_first_token_seconds"].add(value)
            for value in step.inter_token_latency:
                histograms["inter_token_latency_seconds"].add(value)
            for request in step.finished:
                self._finish(request)

    def _finish(self, request: Any) -> None:
        histograms = self._histograms
        self._finished[request.finish_reason] = self._finished.get(request.finish_reason, 0) + 1
        histograms["e2e_request_latency_seconds"].add(request.e2e_latency)
        histograms["request_queue_time_seconds"].add(request.queue_time)
        histograms["request_prefill_time_seconds"].add(request.prefill_time)
        histograms["request_decode_time_seconds"].add(request.decode_time)
        histograms["request_prompt_tokens"].add(request.num_prompt_tokens)
        histograms["request_generation_tokens"].add(request.num_generation_tokens)
        if request.time_per_output_token is not None:
            histograms["request_time_per_output_token_seconds"].add(request.time_per_output_token)

    def reject(self, reason: str) -> None:
        """Count a request that was not taken."""
        with self._lock:
            self._rejected[reason] = self._rejected.get(reason, 0) + 1

    def text(self) -> bytes:
        """All of it in Prometheus' text format."""
        return generate_latest(self._registry)

    def describe(self) -> Iterable[Metric]:
        """Nothing: names need not be known when the collector is registered."""
        return []

    def collect(self) -> Iterator[Metric]:
        """The families of metrics."""
        with self._lock:
            counters = dict(self._counters)
            histograms = {name: (kept.buckets(), kept.total) for name, kept in self._histograms.items()}
            finished, rejected = dict(self._finished), dict(self._rejected)
        stats = self._engine.stats()
        gauges = (stats.num_requests_running, stats.num_requests_waiting, stats.kv_cache_usage)
        labels, values = ["model_name"], [self._model]
        for (name, told), number in zip(_GAUGES.items(), gauges, strict=True):
            gauge = GaugeMetricFamily(f"gpt2rt:{name}", told, labels=labels)
            gauge.add_metric(values, number)
            yield gauge
        for name, told in _COUNTERS.items():
            counter = CounterMetricFamily(f"gpt2rt:{name}", told, labels=labels)
            counter.add_metric(values, counters[name])
            yield counter
        for name, label, told, counts in (
            ("request_success", "finished_reason", "Requests that ended, by why they ended.", finished),
            ("admission_rejections", "reason", "Requests that were not taken.", rejected),
        ):
            counter = CounterMetricFamily(f"gpt2rt:{name}", told, labels=[*labels, label])
            for word, number in counts.items():
                counter.add_metric([*values, word], number)
            yield counter
        for name, (told, _) in _HISTOGRAMS.items():
            buckets, total = histograms[name]
            family = HistogramMetricFamily(f"gpt2rt:{name}", told, labels=labels)
            family.add_metric(values, buckets, total)
            yield family
        yield self._info("cache_config_info", "Sizes of the KV cache.", self._cache())
        yield self._info("kernel_backend_info", "What computes, and in which form.", self._kernels())

    def _cache(self) -> dict[str, str]:
        engine = self._engine
        return {
            "block_size": str(engine.block_size),
            "num_gpu_blocks": str(engine.num_blocks),
            "num_blocks": str(engine.num_blocks),
            "cache_dtype": str(engine.kv_cache_dtype),
            "enable_prefix_caching": str(engine.config.enable_prefix_caching),
        }

    def _kernels(self) -> dict[str, str]:
        status = ops.extension_status()
        return {
            "executor": self._engine.executor_name,
            "cpu_isa": ops.cpu_isa() if status.loaded else "none",
            "extension": "loaded" if status.loaded else "missing",
        }

    def _info(self, name: str, told: str, values: dict[str, str]) -> Metric:
        family = GaugeMetricFamily(f"gpt2rt:{name}", told, labels=["model_name", *values])
        family.add_metric([self._model, *values.values()], 1)
        return family
