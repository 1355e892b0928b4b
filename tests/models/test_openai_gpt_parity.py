"""OpenAI GPT's forward against transformers, on both of its paths."""

import inspect
import random

import pytest
import torch
from openai_gpt_models import copy_of, make, random_ids

import gpt2rt
from gpt2rt import (
    OpenAIGPTDoubleHeadsModel,
    OpenAIGPTForSequenceClassification,
    OpenAIGPTLMHeadModel,
    OpenAIGPTModel,
    ops,
)
from gpt2rt.models.openai_gpt_blocks import OpenAIGPTBlock

TOLERANCE = {"rtol": 0.0, "atol": 2e-5}
KINDS = [OpenAIGPTModel, OpenAIGPTLMHeadModel, OpenAIGPTDoubleHeadsModel, OpenAIGPTForSequenceClassification]
EVERYTHING = {"output_attentions": True, "output_hidden_states": True}


def random_config(seed):
    """Sizes that are no multiples of anything, and every activation that transformers has here."""
    draw = random.Random(seed)
    n_head, head_dim = draw.choice([1, 2, 3, 5]), draw.choice([1, 5, 8, 12])
    return {
        "vocab_size": draw.randint(60, 190),
        "n_positions": draw.randint(16, 40),
        "n_embd": n_head * head_dim,
        "n_head": n_head,
        "n_layer": draw.randint(1, 3),
        "afn": ["gelu", "relu", "silu", "swish"][seed % 4],
        "layer_norm_epsilon": draw.choice([1e-5, 1e-3]),
        "tie_word_embeddings": draw.random() < 0.7,
        "pad_token_id": 0,
        "num_labels": draw.randint(1, 4),
        "summary_activation": draw.choice([None, "tanh"]),
        # narrow models vary more: smaller weights keep logits of the order of one
        "initializer_range": 0.2,
    }


@pytest.fixture
def pair(hf):
    """``pair(kind, **config)``: a model and transformers' copy."""

    def build(kind=OpenAIGPTLMHeadModel, **fields):
        model = make(kind, **fields)
        return model, copy_of(hf, model)

    return build


@pytest.fixture
def ids():
    return random_ids(2, 9)


def labels_for(kind, ids, num_labels):
    """Keywords that make ``kind`` compute every loss it has."""
    if kind is OpenAIGPTForSequenceClassification:
        labels = torch.tensor([0.3, -1.0]) if num_labels == 1 else torch.tensor([1, 0])
        return {"labels": labels[: ids.size(0)]}
    given = {} if kind is OpenAIGPTModel else {"labels": ids.masked_fill(ids % 5 == 0, -100)}
    if kind is OpenAIGPTDoubleHeadsModel:
        given |= {"mc_labels": torch.tensor([1, 0]), "mc_token_ids": torch.tensor([[3, 8, 0], [2, 2, 7]])}
    return given


def assert_same(ours, theirs, **tolerance):
    tolerance = tolerance or TOLERANCE
    assert list(ours.keys()) == list(theirs.keys())
    for name in theirs:
        torch.testing.assert_close(ours[name], theirs[name], **tolerance)


@pytest.mark.proves("O1", "O4")
@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("kind", KINDS)
def test_every_output_of_random_configs(pair, path, kind, seed):
    config = random_config(seed)
    ours, theirs = pair(kind, seed=seed, **config)
    choices = (2, 3, 9) if kind is OpenAIGPTDoubleHeadsModel else (2, 9)
    ids = random_ids(*choices, vocab_size=60)
    given = {**EVERYTHING, **labels_for(kind, ids, config["num_labels"])}
    got, want = ours(ids, **given), theirs(ids, **given)
    assert_same(got, want)
    assert len(got.hidden_states) == config["n_layer"] + 1
    # without attentions another kernel runs
    plain = ours(ids, **labels_for(kind, ids, config["num_labels"]))
    for name in plain:
        torch.testing.assert_close(plain[name], want[name], **TOLERANCE)
    as_tuple = ours(ids, return_dict=False, **given)
    assert isinstance(as_tuple, tuple)
    assert len(as_tuple) == len(want)
    for mine, other in zip(as_tuple, theirs(ids, return_dict=False, **given), strict=True):
        torch.testing.assert_close(mine, other, **TOLERANCE)


