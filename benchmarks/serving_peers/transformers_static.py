"""transformers' ``generate`` with one batch of all requests, padded on the left, until the last of them is done."""

from __future__ import annotations

import pathlib
import time

from cpu_peers import transformers_peer

REQUIRES = transformers_peer.REQUIRES


class Runner(transformers_peer.Runner):
    """A loaded model; ``serve`` answers (tokens of each request, seconds from the start to each of its tokens)."""

    def __init__(self, checkpoint: str, converted: pathlib.Path, options: dict) -> None:
        super().__init__(checkpoint, converted, options)
        self.model.eval()

    def serve(self, prompts: list[list[int]], new_tokens: list[int]) -> tuple[list[list[int]], list[list[float]]]:
        import torch

        start = time.perf_counter()
        longest = max(map(len, prompts))
        ids = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts])
        mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
        clock = transformers_peer.Clock()
        with torch.no_grad():
            out = self.model.generate(
                ids, attention_mask=mask, max_new_tokens=max(new_tokens), do_sample=False, streamer=clock
            )
        moments = [moment - start for moment in clock.times[1:]]
        # what a row makes beyond its own length is of no use to anybody
        rows = [row[longest : longest + count] for row, count in zip(out.tolist(), new_tokens, strict=True)]
        return rows, [moments[:count] for count in new_tokens]
