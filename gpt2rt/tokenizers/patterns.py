"""Which regular expressions of a ``tokenizer.json`` are run.

The library's engine backtracks: a pattern such as ``(a+)+$`` takes time exponential in the text. Accepted are patterns
that cannot: no references and recursion, no repetition of anything that contains a repetition or a choice, and no two
unlimited repetitions in a row, except in the parts listed here of the patterns of well-known models. What is left takes
time quadratic in the text at worst.
"""

import re
from typing import NamedTuple

from gpt2rt.errors import TokenizerError

MAX_PATTERN_CHARACTERS = 4096
# alternatives with two repetitions that do not compete for the same characters, or whose failure is the end of a run
KNOWN_ALTERNATIVES = frozenset(
    {
        # GPT-4, Llama 3, Qwen
        r"\s*[\r\n]+",
        r"\s*[\r\n]",
        r" ?[^\s\p{L}\p{N}]+[\r\n]*",
        # GPT-4o
        r" ?[^\s\p{L}\p{N}]+[\r\n/]*",
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
        # DeepSeek
        r" ?[\p{P}\p{S}]+[\r\n]*",
    }
)
# {m,n} with larger numbers counts as unlimited
_MAX_COUNT = 32

_GROUP = re.compile(r"\((\?(?:[imsx-]*:|=|!|<=|<!|>))?")
_QUANTIFIER = re.compile(r"(?:[*+?]|\{(\d*)(,?)(\d*)\})[?+]?")
_REFERENCE = re.compile(r"\\(?:[1-9]|k|g)")
_CLASS_ESCAPE = re.compile(r"\\(?:[pP]\{\^?\w+\}|x\{[0-9A-Fa-f]+\}|x[0-9A-Fa-f]{2}|u[0-9A-Fa-f]{4}|.)", re.DOTALL)


class _Cost(NamedTuple):
    repetitions: int  # unlimited repetitions one after the other
    simple: bool  # neither a repetition nor a choice inside


def check_pattern(pattern: str, where: str) -> str:
    """The pattern, if it cannot run away.

    Raises:
        TokenizerError: it might.
    """
    if not pattern or len(pattern) > MAX_PATTERN_CHARACTERS:
        raise TokenizerError(
            f"{where}: a pattern has {len(pattern)} characters, expected 1 to {MAX_PATTERN_CHARACTERS}"
        )
    try:
        cost, end = _alternatives(pattern, 0, 0)
    except _Refused as error:
        raise TokenizerError(f"{where}: the pattern {pattern!r} is not run: {error}") from None
    if end != len(pattern):
        raise TokenizerError(f"{where}: the pattern {pattern!r} has a bracket too many at character {end}")
    if cost.repetitions > 1:
        raise TokenizerError(
            f"{where}: the pattern {pattern!r} is not run: {cost.repetitions} unlimited repetitions in a row can take "
            "very long, at most one is accepted outside the patterns of well-known models"
        )
    return pattern


class _Refused(Exception):
    pass


def _alternatives(pattern: str, at: int, depth: int) -> tuple[_Cost, int]:
    """The cost of ``a|b|...`` up to a closing bracket or the end, and where that is."""
    if depth > 20:
        raise _Refused("its groups are nested too deep")
    costs = []
    while True:
        start = at
        cost, at = _sequence(pattern, at, depth)
        known = depth == 0 and pattern[start:at] in KNOWN_ALTERNATIVES
        costs.append(_Cost(0, False) if known else cost)
        if at < len(pattern) and pattern[at] == "|":
            at += 1
            continue
        simple = len(costs) == 1 and costs[0].simple
        return _Cost(max(cost.repetitions for cost in costs), simple), at


def _sequence(pattern: str, at: int, depth: int) -> tuple[_Cost, int]:
    repetitions, simple = 0, True
    while at < len(pattern) and pattern[at] not in "|)":
        inner, at = _atom(pattern, at, depth)
        found = _QUANTIFIER.match(pattern, at)
        if found:
            inner, at = _repeated(inner, found), found.end()
        repetitions += inner.repetitions
        simple = simple and inner.simple
    return _Cost(repetitions, simple), at


def _atom(pattern: str, at: int, depth: int) -> tuple[_Cost, int]:
    """One character, class, escape or group."""
    char = pattern[at]
    if char == "\\":
        if _REFERENCE.match(pattern, at):
            raise _Refused("it refers back to a group")
        found = _CLASS_ESCAPE.match(pattern, at)
        if not found:
            raise _Refused("it ends with a backslash")
        return _Cost(0, True), found.end()
    if char == "[":
        return _Cost(0, True), _class_end(pattern, at)
    if char == "(":
        found = _GROUP.match(pattern, at)
        assert found is not None
        if pattern.startswith("(?", at) and found[1] is None:
            raise _Refused(f"it has the group {pattern[at : at + 4]!r}...")
        cost, end = _alternatives(pattern, found.end(), depth + 1)
        if end >= len(pattern):
            raise _Refused("a group is not closed")
        return cost, end + 1
    if _QUANTIFIER.match(pattern, at):
        raise _Refused(f"the repetition {char!r} at character {at} has nothing to repeat")
    return _Cost(0, True), at + 1


def _class_end(pattern: str, at: int) -> int:
    """The place after a character class; classes may be nested."""
    depth = 0
    start = at
    while at < len(pattern):
        if pattern[at] == "\\":
            at += 2
            continue
        if pattern[at] == "[":
            depth += 1
        elif pattern[at] == "]" and pattern[start:at].lstrip("[^"):
            depth -= 1
            if depth == 0:
                return at + 1
        at += 1
    raise _Refused("a character class is not closed")


def _repeated(inner: _Cost, quantifier: "re.Match[str]") -> _Cost:
    text = quantifier[0]
    if text[0] == "?":
        return _Cost(inner.repetitions, False)
    if not inner.simple:
        raise _Refused(f"{text!r} repeats something that itself repeats or chooses")
    low, comma, high = quantifier[1], quantifier[2], quantifier[3]
    if text[0] == "{" and (high or not comma) and int(high or low or 0) <= _MAX_COUNT:
        return _Cost(0, False)
    return _Cost(1, False)
