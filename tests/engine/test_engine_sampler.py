"""Tokens of a step's rows: equal to ``model.generate``'s, to the ops' definitions, and to the row's alone."""

import itertools
import math

import pytest
import torch

from gpt2rt import GPT2Config, GPT2LMHeadModel, ops
from gpt2rt.engine import logprobs, random_numbers
from gpt2rt.engine.params import SamplingParams
from gpt2rt.engine.random_numbers import RandomNumbers
from gpt2rt.engine.row_penalties import DevicePenalties, HostPenalties
from gpt2rt.engine.sampler import Sampler, SamplingRow
from gpt2rt.errors import NumericsError, RequestError
from gpt2rt.generation.random import request_key, uniform

CPU = torch.device("cpu")
VOCAB = 97
EOS = frozenset([2])


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=VOCAB, n_positions=48, n_embd=48, n_layer=2, n_head=3, bos_token_id=1, eos_token_id=2,
        pad_token_id=0, initializer_range=0.3,
    )  # fmt: skip
    return GPT2LMHeadModel(config).eval()


def make_row(number=0, output_ids=(), prompt_ids=(5, 6, 7), tokenizer=None, **settings):
    return SamplingRow(
        SamplingParams(**settings),
        seed=number * 7919,
        request=2**64 - 1 - number,
        choice=number % 3,
        prompt_ids=list(prompt_ids),
        output_ids=list(output_ids),
        eos_token_ids=EOS,
        tokenizer=tokenizer,
    )


def sampler_of(rows, vocab_size=VOCAB):
    sampler = Sampler(vocab_size, CPU, capacity=2)
    sampler.set_rows(rows)
    return sampler


def random_logits(num_rows, seed=0, vocab_size=VOCAB):
    return torch.randn(num_rows, vocab_size, generator=torch.Generator().manual_seed(seed)) * 3


PARITY = {
    "greedy": {"temperature": 0.0},
    "greedy by a tiny temperature": {"temperature": 1e-30},
    "plain": {},
    "temperature": {"temperature": 0.6},
    "hot": {"temperature": 2.5, "top_k": 7},
    "nearly greedy": {"temperature": 2e-5},
    "top_k": {"top_k": 5},
    "top_k 1": {"top_k": 1},
    "top_k of everything": {"top_k": 10**9},
    "top_p": {"top_p": 0.8},
    "min_p": {"min_p": 0.1},
    "all": {"temperature": 0.8, "top_k": 20, "top_p": 0.9, "min_p": 0.02},
    "penalty": {"repetition_penalty": 1.4, "top_p": 0.9},
    "greedy, penalty": {"repetition_penalty": 0.7, "temperature": 0.0},
    "min_tokens": {"min_tokens": 9, "temperature": 1.5},
}


@pytest.mark.proves("fault:F37")
@pytest.mark.parametrize("name", PARITY)
@pytest.mark.parametrize("prompt", [[9], [40, 41, 42, 43, 44, 45, 46]], ids=["short", "long"])
def test_the_tokens_are_those_of_generate(model, name, prompt):
    settings = PARITY[name]
    params = SamplingParams(**settings)
    kwargs = {"do_sample": False} if params.greedy else {"do_sample": True, "top_k": 0}
    names = ("top_k", "top_p", "min_p", "repetition_penalty", "temperature")
    kwargs |= {key: settings[key] for key in names if key in settings and not (params.greedy and key == "temperature")}
    # no limit is written differently there
    kwargs |= {"top_k": 0} if kwargs.get("top_k", 0) > VOCAB else {}
    kwargs |= {"min_new_tokens": params.min_tokens} if params.min_tokens else {}
    expected = model.generate(
        torch.tensor([prompt]),
        max_new_tokens=16,
        seed=11,
        num_return_sequences=1 if params.greedy else 2,
        output_logits=True,
        return_dict_in_generate=True,
        **kwargs,
    )
    for choice, sequence in enumerate(expected.sequences.tolist()):
        tokens = sequence[len(prompt) :]
        tokens = tokens[: tokens.index(2) + 1] if 2 in tokens else tokens
        output = []
        row = SamplingRow(
            params, seed=11, request=request_key(prompt), choice=choice, prompt_ids=prompt, output_ids=output,
            eos_token_ids=EOS,
        )  # fmt: skip
        sampler = sampler_of([row])
        for step in range(len(tokens)):
            logits = expected.logits[step][choice : choice + 1].clone()
            output += sampler.sample(logits).tokens
        assert output == tokens


