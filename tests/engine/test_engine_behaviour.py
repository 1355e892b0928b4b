"""What an engine does with a request: where it ends, what it may ask for, who goes first, what is left behind."""

import asyncio

import pytest
import torch
from engine_cases import GREEDY, TEXT, generate, prompt_ids, said, small_gpt2, start, tiny

from gpt2rt.engine import LLM, PoolingParams, RequestOutputKind, SamplingParams
from gpt2rt.errors import QueueFullError, RequestError

EOS = 2047


def only(llm, prompt=TEXT[:40], **settings):
    """The one choice of a request."""
    (output,) = llm.generate([prompt], SamplingParams(**settings))
    assert output.finished
    assert output.error is None
    (choice,) = output.outputs
    return choice


@pytest.fixture(scope="module")
def llm():
    return tiny()


# ---- where a text ends -----------------------------------------------------------------------------------------------


def test_max_tokens_end_it(llm):
    choice = only(llm, max_tokens=7, **GREEDY)
    assert (choice.finish_reason, choice.stop_reason, len(choice.token_ids)) == ("length", None, 7)
    assert choice.text == llm.tokenizer.decode(choice.token_ids)
    assert len(only(llm).token_ids) == 16


def test_the_context_ends_it():
    llm = tiny(max_model_len=50)
    choice = only(llm, prompt_ids(20), max_tokens=None, ignore_eos=True)
    assert (choice.finish_reason, len(choice.token_ids)) == ("length", 30)
    assert len(only(llm, prompt_ids(49), max_tokens=None).token_ids) == 1


def test_an_end_token_ends_it(llm):
    choice = only(llm, max_tokens=9, logit_bias={EOS: 100.0}, logprobs=1)
    assert (choice.finish_reason, choice.stop_reason, choice.token_ids, choice.text) == ("stop", None, [EOS], "")
    assert len(choice.logprobs) == 1
    shown = only(llm, max_tokens=9, logit_bias={EOS: 100.0}, include_stop_str_in_output=True, skip_special_tokens=False)
    assert shown.text == llm.tokenizer.decode([EOS])
    ignored = only(llm, max_tokens=9, logit_bias={EOS: 100.0}, ignore_eos=True)
    assert (ignored.finish_reason, ignored.token_ids) == ("length", [EOS] * 9)


def test_min_tokens_come_first(llm):
    choice = only(llm, max_tokens=9, min_tokens=5, logit_bias={EOS: 100.0})
    assert (choice.finish_reason, len(choice.token_ids)) == ("stop", 6)
    assert EOS not in choice.token_ids[:-1]
    # a stop string does not end it earlier either
    word = only(llm, max_tokens=12, **GREEDY)
    text = llm.tokenizer.decode(word.token_ids[1:2])
    early = only(llm, max_tokens=12, stop=[text], **GREEDY)
    late = only(llm, max_tokens=12, min_tokens=4, stop=[text], **GREEDY)
    assert len(early.token_ids) <= 2
    assert len(late.token_ids) >= 4
    assert late.text.startswith(word.text[: len(early.text) + len(text)])


def test_a_stop_token_ends_it(llm):
    free = only(llm, max_tokens=12, **GREEDY)
    token = free.token_ids[5]
    first = free.token_ids.index(token)
    choice = only(llm, max_tokens=12, stop_token_ids=[3, token], **GREEDY)
    assert (choice.finish_reason, choice.stop_reason) == ("stop", token)
    assert choice.token_ids == free.token_ids[: first + 1]
    assert choice.text == llm.tokenizer.decode(choice.token_ids[:-1])
    shown = only(llm, max_tokens=12, stop_token_ids=[token], include_stop_str_in_output=True, **GREEDY)
    assert shown.text == llm.tokenizer.decode(choice.token_ids)


