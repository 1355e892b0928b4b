"""``python -m gpt2rt.cli``."""

from .main import main

main()
