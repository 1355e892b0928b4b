"""How many prompt tokens a step may compute while others wait for their next token."""

from __future__ import annotations

# weight of the newest measurement in the running means
_NEWEST = 0.2
# prompt tokens of a step before anything has been measured, and the least of them ever
_UNMEASURED, _LEAST = 32, 16


class PrefillPacer:
    """Chooses chunks of prompts by measured times, so that a step with prompt tokens is at most so much slower.

    A step of d decoding sequences takes about D seconds, and about c more for each prompt token beside them; a chunk
    of (slowdown - 1) * D / c tokens makes the step ``slowdown`` times as long. Both are running means of what was
    measured. Sarathi-Serve (Agrawal et al., arXiv:2403.02310, section 4) bounds the tokens of a step by a fixed
    number that was measured beforehand.

    Args:
        slowdown: how many times as long as a step without prompt tokens, above 1; None: chunks are not limited.
    """

    def __init__(self, slowdown: float | None) -> None:
        self.slowdown = slowdown
        self._decode_seconds = 0.0
        self._token_seconds = 0.0

    def budget(self, num_decoding: int, most: int) -> int:
        """The most prompt tokens of the next step.

        Args:
            num_decoding: sequences that get a token in it.
            most: the most tokens there may be.
        """
        if self.slowdown is None or not num_decoding:
            return most
        if not self._decode_seconds or not self._token_seconds:
            return min(most, _UNMEASURED)
        tokens = int((self.slowdown - 1.0) * self._decode_seconds / self._token_seconds)
        return min(most, max(_LEAST, tokens))

    def note(self, seconds: float, num_decoding: int, num_prompt_tokens: int) -> None:
        """Take in what a step took."""
        if self.slowdown is None:
            return
        if not num_prompt_tokens:
            self._decode_seconds = _mean(self._decode_seconds, seconds)
            return
        if num_decoding and not self._decode_seconds:
            return
        beyond = seconds - (self._decode_seconds if num_decoding else 0.0)
        # a fast step must not make tokens free
        token_seconds = max(beyond, 0.1 * seconds) / num_prompt_tokens
        self._token_seconds = _mean(self._token_seconds, token_seconds)


def _mean(before: float, newest: float) -> float:
    return newest if before == 0.0 else before + _NEWEST * (newest - before)
