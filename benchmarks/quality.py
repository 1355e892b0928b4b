"""What do 8 and 4 bits cost? Perplexity of the embedded model in every format on text it was not trained on.

    python benchmarks/quality.py --text tinyshakespeare.txt
    python benchmarks/quality.py --text tinyshakespeare.txt --characters 20000      # a quick look

The text is the one that the model card names (SHA-256 checked); the model was trained on its first 90 %, which also
calibrates GPTQ, and is scored on the rest in windows that overlap by half (``model.score``). Bits are those of the
layers' matrices with their scales; embedding and head are int8 unless said otherwise.

Perplexity alone says little of a small model that knows its training text too well: noise in its weights can make it
better on other text. So each format is compared with float32 too: the mean Kullback-Leibler divergence of its
next-token distribution from that of float32, in millinats a token, and the share of positions where both prefer the
same token. Both are taken from what ``generate`` runs; a format named with a cache stores keys and values in that dtype
instead of ``generate``'s own choice.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import pathlib
import re
import time

from common import describe, write_json

MODEL = "gpt2rt/tiny-gpt2"
ROOT = pathlib.Path(__file__).resolve().parent.parent


def formats() -> dict[str, dict]:
    """Name of each format: ``dtype`` to load, or the fields of a QuantizationConfig and maybe the ``cache``'s dtype."""
    rows: dict[str, dict] = {"float32": {"dtype": "float32"}, "bfloat16": {"dtype": "bfloat16"}}
    rows["int8"] = {"scheme": "int8"}
    rows["int8, float32 cache"] = {"scheme": "int8", "cache": "float32"}
    rows["int8, int8 cache"] = {"scheme": "int8", "cache": "int8"}
    rows["int8, exact activations"] = {"scheme": "int8", "activations": "float32"}
    for size in (32, 64, 128):
        for method in ("rtn", "gptq"):
            rows[f"int4 g{size}, {method}"] = {"scheme": "int4", "group_size": size, "method": method}
    for method in ("rtn", "gptq"):
        rows[f"int4 g64 with zero points, {method}"] = {"scheme": "int4", "symmetric": False, "method": method}
    rows["int4 g64, gptq, exact activations"] = {"scheme": "int4", "method": "gptq", "activations": "float32"}
    rows["int4 g64, gptq, int4 embedding"] = {"scheme": "int4", "method": "gptq", "embeddings": "int4"}
    rows["nf4"] = {"scheme": "nf4"}
    rows["nf4, double quantisation"] = {"scheme": "nf4", "double_quant": True}
    rows["fp4"] = {"scheme": "fp4"}
    return rows


def split(path: pathlib.Path) -> tuple[str, str]:
    """Training text and held-out text, cut as the training script cuts them.

    Raises:
        SystemExit: it is not the text that the model card names.
    """
    card = (ROOT / "gpt2rt" / "assets" / "tiny-gpt2" / "README.md").read_text(encoding="utf-8")
    found = re.search(r"SHA-256 `([0-9a-f]{64})`", card)
    assert found, "the model card names its text"
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    if digest != found[1]:
        raise SystemExit(f"{path} has SHA-256 {digest}, but the model was trained on {found[1]}")
    spec = importlib.util.spec_from_file_location("train_tiny", ROOT / "examples" / "train_tiny.py")
    assert spec
    assert spec.loader
    train_tiny = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(train_tiny)
    return train_tiny.load_text(path)


def load(fields: dict, calibration: str, tokenizer):
    """The embedded model in one format."""
    import torch

    from gpt2rt import GPT2LMHeadModel, quantize_model
    from gpt2rt.quantization import QuantizationConfig

    if "dtype" in fields:
        return GPT2LMHeadModel.from_pretrained(MODEL, dtype=getattr(torch, fields["dtype"]))
    cache = fields.pop("cache", None)
    config = QuantizationConfig(**fields)
    model = GPT2LMHeadModel.from_pretrained(MODEL, dtype=torch.float32)
    with_text = {"calibration": [calibration], "tokenizer": tokenizer} if config.method == "gptq" else {}
    model = quantize_model(model, config, progress=False, **with_text)
    if cache is not None:
        model.generation_executor().cache_dtype = getattr(torch, cache)
    return model