# every kind of row that there is; the first eight need their logits as they are
KINDS = [
    {"temperature": 0.0},
    {},
    {"temperature": 0.7, "top_k": 5},
    {"top_p": 0.8},
    {"min_p": 0.05, "temperature": 1.3},
    {"top_k": 20, "top_p": 0.9, "min_p": 0.01, "temperature": 0.9},
    {"temperature": 0.0, "logprobs": 3},
    {"top_p": 0.9, "logprobs": 0},
    {"repetition_penalty": 1.3},
    {"frequency_penalty": 0.5, "presence_penalty": -0.5, "temperature": 0.0, "logprobs": 2},
    {"logit_bias": {4: 5.0, 90: -100.0}, "top_k": 4, "logprobs": 4},
    {"allowed_token_ids": [3, 9, 50], "top_p": 0.95},
    {"min_tokens": 6, "stop_token_ids": [8], "temperature": 0.0},
    {"presence_penalty": 1.5, "repetition_penalty": 0.8, "logit_bias": {1: 2.0}, "allowed_token_ids": [1, 2, 3, 4]},
]


def mixed_rows(count, steps=0):
    """Rows of all kinds, some in the midst of their output."""
    return [
        make_row(number, output_ids=[(number * 5 + i * 11) % VOCAB for i in range(number % 7 + steps)], **kind)
        for number, kind in zip(range(count), itertools.cycle(KINDS), strict=False)
    ]


def run(rows, steps, seed=0):
    """All that is chosen for rows in some steps of random logits; each row's logits are its own."""
    sampler = sampler_of(rows)
    every = [[] for _ in rows]
    logits = [random_logits(len(rows), seed + step) for step in range(steps)]
    for step in range(steps):
        sampled = sampler.sample(logits[step].clone())
        assert not sampled.errors
        for place, token in enumerate(sampled.tokens):
            rows[place].output_ids.append(token)
            every[place].append((token, sampled.logprobs.get(place)))
    return every, logits


def test_every_row_of_a_mixed_batch_is_what_it_is_alone():
    count, steps = 64, 6
    together, logits = run(mixed_rows(count), steps)
    for place, row in enumerate(mixed_rows(count)):
        sampler = sampler_of([row])
        for step in range(steps):
            sampled = sampler.sample(logits[step][place : place + 1].clone())
            token = sampled.tokens[0]
            # floats too are equal, not only close
            assert (token, sampled.logprobs.get(0)) == together[place][step], (place, step, KINDS[place % len(KINDS)])
            row.output_ids.append(token)
        assert (row.params.logprobs is not None) == (together[place][0][1] is not None)


def test_rows_may_come_go_and_change_places():
    count, steps = 20, 8
    together, logits = run(mixed_rows(count), steps)
    rows = mixed_rows(count)
    sampler = Sampler(VOCAB, CPU, capacity=1)
    generator = torch.Generator().manual_seed(3)
    done = [0] * count
    while min(done) < steps:
        chosen = [i for i in torch.randperm(count, generator=generator).tolist()[:7] if done[i] < steps]
        sampler.set_rows([rows[i] for i in chosen])
        if not chosen:
            continue
        sampled = sampler.sample(torch.stack([logits[done[i]][i] for i in chosen]))
        for place, i in enumerate(chosen):
            assert (sampled.tokens[place], sampled.logprobs.get(place)) == together[i][done[i]]
            rows[i].output_ids.append(sampled.tokens[place])
            done[i] += 1
            # as after a preemption
            if done[i] % 3 == 0:
                sampler.release(rows[i])