@pytest.mark.proves("fault:F39")
def test_a_stop_string_ends_it(llm):
    free = only(llm, max_tokens=30, **GREEDY)
    place = len(free.text) // 2
    stop = free.text[place : place + 6]
    cut = free.text.index(stop)
    choice = only(llm, max_tokens=30, stop=["never said", stop], **GREEDY)
    assert (choice.finish_reason, choice.stop_reason, choice.text) == ("stop", stop, free.text[:cut])
    shown = only(llm, max_tokens=30, stop=stop, include_stop_str_in_output=True, **GREEDY)
    assert shown.text == free.text[: cut + 6]
    assert choice.token_ids == free.token_ids[: len(choice.token_ids)]
    # the last token that is allowed completes it: a stop, not a length
    count = len(choice.token_ids)
    assert only(llm, max_tokens=count, stop=stop, **GREEDY).finish_reason == "stop"
    assert only(llm, max_tokens=count - 1, stop=stop, **GREEDY).finish_reason == "length"


def test_text_is_left_out_on_demand(llm):
    choice = only(llm, max_tokens=5, detokenize=False, **GREEDY)
    assert choice.text == ""
    assert choice.token_ids == only(llm, max_tokens=5, **GREEDY).token_ids


# ---- prompts ---------------------------------------------------------------------------------------------------------


def test_a_prompt_in_every_form(llm):
    ids = llm.tokenizer.encode(TEXT[:40])
    params = SamplingParams(max_tokens=5, **GREEDY)
    forms = [
        TEXT[:40],
        ids,
        torch.tensor(ids),
        tuple(ids),
        {"prompt": TEXT[:40]},
        {"prompt_token_ids": ids},
        {"prompt_token_ids": ids, "prompt": "only shown"},
    ]
    outputs = llm.generate(forms, params) + [llm.generate(form, params)[0] for form in forms]
    assert len({tuple(output.outputs[0].token_ids) for output in outputs}) == 1
    assert [output.prompt for output in outputs[:7]] == [TEXT[:40], None, None, None, TEXT[:40], None, "only shown"]
    assert all(output.prompt_token_ids == ids for output in outputs)


def test_parameters_for_each_prompt(llm):
    params = [SamplingParams(max_tokens=n, **GREEDY) for n in (1, 2, 3)]
    outputs = llm.generate([TEXT[:9]] * 3, params)
    assert [len(output.outputs[0].token_ids) for output in outputs] == [1, 2, 3]
    with pytest.raises(RequestError, match="2 parameters for 3 prompts"):
        llm.generate([TEXT[:9]] * 3, params[:2])
    with pytest.raises(RequestError, match="1 priorities for 3 prompts"):
        llm.generate([TEXT[:9]] * 3, params, priority=[1])
    with pytest.raises(RequestError, match="SamplingParams, got PoolingParams"):
        llm.generate([TEXT[:9]], PoolingParams())
    assert llm.generate([], params[0]) == []
    # what the caller gave is his own still
    assert params[0].output_kind is RequestOutputKind.CUMULATIVE


def test_nothing_is_begun_if_one_prompt_is_wrong(llm):
    steps = llm.stats().num_steps
    with pytest.raises(RequestError, match="token 1 of the prompt is 9999"):
        llm.generate([[1, 2], [1, 9999]], SamplingParams())
    assert llm.stats().num_steps == steps


def test_prompts_are_cut_on_demand():
    llm = tiny(max_model_len=40)
    long = prompt_ids(100)
    output = llm.generate([long], SamplingParams(max_tokens=4, truncate_prompt_tokens=5, **GREEDY))[0]
    assert output.prompt_token_ids == long[-5:]
    assert said(output) == generate(llm, [long[-5:]], SamplingParams(max_tokens=4, **GREEDY))[0]
    output = llm.generate([long], SamplingParams(max_tokens=4, truncate_prompt_tokens=-1, **GREEDY))[0]
    assert output.prompt_token_ids == long[-36:]
    # a text that is far too long to be worth tokenising otherwise
    assert len(llm.generate([TEXT * 50], SamplingParams(truncate_prompt_tokens=-1))[0].prompt_token_ids) == 24
    (embedding,) = llm.embed([long], truncate_prompt_tokens=-1)
    assert embedding.prompt_token_ids == long[-40:]


