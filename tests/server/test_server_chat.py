"""``/v1/chat/completions``: with a template only, and templates are kept in their cage."""

import threading
import time

import pytest
from live_server import Api, events
from scripted_engine import ScriptedEngine

TEMPLATE = (
    "{% for message in messages %}{{ message.role | upper }}:\n{{ message.content }}\n\n{% endfor %}"
    "{% if add_generation_prompt %}ROMEO:\n{% endif %}"
)
MESSAGES = [{"role": "juliet", "content": "Who is there?"}]


@pytest.fixture
def chat(engine):
    return Api(engine, chat_template=TEMPLATE)


def answer(api, **body):
    response = api.post("/v1/chat/completions", {"messages": MESSAGES, "max_tokens": 8, "temperature": 0, **body})
    assert response.status_code == 200, response.text
    return response.json()


@pytest.mark.proves("fault:F45")
def test_a_base_model_says_that_it_has_no_template(api):
    for path in ("/v1/chat/completions", "/tokenize"):
        response = api.post(path, {"messages": MESSAGES})
        assert response.status_code == 400
        message = response.json()["error"]["message"]
        assert "gpt2rt/tiny-gpt2 is a base model without a chat template" in message
        assert "/v1/completions" in message


def test_an_answer(chat):
    found = answer(chat, return_token_ids=True)
    assert found["id"].startswith("chatcmpl-")
    assert found["object"] == "chat.completion"
    prompt = "JULIET:\nWho is there?\n\nROMEO:\n"
    assert chat.engine.tokenizer.decode(found["prompt_token_ids"]) == prompt
    same = chat.post("/v1/completions", {"prompt": prompt, "max_tokens": 8, "temperature": 0}).json()
    (choice,) = found["choices"]
    assert choice["message"] == {"role": "assistant", "content": same["choices"][0]["text"]}
    assert choice["finish_reason"] == "length"
    assert found["usage"] == same["usage"]
    # without max_tokens it goes on to the end of the context
    whole = answer(chat, max_tokens=None, ignore_eos=True)
    assert whole["usage"]["total_tokens"] == chat.engine.max_model_len
    assert answer(chat, max_tokens=None, max_completion_tokens=3)["usage"]["completion_tokens"] == 3


@pytest.mark.proves("promise:D6")
def test_a_stream(chat):
    options = {"n": 2, "temperature": 1.0, "seed": 4, "logprobs": True, "top_logprobs": 2, "max_tokens": 12}
    whole = answer(chat, **options)
    body = {"messages": MESSAGES, **options, "stream": True, "stream_options": {"include_usage": True}}
    found = events(chat.post("/v1/chat/completions", body).text)
    assert {event["object"] for event in found} == {"chat.completion.chunk"}
    first = found[0]["choices"]
    assert [choice["delta"] for choice in first] == [{"role": "assistant", "content": ""}] * 2
    assert found[-1]["usage"] == whole["usage"]
    for known in whole["choices"]:
        parts = [choice for event in found[1:] for choice in event["choices"] if choice["index"] == known["index"]]
        assert "".join(part["delta"].get("content", "") for part in parts) == known["message"]["content"]
        kept = [entry for part in parts if part["logprobs"] for entry in part["logprobs"]["content"]]
        assert kept == known["logprobs"]["content"]
        assert all(len(entry["top_logprobs"]) == 2 for entry in kept)
        assert [part["finish_reason"] for part in parts if part["finish_reason"]] == [known["finish_reason"]]


def test_going_on_with_the_last_message(chat):
    body = {"messages": [*MESSAGES, {"role": "romeo", "content": "It is I, and"}]}
    body |= {"continue_final_message": True, "add_generation_prompt": False}
    ids = chat.post("/tokenize", body).json()["tokens"]
    assert chat.engine.tokenizer.decode(ids) == "JULIET:\nWho is there?\n\nROMEO:\nIt is I, and"
    answer(chat, **body)
    parts = [{"type": "text", "text": "Who is"}, {"type": "text", "text": " there?"}]
    same = answer(chat, messages=[{"role": "juliet", "content": parts}])
    assert same["choices"] == answer(chat)["choices"]


@pytest.mark.parametrize(
    ("values", "known"),
    [
        ({"tools": [{"type": "function"}]}, "tools"),
        ({"tool_choice": "auto"}, "tool_choice"),
        ({"functions": [{"name": "f"}]}, "functions"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"chat_template": "{{ 1 }}"}, "chat_template"),
        ({"chat_template_kwargs": {"tokenize": True}}, "chat_template_kwargs"),
        ({"documents": [{"text": "x"}]}, "documents"),
        ({"modalities": ["audio"]}, "modalities"),
        ({"echo": True}, "echo"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"max_completion_tokens": 5}, "max_tokens"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]}, "messages"),
        ({"messages": [{"role": "user", "content": "a", "tool_calls": [{"id": "1"}]}]}, "tool_calls"),
        ({"surprise": 1}, "surprise"),
    ],
    ids=str,
)
def test_what_is_not_there_is_refused_by_name(chat, values, known):
    response = chat.post("/v1/chat/completions", {"messages": MESSAGES, "max_tokens": 8, **values})
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert known in error["message"] + str(error["param"])


def test_values_that_change_nothing_are_taken(chat):
    neutral = {"tools": [], "tool_choice": "none", "modalities": ["text"], "store": False, "service_tier": "auto"}
    neutral |= {"parallel_tool_calls": True, "chat_template_kwargs": {}, "metadata": {"a": "b"}}
    neutral |= {"response_format": {"type": "text"}}
    assert answer(chat, **neutral)["choices"] == answer(chat)["choices"]


@pytest.mark.proves("fault:F45")
@pytest.mark.parametrize(
    "template",
    [
        "{{ messages.__class__.__mro__[1].__subclasses__() }}",
        "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
        "{% for i in range(10**9) %}x{% endfor %}",
        "{{ 'x' * 10**9 }}",
        "{% for i in range(1000) %}" + "x" * 100_000 + "{% endfor %}",
        "{{ raise_exception('roles must alternate') }}",
        "{% for",
        "{{ undefined_thing.deeper }}",
    ],
)
def test_hostile_templates(engine, template):
    api = Api(engine, chat_template=template)
    response = api.post("/v1/chat/completions", {"messages": MESSAGES, "max_tokens": 8})
    assert response.status_code == 400, response.text
    assert "chat template" in response.json()["error"]["message"]


@pytest.mark.proves("fault:F45")
def test_a_template_that_takes_too_long_is_stopped(engine):
    """Loops over messages in loops over messages, which no count of numbers bounds; it writes nothing meanwhile."""
    loops = 6
    template = "".join(f"{{% for m{i} in messages %}}" for i in range(loops)) + "{% endfor %}" * loops
    api = Api(engine, chat_template=template, template_timeout=0.2)
    begun = time.monotonic()
    response = api.post("/v1/chat/completions", {"messages": MESSAGES * 100, "max_tokens": 8})
    assert response.status_code == 400, response.text
    assert "took more than 0.2 s" in response.json()["error"]["message"]
    # it would run for hours; its thread has ended
    while any(thread.name == "gpt2rt-template" for thread in threading.enumerate()):
        assert time.monotonic() < begun + 20
        time.sleep(0.01)


def test_without_a_tokenizer_there_is_no_chat():
    engine = ScriptedEngine()
    engine.tokenizer = None
    api = Api(engine, chat_template=TEMPLATE)
    response = api.post("/v1/chat/completions", {"messages": MESSAGES})
    assert response.status_code == 400
    assert "chat template" in response.json()["error"]["message"]
