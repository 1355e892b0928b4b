"""The cache of a call: rounded up on a GPU, exact where that does not fit, an error where nothing does."""

import dataclasses

import pytest
import torch

from gpt2rt import GPT2Config, GPT2LMHeadModel
from gpt2rt.errors import RequestError
from gpt2rt.generation import reserve
from gpt2rt.generation.reserve import new_cache, rounded
from gpt2rt.graph import make_executor


@pytest.fixture
def executor():
    model = GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=8, n_head=1, vocab_size=11, bos_token_id=0, eos_token_id=0))
    return make_executor(model.eval().build_graph(), "eager")


def test_rounding():
    for count in range(1, 5000):
        up = rounded(count)
        assert up >= count
        assert up <= max(64, 1.25 * count)
    assert len({rounded(count) for count in range(1, 5000)}) < 40


def test_a_cpu_cache_is_exact(executor):
    assert new_cache(executor, 5, "5 rows", "ask for fewer").pool.num_blocks == 5


def on_gpu(executor):
    executor.plan = dataclasses.replace(executor.plan, device=torch.device("cuda:0"))


class Device:
    """A CUDA device with room for so many blocks."""

    def __init__(self, monkeypatch, room):
        self.tried = []
        make = reserve.PagedKVCache

        def allocate(*sizes, device, **options):
            self.tried.append(sizes[3])
            if sizes[3] > room:
                raise torch.cuda.OutOfMemoryError("CUDA out of memory")
            return make(*sizes, **options)

        monkeypatch.setattr(reserve, "PagedKVCache", allocate)
        monkeypatch.setattr(reserve, "_memory_bytes", lambda device: 2**40)
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (2 * 10**9, 2**40))
        monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 3 * 10**9)
        monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 2 * 10**9)


def test_a_gpu_cache_is_rounded_up_where_that_fits(executor, monkeypatch):
    on_gpu(executor)
    device = Device(monkeypatch, 100)
    assert new_cache(executor, 70, "70 rows", "ask for fewer").pool.num_blocks == 80
    assert new_cache(executor, 99, "99 rows", "ask for fewer").pool.num_blocks == 99
    assert device.tried == [80, 112, 99]


def test_a_number_that_was_chosen_is_not_rounded(executor, monkeypatch):
    on_gpu(executor)
    device = Device(monkeypatch, 100)
    assert new_cache(executor, 70, "an engine", "lower num_blocks", exact=True).pool.num_blocks == 70
    assert device.tried == [70]


def test_out_of_memory_is_one_request_s_error(executor, monkeypatch):
    on_gpu(executor)
    device = Device(monkeypatch, 100)
    with pytest.raises(RequestError, match=r"200 rows need up to 0\.0 GB of KV cache.*only 3\.0 GB are free; ask for"):
        new_cache(executor, 200, "200 rows", "ask for fewer")
    assert device.tried == [224, 200]
