"""What a request gets depends on nothing but itself: not on company, cache, chunks or preemption."""

import itertools
import random

import pytest
import torch
from engine_cases import (
    GREEDY,
    KINDS,
    PENALISED,
    TOP_K,
    TOP_P,
    Recorder,
    generate,
    no_blocks,
    prompt_ids,
    run,
    said,
    start,
    tiny,
)

from gpt2rt.engine import PoolingParams, SamplingParams
from gpt2rt.engine.pacing import PrefillPacer
from gpt2rt.ops import extension_status

needs_cpp = pytest.mark.skipif(not extension_status().loaded, reason="the C++ extension is not built")


def chunked(llm, *sizes):
    """Prompts are computed in chunks of these sizes, again and again."""
    sizes = itertools.cycle(sizes)
    llm.core.scheduler._pacer.budget = lambda num_decoding, most: min(most, next(sizes))
    return llm


# ---- D1: company -----------------------------------------------------------------------------------------------------


class Needle:
    """A request with and without all that can be seen of its logits."""

    def __init__(self, length, max_tokens, **settings):
        self.prompt = prompt_ids(length, seed=length)
        self.settings = {"max_tokens": max_tokens, **settings}
        self.expected = None

    def params(self, look):
        """Parameters: ``look`` 0: tokens alone, 1: log-probabilities too, 2: and the logits as they are."""
        self.recorder = Recorder()
        more = {"logprobs": 5} if look else {}
        return SamplingParams(**self.settings, **more, logits_processors=[self.recorder] if look == 2 else None)


def needles():
    return [Needle(9 + 5 * i, 10 + 2 * i, **kind) for i, kind in enumerate(KINDS)]


