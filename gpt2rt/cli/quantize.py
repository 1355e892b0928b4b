"""``gpt2rt quantize``: a checkpoint in 8 or 4 bits, and what that costs."""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .common import (
    Device,
    Dtype,
    JsonFlag,
    LocalOnly,
    Revision,
    Subfolder,
    Threads,
    UsageFault,
    check_dtype,
    parse_device,
    set_threads,
)

if TYPE_CHECKING:
    from gpt2rt.quantization import QuantizationConfig

EXAMPLES = (
    "Examples:\n\ngpt2rt quantize gpt2rt/tiny-gpt2 ./tiny-int4 --scheme int4\n\n"
    "gpt2rt quantize ./my-gpt2 ./my-gpt2-int4 --scheme int4 --method gptq --calibration book.txt --eval other.txt\n\n"
    "gpt2rt quantize ./my-gpt2 ./my-gpt2-nf4 --scheme nf4 --double-quant --format bitsandbytes"
)

# names of gpt2rt.quantization, here so that --help needs no torch
SCHEMES = ("int8", "int4", "nf4", "fp4")
METHODS = ("rtn", "gptq")
FORMATS = ("gpt2rt", "bitsandbytes")

# tokens whose logits are compared together
_WINDOWS_TOGETHER = 4


def command(
    source: Annotated[str, typer.Argument(help="A folder, a hub id, or an embedded model.", metavar="SRC")],
    destination: Annotated[Path, typer.Argument(help="The folder to write.", metavar="DST")],
    scheme: Annotated[str, typer.Option(help=f"Of the layers: {', '.join(SCHEMES)}.")] = "int4",
    group_size: Annotated[
        int | None,
        typer.Option(
            help="Weights that share a scale: int4 32, 64 or 128; nf4 and fp4 32 to 4096.",
            show_default="64; int8 has a scale a row",
        ),
    ] = None,
    asymmetric: Annotated[bool, typer.Option("--asymmetric", help="int4 with zero points.")] = False,
    double_quant: Annotated[
        bool, typer.Option("--double-quant", help="nf4 and fp4: round the scales to 8 bits too.")
    ] = False,
    embeddings: Annotated[
        str | None,
        typer.Option(
            help="Of the token embedding and the output layer: none, float16, bfloat16, int8 or int4.",
            show_default="int8; none with --format bitsandbytes",
        ),
    ] = None,
    activations: Annotated[
        str | None,
        typer.Option(
            help="int8: rounded as the model runs, which is fast; or float32: left alone.",
            show_default="int8; float32 with nf4 and fp4",
        ),
    ] = None,
    skip: Annotated[
        list[str] | None,
        typer.Option(help="A layer that stays as it is, such as lm_head or h.0.attn.c_attn; repeatable."),
    ] = None,
    method: Annotated[
        str, typer.Option(help="rtn: each weight to the nearest code; gptq: with a calibration text.")
    ] = "rtn",
    calibration: Annotated[Path | None, typer.Option(help="UTF-8 text for --method gptq.")] = None,
    calibration_tokens: Annotated[int, typer.Option(help="Tokens of --calibration that are used.")] = 65536,
    format: Annotated[
        str, typer.Option(help="Of the files: gpt2rt; or bitsandbytes, which transformers reads: int8, nf4, fp4.")
    ] = "gpt2rt",
    eval: Annotated[
        Path | None,
        typer.Option(
            help="UTF-8 text to measure the cost on.", show_default="with embedded models, text they have not seen"
        ),
    ] = None,
    eval_tokens: Annotated[int, typer.Option(help="Tokens of --eval that are used.")] = 16384,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Write into DST even if it holds files.")] = False,
    dtype: Dtype = None,
    device: Device = "cpu",
    threads: Threads = None,
    revision: Revision = "main",
    subfolder: Subfolder = "",
    local_files_only: LocalOnly = False,
    as_json: JsonFlag = False,
) -> None:
    """Write a checkpoint in 8 or 4 bits; print its size and what it costs in logits and perplexity."""
    # all that can be wrong with the command line is found before a model is loaded
    for flag, value, choices in (
        ("--scheme", scheme, SCHEMES),
        ("--method", method, METHODS),
        ("--format", format, FORMATS),
    ):
        if value not in choices:
            raise UsageFault(f"{flag} must be one of {', '.join(choices)}, got {value!r}")
    for flag, number in (("--calibration-tokens", calibration_tokens), ("--eval-tokens", eval_tokens)):
        # perplexity needs a token and one before it
        if number < 2:
            raise UsageFault(f"{flag} must be at least 2, got {number}")
    if method == "gptq" and calibration is None:
        raise UsageFault(
            "--method gptq needs --calibration FILE: some hundred kilobytes of text like what the model will see"
        )
    if method == "rtn" and calibration is not None:
        raise UsageFault("--calibration goes with --method gptq")
    if format == "bitsandbytes" and scheme == "int4":
        raise UsageFault("--format bitsandbytes has no int4 in groups; use --scheme nf4, fp4 or int8")
    if format == "bitsandbytes" and embeddings not in (None, "none"):
        raise UsageFault(f"--format bitsandbytes keeps embeddings as they are, got --embeddings {embeddings}")
    check_dtype(dtype)
    _check_destination(source, destination, overwrite)
    calibration_text = None if calibration is None else _read("--calibration", calibration)
    eval_text = _eval_text(source, eval)
    set_threads(threads)
    place = parse_device(device)

    from gpt2rt.quantization import QuantizationConfig

    try:
        config = QuantizationConfig(
            scheme,
            group_size,
            symmetric=not asymmetric,
            double_quant=double_quant,
            embeddings="none" if format == "bitsandbytes" else embeddings,
            activations=activations,
            skip_modules=tuple(skip or ()),
            method=method,
        )
    except ValueError as error:
        raise UsageFault(str(error)) from None
    from gpt2rt.models.quantize import quantize_model

    hub = {"revision": revision, "subfolder": subfolder, "local_files_only": local_files_only}
    tokenizer = _tokenizer(source, hub, needed=calibration_text is not None or eval_text is not None)
    kind = _model_class(source, hub)
    model = kind.from_pretrained(source, dtype=dtype, device=place, **hub)
    # of the class: a classifier's output layer has that name too
    if eval_text is not None and not hasattr(kind, "score"):
        if eval is not None:
            raise UsageFault(f"--eval measures perplexity, which a {kind.__name__} does not give; leave it out")
        eval_text = None
    result: dict[str, Any] = {
        "source": source,
        "destination": str(destination),
        "quantization_config": config.to_dict(),
        "format": format,
        "bytes_before": model.get_memory_footprint(),
        "dtype": str(model.dtype).removeprefix("torch."),
    }
    reference = kind.from_pretrained(source, dtype=dtype, device=place, **hub) if eval_text is not None else None
    start = time.perf_counter()
    quantize_model(
        model,
        config,
        calibration=None if calibration_text is None else [calibration_text],
        tokenizer=tokenizer,
        max_calibration_tokens=calibration_tokens,
        progress=sys.stderr.isatty(),
    )
    result["seconds"] = time.perf_counter() - start
    result["bytes_after"] = model.get_memory_footprint()
    result["cost"] = None
    if eval_text is not None:
        ids = list(tokenizer.encode(eval_text, add_special_tokens=False, verbose=False))[:eval_tokens]
        result["cost"] = dataclasses.asdict(measure_cost(reference, model, ids))
    model.save_pretrained(destination, quantization_format=format)
    if tokenizer is not None:
        tokenizer.save_pretrained(destination)
    result["bytes_on_disk"] = sum(path.stat().st_size for path in destination.glob("*.safetensors"))
    if as_json:
        print(json.dumps(result))
    else:
        _print(result, config)


