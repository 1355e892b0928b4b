"""The sections of gpu.py, in order of priority."""

from __future__ import annotations

import importlib
from collections.abc import Callable

#: letter -> (name, question); each is a module of this package with a function ``run(session)``
SECTIONS = {
    "a": ("correctness", "every kernel and whole models against float64 and transformers"),
    "b": ("ceilings", "bandwidth, products, the cost of launches"),
    "c": ("decode", "latency of a token at batch 1"),
    "d": ("throughput", "decode steps of 8 to 256 sequences"),
    "e": ("prefill", "prompts of 32 to 1024 tokens, time to the first token"),
    "f": ("kernels", "each kernel's share of bandwidth or peak, variants beside each other"),
    "g": ("invariance", "batch invariance and determinism, bit for bit, and what they cost"),
    "h": ("sanitizer", "compute-sanitizer on the smallest shapes"),
}

#: what one command of under ten minutes runs, in order of worth: first whether it is right and what it promises bit for
#: bit (the sanitizer in what these two leave: it runs the kernels that they have compiled), then latency, then all else
PARTS = {"1": "a,g,h", "2": "b,c", "3": "d,e,f"}
#: how the time of a command is shared, if its sections need more than there is; what one leaves goes to the next
WEIGHTS = {
    "correctness": 6,
    "ceilings": 1,
    "decode": 8,
    "throughput": 3,
    "prefill": 3,
    "kernels": 4,
    "invariance": 3,
    "sanitizer": 4,
}


def chosen(text: str) -> list[str]:
    """Names of sections out of letters or names with commas between; empty: all.

    Raises:
        ValueError: there is no such section.
    """
    names = [name for name, _ in SECTIONS.values()]
    if not text:
        return names
    found = []
    for word in text.split(","):
        key = word.strip()
        name = SECTIONS[key][0] if key in SECTIONS else key
        if name not in names:
            known = ", ".join(f"{letter} = {name}" for letter, (name, _) in SECTIONS.items())
            raise ValueError(f"there is no section {key!r}; choose from {known}")
        found.append(name)
    return found


def runner(name: str) -> Callable:
    """The function of a section."""
    return importlib.import_module(f"gpu_sections.{name}").run
