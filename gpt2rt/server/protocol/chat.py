"""``/v1/chat/completions``."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from .common import Body, GenerationFields, only


class TextPart(Body):
    """A part of a message."""

    type: only("text", why="messages are texts")  # type: ignore[valid-type]
    text: str


class Message(Body):
    """One turn of a chat."""

    role: Annotated[str, Field(min_length=1, max_length=64)]
    content: str | list[TextPart] | None = None
    name: str | None = None

    audio: only(None) = None  # type: ignore[valid-type]
    function_call: only(None) = None  # type: ignore[valid-type]
    refusal: only(None) = None  # type: ignore[valid-type]
    tool_call_id: only(None) = None  # type: ignore[valid-type]
    tool_calls: only(None, []) = None  # type: ignore[valid-type]

    def plain(self) -> dict[str, str]:
        """What a template sees."""
        content = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content or ())
        return {"role": self.role, "content": content} | ({} if self.name is None else {"name": self.name})


_OPERATOR = "the template is the operator's choice"


class ChatRequest(GenerationFields):
    """OpenAI's fields, and vLLM's as far as the engine has what they ask for."""

    messages: Annotated[list[Message], Field(min_length=1)]
    add_generation_prompt: bool | None = None
    add_special_tokens: bool | None = None
    continue_final_message: bool | None = None
    logprobs: bool | None = None
    max_completion_tokens: int | None = None
    metadata: dict[str, str] | None = Field(None, description="Not used.")
    safety_identifier: str | None = Field(None, description="Not used.")
    prompt_cache_key: str | None = Field(None, description="Not used: see cache_salt.")
    top_logprobs: int | None = None

    audio: only(None) = None  # type: ignore[valid-type]
    chat_template: only(None, why=_OPERATOR) = None  # type: ignore[valid-type]
    chat_template_kwargs: only(None, {}, why=_OPERATOR) = None  # type: ignore[valid-type]
    documents: only(None, []) = None  # type: ignore[valid-type]
    echo: only(None, False) = None  # type: ignore[valid-type]
    functions: only(None, []) = None  # type: ignore[valid-type]
    function_call: only(None, "none") = None  # type: ignore[valid-type]
    modalities: only(None, ["text"]) = None  # type: ignore[valid-type]
    parallel_tool_calls: only(None, True, False) = None  # type: ignore[valid-type]
    prediction: only(None) = None  # type: ignore[valid-type]
    reasoning_effort: only(None, "none") = None  # type: ignore[valid-type]
    service_tier: Literal["auto", "default"] | None = None
    store: only(None, False) = None  # type: ignore[valid-type]
    tool_choice: only(None, "none") = None  # type: ignore[valid-type]
    tools: only(None, []) = None  # type: ignore[valid-type]
    web_search_options: only(None) = None  # type: ignore[valid-type]
