"""Where the time of one of gpt2rt's steps goes: ``cpu_decode.py --profile``.

The cpu executor notes when each phase of a step begins. Phases are added up by what they do (the norm, product and
residual of one matrix are one node of the plan, its phases are named apart), and stand beside the bytes of weights, or
of keys and values, that they read, and the multiplications and additions that they are.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections import defaultdict

from cpu_peers import PEERS
from shapes import SHAPES, random_checkpoint

WARM_UP, REPEATS = 3, 15


def weight_bytes(linear) -> int:
    """Bytes of a plan's weight as its format stores it: codes, scales and zero points, or floats."""
    weight = linear.weight
    if not hasattr(weight, "codes"):
        return weight.numel() * weight.element_size()
    parts = (weight.codes, weight.scales, weight.zeros)
    return sum(part.numel() * part.element_size() for part in parts if part is not None)


def phase_label(node, phase: str) -> str:
    """``NormQKV: linear``; the two kinds of LinearResidual are told apart by their inputs."""
    kind = type(node).__name__
    if kind == "LinearResidual":
        num_out, num_in = node.linear.weight.shape
        kind += " of attention" if num_in == num_out else " of mlp"
    return f"{kind}: {phase}"


def bytes_read(node, phase: str, seq_lens: list[int], cache) -> int:
    """What a phase must read from memory at least: weights, or keys and values of the sequences."""
    if phase in ("linear", "head") and node.linear is not None:
        return weight_bytes(node.linear)
    if phase == "attention":
        return 2 * sum(seq_lens) * node.n_head * node.head_dim * cache.data.element_size()
    return 0


def operations(node, phase: str, seq_lens: list[int], num_tokens: int) -> int:
    """Multiplications and additions of a phase that computes the last ``num_tokens`` of each sequence."""
    if phase in ("linear", "head") and node.linear is not None:
        num_out, num_in = node.linear.weight.shape
        return 2 * num_out * num_in * len(seq_lens) * (1 if phase == "head" else num_tokens)
    if phase == "attention":
        pairs = sum(position + 1 for end in seq_lens for position in range(end - num_tokens, end))
        return 4 * pairs * node.n_head * node.head_dim
    return 0


def profile_step(executor, num_rows: int, past: int, num_tokens: int) -> list[dict]:
    """Profile a step that computes ``num_tokens`` for each of ``num_rows`` sequences with ``past`` tokens in the cache.

    Returns:
        For each kind of phase: label, and of a step: phases, seconds (median of the sums), bytes and operations.
    """
    from gpt2rt.cache import PagedKVCache, Sequence
    from gpt2rt.graph import StepBatch

    plan = executor.plan
    room = num_rows * (past + num_tokens + 32)
    sizes = {"n_layer": plan.n_layer, "n_head": plan.n_head, "head_dim": plan.head_dim}
    cache = PagedKVCache(**sizes, num_blocks=-(-room // 16) + num_rows, dtype=executor.cache_dtype)
    sequences = [Sequence(cache) for _ in range(num_rows)]
    ids = [(7919 * i + 13) % plan.vocab_size for i in range(max(past, num_tokens))]
    if past:
        executor.step(StepBatch.build([ids[:past]] * num_rows, sequences), cache)
    seconds: dict[str, list[float]] = defaultdict(list)
    counts: dict[str, int] = {}
    moved: dict[str, int] = {}
    computed: dict[str, int] = {}
    for repeat in range(WARM_UP + REPEATS):
        batch = StepBatch.build([ids[:num_tokens]] * num_rows, sequences)
        phases = executor.profile(batch, cache)
        for sequence in sequences:
            sequence.truncate(past)
        if repeat < WARM_UP:
            continue
        sums: dict[str, float] = defaultdict(float)
        counts, moved, computed = defaultdict(int), defaultdict(int), defaultdict(int)
        lengths = batch.seq_lens.tolist()
        for phase in phases:
            node = plan.nodes[phase.node]
            label = phase_label(node, phase.name)
            sums[label] += phase.seconds
            counts[label] += 1
            moved[label] += bytes_read(node, phase.name, lengths, cache)
            computed[label] += operations(node, phase.name, lengths, num_tokens)
        for label, value in sums.items():
            seconds[label].append(value)
    return [
        {
            "label": label,
            "phases": counts[label],
            "seconds": statistics.median(values),
            "bytes": moved[label],
            "operations": computed[label],
        }
        for label, values in seconds.items()
    ]


def table(rows: list[dict]) -> str:
    """A markdown table of :func:`profile_step`, the longest first, with a sum."""
    sums = ("phases", "seconds", "bytes", "operations")
    total = {"label": "all"} | {key: sum(row[key] for row in rows) for key in sums}
    lines = ["| node: phase | phases | ms | share | MB | GB/s | GFLOP/s |", "|" + " --- |" * 7]
    for row in [*sorted(rows, key=lambda row: -row["seconds"]), total]:
        rates = [f"{row[key] / row['seconds'] / 1e9:.1f}" if row[key] else "" for key in ("bytes", "operations")]
        lines.append(
            f"| {row['label']} | {row['phases']} | {row['seconds'] * 1e3:.3f} | "
            f"{100 * row['seconds'] / total['seconds']:.1f} % | {row['bytes'] / 1e6:.2f} | {' | '.join(rates)} |"
        )
    return "\n".join(lines)


def profile_formats(shape: str, names: list[str], arguments: argparse.Namespace) -> dict:
    """Print the profile of each of gpt2rt's formats for the batch sizes and prompt lengths of ``arguments``.

    Returns:
        The same figures: by name of the peer, then of the scenario.
    """
    import torch
    from cpu_peers.gpt2rt_peer import load_model

    torch.set_num_threads(arguments.threads)
    result: dict = {}
    steps = {f"decode-{rows}": (rows, arguments.prompt_tokens, 1) for rows in arguments.batch_sizes}
    steps |= {f"prefill-{n}": (1, 0, n) for n in arguments.prefill if n < SHAPES[shape]["n_positions"]}
    with tempfile.TemporaryDirectory() as folder:
        random_checkpoint(SHAPES[shape], folder)
        for name in names:
            if PEERS[name].family != "gpt2rt_peer":
                raise SystemExit(f"--profile looks into gpt2rt alone, not {name}; choose with --peers 'gpt2rt-*'")
            executor = load_model(folder, PEERS[name].options).generation_executor("cpu")
            for step, sizes in steps.items():
                rows = profile_step(executor, *sizes)
                result.setdefault(name, {})[step] = rows
                print(f"\n{shape}, {name}, {step}\n\n{table(rows)}", flush=True)
    return result
