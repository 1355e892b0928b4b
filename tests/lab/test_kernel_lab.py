"""The kernel lab: its list is complete, its errors find wrong kernels, its times are fair."""

import ast
import contextlib
import math
import pathlib
import time

import pytest
import torch

from gpt2rt import ops
from gpt2rt.lab import timing
from gpt2rt.lab.measure import choose, form_names, is_ours, measure, runs_on, size_text
from gpt2rt.lab.problem import DEFINITION, Place, Problem, error_of, patched, poison
from gpt2rt.lab.registry import OPERATIONS, Operation
from gpt2rt.lab.timing import Timer, Times

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent


def functions(module):
    """Names that a file under kernels/ defines or imports."""
    names = set()
    for node in ast.parse((ROOT / "kernels" / f"{module}.py").read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef):
            names.add(node.name)
        elif isinstance(node, ast.ImportFrom):
            names |= {alias.name for alias in node.names}
    return names


# ---- the list --------------------------------------------------------------------------------------------------------


def test_every_launcher_is_in_the_list():
    listed = {target for operation in OPERATIONS.values() for target in operation.triton}
    found = {
        f"{path.stem}:{node.name}"
        for path in (ROOT / "kernels").glob("*.py")
        for node in ast.parse(path.read_text(encoding="utf-8")).body
        if isinstance(node, ast.FunctionDef) and node.name.endswith("_triton") and not node.name.startswith("_")
    }
    assert listed == found


@pytest.mark.parametrize("operation", OPERATIONS.values(), ids=list(OPERATIONS))
def test_what_the_list_names_exists(operation):
    module, _, name = operation.reference.partition(":")
    assert name in functions(module)
    assert not operation.cpp or (ROOT / "csrc" / "cpu" / operation.cpp).is_file()
    for size in operation.sizes:
        assert size.keys() == operation.sizes[0].keys()


def test_operations_are_chosen_by_name():
    assert [operation.name for operation in choose(["sample", "layer_norm"])] == ["layer_norm", "sample"]
    assert len(choose(None)) == len(OPERATIONS)
    with pytest.raises(ValueError, match="no operation 'norm'; choose from layer_norm, "):
        choose(["norm"])


@pytest.mark.parametrize("operation", [o for o in OPERATIONS.values() if o.cpp], ids=lambda o: o.name)
def test_cpp_forms_agree_with_their_definitions(operation):
    if not ops.extension_status().loaded:
        pytest.skip(ops.extension_status().reason)
    for dtype in (torch.float32, torch.bfloat16):
        result = measure(operation, operation.toy, Place("cpu", dtype))
        assert result["forms"]["C++"]["ok"], result
        assert result["ok"]
        # in the dtype of the place: what plain torch gives, and what is timed beside the others
        assert result["forms"][DEFINITION]["error"] <= result["tolerance"], result


@pytest.mark.parametrize("name", ["layer_norm", "linear_residual", "paged_prefill_attention", "log_probabilities"])
def test_peers_compute_the_same(name):
    operation = OPERATIONS[name]
    size = operation.toy | ({"queries": 70} if name == "paged_prefill_attention" else {})
    forms = measure(operation, size, Place("cpu"))["forms"]
    peers = [form for form in forms if not is_ours(form)]
    assert peers
    assert all(forms[form]["error"] <= 2e-5 for form in peers)


# ---- errors ----------------------------------------------------------------------------------------------------------


def test_the_error_is_a_share_of_the_largest_magnitude():
    expected = torch.tensor([0.0, -4.0, 1.0], dtype=torch.float64)
    assert error_of(torch.tensor([0.0, -4.0, 1.5]), expected) == pytest.approx(0.125)
    assert error_of(expected, expected) == 0.0
    assert error_of(torch.zeros(0), torch.zeros(0)) == 0.0


def test_the_error_of_integers_counts_those_that_differ():
    assert error_of(torch.tensor([1, 2, 3]), torch.tensor([1, 5, 4])) == 2.0


@pytest.mark.parametrize(
    "result", [[1.0, math.nan], [1.0, math.inf], [math.nan, math.inf], [1.0, -math.inf], [1.0], [1.0, 2.0]]
)
def test_what_is_not_finite_must_be_the_same(result):
    expected = torch.tensor([1.0, math.inf], dtype=torch.float64)
    assert error_of(torch.tensor(result), expected) == (0.0 if result == [1.0, math.inf] else math.inf)


def test_poison_fills_every_dtype():
    floats, codes, ids = torch.zeros(3), torch.zeros(3, dtype=torch.float8_e4m3fn), torch.zeros(3, dtype=torch.int64)
    poison(floats, codes, ids)
    assert floats.isnan().all()
    assert (codes.view(torch.uint8) == 0xB3).all()
    assert (ids == -77).all()


def operation_of(**forms):
    """An operation on x = [1, 2] whose definition doubles it."""
    x, out = torch.tensor([1.0, 2.0]), torch.zeros(2)

    def build(place, n):
        return Problem(
            {name: lambda i, form=form: form(x, out) for name, form in forms.items()},
            lambda: 2 * x.double(),
            moved=16,
            operations=2,
            prepare=lambda: poison(out),
        )

    return Operation("double", "y = 2 x", "refs:none", (), "", build, {"n": 2}, ({"n": 2},))


