"""uniforms, penalties with their counts, and log_probabilities in C++ against their definitions in plain torch."""

import math

import pytest
import torch

import gpt2rt.ops as ops
from gpt2rt.generation.random import uniform
from gpt2rt.kernels import sampling_refs, score_refs

OPS = torch.ops.gpt2rt
INF, NAN = math.inf, math.nan
NONE = torch.empty(0, dtype=torch.int64)
LAST = 2**63 - 1


@pytest.fixture(autouse=True)
def _poisoned_outputs():
    """New tensors hold NaN, or the largest integer, until they are written."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3).isnan().all()
    assert torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(before)


def doubles(*values):
    return torch.tensor(values, dtype=torch.float64)


def cut(scores, gap=3):
    """The same scores with NaN between the rows."""
    wide = torch.full((scores.size(0), scores.size(1) + gap), NAN)
    view = wide[:, : scores.size(1)]
    view.copy_(scores)
    return view


def test_these_ops_have_a_form_in_cpp():
    forms = ops.op_forms()
    for name in ("uniforms", "penalties", "count_tokens", "reset_counts", "log_probabilities"):
        assert forms[name]["cpu"] == "C++"


# ---- uniforms -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_rows", [0, 1, 127, 5000])
def test_uniforms_are_the_definition_bit_for_bit(num_rows):
    words = torch.randint(-(2**63), LAST, (4, num_rows))
    if num_rows > 1:
        words[:, 0], words[:, 1] = 0, -1
    numbers = ops.uniforms(*words)
    assert torch.equal(numbers, sampling_refs.uniforms_ref(*words))
    assert numbers[:200].tolist() == [uniform(*word) for word in words[:, :200].T.tolist()]
    assert ((numbers >= 0) & (numbers < 1)).all()
    assert torch.equal(ops.uniforms(*words[:, num_rows // 2 :].contiguous()), numbers[num_rows // 2 :])


# ---- penalties ------------------------------------------------------------------------------------------------------

SETTINGS = doubles(1.3, 0.7, 1.0, 2.0, 1.1), doubles(0.1, -0.3, 0.0, 1.0, 2.0), doubles(0.6, 0.0, -1.5, 1.0, 0.1)


def same_bits(actual, expected):
    return torch.equal(actual.view(torch.int32), expected.view(torch.int32))


@pytest.mark.parametrize("said", [1.0, 0.02, 0.0])
@pytest.mark.parametrize("vocab_size", [1, 2, 63, 64, 65, 997, 50257])
def test_penalties_are_the_definition_bit_for_bit(vocab_size, said):
    scores = 5 * torch.randn(5, vocab_size)
    scores[0, torch.rand(vocab_size) < 0.3] = -INF
    scores[1, 0], scores[1, -1] = 0.0, -0.0
    scores[4, ::7] *= 1e38
    scores = cut(scores)
    counts = torch.randint(0, 9, (4, vocab_size), dtype=torch.int32) * (torch.rand(4, vocab_size) < said)
    slots = torch.tensor([3, 0, 0, -1, 1])
    for wanted in range(8):
        settings = [value if wanted >> i & 1 else None for i, value in enumerate(SETTINGS)]
        expected = score_refs.penalties_ref(scores, counts, slots, *settings)
        penalised = OPS.penalties(scores, counts, slots, *settings)
        assert same_bits(penalised, expected)
        assert torch.equal(penalised[3], scores[3])


def test_penalties_of_scores_that_are_not_finite():
    scores = torch.tensor([[NAN, INF, -INF, 0.0, -0.0, 3.4e38, -3.4e38, 1e-45]]).repeat(1, 9)
    counts = torch.tensor([[3] * 64 + [0] * 8], dtype=torch.int32)
    for settings in ((doubles(2.0), None, None), (doubles(0.5), doubles(-1.0), doubles(1e30)), (None, None, None)):
        expected = score_refs.penalties_ref(scores, counts, torch.tensor([0]), *settings)
        torch.testing.assert_close(
            OPS.penalties(scores, counts, torch.tensor([0]), *settings), expected, rtol=0, atol=0, equal_nan=True
        )


def test_penalties_of_one_row_for_all():
    """Rows with a stride of 0, and a slot that several rows read."""
    scores = torch.randn(70).expand(4, 70)
    counts = torch.randint(0, 5, (2, 70), dtype=torch.int32)
    slots = torch.tensor([1, 1, -1, 0])
    settings = [value[:4].contiguous() for value in SETTINGS]
    expected = score_refs.penalties_ref(scores, counts, slots, *settings)
    assert same_bits(OPS.penalties(scores, counts, slots, *settings), expected)


# ---- counts ---------------------------------------------------------------------------------------------------------


def test_counts_are_made_anew_and_go_on():
    vocab_size, guard = 600, 4096
    ids = torch.randint(-1, 40, (705,))
    ids[3], ids[4], ids[310] = vocab_size, 2**40, -(2**63)
    # a sequence of nothing, one without a slot, one that begins late
    starts = torch.tensor([5, 300, 300, 350, 700])
    slots, prompt_lens = torch.tensor([2, 0, -1, 4]), torch.tensor([400, 0, 3, 7])
    buffer = torch.full((guard + 5 * vocab_size + guard,), 111, dtype=torch.int32)
    counts = buffer[guard:-guard].view(5, vocab_size)
    expected = counts.clone()
    score_refs.reset_counts_ref(expected, slots, ids, starts, prompt_lens, 350)
    ops.reset_counts(counts, slots, ids, starts, prompt_lens, 350)
    assert torch.equal(counts, expected)
    assert (counts[[1, 3]] == 111).all()
    assert counts[0].sum() == 0
    assert counts[2].max() == 1
    assert (counts[4] >> 1).sum() == (ids[357:700] >= 0).sum()

    slots, tokens = torch.tensor([2, 2, 4, -1, 0, 0, 1]), torch.tensor([5, 5, 599, 3, -1, vocab_size, 0])
    score_refs.count_tokens_ref(expected, slots, tokens)
    before = counts.clone()
    ops.count_tokens(counts, slots, tokens)
    assert torch.equal(counts, expected)
    assert (counts - before)[2, 5] == 4
    assert (counts - before).sum() == 8
    assert (buffer[:guard] == 111).all()
    assert (buffer[-guard:] == 111).all()


def test_counts_of_nothing():
    counts = torch.full((2, 9), 5, dtype=torch.int32)
    ops.reset_counts(counts, NONE, NONE, torch.tensor([0]), NONE, 0)
    ops.count_tokens(counts, NONE, NONE)
    assert (counts == 5).all()
    ops.reset_counts(counts, torch.tensor([1]), NONE, torch.tensor([0, 0]), torch.tensor([0]), 0)
    assert counts.sum(dim=1).tolist() == [45, 0]


def test_many_sequences_are_counted_on_any_number_of_threads(monkeypatch):
    ids, lengths = torch.randint(0, 3000, (4000,)), torch.randint(0, 200, (20,))
    starts = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    slots, prompt_lens = torch.randperm(20), lengths // 2
    expected = torch.full((20, 3000), 7, dtype=torch.int32)
    score_refs.reset_counts_ref(expected, slots, ids, starts, prompt_lens, 200)
    for threads in ("1", "2", "5"):
        monkeypatch.setenv("GPT2RT_NUM_THREADS", threads)
        counts = torch.full((20, 3000), 7, dtype=torch.int32)
        ops.reset_counts(counts, slots, ids, starts, prompt_lens, 200)
        assert torch.equal(counts, expected)


# ---- log_probabilities ----------------------------------------------------------------------------------------------


def compare(scores, token_ids, k):
    """The op's results, after comparing them with the definition's."""
    chosen, ranks, best, best_ids = ops.log_probabilities(scores, token_ids, k)
    expected = score_refs.log_probabilities_ref(scores, token_ids, k)
    assert torch.equal(ranks, expected[1])
    assert torch.equal(best_ids, expected[3])
    for result, definition in ((chosen, expected[0]), (best, expected[2])):
        # float64 rounded to float32 by both, less the error of the exponentials, 1e-7 of each
        torch.testing.assert_close(result, definition, rtol=2.5e-7, atol=1e-7, equal_nan=True)
    return chosen, ranks, best, best_ids


@pytest.mark.parametrize("vocab_size", [1, 2, 15, 16, 17, 63, 64, 65, 130, 997, 8192, 50257])
def test_log_probabilities_match_the_definition(vocab_size):
    scores = 4 * torch.randn(5, vocab_size)
    scores[1] = scores[1].round()
    scores[2] = 100 * scores[2]
    scores[3, torch.rand(vocab_size) < 0.7] = -INF
    # one token at least
    scores[3, -1] = 1.0
    scores[4] = scores[4].sort().values
    scores = cut(scores)
    token_ids = torch.tensor([vocab_size - 1, 0, int(scores[2].argmax()), -1, vocab_size // 2])
    for k in sorted({0, 1, 2, 5, 20, 127, 128, vocab_size}):
        if k > min(128, vocab_size):
            continue
        chosen, ranks, best, best_ids = compare(scores, token_ids, k)
        assert ranks[2] == 1
        assert chosen[3].isnan()
        if k:
            assert best_ids[2, 0] == token_ids[2]
            assert best[2, 0] == chosen[2]


def test_a_sure_token_keeps_its_digits():
    """The rest of the sum is far below the largest term: float32 sums would lose it."""
    for margin in (5.0, 10.0, 15.0, 20.0):
        scores = torch.zeros(1, 1000)
        scores[0, 500] = margin
        chosen = ops.log_probabilities(scores, torch.tensor([500]))[0]
        expected = -math.log1p(999 * math.exp(-margin))
        assert chosen.item() == pytest.approx(expected, rel=3e-7, abs=0)


@pytest.mark.parametrize("place", [0, 15, 63, 64, 129, 131])
@pytest.mark.parametrize("bad", [NAN, INF])
def test_bad_rows_have_no_log_probabilities(bad, place):
    scores = torch.randn(4, 132)
    scores[1, place], scores[2] = bad, -INF
    chosen, ranks, best, best_ids = compare(scores, torch.tensor([1, 1, 1, 1]), 3)
    assert chosen.isnan().tolist() == [False, True, True, False]
    assert best.isnan().all(dim=1).tolist() == [False, True, True, False]
    assert ranks[1:3].tolist() == [-1, -1]
    assert (best_ids[1:3] == -1).all()


def test_no_token_is_nan_in_used_memory():
    """NaN is what stands in poisoned memory as well, so here freed memory holds ones."""
    torch.use_deterministic_algorithms(False)
    scores, token_ids = torch.randn(3, 40), torch.tensor([-1, 40, -1])
    scores[2] = NAN
    for _ in range(20):
        used = [torch.ones(3) for _ in range(20)]
        del used
        assert ops.log_probabilities(scores, token_ids)[0].isnan().all()


def test_fewer_tokens_than_k_are_left():
    scores = torch.full((2, 500), -INF)
    scores[:, 100], scores[:, 400] = 3.0, 2.0
    scores[1, [20, 450]] = -200.0
    _, _, best, best_ids = compare(scores, torch.tensor([7, 400]), 6)
    assert best_ids.tolist() == [[100, 400, 0, 1, 2, 3], [100, 400, 20, 450, 0, 1]]
    assert (best[0, 2:] == -INF).all()
    scores = torch.full((1, 20000), -INF)
    scores[0, 15000] = -3.4e38
    chosen, ranks, best, best_ids = compare(scores, torch.tensor([15000]), 128)
    assert (chosen.item(), ranks.item(), best[0, 0].item()) == (0.0, 1, 0.0)
    assert best_ids[0].tolist() == [15000, *range(127)]


@pytest.mark.parametrize("k", [1, 5, 128])
def test_of_equal_scores_the_lowest_ids_come_first(k):
    scores = torch.zeros(3, 20000)
    scores[0, 5000:] = 1.0
    scores[0, :4900] = 1.0
    scores[1, 7::64] = -0.0
    scores[2, ::2] = 2.0
    _, ranks, _, best_ids = compare(scores, torch.tensor([4950, 19999, 19999]), k)
    assert best_ids[0].tolist() == best_ids[1].tolist() == list(range(k))
    assert best_ids[2].tolist() == list(range(0, 2 * k, 2))
    assert ranks.tolist() == [19901, 1, 10001]


def test_an_excluded_token_and_one_outside_the_vocabulary():
    scores = torch.randn(4, 30)
    scores[0, 4] = -INF
    chosen, ranks, _, _ = compare(scores, torch.tensor([4, 30, 2**40, -(2**63)]), 0)
    assert chosen[0] == -INF
    assert ranks.tolist() == [30, -1, -1, -1]


def test_scores_as_far_apart_as_can_be():
    scores = torch.tensor([[3.4e38, -3.4e38, 0.0], [-3.4e38, -3.4e38, -3.3e38], [1e-45, 0.0, -1e-45]])
    compare(scores, torch.tensor([1, 2, 0]), 3)


def test_no_rows():
    none = torch.ones(0, 7)
    assert [t.shape for t in ops.log_probabilities(none, NONE, 3)] == [(0,), (0,), (0, 3), (0, 3)]
    assert ops.penalties(none, torch.ones(2, 7, dtype=torch.int32), NONE).shape == (0, 7)


# ---- a row's bits are its own ---------------------------------------------------------------------------------------


def bits(results):
    """Integers that are equal only where all bits are."""
    return [t.view({8: torch.int64, 4: torch.int32}[t.element_size()]) for t in results]


def row_ops(scores, counts, slots, token_ids, words, settings):
    """Every result that has a row for each row."""
    logs = OPS.log_probabilities(scores, token_ids, 20)
    return bits([*logs, OPS.penalties(scores, counts, slots, *settings), OPS.uniforms(*words)])


@pytest.mark.proves("promise:D1", "promise:D7")
def test_a_row_does_not_depend_on_its_neighbours_threads_or_place(monkeypatch):
    rows, vocab_size = 9, 5003
    scores = 3 * torch.randn(rows, vocab_size)
    scores[4, 17], scores[6] = NAN, -INF
    counts = torch.randint(0, 9, (rows, vocab_size), dtype=torch.int32)
    slots, token_ids = torch.randint(-1, rows, (rows,)), torch.randint(-1, vocab_size, (rows,))
    words = torch.randint(-(2**63), LAST, (4, rows))
    settings = [torch.rand(rows, dtype=torch.float64) + low for low in (0.5, 0.0, -0.5)]
    together = row_ops(scores, counts, slots, token_ids, words, settings)
    for threads in ("1", "3", "8"):
        monkeypatch.setenv("GPT2RT_NUM_THREADS", threads)
        again = row_ops(scores, counts, slots, token_ids, words, settings)
        assert all(map(torch.equal, again, together))
    for row in range(rows):
        part = slice(row, row + 1)
        # at another address, one that is not a multiple of 64 bytes, and after another row
        alone = torch.full((1, vocab_size + row), NAN)[:, row:].copy_(scores[part])
        own = [value[part] for value in settings]
        results = row_ops(alone, counts, slots[part], token_ids[part], words[:, part].contiguous(), own)
        for result, expected in zip(results, together, strict=True):
            assert torch.equal(result, expected[part])
    # the negative control
    other = row_ops(scores + 0.5, counts, slots, token_ids.flip(0), words, settings)
    assert not any(map(torch.equal, [other[0], other[4]], [together[0], together[4]]))


@pytest.mark.proves("promise:D1", "promise:D7")
def test_what_others_ask_for_changes_nothing():
    """The k of a batch is the largest that a row wants; a row's first results are those of its own k."""
    scores, token_ids = 3 * torch.randn(3, 9000), torch.tensor([5, 8999, -1])
    most = ops.log_probabilities(scores, token_ids, 128)
    for k in (0, 1, 20):
        chosen, ranks, best, best_ids = ops.log_probabilities(scores, token_ids, k)
        assert all(map(torch.equal, bits([chosen, ranks]), bits(most[:2])))
        assert torch.equal(best, most[2][:, :k])
        assert torch.equal(best_ids, most[3][:, :k])


