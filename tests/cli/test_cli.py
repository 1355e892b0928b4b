"""The command line: what it prints, where, and how it exits."""

import json
import os
import pathlib
import re
import signal
import subprocess
import sys

import pytest
import torch

from gpt2rt import (
    AutoTokenizer,
    GPT2LMHeadModel,
    GPT2Tokenizer,
    OpenAIGPTConfig,
    OpenAIGPTLMHeadModel,
    OpenAIGPTTokenizer,
)
from gpt2rt.cli import generate
from gpt2rt.ops import CPU_ISAS

# ---- generate ------------------------------------------------------------------------------------------------------


def test_text_is_prompt_and_continuation(run, checkpoint):
    code, out, err = run("generate", "ROMEO:", "--model", checkpoint, "--greedy", "-n", 12)
    assert code == 0
    assert err == ""
    tokenizer, model = GPT2Tokenizer.from_pretrained(checkpoint), GPT2LMHeadModel.from_pretrained(checkpoint)
    ids = model.generate(**tokenizer("ROMEO:", return_tensors="pt"), max_new_tokens=12)
    assert out == tokenizer.decode(ids[0], skip_special_tokens=True) + "\n"


def test_seed_repeats_the_text(run, checkpoint):
    texts = [run("generate", "ab", "-m", checkpoint, "-n", 20, "--seed", seed)[1] for seed in (7, 7, 8)]
    assert texts[0] == texts[1] != texts[2]
    # a zero temperature is --greedy
    cold = run("generate", "ab", "-m", checkpoint, "-n", 20, "--temperature", 0)[1]
    assert cold == run("generate", "ab", "-m", checkpoint, "-n", 20, "--greedy")[1]


def test_json_and_stats(run, checkpoint):
    arguments = ("generate", "ab", "-m", checkpoint, "-n", 9, "--seed", 3, "--threads", 1)
    code, out, err = run(*arguments, "--json", "--stats")
    assert code == 0
    result = json.loads(out)
    assert {key: result[key] for key in ("model", "prompt", "prompt_tokens", "seed", "finish_reason", "device")} == {
        "model": checkpoint,
        "prompt": "ab",
        "prompt_tokens": 2,
        "seed": 3,
        "finish_reason": "length",
        "device": "cpu",
    }
    assert result["new_tokens"] == 9
    assert result["executor"] == "cpu"
    assert result["isa"] in CPU_ISAS
    assert result["ttft_ms"] > 0
    assert result["tokens_per_s"] > 0
    assert run(*arguments)[1] == f"ab{result['text']}\n"
    pattern = (
        r"2 \+ 9 tokens \(length\) · load .* s · TTFT .* ms · .* tokens/s · executor cpu \(.*, 1 threads, float32\) "
    )
    assert re.fullmatch(pattern + r"· seed 3\n", err)


def test_one_token_has_no_rate(run, checkpoint):
    result = json.loads(run("generate", "ab", "-m", checkpoint, "-n", 1, "--json")[1])
    assert result["tokens_per_s"] is None
    assert isinstance(result["seed"], int)


def test_executor_and_dtype_can_be_chosen(run, checkpoint):
    arguments = ("generate", "ab", "-m", checkpoint, "-n", 4, "--greedy", "--json")
    result = json.loads(run(*arguments, "--executor", "eager", "--dtype", "bfloat16")[1])
    assert (result["executor"], result["dtype"], result["seed"]) == ("eager", "bfloat16", None)


def test_stop_text_is_not_shown(run, checkpoint):
    arguments = ("generate", "ab", "-m", checkpoint, "-n", 30, "--greedy", "--json")
    text = json.loads(run(*arguments)[1])["text"]
    stop = next(text[i : i + 2] for i in range(3, len(text)) if text[i : i + 2].isascii())
    result = json.loads(run(*arguments, "--stop", stop, "--stop", "never there")[1])
    assert result["text"] == text[: text.index(stop)]
    assert result["finish_reason"] == "stop"
    assert result["new_tokens"] < 30


def test_pieces_are_flushed_as_they_come(checkpoint, run, monkeypatch):
    written = []
    monkeypatch.setattr(generate, "_write", written.append)
    run("generate", "ab", "-m", checkpoint, "-n", 30, "--greedy")
    assert written[0] == "ab"
    assert written[-1] == "\n"
    assert len(written) > 10


