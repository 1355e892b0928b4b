"""``gpt2rt run``: files and pipes in, files and pipes out."""

import csv
import json
import os
import re
import subprocess
import sys

import pytest
import torch

from gpt2rt import (
    GPT2Config,
    GPT2ForQuestionAnswering,
    GPT2ForSequenceClassification,
    GPT2ForTokenClassification,
    GPT2Tokenizer,
    pipeline,
)
from gpt2rt.cli import run as run_module
from gpt2rt.pipelines import supported_tasks

pytestmark = pytest.mark.proves("L8")
TEXTS = ["the rain", "on a mountain", "Grüße"]
GREEDY = ("--set", "max_new_tokens=4", "--set", "do_sample=false")


@pytest.fixture(scope="session")
def save(checkpoint, tmp_path_factory):
    """``save(class, **config)``: the folder of a random model with the tokenizer of bytes."""

    def save(kind, **fields):
        folder = tmp_path_factory.mktemp(kind.__name__)
        torch.manual_seed(1)
        shape = {
            "vocab_size": 257,
            "n_positions": 64,
            "n_embd": 32,
            "n_layer": 2,
            "n_head": 4,
            "initializer_range": 0.3,
        }
        kind(GPT2Config(**shape, **fields)).save_pretrained(folder)
        GPT2Tokenizer.from_pretrained(checkpoint).save_pretrained(folder)
        return str(folder)

    return save


@pytest.fixture(scope="session")
def classifier(save):
    return save(GPT2ForSequenceClassification, id2label={0: "BAD", 1: "GOOD", 2: "Entailment"})


def labels(folder, texts, **options):
    return pipeline("text-classification", folder, device=-1, **options)(texts)


# ---- pipes ---------------------------------------------------------------------------------------------------------


def test_lines_of_a_pipe(run, stdin, checkpoint):
    stdin("\n".join(TEXTS) + "\n")
    code, out, err = run("run", "--task", "text-generation", "-m", checkpoint, *GREEDY)
    assert (code, err) == (0, "")
    expected = pipeline("text-generation", checkpoint, do_sample=False, max_new_tokens=4)(TEXTS)
    assert [json.loads(line) for line in out.splitlines()] == expected
    assert "Grüße" in out


def test_the_default_model_and_batches(run, stdin):
    outs = []
    for batch_size in (1, 3):
        stdin("ROMEO:\r\nJULIET:")
        code, out, _ = run("run", "--task", "text-generation", *GREEDY, "--batch-size", batch_size)
        assert code == 0
        outs.append(out)
    assert outs[0] == outs[1]
    assert json.loads(outs[0].splitlines()[1])[0]["generated_text"].startswith("JULIET:")


def test_tabs_between_arguments(run, stdin, save, classifier):
    folder = save(GPT2ForQuestionAnswering)
    stdin("where?\tthe rain in the town\n")
    code, out, _ = run("run", "--task", "question-answering", "-m", folder)
    assert code == 0
    assert json.loads(out) == pipeline("question-answering", folder)("where?", "the rain in the town")
    stdin("the rain\ton, fire\n")
    code, out, _ = run(
        "run", "--task", "zero-shot-classification", "-m", classifier, "--column", "sequences,candidate_labels"
    )
    assert code == 0
    assert json.loads(out) == pipeline("zero-shot-classification", classifier)("the rain", "on, fire")
    stdin("the rain\tin a town\n")
    code, out, _ = run("run", "--task", "text-classification", "-m", classifier, "--column", "text,text_pair")
    assert code == 0
    assert json.loads(out) == labels(classifier, {"text": "the rain", "text_pair": "in a town"})


def test_a_pipe_into_a_file(run, stdin, classifier, tmp_path):
    target = tmp_path / "labels.jsonl"
    stdin("\n".join(TEXTS))
    code, out, _ = run("run", "--task", "sentiment-analysis", "-m", classifier, "--output", target)
    assert (code, out) == (0, "")
    assert [json.loads(line) for line in target.read_text().splitlines()] == labels(classifier, TEXTS)


def test_results_come_line_by_line(checkpoint):
    command = [sys.executable, "-m", "gpt2rt.cli", "run", "--task", "text-generation", "-m", checkpoint, *GREEDY]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment
    ) as process:
        for text in TEXTS:
            process.stdin.write(f"{text}\n".encode())
            process.stdin.flush()
            # the answer is there before the next line is
            [result] = json.loads(process.stdout.readline())
            assert result["generated_text"].startswith(text)
        # a reader that goes away is no error
        process.stdout.close()
        process.stdin.write(b"more\n")
        process.stdin.close()
        assert process.stderr.read() == b""
    assert process.returncode == 0