PROGRAM = """
import hashlib, torch, gpt2rt.ops as ops
from gpt2rt.kernels import score_refs

print(ops.cpu_isa())
torch.use_deterministic_algorithms(True)
g = torch.Generator().manual_seed(3)
for n in (1, 3, 17, 63, 64, 65, 130, 3001):
    scores = torch.full((12, n + 5), torch.nan)[:, :n]
    scores[:] = 3 * torch.randn(12, n, generator=g)
    scores[1] = scores[1].round()
    scores[2, torch.rand(n, generator=g) < 0.9] = -torch.inf
    scores[3] *= 1e30
    scores[4, n - 1], scores[5, n // 2], scores[6] = torch.nan, torch.inf, -torch.inf
    ids = torch.randint(-1, n + 1, (12,), generator=g)
    results = ops.log_probabilities(scores, ids, min(n, 128))
    expected = score_refs.log_probabilities_ref(scores, ids, min(n, 128))
    assert torch.equal(results[1], expected[1]) and torch.equal(results[3], expected[3]), n
    for i in (0, 2):
        torch.testing.assert_close(results[i], expected[i], rtol=2.5e-7, atol=1e-7, equal_nan=True)
    counts = torch.randint(0, 9, (12, n), dtype=torch.int32, generator=g)
    counts *= torch.rand(12, n, generator=g) < torch.linspace(0, 1, 12)[:, None]
    settings = [torch.rand(12, dtype=torch.float64, generator=g) + low for low in (0.5, 0, -0.5)]
    given = scores, counts, torch.arange(-1, 11), *settings
    penalised = torch.ops.gpt2rt.penalties(*given)
    torch.testing.assert_close(penalised, score_refs.penalties_ref(*given), rtol=0, atol=0, equal_nan=True)
    for result in (*results, penalised):
        print(n, hashlib.sha256(result.nan_to_num(7.0).numpy().tobytes()).hexdigest())
"""


