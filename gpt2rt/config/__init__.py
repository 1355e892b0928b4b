"""Model configurations: transformers' fields and defaults, checked completely before anything is allocated.

``GPT2Config`` reads and writes the ``config.json`` of transformers. Every rule is checked when a config is made, when
a model is built from it and when it is saved; a broken rule raises :class:`gpt2rt.errors.ConfigError` with the field,
its value and the rule.
"""

from gpt2rt.config.base import (
    GENERATION_FIELDS,
    SUPPORTED_MODEL_TYPES,
    PreTrainedConfig,
    PretrainedConfig,
    check_model_type,
    refuse_remote_code,
    torch_dtype_of,
)
from gpt2rt.config.gpt2 import ACTIVATIONS, GPT2Config

__all__ = [
    "ACTIVATIONS",
    "GENERATION_FIELDS",
    "SUPPORTED_MODEL_TYPES",
    "GPT2Config",
    "PreTrainedConfig",
    "PretrainedConfig",
    "check_model_type",
    "refuse_remote_code",
    "torch_dtype_of",
]
