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


def test_there_is_nothing_to_order_on_the_cpu(current):
    order = StreamOrder(torch.device("cpu"))
    order.join()
    assert current.log == []