@pytest.mark.proves("fault:F36")
def test_what_is_too_long_is_refused_before_work():
    llm = tiny(max_model_len=40)
    for prompt, settings, message in (
        (prompt_ids(40), {"max_tokens": 1}, "the prompt has 40 tokens, but prompt and output together have at most 40"),
        (prompt_ids(41), {"max_tokens": None}, "the prompt has 41 tokens"),
        (prompt_ids(30), {"max_tokens": 11}, "together 41, but the model takes 40; lower max_tokens to 10"),
        (TEXT * 100, {}, "does not fit into the 40 tokens"),
    ):
        with pytest.raises(RequestError, match=message):
            llm.generate([prompt], SamplingParams(**settings))
    with pytest.raises(RequestError, match="the prompt has 41 tokens, but the model takes 40"):
        llm.embed([prompt_ids(41)])
    assert llm.stats().num_steps == 0
    with pytest.raises(ValueError, match="max_model_len=513 is more than the model's 512 positions"):
        tiny(max_model_len=513)


@pytest.mark.proves("fault:F34")
@pytest.mark.parametrize("prompt", ["", [], {"prompt_token_ids": []}])
def test_an_empty_prompt_is_refused(llm, prompt):
    with pytest.raises(RequestError, match="the prompt is empty"):
        llm.generate([prompt], SamplingParams())


def test_without_a_tokenizer_there_are_only_ids():
    llm = LLM(small_gpt2(), num_blocks=32)
    assert llm.tokenizer is None
    (output,) = llm.generate([[1, 2, 3]], SamplingParams(max_tokens=4, detokenize=False, logprobs=1))
    assert output.outputs[0].text == ""
    assert {logprob.decoded_token for entry in output.outputs[0].logprobs for logprob in entry.values()} == {None}
    with pytest.raises(RequestError, match="no tokenizer"):
        llm.generate(["text"], SamplingParams(detokenize=False))


# ---- log-probabilities of prompts ------------------------------------------------------------------------------------


@pytest.mark.proves("promise:D3")
@pytest.mark.parametrize("name", ["gpt2rt/tiny-gpt2", "gpt2rt/tiny-gpt1"])
def test_prompt_logprobs_are_those_of_score(name):
    # 128 rows of logits at most in a step, and here 50 tokens
    for options in ({}, {"max_num_batched_tokens": 50, "max_num_seqs": 8}):
        llm = tiny(name, **options)
        for length in (1, 2, 51, 129, 200):
            prompt = prompt_ids(length)
            output = llm.generate([prompt], SamplingParams(max_tokens=1, prompt_logprobs=2))[0]
            assert output.prompt_logprobs[0] is None
            assert len(output.prompt_logprobs) == length
            if length == 1:
                continue
            (expected,) = llm.model.score([prompt]).token_logprobs
            for token, entry, number in zip(prompt[1:], output.prompt_logprobs[1:], expected[1:], strict=True):
                assert entry[token].logprob == pytest.approx(number, abs=2e-5)
                ranks = sorted(logprob.rank for logprob in entry.values())
                assert ranks[:2] == [1, 2]
                assert len(entry) == len(ranks) == (2 if entry[token].rank <= 2 else 3)


def test_a_prompt_that_fills_the_context_can_be_scored():
    llm = tiny()
    prompt = prompt_ids(llm.max_model_len)
    output = llm.generate([prompt], SamplingParams(max_tokens=1, prompt_logprobs=0))[0]
    (expected,) = llm.model.score([prompt]).token_logprobs
    found = [entry[token].logprob for token, entry in zip(prompt[1:], output.prompt_logprobs[1:], strict=True)]
    assert found == pytest.approx(list(expected[1:]), abs=2e-5)
    assert len(output.outputs[0].token_ids) == 1
    for prompt_too_long, params in (
        (prompt, SamplingParams(max_tokens=1)),
        (prompt, SamplingParams(max_tokens=2, prompt_logprobs=0)),
        ([*prompt, 1], SamplingParams(max_tokens=1, prompt_logprobs=0)),
    ):
        with pytest.raises(RequestError, match="prompt and output together have at most 512"):
            llm.generate([prompt_too_long], params)


