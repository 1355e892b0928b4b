"""Beam search against transformers: tokens, scores, and where each token came from."""

import random
import warnings

import pytest
import torch

from gpt2rt import OpenAIGPTConfig, OpenAIGPTLMHeadModel


@pytest.fixture(scope="module")
def pair(make_model, hf):
    model = make_model()
    return model, hf.copy_of(model)


def quietly(generate, *args, **kwargs):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return generate(*args, **kwargs)


def random_call(seed):
    """Prompts, padded or not, and settings."""
    choose = random.Random(seed)
    batch, length = choose.choice([1, 2, 3]), choose.randint(1, 9)
    ids = torch.randint(3, 97, (batch, length), generator=torch.Generator().manual_seed(seed))
    mask = torch.ones_like(ids)
    if seed % 2:
        for row in range(1, batch):
            mask[row, : choose.randint(0, length - 1)] = 0
    num_beams = choose.randint(2, 5)
    settings = {
        "num_beams": num_beams,
        "num_return_sequences": choose.randint(1, num_beams),
        "max_new_tokens": choose.randint(1, 14),
        "length_penalty": choose.choice([1.0, 0.0, -1.0, 2.0, 0.6]),
        "early_stopping": [True, False, "never"][seed % 3],
        "eos_token_id": choose.choice([2, None, list(range(2, 97, choose.randint(3, 20)))]),
        "pad_token_id": choose.choice([0, 5]),
    }
    rules = {
        "repetition_penalty": 1.4,
        "no_repeat_ngram_size": 2,
        "bad_words_ids": [[5], [7, 8], [40, 41]],
        "min_new_tokens": 4,
        "forced_eos_token_id": 2,
        "renormalize_logits": True,
        "use_cache": False,
    }
    settings |= {name: value for name, value in rules.items() if choose.random() < 0.25}
    return ids.masked_fill(mask == 0, 0), mask, settings


def assert_equal_results(mine, other, num_beams, pad_token_id):
    # transformers without an end token fills rows with -1, which no tokenizer can decode
    assert torch.equal(mine.sequences, other.sequences.masked_fill(other.sequences < 0, pad_token_id))
    assert mine.beam_indices.dtype == other.beam_indices.dtype
    assert torch.equal(mine.beam_indices, other.beam_indices)
    torch.testing.assert_close(mine.sequences_scores, other.sequences_scores, rtol=1e-5, atol=1e-4)
    for name in ("scores", "logits"):
        steps = len(mine[name])
        # transformers goes on until the prompts of the whole batch are done, and a little further
        assert steps <= len(other[name])
        assert mine[name][0].shape == other[name][0].shape
        for ours, theirs in zip(mine[name], other[name], strict=False):
            running = (ours != 0).any(dim=1)
            assert running.view(-1, num_beams).all(dim=1).any()
            torch.testing.assert_close(ours[running], theirs[running], rtol=1e-4, atol=3e-4)


@pytest.mark.proves("G2", "G3", "G6", "I24")
@pytest.mark.parametrize("seed", range(36))
def test_random_calls(pair, seed):
    ours, theirs = pair
    ids, mask, settings = random_call(seed)
    ours.generation_executor(["cpu", "eager"][seed % 2])
    recorded = {"return_dict_in_generate": True, "output_scores": True, "output_logits": True}
    expected = quietly(theirs.generate, ids, attention_mask=mask, **recorded, **settings)
    found = quietly(ours.generate, ids, attention_mask=mask, **recorded, **settings)
    assert_equal_results(found, expected, settings["num_beams"], settings["pad_token_id"])
    assert torch.equal(quietly(ours.generate, ids, attention_mask=mask, **settings), found.sequences)


@pytest.mark.proves("G2")
@pytest.mark.parametrize("seed", range(6))
def test_openai_gpt(hf, seed):
    torch.manual_seed(seed)
    config = OpenAIGPTConfig(vocab_size=97, n_positions=48, n_embd=32, n_layer=2, n_head=4, initializer_range=0.3)
    ours = OpenAIGPTLMHeadModel(config).eval()
    theirs = hf.module.OpenAIGPTLMHeadModel(hf.module.OpenAIGPTConfig(**config.to_dict())).eval()
    theirs.load_state_dict(ours.state_dict())
    ids = torch.randint(3, 97, (2, 6), generator=torch.Generator().manual_seed(seed))
    settings = {
        "num_beams": 3,
        "max_new_tokens": 9,
        "eos_token_id": [2, 11, 20, 29, 38],
        "pad_token_id": 5,
        "early_stopping": bool(seed % 2),
        "num_return_sequences": 2,
        "return_dict_in_generate": True,
        "output_scores": True,
    }
    found, expected = ours.generate(ids, **settings), quietly(theirs.generate, ids, **settings)
    assert torch.equal(found.sequences, expected.sequences)
    assert torch.equal(found.beam_indices, expected.beam_indices)
    torch.testing.assert_close(found.sequences_scores, expected.sequences_scores, rtol=1e-5, atol=1e-4)


def test_up_to_the_last_position(pair):
    ours, theirs = pair
    ids = torch.randint(3, 97, (2, 8), generator=torch.Generator().manual_seed(1))
    settings = {"num_beams": 3, "max_length": 48, "eos_token_id": None, "pad_token_id": 0}
    assert torch.equal(ours.generate(ids, **settings), quietly(theirs.generate, ids, **settings))


