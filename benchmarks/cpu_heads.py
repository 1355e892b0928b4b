"""How fast is a forward with each task head on this CPU, beside transformers in the same run?

    python benchmarks/cpu_heads.py                               # 124M shape, batch 8 x 128 tokens, float32, 5 rounds
    python benchmarks/cpu_heads.py --shape tiny --rounds 2       # a few seconds
    python benchmarks/cpu_heads.py --generate                    # OpenAI GPT: tokens/s of generate()

Both libraries hold the same random weights in one process, and take turns call by call in an order that rotates; the
outputs are compared first. Reported for each head: median and 10th percentile of the time of a call, the ratio of the
medians, and the share of the floor: operations of the matrix products over the rate that torch.addmm reaches on a
matrix of the model's size in the same run.

Cases:
    padded            half of the rows are a quarter shorter, with an attention mask
    double-heads      2 questions x 4 choices, all different
    double-heads+stem the same, but the choices share their first 96 of 128 tokens
"""

from __future__ import annotations

import argparse
import pathlib
import statistics
import time

from common import describe, summary, write_json

SHAPES = {
    "124M": dict(n_layer=12, n_embd=768, n_head=12, vocab_size=50257, n_positions=1024),
    "tiny": dict(n_layer=2, n_embd=64, n_head=2, vocab_size=97, n_positions=256, bos_token_id=0, eos_token_id=0),
}
GPT1_SHAPES = {
    "124M": dict(n_layer=12, n_embd=768, n_head=12, vocab_size=40478, n_positions=512),
    "tiny": dict(n_layer=2, n_embd=64, n_head=2, vocab_size=97, n_positions=256),
}