def test_the_number_decides():
    # the negative control of the two tests above: another choice, request, seed or position draws other tokens
    logits = random_logits(1).expand(40, -1).contiguous()
    for vary in ("seed", "request", "choice", "position"):
        rows = []
        for number in range(40):
            row = make_row(output_ids=[3] * (number if vary == "position" else 0))
            if vary != "position":
                setattr(row, vary, number)
            rows.append(row)
        assert len(set(sampler_of(rows).sample(logits.clone()).tokens)) > 5, vary


@pytest.mark.parametrize("count", [1, 4, 5, 9])
def test_numbers_made_ahead_are_the_same(monkeypatch, count):
    calls = []
    made = ops.uniforms
    monkeypatch.setattr(random_numbers.ops, "uniforms", lambda *args: calls.append(len(args[0])) or made(*args))
    rows = [make_row(number, temperature=number % 4 / 2) for number in range(count)]
    numbers = RandomNumbers(CPU)
    numbers.set_rows(rows)
    steps = 150
    for step in range(steps):
        expected = [
            0.0 if row.params.greedy else uniform(row.seed, row.request, row.choice, 3 + len(row.output_ids))
            for row in rows
        ]
        assert numbers.draw().tolist() == expected
        for number, row in enumerate(rows):
            # rows at different places; one goes back
            row.output_ids += [1] * (1 + (number == 1))
            if step == 70 and number == 2:
                del row.output_ids[:]
    drawing = sum(not row.params.greedy for row in rows)
    assert len(calls) == 0 if drawing < 5 else 0 < len(calls) < steps / 8


def test_the_best_logits_give_the_same(monkeypatch):
    logits = random_logits(6, vocab_size=4096)
    for kinds, count in (
        ([{"temperature": 0.0}] * 6, 1),
        ([{"top_k": 5}, {"top_k": 40, "top_p": 0.9}, {"temperature": 0.0}] * 2, 56),
    ):
        rows = [make_row(number, **kind) for number, kind in enumerate(kinds)]
        sampler = sampler_of(rows, 4096)
        assert sampler.best_count == count
        best = logits.topk(count)
        found = sampler.sample_best(best.indices, best.values)
        assert found.tokens == sampler.sample(logits.clone()).tokens
        assert (found.errors, found.logprobs) == ({}, {})


def test_best_logits_that_do_not_suffice():
    sampler = sampler_of([make_row(top_k=3)], 4096)
    # all tie, so top_k keeps tokens that are not here
    ids = torch.arange(sampler.best_count)[None]
    assert sampler.sample_best(ids, torch.zeros(1, sampler.best_count)) is None
    sampler = sampler_of([make_row(temperature=0.0)], 4096)
    # what the executor says of a row whose logits are not finite
    assert sampler.sample_best(torch.tensor([[-1]]), torch.tensor([[math.nan]])) is None


@pytest.mark.parametrize(
    "kinds",
    [
        [{}],
        [{"top_k": 300}],
        [{"top_k": 5}, {"top_p": 0.5}],
        [{"temperature": 0.0, "logprobs": 0}],
        [{"temperature": 0.0}, {"temperature": 0.0, "logit_bias": {3: 1.0}}],
        [{"temperature": 0.0, "min_tokens": 2}],
        [],
    ],
)
def test_steps_that_need_all_logits(kinds):
    assert sampler_of([make_row(**kind) for kind in kinds], 4096).best_count == 0


