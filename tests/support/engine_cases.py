"""Requests for an engine, and ways to compare and to disturb what it makes of them."""

import contextlib
import dataclasses

import torch

from gpt2rt import GPT2Config, GPT2LMHeadModel
from gpt2rt.cache import Sequence
from gpt2rt.engine import LLM
from gpt2rt.errors import OutOfBlocksError

#: verse of the kind that the embedded models know
TEXT = (
    "ROMEO:\nI would thou wert so happy by thy stay, to hear true shrift. Come, madam, let us away.\n\nJULIET:\nO, "
    "wilt thou leave me so unsatisfied? What satisfaction canst thou have to-night?\n\nROMEO:\nThe exchange of thy "
    "love's faithful vow for mine. I gave thee mine before thou didst request it: and yet I would it were to give again"
)

#: settings of all kinds
GREEDY = {"temperature": 0.0}
TOP_K = {"temperature": 0.9, "top_k": 20, "seed": 3}
TOP_P = {"temperature": 1.1, "top_p": 0.9, "seed": 4}
PENALISED = {
    "temperature": 0.8,
    "seed": 5,
    "repetition_penalty": 1.2,
    "frequency_penalty": 0.3,
    "presence_penalty": 0.1,
}
RULED = {"seed": 6, "logit_bias": {5: 2.0}, "bad_words": [" the"], "min_tokens": 4, "allowed_token_ids": [*range(900)]}
KINDS = (GREEDY, TOP_K, TOP_P, PENALISED, RULED)


def prompt_ids(length, seed=0, vocab_size=1600):
    """A list of ``length`` token ids."""
    return torch.randint(0, vocab_size, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def tiny(name="gpt2rt/tiny-gpt2", **options):
    """An LLM with few blocks, which are made faster."""
    return LLM(name, **{"num_blocks": 256, "num_threads": 1, **options})


class Recorder:
    """A logits processor that changes nothing and keeps each row it sees."""

    def __init__(self):
        self.rows = []

    def __call__(self, output_ids, logits):
        self.rows.append(logits.clone())
        return logits


def said(output):
    """All that a caller learns of a finished request but names and times, to be compared bit for bit."""
    return {
        "prompt": list(output.prompt_token_ids),
        "prompt_logprobs": None if output.prompt_logprobs is None else [_entry(e) for e in output.prompt_logprobs],
        "choices": [
            {
                "index": choice.index,
                "token_ids": list(choice.token_ids),
                "text": choice.text,
                "finish_reason": choice.finish_reason,
                "stop_reason": choice.stop_reason,
                "cumulative_logprob": choice.cumulative_logprob,
                "logprobs": None if choice.logprobs is None else [_entry(e) for e in choice.logprobs],
            }
            for choice in sorted(output.outputs, key=lambda choice: choice.index)
        ],
    }


def _entry(entry):
    return None if entry is None else {token: dataclasses.astuple(logprob) for token, logprob in entry.items()}


def generate(llm, prompts, params, **options):
    """What ``llm.generate`` says, see :func:`said`; none of the requests failed."""
    outputs = llm.generate(prompts, params, **options)
    assert [output.error for output in outputs] == [None] * len(outputs)
    return [said(output) for output in outputs]


def collect(outputs):
    """The whole of a request from its deltas."""
    whole = None
    for output in outputs:
        if whole is None:
            whole = output
        else:
            whole.add(output, aggregate=True)
    return said(whole)


def start(llm, prompt, params, **options):
    """A request that is added and not run; its outputs are appended to ``request.outputs``."""
    outputs = []
    request = llm._request(prompt, params, outputs.append, options.get("priority", 0), options.get("cache_salt"))
    llm.core.add(request)
    request.outputs = outputs
    return request


def run(llm, *requests):
    """Step until these are finished."""
    with torch.inference_mode():
        while not all(request.finished for request in requests):
            llm.core.step()
    return [said(request.outputs[-1]) for request in requests]


@contextlib.contextmanager
def no_blocks(when):
    """Sequences find no block when ``when(sequence, num_tokens)`` says so, as in a pool that others have emptied."""
    append = Sequence.append

    def refuse(self, num_tokens):
        if when(self, num_tokens):
            raise OutOfBlocksError("no blocks, says the test")
        return append(self, num_tokens)

    Sequence.append = refuse
    try:
        yield
    finally:
        Sequence.append = append


def small_gpt2(kind=None, seed=0, **fields):
    """A random GPT-2 of any class whose every part shows in the results."""
    torch.manual_seed(seed)
    shape = {"vocab_size": 97, "n_positions": 64, "n_embd": 48, "n_layer": 2, "n_head": 3, "initializer_range": 0.3}
    model = (kind or GPT2LMHeadModel)(GPT2Config(**shape | fields)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:
                torch.nn.init.normal_(parameter, mean=1.0 if ".ln_" in name and "weight" in name else 0.0, std=0.1)
    return model
