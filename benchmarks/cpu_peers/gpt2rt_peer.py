"""gpt2rt itself, through ``GPT2LMHeadModel.generate`` with a streamer."""

from __future__ import annotations

import pathlib

from .transformers_peer import never_stop, timed_generate

REQUIRES = {"gpt2rt": "gpt2rt"}


def load_model(checkpoint: str, options: dict):
    """The model in ``options["dtype"]``, or quantised with the fields of a QuantizationConfig."""
    import torch

    from gpt2rt import GPT2LMHeadModel

    if "quantization" not in options:
        return GPT2LMHeadModel.from_pretrained(checkpoint, dtype=getattr(torch, options["dtype"]))
    from gpt2rt.quantization import QuantizationConfig

    config = QuantizationConfig(**options["quantization"])
    return GPT2LMHeadModel.from_pretrained(checkpoint, quantization=config)


class Runner:
    """A loaded model; ``generate`` answers (tokens of each row, seconds from the start to each token)."""

    def __init__(self, checkpoint: str, converted: pathlib.Path, options: dict) -> None:
        import torch

        torch.set_num_threads(options["threads"])
        self.model = load_model(checkpoint, options)
        never_stop(self.model)

    def generate(self, prompts: list[list[int]], new_tokens: int) -> tuple[list[list[int]], list[float]]:
        return timed_generate(self.model, prompts, new_tokens)
