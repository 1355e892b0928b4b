"""transformers on plain torch (measured with 5.23.0 and torch 2.13.0), also with bitsandbytes' NF4 weights.

NF4: ``pip install transformers bitsandbytes accelerate`` (measured with bitsandbytes 0.50.2); ``load_in_4bit`` with
bfloat16 arithmetic; the head stays bfloat16, as that library does.
"""

from __future__ import annotations

import os
import pathlib
import time

REQUIRES = {"transformers": "transformers", "torch": "torch"}
OPTION_REQUIRES = {"nf4": {"bitsandbytes": "bitsandbytes", "accelerate": "accelerate"}}


class Clock:
    """A streamer that only notes when it was handed something: first the prompt, then each step's tokens."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass


def timed_generate(model, prompts: list[list[int]], new_tokens: int) -> tuple[list[list[int]], list[float]]:
    """``model.generate``, greedy: tokens of each row, seconds from the start to each step's tokens.

    transformers' and gpt2rt's models take the same arguments.
    """
    import torch

    ids = torch.tensor(prompts)
    clock = Clock()
    with torch.no_grad():
        start = time.perf_counter()
        out = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=new_tokens, do_sample=False, streamer=clock
        )
    return out[:, ids.shape[1] :].tolist(), [moment - start for moment in clock.times[1:]]


def never_stop(model) -> None:
    """No end token: every run makes as many tokens as it was asked for."""
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0


class Runner:
    """A loaded model; ``generate`` answers (tokens of each row, seconds from the start to each token)."""

    def __init__(self, checkpoint: str, converted: pathlib.Path, options: dict) -> None:
        os.environ["TRANSFORMERS_VERBOSITY"] = "error"
        import torch
        from transformers import BitsAndBytesConfig, GPT2LMHeadModel

        torch.set_num_threads(options["threads"])
        load = {"dtype": getattr(torch, options["dtype"]), "attn_implementation": options["attention"]}
        if options.get("nf4"):
            load["quantization_config"] = BitsAndBytesConfig(
                load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=load["dtype"]
            )
            load["device_map"] = "cpu"
        self.model = GPT2LMHeadModel.from_pretrained(checkpoint, **load)
        never_stop(self.model)

    def generate(self, prompts: list[list[int]], new_tokens: int) -> tuple[list[list[int]], list[float]]:
        return timed_generate(self.model, prompts, new_tokens)
