"""The numbers of a run: each against its definition, worked out by hand."""

import json
import math

import numpy as np
import pytest

from gpt2rt.bench.metrics import (
    Answer,
    details,
    parse_goodput,
    parse_metrics,
    parse_percentiles,
    peak_concurrency,
    peak_tokens_per_second,
    percentile_name,
    statistics_ms,
    summarize,
)


def answer(start, ttft, itl, *, prompt_len=5, error=""):
    return Answer(
        prompt_len=prompt_len,
        start=start,
        output_len=0 if error else 1 + len(itl),
        ttft=ttft,
        itl=itl,
        latency=ttft + sum(itl),
        error=error,
    )


RUN = [
    answer(10.0, 0.2, [0.1, 0.3]),
    answer(10.5, 0.4, []),
    answer(10.1, 0.0, [], error="status 503"),
    answer(11.0, 0.3, [0.2, 0.2, 0.2, 0.2], prompt_len=3),
]


def test_counts_and_rates():
    result = summarize(RUN, 2.5)
    assert (result["completed"], result["failed"]) == (3, 1)
    assert (result["total_input_tokens"], result["total_output_tokens"]) == (13, 9)
    assert result["request_throughput"] == 3 / 2.5
    assert result["output_throughput"] == 9 / 2.5
    assert result["total_token_throughput"] == 22 / 2.5
    assert result["request_goodput"] is None
    json.dumps(result)


def test_each_metric_over_the_requests_that_have_it():
    result = summarize(RUN, 2.5, metrics=["ttft", "tpot", "itl", "e2el"], percentiles=[50, 99.9])
    expected = {
        "ttft": [200, 400, 300],
        # a single token has no time after it
        "tpot": [(600 - 200) / 2, (1100 - 300) / 4],
        "itl": [100, 300, 200, 200, 200, 200],
        "e2el": [600, 400, 1100],
    }
    for metric, values in expected.items():
        assert result[f"mean_{metric}_ms"] == pytest.approx(np.mean(values))
        assert result[f"median_{metric}_ms"] == pytest.approx(np.median(values))
        assert result[f"std_{metric}_ms"] == pytest.approx(np.std(values), abs=1e-9)
        assert result[f"p50_{metric}_ms"] == pytest.approx(np.median(values))
        assert result[f"p99.9_{metric}_ms"] == pytest.approx(np.percentile(values, 99.9))


def test_only_chosen_metrics_are_reported():
    keys = set(summarize(RUN, 1.0, metrics=["itl"], percentiles=[90]))
    assert {key for key in keys if key.endswith("_ms")} == {"mean_itl_ms", "median_itl_ms", "std_itl_ms", "p90_itl_ms"}


def test_nothing_to_report_is_none_and_not_zero():
    result = summarize([RUN[2]], 1.0)
    assert result["completed"] == 0
    assert result["mean_ttft_ms"] is result["p99_itl_ms"] is None
    assert result["max_concurrent_requests"] == result["max_output_tokens_per_s"] == 0


@pytest.mark.parametrize(
    ("limits", "good"),
    [
        ({"ttft": 250}, 2),
        ({"ttft": 249.9}, 0),
        # the single token has no time after it, and keeps any limit of it
        ({"tpot": 125}, 2),
        ({"tpot": 124.9}, 1),
        ({"e2el": 500}, 2),
        ({"ttft": 250, "e2el": 1000}, 1),
        ({"ttft": 1e9}, 3),
    ],
)
def test_goodput_counts_requests_that_keep_every_limit(limits, good):
    # milliseconds: ttft 250, 500, 250; tpot 125, -, 250; e2el 500, 500, 1250; and a failed one
    run = [answer(10.0, 0.25, [0.125, 0.125]), answer(10.5, 0.5, []), RUN[2], answer(11.0, 0.25, [0.25] * 4)]
    assert summarize(run, 2.0, goodput=limits)["request_goodput"] == good / 2.0


def test_peaks():
    # chunks at 0.2, 0.3, 0.6 | 0.9 | 1.3 1.5 1.7 1.9 2.1 seconds after the first request
    assert peak_tokens_per_second(RUN[:2] + RUN[3:]) == 4.0
    assert peak_concurrency(RUN[:2] + RUN[3:]) == 2
    # one after another
    assert peak_concurrency([answer(0.0, 1.0, []), answer(1.0, 1.0, [])]) == 1


def test_details_keep_failed_requests():
    found = details(RUN)
    assert found["errors"] == ["", "", "status 503", ""]
    assert found["output_lens"] == [3, 1, 0, 5]
    assert all(len(values) == 4 for values in found.values())


def test_statistics_of_one_sample():
    assert statistics_ms([0.002], [99]) == {"mean": 2.0, "median": 2.0, "std": 0.0, "p99": 2.0}


def test_names_of_percentiles():
    assert [percentile_name(p) for p in (99.0, 99.9, 50)] == ["p99", "p99.9", "p50"]


def test_options_as_text():
    assert parse_metrics("ttft, itl") == ["ttft", "itl"]
    assert parse_percentiles("50,99.9") == [50.0, 99.9]
    assert parse_goodput(["ttft:200", "e2el:1e3"]) == {"ttft": 200.0, "e2el": 1000.0}
    with pytest.raises(ValueError, match="no metric 'latency'"):
        parse_metrics("latency")
    for wrong in ("", "50,", "101", "-1", "nan", "a"):
        with pytest.raises(ValueError, match="numbers from 0 to 100"):
            parse_percentiles(wrong)
    for wrong in ("itl:3", "ttft", "ttft:", "ttft:-1", "ttft:nan"):
        with pytest.raises(ValueError, match="METRIC:MILLISECONDS"):
            parse_goodput([wrong])


def test_a_single_token_has_no_time_after_it():
    assert RUN[1].tpot is None
    assert math.isclose(RUN[0].tpot, 0.2)