def logits(model, ids: list[int]):
    """[len(ids), vocab_size] float32, computed as ``generate`` does it."""
    from gpt2rt.cache import PagedKVCache, Sequence
    from gpt2rt.graph import StepBatch

    executor = model.generation_executor()
    plan = executor.plan
    num_blocks = -(-len(ids) // 16)
    cache = PagedKVCache(plan.n_layer, plan.n_head, plan.head_dim, num_blocks, dtype=executor.cache_dtype)
    return executor.step(StepBatch.build([ids], [Sequence(cache)], all_logits=True), cache).logits


def divergence(reference, model, ids: list[int]) -> tuple[float, float]:
    """How far a model's next-token distributions lie from those of ``reference``, over disjoint windows of a text.

    Returns:
        Mean of KL(reference || model) in nats a token, and the share of positions with the same likeliest token.
    """
    total, same = 0.0, 0
    window = reference.config.n_positions
    for begin in range(0, len(ids), window):
        rows = ids[begin : begin + window]
        expected = logits(reference, rows).log_softmax(-1)
        found = logits(model, rows).log_softmax(-1)
        total += (expected.exp() * (expected - found)).sum().item()
        same += (expected.argmax(-1) == found.argmax(-1)).sum().item()
    return total / len(ids), same / len(ids)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=pathlib.Path, required=True, help="tinyshakespeare.txt")
    parser.add_argument("--characters", type=int, help="score only so many characters of the held-out text")
    parser.add_argument("--formats", nargs="+", default=[""], help="only formats whose names begin so: 'int4 g64' nf4")
    parser.add_argument("--output-json", type=pathlib.Path)
    arguments = parser.parse_args()
    from gpt2rt import GPT2Tokenizer

    training, held_out = split(arguments.text)
    held_out = held_out[: arguments.characters]
    tokenizer = GPT2Tokenizer.from_pretrained(MODEL)
    ids = tokenizer.encode(held_out)
    reference = load(formats()["float32"], training, tokenizer)
    rows: dict[str, dict] = {}
    titles = (
        "format",
        "perplexity",
        "change",
        "KL, mnat",
        "same token",
        "layers' bits a weight",
        "MB",
        "s to quantise",
    )
    print(f"| {' | '.join(titles)} |\n|" + " --- |" * len(titles), flush=True)
    for name, fields in formats().items():
        # float32 is what the others are compared with
        if name != "float32" and not name.startswith(tuple(arguments.formats)):
            continue
        start = time.perf_counter()
        model = load(fields, training, tokenizer)
        seconds = time.perf_counter() - start
        result = model.score(held_out, tokenizer)
        distance, same = divergence(reference, model, ids)
        row = {
            "perplexity": result.perplexity,
            "divergence_nats": distance,
            "same_token": same,
            "tokens": sum(result.num_scored),
            "bits": layer_bits(model),
            "megabytes": model.get_memory_footprint() / 1e6,
            "quantise_s": seconds,
        }
        rows[name] = row
        change = 100 * (row["perplexity"] / rows["float32"]["perplexity"] - 1)
        print(
            f"| {name} | {row['perplexity']:.3f} | {change:+.2f} % | {1e3 * distance:.3f} | {100 * same:.2f} % | "
            f"{row['bits']:.2f} | {row['megabytes']:.2f} | {seconds:.1f} |",
            flush=True,
        )
    print(f"\n{MODEL}, {rows['float32']['tokens']} tokens scored")
    if arguments.output_json:
        write_json(arguments.output_json, {"machine": describe(), "model": MODEL, "formats": rows})


def layer_bits(model) -> float:
    """Stored bits per weight of the blocks' matrices, scales included."""
    from cpu_profile import weight_bytes

    layers = [node.linear for node in model.build_graph().nodes[:-1] if getattr(node, "linear", None) is not None]
    return 8 * sum(map(weight_bytes, layers)) / sum(layer.weight.shape[0] * layer.weight.shape[1] for layer in layers)


if __name__ == "__main__":
    main()
