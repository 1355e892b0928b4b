"""What the ahead-of-time check compiles: launcher calls at real shapes, a file for each subject.

The check takes the kernels and arguments from the calls, so what it compiles is what the launchers would launch,
configuration included. Loops are unrolled differently by version and target, so bounds of wide loads leave some room; a
kernel that fell back to narrow loads has none at all. GPT-2 124M has n_embd 768 and 12 heads, the 1.5B model 1600 and
25; head_dim is 64 everywhere.
"""

import specs_attention
import specs_ops
import specs_rows
import specs_sampling
import specs_tiles

SPECS = [
    *specs_ops.SPECS,
    *specs_rows.SPECS,
    *specs_tiles.SPECS,
    *specs_attention.SPECS,
    *specs_sampling.SPECS,
]
