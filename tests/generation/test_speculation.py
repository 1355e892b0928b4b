"""Assisted decoding never changes the result, and it saves steps."""

import copy

import pytest
import torch
from assisted import PROMPTS, counted, noisy, run

from gpt2rt import OpenAIGPTConfig, OpenAIGPTLMHeadModel
from gpt2rt.errors import NumericsError
from gpt2rt.generation import candidates
from gpt2rt.generation.prepare import prepare

FULL = {"return_dict_in_generate": True, "output_scores": True, "output_logits": True}


@pytest.fixture(scope="module")
def draft(model):
    """A model that is right often, but not always."""
    return noisy(model)


@pytest.fixture
def sources(draft):
    """The ways to get candidates."""
    return {
        "draft": {"assistant_model": draft, "num_assistant_tokens": 4},
        "confident draft": {"assistant_model": draft, "assistant_confidence_threshold": 0.2},
        "heuristic": {
            "assistant_model": draft,
            "num_assistant_tokens": 3,
            "num_assistant_tokens_schedule": "heuristic_transient",
        },
        "lookup": {"prompt_lookup_num_tokens": 5},
        "lookup of one": {"prompt_lookup_num_tokens": 3, "max_matching_ngram_size": 1},
        "early exit": {"assistant_early_exit": 1, "num_assistant_tokens": 3},
    }


SOURCES = ["draft", "confident draft", "heuristic", "lookup", "lookup of one", "early exit"]


def same(first, second):
    assert torch.equal(first.sequences, second.sequences)
    for name in ("scores", "logits"):
        one, other = getattr(first, name), getattr(second, name)
        assert len(one) == len(other)
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True)), name


def free(pools):
    return all(pool.num_free == pool.num_blocks for pool in pools)


@pytest.mark.proves("G2")
@pytest.mark.parametrize("name", SOURCES)
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"do_sample": True, "seed": 3, "top_p": 0.9, "num_return_sequences": 2},
        {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2, "min_new_tokens": 4, "eos_token_id": [7, 40, 51, 80]},
        {"do_sample": True, "seed": 5, "temperature": 0.7, "bad_words_ids": [[12, 13]], "eos_token_id": 20},
        {"do_sample": True, "seed": 6, "guidance_scale": 1.4, "negative_prompt_ids": [[3, 4]], "top_k": 20},
        {"prefix_allowed_tokens_fn": lambda row, ids: range(int(ids[-1]) % 7 + row, 97, 3)},
        {
            "eos_token_id": 51,
            "forced_eos_token_id": 9,
            "sequence_bias": [[[5, 6], 4.0]],
            "exponential_decay_length_penalty": (3, 1.2),
        },
    ],
    ids=["greedy", "sampled", "penalised", "sampled with rules", "guided", "constrained", "forced"],
)
def test_nothing_changes(model, sources, pools, name, settings):
    settings = {"max_new_tokens": 16, "eos_token_id": None, **FULL, **settings}
    expected = model.generate(PROMPTS, **settings)
    assisted = model.generate(PROMPTS, **sources[name], **settings)
    same(expected, assisted)
    assert free(pools)


@pytest.mark.proves("G2")
def test_sampled_tokens_are_the_same_for_many_seeds(model, draft, pools):
    common = {"do_sample": True, "top_k": 0, "max_new_tokens": 10, "eos_token_id": 11, "pad_token_id": 0}
    texts = set()
    for seed in range(40):
        expected = model.generate(PROMPTS, seed=seed, **common)
        texts.add(tuple(expected.flatten().tolist()))
        assert torch.equal(
            model.generate(PROMPTS, seed=seed, assistant_model=draft, num_assistant_tokens=3, **common), expected
        )
        assert torch.equal(model.generate(PROMPTS, seed=seed, prompt_lookup_num_tokens=3, **common), expected)
    assert len(texts) == 40
    assert free(pools)


