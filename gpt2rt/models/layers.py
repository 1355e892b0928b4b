"""The layers that models are built from.

Each computes in one of two ways, which agree within rounding. While gradients are recorded for it, or in training mode,
a layer uses torch's differentiable functions; otherwise it runs the kernels of ``gpt2rt.ops``. The choice is made by
each layer from its own arguments, so a frozen trunk below a trainable head still runs on the kernels.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gpt2rt import ops

KERNEL_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def is_transformed() -> bool:
    """Whether tensors may stand for a batch or carry a tangent: inside ``torch.func`` or forward-mode differentiation.

    Always False for torch.compile, which cannot ask.
    """
    if torch.compiler.is_compiling():
        return False
    return torch.autograd.forward_ad._current_level >= 0 or torch._C._functorch.maybe_current_level() is not None


def is_traced() -> bool:
    """Whether torch.compile, torch.export or torch.jit.trace records this call: its values stand for others."""
    return torch.compiler.is_compiling() or torch.jit.is_tracing()


def runs_kernels(module: nn.Module, *inputs: Tensor) -> bool:
    """Whether this call of ``module`` runs ``gpt2rt.ops`` rather than torch's differentiable functions.

    Args:
        module: the layer.
        *inputs: its tensors, weights included.

    Returns:
        False in training mode, when a gradient is recorded, under autocast (which picks dtypes by torch function),
        under torch.jit.trace (whose graphs may leave for where gpt2rt is not), inside torch.func's transforms, and for
        dtypes that the kernels do not store, such as float64.
    """
    if module.training or (torch.is_grad_enabled() and any(t.requires_grad for t in inputs)):
        return False
    if any(t.dtype not in KERNEL_DTYPES or t.dtype != inputs[0].dtype for t in inputs):
        return False
    return not (torch.is_autocast_enabled(inputs[0].device.type) or torch.jit.is_tracing() or is_transformed())


def is_plain(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether ``module`` is exactly a ``kind`` with nothing hooked to it, so that a fused form may stand in for it."""
    return type(module) is kind and not is_watched(module)


