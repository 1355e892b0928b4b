"""Which compiled kernels a run needs, found out on a CPU and without running or compiling one."""

import contextlib
import os

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from gpt2rt.engine import sampler
from gpt2rt.engine.row_penalties import DevicePenalties
from gpt2rt.graph import executor
from gpt2rt.kernels import launch
from gpt2rt.ops import _library

#: kernels that are compiled alike have the same
Key = tuple[object, ...]


def key_of(kernel, arguments, keywords) -> Key:
    """What triton's launcher compiles by: constants, dtypes, whether pointers and integers are multiples of 16."""
    values = dict(zip((p.name for p in kernel.params), arguments, strict=False)) | keywords
    key = [kernel.fn.__qualname__]
    for p in kernel.params:
        value = values.pop(p.name)
        if p.is_constexpr or value is None:
            key.append((p.name, value))
        elif isinstance(value, torch.Tensor):
            key.append((p.name, value.dtype, value.data_ptr() % 16 == 0))
        elif isinstance(value, int):
            special = None if p.do_not_specialize else (value == 1, value % 16 == 0)
            key.append((p.name, -(2**31) <= value < 2**31, special))
        else:
            key.append((p.name, type(value)))
    return *key, *sorted((name, str(value)) for name, value in values.items())


class _LikeOnGpu(TorchDispatchMode):
    """Every op also makes the launches that it would make on a GPU; its result is that of the CPU."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "gpt2rt":
            _, launcher = _library._FORMS.get(func._schema.name.partition("::")[2], (None, None))
            if launcher is not None:
                _library._lazy_triton(launcher)(*args)
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def spying():
    """The keys of the kernels that are launched meanwhile; engines and executors made in it take a CPU for a GPU.

    No kernel runs: logits are zeros, so the likeliest token is 0.
    """
    if os.environ.get("TRITON_INTERPRET") == "1":
        pytest.skip("kernels are not compiled in triton's interpreter")
    jit = pytest.importorskip("triton.runtime.jit")
    seen: set[Key] = set()

    def run(self, *arguments, grid, warmup, **keywords):
        seen.add(key_of(self, arguments, keywords))

    make = sampler.Sampler.__init__

    def as_on_gpu(self, vocab_size, device, **options):
        make(self, vocab_size, device, **options)
        self._on_host, self._penalties = False, DevicePenalties(vocab_size, device)

    with pytest.MonkeyPatch.context() as patch, _LikeOnGpu():
        patch.setattr(jit.JITFunction, "run", run)
        patch.setattr(executor, "_why_not_cuda", lambda plan: "")
        # some tables have lines for this architecture alone
        patch.setattr(launch, "compiled_for", 90)
        patch.setattr(sampler.Sampler, "__init__", as_on_gpu)
        yield seen
