"""What ``generate`` promises beyond transformers' contract."""

import copy
import gc
import threading
import warnings
import weakref

import pytest
import torch

from gpt2rt.errors import NumericsError
from gpt2rt.generation import GenerationConfig, TextIteratorStreamer, TextStreamer
from gpt2rt.generation.prepare import prepare

PROMPTS = [[5, 6, 7, 8, 9], [40], [10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21], [60, 61]]


def new_tokens(model, prompts, count=12, **settings):
    settings = {"eos_token_id": None, "pad_token_id": 0, "max_new_tokens": count, **settings}
    return model.generate(prompts, **settings)[:, -count:].tolist()


@pytest.mark.parametrize("executor", ["cpu", "eager"])
@pytest.mark.parametrize(
    "settings",
    [{}, {"do_sample": True, "seed": 3, "top_p": 0.9}, {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2}],
    ids=["greedy", "sampled", "penalised"],
)
def test_a_row_alone_is_the_row_in_a_batch(model, executor, settings):
    model.generation_executor(executor)
    together = new_tokens(model, PROMPTS, **settings)
    assert together == [new_tokens(model, [prompt], **settings)[0] for prompt in PROMPTS]


def test_logits_are_bit_equal_alone_and_in_a_batch_on_the_cpu_executor(model):
    model.generation_executor("cpu")
    settings = {"max_new_tokens": 6, "eos_token_id": None, "return_dict_in_generate": True, "output_logits": True}
    together = model.generate(PROMPTS, **settings).logits
    for row, prompt in enumerate(PROMPTS):
        alone = model.generate([prompt], **settings).logits
        assert all(torch.equal(a[0], t[row]) for a, t in zip(alone, together, strict=True))


def test_cache_and_no_cache_give_bit_equal_logits(model):
    model.generation_executor("cpu")
    settings = {"max_new_tokens": 6, "eos_token_id": None, "return_dict_in_generate": True, "output_logits": True}
    cached, recomputed = (model.generate(PROMPTS, use_cache=flag, **settings) for flag in (True, False))
    assert torch.equal(cached.sequences, recomputed.sequences)
    assert all(torch.equal(a, b) for a, b in zip(cached.logits, recomputed.logits, strict=True))


def test_padding_side_does_not_matter(model):
    width = max(map(len, PROMPTS))
    left = torch.tensor([[0] * (width - len(p)) + p for p in PROMPTS])
    right = torch.tensor([p + [0] * (width - len(p)) for p in PROMPTS])
    expected = new_tokens(model, PROMPTS)
    for ids in (left, right, left.int(), right.numpy()):
        mask = (torch.as_tensor(ids) != 0).long()
        assert new_tokens(model, ids, attention_mask=mask) == expected
        assert new_tokens(model, ids, attention_mask=mask.bool()) == expected


@pytest.mark.proves("G6")
def test_result_keeps_the_prompts_as_given(model):
    ids = torch.tensor([[7, 8, 0, 0], [9, 10, 11, 12]])
    result = model.generate(ids, attention_mask=(ids != 0).long(), max_new_tokens=3, eos_token_id=None)
    assert result.dtype == torch.int64
    assert torch.equal(result[:, :4], ids)
    listed = model.generate([[7, 8], [9, 10, 11, 12]], max_new_tokens=3, eos_token_id=None)
    assert listed[0, :4].tolist() == [0, 0, 7, 8]
    assert torch.equal(listed[:, 4:], result[:, 4:])


# ---- sampling ------------------------------------------------------------------------------------------------------


def test_seed_fixes_the_text(model):
    once = new_tokens(model, PROMPTS, do_sample=True, seed=11)
    assert new_tokens(model, PROMPTS, do_sample=True, seed=11) == once
    assert new_tokens(model, PROMPTS, do_sample=True, seed=12) != once
    for threads in (1, 2):
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            assert new_tokens(model, PROMPTS, do_sample=True, seed=11) == once
        finally:
            torch.set_num_threads(before)


def test_without_a_seed_torchs_generator_decides(model):
    torch.manual_seed(5)
    once = new_tokens(model, PROMPTS, do_sample=True)
    assert new_tokens(model, PROMPTS, do_sample=True) != once
    torch.manual_seed(5)
    assert new_tokens(model, PROMPTS, do_sample=True) == once


def test_several_sequences_share_their_prompt(model, pools):
    settings = {"do_sample": True, "seed": 1, "num_return_sequences": 3}
    model.generation_executor("cpu")
    rows = new_tokens(model, PROMPTS, **settings)
    assert len(rows) == 12
    assert all(len({tuple(row) for row in rows[i : i + 3]}) == 3 for i in range(0, 12, 3))
    # choice 0 of a prompt is what it gives when one sequence is asked for
    assert rows[::3] == new_tokens(model, PROMPTS, do_sample=True, seed=1)
    assert all(pool.num_free == pool.num_blocks for pool in pools)
    assert new_tokens(model, PROMPTS, use_cache=False, **settings) == rows


