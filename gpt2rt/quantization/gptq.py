"""Quantising a matrix so that its products, not its elements, stay close: GPTQ.

Source: Frantar et al., "GPTQ", arXiv:2210.17323, sections 3 and 4. With X [K, tokens] the inputs that the layer sees on
a calibration text, and H = 2 X X^T, the columns of W [N, K] are rounded one after another; the error of each is made up
for by the columns that are still floats:

    U = the upper Cholesky factor of inverse(H + damping),  inverse(H) = U^T U
    q_k = the nearest code of w_k;   e = (w_k - q_k) / U[k, k];   w_j -= e * U[k, j]  for j > k

Columns are taken 128 at a time, and the columns behind a block are updated once for all of it (section 3, step 2). A
group's scale is chosen when its first column is due, from the columns as they are by then. The damping is 1 % of the
mean of H's diagonal (section 3, step 3).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .codebooks import pack_4bit
from .config import QuantizationConfig
from .rtn import check_weight, int4_codes, int4_scales, int8_codes, int8_scales
from .weight import QuantizedWeight

DAMPING = 0.01

#: columns between two updates of all that are left; a multiple of every group size
BLOCK = 128


class Hessian:
    """H = 2 X X^T of a layer's inputs, gathered part by part.

    Args:
        in_features: K.
        device: where to sum.

    Attributes:
        matrix: [K, K] float64, divided by the number of tokens at each call of :meth:`mean`.
        num_tokens: summed so far.
    """

    def __init__(self, in_features: int, device: torch.device | str = "cpu") -> None:
        self.matrix = torch.zeros(in_features, in_features, dtype=torch.float64, device=device)
        self.num_tokens = 0

    def add(self, x: Tensor) -> None:
        """Add the inputs [..., K] of any floating dtype.

        Raises:
            ValueError: they hold NaN or infinity.
        """
        rows = x.reshape(-1, x.size(-1)).float()
        self.matrix += rows.t() @ rows
        self.num_tokens += rows.size(0)

    def mean(self) -> Tensor:
        """H for one average token: [K, K] float64. The factor does not change what GPTQ does.

        Raises:
            ValueError: nothing was added, or an input was NaN or infinite.
        """
        if not self.num_tokens:
            raise ValueError("no inputs were gathered; does the model run this layer at all on the calibration text?")
        mean = self.matrix * (2.0 / self.num_tokens)
        if not bool(torch.isfinite(mean.diagonal()).all()):
            raise ValueError(
                "the inputs on the calibration text are NaN or infinite; is the model sound in this dtype?"
            )
        return mean


@torch.no_grad()
def quantize_gptq(weight: Tensor, hessian: Tensor, config: QuantizationConfig) -> QuantizedWeight:
    """A matrix in int4 or int8 whose products with the calibration inputs are close.

    Args:
        weight: [N, K], any floating dtype and strides.
        hessian: [K, K], see :class:`Hessian`; its scale does not matter.
        config: scheme, group size and zero points.

    Raises:
        ValueError: ``weight`` is no finite floating matrix, ``hessian`` does not fit it, or the scheme has a codebook.
    """
    check_weight(weight)
    rows, columns = weight.shape
    if config.scheme not in ("int4", "int8"):
        raise ValueError(f"gptq makes int4 and int8, not {config.scheme}")
    if hessian.shape != (columns, columns):
        raise ValueError(
            f"the Hessian of a [{rows}, {columns}] weight is [{columns}, {columns}], got {list(hessian.shape)}"
        )
    # columns of the weight become contiguous rows
    values = weight.t().to(torch.float32, copy=True).contiguous()
    assert config.activations is not None
    if config.scheme == "int8":
        scales = int8_scales(weight.float())
        codes = _compensated(values, hessian, columns, lambda _group: lambda column: _int8_column(column, scales))
        codes = codes.t().contiguous().to(torch.int8)
        return QuantizedWeight("int8", (rows, columns), columns, codes, scales, activations=config.activations)
    group_size = config.group_size_of(columns)
    scales_of, zeros_of = [], []

    def begin(group: Tensor) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
        group_scales, zeros = int4_scales(group.t().contiguous(), config.symmetric)
        scales_of.append(group_scales)
        zeros_of.append(zeros)

        def column(values: Tensor) -> tuple[Tensor, Tensor]:
            codes = int4_codes(values.unsqueeze(-1), group_scales, zeros).squeeze(-1)
            return codes, (codes - zeros) * group_scales.float()

        return column

    codes = _compensated(values, hessian, group_size, begin)
    packed = pack_4bit(codes.t().contiguous().to(torch.uint8))
    scales = torch.stack(scales_of, dim=1)
    zeros = None if config.symmetric else torch.stack(zeros_of, dim=1).to(torch.uint8)
    return QuantizedWeight("int4", (rows, columns), group_size, packed, scales, zeros, config.activations)


def _int8_column(column: Tensor, scales: Tensor) -> tuple[Tensor, Tensor]:
    codes = int8_codes(column, scales)
    return codes, codes * scales


def _compensated(
    values: Tensor,
    hessian: Tensor,
    group_size: int,
    begin: Callable[[Tensor], Callable[[Tensor], tuple[Tensor, Tensor]]],
) -> Tensor:
    """The codes [K, N] float32 of columns that make up for each other's errors.

    Args:
        values: [K, N] float32; it is used up.
        hessian: [K, K].
        group_size: columns that share a scale.
        begin: called with the columns [group_size or fewer, N] of a group; returns a function from a column [N] to its
            codes and their values.
    """
    columns = values.size(0)
    factor = inverse_factor(hessian)
    codes = torch.empty_like(values)
    for start in range(0, columns, BLOCK):
        stop = min(start + BLOCK, columns)
        block, errors = values[start:stop], torch.empty_like(values[start:stop])
        for place in range(stop - start):
            k = start + place
            if k % group_size == 0:
                quantize = begin(values[k : k + group_size])
            codes[k], approximation = quantize(block[place])
            torch.div(block[place] - approximation, factor[k, k], out=errors[place])
            block[place + 1 :].addr_(factor[k, k + 1 : stop], errors[place], alpha=-1.0)
        values[stop:].addmm_(factor[start:stop, stop:].t(), errors, alpha=-1.0)
    return codes


def inverse_factor(hessian: Tensor) -> Tensor:
    """The upper triangular U with U^T U = inverse(H + damping): [K, K] float32, computed in float64.

    With J the matrix that turns the order of rows around, and J H J = L L^T, it is the inverse of J L J: the inverse
    of H is never formed.

    Raises:
        ValueError: H is not finite, or not positive definite after damping.
    """
    damped = hessian.double().clone()
    diagonal = damped.diagonal()
    mean = float(diagonal.mean())
    # inputs that are always zero: their columns are rounded on their own
    diagonal[diagonal == 0] = mean if mean > 0 else 1.0
    diagonal += DAMPING * mean
    lower, info = torch.linalg.cholesky_ex(damped.flip(0, 1))
    if int(info) or not bool(torch.isfinite(lower).all()):
        raise ValueError("the Hessian is not positive definite; is it the mean of products x x^T of finite inputs?")
    identity = torch.eye(len(damped), dtype=torch.float64, device=damped.device)
    return torch.linalg.solve_triangular(lower.flip(0, 1), identity, upper=True).float()
