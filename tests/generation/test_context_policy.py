"""What happens when a row needs more tokens than the model has positions."""

import warnings

import pytest
import torch

import gpt2rt
from gpt2rt.errors import RequestError
from gpt2rt.generation.prepare import prepare
from gpt2rt.generation.random import request_key, uniform
from gpt2rt.generation.sampling import sample

pytestmark = pytest.mark.proves("D9", "N9")

N = 48  # positions of the model
SHORT = [5, 6, 7, 8, 9]
LONG = [3 + i * 7 % 90 for i in range(70)]
FULL = [3 + i * 5 % 90 for i in range(N)]
PROMPTS = [SHORT, LONG, [40], FULL]


def windows(model, prompt, count, stride, seed=None):
    """The rule for sliding in plain words: a loop over the model's forward. Also the length of each window."""
    ids, start, lengths = list(prompt), max(0, len(prompt) - N), []
    with torch.no_grad():
        for _ in range(count):
            if len(ids) - start > N:
                start = len(ids) - (N - stride)
            lengths.append(len(ids) - start)
            scores = model(torch.tensor([ids[start:]])).logits[:, -1].float()
            if seed is None:
                ids.append(int(scores.argmax()))
            else:
                ids += sample(scores, [uniform(seed, request_key(prompt), 0, len(ids))])
    return ids[len(prompt) :], lengths


def new_tokens(model, prompts, count, **settings):
    settings = {"eos_token_id": None, "pad_token_id": 0, "max_new_tokens": count, **settings}
    return model.generate(prompts, **settings)[:, -count:].tolist()


# ---- sliding -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stride", [None, 1, 7, N - 1])
def test_sliding_is_a_loop_over_forward(model, pools, stride):
    count = 60 if stride == 1 else 5 * N
    expected, lengths = windows(model, SHORT, count, stride or N // 2)
    assert new_tokens(model, [SHORT], count, context_policy="sliding", context_stride=stride) == [expected]
    assert max(lengths) == N
    assert all(pool.num_free == pool.num_blocks for pool in pools)
    # the cache is as large as the window, however long the row
    assert pools[0].num_blocks <= N // 16 + 1


@pytest.mark.parametrize("executor", ["cpu", "eager"])
def test_rows_slide_each_on_its_own(model, executor):
    model.generation_executor(executor)
    count = 70
    expected = [windows(model, prompt, count, 20)[0] for prompt in PROMPTS]
    settings = {"context_policy": "sliding", "context_stride": 20}
    assert new_tokens(model, PROMPTS, count, **settings) == expected
    assert new_tokens(model, PROMPTS, count, use_cache=False, **settings) == expected
    model.generation_executor("cpu")


def test_openai_gpt_slides():
    torch.manual_seed(1)
    config = gpt2rt.OpenAIGPTConfig(vocab_size=97, n_positions=N, n_embd=48, n_layer=2, n_head=3, initializer_range=0.3)
    gpt = gpt2rt.OpenAIGPTLMHeadModel(config).eval()
    expected = [windows(gpt, prompt, 60, 20)[0] for prompt in PROMPTS]
    assert new_tokens(gpt, PROMPTS, 60, context_policy="sliding", context_stride=20) == expected


def test_sliding_samples(model, pools):
    settings = {"context_policy": "sliding", "context_stride": 16, "do_sample": True, "top_k": 0, "seed": 4}
    expected = [windows(model, prompt, 80, 16, seed=4)[0] for prompt in PROMPTS]
    assert new_tokens(model, PROMPTS, 80, **settings) == expected
    # several rows of a prompt share its blocks until they slide off it
    several = new_tokens(model, PROMPTS, 80, num_return_sequences=3, **settings)
    assert several[::3] == expected
    assert len({tuple(row) for row in several}) == 12
    assert all(pool.num_free == pool.num_blocks for pool in pools)


def test_sliding_keeps_what_rows_are_made_of(model):
    """Padding, rules over the whole row, the end of rows, and the streamed steps are as in any other call."""
    width = max(map(len, PROMPTS))
    ids = torch.tensor([[0] * (width - len(p)) + p for p in PROMPTS])
    settings = {"max_new_tokens": 90, "context_policy": "sliding", "pad_token_id": 0, "no_repeat_ngram_size": 2}
    result = model.generate(ids, attention_mask=(ids != 0).long(), eos_token_id=[7], **settings)
    assert torch.equal(result[:, :width], ids)
    assert torch.equal(result, model.generate(PROMPTS, eos_token_id=[7], **settings))
    for prompt, row in zip(PROMPTS, result.tolist(), strict=True):
        new = row[width:]
        new = new[: new.index(7) + 1] if 7 in new else new
        pairs = list(zip([*prompt, *new], [*prompt, *new][1:], strict=False))
        before = set(pairs[: len(prompt) - 1])
        made = pairs[len(prompt) - 1 :]
        assert len(set(made)) == len(made), "no pair twice, however far apart"
        assert not before & set(made)
        alone = model.generate([prompt], eos_token_id=[7], **settings)[0, len(prompt) :].tolist()
        assert alone == new


def test_what_rules_look_at_grows_with_the_rows(model, monkeypatch):
    width = max(map(len, PROMPTS))
    ids = torch.tensor([[0] * (width - len(p)) + p for p in PROMPTS])
    seen = []
    settings = {"max_new_tokens": 75, "context_policy": "sliding", "pad_token_id": 0, "eos_token_id": [7, 50]}
    settings |= {"attention_mask": (ids != 0).long(), "repetition_penalty": 1.2, "no_repeat_ngram_size": 3}
    settings |= {"stopping_criteria": [lambda ids, scores: seen.append(ids.clone()) or False]}
    expected = model.generate(ids, **settings)
    before = list(seen)
    seen.clear()
    monkeypatch.setattr("gpt2rt.generation.history._FIRST_ROOM", 3)
    assert torch.equal(model.generate(ids, **settings), expected)
    assert len(before) == len(seen) > 70
    assert all(torch.equal(one, other) for one, other in zip(before, seen, strict=True))


def test_short_rows_do_not_slide(model):
    assert new_tokens(model, [SHORT], 20, context_policy="sliding") == new_tokens(model, [SHORT], 20)
    # nobody said how many: 20, as ever, also at the end of the positions
    assert model.generate([FULL], context_policy="sliding", eos_token_id=None).size(1) == N + 20


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"context_stride": N}, "context_stride=48 must be smaller than the model's n_positions=48"),
        ({"num_beams": 2}, "context_policy='sliding' does not go with num_beams=2"),
        ({"prompt_lookup_num_tokens": 2}, "does not go with context_policy='sliding'"),
        (
            {"return_dict_in_generate": True, "output_attentions": True},
            "output_attentions does not go with context_policy='sliding'",
        ),
        (
            {"return_dict_in_generate": True, "output_hidden_states": True},
            "output_hidden_states does not go with context_policy='sliding'",
        ),
    ],
)
def test_what_does_not_slide(model, settings, message):
    with pytest.raises(RequestError, match=message):
        model.generate([SHORT], context_policy="sliding", **settings)


