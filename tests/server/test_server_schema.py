"""schemathesis against the server's own OpenAPI page: whatever is sent, the server answers, and never with a 5xx."""

import json

import hypothesis
import pytest
import schemathesis
from hypothesis import strategies as st
from live_server import Api
from schemathesis import GenerationMode
from schemathesis.checks import (
    content_type_conformance,
    not_a_server_error,
    response_schema_conformance,
    status_code_conformance,
)

from gpt2rt.engine.async_llm import AsyncLLM

TEMPLATE = "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}"
EXAMPLES = hypothesis.settings(
    max_examples=50,
    deadline=None,
    database=None,
    derandomize=True,
    suppress_health_check=list(hypothesis.HealthCheck),
)
# what is promised of every answer: no 5xx, and only statuses, types and shapes that the page names
PROMISED = [not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance]
POSTS = ("/v1/completions", "/v1/chat/completions", "/v1/embeddings", "/score", "/tokenize", "/detokenize", "/classify")
GETS = ("/v1/models", "/v1/models/{model}", "/health", "/version", "/metrics", "/tokenizer_info")
FIELDS = ("prompt", "messages", "input", "text_1", "text_2", "tokens", "model", "n", "stop", "stream", "seed")
FIELDS += ("logit_bias", "max_tokens", "stream_options", "logprobs", "echo", "temperature", "allowed_token_ids")


@pytest.fixture(scope="module")
def api(real_engine):
    # a short context: what asks for as much as fits is soon done
    engine = AsyncLLM(
        real_engine.model, tokenizer=real_engine.tokenizer, max_model_len=64, num_blocks=256, num_threads=1
    )
    yield Api(engine, chat_template=TEMPLATE)
    engine.shutdown()


@pytest.fixture(scope="module")
def operations(api):
    """Method and path -> operation."""
    schema = schemathesis.openapi.from_asgi("/openapi.json", api.app, config=schemathesis.Config(seed=1))
    schema.config.generation.update(allow_x00=True)
    found = (result.ok() for result in schema.get_all_operations())
    return {operation.label: operation for operation in found}


def test_the_page_lists_every_endpoint(operations):
    assert set(operations) == {*(f"POST {path}" for path in POSTS), *(f"GET {path}" for path in GETS)}


FITS, BREAKS = GenerationMode.POSITIVE, GenerationMode.NEGATIVE
# nothing that can be sent with a GET breaks the page
CASES = [(f"POST {path}", mode) for path in POSTS for mode in (FITS, BREAKS)] + [(f"GET {path}", FITS) for path in GETS]


@pytest.mark.proves("fault:F46")
@pytest.mark.parametrize(("label", "mode"), CASES, ids=[f"{label}-{mode.value}" for label, mode in CASES])
def test_what_fits_the_page_and_what_breaks_it(operations, label, mode):
    operation = operations[label]

    @EXAMPLES
    @hypothesis.given(operation.as_strategy(generation_mode=mode))
    def check(case):
        case.call_and_validate(checks=PROMISED)

    check()


def texts():
    return st.text(st.characters(codec="utf-8"), max_size=30)


@pytest.mark.proves("fault:F46")
@pytest.mark.parametrize("path", POSTS)
def test_bytes_that_are_no_json(api, path):
    @EXAMPLES
    @hypothesis.given(st.binary(max_size=200) | texts().map(str.encode) | st.just(b"\0" * 100))
    def check(data):
        response = api.raw(path, data)
        assert response.status_code == 400, (data, response.text)
        assert set(response.json()["error"]) == {"message", "type", "param", "code"}

    check()


@pytest.mark.proves("fault:F46")
@pytest.mark.parametrize("path", POSTS)
def test_json_of_any_shape(api, path):
    """Right names with wrong values of every kind, NUL bytes among them."""
    fields = st.sampled_from(FIELDS)
    values = st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | texts(),
        lambda inner: st.lists(inner, max_size=4) | st.dictionaries(texts(), inner, max_size=3),
        max_leaves=8,
    )

    @EXAMPLES
    @hypothesis.given(st.dictionaries(fields | texts(), values, max_size=5))
    def check(body):
        response = api.raw(path, json.dumps(body).encode())
        assert response.status_code < 500, (body, response.text)

    check()
