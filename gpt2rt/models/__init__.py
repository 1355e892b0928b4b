"""The model classes, with transformers' names and forward contract, and what they take and return."""

from .cache import DynamicCache, EncoderDecoderCache
from .gpt2 import GPT2LMHeadModel, GPT2Model, GPT2PreTrainedModel
from .gpt2_blocks import GPT2MLP, GPT2Attention, GPT2Block
from .gpt2_heads import (
    GPT2DoubleHeadsModel,
    GPT2ForQuestionAnswering,
    GPT2ForSequenceClassification,
    GPT2ForTokenClassification,
)
from .inputs import InputRangeError
from .layers import ACT2FN, Conv1D, get_activation
from .openai_gpt import OpenAIGPTLMHeadModel, OpenAIGPTModel, OpenAIGPTPreTrainedModel
from .openai_gpt_blocks import OpenAIGPTBlock
from .openai_gpt_heads import OpenAIGPTDoubleHeadsModel, OpenAIGPTForSequenceClassification
from .outputs import (
    BaseModelOutput,
    BaseModelOutputWithPastAndCrossAttentions,
    CausalLMOutput,
    CausalLMOutputWithCrossAttentions,
    GPT2DoubleHeadsModelOutput,
    ModelOutput,
    OpenAIGPTDoubleHeadsModelOutput,
    QuestionAnsweringModelOutput,
    SequenceClassifierOutput,
    SequenceClassifierOutputWithPast,
    TokenClassifierOutput,
)
from .pretrained import PreTrainedModel
from .quantized import QuantizedConv1D, QuantizedEmbedding, QuantizedLinear, replace_with_quantized
from .summary import SequenceSummary

__all__ = [
    "ACT2FN",
    "GPT2MLP",
    "BaseModelOutput",
    "BaseModelOutputWithPastAndCrossAttentions",
    "CausalLMOutput",
    "CausalLMOutputWithCrossAttentions",
    "Conv1D",
    "DynamicCache",
    "EncoderDecoderCache",
    "GPT2Attention",
    "GPT2Block",
    "GPT2DoubleHeadsModel",
    "GPT2DoubleHeadsModelOutput",
    "GPT2ForQuestionAnswering",
    "GPT2ForSequenceClassification",
    "GPT2ForTokenClassification",
    "GPT2LMHeadModel",
    "GPT2Model",
    "GPT2PreTrainedModel",
    "InputRangeError",
    "ModelOutput",
    "OpenAIGPTBlock",
    "OpenAIGPTDoubleHeadsModel",
    "OpenAIGPTDoubleHeadsModelOutput",
    "OpenAIGPTForSequenceClassification",
    "OpenAIGPTLMHeadModel",
    "OpenAIGPTModel",
    "OpenAIGPTPreTrainedModel",
    "PreTrainedModel",
    "QuantizedConv1D",
    "QuantizedEmbedding",
    "QuantizedLinear",
    "QuestionAnsweringModelOutput",
    "SequenceClassifierOutput",
    "SequenceClassifierOutputWithPast",
    "SequenceSummary",
    "TokenClassifierOutput",
    "get_activation",
    "replace_with_quantized",
]
