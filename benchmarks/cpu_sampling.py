"""What does the choice of the next token cost on this CPU?

    python benchmarks/cpu_sampling.py                       # rows of GPT-2's vocabulary, one thread
    python benchmarks/cpu_sampling.py --shape 124M --dtype bfloat16 --threads 2    # and whole tokens of a model

Rows of random scores go through the sampler op and through the warpers one by one, which choose the same tokens. With
``--shape``, ``generate`` makes tokens of a random model in three ways that take turns: warpers one by one, one op on
all logits, and from the best logits alone, which are found while they are computed (where that applies).
"""

from __future__ import annotations

import argparse
import pathlib
import time
from unittest import mock

from common import describe, summary, write_json
from cpu_decode import SHAPES, Clock

ROWS = {
    "greedy": {},
    "all tokens": {"do_sample": True, "top_k": 0},
    "top_k 50": {"do_sample": True},
    "top_k 50, top_p 0.9": {"do_sample": True, "top_p": 0.9},
    "temperature, top_k 50, top_p 0.9, min_p": {"do_sample": True, "temperature": 0.8, "top_p": 0.9, "min_p": 0.02},
    "top_p 0.9": {"do_sample": True, "top_k": 0, "top_p": 0.9},
    "min_p 0.05": {"do_sample": True, "top_k": 0, "min_p": 0.05},
    "top_k 5000": {"do_sample": True, "top_k": 5000},
}
TOKENS = ("greedy", "top_k 50, top_p 0.9")


def report(name: str, ways: dict[str, list[float]], unit: str) -> dict:
    """Print median and 10th percentile of each way, and return their summaries."""
    result = {way: summary(values) for way, values in ways.items()}
    texts = (f"{way} {numbers['median']:.4g} ({numbers['p10']:.4g})" for way, numbers in result.items())
    print(f"{name:50} {', '.join(texts)} {unit}", flush=True)
    return result


def measure_rows(vocab_size: int, rounds: int) -> dict:
    import torch

    from gpt2rt.generation import GenerationConfig, choice
    from gpt2rt.generation.logits import build_processors
    from gpt2rt.generation.sampling import check_logits, greedy, sample
    from gpt2rt.generation.scores import NO_IDS

    results = {}
    for spread in (1.0, 3.0):
        scores = spread * torch.randn(1, vocab_size, generator=torch.Generator().manual_seed(0))
        for name, settings in ROWS.items():
            config = GenerationConfig(**settings)
            draws = bool(settings)
            _, warpers = build_processors(config, 1, [])
            given = {type(warper).__name__: warper for warper in warpers}
            names = {"temperature": "Temperature", "top_k": "TopK", "top_p": "TopP", "min_p": "MinP"}
            values = {
                key: getattr(given[f"{prefix}LogitsWarper"], key)
                for key, prefix in names.items()
                if f"{prefix}LogitsWarper" in given
            }
            sampler = choice.Sampler(1, do_sample=draws, **values)

            def one_by_one(scores=scores, warpers=warpers, draws=draws):
                check_logits(scores, [0])
                warped = warpers(NO_IDS, scores)
                return sample(warped, [0.37]) if draws else greedy(warped)

            ways = {
                "one op": lambda scores=scores, sampler=sampler: sampler.choose(scores, [0.37], finite=True),
                "one by one": one_by_one,
            }
            if ways["one op"]() != ways["one by one"]():
                raise SystemExit(f"{name}: the ways choose different tokens")
            times: dict[str, list[float]] = {way: [] for way in ways}
            for _ in range(rounds):
                for way, call in ways.items():
                    start = time.perf_counter()
                    call()
                    times[way].append((time.perf_counter() - start) * 1e6)
            results[f"{name}, spread {spread:g}"] = report(f"{name}, spread {spread:g}", times, "us")
    return results


def measure_tokens(arguments: argparse.Namespace) -> dict:
    import torch

    from gpt2rt import GPT2Config, GPT2LMHeadModel
    from gpt2rt.generation import choice

    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(**SHAPES[arguments.shape])).eval().to(getattr(torch, arguments.dtype))
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = None, 0
    ways = {
        "one by one": mock.patch.object(choice, "make_sampler", return_value=None),
        "one op": mock.patch.object(choice.Sampler, "best_count", return_value=0),
        "best logits": mock.patch.object(choice, "_SPARE", choice._SPARE),
    }
    ids = torch.randint(0, model.config.vocab_size, (1, 16))
    results = {}
    for name in TOKENS:
        times: dict[str, list[float]] = {way: [] for way in ways}
        tokens = set()
        for round_ in range(arguments.rounds + 1):
            for way, patch in ways.items():
                clock = Clock()
                settings = {**ROWS[name], **({"seed": 1} if ROWS[name] else {})}
                with patch:
                    out = model.generate(ids, max_new_tokens=arguments.new_tokens, streamer=clock, **settings)
                tokens.add(tuple(out[0].tolist()))
                # the first round warms up; the first times are those of the prompt and of the first token
                if round_:
                    pairs = zip(clock.times[2:], clock.times[3:], strict=False)
                    times[way] += [(after - before) * 1e3 for before, after in pairs]
        if len(tokens) > 1:
            raise SystemExit(f"{name}: the ways choose different tokens")
        results[name] = report(f"{arguments.shape} {arguments.dtype}, {name}", times, "ms a token")
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vocab-size", type=int, default=50257)
    parser.add_argument("--rounds", type=int, default=200, help="of each row")
    parser.add_argument("--shape", choices=SHAPES, help="measure whole tokens instead")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--new-tokens", type=int, default=65)
    parser.add_argument("--output-json", type=pathlib.Path, help="also write the results here")
    arguments = parser.parse_args()
    import torch

    torch.set_num_threads(arguments.threads)
    if arguments.shape:
        arguments.rounds = min(arguments.rounds, 5)
    results = measure_tokens(arguments) if arguments.shape else measure_rows(arguments.vocab_size, arguments.rounds)
    if arguments.output_json:
        settings = {**vars(arguments), "output_json": str(arguments.output_json)}
        write_json(arguments.output_json, {**describe(), "settings": settings, "results": results})
        print(f"written to {arguments.output_json}")


if __name__ == "__main__":
    main()
