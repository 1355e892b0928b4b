"""The head of ``cpu_step`` that keeps the best logits only, against all logits of the same step."""

import math

import pytest
import torch
from cpu_step_model import Config, StepModel

import gpt2rt.ops as ops

TOKENS = [5, 3, 2, 90, 17, 41, 8, 60, 33]
BLOCKS = [2, 7, 1, 30, 9]


def top(model, batch, count, *, hidden=False, num_threads=1):
    """(top_ids, top_logits, hidden) of one step, the outputs full of what they must not keep."""
    arguments = model.arguments(batch, hidden=hidden, num_threads=num_threads)
    rows = batch["logits_indices"].numel()
    arguments["logits"] = torch.empty(0, model.config.vocab_size)
    found = {
        "times": None,
        "top_ids": torch.full((rows, count), -7, dtype=torch.int64),
        "top_logits": torch.full((rows, count), math.nan),
    }
    ops.cpu_step(**(arguments | found))
    return found["top_ids"], found["top_logits"], arguments["hidden"]


def best_of(logits, count):
    """The definition: the larger first, of equals the lower id."""
    values, ids = logits.sort(dim=-1, descending=True, stable=True)
    return ids[:, :count], values[:, :count]


@pytest.mark.parametrize("num_threads", [1, 2, 3, 7])
@pytest.mark.parametrize("vocab_size", [64, 97, 1000, 5003])
def test_best_are_those_of_all_logits(vocab_size, num_threads):
    model = StepModel(Config(n_layer=1, vocab_size=vocab_size))
    batch = model.batch([([t % vocab_size for t in TOKENS], 0)], [BLOCKS])
    logits, _ = model.step(batch)
    for count in {1, 2, 50, min(vocab_size, 272), min(vocab_size, ops.MAX_TOP)}:
        ids, values, _ = top(model, batch, count, num_threads=num_threads)
        expected_ids, expected_values = best_of(logits, count)
        assert torch.equal(ids, expected_ids)
        assert torch.equal(values, expected_values)


@pytest.mark.parametrize("rows", [1, 2, 8, 9, 33, 150])
def test_any_number_of_rows(rows):
    model = StepModel(Config(n_layer=1, vocab_size=700))
    tokens = torch.randint(0, 700, (rows,)).tolist()
    batch = model.batch([(tokens, 0)], [list(range(20))])
    logits, expected_hidden = model.step(batch, hidden=True)
    ids, values, hidden = top(model, batch, 20, hidden=True, num_threads=2)
    assert torch.equal(ids, best_of(logits, 20)[0])
    assert torch.equal(values, best_of(logits, 20)[1])
    assert torch.equal(hidden, expected_hidden)
    # some of the rows, one of them twice
    batch["logits_indices"] = torch.tensor([rows - 1, 0, rows - 1])
    assert torch.equal(top(model, batch, 20)[0], ids[[-1, 0, -1]])


@pytest.mark.parametrize("num_threads", [1, 2, 5])
def test_equal_logits_come_in_order_of_ids(num_threads):
    model = StepModel(Config(n_layer=1, vocab_size=900))
    # every token has 8 twins, spread over the panels
    model.wte.copy_(model.wte[:100].repeat(9, 1))
    model.plan, model.arena = model._build_plan()
    batch = model.batch([(TOKENS, 0)], [BLOCKS])
    logits, _ = model.step(batch)
    assert (logits[:, :100] == logits[:, 800:]).all()
    for count in (1, 4, 100):
        ids, values, _ = top(model, batch, count, num_threads=num_threads)
        assert torch.equal(ids, best_of(logits, count)[0])
        assert torch.equal(values, best_of(logits, count)[1])


def test_all_equal_logits():
    model = StepModel(Config(n_layer=1, vocab_size=500))
    model.wte.zero_()
    model.plan, model.arena = model._build_plan()
    batch = model.batch([(TOKENS, 0)], [BLOCKS])
    assert top(model, batch, 6, num_threads=3)[0].tolist() == [[0, 1, 2, 3, 4, 5]] * len(TOKENS)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("token", [0, 63, 64, 96])
def test_a_row_that_is_not_finite_has_no_tokens(bad, token):
    model = StepModel(Config(n_layer=1))
    model.wte[token, 7] = bad
    model.plan, model.arena = model._build_plan()
    # token 5 is in order itself, but every row meets the bad one in the head
    batch = model.batch([([5, 6], 0)], [BLOCKS])
    ids, values, _ = top(model, batch, 3, num_threads=2)
    assert (ids == -1).all()
    assert values.isnan().all()


def test_what_does_not_fit_is_refused():
    model = StepModel(Config(n_layer=1))
    batch = model.batch([(TOKENS, 0)], [BLOCKS])
    arguments = model.arguments(batch) | {"times": None}
    rows = len(TOKENS)
    ids, values = torch.empty(rows, 2, dtype=torch.int64), torch.empty(rows, 2)
    none = {"logits": torch.empty(0, 97)}
    for changed, message in [
        ({**none, "top_ids": ids, "top_logits": None}, "only one was given"),
        ({"top_ids": ids, "top_logits": values}, "both logits and top_ids are wanted"),
        ({**none, "top_ids": ids.int(), "top_logits": values}, "top_ids is int32"),
        ({**none, "top_ids": ids, "top_logits": values.double()}, "top_logits is float64"),
        ({**none, "top_ids": ids, "top_logits": torch.empty(rows, 3)}, "the columns of top_ids"),
        ({**none, "top_ids": ids[1:], "top_logits": values[1:]}, "the length of logits_indices"),
        ({**none, "top_ids": ids[:, :0], "top_logits": values[:, :0]}, "0 columns, expected 1 to 97"),
        ({**none, "top_ids": torch.empty(rows, 98).long(), "top_logits": torch.empty(rows, 98)}, "98 columns"),
    ]:
        with pytest.raises(ValueError, match=message):
            ops.cpu_step(**(arguments | changed))
    assert model.kv_cache.isnan().all(), "nothing may have been written"