def test_prompt_logprobs_take_nothing_from_the_prefix_cache(llm):
    prompt = prompt_ids(60)
    plain = llm.generate([prompt], SamplingParams(max_tokens=3, **GREEDY))[0]
    wide = llm.generate([prompt], SamplingParams(max_tokens=3, prompt_logprobs=0, **GREEDY))[0]
    assert wide.num_cached_tokens == 0
    assert len(wide.prompt_logprobs) == 60
    assert wide.outputs[0].token_ids == plain.outputs[0].token_ids
    assert llm.generate([prompt], SamplingParams(max_tokens=3))[0].num_cached_tokens == 48


def test_logprobs_of_chosen_tokens(llm):
    choice = only(llm, max_tokens=10, seed=1, logprobs=3)
    assert len(choice.logprobs) == 10
    for token, entry in zip(choice.token_ids, choice.logprobs, strict=True):
        assert sorted(logprob.rank for logprob in entry.values())[:3] == [1, 2, 3]
        assert entry[token].decoded_token == llm.tokenizer.decode([token])
        assert len(entry) == (3 if entry[token].rank <= 3 else 4)
    total = sum(entry[token].logprob for token, entry in zip(choice.token_ids, choice.logprobs, strict=True))
    assert choice.cumulative_logprob == pytest.approx(total)
    # they are the model's own: what is asked of the choice does not change them
    hot = only(llm, max_tokens=1, seed=1, logprobs=3, temperature=0.1, logit_bias={9: 3.0})
    assert hot.logprobs[0].items() >= {k: v for k, v in choice.logprobs[0].items() if v.rank <= 3}.items()
    (scored,) = llm.model.score([llm.tokenizer.encode(TEXT[:40]) + choice.token_ids]).token_logprobs
    mine = [entry[token].logprob for token, entry in zip(choice.token_ids, choice.logprobs, strict=True)]
    assert mine == pytest.approx(scored[-10:], abs=2e-5)


# ---- who goes first --------------------------------------------------------------------------------------------------


def test_more_choices_than_places():
    params = SamplingParams(n=5, max_tokens=12, seed=3, logprobs=1)
    prompt = prompt_ids(20)
    (expected,) = generate(tiny(), [prompt], params)
    for places in (1, 2, 4):
        llm = tiny(max_num_seqs=places)
        request = start(llm, prompt, params)
        most = 0
        while not request.finished:
            llm.core.step()
            most = max(most, len(llm.core.scheduler.running))
        assert said(request.outputs[-1]) == expected
        assert most == places


def test_the_smaller_priority_goes_first():
    llm = tiny(max_num_seqs=1)
    order = []
    requests = []
    for priority in (3, 1, 2, 1, -1):
        request = llm._request(prompt_ids(4), SamplingParams(max_tokens=3), None, priority, None)
        request.sink = lambda output, name=request.request_id: output.finished and order.append(name)
        requests.append(request)
        llm.core.add(request)
    while len(order) < 5:
        llm.core.step()
    assert order == [requests[i].request_id for i in (4, 1, 3, 2, 0)]


def test_the_larger_priority_gives_way():
    llm = tiny(num_blocks=10)
    params = SamplingParams(max_tokens=100, ignore_eos=True)
    outputs = llm.generate([prompt_ids(8, seed=i) for i in range(3)], params, priority=[5, 0, 9])
    assert [output.metrics.num_preemptions > 0 for output in outputs] == [True, False, True]
    assert outputs[1].metrics.finished_time < min(outputs[i].metrics.finished_time for i in (0, 2))


def test_priorities_must_be_numbers(llm):
    for priority in (1.5, 2**31, True):
        with pytest.raises(RequestError, match="priority must be an integer"):
            llm.generate([[1]], SamplingParams(), priority=priority)


# ---- limits ----------------------------------------------------------------------------------------------------------


