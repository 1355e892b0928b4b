"""How fast is each way of decoding on this CPU, beside transformers in the same run?

    python benchmarks/cpu_modes.py                               # 124M shape, prompt of 64 tokens, 48 new ones
    python benchmarks/cpu_modes.py --shape tiny --rounds 1 --new-tokens 8

Both libraries hold the same random weights in one process and take turns, one ``generate`` each a round. Reported for
each mode: the median time of a call, the ratio of the medians, and whether the tokens are equal (not expected where
tokens are drawn: the libraries draw differently). Random weights repeat themselves, which flatters prompt lookup: its
ratio says what verifying several tokens in a step is worth, not how often a text repeats.
"""

from __future__ import annotations

import argparse
import pathlib
import statistics
import warnings

from common import describe, summary, write_json
from cpu_heads import SHAPES, alternate, pair

#: name -> (prompts, keyword arguments)
MODES = {
    "greedy": (1, {}),
    "greedy, 4 prompts": (4, {}),
    "sampling, top_k 50": (1, {"do_sample": True, "top_k": 50}),
    "4 beams": (1, {"num_beams": 4}),
    "4 beams, 4 prompts": (4, {"num_beams": 4}),
    "4 beams, sampled": (1, {"num_beams": 4, "do_sample": True}),
    "prompt lookup, 6 tokens": (1, {"prompt_lookup_num_tokens": 6}),
    "penalty and n-grams": (1, {"repetition_penalty": 1.2, "no_repeat_ngram_size": 3}),
}


def measure(arguments: argparse.Namespace) -> list[dict]:
    import torch

    shape = {**SHAPES[arguments.shape], "bos_token_id": None, "eos_token_id": None}
    ours, theirs = pair("GPT2LMHeadModel", shape, getattr(torch, arguments.dtype))
    generator = torch.Generator().manual_seed(0)
    results = []
    for name, (prompts, settings) in MODES.items():
        if arguments.only and arguments.only not in name:
            continue
        ids = torch.randint(0, shape["vocab_size"], (prompts, arguments.prompt_tokens), generator=generator)
        given = {
            "attention_mask": torch.ones_like(ids),
            "max_new_tokens": arguments.new_tokens,
            "pad_token_id": 0,
            "do_sample": False,
            **settings,
        }
        calls = {
            "gpt2rt": lambda x=ids, s=given: ours.generate(x, **s),
            "transformers": lambda x=ids, s=given: theirs.generate(x, **s),
        }
        equal = torch.equal(calls["gpt2rt"](), calls["transformers"]())
        times = alternate(calls, arguments.rounds)
        median = {key: statistics.median(value) for key, value in times.items()}
        result = {
            "mode": name,
            "tokens_equal": equal,
            "gpt2rt": summary(times["gpt2rt"]),
            "transformers": summary(times["transformers"]),
            "ratio": median["gpt2rt"] / median["transformers"],
        }
        results.append(result)
        print(
            f"{name:26} {median['gpt2rt'] * 1e3:8.1f} ms, transformers {median['transformers'] * 1e3:8.1f} ms, ratio "
            f"{result['ratio']:.2f}, tokens equal: {equal}",
            flush=True,
        )
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="124M")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument("--new-tokens", type=int, default=48)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", default="", help="modes whose name contains this")
    parser.add_argument("--output-json", type=pathlib.Path, help="also write the results here")
    arguments = parser.parse_args()
    import transformers

    warnings.simplefilter("ignore")
    results = measure(arguments)
    if arguments.output_json:
        settings = {**vars(arguments), "output_json": str(arguments.output_json)}
        versions = {**describe(), "transformers": transformers.__version__}
        write_json(arguments.output_json, {**versions, "settings": settings, "results": results})
        print(f"written to {arguments.output_json}")


if __name__ == "__main__":
    main()
