"""Is this installation good, and does it agree with transformers?

``check_install`` runs the embedded model and compares it with numbers that transformers gave for the same files;
``record`` writes those numbers. ``compare`` runs both libraries side by side on any checkpoint.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gpt2rt.errors import CheckpointError

EMBEDDED_MODEL = "gpt2rt/tiny-gpt2"
RECORD_NAME = "doctor.json"

#: largest accepted difference of float32 logits, relative to the largest logit; sums in another order differ by 1e-6
LOGIT_TOLERANCE = 1e-4
#: the same for hidden states, some of which are a thousand times larger than the rest
HIDDEN_TOLERANCE = 1e-4

_PROMPTS = ("ROMEO:", "First Citizen:\n", "O, that this too too solid flesh")
_RECORDED_TOKENS = 24
_RECORDED_LOGITS = 64
# a recorded token is this much likelier than the next one, in logits: no rounding on any machine turns it over
_MARGIN = 0.01

# what tokenizers get wrong: spaces, line ends, digits, apostrophes, scripts, emoji, control characters, specials
_STRINGS = (
    "Hello world",
    " leading and  double   spaces ",
    "line\nbreaks\r\n\n\tand tabs",
    "it's they'll I'VE 12,345.67",
    "Grüße aus Köln, naïve café",
    "Привет, мир",
    "日本語のテキスト",
    "🤗🏽 👨‍👩‍👧",
    "\u0000\u200b\ufeff\u00ad",
    "<|endoftext|>after a special token",
    "x" * 100,
)


@dataclasses.dataclass
class Check:
    """One finding.

    Attributes:
        name: what was looked at.
        status: "ok", "note" (worth knowing, not wrong) or "mismatch".
        detail: what was found, in words.
        value: the number behind it, if there is one.
    """

    name: str
    status: str
    detail: str
    value: float | None = None


@dataclasses.dataclass
class Report:
    """All findings.

    Attributes:
        model: what was run.
        checks: in order.
        ok: there is no mismatch.
        seconds: how long it took.
        summary: one sentence.
    """

    model: str
    checks: list[Check] = dataclasses.field(default_factory=list)
    ok: bool = True
    seconds: float = 0.0
    summary: str = ""

    def add(self, name: str, ok: bool, detail: str, value: float | None = None) -> None:
        """Add a finding that is right or wrong."""
        self.checks.append(Check(name, "ok" if ok else "mismatch", detail, value))
        self.ok = self.ok and ok

    def note(self, name: str, detail: str, value: float | None = None) -> None:
        """Add a finding that is neither."""
        self.checks.append(Check(name, "note", detail, value))


def _relative_error(ours: Tensor, theirs: Tensor) -> float:
    """The largest difference, in units of the largest value."""
    return float((ours.float() - theirs.float()).abs().max() / theirs.float().abs().max().clamp(min=1e-30))


def _rounding(logits: Tensor) -> float:
    """The largest difference of two logits that the order of additions can make."""
    return 2 * LOGIT_TOLERANCE * float(logits.float().abs().max())


def _generation_logits(model: Any, ids: list[int]) -> Tensor:
    """[vocab_size] float32: the next token's logits from the graph that ``generate`` runs."""
    out = model.generate([ids], max_new_tokens=1, return_dict_in_generate=True, output_logits=True, do_sample=False)
    return out.logits[0][0]


