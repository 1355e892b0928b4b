"""``gpt2rt serve``: its flags, their environment variables, and what is refused before a model is loaded."""

import dataclasses
import json
import socket

import pytest

import gpt2rt.server.run
from gpt2rt.server.settings import EngineSettings, ServerSettings


@pytest.fixture
def served(monkeypatch):
    """What a command would serve: [(engine, settings)]; the servers end at once."""
    seen = []

    def run_server(engine, settings, bound, ready):
        seen.append((engine, settings))
        ready()
        bound.close()
        engine.shutdown()
        return 0

    monkeypatch.setattr(gpt2rt.server.run, "run_server", run_server)
    return seen


@pytest.mark.proves("L10")
def test_one_line(run, served):
    code, out, err = run("serve", "--port", "0", "--num-blocks", "40", "--max-num-seqs", "3")
    assert (code, err) == (0, "")
    (line,) = out.splitlines()
    assert line.startswith("http://127.0.0.1:")
    for known in ("gpt2rt/tiny-gpt2", "context 512", "3 running + 256 queued", "40 KV blocks of 16 tokens"):
        assert known in line


def test_flags_reach_engine_and_server(run, served, checkpoint):
    flags = {
        "--served-model-name": "mine",
        "--max-model-len": 32,
        "--max-num-seqs": 2,
        "--max-num-queued-reqs": 5,
        "--num-blocks": 10,
        "--max-n": 3,
        "--max-logprobs": 7,
        "--seed": 9,
        "--executor": "eager",
        "--max-body-bytes": 1000,
        "--request-timeout": 12.5,
        "--api-key": "secret",
        "--host": "0.0.0.0",
        "--chat-template": "{{ messages[0].content }}",
    }
    arguments = [str(part) for pair in flags.items() for part in pair]
    code, out, err = run("serve", checkpoint, "--port", "0", "--json", "--no-enable-prefix-caching", *arguments)
    assert (code, err) == (0, "")
    facts = json.loads(out)
    assert facts["model"] == ["mine"]
    assert (facts["max_model_len"], facts["executor"]) == (32, "eager")
    ((engine, settings),) = served
    config = engine.config
    assert (config.max_num_seqs, config.max_num_queued_reqs, config.num_blocks, config.seed) == (2, 5, 10, 9)
    assert (config.limits.n, config.limits.logprobs, config.enable_prefix_caching) == (3, 7, False)
    assert (settings.max_body_bytes, settings.request_timeout, settings.api_key) == (1000, 12.5, ("secret",))
    assert settings.chat_template == "{{ messages[0].content }}"
    assert "secret" not in out


def test_flags_have_environment_variables(run, served, monkeypatch, tmp_path):
    template = tmp_path / "template.jinja"
    template.write_text("{{ messages[0].content }}", encoding="utf-8")
    for name, value in {
        "GPT2RT_PORT": "0",
        "GPT2RT_MAX_NUM_SEQS": "7",
        "GPT2RT_API_KEY": "one two",
        "GPT2RT_ENABLE_PREFIX_CACHING": "0",
        "GPT2RT_SHUTDOWN_TIMEOUT": "2.5",
        "GPT2RT_CHAT_TEMPLATE": str(template),
        "GPT2RT_NUM_BLOCKS": "20",
    }.items():
        monkeypatch.setenv(name, value)
    # a flag goes before its variable
    code, _, err = run("serve", "--max-num-seqs", "4")
    assert (code, err) == (0, "")
    ((engine, settings),) = served
    assert (engine.config.max_num_seqs, engine.config.num_blocks) == (4, 20)
    assert engine.config.enable_prefix_caching is False
    assert settings.api_key == ("one", "two")
    assert settings.shutdown_timeout == 2.5
    assert settings.chat_template == "{{ messages[0].content }}"


def test_help_names_every_flag(run, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    code, out, _ = run("serve", "--help")
    assert code == 0
    for settings in (ServerSettings, EngineSettings):
        for field in dataclasses.fields(settings):
            assert "--" + field.name.replace("_", "-") in out
            assert field.metadata["help"]
    assert "curl http://127.0.0.1:8000/v1/completions" in out


@pytest.mark.parametrize(
    ("arguments", "known"),
    [
        (["--host", "0.0.0.0"], "--insecure"),
        (["--port", "99999"], "port"),
        (["--max-body-bytes", "0"], "max_body_bytes"),
        (["--request-timeout", "-1"], "request_timeout"),
        (["--ssl-keyfile", "x"], "ssl_certfile"),
        (["--dtype", "float3"], "--dtype"),
        (["--quantization", "int3"], "--quantization"),
        (["--device", "tpu"], "--device"),
        (["--max-num-seqs", "0"], "max_num_seqs"),
        (["--max-logprobs", "1000"], "logprobs"),
        (["--kv-cache-dtype", "int3"], "kv_cache_dtype"),
        (["--num-threads", "-1"], "--threads"),
        (["--chat-template", "no-such-file.jinja"], "--chat-template"),
        (["--surprise"], "--surprise"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else None,
)
def test_wrong_usage(run, one_sentence, served, arguments, known):
    code, out, err = run("serve", "--port", "0", *arguments)
    assert code == 2, err
    assert known in one_sentence(err)
    assert (out, served) == ("", [])


def test_a_port_in_use(run, one_sentence, served):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        code, _, err = run("serve", "no-such-model", "--port", str(port))
    assert code == 1
    # before the model is looked for
    assert f"cannot listen on 127.0.0.1 port {port}" in one_sentence(err)


def test_a_model_that_is_not_there(run, one_sentence, served, tmp_path):
    code, _, err = run("serve", str(tmp_path / "nothing"), "--port", "0", "--local-files-only")
    assert code == 1
    assert "nothing" in one_sentence(err)
    assert served == []


def test_without_the_extra(run, one_sentence, monkeypatch):
    import sys

    for name in [name for name in sys.modules if name.startswith("gpt2rt.server.") and not name.endswith("settings")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "fastapi", None)
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    code, _, err = run("serve", "--port", "0")
    assert code == 1
    assert "pip install 'gpt2rt[serve]'" in one_sentence(err)
