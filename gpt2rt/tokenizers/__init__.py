"""Tokenizers. The ``tokenizers`` library is loaded when the first tokenizer is made."""

from gpt2rt.tokenizers.auto import AutoTokenizer
from gpt2rt.tokenizers.bert import BertTokenizer, BertTokenizerFast
from gpt2rt.tokenizers.encoding import BatchEncoding, CharSpan, TokenSpan
from gpt2rt.tokenizers.fast import PreTrainedTokenizerFast
from gpt2rt.tokenizers.gpt2 import GPT2Tokenizer, GPT2TokenizerFast
from gpt2rt.tokenizers.openai_gpt import OpenAIGPTTokenizer, OpenAIGPTTokenizerFast
from gpt2rt.tokenizers.pretrained import PreTrainedTokenizerBase
from gpt2rt.tokenizers.stream import IncrementalDetokenizer, StreamDecoder

__all__ = [
    "AutoTokenizer",
    "BatchEncoding",
    "BertTokenizer",
    "BertTokenizerFast",
    "CharSpan",
    "GPT2Tokenizer",
    "GPT2TokenizerFast",
    "IncrementalDetokenizer",
    "OpenAIGPTTokenizer",
    "OpenAIGPTTokenizerFast",
    "PreTrainedTokenizerBase",
    "PreTrainedTokenizerFast",
    "StreamDecoder",
    "TokenSpan",
]