def _greedy_ids(model: Any, ids: list[int], count: int) -> list[int]:
    out = model.generate(
        [ids], max_new_tokens=count, min_new_tokens=count, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    return out[0, len(ids) :].tolist()


# ---- the installation ----------------------------------------------------------------------------------------------


def check_install() -> Report:
    """Run the embedded model on every executor and compare with the record.

    Raises:
        CheckpointError: the embedded model or its record is missing or damaged.
    """
    from gpt2rt import ops
    from gpt2rt.checkpoint.json_files import read_json_object
    from gpt2rt.models.auto import AutoModelForCausalLM
    from gpt2rt.tokenizers import AutoTokenizer

    start = time.perf_counter()
    folder = _embedded_folder()
    record = read_json_object(folder / RECORD_NAME)
    report = Report(EMBEDDED_MODEL)
    status = ops.extension_status()
    if status.loaded:
        report.add("C++ extension", True, f"loaded, {ops.cpu_isa()}")
    else:
        report.note("C++ extension", f"not loaded, so everything runs on plain torch: {status.reason}")
    digest = _weights_digest(folder)
    report.add("embedded weights", digest == record["weights_sha256"], f"sha256 {digest[:12]}")
    tokenizer = AutoTokenizer.from_pretrained(EMBEDDED_MODEL)
    wrong = [case["prompt"] for case in record["cases"] if tokenizer.encode(case["prompt"]) != case["input_ids"]]
    report.add("tokenizer", not wrong, f"differs on {wrong[0]!r}" if wrong else f"{len(record['cases'])} texts")
    model = AutoModelForCausalLM.from_pretrained(EMBEDDED_MODEL, dtype=torch.float32)
    for name in ("cpu", "eager") if status.loaded else ("eager",):
        model.generation_executor(name)
        _check_executor(report, model, name, record["cases"])
    return _finish(report, start, "install is good", "install is NOT good")


def _check_executor(report: Report, model: Any, name: str, cases: list[dict[str, Any]]) -> None:
    error, tokens, wrong = 0.0, 0, ""
    begin = time.perf_counter()
    for case in cases:
        ids, expected = case["input_ids"], torch.tensor(case["logits"])
        error = max(error, _relative_error(_generation_logits(model, ids)[case["logit_ids"]], expected))
        ours = _greedy_ids(model, ids, len(case["tokens"]))
        tokens += len(ours)
        if ours != case["tokens"]:
            wrong = wrong or f"other tokens after {case['prompt']!r}"
    rate = tokens / (time.perf_counter() - begin)
    report.add(f"{name}: logits", error <= LOGIT_TOLERANCE, f"largest relative error {error:.1e}", error)
    report.add(f"{name}: greedy tokens", not wrong, wrong or f"{tokens} equal, {rate:.0f} tokens/s", rate)
    together = model.generate(
        [case["input_ids"] for case in cases], max_new_tokens=8, do_sample=False, eos_token_id=None, pad_token_id=0
    )[:, -8:].tolist()
    alone = [_greedy_ids(model, case["input_ids"], 8) for case in cases]
    report.add(f"{name}: batch", together == alone, f"{len(cases)} prompts together as alone")


def _embedded_folder() -> Path:
    from gpt2rt.checkpoint.resolve import embedded_folder

    folder = embedded_folder() / EMBEDDED_MODEL.rpartition("/")[2]
    if not (folder / "config.json").exists():
        raise CheckpointError(f"the embedded model {EMBEDDED_MODEL} is missing from {folder}; reinstall gpt2rt")
    return folder


def _weights_digest(folder: Path) -> str:
    return hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()


def _finish(report: Report, start: float, good: str, bad: str) -> Report:
    report.seconds = round(time.perf_counter() - start, 3)
    wrong = [check.name for check in report.checks if check.status == "mismatch"]
    report.summary = f"{bad}: {', '.join(wrong)}" if wrong else f"{good} ({report.seconds:.1f} s)"
    return report


def record(folder: str | os.PathLike[str] | None = None) -> Path:
    """Write the record of an embedded model, from transformers' float32 results on the same files.

    Args:
        folder: the model's folder; None: that of the embedded model.

    Returns:
        The file written, ``doctor.json`` in the folder.

    Raises:
        ImportError: transformers is not installed.
        ValueError: a prompt's continuation has too few tokens that are clearly likelier than the next.
    """
    from gpt2rt.checkpoint.atomic import write_text

    transformers = _transformers()
    place = Path(folder) if folder is not None else _embedded_folder()
    with _quiet_transformers():
        tokenizer = transformers.AutoTokenizer.from_pretrained(place)
        model = transformers.AutoModelForCausalLM.from_pretrained(
            place, dtype=torch.float32, attn_implementation="eager"
        )
    model.eval()
    cases = []
    for prompt in _PROMPTS:
        ids = tokenizer.encode(prompt)
        logits = _forward_logits(model, ids)
        # evenly spaced over the vocabulary, and the likeliest
        spaced = torch.linspace(0, logits.numel() - 1, _RECORDED_LOGITS).long().tolist()
        chosen = sorted({*spaced, int(logits.argmax())})
        tokens: list[int] = []
        while len(tokens) < _RECORDED_TOKENS:
            best = _forward_logits(model, ids + tokens).topk(2)
            if float(best.values[0] - best.values[1]) < _MARGIN:
                break
            tokens.append(int(best.indices[0]))
        if len(tokens) < 4:
            raise ValueError(f"after {prompt!r} only {len(tokens)} tokens are clearly the likeliest; choose another")
        cases.append(
            {
                "prompt": prompt,
                "input_ids": ids,
                "tokens": tokens,
                "logit_ids": chosen,
                "logits": [float(logits[i]) for i in chosen],
            }
        )
    content = {
        "model": EMBEDDED_MODEL,
        "weights_sha256": _weights_digest(place),
        "recorded_with": {"transformers": transformers.__version__, "torch": torch.__version__},
        "cases": cases,
    }
    write_text(place / RECORD_NAME, json.dumps(content, indent=1, ensure_ascii=False) + "\n")
    return place / RECORD_NAME


@torch.no_grad()
def _forward_logits(model: Any, ids: list[int]) -> Tensor:
    return model(torch.tensor([ids])).logits[0, -1].float()


# ---- side by side with transformers --------------------------------------------------------------------------------


def _transformers() -> Any:
    try:
        import transformers
    except ImportError as error:
        raise ImportError(f"this needs transformers to compare with: pip install transformers ({error})") from None
    return transformers


@contextlib.contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Without its progress bars, log and warnings: what matters is in the report."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def compare(model: str, *, local_files_only: bool = False) -> Report:
    """Run a checkpoint in gpt2rt and in transformers, both in float32 on the CPU.

    Compared are the tokenizers, the hidden states after each block, the logits of ``forward`` and of the graph that
    ``generate`` runs, the likeliest token at each position, greedy continuations, and the speed.

    Args:
        model: a folder, an embedded id or a hub id.
        local_files_only: never download.

    Raises:
        ImportError: transformers is not installed.
        OSError: one of the two cannot load the checkpoint.
    """
    from gpt2rt.checkpoint.resolve import Source
    from gpt2rt.models.auto import AutoModelForCausalLM
    from gpt2rt.tokenizers import AutoTokenizer

    transformers = _transformers()
    start = time.perf_counter()
    report = Report(model)
    # transformers does not know the ids of embedded models
    folder = Source(model, local_files_only=local_files_only).folder
    place = model if folder is None else str(folder)
    options: dict[str, Any] = {"local_files_only": local_files_only}
    ours = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32, **options)
    with _quiet_transformers():
        theirs = transformers.AutoModelForCausalLM.from_pretrained(
            place, dtype=torch.float32, attn_implementation="eager", **options
        ).eval()
    ids = _sample_ids(ours.config)
    try:
        tokenizer = AutoTokenizer.from_pretrained(model, **options)
    except (OSError, ValueError) as error:
        report.note("tokenizer", f"not compared: {error}")
    else:
        with _quiet_transformers():
            their_tokenizer = transformers.AutoTokenizer.from_pretrained(place, **options)
            _compare_tokenizers(report, tokenizer, their_tokenizer)
    _compare_forward(report, ours, theirs, ids)
    _compare_generation(report, ours, theirs, ids)
    return _finish(report, start, "gpt2rt agrees with transformers", "gpt2rt DISAGREES with transformers")


