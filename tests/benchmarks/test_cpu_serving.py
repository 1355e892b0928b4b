"""The benchmark of many requests at once: what it asks, counts and reports."""

import argparse
import asyncio
import json
import sys
import time
import types

import cpu_serving
import pytest
import serve_start
import serving_itl
import serving_loop
import serving_report
import shapes
from cpu_peers import PEERS, PeerFailedError
from serving_peers import SERVERS, family_module, worker

from gpt2rt import GPT2LMHeadModel, GPT2Tokenizer
from gpt2rt.engine import AsyncLLM
from gpt2rt.engine.core import EngineCore


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    shapes.random_checkpoint(shapes.SHAPES["tiny"], str(folder))
    return folder


def arguments(*texts):
    return cpu_serving.parse_arguments(["--dry", "--threads", "1", *texts])


# ---- what is asked ---------------------------------------------------------------------------------------------------


def test_a_workload_has_the_lengths_asked_for_and_depends_on_its_seed_alone():
    work = cpu_serving.Workload(50, (4, 8), (3, 6), 97, "1")
    assert {len(prompt) for prompt in work.prompts} == set(range(4, 9))
    assert set(work.new_tokens) == set(range(3, 7))
    assert max(map(max, work.prompts)) < 97
    assert vars(work) == vars(cpu_serving.Workload(50, (4, 8), (3, 6), 97, "1"))
    assert work.prompts != cpu_serving.Workload(50, (4, 8), (3, 6), 97, "2").prompts


def test_programs_are_chosen_by_name():
    assert cpu_serving.choose("ct2-*, gpt2rt-fp32", None)[0] == "gpt2rt-fp32"
    assert not [name for name in cpu_serving.choose("", None) if name.startswith("llama-server")]
    assert [name for name in cpu_serving.choose("", "/a/llama-server") if name.startswith("llama-server")]
    with pytest.raises(SystemExit, match="no program is named 'vllm'"):
        cpu_serving.choose("vllm", None)


def test_every_program_has_a_family_with_what_it_needs():
    for server in SERVERS.values():
        family = family_module(server)
        assert family.REQUIRES
        assert callable(family.Runner.serve)
        assert server.width in serving_report.BITS


def test_options_are_read():
    found = cpu_serving.parse_arguments(
        ["--prompt-tokens", "9", "--new-tokens", "2-5", "--prefill-slowdown", "none,1.5"]
    )
    assert (found.prompt_tokens, found.new_tokens, found.prefill_slowdown) == ((9, 9), (2, 5), [None, 1.5])
    for wrong in (["--section", "x"], ["--new-tokens", "5-2"], ["--rounds", "0"]):
        with pytest.raises(SystemExit):
            cpu_serving.parse_arguments(wrong)


# ---- the programs ----------------------------------------------------------------------------------------------------

PROMPTS = [[1, 2, 3, 4, 5], [6, 7], [8, 9, 10]]
NEW_TOKENS = [4, 7, 1]


def expected(checkpoint):
    import torch

    model = GPT2LMHeadModel.from_pretrained(checkpoint).eval()
    model.generation_config.eos_token_id = None
    return [
        model.generate(torch.tensor([prompt]), max_new_tokens=count, do_sample=False)[0, len(prompt) :].tolist()
        for prompt, count in zip(PROMPTS, NEW_TOKENS, strict=True)
    ]


@pytest.mark.parametrize(
    "name",
    ["gpt2rt-fp32", "gpt2rt-stream-fp32", "hf-static-fp32", "hf-continuous-sdpa-fp32", "hf-continuous-eager-fp32"],
)
def test_a_program_makes_the_tokens_of_each_request(name, checkpoint, tmp_path):
    server = SERVERS[name]
    family = family_module(server)
    for module in family.REQUIRES:
        pytest.importorskip(module)
    options = {**PEERS[server.model].options, **server.options}
    runner = family.Runner(str(checkpoint), tmp_path, {**options, "threads": 1, "capacity": 3, "longest": 16})
    try:
        # a second time: whatever stays from the first must not matter
        for _ in range(2):
            answer = worker.answer_request(runner, {"prompts": PROMPTS, "new_tokens": NEW_TOKENS})
            assert answer["tokens"] == expected(checkpoint)
            for moments, count in zip(answer["times_ms"], NEW_TOKENS, strict=True):
                assert moments == sorted(moments)
                assert all(0 < moment <= answer["total_ms"] for moment in moments)
                if name == "gpt2rt-stream-fp32":
                    # a slow reader gets some together
                    assert 1 <= len(moments) <= count
                else:
                    assert len(moments) == (0 if name == "gpt2rt-fp32" else count)
    finally:
        if hasattr(runner, "close"):
            runner.close()


