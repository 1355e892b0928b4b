"""What gpt2rt runs on: versions, processor, accelerator and the settings taken from the environment.

Imports nothing of gpt2rt but its version; which form each op runs in is ``gpt2rt.ops.op_forms()``, and
``gpt2rt env`` prints both.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import sys

#: environment variables that gpt2rt reads, and what they do
SETTINGS = {
    "GPT2RT_CPU_ISA": "force a lower instruction set: amx, avx512_bf16, avx512_vnni, avx512, avx2 or portable",
    "GPT2RT_NUM_THREADS": "threads of the C++ kernels; default: torch's number",
    "GPT2RT_CACHE": "folder of packed weights, by default ~/.cache/gpt2rt",
    "GPT2RT_PACKED_CACHE": "0 keeps no packed weights between processes",
    "GPT2RT_PACKED_CACHE_BYTES": "the most that packed weights may take on disk; default: 10 GiB",
    "GPT2RT_CPU_ARITHMETIC": "exact: quantised weights meet float activations, as on a GPU",
    "GPT2RT_CUDA_GRAPHS": "0 launches every kernel by itself",
    "GPT2RT_CUDA_PDL": "0: no programmatic dependent launch",
    "GPT2RT_CUDA_AHEAD": "0: the engine queues no step before it has read the tokens of the last",
    "GPT2RT_BATCH_INVARIANT": "1: on a GPU the bits of a token do not depend on its company",
    "GPT2RT_CUDA_INT4": "1 gives products of few rows and 4-bit weights to CUDA C++, which no device has proven yet",
    "GPT2RT_CUDA_PERSISTENT": "1 runs single decode steps as one CUDA C++ kernel, which no device has proven yet",
    "GPT2RT_REQUIRE_CPP": "1 makes a missing C++ extension an error",
    "GPT2RT_LOG": "debug shows tracebacks on the command line",
    "HF_HUB_OFFLINE": "1 forbids downloads",
    "HF_ENDPOINT": "address of the model hub",
    "HF_HOME": "folder of downloaded models",
}

_PACKAGES = ("torch", "triton", "numpy", "tokenizers", "safetensors", "huggingface_hub", "transformers")


def version() -> str:
    """gpt2rt's own version."""
    try:
        return importlib.metadata.version("gpt2rt")
    except importlib.metadata.PackageNotFoundError:  # run from a source tree that was never installed
        return "0+unknown"


def _package_version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            for line in file:
                if line.startswith("model name"):
                    return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _accelerators() -> list[str]:
    import torch

    if not torch.cuda.is_available():
        return []
    return [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]


def collect() -> dict[str, object]:
    """Versions, hardware and settings.

    Returns:
        ``gpt2rt``, ``python``, ``platform``: str; ``packages``: name -> version or None; ``cpu``: str;
        ``cpu_count``: logical processors this process may use; ``torch_threads``: int; ``accelerators``: names;
        ``settings``: the variables of :data:`SETTINGS` that are set.
    """
    import torch

    return {
        "gpt2rt": version(),
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "packages": {name: _package_version(name) for name in _PACKAGES},
        "cpu": _cpu_name(),
        "cpu_count": len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "accelerators": _accelerators(),
        "settings": {name: os.environ[name] for name in SETTINGS if name in os.environ},
    }
