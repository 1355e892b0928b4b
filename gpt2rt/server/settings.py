"""Everything that can be set about the server and the engine behind it, with finite defaults.

Each field is a flag of ``gpt2rt serve``, ``max_body_bytes`` is ``--max-body-bytes``, and an environment variable,
``GPT2RT_MAX_BODY_BYTES``; the flag goes before the variable. Imports the standard library only, so that ``--help`` is
quick.
"""

from __future__ import annotations

import dataclasses
import ipaddress
import math
from typing import Any


def option(default: Any, help: str, **metadata: Any) -> Any:
    """A field with the sentence that ``--help`` shows for it."""
    return dataclasses.field(default=default, metadata={"help": help, **metadata})


@dataclasses.dataclass(frozen=True, kw_only=True)
class ServerSettings:
    """Where the server listens, who may use it, and the most that anybody may ask of it. Times are seconds.

    Raises:
        ValueError: a value is out of range, or two do not go together.
    """

    host: str = option("127.0.0.1", "Address to listen on.")
    port: int = option(8000, "Port to listen on; 0 takes a free one.")
    uds: str | None = option(None, "Path of a Unix socket to listen on instead.")
    api_key: tuple[str, ...] = option((), "A key that clients must send as 'Authorization: Bearer KEY'; repeatable.")
    insecure: bool = option(False, "Listen on other addresses than loopback without an API key.")
    served_model_name: tuple[str, ...] = option(
        (), "The name of the model in the API; repeatable.", show_default="its own; of a folder, the folder's"
    )
    root_path: str = option("", "Prefix of all paths, where a proxy in front takes it away.")
    ssl_keyfile: str | None = option(None, "TLS: file of the private key.")
    ssl_certfile: str | None = option(None, "TLS: file of the certificate.")
    ssl_ca_certs: str | None = option(None, "TLS: file of the certificates that must have signed those of clients.")
    allowed_origins: tuple[str, ...] = option(
        (), "An origin whose pages may use the server (CORS), or *; repeatable.", show_default="none"
    )
    chat_template: str | None = option(
        None, "A file of Jinja text, or the text itself, for /v1/chat/completions.", show_default="the tokenizer's"
    )
    split_special_tokens: bool = option(False, "Read '<|endoftext|>' in prompts as plain text, not as the token.")
    enable_prompt_tokens_details: bool = option(False, "Report in 'usage' how many prompt tokens came from the cache.")
    disable_uvicorn_access_log: bool = option(False, "Do not log requests.")

    max_body_bytes: int = option(2 * 2**20, "Bytes of a request body; more is answered with 413.")
    max_header_bytes: int = option(2**16, "Bytes of a request's headers; more is answered with 431.")
    max_headers: int = option(128, "Headers of a request; more are answered with 431.")
    max_connections: int = option(1024, "Open connections; for a further one the longest idle one is closed.")
    max_text_bytes: int = option(2**18, "Bytes of a text that is tokenised; a longer one is answered with 400.")
    max_in_flight: int | None = option(
        None, "Requests in work; more are answered with 503.", show_default="--max-num-seqs + --max-num-queued-reqs"
    )
    max_prompts: int = option(128, "Prompts of a request.")
    max_choices: int = option(256, "Prompts of a request times n.")
    max_answer_logprobs: int = option(2**19, "Log-probabilities in an answer, of all its tokens together.")
    keep_alive_timeout: float = option(5.0, "Seconds that a connection may be idle, or take to send its headers.")
    body_timeout: float = option(30.0, "Seconds that a request body may take to arrive; then 408.")
    request_timeout: float = option(600.0, "Seconds that a request may take in all.")
    ping_interval: float = option(15.0, "Seconds of silence after which a stream gets a comment, to stay open.")
    stall_timeout: float = option(30.0, "Seconds that a stream's reader may take nothing before it is cut.")
    template_timeout: float = option(1.0, "Seconds that writing out a chat by its template may take.")
    shutdown_timeout: float = option(
        30.0, "Seconds that running requests get after SIGTERM or SIGINT; then they end with finish_reason 'abort'."
    )

    def __post_init__(self) -> None:
        for name in (field.name for field in dataclasses.fields(self) if field.name.startswith("max_")):
            value = getattr(self, name)
            if value is None and name == "max_in_flight":
                continue
            if type(value) is not int or value < 1:
                raise ValueError(f"{name} must be an integer of at least 1, got {value!r}")
        for field in dataclasses.fields(self):
            if field.name.endswith(("_timeout", "_interval")):
                value = getattr(self, field.name)
                least = 0.0 if field.name == "shutdown_timeout" else 0.001
                if isinstance(value, bool) or not isinstance(value, int | float) or not least <= value < math.inf:
                    raise ValueError(f"{field.name} must be a number of seconds of at least {least:g}, got {value!r}")
        if type(self.port) is not int or not 0 <= self.port <= 65535:
            raise ValueError(f"port must lie in [0, 65535], got {self.port!r}")
        if any(not key or not key.isascii() or not key.isprintable() or " " in key for key in self.api_key):
            # the key itself is not shown
            raise ValueError("api_key must be printable ASCII text without spaces, of at least one character")
        if (self.ssl_keyfile is None) != (self.ssl_certfile is None):
            raise ValueError("ssl_keyfile and ssl_certfile go together; pass both or neither")
        if self.ssl_ca_certs is not None and self.ssl_certfile is None:
            raise ValueError("ssl_ca_certs checks certificates of clients, which needs TLS; pass ssl_certfile too")
        if self.root_path and not (self.root_path.startswith("/") and not self.root_path.endswith("/")):
            raise ValueError(f"root_path must look like '/prefix', got {self.root_path!r}")
        if not (self.api_key or self.insecure or self.uds is not None or is_loopback(self.host)):
            raise ValueError(
                f"host {self.host} can be reached from other machines, and there is no API key; pass --api-key, or "
                "--insecure if anybody who reaches it may use it"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class EngineSettings:
    """The model and how the engine runs it; the words are those of ``gpt2rt.engine.EngineConfig``."""

    tokenizer: str | None = option(None, "Where to read the tokenizer.", show_default="the model's own")
    revision: str = option("main", "Branch, tag or commit of a hub model.")
    subfolder: str = option("", "Folder inside the checkpoint.")
    local_files_only: bool = option(False, "Never download.")
    dtype: str | None = option(
        None, "float32, bfloat16, float16 or auto.", show_default="as stored; float16 as float32 on a CPU"
    )
    quantization: str | None = option(
        None, "Quantise float weights as they are read: int8, int4, nf4 or fp4.", show_default="as stored"
    )
    task: str | None = option(
        None, "generate, embed, classify or token_classify.", show_default="what the checkpoint is made for"
    )
    device: str = option("cpu", "Where to run: cpu, cuda, cuda:1, ...; also -1 (CPU) or n (cuda:n).")
    executor: str | None = option(None, "cpu, cuda or eager.", show_default="the fastest")
    num_threads: int = option(0, "Threads of the CPU executor; 0 is torch's choice.")
    max_model_len: int | None = option(None, "Tokens of prompt and output.", show_default="the model's positions")
    max_num_seqs: int = option(64, "Sequences that are computed side by side.")
    max_num_batched_tokens: int | None = option(None, "Tokens of a step.", show_default="512")
    num_blocks: int | None = option(None, "Blocks of the KV cache.", show_default="as many as its memory holds")
    kv_cache_memory_bytes: int | None = option(
        None, "Memory of the KV cache.", show_default="--max-num-seqs requests of full length"
    )
    gpu_memory_utilization: float = option(0.9, "Share of a GPU's memory for weights, steps and KV cache.")
    kv_cache_dtype: str = option("auto", "auto, float32, bfloat16, float16, int8 or float8.")
    enable_prefix_caching: bool = option(
        True, "Keep the KV blocks of prompts for others that begin alike.", negative=True
    )
    max_num_queued_reqs: int = option(256, "Requests that may wait; more are answered with 503. 0: none waits.")
    max_num_queued_tokens: int | None = option(
        None, "Prompt tokens that may wait; more are answered with 503.", show_default="64 times the context"
    )
    prefill_slowdown: float | None = option(
        None,
        "Compute prompts in chunks so small that others' steps take about this many times as long.",
        show_default="whole chunks",
    )
    seed: int | None = option(None, "Seed of requests without one.", show_default="random")
    max_n: int = option(16, "The most continuations of a prompt.")
    max_logprobs: int = option(20, "The most log-probabilities of a token; at most 128.")


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches an address."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False
