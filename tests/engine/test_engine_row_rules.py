"""What a row changes in its scores: biases, excluded tokens, penalties as the op defines them, processors."""

import math

import pytest
import torch
from sampling_rows import CPU, EOS, VOCAB, make_row, random_logits, sampler_of

from gpt2rt import ops
from gpt2rt.engine.row_penalties import DevicePenalties, HostPenalties
from gpt2rt.engine.sampler import SamplingRow
from gpt2rt.errors import NumericsError, RequestError


def changed_scores(row, logits):
    """The scores that a row's token is chosen from, as the rules leave them."""
    seen = []
    row.params.logits_processors = [lambda output, scores: seen.append(scores.clone()) or scores]
    twin = SamplingRow(
        row.params, seed=row.seed, request=row.request, choice=row.choice, prompt_ids=row.prompt_ids,
        output_ids=row.output_ids, eos_token_ids=EOS, tokenizer=Words(),
    )  # fmt: skip
    sampler_of([twin]).sample(logits.clone())
    return seen[0]


def excluded(scores):
    return scores.isneginf().nonzero().flatten().tolist()


class Words:
    """Spells a word with the numbers in it."""

    def encode(self, text, add_special_tokens=True, verbose=True):
        return [int(part) for part in text.split()]


@pytest.mark.proves("fault:F40")
def test_biases_and_excluded_tokens():
    logits = random_logits(1)
    scores = changed_scores(make_row(logit_bias={3: 2.5, 4: -7.0}), logits)
    expected = logits[0].clone()
    expected[3] += 2.5
    expected[4] -= 7.0
    assert torch.equal(scores, expected)
    scores = changed_scores(make_row(allowed_token_ids=[3, 9, 9]), logits)
    assert excluded(scores) == [token for token in range(VOCAB) if token not in (3, 9)]
    assert torch.equal(scores[[3, 9]], logits[0, [3, 9]])
    for new, ends in (([], [2, 8, 9]), ([1], [2, 8, 9]), ([1, 1], [])):
        row = make_row(min_tokens=2, stop_token_ids=[8, 9], output_ids=new)
        assert excluded(changed_scores(row, logits)) == ends
    assert excluded(changed_scores(make_row(min_tokens=2, ignore_eos=True, stop_token_ids=[8]), logits)) == [8]
    words = ["7", "3 4", "3 3 5", "1 2 3 4 6"]
    for prompt, new, banned in (
        ([3], [], [7]),
        ([1], [3], [4, 7]),
        ([1], [3, 3], [4, 5, 7]),
        # a word that began in the prompt is none of the output
        ([1, 2], [3, 4], [7]),
        ([0], [1, 2, 3, 4], [6, 7]),
    ):
        row = make_row(bad_words=words, prompt_ids=prompt, output_ids=new, tokenizer=Words())
        assert excluded(changed_scores(row, logits)) == banned


@pytest.mark.parametrize("kind", [HostPenalties, lambda: DevicePenalties(VOCAB, CPU)], ids=["host", "device"])
def test_penalties_are_the_ops(kind):
    settings = [
        {},
        {"frequency_penalty": 0.7},
        {"presence_penalty": -1.1},
        {"repetition_penalty": 1.3},
        {"repetition_penalty": 0.6, "frequency_penalty": -0.3, "presence_penalty": 2.0},
    ]
    rows = [
        make_row(number, prompt_ids=[5, 5, 6 + number], output_ids=[6, 90][: number % 3], **setting)
        for number, setting in enumerate(settings * 2)
    ]
    penalties = kind()
    penalised = [row for row in rows if row.penalised]
    assert len(penalised) == 8
    penalties.open(penalised)
    generator = torch.Generator().manual_seed(5)
    for step in range(30):
        scores = random_logits(len(rows), step)
        scores[:, 5] = -0.0
        counts = torch.zeros(len(rows), VOCAB, dtype=torch.int32)
        for slot, row in enumerate(rows):
            for token in set(row.prompt_ids):
                counts[slot, token] += 1
            for token in row.output_ids:
                counts[slot, token] += 2
        expected = ops.penalties(
            scores,
            counts,
            torch.tensor([slot if row.penalised else -1 for slot, row in enumerate(rows)]),
            repetition=torch.tensor([row.params.repetition_penalty for row in rows], dtype=torch.float64),
            frequency=torch.tensor([row.params.frequency_penalty for row in rows], dtype=torch.float64),
            presence=torch.tensor([row.params.presence_penalty for row in rows], dtype=torch.float64),
        )
        assert torch.equal(penalties.penalised(scores.clone(), rows), expected)
        for token, row in zip(torch.randint(0, VOCAB, (len(rows),), generator=generator).tolist(), rows, strict=True):
            row.output_ids.append(token % 50)
        if step == 11:
            # more than one token at once, one taken back, one computed again
            rows[1].output_ids += [7, 7]
            rows[2].output_ids.pop()
            penalties.close(rows[3])
    for row in penalised:
        penalties.close(row)
    if isinstance(penalties, DevicePenalties):
        assert penalties.num_taken == 0
    assert all(row.said is None and row.slot < 0 for row in rows)


