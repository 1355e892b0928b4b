"""A function fails at its first call, then at its second, and so on to its last: once, and from there on for good.

Whoever is in hand at that call gets an error, or is computed again; all others end with the tokens, log-probabilities,
texts and numbers that they have alone. No block is left over, and the next requests are right. The way is SQLite's,
which fails every allocation of its tests in turn.
"""

import contextlib
import itertools
import logging

import pytest
import torch
from engine_faults import (
    Fault,
    Injected,
    assert_clean,
    begin,
    plain_requests,
    references,
    requests,
    run,
    small_llm,
    sweep,
)

import gpt2rt.graph.cpu
from gpt2rt.cache import BlockPool, PagedKVCache, PrefixIndex, Sequence, block_pool
from gpt2rt.engine import SamplingParams, core, prompt_rows, runner, scheduler
from gpt2rt.engine.batch import StepBuffers
from gpt2rt.engine.output_text import OutputText
from gpt2rt.engine.request import Request
from gpt2rt.engine.sampler import Sampler
from gpt2rt.engine.scheduler import Scheduler
from gpt2rt.engine.served import ServedModel
from gpt2rt.engine.step_sampler import StepSampler
from gpt2rt.errors import OutOfBlocksError
from gpt2rt.graph.cpu import CpuExecutor

# what an engine logs for each of some thousand faults takes longer than the faults
pytestmark = pytest.mark.usefixtures("quiet_log")

MEMORY = MemoryError("none left, says the test")
BLOCKS = OutOfBlocksError("none left, says the test")
STAGE = Injected("thrown by the test")
# once: how many requests may fail for one call that does. None where what fails is done again for each alone
ALLOCATIONS = {
    "blocks": (BlockPool, "allocate", BLOCKS, 0),
    "blocks-memory": (BlockPool, "allocate", MEMORY, 1),
    "blocks-op": (block_pool, "block_pool_allocate", MEMORY, 1),
    "references-op": (block_pool, "block_pool_incref", MEMORY, 1),
    "slots": (Sequence, "append", BLOCKS, 0),
    "slots-memory": (Sequence, "append", MEMORY, 1),
    "adopted": (Sequence, "adopt", MEMORY, 1),
    "forked": (Sequence, "fork", MEMORY, 1),
    "tensor-empty": (torch, "empty", MEMORY, 1),
    "tensor-filled": (torch, "tensor", MEMORY, 1),
    "tensor-joined": (torch, "cat", MEMORY, 1),
    "arena": (CpuExecutor, "_workspace", MEMORY, 1),
    "sampler": (Sampler, "sample", MEMORY, 1),
    "sampler-rows": (Sampler, "set_rows", MEMORY, 1),
    "sampling-row": (core, "SamplingRow", MEMORY, 1),
}
STAGES = {
    "schedule": (Scheduler, "_reserve", STAGE, 1),
    "item": (scheduler, "Item", STAGE, 1),
    "admit": (Scheduler, "_begin", STAGE, 1),
    "chain": (PrefixIndex, "chain", STAGE, 1),
    "lookup": (PrefixIndex, "lookup", STAGE, 1),
    "lay-out": (StepBuffers, "lay_out", STAGE, 1),
    "call": (runner.StepRunner, "_call", STAGE, 1),
    "rows": (StepSampler, "_prepare", STAGE, 1),
    "fork": (Scheduler, "fork", STAGE, 1),
    "text": (OutputText, "put", STAGE, 1),
    "text-end": (OutputText, "end", STAGE, 1),
    "logprobs": (core, "as_logprobs", STAGE, 1),
    "prompt-logprobs": (prompt_rows, "prompt_logprobs", STAGE, 1),
    "pool": (ServedModel, "pool", STAGE, 1),
    "index": (PrefixIndex, "insert", STAGE, 1),
    "output": (Request, "output", STAGE, 1),
}


@pytest.fixture
def quiet_log():
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)


@pytest.fixture(scope="module")
def expected():
    return references(requests())


@pytest.fixture(scope="module")
def engines():
    """By the size of the pool; in the smallest, some always wait for the others."""
    return {size: small_llm(num_blocks=size) for size in (64, 9)}


