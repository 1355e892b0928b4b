"""The command line: ``gpt2rt generate``, ``run``, ``score``, ``env`` and ``doctor``."""

from .main import app, main

__all__ = ["app", "main"]
