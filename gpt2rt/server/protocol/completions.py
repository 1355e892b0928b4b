"""``/v1/completions``."""

from __future__ import annotations

from .common import GenerationFields, Prompts, only


class CompletionRequest(GenerationFields):
    """OpenAI's fields, and vLLM's as far as the engine has what they ask for."""

    prompt: Prompts
    add_special_tokens: bool | None = None
    best_of: int | None = None
    echo: bool | None = None
    logprobs: int | None = None

    prompt_embeds: only(None, why="tensors are not taken from requests") = None  # type: ignore[valid-type]
    suffix: only(None, why="the model only goes on with a text") = None  # type: ignore[valid-type]
