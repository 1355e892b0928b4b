"""Faults for an engine: exceptions in chosen calls, NaN in chosen blocks, and requests to do that to."""

import itertools

import torch
from engine_cases import prompt_ids, said, start

from gpt2rt.engine import LLM, PoolingParams, SamplingParams
from gpt2rt.errors import RequestFailedError

# steps in which all requests here end, whatever happens to them
_MOST_STEPS = 300


class Injected(Exception):
    """What the tests throw into the engine."""


def requests(count=None):
    """Prompts and parameters of every kind; all begin alike, so that they share a block of the prefix cache."""
    stem = prompt_ids(20, seed=1)
    kinds = [
        SamplingParams(max_tokens=4, temperature=0.0),
        SamplingParams(max_tokens=3, seed=5, top_p=0.9, logprobs=2, prompt_logprobs=1),
        SamplingParams(max_tokens=3, seed=6, n=2, frequency_penalty=0.5, repetition_penalty=1.2, stop=["\x00never"]),
        PoolingParams(task="embed", pooling="mean"),
        SamplingParams(max_tokens=4, seed=7, top_k=20, min_tokens=2, bad_words=["the"]),
    ]
    prompts = [stem + prompt_ids(6 + 5 * place, seed=2 + place) for place in range(len(kinds))]
    return list(zip(prompts, kinds, strict=True))[:count]


def plain_requests():
    """Requests for which only the best logits are computed."""
    kinds = [
        SamplingParams(max_tokens=5, temperature=0.0),
        SamplingParams(max_tokens=5, seed=8, top_k=10),
        SamplingParams(max_tokens=5, seed=9, top_k=30, temperature=0.7),
    ]
    return [(prompt_ids(25 + 8 * place, seed=20 + place), kind) for place, kind in enumerate(kinds)]


def small_llm(**options):
    """An LLM in which a prompt takes more than one step."""
    return LLM(
        "gpt2rt/tiny-gpt2",
        **{"num_blocks": 64, "num_threads": 1, "max_num_seqs": 6, "max_num_batched_tokens": 80, **options},
    )


def result(request):
    """What a finished request gave: what :func:`said` says, numbers, or its error."""
    output = request.outputs[-1]
    assert output.finished
    if output.error is not None:
        return output.error
    if isinstance(request.params, PoolingParams):
        return None if output.outputs is None else output.outputs.data.tolist()
    return said(output)


def references(cases):
    """The result of each request alone, in an engine of its own, with one step for each prompt and no prefix cache."""
    results = []
    for prompt, params in cases:
        with small_llm(enable_prefix_caching=False) as llm:
            results += run(llm, begin(llm, [(prompt, params)]))
    assert not any(isinstance(one, Exception) for one in results)
    return results


def begin(llm, cases):
    """Requests that were added and not run; an exception in the place of one that was refused."""
    begun = []
    for prompt, params in cases:
        try:
            begun.append(start(llm, prompt, params))
        except Exception as error:
            begun.append(error)
    return begun


def run(llm, begun):
    """Step until all are finished, and give their results."""
    with torch.inference_mode():
        for _ in range(_MOST_STEPS):
            if not llm.core.has_unfinished:
                break
            llm.core.step()
    assert not llm.core.has_unfinished, "requests are left over after so many steps"
    return [one if isinstance(one, Exception) else result(one) for one in begun]


def assert_clean(core):
    """Nobody holds anything but the prefix index."""
    assert not core.requests
    assert not core.scheduler.running
    assert not core.scheduler.waiting
    assert core._queued_tokens == 0
    pool, index = core.cache.pool, core._index
    assert sum(pool.references) == (0 if index is None else index.num_cached)
    assert core.scheduler.num_free == pool.num_blocks


class Fault:
    """A call that fails.

    Args:
        owner, name: the function is this attribute.
        error: what it raises.
        first: it fails from this call on, counted from 0, among those for which ``when`` holds.
        forever: not only once.
        when: is given the arguments.

    Attributes:
        calls: how many there were.
        fired: how many of them failed.
    """

    def __init__(self, owner, name, error, *, first=0, forever=False, when=None):
        self.owner, self.name, self.error = owner, name, error
        self.first, self.forever, self.when = first, forever, when
        self.calls = self.fired = 0

    def __enter__(self):
        self._own = self.name in vars(self.owner)
        self.original = vars(self.owner)[self.name] if self._own else getattr(self.owner, self.name)
        setattr(self.owner, self.name, self._wrap())
        return self

    def __exit__(self, *_):
        if self._own:
            setattr(self.owner, self.name, self.original)
        else:
            delattr(self.owner, self.name)

    def _wrap(self):
        def call(*arguments, **keywords):
            if self.when is None or self.when(*arguments, **keywords):
                number = self.calls
                self.calls += 1
                if number == self.first or (self.forever and number > self.first):
                    self.fired += 1
                    raise self.error
            return self.original(*arguments, **keywords)

        return call


def sweep(llm, cases, expected, owner, name, error, *, forever):
    """Run the requests with the first call of a function failing, then with the second, and so on.

    Whoever is not hit ends with its expected result, whoever is hit with an error; nothing is left over, and the same
    requests are right afterwards.

    Returns:
        For each number of a call how many requests failed.
    """
    failures = []
    for first in itertools.count():
        llm.reset_prefix_cache()
        with Fault(owner, name, error, first=first, forever=forever) as fault:
            results = run(llm, begin(llm, cases))
        assert_clean(llm.core)
        for got, wanted in zip(results, expected, strict=True):
            assert got == wanted or isinstance(got, (RequestFailedError, type(error))), (name, first, got)
        failures.append(sum(isinstance(got, Exception) for got in results))
        if first % 8 == 0:
            assert run(llm, begin(llm, cases)) == expected, (name, first)
        if not fault.fired:
            assert failures.pop() == 0
            return failures


def _blocks(request):
    return {block for branch in request.branches if branch.sequence is not None for block in branch.sequence.blocks}


def poison(core, request):
    """Write NaN over the keys and values that no other request reads, now or later."""
    own = _blocks(request).difference(*(_blocks(other) for other in core.requests.values() if other is not request))
    # requests here begin alike: one that still waits may find the first block in the index
    own -= {branch.sequence.blocks[0] for branch in request.branches if branch.sequence is not None}
    assert own
    core.cache.data[:, :, sorted(own)] = float("nan")
