"""What the requests of several endpoints share."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationInfo, WithJsonSchema
from pydantic_core import PydanticCustomError


class Body(BaseModel):
    """A request's JSON object: unknown fields are refused, and a text is no number."""

    model_config = ConfigDict(extra="forbid", strict=True)


def fault(message: str) -> PydanticCustomError:
    """An error of validation with this message, whatever stands in it."""
    return PydanticCustomError("invalid", "{message}", {"message": message})


def only(*values: Any, why: str = "gpt2rt does not have it") -> Any:
    """The type of a field that may be sent, but only with values that change nothing."""

    def check(value: Any, info: ValidationInfo) -> Any:
        if any(type(value) is type(known) and value == known for known in values):
            return value
        others = ", ".join(repr(known) for known in values if known is not None)
        hint = f"leave it out or send {others}" if others else "leave it out"
        raise fault(f"{info.field_name} is not supported: {why}; {hint}")

    return Annotated[Any, BeforeValidator(check), WithJsonSchema({"enum": list(values)})]


def _is_ids(value: Any) -> bool:
    return type(value) is list and bool(value) and set(map(type, value)) == {int}


def _check_prompts(value: Any, info: ValidationInfo) -> Any:
    name = info.field_name
    expected = f"{name} must be a text, a list of texts, a list of token ids, or a list of such lists"
    if isinstance(value, str):
        return value
    if type(value) is not list:
        raise fault(expected)
    if not value:
        raise fault(f"{name} is an empty list; {expected}")
    kinds = set(map(type, value))
    if kinds in ({str}, {int}):
        return value
    if kinds == {list}:
        for place, ids in enumerate(value):
            if not _is_ids(ids):
                raise fault(f"{name}[{place}] must be a list of token ids, integers, with at least one")
        return value
    raise fault(f"{name} mixes types; {expected}")


_IDS = {"type": "array", "items": {"type": "integer", "minimum": 0}, "minItems": 1}
Prompts = Annotated[
    Any,
    # by hand: a union would be tried member by member, and write an error for each of a hundred thousand ids
    BeforeValidator(_check_prompts),
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "string"},
                {"type": "array", "items": {"type": "string"}, "minItems": 1},
                _IDS,
                {"type": "array", "items": _IDS, "minItems": 1},
            ]
        }
    ),
]


def as_prompts(value: Any) -> list[str | list[int]]:
    """The prompts of a checked :data:`Prompts`, one by one."""
    return [value] if isinstance(value, str) or isinstance(value[0], int) else value


Priority = Annotated[int, Field(ge=-(2**31), lt=2**31, description="The smaller goes first.")]
RequestId = Annotated[
    str, Field(pattern=r"^[A-Za-z0-9._:-]{1,128}$", description="A name that no other running request has.")
]
CacheSalt = Annotated[
    str, Field(min_length=1, max_length=256, description="Cached prefixes are shared among requests with the same.")
]


class StreamOptions(Body):
    """What else a stream holds."""

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


class ResponseFormat(Body):
    """Only plain text."""

    type: only("text", why="gpt2rt writes plain text")  # type: ignore[valid-type]


class GenerationFields(Body):
    """What completions and chat completions share; ``None`` is the same as leaving a field out."""

    model: str | None = None
    frequency_penalty: float | None = None
    ignore_eos: bool | None = None
    include_stop_str_in_output: bool | None = None
    allowed_token_ids: list[int] | None = None
    bad_words: list[str] | None = None
    cache_salt: CacheSalt | None = None
    logit_bias: dict[str, float] | None = None
    max_tokens: int | None = None
    min_p: float | None = None
    min_tokens: int | None = None
    n: int | None = None
    presence_penalty: float | None = None
    priority: Priority | None = None
    prompt_logprobs: int | None = None
    repetition_penalty: float | None = None
    request_id: RequestId | None = None
    return_token_ids: bool | None = None
    return_tokens_as_token_ids: bool | None = None
    seed: int | None = None
    skip_special_tokens: bool | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    truncate_prompt_tokens: int | None = None
    response_format: ResponseFormat | None = None
    user: str | None = Field(None, description="Not used.")

    # fields of vLLM's API that would change the result
    guided_choice: only(None) = None  # type: ignore[valid-type]
    guided_grammar: only(None) = None  # type: ignore[valid-type]
    guided_json: only(None) = None  # type: ignore[valid-type]
    guided_regex: only(None) = None  # type: ignore[valid-type]
    kv_transfer_params: only(None) = None  # type: ignore[valid-type]
    length_penalty: only(None, 1.0, 1, why="there is no beam search") = None  # type: ignore[valid-type]
    logits_processors: only(None, why="code is not taken from requests") = None  # type: ignore[valid-type]
    spaces_between_special_tokens: only(None, True) = None  # type: ignore[valid-type]
    structured_outputs: only(None) = None  # type: ignore[valid-type]
    use_beam_search: only(None, False) = None  # type: ignore[valid-type]
    vllm_xargs: only(None) = None  # type: ignore[valid-type]