def test_prompt_from_stdin(run, checkpoint, monkeypatch, tmp_path, one_sentence):
    def stdin(data):
        (tmp_path / "in").write_bytes(data)
        monkeypatch.setattr(sys, "stdin", (tmp_path / "in").open(encoding="utf-8"))

    stdin("zwei Zeilen\nGrüße".encode())
    code, out, _ = run("generate", "-", "-m", checkpoint, "-n", 2, "--greedy")
    assert code == 0
    assert out.startswith("zwei Zeilen\nGrüße")
    stdin(b"a\xff")
    code, out, err = run("generate", "-", "-m", checkpoint)
    assert (code, out) == (2, "")
    assert "stdin is not UTF-8 text (byte 1 of 2)" in one_sentence(err)
    stdin(b"")
    assert run("generate", "-", "-m", checkpoint)[0] == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "Missing command"),
        (("frobnicate",), "No such command 'frobnicate'"),
        (("--frob",), "No such option: --frob"),
        (("generate",), "prompt"),
        (("generate", "x", "--frob"), "No such option: --frob.*see gpt2rt generate --help"),
        (("generate", "x", "y"), "unexpected extra argument"),
        (("generate", ""), "the prompt is empty"),
        (("generate", "x", "--top-k", "many"), "--top-k"),
        (("generate", "x", "--top-k", "-1"), "top_k must be an integer from 0"),
        (("generate", "x", "--top-p", "1.5"), "top_p must be a number above 0 and at most 1"),
        (("generate", "x", "--min-p", "2"), "min_p must be a number from 0 to 1"),
        (("generate", "x", "--temperature", "-1"), "temperature must be"),
        (("generate", "x", "--temperature", "nan"), "temperature must be"),
        (("generate", "x", "--max-new-tokens", "0"), "max_new_tokens must be"),
        (("generate", "x", "--repetition-penalty", "0"), "repetition_penalty must be"),
        (("generate", "x", "--seed", str(2**63)), "seed must be"),
        (("generate", "x", "--stop", ""), "stop_strings must be"),
        (("generate", "x", "--dtype", "float8"), "--dtype must be one of float32, bfloat16, float16, auto"),
        (
            ("generate", "x", "--device", "moon"),
            "--device must be cpu, cuda, cuda:N, or a number \\(-1 for cpu\\), got 'moon'",
        ),
        (("generate", "x", "--threads", "0"), "--threads must be at least 1"),
        (("generate", "x", "--executor", "fast"), "--executor must be one of"),
        (("generate", "x", "--num-beams", "0"), "num_beams must be an integer from 1"),
        (("generate", "x", "--context-policy", "hope"), "context_policy must be"),
        (("generate", "x", "--kv-cache-dtype", "int4"), "kv_cache_dtype must be one of .*int8"),
        (("generate", "x", "--set", "frob=1"), "frob"),
        (("generate", "x", "--set", "penalty_alpha=0.6"), "penalty_alpha"),
        (("generate", "x", "--set", "=1"), "--set takes NAME=VALUE"),
        (("env", "--frob"), "see gpt2rt env --help"),
        (("doctor", "a", "b"), "unexpected extra argument"),
    ],
)
def test_wrong_usage(run, arguments, message, one_sentence):
    code, out, err = run(*arguments)
    assert code == 2
    assert out == ""
    assert re.search(message, one_sentence(err), re.IGNORECASE)


def test_missing_and_damaged_models(run, checkpoint, tmp_path, one_sentence):
    code, out, err = run("generate", "x", "-m", tmp_path / "nothing")
    assert (code, out) == (1, "")
    assert "nothing' does not exist" in one_sentence(err)
    code, out, err = run("generate", "x", "-m", tmp_path)
    assert (code, out) == (1, "")
    one_sentence(err)
    for path in pathlib.Path(checkpoint).iterdir():
        data = path.read_bytes()
        (tmp_path / path.name).write_bytes(data[:-100] if path.suffix == ".safetensors" else data)
    code, out, err = run("generate", "x", "-m", tmp_path)
    assert (code, out) == (1, "")
    assert "model.safetensors" in one_sentence(err)


def test_prompt_longer_than_the_context(run, checkpoint, one_sentence):
    code, out, err = run("generate", "x" * 65, "-m", checkpoint)
    assert (code, out) == (1, "")
    assert "prompt 0 has 65 tokens, but the model has n_positions=64" in one_sentence(err)


