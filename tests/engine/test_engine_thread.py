"""Readers of AsyncLLM that leave, that are slow, and whose event loops close: nobody else notices."""

import asyncio
import gc
import threading

import pytest
from engine_cases import TEXT, prompt_ids, said
from engine_faults import assert_clean
from engine_readers import PATIENCE, PROMPT, deltas, expected_whole, params, run, until, whole

from gpt2rt.engine import PoolingParams, RequestOutput, RequestOutputKind, SamplingParams
from gpt2rt.errors import QueueFullError, RequestError

LONG = prompt_ids(400, seed=4)


@pytest.fixture(scope="module")
def expected():
    return expected_whole()


# ---- readers that leave (F50) --------------------------------------------------------------------------------------


@pytest.mark.proves("fault:F50")
@pytest.mark.parametrize("count", [1, 2, 5, 19, 20])
@pytest.mark.parametrize("how", ["close", "break", "cancel", "forget"])
def test_a_reader_leaves_after_some_outputs(async_llm, expected, how, count):
    engine = async_llm()
    finished = []
    engine.observer = lambda iteration: finished.extend(one.finish_reason for one in iteration.finished)

    async def reader(stream):
        seen = 0
        async for _ in stream:
            seen += 1
            if seen >= count:
                if how == "cancel":
                    await asyncio.sleep(3600)
                return

    async def main():
        stream = engine.generate(PROMPT, deltas(20 if count >= 19 else 200))
        beside = asyncio.create_task(whole(engine))
        task = asyncio.create_task(reader(stream))
        if how == "cancel":
            await until(lambda: engine.stats().generation_tokens >= count)
            await asyncio.sleep(0.01)
            task.cancel()
        await asyncio.wait([task])
        if how == "close":
            await stream.aclose()
        del stream, task
        if how == "forget":
            gc.collect()
        assert said(await beside) == expected
        assert await engine.drain(PATIENCE)
        assert_clean(engine._core)

    run(main())
    if count < 19:
        assert sorted(finished) == ["abort", "length"]
        # it ends at once, not when all of its tokens are there
        assert engine.stats().generation_tokens < 200


@pytest.mark.proves("fault:F50")
@pytest.mark.parametrize("kind", list(RequestOutputKind), ids=lambda kind: kind.name)
@pytest.mark.parametrize("n", [1, 3])
def test_a_reader_leaves_before_the_first_token(async_llm, expected, kind, n):
    # its prompt takes many steps
    engine = async_llm(max_num_batched_tokens=16, max_num_seqs=8, prefill_slowdown=None)

    async def main():
        sampling = SamplingParams(max_tokens=20, seed=1, n=n, output_kind=kind)
        task = asyncio.create_task(whole(engine, LONG, sampling))
        await until(lambda: engine.stats().num_steps > 3)
        assert not engine.stats().generation_tokens
        task.cancel()
        await asyncio.wait([task])
        await until(lambda: not engine._core.has_unfinished)
        assert_clean(engine._core)
        assert engine.stats().num_steps < 20
        assert said(await whole(engine)) == expected

    run(main())
    assert engine.stats().finished == {"abort": 1, "length": 1}


@pytest.mark.proves("fault:F50")
def test_a_reader_leaves_while_it_waits(async_llm, expected):
    engine = async_llm(max_num_seqs=1)

    async def main():
        first = asyncio.create_task(whole(engine, PROMPT, params(100)))
        await until(lambda: engine.stats().num_requests_running)
        waiting = [asyncio.create_task(whole(engine, LONG)) for _ in range(5)]
        await until(lambda: engine.stats().num_requests_waiting == 5)
        for task in waiting:
            task.cancel()
        await until(lambda: not engine.stats().num_requests_waiting)
        last = asyncio.create_task(whole(engine))
        assert len((await first).outputs[0].token_ids) == 100
        assert said(await last) == expected

    run(main())


@pytest.mark.proves("fault:F50")
@pytest.mark.parametrize("turns", range(12))
def test_a_task_is_cancelled_at_each_turn_of_the_loop(async_llm, expected, turns):
    # before it has begun, while its text is made into tokens in a thread, while it waits to be accepted, and later
    engine = async_llm()

    async def main():
        tasks = [
            asyncio.create_task(whole(engine, prompt, deltas(30)))
            for prompt in (PROMPT, TEXT, TEXT * 12, "\ud800" * 3000)
        ]
        for _ in range(turns):
            await asyncio.sleep(0)
        for task in tasks:
            task.cancel()
        for one in await asyncio.gather(*tasks, return_exceptions=True):
            # where this thread had to wait, a request may have come to its end
            done = isinstance(one, RequestOutput) and len(one.outputs[0].token_ids) == 30
            assert done or isinstance(one, (asyncio.CancelledError, RequestError))
        assert said(await whole(engine)) == expected
        assert await engine.drain(PATIENCE)
        assert_clean(engine._core)

    run(main())


@pytest.mark.proves("fault:F50")
def test_a_generator_that_is_never_begun(async_llm):
    engine = async_llm()

    async def main():
        engine.generate(PROMPT)
        engine.encode(PROMPT, PoolingParams())
        stream = engine.generate(PROMPT)
        await stream.aclose()
        assert await engine.drain(PATIENCE)

    run(main())
    assert not engine.stats().num_steps


# ---- slow readers, full queues, names (F51, F52) -------------------------------------------------------------------


