"""How large the KV cache of an engine on a GPU is, and what happens where it does not fit; on a GPU that is none."""

import gc
import logging
import types
import weakref

import pytest
import torch
from engine_cases import generate, prompt_ids, tiny

from gpt2rt.engine import EngineConfig, SamplingParams, fitting
from gpt2rt.engine.core import EngineCore
from gpt2rt.engine.served import ServedModel
from gpt2rt.errors import RequestError

TOTAL = 10**9
# of the embedded model, which the machine of a test holds easily
LONGEST = 512


class Gpu:
    """A device with so many bytes free once an engine was tried out; it knows which caches live."""

    def __init__(self, monkeypatch, free, *, steps=0):
        self.free, self.reserve, self.caches, self.log = free, 0, [], []
        cuda = torch.cuda
        monkeypatch.setattr(cuda, "mem_get_info", lambda device: (self.free - self.taken, TOTAL))
        monkeypatch.setattr(cuda, "synchronize", lambda device: None)
        monkeypatch.setattr(cuda, "empty_cache", lambda: self.log.append("empty"))
        monkeypatch.setattr(cuda, "reset_peak_memory_stats", lambda device: self.log.append("reset"))
        monkeypatch.setattr(cuda, "memory_reserved", lambda device: 7)
        monkeypatch.setattr(cuda, "memory_allocated", lambda device: 7)
        monkeypatch.setattr(cuda, "max_memory_reserved", lambda device: 7 + steps)
        monkeypatch.setattr(fitting, "try_out", self.try_out)
        monkeypatch.setattr(fitting, "capture", self.capture)
        monkeypatch.setattr(fitting, "EngineCore", lambda served, cache: EngineCore(served.real, cache))
        #: bytes that the graphs of the cache need
        self.graphs = 0

    @property
    def taken(self):
        return sum(cache().data.nbytes for cache in self.caches if cache() is not None)

    def try_out(self, served):
        self.log.append("try out")
        return EngineCore(served.real, served.real.new_cache(4))

    def capture(self, served, cache):
        if self.taken + self.graphs > self.free:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 MiB")

    def new_cache(self, real, num_blocks):
        self.log.append(num_blocks)
        if self.taken + num_blocks * real.block_bytes > self.free:
            raise RequestError("the engine's sequences need more")
        cache = real.new_cache(num_blocks)
        self.caches.append(weakref.ref(cache))
        return cache


class Served:
    """A model on that device."""

    def __init__(self, gpu, real):
        self.gpu, self.real = gpu, real
        self.device = torch.device("cuda", 0)
        self.num_blocks = types.MethodType(ServedModel.num_blocks, self)

    def __getattr__(self, name):
        return getattr(self.real, name)

    def new_cache(self, num_blocks):
        return self.gpu.new_cache(self.real, num_blocks)


@pytest.fixture(scope="module")
def model():
    return tiny().model


@pytest.fixture(autouse=True)
def no_collector(monkeypatch):
    """What has to go must not wait for it."""
    monkeypatch.setattr(fitting, "gc", types.SimpleNamespace(collect=lambda: 0))
    gc.disable()
    yield
    gc.enable()


def served_on(gpu, model, **settings):
    config = EngineConfig(max_model_len=LONGEST, num_threads=1, **{"max_num_seqs": 100, **settings})
    return Served(gpu, ServedModel(model, lambda: None, config, "tiny"))


