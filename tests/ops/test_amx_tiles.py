"""The kernels on AMX tiles, on a processor without them: the same sources, compiled here. The numbers and their bits.

Everything is proven twice, with tiles in plain C++ and with the machine code for AMX, whose instructions a signal
handler carries out. On a processor with AMX, test_isa_cpu.py runs the tests of this folder on the tiles themselves.
"""

import math
import os
import shlex
import shutil
import struct
import subprocess

import emulated_tiles
import pytest
import torch
from emulated_tiles import Linear, bfloat16_ref
from quantized_cases import Case, random_case

import gpt2rt.ops as ops
from gpt2rt.kernels.quantized_linear import quantized_linear_ref

FORMATS = ["int8", "int4-g32", "int4-g64", "int4-g128", "int4-g64-zeros"]
# rows: one tile, two, an odd number of tiles, tiles that overlap, more than are kept at a time
ROWS = [1, 8, 9, 16, 17, 33, 97, 113]


@pytest.fixture(scope="module", params=["emulated", "trapped"])
def library_path(request, tmp_path_factory):
    compiler = shlex.split(os.environ.get("CXX", "c++"))
    if shutil.which(compiler[0]) is None:
        pytest.skip(f"the kernels are compiled here, and there is no compiler {compiler[0]}; set CXX")
    if request.param == "trapped":
        if ops.cpu_isa() not in ("avx512_bf16", "amx"):
            pytest.skip("beside the tiles, the machine code for AMX uses what avx512_bf16 has")
        known = subprocess.run([*compiler, "-mamx-tile", "-E", "-x", "c++", os.devnull], capture_output=True)
        if known.returncode != 0:
            pytest.skip(f"{compiler[0]} does not know AMX")
    return emulated_tiles.build(tmp_path_factory.mktemp("tiles"), request.param)


@pytest.fixture(scope="module")
def library(library_path):
    loaded = emulated_tiles.load(library_path)
    if library_path.name.startswith("emulated"):
        yield loaded
        return
    loaded.trap_tiles()
    yield loaded
    loaded.untrap_tiles()


