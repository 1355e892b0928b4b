"""How fast are the matrix products of a CPU step, format by format, and how far from memory and instructions?

    python benchmarks/cpu_gemm.py                                     # the five products of GPT-2 124M
    python benchmarks/cpu_gemm.py --formats int8,int4-g32 --shapes fc --rows 1,8 --json result.json

Each product is ``gpt2rt.ops.packed_linear``, which runs what ``cpu_step`` runs, activations prepared in the call. It
cycles through copies of its weight (``--megabytes`` in all, on 2 MiB pages), so that a weight has left the caches when
its turn comes again, as a model's layers do. Reported for each: the median and the best time, bytes of weights a second
and their share of the read bandwidth measured in the same run, multiply-adds a second and their share of what the
instruction gives in registers (instruction_peak.cpp, built and run here where there is a compiler).
"""

from __future__ import annotations

import argparse
import json
import pathlib
import subprocess
import sys
import tempfile
import time

import torch
from bandwidth import read_bandwidth
from common import describe, summary, write_json

from gpt2rt import ops
from gpt2rt.ops.arena import allocate_arena

# name -> (in_features, out_features)
SHAPES = {"qkv": (768, 2304), "proj": (768, 768), "fc": (768, 3072), "down": (3072, 768), "head": (768, 50257)}
ROWS = (1, 2, 4, 8, 16, 64, 512)
DENSE = {"float32": torch.float32, "bfloat16": torch.bfloat16}
#: name -> (format of the kernels, group size, zero points)
QUANTIZED = {
    "int8": ("int8", 0, False),
    "int4-g32": ("int4", 32, False),
    "int4-g64": ("int4", 64, False),
    "int4-g128": ("int4", 128, False),
    "int4-g64-zeros": ("int4", 64, True),
    "nf4": ("code4", 64, False),
    "fp4": ("code4", 64, False),
}


