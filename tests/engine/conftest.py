"""After every test no block has leaked and no request is left, in any engine that lives."""

import gc
import time
import weakref

import pytest
import torch

from gpt2rt.engine import AsyncLLM
from gpt2rt.engine.core import EngineCore

# seconds that requests of an engine with a thread of its own have to go away
_PATIENCE = 3.0
_CORES = weakref.WeakSet()


@pytest.fixture(scope="session", autouse=True)
def _known_cores():
    """Every EngineCore that is made from now on is in ``_CORES``."""
    original = EngineCore.__init__

    def remember(self, *arguments, **keywords):
        original(self, *arguments, **keywords)
        _CORES.add(self)

    EngineCore.__init__ = remember
    yield
    EngineCore.__init__ = original


@pytest.fixture(autouse=True)
def nothing_left(_known_cores):
    """No engine has a request, a sequence or a block that is not in its prefix index, once a test is over."""
    yield
    for core in list(_CORES):
        # one that is not clean is the fault of this test, not of the next
        _CORES.discard(core)
        check_clean(core)
        _CORES.add(core)


def check_clean(core):
    """Fail unless an engine is as good as new; its prefix index is emptied."""
    end = time.monotonic() + _PATIENCE
    while core.requests and time.monotonic() < end:
        # a generator in a reference cycle is closed when the cycle is found
        gc.collect()
        time.sleep(0.01)
    assert not core.requests, f"{len(core.requests)} requests are left: {list(core.requests)[:5]}"
    assert not core.scheduler.running
    assert not core.scheduler.waiting
    assert core._queued_tokens == 0
    pool, index = core.cache.pool, core._index
    known = 0 if index is None else index.num_cached
    assert sum(pool.references) == known, "somebody besides the prefix index holds blocks"
    assert core.scheduler.num_free == pool.num_blocks
    core.reset_prefix_cache()
    assert pool.num_free == pool.num_blocks


@pytest.fixture(autouse=True)
def one_thread():
    """Models this small only lose time with more threads, most of all on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def async_llm():
    """``async_llm(**options)``: an AsyncLLM that is shut down, and whose thread is gone, when the test is over."""
    made = []

    def make(model="gpt2rt/tiny-gpt2", **options):
        made.append(AsyncLLM(model, **{"num_blocks": 256, "num_threads": 1, **options}))
        return made[-1]

    yield make
    for engine in made:
        engine.shutdown()
        assert not engine._thread.is_alive()
