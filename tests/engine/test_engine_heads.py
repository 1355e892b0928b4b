"""Embeddings, classes, answers and choices: every head on the engine says what the model's own forward says."""

import openai_gpt_models
import pytest
import torch
from engine_cases import GREEDY, generate, prompt_ids, said, small_gpt2, tiny

import gpt2rt
from gpt2rt.engine import LLM, PoolingParams, SamplingParams
from gpt2rt.errors import RequestError


@pytest.fixture(scope="module")
def llm():
    return tiny()


# prompts of one token, of blocks and more; in whole, and in chunks of 7
_LENGTHS = (1, 16, 5, 33, 40)
_CHUNKS = ({}, {"max_num_batched_tokens": 7, "max_num_seqs": 3})


def build(kind, **fields):
    """A random model of any class, and prompts for it."""
    make = openai_gpt_models.make if kind.startswith("OpenAI") else small_gpt2
    model = make(getattr(gpt2rt, kind), **fields)
    return model, [prompt_ids(n, seed=n, vocab_size=90) for n in _LENGTHS]


def engines(model):
    for options in _CHUNKS:
        yield LLM(model, num_blocks=40, **options)


def near(mine, theirs):
    torch.testing.assert_close(torch.as_tensor(mine), theirs, rtol=2e-5, atol=2e-5)


@torch.no_grad()
def forward(model, prompt):
    return model(torch.tensor([prompt]))


@pytest.mark.parametrize("kind", ["GPT2Model", "GPT2LMHeadModel", "OpenAIGPTModel", "OpenAIGPTLMHeadModel"])
def test_embeddings_are_the_last_hidden_states(kind):
    model, prompts = build(kind)
    trunk = getattr(model, "transformer", model)
    for llm in engines(model):
        last, mean = llm.embed(prompts), llm.embed(prompts, pooling="mean", normalize=False)
        each = llm.encode(prompts, PoolingParams(task="token_embed", normalize=False))
        for prompt, one, average, rows in zip(prompts, last, mean, each, strict=True):
            states = forward(trunk, prompt).last_hidden_state[0]
            near(one.outputs.embedding, states[-1] / states[-1].norm())
            near(average.outputs.embedding, states.mean(0))
            near(rows.outputs.data, states)
        first, second = llm.embed(prompts[3:])
        (score,) = llm.score(prompts[3], prompts[4])
        cosine = torch.tensor(first.outputs.embedding) @ torch.tensor(second.outputs.embedding)
        assert score.outputs.score == pytest.approx(float(cosine), abs=1e-6)
        assert [result.outputs.score for result in llm.score(prompts[3], prompts)][4] == score.outputs.score
        assert ("generate" in llm.tasks) == ("LMHead" in kind)


@pytest.mark.parametrize("kind", ["GPT2ForSequenceClassification", "OpenAIGPTForSequenceClassification"])
def test_classes_are_those_of_the_model(kind):
    for labels, problem, activation in (
        (3, None, lambda logits: logits.softmax(-1)),
        (3, "multi_label_classification", torch.sigmoid),
        (1, None, torch.sigmoid),
        (2, "regression", lambda logits: logits),
    ):
        model, prompts = build(kind, num_labels=labels, problem_type=problem, pad_token_id=0)
        # padding on the right is passed over, and within the text it is not
        prompts = [*prompts, [5, 0, 6, 0, 0], [0, 0, 0]]
        for llm in engines(model):
            assert llm.tasks == ({"classify", "score"} if labels == 1 else {"classify"})
            for prompt, found, raw in zip(
                prompts, llm.classify(prompts), llm.classify(prompts, use_activation=False), strict=True
            ):
                logits = forward(model, prompt).logits[0]
                near(raw.outputs.probs, logits)
                near(found.outputs.probs, activation(logits))
            if labels == 1:
                (scored,) = llm.score(prompts[2], prompts[3])
                near([scored.outputs.score], forward(model, prompts[2] + prompts[3]).logits[0].sigmoid())
            with pytest.raises(RequestError, match="has no task 'embed'"):
                llm.embed(prompts)
            with pytest.raises(RequestError, match="generates no text"):
                llm.generate(prompts, SamplingParams(detokenize=False))


def test_token_classes_are_those_of_the_model():
    model, prompts = build("GPT2ForTokenClassification", num_labels=4)
    for llm in engines(model):
        found = llm.encode(prompts)
        raw = llm.encode(prompts, PoolingParams(task="token_classify", use_activation=False))
        for prompt, probabilities, logits in zip(prompts, found, raw, strict=True):
            expected = forward(model, prompt).logits[0]
            near(logits.outputs.data, expected)
            near(probabilities.outputs.data, expected.softmax(-1))


def test_question_answering_rows_are_those_of_the_model():
    model, prompts = build("GPT2ForQuestionAnswering")
    for llm in engines(model):
        for prompt, found in zip(prompts, llm.encode(prompts), strict=True):
            expected = forward(model, prompt)
            near(found.outputs.data, torch.stack([expected.start_logits[0], expected.end_logits[0]], dim=-1))


@pytest.mark.parametrize("kind", ["GPT2DoubleHeadsModel", "OpenAIGPTDoubleHeadsModel"])
@pytest.mark.parametrize("summary", ["cls_index", "last"])
def test_choices_are_those_of_the_model(kind, summary):
    model, prompts = build(kind, summary_type=summary)
    stem, choices = prompts[3], [prompt_ids(6, seed=i, vocab_size=90) for i in range(4)]
    outputs = [forward(model, stem + choice) for choice in choices]
    for llm in engines(model):
        near(llm.choose(stem, choices), torch.stack([output.mc_logits.flatten()[-1] for output in outputs]))
        # the stem is computed once
        assert llm.stats().prefix_cache_hits == 3 * 32
        assert llm.choose(stem, []) == []
        (words,) = llm.generate([stem], SamplingParams(max_tokens=1, logprobs=0, detokenize=False, **GREEDY))
        assert words.outputs[0].token_ids == [int(outputs[0].logits[0, len(stem) - 1].argmax())]


def test_only_a_multiple_choice_head_chooses(llm):
    with pytest.raises(RequestError, match="no multiple choice head"):
        llm.choose("a", ["b"])
    model, _ = build("GPT2DoubleHeadsModel", summary_type="mean")
    assert "classify" not in LLM(model, num_blocks=8).tasks


def test_heads_and_text_run_side_by_side(llm):
    params = SamplingParams(max_tokens=20, seed=1, logprobs=2)
    expected = generate(llm, [prompt_ids(20)], params)[0], llm.embed([prompt_ids(70, seed=1)])[0].outputs.embedding
    llm.reset_prefix_cache()
    stream = llm.stream(prompt_ids(20), params)
    first = next(stream)
    assert not first.finished
    assert llm.embed([prompt_ids(70, seed=1)])[0].outputs.embedding == expected[1]
    assert said(list(stream)[-1]) == expected[0]


@pytest.mark.proves("fault:F53")
def test_embeddings_in_a_pool_that_is_short():
    prompts = [prompt_ids(60, seed=i) for i in range(6)]
    expected = [output.outputs.embedding for output in tiny().embed(prompts, pooling="mean")]
    llm = tiny(num_blocks=7, max_num_batched_tokens=20, max_num_seqs=8)
    assert [output.outputs.embedding for output in llm.embed(prompts, pooling="mean")] == expected
