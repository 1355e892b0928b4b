"""Seeds, ways of asking, threads and restarts: the same question gets the same answer."""

import asyncio
import itertools

import engine_golden
import pytest
import torch
from engine_cases import GREEDY, PENALISED, TEXT, TOP_P, collect, generate, prompt_ids, said, tiny

from gpt2rt.engine import RequestOutputKind, SamplingParams
from gpt2rt.ops import extension_status

needs_cpp = pytest.mark.skipif(not extension_status().loaded, reason="the C++ extension is not built")


# ---- D5: seeds -------------------------------------------------------------------------------------------------------


def tokens(words):
    return [choice["token_ids"] for choice in words["choices"]]


@pytest.mark.proves("promise:D5")
def test_a_seed_gives_four_fixed_texts():
    params = SamplingParams(n=4, max_tokens=20, seed=11)
    llm = tiny()
    (first,) = generate(llm, [prompt_ids(12)], params)
    assert len({tuple(ids) for ids in tokens(first)}) == 4
    assert generate(tiny(max_num_seqs=2, enable_prefix_caching=False), [prompt_ids(12)], params) == [first]
    # a choice does not depend on how many there are
    (two,) = generate(llm, [prompt_ids(12)], SamplingParams(n=2, max_tokens=20, seed=11))
    assert tokens(two) == tokens(first)[:2]
    # nor a token on how many follow
    (short,) = generate(llm, [prompt_ids(12)], SamplingParams(n=4, max_tokens=7, seed=11))
    assert tokens(short) == [ids[:7] for ids in tokens(first)]
    (other,) = generate(llm, [prompt_ids(12)], SamplingParams(n=4, max_tokens=20, seed=12))
    assert all(mine != theirs for mine, theirs in zip(tokens(other), tokens(first), strict=True))


@pytest.mark.proves("promise:D5")
def test_without_a_seed_texts_differ_unless_the_engine_has_one():
    params = SamplingParams(max_tokens=20)
    llm = tiny()
    drawn = [tokens(generate(llm, [prompt_ids(12)], params)[0]) for _ in range(3)]
    assert drawn[0] != drawn[1] != drawn[2] != drawn[0]
    assert tokens(generate(tiny(), [prompt_ids(12)], params)[0]) != drawn[0]
    seeded = [
        [tokens(generate(llm, [prompt_ids(12)], params)[0]) for _ in range(3)] for llm in (tiny(seed=5), tiny(seed=5))
    ]
    assert seeded[0] == seeded[1]
    assert seeded[0][0] != seeded[0][1]
    assert tokens(generate(tiny(seed=6), [prompt_ids(12)], params)[0]) != seeded[0][0]


@pytest.mark.proves("promise:D5")
def test_order_and_priority_do_not_matter_to_a_seed():
    prompts = [prompt_ids(8, seed=i) for i in range(9)]
    params = [SamplingParams(max_tokens=15, seed=i, **({"top_p": 0.8} if i % 2 else {})) for i in range(9)]
    expected = generate(tiny(), prompts, params)
    llm = tiny(max_num_seqs=3)
    backwards = generate(llm, prompts[::-1], params[::-1], priority=[i % 3 - 1 for i in range(9)])
    assert backwards == expected[::-1]


# ---- the same as model.generate --------------------------------------------------------------------------------------

_WAYS = {
    "greedy": ({}, {"temperature": 0.0}),
    "all tokens": ({"do_sample": True, "top_k": 0}, {}),
    "top_k": ({"do_sample": True, "top_k": 7, "temperature": 0.7}, {"top_k": 7, "temperature": 0.7}),
    "top_p": ({"do_sample": True, "top_k": 0, "top_p": 0.7}, {"top_p": 0.7}),
    "min_p": ({"do_sample": True, "top_k": 50, "min_p": 0.1}, {"top_k": 50, "min_p": 0.1}),
    "penalty": ({"repetition_penalty": 1.3}, {"temperature": 0.0, "repetition_penalty": 1.3}),
    "drawn with a penalty": (
        {"do_sample": True, "top_k": 0, "repetition_penalty": 1.3},
        {"repetition_penalty": 1.3},
    ),
}


