"""Several tokens drawn from one distribution, none twice."""

from __future__ import annotations

from bisect import insort
from collections.abc import Sequence

import torch
from torch import Tensor


def sample_without_replacement(scores: Tensor, uniforms: Sequence[float]) -> Tensor:
    """Places drawn from softmax(scores) one after another, each from what the ones before it left.

    The cumulative distribution is made once; instead of taking a drawn place out of it, later draws step over it. The
    result has the law of ``torch.multinomial(softmax(scores), k)``. Where fewer than k places have any probability, the
    highest of the other scores fill up.

    Args:
        scores: [n] float32, -inf for excluded places.
        uniforms: k numbers in [0, 1), k at most n.

    Returns:
        [k] int64, in the order of drawing.
    """
    mass = torch.softmax(scores, dim=0).double()
    kept = mass.nonzero().flatten()
    cumulative = mass[kept].cumsum(dim=0).cpu().numpy()
    weights = mass[kept].cpu().numpy()
    taken: list[int] = []
    order: list[int] = []
    left = float(cumulative[-1])
    for number in uniforms[: len(kept)]:
        target = number * left
        for place in taken:
            if target >= cumulative[place] - weights[place]:
                target += weights[place]
        place = _nearest_free(int(cumulative.searchsorted(target, side="right")), taken, len(kept))
        insort(taken, place)
        order.append(place)
        left -= float(weights[place])
    drawn = kept[torch.tensor(order, device=kept.device)]
    if len(order) == len(uniforms):
        return drawn
    free = torch.ones_like(scores, dtype=torch.bool)
    free[drawn] = False
    rest = free.nonzero().flatten()
    fill = scores[rest].topk(len(uniforms) - len(order)).indices
    return torch.cat([drawn, rest[fill]])


def _nearest_free(place: int, taken: Sequence[int], count: int) -> int:
    """``place`` itself, unless rounding led to one that is taken or past the end; there must be a free one."""
    near = (other for distance in range(count + 1) for other in (place - distance, place + distance))
    return next(other for other in near if 0 <= other < count and other not in taken)