def test_every_instruction_set_gives_the_same(run_python):
    outputs = {}
    # the levels above avx512 have its kernels
    for isa in ("portable", "avx2", "avx512"):
        done = run_python(PROGRAM, GPT2RT_CPU_ISA=isa)
        if done.returncode:
            assert "does not support" in done.stderr or "expected one of" in done.stderr, done.stderr
            continue
        name, *lines = done.stdout.splitlines()
        outputs[name] = lines
    assert len(outputs["portable"]) == 40
    assert all(lines == outputs["portable"] for lines in outputs.values())


# ---- opcheck, refusals ----------------------------------------------------------------------------------------------


def opcheck_cases():
    yield OPS.uniforms, tuple(torch.arange(12).view(4, 3))
    scores, numbers, ids = torch.randn(3, 12)[:, :9], doubles(0.5, 1.0, 1.5), torch.tensor([1, 8, 0])
    counts = torch.randint(0, 5, (3, 9), dtype=torch.int32)
    for given in ((numbers, numbers, numbers), (None, numbers, None), (None, None, None)):
        yield OPS.penalties, (scores, counts, ids % 3 - 1, *given)
    yield OPS.count_tokens, (counts, ids % 3 - 1, ids)
    yield OPS.reset_counts, (counts, torch.tensor([2, -1]), ids, torch.tensor([0, 2, 3]), torch.tensor([1, 1]), 2)
    yield OPS.log_probabilities, (scores, ids, 4)
    yield OPS.log_probabilities, (scores, ids, 0)


