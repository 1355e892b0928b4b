"""One launcher call that the ahead-of-time check compiles, and what its machine code must show."""

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Spec:
    """A call with tensors that have shapes and strides but no memory (device "meta").

    Attributes:
        name: unique label, the first column of the table.
        call: launches on meta tensors.
        wide_loads: for each kernel of the call, in order: the least number of 128-bit loads in its machine code.
        mma: whether the kernels must use tensor cores; a string names the instructions that sm_90 must use.
        wait_after_loads: the least number of 128-bit loads that each kernel of a programmatic dependent launch issues
            before it waits for the one before it. Not 0: only targets that have such launches compile it.
        pdl: the call asks for programmatic dependent launches, so only targets that have them compile it.
    """

    name: str
    call: Callable[[], object]
    wide_loads: tuple[int, ...]
    mma: bool | str = False
    wait_after_loads: int = 0
    pdl: bool = False
