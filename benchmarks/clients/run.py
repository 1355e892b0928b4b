"""Do the programs that people use with OpenAI-compatible servers work with ``gpt2rt serve``, as they are?

    python benchmarks/clients/run.py                              # in a virtual environment of its own, then removed
    python benchmarks/clients/run.py --venv ~/clients --output-json benchmarks/results/clients.json
    python benchmarks/clients/run.py --venv ~/clients --clients lm_eval,openai

The script makes a virtual environment with the clients, unmodified, from the package index (about 2 GB; with ``--venv``
it is kept and used again), starts ``gpt2rt serve`` with an embedded model on a free port, runs every client against it
without network (``HF_HUB_OFFLINE=1``), and writes what each said:

    openai     openai_client.py: completions plain, streamed, with log-probabilities, of token ids, refused; models,
               embeddings
    langchain  langchain_client.py: langchain-openai's ``OpenAI``, plain, streamed and batched
    lm_eval    a multiple-choice task out of a file that is made here, as ``local-completions``, with the tokenizer's
               files and with the server's own tokenizer; the log-likelihoods of its samples must be those that the
               model gives in this process
    guidellm   a short run of 4 streams on synthetic text

A client has succeeded when it ended with code 0 and its answers hold what this script knows of them.
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import json
import math
import os
import pathlib
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from typing import Any

HERE = pathlib.Path(__file__).resolve().parent
if __name__ == "__main__":
    sys.path.insert(0, str(HERE.parent))

from common import describe, write_json  # noqa: E402 found by the line above

MODEL = "gpt2rt/tiny-gpt2"
# torch first and alone: whatever needs it then takes this one
REQUIREMENTS = (("torch==2.13.0",), ("lm_eval[api]>=0.4.13", "guidellm>=0.8", "langchain-openai>=1.7", "openai"))
PACKAGES = ("openai", "langchain-openai", "lm_eval", "guidellm", "transformers", "torch")
# log-probabilities go over the wire as decimal numbers of float32
TOLERANCE = 2e-4
QUESTIONS = (
    ("The king of England lives in a", (" castle", " bottle", " spoon"), 0),
    ("O Romeo, Romeo! wherefore art thou", (" seven", " Romeo", " under"), 1),
    ("Good morrow, my", (" table", " yellow", " lord"), 2),
    ("To be, or not to", (" be", " cheese", " of"), 0),
    ("The moon shines at", (" four of clubs", " night", " green"), 1),
)
TASK = """task: gpt2rt_words
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
target_delimiter: ""
metric_list:
  - metric: acc
  - metric: acc_norm
"""


class Clients:
    """The virtual environment, and how to run something in it."""

    def __init__(self, folder: pathlib.Path) -> None:
        self.bin = folder / "bin"
        if not (self.bin / "guidellm").exists():
            subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
            pip = [str(self.bin / "python"), "-m", "pip", "install", "--quiet"]
            # the pip that comes with Python may not find a way through so many requirements
            subprocess.run([*pip, "--upgrade", "pip"], check=True)
            for packages in REQUIREMENTS:
                subprocess.run([*pip, *packages], check=True)

    def run(self, program: str, *arguments: str, base_url: str) -> dict[str, Any]:
        """Exit code, seconds, and what a program said."""
        environment = {
            **os.environ,
            "HF_HUB_OFFLINE": "1",
            "HF_DATASETS_OFFLINE": "1",
            "OPENAI_API_KEY": "none",
            "OPENAI_BASE_URL": f"{base_url}/v1",
            "CLIENT_MODEL": MODEL,
        }
        start = time.perf_counter()
        done = subprocess.run(
            [str(self.bin / program), *arguments], env=environment, capture_output=True, text=True, timeout=600
        )
        seconds = time.perf_counter() - start
        # what a program that succeeds writes beside its answers is of no interest, and full of paths
        errors = done.stderr[-4000:] if done.returncode else ""
        return {"code": done.returncode, "seconds": seconds, "stdout": done.stdout, "stderr": errors}

    def versions(self) -> dict[str, str]:
        code = f"import importlib.metadata as m, json; print(json.dumps({{n: m.version(n) for n in {PACKAGES}}}))"
        return json.loads(subprocess.check_output([str(self.bin / "python"), "-c", code], text=True))


@contextlib.contextmanager
def server(log: pathlib.Path) -> Iterator[str]:
    """``gpt2rt serve`` while the block runs: its base URL."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "gpt2rt.cli", "serve", MODEL, "--port", str(port)]
    with open(log, "w", encoding="utf-8") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output)
        try:
            deadline = time.monotonic() + 60.0
            while not healthy(port):
                if process.poll() is not None or time.monotonic() > deadline:
                    raise SystemExit(f"gpt2rt serve did not start:\n{log.read_text(encoding='utf-8')}")
                time.sleep(0.05)
            yield f"http://127.0.0.1:{port}"
        finally:
            process.terminate()
            process.wait()


