"""argmax, sampling_weights and sample in triton's interpreter, against their definition, bit for bit."""

import math
import os

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs TRITON_INTERPRET=1", allow_module_level=True)

from gpt2rt.kernels import sampling
from gpt2rt.kernels.config_table import ALL
from gpt2rt.kernels.sampling import (
    argmax_ref,
    argmax_triton,
    sample_into_triton,
    sample_ref,
    sample_triton,
    sampling_weights_ref,
    sampling_weights_triton,
    select_workspace,
)
from gpt2rt.kernels.sampling_select import CHUNKS, MAX_LIST, SelectWorkspace

pytestmark = [
    pytest.mark.kernel,
    # numpy warns of infinities, which are meant
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
]

INF = math.inf
CHUNK = CHUNKS.find(0, ALL).size
LAST = 1 - 2**-53
NONE = {"temperature": None, "top_k": None, "top_p": None, "min_p": None}


def doubles(*values):
    return torch.tensor(values, dtype=torch.float64)


def rows_of(num_rows, **values):
    """The same settings for every row."""
    dtypes = {"top_k": torch.int64}
    return {name: torch.full((num_rows,), v, dtype=dtypes.get(name, torch.float64)) for name, v in values.items()}


def garbage(work):
    """The memory of a sequence that ran before: list entries that would raise every threshold."""
    for tensor in work:
        tensor.fill_(-12345)
    work.list_keys.fill_(0x7F000000)
    work.list_weights.fill_(2**42)
    return work


@pytest.fixture(autouse=True)
def used_memory(monkeypatch):
    monkeypatch.setattr(sampling, "select_workspace", lambda *arguments: garbage(select_workspace(*arguments)))


def both(scores, uniforms, finite=False, **settings):
    """Tokens of the definition, after asserting that the kernels' are the same."""
    arguments = (*(NONE | settings).values(), None, False, finite)
    expected = sample_ref(scores, uniforms, *arguments)
    assert sample_triton(scores, uniforms, *arguments).tolist() == expected.tolist()
    return expected.tolist()


# ---- weights and argmax ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("vocab_size", [1, 2, 7, 1000, CHUNK, CHUNK + 1, 50257])
def test_rows_match_the_definition(vocab_size, cut_rows):
    scores = 4 * torch.randn(5, vocab_size)
    scores[1] = scores[1].round()
    scores[2] = 1.5
    scores[3, torch.rand(vocab_size) < 0.7] = -INF
    scores[4] = -3.4e38
    # the larger vocabulary costs the interpreter a second a row
    scores = cut_rows(scores[: 2 if vocab_size > 10_000 else 5])
    assert torch.equal(sampling_weights_triton(scores), sampling_weights_ref(scores))
    for finite in (False, True):
        assert torch.equal(argmax_triton(scores, finite), argmax_ref(scores, finite))


def test_weights_over_the_whole_range():
    x = torch.cat([torch.zeros(1), -torch.rand(20_000) * 45, -torch.rand(500) * 1e-4, -torch.arange(64) * math.log(2)])
    weights = sampling_weights_triton(x[None])
    assert torch.equal(weights, sampling_weights_ref(x[None]))
    assert weights[0, 0] == 2**42
    assert (weights[0] == 0).any()


def test_argmax_takes_the_lowest_id_of_equals():
    scores = torch.zeros(4, 2 * CHUNK + 9)
    scores[0, [70, CHUNK, 2 * CHUNK + 8]] = 5.0
    scores[1, [CHUNK + 1, CHUNK, 2 * CHUNK]] = 5.0
    scores[2, 7] = -0.0
    scores[3] = -INF
    scores[3, 2 * CHUNK + 8] = -3.4e38
    assert argmax_triton(scores, False).tolist() == [70, CHUNK, 0, 2 * CHUNK + 8]