def test_end_of_the_context_is_a_warning(run, checkpoint):
    code, _, err = run("generate", "x" * 60, "-m", checkpoint, "--greedy")
    assert code == 0
    assert err.startswith("gpt2rt: warning: 128 new tokens were asked for, but after the longest prompt there is room")


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_device_that_is_not_there(run, checkpoint, one_sentence):
    code, _, err = run("generate", "x", "-m", checkpoint, "--device", "cuda")
    assert code == 1
    assert "sees no CUDA device" in one_sentence(err)


def test_debug_shows_the_traceback(run, tmp_path, monkeypatch):
    monkeypatch.setenv("GPT2RT_LOG", "debug")
    code, _, err = run("generate", "x", "-m", tmp_path / "nothing")
    assert code == 1
    assert "Traceback" in err


def test_interrupt(run, checkpoint, monkeypatch, one_sentence):
    def write(text):
        if text != "ab":
            raise KeyboardInterrupt

    monkeypatch.setattr(generate, "_write", write)
    code, _, err = run("generate", "ab", "-m", checkpoint, "-n", 9)
    assert code == 130
    one_sentence(err)


def test_beams(run, checkpoint):
    code, out, err = run("generate", "ROMEO:", "-m", checkpoint, "--greedy", "-n", 12, "--num-beams", 3)
    assert (code, err) == (0, "")
    tokenizer, model = GPT2Tokenizer.from_pretrained(checkpoint), GPT2LMHeadModel.from_pretrained(checkpoint)
    ids = model.generate(**tokenizer("ROMEO:", return_tensors="pt"), max_new_tokens=12, num_beams=3)
    assert out == tokenizer.decode(ids[0], skip_special_tokens=True) + "\n"
    result = json.loads(
        run("generate", "ROMEO:", "-m", checkpoint, "-n", 12, "--num-beams", 3, "--seed", 1, "--json")[1]
    )
    assert result["new_tokens"] == 12


def test_any_field_can_be_set(run, checkpoint):
    arguments = ("generate", "aaaa", "-m", checkpoint, "--greedy", "-n", 20, "--json")
    plain = json.loads(run(*arguments)[1])["text"]
    stop = next(c for c in plain if c.isascii())
    banned = GPT2Tokenizer.from_pretrained(checkpoint).encode(stop)
    result = json.loads(run(*arguments, "--set", f"suppress_tokens={banned}", "--set", "max-new-tokens=18")[1])
    assert result["new_tokens"] == 18
    assert stop not in result["text"]
    assert json.loads(run(*arguments, "--set", f"stop_strings={stop}")[1])["text"] == plain[: plain.index(stop)]


def test_int8_cache(run, checkpoint):
    arguments = ("generate", "aaaa", "-m", checkpoint, "--greedy", "-n", 9, "--json")
    code, out, _ = run(*arguments, "--kv-cache-dtype", "int8")
    assert (code, json.loads(out)["new_tokens"]) == (0, 9)
    assert (
        run(*arguments, "--set", "cache_implementation=quantized")[1].split('"load_s"')[0] == out.split('"load_s"')[0]
    )


def test_drafts_do_not_change_the_text(run, checkpoint):
    arguments = ("generate", "abab", "-m", checkpoint, "-n", 20, "--seed", 5)
    plain = run(*arguments)[1]
    assert run(*arguments, "--assistant-model", checkpoint)[1] == plain
    assert run(*arguments, "--prompt-lookup", 3)[1] == plain


def test_context_policy(run, checkpoint, one_sentence):
    arguments = ("generate", "x" * 60, "-m", checkpoint, "--greedy", "-n", 20)
    code, _, err = run(*arguments, "--context-policy", "error")
    assert code == 1
    assert "n_positions=64" in one_sentence(err)
    code, out, err = run(*arguments, "--context-policy", "sliding", "--json")
    assert (code, err) == (0, "")
    assert json.loads(out)["new_tokens"] == 20


def test_another_tokenizer(run, checkpoint, tmp_path, one_sentence):
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((pathlib.Path(checkpoint) / name).read_bytes())
    arguments = ("generate", "ab", "-m", tmp_path, "--greedy", "-n", 4)
    code, _, err = run(*arguments)
    assert code == 1
    assert "tokenizer" in one_sentence(err)
    code, out, _ = run(*arguments, "--tokenizer", checkpoint)
    assert (code, out) == (0, run("generate", "ab", "-m", checkpoint, "--greedy", "-n", 4)[1])


