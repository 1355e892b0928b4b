"""The benchmark of CPU decoding: what it asks, counts and reports. The peers themselves are not installed here."""

import argparse
import itertools
import json
import sys

import cpu_decode
import cpu_profile
import cpu_report
import cpu_start
import numpy as np
import pytest
import shapes
import torch
from bandwidth import read_bandwidth
from cpu_peers import PEERS, PeerFailedError, PeerProcess, family_module, worker
from cpu_peers.onnx_genai import quantize_blocks
from cpu_peers.weights import read_checkpoint

from gpt2rt import GPT2LMHeadModel


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    shapes.random_checkpoint(shapes.SHAPES["tiny"], str(folder))
    return folder


def arguments(**changes):
    values = dict(prompt_tokens=4, new_tokens=3, batch_sizes=[1, 3], prefill=[20, 300])
    return argparse.Namespace(**values | changes)


# ---- what is asked ---------------------------------------------------------------------------------------------------


def test_scenarios_fit_the_shape():
    found = {scenario.name: scenario for scenario in cpu_decode.scenarios(arguments(), shapes.SHAPES["tiny"])}
    assert list(found) == ["decode-1", "decode-3", "prefill-20"]
    rows = found["decode-3"].prompts
    assert [len(row) for row in rows] == [4, 4, 4]
    assert rows[0] != rows[1]
    assert max(map(max, rows)) < 97
    assert found["prefill-20"].new_tokens == 1


def test_a_shape_with_few_positions_has_a_prefill():
    found = cpu_decode.scenarios(arguments(prefill=[512, 1000], batch_sizes=[]), shapes.SHAPES["tiny"])
    assert [scenario.name for scenario in found] == ["prefill-128"]


def test_decoding_counts_the_time_between_tokens_and_prefill_that_to_the_first():
    decode, *_, prefill = cpu_decode.scenarios(arguments(), shapes.SHAPES["tiny"])
    assert decode.samples([7.0, 8.0, 10.0]) == [1.0, 2.0]
    assert prefill.samples([7.0]) == [7.0]


def test_peers_that_start_slowly_are_chosen_by_name_only():
    assert "torchao-int8" not in cpu_decode.choose("")
    assert cpu_decode.choose("torchao-int8") == ["torchao-int8"]
    assert cpu_decode.choose("ort-*, gpt2rt-fp32") == ["gpt2rt-fp32", "ort-fp32", "ort-int8", "ort-int4"]
    with pytest.raises(SystemExit, match="no peer is named 'llama'"):
        cpu_decode.choose("llama")


def test_a_family_may_have_an_interpreter_of_its_own():
    assert cpu_decode.interpreters(["openvino=/a/python"]) == {"openvino_peer": "/a/python"}
    for wrong in ("openvino", "vino=/a"):
        with pytest.raises(SystemExit, match="expected FAMILY=PYTHON"):
            cpu_decode.interpreters([wrong])


def test_everybody_is_first_once_in_as_many_rounds_as_there_are_peers():
    orders = [cpu_decode.rotated(list("abc"), number) for number in range(3)]
    assert [order[0] for order in orders] == ["a", "b", "c"]
    assert all(sorted(order) == list("abc") for order in orders)
    assert cpu_decode.rotated([], 2) == []


# ---- what is counted -------------------------------------------------------------------------------------------------


def test_bytes_of_a_step_are_those_of_the_models_matrices(checkpoint):
    model = GPT2LMHeadModel.from_pretrained(checkpoint)
    matrices = [p for name, p in model.named_parameters() if p.dim() == 2 and "wpe" not in name]
    assert shapes.step_bytes(shapes.SHAPES["tiny"], (32, 32)) == 4 * sum(p.numel() for p in matrices)


def test_operations_of_a_prefill_are_counted_position_by_position():
    shape, num_tokens = shapes.SHAPES["tiny"], 5
    body, head = shapes.weight_counts(shape)
    expected = 2 * head
    for position in range(num_tokens):
        # scores and weighted sums over this and all earlier positions
        expected += 2 * body + 2 * 2 * shape["n_layer"] * shape["n_embd"] * (position + 1)
    assert shapes.prefill_operations(shape, num_tokens) == expected


def test_bandwidth_is_measured_once_a_repeat():
    threads = torch.get_num_threads()
    found = read_bandwidth(1 << 21, 2, repeats=3)
    assert len(found) == 3
    assert min(found) > 0
    assert torch.get_num_threads() == threads