def test_penalties_do_not_fall_behind_a_long_output():
    row = make_row(frequency_penalty=1.0, temperature=0.0, prompt_ids=[1])
    sampler = sampler_of([row])
    for _ in range(3 * VOCAB):
        row.output_ids += sampler.sample(torch.zeros(1, VOCAB)).tokens
    # each token lowers its own score, so all take turns
    assert row.output_ids == [*range(VOCAB)] * 3


def test_processors():
    seen = []

    def with_output(output, scores):
        seen.append(("output", list(output), tuple(scores.shape)))
        output.append(99)
        return scores

    def with_prompt(prompt, output, scores):
        seen.append(("prompt", list(prompt), list(output)))
        prompt.append(99)
        output.append(99)
        scores = scores.double()
        scores[17] = 1e5
        return scores

    class Favours:
        def __call__(self, output, scores, factor=2.0):
            scores[3] += 1000.0 * factor
            return scores

    row = make_row(temperature=0.0, output_ids=[4], logits_processors=[with_output, with_prompt])
    other = make_row(temperature=0.0, logits_processors=[Favours()])
    sampled = sampler_of([row, other]).sample(random_logits(2))
    assert sampled.tokens == [17, 3]
    assert seen == [("output", [4], (VOCAB,)), ("prompt", [5, 6, 7], [4])]
    # what a processor does to its arguments stays its own
    assert (row.prompt_ids, row.output_ids) == ([5, 6, 7], [4])


def raises(output, scores):
    raise KeyError("mine")


@pytest.mark.parametrize(
    ("processor", "message"),
    [
        (raises, "the logits processor raises raised KeyError: 'mine'"),
        (lambda output, scores: scores[1:], r"<lambda> returned \[96\], expected a tensor of shape \[97\]"),
        (lambda output, scores: None, "<lambda> returned NoneType"),
        (lambda output, scores: scores.numpy(), "<lambda> returned ndarray"),
        (lambda: None, "<lambda> raised TypeError"),
    ],
)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_processor_at_fault_fails_its_row_alone(processor, message, temperature):
    rows = [make_row(0), make_row(1, temperature=temperature, logits_processors=[processor]), make_row(2, min_tokens=4)]
    logits = random_logits(3)
    sampled = sampler_of(rows).sample(logits.clone())
    assert list(sampled.errors) == [1]
    with pytest.raises(RequestError, match=message):
        raise sampled.errors[1]
    assert sampled.tokens[1] == -1
    assert sampled.tokens[0] == sampler_of(rows[:1]).sample(logits[:1].clone()).tokens[0]
    assert sampled.tokens[2] == sampler_of(rows[2:]).sample(logits[2:].clone()).tokens[0]


def test_a_processor_that_returns_nan():
    row = make_row(logits_processors=[lambda output, scores: scores * math.nan])
    error = sampler_of([row]).sample(random_logits(1)).errors[0]
    assert isinstance(error, NumericsError)
    assert "the scores hold nan after penalties, processors and temperature" in str(error)
