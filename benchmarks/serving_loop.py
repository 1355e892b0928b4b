"""What does the engine's Python cost a step?

One request decodes on ``LLM.stream``. Of each step three times are noted: of the engine's step, of the executor's step
within it, and of the operations within it that choose the token (``ops.sample``, ``ops.argmax``, ``ops.uniforms``).
The loop's cost is the first less the second; beyond the operations it is Python alone. The time between two outputs of
the stream less the executor's is what a caller sees. Shapes: one so small that the executor takes no time to speak of,
with a small and with GPT-2's vocabulary, and the one of the benchmark, whose weights leave nothing in the caches.
Whether it is that which makes its steps dearer the small model shows: "after 512 MiB" reads so much memory within the
executor's step, as those weights do.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

from common import summary
from cpu_decode import say
from cpu_peers import PEERS
from cpu_peers.gpt2rt_peer import load_model
from shapes import SHAPES

WARM_UP = 10
SAMPLED = {"temperature": 0.8, "top_p": 0.95, "seed": 0}
_EVICTED = 512 * 2**20
CHOICES = ("sample", "argmax", "uniforms")


class Stopwatch:
    """Adds up the seconds within some functions."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def around(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*values: Any, **keywords: Any) -> Any:
            start = time.perf_counter()
            try:
                return function(*values, **keywords)
            finally:
                self.seconds += time.perf_counter() - start

        return timed

    def take(self) -> float:
        """What was added up since the last time."""
        seconds, self.seconds = self.seconds, 0.0
        return seconds


def time_steps(
    model: Any, settings: dict[str, Any], steps: int, tokenizer: Any = None, *, evict: bool = False
) -> dict[str, dict[str, float]]:
    """Decode ``steps`` tokens and note where the time goes; ``evict``: each step of the executor empties the caches.

    Returns:
        Microseconds a step: ``engine``, ``executor``, ``loop`` (the first less the second), ``choosing`` (operations
        within it), ``python`` (the loop less those), ``seen`` (between outputs, less the executor).
    """
    from gpt2rt import ops
    from gpt2rt.engine import LLM, RequestOutputKind, SamplingParams

    engine, executor, choosing = Stopwatch(), Stopwatch(), Stopwatch()
    samples: dict[str, list[float]] = {}
    originals = {name: getattr(ops, name) for name in CHOICES}
    with LLM(model, tokenizer=tokenizer) as llm:
        inner = llm.core.served.executor
        plain_step = _evicting(inner.step) if evict else inner.step
        llm.core.step = engine.around(llm.core.step)
        inner.step = executor.around(plain_step)
        for name, function in originals.items():
            setattr(ops, name, choosing.around(function))
        parameters = SamplingParams(
            max_tokens=steps + WARM_UP,
            ignore_eos=True,
            detokenize=llm.tokenizer is not None,
            output_kind=RequestOutputKind.DELTA,
            **settings,
        )
        try:
            before = 0.0
            for number, _ in enumerate(llm.stream([1, 2, 3], parameters)):
                now = time.perf_counter()
                times = engine.take(), executor.take(), choosing.take()
                if number > WARM_UP:
                    note = 1e6 * times[0], 1e6 * times[1], 1e6 * times[2]
                    values = {
                        "engine": note[0],
                        "executor": note[1],
                        "loop": note[0] - note[1],
                        "choosing": note[2],
                        "python": note[0] - note[1] - note[2],
                        "seen": 1e6 * (now - before) - note[1],
                    }
                    for name, value in values.items():
                        samples.setdefault(name, []).append(value)
                before = now
        finally:
            del inner.step
            for name, function in originals.items():
                setattr(ops, name, function)
    return {name: summary(values) for name, values in samples.items()}


def _evicting(step: Callable[..., Any]) -> Callable[..., Any]:
    import torch

    memory = torch.ones(_EVICTED // 4)

    def evicting(*values: Any, **keywords: Any) -> Any:
        result = step(*values, **keywords)
        memory.sum()
        return result

    return evicting


def measure_loop(arguments: argparse.Namespace, checkpoint: str) -> list[dict[str, Any]]:
    """A row for each model and way of choosing."""
    import torch

    from gpt2rt import GPT2Config, GPT2LMHeadModel

    torch.set_num_threads(arguments.threads)
    small = SHAPES["overhead"]
    steps = min(
        arguments.steps, small["n_positions"] - WARM_UP - 8, SHAPES[arguments.shape]["n_positions"] - WARM_UP - 8
    )

    def shaped(vocab_size: int) -> Any:
        torch.manual_seed(0)
        return GPT2LMHeadModel(GPT2Config(**{**small, "vocab_size": vocab_size})).eval()

    models: dict[str, Callable[[], Any]] = {
        "12 layers of width 32, vocabulary 97": lambda: shaped(97),
        "12 layers of width 32, vocabulary 50257": lambda: shaped(50257),
        "gpt2rt/tiny-gpt2, with text": lambda: "gpt2rt/tiny-gpt2",
    }
    form = arguments.formats.split(",")[0]
    models[f"{arguments.shape} {form}"] = lambda: load_model(checkpoint, PEERS[f"gpt2rt-{form}"].options)
    rows = []
    for name, make in models.items():
        model = make()
        for way, settings in (("greedy", {"temperature": 0.0}), ("top-p 0.95", SAMPLED)):
            say(f"loop: {name}, {way}")
            room = 200 if isinstance(model, str) else steps
            rows.append({"model": name, "choice": way, "us": time_steps(model, settings, min(steps, room))})
        if name.endswith("vocabulary 97"):
            name += ", after 512 MiB"
            say(f"loop: {name}, greedy")
            rows.append(
                {"model": name, "choice": "greedy", "us": time_steps(model, {"temperature": 0.0}, 50, evict=True)}
            )
    return rows