def healthy(port: int) -> bool:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    try:
        connection.request("GET", "/health")
        return connection.getresponse().status == 200
    except OSError:
        return False
    finally:
        connection.close()


def tokenizer_folder() -> str:
    """Where the embedded model's files are."""
    import gpt2rt

    return str(pathlib.Path(gpt2rt.__file__).parent / "assets" / MODEL.rpartition("/")[2])


# ---- the clients -----------------------------------------------------------------------------------------------------


def run_openai(clients: Clients, base_url: str, folder: pathlib.Path) -> dict[str, Any]:
    return script(clients, base_url, "openai_client.py")


def run_langchain(clients: Clients, base_url: str, folder: pathlib.Path) -> dict[str, Any]:
    return script(clients, base_url, "langchain_client.py")


def script(clients: Clients, base_url: str, name: str) -> dict[str, Any]:
    """A script of this folder: its assertions are the checks, its last line is JSON."""
    said = clients.run("python", str(HERE / name), base_url=base_url)
    lines = said.pop("stdout").strip().splitlines()
    return {**said, "ok": said["code"] == 0, "answers": json.loads(lines[-1]) if lines and said["code"] == 0 else None}


def run_lm_eval(clients: Clients, base_url: str, folder: pathlib.Path) -> dict[str, Any]:
    """Both ways to tokenise; each sample's log-likelihoods beside those of the model in this process."""
    data = folder / "words.jsonl"
    rows = [{"question": q, "choices": list(choices), "answer": answer} for q, choices, answer in QUESTIONS]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    (folder / "words.yaml").write_text(TASK.format(data=data), encoding="utf-8")
    expected = log_likelihoods()
    result: dict[str, Any] = {"ok": True, "runs": {}}
    for backend in ("huggingface", "remote"):
        output = folder / backend
        model_args = f"model={MODEL},base_url={base_url}/v1/completions,num_concurrent=4,max_length=256"
        model_args += f",tokenizer_backend={backend},tokenizer={tokenizer_folder()}"
        said = clients.run(
            "lm_eval",
            *("run", "--model", "local-completions", "--model_args", model_args, "--tasks", "gpt2rt_words"),
            *("--include_path", str(folder), "--batch_size", "4", "--log_samples", "--output_path", str(output)),
            base_url=base_url,
        )
        said.pop("stdout")
        found = samples(output)
        same = len(found) == len(expected) and all(
            math.isclose(mine, theirs, abs_tol=TOLERANCE)
            for row, other in zip(found, expected, strict=True)
            for mine, theirs in zip(row, other, strict=True)
        )
        ok = said["code"] == 0 and same
        accuracy = None
        for path in output.rglob("results_*.json"):
            accuracy = json.loads(path.read_text(encoding="utf-8"))["results"]["gpt2rt_words"]["acc,none"]
        result["runs"][backend] = {**said, "ok": ok, "same_log_likelihoods": same, "accuracy": accuracy}
        result["ok"] &= ok
    return result


