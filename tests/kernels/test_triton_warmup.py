"""``gpt2rt warmup`` in triton's interpreter, where compiling is running."""

import json
import os

import pytest

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs TRITON_INTERPRET=1", allow_module_level=True)

from gpt2rt import GPT2Config, GPT2LMHeadModel, GPT2Tokenizer, cli
from gpt2rt.engine import warmup as engine_warmup
from gpt2rt.generation import warmup as generate_warmup

pytestmark = pytest.mark.kernel


@pytest.fixture
def checkpoint(tmp_path):
    GPT2Tokenizer({"a": 0, "<|endoftext|>": 1}, [], eos_token="<|endoftext|>").save_pretrained(tmp_path)
    config = GPT2Config(n_layer=1, n_embd=16, n_head=1, n_positions=16, vocab_size=2, bos_token_id=1, eos_token_id=1)
    GPT2LMHeadModel(config).save_pretrained(tmp_path)
    return str(tmp_path)


def test_warmup_says_what_it_did(checkpoint, capsys, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", "/somewhere")
    # what they run is seen in test_generate_launches.py and test_engine_launches.py
    run = []
    monkeypatch.setattr(generate_warmup, "run_each_way", lambda model, dtype: run.append(dtype))
    monkeypatch.setattr(engine_warmup, "try_out", lambda served: run.append(served.config))
    with pytest.raises(SystemExit) as stopped:
        cli.main(["warmup", checkpoint, "--device", "cpu", "--batch-sizes", "1", "--prompt-lengths", "16", "--json"])
    assert stopped.value.code == 0
    facts = json.loads(capsys.readouterr().out)
    # a decode step, a prompt, and both without a graph
    assert (facts["sizes"], facts["graphs"], facts["folder"]) == (4, 0, "/somewhere")
    assert run[0] == "auto"
    assert (run[1].max_num_seqs, run[1].step_tokens, run[1].executor) == (1, 16, "cuda")
