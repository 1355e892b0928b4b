"""The definition of argmax, sampling_weights, sample and uniforms, in plain torch; see ``refs.py`` for the others.

The weight of a score is

    w = floor(2^42 exp(s - m)),   m the largest score of the row

with the exponential computed by a fixed chain of float32 multiplications and additions, each rounded: Cody & Waite's
reduction ``x = n ln 2 + r`` (Software Manual for the Elementary Functions, 1980) and the Taylor polynomial of degree 7,
to about 1e-7. So a weight has the same bits on every device, and sums of weights, being sums of integers, have no
rounding and no order. Whoever sums them, over all tokens or only over those that were not left out, draws the same
token.

Names: R = num_rows, V = vocab_size. A token with -inf is excluded.
"""

import torch
from torch import Tensor

#: the weight of a row's largest score
UNIT = 2**42
#: with more scores in a row the sum of their weights could leave int64
MAX_SCORES = 2**20
# Taylor coefficients of exp, from the seventh
_COEFFICIENTS = (1 / 5040, 1 / 720, 1 / 120, 1 / 24, 1 / 6, 0.5, 1.0, 1.0)


def argmax_ref(scores: Tensor, finite: bool) -> Tensor:
    """The first of the largest scores of each row.

    Args:
        scores: [R, V] float32.
        finite: -inf is an error too.

    Returns:
        [R] int64; -1 where :func:`_fine` says no.
    """
    return scores.argmax(dim=-1).masked_fill_(~_fine(scores, finite), -1)


def sampling_weights_ref(scores: Tensor) -> Tensor:
    """w of every score.

    Args:
        scores: [R, V] float32.

    Returns:
        [R, V] int64; 0 in rows that cannot be drawn from.
    """
    # exp(-40) is less than one unit
    x = (scores - scores.amax(dim=-1, keepdim=True)).clamp_(min=-40.0)
    n = torch.round(x * 1.44269504088896341)
    r = (x - n * 0.693359375) + n * 2.12194440054690583e-4
    p = torch.full_like(r, _COEFFICIENTS[0])
    for coefficient in _COEFFICIENTS[1:]:
        p = p * r + coefficient
    # p has 24 bits, so it becomes an integer without rounding
    units = (p * 2.0**24).nan_to_num_(0.0).long() << 18
    weights = units >> (-n).nan_to_num_(0.0).long()
    return weights.masked_fill_(~_fine(scores, False)[:, None], 0)


def sample_ref(
    scores: Tensor,
    uniforms: Tensor,
    temperature: Tensor | None,
    top_k: Tensor | None,
    top_p: Tensor | None,
    min_p: Tensor | None,
    token_ids: Tensor | None,
    partial: bool,
    finite: bool,
) -> Tensor:
    """A token of each row: the first, in order of ids, whose cumulative weight exceeds ``uniform * total``.

    Args:
        scores: [R, V] float32.
        uniforms: [R] float64 in [0, 1).
        temperature: [R] float64; scores are divided by it in float32.
        top_k: [R] int64; then those below the k-th largest are left out.
        top_p: [R] float64; then a token stays while those with larger scores have less than this share of all weight.
        min_p: [R] float64; then those with less than this times the largest weight are left out.
        token_ids: [R, V] int64, what the columns stand for; None: 0 to V - 1.
        partial: the columns are the best of a longer row, in falling order. If top_k keeps the last of them it could
            tie with others that are not here, so the row has no token; unless its weight is 0, like theirs.
        finite: -inf is an error too.

    Returns:
        [R] int64; -1 where :func:`_fine` or ``partial`` says no.

    Raises:
        ValueError: a number or setting is out of range.
    """
    _check_settings(uniforms, temperature, top_p, min_p)
    fine = _fine(scores, finite)
    if temperature is not None:
        scores = _tempered(scores, temperature)
        fine &= _fine(scores, False)
    if top_k is not None:
        scores = _keep_top_k(scores, top_k)
    if partial:
        fine &= sampling_weights_ref(scores)[:, -1] == 0
        fine &= torch.zeros_like(fine) if top_k is None else (top_k > 0) & (top_k < scores.size(1))
    if token_ids is not None:
        token_ids, order = token_ids.sort(dim=-1)
        scores = scores.gather(-1, order)
    if top_p is not None:
        scores = _keep_top_p(scores, top_p)
    weights = sampling_weights_ref(scores)
    if min_p is not None:
        weights = weights.masked_fill(weights.double() < min_p[:, None] * float(UNIT), 0)
    cumulative = weights.cumsum(dim=-1)
    total = cumulative[:, -1:]
    # the product can round up to the total, which no sum exceeds
    target = torch.minimum((uniforms[:, None] * total.double()).long(), total - 1)
    columns = torch.searchsorted(cumulative, target, right=True).squeeze(-1).clamp_(max=scores.size(1) - 1)
    chosen = columns if token_ids is None else token_ids.gather(-1, columns[:, None]).squeeze(-1)
    return torch.where(fine, chosen, -1)


