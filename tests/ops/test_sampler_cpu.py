"""argmax, sampling_weights and sample in C++ against their definition in plain torch, bit for bit."""

import math

import pytest
import torch

import gpt2rt.ops as ops
from gpt2rt.kernels import sampling_refs as refs

INF = math.inf
LAST = 1 - 2**-53


def doubles(*values):
    return torch.tensor(values, dtype=torch.float64)


# ---- weights and argmax ---------------------------------------------------------------------------------------------


def test_weights_are_the_exponential_in_units():
    x = torch.cat([torch.zeros(1), -torch.rand(200_000) * 29, -torch.rand(1000) * 1e-4])
    weights = ops.sampling_weights(x[None])[0]
    assert torch.equal(weights, refs.sampling_weights_ref(x[None])[0])
    exact = torch.exp(x.double()) * ops.WEIGHT_UNIT
    # rounding down to an integer, and the error of the exponential
    error = (weights.double() - exact).abs()
    assert (error <= 1 + 1.2e-7 * exact).all()
    assert weights[0] == ops.WEIGHT_UNIT == 2**42


@pytest.mark.parametrize("vocab_size", [1, 2, 63, 64, 65, 997, 50257])
def test_rows_match_the_definition(vocab_size):
    wide = torch.full((5, vocab_size + 3), math.nan)
    scores = wide[:, :vocab_size]
    scores[:] = 4 * torch.randn(5, vocab_size)
    scores[1] = scores[1].round()
    scores[2] = 1.5
    scores[3, torch.rand(vocab_size) < 0.7] = -INF
    scores[4] = -3.4e38
    assert torch.equal(ops.sampling_weights(scores), refs.sampling_weights_ref(scores))
    for finite in (False, True):
        assert torch.equal(ops.argmax(scores, finite=finite), refs.argmax_ref(scores, finite))


def test_argmax_takes_the_lowest_id_of_equals():
    scores = torch.zeros(3, 200)
    scores[0, [70, 64, 190]] = 5.0
    scores[1, [199, 128, 127]] = 5.0
    scores[2, 7] = -0.0
    assert ops.argmax(scores).tolist() == [64, 127, 0]


@pytest.mark.parametrize("place", [0, 63, 64, 129, 131])
@pytest.mark.parametrize("bad", [math.nan, INF, -INF])
def test_bad_scores_give_no_token(place, bad):
    scores = torch.randn(3, 132)
    scores[1, place] = bad
    excluded = bad == -INF
    uniforms = doubles(0.2, 0.5, 0.8)
    for settings in ({}, {"top_k": torch.tensor([5, 5, 5])}, {"top_p": doubles(0.9, 0.9, 0.9)}):
        for finite in (True, False):
            for tokens in (
                ops.sample(scores, uniforms, finite=finite, **settings).tolist(),
                ops.argmax(scores, finite=finite).tolist(),
            ):
                assert (tokens[1] == -1) == (finite or not excluded)
                assert tokens[0] >= 0
                assert tokens[2] >= 0
    assert (ops.sampling_weights(scores)[1] == 0).all() != excluded


def test_a_row_without_tokens_gives_none():
    scores = torch.tensor([[-INF, -INF], [-INF, -3.4e38]])
    assert ops.argmax(scores).tolist() == [-1, 1]
    assert ops.sample(scores, doubles(0.1, 0.9)).tolist() == [-1, 1]
    assert ops.sampling_weights(scores).tolist() == [[0, 0], [0, 2**42]]


def test_scores_that_overflow_at_the_temperature_give_no_token():
    scores = torch.tensor([[3e38, 1.0], [1.0, 2.0]])
    assert ops.sample(scores, doubles(0.5, 0.5), temperature=doubles(0.01, 1e-3)).tolist() == [-1, 1]
    # at a tiny one only differences count
    assert ops.sample(scores, doubles(0.5, 0.5), temperature=doubles(1e-9, 1e-300)).tolist() == [0, 1]


# ---- sample ---------------------------------------------------------------------------------------------------------

