"""CTranslate2 (measured with 4.8.5): ``generate_batch`` with its own batching.

Prompts of different lengths share a batch: as many tokens as the shortest has are read at once, the others one after
another. A callback ends each row at its length, and the batch shrinks by it. With ``workers`` the library sorts the
requests by length into as many batches as there are threads, and computes them side by side, one thread each.
"""

from __future__ import annotations

import pathlib
import time

REQUIRES = {"ctranslate2": "ctranslate2"}


class Runner:
    """A loaded model; ``serve`` answers (tokens of each request, seconds from the start to each of its tokens)."""

    def __init__(self, checkpoint: str, converted: pathlib.Path, options: dict) -> None:
        import ctranslate2

        threads = options["threads"]
        self.workers = threads if options.get("workers") else 1
        self.generator = ctranslate2.Generator(
            str(converted),
            device="cpu",
            compute_type=options["compute_type"],
            inter_threads=self.workers,
            intra_threads=threads // self.workers,
        )

    def serve(self, prompts: list[list[int]], new_tokens: list[int]) -> tuple[list[list[int]], list[list[float]]]:
        tokens = [[str(token) for token in prompt] for prompt in prompts]
        times: list[list[float]] = [[] for _ in prompts]

        def note(step) -> bool:
            row = step.batch_id
            times[row].append(time.perf_counter() - start)
            return len(times[row]) >= new_tokens[row]

        start = time.perf_counter()
        results = self.generator.generate_batch(
            tokens,
            include_prompt_in_result=False,
            # 0: one batch
            max_batch_size=-(-len(prompts) // self.workers) if self.workers > 1 else 0,
            max_length=max(new_tokens),
            # no row ends early
            min_length=max(new_tokens),
            sampling_topk=1,
            callback=note,
        )
        return [[int(token) for token in result.sequences[0]] for result in results], times