class Weight:
    """Copies of one packed random weight [out_features, in_features]."""

    def __init__(self, name: str, in_features: int, out_features: int, megabytes: float) -> None:
        self.out_features = out_features
        generator = torch.Generator().manual_seed(0)
        if name in DENSE:
            weight = torch.randn(out_features, in_features, generator=generator).to(DENSE[name])
            self.options = {"weight_format": name}
            self.num_bytes = ops.packed_linear_bytes(out_features, in_features, weight.dtype)
        else:
            kind, group, zeros = QUANTIZED[name]
            self.options = {"weight_format": kind, "group_size": group, "has_zeros": zeros}
            if kind == "code4":
                # any 16 values: the time does not depend on them
                self.options["codebook"] = torch.linspace(-1.0, 1.0, 16)
            self.num_bytes = ops.packed_quantized_bytes(
                out_features,
                in_features,
                bits=8 if kind == "int8" else 4,
                group_size=group,
                has_zeros=zeros,
                has_codebook=kind == "code4",
            )
        # every copy begins at a multiple of 64 bytes, as the kernels want it
        count = max(1, round(megabytes * 1e6 / self.num_bytes))
        arena = allocate_arena(count * self.num_bytes)
        self.copies = list(arena.view(count, self.num_bytes))
        if name in DENSE:
            ops.pack_linear(weight, self.copies[0])
        else:
            self._pack_random(kind, in_features, group, zeros, generator)
        for copy in self.copies[1:]:
            copy.copy_(self.copies[0])

    def _pack_random(self, kind: str, k: int, group: int, zeros: bool, generator: torch.Generator) -> None:
        n = self.out_features
        if kind == "int8":
            codes = torch.randint(-127, 128, (n, k), dtype=torch.int8, generator=generator)
            scales, points = torch.full((n,), 0.01), None
        else:
            codes = torch.randint(0, 256, (n, -(-k // 2)), dtype=torch.uint8, generator=generator)
            scales = torch.full((n, -(-k // group)), 0.01, dtype=torch.float32 if kind == "code4" else torch.float16)
            points = torch.full(scales.shape, 7, dtype=torch.uint8) if zeros else None
        codebook = self.options.get("codebook")
        ops.pack_quantized(codes, scales, points, codebook, self.copies[0], in_features=k, group_size=group)


def time_product(weight: Weight, x: torch.Tensor, fast: bool, threads: int, seconds: float) -> list[float]:
    """Seconds of single calls, over the copies in turn, for about ``seconds``."""
    # rows of the result are no multiple of 4 KiB apart, as in a step's workspace
    out = torch.empty(x.size(0), weight.out_features + 16)[:, : weight.out_features]
    options = {"out_features": weight.out_features, "fast": fast, "num_threads": threads, "out": out}
    times: list[float] = []
    end = time.perf_counter() + seconds
    # at least one round that only warms up and one that counts
    while len(times) < 2 * len(weight.copies) or time.perf_counter() < end:
        for packed in weight.copies:
            start = time.perf_counter()
            ops.packed_linear(x, packed, **weight.options, **options)
            times.append(time.perf_counter() - start)
    return times[len(weight.copies) :]


def instruction_peaks(threads: int) -> dict[str, float]:
    """Multiply-adds a second in registers, by operand; empty without a compiler."""
    source = pathlib.Path(__file__).resolve().with_name("instruction_peak.cpp")
    with tempfile.TemporaryDirectory() as folder:
        program = str(pathlib.Path(folder) / "peak")
        build = ["c++", "-O3", "-std=c++20", "-march=native", "-pthread", str(source), "-o", program]
        try:
            subprocess.run(build, check=True, capture_output=True, text=True)
            done = subprocess.run([program, str(threads)], check=True, capture_output=True, text=True)
        except (OSError, subprocess.CalledProcessError) as error:
            print(f"no share of the instruction peak: {getattr(error, 'stderr', '') or error}", file=sys.stderr)
            return {}
    return json.loads(done.stdout)


def instruction(name: str, fast: bool) -> str:
    """The operands that this arithmetic multiplies, as instruction_peaks names them."""
    kind = name if name in DENSE else QUANTIZED[name][0]
    if fast and kind in ("int8", "int4"):
        return "int8"
    return "bfloat16" if fast and kind == "bfloat16" and ops.cpu_isa() in ("avx512_bf16", "amx") else "float32"


def chosen(text: str, known: list[str], what: str) -> list[str]:
    names = text.split(",")
    for name in names:
        if name not in known:
            raise SystemExit(f"cpu_gemm.py: {what} {name!r} is none of {', '.join(known)}")
    return names


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", default=",".join(SHAPES))
    parser.add_argument("--formats", default=",".join([*DENSE, *QUANTIZED]))
    parser.add_argument("--rows", default=",".join(map(str, ROWS)))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--megabytes", type=float, default=130.0, help="of copies of each weight; more than the caches")
    parser.add_argument("--seconds", type=float, default=0.3, help="for each product")
    parser.add_argument("--json", type=pathlib.Path, help="where the result is written")
    arguments = parser.parse_args()
    formats = chosen(arguments.formats, [*DENSE, *QUANTIZED], "format")
    shapes = chosen(arguments.shapes, list(SHAPES), "shape")
    rows = [int(row) for row in arguments.rows.split(",")]

    peaks = instruction_peaks(arguments.threads)
    results = []
    print("format          mode   shape  rows        us       GB/s  of read   Gmac/s  of peak")
    for shape in shapes:
        k, n = SHAPES[shape]
        for name in formats:
            weight = Weight(name, k, n, arguments.megabytes)
            read = summary(read_bandwidth(len(weight.copies) * weight.num_bytes, arguments.threads))["median"]
            # 4-bit codebooks and float32 have one arithmetic
            both = name != "float32" and "codebook" not in weight.options
            for fast in (True, False) if both else (False,):
                peak = peaks.get(instruction(name, fast))
                for m in rows:
                    x = torch.randn(m, k)
                    times = time_product(weight, x, fast, arguments.threads, arguments.seconds)
                    median = summary(times)["median"]
                    rate, macs = weight.num_bytes / median, m * n * k / median
                    results.append(
                        {
                            "format": name,
                            "fast": fast,
                            "shape": shape,
                            "rows": m,
                            "seconds": {**summary(times), "best": min(times)},
                            "weight_bytes": weight.num_bytes,
                            "bytes_per_s": rate,
                            "read_bytes_per_s": read,
                            "multiply_adds_per_s": macs,
                            "peak_multiply_adds_per_s": peak,
                        }
                    )
                    share = f"{100 * macs / peak:6.0f} %" if peak else "       -"
                    print(
                        f"{name:15} {'fast' if fast else 'exact':6} {shape:5} {m:5} {median * 1e6:9.1f}"
                        f" {rate / 1e9:10.1f} {100 * rate / read:6.0f} % {macs / 1e9:8.1f} {share}",
                        flush=True,
                    )
    if arguments.json is not None:
        result = {"machine": describe(), "threads": arguments.threads, "megabytes": arguments.megabytes}
        write_json(arguments.json, {**result, "instruction_peaks": peaks, "products": results})


if __name__ == "__main__":
    main()
