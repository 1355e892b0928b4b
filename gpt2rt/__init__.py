"""gpt2rt: a small, exact, measured runtime for GPT-2 models.

Names are transformers': ``from gpt2rt import GPT2LMHeadModel, GPT2Tokenizer``. Each is imported when it is first
used, so that ``import gpt2rt`` costs little more than ``import torch``.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

import torch as torch  # everything here needs it: fail now, with its own message, if it is missing

#: public name -> module that defines it
_EXPORTS = {
    "AsyncTextIteratorStreamer": "gpt2rt.generation",
    "BaseModelOutputWithPastAndCrossAttentions": "gpt2rt.models",
    "BatchEncoding": "gpt2rt.tokenizers",
    "CausalLMOutputWithCrossAttentions": "gpt2rt.models",
    "CheckpointError": "gpt2rt.errors",
    "ConfigError": "gpt2rt.errors",
    "DynamicCache": "gpt2rt.models",
    "EncoderDecoderCache": "gpt2rt.models",
    "GPT2Config": "gpt2rt.config",
    "GPT2DoubleHeadsModel": "gpt2rt.models",
    "GPT2DoubleHeadsModelOutput": "gpt2rt.models",
    "GPT2ForQuestionAnswering": "gpt2rt.models",
    "GPT2ForSequenceClassification": "gpt2rt.models",
    "GPT2ForTokenClassification": "gpt2rt.models",
    "GPT2LMHeadModel": "gpt2rt.models",
    "GPT2Model": "gpt2rt.models",
    "GPT2PreTrainedModel": "gpt2rt.models",
    "GPT2Tokenizer": "gpt2rt.tokenizers",
    "GPT2TokenizerFast": "gpt2rt.tokenizers",
    "GenerationConfig": "gpt2rt.generation",
    "GenerationMixin": "gpt2rt.generation",
    "InputRangeError": "gpt2rt.models",
    "LogitsProcessor": "gpt2rt.generation",
    "LogitsProcessorList": "gpt2rt.generation",
    "ModelOutput": "gpt2rt.models",
    "NumericsError": "gpt2rt.errors",
    "OutOfBlocksError": "gpt2rt.errors",
    "PreTrainedModel": "gpt2rt.models",
    "QuestionAnsweringModelOutput": "gpt2rt.models",
    "RequestError": "gpt2rt.errors",
    "SequenceClassifierOutputWithPast": "gpt2rt.models",
    "StoppingCriteria": "gpt2rt.generation",
    "StoppingCriteriaList": "gpt2rt.generation",
    "TextIteratorStreamer": "gpt2rt.generation",
    "TextStreamer": "gpt2rt.generation",
    "TokenClassifierOutput": "gpt2rt.models",
    "TokenizerError": "gpt2rt.errors",
}

__all__ = sorted([*_EXPORTS, "__version__"])

if TYPE_CHECKING:
    from gpt2rt.config import GPT2Config as GPT2Config
    from gpt2rt.models import GPT2LMHeadModel as GPT2LMHeadModel
    from gpt2rt.models import GPT2Model as GPT2Model
    from gpt2rt.tokenizers import GPT2Tokenizer as GPT2Tokenizer


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from gpt2rt.env import version

        return version()
    if name in _EXPORTS:
        value = getattr(importlib.import_module(_EXPORTS[name]), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'gpt2rt' has no attribute {name!r}; it exports {', '.join(__all__)}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
