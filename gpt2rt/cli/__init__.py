"""The command line: ``gpt2rt generate``, ``run``, ``score``, ``quantize``, ``warmup``, ``bench`` and others."""

from .main import app, main

__all__ = ["app", "main"]
