"""What do log-probabilities, penalties, their counts and random numbers cost on this CPU?

    python benchmarks/cpu_scores.py                  # rows of GPT-2's vocabulary, one thread
    python benchmarks/cpu_scores.py --rows 64 --only log_probabilities

Each op runs in C++, as its definition in plain torch and, where there is one, as the usual chain of torch operations;
the ways take turns of 20 calls. Before anything is timed the results are compared: penalties, counts and numbers bit by
bit. The floor is what has to be read and written (the scores twice for log_probabilities, whose sum needs the maximum)
at the rate at which one core reads a buffer of 1 MiB, measured in the same run; rows take turns so that none is found
in the smaller caches.
"""

from __future__ import annotations

import argparse
import pathlib
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from bandwidth import read_bandwidth
from common import describe, summary, write_json

# calls of one way before the next has its turn
TURN = 20


class Case(NamedTuple):
    """One op at one size.

    Attributes:
        name: op and size.
        ways: what is timed, with the number of the round; the first is the op.
        moved: bytes read and written at least.
        check: raises SystemExit unless the ways agree.
    """

    name: str
    ways: Mapping[str, Callable[[int], Any]]
    moved: int
    check: Callable[[], None]


def agree(name: str, results: tuple, expected: tuple) -> None:
    """Floats to 1e-5, as the chains in float32 need it, everything else bit by bit."""
    import torch

    for result, definition in zip(results, expected, strict=True):
        if result.dtype == torch.float32 and name.startswith("log_probabilities"):
            torch.testing.assert_close(result, definition, rtol=1e-6, atol=1e-5, equal_nan=True)
        elif not torch.equal(result, definition):
            raise SystemExit(f"{name}: the results differ from the definition's")


def log_probabilities_case(vocab_size: int, rows: int, k: int, copies: int) -> Case:
    import torch

    from gpt2rt import ops
    from gpt2rt.kernels import score_refs

    scores = 3 * torch.randn(copies, rows, vocab_size)
    ids = torch.randint(0, vocab_size, (rows,))
    # likely ones, as those that were drawn
    ids[::2] = scores[0].topk(20).indices[::2, 7]

    def chain(i: int) -> tuple:
        logs = scores[i % copies].log_softmax(dim=-1)
        chosen = logs.gather(1, ids[:, None])
        return chosen[:, 0], 1 + (logs > chosen).sum(dim=-1), *logs.topk(k, dim=-1)

    name = f"log_probabilities, {rows} rows, k {k}"
    ways: dict[str, Callable[[int], Any]] = {
        "op": lambda i: ops.log_probabilities(scores[i % copies], ids, k),
        "torch": chain,
        "definition": lambda i: score_refs.log_probabilities_ref(scores[i % copies], ids, k),
    }
    return Case(name, ways, 8 * rows * vocab_size, lambda: agree(name, ways["op"](0), ways["definition"](0)))


def penalties_case(vocab_size: int, rows: int, said: int, copies: int) -> Case:
    """``said``: different tokens in each text."""
    import torch

    from gpt2rt import ops
    from gpt2rt.kernels import score_refs

    scores = 3 * torch.randn(copies, rows, vocab_size)
    counts = torch.zeros(rows, vocab_size, dtype=torch.int32)
    for row in range(rows):
        counts[row, torch.randperm(vocab_size)[:said]] = torch.randint(1, 7, (said,), dtype=torch.int32)
    slots = torch.arange(rows)
    names = ("repetition", "frequency", "presence")
    settings = {name: torch.full((rows,), 1.0 + i / 4, dtype=torch.float64) for i, name in enumerate(names)}
    name = f"penalties, {rows} rows, {said} tokens said"
    ways: dict[str, Callable[[int], Any]] = {
        "op": lambda i: ops.penalties(scores[i % copies], counts, slots, **settings),
        "definition": lambda i: score_refs.penalties_ref(scores[i % copies], counts, slots, *settings.values()),
    }
    return Case(name, ways, 12 * rows * vocab_size, lambda: agree(name, (ways["op"](0),), (ways["definition"](0),)))