def test_the_cache_takes_what_steps_leave(monkeypatch, model):
    gpu = Gpu(monkeypatch, 40 * 10**6 + TOTAL // 10, steps=10 * 10**6)
    served = served_on(gpu, model)
    core = fitting.new_core(served)
    expected = 30 * 10**6 // served.block_bytes
    assert 0 < expected < 100 * LONGEST // 16
    assert core.cache.pool.num_blocks == expected
    # the peak is that of the steps alone, and the memory of the first engine is there again
    assert gpu.log == ["empty", "reset", "try out", "empty", expected]
    assert [entry() for entry in gpu.caches] == [core.cache]


def test_no_larger_than_the_requests_that_may_run(monkeypatch, model):
    core = fitting.new_core(served_on(Gpu(monkeypatch, TOTAL), model, max_num_seqs=2))
    assert core.cache.pool.num_blocks == 2 * LONGEST // 16


def test_it_is_smaller_where_it_does_not_fit_after_all(monkeypatch, model, caplog):
    gpu = Gpu(monkeypatch, 40 * 10**6 + TOTAL // 10)
    served = served_on(gpu, model)
    wanted = served.num_blocks(40 * 10**6)
    # by chance another program took the rest: first the cache does not fit, then its graphs do not
    gpu.free = int(0.85 * wanted) * served.block_bytes
    gpu.graphs = int(0.1 * wanted) * served.block_bytes
    monkeypatch.setattr(fitting, "_spare_bytes", lambda served: 40 * 10**6)
    with caplog.at_level(logging.WARNING):
        core = fitting.new_core(served)
    smaller = int(wanted * 0.8)
    least = int(smaller * 0.8)
    assert [entry for entry in gpu.log if entry != "empty"] == [wanted, smaller, least]
    assert core.cache.pool.num_blocks == least
    # nothing of those that did not fit is left when the next is tried
    assert [entry() for entry in gpu.caches] == [None, core.cache]
    first, second = (record.getMessage() for record in caplog.records)
    assert f"a KV cache of {wanted} blocks (0.04 GB)" in first
    assert f"trying {smaller} blocks (0.03 GB): the engine's sequences need more" in first
    assert f"of {smaller} blocks" in second
    assert f"trying {least} blocks" in second
    assert "CUDA out of memory" in second
    # and it works
    assert core.served is served.real


def test_it_is_not_tried_for_ever(monkeypatch, model):
    gpu = Gpu(monkeypatch, TOTAL)
    gpu.graphs = TOTAL
    with pytest.raises(RequestError, match=r"no memory for a KV cache of 32 blocks \(0\.00 GB\), which one request of"):
        fitting.new_core(served_on(gpu, model))
    assert len(gpu.caches) == 5
    assert gpu.taken == 0
    # where the smallest of use is reached, there is nothing to try
    gpu.caches.clear()
    with pytest.raises(RequestError, match=r"max_model_len=512 needs, within .*=0\.9: 1\.00 of 1\.00 GB are"):
        fitting.new_core(served_on(gpu, model, max_num_seqs=1))
    assert len(gpu.caches) == 1


def test_what_is_asked_for_is_what_one_gets(monkeypatch, model):
    gpu = Gpu(monkeypatch, TOTAL)
    served = served_on(gpu, model, num_blocks=5)
    assert fitting.new_core(served).cache.pool.num_blocks == 5
    served = served_on(gpu, model, kv_cache_memory_bytes=7 * served.block_bytes + 1)
    assert fitting.new_core(served).cache.pool.num_blocks == 7


@pytest.mark.parametrize("name", ["num_blocks", "kv_cache_memory_bytes"])
def test_what_is_asked_for_and_does_not_fit_is_an_error(monkeypatch, model, name):
    gpu = Gpu(monkeypatch, 30 * 10**6)
    size = served_on(gpu, model).block_bytes
    value = 1000 if name == "num_blocks" else 1000 * size
    asked = rf"^{name}={value} asks for a KV cache of {1000 * size / 1e9:.2f} GB, .*: 0\.03 of 1\.00 GB are free"
    with pytest.raises(RequestError, match=asked):
        fitting.new_core(served_on(gpu, model, **{name: value}))
    # nothing has to run for that
    assert gpu.log == []
    # what fits into an empty device and not beside the steps
    monkeypatch.setattr(fitting, "try_out", lambda served: setattr(gpu, "free", 10**6))
    with pytest.raises(RequestError, match=rf"^{name}=.* 0\.00 of 1\.00 GB are free; .*need more\)$"):
        fitting.new_core(served_on(gpu, model, **{name: value // 10}))
    assert gpu.log.count(100) == 1
    # and what leaves no room for graphs
    gpu.free = gpu.graphs = 30 * 10**6
    monkeypatch.setattr(fitting, "try_out", lambda served: None)
    with pytest.raises(RequestError, match=r"lower it, or leave it out .*\(CUDA out of memory"):
        fitting.new_core(served_on(gpu, model, **{name: value // 100}))
    assert gpu.taken == 0


def test_no_room_for_one_request(monkeypatch, model):
    gpu = Gpu(monkeypatch, 10**5 + TOTAL // 10)
    with pytest.raises(RequestError, match=r"a KV cache of 32 blocks.*lower max_model_len.*0\.00 GB are left"):
        fitting.new_core(served_on(gpu, model))
    assert gpu.caches == []


def test_no_room_for_steps(monkeypatch, model):
    gpu = Gpu(monkeypatch, TOTAL)

    def try_out(served):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 3.00 GiB")

    monkeypatch.setattr(fitting, "try_out", try_out)
    with pytest.raises(RequestError, match=r"max_num_seqs=100 and 512 tokens a step do not fit .*lower .*3\.00"):
        fitting.new_core(served_on(gpu, model))
    assert gpu.log[-1] == "empty"


def test_graphs_of_caches_that_are_gone_are_forgotten(monkeypatch, model):
    gpu = Gpu(monkeypatch, TOTAL)
    served = served_on(gpu, model, num_blocks=5)
    cleared = []
    executor = types.SimpleNamespace(name="cuda", graphs=types.SimpleNamespace(clear=lambda: cleared.append(gpu.taken)))
    served.executor = executor
    fitting.new_core(served)
    assert cleared == [0]


def test_an_engine_goes_with_its_cache_at_once():
    llm = tiny(num_blocks=64)
    generate(llm, [prompt_ids(20), prompt_ids(5)], SamplingParams(max_tokens=3, n=2, seed=1))
    core, cache = weakref.ref(llm.core), weakref.ref(llm.core.cache)
    llm.shutdown()
    assert (core(), cache()) == (None, None)