def test_who_makes_fewer_tokens_is_not_measured(monkeypatch):
    process = types.SimpleNamespace(
        serve=lambda prompts, counts: {"tokens": [[1]], "times_ms": [[1.0]], "total_ms": 1.0, "peak_megabytes": 1.0}
    )
    monkeypatch.setattr(cpu_serving, "SETTLE_S", 0.0)
    row = cpu_serving.Row("some", process)
    work = cpu_serving.Workload(1, (2, 2), (3, 3), 97, "1")
    with pytest.raises(PeerFailedError, match=r"made \[1\] tokens, asked for \[3\]"):
        row.run(work, 1)
    assert row.tokens_per_s == {}


def test_rates_and_times_of_an_answer(monkeypatch):
    answer = {
        "tokens": [[1, 2, 3], [4, 5]],
        "times_ms": [[10.0, 12.0, 15.0], [11.0, 12.0]],
        "total_ms": 20.0,
        "peak_megabytes": 5.0,
    }
    monkeypatch.setattr(cpu_serving, "SETTLE_S", 0.0)
    row = cpu_serving.Row("some", types.SimpleNamespace(serve=lambda prompts, counts: answer))
    work = cpu_serving.Workload(2, (2, 2), (3, 3), 97, "1")
    work.new_tokens = [3, 2]
    row.run(work, 1)
    assert row.tokens_per_s == {2: [250.0]}
    assert row.first_ms == {2: [10.0, 11.0]}
    assert row.gaps_ms == {2: [2.0, 3.0, 1.0]}
    # who waits for everything has no such times
    answer["times_ms"] = [[], []]
    other = cpu_serving.Row("other", row.process)
    other.run(work, 1)
    assert other.first_ms == other.gaps_ms == {}
    other.tokens[2, 1] = [[1, 2, 3], [4, 6]]
    assert cpu_serving.agreement(other, row, 2) == 0.5


# ---- whole runs ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stays_loaded", [True, False])
def test_a_dry_run_of_throughput(tmp_path, monkeypatch, capsys, stays_loaded):
    """With and without memory to keep programs loaded; one lacks its packages and is named."""
    bare = tmp_path / "python"
    bare.write_text(f'#!/bin/sh\nexec {sys.executable} -S "$@"\n', encoding="ascii")
    bare.chmod(0o755)
    monkeypatch.setattr(cpu_serving, "SETTLE_S", 0.0)
    monkeypatch.setattr(cpu_serving, "available_bytes", lambda: 1 << 50 if stays_loaded else 0)
    output = tmp_path / "result.json"
    cpu_serving.main(
        [
            *("--dry", "--threads", "1", "--peers", "gpt2rt-stream-fp32,hf-static-fp32", "--output-json", str(output)),
            *("--peer-python", f"transformers={bare}", "--models", str(tmp_path / "models")),
        ]
    )
    text = capsys.readouterr().out
    result = json.loads(output.read_text(encoding="utf-8"))
    found = result["throughput"]
    assert found["left_out"] == {"hf-static-fp32": "not installed: pip install transformers torch"}
    assert found["failed"] == {}
    row = found["programs"]["gpt2rt-stream-fp32"]
    assert row["stayed_loaded"] == stays_loaded
    assert list(row["requests"]) == ["2", "5"]
    for measured in row["requests"].values():
        assert measured["output_tokens_per_s"]["samples"] == 1
        assert measured["output_tokens_per_s"]["median"] > 0
        assert measured["same_tokens"] == 1.0
        assert measured["ttft_ms"]["p50"] > 0
    assert not [name for name in result["arguments"] if name in cpu_serving.PLACES]
    assert str(tmp_path) not in output.read_text(encoding="utf-8")
    assert "| gpt2rt-stream-fp32 | 2 |" in text
    assert "hf-static-fp32: not installed" in text


