"""The machine code of the persistent decode kernel: what it takes, and that its weights wait for nothing."""

import json
import pathlib
import re
import shutil

import pytest
from cuda_build import RESOURCES, disassembled, persistent_everywhere, reachable

# bulk copies and what stands in for them before sm_90
FETCH = {"sm_80": "LDGSTS", "sm_90": "UBLKCP", "sm_100": "UBLKCP", "sm_120": "UBLKCP"}
# to wait for a chunk, read it and the activations from shared memory, unpack, multiply, add and release: of a thread, a
# weight. At 4, those of the 124M model are some 17 us of the 82 that an H100 needs to read them
MOST_INSTRUCTIONS = {"float16": 4.0, "bfloat16": 4.5}


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """An object for every architecture, and what ptxas said."""
    if shutil.which("nvcc") is None:
        pytest.skip("the CUDA toolkit (nvcc) is not installed")
    return persistent_everywhere(tmp_path_factory.mktemp("cuda"))


@pytest.fixture(scope="module")
def code(compiled):
    """(architecture, dtype) -> address -> instruction."""
    triton = pytest.importorskip("triton")
    tool = pathlib.Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    found = {}
    for name, instructions in disassembled(compiled[0], tool).items():
        found[name.split()[0], "bfloat16" if "BFloat" in name else "float16"] = instructions
    assert {architecture for architecture, _ in found} == set(FETCH)
    assert len(found) == 2 * len(FETCH)
    return found


def named(instructions, pattern):
    """Addresses of the instructions whose name matches."""
    return [at for at, text in instructions.items() if re.match(rf"(@!?U?P\w+\s+)?(?:{pattern})", text)]


def test_resources_are_those_of_the_table(compiled):
    """``python tests/support/cuda_build.py`` writes the table anew, for a change to be seen in review."""
    table = json.loads(RESOURCES.read_text())
    assert compiled[1] == table
    for instances in table.values():
        for numbers in instances.values():
            # 17 warps, five of them on one quarter of a multiprocessor with its 16384 registers
            assert 5 * 32 * numbers["registers"] <= 16384
            assert (numbers["stack"], numbers["spills"], numbers["static_shared"]) == (0, 0, 0)


def test_the_warp_that_fetches_waits_for_stages_alone(code):
    """From a fetch nothing can be reached that waits for other warps or blocks, or reads what they write."""
    for (architecture, dtype), instructions in code.items():
        fetches = named(instructions, FETCH[architecture])
        assert fetches, (architecture, dtype)
        after = set().union(*(reachable(instructions, at) for at in fetches))
        forbidden = set(named(instructions, r"BAR\b|RED|ATOM|LDG\b|LDG\.|LD\.|STG|ST\.|MEMBAR|ERRBAR|CCTL\.IV"))
        assert forbidden, "the rest of the kernel has all of these"
        assert not [instructions[at] for at in after & forbidden], (architecture, dtype)
        # it does wait for the stages
        assert after & set(named(instructions, r"SYNCS\.PHASECHK|LDS"))


def test_who_multiplies_reads_shared_memory_alone(code):
    """From the wait for a full stage to its release: 32 weights of a thread at most, no global memory."""
    for (architecture, dtype), instructions in code.items():
        # before sm_90 an mbarrier is not so easily seen
        if architecture == "sm_80":
            continue
        (release,) = named(instructions, r"SYNCS\.ARRIVE\.TRANS64\.A1T0")
        wait = max(at for at in named(instructions, r"SYNCS\.PHASECHK") if at < release)
        between = {at: text for at, text in instructions.items() if wait < at < release}
        assert len(named(between, r"FFMA")) == 32
        # weights, and two planes of activations
        assert len(named(between, r"LDS\.128")) == 3 * 32 / 8
        assert not named(between, r"LDG|LD\.|STG|BAR|RED|LDL|STL")
        assert len(between) / 32 <= MOST_INSTRUCTIONS[dtype], f"{architecture} {dtype}: {len(between) / 32:.2f}"
        assert not reachable(instructions, release) & set(named(instructions, FETCH[architecture]))
