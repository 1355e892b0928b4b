"""uniforms, penalties with their counts, and log_probabilities as ops: definitions, opcheck, refusals."""

import math

import pytest
import torch

import gpt2rt.ops as ops
from gpt2rt.generation.logits import RepetitionPenaltyLogitsProcessor
from gpt2rt.generation.random import uniform

OPS = torch.ops.gpt2rt


def doubles(*values):
    return torch.tensor(values, dtype=torch.float64)


def test_uniforms_are_the_hosts():
    words = torch.randint(-(2**63), 2**63 - 1, (4, 200))
    words[:, 0], words[:, 1] = 0, -1
    assert ops.uniforms(*words).tolist() == [uniform(*word) for word in words.T.tolist()]


def sequences():
    """(slots, token_ids, starts, prompt_lens, max_len) and the same as lists of (slot, prompt, output)."""
    lists = [(2, [1, 1, 5], [5, 7, 7, 0]), (0, [3], []), (1, [], [4, 4])]
    token_ids = [token for _, prompt, output in lists for token in prompt + output]
    lengths = [len(prompt) + len(output) for _, prompt, output in lists]
    starts = torch.tensor([0, *lengths]).cumsum(0)
    prompt_lens = torch.tensor([len(prompt) for _, prompt, _ in lists])
    slots = torch.tensor([slot for slot, _, _ in lists])
    return (slots, torch.tensor(token_ids), starts, prompt_lens, max(lengths)), lists


def test_counts_say_what_was_said():
    counts = torch.full((4, 9), 50, dtype=torch.int32)
    arguments, lists = sequences()
    ops.reset_counts(counts, *arguments)
    for slot, prompt, output in lists:
        assert counts[slot].tolist() == [2 * output.count(token) + (token in prompt) for token in range(9)]
    assert (counts[3] == 50).all()
    before = counts.clone()
    # what is skipped: no slot, no token of the vocabulary
    ops.count_tokens(counts, torch.tensor([2, 2, -1, 0, 0]), torch.tensor([7, 7, 3, -1, 9]))
    before[2, 7] += 4
    assert torch.equal(counts, before)


def test_ids_outside_the_vocabulary_are_no_tokens():
    counts = torch.zeros(1, 4, dtype=torch.int32)
    ids = torch.tensor([-1, 2, 4, 3, -1, 3, 2**40])
    ops.reset_counts(counts, torch.tensor([0]), ids, torch.tensor([0, 7]), torch.tensor([3]), 7)
    assert counts.tolist() == [[0, 0, 1, 4]]


def test_the_penalties_are_transformers_and_openais():
    arguments, lists = sequences()
    counts = torch.zeros(3, 9, dtype=torch.int32)
    ops.reset_counts(counts, *arguments)
    scores = 4 * torch.randn(3, 9)
    scores[0, 1] = -math.inf
    slots = arguments[0]
    repetition, frequency, presence = doubles(1.3, 0.8, 2.0), doubles(0.5, 1.0, -0.7), doubles(0.2, 0.3, 0.4)
    penalised = ops.penalties(scores, counts, slots, repetition=repetition, frequency=frequency, presence=presence)
    alone = ops.penalties(scores, counts, slots, repetition=repetition)
    for row, (_, prompt, output) in enumerate(lists):
        processor = RepetitionPenaltyLogitsProcessor(float(repetition[row]))
        expected = processor(torch.tensor([prompt + output]), scores[row : row + 1])[0]
        assert torch.equal(alone[row], expected)
        for token in set(output):
            expected[token] -= output.count(token) * frequency[row].item()
            expected[token] -= presence[row].item()
        torch.testing.assert_close(penalised[row], expected)


def test_a_row_without_a_slot_stays():
    scores, counts = torch.randn(2, 5), torch.full((1, 5), 3, dtype=torch.int32)
    penalised = ops.penalties(scores, counts, torch.tensor([-1, 0]), frequency=doubles(1.0, 1.0))
    assert torch.equal(penalised[0], scores[0])
    assert torch.equal(penalised[1], scores[1] - 1)


def test_log_probabilities_are_the_log_softmax():
    scores = 5 * torch.randn(4, 60)
    scores[1, 7], scores[1, 30] = 90.0, 90.0
    token_ids = torch.tensor([3, 30, 59, -1])
    chosen, ranks, best, best_ids = ops.log_probabilities(scores, token_ids, 60)
    logs = torch.log_softmax(scores, dim=-1)
    torch.testing.assert_close(chosen[:3], logs.gather(1, token_ids.clamp(min=0)[:, None])[:3, 0])
    assert math.isnan(chosen[3])
    assert ranks[3] == -1
    for row in range(3):
        assert scores[row].sort(descending=True).values[ranks[row] - 1] == scores[row, token_ids[row]]
    assert ranks[1] == 1
    assert best_ids[1, :2].tolist() == [7, 30]
    torch.testing.assert_close(best, logs.sort(dim=-1, descending=True).values)
    assert torch.equal(best_ids.sort(dim=-1).values, torch.arange(60).expand(4, 60))