@dataclasses.dataclass(frozen=True)
class Cost:
    """What quantisation changes on a text.

    Attributes:
        num_tokens: of the text.
        logit_error: the largest difference of a logit.
        divergence: the mean over tokens of KL(before || after), in nats.
        top1: the part of the tokens after which the likeliest next token is the same.
        perplexity_before, perplexity_after: as ``gpt2rt score`` computes them.
    """

    num_tokens: int
    logit_error: float
    divergence: float
    top1: float
    perplexity_before: float
    perplexity_after: float


def measure_cost(before: Any, after: Any, ids: list[int]) -> Cost:
    """What the second of two language models does differently on a text.

    Args:
        before, after: models with the same vocabulary.
        ids: of the text; it is cut into windows of ``n_positions`` tokens.

    Raises:
        ValueError: the text has fewer than two tokens.
    """
    import torch

    if len(ids) < 2:
        raise ValueError(f"the text to measure on has {len(ids)} tokens; it needs at least 2")
    length = min(before.config.n_positions, len(ids))
    windows = torch.tensor(ids[: len(ids) // length * length]).view(-1, length)
    largest, divergence, same = 0.0, 0.0, 0
    with torch.no_grad():
        for batch in windows.split(_WINDOWS_TOGETHER):
            first, second = (model(batch.to(model.device)).logits.float() for model in (before, after))
            largest = max(largest, float((first - second).abs().max()))
            expected, found = first.log_softmax(-1), second.log_softmax(-1)
            divergence += float((expected.exp() * (expected - found)).sum())
            same += int((first.argmax(-1) == second.argmax(-1)).sum())
    return Cost(
        num_tokens=len(ids),
        logit_error=largest,
        divergence=divergence / windows.numel(),
        top1=same / windows.numel(),
        perplexity_before=before.score([ids]).perplexity,
        perplexity_after=after.score([ids]).perplexity,
    )


def _print(result: dict[str, Any], config: QuantizationConfig) -> None:
    before, after = (result[name] / 1e6 for name in ("bytes_before", "bytes_after"))
    print(
        f"{result['source']}: {before:.2f} MB ({result['dtype']}) -> {after:.2f} MB ({_described(config)}), "
        f"quantised in {result['seconds']:.1f} s"
    )
    cost = result["cost"]
    if cost is None:
        print("its cost was not measured; pass --eval FILE")
    else:
        change = 100 * (cost["perplexity_after"] / cost["perplexity_before"] - 1)
        print(
            f"perplexity: {cost['perplexity_before']:.3f} -> {cost['perplexity_after']:.3f} ({change:+.2f} %), "
            f"{cost['num_tokens']} tokens"
        )
        print(
            f"logits: largest error {cost['logit_error']:.4f}, mean KL divergence {cost['divergence']:.6f} nats, "
            f"same likeliest token {100 * cost['top1']:.2f} %"
        )
    print(f"wrote {result['destination']}: {result['bytes_on_disk'] / 1e6:.2f} MB, {result['format']} layout")


def _described(config: QuantizationConfig) -> str:
    parts = [config.scheme]
    if config.group_size is not None:
        parts.append(f"groups of {config.group_size}")
    if not config.symmetric:
        parts.append("zero points")
    if config.double_quant:
        parts.append("8-bit scales")
    parts += [f"embeddings {config.embeddings}", config.method]
    return ", ".join(parts)


def _check_destination(source: str, destination: Path, overwrite: bool) -> None:
    """Raise UsageFault unless DST is free, or may be written to."""
    if destination.exists() and not destination.is_dir():
        raise UsageFault(f"{destination} is a file; name a folder")
    if destination.is_dir() and Path(source).is_dir() and destination.samefile(source):
        raise UsageFault(f"SRC and DST are the same folder, {destination}; the float weights would be lost")
    if destination.is_dir() and any(destination.iterdir()) and not overwrite:
        raise UsageFault(f"{destination} holds files already; pass --overwrite to write into it")


def _read(flag: str, path: Path) -> str:
    """The text of a file.

    Raises:
        UsageFault: there is no such file, or it holds no UTF-8 text.
    """
    if not path.is_file():
        raise UsageFault(f"{flag} {path} is no file")
    data = path.read_bytes()
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UsageFault(f"{flag} {path} is not UTF-8 text (byte {error.start} of {len(data)})") from None
    if not text:
        raise UsageFault(f"{flag} {path} is empty")
    return text


def _eval_text(source: str, path: Path | None) -> str | None:
    """The text to measure on; with an embedded model the part of its text that it was not trained on."""
    if path is not None:
        return _read("--eval", path)
    from gpt2rt.checkpoint.resolve import embedded_folder, embedded_models

    if source not in embedded_models():
        return None
    return (embedded_folder() / "held-out.txt").read_text(encoding="utf-8")


def _tokenizer(source: str, hub: dict[str, Any], needed: bool) -> Any:
    """The checkpoint's tokenizer; None if it has none and none is needed."""
    from gpt2rt.tokenizers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(source, **hub)
    except (OSError, ValueError) as error:
        if needed:
            raise
        print(f"gpt2rt: warning: no tokenizer is copied: {error}", file=sys.stderr)
        return None


def _model_class(source: str, hub: dict[str, Any]) -> Any:
    """The class that the checkpoint's config names; the language model's if it names none."""
    import gpt2rt.models as models
    from gpt2rt.config.auto import read_config
    from gpt2rt.models.auto import AutoModelForCausalLM

    _, fields = read_config(source, **hub)
    names = fields.get("architectures") or []
    return getattr(models, str(names[0]), AutoModelForCausalLM) if names else AutoModelForCausalLM
