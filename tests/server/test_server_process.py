"""``gpt2rt serve`` as a process of its own: one line, signals, restarts, and an engine that dies."""

import concurrent.futures
import contextlib
import json
import os
import pathlib
import signal
import subprocess
import sys
import textwrap
import time

import httpx
import pytest
from live_server import events, wait_until

BODY = {"prompt": "ROMEO:", "max_tokens": 400, "ignore_eos": True, "temperature": 0, "stream": True}
# more work than can be done in a minute: what runs is still running when a signal comes
LOAD = {**BODY, "n": 16, "temperature": 1.0, "seed": 1}


class Process:
    """A server; ``facts`` is what its line says."""

    def __init__(self, *arguments, command=("-m", "gpt2rt.cli", "serve", "--json", "--num-threads", "1")):
        # as a terminal or a supervisor starts it: Ctrl-C is not ignored
        self.process = subprocess.Popen(
            [sys.executable, *command, *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", "GPT2RT_LOG": ""},
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        )

    def __enter__(self):
        line = self.process.stdout.readline()
        if not line:
            raise AssertionError(self.process.stderr.read())
        self.facts = json.loads(line)
        self.url = self.facts["url"]
        return self

    def __exit__(self, *_):
        with contextlib.suppress(ProcessLookupError):
            self.process.kill()
        self.process.communicate()

    def send(self, number):
        self.process.send_signal(number)

    def end(self, seconds=20):
        """The exit code, and what was written meanwhile."""
        out, err = self.process.communicate(timeout=seconds)
        return self.process.returncode, out + err

    def stream(self, body=BODY, wait=True):
        """The text of a stream, in a thread: a future, once its first piece has come."""
        pool = concurrent.futures.ThreadPoolExecutor(1)
        begun = concurrent.futures.Future()

        def read():
            text = ""
            with httpx.stream("POST", self.url + "/v1/completions", json=body, timeout=60) as answer:
                for piece in answer.iter_text():
                    text += piece
                    if not begun.done():
                        begun.set_result(None)
            return text

        future = pool.submit(read)
        if wait:
            begun.result(30)
        return future

    def shared_memory(self):
        """What it has in /dev/shm, mapped or open; other processes have theirs there, too."""
        process = pathlib.Path(f"/proc/{self.process.pid}")
        mapped = [line.split(maxsplit=5)[-1] for line in (process / "maps").read_text().splitlines()]
        opened = [os.readlink(link) for link in (process / "fd").iterdir()]
        return [name for name in mapped + opened if name.startswith("/dev/shm/")]

    def refuses(self):
        with pytest.raises(httpx.TransportError):
            httpx.get(self.url + "/health", timeout=5)


@pytest.mark.proves("fault:F57", "L10")
def test_one_line_and_an_end_while_idle():
    with Process("--port", "0", "--max-num-seqs", "4", "--num-blocks", "100") as server:
        facts = server.facts
        assert facts["model"] == ["gpt2rt/tiny-gpt2"]
        assert (facts["max_num_seqs"], facts["num_blocks"], facts["max_num_queued_reqs"]) == (4, 100, 256)
        assert httpx.get(server.url + "/health").status_code == 200
        children = pathlib.Path(f"/proc/{server.process.pid}/task/{server.process.pid}/children").read_text()
        assert children.split() == []
        assert server.shared_memory() == []
        server.send(signal.SIGTERM)
        code, written = server.end()
        assert code == 0, written
        assert "Traceback" not in written
        server.refuses()


@pytest.mark.proves("fault:F57")
def test_streams_end_in_order_when_a_signal_comes():
    with Process("--port", "0") as server:
        known = httpx.post(server.url + "/v1/completions", json={**BODY, "stream": False}, timeout=60).json()
        streams = [server.stream() for _ in range(4)]
        server.send(signal.SIGTERM)
        for stream in streams:
            found = events(stream.result(60))
            assert "".join(event["choices"][0]["text"] for event in found) == known["choices"][0]["text"]
            assert found[-1]["choices"][0]["finish_reason"] == "length"
        code, written = server.end()
        assert code == 0, written
        assert "Traceback" not in written
        server.refuses()


@pytest.mark.proves("fault:F57")
def test_a_second_signal_aborts_streams_and_they_say_so():
    with Process("--port", "0", "--max-num-seqs", "2", "--shutdown-timeout", "60") as server:
        # one that runs, and two that wait for it
        streams = [server.stream(LOAD), server.stream(LOAD, wait=False), server.stream(LOAD, wait=False)]
        waiting = "gpt2rt:num_requests_waiting{"
        wait_until(lambda: _value(httpx.get(server.url + "/metrics").text, waiting) >= 16)
        server.send(signal.SIGTERM)
        time.sleep(0.3)
        assert server.process.poll() is None
        server.send(signal.SIGTERM)
        for stream in streams:
            reasons = [choice["finish_reason"] for event in events(stream.result(60)) for choice in event["choices"]]
            assert "abort" in reasons
            # each choice has one end
            assert len([reason for reason in reasons if reason is not None]) == 16
        code, written = server.end()
        assert code == 0, written
        assert "Traceback" not in written


def _value(text, name):
    return next(float(line.split()[-1]) for line in text.splitlines() if line.startswith(name))


@pytest.mark.proves("fault:F57")
def test_a_killed_server_leaves_nothing_behind():
    with Process("--port", "0") as server:
        stream = server.stream(LOAD)
        # what is not there cannot stay behind
        assert server.shared_memory() == []
        port = server.url.rpartition(":")[2]
        server.send(signal.SIGKILL)
        with pytest.raises(httpx.TransportError):
            stream.result(20)
        server.process.wait(20)
    # the port is free at once
    with Process("--port", port) as again:
        assert again.url == server.url
        assert httpx.get(again.url + "/health").status_code == 200
        # Ctrl-C ends it in order, too
        again.send(signal.SIGINT)
        code, written = again.end()
        assert code == 0, written
        assert "Traceback" not in written


@pytest.mark.proves("fault:F56")
def test_the_process_ends_when_its_engine_dies():
    """A fault in the engine's thread outside of any request: 503, error events, and a code that is not 0."""
    script = textwrap.dedent(
        """
        import json, signal
        from gpt2rt.engine.async_llm import AsyncLLM
        from gpt2rt.server.run import run_server
        from gpt2rt.server.settings import ServerSettings
        from gpt2rt.server.sockets import address, listen

        settings = ServerSettings(port=0, disable_uvicorn_access_log=True)
        engine = AsyncLLM("gpt2rt/tiny-gpt2", num_threads=1)
        bound = listen(settings)

        def die(*_):
            engine._core.step = None

        signal.signal(signal.SIGUSR1, die)
        raise SystemExit(
            run_server(
                engine, settings, bound, lambda: print(json.dumps({"url": address(settings, bound)}), flush=True)
            )
        )
        """
    )
    with Process(command=("-c", script)) as server:
        stream = server.stream(LOAD)
        server.send(signal.SIGUSR1)
        begun = time.monotonic()
        assert events(stream.result(20))[-1]["error"]["code"] == "engine_dead"
        wait_until(lambda: httpx.get(server.url + "/health").status_code == 503, 1)
        code, written = server.end()
        assert code == 1, written
        assert time.monotonic() < begun + 5
        assert "the engine has stopped" in written