@pytest.mark.parametrize(("num_rows", "past", "num_tokens"), [(1, 6, 1), (3, 2, 1), (2, 0, 5)])
def test_the_profile_accounts_for_the_bytes_and_operations_of_a_step(checkpoint, num_rows, past, num_tokens):
    shape = shapes.SHAPES["tiny"]
    executor = GPT2LMHeadModel.from_pretrained(checkpoint).generation_executor("cpu")
    rows = cpu_profile.profile_step(executor, num_rows, past, num_tokens)
    length = past + num_tokens
    cached = 2 * 4 * num_rows * length * shape["n_layer"] * shape["n_embd"]
    assert sum(row["bytes"] for row in rows) == shapes.step_bytes(shape, (32, 32)) + cached
    body, head = shapes.weight_counts(shape)
    pairs = sum(range(past + 1, length + 1))
    each = 2 * body * num_tokens + 2 * head + 4 * shape["n_layer"] * shape["n_embd"] * pairs
    assert sum(row["operations"] for row in rows) == num_rows * each
    assert all(row["seconds"] > 0 for row in rows)
    text = cpu_profile.table(rows)
    assert "Attention: attention" in text
    assert text.splitlines()[-1].startswith("| all |")


def test_the_profile_counts_codes_and_scales_of_a_quantised_weight(checkpoint):
    plan = GPT2LMHeadModel.from_pretrained(checkpoint, quantization="int4-g32").build_graph()
    layers = [node.linear for node in plan.nodes[:-1] if getattr(node, "linear", None) is not None]
    weights = 12 * 2 * 64 * 64
    # four bits, and a float16 scale for each 32
    assert sum(map(cpu_profile.weight_bytes, layers)) == weights * 4.5 / 8


# ---- the processes of the peers --------------------------------------------------------------------------------------


def test_checkpoints_are_read_without_torch(checkpoint):
    found = read_checkpoint(checkpoint)
    state = GPT2LMHeadModel.from_pretrained(checkpoint).state_dict()
    names = {name.removeprefix("transformer."): name for name in state}
    for name, values in found.tensors.items():
        np.testing.assert_array_equal(values, state[names[name]].numpy())
    weight, bias = found.linear("h.1.mlp.c_fc")
    assert weight.shape == (256, 64)
    assert bias.shape == (256,)
    np.testing.assert_array_equal(weight.T, found["h.1.mlp.c_fc.weight"])


def test_every_peer_has_a_family_with_what_it_needs():
    for peer in PEERS.values():
        family = family_module(peer)
        assert family.REQUIRES
        assert callable(family.Runner.generate)
        assert hasattr(family, "convert") == hasattr(family, "CONVERT_REQUIRES")
        assert set(worker.required(peer, converting=False)) >= set(family.REQUIRES)
    assert "torchao" in worker.required(PEERS["torchao-int8"], converting=False)
    assert "torchao" not in worker.required(PEERS["torch-compile-bf16"], converting=False)


def test_absent_packages_are_noticed():
    assert worker.installed("torch.nn")
    assert not worker.installed("no_such_package")
    assert not worker.installed("no_such_package.part")


def test_a_worker_answers_with_tokens_times_and_memory(checkpoint, tmp_path):
    process = PeerProcess("gpt2rt-fp32", checkpoint=str(checkpoint), converted=tmp_path / "own", threads=1)
    process.convert()
    about = process.start()
    answer = process.ask([[1, 2, 3], [4, 5, 6]], 4)
    process.close()
    assert about["load_s"] > 0
    assert list(about["versions"]) == ["gpt2rt"]
    assert len(answer["times_ms"]) == 4
    assert all(later > earlier for earlier, later in itertools.pairwise(answer["times_ms"]))
    assert answer["peak_megabytes"] > 50
    model = GPT2LMHeadModel.from_pretrained(checkpoint)
    model.generation_config.eos_token_id = None
    expected = model.generate(torch.tensor([[1, 2, 3], [4, 5, 6]]), max_new_tokens=4, do_sample=False)
    assert answer["tokens"] == expected[:, 3:].tolist()


def test_a_peer_that_dies_says_why(tmp_path):
    process = PeerProcess("gpt2rt-fp32", checkpoint=str(tmp_path / "absent"), converted=tmp_path / "own", threads=1)
    with pytest.raises(PeerFailedError, match=r"exit code 1: .*absent"):
        process.start()
    process.close()


@pytest.mark.parametrize("stays_loaded", [True, False])
def test_a_whole_run(tmp_path, monkeypatch, stays_loaded):
    """With and without memory to keep peers loaded; one peer lacks its packages and is named."""
    bare = tmp_path / "python"
    bare.write_text(f'#!/bin/sh\nexec {sys.executable} -S "$@"\n', encoding="ascii")
    bare.chmod(0o755)
    monkeypatch.setattr(cpu_decode, "SETTLE_S", 0.0)
    monkeypatch.setattr(cpu_decode, "available_bytes", lambda: 1 << 50 if stays_loaded else 0)
    options = arguments(prefill=[20])
    options.shape, options.rounds, options.threads = "tiny", 2, 1
    options.peers, options.peer_python = "gpt2rt-fp32,hf-sdpa-fp32", [f"transformers={bare}"]
    options.models = tmp_path / "models"
    result = cpu_decode.measure(options)
    assert result["left_out"] == {"hf-sdpa-fp32": "not installed: pip install transformers torch"}
    assert result["failed"] == {}
    assert list(result["peers"]) == ["gpt2rt-fp32"]
    row = result["peers"]["gpt2rt-fp32"]
    assert row["stayed_loaded"] == stays_loaded
    # a run without memory warms up in each round, and does not count that
    counts = {name: measured["ms"]["samples"] for name, measured in row["scenarios"].items()}
    assert counts == {"decode-1": 4, "decode-3": 4, "prefill-20": 2}
    assert len(row["scenarios"]["decode-3"]["tokens"]) == 3
    assert json.loads(json.dumps(result)) == result
    assert "gpt2rt-fp32" in cpu_report.overview(result)
    # a second run finds the checkpoint
    assert (options.models / "checkpoint-tiny" / "model.safetensors").is_file()


