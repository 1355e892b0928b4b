"""How fast does a GPT-2 decode on this CPU, beside transformers, and how far from what the memory allows?

    python benchmarks/cpu_decode.py                      # GPT-2 124M, all peers, 5 rounds
    python benchmarks/cpu_decode.py --shape tiny --rounds 1 --new-tokens 8

Every peer is a process of its own (so that peak memory is its own) which loads the same random checkpoint and calls
``model.generate`` with a streamer; the clock is read when the streamer is handed a token. The peers take turns, one
``generate`` each a round, in an order that rotates, and none computes while another is measured. Reported: time to
the first token, time between tokens, peak resident memory, and the share of the floor: bytes of weights that a token
must read, over the read bandwidth measured in the same run.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import pathlib
import resource
import subprocess
import sys
import tempfile
import time

SHAPES = {
    "124M": dict(n_layer=12, n_embd=768, n_head=12, vocab_size=50257, n_positions=1024),
    "355M": dict(n_layer=24, n_embd=1024, n_head=16, vocab_size=50257, n_positions=1024),
    "overhead": dict(n_layer=12, n_embd=32, n_head=2, vocab_size=97, n_positions=1024, bos_token_id=0, eos_token_id=0),
    "tiny": dict(n_layer=2, n_embd=64, n_head=2, vocab_size=97, n_positions=256, bos_token_id=0, eos_token_id=0),
}
PEERS = {
    "gpt2rt-fp32": ("gpt2rt", "float32", None),
    "gpt2rt-bf16": ("gpt2rt", "bfloat16", None),
    "hf-eager-fp32": ("transformers", "float32", "eager"),
    "hf-sdpa-fp32": ("transformers", "float32", "sdpa"),
    "hf-sdpa-bf16": ("transformers", "bfloat16", "sdpa"),
}


class Clock:
    """A streamer that only notes when it was handed something: first the prompt, then each token."""

    def __init__(self):
        self.times = []

    def put(self, value):
        self.times.append(time.perf_counter())

    def end(self):
        pass


def peak_megabytes() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6


def worker(peer: str, checkpoint: str, threads: int) -> None:
    """Load once, then answer each line of standard input with the times of one ``generate``."""
    import torch

    torch.set_num_threads(threads)
    library, dtype, attention = PEERS[peer]
    start = time.perf_counter()
    options = {"dtype": getattr(torch, dtype)}
    if library == "gpt2rt":
        from gpt2rt import GPT2LMHeadModel
    else:
        os.environ["TRANSFORMERS_VERBOSITY"] = "error"
        from transformers import GPT2LMHeadModel

        options["attn_implementation"] = attention
    model = GPT2LMHeadModel.from_pretrained(checkpoint, **options)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    load_s = time.perf_counter() - start
    print(json.dumps({"load_s": load_s}), flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        ids = torch.tensor([request["prompt"]])
        clock = Clock()
        with torch.no_grad():
            start = time.perf_counter()
            out = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=request["new_tokens"],
                do_sample=False,
                streamer=clock,
            )
        times = clock.times[1:]  # the first put is the prompt
        answer = {
            "ttft_ms": (times[0] - start) * 1e3,
            "itl_ms": [(b - a) * 1e3 for a, b in itertools.pairwise(times)],
            "tokens": out[0, ids.shape[1] :].tolist(),
            "peak_megabytes": peak_megabytes(),
        }
        print(json.dumps(answer), flush=True)


class Peer:
    """One worker process."""

    def __init__(self, name: str, checkpoint: str, threads: int):
        self.name = name
        command = [sys.executable, __file__, "--worker", name, "--checkpoint", checkpoint, "--threads", str(threads)]
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        self.load_s = self._read()["load_s"]
        self.ttft: list[float] = []
        self.itl: list[float] = []
        self.tokens: list[int] = []
        self.peak = 0.0

    def _read(self) -> dict:
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"{self.name} died with exit code {self.process.wait()}; see its message above")
        return json.loads(line)

    def run(self, prompt: list[int], new_tokens: int, keep: bool) -> None:
        self.process.stdin.write(json.dumps({"prompt": prompt, "new_tokens": new_tokens}) + "\n")
        self.process.stdin.flush()
        answer = self._read()
        self.peak, self.tokens = answer["peak_megabytes"], answer["tokens"]
        if keep:
            self.ttft.append(answer["ttft_ms"])
            self.itl += answer["itl_ms"]

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()


def read_bandwidth(num_bytes: int, threads: int) -> float:
    """Bytes a second of reading a buffer of this size once, the best of several ``torch.sum``."""
    import torch

    torch.set_num_threads(threads)
    buffer = torch.ones(max(num_bytes // 4, 1 << 20), dtype=torch.float32)
    best = 0.0
    for _ in range(7):
        start = time.perf_counter()
        buffer.sum()
        best = max(best, buffer.numel() * 4 / (time.perf_counter() - start))
    return best


def weight_count(shape: dict) -> int:
    """Matrix weights that one token reads: the layers' four matrices and the head."""
    return 12 * shape["n_layer"] * shape["n_embd"] ** 2 + shape["vocab_size"] * shape["n_embd"]