TEMPERATURES = (1.0, 0.7, 1.3, 1e-3, 1e-5, 1e-45, 1e3, 3e38)
TOP_PS = (0.0, 1e-9, 0.5, 0.9, 0.99, 0.9999, 1.0)
MIN_PS = (0.0, 1e-30, 1e-10, 0.01, 0.5, 1.0)


def random_case(seed):
    """Arguments of the raw op: rows of every sharpness, with ties, excluded tokens and settings of their own."""
    g = torch.Generator().manual_seed(seed)

    def below(n):
        return int(torch.randint(n, (), generator=g))

    def some(values, dtype=torch.float64):
        return torch.tensor([values[below(len(values))] for _ in range(rows)], dtype=dtype) if below(2) else None

    vocab_size, rows = 1 + below((3, 70, 300, 3000, 20000)[below(5)]), 1 + below(5)
    scores = torch.randn(rows, vocab_size, generator=g) * (0.01, 0.3, 1, 3, 8, 100, 1e30)[below(7)]
    kind = below(5)
    if kind == 1:
        scores = (8 * scores).round() / 8
    elif kind == 2:
        scores[torch.rand(scores.shape, generator=g) < 0.7] = -INF
    elif kind == 3:
        scores[:] = 1.5
    top_ks = (1, 2, 5, 50, -1, 0, vocab_size, vocab_size + 5, max(1, vocab_size - 1), 300, 900)
    uniforms = torch.rand(rows, dtype=torch.float64, generator=g)
    if not below(8):
        uniforms[:] = (0.0, LAST)[below(2)]
    ids = None if below(3) else torch.stack([torch.randperm(2 * vocab_size, generator=g) for _ in range(rows)])
    ids = None if ids is None else ids[:, :vocab_size].contiguous()
    settings = some(TEMPERATURES), some(top_ks, torch.int64), some(TOP_PS), some(MIN_PS)
    partial = not below(6)
    if partial:
        scores = scores.sort(dim=-1, descending=True).values
    return scores, uniforms, *settings, ids, partial, bool(below(2))


@pytest.mark.parametrize("group", range(10))
def test_sample_is_the_definition_bit_for_bit(group):
    drawn = 0
    for seed in range(80 * group, 80 * group + 80):
        case = random_case(seed)
        tokens = torch.ops.gpt2rt.sample(*case)
        assert torch.equal(tokens, refs.sample_ref(*case)), f"seed {seed}"
        drawn += int((tokens >= 0).sum())
    assert drawn > 100


def test_the_definition_draws_from_the_softmax():
    """Against float64: the cumulative distribution of what survives, in order of ids."""
    scores = 3 * torch.randn(1, 500)
    values, order = torch.softmax(scores[0].double() / 0.8, 0).sort(descending=True)
    best = values[:40] / values[:40].sum()
    kept = order[:40][best.cumsum(0) - best < 0.9]
    probabilities = torch.zeros(500, dtype=torch.float64)
    probabilities[kept] = torch.softmax(scores[0, kept].double() / 0.8, 0)
    cumulative = probabilities.cumsum(0)
    settings = {"temperature": doubles(0.8), "top_k": torch.tensor([40]), "top_p": doubles(0.9)}
    for number in torch.rand(300, dtype=torch.float64).tolist():
        token = ops.sample(scores, doubles(number), **settings).item()
        # a millionth to either side of the token's share
        assert cumulative[token] - probabilities[token] - 1e-6 <= number <= cumulative[token] + 1e-6


def test_ties_with_the_last_one_kept_stay():
    scores = torch.tensor([[1.0, 3.0, 3.0, 3.0, 0.0]])
    for settings in ({"top_k": torch.tensor([2])}, {"top_p": doubles(0.4)}, {"min_p": doubles(1.0)}):
        drawn = {ops.sample(scores, doubles(number), **settings).item() for number in (0.0, 0.5, LAST)}
        assert drawn == {1, 2, 3}


