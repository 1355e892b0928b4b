"""``gpt2rt score`` prints what ``model.score`` says."""

import json
import re

import pytest

from gpt2rt import GPT2LMHeadModel, GPT2Tokenizer

pytestmark = pytest.mark.proves("N9")
LONG = "the rain in the inner town, " * 8


@pytest.fixture(scope="module")
def expected(checkpoint):
    """``expected(texts, **options)``: the scores, from the model itself."""
    model, tokenizer = GPT2LMHeadModel.from_pretrained(checkpoint), GPT2Tokenizer.from_pretrained(checkpoint)
    return lambda texts, **options: model.score(texts, tokenizer, **options)


def test_files(run, checkpoint, expected, tmp_path):
    (tmp_path / "a.txt").write_text(LONG)
    (tmp_path / "b.txt").write_text("Grüße", encoding="utf-8")
    files = [tmp_path / "a.txt", tmp_path / "b.txt"]
    options = ("-m", checkpoint, "--stride", 5, "--max-length", 32, "--json", "--tokens")
    code, out, err = run("score", *files, *options)
    assert (code, err) == (0, "")
    result, scores = json.loads(out), expected([LONG, "Grüße"], stride=5, max_length=32)
    assert result["perplexity"] == scores.perplexity
    assert result["num_scored"] == sum(scores.num_scored)
    for text, logprob, logprobs, perplexity in zip(
        result["texts"], scores.logprobs, scores.token_logprobs, scores.perplexities, strict=True
    ):
        assert (text["logprob"], text["perplexity"]) == (logprob, perplexity)
        assert [value for _, value in text["tokens"]] == logprobs
        assert text["num_tokens"] == len(logprobs) == text["num_scored"] + 1


def test_lines(run, stdin, checkpoint, expected):
    stdin("the rain\n\na\n")
    code, out, _ = run("score", "-", "--lines", "--add-bos", "-m", checkpoint)
    scores = expected(["the rain", "a"], add_bos=True)
    assert code == 0
    first, second, total = out.splitlines()
    assert first == f"stdin:1: perplexity {scores.perplexities[0]:.4f}, 8 tokens scored, log-probability " + (
        f"{scores.logprobs[0]:.3f} nats"
    )
    assert second.startswith("stdin:3: ")
    assert total.startswith(f"all: perplexity {scores.perplexity:.4f}, 9 tokens scored")


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        ((), 2, "Missing argument"),
        (("nothing.txt",), 2, "nothing.txt is no file"),
        (("-", "--tokens"), 2, "--tokens goes with --json"),
        (("-", "--stride", "0"), 2, "--stride must be at least 1"),
        (("-", "--dtype", "int3"), 2, "--dtype must be one of"),
        (("-", "--stride", "65"), 1, "stride must be an integer from 1 to 64"),
        (("-", "--lines"), 1, "text 1 has a single token and nothing before it"),
    ],
)
def test_what_goes_wrong(run, stdin, one_sentence, checkpoint, arguments, code, message):
    stdin("abc\nd\n")
    found, out, err = run("score", *arguments, "-m", checkpoint)
    assert (found, out) == (code, "")
    assert re.search(message, one_sentence(err))


@pytest.mark.parametrize(("data", "message"), [(b"", "stdin is empty"), (b"\xff", "stdin is not UTF-8")])
def test_no_text(run, stdin, one_sentence, checkpoint, data, message):
    stdin(data)
    code, _, err = run("score", "-", "-m", checkpoint)
    assert code == 2
    assert message in one_sentence(err)