def test_openai_gpt(run, test_data, tmp_path):
    OpenAIGPTTokenizer.from_pretrained(test_data / "openai-gpt").save_pretrained(tmp_path)
    torch.manual_seed(0)
    config = OpenAIGPTConfig(n_positions=64, n_embd=32, n_layer=2, n_head=4, initializer_range=0.3)
    model = OpenAIGPTLMHeadModel(config).eval()
    model.save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    code, out, err = run("generate", "the rain", "-m", tmp_path, "--greedy", "-n", 6)
    assert (code, err) == (0, "")
    prompt = tokenizer("the rain", return_tensors="pt")["input_ids"]
    ids = model.generate(prompt, max_new_tokens=6)[0]
    assert "".join(out.split()) == "".join(tokenizer.decode(ids).split())
    code, out, _ = run("generate", "the rain", "-m", tmp_path, "-n", 6, "--seed", 3, "--json")
    assert code == 0
    assert json.loads(out)["executor"] == "cpu"


# ---- as a program --------------------------------------------------------------------------------------------------


def program(*command):
    return subprocess.Popen(
        [sys.executable, *command],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )


def test_reader_that_goes_away(checkpoint):
    with program("-m", "gpt2rt.cli", "generate", "ab", "-m", checkpoint, "-n", "60") as process:
        process.stdout.close()
        err = process.stderr.read().decode()
    assert process.returncode == 0
    assert err == ""


WAITS = """
import signal
import time

# a shell that starts the tests in the background lets its children ignore the signal
signal.signal(signal.SIGINT, signal.default_int_handler)
from gpt2rt import cli
from gpt2rt.cli import generate

def wait(prompt):
    print("ready", flush=True)
    time.sleep(60)

generate._read_prompt = wait
cli.main(["generate", "x"])
"""


def test_ctrl_c(one_sentence):
    with program("-c", WAITS) as process:
        assert process.stdout.readline() == b"ready\n"
        process.send_signal(signal.SIGINT)
        err = process.stderr.read().decode()
    assert process.returncode == 130
    assert one_sentence(err) == "gpt2rt: error: interrupted"


# ---- env, doctor, help ---------------------------------------------------------------------------------------------


def test_env(run):
    code, out, _ = run("env", "--json")
    assert code == 0
    facts = json.loads(out)
    assert facts["packages"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert facts["ops"]["layer_norm"]["cpu"] == ("C++" if facts["extension"]["loaded"] else "torch")
    assert facts["isa"] in (*CPU_ISAS, None)
    code, out, _ = run("env")
    assert code == 0
    assert "paged_decode_attention" in out
    if not facts["accelerators"]:
        assert "Triton is not active: " in out


def test_env_says_why_cpp_is_missing(run, monkeypatch):
    from gpt2rt import ops

    status = ops.ExtensionStatus(False, None, "[it] was not built")
    monkeypatch.setattr(ops, "extension_status", lambda: status)
    out = run("env")[1]
    assert "C++ is not active: [it] was not built" in out
    assert json.loads(run("env", "--json")[1])["isa"] is None


def test_doctor_exit_code_follows_the_report(run, monkeypatch):
    from gpt2rt import doctor

    report = doctor.Report("a model")
    report.add("arithmetic", True, "fine")
    report.summary = "all [is] good"
    monkeypatch.setattr(doctor, "check_install", lambda: report)
    code, out, _ = run("doctor")
    assert code == 0
    assert re.search(r"ok +arithmetic +fine", out)
    assert "all [is] good" in out
    report.add("geometry", False, "off by 3", 3.0)
    code, out, _ = run("doctor", "--json")
    assert code == 1
    assert json.loads(out)["checks"][1] == {
        "name": "geometry",
        "status": "mismatch",
        "detail": "off by 3",
        "value": 3.0,
    }


def test_doctor_without_transformers(run, checkpoint, monkeypatch, one_sentence):
    monkeypatch.setitem(sys.modules, "transformers", None)
    code, _, err = run("doctor", checkpoint)
    assert code == 1
    assert "pip install transformers" in one_sentence(err)


@pytest.mark.parametrize("verb", ["generate", "run", "score", "env", "doctor"])
def test_help_has_an_example(run, verb):
    code, out, _ = run(verb, "--help")
    assert code == 0
    assert re.search(rf"Examples?:\s+gpt2rt {verb}", out)


def test_version(run):
    from gpt2rt.env import version

    assert run("--version") == (0, f"gpt2rt {version()}\n", "")
