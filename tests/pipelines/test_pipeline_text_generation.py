"""Text generation gives transformers' results."""

import random
import warnings

import numpy
import pytest
import torch

from gpt2rt import GenerationConfig, OpenAIGPTConfig, OpenAIGPTLMHeadModel, OpenAIGPTTokenizer, pipeline, set_seed

from .conftest import TEXTS, make_tokenizer

pytestmark = pytest.mark.proves("L4")
GREEDY = {"do_sample": False, "max_new_tokens": 8}


@pytest.fixture(scope="module")
def model(make_model):
    return make_model("LMHeadModel")


@pytest.fixture
def pipe(model, tokenizer):
    return pipeline("text-generation", model=model, tokenizer=tokenizer)


@pytest.fixture(scope="module")
def pair(both, model, padded_tokenizer):
    ours, theirs = both("text-generation", model, padded_tokenizer)

    def call(*args, **kwargs):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return theirs(*args, **kwargs)

    return ours, call


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"return_full_text": False},
        {"return_text": True},
        {"return_tensors": True},
        {"max_new_tokens": None, "max_length": 40},
        {"prefix": "the "},
        {"prefix": "the ", "max_new_tokens": None, "max_length": 40},
        {"skip_special_tokens": False, "max_new_tokens": 30},
        {"num_beams": 3, "num_return_sequences": 2},
        {"repetition_penalty": 1.5, "no_repeat_ngram_size": 2},
        {"truncation": True, "tokenizer_encode_kwargs": {"max_length": 3}},
    ],
    ids=str,
)
def test_equals_transformers(pair, same, options):
    ours, theirs = pair
    options = {name: value for name, value in {**GREEDY, **options}.items() if value is not None}
    for inputs in (TEXTS[0], TEXTS[:2], ""):
        same(ours(inputs, **options), theirs(inputs, **options))


def test_stop_sequence(pair, same):
    ours, theirs = pair
    [full] = ours(TEXTS[0], return_full_text=False, **GREEDY)
    stop = next(c for c in full["generated_text"][1:] if c.isascii())
    for stops in (stop, [stop, "never there"]):
        [short] = ours(TEXTS[0], stop_sequence=stops, return_full_text=False, **GREEDY)
        same([short], theirs(TEXTS[0], stop_sequence=stops, return_full_text=False, **GREEDY))
        assert len(short["generated_text"]) < len(full["generated_text"])


def test_hole(pair, same):
    ours, theirs = pair
    text = "the rain in a town " * 8
    options = {"handle_long_generation": "hole", "do_sample": False, "max_new_tokens": 40, "return_full_text": False}
    same(ours(text, **options), theirs(text, **options))
    with pytest.raises(ValueError, match="cannot make room for 96 new tokens: the model reads 96 tokens"):
        ours(text, **{**options, "max_new_tokens": 96})
    with pytest.raises(ValueError, match="how many new tokens are wanted is unknown"):
        ours(text, handle_long_generation="hole", max_length=3, truncation=False)
    with pytest.raises(ValueError, match="handle_long_generation = 'cut'"):
        ours(text, handle_long_generation="cut")


def test_scores_come_along(pair, same):
    ours, theirs = pair
    options = {**GREEDY, "return_dict_in_generate": True, "output_scores": True, "max_new_tokens": 3}
    same(ours(TEXTS[0], **options), theirs(TEXTS[0], **options), 1e-4)


def spy(pipe, monkeypatch):
    """The keyword arguments of each call of ``generate``."""
    calls, generate = [], pipe.model.generate

    def recorded(rows, **kwargs):
        calls.append(kwargs)
        return generate(rows, **kwargs)

    # the signature stays visible for the check of keywords
    recorded.__wrapped__ = generate
    monkeypatch.setattr(pipe.model, "generate", recorded)
    return calls