def samples(output: pathlib.Path) -> list[list[float]]:
    """The log-likelihoods of the choices of each question, as lm_eval logged them."""
    rows = []
    for path in output.rglob("samples_*.jsonl"):
        rows += [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    rows.sort(key=lambda row: row["doc_id"])
    return [[float(answer[0]) for answer in row["filtered_resps"]] for row in rows]


def log_likelihoods() -> list[list[float]]:
    """The same from the model's own forward pass."""
    import torch

    from gpt2rt import GPT2LMHeadModel
    from gpt2rt.tokenizers import AutoTokenizer

    model, tokenizer = GPT2LMHeadModel.from_pretrained(MODEL).eval(), AutoTokenizer.from_pretrained(MODEL)
    rows = []
    for question, choices, _ in QUESTIONS:
        row = []
        for choice in choices:
            # as lm_eval cuts them
            begin, whole = tokenizer.encode(question), tokenizer.encode(question + choice)
            with torch.no_grad():
                logits = model(torch.tensor([whole])).logits[0]
            steps = logits.log_softmax(-1)[range(len(begin) - 1, len(whole) - 1), whole[len(begin) :]]
            row.append(float(steps.sum()))
        rows.append(row)
    return rows


def run_guidellm(clients: Clients, base_url: str, folder: pathlib.Path) -> dict[str, Any]:
    path = folder / "guidellm.json"
    said = clients.run(
        "guidellm",
        "run",
        *("--backend", f"kind=openai_http,target={base_url},model={MODEL},request_format=/v1/completions"),
        *("--data", "kind=synthetic_text,prompt_tokens=32,output_tokens=16"),
        *("--tokenizer", f"kind=hf_auto,model={tokenizer_folder()}"),
        *("--profile", "kind=concurrent,streams=4", "--constraint", "kind=max_requests,count=40"),
        *("--output", f"kind=json,path={path}", "--disable-progress"),
        base_url=base_url,
    )
    said.pop("stdout")
    answers = guidellm_figures(json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else None
    ok = said["code"] == 0 and answers is not None and answers["successful"] == 40 and answers["errored"] == 0
    return {**said, "ok": ok, "answers": answers}


def guidellm_figures(report: dict[str, Any]) -> dict[str, Any]:
    """Counts, and medians of what it measured of the requests that succeeded."""
    (benchmark,) = report["benchmarks"]
    metrics = benchmark["metrics"]
    names = ("requests_per_second", "output_tokens_per_second", "time_to_first_token_ms", "inter_token_latency_ms")
    return {
        "successful": metrics["request_totals"]["successful"],
        "errored": metrics["request_totals"]["errored"],
        **{name: metrics[name]["successful"]["median"] for name in names},
    }


CLIENTS = {
    "openai": run_openai,
    "langchain": run_langchain,
    "lm_eval": run_lm_eval,
    "guidellm": run_guidellm,
}


def main(texts: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--venv", type=pathlib.Path, help="keep the virtual environment here, or use the one that is")
    parser.add_argument("--clients", default=",".join(CLIENTS), help=f"comma-separated, of {', '.join(CLIENTS)}")
    parser.add_argument("--output-json", type=pathlib.Path)
    arguments = parser.parse_args(texts)
    chosen = arguments.clients.split(",")
    if unknown := set(chosen) - set(CLIENTS):
        parser.error(f"--clients {', '.join(sorted(unknown))}: there are {', '.join(CLIENTS)}")
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        clients = Clients(arguments.venv or folder / "venv")
        result = {"machine": describe(), "model": MODEL, "versions": clients.versions(), "clients": {}}
        with server(folder / "server.log") as base_url:
            for client in chosen:
                (folder / client).mkdir()
                result["clients"][client] = CLIENTS[client](clients, base_url, folder / client)
                print(f"{client}: {'works' if result['clients'][client]['ok'] else 'FAILED'}", flush=True)
        if arguments.output_json:
            write_json(arguments.output_json, result)
    failed = [client for client, said in result["clients"].items() if not said["ok"]]
    for client in failed:
        print(json.dumps(result["clients"][client], indent=1), file=sys.stderr)
    if failed:
        raise SystemExit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