def int4_case(group, n, k, zeros=False):
    groups = -(-k // group)
    codes = torch.randint(0, 256, (n, -(-k // 2)), dtype=torch.uint8)
    scales = (torch.rand(n, groups) * 0.01 + 0.001).half()
    return Case(codes, scales, torch.randint(0, 16, (n, groups), dtype=torch.uint8) if zeros else None, None, k, group)


def assert_int8_is_right(linear, case, x):
    rows = linear.rows(x)
    y = linear(rows)
    # the same bits as without tiles, and the numbers of the definition
    assert torch.equal(y, linear(rows, tiles=False))
    expected = quantized_linear_ref(x, *case.tensors, None, case.in_features, case.group_size, True)
    size = expected.abs().amax(dim=1, keepdim=True) + 1.0
    assert float(((y - expected).abs() / size).max()) < 2e-6


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize(("n", "k"), [(1, 1), (65, 63), (70, 129), (130, 200), (64, 256), (17, 331)])
def test_int8_rows(library, name, n, k):
    case = random_case(name, n, k)
    linear = Linear(library, case)
    for m in ROWS:
        assert_int8_is_right(linear, case, torch.randn(m, k) * torch.logspace(-2, 2, m)[:, None])


@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize("group", [96, 160, 256, 512])
def test_groups_of_other_sizes(library, group, zeros):
    """A multiple of 32 but not of 64; the longest that is unpacked; one that goes to the kernel without tiles."""
    case = int4_case(group, 70, 600, zeros)
    linear = Linear(library, case)
    for m in (9, 40):
        assert_int8_is_right(linear, case, torch.randn(m, 600))


def test_extreme_codes_do_not_saturate(library):
    """127 * 255 in all places: where pairs were summed in 16 bits, this would show."""
    case = Case(torch.full((64, 128), 127, dtype=torch.int8), torch.ones(64), None, None, 128, 128)
    x = torch.ones(20, 128)
    y = Linear(library, case)(Linear(library, case).rows(x))
    torch.testing.assert_close(y, torch.full((20, 64), 127.0 * 128.0), rtol=1e-6, atol=0)


@pytest.mark.parametrize(("n", "k"), [(1, 1), (64, 32), (65, 31), (70, 64), (130, 77), (64, 96), (17, 130)])
def test_bfloat16_rows_to_the_bit(library, n, k):
    weight = torch.randn(n, k).bfloat16()
    linear = Linear(library, weight)
    for m in ROWS:
        x = torch.randn(m, k).bfloat16()
        assert torch.equal(linear(linear.rows(x)), bfloat16_ref(x, weight)), (m, n, k)


def test_bfloat16_is_near_the_exact_product(library, assert_matmul):
    x, weight = torch.randn(33, 768).bfloat16(), torch.randn(70, 768).bfloat16() / math.sqrt(768)
    linear = Linear(library, weight)
    exact = x.double() @ weight.double().t()
    assert_matmul(linear(linear.rows(x)), x.float() @ weight.float().t(), exact)


@pytest.mark.parametrize("name", [*FORMATS, "bfloat16"])
def test_rows_do_not_depend_on_company(library, name):
    """The bits of a row are the same alone, among any number of others and at any place."""
    n, k = 70, 200
    linear = Linear(library, torch.randn(n, k) if name == "bfloat16" else random_case(name, n, k))
    rows = linear.rows(torch.randn(200, k))
    together = linear(rows)
    for m in range(1, 41):
        first = m % 7
        assert torch.equal(linear(rows[first : first + m]), together[first : first + m]), m
    # negative control: the comparison sees one bit
    wrong = together.clone()
    wrong.view(torch.int32)[3, 3] ^= 1
    assert not torch.equal(wrong, together)


@pytest.mark.parametrize("name", ["int8", "int4-g64", "bfloat16"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("m", [3, 21, 35])
def test_epilogues(library, name, dtype, m):
    n, k = 130, 100
    linear = Linear(library, torch.randn(n, k) / 10 if name == "bfloat16" else random_case(name, n, k))
    bias, residual = torch.randn(n), torch.randn(m, n).to(dtype)
    rows = linear.rows(torch.randn(m, k))
    plain = linear(rows)
    assert torch.equal(linear(rows, bias=bias), plain + bias)
    assert torch.equal(linear(rows, dtype=dtype), plain.to(dtype))
    # the rows that the last tile repeats are not added to the residual twice
    for in_place in (False, True):
        y = linear(rows, bias=bias, residual=residual, in_place=in_place, dtype=dtype)
        assert torch.equal(y, (residual.float() + (plain + bias)).to(dtype))
    gelu = torch.nn.functional.gelu(plain + bias, approximate="tanh") + residual.float()
    y = linear(rows, bias=bias, activation="gelu_new", residual=residual, dtype=dtype)
    rtol, atol = {torch.float32: (1.3e-6, 1e-5), torch.bfloat16: (1.6e-2, 1e-2), torch.float16: (1e-3, 1e-3)}[dtype]
    torch.testing.assert_close(y.float(), gelu, rtol=rtol, atol=atol)


@pytest.mark.parametrize("name", ["int8", "int4-g32", "bfloat16"])
@pytest.mark.parametrize(("group", "next_name"), [(64, "int8"), (32, "int4-g32")])
def test_results_in_groups_for_the_next_weight(library, name, group, next_name):
    """They are what preparing the rows of float32 gives, to the byte."""
    n, k, m = 192, 100, 37
    linear = Linear(library, torch.randn(n, k) / 10 if name == "bfloat16" else random_case(name, n, k))
    following = Linear(library, random_case(next_name, 64, n))
    rows, bias = linear.rows(torch.randn(m, k)), torch.randn(n)
    wide = linear(rows, bias=bias, activation="gelu_new")
    expected = following.rows(wide)
    assert torch.equal(linear.grouped(rows, bias, "gelu_new", group, expected.size(1)), expected)


@pytest.mark.parametrize("name", ["int8", "int4-g64", "bfloat16"])
@pytest.mark.parametrize("m", [5, 20])
def test_only_the_panels_asked_for_are_written(library, name, m):
    n, k = 200, 130
    linear = Linear(library, torch.randn(n, k) if name == "bfloat16" else random_case(name, n, k))
    rows = linear.rows(torch.randn(m, k))
    whole, part = linear(rows), linear(rows, panels=(1, 3))
    assert torch.equal(part[:, 64:192], whole[:, 64:192])
    assert part[:, :64].isnan().all()
    assert part[:, 192:].isnan().all()
    assert linear(rows, panels=(2, 2)).isnan().all()


@pytest.mark.parametrize("name", ["int8", "int4-g64", "bfloat16"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_damage_stays_in_its_row_and_shows(library, name, value):
    n, k = 70, 130
    linear = Linear(library, torch.randn(n, k) if name == "bfloat16" else random_case(name, n, k))
    x = torch.randn(20, k)
    clean = linear(linear.rows(x))
    x[13, 129] = value
    y = linear(linear.rows(x))
    assert not y[13].isfinite().any()
    others = [i for i in range(20) if i != 13]
    assert torch.equal(y[others], clean[others])


def test_tiles_are_released(library):
    """After each kernel; a thread that keeps them pays for them at every switch of context."""
    for weight in (random_case("int8", 70, 130), random_case("int4-g64", 70, 130), torch.randn(70, 130)):
        linear = Linear(library, weight)
        for m in (1, 20, 40):
            linear(linear.rows(torch.randn(m, 130)))
            assert library.tiles_in_use() == 0


def test_the_machine_code_runs_on_tiles(library_path, library):
    """Else the other tests of this form would prove something else."""
    if library_path.name.startswith("emulated") or ops.cpu_isa() == "amx":
        pytest.skip("nothing is trapped here")
    before = library.trapped_instructions()
    linear = Linear(library, torch.randn(64, 64))
    linear(linear.rows(torch.randn(1, 64)))
    # configuration, 4 sums set to zero, 2 steps of 5 loads and 4 products, 4 stores, release
    assert library.trapped_instructions() - before == 1 + 4 + 2 * 9 + 4 + 1


# ---- the check before the kernels are used


def test_the_check_accepts_right_kernels_and_refuses_wrong_ones(library):
    assert library.check(0) == 1
    assert [library.check(damage) for damage in (1, 2, 3)] == [0, 0, 0]


# ---- the emulation against the manual


def config(rows, inner):
    """C has ``rows`` rows of 64 bytes, A ``rows`` of 4 * ``inner`` bytes, B ``inner`` of 64."""
    row_bytes, tile_rows = [0] * 16, [0] * 16
    for tile, (count, width) in {0: (rows, 64), 4: (rows, 4 * inner), 6: (inner, 64)}.items():
        tile_rows[tile], row_bytes[tile] = count, width
    return struct.pack("<BB14x16H16B", 1, 0, *row_bytes, *tile_rows)


def product(library, kind, shape, a, b, c):
    """C + A B, all [16, 64 bytes] in memory."""
    c = c.clone()
    library.product(kind, shape, a.data_ptr(), b.data_ptr(), c.data_ptr())
    return c


def test_emulated_int8_product(library):
    a = torch.randint(-128, 128, (16, 64), dtype=torch.int8)
    b = torch.randint(0, 256, (16, 16, 4), dtype=torch.uint8)
    c = torch.randint(-(2**30), 2**30, (16, 16), dtype=torch.int32)
    for rows, inner in [(16, 16), (1, 16), (5, 3), (16, 1)]:
        y = product(library, 0, config(rows, inner), a, b, c)
        columns = b[:inner].permute(0, 2, 1).reshape(4 * inner, 16)
        assert torch.equal(y[:rows], c[:rows] + a[:rows, : 4 * inner].int() @ columns.int())
        # a store writes the rows of the configuration only
        assert torch.equal(y[rows:], c[rows:])


def test_emulated_bfloat16_product(library):
    a, b = torch.zeros(16, 32).bfloat16(), torch.zeros(16, 16, 2).bfloat16()
    c = torch.zeros(16, 16)
    full = config(16, 16)
    # even: 1 + 2^-24 rounds to 1; odd: 2^-24; one chain over all would have summed the small ones first or last
    a[0, :4] = torch.tensor([1.0, 2.0**-24, 2.0**-24, 2.0**-24])
    b[:, 0] = 1.0
    assert product(library, 1, full, a, b, c)[0, 0] == 1.0 + 2.0**-23
    # the sum of a tile is rounded before it meets C
    c[0, 0] = -1.0
    assert product(library, 1, full, a, b, c)[0, 0] == 2.0**-23
    # subnormal: elements, products and C count as zero
    a.zero_(), b.zero_(), c.zero_()
    a[0, 0], b[0, 0, 0], b[0, 1, 0], c[0, 2] = 2.0**-127, 1.0, 2.0**100, 2.0**-130
    assert product(library, 1, full, a, b, c)[0].eq(0).all()
    a[0, 0], b[0, 0, 0] = 2.0**-100, 2.0**-30
    assert product(library, 1, full, a, b, c)[0, 0] == 0
    b[0, 0, 0] = 2.0**-26
    assert product(library, 1, full, a, b, c)[0, 0] == 2.0**-126


# without torch, so that it starts fast
FAULT = """
import ctypes, sys
library, tile = ctypes.CDLL(sys.argv[1]), ctypes.create_string_buffer(1024)
if hasattr(library, "trap_tiles"):
    library.trap_tiles()
library.product(1, bytes.fromhex(sys.argv[2]), tile, tile, tile)
"""


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({0: 2}, "the palette is not 1"),
        ({3: 1}, "a reserved byte is not 0"),
        ({48: 17}, "at most 16 rows of 64 bytes"),
        ({16: 65}, "at most 16 rows of 64 bytes"),
        ({49: 4}, "rows without bytes"),
        ({32: 64, 56: 16}, "there are 8 tiles"),
        ({52: 8}, "shapes do not fit"),
        ({54: 8}, "shapes do not fit"),
    ],
)
def test_what_faults_on_a_processor_ends_the_emulation(library_path, run_python, change, message):
    """So a kernel whose configuration is wrong cannot pass the tests above."""
    shape = bytearray(config(16, 16))
    for offset, value in change.items():
        shape[offset] = value
    done = run_python(FAULT, str(library_path), shape.hex())
    assert done.returncode < 0, done.stdout
    assert message in done.stderr