def test_scores_that_become_equal_by_the_temperature_are_ties():
    # neighbours in float32, equal after the division
    first = torch.tensor(1.9)
    second = torch.nextafter(first, torch.tensor(2.0))
    temperature = next(t for t in (1.3, 1.5, 1.7) if first / t == second / t)
    scores = torch.full((1, 20000), -9.0)
    scores[0, 300], scores[0, 17000] = first, second
    settings = {"top_k": torch.tensor([1]), "temperature": doubles(temperature)}
    drawn = {ops.sample(scores, doubles(number), **settings).item() for number in (0.0, LAST)}
    assert drawn == {300, 17000}
    del settings["temperature"]
    assert ops.sample(scores, doubles(0.0), **settings).item() == 17000


def test_columns_in_any_order_draw_the_same_token():
    scores = 2 * torch.randn(1, 300)
    for number in (0.05, 0.5, 0.95):
        settings = {"top_k": torch.tensor([60]), "top_p": doubles(0.9), "min_p": doubles(0.01)}
        expected = ops.sample(scores, doubles(number), **settings).item()
        best = scores.topk(80)
        assert ops.sample(best.values, doubles(number), token_ids=best.indices, **settings).item() == expected


def test_part_of_a_row_draws_the_same_or_says_that_it_cannot():
    scores = (5 * torch.randn(60, 300)).round() / 2.5
    uniforms = torch.rand(60, dtype=torch.float64)
    settings = {"top_k": torch.full((60,), 20), "top_p": torch.full((60,), 0.97, dtype=torch.float64)}
    expected = ops.sample(scores, uniforms, **settings)
    values, ids = scores.sort(dim=-1, descending=True, stable=True)
    part = {"token_ids": ids[:, :24].contiguous(), "partial": True}
    tokens = ops.sample(values[:, :24].contiguous(), uniforms, **part, **settings)
    # rounded scores tie now and then: the 24th can equal the 20th
    unsure = values[:, 19] == values[:, 23]
    assert torch.equal(tokens, torch.where(unsure, -1, expected))
    assert 10 < unsure.sum() < 50
    # without top_k every token counts
    del settings["top_k"]
    assert (ops.sample(values[:, :24].contiguous(), uniforms, **part, **settings) == -1).all()


def test_a_row_does_not_depend_on_its_neighbours_or_threads(monkeypatch):
    scores = 3 * torch.randn(9, 5000)
    uniforms = torch.rand(9, dtype=torch.float64)
    settings = {"top_k": torch.full((9,), 40), "top_p": torch.full((9,), 0.95, dtype=torch.float64)}
    together = ops.sample(scores, uniforms, **settings)
    for row in range(9):
        one = {name: value[row : row + 1] for name, value in settings.items()}
        assert ops.sample(scores[row : row + 1], uniforms[row : row + 1], **one).item() == together[row]
    monkeypatch.setenv("GPT2RT_NUM_THREADS", "5")
    assert torch.equal(ops.sample(scores, uniforms, **settings), together)
    # the negative control: other numbers draw other tokens
    assert not torch.equal(ops.sample(scores, 1 - uniforms, **settings), together)


PROGRAM = """
import torch, gpt2rt.ops as ops
g = torch.Generator().manual_seed(3)
scores = 3 * torch.randn(40, 3001, generator=g)
uniforms = torch.rand(40, dtype=torch.float64, generator=g)
k, p = torch.full((40,), 200), torch.full((40,), 0.97, dtype=torch.float64)
t = torch.linspace(0.2, 2, 40, dtype=torch.float64)
print(ops.cpu_isa())
print(ops.sample(scores, uniforms, temperature=t, top_k=k, top_p=p).tolist())
print(ops.sample(scores, uniforms, temperature=t, top_p=p).tolist())
print(ops.sample(scores, uniforms).tolist(), int(ops.sampling_weights(scores).sum()), ops.argmax(scores).tolist())
"""


def test_every_instruction_set_draws_the_same(run_python):
    outputs = {}
    # the levels above avx512 have its sampler
    for isa in ("portable", "avx2", "avx512"):
        done = run_python(PROGRAM, GPT2RT_CPU_ISA=isa)
        if done.returncode:
            assert "does not support" in done.stderr or "expected one of" in done.stderr
            continue
        name, *lines = done.stdout.splitlines()
        outputs[name] = lines
    assert len(outputs["portable"]) == 3
    assert all(lines == outputs["portable"] for lines in outputs.values())


