"""Which loop a call of ``generate`` runs through."""

from __future__ import annotations

from collections.abc import Generator
from typing import Any, Protocol

from torch import Tensor

from .decode import DecodePlan, Decoder, Row
from .starts import LayerPairs


class Loop(Protocol):
    """What all decode loops have in common.

    Attributes:
        plan: what it does.
        rows: the rows of the output.
        scores, logits: recorded steps.
        past: of each layer, keys and values at the end, if ``plan.output_past``.
    """

    plan: DecodePlan
    rows: list[Row]
    scores: list[Tensor]
    logits: list[Tensor]
    past: LayerPairs | None

    def steps(self) -> Generator[Any, None, None]:
        """Generate; each item holds the newest token of every row."""
        ...


def make_decoder(plan: DecodePlan) -> Loop:
    """The loop for a plan: beams, speculation, or one token after another."""
    if plan.num_beams > 1:
        from .beams import BeamDecoder

        return BeamDecoder(plan)
    if plan.speculation is not None:
        from .speculation import SpeculativeDecoder

        return SpeculativeDecoder(plan)
    return Decoder(plan)