def is_watched(module: nn.Module) -> bool:
    """Whether a caller hooked something to ``module``, or gave this one object a forward of its own."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in module.__dict__
    )


def computes_alone(module: nn.Module, weight: Tensor) -> bool:
    """Whether ``module`` and all below it run on the kernels, and nobody watches them or put own layers among them.

    Only then may tokens be computed in another shape than the caller's [batch, seq_len]: nobody can tell.

    Args:
        module: the bare model.
        weight: one of its weights, with whose dtype all others are compared.
    """
    parameters = [p for p in module._parameters.values() if p is not None]
    return (
        type(module).__module__.partition(".")[0] in ("gpt2rt", "torch")
        and not is_watched(module)
        and runs_kernels(module, weight, *parameters)
        and all(computes_alone(child, weight) for child in module._modules.values() if child is not None)
    )


def as_rows(x: Tensor) -> Tensor:
    """[..., n] as [num_tokens, n] with contiguous rows, the shape of every op."""
    return x.reshape(-1, x.size(-1)).contiguous()


class LayerNorm(nn.LayerNorm):
    """``nn.LayerNorm`` over the last dimension, on the kernels when no gradient is needed."""

    def forward(self, x: Tensor) -> Tensor:
        if runs_kernels(self, x, self.weight, self.bias):
            return ops.layer_norm(as_rows(x), self.weight, self.bias, self.eps).view(x.shape)
        return super().forward(x)


class Conv1D(nn.Module):
    """A linear layer whose weight is stored [in, out], as GPT-2 checkpoints publish it: ``x @ weight + bias``.

    Args:
        nf: number of output features.
        nx: number of input features.
    """

    def __init__(self, nf: int, nx: int) -> None:
        super().__init__()
        self.nf = nf
        self.nx = nx
        self.weight = nn.Parameter(torch.empty(nx, nf))
        self.bias = nn.Parameter(torch.zeros(nf))
        nn.init.normal_(self.weight, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        """[..., nx] to [..., nf]."""
        if runs_kernels(self, x, self.weight, self.bias):
            rows = ops.linear(as_rows(x), self.weight.t(), self.bias)
        else:
            rows = torch.addmm(self.bias, x.reshape(-1, self.nx), self.weight)
        return rows.view(*x.shape[:-1], self.nf)

    def extra_repr(self) -> str:
        return f"nf={self.nf}, nx={self.nx}"


def project(module: nn.Module, x: Tensor) -> Tensor:
    """``module(x)``, on the kernels when ``module`` is an ``nn.Linear`` and no gradient is needed.

    Args:
        module: the output layer: ``nn.Linear``, or whatever a caller put in its place.
        x: [..., in].

    Returns:
        [..., out].
    """
    if is_plain(module, nn.Linear):
        # is_plain has shown what module is, but nn.Module is all that mypy knows
        weight: Tensor = module.weight  # type: ignore[assignment]
        bias: Tensor | None = module.bias  # type: ignore[assignment]
        if runs_kernels(module, x, weight, *([] if bias is None else [bias])):
            return ops.linear(as_rows(x), weight, bias).view(*x.shape[:-1], weight.size(0))
    return module(x)


def end_branch(projection: nn.Module, dropout: nn.Module, x: Tensor, residual: Tensor | None) -> Tensor:
    """``residual + dropout(projection(x))``, in one pass over memory where nothing stands between.

    Args:
        projection: a Conv1D, or whatever a caller put in its place.
        dropout: what follows it.
        x: [..., in].
        residual: [..., out], or None to add nothing.

    Returns:
        [..., out].
    """
    if residual is None:
        return dropout(projection(x))
    if is_plain(projection, Conv1D) and is_plain(dropout, nn.Dropout):
        # is_plain has shown what the module is, but nn.Module is all that mypy knows
        weight: Tensor = projection.weight  # type: ignore[assignment]
        bias: Tensor = projection.bias  # type: ignore[assignment]
        if runs_kernels(projection, x, weight, bias, residual) and not dropout.training:
            rows = ops.linear_residual(as_rows(x), weight.t(), bias, as_rows(residual))
            return rows.view(residual.shape)
    return residual + dropout(projection(x))


def _gelu_tanh(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


def _identity(x: Tensor) -> Tensor:
    return x


def _gelu_10(x: Tensor) -> Tensor:
    return F.gelu(x).clamp(-10.0, 10.0)


def _quick_gelu(x: Tensor) -> Tensor:
    return x * torch.sigmoid(1.702 * x)


def _laplace(x: Tensor) -> Tensor:
    # a normal distribution function, mean sqrt(1/2), deviation sqrt(1/(4 pi)); Ma et al., arXiv:2209.10655
    return 0.5 * (1.0 + torch.erf((x - 0.707107) / (0.282095 * 2.0**0.5)))


def _relu2(x: Tensor) -> Tensor:
    return F.relu(x).square()


def _sqrtsoftplus(x: Tensor) -> Tensor:
    return F.softplus(x).sqrt()


#: transformers' name -> function of one tensor. Several names differ only in how transformers computes the same value.
ACT2FN: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_10": _gelu_10,
    "gelu_accurate": _gelu_tanh,
    "gelu_fast": _gelu_tanh,
    "gelu_new": _gelu_tanh,
    "gelu_python": F.gelu,
    "gelu_python_tanh": _gelu_tanh,
    "gelu_pytorch_tanh": _gelu_tanh,
    "hardswish": F.hardswish,
    "laplace": _laplace,
    "leaky_relu": F.leaky_relu,
    "linear": _identity,
    "mish": F.mish,
    "quick_gelu": _quick_gelu,
    "relu": F.relu,
    "relu2": _relu2,
    "relu6": F.relu6,
    "sigmoid": torch.sigmoid,
    "silu": F.silu,
    "sqrtsoftplus": _sqrtsoftplus,
    "swish": F.silu,
    "tanh": torch.tanh,
}


class Activation(nn.Module):
    """One of the functions of ``ACT2FN`` as a module, so that hooks can see it.

    Args:
        name: transformers' name of the function.

    Raises:
        ValueError: there is no function of that name.
    """

    def __init__(self, name: str) -> None:
        super().__init__()
        if name not in ACT2FN:
            raise ValueError(f"activation {name!r} is not known; use one of {', '.join(ACT2FN)}")
        self.name = name
        self.function = ACT2FN[name]

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)

    def extra_repr(self) -> str:
        return repr(self.name)


def get_activation(name: str) -> Activation:
    """The activation of that name as a module; see :class:`Activation`."""
    return Activation(name)
