"""Rows of the engine's sampler, of every kind that there is, and logits for them."""

import itertools

import torch

from gpt2rt.engine.params import SamplingParams
from gpt2rt.engine.sampler import Sampler, SamplingRow

CPU = torch.device("cpu")
VOCAB = 97
EOS = frozenset([2])


def make_row(number=0, output_ids=(), prompt_ids=(5, 6, 7), tokenizer=None, **settings):
    return SamplingRow(
        SamplingParams(**settings),
        seed=number * 7919,
        request=2**64 - 1 - number,
        choice=number % 3,
        prompt_ids=list(prompt_ids),
        output_ids=list(output_ids),
        eos_token_ids=EOS,
        tokenizer=tokenizer,
    )


def sampler_of(rows, vocab_size=VOCAB):
    sampler = Sampler(vocab_size, CPU, capacity=2)
    sampler.set_rows(rows)
    return sampler


def random_logits(num_rows, seed=0, vocab_size=VOCAB):
    return torch.randn(num_rows, vocab_size, generator=torch.Generator().manual_seed(seed)) * 3


# every kind of row that there is; the first eight need their logits as they are
KINDS = [
    {"temperature": 0.0},
    {},
    {"temperature": 0.7, "top_k": 5},
    {"top_p": 0.8},
    {"min_p": 0.05, "temperature": 1.3},
    {"top_k": 20, "top_p": 0.9, "min_p": 0.01, "temperature": 0.9},
    {"temperature": 0.0, "logprobs": 3},
    {"top_p": 0.9, "logprobs": 0},
    {"repetition_penalty": 1.3},
    {"frequency_penalty": 0.5, "presence_penalty": -0.5, "temperature": 0.0, "logprobs": 2},
    {"logit_bias": {4: 5.0, 90: -100.0}, "top_k": 4, "logprobs": 4},
    {"allowed_token_ids": [3, 9, 50], "top_p": 0.95},
    {"min_tokens": 6, "stop_token_ids": [8], "temperature": 0.0},
    {"presence_penalty": 1.5, "repetition_penalty": 0.8, "logit_bias": {1: 2.0}, "allowed_token_ids": [1, 2, 3, 4]},
]


def mixed_rows(count):
    """Rows of all kinds, some in the midst of their output."""
    return [
        make_row(number, output_ids=[(number * 5 + i * 11) % VOCAB for i in range(number % 7)], **kind)
        for number, kind in zip(range(count), itertools.cycle(KINDS), strict=False)
    ]
