"""Prompts to measure with, and when they are sent. Everything is a function of the seed.

Data sets (``--dataset-name``), after vLLM's of the same names:

    random    token ids drawn uniformly from the vocabulary without its special tokens; lengths are uniform within
              ``length * (1 +- range_ratio)``; ``prefix_len`` tokens at the start may be the same in all prompts
    custom    a JSON Lines file with a ``prompt`` in each line, and perhaps its ``output_tokens``
    sharegpt  a JSON file of conversations, as ShareGPT publishes them: the first message is the prompt, the length of
              the second one is how many tokens are asked for
"""

from __future__ import annotations

import dataclasses
import json
import math
import pathlib
from collections.abc import Iterator
from typing import Any

DATASETS = ("random", "custom", "sharegpt")


@dataclasses.dataclass(frozen=True, slots=True)
class Sample:
    """One request to make: the prompt as token ids or as text, its length, and how many tokens to ask for."""

    prompt: list[int] | str
    prompt_len: int
    output_len: int


@dataclasses.dataclass(frozen=True)
class Workload:
    """Which prompts to make.

    Attributes:
        name: one of DATASETS.
        num_prompts: how many.
        input_len, output_len: tokens; a file's own lengths hold where ``output_len`` is None.
        range_ratio: 0 for equal lengths, below 1; "random" only.
        prefix_len: tokens that all prompts begin with, beyond ``input_len``; "random" only.
        path: the file of "custom" and "sharegpt".
        seed: of all that is drawn.
    """

    name: str = "random"
    num_prompts: int = 1000
    input_len: int = 1024
    output_len: int | None = 128
    range_ratio: float = 0.0
    prefix_len: int = 0
    path: pathlib.Path | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.name not in DATASETS:
            raise ValueError(f"there is no data set {self.name!r}; choose of {', '.join(DATASETS)}")
        if self.num_prompts < 1 or self.input_len < 1 or (self.output_len is not None and self.output_len < 1):
            lengths = f"num_prompts {self.num_prompts}, input_len {self.input_len}, output_len {self.output_len}"
            raise ValueError(f"at least one prompt, input and output token are needed, got {lengths}")
        if not 0.0 <= self.range_ratio < 1.0 or self.prefix_len < 0:
            raise ValueError(
                f"range_ratio must be at least 0 and below 1, prefix_len at least 0, "
                f"got {self.range_ratio} and {self.prefix_len}"
            )
        if (self.path is None) != (self.name == "random"):
            raise ValueError(f"data set {self.name!r} " + ("takes no file" if self.path else "needs a file"))

    def samples(self, tokenizer: Any, *, extra: int = 0) -> list[Sample]:
        """The prompts, and ``extra`` further ones to warm up with, at the end.

        Raises:
            ValueError: the file does not hold what is expected, or no prompt.
            OSError: it cannot be read.
        """
        if self.name == "random":
            return random_samples(
                ordinary_ids(tokenizer),
                self.num_prompts + extra,
                input_len=self.input_len,
                output_len=128 if self.output_len is None else self.output_len,
                range_ratio=self.range_ratio,
                prefix_len=self.prefix_len,
                seed=self.seed,
            )
        assert self.path is not None
        read = _custom if self.name == "custom" else _sharegpt
        found = []
        for text, answer in read(self.path):
            wanted = self.output_len
            if wanted is None:
                wanted = answer if isinstance(answer, int) else len(tokenizer.encode(answer))
            if wanted > 0:
                found.append(Sample(text, len(tokenizer.encode(text)), wanted))
        if not found:
            raise ValueError(f"{self.path} holds no prompt")
        import numpy as np

        order = np.random.default_rng(self.seed).permutation(len(found))
        # too few: from the start again, as vLLM does it
        return [found[order[i % len(found)]] for i in range(self.num_prompts + extra)]


def ordinary_ids(tokenizer: Any) -> list[int]:
    """All ids of a tokenizer but the special ones."""
    special = set(tokenizer.all_special_ids)
    return [token for token in range(len(tokenizer)) if token not in special]


def random_samples(
    ids: list[int],
    count: int,
    *,
    input_len: int,
    output_len: int,
    range_ratio: float = 0.0,
    prefix_len: int = 0,
    seed: int = 0,
) -> list[Sample]:
    """Prompts of random ids out of ``ids``."""
    import numpy as np

    generator = np.random.default_rng(seed)
    vocabulary = np.asarray(ids)

    def lengths(middle: int) -> Any:
        low, high = max(1, math.floor(middle * (1 - range_ratio))), math.ceil(middle * (1 + range_ratio))
        return generator.integers(low, high + 1, count)

    prefix = generator.choice(vocabulary, prefix_len).tolist()
    inputs, outputs = lengths(input_len), lengths(output_len)
    return [
        Sample(prefix + generator.choice(vocabulary, inputs[i]).tolist(), prefix_len + int(inputs[i]), int(outputs[i]))
        for i in range(count)
    ]


def _custom(path: pathlib.Path) -> Iterator[tuple[str, str | int]]:
    with open(path, encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                entry = json.loads(line)
                prompt, wanted = entry["prompt"], entry.get("output_tokens", 128)
            except (ValueError, TypeError, KeyError, AttributeError):
                prompt = wanted = None
            if not isinstance(prompt, str) or not isinstance(wanted, int):
                raise ValueError(f'{path}, line {number}: expected {{"prompt": TEXT, "output_tokens": NUMBER}}')
            yield prompt, wanted


def _sharegpt(path: pathlib.Path) -> Iterator[tuple[str, str | int]]:
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
        conversations = [entry["conversations"] for entry in entries]
        for messages in conversations:
            if len(messages) >= 2:
                yield str(messages[0]["value"]), str(messages[1]["value"])
    except (ValueError, TypeError, KeyError):
        raise ValueError(f'{path}: expected a list of {{"conversations": [{{"value": TEXT}}, ...]}}') from None


def arrival_times(count: int, request_rate: float, burstiness: float = 1.0, seed: int = 0) -> list[float]:
    """Seconds from the start at which requests are sent.

    The gaps between them follow a gamma distribution with shape ``burstiness`` and mean 1 / ``request_rate``: 1 is a
    Poisson process, less comes in bursts, more is more even. As in vLLM they are scaled so that the last request is
    sent after ``count / request_rate`` seconds whatever was drawn. An infinite rate sends everything at once.

    Raises:
        ValueError: rate or burstiness are not positive.
    """
    if not request_rate > 0.0 or not (burstiness > 0.0 and math.isfinite(burstiness)):
        raise ValueError(f"request rate and burstiness must be positive, got {request_rate} and {burstiness}")
    if math.isinf(request_rate):
        return [0.0] * count
    import numpy as np

    gaps = np.random.default_rng(seed).gamma(burstiness, 1.0 / (request_rate * burstiness), count)
    moments = np.cumsum(gaps)
    if moments[-1] > 0.0:
        moments *= count / request_rate / moments[-1]
    return moments.tolist()