@pytest.mark.parametrize("bad", [math.nan, INF, -INF])
def test_bad_scores_give_no_token(bad):
    for place in (0, CHUNK - 1, CHUNK + 4):
        scores = torch.randn(2, CHUNK + 5)
        scores[1, place] = bad
        for finite in (True, False):
            refused = finite or bad != -INF
            assert (argmax_triton(scores, finite)[1] == -1) == refused
            tokens = both(scores, doubles(0.2, 0.5), finite, **rows_of(2, top_p=0.9))
            assert (tokens[1] == -1) == refused
            assert tokens[0] >= 0
        assert (sampling_weights_triton(scores)[1] == 0).all() == (bad != -INF)


def test_a_row_without_tokens_gives_none():
    scores = torch.tensor([[-INF, -INF], [-INF, -3.4e38]])
    assert argmax_triton(scores, False).tolist() == [-1, 1]
    assert both(scores, doubles(0.1, 0.9)) == [-1, 1]
    assert both(scores, doubles(0.1, 0.9), **rows_of(2, top_k=1, top_p=0.5, min_p=0.1)) == [-1, 1]
    assert sampling_weights_triton(scores).tolist() == [[0, 0], [0, 2**42]]


# ---- sample ---------------------------------------------------------------------------------------------------------

TEMPERATURES = (1.0, 0.7, 1.3, 1e-3, 1e-4, math.nextafter(1e-4, 0), 1e-5, 1e-37, 1e-45, 1e3, 3.4028234663852886e38)
TOP_PS = (0.0, 1e-9, 0.5, 0.9, 0.99, 0.9999, LAST, 1.0)
MIN_PS = (0.0, 5e-324, 1e-30, 1e-10, 0.01, 0.5, 1.0)


def random_case(seed):
    """Rows of every sharpness, with ties, excluded tokens and settings of their own."""
    g = torch.Generator().manual_seed(seed)

    def pick(values):
        return values[int(torch.randint(len(values), (), generator=g))]

    vocab_size, num_rows = pick((1, 2, 7, 64, 300, 1000, CHUNK, CHUNK + 1)), pick((1, 2))
    scores = torch.randn(num_rows, vocab_size, generator=g) * pick((0.01, 0.3, 1, 3, 8, 100, 1e6, 1e30))
    kind = pick(("plain", "plain", "ties", "excluded", "equal", "subnormal"))
    if kind == "ties":
        scores = (8 * scores).round() / 8
    elif kind == "excluded":
        scores[torch.rand(scores.shape, generator=g) < 0.7] = -INF
    elif kind == "equal":
        scores[:] = 1.5
    elif kind == "subnormal":
        scores *= 1e-42
    choices = {
        "temperature": TEMPERATURES,
        "top_k": (1, 2, 5, 50, -1, 0, vocab_size, vocab_size + 5, max(1, vocab_size - 1), 300, 900),
        "top_p": TOP_PS,
        "min_p": MIN_PS,
    }
    settings = {
        name: torch.tensor([pick(values) for _ in range(num_rows)], dtype=torch.int64 if name == "top_k" else None)
        for name, values in choices.items()
        if pick((True, False))
    }
    settings = {name: v if name == "top_k" else v.double() for name, v in settings.items()}
    uniforms = torch.rand(num_rows, dtype=torch.float64, generator=g)
    if pick(range(8)) == 0:
        uniforms[:] = pick((0.0, LAST))
    return scores, uniforms, settings, pick((True, False))


@pytest.mark.parametrize("group", range(6))
def test_sample_is_the_definition_bit_for_bit(group):
    drawn = 0
    for seed in range(10 * group, 10 * group + 10):
        scores, uniforms, settings, finite = random_case(seed)
        drawn += sum(token >= 0 for token in both(scores, uniforms, finite, **settings))
    assert drawn >= 5


def test_the_vocabulary_of_gpt2(cut_rows):
    scores = cut_rows(3 * torch.randn(2, 50257) - 40)
    assert min(both(scores, doubles(0.3, LAST))) >= 0
    settings = {
        "temperature": doubles(0.8, 1.2),
        "top_k": torch.tensor([50, 0]),
        "top_p": doubles(0.95, 0.9),
        "min_p": doubles(0.0, 1e-3),
    }
    assert min(both(scores, doubles(0.3, 0.99), **settings)) >= 0