@pytest.fixture
def slow_steps(monkeypatch):
    """Steps that take a millisecond, so that readers keep up with a model of no size."""
    plain = EngineCore.step

    def step(core):
        time.sleep(0.001)
        plain(core)

    monkeypatch.setattr(EngineCore, "step", step)


def test_a_dry_run_of_the_times_between_tokens(checkpoint, slow_steps):
    options = arguments("--formats", "int8")
    options.prefill_slowdown = [2.0]
    rows = serving_itl.measure_itl(options, str(checkpoint))
    assert [(row["format"], row["streams"]) for row in rows] == [("int8", 1), ("int8", 2)]
    for row in rows:
        assert row["unloaded_ms"]["samples"] > 0
        assert row["loaded_ms"]["samples"] > 0
        assert row["p99_ratio"] == pytest.approx(row["loaded_ms"]["p99"] / row["unloaded_ms"]["p99"])
        assert row["prompt_ttft_ms"]["alone"] > 0


def test_only_gaps_beside_a_prompt_count_as_loaded(checkpoint, slow_steps):
    async def main():
        engine = AsyncLLM(GPT2LMHeadModel.from_pretrained(checkpoint), prefill_slowdown=2.0)
        try:
            load = serving_itl.Load(engine, 97, 256, 60, "seed")
            alone = await load.alone(2, 20)
            beside, first = await load.beside(2, 3)
            # streams that were left are ended
            left = await engine.drain(5.0)
            return alone, beside, first, left
        finally:
            engine.shutdown()

    alone, beside, first, left = asyncio.run(main())
    # of two streams, after both have begun; a slow reader gets some tokens together
    assert 0 < len(alone) <= 2 * 19
    assert len(first) == 3
    assert 0 < len(beside) < 2 * 239
    assert left


def test_the_loop_is_the_step_without_the_executor(checkpoint):
    from gpt2rt import ops

    before = ops.sample
    model = GPT2LMHeadModel.from_pretrained(checkpoint).eval()
    for settings in ({"temperature": 0.0}, serving_loop.SAMPLED):
        found = serving_loop.time_steps(model, settings, 20)
        medians = {name: values["median"] for name, values in found.items()}
        assert {values["samples"] for values in found.values()} == {19}
        assert 0 < medians["executor"] < medians["engine"]
        assert 0 < medians["python"] <= medians["loop"]
        assert (medians["choosing"] > 0) == (settings is serving_loop.SAMPLED)
        assert medians["loop"] < medians["engine"]
    # everything is as it was
    assert ops.sample is before
    assert "step" not in vars(model.generation_executor("cpu"))


def test_a_stopwatch_adds_up():
    watch = serving_loop.Stopwatch()
    assert watch.around(lambda a, b: a + b)(1, b=2) == 3
    first = watch.take()
    assert first > 0
    assert watch.take() == 0.0
    with pytest.raises(ZeroDivisionError):
        watch.around(lambda: 1 / 0)()
    assert watch.take() > 0


# ---- what is reported ------------------------------------------------------------------------------------------------


def result_of(speeds):
    """A result with one number of requests: {program: tokens/s}."""
    programs = {}
    for name, speed in speeds.items():
        times = None if name.startswith("hf") else {"p50": 1.0, "p99": 2.0}
        measured = {
            "output_tokens_per_s": {"median": speed, "p10": speed - 1, "p90": speed + 1, "samples": 3},
            "ttft_ms": times,
            "itl_ms": times,
            "same_tokens": 0.5,
        }
        programs[name] = {"width": SERVERS[name].width, "requests": {"16": measured}, "peak_megabytes": 300.0}
    return {
        "machine": {"cpu": "a processor", "isa": "avx2", "commit": "abc"},
        "arguments": {"shape": "tiny", "threads": 2, "long_prompt": 900},
        "throughput": {"left_out": {"lcpp-fp32": "not installed: gguf"}, "failed": {}, "programs": programs},
    }


SPEEDS = {
    "gpt2rt-fp32": 120.0,
    "gpt2rt-int8": 400.0,
    "hf-continuous-sdpa-fp32": 10.0,
    "hf-continuous-eager-fp32": 20.0,
    "hf-static-bf16": 50.0,
    "ct2-fp32": 100.0,
    "ct2-int8": 200.0,
}


