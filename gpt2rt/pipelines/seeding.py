"""One seed for everything that draws."""

import random

import numpy as np
import torch


def set_seed(seed: int, deterministic: bool = False) -> None:
    """Seed Python's, numpy's and torch's generators, on all devices.

    Sampling without ``seed`` of its own takes it from torch's generator, so a script repeats from here on.

    Args:
        seed: 0 to 2**32 - 1.
        deterministic: also let torch use deterministic algorithms only.
    Raises:
        ValueError: ``seed`` is out of range.
    """
    random.seed(seed)
    # what draws elsewhere in a script uses the global generator
    np.random.seed(seed)  # noqa: NPY002
    torch.manual_seed(seed)
    if deterministic:
        torch.use_deterministic_algorithms(True)
