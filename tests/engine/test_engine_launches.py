"""No request waits for a compiler: what the warm-up has launched is all that later requests launch."""

import random

import pytest
import torch
from launch_spy import spying

import gpt2rt
from gpt2rt import GPT2Config
from gpt2rt.engine import LLM, PoolingParams, SamplingParams, warmup
from gpt2rt.models.quantize import quantize_model

# an odd number: rows of logits then begin anywhere, unless they are padded
VOCAB = 1009
SIZES = {"n_layer": 1, "n_embd": 64, "n_head": 2, "vocab_size": VOCAB, "bos_token_id": None, "eos_token_id": None}
LENGTHS = (1, 2, 3, 8, 9, 16, 17, 33, 64, 65, 128, 129, 257, 300, 511, 600)


def small(kind, dtype, n_positions, **fields):
    torch.manual_seed(0)
    return getattr(gpt2rt, kind)(GPT2Config(**SIZES, n_positions=n_positions, **fields)).eval().to(dtype)


def sampling(choose, room):
    """Settings by chance."""

    def maybe(share, **settings):
        return settings if choose.random() < share else {}

    temperature = choose.choice([0.0, 0.7, 1.0])
    return SamplingParams(
        temperature=temperature,
        max_tokens=min(room, choose.choice([1, 2, 5])),
        seed=1,
        ignore_eos=True,
        detokenize=False,
        **maybe(0.3, top_k=choose.choice([1, 5, 40])),
        **maybe(0.3, top_p=0.9),
        **maybe(0.3, min_p=0.1),
        **maybe(0.2, repetition_penalty=1.2),
        **maybe(0.2, presence_penalty=0.4),
        **maybe(0.2, frequency_penalty=0.3),
        **maybe(0.2, logprobs=choose.choice([0, 1, 20])),
        **maybe(0.2, prompt_logprobs=choose.choice([0, 1, 20])),
        **maybe(0.2, logit_bias={3: 1.0}),
        **(maybe(0.2, n=3) if temperature else {}),
    )


def ask(llm, choose):
    """One to twenty prompts at once, some of them for hidden states."""
    longest = llm.max_model_len - 6
    lengths = [min(longest, choose.choice(LENGTHS)) for _ in range(choose.choice([1, 2, 5, 20]))]
    prompts = [[choose.randrange(VOCAB) for _ in range(length)] for length in lengths]
    pooled = sorted(llm.tasks - {"generate", "score"})
    if "generate" in llm.tasks:
        llm.generate(prompts, [sampling(choose, 5) for _ in prompts])
    if pooled:
        llm.encode(prompts, [PoolingParams(task=choose.choice(pooled)) for _ in prompts])


CASES = {
    "float32": (lambda: small("GPT2LMHeadModel", torch.float32, 1024), {"max_num_batched_tokens": 100}),
    # many rows of few splits; prompts of several sequences with more tokens together than one may have
    "float16": (lambda: small("GPT2DoubleHeadsModel", torch.float16, 256), {"max_num_seqs": 70}),
    "int4": (lambda: quantize_model(small("GPT2LMHeadModel", torch.bfloat16, 600), "int4", progress=False), {}),
    "int8 cache": (lambda: small("GPT2LMHeadModel", torch.float16, 600), {"kv_cache_dtype": "int8"}),
    # a head that looks at every token
    "token classes": (lambda: small("GPT2ForTokenClassification", torch.float16, 600, num_labels=3), {}),
}


@pytest.mark.parametrize("case", CASES)
def test_requests_launch_what_the_warm_up_has_launched(case):
    make, options = CASES[case]
    choose = random.Random(case)
    with spying() as seen:
        llm = LLM(make(), executor="cuda", num_blocks=1000, **{"max_num_seqs": 16, **options})
        warmup.try_out(llm._served)
        warm = set(seen)
        assert len(warm) > 20
        for _ in range(5):
            ask(llm, choose)
        assert seen - warm == set()
        llm.shutdown()


def test_the_spy_finds_what_is_missing(monkeypatch):
    monkeypatch.setattr(warmup, "_WAYS", warmup._WAYS[:2])
    with spying() as seen:
        llm = LLM(small("GPT2LMHeadModel", torch.float32, 64), executor="cuda", num_blocks=40, max_num_seqs=4)
        warmup.try_out(llm._served)
        warm = set(seen)
        llm.generate([[5, 7]], SamplingParams(max_tokens=2, repetition_penalty=1.2, detokenize=False))
        assert "_penalties_kernel" in {key[0] for key in seen - warm}
        llm.shutdown()
