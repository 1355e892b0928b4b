"""``/v1/embeddings``, ``/classify`` and ``/score``."""

import base64

import numpy as np
import pytest
import torch
from live_server import Api

from gpt2rt import GPT2Config, GPT2ForSequenceClassification, GPT2Model
from gpt2rt.engine.async_llm import AsyncLLM


@pytest.fixture(scope="module")
def classifier(real_engine):
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=2048, n_positions=64, n_embd=48, n_layer=2, n_head=3, num_labels=3)
    config.id2label = {0: "sad", 1: "merry", 2: "angry"}
    model = GPT2ForSequenceClassification(config).eval()
    engine = AsyncLLM(model, tokenizer=real_engine.tokenizer, num_blocks=64, num_threads=1)
    yield engine
    engine.shutdown()


@pytest.fixture(scope="module")
def scorer(real_engine):
    torch.manual_seed(1)
    config = GPT2Config(vocab_size=2048, n_positions=64, n_embd=48, n_layer=2, n_head=3, num_labels=1)
    engine = AsyncLLM(
        GPT2ForSequenceClassification(config).eval(), tokenizer=real_engine.tokenizer, num_blocks=64, num_threads=1
    )
    yield engine
    engine.shutdown()


def test_embeddings_are_the_hidden_states_of_the_model(api):
    tokenizer, model = api.engine.tokenizer, api.engine.model
    texts = ["ROMEO:\nI am", "First Citizen:"]
    for pooling in ("last", "mean"):
        body = {"input": texts, "pooling": pooling, "normalize": False}
        answer = api.post("/v1/embeddings", body).json()
        assert answer["object"] == "list"
        for place, (text, item) in enumerate(zip(texts, answer["data"], strict=True)):
            assert (item["object"], item["index"]) == ("embedding", place)
            with torch.no_grad():
                hidden = model.transformer(torch.tensor([tokenizer.encode(text)])).last_hidden_state[0]
            known = hidden[-1] if pooling == "last" else hidden.mean(0)
            assert item["embedding"] == pytest.approx(known.tolist(), abs=1e-4)
    assert answer["usage"]["prompt_tokens"] == sum(len(tokenizer.encode(text)) for text in texts)


def test_embeddings_as_base64_and_from_ids(api):
    ids = api.engine.tokenizer.encode("ROMEO:")
    plain = api.post("/v1/embeddings", {"input": "ROMEO:"}).json()["data"][0]["embedding"]
    packed = api.post("/v1/embeddings", {"input": [ids], "encoding_format": "base64"}).json()["data"][0]["embedding"]
    assert np.frombuffer(base64.b64decode(packed), "<f4").tolist() == plain
    size = api.engine.model.config.n_embd
    assert api.post("/v1/embeddings", {"input": ids, "dimensions": size}).json()["data"][0]["embedding"] == plain


@pytest.mark.parametrize(
    ("body", "known"),
    [
        ({"input": ""}, None),
        ({"input": []}, "input"),
        ({"input": [5000]}, "5000"),
        ({"input": [5] * 513}, "513"),
        ({"input": ["a"] * 129}, "129 prompts"),
        ({"input": "a", "dimensions": 7}, "dimensions"),
        ({"input": "a", "encoding_format": "hex"}, "encoding_format"),
        ({"input": "a", "pooling": "cls"}, "pooling"),
        ({"input": "a", "surprise": 1}, "surprise"),
        ({"input": "a", "truncate_prompt_tokens": 0}, "truncate_prompt_tokens"),
    ],
    ids=str,
)
def test_bad_embedding_requests(api, body, known):
    response = api.post("/v1/embeddings", body)
    if known is None:
        # an empty text is the bos token
        assert response.status_code == 200
        return
    assert response.status_code == 400, response.text
    assert known in response.json()["error"]["message"] + str(response.json()["error"]["param"])


def test_classify(classifier):
    api = Api(classifier)
    texts = ["ROMEO:", "JULIET: ay me"]
    answer = api.post("/classify", {"input": texts}).json()
    for place, (text, item) in enumerate(zip(texts, answer["data"], strict=True)):
        with torch.no_grad():
            logits = classifier.model(torch.tensor([classifier.tokenizer.encode(text)])).logits[0]
        assert item["index"] == place
        assert item["probs"] == pytest.approx(logits.softmax(-1).tolist(), abs=1e-5)
        assert item["label"] == classifier.model.config.id2label[int(logits.argmax())]
        assert item["num_classes"] == 3
        raw = api.post("/classify", {"input": text, "use_activation": False}).json()["data"][0]["probs"]
        assert raw == pytest.approx(logits.tolist(), abs=1e-5)
    # what a classifier cannot do is refused with what it can
    for path, body in (("/v1/completions", {"prompt": "a"}), ("/v1/embeddings", {"input": "a"})):
        response = api.post(path, body)
        assert response.status_code == 400
        assert "classify" in response.json()["error"]["message"]


def test_a_language_model_has_no_classes(api):
    response = api.post("/classify", {"input": "a"})
    assert response.status_code == 400
    assert "classify was asked for" in response.json()["error"]["message"]


def test_scores_are_cosines_of_embeddings(api):
    answer = api.post("/score", {"text_1": "ROMEO:", "text_2": ["ROMEO:", "JULIET:"]}).json()
    scores = [item["score"] for item in answer["data"]]
    rows = [
        np.array(item["embedding"])
        for item in api.post("/v1/embeddings", {"input": ["ROMEO:", "JULIET:"]}).json()["data"]
    ]
    assert scores == pytest.approx([1.0, float(rows[0] @ rows[1])], abs=1e-5)
    assert [item["index"] for item in answer["data"]] == [0, 1]
    assert api.post("/v1/score", {"text_1": ["a", "b"], "text_2": ["a", "b"]}).status_code == 200
    for bad in ({"text_1": ["a", "b"], "text_2": "a"}, {"text_1": [], "text_2": "a"}, {"text_1": "a"}):
        assert api.post("/score", bad).status_code == 400


def test_scores_of_a_classifier_with_one_class(scorer):
    api = Api(scorer)
    tokenizer = scorer.tokenizer
    answer = api.post("/score", {"text_1": "ROMEO:", "text_2": ["love", "hate me"]}).json()
    for text, item in zip(["love", "hate me"], answer["data"], strict=True):
        ids = tokenizer.encode("ROMEO:") + tokenizer.encode(text)
        with torch.no_grad():
            logit = scorer.model(torch.tensor([ids])).logits[0, 0]
        assert item["score"] == pytest.approx(float(torch.sigmoid(logit)), abs=1e-5)


def test_a_model_without_head(real_engine):
    torch.manual_seed(0)
    model = GPT2Model(GPT2Config(vocab_size=2048, n_positions=64, n_embd=48, n_layer=1, n_head=3)).eval()
    engine = AsyncLLM(model, tokenizer=real_engine.tokenizer, num_blocks=16, num_threads=1)
    try:
        api = Api(engine)
        assert len(api.post("/v1/embeddings", {"input": "a"}).json()["data"][0]["embedding"]) == 48
        assert api.post("/v1/completions", {"prompt": "a"}).status_code == 400
    finally:
        engine.shutdown()
