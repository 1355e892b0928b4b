"""The persistent decode kernel, run on the host with all its blocks, against the definition in float64.

The source is the device's own; ``tests/support/cuda_grid_on_host.h`` stands in for the device.
"""

import ctypes
import dataclasses
import math

import pytest
import torch
from cuda_persistent_host import SHARED_BYTES, emulating, library, new_state, register, sized, stages_for
from cuda_rows_host import why_not

from gpt2rt.kernels import persistent_decode as kernel
from gpt2rt.kernels.persistent_decode import (
    DecodeLayer,
    DecodeWeights,
    chunk_elements,
    pack_decode_weights,
    pack_tiles,
    persistent_decode_cuda,
    persistent_decode_ref,
    unpack_tiles,
)

if why_not() is not None:
    pytest.skip(str(why_not()), allow_module_level=True)

BLOCK = 16
DTYPES = (torch.float16, torch.bfloat16)


@pytest.fixture(scope="module", autouse=True)
def op_on_the_host():
    return register()


@dataclasses.dataclass
class Model:
    """Random weights of one shape, and the same packed."""

    layers: list[DecodeLayer]
    final_norm: tuple[torch.Tensor, torch.Tensor]
    head: torch.Tensor
    wte: torch.Tensor
    wpe: torch.Tensor
    weights: DecodeWeights
    n_head: int
    head_dim: int
    eps: float = 1e-5


def make_model(n_layer, n_head, head_dim, inner, vocab, *, n_embd=None, dtype=torch.float16, positions=1024, **options):
    torch.manual_seed(0)
    wide = n_head * head_dim
    n_embd = n_embd or wide
    has_bias = options.pop("bias", True)

    def normal(*shape, scale=1.0):
        return (torch.randn(*shape) * scale).to(dtype)

    def product(n, k):
        # as Conv1D stores it, for half of them
        weight = normal(n, k, scale=k**-0.5) if n % 2 else normal(k, n, scale=k**-0.5).t()
        return weight, normal(n, scale=0.1) if has_bias else None

    def norm():
        return 1 + normal(n_embd, scale=0.1), normal(n_embd, scale=0.1)

    layers = [
        DecodeLayer(
            norm(),
            product(3 * wide, n_embd),
            product(n_embd, wide),
            norm(),
            product(inner, n_embd),
            product(n_embd, inner),
            head_dim**-0.5 / (i + 1),
        )
        for i in range(n_layer)
    ]
    final_norm, head = norm(), normal(vocab, n_embd, scale=n_embd**-0.5)
    weights = pack_decode_weights(layers, final_norm, head, eps=1e-5, **options)
    # rows of the tables are cut out of wider ones
    wte, wpe = normal(vocab, n_embd + 3)[:, :n_embd], normal(positions, n_embd + 1)[:, :n_embd]
    return Model(layers, final_norm, head, wte, wpe, weights, n_head, head_dim)


