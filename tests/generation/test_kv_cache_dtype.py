"""What keys and values are stored in: ``kv_cache_dtype``, and transformers' quantized cache."""

import pytest
import torch

from gpt2rt import GPT2LMHeadModel, GPT2Tokenizer, QuantizationConfig, ops, quantize_model
from gpt2rt.cache import PagedKVCache, Sequence
from gpt2rt.errors import RequestError
from gpt2rt.generation import GenerationConfig, reserve
from gpt2rt.graph import StepBatch

needs_cpp = pytest.mark.skipif(not ops.extension_status().loaded, reason="the C++ extension is not built")
EXECUTORS = ["eager", "modules", pytest.param("cpu", marks=needs_cpp)]
PROMPTS = [[5, 9, 12, 7], [33] * 20, [4, 8]]
DTYPES = {
    "int8": torch.int8,
    "float8": torch.float8_e4m3fn,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float32": torch.float32,
}


def cache_shape(model):
    """n_layer, n_head, head_dim."""
    config = model.config
    return config.n_layer, config.n_head, config.n_embd // config.n_head


@pytest.fixture
def caches(monkeypatch):
    """The caches that calls of generate make."""
    made = []

    class Recorded(PagedKVCache):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            made.append(self)

    monkeypatch.setattr(reserve, "PagedKVCache", Recorded)
    return made


@pytest.mark.parametrize(
    ("executor", "name"),
    [
        *(pytest.param("cpu", name, marks=needs_cpp) for name in DTYPES if name != "float8"),
        *((executor, name) for executor in ("eager", "modules") for name in DTYPES),
    ],
)
def test_every_dtype_on_every_executor(make_model, caches, executor, name):
    model = make_model()
    model.generation_executor(executor)
    out = model.generate(PROMPTS, max_new_tokens=12, min_new_tokens=12, kv_cache_dtype=name)
    assert {cache.data.dtype for cache in caches} == {DTYPES[name]}
    assert out.shape == (3, 32)
    # in company and alone
    alone = model.generate([PROMPTS[0]], max_new_tokens=12, min_new_tokens=12, kv_cache_dtype=name)
    assert torch.equal(out[0, -12:], alone[0, -12:])
    assert caches[-1].pool.num_free == caches[-1].pool.num_blocks


@needs_cpp
def test_float8_on_the_cpu_executor_is_refused(make_model, caches):
    model = make_model()
    model.generation_executor("cpu")
    with pytest.raises(RequestError, match="'float8' has no kernels in the cpu executor; use 'int8'"):
        model.generate(PROMPTS, max_new_tokens=2, kv_cache_dtype="float8")
    assert not caches, "refused before any work"
    cache = PagedKVCache(*cache_shape(model), 4, dtype=torch.float8_e4m3fn)
    batch = StepBatch.build([[1, 2]], [Sequence(cache)])
    with pytest.raises(ValueError, match="kv_cache is Float8_e4m3fn, expected float32, bfloat16, float16 or int8"):
        model.generation_executor().step(batch, cache)


def test_auto_is_the_models_own(make_model, caches):
    ids = [[5, 9, 12]]
    plain = make_model().generate(ids, max_new_tokens=5)
    assert torch.equal(make_model().generate(ids, max_new_tokens=5, kv_cache_dtype="auto"), plain)
    assert torch.equal(make_model().generate(ids, max_new_tokens=5, kv_cache_dtype="float32"), plain)
    make_model().bfloat16().generate(ids, max_new_tokens=5)
    assert [cache.data.dtype for cache in caches] == [torch.float32] * 3 + [torch.bfloat16]