def counts_cases(vocab_size: int, rows: int, tokens: int) -> list[Case]:
    import torch

    from gpt2rt import ops
    from gpt2rt.kernels import score_refs

    counts = torch.zeros(rows, vocab_size, dtype=torch.int32)
    slots, ids = torch.randperm(rows), torch.randint(0, vocab_size, (rows * tokens,))
    return [
        _in_place(
            f"count_tokens, {rows} rows",
            counts,
            (ops.count_tokens, score_refs.count_tokens_ref),
            (slots, ids[:rows].contiguous()),
            24 * rows,
        ),
        _in_place(
            f"reset_counts, {rows} rows, {tokens} tokens each",
            counts,
            (ops.reset_counts, score_refs.reset_counts_ref),
            (slots, ids, torch.arange(rows + 1) * tokens, torch.full((rows,), tokens // 2), tokens),
            4 * rows * vocab_size + 16 * rows * tokens,
        ),
    ]


def _in_place(name: str, counts: Any, forms: tuple[Callable, Callable], arguments: tuple, moved: int) -> Case:
    """An op that changes ``counts``, and its definition."""

    def changed(form: Callable) -> tuple:
        result = counts.clone()
        form(result, *arguments)
        return (result,)

    op, definition = forms

    def run_op(_: int) -> None:
        op(counts, *arguments)

    def run_definition(_: int) -> None:
        definition(counts, *arguments)

    ways = {"op": run_op, "definition": run_definition}
    return Case(name, ways, moved, lambda: agree(name, changed(op), changed(definition)))


def uniforms_case(rows: int) -> Case:
    import torch

    from gpt2rt import ops
    from gpt2rt.kernels import sampling_refs

    words = [torch.randint(-(2**62), 2**62, (rows,)) for _ in range(4)]
    name = f"uniforms, {rows} rows"
    ways: dict[str, Callable[[int], Any]] = {
        "op": lambda _: ops.uniforms(*words),
        "op unchecked": lambda _: torch.ops.gpt2rt.uniforms.default(*words),
        "definition": lambda _: sampling_refs.uniforms_ref(*words),
    }
    return Case(name, ways, 40 * rows, lambda: agree(name, (ways["op"](0),), (ways["definition"](0),)))


def measure(case: Case, rounds: int, bytes_per_us: float) -> dict:
    """Times of each way in us; a way that takes long gets fewer rounds."""
    case.check()
    times: dict[str, list[float]] = {way: [] for way in case.ways}
    spent = dict.fromkeys(case.ways, 0.0)
    for begin in range(0, rounds, TURN):
        for way, call in case.ways.items():
            if spent[way] > 1e6:
                continue
            # the first two find the caches as another way has left them
            call(begin)
            call(begin + 1)
            for i in range(begin, begin + TURN):
                start = time.perf_counter()
                call(i)
                times[way].append((time.perf_counter() - start) * 1e6)
                spent[way] += times[way][-1]
    result: dict[str, Any] = {way: summary(values) for way, values in times.items()}
    floor = case.moved / bytes_per_us
    texts = (f"{way} {numbers['median']:.4g} ({numbers['p10']:.4g})" for way, numbers in result.items())
    share = 100 * floor / result["op"]["median"]
    print(f"{case.name:42} {', '.join(texts)} us; floor {floor:.3g} us, {share:.0f} %", flush=True)
    return {**result, "floor_us": floor, "percent_of_floor": share}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vocab-size", type=int, default=50257)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--k", type=int, nargs="+", default=[0, 5, 20, 128])
    parser.add_argument("--rounds", type=int, default=300, help="of each case")
    parser.add_argument("--copies", type=int, default=8, help="sets of rows that take turns")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--only", default="", help="cases whose names begin like this")
    parser.add_argument("--output-json", type=pathlib.Path, help="also write the results here")
    arguments = parser.parse_args()
    import torch

    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    speed = statistics.median(read_bandwidth(1 << 20, 1))
    print(f"one core reads 1 MiB at {speed / 1e9:.1f} GB/s")
    vocab_size, copies = arguments.vocab_size, arguments.copies
    results = {}
    for rows in arguments.rows:
        cases = [log_probabilities_case(vocab_size, rows, k, copies) for k in arguments.k]
        cases += [penalties_case(vocab_size, rows, said, copies) for said in (100, 1000, vocab_size)]
        cases += [*counts_cases(vocab_size, rows, 1024), uniforms_case(rows)]
        for case in cases:
            if case.name.startswith(arguments.only):
                results[case.name] = measure(case, arguments.rounds, speed / 1e6)
    if arguments.output_json:
        settings = {**vars(arguments), "output_json": str(arguments.output_json)}
        write_json(
            arguments.output_json,
            {**describe(), "settings": settings, "bytes_per_second": speed, "results": results},
        )
        print(f"written to {arguments.output_json}")


if __name__ == "__main__":
    main()