# ---- files ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("records", [TEXTS, [{"text": text, "id": 1} for text in TEXTS]], ids=["texts", "objects"])
@pytest.mark.parametrize("lines", [False, True], ids=["json", "jsonl"])
def test_json(run, classifier, tmp_path, records, lines):
    source, target = tmp_path / ("in.jsonl" if lines else "in.json"), tmp_path / "out.json"
    text = "\n".join(map(json.dumps, records)) + "\n\n" if lines else json.dumps(records)
    source.write_text(text)
    arguments = ("run", "--task", "text-classification", "-m", classifier, "--input", source)
    code, out, err = run(*arguments, "--output", target, "--batch-size", 2)
    assert (code, out, err) == (0, "", "")
    assert json.loads(target.read_text()) == labels(classifier, TEXTS)
    # without --output to stdout, in the format of the input
    code, out, _ = run(*arguments)
    assert code == 0
    results = [json.loads(line) for line in out.splitlines()] if lines else json.loads(out)
    assert results == labels(classifier, TEXTS)


def test_csv(run, classifier, tmp_path):
    source, target = tmp_path / "in.csv", tmp_path / "out.csv"
    with source.open("w", newline="", encoding="utf-8-sig") as file:
        writer = csv.writer(file)
        writer.writerows([["id", "review"], *([str(i), text] for i, text in enumerate(TEXTS))])
    arguments = ("run", "--task", "text-classification", "-m", classifier, "--input", source, "--column", "review")
    assert run(*arguments, "--output", target)[0] == 0
    rows = list(csv.DictReader(target.open()))
    assert [(row["label"], float(row["score"])) for row in rows] == [
        (label["label"], label["score"]) for label in labels(classifier, TEXTS)
    ]
    code, out, _ = run(*arguments)
    assert (code, out) == (0, target.read_text())


def test_several_results_become_several_rows(run, save, tmp_path):
    folder = save(GPT2ForTokenClassification, id2label={0: "A", 1: "B"})
    source, target = tmp_path / "in.json", tmp_path / "out.csv"
    source.write_text(json.dumps(TEXTS))
    assert run("run", "--task", "ner", "-m", folder, "--input", source, "--output", target)[0] == 0
    entities = [entity for text in pipeline("ner", folder)(TEXTS) for entity in text]
    assert [row["word"] for row in csv.DictReader(target.open())] == [entity["word"] for entity in entities]


def test_columns_with_names(run, save, tmp_path):
    folder = save(GPT2ForQuestionAnswering)
    source = tmp_path / "in.json"
    source.write_text(json.dumps([{"q": "where?", "c": "the rain in the town"}] * 2))
    code, out, _ = run(
        "run", "--task", "question-answering", "-m", folder, "--input", source, "--column", "question=q,context=c"
    )
    assert code == 0
    answer = pipeline("question-answering", folder)("where?", "the rain in the town")
    assert json.loads(out) == [answer, answer]


def test_files_are_replaced_only_if_asked(run, classifier, tmp_path, one_sentence):
    source, target = tmp_path / "in.json", tmp_path / "out.json"
    source.write_text(json.dumps(TEXTS))
    target.write_text("precious")
    arguments = ("run", "--task", "text-classification", "-m", classifier, "--input", source, "--output", target)
    code, _, err = run(*arguments)
    assert code == 2
    assert "out.json exists already; pass --overwrite" in one_sentence(err)
    # a failure on the way leaves the old file as it was
    source.write_text(json.dumps([*TEXTS, 7]))
    code, _, err = run(*arguments, "--overwrite")
    assert code == 1
    one_sentence(err)
    assert target.read_text() == "precious"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.json", "out.json"]
    source.write_text(json.dumps(TEXTS))
    assert run(*arguments, "--overwrite")[0] == 0
    assert json.loads(target.read_text()) == labels(classifier, TEXTS)


def test_all_tasks_are_known():
    assert list(run_module.TASKS) == supported_tasks()


