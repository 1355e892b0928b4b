"""The kernel lab: every kernel at sizes that matter, its forms side by side, errors and times beside their limits.

``registry.OPERATIONS`` is the list; ``gpt2rt bench kernels``, ``benchmarks/gpu.py`` and
``benchmarks/bench_kernels.py`` all run it.
"""
