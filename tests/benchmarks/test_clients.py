"""The script that runs other people's clients: what it makes of their answers. They are not installed here."""

import contextlib
import importlib.util
import json
import pathlib
import types

import pytest

from gpt2rt import cli

ROOT = pathlib.Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def clients():
    spec = importlib.util.spec_from_file_location("clients_run", ROOT / "benchmarks" / "clients" / "run.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Programs:
    """Stands for the environment: every program does what ``does`` says, and its command is noted."""

    def __init__(self, does):
        self.does, self.commands = does, []

    def run(self, program, *arguments, base_url):
        self.commands.append((program, *arguments))
        return {"code": 0, "seconds": 1.0, "stdout": self.does(program, arguments) or "", "stderr": ""}


def option(arguments, name):
    return arguments[arguments.index(name) + 1]


def test_the_embedded_models_files_are_where_clients_look(clients):
    folder = pathlib.Path(clients.tokenizer_folder())
    assert (folder / "tokenizer.json").is_file()


def test_log_likelihoods_are_sums_over_the_choice(clients):
    rows = clients.log_likelihoods()
    assert [len(row) for row in rows] == [len(choices) for _, choices, _ in clients.QUESTIONS]
    assert all(value < 0 for row in rows for value in row)


@pytest.mark.parametrize(("shift", "works"), [(0.0, True), (1e-5, True), (1e-2, False)])
def test_lm_evals_log_likelihoods_must_be_the_models(clients, tmp_path, shift, works):
    expected = clients.log_likelihoods()

    def lm_eval(program, arguments):
        assert program == "lm_eval"
        output = pathlib.Path(option(arguments, "--output_path")) / "model"
        output.mkdir(parents=True)
        (output / "results_1.json").write_text(json.dumps({"results": {"gpt2rt_words": {"acc,none": 0.6}}}))
        # not in order
        lines = [
            json.dumps({"doc_id": number, "filtered_resps": [[str(value + shift), "False"] for value in row]})
            for number, row in reversed(list(enumerate(expected)))
        ]
        (output / "samples_gpt2rt_words_1.jsonl").write_text("\n".join(lines) + "\n")

    programs = Programs(lm_eval)
    result = clients.run_lm_eval(programs, "http://host:1", tmp_path)
    assert result["ok"] == works
    assert {name: run["accuracy"] for name, run in result["runs"].items()} == {"huggingface": 0.6, "remote": 0.6}
    assert "base_url=http://host:1/v1/completions" in option(programs.commands[0], "--model_args")
    task = (tmp_path / "words.yaml").read_text()
    assert 'doc_to_text: "{{question}}"' in task
    assert f"test: {tmp_path / 'words.jsonl'}" in task
    rows = [json.loads(line) for line in (tmp_path / "words.jsonl").read_text().splitlines()]
    assert [row["question"] for row in rows] == [question for question, _, _ in clients.QUESTIONS]


def test_lm_eval_without_samples_has_failed(clients, tmp_path):
    assert not clients.run_lm_eval(Programs(lambda *_: None), "http://host:1", tmp_path)["ok"]


@pytest.mark.parametrize(("errored", "works"), [(0, True), (1, False)])
def test_guidellm_must_answer_every_request(clients, tmp_path, errored, works):
    def guidellm(program, arguments):
        path = option(arguments, "--output").partition("path=")[2]
        names = ("requests_per_second", "output_tokens_per_second", "time_to_first_token_ms", "inter_token_latency_ms")
        metrics = {name: {"successful": {"median": 2.0}} for name in names}
        metrics["request_totals"] = {"successful": 40, "errored": errored}
        pathlib.Path(path).write_text(json.dumps({"benchmarks": [{"metrics": metrics}]}))

    result = clients.run_guidellm(Programs(guidellm), "http://host:1", tmp_path)
    assert result["ok"] == works
    assert result["answers"]["time_to_first_token_ms"] == 2.0


def test_a_script_answers_with_its_last_line(clients, tmp_path):
    programs = Programs(lambda *_: 'hello\n{"plain": "x"}\n')
    result = clients.run_openai(programs, "http://host:1", tmp_path)
    assert (result["ok"], result["answers"]) == (True, {"plain": "x"})
    for _, path in programs.commands:
        assert pathlib.Path(path).is_file()


def test_a_server_runs_while_it_is_needed(clients, tmp_path, capsys):
    output = tmp_path / "bench.json"
    with clients.server(tmp_path / "log") as base_url:
        port = int(base_url.rpartition(":")[2])
        assert clients.healthy(port)
        # gpt2rt's own load generator is a client too
        sizes = ["--num-prompts", "6", "--input-len", "9", "--output-len", "4", "--max-concurrency", "3"]
        with pytest.raises(SystemExit) as stopped:
            cli.main(["bench", "serve", "--base-url", base_url, *sizes, "--output-json", str(output)])
    assert stopped.value.code == 0, capsys.readouterr().err
    result = json.loads(output.read_text(encoding="utf-8"))
    assert (result["completed"], result["failed"], result["model_id"]) == (6, 0, clients.MODEL)
    assert (result["total_input_tokens"], result["total_output_tokens"]) == (54, 24)
    assert result["mean_ttft_ms"] > 0
    assert not clients.healthy(port)


def test_a_whole_run_writes_what_everybody_said(clients, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(clients, "Clients", lambda folder: types.SimpleNamespace(versions=lambda: {"openai": "1"}))
    monkeypatch.setattr(clients, "server", lambda log: contextlib.nullcontext("http://host:1"))
    answers = {"openai": True, "guidellm": False}
    for name, works in answers.items():
        monkeypatch.setitem(clients.CLIENTS, name, lambda *_, works=works: {"ok": works})
    output = tmp_path / "clients.json"
    with pytest.raises(SystemExit, match="failed: guidellm"):
        clients.main(["--venv", str(tmp_path), "--clients", "openai,guidellm", "--output-json", str(output)])
    result = json.loads(output.read_text())
    assert result["clients"] == {"openai": {"ok": True}, "guidellm": {"ok": False}}
    assert "openai: works\nguidellm: FAILED\n" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        clients.main(["--clients", "curl"])