# ---- what goes wrong -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "Missing option '--task'"),
        (("--task", "fill-mask"), "--task must be one of feature-extraction, ner, .*, got 'fill-mask'"),
        (("--task", "ner"), "--task token-classification has no default model; pass --model"),
        (("--task", "text-generation", "--format", "xml"), "--format must be one of infer, json, csv, pipe"),
        (("--task", "text-generation", "--input", "nothing.json"), "--input nothing.json is no file"),
        (("--task", "text-generation", "--input", "nothing.txt"), "format of nothing.txt cannot be told from its name"),
        (("--task", "text-generation", "--output", "no/such/x.json"), "the folder .*no/such does not exist"),
        (("--task", "text-generation", "--output", ".", "--overwrite"), "--output . is a folder; name the file in it"),
        (("--task", "text-generation", "--device", "moon"), "--device must be cpu, cuda, cuda:N, or a number"),
        (("--task", "text-generation", "--batch-size", "0"), "--batch-size must be at least 1"),
        (("--task", "text-generation", "--dtype", "int3"), "--dtype must be one of"),
        (("--task", "text-generation", "--set", "top_k"), "--set takes NAME=VALUE, got 'top_k'"),
        (("--task", "text-generation", "--set", "frob=1"), "no keyword 'frob'; its own are"),
        (("--task", "text-generation", "--column", "a=,b"), "--column takes NAME, or ARGUMENT=NAME"),
    ],
)
def test_wrong_usage(run, stdin, one_sentence, arguments, message):
    stdin("a\n")
    code, out, err = run("run", *arguments)
    assert (code, out) == (2, "")
    assert re.search(message, one_sentence(err))


@pytest.mark.parametrize(
    ("name", "content", "options", "message"),
    [
        ("in.json", b"[1,", (), "in.json is not JSON"),
        ("in.json", b"[" * 100000, (), "in.json is n"),
        ("in.json", b'{"text": "a"}', (), "holds a dict, expected a list"),
        ("in.json", b'[{"a": "b"}]', (), "entry 1 of .* has the columns 'a', and which one holds the text is unknown"),
        ("in.json", b'[{"a": "b"}]', ("--column", "c"), "entry 1 of .* has no column 'c'; it has 'a'"),
        ("in.json", b'["a"]', ("--column", "text,text_pair"), "is no object with text, text_pair"),
        ("in.json", b"[7]", (), "got int"),
        ("in.jsonl", b'"a"\nb\n', (), "line 2 of .*in.jsonl is not JSON"),
        ("in.jsonl", b'"\xff"\n', (), "line 1 of .*in.jsonl is not UTF-8 text"),
        ("in.csv", b"text\n\xff\n", (), "in.csv is not UTF-8 text"),
        ("in.csv", b"a,b\n1\n", ("--column", "b"), "row 1 of .* has no column 'b'"),
    ],
)
def test_damaged_input(run, one_sentence, classifier, tmp_path, name, content, options, message):
    (tmp_path / name).write_bytes(content)
    arguments = ("run", "--task", "text-classification", "-m", classifier, "--input", tmp_path / name)
    code, _, err = run(*arguments, *options, "--output", tmp_path / "out.json")
    assert code == 1
    assert re.search(message, one_sentence(err))
    assert not (tmp_path / "out.json").exists()


def test_a_file_without_results_writes_nothing(run, classifier, tmp_path):
    (tmp_path / "in.json").write_text("[7]")
    arguments = ("run", "--task", "text-classification", "-m", classifier, "--input", tmp_path / "in.json")
    assert run(*arguments)[:2] == (1, "")
    (tmp_path / "in.json").write_text("[]")
    assert run(*arguments)[:2] == (0, "[]\n")


def test_a_damaged_pipe(run, stdin, classifier, save, one_sentence):
    stdin(b"fine\nb\xffd\n")
    code, out, err = run("run", "--task", "text-classification", "-m", classifier)
    assert code == 1
    assert json.loads(out)["label"] in ("BAD", "GOOD", "Entailment")
    assert "line 2 of stdin is not UTF-8 text (byte 1 of 4)" in one_sentence(err)
    stdin("no tab\n")
    code, _, err = run("run", "--task", "question-answering", "-m", save(GPT2ForQuestionAnswering))
    assert code == 1
    assert "line 1 of stdin has 1 parts between tabs, expected 2: question, context" in one_sentence(err)


def test_a_wrong_model(run, stdin, one_sentence, tmp_path):
    stdin("a\n")
    code, _, err = run("run", "--task", "text-generation", "-m", tmp_path / "nothing")
    assert code == 1
    assert "does not exist" in one_sentence(err)