def test_a_kernel_that_is_wrong_or_fails_or_leaves_its_output_is_found():
    def fails(x, out):
        raise RuntimeError("no\nluck")

    operation = operation_of(
        **{"C++": lambda x, out: x + x, "Triton": lambda x, out: x * 2.001, "Triton: lazy": lambda x, out: out},
        **{"Triton: broken": fails, "torch": lambda x, out: 3 * x},
    )
    result = measure(operation, {"n": 2}, Place("cpu"))
    forms = result["forms"]
    assert {name: form["ok"] for name, form in forms.items()} == {
        "C++": True,
        "Triton": False,
        "Triton: lazy": False,
        "Triton: broken": False,
        "torch": None,
    }
    assert forms["Triton"]["error"] == pytest.approx(5e-4, rel=0.01)
    assert forms["Triton: broken"]["failed"] == "RuntimeError: no luck"
    assert forms["Triton: lazy"]["error"] is None
    assert "NaN" in forms["Triton: lazy"]["failed"]
    assert not result["ok"]


def test_times_stand_beside_the_limit():
    operation = operation_of(**{"C++": lambda x, out: x + x, "torch": lambda x, out: x * 2})
    timer = Timer(torch.device("cpu"), rounds=3, target_us=10.0)
    result = measure(operation, {"n": 2}, Place("cpu"), timer, {"bytes_per_s": 1e6, "operations_per_s": 1e3})
    # 2 operations at 1000 a second take longer than 16 bytes at a million
    assert result["limit_us"] == pytest.approx(2000.0)
    for form in result["forms"].values():
        assert form["us"] >= form["p10_us"] > 0.0
        assert form["share"] == pytest.approx(2000.0 / form["us"])
        assert form["captured"] is False


def test_a_form_that_fails_only_when_timed_is_a_failure():
    calls = []

    def once(x, out):
        calls.append(1)
        if len(calls) > 1:
            raise RuntimeError("out of luck")
        return x + x

    timer = Timer(torch.device("cpu"), rounds=2)
    result = measure(operation_of(**{"C++": once}), {"n": 2}, Place("cpu"), timer)
    assert result["forms"]["C++"]["failed"] == "RuntimeError: out of luck"
    assert not result["ok"]


def test_the_definition_is_computed_once_for_all_forms():
    asked = []
    operation = operation_of(**{"C++": lambda x, out: x + x, "torch": lambda x, out: 3 * x})
    problem = operation.problem(Place("cpu"), {"n": 2})
    expected = problem.expected
    problem.expected = lambda: (asked.append(1), expected())[1]
    assert [problem.error(form) for form in ("C++", "torch", "C++")] == [0.0, pytest.approx(0.5), 0.0]
    assert len(asked) == 1


@pytest.mark.parametrize(("k", "tiles"), [(768, 8), (1600, 4), (1632, 2), (1616, 0)])
def test_torchs_int4_product_takes_whole_groups_of_tiles(k, tiles):
    """It was asked for eight tiles of every width: the problem of GPT-2 XL's, a target, could not even be made."""
    from gpt2rt.lab.products import inner_tiles

    assert inner_tiles(k) == tiles


@pytest.mark.parametrize("name", ["layer_norm", "sample", "write_kv", "linear_gelu_new", "paged_prefill_attention"])
def test_the_forms_of_a_size_are_told_without_its_data(name):
    operation = OPERATIONS[name]
    place = Place("cpu")
    for size in (operation.toy, operation.sizes[0]):
        assert form_names(operation, size, place) == list(operation.problem(place, size).forms)


def test_pytest_benchmark_has_the_forms_of_the_command_line():
    """It had one of gpt2rt's forms and one peer, chosen by their order."""
    pytest.importorskip("pytest_benchmark", reason="pip install 'gpt2rt[bench]'")
    import bench_kernels

    assert bench_kernels.DEVICE.type == "cpu"
    found = {}
    for case in bench_kernels._cases():
        operation, size, form = case.values
        found.setdefault((operation.name, size_text(size)), []).append(form)
    place = Place("cpu")
    listed = {o.name for o in OPERATIONS.values() if runs_on(o, place)}
    assert {name for name, _ in found} == listed
    assert len(found) == sum(len(o.sizes) for o in OPERATIONS.values() if o.name in listed)
    assert all(DEFINITION in forms for forms in found.values())


def test_the_definitions_time_is_left_out_where_there_is_another_peer():
    forms = {"C++": lambda x, out: x + x, DEFINITION: lambda x, out: 2 * x}
    alone = measure(operation_of(**forms), {"n": 2}, Place("cpu"), definition=False)
    assert set(alone["forms"]) == {"C++", DEFINITION}
    beside = measure(operation_of(**forms, torch=lambda x, out: 2 * x), {"n": 2}, Place("cpu"), definition=False)
    assert set(beside["forms"]) == {"C++", "torch"}