def test_the_best_logits_suffice_again_once_min_tokens_are_there():
    row = make_row(temperature=0.0, min_tokens=2, output_ids=[4])
    assert sampler_of([row]).best_count == 0
    row.output_ids.append(4)
    assert sampler_of([row]).best_count == 1
    # with nothing to wait for there is no rule at all
    assert sampler_of([make_row(temperature=0.0, min_tokens=2, ignore_eos=True)]).best_count == 1


@pytest.mark.proves("fault:F58")
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_bad_logits_fail_their_row_alone(value):
    rows = mixed_rows(2 * len(KINDS))
    logits = random_logits(len(rows))
    good = sampler_of(rows).sample(logits.clone())
    assert not good.errors
    for bad in range(len(KINDS)):
        damaged = logits.clone()
        # token 60 is allowed in no row that allows few: damage counts although a rule would hide it
        damaged[bad, 60] = value
        sampled = sampler_of(rows).sample(damaged)
        assert list(sampled.errors) == [bad]
        assert isinstance(sampled.errors[bad], NumericsError)
        assert "1 of 97 logits are NaN or infinite" in str(sampled.errors[bad])
        assert sampled.tokens == [-1 if place == bad else token for place, token in enumerate(good.tokens)]
        assert sampled.logprobs == {place: entry for place, entry in good.logprobs.items() if place != bad}


@pytest.mark.proves("fault:F37")
def test_scores_that_overflow_after_the_temperature():
    row = make_row(temperature=0.001)
    sampled = sampler_of([row]).sample(torch.full((1, VOCAB), 3e38))
    assert sampled.tokens == [-1]
    assert "overflow float32 after the temperature; raise it" in str(sampled.errors[0])


@pytest.mark.proves("fault:F41")
def test_a_row_without_a_token_left_fails_alone():
    rows = [
        make_row(0),
        make_row(1, allowed_token_ids=[2], min_tokens=3),
        make_row(2, logits_processors=[lambda output, scores: torch.full_like(scores, -math.inf)]),
        make_row(3, allowed_token_ids=[2]),
        make_row(4, temperature=0.0, logit_bias=dict.fromkeys(range(VOCAB), -100.0)),
    ]
    sampled = sampler_of(rows).sample(random_logits(5))
    assert sorted(sampled.errors) == [1, 2]
    for error in sampled.errors.values():
        assert isinstance(error, RequestError)
        assert "no token is left to choose: allowed_token_ids, bad_words, min_tokens" in str(error)
    assert [sampled.tokens[place] for place in (1, 2, 3)] == [-1, -1, 2]
    # biases exclude nothing
    assert sampled.tokens[4] >= 0


def changed_scores(row, logits):
    """The scores that a row's token is chosen from, as the rules leave them."""
    seen = []
    row.params.logits_processors = [
        *(row.params.logits_processors or ()),
        lambda output, scores: seen.append(scores.clone()) or scores,
    ]  # noqa: E501
    twin = SamplingRow(
        row.params, seed=row.seed, request=row.request, choice=row.choice, prompt_ids=row.prompt_ids,
        output_ids=row.output_ids, eos_token_ids=EOS, tokenizer=Words(),
    )  # fmt: skip
    sampler_of([twin]).sample(logits.clone())
    return seen[0]


class Words:
    """Spells a word with the numbers in it."""

    def encode(self, text, add_special_tokens=True, verbose=True):
        return [int(part) for part in text.split()]


@pytest.mark.proves("fault:F40")
def test_biases_and_excluded_tokens():
    logits = random_logits(1)
    excluded = lambda scores: scores.isneginf().nonzero().flatten().tolist()  # noqa: E731
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
        row = make_row(bad_words=words, prompt_ids=prompt, output_ids=new)
        row.rules = None
        twin = make_row(bad_words=words, prompt_ids=prompt, output_ids=new, tokenizer=Words())
        assert excluded(changed_scores(twin, logits)) == banned


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
    assert row.output_ids == [4]


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