def test_no_rows():
    none = torch.empty(0, 7)
    assert ops.argmax(none).shape == (0,)
    assert ops.sampling_weights(none).shape == (0, 7)
    assert ops.sample(none, doubles(), top_k=torch.empty(0, dtype=torch.int64)).shape == (0,)


# ---- refusals -------------------------------------------------------------------------------------------------------

ROWS = torch.zeros(2, 5)
HALVES = doubles(0.5, 0.5)
REFUSED = {
    "one dimension": (ValueError, "num_tokens, n", {"scores": torch.zeros(5)}),
    "float64": (TypeError, "expected float32|float16 or bfloat16", {"scores": torch.zeros(2, 5).double()}),
    "bfloat16": (TypeError, "expected float32", {"scores": torch.zeros(2, 5).bfloat16()}),
    "columns": (ValueError, "must be contiguous", {"scores": torch.zeros(5, 2).t()}),
    "no tokens": (ValueError, "rows of 1 to", {"scores": torch.zeros(2, 0)}),
    "too many tokens": (ValueError, "rows of 1 to 1048576", {"scores": torch.zeros(2, 2**20 + 1)}),
    "one number": (ValueError, "uniforms has shape", {"uniforms": doubles(0.5)}),
    "float32 numbers": (TypeError, "uniforms", {"uniforms": HALVES.float()}),
    "number 1": (ValueError, r"uniforms\[1\] is 1", {"uniforms": doubles(0.5, 1.0)}),
    "number NaN": (ValueError, r"uniforms\[0\] is nan", {"uniforms": doubles(math.nan, 0.0)}),
    "temperature 0": (ValueError, r"temperature\[1\] is 0", {"temperature": doubles(1.0, 0.0)}),
    "temperature inf": (ValueError, r"temperature\[0\] is inf", {"temperature": doubles(INF, 1.0)}),
    "temperature in float32": (TypeError, "temperature", {"temperature": HALVES.float()}),
    "top_k in float": (TypeError, "top_k", {"top_k": HALVES}),
    "top_p above 1": (ValueError, r"top_p\[1\] is 1.5", {"top_p": doubles(1.0, 1.5)}),
    "min_p below 0": (ValueError, r"min_p\[0\] is -0.1", {"min_p": doubles(-0.1, 0.0)}),
    "strided": (ValueError, "contiguous", {"top_p": doubles(0.5, 0.5, 0.5, 0.5)[::2]}),
    "ids of another shape": (ValueError, "token_ids", {"token_ids": torch.zeros(2, 4, dtype=torch.int64)}),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_fit_is_refused(case):
    error, message, changed = REFUSED[case]
    arguments = {"scores": ROWS, "uniforms": HALVES, **changed}
    with pytest.raises(error, match=message):
        ops.sample(**arguments)
    if "scores" in changed:
        with pytest.raises(error, match=message):
            ops.argmax(arguments["scores"])
        with pytest.raises(error, match=message):
            ops.sampling_weights(arguments["scores"])
    # the C++ form checks for itself
    names = ("scores", "uniforms", "temperature", "top_k", "top_p", "min_p", "token_ids")
    with pytest.raises(ValueError, match="sample: "):
        torch.ops.gpt2rt.sample(*(arguments.get(name) for name in names), False, False)


@pytest.mark.parametrize("name", ["uniforms", "temperature", "top_p", "min_p"])
def test_the_definition_refuses_the_same_values(name):
    settings = {"temperature": None, "top_p": None, "min_p": None, "uniforms": HALVES, name: doubles(0.5, -1.0)}
    with pytest.raises(ValueError, match=rf"sample: {name}\[1\] is -1"):
        refs.sample_ref(
            ROWS,
            settings["uniforms"],
            settings["temperature"],
            None,
            settings["top_p"],
            settings["min_p"],
            None,
            False,
            False,
        )
