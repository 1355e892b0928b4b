"""Which launches are captured, replayed and forgotten; with stand-ins for torch's graphs, so that no GPU is needed."""

import contextlib
import gc

import pytest
import torch

from gpt2rt.graph import cuda_graphs
from gpt2rt.graph.cuda_graphs import GraphStore


class Device:
    """What a GPU would have run, and what a capture recorded."""

    def __init__(self):
        self.log = []
        self.capturing = None
        self.error = None
        self.streams = []
        self.captured_on = []

    def launch(self, name):
        (self.log if self.capturing is None else self.capturing).append(name)


@pytest.fixture
def device(monkeypatch):
    device = Device()
    device_streams = device.captured_on

    class Graph:
        def __init__(self):
            self.recorded = []

        def replay(self):
            device.log.append(("replay", *self.recorded))

    @contextlib.contextmanager
    def capture(graph, pool, stream, capture_error_mode):
        assert pool == "pool"
        assert capture_error_mode == "thread_local"
        device.capturing = graph.recorded
        try:
            yield
            if device.error is not None:
                raise device.error
        finally:
            device.capturing = None

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", capture)
    monkeypatch.setattr(cuda_graphs, "_streams", {})
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: device_streams.append(device) or "stream")
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: "the caller's stream")
    monkeypatch.setattr(torch.cuda, "set_stream", device.streams.append)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: "pool")
    return device


def store(**options):
    return GraphStore(torch.device("cuda:0"), **options)


def test_a_step_runs_once_and_is_captured_then_replayed(device):
    graphs = store()
    for _ in range(3):
        graphs.run("a", lambda: device.launch("a"))
    assert device.log == ["a", ("replay", "a"), ("replay", "a")]
    graphs.run("b", lambda: device.launch("b"))
    assert device.log[3:] == ["b"]
    assert len(graphs) == 2
    graphs.clear()
    graphs.run("a", lambda: device.launch("a"))
    assert device.log[4:] == ["a"]
    # all captures, of other stores too, are made on one stream
    store().run("a", lambda: device.launch("a"))
    assert len(device.captured_on) == 1


def test_the_least_recently_used_is_forgotten(device):
    graphs = store(max_graphs=2)
    for key in ("a", "b", "a", "c", "a", "b"):
        graphs.run(key, lambda key=key: device.launch(key))
    assert device.log == ["a", "b", ("replay", "a"), "c", ("replay", "a"), "b"]


def fail(graphs, device, key):
    """A step whose capture fails."""
    device.error = RuntimeError(f"operation of {key} not permitted when stream is capturing")
    with pytest.warns(RuntimeWarning, match=f"cannot capture .*: operation of {key} not permitted") as warned:
        graphs.run(key, lambda: device.launch(key))
    device.error = None
    return str(warned[0].message)


def test_what_cannot_be_captured_is_launched_plainly(device):
    graphs = store()
    graphs.run("a", lambda: device.launch("a"))
    assert fail(graphs, device, "b").startswith("gpt2rt cannot capture a step as a CUDA graph")
    assert graphs.disabled == ""
    for key in ("a", "b", "b", "c", "c"):
        graphs.run(key, lambda key=key: device.launch(key))
    assert device.streams == ["the caller's stream"]
    assert gc.isenabled()
    # every step ran exactly once, and those of other sizes are still replayed
    assert device.log == ["a", "b", ("replay", "a"), "b", "b", "c", ("replay", "c")]


def test_after_three_failures_in_a_row_nothing_is_captured(device):
    graphs = store()
    graphs.run("a", lambda: device.launch("a"))
    for key in ("b", "c"):
        fail(graphs, device, key)
    # one that succeeds begins the count anew
    graphs.run("d", lambda: device.launch("d"))
    for key in ("e", "f"):
        fail(graphs, device, key)
    assert graphs.disabled == ""
    assert fail(graphs, device, "g").startswith("gpt2rt cannot capture CUDA graphs here")
    assert graphs.disabled == "3 captures in a row failed: operation of g not permitted when stream is capturing"
    assert len(graphs) == 0
    device.log.clear()
    for key in ("a", "b", "g", "h", "h"):
        graphs.run(key, lambda key=key: device.launch(key))
    assert device.log == ["a", "b", "g", "h", "h"]


def test_out_of_memory_is_not_a_failed_capture(device):
    graphs = store()
    device.error = torch.cuda.OutOfMemoryError("CUDA out of memory")
    with pytest.raises(torch.cuda.OutOfMemoryError):
        graphs.run("a", lambda: device.launch("a"))
    assert graphs.disabled == ""
    device.error = None
    graphs.run("a", lambda: device.launch("a"))
    graphs.run("a", lambda: device.launch("a"))
    assert device.log == ["a", "a", ("replay", "a")]


def test_graphs_can_be_turned_off(device):
    graphs = store(enabled=False)
    assert graphs.disabled == "CUDA graphs are turned off"
    graphs.run("a", lambda: device.launch("a"))
    graphs.run("a", lambda: device.launch("a"))
    assert device.log == ["a", "a"]
    assert GraphStore(torch.device("cpu")).disabled == "the weights are on cpu"
