"""Steps in which rows of logits that are sampled stand beside rows that are not, as many as there are choices."""

import pytest
from engine_cases import prompt_ids, said, tiny
from engine_faults import begin, references, run, small_llm

from gpt2rt.engine import PoolingParams, SamplingParams


@pytest.mark.parametrize("sampling", [{"temperature": 0.0}, {"seed": 1, "top_k": 5}, {"seed": 1, "n": 3}], ids=str)
def test_log_probabilities_of_a_prompt_of_one_token(sampling):
    # its only row of logits is sampled, and wanted as a whole besides
    with tiny() as llm:
        plain, asked = (
            said(llm.generate([[5]], SamplingParams(max_tokens=4, prompt_logprobs=wanted, **sampling))[0])
            for wanted in (None, 2)
        )
    assert asked.pop("prompt_logprobs") == [None]
    assert plain.pop("prompt_logprobs") is None
    assert asked == plain


@pytest.mark.parametrize(
    "wide",
    [SamplingParams(max_tokens=3, temperature=0.0, prompt_logprobs=0), PoolingParams(task="token_embed")],
    ids=str,
)
@pytest.mark.parametrize("n", [1, 2, 3])
@pytest.mark.parametrize("left", [1, 2, 3])
def test_choices_begin_beside_a_chunk_of_a_prompt(n, left, wide):
    # n choices need one row, and the chunk gives rows that are not sampled: 1 + left of them may be n
    cases = [
        (prompt_ids(64 - left, seed=7), SamplingParams(n=n, seed=3, max_tokens=4)),
        (prompt_ids(30, seed=8), wide),
    ]
    with small_llm(max_num_batched_tokens=64) as llm:
        assert run(llm, begin(llm, cases)) == references(cases)