@needs_cpp
@pytest.mark.proves("promise:D5", "promise:D6")
@pytest.mark.parametrize("options", [{}, {"quantization": "int8"}], ids=str)
@pytest.mark.parametrize("name", ["gpt2rt/tiny-gpt2", "gpt2rt/tiny-gpt1"])
def test_the_engine_says_what_generate_says(name, options):
    llm = tiny(name, **options)
    prompts = [prompt_ids(n, seed=n) for n in (5, 1, 40)]
    for their, ours in _WAYS.values():
        outputs = generate(llm, prompts, SamplingParams(max_tokens=24, seed=9, **ours))
        for prompt, words in zip(prompts, outputs, strict=True):
            if "do_sample" in their:
                their = {"seed": 9, **their}
            expected = llm.model.generate(torch.tensor([prompt]), max_new_tokens=24, **their)
            assert words["prompt"] + words["choices"][0]["token_ids"] == expected[0].tolist()


@pytest.mark.proves("promise:D5")
def test_choices_are_those_of_num_return_sequences():
    llm = tiny()
    (words,) = generate(llm, [prompt_ids(12)], SamplingParams(n=4, max_tokens=16, seed=2, ignore_eos=True))
    expected = llm.model.generate(
        torch.tensor([prompt_ids(12)]), max_new_tokens=16, min_new_tokens=16, seed=2, do_sample=True, top_k=0,
        num_return_sequences=4,
    )  # fmt: skip
    ours = [words["prompt"] + ids for ids in tokens(words)]
    # generate takes the end token from the scores until min_new_tokens; compare where that made no difference
    assert all(llm.model.config.eos_token_id not in ids for ids in ours)
    assert ours == expected.tolist()


# ---- D6: ways of asking ----------------------------------------------------------------------------------------------


class Forced:
    """A logits processor that dictates the tokens; the model's own logits still give the log-probabilities."""

    def __init__(self, ids):
        self.ids = ids

    def __call__(self, output_ids, logits):
        forced = torch.full_like(logits, -torch.inf)
        forced[self.ids[len(output_ids)]] = 0.0
        return forced


_EMOJI = "to be 🙂 or 👩‍👩‍👧 not — naïve 日本語 🏴‍☠️ END of it all"


def questions(tokenizer):
    emoji = tokenizer.encode(_EMOJI)
    assert len(emoji) > 30
    common = {"max_tokens": len(emoji), "logprobs": 2, "temperature": 0.0}
    yield SamplingParams(**common, logits_processors=[Forced(emoji)])
    # the stop string begins in one token and ends in another; half of it is seen before
    yield SamplingParams(**common, logits_processors=[Forced(emoji)], stop=["END of", "not END"])
    yield SamplingParams(**common, logits_processors=[Forced(emoji)], stop=["語 🏴"], include_stop_str_in_output=True)
    yield SamplingParams(**common, logits_processors=[Forced(emoji)], stop=["🏴‍☠️ END of it all!"])
    # cut in the middle of a character
    yield SamplingParams(**{**common, "max_tokens": 5}, logits_processors=[Forced(emoji)])
    yield SamplingParams(max_tokens=40, prompt_logprobs=1, **TOP_P)
    yield SamplingParams(max_tokens=30, n=3, logprobs=1, seed=8, stop=["the", "\n"])
    yield SamplingParams(max_tokens=20, logprobs=0, **GREEDY)


async def _ask(engine, prompt, params, kind):
    params = params.clone()
    params.output_kind = kind
    return [output async for output in engine.generate(prompt, params)]