@needs_cpp
@pytest.mark.parametrize("scheme", ["int8", "int4", "nf4"])
def test_auto_of_a_quantised_model(make_model, caches, scheme):
    """bfloat16 where the cpu executor rounds activations and computes with it; a name always wins."""
    config = QuantizationConfig(scheme)
    model = quantize_model(make_model(n_embd=64, n_head=2), config, progress=False)
    rounded = scheme != "nf4" and ops.has_bfloat16_products()
    own = torch.bfloat16 if rounded else torch.float32
    settings = {"max_new_tokens": 12, "do_sample": False}
    plain = model.generate(PROMPTS, **settings)
    named = model.generate(PROMPTS, kv_cache_dtype=str(own).removeprefix("torch."), **settings)
    assert torch.equal(plain, named)
    model.generate(PROMPTS, kv_cache_dtype="float32", **settings)
    assert [cache.data.dtype for cache in caches] == [own, own, torch.float32]
    assert model.generation_executor().cache_dtype == own
    # beams, guidance, scoring and drafts take the same
    model.generate(PROMPTS, max_new_tokens=2, num_beams=2)
    model.generate([PROMPTS[1]], max_new_tokens=2, guidance_scale=1.5)
    drafted = model.generate([PROMPTS[1]], assistant_model=model, **settings)
    assert torch.equal(drafted[0], plain[1, : drafted.size(1)])
    assert {cache.data.dtype for cache in caches[3:]} == {own}
    model.generation_executor("eager")
    model.generate(PROMPTS, max_new_tokens=2)
    assert caches[-1].data.dtype == torch.float32


@needs_cpp
def test_exact_arithmetic_keeps_float32(make_model, caches, monkeypatch):
    monkeypatch.setenv("GPT2RT_CPU_ARITHMETIC", "exact")
    model = quantize_model(make_model(n_embd=64, n_head=2), QuantizationConfig("int8"), progress=False)
    model.generate(PROMPTS, max_new_tokens=2)
    assert [cache.data.dtype for cache in caches] == [torch.float32]


def test_the_quantized_cache_of_transformers(make_model, caches):
    model = make_model()
    settings = {"max_new_tokens": 9, "do_sample": False}
    expected = model.generate(PROMPTS, kv_cache_dtype="int8", **settings)
    for cache_config in (None, {"nbits": 8}, {}):
        out = model.generate(PROMPTS, cache_implementation="quantized", cache_config=cache_config, **settings)
        assert torch.equal(out, expected)
    both = model.generate(PROMPTS, cache_implementation="quantized", kv_cache_dtype="int8", **settings)
    assert torch.equal(both, expected)
    assert {cache.data.dtype for cache in caches} == {torch.int8}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kv_cache_dtype": "int4"}, "kv_cache_dtype"),
        ({"kv_cache_dtype": torch.int8}, "kv_cache_dtype"),
        ({"cache_implementation": "quantized", "cache_config": {"nbits": 4}}, "nbits=4: a quantized cache has 8 bits"),
        ({"cache_implementation": "quantized", "cache_config": {"nbits": 2}}, "nbits=2"),
        (
            {"cache_implementation": "quantized", "cache_config": {"backend": "quanto", "nbits": 8}},
            "backend='quanto': a quantized cache is int8 here",
        ),
        ({"cache_implementation": "quantized", "cache_config": {"residual_length": 64}}, "residual_length=64"),
        (
            {"cache_implementation": "quantized", "kv_cache_dtype": "bfloat16"},
            "stores keys and values in int8, but kv_cache_dtype is 'bfloat16'",
        ),
        ({"custom_generate": lambda *_, **__: None, "kv_cache_dtype": "int8"}, "custom_generate fills a cache of its"),
    ],
)
def test_refusals(model, settings, message):
    with pytest.raises(RequestError, match=message):
        model.generate([[1, 2]], max_new_tokens=2, **settings)


@pytest.mark.parametrize("small_name", ["int8", "float8"])
def test_8_bits_take_about_a_quarter_of_the_memory(make_model, caches, small_name):
    model = make_model(n_embd=128, n_head=2)
    model.generation_executor("eager")
    for name in ("float32", small_name):
        model.generate([[5, 9]], max_new_tokens=4, kv_cache_dtype=name)
    full, small = (cache.data.numel() * cache.data.element_size() for cache in caches)
    scales = caches[1].scales.numel() * 4
    assert full == 4 * small
    assert scales == small / 16


