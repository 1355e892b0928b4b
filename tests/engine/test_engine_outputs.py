"""Outputs of requests: what a slow reader gets when several come together, and typed results of pooling."""

import pytest
import torch

from gpt2rt.engine.outputs import (
    ClassificationRequestOutput,
    CompletionOutput,
    EmbeddingRequestOutput,
    Logprob,
    PoolingOutput,
    PoolingRequestOutput,
    RequestMetrics,
    RequestOutput,
    ScoringRequestOutput,
)
from gpt2rt.errors import NumericsError, RequestError


def output(*completions, finished=False, **fields):
    return RequestOutput("r", "hi", [1, 2], fields.pop("prompt_logprobs", None), list(completions), finished, **fields)


def delta(index, text, ids, reason=None, total=None, **fields):
    logprobs = [{token: Logprob(-1.0, 1, "x")} for token in ids] if total is not None else None
    return CompletionOutput(index, text, ids, total, logprobs, reason, **fields)


def test_deltas_add_up_for_each_choice():
    first = delta(0, "a", [5], total=-1.0)
    early_ids = first.token_ids
    merged = output(first)
    merged.add(output(delta(1, "x", [7], total=-1.0), num_cached_tokens=16), aggregate=True)
    merged.add(output(delta(0, "b", [6], total=-2.0), delta(1, "", [8], "stop", -2.0, stop_reason=8)), aggregate=True)
    merged.add(output(delta(0, "c", [9], "length", -3.0), finished=True, metrics=RequestMetrics(1.0)), aggregate=True)
    zero, one = merged.outputs
    assert (zero.index, zero.text, zero.token_ids, zero.finish_reason) == (0, "abc", [5, 6, 9], "length")
    assert [list(entry) for entry in zero.logprobs] == [[5], [6], [9]]
    assert zero.cumulative_logprob == -3.0
    assert (one.index, one.text, one.token_ids, one.finish_reason, one.stop_reason) == (1, "x", [7, 8], "stop", 8)
    assert merged.finished
    assert merged.num_cached_tokens == 16
    assert merged.metrics.arrival_time == 1.0
    # a reader that holds the earlier list sees no change
    assert early_ids == [5]


def test_cumulative_outputs_replace():
    merged = output(delta(0, "a", [5]), delta(1, "x", [7]))
    merged.add(output(delta(0, "ab", [5, 6])), aggregate=False)
    assert [(item.index, item.text, item.token_ids) for item in merged.outputs] == [(0, "ab", [5, 6]), (1, "x", [7])]
    assert not merged.finished


def test_an_error_and_prompt_logprobs_survive():
    error = NumericsError("NaN")
    merged = output(delta(0, "a", [5]), prompt_logprobs=[None, {2: Logprob(-0.5)}])
    merged.add(output(delta(0, "", [], "error"), finished=True, error=error), aggregate=True)
    merged.add(output(finished=True), aggregate=True)
    assert merged.error is error
    assert merged.outputs[0].finished()
    assert merged.prompt_logprobs[0] is None


def pooled(data, **fields):
    return PoolingRequestOutput("r", PoolingOutput(torch.tensor(data)), [1, 2], True, **fields)


def test_pooling_results_by_task():
    embedding = EmbeddingRequestOutput.from_base(pooled([1.0, 2.0], num_cached_tokens=3))
    assert embedding.outputs.embedding == [1.0, 2.0]
    assert embedding.outputs.hidden_size == 2
    assert (embedding.request_id, embedding.prompt_token_ids, embedding.finished) == ("r", [1, 2], True)
    assert embedding.num_cached_tokens == 3
    classes = ClassificationRequestOutput.from_base(pooled([0.25, 0.75]))
    assert (classes.outputs.probs, classes.outputs.num_classes) == ([0.25, 0.75], 2)
    for data in (0.5, [0.5], [[0.5]]):
        assert ScoringRequestOutput.from_base(pooled(data)).outputs.score == 0.5


def test_pooling_results_of_a_wrong_shape_or_request_are_refused():
    with pytest.raises(RequestError, match=r"an embedding is one row of numbers, got shape \[1, 2\]"):
        EmbeddingRequestOutput.from_base(pooled([[1.0, 2.0]]))
    with pytest.raises(RequestError, match=r"a classification is one row of numbers, got shape \[\]"):
        ClassificationRequestOutput.from_base(pooled(1.0))
    with pytest.raises(RequestError, match=r"a score is one number, got shape \[2\]"):
        ScoringRequestOutput.from_base(pooled([1.0, 2.0]))
    failed = PoolingRequestOutput("r", None, [1], True, error=NumericsError("NaN"))
    with pytest.raises(NumericsError, match="NaN"):
        EmbeddingRequestOutput.from_base(failed)
    with pytest.raises(RequestError, match="request 'r' has no result yet"):
        EmbeddingRequestOutput.from_base(PoolingRequestOutput("r", None, [1], False))
