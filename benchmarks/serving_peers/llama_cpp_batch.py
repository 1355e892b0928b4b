"""llama.cpp's library: all sequences in one context, each step one batch of the next token of all that go on."""

from __future__ import annotations

import pathlib
import time

import numpy as np
from cpu_peers import llama_cpp_peer

REQUIRES = llama_cpp_peer.REQUIRES


class Runner(llama_cpp_peer.Runner):
    """A loaded model; ``serve`` answers (tokens of each request, seconds from the start to each of its tokens)."""

    def __init__(self, checkpoint: str, converted: pathlib.Path, options: dict) -> None:
        super().__init__(checkpoint, converted, options)
        self.capacity, self.longest = options["capacity"], options["longest"]
        self._prepare(self.capacity, self.longest)

    def serve(self, prompts: list[list[int]], new_tokens: list[int]) -> tuple[list[list[int]], list[list[float]]]:
        api = self.api
        rows: list[list[int]] = [[] for _ in prompts]
        times: list[list[float]] = [[] for _ in prompts]
        start = time.perf_counter()
        api.llama_memory_clear(api.llama_get_memory(self.context), True)
        batch = api.llama_batch_init(sum(map(len, prompts)), 0, 1)
        parts = dict(enumerate(prompts))
        while parts:
            batch.n_tokens, wanted = 0, []
            for row, tokens in parts.items():
                first = len(prompts[row]) + len(rows[row]) - len(tokens)
                for offset, token in enumerate(tokens):
                    at = batch.n_tokens
                    batch.token[at], batch.pos[at] = token, first + offset
                    batch.n_seq_id[at], batch.seq_id[at][0] = 1, row
                    batch.logits[at] = offset == len(tokens) - 1
                    batch.n_tokens += 1
                wanted.append((row, batch.n_tokens - 1))
            code = api.llama_decode(self.context, batch)
            if code != 0:
                raise RuntimeError(f"llama_decode answered {code}")
            for row, at in wanted:
                logits = np.ctypeslib.as_array(api.llama_get_logits_ith(self.context, at), shape=(self.vocab_size,))
                rows[row].append(int(logits.argmax()))
                times[row].append(time.perf_counter() - start)
            parts = {row: [rows[row][-1]] for row in parts if len(rows[row]) < new_tokens[row]}
        api.llama_batch_free(batch)
        return rows, times
