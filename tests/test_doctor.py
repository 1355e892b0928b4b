"""``gpt2rt doctor``: it says yes to what is right and no to what is not."""

import json
import shutil

import pytest
import torch

from gpt2rt import (
    GPT2Config,
    GPT2LMHeadModel,
    GPT2Tokenizer,
    OpenAIGPTConfig,
    OpenAIGPTLMHeadModel,
    OpenAIGPTTokenizer,
    doctor,
)
from gpt2rt.tokenizers.bytelevel import byte_to_char


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Models this small only lose time with more threads, most of all on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A random model with a tokenizer of bytes, laid out and recorded like an embedded one."""
    folder = tmp_path_factory.mktemp("assets") / "tiny-gpt2"
    vocab = {char: byte for byte, char in byte_to_char().items()} | {"<|endoftext|>": 256}
    GPT2Tokenizer(vocab, [], eos_token="<|endoftext|>", model_max_length=64).save_pretrained(folder)
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=257, n_positions=64, n_embd=48, n_layer=2, n_head=3, initializer_range=0.3)
    GPT2LMHeadModel(config).save_pretrained(folder)
    assert doctor.record(folder) == folder / "doctor.json"
    return folder


@pytest.fixture
def embedded(checkpoint, tmp_path, monkeypatch):
    """The checkpoint in the place of the embedded model; a copy that a test may damage."""
    root = tmp_path / "assets"
    shutil.copytree(checkpoint, root / "tiny-gpt2")
    monkeypatch.setattr("gpt2rt.checkpoint.resolve.embedded_folder", lambda: root)
    return root / "tiny-gpt2"


def statuses(report):
    return {check.name: check.status for check in report.checks}


def test_a_good_install_is_called_good(embedded, hf):
    report = doctor.check_install()
    assert report.ok
    assert report.summary.startswith("install is good")
    assert set(statuses(report).values()) == {"ok"}
    assert {"tokenizer", "cpu: logits", "cpu: greedy tokens", "cpu: batch", "eager: logits"} <= statuses(report).keys()


def test_record_holds_what_transformers_says(embedded, hf):
    record = json.loads((embedded / "doctor.json").read_text())
    assert record["recorded_with"]["transformers"] == hf.module.__version__
    theirs = hf.module.GPT2LMHeadModel.from_pretrained(embedded, dtype=torch.float32)
    for case in record["cases"]:
        ids = torch.tensor([case["input_ids"]])
        logits = theirs(ids).logits[0, -1]
        torch.testing.assert_close(logits[case["logit_ids"]], torch.tensor(case["logits"]), rtol=1e-5, atol=1e-4)
        generated = theirs.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=len(case["tokens"]), eos_token_id=None
        )
        assert generated[0, ids.size(1) :].tolist() == case["tokens"]


@pytest.mark.parametrize(
    ("damage", "wrong"),
    [
        (lambda case: case["logits"].__setitem__(3, case["logits"][3] + 0.1), {"cpu: logits", "eager: logits"}),
        (lambda case: case["tokens"].__setitem__(2, 5), {"cpu: greedy tokens", "eager: greedy tokens"}),
        (lambda case: case.update(prompt="another text"), {"tokenizer"}),
    ],
    ids=["logits", "tokens", "tokenizer"],
)
def test_differences_are_found(embedded, damage, wrong):
    path = embedded / "doctor.json"
    record = json.loads(path.read_text())
    damage(record["cases"][1])
    path.write_text(json.dumps(record))
    report = doctor.check_install()
    assert not report.ok
    assert {name for name, status in statuses(report).items() if status == "mismatch"} == wrong
    assert all(name in report.summary for name in wrong)


def test_other_weights_are_found(embedded, checkpoint):
    model = GPT2LMHeadModel.from_pretrained(checkpoint)
    with torch.no_grad():
        model.transformer.h[0].mlp.c_fc.weight[0, 0] += 1e-4
    model.save_pretrained(embedded)
    assert statuses(doctor.check_install())["embedded weights"] == "mismatch"


def test_missing_model_and_record(embedded):
    (embedded / "doctor.json").unlink()
    with pytest.raises(OSError, match=r"doctor\.json"):
        doctor.check_install()
    (embedded / "config.json").unlink()
    with pytest.raises(OSError, match="embedded model gpt2rt/tiny-gpt2 is missing"):
        doctor.check_install()


def test_compare_agrees_with_transformers(checkpoint):
    report = doctor.compare(str(checkpoint))
    assert report.ok, report
    names = statuses(report)
    assert names.pop("speed") == "note"
    assert names.keys() == {
        "tokenizer: encode",
        "tokenizer: decode",
        "hidden states: embedding",
        "hidden states: block 1",
        "hidden states: block 2 + final norm",
        "logits: forward",
        "logits: generate (cpu)",
        "argmax",
        "greedy tokens",
    }
    assert set(names.values()) == {"ok"}


@pytest.mark.proves("O1", "T11")
def test_compare_runs_openai_gpt(test_data, tmp_path):
    """Model and tokenizer classes follow the files."""
    tokenizer = OpenAIGPTTokenizer.from_pretrained(test_data / "openai-gpt")
    tokenizer.save_pretrained(tmp_path)
    torch.manual_seed(0)
    config = OpenAIGPTConfig(n_positions=64, n_embd=32, n_layer=2, n_head=4, initializer_range=0.3)
    OpenAIGPTLMHeadModel(config).save_pretrained(tmp_path)
    report = doctor.compare(str(tmp_path))
    assert report.ok, report
    names = statuses(report)
    assert {"tokenizer: encode", "hidden states: block 2", "logits: generate (cpu)", "greedy tokens"} <= names.keys()


def test_compare_finds_a_wrong_layer(checkpoint, monkeypatch):
    from gpt2rt.models import gpt2_blocks

    forward = gpt2_blocks.GPT2MLP.forward
    monkeypatch.setattr(gpt2_blocks.GPT2MLP, "forward", lambda self, *inputs: forward(self, *inputs) * 1.01)
    report = doctor.compare(str(checkpoint))
    assert not report.ok
    wrong = {name for name, status in statuses(report).items() if status == "mismatch"}
    assert {"hidden states: block 1", "logits: forward"} <= wrong
    # the graph does not go through the module, and the embedding comes before it
    assert not wrong & {"hidden states: embedding", "logits: generate (cpu)"}


def test_compare_finds_another_tokenizer(checkpoint, monkeypatch):
    encode = GPT2Tokenizer.encode
    monkeypatch.setattr(GPT2Tokenizer, "encode", lambda self, text: encode(self, text.replace("é", "e")))
    report = doctor.compare(str(checkpoint))
    assert statuses(report)["tokenizer: encode"] == "mismatch"
    assert "Grüße" in next(check.detail for check in report.checks if check.name == "tokenizer: encode")


def test_compare_without_tokenizer(checkpoint, tmp_path):
    for name in ("config.json", "model.safetensors"):
        shutil.copy(checkpoint / name, tmp_path)
    report = doctor.compare(str(tmp_path))
    assert report.ok
    assert statuses(report)["tokenizer"] == "note"


def test_the_embedded_model_is_good():
    report = doctor.check_install()
    assert report.ok, report
