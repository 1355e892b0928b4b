"""The openai client, unmodified, against the server; its own pydantic models read the answers strictly."""

import asyncio

import openai
import pytest
from live_server import LiveServer, wait_until
from openai.types import Completion, CreateEmbeddingResponse
from openai.types.chat import ChatCompletion, ChatCompletionChunk

from gpt2rt.engine.params import SamplingParams

PROMPTS = ["ROMEO:\nI", "First Citizen:", "Où est l'été ? 🌶🌶", "<|endoftext|>JULIET:"]


@pytest.fixture(scope="module")
def client(live):
    with openai.OpenAI(base_url=live.url + "/v1", api_key="unused", max_retries=0) as client:
        yield client


def streamed(client, **request):
    """The choices of a stream put together: index -> (text, logprobs, finish_reason), and its usage."""
    choices, usage = {}, None
    for chunk in client.completions.create(stream=True, stream_options={"include_usage": True}, **request):
        # strictly, as the client's own models say
        Completion.model_validate(_finished(chunk.model_dump()))
        usage = chunk.usage or usage
        for choice in chunk.choices:
            text, kept, reason = choices.setdefault(choice.index, ["", {}, None])
            assert reason is None
            for name, values in (choice.logprobs.model_dump() if choice.logprobs else {}).items():
                kept.setdefault(name, []).extend(values)
            choices[choice.index] = [text + choice.text, kept, choice.finish_reason]
    return choices, usage


def _finished(value):
    """A chunk whose choices have an end: the models know no other choices."""
    return value | {"choices": [choice | {"finish_reason": "stop", "logprobs": None} for choice in value["choices"]]}


def _without_first_nulls(value):
    """An echo begins with a token that nothing stands before: null, as OpenAI has it and its models do not."""
    for choice in value["choices"]:
        if choice["logprobs"]:
            assert choice["logprobs"]["token_logprobs"][0] is choice["logprobs"]["top_logprobs"][0] is None
            choice["logprobs"]["token_logprobs"][0], choice["logprobs"]["top_logprobs"][0] = 0.0, {}
    return value


@pytest.mark.proves("L10")
def test_models(client):
    (model,) = client.models.list().data
    assert model.id == "gpt2rt/tiny-gpt2"
    assert client.models.retrieve(model.id).id == model.id
    with pytest.raises(openai.NotFoundError) as refused:
        client.models.retrieve("gpt-5")
    assert refused.value.code == "model_not_found"


@pytest.mark.proves("promise:D6")
@pytest.mark.parametrize("echo", [False, True])
@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 0.0},
        {"temperature": 1.0, "seed": 7, "n": 3, "logprobs": 3},
        {"temperature": 0.8, "seed": 11, "stop": ["\n\n", "the"], "logprobs": 0},
        {"temperature": 1.4, "seed": 5, "extra_body": {"top_k": 40, "min_tokens": 5}},
    ],
    ids=["greedy", "drawn", "stops", "extra"],
)
def test_a_stream_says_what_the_whole_answer_says(client, engine, options, echo):
    request = {"model": "gpt2rt/tiny-gpt2", "prompt": PROMPTS, "max_tokens": 24, "echo": echo, **options}
    whole = client.completions.create(**request)
    Completion.model_validate(_without_first_nulls(whole.model_dump()) if echo else whole.model_dump())
    choices, usage = streamed(client, **request)
    assert [choice.index for choice in whole.choices] == list(range(len(choices))) == sorted(choices)
    for choice in whole.choices:
        logprobs = choice.logprobs.model_dump() if choice.logprobs else {}
        assert choices[choice.index] == [choice.text, logprobs, choice.finish_reason]
    assert usage == whole.usage


