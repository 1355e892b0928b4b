"""gpt2rt's engine: ``LLM``, which a program waits for, or ``AsyncLLM`` with a stream for every request."""

from __future__ import annotations

import asyncio
import pathlib
import time

from cpu_peers.gpt2rt_peer import load_model

REQUIRES = {"gpt2rt": "gpt2rt"}
BLOCK_SIZE = 16


class Runner:
    """A loaded engine; ``serve`` answers (tokens of each request, seconds from the start to each of its outputs)."""

    def __init__(self, checkpoint: str, converted: pathlib.Path, options: dict) -> None:
        import torch

        from gpt2rt.engine import LLM, AsyncLLM

        torch.set_num_threads(options["threads"])
        # the cache has the size that the requests need
        blocks = options["capacity"] * -(-options["longest"] // BLOCK_SIZE)
        settings = {"max_num_seqs": options["capacity"], "num_blocks": blocks}
        model = load_model(checkpoint, options)
        self.loop = asyncio.new_event_loop() if options.get("stream") else None
        if self.loop is None:
            self.engine = LLM(model, **settings)
        else:
            self.engine = AsyncLLM(model, max_num_queued_reqs=None, **settings)

    def serve(self, prompts: list[list[int]], new_tokens: list[int]) -> tuple[list[list[int]], list[list[float]]]:
        if self.loop is not None:
            return self.loop.run_until_complete(self._stream_all(prompts, new_tokens, time.perf_counter()))
        outputs = self.engine.generate(prompts, [self._parameters(count) for count in new_tokens])
        # to the program that waits all tokens come at the end
        return [list(output.outputs[0].token_ids) for output in outputs], [[] for _ in outputs]

    async def _stream_all(self, prompts, new_tokens, start):
        rows = await asyncio.gather(
            *(self._stream(prompt, count, start) for prompt, count in zip(prompts, new_tokens, strict=True))
        )
        return [tokens for tokens, _ in rows], [seconds for _, seconds in rows]

    async def _stream(self, prompt: list[int], count: int, start: float) -> tuple[list[int], list[float]]:
        from gpt2rt.engine import RequestOutputKind

        parameters = self._parameters(count)
        parameters.output_kind = RequestOutputKind.DELTA
        tokens: list[int] = []
        seconds: list[float] = []
        async for output in self.engine.generate(prompt, parameters):
            if output.outputs[0].token_ids:
                tokens += output.outputs[0].token_ids
                seconds.append(time.perf_counter() - start)
        return tokens, seconds

    @staticmethod
    def _parameters(count: int):
        from gpt2rt.engine import SamplingParams

        return SamplingParams(temperature=0.0, max_tokens=count, ignore_eos=True, detokenize=False)

    def close(self) -> None:
        self.engine.shutdown()