def _sample_ids(config: Any) -> Tensor:
    """[2, length] fixed ids spread over the vocabulary."""
    length = max(1, min(24, config.n_positions // 2))
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, config.vocab_size, (2, length), generator=generator)


def _compare_tokenizers(report: Report, ours: Any, theirs: Any) -> None:
    different = [text for text in _STRINGS if ours.encode(text) != theirs.encode(text)]
    detail = f"{different[0]!r}: {ours.encode(different[0])} / {theirs.encode(different[0])}" if different else ""
    report.add("tokenizer: encode", not different, detail or f"{len(_STRINGS)} texts equal")
    wrong = [
        text
        for text in _STRINGS
        if ours.decode(theirs.encode(text), clean_up_tokenization_spaces=False)
        != theirs.decode(theirs.encode(text), clean_up_tokenization_spaces=False)
    ]
    report.add("tokenizer: decode", not wrong, f"differs on {wrong[0]!r}" if wrong else f"{len(_STRINGS)} texts equal")


@torch.no_grad()
def _compare_forward(report: Report, ours: Any, theirs: Any, ids: Tensor) -> None:
    mine = ours(ids, output_hidden_states=True)
    with _quiet_transformers():
        other = theirs(ids, output_hidden_states=True)
    layers = list(zip(mine.hidden_states, other.hidden_states, strict=True))
    for index, (state, reference) in enumerate(layers):
        name = "embedding" if index == 0 else f"block {index}"
        if index == len(layers) - 1 and ours.config.model_type == "gpt2":
            # OpenAI GPT has its norms inside the blocks
            name += " + final norm"
        _add_error(report, f"hidden states: {name}", state, reference, HIDDEN_TOLERANCE)
    _add_error(report, "logits: forward", mine.logits, other.logits, LOGIT_TOLERANCE)
    # a token counts as the likeliest if rounding alone could make it so
    chosen = other.logits.gather(-1, mine.logits.argmax(-1, keepdim=True)).squeeze(-1)
    agreeing = int((chosen >= other.logits.amax(-1) - _rounding(other.logits)).sum())
    report.add("argmax", agreeing == ids.numel(), f"{agreeing} of {ids.numel()} positions", agreeing / ids.numel())
    graph = torch.stack([_generation_logits(ours, row) for row in ids.tolist()])
    executor = ours.generation_executor().name
    _add_error(report, f"logits: generate ({executor})", graph, other.logits[:, -1], LOGIT_TOLERANCE)


def _add_error(report: Report, name: str, ours: Tensor, theirs: Tensor, tolerance: float) -> None:
    relative = _relative_error(ours, theirs)
    absolute = float((ours.float() - theirs.float()).abs().max())
    report.add(name, relative <= tolerance, f"max abs error {absolute:.1e}, relative {relative:.1e}", absolute)


def _compare_generation(report: Report, ours: Any, theirs: Any, ids: Tensor) -> None:
    count = max(1, min(16, ours.config.n_positions - ids.size(1)))
    row = ids[:1]

    def run(model: Any) -> Tensor:
        return model.generate(
            row,
            attention_mask=torch.ones_like(row),
            max_new_tokens=count,
            min_new_tokens=count,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )

    with _quiet_transformers():
        mine, other = run(ours)[0], run(theirs)[0]
        differing = (mine != other).nonzero().flatten().tolist()
        if not differing:
            report.add("greedy tokens", True, f"{count} tokens after {row.size(1)} equal")
        else:
            place = differing[0]
            logits = _forward_logits(theirs, other[:place].tolist())
            margin = float(logits[other[place]] - logits[mine[place]])
            detail = f"differ from token {place - row.size(1)} on, by a margin of {margin:.1e} in the logits"
            if margin <= _rounding(logits):
                report.note("greedy tokens", f"{detail}, which rounding explains")
            else:
                report.add("greedy tokens", False, detail)
        our_rate, their_rate = (count / _fastest(run, model) for model in (ours, theirs))
    report.note(
        "speed",
        f"gpt2rt {our_rate:.1f} tokens/s, transformers {their_rate:.1f} tokens/s, ratio {our_rate / their_rate:.2f}",
        our_rate / their_rate,
    )


def _fastest(run: Callable[[Any], Any], model: Any) -> float:
    """Seconds of the fastest of three runs."""
    times = []
    for _ in range(3):
        begin = time.perf_counter()
        run(model)
        times.append(time.perf_counter() - begin)
    return min(times)


if __name__ == "__main__":
    print(record(sys.argv[1] if len(sys.argv) > 1 else None))
