"""The training script runs from text to a model that loads and generates."""

import pathlib
import subprocess
import sys

import pytest
import torch

import gpt2rt

ROOT = pathlib.Path(__file__).resolve().parent.parent


@pytest.mark.parametrize("model_type", ["gpt2", "openai-gpt"])
def test_train_tiny_makes_a_checkpoint_that_generates(tmp_path, model_type):
    lines = [f"SPEAKER {i % 7}:\nWords, words and more words, number {i}.\n\n" for i in range(400)]
    (tmp_path / "text.txt").write_text("".join(lines), encoding="utf-8")
    small = dict(steps=3, batch_size=2, vocab_size=300, n_layer=1, n_embd=16, n_head=2, n_positions=128)
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in small.items()]
    command = [sys.executable, ROOT / "examples" / "train_tiny.py", "--text", tmp_path / "text.txt"]
    command += ["--model-type", model_type]
    for stage in ([], ["--init", tmp_path / "out"]):
        result = subprocess.run(
            [*command, "--output", tmp_path / "out", *flags, *stage], capture_output=True, text=True
        )
        assert result.returncode == 0, result.stderr
    assert "held out:" in result.stdout
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert "1 layers, n_embd 16, 2 heads, 128 positions" in card
    # the second run went on from the first, and its card has the commands of both
    assert card.count("python examples/train_tiny.py") == 2
    assert "the weights of an earlier run" in card
    prefix = {"gpt2": "GPT2", "openai-gpt": "OpenAIGPT"}[model_type]
    model = getattr(gpt2rt, f"{prefix}LMHeadModel").from_pretrained(tmp_path / "out", dtype="auto")
    tokenizer = getattr(gpt2rt, f"{prefix}Tokenizer").from_pretrained(tmp_path / "out")
    assert model.dtype == torch.float16
    assert model.config.vocab_size == len(tokenizer)
    ids = tokenizer("SPEAKER 1:", return_tensors="pt")
    assert model.generate(**ids, max_new_tokens=5, do_sample=False).shape[1] > ids["input_ids"].shape[1]
