"""A real engine on the embedded model, shared by all tests of the server, and checked for leaks after each."""

import time

import pytest
import torch
from live_server import Api, LiveServer

from gpt2rt.engine.async_llm import AsyncLLM


@pytest.fixture(scope="session")
def real_engine():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    engine = AsyncLLM("gpt2rt/tiny-gpt2", num_blocks=512, max_num_seqs=16, num_threads=1)
    yield engine
    engine.shutdown()
    torch.set_num_threads(before)


@pytest.fixture
def engine(real_engine):
    """The engine; after the test it has nothing left to do, and every block is free."""
    yield real_engine
    end = time.monotonic() + 10
    while True:
        stats = real_engine.stats()
        if stats.num_requests_running == stats.num_requests_waiting == 0:
            break
        assert time.monotonic() < end, stats
        time.sleep(0.01)
    assert stats.num_free_blocks == stats.num_blocks


@pytest.fixture
def api(engine):
    """The app on the real engine."""
    return Api(engine)


@pytest.fixture(scope="module")
def live(real_engine):
    """A server with the real engine on a port."""
    with LiveServer(real_engine) as server:
        yield server