def test_defaults(make_model, tokenizer, monkeypatch):
    model = make_model("LMHeadModel")
    pipe = pipeline("text-generation", model=model, tokenizer=tokenizer)
    calls = spy(pipe, monkeypatch)

    def last(**options):
        pipe("a", **options)
        return {name: calls[-1].get(name) for name in ("do_sample", "temperature", "max_new_tokens", "max_length")}

    with warnings.catch_warnings():
        # 256 new tokens are nobody's wish, so that the positions end before them is no news
        warnings.simplefilter("error")
        assert last() == {"do_sample": True, "temperature": 0.7, "max_new_tokens": 96, "max_length": None}
    assert last(do_sample=False)["temperature"] is None
    assert last(temperature=0.3, max_new_tokens=2)["temperature"] == 0.3
    assert last(max_length=5) == {"do_sample": True, "temperature": 0.7, "max_new_tokens": None, "max_length": 5}
    # the model's own settings go before the pipeline's
    model.generation_config = GenerationConfig(do_sample=False, max_new_tokens=3)
    assert last() == dict.fromkeys(("do_sample", "temperature", "max_new_tokens", "max_length"))
    assert len(pipe("a", return_tensors=True)[0]["generated_token_ids"]) == 4
    # and a call's generation_config before both, and before those of the pipeline
    pipe = pipeline("text-generation", model=model, tokenizer=tokenizer, max_new_tokens=7)
    ids = pipe("a", return_tensors=True, generation_config=GenerationConfig(max_new_tokens=5))[0]["generated_token_ids"]
    assert len(ids) == 6
    assert len(pipe("a", return_tensors=True)[0]["generated_token_ids"]) == 8


@pytest.mark.parametrize(
    "options",
    [
        {"max_new_tokens": 12},
        {"max_length": 70},
        {},
        {"max_new_tokens": 12, "num_return_sequences": 2, "num_beams": 2},
        {"max_new_tokens": 12, "stop_sequence": "e"},
        {"max_new_tokens": 12, "do_sample": True, "seed": 5},
    ],
    ids=str,
)
@pytest.mark.parametrize("result", [{"return_tensors": True}, {"return_full_text": True}], ids=["ids", "text"])
def test_batches_do_not_change_results(pipe, options, result):
    texts, options = [*TEXTS, ""], {"do_sample": False, **options, **result}
    alone = [pipe(text, **options) for text in texts]
    for batch_size in (1, 2, 5):
        assert pipe(texts, batch_size=batch_size, **options) == alone


def test_rows_that_end_early_in_a_batch(make_model, tokenizer):
    """Padding that only other rows of the batch need does not show."""
    model = make_model("LMHeadModel", eos_token_id=list(range(200)))
    pipe = pipeline("text-generation", model=model, tokenizer=tokenizer, do_sample=False, max_new_tokens=20)
    alone = [pipe(text, return_tensors=True) for text in TEXTS]
    prompts = [len(tokenizer(text)["input_ids"]) for text in TEXTS]
    lengths = {len(result[0]["generated_token_ids"]) - n for result, n in zip(alone, prompts, strict=True)}
    assert len(lengths) > 1
    assert pipe(TEXTS, return_tensors=True, batch_size=4) == alone


def test_lazy_inputs(pipe):
    read = []

    def prompts():
        for text in TEXTS:
            read.append(text)
            yield text

    results = pipe(prompts(), **GREEDY)
    assert read == []
    first = next(results)
    assert read == TEXTS[:1]
    assert [first, *results] == pipe(TEXTS, **GREEDY)
    with pytest.raises(TypeError, match="the input has no length"):
        len(results)


def test_data_sets(pipe):
    class Texts(torch.utils.data.Dataset):
        def __len__(self):
            return 3

        def __getitem__(self, index):
            return TEXTS[index]

    results = pipe(Texts(), **GREEDY)
    assert len(results) == 3
    assert list(results) == pipe(TEXTS[:3], **GREEDY)
    assert pipe([], **GREEDY) == []

    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            return iter(TEXTS[:2])

    assert list(pipe(Stream(), **GREEDY)) == pipe(TEXTS[:2], **GREEDY)


def test_seeds(pipe):
    options = {"max_new_tokens": 20}
    torch.manual_seed(1)
    first = pipe("a", **options)
    assert pipe("a", **options) != first
    torch.manual_seed(1)
    assert pipe("a", **options) == first
    assert pipe("a", seed=3, **options) == pipe("a", seed=3, **options)


def test_set_seed_makes_a_script_repeatable(pipe):
    def draws():
        numbers = random.random(), numpy.random.rand(), float(torch.rand(1))  # noqa: NPY002
        return pipe("a", max_new_tokens=20, num_return_sequences=2), numbers

    set_seed(42)
    first = draws()
    assert draws() != first
    set_seed(42)
    assert draws() == first
    set_seed(43)
    assert draws()[0] != first[0]
    try:
        set_seed(1, deterministic=True)
        assert torch.are_deterministic_algorithms_enabled()
    finally:
        torch.use_deterministic_algorithms(False)


