"""An OpenAI-compatible HTTP server on the engine.

``gpt2rt serve`` starts it; the extra ``gpt2rt[serve]`` installs what it needs.
"""