def test_candidates_save_steps(model, draft):
    common = {"num_assistant_tokens": 4, "assistant_confidence_threshold": 0.0}
    for settings in ({}, {"do_sample": True, "seed": 1}):
        decoder, steps = run(model, assistant_model=draft, **common, **settings)
        statistics = decoder.statistics
        assert len(steps) == 20
        assert statistics.steps < 12, "the noisy copy is right most of the time"
        # every row got 19 tokens after the prefill's, each checked or the one after the checked ones
        assert 0 < statistics.accepted < statistics.proposed
    # the model as its own draft is never wrong: four rounds of four candidates and one token, and one of three more
    decoder, _ = run(model, assistant_early_exit=2, **common)
    assert decoder.statistics.accepted == decoder.statistics.proposed
    assert decoder.statistics.steps == 4
    assert decoder.statistics.accepted == 4 * (3 * 4 + 3)


def test_rows_accept_different_numbers_of_tokens(model, draft):
    decoder, _ = run(model, assistant_model=draft, num_assistant_tokens=6, assistant_confidence_threshold=0.0)
    alone = [
        run(model, [p], assistant_model=draft, num_assistant_tokens=6, assistant_confidence_threshold=0.0)[0]
        for p in PROMPTS
    ]
    steps = [one.statistics.steps for one in alone]
    assert len(set(steps)) > 1
    # rows do not wait for each other: the batch takes as many steps as its slowest row
    assert decoder.statistics.steps == max(steps)
    assert decoder.statistics.accepted == sum(one.statistics.accepted for one in alone)


def test_a_step_gives_out_columns_in_order(model, draft):
    expected, plain = run(model, eos_token_id=[7, 40, 51])
    decoder, steps = run(model, eos_token_id=[7, 40, 51], assistant_model=draft)
    assert steps == plain
    assert [row.finish_reason for row in decoder.rows] == [row.finish_reason for row in expected.rows]


def test_streamers_get_every_token(model, draft):
    class Records:
        def __init__(self):
            self.values, self.ended = [], 0

        def put(self, value):
            self.values.append(value)

        def end(self):
            self.ended += 1

    settings = {"max_new_tokens": 15, "eos_token_id": [7, 40, 51]}
    streamer = Records()
    result = model.generate(PROMPTS, assistant_model=draft, streamer=streamer, **settings)
    assert streamer.ended == 1
    assert torch.equal(torch.cat([streamer.values[0], torch.stack(streamer.values[1:], dim=1)], dim=1), result)
    assert torch.equal(result, model.generate(PROMPTS, **settings))


def test_padding_and_masks(model, sources):
    width = max(map(len, PROMPTS))
    for side in ("left", "right"):
        rows = [[0] * (width - len(p)) + p if side == "left" else p + [0] * (width - len(p)) for p in PROMPTS]
        ids = torch.tensor(rows)
        settings = {
            "attention_mask": (ids != 0).long(),
            "max_new_tokens": 12,
            "eos_token_id": None,
            "repetition_penalty": 1.2,
        }
        expected = model.generate(ids, **settings)
        for source in sources.values():
            assert torch.equal(model.generate(ids, **source, **settings), expected)


def test_a_callers_processors_and_criteria_see_what_they_always_see(model, sources):
    """They are called once for each token, with all rows at the same length, as without candidates."""

    def call(source):
        seen = []

        def processor(ids, scores):
            seen.append(("processor", ids.clone()))
            return scores.roll(ids.size(1) % 3, dims=1)

        def criterion(ids, scores):
            seen.append(("criterion", ids.clone(), len(scores)))
            return ids[:, -1] % 11 == 3

        result = model.generate(
            PROMPTS,
            max_new_tokens=12,
            eos_token_id=None,
            logits_processor=[processor],
            stopping_criteria=[criterion],
            **FULL,
            **source,
        )
        return result, seen

    expected, seen = call({})
    for name in ("draft", "lookup"):
        result, also = call(sources[name])
        same(expected, result)
        assert len(also) == len(seen)
        for one, other in zip(seen, also, strict=True):
            assert one[0] == other[0]
            assert torch.equal(one[1], other[1])
            assert one[2:] == other[2:]


