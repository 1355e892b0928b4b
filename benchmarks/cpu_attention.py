"""How fast is attention over the paged cache on this CPU, beside torch's on the same numbers in the same run?

    python benchmarks/cpu_attention.py                             # GPT-2 124M: 12 heads of 64
    python benchmarks/cpu_attention.py --heads 2 --only "prefill 512" --rounds 1

Peers: ``scaled_dot_product_attention`` of torch on contiguous keys and values in float32 and bfloat16; it has no paged
and no int8 form. All of a case take turns, one call each a round. Reported: the median time of one layer, the ratio to
torch in the same dtype (int8: to the faster of torch's two; below 1 is faster than torch), and the share of a ceiling
measured in this run: for prefill the float32 matrix product of torch (2048 x 2048), for decoding the speed at which
``sum`` reads 512 MB. Blocks lie in random order. Decoding goes through as many layers as a step would, up to 400 MB of
them, so that keys and values come from where they would come from; a small cache stays in the processor's own caches
and can exceed the ceiling.
"""

from __future__ import annotations

import argparse
import os
import pathlib
import statistics
import time
from collections.abc import Callable

from common import describe, summary, write_json

#: name -> (sequences, tokens in the cache, tokens computed); as many computed as cached is a whole prompt
CASES = {
    "prefill 512": (1, 512, 512),
    "prefill 1000": (1, 1000, 1000),
    "prefill 64 after 960": (1, 1024, 64),
    **{
        f"decode {batch} x {context}": (batch, context, 1) for batch in (1, 8, 64) for context in (128, 1024)
    },
}  # fmt: skip
#: what keys and values are stored in; "bfloat16 fast" has products of bfloat16, as steps in fast arithmetic
KINDS = ("float32", "bfloat16", "bfloat16 fast", "int8")
BLOCK_SIZE = 16
_MOST_BYTES = 400e6


def ceilings() -> dict[str, float]:
    """What torch reaches here: GFLOP/s of a float32 matrix product, GB/s of reading."""
    import torch

    a = torch.randn(2048, 2048)
    data = torch.ones(128 * 2**20)
    return {
        "gflops": 2 * 2048**3 / min(_times(lambda: a @ a, 5)) / 1e9,
        "gb_per_s": data.nbytes / min(_times(data.sum, 5)) / 1e9,
    }


def _times(call: Callable[[], object], count: int) -> list[float]:
    call()
    times = []
    for _ in range(count):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return times