@pytest.mark.proves("fault:F54")
@pytest.mark.parametrize("forever", [False, True], ids=["once", "for-good"])
@pytest.mark.parametrize("place", ALLOCATIONS)
def test_every_allocation_in_turn(engines, expected, place, forever):
    owner, name, error, most = ALLOCATIONS[place]
    failures = sweep(engines[64], requests(), expected, owner, name, error, forever=forever)
    assert failures
    if not forever:
        assert max(failures) <= most


@pytest.mark.proves("fault:F54")
@pytest.mark.parametrize("forever", [False, True], ids=["once", "for-good"])
@pytest.mark.parametrize("place", ["blocks", "blocks-memory", "references-op"])
def test_every_allocation_in_turn_where_blocks_are_short(engines, expected, place, forever):
    # two of the five at a time, so that there are preemptions, and blocks of the index are reclaimed
    owner, name, error, most = ALLOCATIONS[place]
    failures = sweep(engines[9], requests(), expected, owner, name, error, forever=forever)
    if not forever:
        assert max(failures) <= most
    assert engines[9].stats().num_preemptions


@pytest.mark.proves("fault:F54")
def test_the_first_workspace_cannot_be_had(expected, monkeypatch):
    engine = small_llm()
    # scratch memory outlives an engine: that of a new executor has none yet
    executor = engine.core._runner.executor
    monkeypatch.setattr(executor, "_scratch", type(executor._scratch)())
    failures = sweep(engine, requests(), expected, gpt2rt.graph.cpu, "allocate_arena", MEMORY, forever=False)
    assert failures == [0]


@pytest.mark.proves("fault:F54")
@pytest.mark.parametrize("forever", [False, True], ids=["once", "for-good"])
@pytest.mark.parametrize("name", ["sample", "sample_best", "set_rows"])
def test_a_sampler_of_the_best_logits_alone(name, forever):
    cases = plain_requests()
    engine = small_llm()
    failures = sweep(engine, cases, references(cases), Sampler, name, MEMORY, forever=forever)
    if name == "sample":
        # nobody needs it
        assert failures == []
    elif forever and name == "set_rows":
        assert failures[0] == len(cases)
    else:
        # all of them are sampled one by one, from all logits
        assert set(failures) == {0}


@pytest.mark.proves("fault:F55")
@pytest.mark.parametrize("place", STAGES)
def test_every_call_of_a_stage_in_turn(engines, expected, place):
    # stages that fail for good, for one request, stand in test_engine_faults.py
    owner, name, error, most = STAGES[place]
    failures = sweep(engines[64], requests(), expected, owner, name, error, forever=False)
    assert failures
    assert max(failures) <= most


@pytest.mark.proves("fault:F54")
@pytest.mark.filterwarnings("ignore:request llm-:UserWarning")
def test_blocks_that_cannot_be_given_back(engines, expected):
    # nobody's fault alone: where it ends a step in its middle, all requests end, and the cache is emptied
    engine = engines[64]
    cases = requests()
    texts = [(prompt, params) for prompt, params in cases if isinstance(params, SamplingParams)]
    for first in itertools.count():
        with Fault(block_pool, "block_pool_free", MEMORY, first=first) as fault, contextlib.suppress(MemoryError):
            engine.generate([prompt for prompt, _ in texts], [params for _, params in texts])
        assert_clean(engine.core)
        assert run(engine, begin(engine, cases)) == expected
        if not fault.fired:
            break
    assert first > len(texts)


@pytest.mark.proves("fault:F54")
@pytest.mark.parametrize(("owner", "name"), [(PagedKVCache, "copy_block"), (block_pool, "block_pool_free")])
def test_a_shared_tail_that_cannot_be_copied(owner, name):
    cache = PagedKVCache(1, 1, 1, 4, block_size=8)
    parent = Sequence(cache)
    parent.append(3)
    child = parent.fork()
    before = list(cache.pool.references), list(child.blocks), len(child)
    with Fault(owner, name, MEMORY), pytest.raises(MemoryError):
        child.append(8)
    assert before == (list(cache.pool.references), list(child.blocks), len(child))
    child.append(8)
    parent.free()
    child.free()
    assert cache.pool.num_free == 4
