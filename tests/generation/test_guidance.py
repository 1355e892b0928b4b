"""Classifier-free guidance: the unconditional branch in its own paged cache."""

import pytest
import torch

from gpt2rt import UnbatchedClassifierFreeGuidanceLogitsProcessor
from gpt2rt.errors import RequestError
from gpt2rt.generation import guidance as module
from gpt2rt.generation.guidance import GuidanceProcessor

PROMPTS = torch.tensor([[5, 6, 7], [40, 41, 20], [33, 34, 35]])
NEGATIVE = torch.tensor([[50, 51, 52, 53], [60, 61, 62, 63], [70, 71, 72, 73]])


@pytest.fixture(scope="module")
def theirs(model, hf):
    return hf.copy_of(model)


@pytest.fixture
def guidance_pools(monkeypatch):
    """The block pools of the unconditional branches that a test makes."""
    made = []

    def new_cache(*args):
        cache = original(*args)
        made.append(cache.pool)
        return cache

    original = module.new_cache
    monkeypatch.setattr(module, "new_cache", new_cache)
    return made


def reference(model, row, negative, scale):
    """The scores after a row, by the definition: whole texts, one at a time."""
    with torch.no_grad():
        cond = model(torch.tensor([row])).logits[0, -1].log_softmax(-1)
        other = model(torch.tensor([negative])).logits[0, -1].log_softmax(-1)
    return other + scale * (cond - other)


@pytest.mark.proves("G13")
@pytest.mark.parametrize("scale", [1.5, 3.0, 0.0, 0.5, -1.0])
@pytest.mark.parametrize("negative", [None, NEGATIVE[:1], NEGATIVE[:1, :1]])
def test_greedy_matches_transformers(model, theirs, scale, negative, guidance_pools):
    settings = {"guidance_scale": scale, "negative_prompt_ids": negative, "max_new_tokens": 12}
    for prompt in PROMPTS:
        ids = prompt[None]
        expected = theirs.generate(ids, attention_mask=torch.ones_like(ids), pad_token_id=0, **settings)
        assert torch.equal(model.generate(ids, **settings), expected)
    assert len(guidance_pools) == 3
    assert all(pool.num_free == pool.num_blocks for pool in guidance_pools)


def test_a_batch_matches_transformers(model, theirs):
    settings = {"guidance_scale": 2.0, "negative_prompt_ids": NEGATIVE, "max_new_tokens": 12}
    expected = theirs.generate(PROMPTS, attention_mask=torch.ones_like(PROMPTS), pad_token_id=0, **settings)
    assert torch.equal(model.generate(PROMPTS, **settings), expected)


@pytest.mark.parametrize("settings", [{}, {"use_cache": False}, {"do_sample": True, "seed": 3}])
def test_padded_prompts_of_any_length(model, settings):
    """Left padding in prompts and negative prompts; transformers counts positions from the padding on here."""
    prompts, negatives = [[5, 6, 7], [40], [33, 34]], [[50], [60, 61, 62], [70, 71]]
    settings = {"guidance_scale": 1.8, "max_new_tokens": 10, **settings}
    alone = [
        model.generate([prompt], negative_prompt_ids=torch.tensor([negative]), **settings)[0, len(prompt) :].tolist()
        for prompt, negative in zip(prompts, negatives, strict=True)
    ]
    padded = torch.tensor([[0] * (3 - len(row)) + row for row in negatives])
    mask = torch.tensor([[0] * (3 - len(row)) + [1] * len(row) for row in negatives])
    together = model.generate(prompts, negative_prompt_ids=padded, negative_prompt_attention_mask=mask, **settings)
    for row, expected in zip(together[:, 3:].tolist(), alone, strict=True):
        assert row == expected + [0] * (len(row) - len(expected))


def test_without_negative_prompts_each_row_starts_from_its_last_token(model):
    prompts = [[5, 6, 7], [40]]
    with_ids = model.generate(
        prompts, guidance_scale=2.0, max_new_tokens=8, negative_prompt_ids=torch.tensor([[7], [40]])
    )
    assert torch.equal(model.generate(prompts, guidance_scale=2.0, max_new_tokens=8), with_ids)


@pytest.mark.parametrize("num_return_sequences", [1, 3])
def test_one_negative_prompt_for_all_rows(model, num_return_sequences):
    settings = {"guidance_scale": 2.0, "max_new_tokens": 8, "do_sample": True, "seed": 1}
    settings["num_return_sequences"] = num_return_sequences
    one = model.generate(PROMPTS, negative_prompt_ids=NEGATIVE[:1], **settings)
    assert torch.equal(one, model.generate(PROMPTS, negative_prompt_ids=NEGATIVE[:1].repeat(3, 1), **settings))
    assert not torch.equal(one, model.generate(PROMPTS, negative_prompt_ids=NEGATIVE, **settings))