@pytest.mark.proves("O1")
@pytest.mark.parametrize("kind", KINDS)
def test_names_of_parameters_and_modules_are_those_of_transformers(pair, kind):
    ours, theirs = pair(kind)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert [name for name, _ in ours.named_parameters()] == [name for name, _ in theirs.named_parameters()]
    # transformers' blocks share one activation module
    names = [{name for name, _ in model.named_modules(remove_duplicate=False)} for model in (ours, theirs)]
    assert names[0] == names[1]


@pytest.mark.proves("O1")
def test_the_norms_stand_after_the_additions(path):
    model = make()
    block = model.transformer.h[0]
    assert isinstance(block, OpenAIGPTBlock)
    x = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(0))
    attended, _ = block.attn(x)
    n = torch.nn.functional.layer_norm(x + attended, (32,), block.ln_1.weight, block.ln_1.bias, 1e-5)
    want = torch.nn.functional.layer_norm(n + block.mlp(n), (32,), block.ln_2.weight, block.ln_2.bias, 1e-5)
    torch.testing.assert_close(block(x)[0], want, **TOLERANCE)
    # hooks see each module's own input and output, without what is added to it
    seen = {}
    for name in ("attn", "mlp", "ln_1"):
        module = block.get_submodule(name)
        module.register_forward_hook(lambda module, args, out, name=name: seen.update({name: (args[0], out)}))
    torch.testing.assert_close(block(x)[0], want, **TOLERANCE)
    torch.testing.assert_close(seen["attn"][1][0], attended, **TOLERANCE)
    torch.testing.assert_close(seen["ln_1"], (x + attended, n), **TOLERANCE)
    torch.testing.assert_close(seen["mlp"], (n, block.mlp(n)), **TOLERANCE)


@pytest.mark.proves("O4")
@pytest.mark.parametrize("kind", KINDS)
def test_arguments_stand_in_transformers_order(hf, kind):
    def positional(forward):
        parameters = inspect.signature(forward).parameters.values()
        return [p.name for p in parameters if p.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD]

    assert positional(kind.forward) == positional(getattr(hf.module, kind.__name__).forward)


@pytest.mark.proves("O4")
@pytest.mark.parametrize(
    "name", ["BaseModelOutput", "CausalLMOutput", "OpenAIGPTDoubleHeadsModelOutput", "SequenceClassifierOutput"]
)
def test_output_fields_are_transformers_and_a_cache_behind_them(hf, name):
    import dataclasses

    import transformers.modeling_outputs as shared
    import transformers.models.openai.modeling_openai as own

    theirs = getattr(shared, name, None) or getattr(own, name)
    ours = [field.name for field in dataclasses.fields(getattr(gpt2rt, name))]
    assert ours == [*(field.name for field in dataclasses.fields(theirs)), "past_key_values"]


@pytest.mark.parametrize("afn", ["gelu", "gelu_new", "gelu_python", "quick_gelu", "mish"])
def test_activations_that_transformers_does_not_take_here(hf, path, ids, afn):
    """Its documentation lists "gelu_new", which it refuses; "gelu" is that function, not the exact one."""
    ours = make(afn=afn)
    theirs = copy_of(hf, make(afn="gelu"))
    for block in theirs.transformer.h:
        block.mlp.act = hf.module.activations.ACT2FN["gelu_new" if afn == "gelu" else afn]
    torch.testing.assert_close(ours(ids).logits, theirs(ids).logits, **TOLERANCE)


@pytest.mark.proves("O4")
def test_types_positions_and_embeddings(pair, path, ids):
    ours, theirs = pair()
    types = torch.zeros_like(ids)
    types[:, 4:] = 3
    given = {"token_type_ids": types, "position_ids": torch.arange(20, 29).unsqueeze(0)}
    want = theirs(ids, **given)
    assert_same(ours(ids, **given), want)
    assert_same(ours(inputs_embeds=ours.transformer.tokens_embed(ids), **given), want)
    by_row = torch.stack([torch.arange(9), torch.arange(30, 39)])
    assert_same(ours(ids, position_ids=by_row), theirs(ids, position_ids=by_row))
    # position ids that start again are no packed sequences here, unlike in GPT-2
    again = torch.tensor([[0, 1, 2, 3, 0, 1, 0, 1, 2]])
    assert_same(ours(ids, position_ids=again), theirs(ids, position_ids=again))
    # type 0 is token 0 and adds its embedding
    embeds = ours.transformer.tokens_embed(ids) + ours.transformer.tokens_embed.weight[0]
    zeros = torch.zeros_like(ids)
    torch.testing.assert_close(ours(ids, token_type_ids=zeros).logits, ours(inputs_embeds=embeds).logits, **TOLERANCE)