@pytest.mark.parametrize("bits", [4, 8])
def test_blocks_for_onnx_are_rounded_to_nearest(bits):
    generator = np.random.default_rng(0)
    weight = generator.standard_normal((5, 70)).astype(np.float32)
    weight[2, :32] = 0.0
    codes, scales = quantize_blocks(weight, bits)
    assert codes.shape == (5, 3, 32 * bits // 8)
    if bits == 4:
        codes = np.stack([codes & 15, codes >> 4], -1).reshape(5, 3, 32)
    restored = ((codes.astype(np.float32) - (1 << (bits - 1))) * scales[..., None]).reshape(5, -1)[:, :70]
    bound = np.repeat(np.abs(scales), 32, axis=1)[:, :70]
    # the largest code of the other sign does not exist, so an element that would need it is off by up to one step
    assert (np.abs(restored - weight) <= bound * 1.0001).all()
    assert (np.abs(restored - weight) <= bound * 0.5001).mean() > 0.95
    np.testing.assert_array_equal(restored[2, :32], 0.0)


# ---- what is reported ------------------------------------------------------------------------------------------------


def result_of(medians):
    """A result with one scenario: {peer: median ms}."""
    rows = {}
    for name, median in medians.items():
        times = {"median": median, "p10": median - 1, "p90": median + 1, "samples": 9}
        rows[name] = {
            "width": PEERS[name].width,
            "scenarios": {"decode-1": {"ms": times}},
            "floor_ms": 2.0,
            "step_megabytes": 100.0,
            "peak_megabytes": 300.0,
        }
    return {
        "machine": {"cpu": "a processor", "isa": "avx2", "commit": "abc"},
        "arguments": {"shape": "tiny", "threads": 2},
        "left_out": {"ov-int4": "not installed: pip install openvino"},
        "failed": {},
        "peers": rows,
    }


def test_speed_is_compared_with_the_fastest_other_of_the_same_width():
    result = result_of({"gpt2rt-int4": 4.0, "gpt2rt-int4-g32": 3.0, "ort-int4": 8.0, "lcpp-q4_0": 6.0, "ort-int8": 1.0})
    assert cpu_report.fastest_other(result, "int4", "decode-1") == ("lcpp-q4_0", 6.0)
    assert cpu_report.speed_ratio(result, "gpt2rt-int4", "decode-1") == 1.5
    assert cpu_report.speed_ratio(result, "ort-int4", "decode-1") == 0.75
    assert cpu_report.fastest_other(result, "nf4", "decode-1") is None


def test_tables_of_a_result(tmp_path, capsys, monkeypatch):
    result = result_of({"ort-int4": 8.0, "gpt2rt-int4": 4.0, "gpt2rt-nf4": 5.0})
    path = tmp_path / "result.json"
    path.write_text(json.dumps(result), encoding="utf-8")
    monkeypatch.setattr(sys, "argv", ["cpu_report.py", str(path)])
    cpu_report.main()
    text = capsys.readouterr().out
    assert "| gpt2rt-int4 | 4.00 | 8.00 (ort-int4) | 2.00 |" in text
    # no other program of its width ran
    assert "| gpt2rt-nf4 | 5.00 |  |  |" in text
    assert "| int4 | **gpt2rt-int4** | 3.00 / 4.00 | 2.00 | 100.0 | 2.00 | 300 |" in text
    assert "ov-int4: not installed: pip install openvino" in text
    widths = [len(line.split("|")) for line in text.splitlines() if line.startswith("|")]
    assert len(set(widths)) == 2


def test_a_start_is_measured_to_the_first_token(tmp_path):
    cache = tmp_path / "cache"
    cache.mkdir()
    (cache / "old").touch()
    variant = cpu_start.Variant("quick", "print('first token', flush=True)", cache=cache, first=True)
    variant.run(keep=False)
    assert variant.seconds == []
    assert not cache.exists()
    variant.run(keep=True)
    assert variant.seconds[0] > 0
    with pytest.raises(SystemExit, match=r"(?s)bad ended with exit code 1.*no such luck"):
        cpu_start.Variant("bad", "raise ValueError('no such luck')").run(keep=True)
