"""transformers' continuous batching (measured with 5.23.0): a manager with a thread of its own and a paged cache.

``sdpa`` and ``paged|eager`` are the attentions that it has on a CPU. The manager stays between calls, and its cache is
given the size that the requests need.
"""

from __future__ import annotations

import os
import pathlib
import time

REQUIRES = {"transformers": "transformers", "torch": "torch"}
PAGE_SIZE = 256


class Runner:
    """A loaded model; ``serve`` answers (tokens of each request, seconds from the start to each of its tokens)."""

    def __init__(self, checkpoint: str, converted: pathlib.Path, options: dict) -> None:
        os.environ["TRANSFORMERS_VERBOSITY"] = "error"
        import torch
        from transformers import GenerationConfig, GPT2LMHeadModel
        from transformers.generation.configuration_utils import ContinuousBatchingConfig

        torch.set_num_threads(options["threads"])
        model = GPT2LMHeadModel.from_pretrained(
            checkpoint, dtype=getattr(torch, options["dtype"]), attn_implementation=options["attention"]
        )
        pages = options["capacity"] * -(-options["longest"] // PAGE_SIZE)
        self.manager = model.eval().init_continuous_batching(
            # no end token: every request makes as many tokens as it was asked for
            generation_config=GenerationConfig(do_sample=False, eos_token_id=-1, pad_token_id=0),
            continuous_batching_config=ContinuousBatchingConfig(
                auto_switch_to_flash=False, page_size=PAGE_SIZE, num_blocks=pages + 2
            ),
        )
        self.manager.start()

    def serve(self, prompts: list[list[int]], new_tokens: list[int]) -> tuple[list[list[int]], list[list[float]]]:
        start = time.perf_counter()
        names = [
            self.manager.add_request(prompt, max_new_tokens=count, record_timestamps=True)
            for prompt, count in zip(prompts, new_tokens, strict=True)
        ]
        finished: dict[str, object] = {}
        while len(finished) < len(names):
            result = self.manager.get_result(timeout=1)
            if result is not None and result.is_finished():
                if result.error:
                    raise RuntimeError(result.error)
                finished[result.request_id] = result
            elif result is None and not self.manager.is_running():
                raise RuntimeError("the manager's thread ended before its requests")
        rows = [finished[name] for name in names]
        return (
            [list(row.generated_tokens) for row in rows],
            [[moment - start for moment in row.timestamps] for row in rows],
        )

    def close(self) -> None:
        self.manager.stop(block=True)