@pytest.mark.parametrize("use_cache", [True, False])
def test_rows_in_any_order_and_number(model, use_cache):
    """Rows are dropped, doubled, exchanged and taken back, as beams and candidates do; nothing is lost or mixed up."""
    generator = torch.Generator().manual_seed(0)
    processor = GuidanceProcessor(
        1.5,
        model.generation_executor(),
        [[50, 51], [60]],
        prompt_columns=2,
        num_rows=6,
        max_new_tokens=20,
        use_cache=use_cache,
    )
    rows = [[5, 6]] * 3 + [[7, 8]] * 3
    for step in range(12):
        kept = sorted(torch.randperm(6, generator=generator)[: 1 + step % 6].tolist())
        ids = torch.tensor([rows[row] for row in kept])
        logits = torch.randn(len(kept), 97, generator=generator)
        result = processor.for_rows(ids, logits, kept)
        for place, row in enumerate(kept):
            negative = [[50, 51], [60]][row // 3] + rows[row][2:]
            with torch.no_grad():
                other = model(torch.tensor([negative])).logits[0, -1].log_softmax(-1)
            expected = other + 1.5 * (logits[place].log_softmax(-1) - other)
            torch.testing.assert_close(result[place], expected, rtol=2e-5, atol=2e-5)
        # rows of a prompt continue one another; all get a token, which in two of three steps is the same one
        parents = [3 * (row // 3) + int(torch.randint(0, 3, (), generator=generator)) for row in range(6)]
        rows = [rows[parent] + [int(torch.randint(0, 3, (), generator=generator))] for parent in parents]
        if step % 4 == 3:
            # back to a shorter text
            rows = [row[:-2] for row in rows]
    pool = processor._cache.pool
    assert pool.num_free < pool.num_blocks or not use_cache
    processor.close()
    assert pool.num_free == pool.num_blocks


def test_beams_keep_their_own_branch(model, theirs, guidance_pools):
    settings = {"guidance_scale": 1.5, "num_beams": 3, "max_new_tokens": 8, "num_return_sequences": 3}
    result = model.generate(
        PROMPTS, negative_prompt_ids=NEGATIVE, return_dict_in_generate=True, output_scores=True, **settings
    )
    assert all(pool.num_free == pool.num_blocks for pool in guidance_pools)
    for index, prompt in enumerate(PROMPTS):
        alone = model.generate(prompt[None], negative_prompt_ids=NEGATIVE[index : index + 1], **settings)
        mine = result.sequences[3 * index : 3 * index + 3]
        width = max(alone.size(1), mine.size(1))
        pad = torch.nn.functional.pad
        assert torch.equal(pad(alone, (0, width - alone.size(1))), pad(mine, (0, width - mine.size(1))))
    # the score of the best row is the sum of its guided log-probabilities
    row = result.sequences[0].tolist()
    new = [token for token in row[3:] if token != 0]
    total = 0.0
    for step, token in enumerate(new):
        total += float(reference(model, row[: 3 + step], NEGATIVE[0].tolist() + new[:step], 1.5)[token])
    assert float(result.sequences_scores[0]) == pytest.approx(total / len(new), abs=1e-4)


def test_blocks_are_free_after_an_error(model, guidance_pools):
    def fail(ids, scores):
        if ids.size(1) == 6:
            raise KeyError("stop")
        return scores

    with pytest.raises(KeyError):
        model.generate(PROMPTS, guidance_scale=2.0, max_new_tokens=8, logits_processor=[fail])
    assert [pool.num_free == pool.num_blocks for pool in guidance_pools] == [True]


def test_as_a_callers_processor(model, theirs, hf):
    ids = PROMPTS[:2]
    processor = UnbatchedClassifierFreeGuidanceLogitsProcessor(1.7, model, NEGATIVE[:2])
    expected = model.generate(ids, guidance_scale=1.7, negative_prompt_ids=NEGATIVE[:2], max_new_tokens=8)
    # used twice: a new call starts anew
    for _ in range(2):
        assert torch.equal(model.generate(ids, logits_processor=[processor], max_new_tokens=8), expected)
    mask = torch.ones_like(ids)
    inside = theirs.generate(ids, attention_mask=mask, logits_processor=[processor], max_new_tokens=8, pad_token_id=0)
    assert torch.equal(inside, expected)
    other = hf.module.UnbatchedClassifierFreeGuidanceLogitsProcessor(1.7, theirs, NEGATIVE[:2])
    assert torch.equal(model.generate(ids, logits_processor=[other], max_new_tokens=8), expected)
    with pytest.raises(TypeError, match="needs a language model of gpt2rt"):
        UnbatchedClassifierFreeGuidanceLogitsProcessor(1.7, theirs)


REFUSED = {
    "number": ({"negative_prompt_ids": NEGATIVE[:2]}, "2 negative prompts for 3 rows"),
    "too long": ({"negative_prompt_ids": torch.full((1, 46), 5)}, "longest negative prompt has 46 tokens"),
    "shape": ({"negative_prompt_ids": torch.tensor([5, 6])}, r"shape \[2\], expected integers \[batch, length\]"),
    "floats": ({"negative_prompt_ids": torch.tensor([[5.0]])}, "is torch.float32"),
    "text": ({"negative_prompt_ids": "no"}, "negative_prompt_ids is a str, expected a tensor of integers"),
    "id": ({"negative_prompt_ids": torch.tensor([[97]])}, "negative prompt 0 holds the token id 97"),
    "mask shape": (
        {"negative_prompt_ids": NEGATIVE, "negative_prompt_attention_mask": torch.ones(3, 3)},
        "expected .3, 4., the shape of negative_prompt_ids",
    ),
    "empty": (
        {"negative_prompt_ids": NEGATIVE, "negative_prompt_attention_mask": torch.zeros(3, 4)},
        "negative prompt 0 holds no token",
    ),
    "mask alone": ({"negative_prompt_attention_mask": torch.ones(3, 4)}, "without negative_prompt_ids"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refusals(model, name):
    settings, message = REFUSED[name]
    with pytest.raises(RequestError, match=message):
        model.generate(PROMPTS, guidance_scale=2.0, max_new_tokens=5, **settings)


def test_negative_prompts_without_guidance_do_nothing(model):
    with pytest.warns(UserWarning, match="only matter with guidance_scale"):
        result = model.generate(PROMPTS, negative_prompt_ids=NEGATIVE, max_new_tokens=3)
    assert torch.equal(result, model.generate(PROMPTS, max_new_tokens=3, guidance_scale=1.0))