class Sequence:
    """A sequence of random tokens in a paged cache whose other places are NaN, and the state of the kernel."""

    def __init__(self, model, length, *, splits=None, block_size=BLOCK):
        self.model, self.length, self.block_size = model, length, block_size
        n_layer, wide = len(model.layers), model.n_head * model.head_dim
        count = -(-(length + 8) // block_size)
        shape = n_layer, 2, count + 3, model.n_head, block_size, model.head_dim
        self.cache = torch.full(shape, math.nan, dtype=model.head.dtype)
        self.table = torch.randperm(count + 3)[:count].to(torch.int32)[None]
        for token in range(length):
            block, offset = self.place(token)
            self.cache[:, :, block, :, offset] = torch.randn(n_layer, 2, model.n_head, model.head_dim).to(
                model.head.dtype
            )
        self.splits = splits or -(-(length + 8) // 64)
        sizes = model.head.size(1), wide, model.weights.inner, model.n_head, self.splits
        self.workspace, self.barrier = new_state(*sizes)

    def place(self, token):
        return int(self.table[0, token // self.block_size]), token % self.block_size

    def step(self, token=5, **changes):
        """Append a token; logits and hidden row."""
        block, offset = self.place(self.length)
        inputs = {
            "input_ids": torch.tensor([token]),
            "position_ids": torch.tensor([self.length]),
            "slot_mapping": torch.tensor([block * self.block_size + offset]),
            "seq_lens": torch.tensor([self.length + 1], dtype=torch.int32),
            "block_table": self.table,
            **changes,
        }
        self.length += 1
        logits, hidden = (
            torch.full((1, len(self.model.head)), math.nan),
            torch.full((1, self.model.head.size(1)), math.nan),
        )
        rest = self.cache, self.workspace, self.barrier, logits, hidden
        tables = self.model.weights, self.model.wte, self.model.wpe
        persistent_decode_cuda(
            *tables,
            **inputs,
            **dict(zip(("cache", "workspace", "barrier", "logits", "hidden"), rest, strict=True)),
            num_splits=self.splits,
        )
        return logits[0], hidden[0]

    def context(self):
        """[n_layer, 2, n_head, length, head_dim] float64, as the cache holds it."""
        blocks = self.cache[:, :, self.table[0].long()]
        return blocks.transpose(2, 3).flatten(3, 4)[:, :, :, : self.length].double()


def check(sequence, logits, hidden, token=5):
    """Of the last step: sums in float32 are the only roundings but that of keys and values."""
    model, context = sequence.model, sequence.context()
    weights = model.weights
    tables = model.layers, model.final_norm, model.head, model.wte, model.wpe
    expected, expected_hidden, written = persistent_decode_ref(
        *tables, token, sequence.length - 1, context, eps=weights.eps, activation=weights.activation
    )
    for found, definition in ((logits, expected), (hidden, expected_hidden)):
        error = (found.double() - definition).abs().max().item()
        # "not >" would let NaN pass
        assert error <= 4e-6 * max(1.0, definition.abs().max().item()), f"largest error {error:.2e}"
    found = context[:, :, :, -1]
    unit = torch.finfo(model.head.dtype).eps
    assert ((found - written).abs() <= 0.51 * unit * written.abs() + 1e-6).all()


# layers, heads, head_dim, inner, vocab, tokens in the cache, blocks: GPT-2's sizes and odd ones
SHAPES = [
    (2, 1, 64, 256, 61, 0, 3),
    (2, 4, 16, 389, 7, 62, 1),
    (1, 5, 8, 1, 1, 63, 4),
    (3, 3, 40, 130, 77, 64, 7),
    (1, 3, 72, 600, 30, 127, 132),
    (1, 2, 128, 1000, 129, 300, 5),
    (1, 12, 64, 3072, 53, 1022, 132),
    (1, 16, 64, 4096, 33, 255, 3),
    (1, 20, 64, 5120, 9, 191, 16),
    (1, 25, 64, 6400, 41, 17, 132),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("layers", "heads", "head_dim", "inner", "vocab", "past", "blocks"), SHAPES)
def test_matches_the_definition(layers, heads, head_dim, inner, vocab, past, blocks, dtype):
    model = make_model(layers, heads, head_dim, inner, vocab, dtype=dtype)
    sequence = Sequence(model, past)
    with emulating(blocks=blocks, bulk=dtype == torch.float16):
        result = sequence.step(token=vocab - 1)
    check(sequence, *result, token=vocab - 1)


def test_heads_that_are_not_the_width_of_the_model():
    for n_embd in (64, 200):
        sequence = Sequence(make_model(2, 3, 40, 90, 33, n_embd=n_embd), 70)
        check(sequence, *sequence.step())


@pytest.mark.parametrize("block_size", [8, 32, 128])
def test_other_block_sizes(block_size):
    sequence = Sequence(make_model(2, 3, 16, 90, 33), 150, block_size=block_size)
    check(sequence, *sequence.step())


@pytest.mark.parametrize("activation", ["linear", "gelu_new", "gelu", "relu", "silu", "tanh", "quick_gelu"])
def test_activations(activation):
    sequence = Sequence(make_model(1, 2, 16, 70, 20, activation=activation), 9)
    check(sequence, *sequence.step())


def test_without_biases():
    sequence = Sequence(make_model(2, 2, 32, 256, 30, bias=False), 40)
    check(sequence, *sequence.step())


DEVICES = [
    *({"blocks": blocks} for blocks in (2, 3, 17, 132)),
    *({"blocks": 3, "stages": stages, "seed": stages} for stages in (1, 2, 5)),
    {"blocks": 5, "bulk": False, "seed": 7},
    {"blocks": 4, "architecture": 86, "seed": 8},
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bits_do_not_depend_on_the_grid_nor_the_ring_nor_the_order_of_threads(dtype):
    model = make_model(2, 4, 24, 1100, 133, dtype=dtype)
    results = []
    for device in [{"blocks": 1}, *DEVICES]:
        torch.manual_seed(1)
        sequence = Sequence(model, 140)
        with emulating(**device):
            results.append((*sequence.step(), sequence.cache.nan_to_num(7.0)))
    check(sequence, *results[-1][:2])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_bits_do_not_depend_on_how_many_splits_there_is_room_for():
    model = make_model(2, 2, 32, 128, 50)
    results = []
    for splits in (2, 3, 16):
        torch.manual_seed(1)
        results.append(Sequence(model, 100, splits=splits).step()[0])
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


@pytest.mark.parametrize("groups", [1, 2])
def test_launches_follow_one_another_on_one_barrier(groups):
    """Steps that go on from each other's cache, with other numbers of blocks and nothing reset between them."""
    sequence = Sequence(make_model(2, 3, 16, 200, 41), 60)
    for step, blocks in enumerate((3, 1, 5, 5, 2, 132)):
        with emulating(blocks=blocks, groups=groups, seed=step):
            check(sequence, *sequence.step(token=7 * step), token=7 * step)
        # all but the sense is as at first
        assert sequence.barrier.item() & 0x7FFFFFFF == 0


def test_two_groups_on_stages_that_neither_has_emptied():
    """With one ring for both groups, a row of more chunks than stages hung: of a stage that was to be used twice before
    a group's turn the parity was that of a round long past."""
    model = make_model(2, 4, 16, 1100, 20)
    assert -(-1100 // chunk_elements(64)) == 5
    for stages in (1, 2, 3):
        sequence = Sequence(model, 20)
        with emulating(blocks=2, stages=stages, seed=stages):
            check(sequence, *sequence.step())


def test_only_the_new_slot_is_written():
    sequence = Sequence(make_model(2, 2, 16, 64, 30), 35)
    before = sequence.cache.clone()
    sequence.step()
    block, offset = sequence.place(35)
    assert sequence.cache[:, :, block, :, offset].isfinite().all()
    sequence.cache[:, :, block, :, offset] = math.nan
    assert torch.equal(sequence.cache.view(torch.int16), before.view(torch.int16))


def test_a_slot_outside_the_cache_writes_nothing():
    for slot in (-1, 10**6):
        sequence = Sequence(make_model(2, 2, 16, 64, 30), 35)
        before = sequence.cache.clone()
        logits, _ = sequence.step(slot_mapping=torch.tensor([slot]))
        # the token attends to itself, which is not there
        assert logits.isnan().all()
        assert torch.equal(sequence.cache.view(torch.int16), before.view(torch.int16))


def test_a_padding_row_reads_and_writes_no_cache():
    sequence = Sequence(make_model(2, 2, 16, 64, 30), 35)
    before = sequence.cache.clone()
    nowhere = {"slot_mapping": torch.tensor([-1]), "seq_lens": torch.zeros(1, dtype=torch.int32)}
    logits, hidden = sequence.step(**nowhere, block_table=torch.full_like(sequence.table, -9))
    assert logits.isfinite().all()
    assert hidden.isfinite().all()
    assert torch.equal(sequence.cache.view(torch.int16), before.view(torch.int16))


WRONG = {
    "id below": {"input_ids": torch.tensor([-1])},
    "id above": {"input_ids": torch.tensor([30])},
    "position below": {"position_ids": torch.tensor([-1])},
    "position above": {"position_ids": torch.tensor([1024])},
    "block below": {"block_table": torch.tensor([[-1, 0, 1]], dtype=torch.int32)},
    "block above": {"block_table": torch.tensor([[0, 1, 99]], dtype=torch.int32)},
    "table too short": {"block_table": torch.tensor([[0, 1]], dtype=torch.int32)},
    "too long": {"seq_lens": torch.tensor([65], dtype=torch.int32)},
}


@pytest.mark.parametrize("wrong", WRONG)
def test_a_row_outside_its_tables_is_not_a_number(wrong):
    """Nothing is read outside; what stands there would be a number."""
    sequence = Sequence(make_model(1, 2, 16, 64, 30), 35, splits=1)
    sequence.cache.fill_(0.5)
    logits, hidden = sequence.step(**WRONG[wrong])
    assert logits.isnan().all()
    assert hidden.isnan().all()


def test_the_first_of_the_largest_logits():
    """Whatever block has it; of equal ones the lowest, also across blocks; -1 unless all are finite."""
    model = make_model(1, 2, 16, 64, 900)
    for blocks in (1, 3, 132):
        for kind in ("one", "equal", "nan", "inf"):
            changed = dataclasses.replace(model, head=model.head.clone())
            sequence = Sequence(changed, 20)
            logits, hidden = sequence.step()
            expected = int(logits.argmax())
            if kind == "equal":
                # the largest by far, in three tiles
                for row in (899, 640, 641):
                    changed.head[row] = 2 * hidden.sign()
                expected = 640
            elif kind != "one":
                changed.head[777] = torch.full((32,), math.nan if kind == "nan" else 65504.0) * hidden.sign()
                expected = -1
            weights = (changed.layers, changed.final_norm, changed.head)
            changed.weights = pack_decode_weights(*weights, eps=1e-5)
            if kind == "inf":
                changed.weights.norms[-1].mul_(1e36)
            chosen = torch.tensor([-77])
            sequence.length -= 1
            with emulating(blocks=blocks, seed=blocks):
                sequence.step(chosen=chosen)
            assert chosen.item() == expected, (blocks, kind)
            assert sequence.barrier.item() & 0x7FFFFFFF == 0


def test_without_hidden():
    sequence = Sequence(make_model(1, 2, 16, 64, 30), 5)
    again = Sequence(make_model(1, 2, 16, 64, 30), 5)
    again.cache.copy_(sequence.cache)
    again.table.copy_(sequence.table)
    logits, _ = sequence.step()
    only = torch.full((30,), math.nan)
    block, offset = again.place(5)
    numbers = torch.tensor([5]), torch.tensor([5]), torch.tensor([block * BLOCK + offset])
    state = torch.tensor([6], dtype=torch.int32), again.table, again.cache, again.workspace, again.barrier
    model = again.model
    persistent_decode_cuda(model.weights, model.wte, model.wpe, *numbers, *state, only, num_splits=again.splits)
    assert torch.equal(only, logits)


# ---- what the tests above would not notice if they could not fail --------------------------------------------------

# two layers have ten barriers of the grid, and one more is before the choice
FAULTS = [
    *({"grid_wait": i} for i in range(11)),
    {"full_wait": True},
    {"empty_wait": True},
    {"consumers_meet": True},
    {"warp_meet": True},
    {"stage_shift": 16},
    {"stage_shift": -16},
    {"stage_shift": 4224},
]


@pytest.mark.parametrize("fault", FAULTS, ids=str)
def test_a_missing_wait_or_a_misplaced_stage_is_noticed(fault):
    model = make_model(2, 4, 16, 1100, 61)

    def checked_step(sequence):
        chosen = torch.tensor([-77])
        # what an earlier step left would do for this one
        sequence.workspace.fill_(math.nan)
        logits, hidden = sequence.step(chosen=chosen)
        check(sequence, logits, hidden)
        assert chosen.item() == logits.argmax()

    noticed = 0
    # in some orders the late ones happen to be early enough
    for seed in (1, 2, 3):
        sequence = Sequence(model, 70)
        with emulating(blocks=3, stages=2, seed=seed):
            checked_step(sequence)
        with emulating(blocks=3, stages=2, seed=seed, **fault):
            try:
                checked_step(sequence)
            except (AssertionError, RuntimeError):
                # numbers that are wrong, or a run that the emulated device ends
                noticed += 1
    assert noticed


# ---- the stream ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("n", "k", "n_embd"), [(1, 1, 8), (8, 64, 64), (9, 257, 256), (2304, 768, 768), (50, 6400, 1600)]
)
def test_unpack_is_the_inverse_of_pack(n, k, n_embd, dtype):
    weight, bias, chunk = torch.randn(n, k).to(dtype), torch.randn(n).to(dtype), chunk_elements(n_embd)
    data = pack_tiles(weight, bias, chunk)
    assert data.numel() == kernel.tiles_bytes(n, k)
    again, biases = unpack_tiles(data, n, k, chunk, dtype)
    assert torch.equal(again, weight)
    assert torch.equal(biases, bias.float())
    _, none = unpack_tiles(pack_tiles(weight.t().contiguous().t(), None, chunk), n, k, chunk, dtype)
    assert torch.equal(none, torch.zeros(n))


def test_layout_by_hand():
    """Ten rows of 300 elements in chunks of 256: two tiles, the second padded to eight rows, all to 304 elements."""
    weight, bias = torch.arange(3000).view(10, 300).to(torch.float16), torch.arange(10.0).half()
    data = pack_tiles(weight, bias, 256)
    tile = 32 + 2 * 8 * 304
    assert data.numel() == 2 * tile
    second = data[tile:]
    assert second[:32].view(torch.float32).tolist() == [8.0, 9.0, 0, 0, 0, 0, 0, 0]
    first_chunk = second[32 : 32 + 2 * 8 * 256].view(torch.float16).view(8, 256)
    assert torch.equal(first_chunk[1], weight[9, :256])
    last_chunk = second[32 + 2 * 8 * 256 :].view(torch.float16).view(8, 48)
    assert torch.equal(last_chunk[1], torch.cat((weight[9, 256:], torch.zeros(4).half())))
    assert not first_chunk[2:].any()
    assert not last_chunk[2:].any()


# layers, heads, d of the published models: stages of each ring on sm_80, sm_86 and sm_90
SIZES = {(12, 12, 768): (5, 3, 8), (24, 16, 1024): (4, 2, 6), (36, 20, 1280): (4, 2, 6), (48, 25, 1600): (3, 1, 5)}


@pytest.mark.parametrize(("layers", "heads", "d"), SIZES)
def test_published_sizes_fit_shared_memory(layers, heads, d):
    params = sized(layers, heads, 64, d, 4 * d, 50257, 16)
    assert tuple(stages_for(params, 2, architecture) for architecture in SHARED_BYTES) == SIZES[layers, heads, d]
    weights = layers * 12 * d * d + 50257 * d
    stream = library().model_stream_bytes(ctypes.byref(params))
    # biases and the last tile of the vocabulary come on top
    assert 2 * weights <= stream <= 1.005 * 2 * weights
    chunk = chunk_elements(d)
    assert all(weight.chunk == chunk for weight in params.weights)
    assert library().model_stage_bytes(ctypes.byref(params)) == -(-(32 + 16 * chunk) // 128) * 128
