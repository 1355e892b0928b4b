"""Model configurations: transformers' fields and defaults, checked completely before anything is allocated.

``GPT2Config`` and ``OpenAIGPTConfig`` read and write the ``config.json`` of transformers. Every rule is checked when a
config is made, when a model is built from it and when it is saved; a broken rule raises
:class:`gpt2rt.errors.ConfigError` with the field, its value and the rule.
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
from gpt2rt.config.decoder import ACTIVATIONS
from gpt2rt.config.gpt2 import GPT2Config
from gpt2rt.config.openai_gpt import OpenAIGPTConfig, openai_gpt_activation

__all__ = [
    "ACTIVATIONS",
    "GENERATION_FIELDS",
    "SUPPORTED_MODEL_TYPES",
    "GPT2Config",
    "OpenAIGPTConfig",
    "PreTrainedConfig",
    "PretrainedConfig",
    "check_model_type",
    "openai_gpt_activation",
    "refuse_remote_code",
    "torch_dtype_of",
]
