"""How long from the command ``gpt2rt serve`` to the first request that it has answered?

    python benchmarks/serve_start.py                      # embedded model, and 124M in float32, bfloat16 and int8
    python benchmarks/serve_start.py --shape tiny --runs 1 --formats fp32

Each run starts the command in a fresh process, on a free port. The clock runs in this one, from before the process is
started until the whole answer to ``POST /v1/completions`` (16 tokens of text in, 1 out) is there; connections that are
refused are tried again every 2 ms. Files are in the page cache. gpt2rt keeps packed weights between processes: a first
start finds an empty cache folder, a second start what the first one wrote. The 124M checkpoint has random weights and a
made-up tokenizer of GPT-2's size; int8 is a checkpoint that was quantised and saved before. ``import torch`` and
``import fastapi, uvicorn`` alone are measured too, since no server on them can be faster. The variants take turns.
"""

from __future__ import annotations

import argparse
import http.client
import itertools
import json
import os
import pathlib
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from typing import Any

from common import describe, summary, write_json
from cpu_start import EMBEDDED, checkpoint_of
from shapes import SHAPES, random_checkpoint

FORMATS = ("fp32", "bf16", "int8")
PROMPT = "the quick brown fox jumps over"
PATIENCE_S = 120.0
RETRY_S = 0.002
IMPORTS = {"import torch": "import torch", "import torch, fastapi, uvicorn": "import torch, fastapi, uvicorn"}


def save_tokenizer(folder: str, vocab_size: int) -> None:
    """A byte-level tokenizer of this size: a token for each byte, then pairs of bytes, and ``<|endoftext|>``."""
    from gpt2rt import GPT2Tokenizer
    from gpt2rt.tokenizers.bytelevel import byte_to_char

    letters = list(byte_to_char().values())
    tokens = letters[: vocab_size - 1]
    pairs = itertools.product(letters, repeat=2)
    merges = [next(pairs) for _ in range(vocab_size - 1 - len(tokens))]
    vocab = {token: number for number, token in enumerate([*tokens, *("".join(pair) for pair in merges)])}
    vocab["<|endoftext|>"] = len(vocab)
    tokenizer = GPT2Tokenizer(vocab, merges, eos_token="<|endoftext|>", model_max_length=1024)
    tokenizer.save_pretrained(folder)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def ask(port: int, prompt: str) -> dict[str, Any] | None:
    """The answer to one request; None if nobody listens yet.

    Raises:
        RuntimeError: it is no success.
    """
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=PATIENCE_S)
    try:
        body = json.dumps({"prompt": prompt, "max_tokens": 1, "temperature": 0.0})
        connection.request("POST", "/v1/completions", body, {"Content-Type": "application/json"})
        answer = connection.getresponse()
        content = answer.read()
    except OSError:
        return None
    finally:
        connection.close()
    if answer.status != 200:
        raise RuntimeError(f"the server answered {answer.status}: {content[:500]!r}")
    return json.loads(content)


class Server:
    """``gpt2rt serve`` of one model; ``cache`` is gpt2rt's cache folder, emptied first where ``first`` is set."""

    def __init__(self, name: str, options: list[str], cache: pathlib.Path, *, first: bool = False) -> None:
        self.name, self.options, self.cache, self.first = name, options, cache, first
        self.seconds: list[float] = []

    def run(self, *, keep: bool) -> dict[str, Any]:
        """Start it, ask once, end it.

        Raises:
            SystemExit: it ended, or did not answer in time.
        """
        if self.first:
            shutil.rmtree(self.cache, ignore_errors=True)
        port = free_port()
        command = [sys.executable, "-m", "gpt2rt.cli", "serve", *self.options, "--port", str(port)]
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "GPT2RT_CACHE": str(self.cache)}
        with tempfile.TemporaryFile("w+") as log:
            start = time.perf_counter()
            process = subprocess.Popen(command, stdout=log, stderr=log, env=environment)
            try:
                while (answer := ask(port, PROMPT)) is None:
                    if process.poll() is not None or time.perf_counter() - start > PATIENCE_S:
                        log.seek(0)
                        raise SystemExit(f"{self.name} did not answer (exit code {process.returncode}):\n{log.read()}")
                    time.sleep(RETRY_S)
                seconds = time.perf_counter() - start
            finally:
                process.terminate()
                process.wait()
        if keep:
            self.seconds.append(seconds)
        return answer


class Import:
    """A process that only imports."""

    def __init__(self, name: str, code: str) -> None:
        self.name, self.code = name, code
        self.seconds: list[float] = []

    def run(self, *, keep: bool) -> None:
        start = time.perf_counter()
        subprocess.run([sys.executable, "-c", self.code], check=True)
        if keep:
            self.seconds.append(time.perf_counter() - start)


def variants(arguments: argparse.Namespace, folder: pathlib.Path) -> list[Server | Import]:
    found: list[Server | Import] = [Import(name, code) for name, code in IMPORTS.items()]
    common = ["--num-threads", str(arguments.threads)]
    found.append(Server("gpt2rt serve, embedded model", [EMBEDDED, *common], folder / "cache-embedded"))
    plain = str(folder / "checkpoint")
    random_checkpoint(SHAPES[arguments.shape], plain)
    for form in arguments.formats.split(","):
        path, dtype = checkpoint_of(form, plain, folder)
        save_tokenizer(path, SHAPES[arguments.shape]["vocab_size"])
        options = [path, *common] + ([] if dtype == "None" else ["--dtype", dtype.removeprefix("torch.")])
        for what in ("first", "second"):
            # the second start follows the first in each round, so it finds its file
            name = f"gpt2rt serve, {arguments.shape} {form}, {what} start"
            found.append(Server(name, options, folder / f"cache-{form}", first=what == "first"))
    return found


def main(texts: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="124M")
    parser.add_argument("--formats", default=",".join(FORMATS))
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--output-json", type=pathlib.Path)
    arguments = parser.parse_args(texts)
    unknown = set(arguments.formats.split(",")) - set(FORMATS)
    if unknown:
        parser.error(f"--formats {','.join(sorted(unknown))}: there are {', '.join(FORMATS)}")
    with tempfile.TemporaryDirectory() as folder:
        started = variants(arguments, pathlib.Path(folder))
        for number in range(arguments.runs + 1):  # round 0 fills the page cache
            for variant in started:
                variant.run(keep=number > 0)
    print("\n| process start to | s, median | most |\n| --- | --- | --- |")
    for variant in started:
        print(f"| {variant.name} | {statistics.median(variant.seconds):.2f} | {max(variant.seconds):.2f} |")
    if arguments.output_json:
        rows = {variant.name: summary(variant.seconds) for variant in started}
        options = {"shape": arguments.shape, "runs": arguments.runs, "threads": arguments.threads}
        write_json(arguments.output_json, {"machine": describe(), "arguments": options, "seconds": rows})


if __name__ == "__main__":
    main()