@pytest.mark.parametrize("executor", EXECUTORS)
def test_beams_forks_and_drafts(make_model, executor):
    model = make_model()
    model.generation_executor(executor)
    settings = {"max_new_tokens": 12, "kv_cache_dtype": "int8"}
    beams = model.generate(PROMPTS, num_beams=3, num_return_sequences=3, **settings)
    alone = model.generate([PROMPTS[1]], num_beams=3, num_return_sequences=3, **settings)
    assert torch.equal(beams[3:6, 20 : alone.size(1)], alone[:, 20:])
    sampled = model.generate(PROMPTS, do_sample=True, num_return_sequences=4, seed=3, **settings)
    single = model.generate([PROMPTS[0]], do_sample=True, num_return_sequences=4, seed=3, **settings)
    assert torch.equal(sampled[:4, 20 : 20 + single.size(1) - 4], single[:, 4:])
    greedy = model.generate([PROMPTS[1]], do_sample=False, **settings)
    drafted = model.generate([PROMPTS[1]], do_sample=False, prompt_lookup_num_tokens=3, **settings)
    assert torch.equal(drafted, greedy)
    guided = model.generate([PROMPTS[1]], do_sample=False, guidance_scale=1.5, **settings)
    assert guided.size(0) == 1


@pytest.mark.parametrize("executor", EXECUTORS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_past_key_values_come_out_in_the_models_dtype(make_model, executor, dtype):
    model = make_model().to(dtype)
    model.generation_executor(executor)
    settings = {"do_sample": False, "suppress_tokens": [2], "return_dict_in_generate": True, "kv_cache_dtype": "int8"}
    first = model.generate([PROMPTS[1]], max_new_tokens=4, **settings)
    exact = model(first.sequences[:, :-1], use_cache=True).past_key_values
    for (keys, values), (k, v) in zip(first.past_key_values, exact, strict=True):
        assert keys.dtype == values.dtype == dtype
        # half a step of 127 of the largest element of each head, in the first layer; later ones see rounded values
        assert ((keys - k).abs() <= 0.05 * k.abs().amax(-1, keepdim=True) + 0.05).all()
        assert ((values - v).abs() <= 0.05 * v.abs().amax(-1, keepdim=True) + 0.05).all()
    step = keys.float().abs().amax(-1, keepdim=True) / 127
    assert (((keys.float() / step) - (keys.float() / step).round()).abs().max() < 0.51).item()
    # the forward of the model and a second call of generate go on from them
    whole = model.generate([PROMPTS[1]], max_new_tokens=8, **settings).sequences
    again = model.generate(first.sequences, past_key_values=first.past_key_values, max_new_tokens=4, **settings)
    assert again.sequences.shape == whole.shape
    assert torch.equal(again.sequences[:, :24], whole[:, :24])


def test_saved_in_a_generation_config(tmp_path):
    config = GenerationConfig(kv_cache_dtype="int8")
    config.save_pretrained(tmp_path)
    assert GenerationConfig.from_pretrained(tmp_path).kv_cache_dtype == "int8"


@needs_cpp
@pytest.mark.parametrize(
    ("name", "executor_name", "small", "most"),
    [("gpt2rt/tiny-gpt2", "cpu", torch.int8, 2e-3), ("gpt2rt/tiny-gpt2", "eager", torch.float8_e4m3fn, 5e-3)],
)
def test_quality_on_the_embedded_model(name, executor_name, small, most):
    """The mean loss of a text changes by less than 0.2 % with an int8 cache (float8: 0.5 %), and by something."""
    model, tokenizer = GPT2LMHeadModel.from_pretrained(name), GPT2Tokenizer.from_pretrained(name)
    text = (
        "ROMEO:\nBut, soft! what light through yonder window breaks?\nIt is the east, and Juliet is the sun.\n"
        "Arise, fair sun, and kill the envious moon,\nWho is already sick and pale with grief,\n"
        "That thou her maid art far more fair than she:\nBe not her maid, since she is envious;\n"
    )
    ids = tokenizer.encode(text)[: model.config.n_positions]
    executor, losses = model.generation_executor(executor_name), {}
    for dtype in (torch.float32, small):
        cache = PagedKVCache(*cache_shape(model), 64, dtype=dtype)
        logits = executor.step(StepBatch.build([ids], [Sequence(cache)], all_logits=True), cache).logits
        losses[dtype] = torch.nn.functional.cross_entropy(logits[:-1], torch.tensor(ids[1:])).item()
    change = losses[small] / losses[torch.float32] - 1
    assert 0 < abs(change) < most, f"{change:.2%}"
