"""cpu_step: numbers against plain float64 torch, and bits against itself in other company."""

import pytest
import torch
from cpu_step_model import ACTIVATIONS, Config, StepModel

import gpt2rt.ops as ops

CASES = {
    "gpt2": Config(),
    "post norm": Config(post_norm=True, activation="gelu"),
    "no bias, one head": Config(bias=False, n_head=1, head_dim=50, n_inner=7),
    "head_dim 64": Config(n_head=2, head_dim=64, n_inner=130, vocab_size=64, n_layer=1),
    "bf16 weights": Config(dtype=torch.bfloat16),
    "f16 weights": Config(dtype=torch.float16, activation="quick_gelu"),
    "blocks of 5": Config(block_size=5, num_blocks=80),
}


def tokens_of(config, length, seed=1):
    return torch.randint(0, config.vocab_size, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def some_blocks(config, length, seed=2):
    """Distinct blocks, in random order, for a sequence of this length."""
    order = torch.randperm(config.num_blocks, generator=torch.Generator().manual_seed(seed)).tolist()
    return order[: -(-length // config.block_size)]


@pytest.fixture(params=CASES, scope="module")
def model(request):
    return StepModel(CASES[request.param])


@pytest.fixture
def fresh(model):
    model.reset_cache()
    return model


def test_matches_float64(fresh):
    tokens = tokens_of(fresh.config, 300)
    exact, exact_hidden = fresh.reference(tokens)
    logits, hidden = fresh.step(
        fresh.batch([(tokens, 0)], [some_blocks(fresh.config, 300)]), hidden=True, num_threads=2
    )
    # logits reach 20, so this is 1 to 2 ulp of them
    torch.testing.assert_close(logits.double(), exact, rtol=1e-6, atol=2e-5)
    torch.testing.assert_close(hidden.double(), exact_hidden, rtol=1e-6, atol=2e-5)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations(activation):
    model = StepModel(Config(activation=activation, n_layer=1))
    tokens = tokens_of(model.config, 20)
    logits = model.run(tokens, some_blocks(model.config, 20))
    torch.testing.assert_close(logits.double(), model.reference(tokens)[0], rtol=1e-6, atol=2e-5)


# what rounding keys and values to 8 or 11 bits, or to 127 steps, does to logits of up to 20
@pytest.mark.parametrize(("cache_dtype", "most"), [(torch.bfloat16, 0.1), (torch.float16, 0.02), (torch.int8, 0.2)])
def test_small_caches(cache_dtype, most):
    model = StepModel(Config(cache_dtype=cache_dtype))
    tokens = tokens_of(model.config, 100)
    logits = model.run(tokens, some_blocks(model.config, 100))
    error = (logits - model.reference(tokens)[0]).abs().max()
    assert 1e-4 < error < most
    model.reset_cache()
    assert torch.equal(model.run(tokens, some_blocks(model.config, 100, seed=5), chunk=7, num_threads=2), logits)


@pytest.mark.parametrize("cache_dtype", [torch.float32, torch.bfloat16, torch.int8], ids=str)
def test_splits_of_long_sequences_on_many_threads_change_no_bit(cache_dtype):
    # one sequence of 3 splits and 6 heads: fewer tiles than the threads could use, so each split is a task
    model = StepModel(Config(n_layer=2, n_head=3, head_dim=20, n_positions=900, num_blocks=60, cache_dtype=cache_dtype))
    tokens, blocks = tokens_of(model.config, 850), some_blocks(model.config, 850)
    model.run(tokens[:840], blocks)
    one = model.run_from(840, tokens, blocks, num_threads=1)
    for num_threads in (2, 5, 16, 64):
        assert torch.equal(model.run_from(840, tokens, blocks, num_threads=num_threads), one)
        # one token at a time
        assert torch.equal(model.run_from(840, tokens, blocks, chunk=1, num_threads=num_threads), one)


@pytest.mark.parametrize(("chunk", "num_threads"), [(1, 1), (7, 2), (16, 3), (64, 1), (None, 2), (None, 3)])
def test_chunks_blocks_and_threads_change_no_bit(fresh, chunk, num_threads):
    tokens = tokens_of(fresh.config, 150)
    whole = fresh.run(tokens, some_blocks(fresh.config, 150))
    fresh.reset_cache()
    again = fresh.run(tokens, some_blocks(fresh.config, 150, seed=7), chunk, num_threads)
    assert torch.equal(again, whole)


@pytest.mark.parametrize("num_threads", [1, 2])
def test_batch_neighbours_change_no_bit(fresh, num_threads):
    c = fresh.config
    prompts = [tokens_of(c, n, seed=n) for n in (1, 5, 40, 33)]
    alone, alone_next = [], []
    for prompt in prompts:
        fresh.reset_cache()
        blocks = some_blocks(c, len(prompt) + 1)
        alone.append(fresh.run(prompt, blocks))
        alone_next.append(fresh.step(fresh.batch([([3], len(prompt))], [blocks]))[0])

    fresh.reset_cache()
    order = torch.randperm(c.num_blocks).tolist()
    tables = [[order.pop() for _ in range(-(-(len(p) + 1) // c.block_size))] for p in prompts]
    # the third prompt comes in two parts, the second of them beside the others
    fresh.step(fresh.batch([(prompts[2][:17], 0)], [tables[2]]))
    chunks = [(prompts[0], 0), (prompts[1], 0), (prompts[2][17:], 17), (prompts[3], 0)]
    together = fresh.step(fresh.batch(chunks, tables), num_threads=num_threads)[0]
    expected = torch.cat([alone[0], alone[1], alone[2][17:], alone[3]])
    assert torch.equal(together, expected)
    decode = fresh.batch([([3], len(p)) for p in prompts], tables)
    assert torch.equal(fresh.step(decode, num_threads=num_threads)[0], torch.cat(alone_next))


def test_another_order_of_the_sums_gives_other_bits(fresh):
    # the control of the tests above: the same head with its features in another order is close, but not equal
    tokens = tokens_of(fresh.config, 150)
    logits, hidden = fresh.step(fresh.batch([(tokens, 0)], [some_blocks(fresh.config, 150)]), hidden=True)
    order = torch.randperm(fresh.config.n_embd)
    other = ops.linear(hidden[:, order], fresh.wte.float()[:, order], None)
    torch.testing.assert_close(logits, other, rtol=1e-4, atol=1e-4)
    assert not torch.equal(logits, other)


def test_head_is_the_linear_op_to_the_bit(fresh):
    # packed panels of any storage and panels packed on the fly give the same sums
    tokens = tokens_of(fresh.config, 40)
    logits, hidden = fresh.step(fresh.batch([(tokens, 0)], [some_blocks(fresh.config, 40)]), hidden=True)
    assert torch.equal(logits, ops.linear(hidden, fresh.wte.float(), None))


def test_logits_only_of_the_rows_asked_for(fresh):
    tokens = tokens_of(fresh.config, 40)
    batch = fresh.batch([(tokens, 0)], [some_blocks(fresh.config, 40)])
    logits, hidden = fresh.step(batch, hidden=True)
    for rows in ([39], [3, 3, 0], list(range(20)), []):
        fresh.reset_cache()
        some = fresh.step(
            {**batch, "logits_indices": torch.tensor(rows, dtype=torch.int64)}, hidden=True, num_threads=2
        )
        assert torch.equal(some[0], logits[rows])
        assert torch.equal(some[1], hidden[rows])


def test_hidden_or_logits_alone(fresh):
    tokens = tokens_of(fresh.config, 40)
    batch = fresh.batch([(tokens, 0)], [some_blocks(fresh.config, 40)])
    both = fresh.step(batch, hidden=True)
    for name, expected in (("hidden", both[1]), ("logits", both[0])):
        arguments = fresh.arguments(batch, hidden=True)
        other = "logits" if name == "hidden" else "hidden"
        arguments[other] = arguments[other][:0]
        ops.cpu_step(*arguments.values())
        assert torch.equal(arguments[name], expected)


def test_plan_without_a_head():
    with_head, without = StepModel(Config()), StepModel(Config(head=False))
    tokens = tokens_of(with_head.config, 20)
    blocks = some_blocks(with_head.config, 20)
    expected = with_head.step(with_head.batch([(tokens, 0)], [blocks]), hidden=True)[1]
    assert torch.equal(without.step(without.batch([(tokens, 0)], [blocks]), hidden=True)[1], expected)


def test_padding_tokens_are_not_cached(fresh):
    tokens = tokens_of(fresh.config, 10)
    batch = fresh.batch([(tokens, 0)], [some_blocks(fresh.config, 10)])
    expected, _ = fresh.step(batch)
    fresh.reset_cache()
    # a sequence of two more tokens whose slots are -1 but which has cached tokens to look at: its own earlier ones
    slots = torch.cat([batch["slot_mapping"], torch.tensor([-1])])
    padded = {
        **batch,
        "input_ids": torch.cat([batch["input_ids"], torch.tensor([0])]),
        "position_ids": torch.cat([batch["position_ids"], torch.tensor([0])]),
        "query_start_loc": torch.tensor([0, 10, 11], dtype=torch.int32),
        "seq_lens": torch.tensor([10, 1], dtype=torch.int32),
        "block_table": batch["block_table"].repeat(2, 1),
        "slot_mapping": slots,
    }
    before = fresh.kv_cache.isnan().sum()
    logits, _ = fresh.step(padded)
    assert torch.equal(logits, expected)
    assert before - fresh.kv_cache.isnan().sum() == 10 * 2 * fresh.config.n_layer * fresh.config.n_embd


def test_a_step_of_no_tokens(fresh):
    logits, hidden = fresh.step(fresh.batch([([], 0)], [[]]), hidden=True)
    assert logits.shape[0] == hidden.shape[0] == 0
    assert fresh.kv_cache.isnan().all()


def test_workspace_is_enough_and_not_overrun(fresh):
    # rows on both sides of every threshold, each in a workspace of exactly the size asked for, between two guards
    c = fresh.config
    for num_tokens in (1, 2, 8, 9, 33, 97):
        fresh.reset_cache()
        tokens = tokens_of(c, num_tokens)
        arguments = fresh.arguments(fresh.batch([(tokens, 0)], [some_blocks(c, num_tokens)]), num_threads=2)
        size = ops.cpu_step_workspace_bytes(fresh.plan, num_tokens, num_tokens)
        for offset in (0, 4, 60):
            guarded = torch.full((size + 256,), 7, dtype=torch.uint8)
            arguments["workspace"] = guarded[64 + offset : 64 + offset + size]
            ops.cpu_step(*arguments.values())
            assert (guarded[: 64 + offset] == 7).all()
            assert (guarded[64 + offset + size :] == 7).all()