def test_a_stride_without_sliding_is_named(model):
    with pytest.warns(UserWarning, match="context_stride only matters with context_policy='sliding'"):
        model.generate([SHORT], context_stride=3)


# ---- truncate_left -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [{}, {"do_sample": True, "seed": 3}, {"repetition_penalty": 1.5}], ids=str)
def test_truncate_left_is_a_shorter_prompt(model, settings):
    count = 12
    kept = [prompt[-(N - count) :] for prompt in PROMPTS]
    result = model.generate(
        PROMPTS, max_new_tokens=count, context_policy="truncate_left", eos_token_id=None, pad_token_id=0, **settings
    )
    assert result[:, -count:].tolist() == new_tokens(model, kept, count, **settings)
    # the caller's whole prompts are still there
    for row, prompt in zip(result.tolist(), PROMPTS, strict=True):
        assert row[len(LONG) - len(prompt) : len(LONG)] == prompt


def test_truncate_left_of_a_padded_batch(model):
    ids = torch.tensor([LONG, [0] * 20 + LONG[:50]])
    settings = {"max_new_tokens": 12, "context_policy": "truncate_left", "eos_token_id": None, "pad_token_id": 0}
    settings |= {"no_repeat_ngram_size": 3, "repetition_penalty": 1.3}
    result = model.generate(ids, attention_mask=(ids != 0).long(), **settings)
    assert torch.equal(result[:, :70], ids)
    assert result[:, 70:].tolist() == new_tokens(
        model, [LONG[-36:], LONG[14:50]], 12, no_repeat_ngram_size=3, repetition_penalty=1.3
    )


def test_truncate_left_leaves_short_prompts_alone(model):
    expected = new_tokens(model, [SHORT, FULL[:36]], 12)
    assert new_tokens(model, [SHORT, FULL[:36]], 12, context_policy="truncate_left") == expected
    # 20 when nobody says how many
    result = model.generate([LONG], context_policy="truncate_left", eos_token_id=None)
    assert result.shape == (1, 90)
    assert result[0, 70:].tolist() == new_tokens(model, [LONG[-28:]], 20)[0]


def test_truncate_left_keeps_at_least_a_token(model):
    with pytest.warns(UserWarning, match="room for 48"):
        result = model.generate([LONG], max_new_tokens=100, context_policy="truncate_left", eos_token_id=None)
    assert result.shape == (1, 70 + N)
    assert result[0, 70:].tolist() == new_tokens(model, [LONG[-1:]], N)[0]