def test_a_call_that_takes_long_has_few_rounds(monkeypatch):
    monkeypatch.setattr(timing, "_MOST_US", 1.0)
    calls = {"slow": lambda i: time.sleep(1e-3), "fast": lambda i: None}
    times, _ = Timer(torch.device("cpu"), rounds=5, target_us=1.0).compare(calls)
    assert times["slow"].samples == 3


def test_whose_a_form_is():
    assert all(is_ours(form) for form in ("C++", "Triton", "CUDA C++", "Triton: n8 w8"))
    assert not any(is_ours(form) for form in ("torch", "torch, dense", "definition", "Tritonish"))


def test_sizes_in_words():
    assert size_text({"rows": 8, "format": "int4"}) == "rows=8 format=int4"


# ---- times and variants ----------------------------------------------------------------------------------------------


def test_peers_take_turns_and_copies_too():
    order = []
    calls = {name: lambda i, name=name: order.append((name, i)) for name in "ab"}
    timer = Timer(torch.device("cpu"), rounds=4, target_us=1e9, max_calls=3)
    times, failed = timer.compare(calls, copies=5)
    assert not failed
    assert all(t.samples == 4 for t in times.values())
    measured = order[6:]  # two warm-up calls and a guess each
    turns = [measured[i : i + 3] for i in range(0, len(measured), 3)]
    assert [turn[0][0] for turn in turns] == ["a", "b", "b", "a", "a", "b", "b", "a"]
    # the next round goes on with the next copies
    assert [i for name, i in measured if name == "a"] == [0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 0, 1]


class FakeDevice:
    """torch.cuda as far as the timer needs it: launching a call takes the host a millisecond, running it 10 us."""

    def __init__(self, monkeypatch):
        self.clock_us, self.capturing, self.graphs, self.order = 0.0, None, [], []
        device = self

        class Graph:
            def __init__(self):
                self.calls = 0
                device.graphs.append(self)

            def replay(self):
                device.order.append("replay")
                device.clock_us += 10.0 * self.calls

        class Event:
            def __init__(self, enable_timing):
                assert enable_timing

            def record(self):
                device.order.append("event")
                self.at = device.clock_us

            def synchronize(self):
                pass

            def elapsed_time(self, end):
                return (end.at - self.at) * 1e-3

        @contextlib.contextmanager
        def graph(which, capture_error_mode):
            device.capturing = which
            yield
            device.capturing = None

        names = {"CUDAGraph": Graph, "Event": Event, "graph": graph, "current_stream": lambda _: None}
        names |= {"synchronize": lambda _: None, "_sleep": lambda _: device.order.append("busy")}
        for name, fake in names.items():
            monkeypatch.setattr(torch.cuda, name, fake)

    def call(self, copy):
        if self.capturing is None:
            time.sleep(1e-3)
            self.clock_us += 10.0
        else:
            self.capturing.calls += 1


def test_a_graph_holds_as_many_calls_as_its_own_time_asks_for(monkeypatch):
    """It was counted by the time that launching from Python takes: one call, and the gap before it."""
    device = FakeDevice(monkeypatch)
    timer = Timer(torch.device("cuda"), rounds=3, target_us=1000.0, max_calls=64)
    times, failed = timer.compare({"x": device.call}, copies=3)
    assert not failed
    # 100 calls would fill the time; 64 are the most
    assert [graph.calls for graph in device.graphs] == [3, 64]
    assert (times["x"].median, times["x"].samples, times["x"].captured) == (pytest.approx(10.0), 3, True)
    # busy while the graph is launched, so that nothing lies between the event and it
    assert device.order[-4:] == ["busy", "event", "replay", "event"]


def test_a_timer_that_does_not_warm_up_calls_once():
    calls = []
    times, _ = Timer(torch.device("cpu"), rounds=1, warm=False).compare({"x": calls.append}, copies=5)
    assert calls == [0]
    assert times["x"].samples == 1


def test_median_and_tenth_percentile():
    times = Times.of([float(i) for i in range(20, 0, -1)], True)
    assert (times.median, times.p10, times.samples, times.captured) == (10.5, 3.0, 20, True)


def test_a_variant_changes_a_name_for_as_long_as_it_is_tried():
    from gpt2rt.kernels import weights

    with patched("weights", "CHUNK", 32):
        assert weights.CHUNK == 32
    assert weights.CHUNK == 64
    with pytest.raises(ZeroDivisionError), patched("weights", "CHUNK", 0):
        _ = 1 // weights.CHUNK
    assert weights.CHUNK == 64


def test_cold_data_has_copies():
    assert Place("cpu").copies(100) == 1
    assert Place("cpu", cold_bytes=1000).copies(300) == 4
    assert Place("cpu", cold_bytes=1 << 40).copies(1) == 64
    problem = OPERATIONS["layer_norm"].problem(Place("cpu", cold_bytes=10_000), {"rows": 3, "n": 100})
    assert problem.copies == 5
    first, last = (problem.forms["torch"](i) for i in (0, 4))
    assert not torch.equal(first, last)