def test_rivals_are_as_wide_or_wider():
    result = result_of(SPEEDS)
    anybody = serving_report.RIVALS["fastest other"]
    assert serving_report.fastest(result, "16", "fp32", anybody) == "ct2-fp32"
    assert serving_report.fastest(result, "16", "bf16", anybody) == "ct2-fp32"
    assert serving_report.fastest(result, "16", "int8", anybody) == "ct2-int8"
    continuous = serving_report.RIVALS["transformers, continuous"]
    assert serving_report.fastest(result, "16", "int8", continuous) == "hf-continuous-eager-fp32"
    assert serving_report.fastest(result_of({"gpt2rt-fp32": 1.0}), "16", "fp32", anybody) is None


def test_tables_of_a_result(tmp_path, capsys, monkeypatch):
    path = tmp_path / "result.json"
    path.write_text(json.dumps(result_of(SPEEDS)), encoding="utf-8")
    monkeypatch.setattr(sys, "argv", ["serving_report.py", str(path)])
    serving_report.main()
    text = capsys.readouterr().out
    rivals = "100 (ct2-fp32) | 1.20 | 20 (hf-continuous-eager-fp32) | 6.00 | 100 (ct2-fp32) | 1.20 |"
    assert f"| gpt2rt-fp32 | 16 | 120 | {rivals}" in text
    assert "| int8 | **gpt2rt-int8** | 16 | 400 (399) | 1.0 / 2.0 | 1.0 / 2.0 | 50 % | 300 |" in text
    assert "| bf16 | hf-static-bf16 | 16 | 50 (49) |  |  | 50 % | 300 |" in text
    assert "lcpp-fp32: not installed: gguf" in text


def test_a_result_of_the_other_sections_has_their_tables():
    result = result_of({"gpt2rt-fp32": 1.0})
    del result["throughput"]
    spread = {"p50": 1.0, "p90": 1.5, "p99": 2.0, "max": 3.0, "samples": 9}
    row = {"format": "fp32", "prefill_slowdown": None, "streams": 4, "unloaded_ms": spread, "loaded_ms": spread}
    result["itl"] = [row | {"p99_ratio": 1.0, "prompt_ttft_ms": {"alone": 10.0, "beside_streams": 20.0}}]
    names = ("engine", "executor", "loop", "choosing", "python", "seen")
    result["loop"] = [{"model": "m", "choice": "greedy", "us": {name: {"median": 5.0} for name in names}}]
    text = serving_report.tables(result)
    assert "| fp32 | None | 4 | 1.0 / 2.0 | 1.0 / 2.0 / 3.0 | 1.00 | 10 | 20 |" in text
    assert "| m | greedy | 5.0 | 5.0 | 5.0 | 5.0 | 5.0 | 5.0 |" in text


def test_the_plot_is_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    serving_report.plot(result_of(SPEEDS), tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 1000


# ---- the start of a server -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("vocab_size", [97, 257, 1000])
def test_the_made_up_tokenizer_has_the_size_asked_for(tmp_path, vocab_size):
    serve_start.save_tokenizer(str(tmp_path), vocab_size)
    tokenizer = GPT2Tokenizer.from_pretrained(tmp_path)
    assert len(tokenizer) == vocab_size
    assert max(tokenizer.encode("abc")) < vocab_size


def test_a_server_is_timed_from_its_command_to_its_first_answer(tmp_path):
    server = serve_start.Server("tiny", ["gpt2rt/tiny-gpt2", "--num-threads", "1"], tmp_path / "cache", first=True)
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "old").touch()
    answer = server.run(keep=True)
    assert answer["usage"]["completion_tokens"] == 1
    assert server.seconds[0] > 0
    assert not (tmp_path / "cache" / "old").exists()


def test_a_server_that_does_not_start_says_why(tmp_path, monkeypatch):
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho no such model: $4\nexit 1\n", encoding="ascii")
    python.chmod(0o755)
    monkeypatch.setattr(serve_start.sys, "executable", str(python))
    server = serve_start.Server("bad", ["absent"], tmp_path / "cache")
    with pytest.raises(SystemExit, match=r"(?s)bad did not answer \(exit code 1\).*no such model: absent"):
        server.run(keep=True)


def test_nobody_listening_is_no_answer():
    assert serve_start.ask(serve_start.free_port(), "x") is None


def test_dry_sizes_are_those_of_options():
    assert set(cpu_serving.DRY) <= set(vars(cpu_serving.parse_arguments([])))
    assert isinstance(arguments(), argparse.Namespace)
