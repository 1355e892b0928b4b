"""How long from the start of a process to its first token?

    python benchmarks/cpu_start.py                       # embedded model, 124M in every format, transformers
    python benchmarks/cpu_start.py --shape tiny --runs 1 --formats fp32

Each run is a fresh Python process; the clock runs in this one, from before it is started until the first token comes
out of ``generate`` (prompt of 64 tokens) and down its pipe. Files are in the page cache. ``import torch`` alone is
measured too, since no program on torch can be faster, and taken off: the column "beyond" is the median less the median
of that. gpt2rt keeps packed weights between processes: a first start finds an empty cache folder, a second start what
the first one wrote. Quantised formats are checkpoints that were quantised and saved before. The variants take turns.
"""

from __future__ import annotations

import argparse
import os
import pathlib
import shutil
import statistics
import subprocess
import sys
import tempfile
import time

from common import describe, summary, write_json
from cpu_peers import PEERS
from cpu_peers.gpt2rt_peer import load_model
from shapes import SHAPES, random_checkpoint

EMBEDDED = "gpt2rt/tiny-gpt2"
FORMATS = ("fp32", "bf16", "int8", "int4", "nf4")
# what a fresh process runs: it says "first token" as soon as the streamer has it
GENERATE = """
import sys
class Streamer:
    puts = 0
    def put(self, value):
        self.puts += 1
        if self.puts == 2:
            print("first token", flush=True)
    def end(self):
        pass
import torch
from {library} import GPT2LMHeadModel
torch.set_num_threads({threads})
model = GPT2LMHeadModel.from_pretrained({checkpoint!r}, dtype={dtype})
ids = torch.tensor([[(7919 * i + 13) % model.config.vocab_size for i in range(64)]])
model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=2, do_sample=False, streamer=Streamer())
"""
IMPORT_TORCH = "import torch; print('first token', flush=True)"


class Variant:
    """A program to start; ``cache`` is gpt2rt's cache folder, emptied before each start where ``first`` is set."""

    def __init__(self, name: str, code: str, *, cache: pathlib.Path | None = None, first: bool = False) -> None:
        self.name, self.code, self.cache, self.first = name, code, cache, first
        self.seconds: list[float] = []

    def run(self, *, keep: bool) -> None:
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
        if self.cache is not None:
            if self.first:
                shutil.rmtree(self.cache, ignore_errors=True)
            environment["GPT2RT_CACHE"] = str(self.cache)
        start = time.perf_counter()
        process = subprocess.Popen(
            [sys.executable, "-c", self.code],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
        )
        assert process.stdout is not None
        line = process.stdout.readline()
        seconds = time.perf_counter() - start
        _, errors = process.communicate()
        if line.strip() != "first token" or process.returncode:
            raise SystemExit(f"{self.name} ended with exit code {process.returncode}:\n{errors}")
        if keep:
            self.seconds.append(seconds)


def checkpoint_of(form: str, plain: str, folder: pathlib.Path) -> tuple[str, str]:
    """(folder, dtype as code) to load a format from: the float32 checkpoint, or a quantised one made of it."""
    options = PEERS[f"gpt2rt-{form}"].options
    if "quantization" not in options:
        return plain, f"torch.{options['dtype']}"
    target = folder / f"checkpoint-{form}"
    load_model(plain, options).save_pretrained(target)
    return str(target), "None"


def variants(arguments: argparse.Namespace, folder: pathlib.Path) -> list[Variant]:
    def program(library: str, checkpoint: str, dtype: str) -> str:
        return GENERATE.format(library=library, checkpoint=checkpoint, dtype=dtype, threads=arguments.threads)

    plain = str(folder / "checkpoint")
    random_checkpoint(SHAPES[arguments.shape], plain)
    found = [
        Variant("import torch", IMPORT_TORCH),
        Variant("gpt2rt, embedded model", program("gpt2rt", EMBEDDED, "None"), cache=folder / "cache-embedded"),
        Variant("transformers, fp32", program("transformers", plain, "torch.float32")),
    ]
    for form in arguments.formats.split(","):
        code = program("gpt2rt", *checkpoint_of(form, plain, folder))
        # the second start follows the first in each round, so it finds its file
        for what in ("first", "second"):
            name = f"gpt2rt, {arguments.shape} {form}, {what} start"
            found.append(Variant(name, code, cache=folder / f"cache-{form}", first=what == "first"))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="124M")
    parser.add_argument("--formats", default=",".join(FORMATS))
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--output-json", type=pathlib.Path)
    arguments = parser.parse_args()
    unknown = set(arguments.formats.split(",")) - set(FORMATS)
    if unknown:
        parser.error(f"--formats {','.join(sorted(unknown))}: there are {', '.join(FORMATS)}")
    with tempfile.TemporaryDirectory() as folder:
        started = variants(arguments, pathlib.Path(folder))
        for number in range(arguments.runs + 1):  # round 0 fills the page cache
            for variant in started:
                variant.run(keep=number > 0)
    base = statistics.median(started[0].seconds)
    print("\n| process start to first token | s | beyond `import torch`, s |\n| --- | --- | --- |")
    for variant in started:
        median = statistics.median(variant.seconds)
        print(f"| {variant.name} | {median:.2f} | {median - base:.2f} |")
    if arguments.output_json:
        rows = {variant.name: summary(variant.seconds) for variant in started}
        options = {"shape": arguments.shape, "runs": arguments.runs, "threads": arguments.threads}
        write_json(arguments.output_json, {"machine": describe(), "arguments": options, "seconds": rows})


if __name__ == "__main__":
    main()