def test_a_bad_row_has_no_log_probabilities():
    scores = torch.randn(3, 8)
    scores[0, 2], scores[1] = math.nan, -math.inf
    chosen, ranks, best, best_ids = ops.log_probabilities(scores, torch.tensor([1, 1, 1]), 2)
    assert chosen.isnan().tolist() == best[:, 1].isnan().tolist() == [True, True, False]
    assert (ranks < 0).tolist() == (best_ids[:, 0] < 0).tolist() == [True, True, False]


def opcheck_cases():
    words = torch.randint(-(2**63), 2**63 - 1, (4, 3))
    yield OPS.uniforms, tuple(words)
    scores, numbers, ids = torch.randn(3, 12)[:, :9], doubles(0.5, 1.0, 1.5), torch.tensor([1, 8, -1])
    counts = torch.randint(0, 5, (3, 9), dtype=torch.int32)
    yield OPS.penalties, (scores, counts, ids % 3, numbers, None, numbers)
    yield OPS.count_tokens, (counts, ids % 3, ids)
    yield OPS.reset_counts, (counts, *sequences()[0])
    # an id outside would give NaN, which equals nothing
    yield OPS.log_probabilities, (scores, ids % 3, 4)


@pytest.mark.parametrize("case", [*opcheck_cases()], ids=lambda case: str(case[0]).removeprefix("gpt2rt."))
def test_opcheck(case):
    torch.library.opcheck(*case)


SCORES, IDS, COUNTS = torch.zeros(2, 5), torch.zeros(2, dtype=torch.int64), torch.zeros(3, 5, dtype=torch.int32)
STARTS = torch.tensor([0, 1, 2])
REFUSED = {
    "seeds of two dimensions": (ValueError, "seeds has shape", ops.uniforms, (IDS[None], IDS, IDS, IDS)),
    "fewer positions": (ValueError, "positions has shape", ops.uniforms, (IDS, IDS, IDS, IDS[:1])),
    "choices in int32": (TypeError, "choices has dtype", ops.uniforms, (IDS, IDS, IDS.int(), IDS)),
    "half scores": (TypeError, "expected float32", ops.penalties, (SCORES.half(), COUNTS, IDS)),
    "counts in int64": (TypeError, "counts has dtype", ops.penalties, (SCORES, COUNTS.long(), IDS)),
    "another vocabulary": (
        ValueError,
        "the tokens of scores",
        ops.penalties,
        (SCORES, COUNTS[:, :4].contiguous(), IDS),
    ),
    "flat counts": (ValueError, r"expected \[num_slots", ops.penalties, (SCORES, COUNTS[0], IDS)),
    "fewer slots": (ValueError, "slots has shape", ops.penalties, (SCORES, COUNTS, IDS[:1])),
    "tokens without slots": (ValueError, "token_ids has shape", ops.count_tokens, (COUNTS, IDS, IDS[:1])),
    "one slot": (ValueError, r"expected \[num_rows\]", ops.count_tokens, (COUNTS, IDS[0], IDS)),
    "fewer starts": (ValueError, "starts has shape", ops.reset_counts, (COUNTS, IDS, IDS, IDS, IDS, 1)),
    "flat ids": (ValueError, r"\[total\]", ops.reset_counts, (COUNTS, IDS, IDS[None], STARTS, IDS, 1)),
    "max_len": (ValueError, "max_len is 3, expected", ops.reset_counts, (COUNTS, IDS, IDS, STARTS, IDS, 3)),
    "k above V": (ValueError, "k is 6, expected 0 to 5", ops.log_probabilities, (SCORES, IDS, 6)),
    "k above 128": (ValueError, "expected 0 to 128", ops.log_probabilities, (torch.zeros(2, 500), IDS, 129)),
    "negative k": (ValueError, "k is -1", ops.log_probabilities, (SCORES, IDS, -1)),
    "ids in int32": (TypeError, "token_ids has dtype", ops.log_probabilities, (SCORES, IDS.int(), 0)),
    "double scores": (TypeError, "scores has dtype", ops.log_probabilities, (SCORES.double(), IDS, 0)),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_fit_is_refused(case):
    error, message, op, arguments = REFUSED[case]
    with pytest.raises(error, match=message):
        op(*arguments)


def test_penalties_of_another_dtype_are_refused():
    with pytest.raises(TypeError, match=r"frequency has dtype torch\.float32, expected torch\.float64"):
        ops.penalties(SCORES, COUNTS, IDS, frequency=torch.zeros(2))
