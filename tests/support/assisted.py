"""Helpers for tests of assisted decoding."""

import copy

import torch

from gpt2rt.generation.prepare import prepare

PROMPTS = [[5, 6, 7, 8, 9], [40], [10, 11, 12, 13, 10, 11, 12, 13, 10, 11], [60, 61]]


def noisy(model):
    """A copy of a model with a little noise in its weights: as a draft it is right often, but not always."""
    twin = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.01)
    return twin


def run(model, prompts=PROMPTS, **settings):
    """The loop after it has ended, and the steps it gave out."""
    settings = {"max_new_tokens": 20, "eos_token_id": None, "pad_token_id": 0, **settings}
    decoder, _, _ = prepare(model, prompts, None, None, None, settings)
    with torch.no_grad():
        steps = list(decoder.steps())
    return decoder, steps


def counted(monkeypatch, source):
    """The numbers of candidates that a source was asked for, round by round."""
    asked = []
    propose = source.propose

    def watched(self, counts):
        asked.append(dict(counts))
        return propose(self, counts)

    monkeypatch.setattr(source, "propose", watched)
    return asked