def test_equal_prompts_in_a_batch_draw_different_numbers(model):
    rows = new_tokens(model, [PROMPTS[0]] * 3, do_sample=True, seed=1)
    assert len({tuple(row) for row in rows}) == 3
    assert rows == new_tokens(model, [PROMPTS[0]], do_sample=True, seed=1, num_return_sequences=3)


def test_one_prefill_for_all_sequences(model):
    executor = model.generation_executor("eager")
    sizes = []
    step = executor.step

    def counted(batch, cache, **kwargs):
        sizes.append(batch.input_ids.numel())
        return step(batch, cache, **kwargs)

    executor.step = counted
    try:
        new_tokens(model, PROMPTS[:2], count=3, do_sample=True, seed=1, num_return_sequences=4)
    finally:
        del executor.step
    assert sizes == [len(PROMPTS[0]) + len(PROMPTS[1]), 8, 8]


def test_many_prompts_are_computed_in_several_steps(model, monkeypatch, pools):
    expected = new_tokens(model, PROMPTS, do_sample=True, seed=1, num_return_sequences=2)
    executor = model.generation_executor()
    step, sizes = executor.step, []

    def watched(batch, cache, **kwargs):
        sizes.append(batch.input_ids.numel())
        return step(batch, cache, **kwargs)

    monkeypatch.setattr(executor, "step", watched)
    # prompts of 5, 1, 12 and 2 tokens
    monkeypatch.setattr("gpt2rt.generation.starts._MAX_STEP_TOKENS", 6)
    assert new_tokens(model, PROMPTS, do_sample=True, seed=1, num_return_sequences=2) == expected
    assert sizes[:4] == [6, 12, 2, 8]


# ---- lengths -------------------------------------------------------------------------------------------------------


@pytest.mark.proves("D9", "fault:F36")
def test_rows_end_at_the_last_position_with_one_warning(model):
    prompts = [list(range(3, 43)), [5, 6]]
    with pytest.warns(UserWarning, match="room for 9 in the model's n_positions=48") as caught:
        result = model.generate(prompts, max_new_tokens=100, eos_token_id=None)
    assert len(caught) == 1
    # 48 tokens have positions, and one more can be predicted from them
    assert result.size(1) == 40 + (49 - 2)
    assert (result[0, 40:49] != 0).any()
    assert (result[0, 49:] == 0).all()


@pytest.mark.proves("D9")
def test_a_full_prompt_still_gets_a_token(model):
    prompt = [[3 + i % 50 for i in range(48)]]
    assert model.generate(prompt, eos_token_id=None).shape == (1, 49)
    assert model.generate(prompt, max_new_tokens=1, eos_token_id=None).shape == (1, 49)


@pytest.mark.proves("G5")
def test_max_time_ends_after_the_token_in_work(model):
    assert model.generate([[5]], max_new_tokens=40, max_time=1e-9, eos_token_id=None).shape == (1, 2)


@pytest.mark.proves("G5")
def test_finish_reasons(byte_model, tokenizer):
    def reasons(prompts=([40, 41], [70]), **settings):
        settings = {"max_new_tokens": 9, "pad_token_id": 0, **settings}
        decoder, _, _ = prepare(byte_model, list(prompts), None, None, settings.pop("criteria", None), settings)
        with torch.no_grad():
            for _ in decoder.steps():
                pass
        return [row.finish_reason for row in decoder.rows]

    assert reasons(eos_token_id=None) == ["length", "length"]
    first = byte_model.generate([[40, 41]], max_new_tokens=1)[0, -1].item()
    assert reasons(eos_token_id=first) == ["stop", reasons([[70]], eos_token_id=first)[0]]
    assert reasons(max_time=1e-9, eos_token_id=None) == ["time", "time"]
    assert reasons(criteria=[lambda ids, scores: ids[:, 0] == 40], eos_token_id=None) == ["stop", "length"]


# ---- blocks --------------------------------------------------------------------------------------------------------


def fails_at(call, error):
    """A callable that raises at its n-th call."""
    calls = []

    def fail(*args):
        calls.append(args)
        if len(calls) == call:
            raise error
        return args[1] if len(args) == 2 and isinstance(args[1], torch.Tensor) else False

    return fail