@pytest.mark.parametrize("case", [*opcheck_cases()], ids=lambda case: str(case[0]).removeprefix("gpt2rt."))
def test_opcheck(case):
    # compiling does not go with poisoned memory
    torch.use_deterministic_algorithms(False)
    torch.library.opcheck(*case)


SCORES, IDS, COUNTS = torch.zeros(2, 5), torch.tensor([0, 1]), torch.full((3, 5), 4, dtype=torch.int32)
STARTS, HALVES = torch.tensor([0, 1, 2]), doubles(0.5, 0.5)
LONG, OFF = torch.zeros(2, 10, dtype=torch.int64), (None, None, None)
REFUSED = {
    "uniforms: two dimensions": (OPS.uniforms, (LONG, IDS, IDS, IDS), "seeds has shape"),
    "uniforms: fewer choices": (OPS.uniforms, (IDS, IDS, IDS[:1], IDS), "choices has shape"),
    "uniforms: int32": (OPS.uniforms, (IDS, IDS.int(), IDS, IDS), "requests is int32"),
    "uniforms: strided": (OPS.uniforms, (IDS, IDS, IDS, LONG[0, ::5]), "positions must be contiguous"),
    "penalties: half": (OPS.penalties, (SCORES.half(), COUNTS, IDS, *OFF), "scores is float16"),
    "penalties: columns": (OPS.penalties, (SCORES.t(), COUNTS, IDS, *OFF), "stride 5"),
    "penalties: counts in int64": (OPS.penalties, (SCORES, COUNTS.long(), IDS, *OFF), "counts is int64"),
    "penalties: cut counts": (OPS.penalties, (SCORES[:, :4], COUNTS[:, :4], IDS, *OFF), "counts must be contiguous"),
    "penalties: vocabulary": (OPS.penalties, (SCORES[:, :4], COUNTS, IDS, *OFF), "expected 4"),
    "penalties: one slot": (OPS.penalties, (SCORES, COUNTS, IDS[:1], *OFF), "slots has shape"),
    "penalties: slot": (OPS.penalties, (SCORES, COUNTS, IDS + 2, *OFF), r"slots\[1\] is 3, but counts has 3 slots"),
    "penalties: float32": (OPS.penalties, (SCORES, COUNTS, IDS, None, HALVES.float(), None), "frequency is float32"),
    "penalties: one factor": (OPS.penalties, (SCORES, COUNTS, IDS, HALVES[:1], None, None), "repetition has shape"),
    "count_tokens: slot": (OPS.count_tokens, (COUNTS, IDS + 2, IDS), r"slots\[1\] is 3, but counts has 3 slots"),
    "count_tokens: fewer ids": (OPS.count_tokens, (COUNTS, IDS, IDS[:1]), "token_ids has shape"),
    "count_tokens: flat": (OPS.count_tokens, (COUNTS[0], IDS, IDS), "counts has shape"),
    "reset_counts: slot": (OPS.reset_counts, (COUNTS, IDS + 9, IDS, STARTS, IDS, 1), r"slots\[0\] is 9"),
    "reset_counts: starts": (OPS.reset_counts, (COUNTS, IDS, IDS, STARTS[:2], IDS, 1), "starts has shape"),
    "reset_counts: too far": (OPS.reset_counts, (COUNTS, IDS, IDS, STARTS + 1, IDS, 1), r"starts\[2\] is 3"),
    "reset_counts: backwards": (
        OPS.reset_counts,
        (COUNTS, IDS, IDS, STARTS.flip(0).contiguous(), IDS, 1),
        r"starts\[1\] is 1, expected 2 to 2",
    ),
    "reset_counts: before": (OPS.reset_counts, (COUNTS, IDS, IDS, STARTS - 1, IDS, 1), r"starts\[0\] is -1"),
    "reset_counts: lengths": (OPS.reset_counts, (COUNTS, IDS, IDS, STARTS, IDS[:1], 1), "prompt_lens has shape"),
    "log_probabilities: k": (OPS.log_probabilities, (SCORES, IDS, 6), "k is 6, expected 0 to 5"),
    "log_probabilities: large k": (OPS.log_probabilities, (torch.zeros(2, 500), IDS, 129), "expected 0 to 128"),
    "log_probabilities: negative k": (OPS.log_probabilities, (SCORES, IDS, -1), "k is -1"),
    "log_probabilities: no tokens": (OPS.log_probabilities, (SCORES[:, :0], IDS, 0), "rows of 1 to 1048576"),
    "log_probabilities: float64": (OPS.log_probabilities, (SCORES.double(), IDS, 0), "scores is float64"),
    "log_probabilities: fewer ids": (OPS.log_probabilities, (SCORES, IDS[:1], 0), "token_ids has shape"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_the_cpp_form_checks_for_itself(case):
    op, arguments, message = REFUSED[case]
    with pytest.raises((ValueError, IndexError), match=message):
        op(*arguments)
    # before any work
    assert (COUNTS == 4).all()


def test_a_slot_outside_is_an_index_error():
    for call in (
        lambda: ops.penalties(SCORES, COUNTS, IDS + 2),
        lambda: ops.count_tokens(COUNTS, IDS + 2, IDS),
        lambda: ops.reset_counts(COUNTS, IDS + 2, IDS, STARTS, IDS, 1),
    ):
        with pytest.raises(IndexError, match=r"slots\[1\] is 3, but counts has 3 slots; expected 0 to 2, or -1"):
            call()
