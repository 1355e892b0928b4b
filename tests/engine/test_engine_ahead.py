"""Decoding ahead on a GPU: the tokens of the engine's other steps, whatever happens, and nothing left behind."""

import itertools

import pytest
import torch
from host_kernels import use_host_kernels
from lively_model import lively_model

from gpt2rt.engine import LLM, SamplingParams
from gpt2rt.errors import NumericsError
from gpt2rt.graph.device_loop import DeviceLoop

VOCAB = 53
PROMPTS = [[5, 7, 11], [2], [5, 7, 11, 13, 17, 19]]
DRAWN = {"temperature": 0.8, "top_p": 0.9}


NAMES = itertools.count()


@pytest.fixture(autouse=True)
def host_kernels(monkeypatch, caplog, request):
    use_host_kernels(monkeypatch)
    yield
    if "fails" not in request.node.name:
        # a failure would be made good by the engine's own steps
        assert not [record for record in caplog.get_records("call") if "decod" in record.getMessage()]


@pytest.fixture(scope="module")
def model():
    return lively_model(n_layer=1, n_embd=16, n_head=1, n_positions=64, vocab_size=VOCAB)


@pytest.fixture
def llm(model, host_kernels):
    llm = LLM(model, executor="cuda", num_blocks=24, max_num_seqs=4)
    yield llm
    llm.shutdown()


@pytest.fixture
def ahead(monkeypatch):
    """The rows of each step that was queued ahead."""
    seen = []
    launch = DeviceLoop.launch

    def counted(loop):
        pairs = zip(loop._sequences, loop._limits, strict=True)
        going = [sequence is not None and sequence.length < limit for sequence, limit in pairs]
        # the device knows as well who goes on
        assert (loop._state._shared.seq_lens > 0).tolist()[: len(going)] == going
        launch(loop)
        seen.append(sum(sequence is not None for sequence in loop._sequences))

    monkeypatch.setattr(DeviceLoop, "launch", counted)
    return seen


def params_of(lengths, **settings):
    settings = {"temperature": 0.0, "ignore_eos": True, "detokenize": False, **settings}
    return [SamplingParams(max_tokens=length, **{"seed": place, **settings}) for place, length in enumerate(lengths)]


def alone(model, prompts, params):
    """What each request gets on the eager executor."""
    llm = LLM(model, executor="eager", num_blocks=64)
    outputs = [llm.generate([prompt], [one])[0] for prompt, one in zip(prompts, params, strict=True)]
    llm.shutdown()
    return [said(output) for output in outputs]


def said(output):
    return [(choice.token_ids, choice.finish_reason) for choice in output.outputs]


def start(llm, prompt, params):
    outputs = []
    request = llm._frontend.make(prompt, params, outputs.append, request_id=str(next(NAMES)))
    llm.core.add(request)
    return request, outputs


def assert_clean(core):
    assert not core.has_unfinished
    assert not core._ahead.branches
    assert core.scheduler.num_free == core.cache.pool.num_blocks


@pytest.mark.parametrize("settings", [{}, DRAWN, {"stop_token_ids": [4, 29]}, {"n": 2, **DRAWN}])
def test_the_tokens_of_the_eager_executor(model, llm, ahead, settings):
    prompts = [*PROMPTS, [31, 8]]
    params = params_of([24, 7, 15, 24], **settings)
    found = llm.generate(prompts, params)
    assert [said(output) for output in found] == alone(model, prompts, params)
    assert ahead
    # rows that end do not end the others' run, until a smaller batch would do
    if not settings:
        assert [count for count, _ in itertools.groupby(ahead)] == [4, 3, 2]
    assert_clean(llm.core)


def test_it_can_be_turned_off(model, ahead, monkeypatch):
    monkeypatch.setenv("GPT2RT_CUDA_AHEAD", "0")
    llm = LLM(model, executor="cuda", num_blocks=24)
    llm.generate(PROMPTS, params_of([14, 14, 14]))
    assert not ahead
    llm.shutdown()


def test_rows_that_draw_beside_rows_that_do_not(ahead):
    # ties, of which the first is taken without drawing
    with torch.no_grad():
        twins = lively_model(n_layer=1, n_embd=16, n_head=1, n_positions=64, vocab_size=VOCAB)
        twins.transformer.wte.weight[27:52] = twins.transformer.wte.weight[1:26]
    llm = LLM(twins, executor="cuda", num_blocks=24, max_num_seqs=4)
    ways = [{}, DRAWN, {}, {"temperature": 1.0, "top_k": 5}]
    prompts = [*PROMPTS, [31, 8]]
    params = [params_of([12], seed=place, **way)[0] for place, way in enumerate(ways)]
    found = llm.generate(prompts, params)
    assert [said(output) for output in found] == alone(twins, prompts, params)
    assert ahead
    assert any(token > 26 for token in found[3].outputs[0].token_ids)
    assert all(token < 27 or token == 52 for token in found[0].outputs[0].token_ids)
    llm.shutdown()


def test_what_the_host_has_to_look_at_is_not_decoded_ahead(llm, ahead):
    for settings in ({"logprobs": 1}, {"presence_penalty": 0.5}, {"logit_bias": {3: 1.0}}):
        llm.generate(PROMPTS[:2], params_of([7, 7], **settings))
    assert not ahead
    llm.generate(PROMPTS[:1], params_of([9], min_tokens=6, stop_token_ids=[1]))
    # until then the ends have to be excluded
    assert 0 < len(ahead) < 6


