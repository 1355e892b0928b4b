"""AsyncLLM ends: by shutdown, by a fault in its thread, by a fork, with its process; nobody waits in vain."""

import asyncio
import os
import signal
import subprocess
import sys
import threading
import time

import pytest
import torch
from engine_cases import TEXT, said
from engine_faults import Fault, Injected, assert_clean
from engine_readers import PATIENCE, PROMPT, expected_whole, params, run, until, whole

from gpt2rt.engine import LLM, AsyncLLM, PoolingParams, async_llm, core
from gpt2rt.errors import EngineDeadError


@pytest.fixture(scope="module")
def expected():
    return expected_whole()


@pytest.mark.proves("fault:F57")
def test_shutdown_under_load(async_llm):
    engine = async_llm(max_num_seqs=2)

    async def main():
        tasks = [asyncio.create_task(whole(engine, PROMPT, params(200))) for _ in range(6)]
        await until(lambda: engine.stats().generation_tokens > 8)
        await asyncio.to_thread(engine.shutdown)
        late = asyncio.create_task(whole(engine))
        for output in await asyncio.gather(*tasks):
            assert output.finished
            assert output.outputs[0].finish_reason == "abort"
        with pytest.raises(EngineDeadError, match="shut down"):
            await late
        with pytest.raises(EngineDeadError):
            await engine.check_health()
        await engine.abort("req-0")
        assert await engine.drain(1.0)

    run(main())
    engine.shutdown()
    assert not engine.errored
    assert not engine.is_running
    assert engine.dead_error is None
    assert_clean(engine._core)


@pytest.mark.proves("fault:F57")
def test_requests_that_come_while_it_shuts_down(async_llm):
    engine = async_llm()

    async def main():
        async def client():
            ends = []
            while True:
                try:
                    ends.append((await whole(engine, PROMPT, params(5))).outputs[0].finish_reason)
                except EngineDeadError:
                    return ends

        clients = [asyncio.create_task(client()) for _ in range(8)]
        await until(lambda: engine.stats().finished.get("length", 0) > 20)
        await asyncio.to_thread(engine.shutdown)
        ends = [end for ends in await asyncio.gather(*clients) for end in ends]
        assert set(ends) <= {"length", "abort"}

    run(main())
    assert_clean(engine._core)


@pytest.mark.proves("fault:F57")
def test_drain(async_llm):
    engine = async_llm()

    async def main():
        assert await engine.drain(0.0)
        tasks = [asyncio.create_task(whole(engine, PROMPT, params(100))) for _ in range(3)]
        # begun, and not in the engine's hands yet
        await asyncio.sleep(0)
        assert not await engine.drain(0.0)
        assert await engine.drain(PATIENCE)
        engine.shutdown()
        return [output.outputs[0].finish_reason for output in await asyncio.gather(*tasks)]

    assert run(main()) == ["length"] * 3


def test_shutdown_from_its_own_thread(async_llm):
    engine = async_llm()

    def observer(iteration):
        if iteration.num_generation_tokens:
            engine.shutdown()

    engine.observer = observer
    output = run(whole(engine))
    assert output.outputs[0].finish_reason == "abort"
    engine._thread.join(PATIENCE)
    assert not engine._thread.is_alive()


class Deadly(BaseException):
    """Like SystemExit: no fault of a request."""


DEATHS = {
    "step": (core.EngineCore, "step", Injected("thrown by the test")),
    "schedule": (core.Scheduler, "schedule", Injected("thrown by the test")),
    "report": (core.Accounts, "close", MemoryError()),
    "pacer": (core.PrefillPacer, "note", Injected("thrown by the test")),
    "executor": (core.StepRunner, "run", SystemExit(3)),
    "sampler": (core.Sampler, "sample", Deadly("thrown by the test")),
    "add": (core.EngineCore, "add", Deadly("thrown by the test")),
    "abort": (core.EngineCore, "abort", Injected("thrown by the test")),
    "turn": (AsyncLLM, "_turn", Injected("thrown by the test")),
    "deliver": (AsyncLLM, "_deliver", Injected("thrown by the test")),
    "accept": (async_llm.Stream, "call", Deadly("thrown by the test")),
    "give-back": (core.Scheduler, "remove", Injected("thrown by the test")),
}