def test_stop_strings(byte_model, tokenizer):
    settings = {"max_new_tokens": 30, "pad_token_id": 0}
    plain = byte_model.generate([[40, 41, 42]], **settings)
    text = tokenizer.decode(plain[0, 3:])
    stop = next(letter for letter in text[8:] if letter.isascii() and letter.isprintable())
    settings |= {"stop_strings": stop, "tokenizer": tokenizer}
    expected = byte_model.generate([[40, 41, 42], [70, 71]], **settings)
    assert expected[0, -1] == 0
    assert plain[0, -1] != 0
    for source in ({"prompt_lookup_num_tokens": 4}, {"assistant_early_exit": 1}, {"assistant_early_exit": 2}):
        assert torch.equal(byte_model.generate([[40, 41, 42], [70, 71]], **source, **settings), expected)


def test_max_time(model, draft):
    decoder, steps = run(model, assistant_model=draft, max_time=1e-9)
    assert len(steps) == 1
    assert [row.finish_reason for row in decoder.rows] == ["time"] * 4


def test_rows_at_the_last_position(make_model, model, draft, pools):
    # as far as positions go, and with prompts of many lengths
    prompts = [[3 + i % 50 for i in range(length)] for length in (48, 47, 40, 3)]
    settings = {"max_new_tokens": 46, "eos_token_id": None}
    with pytest.warns(UserWarning, match="room for 1"):
        expected = model.generate(prompts, **settings)
    short = make_model(seed=0, n_positions=16)
    for source in ({"assistant_model": draft}, {"assistant_model": short}, {"prompt_lookup_num_tokens": 8}):
        with pytest.warns(UserWarning, match="room for 1"):
            assert torch.equal(model.generate(prompts, **source, **settings), expected)
    assert free(pools)


def test_many_rows_get_few_candidates(model, draft, monkeypatch):
    """The logits of a step stay bounded: what a row may propose depends on how many rows there are."""
    expected = model.generate(PROMPTS, max_new_tokens=20, eos_token_id=None)
    monkeypatch.setattr("gpt2rt.generation.speculation._MAX_LOGITS", 12)
    asked = counted(monkeypatch, candidates.Draft)
    assert torch.equal(model.generate(PROMPTS, max_new_tokens=20, eos_token_id=None, assistant_model=draft), expected)
    # 12 logits for 4 rows: one each for the token after the candidates, and two candidates
    assert {count for counts in asked for count in counts.values()} <= {1, 2}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_weights(make_model, draft, dtype):
    twin = make_model().to(dtype)
    settings = {"max_new_tokens": 16, "eos_token_id": None, **FULL}
    expected = twin.generate(PROMPTS, **settings)
    for source in ({"assistant_model": draft}, {"assistant_early_exit": 1}, {"prompt_lookup_num_tokens": 4}):
        same(expected, twin.generate(PROMPTS, **source, **settings))


def test_the_eager_executor_takes_the_same_tokens(make_model, draft):
    """Its logits depend on the number of tokens in a step, but only by rounding."""
    twin = make_model()
    twin.generation_executor("eager")
    for settings in ({}, {"do_sample": True, "seed": 2}):
        settings = {"max_new_tokens": 16, "eos_token_id": None, **settings}
        expected = twin.generate(PROMPTS, **settings)
        for source in ({"assistant_model": draft}, {"assistant_early_exit": 1}, {"prompt_lookup_num_tokens": 4}):
            assert torch.equal(twin.generate(PROMPTS, **source, **settings), expected)


