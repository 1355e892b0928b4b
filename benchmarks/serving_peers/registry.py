"""Every program that is measured: its family, the peer of cpu_peers whose model files it reads, and its options."""

from __future__ import annotations

import dataclasses
import importlib
from types import ModuleType

from cpu_peers import PEERS


@dataclasses.dataclass(frozen=True)
class Server:
    """One row of the table.

    Attributes:
        family: module of this package.
        model: the peer of cpu_peers that converts the checkpoint for it; its options hold for this one too.
        options: passed to the family's ``Runner``, beside those of ``model``, ``threads`` and ``capacity``.
    """

    family: str
    model: str
    options: dict = dataclasses.field(default_factory=dict)

    @property
    def width(self) -> str:
        """Of the weights, the class it is compared in."""
        return PEERS[self.model].width

    @property
    def environment(self) -> str:
        """The family of cpu_peers whose interpreter it runs in, as --peer-python names it."""
        return PEERS[self.model].family


SERVERS = {
    # the engine from a program that waits for it, and from one that streams every request
    "gpt2rt-fp32": Server("gpt2rt_engine", "gpt2rt-fp32"),
    "gpt2rt-bf16": Server("gpt2rt_engine", "gpt2rt-bf16"),
    "gpt2rt-int8": Server("gpt2rt_engine", "gpt2rt-int8"),
    "gpt2rt-stream-fp32": Server("gpt2rt_engine", "gpt2rt-fp32", {"stream": True}),
    "gpt2rt-stream-bf16": Server("gpt2rt_engine", "gpt2rt-bf16", {"stream": True}),
    "gpt2rt-stream-int8": Server("gpt2rt_engine", "gpt2rt-int8", {"stream": True}),
    "hf-continuous-sdpa-fp32": Server("transformers_continuous", "hf-sdpa-fp32"),
    "hf-continuous-sdpa-bf16": Server("transformers_continuous", "hf-sdpa-bf16"),
    "hf-continuous-eager-fp32": Server("transformers_continuous", "hf-sdpa-fp32", {"attention": "paged|eager"}),
    "hf-continuous-eager-bf16": Server("transformers_continuous", "hf-sdpa-bf16", {"attention": "paged|eager"}),
    "hf-static-fp32": Server("transformers_static", "hf-sdpa-fp32"),
    "hf-static-bf16": Server("transformers_static", "hf-sdpa-bf16"),
    # everything in one batch; or sorted by length into a batch for each processor
    "ct2-fp32": Server("ctranslate2_batches", "ct2-fp32"),
    "ct2-int8": Server("ctranslate2_batches", "ct2-int8"),
    "ct2-sorted-fp32": Server("ctranslate2_batches", "ct2-fp32", {"workers": True}),
    "ct2-sorted-int8": Server("ctranslate2_batches", "ct2-int8", {"workers": True}),
    # the library with a loop of ours, and the project's own server, where --llama-server says where it is
    "lcpp-fp32": Server("llama_cpp_batch", "lcpp-f32"),
    "lcpp-bf16": Server("llama_cpp_batch", "lcpp-bf16"),
    "lcpp-q8_0": Server("llama_cpp_batch", "lcpp-q8_0"),
    "llama-server-fp32": Server("llama_server", "lcpp-f32"),
    "llama-server-bf16": Server("llama_server", "lcpp-bf16"),
    "llama-server-q8_0": Server("llama_server", "lcpp-q8_0"),
}


def family_module(server: Server) -> ModuleType:
    return importlib.import_module(f"{__package__}.{server.family}")