@pytest.mark.parametrize("where", ["streamer", "criterion", "processor", "executor"])
@pytest.mark.parametrize("call", [1, 4])
@pytest.mark.parametrize("error", [RuntimeError("stop here"), KeyboardInterrupt()])
def test_blocks_are_free_after_a_failure(make_model, pools, where, call, error):
    model = make_model()
    settings = {"max_new_tokens": 30, "eos_token_id": None, "do_sample": True, "seed": 0, "num_return_sequences": 2}
    fail = fails_at(call, error)
    if where == "streamer":

        class Streamer:
            ended = False

            def put(self, value):
                fail(value)

            def end(self):
                Streamer.ended = True

        settings["streamer"] = Streamer()
    elif where == "criterion":
        settings["stopping_criteria"] = [fail]
    elif where == "processor":
        settings["logits_processor"] = [fail]
    else:
        executor = model.generation_executor()
        step = executor.step
        executor.step = lambda *args, **kwargs: (fail(*args[:1]), step(*args, **kwargs))[1]
    with pytest.raises(type(error)):
        model.generate(PROMPTS, **settings)
    assert len(pools) == 1
    assert pools[0].num_free == pools[0].num_blocks
    if where == "streamer":
        assert Streamer.ended, "a consumer of the stream would wait for ever"


def test_finished_rows_leave_the_batch_and_free_their_blocks(model, pools):
    executor = model.generation_executor("eager")
    step, free, rows = executor.step, [], []

    def watched(batch, cache, **kwargs):
        free.append(cache.pool.num_free)
        rows.append(batch.seq_lens.numel())
        return step(batch, cache, **kwargs)

    executor.step = watched
    try:
        long = [3 + i % 40 for i in range(32)]
        ends = [False] * 2 + [True] + [False] * 20

        def criterion(input_ids, scores):
            return torch.tensor([ends[input_ids.size(1) - 32 - 1], False])

        model.generate([long, [5, 6]], max_new_tokens=8, eos_token_id=None, stopping_criteria=[criterion])
    finally:
        del executor.step
    assert rows == [2, 2, 2, 1, 1, 1, 1, 1]
    # the long row held blocks for 34 tokens
    assert free[3] == free[2] + 3


def test_model_failure_reaches_the_consumer_of_a_stream(make_model, tokenizer):
    model = make_model()
    with torch.no_grad():
        model.transformer.ln_f.bias.fill_(float("nan"))
    streamer = TextIteratorStreamer(tokenizer, timeout=30)
    failed = []

    def work():
        try:
            model.generate([[5]], streamer=streamer)
        except NumericsError as error:
            failed.append(error)

    worker = threading.Thread(target=work)
    worker.start()
    with pytest.raises(NumericsError, match="row 0: 97 of 97 logits are NaN"):
        list(streamer)
    worker.join()
    assert len(failed) == 1


# ---- streams -------------------------------------------------------------------------------------------------------


@pytest.mark.proves("G11")
def test_streamed_text_is_the_decoded_result(byte_model, tokenizer, capsys):
    ids = torch.tensor([[40, 41, 42]])
    streamer = TextIteratorStreamer(tokenizer)
    result = byte_model.generate(ids, max_new_tokens=20, streamer=streamer)
    assert "".join(streamer) == tokenizer.decode(result[0])
    byte_model.generate(ids, max_new_tokens=20, streamer=TextStreamer(tokenizer, skip_prompt=True))
    assert capsys.readouterr().out == tokenizer.decode(result[0, 3:]) + "\n"


@pytest.mark.proves("G11")
def test_a_streamer_gets_every_row(model):
    class Records:
        def __init__(self):
            self.values, self.ended = [], 0

        def put(self, value):
            self.values.append(value)

        def end(self):
            self.ended += 1

    streamer = Records()
    result = model.generate(PROMPTS, max_new_tokens=9, eos_token_id=list(range(0, 97, 5)), streamer=streamer)
    assert streamer.ended == 1
    assert streamer.values[0].shape == (4, 12)
    assert torch.equal(torch.cat([streamer.values[0], torch.stack(streamer.values[1:], dim=1)], dim=1), result)


# ---- the executor --------------------------------------------------------------------------------------------------


def test_executor_is_kept_until_weights_change(make_model):
    model = make_model()
    first = model.generation_executor()
    assert first.name == "cpu"
    assert model.generation_executor() is first
    before = new_tokens(model, PROMPTS)
    assert model.generation_executor() is first
    changes = {
        "optimiser step": lambda: model.transformer.h[0].mlp.c_fc.weight.mul_(-1.0),
        "through .data": lambda: model.lm_head.weight.data.mul_(-1.0),
        "new parameter": lambda: setattr(
            model.transformer.h[1].ln_1, "weight", torch.nn.Parameter(-model.transformer.h[1].ln_1.weight)
        ),
        "load_state_dict": lambda: model.load_state_dict(make_model(seed=9).state_dict()),
        "flag": lambda: setattr(model.config, "scale_attn_weights", False),
        "dtype": lambda: model.to(torch.bfloat16),
    }
    for name, change in changes.items():
        kept = model.generation_executor()
        with torch.no_grad():
            change()
        assert model.generation_executor() is not kept, name
        after = new_tokens(model, PROMPTS)
        assert after != before, name
        before = after