@pytest.mark.parametrize("setting", [{"top_k": 5}, {"top_p": 0.4}, {"top_k": 5, "top_p": 0.4}])
def test_more_ties_than_a_list_holds(setting):
    scores = torch.zeros(1, MAX_LIST + 100)
    scores[0, ::3] = 1.0
    scores[0, 1::3] = 1.0
    for number in (0.6, LAST):
        token = both(scores, doubles(number), **rows_of(1, **setting))[0]
        assert token % 3 != 2


def test_a_list_that_is_full_does_not_run_over():
    scores = torch.zeros(1, MAX_LIST + 1)
    work = garbage(select_workspace(2, MAX_LIST + 1, "cpu"))
    sample_into_triton(scores, doubles(0.5), torch.zeros(1, dtype=torch.int64), work, **rows_of(1, top_k=5))
    assert work.found.tolist() == [MAX_LIST + 1, -12345]
    assert (work.list_keys == torch.tensor([[0], [0x7F000000]])).all()


@pytest.mark.parametrize("top_p", [1.0, 0.7])
def test_top_k_above_what_a_list_holds(top_p):
    scores = torch.randn(1, MAX_LIST + 900)
    both(scores, doubles(0.97), **rows_of(1, top_k=MAX_LIST + 500, top_p=top_p))


def test_the_last_scores_that_are_kept():
    # neighbours in float32, so that a threshold that is off by one bit shows
    first = torch.tensor(1.9)
    second = torch.nextafter(first, torch.tensor(2.0))
    scores = torch.full((1, 3000), -9.0)
    scores[0, 300], scores[0, 2900] = first, second
    for number in (0.0, LAST):
        assert both(scores, doubles(number), **rows_of(1, top_k=1)) == [2900]
        assert both(scores, doubles(number), **rows_of(1, top_p=0.0)) == [2900]
        # equal after the division
        expected = [300 if number == 0.0 else 2900]
        temperature = next(t for t in (1.3, 1.5, 1.7) if first / t == second / t)
        assert both(scores, doubles(number), **rows_of(1, top_k=1, temperature=temperature)) == expected


def test_a_list_from_several_chunks():
    # all in one bin, a bit apart: the threshold is right only if the list holds each of them
    scores = torch.full((1, 3000), -9.0)
    for place, units in ((100, 0), (300, 1), (2900, 2)):
        scores[0, place] = (torch.tensor(1.9).view(torch.int32) + units).view(torch.float32)
    assert both(scores, doubles(0.0), **rows_of(1, top_k=2)) == [300]
    assert both(scores, doubles(0.0), **rows_of(1, top_p=0.5)) == [300]


def test_top_p_is_a_share_of_what_top_k_kept():
    scores = torch.full((1, 600), -1.0)
    scores[0, 500], scores[0, 7] = 1.0, 0.0
    # weights e, 1 and 598 times 1/e: the largest is 0.73 of the first two, 0.012 of all; the others tie
    both_kept, one_kept = rows_of(1, top_k=2, top_p=0.8), rows_of(1, top_k=2, top_p=0.7)
    assert both(scores, doubles(0.1), **both_kept) == [7]
    assert both(scores, doubles(0.1), **one_kept) == [500]
    assert both(scores, doubles(0.999), **rows_of(1, top_p=0.8)) == [599]


def test_min_p_between_two_weights():
    scores = torch.tensor([[0.0, -1.0, -2.0]])
    weight = int(sampling_weights_ref(scores)[0, 1])
    assert both(scores, doubles(LAST), **rows_of(1, min_p=weight / 2**42)) == [1]
    assert both(scores, doubles(LAST), **rows_of(1, min_p=(weight + 0.5) / 2**42)) == [0]