@pytest.mark.proves("fault:F51")
@pytest.mark.parametrize("kind", [RequestOutputKind.DELTA, RequestOutputKind.CUMULATIVE], ids=lambda kind: kind.name)
def test_a_slow_reader_gets_what_it_missed_in_one_output(async_llm, expected, kind):
    engine = async_llm()
    sampling = params(200, output_kind=kind, logprobs=0)

    async def main():
        stream = engine.generate(PROMPT, sampling)
        outputs = [await anext(stream)]
        # others are not held up by it
        assert said(await whole(engine)) == expected
        await until(lambda: not engine._core.has_unfinished)
        await asyncio.sleep(0)
        outputs += [output async for output in stream]
        return outputs

    outputs = run(main())
    assert len(outputs) == 2
    assert outputs[-1].finished
    counts = [len(output.outputs[0].token_ids) for output in outputs]
    logprobs = [len(output.outputs[0].logprobs) for output in outputs]
    assert counts == logprobs
    if kind is RequestOutputKind.DELTA:
        joined, later = outputs
        joined.add(later, aggregate=True)
        assert sum(counts) == 200
    else:
        joined = outputs[-1]
        assert counts[-1] == 200
    again = run(whole(engine, PROMPT, params(200, logprobs=0)))
    assert said(joined) == said(again)


@pytest.mark.proves("fault:F51")
def test_what_waits_for_a_reader_is_one_output(async_llm):
    engine = async_llm()

    async def main():
        stream = engine.generate(PROMPT, deltas(200))
        await anext(stream)
        await until(lambda: not engine._core.has_unfinished)
        await asyncio.sleep(0)
        gc.collect()
        # those of the engine have been merged into the one that the reader holds
        name = "req-0"
        return sum(
            1
            for one in gc.get_objects()
            if type(one).__name__ == "RequestOutput" and one.request_id == name and not one.finished
        )

    assert run(main()) <= 1


def test_a_full_queue(async_llm, expected):
    engine = async_llm(max_num_seqs=1, max_num_queued_reqs=2)

    async def main():
        tasks = [asyncio.create_task(whole(engine)) for _ in range(8)]
        results = await asyncio.gather(*tasks, return_exceptions=True)
        full = [one for one in results if isinstance(one, QueueFullError)]
        assert full
        assert all(one.retry_after > 0 for one in full)
        good = [said(one) for one in results if not isinstance(one, Exception)]
        assert good == [expected] * (8 - len(full))
        # there is room again
        assert said(await whole(engine)) == expected

    run(main())


@pytest.mark.proves("fault:F52")
def test_a_name_twice(async_llm):
    engine = async_llm()

    async def main():
        first = engine.generate(PROMPT, params(200), request_id="a")
        await anext(first)
        with pytest.raises(RequestError, match="request_id 'a' is in use"):
            await whole(engine, request_id="a")
        # the first does not notice
        assert len([output async for output in first][-1].outputs[0].token_ids) == 200
        assert (await whole(engine, request_id="a")).request_id == "a"

    run(main())


@pytest.mark.proves("fault:F52")
def test_aborts_by_name(async_llm, expected):
    engine = async_llm()

    async def main():
        tasks = {name: asyncio.create_task(whole(engine, PROMPT, params(200), request_id=name)) for name in "abc"}
        beside = asyncio.create_task(whole(engine))
        await until(lambda: engine.stats().generation_tokens > 8)
        await engine.abort("nobody")
        await engine.abort(["a", "nobody", "a"])
        await engine.abort("b")
        await engine.abort("b")
        for name in "ab":
            output = await tasks[name]
            assert output.finished
            assert output.outputs[0].finish_reason == "abort"
            assert 0 < len(output.outputs[0].token_ids) < 200
        assert (await tasks["c"]).outputs[0].finish_reason == "length"
        assert said(await beside) == expected
        await engine.abort("c")
        await engine.abort([])

    run(main())


# ---- event loops ---------------------------------------------------------------------------------------------------


def test_two_event_loops_at_once(async_llm, expected):
    engine = async_llm()
    results = []

    def thread():
        async def main():
            return [said(one) for one in await asyncio.gather(*(whole(engine) for _ in range(6)))]

        results.append(run(main()))

    threads = [threading.Thread(target=thread) for _ in range(3)]
    for one in threads:
        one.start()
    for one in threads:
        one.join()
    assert results == [[expected] * 6] * 3


@pytest.mark.proves("fault:F50")
@pytest.mark.parametrize("kind", list(RequestOutputKind), ids=lambda kind: kind.name)
def test_a_loop_is_closed_under_its_requests(async_llm, expected, kind):
    engine = async_llm()
    loop = asyncio.new_event_loop()
    streams = [engine.generate(PROMPT, params(400, output_kind=kind)) for _ in range(3)]
    tasks = [loop.create_task(anext(stream)) for stream in streams]
    loop.run_until_complete(until(lambda: engine.stats().generation_tokens))
    loop.close()
    assert said(run(whole(engine))) == expected
    run(until(lambda: not engine._core.has_unfinished))
    # who wants one output at the end is found missing only then
    reason = "length" if kind is RequestOutputKind.FINAL_ONLY else "abort"
    assert engine.stats().finished[reason] >= 3
    assert engine.is_running
    assert not engine._ready
    # nothing is told of tasks that never end
    for task in tasks:
        task._log_destroy_pending = False
    del streams, tasks
    gc.collect()