def test_other_architectures_assist_and_are_assisted(make_model, model, pools):
    """OpenAI GPT norms after the residual: its first layers are cut at other places."""
    torch.manual_seed(1)
    config = OpenAIGPTConfig(vocab_size=97, n_positions=48, n_embd=48, n_layer=3, n_head=3, initializer_range=0.3)
    gpt = OpenAIGPTLMHeadModel(config).eval()
    settings = {"max_new_tokens": 14, "eos_token_id": None, "pad_token_id": 0, "do_sample": True, "seed": 4}
    expected = gpt.generate(PROMPTS, **settings)
    for source in (
        {"assistant_early_exit": 1},
        {"assistant_early_exit": 2},
        {"assistant_model": model},
        {"prompt_lookup_num_tokens": 3},
    ):
        assert torch.equal(gpt.generate(PROMPTS, **source, **settings), expected)
    shallow = OpenAIGPTLMHeadModel(OpenAIGPTConfig(**{**config.to_dict(), "n_layer": 2})).eval()
    shallow.load_state_dict({name: value for name, value in gpt.state_dict().items() if ".h.2." not in name})
    common = {"num_assistant_tokens": 5, "assistant_confidence_threshold": 0.0}
    one, _ = run(gpt, assistant_early_exit=2, **common)
    other, _ = run(gpt, assistant_model=shallow, **common)
    assert one.statistics == other.statistics
    expected = model.generate(PROMPTS, **settings)
    assert torch.equal(model.generate(PROMPTS, assistant_model=gpt, **settings), expected)
    assert free(pools)


def test_the_cache_of_the_result_and_continuing_from_it(model, draft, pools):
    settings = {"max_new_tokens": 10, "eos_token_id": [7, 40, 51], "pad_token_id": 0, "return_dict_in_generate": True}
    expected = model.generate(PROMPTS, **settings)
    result = model.generate(PROMPTS, assistant_model=draft, **settings)
    assert torch.equal(result.sequences, expected.sequences)
    for layer in range(2):
        for one, other in zip(expected.past_key_values[layer], result.past_key_values[layer], strict=True):
            assert torch.equal(one, other)
    mask = torch.cat([torch.tensor([[0] * (10 - len(p)) + [1] * len(p) for p in PROMPTS]), torch.ones(4, 10).long()], 1)
    settings |= {"attention_mask": mask[:, : expected.sequences.size(1)], "max_new_tokens": 8}
    plain = model.generate(expected.sequences, past_key_values=copy.deepcopy(expected.past_key_values), **settings)
    for source in ({"assistant_model": draft}, {"prompt_lookup_num_tokens": 4}):
        past = copy.deepcopy(result.past_key_values)
        again = model.generate(expected.sequences, past_key_values=past, **source, **settings)
        assert torch.equal(again.sequences, plain.sequences)
    assert free(pools)


def test_drafts_of_many_kinds(make_model, model, pools):
    settings = {"max_new_tokens": 14, "eos_token_id": None, "do_sample": True, "seed": 4, "num_return_sequences": 3}
    expected = model.generate(PROMPTS, **settings)
    smaller = make_model(seed=5, n_layer=1, n_embd=32, n_head=2)
    other = make_model(seed=6).to(torch.bfloat16)
    for assistant in (smaller, other):
        for executor in ("cpu", "eager"):
            assistant.generation_executor(executor)
            assert torch.equal(model.generate(PROMPTS, assistant_model=assistant, **settings), expected)
    assert free(pools)


