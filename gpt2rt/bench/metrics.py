"""What is measured of each request, and what is made of it.

Names and definitions are those of vLLM's serving benchmark (its documentation, "Benchmark CLI"). Times are seen from
the client, from the moment at which a request is sent:

    TTFT, time to first token:       until the first chunk that holds a choice arrives
    E2EL, end-to-end latency:        until the last one arrives
    ITL, inter-token latency:        between one chunk and the next of the same request; all gaps of all requests are
                                     one sample (a server that puts several tokens into a chunk has fewer, longer gaps)
    TPOT, time per output token:     (E2EL - TTFT) / (output tokens - 1), one value a request of at least two tokens
    request throughput:              completed requests / duration of the run
    output (total) token throughput: output (prompt and output) tokens of completed requests / duration
    goodput:                         completed requests that keep all given limits / duration

Standard deviations are those of a population, percentiles are interpolated linearly (numpy's defaults, as in vLLM).
A failed request counts in ``failed`` only. Where there is nothing to take a mean of, the value is None.
"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

METRICS = {
    "ttft": "Time to first token",
    "tpot": "Time per output token, without the first",
    "itl": "Inter-token latency",
    "e2el": "End-to-end latency",
}
GOODPUT_METRICS = ("ttft", "tpot", "e2el")


@dataclasses.dataclass(slots=True)
class Answer:
    """What became of one request.

    Attributes:
        prompt_len, output_len: tokens.
        start: when it was sent, on any clock that all answers of a run share, in seconds.
        ttft, latency: seconds from ``start`` to the first and to the last chunk.
        itl: seconds between chunks.
        text: what was generated.
        error: why it failed; empty if it did not.
    """

    prompt_len: int
    start: float
    output_len: int = 0
    ttft: float = 0.0
    itl: list[float] = dataclasses.field(default_factory=list)
    latency: float = 0.0
    text: str = ""
    error: str = ""

    @property
    def tpot(self) -> float | None:
        """Seconds a token after the first; None for a single token."""
        return (self.latency - self.ttft) / (self.output_len - 1) if self.output_len > 1 else None

    def values(self, metric: str) -> list[float]:
        """The request's samples of a metric, in seconds."""
        if metric == "itl":
            return self.itl
        value = {"ttft": self.ttft, "tpot": self.tpot, "e2el": self.latency}[metric]
        return [] if value is None else [value]

    def keeps(self, limits: Mapping[str, float]) -> bool:
        """Whether every metric is at most its limit, given in milliseconds; a single token keeps any TPOT."""
        return all(1e3 * value <= limit for metric, limit in limits.items() for value in self.values(metric))


def percentile_name(percent: float) -> str:
    """``p99``, ``p99.9``."""
    return f"p{percent:g}"


def statistics_ms(seconds: Sequence[float], percentiles: Iterable[float]) -> dict[str, float | None]:
    """``mean``, ``median``, ``std`` and the percentiles of samples in seconds, in milliseconds."""
    import numpy as np

    names = ["mean", "median", "std", *map(percentile_name, percentiles)]
    if not seconds:
        return dict.fromkeys(names)
    values = 1e3 * np.asarray(seconds)
    found = [values.mean(), np.median(values), values.std(), *(np.percentile(values, p) for p in percentiles)]
    return {name: float(value) for name, value in zip(names, found, strict=True)}