def test_greedy_takes_the_lowest_id_of_equals():
    logits = torch.zeros(3, VOCAB)
    logits[:, [40, 41, 80]] = 2.0
    alone = sampler_of([make_row(temperature=0.0)]).sample(logits[:1].clone()).tokens
    mixed = sampler_of([make_row(1), make_row(2, temperature=0.0), make_row(3, top_p=0.5)]).sample(logits.clone())
    assert alone == [40]
    assert mixed.tokens[1] == 40


def check_entry(entry, logits, token, k):
    """An entry against ``ops.log_probabilities``."""
    value, rank, best, ids = ops.log_probabilities(logits[None], torch.tensor([token]), k)
    assert entry[token][1] == rank.item()
    assert entry[token][0] == pytest.approx(value.item(), abs=2e-6)
    assert list(entry)[0] == token
    # the likeliest follow in their order, without the token
    assert [other for other in entry if other != token] == [other for other in ids[0].tolist() if other != token]
    for place, (other, expected) in enumerate(zip(ids[0].tolist(), best[0].tolist(), strict=True)):
        assert entry[other][0] == pytest.approx(expected, abs=2e-6)
        if other != token:
            assert entry[other][1] == place + 1


def test_logprobs_are_of_the_raw_logits():
    rows = [
        make_row(number, logprobs=k, **kind)
        for number, (k, kind) in enumerate(zip((0, 1, 5, 20), KINDS[8:], strict=False))
    ]  # noqa: E501
    rows.append(make_row(9))
    logits = random_logits(5)
    sampled = sampler_of(rows).sample(logits.clone())
    assert sorted(sampled.logprobs) == [0, 1, 2, 3]
    for place, entry in sampled.logprobs.items():
        check_entry(entry, logits[place], sampled.tokens[place], rows[place].params.logprobs)


@pytest.mark.parametrize("vocab_size", [5, 97, 50257])
def test_entries_are_the_ops(vocab_size):
    logits = random_logits(4, vocab_size=vocab_size)
    # rows with many equal scores, with excluded ones, with huge ones
    logits[1] = logits[1].round()
    logits[2, ::2] = -math.inf
    logits[3] *= 1e30
    for k in (0, 1, min(20, vocab_size // 2), min(128, vocab_size // 2)):
        tokens = [1, 3, 1, int(logits[3].argmax())]
        entries = logprobs.entries(logits, torch.tensor(tokens), [k] * 4)
        for row in range(4):
            check_entry(entries[row], logits[row], tokens[row], k)


def test_logprobs_of_prompts():
    logits = random_logits(4)
    entries = logprobs.prompt_logprobs(logits, [3, 0, 96, 3], 2)
    for row, token in enumerate([3, 0, 96, 3]):
        check_entry(entries[row], logits[row], token, 2)
    # chunks change nothing
    chunks = logprobs.prompt_logprobs(logits[:1], [3], 2) + logprobs.prompt_logprobs(logits[1:], [0, 96, 3], 2)
    assert chunks == entries
    logits[2, 5] = math.nan
    with pytest.raises(NumericsError, match="the logits for token 96"):
        logprobs.prompt_logprobs(logits, [3, 0, 96, 3], 2)


def test_logprobs_with_texts():
    class Tokenizer:
        calls = 0

        def decode(self, ids):
            self.calls += 1
            return {1: "é", 2: "\ufffd"}[ids[0]]

    tokenizer = Tokenizer()
    texts = logprobs.TokenTexts(tokenizer)
    for _ in range(2):
        found = logprobs.as_logprobs({1: (-0.5, 1), 2: (-1.5, 2)}, texts)
    assert tokenizer.calls == 2
    assert [(token, item.logprob, item.rank, item.decoded_token) for token, item in found.items()] == [
        (1, -0.5, 1, "é"),
        (2, -1.5, 2, "\ufffd"),
    ]
    assert logprobs.as_logprobs({1: (-0.5, 1)}, logprobs.TokenTexts(None))[1].decoded_token is None