@pytest.mark.proves("fault:F56")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize("first", [0, 3])
@pytest.mark.parametrize("place", DEATHS)
def test_its_thread_dies(place, first):
    owner, name, error = DEATHS[place]
    engine = AsyncLLM(num_blocks=128, num_threads=1, max_num_seqs=4)

    async def main():
        stop = asyncio.Event()

        async def client():
            # some come to their ends before it happens
            while not stop.is_set():
                await whole(engine, PROMPT, params(30))

        async def leaver():
            while not stop.is_set():
                stream = engine.generate(PROMPT, params(30))
                await anext(stream)
                await stream.aclose()

        async def pooler():
            while not stop.is_set():
                async for _ in engine.encode(PROMPT, PoolingParams()):
                    pass

        with Fault(owner, name, error, first=first) as fault:
            tasks = [asyncio.create_task(work()) for work in [client] * 6 + [leaver, pooler]]
            await until(lambda: fault.fired)
            await until(lambda: engine.errored)
            results = await asyncio.gather(*tasks, return_exceptions=True)
        assert {type(one) for one in results} == {EngineDeadError}
        assert len(set(map(id, results))) == len(results), "readers share an exception"
        assert all(type(error).__name__ in str(one) for one in results)
        assert all(one.__cause__ is error for one in results)
        for task in (whole(engine), anext(engine.encode(PROMPT, PoolingParams())), engine.check_health()):
            with pytest.raises(EngineDeadError):
                await task
        await engine.abort("req-0")
        await engine.drain(0.1)

    run(main())
    assert engine.errored
    assert engine.dead_error is error
    assert not engine.is_running
    engine.shutdown()
    engine.shutdown()
    assert not engine._thread.is_alive()
    assert_clean(engine._core)


@pytest.mark.proves("fault:F54")
@pytest.mark.parametrize("forever", [False, True])
def test_a_thread_that_cannot_be_started(async_llm, expected, forever, monkeypatch):
    refusal = RuntimeError("can't start new thread")
    with Fault(threading.Thread, "start", refusal, forever=forever), pytest.raises(RuntimeError, match="new thread"):
        AsyncLLM(num_blocks=128, num_threads=1)
    engine = async_llm()

    async def main():
        beside = asyncio.create_task(whole(engine))
        await asyncio.sleep(0)
        # a long text is made into tokens in a thread
        with (
            Fault(threading.Thread, "start", refusal, forever=forever),
            pytest.raises(RuntimeError, match="new thread"),
        ):
            await whole(engine, TEXT * 12, params(3, truncate_prompt_tokens=20))
        assert said(await beside) == expected
        assert len((await whole(engine, TEXT * 12, params(3, truncate_prompt_tokens=20))).prompt_token_ids) == 20

    run(main())


# ---- processes -----------------------------------------------------------------------------------------------------


def in_child(function):
    """Run a function in a forked child; whether it came back without an exception, in time."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            function()
            code = 0
        finally:
            os._exit(code)
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status) == 0
        time.sleep(0.005)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return False


@pytest.mark.proves("fault:F61")
@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
@pytest.mark.parametrize("lock_held", [False, True])
def test_a_forked_child_is_told_that_it_has_no_engine(async_llm, expected, lock_held):
    engine = async_llm()

    def child():
        async def main():
            for work in (whole(engine), anext(engine.encode(PROMPT, PoolingParams())), engine.check_health()):
                with pytest.raises(EngineDeadError, match="forked"):
                    await work
            await engine.abort("req-0")
            await engine.drain(0.1)

        run(main())
        assert not engine.is_running
        engine.shutdown()
        # one of its own works
        own = AsyncLLM(num_blocks=128, num_threads=1)
        assert said(run(whole(own))) == expected
        own.shutdown()

    assert said(run(whole(engine))) == expected
    if lock_held:
        with engine._wake:
            assert in_child(child)
    else:
        assert in_child(child)
    # the parent goes on
    assert said(run(whole(engine))) == expected


@pytest.mark.proves("fault:F61")
@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_a_forked_child_goes_on_with_an_llm(expected):
    with LLM(num_blocks=128, num_threads=1) as llm:
        # in the parent's middle of a request
        stream = llm.stream(PROMPT, params(20))
        next(stream)

        def child():
            assert said(llm.generate([PROMPT], params(20))[0]) == expected
            assert said(list(stream)[-1]) == expected

        assert in_child(child)
        assert said(list(stream)[-1]) == expected


def test_a_program_that_ends_without_shutdown():
    code = """
import asyncio
from gpt2rt.engine import AsyncLLM, SamplingParams
engine = AsyncLLM(num_blocks=128, num_threads=1)
async def main():
    stream = engine.generate("ROMEO:", SamplingParams(max_tokens=400, ignore_eos=True))
    await anext(stream)
    asyncio.get_running_loop().set_exception_handler(lambda *_: None)
    others = [engine.generate("a", SamplingParams(max_tokens=400, ignore_eos=True)) for _ in range(4)]
    for other in others:
        await anext(other)
    print("ready")
    raise SystemExit(7)
asyncio.run(main())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout) == (7, "ready\n"), done.stderr


def test_results_do_not_depend_on_inference_mode(async_llm, expected):
    engine = async_llm()
    with torch.inference_mode():
        assert said(run(whole(engine))) == expected
    with torch.enable_grad():
        assert said(run(whole(engine))) == expected
