"""``/v1/embeddings``, ``/classify`` and ``/score``."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from .common import Body, CacheSalt, Priority, Prompts, RequestId, only


class PoolingFields(Body):
    """What they share."""

    model: str | None = None
    add_special_tokens: bool | None = None
    cache_salt: CacheSalt | None = None
    priority: Priority | None = None
    request_id: RequestId | None = None
    truncate_prompt_tokens: int | None = None
    user: str | None = Field(None, description="Not used.")


class EmbeddingRequest(PoolingFields):
    """OpenAI's fields, and how hidden states become one vector."""

    input: Prompts
    dimensions: int | None = Field(None, description="Only the size that the model has.")
    encoding_format: Literal["float", "base64"] | None = None
    normalize: bool | None = None
    pooling: Literal["last", "mean"] | None = None


class ClassificationRequest(PoolingFields):
    """Texts to classify."""

    input: Prompts
    use_activation: bool | None = Field(None, description="False: logits instead of probabilities.")


Texts = str | Annotated[list[str], Field(min_length=1)]


class ScoreRequest(PoolingFields):
    """Pairs of texts: one with one, one with each of many, or many with as many."""

    text_1: Texts
    text_2: Texts

    mm_processor_kwargs: only(None) = None  # type: ignore[valid-type]