def mismatches(llm, sizes, found=None):
    """Needles that differ from themselves alone, as (size of the batch, place in it, kind, way of looking)."""
    found = [] if found is None else found
    all_needles = needles()
    alone = {}
    for kind, needle in enumerate(all_needles):
        for look in range(3):
            (words,) = generate(llm, [needle.prompt], needle.params(look))
            alone[kind, look] = words, needle.recorder.rows
    turn = itertools.cycle(alone)
    for size in sizes:
        # needles a few places from each other, at other places in every batch
        places = sorted({*range(size % 3, size, max(1, size // 5)), size - 1})
        prompts = [prompt_ids(1 + (7 * i + size) % 40, seed=1000 + i) for i in range(size)]
        params = [
            SamplingParams(max_tokens=4 + 5 * i % 9, logprobs=3 if i % 4 == 0 else None, **KINDS[i % len(KINDS)])
            for i in range(size)
        ]
        hidden, recorders = {}, {}
        for place in places:
            hidden[place] = kind, look = next(turn)
            prompts[place] = all_needles[kind].prompt
            params[place] = all_needles[kind].params(look)
            recorders[place] = all_needles[kind].recorder
        together = generate(llm, prompts, params)
        for place, key in hidden.items():
            words, rows = alone[key]
            mine = recorders[place].rows
            same = together[place] == words and len(mine) == len(rows) and all(map(torch.equal, mine, rows))
            if not same:
                found.append((size, place, *key))
    return found


EVERY_SIZE = (2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 33, 48, 63, 64)
WEIGHTS = (None, "int8", "int4", "nf4")


@needs_cpp
@pytest.mark.proves("promise:D1")
@pytest.mark.parametrize("weights", WEIGHTS, ids=str)
@pytest.mark.parametrize("name", ["gpt2rt/tiny-gpt2", "gpt2rt/tiny-gpt1"])
def test_a_needle_is_the_same_in_any_company(name, weights):
    loading = {} if weights is None else {"quantization": weights}
    llm = tiny(name, executor="cpu", enable_prefix_caching=False, num_blocks=400, **loading)
    assert mismatches(llm, EVERY_SIZE) == []


@needs_cpp
@pytest.mark.proves("promise:D1")
@pytest.mark.parametrize("weights", WEIGHTS, ids=str)
def test_a_needle_is_the_same_in_any_company_op_by_op(weights):
    loading = {} if weights is None else {"quantization": weights}
    llm = tiny(executor="eager", enable_prefix_caching=False, num_blocks=400, **loading)
    assert mismatches(llm, (3, 17) if weights else (2, 4, 8, 17, 64)) == []


@needs_cpp
@pytest.mark.proves("promise:D1")
@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
def test_a_needle_is_the_same_in_any_company_with_a_smaller_cache(dtype):
    llm = tiny(enable_prefix_caching=False, num_blocks=400, kv_cache_dtype=dtype)
    assert mismatches(llm, (2, 5, 16, 33, 64)) == []


@needs_cpp
@pytest.mark.proves("promise:D1")
@pytest.mark.parametrize("name", ["cpu", "eager"])
def test_the_needle_notices_an_executor_that_minds_the_company(name, monkeypatch):
    """The negative control: one bit of the logits depends on how many sequences there are."""
    llm = tiny(executor=name, enable_prefix_caching=False, num_blocks=400)
    executor = llm.core._runner.executor
    step = executor.step

    def minds(batch, cache, **options):
        output = step(batch, cache, **options)
        if output.logits is not None and batch.seq_lens.numel() > 1:
            output.logits = torch.nextafter(output.logits, torch.full_like(output.logits, torch.inf))
        return output

    monkeypatch.setattr(executor, "step", minds)
    found = mismatches(llm, (2, 5, 9))
    assert {look for *_, look in found} >= {1, 2}
    # whoever looks at the numbers sees it every time
    assert [entry for entry in found if entry[3] == 2] != []


@needs_cpp
@pytest.mark.proves("promise:D1")
def test_newcomers_and_leavers_do_not_matter():
    llm = tiny(enable_prefix_caching=False, max_num_seqs=12)
    needle = SamplingParams(max_tokens=60, logprobs=5, **TOP_P)
    (alone,) = generate(llm, [prompt_ids(20)], needle)
    chance = random.Random(0)
    request = start(llm, prompt_ids(20), needle)
    others = []
    while not request.finished:
        if chance.random() < 0.5:
            params = SamplingParams(max_tokens=chance.randint(1, 20), n=chance.randint(1, 3), seed=1)
            priority = chance.randint(-1, 1)
            others.append(start(llm, prompt_ids(chance.randint(1, 60), len(others)), params, priority=priority))
        if others and chance.random() < 0.2:
            llm.core.abort(chance.choice(others).request_id)
        llm.core.step()
    assert said(request.outputs[-1]) == alone
    assert len(others) > 10
    run(llm, *others)


# ---- D2: the prefix cache --------------------------------------------------------------------------------------------


@needs_cpp
@pytest.mark.proves("promise:D2")
@pytest.mark.parametrize("options", [{}, {"kv_cache_dtype": "int8"}, {"kv_cache_dtype": "bfloat16"}], ids=str)
@pytest.mark.parametrize("name", ["gpt2rt/tiny-gpt2", "gpt2rt/tiny-gpt1"])
def test_a_prefix_hit_is_a_miss(name, options):
    plain = tiny(name, enable_prefix_caching=False, **options)
    cached = tiny(name, **options)
    stem = prompt_ids(100)
    # the same again, one token more or less, whole blocks, other ends
    lengths = (100, 100, 101, 99, 96, 97, 95, 64, 48, 17, 16, 15)
    prompts = [stem[:n] if n <= 100 else [*stem, 7] for n in lengths] + [stem[:70] + prompt_ids(20, seed=2)]
    hits = 0
    for kind, prompt in zip(itertools.cycle(KINDS), prompts, strict=False):
        seen = []
        for llm in (plain, cached):
            recorder = Recorder()
            # a row with a processor gets all logits; one without takes the short way
            sampled = SamplingParams(max_tokens=12, logprobs=5, logits_processors=[recorder], **kind)
            output = llm.generate([prompt], sampled)[0]
            short = generate(llm, [prompt], SamplingParams(max_tokens=12, **kind))
            seen.append((said(output), recorder.rows, short))
        hits += output.num_cached_tokens
        (words, rows, short), (cached_words, cached_rows, cached_short) = seen
        assert cached_words == words
        assert cached_short == short
        assert all(map(torch.equal, rows, cached_rows))
    # every prompt but the first finds its whole blocks, but for the last token's
    assert hits == sum(16 * ((n - 1) // 16) for n in lengths[1:]) + 64


@pytest.mark.proves("promise:D2")
def test_a_salt_keeps_prefixes_apart_and_changes_nothing():
    llm = tiny()
    prompt = prompt_ids(50)
    params = SamplingParams(max_tokens=10, logprobs=5, **TOP_K)
    outputs = [llm.generate([prompt], params, cache_salt=salt)[0] for salt in (None, "a", "b", "a", None, "b")]
    assert [output.num_cached_tokens for output in outputs] == [0, 0, 0, 48, 48, 48]
    assert all(said(output) == said(outputs[0]) for output in outputs)


@pytest.mark.proves("promise:D2")
def test_a_conversation_finds_its_own_answers():
    plain, cached = tiny(enable_prefix_caching=False), tiny()
    prompt = prompt_ids(30)
    for turn in range(3):
        params = SamplingParams(max_tokens=40, logprobs=2, seed=turn)
        (expected,) = generate(plain, [prompt], params)
        output = cached.generate([prompt], params)[0]
        assert said(output) == expected
        # the last token of an answer is never computed
        assert output.num_cached_tokens == (0 if turn == 0 else (len(prompt) - 11) // 16 * 16)
        prompt = prompt + output.outputs[0].token_ids + prompt_ids(10, seed=turn)


@pytest.mark.proves("promise:D2")
def test_a_mixture_of_two_choices_finds_no_block_of_the_other():
    prompt = prompt_ids(16)
    params = SamplingParams(n=2, max_tokens=50, ignore_eos=True, seed=0)
    llm = tiny()
    first, second = (choice["token_ids"] for choice in generate(llm, [prompt], params)[0]["choices"])
    llm.reset_prefix_cache()
    # the first choice ends after its first block, the second goes on
    stop = next(token for token in first[17:30] if token not in second + first[:17])
    params.stop_token_ids = [stop]
    short, whole = (choice["token_ids"] for choice in generate(llm, [prompt], params)[0]["choices"])
    assert (len(short) < 31, whole) == (True, second)
    mixture = prompt + first[:16] + second[16:32] + [1]
    greedy = SamplingParams(max_tokens=5, logprobs=3, **GREEDY)
    output = llm.generate([mixture], greedy)[0]
    assert output.num_cached_tokens == 32
    assert said(output) == generate(tiny(enable_prefix_caching=False), [mixture], greedy)[0]


# ---- D3: chunks ------------------------------------------------------------------------------------------------------


@needs_cpp
@pytest.mark.proves("promise:D3")
@pytest.mark.parametrize("options", [{}, {"kv_cache_dtype": "int8"}, {"quantization": "int8"}], ids=str)
def test_chunks_of_a_prompt_do_not_matter(options):
    prompts = [prompt_ids(n, seed=n) for n in (200, 1, 16, 17, 90)]
    params = [
        SamplingParams(max_tokens=6, logprobs=5, prompt_logprobs=2 if i in (0, 2) else None, **kind)
        for i, kind in enumerate(KINDS)
    ]
    whole = generate(tiny(**options), prompts, params)
    for most in (1, 7, 16, 64, 500):
        llm = tiny(max_num_seqs=min(most, 8), max_num_batched_tokens=most, **options)
        assert generate(llm, prompts, params) == whole, most
    for sizes in ((1,), (7,), (16,), (3, 40, 1, 15, 17)):
        assert generate(chunked(tiny(**options), *sizes), prompts, params) == whole, sizes


@pytest.mark.proves("promise:D3")
def test_the_pacer_does_not_matter():
    prompts = [prompt_ids(10), prompt_ids(300, seed=1), prompt_ids(250, seed=2)]
    params = SamplingParams(max_tokens=30, logprobs=3, prompt_logprobs=0, **TOP_P)
    whole = generate(tiny(), prompts, params)
    llm = tiny(prefill_slowdown=1.01)
    noted = []
    note = PrefillPacer.note
    llm.core._pacer.note = lambda *arguments: (noted.append(arguments[2]), note(llm.core._pacer, *arguments))
    assert generate(llm, prompts, params) == whole
    # what was measured made chunks that no setting names
    assert sum(1 for count in noted if 0 < count < 100) >= 2


# ---- D4: preemption --------------------------------------------------------------------------------------------------

_LONG = 64


def preempted_at(llm, step, prompt, params):
    """A request all of whose choices lose their blocks in one step, and its output."""
    request = start(llm, prompt, params)
    chosen = set()

    def when(sequence, num_tokens):
        branches = [branch for branch in request.branches if branch.sequence is sequence]
        reached = [branch for branch in branches if len(branch.output_ids) == step and branch.index not in chosen]
        chosen.update(branch.index for branch in reached)
        return bool(reached)

    with no_blocks(when):
        (words,) = run(llm, request)
    return words, request


@needs_cpp
@pytest.mark.proves("promise:D4")
@pytest.mark.parametrize(
    ("caching", "kind"),
    [(False, GREEDY), (True, TOP_K), (True, {"n": 2, "logprobs": 3, **PENALISED})],
    ids=["anew", "from the prefix cache", "two choices"],
)
def test_preempted_at_every_step(caching, kind):
    llm = tiny(enable_prefix_caching=caching)
    prompt = prompt_ids(21)
    params = SamplingParams(max_tokens=_LONG, **kind)
    (expected,) = generate(llm, [prompt], params)
    for step in range(_LONG):
        words, request = preempted_at(llm, step, prompt, params)
        assert words == expected, step
        assert request.metrics.num_preemptions >= 1


@needs_cpp
@pytest.mark.proves("promise:D4", "promise:D5")
@pytest.mark.parametrize("options", [{}, {"quantization": "int8"}, {"kv_cache_dtype": "int8"}], ids=str)
def test_a_storm_of_preemptions(options):
    prompts = [prompt_ids(5 + 9 * i, seed=i) for i in range(10)]
    params = [
        SamplingParams(max_tokens=20 + i, n=1 if kind is GREEDY else 1 + i % 3, logprobs=2, **kind)
        for i, kind in zip(range(10), itertools.cycle(KINDS), strict=False)
    ]
    llm = tiny(max_num_seqs=8, **options)
    calm = [generate(llm, [prompt], one)[0] for prompt, one in zip(prompts, params, strict=True)]
    llm.reset_prefix_cache()
    chance = random.Random(0)
    with no_blocks(lambda sequence, num_tokens: chance.random() < 0.15):
        assert generate(llm, prompts, params) == calm
    assert llm.stats().num_preemptions > 50


@needs_cpp
@pytest.mark.proves("promise:D4")
@pytest.mark.parametrize("caching", [False, True])
def test_a_pool_that_is_too_small_for_all(caching):
    prompts = [prompt_ids(10 + 5 * i, seed=i) for i in range(8)]
    params = [SamplingParams(max_tokens=60, logprobs=1, seed=i, n=1 + (i % 4 == 0)) for i in range(8)]
    roomy = tiny()
    alone = [generate(roomy, [prompt], one)[0] for prompt, one in zip(prompts, params, strict=True)]
    # the longest needs 7 blocks for itself
    llm = tiny(num_blocks=14, enable_prefix_caching=caching)
    assert generate(llm, prompts, params) == alone
    assert llm.stats().num_preemptions > 5


@pytest.mark.proves("promise:D4")
@pytest.mark.parametrize("sizes", [(16,), (7, 30, 11)])
def test_prompt_logprobs_of_a_prompt_that_is_preempted_on_its_way(sizes):
    prompt = prompt_ids(150)
    params = SamplingParams(max_tokens=5, prompt_logprobs=2, logprobs=2, **TOP_K)
    (expected,) = generate(tiny(), [prompt], params)
    llm = tiny()
    for preempted in range(1, 8):
        chunked(llm, *sizes).reset_prefix_cache()
        calls = itertools.count()
        with no_blocks(lambda sequence, num_tokens, calls=calls, at=preempted: next(calls) == at):
            assert generate(llm, [prompt], params) == [expected], preempted
        assert llm.stats().num_preemptions == preempted


@pytest.mark.proves("promise:D4")
@pytest.mark.parametrize("options", [{"pooling": "mean"}, {"task": "token_embed"}, {}], ids=str)
def test_embeddings_of_a_prompt_that_is_preempted_on_its_way(options):
    prompt = prompt_ids(150)
    (expected,) = tiny().encode([prompt], PoolingParams(**options))
    llm = tiny()
    for preempted in range(1, 6):
        chunked(llm, 7, 30, 11).reset_prefix_cache()
        calls = itertools.count()
        with no_blocks(lambda sequence, num_tokens, calls=calls, at=preempted: next(calls) == at):
            (output,) = llm.encode([prompt], PoolingParams(**options))
        assert llm.stats().num_preemptions == preempted
        assert output.outputs.data.shape == expected.outputs.data.shape
        torch.testing.assert_close(output.outputs.data, expected.outputs.data, rtol=0, atol=0)
