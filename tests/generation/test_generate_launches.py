"""No call of generate() waits for a compiler after ``gpt2rt warmup``: what that has launched is all that there is."""

import pytest
import torch
from launch_spy import spying
from lively_model import lively_model

from gpt2rt.cache import PagedKVCache
from gpt2rt.generation.warmup import run_each_way

# an odd number: rows of logits then begin anywhere, unless they are padded
VOCAB = 1009
WAYS = {
    "greedy": {"do_sample": False},
    "sampled": {"do_sample": True},
    "filtered": {"do_sample": True, "top_k": 5, "top_p": 0.9, "temperature": 0.7},
    "top_p": {"do_sample": True, "top_k": 0, "top_p": 0.9},
    "penalised": {"do_sample": True, "repetition_penalty": 1.2, "min_p": 0.1},
    "ngrams": {"do_sample": False, "no_repeat_ngram_size": 2},
    "beams": {"num_beams": 2},
    "scores": {"do_sample": True, "output_scores": True, "return_dict_in_generate": True},
    "several": {"do_sample": True, "num_return_sequences": 2},
}


@pytest.mark.filterwarnings("ignore")
def test_calls_launch_what_the_warm_up_has_launched():
    sizes = {"n_layer": 1, "n_embd": 64, "n_head": 2, "n_positions": 300, "vocab_size": VOCAB}
    with spying() as seen:
        model = lively_model(**sizes).to(torch.float16)
        executor = model.generation_executor("cuda")
        assert executor.name == "cuda"
        executor.warm_up(PagedKVCache(1, 2, 32, 8, dtype=torch.float16))
        run_each_way(model, "auto")
        warm = set(seen)
        assert len(warm) > 90
        for rows, length in ((1, 1), (3, 7), (4, 290)):
            ids = torch.randint(1, VOCAB, (rows, length))
            for name, way in WAYS.items():
                model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=4, seed=1, **way)
                assert seen - warm == set(), name