def test_a_request_that_comes_later_and_one_that_is_taken_back(model, llm, ahead):
    params = params_of([16, 16, 6])
    expected = alone(model, PROMPTS, params)
    first, second = (start(llm, prompt, one) for prompt, one in zip(PROMPTS[:2], params[:2], strict=True))
    while len(first[0].branches[0].output_ids) < 6:
        llm.core.step()
    assert llm.core._ahead.branches
    third = start(llm, PROMPTS[2], params[2])
    before = len(ahead)
    while not third[0].num_output_tokens:
        llm.core.step()
    # what was pending has been used, and nothing was queued in its way
    assert len(ahead) == before
    while len(first[0].branches[0].output_ids) < 11:
        llm.core.step()
    assert len(ahead) > before
    llm.core.abort(second[0].request_id)
    while llm.core.has_unfinished:
        llm.core.step()
    assert [said(outputs[-1]) for _, outputs in (first, third)] == [expected[0], expected[2]]
    assert second[1][-1].outputs[0].finish_reason == "abort"
    tokens = second[1][-1].outputs[0].token_ids
    assert tokens == expected[1][0][0][: len(tokens)]
    assert_clean(llm.core)


def test_an_empty_pool_ends_the_run_and_somebody_gives_way(model, ahead):
    llm = LLM(model, executor="cuda", num_blocks=5, max_num_seqs=3, enable_prefix_caching=False)
    params = params_of([18, 18, 18])
    found = llm.generate(PROMPTS, params)
    assert [said(output) for output in found] == alone(model, PROMPTS, params)
    assert llm.core.stats().num_preemptions
    assert ahead
    assert_clean(llm.core)
    llm.shutdown()


@pytest.mark.proves("fault:F58")
def test_a_row_without_a_token_is_computed_again_and_told(model, llm):
    params = params_of([20, 20])
    expected = alone(model, PROMPTS[:2], params)
    good, bad = (start(llm, prompt, one) for prompt, one in zip(PROMPTS[:2], params, strict=True))
    while not llm.core._ahead.branches or bad[0].num_output_tokens < 8:
        llm.core.step()
    llm.core.cache.data[:, :, bad[0].branches[0].sequence.blocks[0]] = torch.nan
    while llm.core.has_unfinished:
        llm.core.step()
    assert said(good[1][-1]) == expected[0]
    assert isinstance(bad[1][-1].error, NumericsError)
    assert_clean(llm.core)


def test_a_row_without_a_token_by_chance_gets_it_in_a_step_of_the_engine(model, llm, monkeypatch):
    read = DeviceLoop.read
    reads = itertools.count()

    def damaged(loop):
        tokens = read(loop)
        return [-1 if row == 0 else token for row, token in enumerate(tokens)] if next(reads) == 3 else tokens

    monkeypatch.setattr(DeviceLoop, "read", damaged)
    params = params_of([30, 30])
    found = llm.generate(PROMPTS[1:], params)
    assert [said(output) for output in found] == alone(model, PROMPTS[1:], params)
    assert next(reads) > 8


@pytest.mark.parametrize("name", ["start", "launch"])
def test_a_run_that_fails_is_followed_by_steps_of_the_engine(model, llm, monkeypatch, caplog, name):
    def fail(*_):
        raise RuntimeError("thrown by the test")

    monkeypatch.setattr(DeviceLoop, name, fail)
    params = params_of([9])
    assert said(llm.generate(PROMPTS[:1], params)[0]) == alone(model, PROMPTS[:1], params)[0]
    assert "thrown by the test" in caplog.text
    assert_clean(llm.core)


def test_a_reset_in_the_middle_of_a_run(model, llm):
    start(llm, PROMPTS[0], params_of([20])[0])
    while not llm.core._ahead.branches:
        llm.core.step()
    llm.core.reset(RuntimeError("thrown by the test"))
    assert_clean(llm.core)
    params = params_of([9])
    assert said(llm.generate(PROMPTS[:1], params)[0]) == alone(model, PROMPTS[:1], params)[0]


def test_requests_of_every_kind_at_any_time(model, ahead):
    numbers = torch.Generator().manual_seed(7)

    def draw(most):
        return int(torch.randint(0, most, (), generator=numbers))

    kinds = [{}, {}, {}, DRAWN, DRAWN, {"n": 2, **DRAWN}, {"logprobs": 1}, {"stop_token_ids": [4, 17, 29]}]
    prompts = [[1 + draw(VOCAB - 1) for _ in range(1 + draw(20))] for _ in range(24)]
    params = [params_of([1 + draw(24)], **kinds[draw(len(kinds))])[0] for _ in prompts]
    expected = alone(model, prompts, params)
    num_ahead = num_steps = 0
    for trial in range(20):
        llm = LLM(
            model,
            executor="cuda",
            num_blocks=6 + draw(12),
            max_num_seqs=1 + draw(6),
            max_num_batched_tokens=16,
            enable_prefix_caching=trial % 2 == 0,
        )
        core, running = llm.core, []
        for number in range(60):
            if draw(4) == 0 and number < 50:
                place = draw(len(prompts))
                running.append((place, *start(llm, prompts[place], params[place])))
            if draw(20) == 0 and running:
                core.abort(running[draw(len(running))][1].request_id)
            if core.has_unfinished:
                core.step()
                num_steps += 1
                num_ahead += bool(core._ahead.branches)
        while core.has_unfinished:
            core.step()
        for place, _, outputs in running:
            if outputs[-1].outputs[0].finish_reason == "abort":
                for choice, (tokens, _) in zip(outputs[-1].outputs, expected[place], strict=False):
                    assert choice.token_ids == tokens[: len(choice.token_ids)]
            else:
                assert said(outputs[-1]) == expected[place]
        assert core._ahead.branches == []
        assert core.scheduler.num_free == core.cache.pool.num_blocks
        llm.shutdown()
    assert num_ahead > num_steps / 10
    assert len(ahead) >= num_ahead