@pytest.mark.proves("promise:D6")
@pytest.mark.parametrize("prompt", PROMPTS)
def test_the_server_says_what_the_engine_says(client, engine, prompt):
    options = {"temperature": 1.0, "seed": 3, "n": 2, "max_tokens": 24, "logprobs": 4, "stop": ["king"]}
    answer = client.completions.create(model="gpt2rt/tiny-gpt2", prompt=prompt, **options)

    async def ask():
        async for output in engine.generate(prompt, SamplingParams(**options)):
            last = output
        return last

    output = asyncio.run(ask())
    for choice, known in zip(answer.choices, output.outputs, strict=True):
        assert (choice.text, choice.finish_reason) == (known.text, known.finish_reason)
        values = [row[token].logprob for token, row in zip(known.token_ids, known.logprobs, strict=True)]
        assert choice.logprobs.token_logprobs == values
        top = [sorted((entry.logprob for entry in row.values()), reverse=True) for row in known.logprobs]
        assert [sorted(row.values(), reverse=True) for row in choice.logprobs.top_logprobs] == top
    assert answer.usage.prompt_tokens == len(output.prompt_token_ids)


def test_chats(engine):
    template = "{% for message in messages %}{{ message.role }}:\n{{ message.content }}\n{% endfor %}ROMEO:\n"
    options = {"model": "gpt2rt/tiny-gpt2", "max_tokens": 12, "n": 2, "seed": 1, "logprobs": True, "top_logprobs": 2}
    options["messages"] = [{"role": "developer", "content": "Be brief."}, {"role": "user", "content": "Who is there?"}]
    with LiveServer(engine, chat_template=template) as server:
        client = openai.OpenAI(base_url=server.url + "/v1", api_key="unused", max_retries=0)
        whole = client.chat.completions.create(**options)
        chunks = list(client.chat.completions.create(**options, stream=True, stream_options={"include_usage": True}))
    ChatCompletion.model_validate(whole.model_dump())
    for chunk in chunks:
        ChatCompletionChunk.model_validate(chunk.model_dump())
    assert chunks[-1].usage == whole.usage
    for known in whole.choices:
        parts = [choice for chunk in chunks for choice in chunk.choices if choice.index == known.index]
        assert parts[0].delta.role == "assistant"
        assert "".join(part.delta.content or "" for part in parts) == known.message.content
        assert parts[-1].finish_reason == known.finish_reason


def test_errors_have_the_clients_classes(client):
    with pytest.raises(openai.BadRequestError, match="temperature") as refused:
        client.completions.create(model="gpt2rt/tiny-gpt2", prompt="a", temperature=3e38)
    assert refused.value.body["param"] == "temperature"
    with pytest.raises(openai.NotFoundError, match="gpt-5") as refused:
        client.completions.create(model="gpt-5", prompt="a")
    assert refused.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError, match="base model without a chat template"):
        client.chat.completions.create(model="gpt2rt/tiny-gpt2", messages=[{"role": "user", "content": "hi"}])


def test_embeddings(client):
    # the client asks for base64 unless told otherwise
    texts = ["ROMEO:", "JULIET:"]
    packed = client.embeddings.create(model="gpt2rt/tiny-gpt2", input=texts)
    plain = client.embeddings.create(model="gpt2rt/tiny-gpt2", input=texts, encoding_format="float")
    CreateEmbeddingResponse.model_validate(plain.model_dump())
    assert [item.embedding for item in packed.data] == [item.embedding for item in plain.data]
    assert [item.index for item in plain.data] == [0, 1]
    for item in plain.data:
        assert sum(number * number for number in item.embedding) == pytest.approx(1.0, abs=1e-5)


def test_a_stream_that_is_closed_frees_its_blocks(client, engine):
    before = engine.stats().finished.get("abort", 0)
    stream = client.completions.create(
        model="gpt2rt/tiny-gpt2", prompt="a", max_tokens=500, stream=True, extra_body={"ignore_eos": True}
    )
    next(iter(stream))
    stream.close()
    wait_until(lambda: engine.stats().finished.get("abort", 0) == before + 1)