def paged_call(kind: str, case: tuple[int, int, int], heads: int, head_dim: int, layers: int) -> Callable[[], object]:
    """One pass over all layers with ``gpt2rt.ops``."""
    import torch

    from gpt2rt import ops
    from gpt2rt.cache import PagedKVCache

    batch, context, queries = case
    blocks = -(-context // BLOCK_SIZE)
    fast = kind.endswith(" fast")
    dtype = getattr(torch, kind.removesuffix(" fast"))
    cache = PagedKVCache(layers, heads, head_dim, batch * blocks, block_size=BLOCK_SIZE, dtype=dtype)
    table = torch.randperm(batch * blocks).int().view(batch, blocks)
    positions = torch.arange(context)
    for layer in range(layers):
        for row in table.long():
            slots = row[positions // BLOCK_SIZE] * BLOCK_SIZE + positions % BLOCK_SIZE
            cache.write(layer, *torch.randn(2, context, heads, head_dim), slots)
    # the arithmetic of queries is float32 in the cpu executor, and 16 bits where the whole model is
    query = torch.randn(batch * queries, heads, head_dim).to(torch.bfloat16 if kind == "bfloat16" else torch.float32)
    lens = torch.full((batch,), context, dtype=torch.int32)
    starts = torch.arange(0, batch * queries + 1, queries, dtype=torch.int32)

    def call() -> None:
        for layer in range(layers):
            caches = cache.key_cache(layer), cache.value_cache(layer)
            scales = cache.key_scales(layer), cache.value_scales(layer)
            if fast:
                ops.step_attention(query, *caches, table, lens, starts, head_dim**-0.5)
            elif queries == 1:
                ops.paged_decode_attention(query, *caches, table, lens, context, head_dim**-0.5, *scales)
            else:
                arguments = (table, lens, starts, queries, head_dim**-0.5)
                ops.paged_prefill_attention(query, *caches, *arguments, *scales)

    return call


def torch_call(kind: str, case: tuple[int, int, int], heads: int, head_dim: int, layers: int) -> Callable[[], object]:
    """The same with torch, on keys and values that lie one after another."""
    import torch

    batch, context, queries = case
    dtype = getattr(torch, kind)
    query = torch.randn(batch, heads, queries, head_dim).to(dtype)
    keys, values = (torch.randn(layers, batch, heads, context, head_dim).to(dtype) for _ in range(2))
    mask = None
    if 1 < queries < context:
        mask = torch.ones(queries, context, dtype=torch.bool).tril(context - queries)

    def call() -> None:
        for layer in range(layers):
            torch.nn.functional.scaled_dot_product_attention(
                query, keys[layer], values[layer], attn_mask=mask, is_causal=queries == context
            )

    return call


def measure(arguments: argparse.Namespace) -> list[dict]:
    import torch

    heads, head_dim = arguments.heads, arguments.head_dim
    ceiling = ceilings()
    print(f"ceilings: {ceiling['gflops']:.0f} GFLOP/s, {ceiling['gb_per_s']:.1f} GB/s")
    results = []
    for name, case in CASES.items():
        if arguments.only and arguments.only not in name:
            continue
        torch.manual_seed(0)
        batch, context, queries = case
        kv_floats = 2 * batch * context * heads * head_dim
        layers = 1 if queries > 1 else int(max(1, min(12, _MOST_BYTES / (4 * kv_floats))))
        calls = {f"gpt2rt {kind}": paged_call(kind, case, heads, head_dim, layers) for kind in KINDS}
        calls |= {f"torch {kind}": torch_call(kind, case, heads, head_dim, layers) for kind in ("float32", "bfloat16")}
        times: dict[str, list[float]] = {key: [] for key in calls}
        for call in calls.values():
            call()
        for _ in range(arguments.rounds):
            for key, call in calls.items():
                start = time.perf_counter()
                call()
                times[key].append((time.perf_counter() - start) / layers)
        median = {key: statistics.median(values) for key, values in times.items()}
        # products of queries and keys, and of weights and values, each a multiplication and an addition
        flops = 4 * head_dim * heads * batch * sum(range(context - queries + 1, context + 1))
        for kind in KINDS:
            ours, dtype = median[f"gpt2rt {kind}"], kind.removesuffix(" fast")
            peer = min(v for k, v in median.items() if k.startswith("torch")) if kind == "int8" else None
            ratio = ours / (peer or median[f"torch {dtype}"])
            num_bytes = kv_floats * getattr(torch, dtype).itemsize
            if kind == "int8":
                num_bytes += kv_floats // head_dim * 4
            result = {
                "case": name,
                "kv": kind,
                "layers": layers,
                "gpt2rt": summary(times[f"gpt2rt {kind}"]),
                "torch": summary(times[f"torch {dtype}"]) if peer is None else None,
                "ratio": ratio,
            }
            if queries > 1:
                result["gflops"] = flops / ours / 1e9
                share = result["share"] = result["gflops"] / ceiling["gflops"]
                speed = f"{result['gflops']:6.1f} GFLOP/s"
            else:
                result["gb_per_s"] = num_bytes / ours / 1e9
                share = result["share"] = result["gb_per_s"] / ceiling["gb_per_s"]
                speed = f"{result['gb_per_s']:6.1f} GB/s   "
            results.append(result)
            print(
                f"{name:21} {kind:13} {ours * 1e3:8.3f} ms, {speed}, {share:5.0%} of the ceiling, ratio to torch "
                f"{ratio:.2f}",
                flush=True,
            )
    return [{"ceilings": ceiling}, *results]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--heads", type=int, default=12)
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--only", default="", help="cases whose name contains this")
    parser.add_argument("--output-json", type=pathlib.Path, help="also write the results here")
    arguments = parser.parse_args()
    os.environ["GPT2RT_NUM_THREADS"] = str(arguments.threads)
    import torch

    torch.set_num_threads(arguments.threads)
    results = measure(arguments)
    if arguments.output_json:
        settings = {**vars(arguments), "output_json": str(arguments.output_json)}
        write_json(arguments.output_json, {**describe(), "settings": settings, "results": results})
        print(f"written to {arguments.output_json}")


if __name__ == "__main__":
    main()