@pytest.mark.proves("D8")
@pytest.mark.parametrize("leading", [(), (1,), (3, 2), (2, 1, 2)])
def test_leading_dimensions(path, leading):
    """Embeddings of 4 dimensions and masks of 3 stop transformers with an error."""
    model = make()
    ids = random_ids(*leading, 7)
    mask = torch.ones_like(ids)
    mask[..., 5:] = 0
    flat = model(ids.view(-1, 7), attention_mask=mask.view(-1, 7)).logits.view(*leading, 7, 100)
    got = model(ids, attention_mask=mask, position_ids=torch.arange(7).expand_as(ids))
    torch.testing.assert_close(got.logits, flat, **TOLERANCE)
    got = model(inputs_embeds=model.transformer.tokens_embed(ids), attention_mask=mask, labels=ids)
    torch.testing.assert_close(got.logits, flat, **TOLERANCE)
    assert got.loss.dim() == 0


@pytest.mark.proves("O4")
@pytest.mark.parametrize(
    "keep",
    [
        1,
        4,
        50,
        torch.tensor([0, 5, 2]),
        torch.tensor([-1, 3]),
        torch.tensor([[1, 8], [0, 0]]),
        torch.tensor([[True] * 3 + [False] * 6, [False] * 8 + [True]]),
    ],
    ids=["last", "last_4", "more_than_there_are", "1d", "1d_negative", "2d", "2d_bool"],
)
def test_logits_to_keep(pair, path, ids, keep):
    ours, theirs = pair()
    assert_same(ours(ids, logits_to_keep=keep), theirs(ids, logits_to_keep=keep))


@pytest.mark.proves("O4")
@pytest.mark.parametrize("num_items", [None, 5, torch.tensor(7)], ids=["mean", "int", "tensor"])
def test_language_model_losses(pair, path, ids, num_items):
    ours, theirs = pair()
    labels = ids.clone()
    labels[0, 3:6] = -100
    kwargs = {} if num_items is None else {"num_items_in_batch": num_items}
    assert_same(ours(ids, labels=labels, **kwargs), theirs(ids, labels=labels, **kwargs))
    shifted = torch.roll(labels, 2, dims=1)
    want = theirs(ids, labels=labels, shift_labels=shifted, **kwargs)
    assert_same(ours(ids, labels=labels, shift_labels=shifted, **kwargs), want)
    assert_same(ours(ids, shift_labels=shifted, **kwargs), want)


@pytest.mark.proves("O4")
def test_selected_hidden_states_and_config_defaults(path, ids):
    model = make()
    every = model(ids, output_hidden_states=True).hidden_states
    assert len(every) == 3
    torch.testing.assert_close(model.lm_head(every[-1]), model(ids).logits, **TOLERANCE)
    picked = model(ids, output_hidden_states=[0, -1]).hidden_states
    assert picked[1] is None
    torch.testing.assert_close(picked[0], every[0], **TOLERANCE)
    torch.testing.assert_close(picked[2], every[2], **TOLERANCE)
    quiet = make(return_dict=False, output_attentions=True, output_hidden_states=True)
    logits, states, attentions = quiet(ids)
    assert (len(states), len(attentions)) == (3, 2)
    torch.testing.assert_close(quiet(ids, return_dict=True).logits, logits, **TOLERANCE)


@pytest.mark.proves("D7")
@pytest.mark.parametrize("kind", KINDS)
def test_unknown_arguments_raise(kind):
    with pytest.raises(TypeError, match=r"no argument 'attention_maks'. Did you mean 'attention_mask'\?"):
        make(kind)(random_ids(1, 4), attention_maks=None)


