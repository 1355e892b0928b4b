"""``model.score``: log-probabilities of texts, and perplexity by strided windows."""

import math

import pytest
import torch
import torch.nn.functional as F

import gpt2rt
from gpt2rt.errors import NumericsError, RequestError
from gpt2rt.generation import scoring

pytestmark = pytest.mark.proves("N9")

N = 48  # positions of the model
LONG = [3 + i * i % 91 for i in range(150)]
TEXTS = [[5, 6, 7, 8], LONG, [40, 41], LONG[20:68], LONG[:49]]


def cross_entropies(model, ids, max_length, stride):
    """The strided guide in plain words: forward on each window, the loss of the tokens that are new in it."""
    values, reached = [None] * len(ids), 0
    for start in range(0, len(ids), stride):
        stop = min(start + max_length, len(ids))
        window = torch.tensor([ids[start:stop]])
        with torch.no_grad():
            logits = model(window).logits[0, :-1].float()
        losses = F.cross_entropy(logits, window[0, 1:], reduction="none").tolist()
        for place in range(max(reached, start + 1), stop):
            assert values[place] is None
            values[place] = -losses[place - start - 1]
        reached = stop
        if stop == len(ids):
            return values
    raise AssertionError


def close(got, expected):
    assert [value is None for value in got] == [value is None for value in expected]
    assert [value for value in got if value is not None] == pytest.approx(
        [value for value in expected if value is not None], abs=1e-5
    )


@pytest.mark.parametrize("executor", ["cpu", "eager"])
def test_scores_are_the_cross_entropies_of_forward(model, pools, executor):
    model.generation_executor(executor)
    texts = [text for text in TEXTS if len(text) <= N]
    result = model.score(texts)
    model.generation_executor("cpu")
    assert isinstance(result, gpt2rt.ScoreOutput)
    assert result.token_ids == texts
    for index, ids in enumerate(texts):
        expected = cross_entropies(model, ids, N, N)
        close(result.token_logprobs[index], expected)
        total = sum(value for value in expected if value is not None)
        assert result.token_logprobs[index][0] is None
        assert result.num_scored[index] == len(ids) - 1
        assert result.logprobs[index] == pytest.approx(total, abs=1e-4)
        with torch.no_grad():
            loss = model(torch.tensor([ids]), labels=torch.tensor([ids])).loss.item()
        assert result.perplexities[index] == pytest.approx(math.exp(loss), rel=1e-5)
    assert result.perplexity == pytest.approx(math.exp(-sum(result.logprobs) / sum(result.num_scored)), rel=1e-12)
    assert all(pool.num_free == pool.num_blocks for pool in pools)


@pytest.mark.parametrize(("max_length", "stride"), [(None, None), (48, 1), (48, 16), (48, 48), (20, 7), (7, 7), (2, 1)])
def test_long_texts_are_scored_in_windows(model, max_length, stride):
    result = model.score(TEXTS, max_length=max_length, stride=stride)
    width = max_length or N
    step = stride or N // 2
    for index, ids in enumerate(TEXTS):
        close(result.token_logprobs[index], cross_entropies(model, ids, width, step))
    # with windows that touch, the first token of each has nothing before it
    missing = [place for place, value in enumerate(result.token_logprobs[1]) if value is None]
    assert missing == (list(range(0, len(LONG), width)) if step == width else [0])


def test_every_token_is_scored_once_with_enough_context():
    """The table of windows: of a token, where its window begins."""
    for length in (2, 7, 8, 9, 30):
        for max_length in (2, 5, 8):
            for stride in range(1, max_length + 1):
                windows = scoring.windows_of(length, max_length, stride)
                scored = [place for _, first, stop in windows for place in range(first, stop)]
                if stride < max_length:
                    assert scored == list(range(1, length))
                else:
                    assert scored == [place for place in range(length) if place % max_length]
                for start, first, stop in windows:
                    assert stop - start <= max_length
                    if start:
                        assert first - start >= max(1, max_length - stride)
    assert scoring.windows_of(10, 4, 2) == [(0, 1, 4), (2, 4, 6), (4, 6, 8), (6, 8, 10)]
    assert scoring.windows_of(9, 4, 4) == [(0, 1, 4), (4, 5, 8), (8, 9, 9)]