def random_checkpoint(shape: dict, folder: str) -> None:
    import torch

    from gpt2rt import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    GPT2LMHeadModel(GPT2Config(**shape)).save_pretrained(folder)


def measure(arguments: argparse.Namespace) -> dict:
    from common import describe, summary

    shape = SHAPES[arguments.shape]
    names = arguments.peers.split(",") if arguments.peers else list(PEERS)
    with tempfile.TemporaryDirectory() as folder:
        random_checkpoint(shape, folder)
        peers = [Peer(name, folder, arguments.threads) for name in names]
    prompt = [(7919 * i + 13) % shape["vocab_size"] for i in range(arguments.prompt_tokens)]
    for round_number in range(arguments.rounds + 1):  # round 0 warms up
        turn = round_number % len(peers)
        for peer in peers[turn:] + peers[:turn]:
            peer.run(prompt, arguments.new_tokens, keep=round_number > 0)
    for peer in peers:
        peer.close()
    weights = weight_count(shape)
    result = {"machine": describe(), "arguments": vars(arguments), "shape": shape, "peers": {}}
    for peer in peers:
        size = 2 if peer.name.endswith("bf16") else 4
        bandwidth = read_bandwidth(weights * size, arguments.threads)
        itl = summary(peer.itl)
        result["peers"][peer.name] = {
            "ttft_ms": summary(peer.ttft),
            "itl_ms": itl,
            "tokens_per_s": 1e3 / itl["median"],
            "peak_megabytes": peer.peak,
            "load_s": peer.load_s,
            "bandwidth_gb_per_s": bandwidth / 1e9,
            "floor_ms": weights * size / bandwidth * 1e3,
            "tokens": peer.tokens,
        }
    return result


def report(result: dict) -> None:
    peers = result["peers"]
    base = next((name for name in ("hf-sdpa-fp32", "hf-eager-fp32") if name in peers), next(iter(peers)))
    print(
        f"\n{result['arguments']['shape']}, {result['arguments']['threads']} threads, "
        f"{result['machine']['cpu']}, {result['machine']['isa']}; ratio = tokens/s over {base}\n"
    )
    print(
        f"{'peer':16s} {'tok/s':>8s} {'ratio':>6s} {'itl p10/p50 ms':>17s} {'x floor':>8s} {'ttft ms':>8s} "
        f"{'peak MB':>8s} {'load s':>7s} {'same':>7s}"
    )
    for name, row in peers.items():
        same = next(
            (i for i, (a, b) in enumerate(zip(row["tokens"], peers[base]["tokens"], strict=True)) if a != b),
            len(row["tokens"]),
        )
        print(
            f"{name:16s} {row['tokens_per_s']:8.1f} {row['tokens_per_s'] / peers[base]['tokens_per_s']:6.2f} "
            f"{row['itl_ms']['p10']:8.2f}/{row['itl_ms']['median']:8.2f} {row['itl_ms']['p10'] / row['floor_ms']:8.2f} "
            f"{row['ttft_ms']['median']:8.1f} {row['peak_megabytes']:8.0f} {row['load_s']:7.2f} "
            f"{same:3d}/{len(row['tokens']):3d}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="124M")
    parser.add_argument("--peers", default="", help=f"comma-separated; all: {','.join(PEERS)}")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument("--new-tokens", type=int, default=65)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--output-json", type=pathlib.Path)
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--checkpoint", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        worker(arguments.worker, arguments.checkpoint, arguments.threads)
        return
    from common import write_json

    output = arguments.output_json
    arguments.output_json = str(output) if output else None
    result = measure(arguments)
    report(result)
    if output:
        write_json(output, result)
        print(f"\nwritten to {output}")


if __name__ == "__main__":
    main()