@pytest.mark.proves("D7")
def test_a_head_mask_acts(path, ids):
    """One head switched off is the model whose output projection does not read it."""
    model = make()
    mask = torch.ones(2, 4)
    mask[1, 2] = 0.0
    got = model(ids, head_mask=mask)
    cut = make()
    with torch.no_grad():
        cut.transformer.h[1].attn.c_proj.weight[16:24] = 0.0
    torch.testing.assert_close(got.logits, cut(ids).logits, **TOLERANCE)
    assert not torch.allclose(got.logits, model(ids).logits)
    assert model(ids, head_mask=mask, output_attentions=True).attentions[1][:, 2].count_nonzero() == 0


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision(hf, path, kind, dtype):
    """Against transformers in float32 with the same rounded weights: 16-bit rounding is all that may differ."""
    ours = make(kind, num_labels=3, pad_token_id=0, initializer_range=0.1).to(dtype)
    theirs = copy_of(hf, ours).float()
    ids = random_ids(*((2, 3, 9) if kind is OpenAIGPTDoubleHeadsModel else (2, 9)))
    mask = torch.ones_like(ids)
    if kind is not OpenAIGPTDoubleHeadsModel:
        mask[0, :3] = 0
    given = {**EVERYTHING, **labels_for(kind, ids, 3)}
    given |= {} if kind is OpenAIGPTDoubleHeadsModel else {"attention_mask": mask}
    got, want = ours(ids, **given), theirs(ids, **given)
    for name in want:
        values, expected = got[name], want[name]
        if name.endswith("loss"):
            assert values.dtype == torch.float32
        else:
            values, expected = (
                torch.cat([x.flatten() for x in y]) if isinstance(y, tuple) else y for y in (values, expected)
            )
            assert values.dtype == dtype
        # hidden states are normalised, of order one, and rounded once per block
        atol = 5e-2 if name in ("hidden_states", "last_hidden_state") and dtype is torch.bfloat16 else 2e-2
        torch.testing.assert_close(values.float(), expected.float(), rtol=0.0, atol=atol)


# ---- gradients and training ------------------------------------------------------------------------------------------


def gradients(model, ids, **given):
    model.zero_grad()
    output = model(ids, **given)
    # the bare model has no loss of its own
    sum(output[name] for name in ("loss", "mc_loss") if name in output).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.proves("O4")
@pytest.mark.parametrize(
    ("kind", "case"),
    [
        (kind, case)
        for kind in KINDS[1:]
        for case in ("plain", "padded", "attentions", "train")
        # transformers has no mask for choices to compare with
        if (kind, case) != (OpenAIGPTDoubleHeadsModel, "padded")
    ],
)
def test_the_gradient_of_every_parameter(hf, kind, case):
    config = dict.fromkeys(("attn_pdrop", "resid_pdrop", "embd_pdrop", "summary_first_dropout"), 0.0)
    ours = make(kind, pad_token_id=0, num_labels=3, initializer_range=0.1, **config)
    theirs = copy_of(hf, ours)
    ids = random_ids(*((2, 3, 9) if kind is OpenAIGPTDoubleHeadsModel else (2, 9)))
    given = labels_for(kind, ids, 3)
    if case == "padded":
        given["attention_mask"] = torch.ones_like(ids)
        given["attention_mask"][0, :3] = 0
    if case == "attentions":
        given["output_attentions"] = True
    if case == "train":
        ours.train()
        theirs.train()
    want, got = gradients(theirs, ids, **given), gradients(ours, ids, **given)
    assert got.keys() == want.keys()
    for name, gradient in want.items():
        # one number added to the scores of all choices changes nothing
        assert gradient.count_nonzero() > 0 or name == "multiple_choice_head.summary.bias"
        torch.testing.assert_close(got[name], gradient, rtol=1e-4, atol=5e-6)


def test_dropout_acts_in_training_only(ids):
    model = make()
    with torch.no_grad():
        still = model(ids).logits
        model.train()
        torch.manual_seed(0)
        first, second = model(ids).logits, model(ids).logits
        assert not torch.equal(first, second)
        torch.manual_seed(0)
        assert torch.equal(model(ids).logits, first)
        assert torch.equal(model.eval()(ids).logits, still)


def test_gradient_checkpointing_changes_nothing_but_memory(ids):
    model = make(attn_pdrop=0.0, resid_pdrop=0.0, embd_pdrop=0.0).train()
    want = gradients(model, ids, labels=ids)
    assert not model.is_gradient_checkpointing
    model.gradient_checkpointing_enable()
    assert model.is_gradient_checkpointing
    runs = []
    model.transformer.h[0].attn.register_forward_hook(lambda *_: runs.append(1))
    got = gradients(model, ids, labels=ids)
    assert len(runs) == 2
    for name, gradient in want.items():
        torch.testing.assert_close(got[name], gradient, rtol=1e-5, atol=1e-7)
    with pytest.warns(UserWarning, match="use_cache=True has no effect"):
        assert model(ids, use_cache=True).past_key_values is None
    past = model.eval()(ids, use_cache=True).past_key_values
    with pytest.raises(ValueError, match="gradient checkpointing"):
        model.train()(ids, past_key_values=past)
    model.gradient_checkpointing_disable()
    assert not model.is_gradient_checkpointing