@pytest.mark.proves("promise:D6", "fault:F39")
def test_streams_say_what_generate_says(async_llm):
    llm = tiny()
    prompt = TEXT[:60]
    asked = list(questions(llm.tokenizer))
    expected = [generate(llm, [prompt], params)[0] for params in asked]
    assert expected[0]["choices"][0]["text"] == _EMOJI
    assert expected[1]["choices"][0]["text"] == _EMOJI[: _EMOJI.index("END")]
    assert expected[1]["choices"][0]["stop_reason"] == "END of"
    assert expected[2]["choices"][0]["text"] == _EMOJI[: _EMOJI.index("🏴") + 1]
    assert expected[3]["choices"][0]["finish_reason"] == "length"
    engine = async_llm()

    async def all_ways(params):
        kinds = RequestOutputKind.DELTA, RequestOutputKind.CUMULATIVE, RequestOutputKind.FINAL_ONLY
        return await asyncio.gather(*[_ask(engine, prompt, params, kind) for kind in kinds])

    async def everything():
        return await asyncio.gather(*map(all_ways, asked))

    answers = asyncio.run(everything())
    for params, words, (deltas, cumulative, final) in zip(asked, expected, answers, strict=True):
        assert collect(deltas) == words
        assert said(cumulative[-1]) == words
        assert [said(output) for output in final] == [words]
        delta = params.clone()
        delta.output_kind = RequestOutputKind.DELTA
        assert collect(llm.stream(prompt, delta)) == words
        pieces = list(llm.stream(prompt, params))
        assert said(pieces[-1]) == words
        assert [output.finished for output in pieces] == [False] * (len(pieces) - 1) + [True]
        for earlier, later in itertools.pairwise(pieces):
            for choice, next_choice in zip(earlier.outputs, later.outputs, strict=False):
                # what was shown stays, and no half of a character ever was
                assert next_choice.text.startswith(choice.text)
                assert next_choice.token_ids[: len(choice.token_ids)] == choice.token_ids
                assert "�" not in choice.text


# ---- D7: threads -----------------------------------------------------------------------------------------------------


@needs_cpp
@pytest.mark.proves("promise:D7")
@pytest.mark.parametrize("options", [{}, {"quantization": "int8"}, {"executor": "eager"}], ids=str)
def test_threads_do_not_matter(options):
    prompts = [prompt_ids(n, seed=n) for n in (70, 3, 20)]
    params = [SamplingParams(max_tokens=8, logprobs=5, **kind) for kind in (GREEDY, TOP_P, PENALISED)]
    found = []
    for threads in (1, 2, 4):
        torch.set_num_threads(threads)
        llm = tiny(num_threads=threads, **options)
        if llm.core._runner.executor.name == "cpu":
            assert llm.core._runner.executor.num_threads == threads
        found.append(generate(llm, prompts, params))
    assert found[0] == found[1] == found[2]


# ---- D8: restarts ----------------------------------------------------------------------------------------------------


@needs_cpp
@pytest.mark.proves("promise:D8")
@pytest.mark.parametrize("case", engine_golden.CASES, ids=str)
def test_tokens_are_those_of_the_golden_file(case):
    golden = engine_golden.read(case)
    found = engine_golden.compute(case)
    assert found.keys() == golden.keys()
    for name, expected in golden.items():
        wrong = engine_golden.compare(found[name], expected, engine_golden.TOLERANCE[case[1]])
        assert wrong is None, f"{name}: {wrong}"


@pytest.mark.proves("promise:D8")
def test_the_golden_comparison_notices_another_token_and_another_number():
    expected = next(iter(engine_golden.read(engine_golden.CASES[0]).values()))
    assert engine_golden.compare(expected, expected, 1e-3) is None
    token = {**expected, "token_ids": [expected["token_ids"][0] + 1, *expected["token_ids"][1:]]}
    assert "token 0" in engine_golden.compare(token, expected, 1e-3)
    number = {**expected, "logprobs": [expected["logprobs"][0] + 2e-3, *expected["logprobs"][1:]]}
    assert "log-probability" in engine_golden.compare(number, expected, 1e-3)


@pytest.mark.proves("promise:D8")
def test_saved_and_loaded_again_it_says_the_same(tmp_path):
    llm = tiny()
    params = [SamplingParams(max_tokens=20, logprobs=3, **kind) for kind in (GREEDY, TOP_P)]
    expected = generate(llm, [TEXT[:80]] * 2, params)
    llm.model.save_pretrained(tmp_path)
    llm.tokenizer.save_pretrained(tmp_path)
    llm.shutdown()
    assert generate(tiny(str(tmp_path)), [TEXT[:80]] * 2, params) == expected