def uniforms_ref(seeds: Tensor, requests: Tensor, choices: Tensor, positions: Tensor) -> Tensor:
    """Numbers in [0, 1) of 53 random bits, by Philox4x32-10: one for each place in the arguments.

    Source: Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3", SC'11, section 3.3.

    Args:
        seeds: [R] int64, the key.
        requests: [R] int64, the counter's upper half.
        choices: [R] int64; the lower 32 bits are the counter's second word.
        positions: [R] int64; the lower 32 bits are the counter's first word.

    Returns:
        [R] float64.
    """
    mask = 0xFFFFFFFF
    c0, c1, c2, c3 = positions & mask, choices & mask, requests & mask, (requests >> 32) & mask
    k0, k1 = seeds & mask, (seeds >> 32) & mask
    for _ in range(10):
        # modulo 2^64, which int64 products are as well
        first, second = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c2 = ((second >> 32) & mask) ^ c1 ^ k0, ((first >> 32) & mask) ^ c3 ^ k1
        c1, c3 = second & mask, first & mask
        k0, k1 = (k0 + 0x9E3779B9) & mask, (k1 + 0xBB67AE85) & mask
    return ((c0 >> 5) * 2**26 + (c1 >> 6)).double() * 2.0**-53


def _fine(scores: Tensor, finite: bool) -> Tensor:
    """[R] bool: the largest score is finite, no score is NaN; with ``finite`` all are finite."""
    # amax passes NaN on
    fine = scores.amax(dim=-1).isfinite()
    return fine & scores.isfinite().all(dim=-1) if finite else fine


def _tempered(scores: Tensor, temperature: Tensor) -> Tensor:
    """Scores over temperature; at a tiny one their differences to the largest, which cannot overflow upwards."""
    tiny = (temperature < 1e-4)[:, None]
    shifted = torch.where(tiny, scores - scores.amax(dim=-1, keepdim=True), scores)
    # below the smallest normal float32 the divisor itself would vanish
    return shifted / temperature.clamp(min=1e-37).float()[:, None]


def _keep_top_k(scores: Tensor, top_k: Tensor) -> Tensor:
    """Those below the k-th largest become -inf; k below 1 or from V on: none."""
    count = scores.size(1)
    active = (top_k > 0) & (top_k < count)
    ranked = scores.sort(dim=-1, descending=True).values
    last = ranked.gather(-1, (top_k.clamp(1, count) - 1)[:, None])
    return scores.masked_fill((scores < last) & active[:, None], -torch.inf)


def _keep_top_p(scores: Tensor, top_p: Tensor) -> Tensor:
    """Those below the last that is needed for this share of the weight become -inf; 1: none."""
    ranked = scores.sort(dim=-1, descending=True).values
    weights = sampling_weights_ref(ranked)
    cumulative = weights.cumsum(dim=-1)
    target = top_p[:, None] * cumulative[:, -1:].double()
    kept = ((cumulative - weights).double() < target).sum(dim=-1, keepdim=True).clamp_(min=1)
    last = ranked.gather(-1, kept - 1)
    return scores.masked_fill((scores < last) & (top_p < 1.0)[:, None], -torch.inf)


def _check_settings(uniforms: Tensor, temperature: Tensor | None, top_p: Tensor | None, min_p: Tensor | None) -> None:
    """Raise ValueError, with the first bad value, unless every number and setting is in range."""
    largest = torch.finfo(torch.float32).max
    rules = (
        ("uniforms", uniforms, lambda v: (v >= 0) & (v < 1), "a number from 0 to below 1"),
        ("temperature", temperature, lambda v: (v > 0) & (v <= largest), "a number above 0 that float32 can hold"),
        ("top_p", top_p, lambda v: (v >= 0) & (v <= 1), "a number from 0 to 1; 1 keeps all tokens"),
        ("min_p", min_p, lambda v: (v >= 0) & (v <= 1), "a number from 0 to 1; 0 keeps all tokens"),
    )
    for name, values, rule, expected in rules:
        if values is None:
            continue
        bad = (~rule(values)).nonzero()
        if len(bad):
            row = int(bad[0])
            raise ValueError(f"sample: {name}[{row}] is {float(values[row])}, expected {expected}")