def test_streamer(pipe, tokenizer):
    from gpt2rt import TextIteratorStreamer

    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True)
    [result] = pipe(TEXTS[0], streamer=streamer, return_full_text=False, **GREEDY)
    assert "".join(streamer) == result["generated_text"]


TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% if not loop.last %}</s>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
CHAT = [{"role": "user", "content": "the rain"}]
PREFILL = [*CHAT, {"role": "assistant", "content": "in the"}]


@pytest.mark.proves("T14")
def test_chats_equal_transformers(both, model, same):
    ours, theirs = both("text-generation", model, make_tokenizer(pad_token="<pad>", chat_template=TEMPLATE))
    for inputs in (CHAT, PREFILL, [CHAT, PREFILL, CHAT * 2]):
        for options in ({}, {"return_full_text": False}, {"return_tensors": True}):
            same(ours(inputs, **GREEDY, **options), theirs(inputs, **GREEDY, **options))
    same(ours(PREFILL, continue_final_message=False, **GREEDY), theirs(PREFILL, continue_final_message=False, **GREEDY))
    [result] = ours(CHAT, **GREEDY)
    assert [message["role"] for message in result["generated_text"]] == ["user", "assistant"]
    assert list(ours((chat for chat in [CHAT, PREFILL]), batch_size=2, **GREEDY)) == ours([CHAT, PREFILL], **GREEDY)


def test_a_chat_needs_a_template(pipe):
    with pytest.raises(ValueError, match="chat_template"):
        pipe(CHAT, **GREEDY)


@pytest.mark.parametrize("name", [False, True], ids=["object", "folder"])
def test_an_assistant_does_not_change_the_text(pipe, make_model, tokenizer, save, name):
    assistant = make_model("LMHeadModel", seed=3, n_layer=1)
    options = {
        "max_new_tokens": 12,
        "seed": 4,
        "assistant_model": str(save(assistant, tokenizer)) if name else assistant,
    }
    assert pipe(TEXTS, batch_size=3, **options) == pipe(TEXTS, max_new_tokens=12, seed=4)


def test_refusals(pipe, make_model, tokenizer):
    with pytest.raises(TypeError, match=r"no keyword 'max_tokens'; its own are .*return_full_text.*and fields of Gene"):
        pipe("a", max_tokens=3)
    with pytest.raises(TypeError, match="no keyword 'frob'"):
        pipeline("text-generation", model=pipe.model, tokenizer=tokenizer, frob=1)
    with pytest.raises(ValueError, match="return_tensors gives token ids and return_full_text gives text"):
        pipe("a", return_tensors=True, return_full_text=False)
    with pytest.raises(ValueError, match=r"a prompt is a text or a chat, .* got int"):
        pipe([3])
    with pytest.raises(ValueError, match="batch_size = 0"):
        pipe("a", batch_size=0)
    without = make_model("LMHeadModel", bos_token_id=None)
    with pytest.raises(ValueError, match="the prompt is empty and the model has no bos_token_id"):
        pipeline("text-generation", model=without, tokenizer=tokenizer)("")


@pytest.mark.proves("O1")
def test_openai_gpt_equals_transformers(hf, test_data, tmp_path, same):
    OpenAIGPTTokenizer.from_pretrained(test_data / "openai-gpt").save_pretrained(tmp_path)
    torch.manual_seed(0)
    config = OpenAIGPTConfig(n_positions=64, n_embd=32, n_layer=2, n_head=4, initializer_range=0.3)
    OpenAIGPTLMHeadModel(config).save_pretrained(tmp_path)
    ours = pipeline(model=tmp_path, device="cpu")
    theirs = hf.module.pipeline("text-generation", model=str(tmp_path), device="cpu")
    texts = ["The rain in the inner town.", "Hello, it's me"]
    for options in ({}, {"return_full_text": False}, {"return_tensors": True}):
        same(ours(texts, **GREEDY, **options), theirs(texts, **GREEDY, **options))
    alone = [ours(text, **GREEDY) for text in texts]
    assert ours(texts, batch_size=2, **GREEDY) == alone
