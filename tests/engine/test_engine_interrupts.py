"""Ctrl-C at any place in the engine: no request and no block is left, and the next call is right."""

import sys
import threading

import pytest
from engine_cases import prompt_ids, said
from engine_faults import assert_clean, small_llm

import gpt2rt.cache
import gpt2rt.engine
from gpt2rt.engine import RequestOutputKind, SamplingParams

_FOLDERS = tuple(module.__path__[0] for module in (gpt2rt.engine, gpt2rt.cache))
# so many places lie between one that is interrupted and the next
_STRIDE = 17
PROMPTS = [prompt_ids(20, seed=1) + prompt_ids(10 + place, seed=place) for place in range(3)]
PARAMS = [
    SamplingParams(max_tokens=3, temperature=0.0),
    SamplingParams(max_tokens=3, n=2, seed=1, frequency_penalty=1.0, ignore_eos=True),
    SamplingParams(max_tokens=3, top_k=5, seed=2, logprobs=1, prompt_logprobs=0, ignore_eos=True),
]


class Interrupt:
    """Raises KeyboardInterrupt at the n-th place of the engine's code where Python looks for signals in this thread.

    Those are the beginnings of functions, and the returns of calls that are not in Python. At other places a signal
    waits: so it cannot come between the end of a ``with`` block and the release of its lock.
    """

    def __init__(self, place):
        self.left = place

    def __enter__(self):
        sys.setprofile(self._look)
        return self

    def __exit__(self, *_):
        sys.setprofile(None)

    def _look(self, frame, event, argument):
        code = frame.f_code
        # Python swallows what is raised in a generator expression that it is closing
        if event in ("call", "c_return") and code.co_filename.startswith(_FOLDERS) and code.co_name != "<genexpr>":
            self.left -= 1
            if self.left == 0:
                sys.setprofile(None)
                raise KeyboardInterrupt


@pytest.fixture(scope="module")
def expected():
    with small_llm() as llm:
        return [said(output) for output in llm.generate(PROMPTS, PARAMS)]


@pytest.mark.parametrize("num_blocks", [64, 5], ids=["ample", "short"])
def test_ctrl_c_at_any_place(expected, num_blocks):
    llm = small_llm(num_blocks=num_blocks)
    place, interrupted = 1 + num_blocks % 7, 0
    while True:
        with Interrupt(place):
            try:
                outputs = llm.generate(PROMPTS, PARAMS)
            except KeyboardInterrupt:
                interrupted += 1
            else:
                break
        assert_clean(llm.core)
        if interrupted % 5 == 0:
            assert [said(output) for output in llm.generate(PROMPTS, PARAMS)] == expected
        place += _STRIDE
    assert [said(output) for output in outputs] == expected
    assert interrupted > 50
    assert bool(llm.stats().num_preemptions) == (num_blocks == 5)


def test_ctrl_c_in_a_stream(expected):
    llm = small_llm()
    place = 1
    while True:
        with Interrupt(place):
            try:
                outputs = list(llm.stream(PROMPTS[0], PARAMS[0]))
            except KeyboardInterrupt:
                pass
            else:
                break
        # the iterator went with the exception
        assert_clean(llm.core)
        place += 2 * _STRIDE
    assert said(outputs[-1]) == expected[0]
    assert place > 300


def test_ctrl_c_ends_the_streams_beside_it_with_an_error(expected):
    llm = small_llm()
    params = PARAMS[0].clone()
    params.output_kind, params.max_tokens = RequestOutputKind.DELTA, 100
    stream = llm.stream(PROMPTS[0], params)
    assert len(next(stream).outputs[0].token_ids) == 1
    with Interrupt(1000) as interrupt, pytest.raises(KeyboardInterrupt):
        llm.generate(PROMPTS, PARAMS)
    assert interrupt.left == 0
    with pytest.raises(RuntimeError, match="KeyboardInterrupt"):
        next(stream)
    assert_clean(llm.core)
    assert [said(output) for output in llm.generate(PROMPTS, PARAMS)] == expected


def test_streams_that_nobody_reads_on():
    llm = small_llm()
    for count in range(4):
        stream = llm.stream(PROMPTS[0], PARAMS[0])
        for _ in range(count):
            next(stream)
        stream.close()
        assert_clean(llm.core)
    # not begun, and forgotten
    llm.stream(PROMPTS[0], PARAMS[0])
    assert_clean(llm.core)


def test_threads_that_share_an_llm(expected):
    llm = small_llm()
    results, streamed = {}, {}

    def call(number):
        results[number] = [said(output) for output in llm.generate(PROMPTS, PARAMS)]
        streamed[number] = said(list(llm.stream(PROMPTS[0], PARAMS[0]))[-1])

    threads = [threading.Thread(target=call, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert list(results.values()) == [expected] * 4
    assert list(streamed.values()) == [expected[0]] * 4
    assert_clean(llm.core)


def test_shutdown_under_a_stream():
    llm = small_llm()
    stream = llm.stream(PROMPTS[0], PARAMS[0])
    next(stream)
    llm.shutdown()
    llm.shutdown()
    last = next(stream)
    assert last.finished
    assert last.outputs[0].finish_reason == "abort"
    with pytest.raises(RuntimeError, match="shut down"):
        llm.generate("a")
