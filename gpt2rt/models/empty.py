"""Building a model whose weights will come from a checkpoint, without initialising them first."""

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any

from torch import Tensor
from torch.overrides import TorchFunctionMode

_SKIP_INIT: ContextVar[bool] = ContextVar("gpt2rt_skip_init", default=False)


@contextlib.contextmanager
def no_init_weights() -> Iterator[None]:
    """Within this block new models keep whatever their parameters were allocated with."""
    token = _SKIP_INIT.set(True)
    try:
        yield
    finally:
        _SKIP_INIT.reset(token)


def initializes() -> bool:
    """Whether new models initialise their weights: outside of :func:`no_init_weights`."""
    return not _SKIP_INIT.get()


class NoFill(TorchFunctionMode):
    """Leaves out the in-place fills by which torch's modules initialise themselves.

    On the meta device they have nothing to do, and torch would load its Python decompositions for them, which takes
    seconds and 150 MB. A mode acts on the current thread only.
    """

    _FILLS = frozenset({Tensor.uniform_, Tensor.normal_, Tensor.fill_, Tensor.zero_})

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        # the functions of torch.nn.init arrive here whole, with the tensor by keyword
        if func in self._FILLS or getattr(func, "__module__", None) == "torch.nn.init":
            tensor = kwargs["tensor"] if "tensor" in kwargs else args[0]
            if tensor.is_meta:
                return tensor
        return func(*args, **kwargs)