@pytest.mark.proves("G1")
def test_default_length(pair):
    ours, theirs = pair
    ids = torch.randint(3, 97, (2, 8), generator=torch.Generator().manual_seed(2))
    settings = {"num_beams": 2, "eos_token_id": None, "pad_token_id": 0}
    found = ours.generate(ids, **settings)
    assert found.shape == (2, 28)
    assert torch.equal(found, quietly(theirs.generate, ids, **settings))


@pytest.mark.proves("G3", "G5")
def test_callers_processors_and_criteria_of_both_libraries(pair, hf):
    ours, theirs = pair
    ids = torch.randint(3, 97, (2, 5), generator=torch.Generator().manual_seed(3))

    class Prefer:
        def __call__(self, input_ids, scores):
            assert input_ids.shape[0] == scores.shape[0] == 6
            scores = scores.clone()
            # something of its own for each prompt, and for what stands in the row, so that a mixed-up row shows
            scores[torch.arange(6), 10 + torch.arange(6) // 3] += 3.0
            scores[torch.arange(6), (input_ids[:, -1] * 7) % 97] += 2.0
            return scores

    class EndsAt:
        def __call__(self, input_ids, scores, **kwargs):
            assert input_ids.shape[0] == 12
            return input_ids[:, -1] % 5 == 0

    modules = hf.module
    settings = {
        "num_beams": 3,
        "max_new_tokens": 10,
        "num_return_sequences": 3,
        "eos_token_id": None,
        "pad_token_id": 0,
        "logits_processor": modules.LogitsProcessorList([Prefer(), modules.MinLengthLogitsProcessor(6, 2)]),
        "stopping_criteria": modules.StoppingCriteriaList([EndsAt()]),
        "early_stopping": True,
    }
    found, expected = ours.generate(ids, **settings), quietly(theirs.generate, ids, **settings)
    # rows are filled with pad_token_id here, where transformers without an end token has -1
    assert torch.equal(found, expected.clamp(min=0))


@pytest.mark.proves("G5")
def test_stop_strings(byte_model, tokenizer, hf, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    their_tokenizer = hf.module.AutoTokenizer.from_pretrained(tmp_path)
    theirs = hf.copy_of(byte_model)
    ids = torch.tensor([[40, 41, 42], [70, 71, 72]])
    free = byte_model.generate(ids, max_new_tokens=14, num_beams=3, eos_token_id=None, pad_token_id=9)
    texts = [tokenizer.decode(row[3:]) for row in free]
    stops = [next(c for c in text[4:] if c.isascii()) for text in texts]
    settings = {"max_new_tokens": 14, "num_beams": 3, "num_return_sequences": 2, "pad_token_id": 9}
    expected = quietly(theirs.generate, ids, tokenizer=their_tokenizer, stop_strings=stops, **settings)
    found = byte_model.generate(ids, tokenizer=tokenizer, stop_strings=stops, **settings)
    assert torch.equal(found, expected)
    assert not torch.equal(found, byte_model.generate(ids, **settings)[:, : found.size(1)])


@pytest.mark.proves("G13")
def test_prefix_allowed_tokens_fn(pair):
    ours, theirs = pair
    ids = torch.randint(3, 97, (3, 4), generator=torch.Generator().manual_seed(4))
    allowed = {0: list(range(2, 30)), 1: list(range(2, 60, 3)), 2: [2, 5, 50, 61, 70, 80, 90, 95, 96]}
    settings = {
        "num_beams": 3,
        "max_new_tokens": 8,
        "eos_token_id": [2, 5, 20],
        "pad_token_id": 7,
        "early_stopping": True,
        "prefix_allowed_tokens_fn": lambda batch_id, row: allowed[batch_id],
    }
    found, expected = ours.generate(ids, **settings), quietly(theirs.generate, ids, **settings)
    assert torch.equal(found, expected)


@pytest.mark.proves("G13")
def test_guidance_follows_the_beams(pair):
    """The negative prompt has a cache of its own, which transformers does not reorder; recomputing it is the check."""
    ours, _ = pair
    ours.generation_executor("cpu")
    ids = torch.randint(3, 97, (2, 4), generator=torch.Generator().manual_seed(5))
    negative = torch.randint(3, 97, (2, 3), generator=torch.Generator().manual_seed(6))
    settings = {"num_beams": 3, "max_new_tokens": 6, "eos_token_id": list(range(2, 97, 9)), "pad_token_id": 0}
    guidance = {"guidance_scale": 2.0, "negative_prompt_ids": negative}
    guided = ours.generate(ids, **guidance, **settings)
    assert guided.tolist() != ours.generate(ids, **settings).tolist()
    assert torch.equal(ours.generate(ids, use_cache=False, **guidance, **settings), guided)


@pytest.mark.proves("G6")
def test_scores_can_be_computed_again(pair):
    ours, theirs = pair
    ids = torch.randint(3, 97, (2, 5), generator=torch.Generator().manual_seed(8))
    for penalty in (1.0, 2.0, 0.0):
        output = ours.generate(
            ids,
            num_beams=4,
            num_return_sequences=3,
            max_new_tokens=9,
            length_penalty=penalty,
            eos_token_id=list(range(2, 97, 7)),
            pad_token_id=0,
            return_dict_in_generate=True,
            output_scores=True,
        )
        found = ours.compute_transition_scores(output.sequences, output.scores, output.beam_indices)
        theirs_too = theirs.compute_transition_scores(output.sequences, output.scores, output.beam_indices)
        assert torch.equal(found, theirs_too)
        lengths = (output.beam_indices >= 0).sum(dim=1)
        torch.testing.assert_close(found.sum(dim=1) / lengths**penalty, output.sequences_scores, rtol=1e-4, atol=1e-4)