def test_smaller_strides_give_more_context(model):
    """On a text with long repeats, as on any other: what changes is the context alone."""
    by_stride = {stride: model.score([LONG], stride=stride).token_logprobs[0] for stride in (1, 24, 48)}
    full = by_stride[1]
    for place in range(1, N):
        assert by_stride[24][place] == full[place] == by_stride[48][place]
    # the last token of each window of 48 sees 47 before it, whatever the stride
    assert by_stride[24][71] == pytest.approx(full[71], abs=1e-6)
    assert by_stride[48][95] == pytest.approx(full[95], abs=1e-6)
    assert by_stride[48][60] != pytest.approx(full[60], abs=1e-3)


def test_openai_gpt():
    torch.manual_seed(1)
    config = gpt2rt.OpenAIGPTConfig(vocab_size=97, n_positions=N, n_embd=48, n_layer=2, n_head=3, initializer_range=0.3)
    gpt = gpt2rt.OpenAIGPTLMHeadModel(config).eval()
    result = gpt.score(TEXTS, stride=20)
    for index, ids in enumerate(TEXTS):
        close(result.token_logprobs[index], cross_entropies(gpt, ids, N, 20))


@pytest.mark.parametrize("batch_size", [1, 3, 100])
def test_neither_batch_nor_chunks_change_the_numbers(model, monkeypatch, batch_size):
    model.generation_executor("cpu")
    expected = model.score(TEXTS, stride=10)
    assert model.score(TEXTS, stride=10, batch_size=batch_size) == expected
    for text, logprobs in zip(TEXTS, expected.token_logprobs, strict=True):
        assert model.score([text], stride=10).token_logprobs == [logprobs]
    monkeypatch.setattr(scoring, "_MAX_LOGITS", 97 * 5)
    assert model.score(TEXTS, stride=10, batch_size=batch_size) == expected


def test_logits_are_made_in_chunks(model, monkeypatch):
    monkeypatch.setattr(scoring, "_MAX_LOGITS", 97 * 16)
    executor = model.generation_executor("cpu")
    step, sizes = executor.step, []

    def watched(batch, cache, **kwargs):
        output = step(batch, cache, **kwargs)
        sizes.append((batch.input_ids.numel(), output.logits.size(0)))
        return output

    monkeypatch.setattr(executor, "step", watched)
    model.score([LONG] * 4, stride=12, batch_size=4)
    assert max(tokens for tokens, _ in sizes) <= 16
    assert max(logits for _, logits in sizes) <= 16
    # what is context only costs no logits: of 10 windows a text, 12 new tokens each after the first
    assert sum(logits for _, logits in sizes) < sum(tokens for tokens, _ in sizes) / 2


