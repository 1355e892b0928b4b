"""Work on several streams runs in the order it was queued; with stand-ins for torch's streams, so no GPU is needed."""

import pytest
import torch

from gpt2rt.graph.streams import StreamOrder


class Stream:
    def __init__(self, name, log):
        self.name, self.log = name, log

    def wait_stream(self, other):
        self.log.append((self.name, other.name))


@pytest.fixture
def current(monkeypatch):
    """Sets the current stream; returns who waited for whom."""
    log, streams, state = [], {}, {}

    def choose(name):
        state["current"] = streams.setdefault(name, Stream(name, log))

    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: state["current"])
    choose.log = log
    return choose


def test_a_stream_waits_for_the_one_before_it(current):
    order = StreamOrder(torch.device("cuda:0"))
    for name in ("a", "a", "b", "b", "a", "c"):
        current(name)
        order.join()
    assert current.log == [("b", "a"), ("a", "b"), ("c", "a")]


class Memory:
    """A tensor of somebody else."""

    def __init__(self):
        self.recorded = []

    def record_stream(self, stream):
        self.recorded.append(stream.name)


def test_tensors_of_others_are_recorded_where_there_are_several_streams(current):
    order, cache = StreamOrder(torch.device("cuda:0")), Memory()
    for name in ("a", "a", "b", "b", "a"):
        current(name)
        order.join(cache, None)
    # on one stream alone there is nothing to wait for
    assert cache.recorded == ["b", "b", "a"]


def test_memory_is_given_back_after_the_last_work(current):
    class Owner:
        pass

    owner, order = Owner(), StreamOrder(torch.device("cuda:0"))
    order.settle_with(owner)
    for name in ("a", "b", "c", "b"):
        current(name)
        order.join()
    before = len(current.log)
    del owner
    # whatever stream its tensors were allocated on: what comes next there comes after the last work
    assert current.log[before:] == [("a", "b"), ("c", "b")]


def test_an_owner_without_work_leaves_nothing_to_wait_for(current):
    order = StreamOrder(torch.device("cuda:0"))
    order._settle()
    current("a")
    order.join()
    order._settle()
    assert current.log == []


def test_there_is_nothing_to_order_on_the_cpu(current):
    order, cache = StreamOrder(torch.device("cpu")), Memory()
    order.join(cache)
    order._settle()
    assert (current.log, cache.recorded) == ([], [])
