"""What ``gpt2rt env`` is made of."""

import os
import subprocess
import sys

import pytest
import torch

from gpt2rt import env, ops


def test_collect_names_versions_and_hardware(monkeypatch):
    monkeypatch.setenv("GPT2RT_NUM_THREADS", "2")
    facts = env.collect()
    assert facts["packages"]["torch"] == torch.__version__
    assert facts["cpu_count"] >= 1
    assert facts["settings"]["GPT2RT_NUM_THREADS"] == "2"
    assert set(facts["settings"]) <= set(env.SETTINGS)
    assert facts["accelerators"] == [] or torch.cuda.is_available()


def test_every_op_has_a_form_on_the_cpu():
    forms = ops.op_forms()
    assert len(forms) >= 8
    loaded = ops.extension_status().loaded
    for name, form in forms.items():
        assert form["cpu"] == ("C++" if loaded else "torch"), name
        assert form["cuda"] in ("Triton", "torch", "none")
    assert forms["paged_decode_attention"]["cuda"] == "Triton"


WITHOUT_EXTENSION = """
import pathlib, warnings
import torch
from unittest import mock
exists = pathlib.Path.exists
with mock.patch.object(pathlib.Path, "exists", lambda self: self.name != "_C.abi3.so" and exists(self)):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        from gpt2rt import ops
assert len(caught) == 1 and "plain torch path" in str(caught[0].message), caught
assert not ops.extension_status().loaded and "not built" in ops.extension_status().reason
assert ops.op_forms()["layer_norm"]["cpu"] == "torch"
x = torch.randn(3, 8)
y = ops.layer_norm(x, torch.ones(8), torch.zeros(8), 1e-5)
torch.testing.assert_close(y, torch.nn.functional.layer_norm(x, (8,)))
from gpt2rt import GPT2Config, GPT2LMHeadModel
torch.manual_seed(0)
model = GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=16, n_head=2, vocab_size=20, bos_token_id=0, eos_token_id=0))
assert model.generation_executor().name == "eager"
print(model.generate(torch.tensor([[1, 2]]), min_new_tokens=3, max_new_tokens=3).shape)
"""


def run(code, **environment):
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, **environment}
    )


def test_without_the_extension_everything_works_after_one_warning():
    result = run(WITHOUT_EXTENSION, GPT2RT_REQUIRE_CPP="0")
    assert result.returncode == 0, result.stderr
    assert "torch.Size([1, 5])" in result.stdout


def test_a_required_extension_that_is_missing_is_an_error():
    result = run(WITHOUT_EXTENSION, GPT2RT_REQUIRE_CPP="1")
    assert result.returncode != 0
    assert "ImportError: GPT2RT_REQUIRE_CPP is set, but _C.abi3.so was not built" in result.stderr


@pytest.mark.skipif(not ops.extension_status().loaded, reason="the C++ extension is not built")
@pytest.mark.parametrize("isa", ops.CPU_ISAS)
def test_a_lower_instruction_set_can_be_forced(isa):
    if ops.CPU_ISAS.index(isa) > ops.CPU_ISAS.index(ops.cpu_isa()):
        pytest.skip(f"this processor has no {isa}")
    result = run("from gpt2rt import ops; print(ops.cpu_isa())", GPT2RT_CPU_ISA=isa)
    assert result.stdout.strip() == isa, result.stderr


@pytest.mark.skipif(not ops.extension_status().loaded, reason="the C++ extension is not built")
def test_an_unknown_instruction_set_is_refused():
    result = run("from gpt2rt import ops; print(ops.cpu_isa())", GPT2RT_CPU_ISA="sse9")
    assert result.returncode != 0
    assert "sse9" in result.stderr