def test_fresh_weights_follow_the_config():
    torch.manual_seed(0)
    config = gpt2rt.OpenAIGPTConfig(vocab_size=100, n_positions=64, n_embd=64, n_layer=2, n_head=4)
    for kind in KINDS:
        model = kind(config)
        for name, parameter in model.named_parameters():
            if ".ln_" in name:
                assert (parameter == float(name.endswith("weight"))).all()
            elif parameter.dim() == 1:
                assert parameter.count_nonzero() == 0
            elif parameter.numel() > 1000:
                # unlike in GPT-2, the projections before the additions are no smaller than the others
                assert 0.018 < parameter.std() < 0.022, name


@pytest.mark.parametrize("tied", [True, False])
def test_resizing_and_tying(tied):
    model = make(tie_word_embeddings=tied)
    assert (model.lm_head.weight is model.transformer.tokens_embed.weight) == tied
    old = model.transformer.tokens_embed.weight.detach().clone()
    model.resize_token_embeddings(103)
    assert model.get_input_embeddings() is model.transformer.tokens_embed
    assert torch.equal(model.transformer.tokens_embed.weight[:100], old)
    assert model(torch.tensor([[102, 1]])).logits.shape == (1, 2, 103)
    assert model.config.vocab_size == 103
    assert (model.lm_head.weight is model.transformer.tokens_embed.weight) == tied
    assert model.generate(torch.tensor([[102, 1]]), max_new_tokens=2).shape == (1, 4)
    assert model.half().dtype == torch.float16
    assert model.to(torch.float64)(torch.tensor([[102, 1]])).logits.dtype == torch.float64


# ---- choices over one stem -------------------------------------------------------------------------------------------


@pytest.mark.skipif(not ops.extension_status().loaded, reason="the C++ extension is not built")
@pytest.mark.parametrize("pad", ["none", "right"])
def test_choices_that_begin_alike_compute_their_stem_once(hf, pad):
    """Blocks of 16 tokens are shared between neighbours; no number depends on it."""
    model = make(OpenAIGPTDoubleHeadsModel)
    ids = random_ids(2, 3, 48)
    ids[:, :, :36] = ids[:, :1, :36]
    mask = torch.ones_like(ids)
    if pad == "right":
        mask[0, 1, 40:] = 0
    given = {"attention_mask": mask} if pad == "right" else {}
    with torch.no_grad():
        base = model.transformer(ids, **given)
        assert base.shared_rows.rows.size(0) == 2 * (48 + 2 * 16)
        got = model(ids, use_cache=True, labels=ids, mc_labels=torch.tensor([2, 0]), **given)
        rows = [[model(ids[i : i + 1, j], attention_mask=mask[i : i + 1, j]) for j in range(3)] for i in range(2)]
    for i in range(2):
        for j in range(3):
            real = mask[i, j].bool()
            torch.testing.assert_close(got.logits[i, j][real], rows[i][j].logits[0][real], **TOLERANCE)
    if pad == "none":
        want = copy_of(hf, model)(ids, labels=ids, mc_labels=torch.tensor([2, 0]))
        for name in want:
            torch.testing.assert_close(got[name], want[name], **TOLERANCE)
        more = random_ids(2, 3, 4, seed=5)
        with torch.no_grad():
            tail = model(more, past_key_values=got.past_key_values).logits
            full = model(torch.cat([ids, more], dim=-1)).logits[..., 48:, :]
        torch.testing.assert_close(tail, full, **TOLERANCE)


@pytest.mark.parametrize("masked", [False, True])
def test_forward_is_one_graph_for_the_compiler(ids, masked):
    model = make()
    mask = None
    if masked:
        mask = torch.ones_like(ids)
        mask[0, :3] = 0
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(
            compiled(ids, attention_mask=mask).logits, model(ids, attention_mask=mask).logits, **TOLERANCE
        )