@pytest.mark.proves("fault:F53")
def test_a_request_that_no_pool_could_hold_is_refused():
    llm = tiny(num_blocks=3)
    assert len(only(llm, prompt_ids(30), max_tokens=19, ignore_eos=True).token_ids) == 19
    with pytest.raises(RequestError, match="up to 4 KV blocks of 16 tokens for its 49 tokens, but the engine has 3"):
        llm.generate([prompt_ids(30)], SamplingParams(max_tokens=20))
    with pytest.raises(RequestError, match="needs up to 4 KV blocks"):
        llm.embed([prompt_ids(49)])


def test_choices_of_one_request_need_not_fit_together():
    params = SamplingParams(n=6, max_tokens=30, seed=1, ignore_eos=True)
    (expected,) = generate(tiny(), [prompt_ids(18)], params)
    llm = tiny(num_blocks=4)
    assert generate(llm, [prompt_ids(18)], params) == [expected]
    assert llm.stats().num_preemptions > 0


def test_the_queue_has_an_end():
    llm = tiny(max_num_seqs=2, max_num_queued_reqs=3)
    params = SamplingParams(max_tokens=2)
    assert len(llm.generate([[1]] * 5, params)) == 5
    with pytest.raises(QueueFullError, match="at most 3 may") as raised:
        llm.generate([[1]] * 6, params)
    assert raised.value.retry_after > 0
    # what had been added is gone, and there is room again
    assert len(llm.generate([[1]] * 5, params)) == 5


def test_without_a_queue_nobody_waits():
    llm = tiny(max_num_seqs=2, max_num_queued_reqs=0)
    params = SamplingParams(max_tokens=2)
    assert len(llm.generate([[1]] * 2, params)) == 2
    with pytest.raises(QueueFullError, match="at most 0 may"):
        llm.generate([[1]] * 3, params)
    assert len(llm.generate([[1]] * 2, params)) == 2
    with pytest.raises(ValueError, match="max_num_queued_reqs must be an integer of at least 0, got -1"):
        tiny(max_num_queued_reqs=-1)


def test_the_queue_has_an_end_in_tokens():
    llm = tiny(max_num_seqs=1, max_num_queued_reqs=100, max_num_queued_tokens=50)
    params = SamplingParams(max_tokens=2)
    assert len(llm.generate([[1] * 25] * 2, params)) == 2
    with pytest.raises(QueueFullError, match="50 prompt tokens wait already, and at most 50 may"):
        llm.generate([[1] * 25] * 3, params)
    # one alone is always taken
    assert len(llm.generate([[1] * 100], params)) == 1


def test_without_a_bound_anything_may_wait():
    llm = tiny(max_num_seqs=4)
    assert len(llm.generate([[i] for i in range(1, 301)], SamplingParams(max_tokens=1))) == 300


@pytest.mark.proves("fault:F52")
def test_a_name_is_used_once_at_a_time(async_llm):
    engine = async_llm()

    async def ask(name, **settings):
        return [output async for output in engine.generate([1, 2], SamplingParams(**settings), name)][-1]

    async def both():
        first = asyncio.ensure_future(ask("mine", max_tokens=400, ignore_eos=True))
        await asyncio.sleep(0.02)
        with pytest.raises(RequestError, match="'mine' is in use"):
            await ask("mine")
        await engine.abort("mine")
        await engine.abort(["mine", "nobody's"])
        output = await first
        assert (output.request_id, output.outputs[0].finish_reason) == ("mine", "abort")
        return (await ask("mine")).outputs[0].finish_reason

    assert asyncio.run(both()) == "length"


# ---- conversations ---------------------------------------------------------------------------------------------------

_TEMPLATE = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}ROMEO:{% endif %}"
)


@pytest.mark.proves("fault:F45")
def test_conversations_need_a_template(llm):
    talk = [{"role": "JULIET", "content": "What man art thou?"}]
    params = SamplingParams(max_tokens=5, **GREEDY)
    with pytest.raises(RequestError, match="no chat template"):
        llm.chat(talk, params)
    with pytest.raises(RequestError, match="messages is empty"):
        llm.chat([], params)
    (output,) = llm.chat(talk, params, chat_template=_TEMPLATE)
    assert output.prompt == "JULIET: What man art thou?\nROMEO:"
    assert len(llm.chat([talk, talk], params, chat_template=_TEMPLATE)) == 2
