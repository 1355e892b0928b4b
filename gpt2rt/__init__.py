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
    "AsyncLLM": "gpt2rt.engine",
    "AsyncTextIteratorStreamer": "gpt2rt.generation",
    "AutoConfig": "gpt2rt.config.auto",
    "AutoModel": "gpt2rt.models.auto",
    "AutoModelForCausalLM": "gpt2rt.models.auto",
    "AutoModelForQuestionAnswering": "gpt2rt.models.auto",
    "AutoModelForSequenceClassification": "gpt2rt.models.auto",
    "AutoModelForTokenClassification": "gpt2rt.models.auto",
    "AutoTokenizer": "gpt2rt.tokenizers",
    "BaseModelOutput": "gpt2rt.models",
    "BaseModelOutputWithPastAndCrossAttentions": "gpt2rt.models",
    "BatchEncoding": "gpt2rt.tokenizers",
    "BertTokenizer": "gpt2rt.tokenizers",
    "BertTokenizerFast": "gpt2rt.tokenizers",
    "BitsAndBytesConfig": "gpt2rt.quantization",
    "CausalLMOutput": "gpt2rt.models",
    "CausalLMOutputWithCrossAttentions": "gpt2rt.models",
    "CheckpointError": "gpt2rt.errors",
    "CompletionOutput": "gpt2rt.engine",
    "ConfidenceCriteria": "gpt2rt.generation",
    "ConfigError": "gpt2rt.errors",
    "DynamicCache": "gpt2rt.models",
    "EncoderDecoderCache": "gpt2rt.models",
    "EncoderNoRepeatNGramLogitsProcessor": "gpt2rt.generation",
    "EncoderRepetitionPenaltyLogitsProcessor": "gpt2rt.generation",
    "EngineConfig": "gpt2rt.engine",
    "EngineDeadError": "gpt2rt.errors",
    "EosTokenCriteria": "gpt2rt.generation",
    "EpsilonLogitsWarper": "gpt2rt.generation",
    "EtaLogitsWarper": "gpt2rt.generation",
    "ExponentialDecayLengthPenalty": "gpt2rt.generation",
    "FeatureExtractionPipeline": "gpt2rt.pipelines",
    "ForcedBOSTokenLogitsProcessor": "gpt2rt.generation",
    "ForcedEOSTokenLogitsProcessor": "gpt2rt.generation",
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
    "GenerateBeamDecoderOnlyOutput": "gpt2rt.generation",
    "GenerateDecoderOnlyOutput": "gpt2rt.generation",
    "GenerationConfig": "gpt2rt.generation",
    "GenerationMixin": "gpt2rt.generation",
    "InfNanRemoveLogitsProcessor": "gpt2rt.generation",
    "InputRangeError": "gpt2rt.models",
    "LLM": "gpt2rt.engine",
    "LogitNormalization": "gpt2rt.generation",
    "LogitsProcessor": "gpt2rt.generation",
    "LogitsProcessorList": "gpt2rt.generation",
    "Logprob": "gpt2rt.engine",
    "MaxLengthCriteria": "gpt2rt.generation",
    "MaxTimeCriteria": "gpt2rt.generation",
    "MinLengthLogitsProcessor": "gpt2rt.generation",
    "MinNewTokensLengthLogitsProcessor": "gpt2rt.generation",
    "MinPLogitsWarper": "gpt2rt.generation",
    "ModelOutput": "gpt2rt.models",
    "NerPipeline": "gpt2rt.pipelines",
    "NoBadWordsLogitsProcessor": "gpt2rt.generation",
    "NoRepeatNGramLogitsProcessor": "gpt2rt.generation",
    "NumericsError": "gpt2rt.errors",
    "OpenAIGPTConfig": "gpt2rt.config",
    "OpenAIGPTDoubleHeadsModel": "gpt2rt.models",
    "OpenAIGPTDoubleHeadsModelOutput": "gpt2rt.models",
    "OpenAIGPTForSequenceClassification": "gpt2rt.models",
    "OpenAIGPTLMHeadModel": "gpt2rt.models",
    "OpenAIGPTModel": "gpt2rt.models",
    "OpenAIGPTPreTrainedModel": "gpt2rt.models",
    "OpenAIGPTTokenizer": "gpt2rt.tokenizers",
    "OpenAIGPTTokenizerFast": "gpt2rt.tokenizers",
    "OutOfBlocksError": "gpt2rt.errors",
    "Pipeline": "gpt2rt.pipelines",
    "PoolingParams": "gpt2rt.engine",
    "PoolingRequestOutput": "gpt2rt.engine",
    "PreTrainedModel": "gpt2rt.models",
    "PreTrainedTokenizerBase": "gpt2rt.tokenizers",
    "PreTrainedTokenizerFast": "gpt2rt.tokenizers",
    "PrefixConstrainedLogitsProcessor": "gpt2rt.generation",
    "QuantizationConfig": "gpt2rt.quantization",
    "QuantizedWeight": "gpt2rt.quantization",
    "QuestionAnsweringModelOutput": "gpt2rt.models",
    "QuestionAnsweringPipeline": "gpt2rt.pipelines",
    "QueueFullError": "gpt2rt.errors",
    "RepetitionPenaltyLogitsProcessor": "gpt2rt.generation",
    "RequestError": "gpt2rt.errors",
    "RequestFailedError": "gpt2rt.errors",
    "RequestLimits": "gpt2rt.engine",
    "RequestOutput": "gpt2rt.engine",
    "RequestOutputKind": "gpt2rt.engine",
    "SamplingParams": "gpt2rt.engine",
    "ScoreOutput": "gpt2rt.generation",
    "SequenceBiasLogitsProcessor": "gpt2rt.generation",
    "SequenceClassifierOutput": "gpt2rt.models",
    "SequenceClassifierOutputWithPast": "gpt2rt.models",
    "StopStringCriteria": "gpt2rt.generation",
    "StoppingCriteria": "gpt2rt.generation",
    "StoppingCriteriaList": "gpt2rt.generation",
    "StreamDecoder": "gpt2rt.tokenizers",
    "SuppressTokensAtBeginLogitsProcessor": "gpt2rt.generation",
    "SuppressTokensLogitsProcessor": "gpt2rt.generation",
    "TemperatureLogitsWarper": "gpt2rt.generation",
    "TextClassificationPipeline": "gpt2rt.pipelines",
    "TextGenerationPipeline": "gpt2rt.pipelines",
    "TextIteratorStreamer": "gpt2rt.generation",
    "TextStreamer": "gpt2rt.generation",
    "TokenClassificationPipeline": "gpt2rt.pipelines",
    "TokenClassifierOutput": "gpt2rt.models",
    "TokenizerError": "gpt2rt.errors",
    "TopHLogitsWarper": "gpt2rt.generation",
    "TopKLogitsWarper": "gpt2rt.generation",
    "TopPLogitsWarper": "gpt2rt.generation",
    "TypicalLogitsWarper": "gpt2rt.generation",
    "UnbatchedClassifierFreeGuidanceLogitsProcessor": "gpt2rt.generation",
    "ZeroShotClassificationPipeline": "gpt2rt.pipelines",
    "pipeline": "gpt2rt.pipelines",
    "quantize_model": "gpt2rt.models.quantize",
    "set_seed": "gpt2rt.pipelines",
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