def test_bos_scores_the_first_token_too(model):
    plain, with_bos = model.score(TEXTS), model.score(TEXTS, add_bos=True)
    assert with_bos.token_ids == TEXTS
    for index, ids in enumerate(TEXTS):
        # 1 is the model's bos
        close(with_bos.token_logprobs[index], cross_entropies(model, [1, *ids], N, N // 2)[1:])
        assert with_bos.num_scored[index] == plain.num_scored[index] + 1
    assert model.score([[5]], add_bos=True).num_scored == [1]


def test_texts_and_tensors(byte_model, tokenizer, recwarn):
    texts = ["the stop", "to stop the other " * 30]
    result = byte_model.score(texts, tokenizer)
    ids = [tokenizer.encode(text, verbose=False) for text in texts]
    assert max(map(len, ids)) > tokenizer.model_max_length
    assert result.token_ids == ids
    assert result == byte_model.score(ids)
    assert byte_model.score(texts[0], tokenizer) == byte_model.score(texts[:1], tokenizer)
    assert (
        byte_model.score(torch.tensor(ids[0])) == byte_model.score(torch.tensor([ids[0]])) == byte_model.score(ids[:1])
    )
    assert byte_model.score([torch.tensor(row) for row in ids]) == result
    assert not recwarn.list


def test_half_precision_weights_give_float32_numbers(make_model):
    model = make_model()
    expected = model.score(TEXTS)
    result = model.to(torch.bfloat16).score(TEXTS)
    assert result.perplexity == pytest.approx(expected.perplexity, rel=0.1)
    assert result.perplexity != expected.perplexity


def test_training_mode_and_gradients_change_nothing(make_model):
    model = make_model(resid_pdrop=0.9)
    expected = model.score(TEXTS)
    assert model.train().score(TEXTS) == expected
    assert model.training


@pytest.mark.parametrize(
    ("texts", "settings", "message"),
    [
        ([], {}, "got list, which is empty"),
        (None, {}, "expected texts, or a list of token ids for each text, got NoneType"),
        ({"input_ids": [[5, 6]]}, {}, "got dict"),
        ([5, 6], {}, r"text 0 is 5, expected a text or a list of token ids: \[\[...\]\]"),
        ([[5, 6], []], {}, r"text 1 is \[\], which has no tokens"),
        ([[5, 6], [7]], {}, "text 1 has a single token and nothing before it.*add_bos=True"),
        ([[5, 97]], {}, "text 0 holds the token id 97, but the vocabulary has ids 0 to 96"),
        ([[5, -1]], {}, "text 0 holds the token id -1"),
        ([[5, 1.5]], {}, "text 0 holds 1.5, a float"),
        (torch.tensor([[0.5, 1.5]]), {}, "text 0 holds 0.5, a float"),
        ("the", {}, "needs its tokenizer"),
        ([[5, 6]], {"stride": 0}, "stride must be an integer from 1 to 48, max_length; got 0"),
        ([[5, 6]], {"stride": 11, "max_length": 10}, "stride must be an integer from 1 to 10"),
        ([[5, 6]], {"stride": 2.0}, "stride must be an integer .* got 2.0"),
        ([[5, 6]], {"max_length": 49}, "max_length must be an integer from 2 to 48, the model's n_positions; got 49"),
        ([[5, 6]], {"max_length": 1}, "max_length must be an integer from 2"),
        ([[5, 6]], {"batch_size": 0}, "batch_size must be an integer from 1"),
    ],
)
def test_refusals(model, monkeypatch, texts, settings, message):
    def step(*args, **kwargs):
        raise AssertionError("the model ran")

    monkeypatch.setattr(model.generation_executor(), "step", step)
    with pytest.raises(RequestError, match=message):
        model.score(texts, **settings)


def test_empty_text_and_missing_bos(byte_model, tokenizer, make_model):
    with pytest.raises(RequestError, match="text 1 is '', which has no tokens"):
        byte_model.score(["the stop", ""], tokenizer)
    with pytest.raises(RequestError, match="add_bos=True needs a bos_token_id"):
        make_model(bos_token_id=None).score([[5, 6]], add_bos=True)
    model = make_model()
    model.generation_config.bos_token_id = 5000
    with pytest.raises(RequestError, match="bos_token_id is 5000, but the vocabulary has ids 0 to 96"):
        model.score([[5, 6]], add_bos=True)


def test_damaged_weights(make_model, pools):
    model = make_model()
    with torch.no_grad():
        model.transformer.ln_f.bias.fill_(float("nan"))
    with pytest.raises(NumericsError, match="row 1: 97 of 97 logits are NaN"):
        model.score([[5, 6], [5, 6, 7]])
    assert all(pool.num_free == pool.num_blocks for pool in pools)


def test_sums_are_exact_and_perplexity_may_overflow(make_model):
    model = make_model()
    with torch.no_grad():
        model.transformer.ln_f.weight.mul_(1e4)
    result = model.score([LONG])
    assert result.logprobs[0] == math.fsum(value for value in result.token_logprobs[0] if value is not None)
    assert result.perplexity == math.inf