def test_truncate_left_with_max_length_counts_the_whole_prompt(model):
    result = model.generate([LONG], max_length=75, context_policy="truncate_left", eos_token_id=None)
    assert result.shape == (1, 75)
    assert result[0, 70:].tolist() == new_tokens(model, [LONG[-43:]], 5)[0]


def test_truncate_left_shows_what_the_model_saw(model):
    """Hidden states of the tokens that were kept; no cache, whose columns would not be those of the result."""
    settings = {"max_new_tokens": 3, "return_dict_in_generate": True, "output_hidden_states": True}
    settings |= {"eos_token_id": None, "output_logits": True}
    result = model.generate([LONG], context_policy="truncate_left", **settings)
    expected = model.generate([LONG[-45:]], **settings)
    assert result.past_key_values is None
    assert model.generate([SHORT], context_policy="truncate_left", **settings).past_key_values is not None
    assert model.generate([SHORT], context_policy="sliding", return_dict_in_generate=True).past_key_values is None
    for one, other in zip(result.logits, expected.logits, strict=True):
        assert torch.equal(one, other)
    for step, other in zip(result.hidden_states, expected.hidden_states, strict=True):
        for layer, its in zip(step, other, strict=True):
            torch.testing.assert_close(layer[:, -its.size(1) :], its, rtol=0, atol=2e-5)


def test_truncate_left_as_transformers_pipeline_does(model, hf):
    """``handle_long_generation="hole"`` keeps n_positions - max_new_tokens tokens of the prompt."""
    kept = torch.tensor([LONG[-(N - 10) :]])
    expected = hf.copy_of(model).generate(kept, max_new_tokens=10, eos_token_id=None, pad_token_id=0)
    assert new_tokens(model, [LONG], 10, context_policy="truncate_left") == expected[:, -10:].tolist()


def test_truncate_left_with_candidates(model):
    settings = {"max_new_tokens": 12, "context_policy": "truncate_left", "eos_token_id": None, "pad_token_id": 0}
    expected = model.generate(PROMPTS, **settings)
    for source in ({"prompt_lookup_num_tokens": 4}, {"assistant_early_exit": 1}):
        assert torch.equal(model.generate(PROMPTS, **source, **settings), expected)


# ---- error and stop ------------------------------------------------------------------------------------------------


@pytest.fixture
def no_work(model, monkeypatch):
    def step(*args, **kwargs):
        raise AssertionError("the model ran")

    monkeypatch.setattr(model.generation_executor(), "step", step)


@pytest.mark.parametrize(
    ("prompts", "settings", "message"),
    [
        ([SHORT], {"max_new_tokens": 45}, "prompt 0 has 5 tokens and 45 new ones were asked for.*room for 44;"),
        ([SHORT, FULL[:40]], {"max_new_tokens": 10}, "prompt 1 has 40 tokens and 10 new ones"),
        ([SHORT], {"max_length": 50}, "prompt 0 has 5 tokens and 45 new ones"),
        ([FULL], {"max_new_tokens": 2}, "n_positions=48, room for 1;"),
        ([LONG], {}, "prompt 0 has 70 tokens, but the model has n_positions=48"),
    ],
)
@pytest.mark.proves("fault:F36")
def test_error_comes_before_any_work(model, no_work, prompts, settings, message):
    with pytest.raises(RequestError, match=message):
        model.generate(prompts, context_policy="error", **settings)


def test_error_lets_pass_what_fits(model):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert model.generate([SHORT], max_new_tokens=44, context_policy="error", eos_token_id=None).size(1) == 49
        assert model.generate([FULL], max_new_tokens=1, context_policy="error", eos_token_id=None).size(1) == 49
        # nobody said how many
        assert model.generate([FULL], context_policy="error", eos_token_id=None).size(1) == 49


@pytest.mark.proves("fault:F36")
def test_stop_is_the_default(model):
    for policy in (None, "stop"):
        with pytest.warns(UserWarning, match="room for 44 in the model's n_positions=48; rows end there"):
            result = model.generate([SHORT], max_new_tokens=100, context_policy=policy, eos_token_id=None)
        assert result.size(1) == 49
        with pytest.raises(RequestError, match=r"prompt 0 has 70 tokens.*set context_policy"):
            model.generate([LONG], context_policy=policy)


def test_unknown_policies_are_refused(model):
    with pytest.raises(RequestError, match="context_policy"):
        model.generate([SHORT], context_policy="rolling")


def test_the_model_may_carry_the_policy(make_model):
    model = make_model()
    model.generation_config.context_policy = "sliding"
    model.generation_config.max_new_tokens = 100
    assert model.generate([SHORT], eos_token_id=None).size(1) == 105
    decoder, _, _ = prepare(model, [SHORT], None, None, None, {})
    assert decoder.plan.context_stride == N // 2