def test_neutral_settings_change_nothing():
    scores, uniforms = 3 * torch.randn(3, 1000), doubles(0.1, 0.5, 0.9)
    plain = both(scores, uniforms)
    assert both(scores, uniforms, **rows_of(3, temperature=1.0, top_k=1000, top_p=1.0, min_p=0.0)) == plain
    assert both(scores, uniforms, **rows_of(3, top_k=0)) == plain
    # the negative control
    assert both(scores, uniforms, **rows_of(3, min_p=1.0)) == scores.argmax(dim=-1).tolist() != plain


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("uniforms", (1.0, -0.1, math.nan)),
        ("temperature", (0.0, INF, math.nan)),
        ("top_p", (-0.1, 1.1, math.nan)),
        ("min_p", (-0.1, 1.1, math.nan)),
    ],
)
def test_settings_out_of_range_give_no_token_and_leave_their_neighbours(name, values):
    scores = torch.randn(4, 50)
    arguments = {"uniforms": doubles(0.5, 0.5, 0.5, 0.5)} | rows_of(4, temperature=0.9, top_p=0.9, min_p=0.01)
    good = both(scores, **arguments)
    arguments[name] = arguments[name].clone()
    arguments[name][:3] = doubles(*values)
    arguments["top_k"] = None
    tokens = sample_triton(scores, token_ids=None, partial=False, finite=False, **arguments)
    assert tokens.tolist() == [-1, -1, -1, good[3]]


def test_memory_is_given_by_the_caller_and_may_be_larger(monkeypatch):
    scores, uniforms = 3 * torch.randn(2, 2500), doubles(0.1, 0.9)
    settings = rows_of(2, temperature=0.7, top_k=40, top_p=0.9)
    work = garbage(select_workspace(5, 9000, "cpu"))
    out = torch.full((2,), 77)
    with monkeypatch.context() as patch:
        patch.setattr(torch, "empty", None)
        sample_into_triton(scores, uniforms, out, work, **settings)
    assert out.tolist() == both(scores, uniforms, **settings)
    # nothing is left over from one sequence to the next
    other = 3 * torch.randn(2, 100)
    sample_into_triton(other, uniforms, out, work, **settings)
    assert out.tolist() == both(other, uniforms, **settings)


@pytest.mark.parametrize("settings", [{"top_k": 60}, {"top_p": 0.9}, {"top_k": 60, "top_p": 0.9}])
def test_the_order_of_the_list_does_not_matter(settings, monkeypatch):
    # on a GPU it is another one each time
    launch = sampling.launch_select
    shuffled = 0

    def select(scores, work: SelectWorkspace, **options):
        nonlocal shuffled
        launch(scores, work, **options)
        for row, found in enumerate(work.found.tolist()):
            order = torch.randperm(found)
            shuffled += found
            for tensor in (work.list_keys, work.list_weights, work.list_ids):
                tensor[row, :found] = tensor[row, order]

    monkeypatch.setattr(sampling, "launch_select", select)
    scores = (20 * torch.randn(3, 3000)).round() / 10
    both(scores, doubles(0.2, 0.6, 0.97), **rows_of(3, **settings))
    assert shuffled > 100


def test_a_row_does_not_depend_on_its_neighbours():
    scores, uniforms = 3 * torch.randn(3, 700), doubles(0.2, 0.6, 0.97)
    settings = rows_of(3, temperature=0.9, top_k=40, top_p=0.95)
    together = both(scores, uniforms, **settings)
    for row in range(3):
        one = {name: value[row : row + 1] for name, value in settings.items()}
        assert both(scores[row : row + 1], uniforms[row : row + 1], **one) == [together[row]]


def test_columns_that_stand_for_other_tokens_run_the_definition():
    values, ids = torch.randn(2, 300).sort(dim=-1, descending=True)
    case = (values[:, :24].contiguous(), doubles(0.2, 0.9), None, torch.tensor([20, 24]), None, None)
    case = (*case, ids[:, :24].contiguous(), True, False)
    tokens = sample_triton(*case)
    assert tokens.tolist() == sample_ref(*case).tolist()
    assert tokens[0] >= 0
    assert tokens[1] == -1


def test_no_rows():
    none = torch.ones(0, 7)
    assert argmax_triton(none, False).shape == (0,)
    assert sampling_weights_triton(none).shape == (0, 7)
    assert both(none, doubles(), **rows_of(0, top_k=3)) == []