def test_changed_weights_are_used(make_model, hf):
    model = make_model()
    model.generate([[5]])
    optimiser = torch.optim.SGD(model.parameters(), lr=0.5)
    model(torch.tensor([[5, 6, 7]]), labels=torch.tensor([[5, 6, 7]])).loss.backward()
    optimiser.step()
    expected = hf.copy_of(model).generate(torch.tensor([[5, 9]]), max_new_tokens=10)
    assert torch.equal(model.generate([[5, 9]], max_new_tokens=10), expected)


def test_executor_can_be_chosen_and_rebuilt(make_model):
    model = make_model()
    assert model.generation_executor("eager").name == "eager"
    assert model.generation_executor().name == "eager"
    assert model.generation_executor("cpu").name == "cpu"
    kept = model.generation_executor()
    assert model.generation_executor(rebuild=True) is not kept
    with pytest.raises(ValueError, match="no executor 'gpu'; choose one of eager, cpu"):
        model.generation_executor("gpu")


def test_model_stays_copyable_and_collectable(make_model):
    model = make_model()
    expected = new_tokens(model, PROMPTS)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin.lm_head.weight.mul_(-1.0)
    assert new_tokens(twin, PROMPTS) != expected
    assert new_tokens(model, PROMPTS) == expected
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None


def test_training_mode_changes_nothing(make_model):
    model = make_model(resid_pdrop=0.9, embd_pdrop=0.9, attn_pdrop=0.9)
    expected = new_tokens(model, PROMPTS)
    model.train()
    assert new_tokens(model, PROMPTS) == expected
    assert model.training
    with torch.inference_mode():
        assert new_tokens(model, PROMPTS) == expected
    assert not model.generate([[5]]).requires_grad


def test_threads_may_share_a_model(model):
    expected = [new_tokens(model, [prompt], count=20) for prompt in PROMPTS]
    results = [None] * len(PROMPTS)

    def work(index):
        results[index] = new_tokens(model, [PROMPTS[index]], count=20)

    workers = [threading.Thread(target=work, args=(index,)) for index in range(len(PROMPTS))]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert results == expected


# ---- settings ------------------------------------------------------------------------------------------------------


@pytest.mark.proves("G1")
def test_priority_of_settings(make_model):
    model = make_model()
    model.generation_config = GenerationConfig(max_new_tokens=3, eos_token_id=None, pad_token_id=0)
    assert model.generate([[5]]).size(1) == 4
    assert model.generate([[5]], generation_config=GenerationConfig(max_new_tokens=4)).size(1) == 5
    given = GenerationConfig(max_new_tokens=4)
    assert model.generate([[5]], generation_config=given, max_new_tokens=5).size(1) == 6
    assert given == GenerationConfig(max_new_tokens=4), "the caller's config must not be changed"
    assert model.generation_config.max_new_tokens == 3


def test_none_unsets_the_models_own_setting(make_model):
    model = make_model()
    first = model.generate([[5]], max_new_tokens=1)[0, -1].item()
    model.generation_config.eos_token_id = first
    assert model.generate([[5]], max_new_tokens=6).size(1) == 2
    assert model.generate([[5]], max_new_tokens=6, eos_token_id=None).size(1) == 7


def test_clean_calls_do_not_warn(model):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.generate([[5]])
        model.generate(PROMPTS, max_new_tokens=3, do_sample=True, temperature=0.5, seed=1)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": 0.5, "top_k": 3}, "temperature, top_k only matter with do_sample=True"),
        ({"seed": 0}, "seed only matter"),
        ({"output_scores": True}, "output_scores only matter with return_dict_in_generate=True"),
        ({"max_new_tokens": 3, "max_length": 30}, "max_new_tokens counts"),
        ({"early_stopping": True, "length_penalty": 2.0}, "early_stopping, length_penalty only matter with num_beams"),
        ({"do_sample": False, "temperature": 0.0}, "temperature only matter"),
        ({"max_new_tokens": 3, "min_new_tokens": 5}, "a minimum of 5 new tokens was set, but rows end after 3"),
    ],
)
def test_settings_without_effect_are_named(model, settings, message):
    with pytest.warns(UserWarning, match=message):
        model.generate([[5]], **settings)


def test_a_limit_that_the_models_own_settings_overrule_is_named(make_model):
    model = make_model()
    model.generation_config.max_new_tokens = 4
    with pytest.warns(UserWarning, match="both max_new_tokens and max_length are set; max_new_tokens counts"):
        assert model.generate([[5]], max_length=30, eos_token_id=None).size(1) == 5
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.generation_config.max_length = 9
        model.generate([[5]], max_new_tokens=3)