def summarize(
    answers: Sequence[Answer],
    duration: float,
    *,
    metrics: Sequence[str] = ("ttft", "tpot", "itl"),
    percentiles: Sequence[float] = (99.0,),
    goodput: Mapping[str, float] | None = None,
) -> dict[str, Any]:
    """The metrics of a run under vLLM's keys: ``mean_ttft_ms``, ``p99_itl_ms``, ``output_throughput``, ...

    Args:
        answers: one for each request.
        duration: seconds from sending the first request until the last one was answered.
        metrics: which of METRICS to report.
        percentiles: of each of them, 0 to 100.
        goodput: limits in milliseconds for some of GOODPUT_METRICS.
    """
    done = [answer for answer in answers if not answer.error]
    output_tokens = sum(answer.output_len for answer in done)
    input_tokens = sum(answer.prompt_len for answer in done)
    result: dict[str, Any] = {
        "duration": duration,
        "completed": len(done),
        "failed": len(answers) - len(done),
        "total_input_tokens": input_tokens,
        "total_output_tokens": output_tokens,
        "request_throughput": len(done) / duration,
        "request_goodput": sum(answer.keeps(goodput) for answer in done) / duration if goodput else None,
        "output_throughput": output_tokens / duration,
        "total_token_throughput": (input_tokens + output_tokens) / duration,
        "max_output_tokens_per_s": peak_tokens_per_second(done),
        "max_concurrent_requests": peak_concurrency(done),
    }
    for metric in metrics:
        samples = [value for answer in done for value in answer.values(metric)]
        for name, value in statistics_ms(samples, percentiles).items():
            result[f"{name}_{metric}_ms"] = value
    return result


def details(answers: Sequence[Answer]) -> dict[str, list[Any]]:
    """What was measured of every single request, under vLLM's keys; seconds."""
    return {
        "input_lens": [answer.prompt_len for answer in answers],
        "output_lens": [answer.output_len for answer in answers],
        "ttfts": [answer.ttft for answer in answers],
        "itls": [answer.itl for answer in answers],
        "start_times": [answer.start for answer in answers],
        "generated_texts": [answer.text for answer in answers],
        "errors": [answer.error for answer in answers],
    }


def peak_tokens_per_second(answers: Sequence[Answer]) -> float:
    """Most chunks that arrived within one of the run's seconds, counted from the first request."""
    if not answers:
        return 0.0
    begin = min(answer.start for answer in answers)
    seconds: Counter[int] = Counter()
    for answer in answers:
        moment = answer.start - begin + answer.ttft
        seconds[int(moment)] += 1
        for gap in answer.itl:
            moment += gap
            seconds[int(moment)] += 1
    return float(max(seconds.values()))


def peak_concurrency(answers: Sequence[Answer]) -> int:
    """Most requests that were under way at one moment."""
    # where one ends as another begins, the end comes first
    events = sorted([(a.start, 1) for a in answers] + [(a.start + a.latency, -1) for a in answers])
    running = peak = 0
    for _, change in events:
        running += change
        peak = max(peak, running)
    return peak


def parse_metrics(text: str) -> list[str]:
    """``"ttft,tpot"`` as a list.

    Raises:
        ValueError: there is no metric of that name.
    """
    names = [part.strip() for part in text.split(",") if part.strip()]
    for name in names:
        if name not in METRICS:
            raise ValueError(f"there is no metric {name!r}; choose of {', '.join(METRICS)}")
    return names


def parse_percentiles(text: str) -> list[float]:
    """``"50,99.9"`` as a list.

    Raises:
        ValueError: one is no number between 0 and 100.
    """
    found = []
    for part in text.split(","):
        try:
            value = float(part)
        except ValueError:
            value = math.nan
        if not 0.0 <= value <= 100.0:
            raise ValueError(f"expected numbers from 0 to 100 with commas between them, such as 50,99.9, got {text!r}")
        found.append(value)
    return found


def parse_goodput(settings: Iterable[str]) -> dict[str, float]:
    """``["ttft:200", "e2el:3000"]`` as limits in milliseconds.

    Raises:
        ValueError: one is not METRIC:MILLISECONDS.
    """
    limits = {}
    for setting in settings:
        name, colon, text = setting.partition(":")
        try:
            limit = float(text)
        except ValueError:
            limit = math.nan
        if name not in GOODPUT_METRICS or not colon or not limit >= 0.0:
            known = ", ".join(GOODPUT_METRICS)
            raise ValueError(
                f"expected METRIC:MILLISECONDS with a metric of {known}, such as ttft:200, got {setting!r}"
            )
        limits[name] = limit
    return limits
