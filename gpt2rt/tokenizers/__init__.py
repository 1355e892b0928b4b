"""Tokenizers. The ``tokenizers`` library is loaded when the first tokenizer is made."""

from gpt2rt.tokenizers.encoding import BatchEncoding, CharSpan, TokenSpan
from gpt2rt.tokenizers.gpt2 import GPT2Tokenizer, GPT2TokenizerFast
from gpt2rt.tokenizers.stream import IncrementalDetokenizer, StreamDecoder

__all__ = [
    "BatchEncoding",
    "CharSpan",
    "GPT2Tokenizer",
    "GPT2TokenizerFast",
    "IncrementalDetokenizer",
    "StreamDecoder",
    "TokenSpan",
]
