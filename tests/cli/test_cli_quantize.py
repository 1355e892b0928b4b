"""``gpt2rt quantize`` writes a checkpoint in 8 or 4 bits, and says what that costs."""

import json
import re

import pytest
import torch

from gpt2rt import AutoTokenizer, GPT2ForSequenceClassification, GPT2LMHeadModel, QuantizationConfig, quantize_model
from gpt2rt.cli.quantize import measure_cost

TEXT = "the rain in the inner town, " * 8


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return path


@pytest.mark.parametrize(
    ("options", "config"),
    [
        ((), QuantizationConfig("int4")),
        (("--scheme", "int8", "--activations", "float32"), QuantizationConfig("int8", activations="float32")),
        (
            ("--group-size", 32, "--asymmetric", "--embeddings", "int4", "--skip", "h.1", "--skip", "c_attn"),
            QuantizationConfig("int4", 32, symmetric=False, embeddings="int4", skip_modules=("h.1", "c_attn")),
        ),
    ],
)
def test_the_model_that_is_written(run, checkpoint, tmp_path, text, options, config):
    code, out, err = run("quantize", checkpoint, tmp_path / "out", "--eval", text, "--json", *options)
    assert (code, err) == (0, "")
    result = json.loads(out)
    floats = GPT2LMHeadModel.from_pretrained(checkpoint)
    expected = quantize_model(GPT2LMHeadModel.from_pretrained(checkpoint), config, progress=False)
    written = GPT2LMHeadModel.from_pretrained(tmp_path / "out")
    for name, tensor in expected.state_dict().items():
        assert torch.equal(written.state_dict()[name], tensor), name
    assert written.config.quantization_config == config
    assert result["quantization_config"] == config.to_dict()
    assert result["bytes_before"] == floats.get_memory_footprint()
    assert result["bytes_after"] == expected.get_memory_footprint() < result["bytes_before"]
    assert result["bytes_on_disk"] == (tmp_path / "out" / "model.safetensors").stat().st_size
    # the tokenizer comes along
    tokenizers = [AutoTokenizer.from_pretrained(folder) for folder in (checkpoint, tmp_path / "out")]
    ids = tokenizers[0].encode(TEXT)
    assert tokenizers[1].encode(TEXT) == ids
    cost = result["cost"]
    assert cost["num_tokens"] == len(ids)
    assert cost["perplexity_before"] == floats.score([ids]).perplexity
    assert cost["perplexity_after"] == expected.score([ids]).perplexity
    with torch.no_grad():
        windows = torch.tensor(ids[: len(ids) // 64 * 64]).view(-1, 64)
        first, second = (model(windows).logits for model in (floats, expected))
    assert cost["logit_error"] == pytest.approx((first - second).abs().max().item(), rel=1e-4)
    divergence = torch.nn.functional.kl_div(
        second.log_softmax(-1), first.log_softmax(-1), reduction="none", log_target=True
    )
    assert cost["divergence"] == pytest.approx(divergence.sum(-1).mean().item(), rel=1e-3)
    assert cost["top1"] == pytest.approx((first.argmax(-1) == second.argmax(-1)).float().mean().item(), abs=1e-6)


def test_what_it_prints(run, checkpoint, tmp_path, text):
    code, out, err = run("quantize", checkpoint, tmp_path / "out", "--eval", text, "--eval-tokens", 100)
    assert (code, err) == (0, "")
    size, perplexity, logits, wrote = out.splitlines()
    assert size.startswith(f"{checkpoint}: 0.29 MB (float32) -> ")
    assert "(int4, groups of 64, embeddings int8, rtn), quantised in " in size
    assert re.fullmatch(r"perplexity: [\d.]+ -> [\d.]+ \([+-][\d.]+ %\), 100 tokens", perplexity)
    assert re.fullmatch(
        r"logits: largest error [\d.]+, mean KL divergence [\d.]+ nats, same likeliest token [\d.]+ %", logits
    )
    assert wrote == f"wrote {tmp_path / 'out'}: {_megabytes(tmp_path / 'out')} MB, gpt2rt layout"


def _megabytes(folder):
    return f"{(folder / 'model.safetensors').stat().st_size / 1e6:.2f}"


def test_with_a_calibration_text(run, checkpoint, tmp_path, text):
    options = ("--method", "gptq", "--calibration", text, "--calibration-tokens", 128)
    code, out, err = run("quantize", checkpoint, tmp_path / "out", *options)
    assert (code, err) == (0, "")
    assert out.splitlines()[1] == "its cost was not measured; pass --eval FILE"
    written = GPT2LMHeadModel.from_pretrained(tmp_path / "out")
    assert written.config.quantization_config.method == "gptq"
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    expected = quantize_model(
        GPT2LMHeadModel.from_pretrained(checkpoint),
        QuantizationConfig("int4", method="gptq"),
        calibration=[TEXT],
        tokenizer=tokenizer,
        max_calibration_tokens=128,
        progress=False,
    )
    rounded = quantize_model(GPT2LMHeadModel.from_pretrained(checkpoint), "int4", progress=False)
    codes = [m.transformer.h[1].mlp.c_proj.quantized.codes for m in (written, expected, rounded)]
    assert torch.equal(codes[0], codes[1])
    assert not torch.equal(codes[0], codes[2])


def test_the_layout_of_bitsandbytes(run, checkpoint, tmp_path):
    options = ("--scheme", "nf4", "--double-quant", "--format", "bitsandbytes")
    code, out, _ = run("quantize", checkpoint, tmp_path / "out", *options)
    assert code == 0
    assert "(nf4, groups of 64, 8-bit scales, embeddings none, rtn)" in out
    fields = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert fields["quant_method"] == "bitsandbytes"
    assert (fields["bnb_4bit_quant_type"], fields["bnb_4bit_use_double_quant"]) == ("nf4", True)
    written = GPT2LMHeadModel.from_pretrained(tmp_path / "out")
    config = QuantizationConfig("nf4", double_quant=True, embeddings="none")
    expected = quantize_model(GPT2LMHeadModel.from_pretrained(checkpoint), config, progress=False)
    layers = [model.transformer.h[0].mlp.c_fc.quantized for model in (written, expected)]
    assert torch.equal(layers[0].codes, layers[1].codes)
    torch.testing.assert_close(layers[0].scales, layers[1].scales, rtol=0.02, atol=0)


def test_embedded_models_are_measured_on_text_they_have_not_seen(run, tmp_path):
    options = ("--scheme", "int8", "--embeddings", "none", "--eval-tokens", 64, "--json")
    code, out, _ = run("quantize", "gpt2rt/tiny-gpt1", tmp_path / "out", *options)
    assert code == 0
    cost = json.loads(out)["cost"]
    assert cost["num_tokens"] == 64
    assert 0 < cost["divergence"] < 0.01


def test_other_heads_keep_theirs(run, checkpoint, tmp_path, text, one_sentence):
    config = GPT2LMHeadModel.from_pretrained(checkpoint).config
    config.num_labels = 3
    GPT2ForSequenceClassification(config).save_pretrained(tmp_path / "classifier")
    code, _, err = run("quantize", tmp_path / "classifier", tmp_path / "out")
    assert code == 0
    # there is none beside it
    assert err.startswith("gpt2rt: warning: no tokenizer is copied: ")
    written = GPT2ForSequenceClassification.from_pretrained(tmp_path / "out")
    assert written.quantization_scheme == "int4"
    assert written.score.weight.shape == (3, 48)
    AutoTokenizer.from_pretrained(checkpoint).save_pretrained(tmp_path / "classifier")
    code, _, err = run("quantize", tmp_path / "classifier", tmp_path / "other", "--eval", text)
    assert code == 2
    assert "perplexity, which a GPT2ForSequenceClassification does not give" in one_sentence(err)


def test_folders_that_hold_something(run, checkpoint, tmp_path, one_sentence):
    (tmp_path / "out").mkdir()
    kept = tmp_path / "out" / "notes.txt"
    kept.write_text("mine")
    code, out, err = run("quantize", checkpoint, tmp_path / "out")
    assert (code, out) == (2, "")
    assert f"{tmp_path / 'out'} holds files already; pass --overwrite" in one_sentence(err)
    assert list((tmp_path / "out").iterdir()) == [kept]
    assert run("quantize", checkpoint, tmp_path / "out", "--overwrite")[0] == 0
    assert run("quantize", checkpoint, tmp_path / "out", "--scheme", "int8", "--overwrite")[0] == 0
    assert GPT2LMHeadModel.from_pretrained(tmp_path / "out").quantization_scheme == "int8"
    assert kept.read_text() == "mine"
    code, _, err = run("quantize", kept, tmp_path / "new")
    assert code == 1
    code, _, err = run("quantize", checkpoint, kept)
    assert code == 2
    assert "notes.txt is a file; name a folder" in one_sentence(err)
    code, _, err = run("quantize", checkpoint, checkpoint, "--overwrite")
    assert code == 2
    assert "SRC and DST are the same folder" in one_sentence(err)


def test_a_quantised_checkpoint_is_not_quantised_again(run, checkpoint, tmp_path, one_sentence):
    assert run("quantize", checkpoint, tmp_path / "once")[0] == 0
    code, _, err = run("quantize", tmp_path / "once", tmp_path / "twice", "--scheme", "int8")
    assert code == 1
    assert "quantised already; load its float checkpoint" in one_sentence(err)
    assert not (tmp_path / "twice").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--scheme", "int3"), "--scheme must be one of int8, int4, nf4, fp4, got 'int3'"),
        (("--method", "awq"), "--method must be one of rtn, gptq"),
        (("--format", "gguf"), "--format must be one of gpt2rt, bitsandbytes"),
        (("--method", "gptq"), "--method gptq needs --calibration FILE"),
        (("--calibration", "nothing.txt"), "--calibration goes with --method gptq"),
        (("--method", "gptq", "--calibration", "nothing.txt"), "--calibration nothing.txt is no file"),
        (("--eval", "nothing.txt"), "--eval nothing.txt is no file"),
        (("--eval-tokens", 1), "--eval-tokens must be at least 2, got 1"),
        (("--format", "bitsandbytes"), "bitsandbytes has no int4 in groups"),
        (("--format", "bitsandbytes", "--scheme", "nf4", "--embeddings", "int8"), "keeps embeddings as they are"),
        (("--group-size", 48), r"group_size = 48, but for int4 it must be one of \(32, 64, 128\)"),
        (("--scheme", "nf4", "--asymmetric"), "only int4 has zero points"),
        (("--scheme", "nf4", "--method", "gptq", "--calibration", __file__), "nf4 has only 'rtn'"),
        (("--embeddings", "int3"), "embeddings = 'int3', but it must be one of none, float16"),
        (("--dtype", "int8"), "--dtype must be one of float32"),
    ],
)
def test_what_goes_wrong(run, one_sentence, checkpoint, tmp_path, arguments, message):
    code, out, err = run("quantize", checkpoint, tmp_path / "out", *arguments)
    assert (code, out) == (2, "")
    assert re.search(message, one_sentence(err))
    assert not (tmp_path / "out").exists()


def test_texts_that_are_none(run, one_sentence, checkpoint, tmp_path):
    for data, message in (
        (b"", "is empty"),
        (b"\xff", "is not UTF-8 text"),
        (b"a", "has 1 tokens; it needs at least 2"),
    ):
        (tmp_path / "text").write_bytes(data)
        code, _, err = run("quantize", checkpoint, tmp_path / "out", "--eval", tmp_path / "text")
        assert code in (1, 2)
        assert message in one_sentence(err)
        assert not (tmp_path / "out").exists()


def test_the_same_model_costs_nothing(checkpoint):
    model = GPT2LMHeadModel.from_pretrained(checkpoint)
    cost = measure_cost(model, model, list(range(100)))
    assert (cost.logit_error, cost.divergence, cost.top1) == (0.0, 0.0, 1.0)
    assert cost.perplexity_before == cost.perplexity_after