# ---- blocks --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["streamer", "criterion", "processor", "executor", "draft"])
@pytest.mark.parametrize("error", [RuntimeError("stop here"), KeyboardInterrupt()])
def test_blocks_are_free_after_a_failure(model, draft, pools, monkeypatch, where, error):
    calls = []

    def fail():
        calls.append(0)
        if len(calls) == 3:
            raise error

    class Streamer:
        def put(self, value):
            fail()

        def end(self):
            pass

    settings = {"max_new_tokens": 30, "eos_token_id": None, "do_sample": True, "seed": 0, "num_return_sequences": 2}
    if where == "streamer":
        settings["streamer"] = Streamer()
    elif where == "criterion":
        settings["stopping_criteria"] = [lambda ids, scores: bool(fail())]
    elif where == "processor":
        settings["logits_processor"] = [lambda ids, scores: (fail(), scores)[1]]
    else:
        executor = (model if where == "executor" else draft).generation_executor()
        step = executor.step
        monkeypatch.setattr(executor, "step", lambda *args, **kwargs: (fail(), step(*args, **kwargs))[1])
    with pytest.raises(type(error)):
        model.generate(PROMPTS, assistant_model=draft, **settings)
    assert len(pools) == 2
    assert free(pools)


def test_closing_the_loop_frees_everything(model, draft, pools):
    decoder, _, _ = prepare(model, PROMPTS, None, None, None, {"max_new_tokens": 30, "assistant_model": draft})
    steps = decoder.steps()
    next(steps)
    next(steps)
    assert not free(pools)
    steps.close()
    assert free(pools)
    assert len(pools) == 2


def test_finished_rows_free_their_blocks(model, draft, pools, monkeypatch):
    executor = model.generation_executor("cpu")
    step, rows = executor.step, []

    def watched(batch, cache, **kwargs):
        rows.append(batch.seq_lens.numel())
        return step(batch, cache, **kwargs)

    monkeypatch.setattr(executor, "step", watched)
    model.generate(
        [[3 + i % 40 for i in range(32)], [5, 6]],
        max_new_tokens=12,
        eos_token_id=None,
        assistant_model=draft,
        stopping_criteria=[lambda ids, scores: torch.tensor([ids.size(1) >= 35, False])],
    )
    assert rows[0] == 2
    assert rows[-1] == 1
    assert free(pools)


# ---- faults of a draft ---------------------------------------------------------------------------------------------


def test_a_damaged_draft_is_named(model, draft, pools):
    broken = copy.deepcopy(draft)
    with torch.no_grad():
        broken.transformer.ln_f.bias.fill_(float("nan"))
    with pytest.raises(
        NumericsError, match="the assistant model, not the model itself: row 0: 97 of 97 logits are NaN"
    ):
        model.generate(PROMPTS, assistant_model=broken)
    assert free(pools)


def test_a_guess_without_a_way_on_is_no_error(model, make_model):
    """Rules that exclude every token after a wrong guess end the draft, not the call."""
    said = model.generate([[5]], max_new_tokens=12, eos_token_id=None)[0, 1:].tolist()
    others = [make_model(seed=seed) for seed in range(9, 14)]
    guesses = [other.generate([[5]], max_new_tokens=1)[0, 1].item() for other in others]
    other, guess = next(pair for pair in zip(others, guesses, strict=True) if pair[1] not in said)
    # nothing may follow that guess; the model never says it, so it never comes to that
    words = [[guess, token] for token in range(97)]
    settings = {"max_new_tokens": 12, "eos_token_id": None, "bad_words_ids": words}
    expected = model.generate([[5]], **settings)
    assert torch.equal(model.generate([[5]], assistant_model=other, **settings), expected)


@pytest.mark.proves("G2")
def test_tokens_are_those_of_transformers(model, draft, hf):
    reference = hf.copy_of(model)
    for prompt in PROMPTS:
        ids = torch.tensor([prompt])
        expected = reference.generate(ids, assistant_model=hf.copy_of(draft), max_new_tokens=12, eos_token_id=None)
        assert torch.equal(model.generate(ids, assistant_model=draft, max_new_tokens=12, eos_token_id=None), expected)
        expected = reference.generate(ids, prompt_lookup_num_tokens=3, max_new_tokens=12, eos_token_id=None)
        assert torch.equal(
            model.generate(ids, prompt_lookup_num_tokens=3, max_new_tokens=12, eos_token_id=None), expected
        )
