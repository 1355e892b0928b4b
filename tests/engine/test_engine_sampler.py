"""Tokens of a step's rows: equal to ``model.generate``'s, and to what each row gets alone."""

import math

import pytest
import torch
from sampling_rows import CPU, EOS, KINDS, VOCAB, make_row, mixed_rows, random_logits, sampler_of

from gpt2rt import GPT2Config, GPT2LMHeadModel
from gpt2rt.engine.params import SamplingParams
from gpt2rt.engine.random_numbers import RandomNumbers
from gpt2rt.engine.sampler import Sampler, SamplingRow
from gpt2rt.errors import NumericsError, RequestError
from gpt2rt.generation.random import request_key, uniform


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=VOCAB, n_positions=48, n_embd=48, n_layer=2, n_head=3, bos_token_id=1, eos_token_id=2,
        pad_token_id=0, initializer_range=0.3,
    )  # fmt: skip
    return GPT2LMHeadModel(config).eval()


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
    if not params.greedy:
        kwargs["seed"] = 11
    expected = model.generate(
        torch.tensor([prompt]),
        max_new_tokens=16,
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


def test_where_reading_waits_it_is_done_once(monkeypatch):
    reads = []

    def fetch(*tensors):
        reads.append(len(tensors))
        return [tensor.tolist() for tensor in tensors]

    count, steps = 2 * len(KINDS), 6
    expected, logits = run(mixed_rows(count), steps)
    monkeypatch.setattr("gpt2rt.engine.sampler.fetch", fetch)
    rows = mixed_rows(count)
    sampler = sampler_of(rows)
    sampler._waits = True
    for step in range(steps):
        sampled = sampler.sample(logits[step].clone())
        assert not sampled.errors
        assert [(token, sampled.logprobs.get(place)) for place, token in enumerate(sampled.tokens)] == [
            steps_of_row[step] for steps_of_row in expected
        ]
        for row, token in zip(rows, sampled.tokens, strict=True):
            row.output_ids.append(token)
    assert len(reads) == steps
    damaged = random_logits(count)
    damaged[len(KINDS) - 1, 60] = math.nan
    with pytest.raises(NumericsError, match="rules or penalties"):
        sampler.sample(damaged.clone())
    assert list(sampler.sample(damaged, careful=True).errors) == [len(KINDS) - 1]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
def test_a_gpu_chooses_the_same_tokens():
    count, steps = 64, 6
    expected, logits = run(mixed_rows(count), steps)
    rows = mixed_rows(count)
    sampler = Sampler(VOCAB, torch.device("cuda"), capacity=4)
    sampler.set_rows(rows)
    for step in range(steps):
        sampled = sampler.sample(logits[step].cuda())
        assert not sampled.errors
        assert sampled.tokens == [steps_of_row[step][0] for steps_of_row in expected]
        for place, entry in sampled.logprobs.items():
            on_host = expected[place][step][1]
            assert list(entry) == list(on_host)
            for token, (value, rank) in entry.items():
                assert on_host[token] == (pytest.approx(value, abs=2e-6), rank)
        for row, token in zip(rows, sampled.tokens, strict=True):
            row.output_ids.append(token)


def test_the_number_decides():
    # the negative control of the two tests above: another choice, request, seed or position draws other tokens
    # many tokens of much the same probability
    logits = (random_logits(1) / 3).expand(40, -1).contiguous()
    for vary in ("seed", "request", "choice", "position"):
        rows = []
        for number in range(40):
            row = make_row(output_ids=[3] * (number if vary == "position" else 0))
            if vary != "position":
                setattr(row, vary, number)
            rows.append(row)
        assert len(set(sampler_of(rows).sample(logits.clone()).tokens)) > 5, vary


@pytest.mark.parametrize("count", [1, 9])
def test_numbers_are_those_of_generate(count):
    rows = [make_row(number, temperature=number % 4 / 2) for number in range(count)]
    numbers = RandomNumbers(CPU)
    numbers.set_rows(rows)
    for _ in range(20):
        expected = [
            0.0 if row.params.greedy else uniform(row.seed, row.request, row.choice, 3 + len(row.output_ids))
            for row in rows
        ]
        assert numbers.draw().tolist() == expected
        for number, row in enumerate(rows):
            # rows at different places
            row.output_ids += [1] * (1 + (number == 1))


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


def test_greedy_takes_the_lowest_id_of_equals():
    logits = torch.zeros(3, VOCAB)
    logits[:, [40, 41, 80]] = 2.0
    alone = sampler_of([make_row(temperature=0.0)]).sample(logits[:1].clone()).tokens
    mixed = sampler_of([make_row(1), make_row(2, temperature=0.0), make_row(3, top_p=0.5)]).sample(logits.clone())
    assert alone == [40]
    assert mixed.tokens[1] == 40
