"""``gpt2rt bench latency`` and ``throughput`` with the embedded model."""

import json

import pytest

FAST = ("--threads", "1", "--num-blocks", "64")


def test_latency_as_a_table(run):
    code, out, err = run(
        "bench", "latency", *FAST, "--input-len", 4, "--output-len", 2, "--batch-size", 2, "--num-iters", 2
    )
    assert (code, err) == (0, "")
    assert "2 x (4 tokens in, 2 out), 2 times after 10" in " ".join(out.split())
    assert "99 %" in out


def test_latency_as_json(run, tmp_path):
    path = tmp_path / "folder" / "latency.json"
    sizes = ("--input-len", 4, "--output-len", 2, "--batch-size", 1, "--num-iters", 3, "--num-iters-warmup", 0)
    code, out, _ = run("bench", "latency", *FAST, *sizes, "--json", "--output-json", path)
    assert code == 0
    result = json.loads(out)
    assert set(result) == {"avg_latency", "std_latency", "latencies", "percentiles"}
    assert len(result["latencies"]) == 3
    assert json.loads(path.read_text()) == result


@pytest.mark.parametrize("more", [(), ("--async-engine",)])
def test_throughput(run, more):
    sizes = ("--num-prompts", 5, "--input-len", 6, "--output-len", 3, "--max-num-seqs", 2)
    code, out, err = run("bench", "throughput", *FAST, *sizes, *more, "--json")
    assert (code, err) == (0, "")
    result = json.loads(out)
    assert (result["num_requests"], result["total_output_tokens"], result["total_num_tokens"]) == (5, 15, 45)
    assert ("mean_ttft_ms" in result) == bool(more)
    code, out, _ = run("bench", "throughput", *FAST, *sizes, *more)
    assert code == 0
    assert ("Time to first token" in out) == bool(more)


def test_a_checkpoint_without_its_tokenizers_special_tokens_is_measured_too(run, checkpoint):
    code, out, err = run(
        *("bench", "throughput", "--model", checkpoint, "--threads", 1, "--num-prompts", 2, "--input-len", 8),
        *("--output-len", 4, "--quantization", "int8", "--json"),
    )
    assert (code, err) == (0, "")
    assert json.loads(out)["total_output_tokens"] == 8


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("latency", "--batch-size", "0"), "--batch-size must be at least 1, got 0"),
        (("latency", "--num-iters-warmup", "-1"), "--num-iters-warmup must be at least 0, got -1"),
        (("latency", "--input-len", "500", "--output-len", "100"), "are 600 tokens, but gpt2rt/tiny-gpt2 takes 512"),
        (("latency", "--dtype", "int4"), "--dtype must be one of"),
        (("throughput", "--num-prompts", "0"), "at least one prompt"),
        (("throughput", "--n", "0"), "--n must be at least 1"),
        (("throughput", "--dataset-name", "sharegpt"), "needs a file"),
        (("throughput", "--random-range-ratio", "1"), "below 1"),
    ],
)
def test_wrong_usage(run, one_sentence, arguments, message):
    code, _, err = run("bench", *arguments)
    assert code == 2
    assert message in one_sentence(err)
