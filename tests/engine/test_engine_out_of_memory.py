"""A step that finds no memory on its device: once more when torch has given back what it can, then each alone."""

import gc
import weakref

import pytest
import torch
from engine_faults import assert_clean, begin, plain_requests, references, run, small_llm

from gpt2rt.errors import RequestFailedError

NO_MEMORY = "CUDA out of memory. Tried to allocate 1.00 GiB"


class Executor:
    """The engine's own, with memory for steps of so many tokens while ``crowded``; torch's cache may be what crowds."""

    def __init__(self, llm, monkeypatch, room, *, until_emptied):
        self.room, self.crowded, self.buffers = room, True, []
        self.calls, self.emptied = [], 0
        runner = llm.core._runner
        step = runner.executor.step

        def run_step(batch, cache, **options):
            tokens = batch.input_ids.numel()
            self.calls.append(tokens)
            # what a step allocates, and a traceback would hold
            buffers = torch.zeros(4)
            self.buffers.append(weakref.ref(buffers))
            if self.crowded and tokens > self.room:
                raise torch.cuda.OutOfMemoryError(NO_MEMORY)
            return step(batch, cache, **options)

        def empty_cache():
            self.emptied += 1
            assert all(each() is None for each in self.buffers), "the error of the failed step holds its memory"
            self.crowded = self.crowded and not until_emptied

        monkeypatch.setattr(runner.executor, "step", run_step)
        monkeypatch.setattr(torch.cuda, "empty_cache", empty_cache)


@pytest.fixture(autouse=True)
def no_collector():
    """What has to go must not wait for it by chance."""
    gc.disable()
    yield
    gc.enable()


@pytest.fixture(scope="module")
def expected():
    return references(plain_requests())


def test_a_step_is_made_once_more(monkeypatch, expected, caplog):
    with small_llm() as llm:
        executor = Executor(llm, monkeypatch, 40, until_emptied=True)
        assert run(llm, begin(llm, plain_requests())) == expected
        assert executor.emptied == 1
        assert executor.calls[0] == executor.calls[1] == 80
        assert_clean(llm.core)
    assert "no memory for a step of 3 sequences; it is tried once more (CUDA out of memory" in caplog.text


def test_then_each_alone(monkeypatch, expected):
    with small_llm() as llm:
        # a step of all prompts is too large, each of them is not
        executor = Executor(llm, monkeypatch, 41, until_emptied=False)
        assert run(llm, begin(llm, plain_requests())) == expected
        assert executor.calls[:2] == [80, 80]
        assert max(executor.calls[2:5]) <= 41
        assert executor.emptied == 1
        assert_clean(llm.core)


def test_what_fits_in_no_way_fails_alone(monkeypatch, expected):
    cases = plain_requests()
    with small_llm(enable_prefix_caching=False) as llm:
        # the parts have 25, 33 and 22 tokens
        executor = Executor(llm, monkeypatch, 30, until_emptied=False)
        first, second, third = run(llm, begin(llm, cases))
        assert first == expected[0]
        assert third == expected[2]
        assert isinstance(second, RequestFailedError)
        assert NO_MEMORY in str(second)
        # an error that somebody keeps does not keep what the step had allocated
        assert all(each() is None for each in executor.buffers)
        # two calls together, one alone for each; no more of those that failed
        assert executor.calls.count(80) == 2
        assert_clean(llm.core)
        # and one that is alone from its beginning
        executor.calls.clear()
        (only,) = run(llm, begin(llm, cases[2:]))
        assert isinstance(only, RequestFailedError)
        assert executor.calls == [41, 41]
        assert_clean(llm.core)
        executor.crowded = False
        assert run(llm, begin(llm, cases)) == expected
