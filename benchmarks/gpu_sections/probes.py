"""A kernel that does nothing: what a launch costs."""

import triton
import triton.language as tl

from gpt2rt.kernels.fusion import let_dependents_start, wait_for_inputs


@triton.jit
def empty_kernel(x_ptr, PDL: tl.constexpr):
    let_dependents_start(PDL)
    wait_for_inputs(PDL)
