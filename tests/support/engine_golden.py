"""Tokens and log-probabilities of the embedded models, kept in tests/engine/golden.

    python tests/support/engine_golden.py       # writes the files anew; only where a change of numbers is meant

Bits may differ between instruction sets. A golden continuation therefore says how many of its tokens are ``stable``:
those that came out again each time the logits were disturbed by up to the tolerance.
"""

from __future__ import annotations

import json
import pathlib

import torch

from gpt2rt.engine import LLM, SamplingParams

GOLDEN = pathlib.Path(__file__).resolve().parent.parent / "engine" / "golden"
CASES = [(name, dtype) for name in ("tiny-gpt2", "tiny-gpt1") for dtype in ("float32", "int8")]
#: how far a log-probability may be from the golden one. Activations of int8 are rounded to integers: a difference in
#: the last bit of a float can move one by a whole step
TOLERANCE = {"float32": 1e-3, "int8": 2e-2}
#: how many times the logits are disturbed to see which tokens are stable
TRIES = 16
PROMPT = "JULIET:\nO, swear not by the moon, the inconstant moon, that monthly changes in her circled orb"
QUESTIONS = {
    "greedy": {"temperature": 0.0, "max_tokens": 64},
    "drawn": {"seed": 1, "max_tokens": 64},
    "top_p": {"seed": 2, "max_tokens": 64, "temperature": 0.8, "top_p": 0.9, "top_k": 40},
    "penalised": {"seed": 3, "max_tokens": 64, "repetition_penalty": 1.2, "frequency_penalty": 0.2},
}


def path(case: tuple[str, str]) -> pathlib.Path:
    """The file of a model with weights of a dtype."""
    return GOLDEN / f"{case[0]}-{case[1]}.json"


def read(case: tuple[str, str]) -> dict:
    """The golden continuations by name."""
    return json.loads(path(case).read_text(encoding="utf-8"))


def _engine(case: tuple[str, str]) -> LLM:
    name, dtype = case
    options = {"quantization": "int8"} if dtype == "int8" else {"dtype": "float32"}
    return LLM(f"gpt2rt/{name}", num_blocks=128, num_threads=1, executor="cpu", kv_cache_dtype="float32", **options)


def _ask(llm: LLM, processors=None, **settings) -> dict:
    params = SamplingParams(logprobs=0, prompt_logprobs=0, logits_processors=processors, **settings)
    output = llm.generate([PROMPT], params)[0]
    choice = output.outputs[0]
    return {
        "token_ids": list(choice.token_ids),
        "text": choice.text,
        "logprobs": [entry[token].logprob for token, entry in zip(choice.token_ids, choice.logprobs, strict=True)],
        "prompt_logprobs": [next(iter(entry.values())).logprob for entry in output.prompt_logprobs[1:]],
    }


def compute(case: tuple[str, str]) -> dict:
    """The continuations as they are now."""
    llm = _engine(case)
    return {name: _ask(llm, **settings) for name, settings in QUESTIONS.items()}


def compare(found: dict, expected: dict, tolerance: float) -> str | None:
    """What is wrong with a continuation whose log-probabilities may be so far away; None: nothing."""
    stable = expected["stable"]
    for place, (mine, theirs) in enumerate(zip(found["token_ids"], expected["token_ids"], strict=True)):
        if mine != theirs:
            if place < stable:
                return f"token {place} is {mine}, expected {theirs}; {stable} are stable"
            # what follows continues another text
            stable = place
            break
    else:
        stable = len(expected["token_ids"])
    for key, count in (("prompt_logprobs", None), ("logprobs", stable)):
        for place, (mine, theirs) in enumerate(zip(found[key][:count], expected[key][:count], strict=True)):
            if abs(mine - theirs) > tolerance:
                return f"{key}: log-probability {place} is {mine}, expected {theirs} within {tolerance}"
    return None


def _stable(llm: LLM, expected: list[int], settings: dict, noise: float) -> int:
    """How many tokens come out again when the logits are disturbed by up to ``noise``."""
    stable = len(expected)
    for seed in range(TRIES):
        generator = torch.Generator().manual_seed(seed)

        def disturb(output_ids, logits, generator=generator):
            return logits + noise * (2 * torch.rand(logits.shape, generator=generator) - 1)

        found = _ask(llm, [disturb], **settings)["token_ids"]
        differing = [place for place in range(len(expected)) if found[place] != expected[place]]
        stable = min([stable, *differing])
    return stable


def main() -> None:
    GOLDEN.mkdir(exist_ok=True)
    for case in CASES:
        llm, result = _engine(case), compute(case)
        for name, continuation in result.items():
            continuation["stable"] = _stable(llm, continuation["token_ids"], QUESTIONS[name], TOLERANCE[case[1]])
            print(*case, name, f"{continuation['stable']} of {len(continuation['token_ids'])} stable")
        path(case).write_text(json.dumps(result, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
