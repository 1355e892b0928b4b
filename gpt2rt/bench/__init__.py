"""Measuring a whole engine or a server: what ``gpt2rt bench latency``, ``throughput`` and ``serve`` do.

Flags, metrics and keys are those of vLLM's benchmarks, so that its users and their scripts find what they know.
``metrics`` says how every number is defined, ``workload`` makes prompts and arrival times, ``offline`` measures an
engine in this process, ``serve`` any OpenAI-compatible server over HTTP (``http`` is its client: it needs nothing but
the standard library, and it is small enough not to be what is measured).
"""