def cases(shape: str, batch: int, length: int):
    """(name, class name, config, ids, mask) of each case."""
    import torch

    generator = torch.Generator().manual_seed(0)
    gpt2, gpt1 = SHAPES[shape], GPT1_SHAPES[shape]
    vocab = min(gpt2["vocab_size"], gpt1["vocab_size"])
    ids = torch.randint(1, vocab, (batch, length), generator=generator)
    mask = torch.ones_like(ids)
    mask[::2, -length // 4 :] = 0
    choices = ids.view(batch // 4, 4, length)
    stem = choices.clone()
    stem[:, :, : length * 3 // 4] = stem[:, :1, : length * 3 // 4]
    labels = {"num_labels": 3, "pad_token_id": 0}
    yield "GPT2Model", "GPT2Model", gpt2, ids, None
    yield "GPT2LMHeadModel", "GPT2LMHeadModel", gpt2, ids, None
    yield "GPT2ForSequenceClassification", "GPT2ForSequenceClassification", {**gpt2, **labels}, ids, None
    yield "GPT2ForSequenceClassification padded", "GPT2ForSequenceClassification", {**gpt2, **labels}, ids * mask, mask
    yield "GPT2ForTokenClassification", "GPT2ForTokenClassification", {**gpt2, **labels}, ids, None
    yield "GPT2ForTokenClassification padded", "GPT2ForTokenClassification", {**gpt2, **labels}, ids * mask, mask
    yield "GPT2ForQuestionAnswering", "GPT2ForQuestionAnswering", gpt2, ids, None
    yield "GPT2DoubleHeadsModel", "GPT2DoubleHeadsModel", gpt2, choices, None
    yield "GPT2DoubleHeadsModel stem", "GPT2DoubleHeadsModel", gpt2, stem, None
    yield "OpenAIGPTModel", "OpenAIGPTModel", gpt1, ids, None
    yield "OpenAIGPTLMHeadModel", "OpenAIGPTLMHeadModel", gpt1, ids, None
    yield "OpenAIGPTForSequenceClassification", "OpenAIGPTForSequenceClassification", {**gpt1, **labels}, ids, None
    yield "OpenAIGPTDoubleHeadsModel stem", "OpenAIGPTDoubleHeadsModel", gpt1, stem, None


def pair(class_name: str, shape: dict, dtype):
    """The same weights in gpt2rt and in transformers; sdpa where transformers has it (it has not for OpenAI GPT)."""
    import torch
    import transformers

    import gpt2rt

    config_name = "GPT2Config" if class_name.startswith("GPT2") else "OpenAIGPTConfig"
    torch.manual_seed(0)
    config = getattr(transformers, config_name)(**shape)
    config._attn_implementation = "sdpa" if config_name == "GPT2Config" else "eager"
    theirs = getattr(transformers, class_name)(config).to(dtype).eval()
    ours = getattr(gpt2rt, class_name)(getattr(gpt2rt, config_name)(**shape)).to(dtype).eval()
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


def best_rate(width: int, rows: int) -> float:
    """Floating-point operations a second of a float32 matrix product of the model's size, the best of some."""
    import torch

    x, w, b = torch.randn(rows, width), torch.randn(width, 4 * width), torch.randn(4 * width)
    times = []
    for _ in range(10):
        start = time.perf_counter()
        torch.addmm(b, x, w)
        times.append(time.perf_counter() - start)
    return 2 * rows * width * 4 * width / min(times)


def operations(model, tokens: int) -> float:
    """Of a call's matrix products: two for each weight of a matrix and token; attention is not counted, and a head on
    one token of each sequence is counted as if it were on all.
    """
    import torch

    tables = {id(m.weight) for m in model.modules() if isinstance(m, torch.nn.Embedding)}
    count = sum(p.numel() for p in model.parameters() if p.dim() == 2 and id(p) not in tables)
    if hasattr(model, "lm_head"):
        count += model.lm_head.weight.numel()
    return 2.0 * count * tokens


def alternate(calls: dict, rounds: int) -> dict[str, list[float]]:
    """The times of each call, which take turns in an order that rotates."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    names = list(calls)
    for call in calls.values():
        call()
    for turn in range(rounds):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            start = time.perf_counter()
            calls[name]()
            times[name].append(time.perf_counter() - start)
    return times


def measure_heads(arguments) -> list[dict]:
    import torch

    dtype = getattr(torch, arguments.dtype)
    results = []
    for name, class_name, shape, ids, mask in cases(arguments.shape, arguments.batch, arguments.length):
        if arguments.only and arguments.only not in name:
            continue
        ours, theirs = pair(class_name, shape, dtype)
        inputs = {"input_ids": ids} if mask is None else {"input_ids": ids, "attention_mask": mask}
        with torch.no_grad():
            difference = max(
                float((a - b).abs().max())
                for a, b in zip(_tensors(ours(**inputs)), _tensors(theirs(**inputs)), strict=True)
            )
            rate = best_rate(shape["n_embd"], ids.numel())
            calls = {"gpt2rt": lambda m=ours, x=inputs: m(**x), "transformers": lambda m=theirs, x=inputs: m(**x)}
            times = alternate(calls, arguments.rounds)
        floor = operations(ours, ids.numel()) / rate
        median = {key: statistics.median(value) for key, value in times.items()}
        result = {
            "case": name,
            "max_abs_difference": difference,
            "gpt2rt": summary(times["gpt2rt"]),
            "transformers": summary(times["transformers"]),
            "ratio": median["gpt2rt"] / median["transformers"],
            "ratio_p10": summary(times["gpt2rt"])["p10"] / summary(times["transformers"])["p10"],
            "floor_s": floor,
            "over_floor": median["gpt2rt"] / floor,
        }
        results.append(result)
        print(
            f"{name:40} {median['gpt2rt'] * 1e3:8.1f} ms, transformers {median['transformers'] * 1e3:8.1f} ms, ratio "
            f"{result['ratio']:.2f}, x floor {result['over_floor']:.2f}, max difference {difference:.1e}",
            flush=True,
        )
    return results


def _tensors(output) -> list:
    """The floating-point tensors of an output, without the cache and, for transformers' outputs, None."""
    import torch

    return [v for k, v in output.items() if k != "past_key_values" and isinstance(v, torch.Tensor)]


def measure_generation(arguments) -> list[dict]:
    """Greedy generation with OpenAI GPT: transformers has no cache for it and computes every prefix anew."""
    import torch

    ours, theirs = pair("OpenAIGPTLMHeadModel", GPT1_SHAPES[arguments.shape], getattr(torch, arguments.dtype))
    results = []
    for new_tokens in arguments.new_tokens:
        ids = torch.randint(1, 97, (1, 16), generator=torch.Generator().manual_seed(0))
        mask = torch.ones_like(ids)
        settings = {"max_new_tokens": new_tokens, "do_sample": False, "pad_token_id": 0, "attention_mask": mask}
        calls = {
            "gpt2rt": lambda x=ids, s=settings: ours.generate(x, **s),
            "transformers": lambda x=ids, s=settings: theirs.generate(x, **s),
        }
        equal = torch.equal(calls["gpt2rt"](), calls["transformers"]())
        times = alternate(calls, arguments.rounds)
        median = {key: statistics.median(value) for key, value in times.items()}
        results.append(
            {
                "new_tokens": new_tokens,
                "tokens_equal": equal,
                "gpt2rt": summary(times["gpt2rt"]),
                "transformers": summary(times["transformers"]),
                "ratio": median["gpt2rt"] / median["transformers"],
            }
        )
        print(
            f"OpenAI GPT, {new_tokens} new tokens: {new_tokens / median['gpt2rt']:.1f} tokens/s, transformers "
            f"{new_tokens / median['transformers']:.1f}, time ratio {results[-1]['ratio']:.3f}, tokens equal: {equal}",
            flush=True,
        )
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="124M")
    parser.add_argument("--batch", type=int, default=8, help="sequences; a multiple of 4")
    parser.add_argument("--length", type=int, default=128, help="tokens of each")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", default="", help="cases whose name contains this")
    parser.add_argument("--generate", action="store_true", help="measure generate() of OpenAI GPT instead")
    parser.add_argument("--new-tokens", type=int, nargs="+", default=[32, 128])
    parser.add_argument("--output-json", type=pathlib.Path, help="also write the results here")
    arguments = parser.parse_args()
    if arguments.batch % 4:
        parser.error(f"--batch must be a multiple of 4, for the choices, got {arguments.batch}")
    import transformers

    results = measure_generation(arguments) if arguments.generate else measure_heads(arguments)
    if arguments.output_json:
        settings = {**vars(arguments), "output_json": str(arguments.output_json)}
        versions = {**describe(), "transformers": transformers.__version__}
        write_json(arguments.output_json, {**versions, "settings": settings, "results": results})
        print(f"written to {arguments.output_json}")


if __name__ == "__main__":
    main()
