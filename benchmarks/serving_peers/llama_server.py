"""llama.cpp's own server, started on a free port, with a stream for every request.

Built from the source that llama-cpp-python ships (measured with 0.3.36): ``cmake -DGGML_NATIVE=ON -DLLAMA_BUILD_UI=OFF
-DLLAMA_USE_PREBUILT_UI=OFF`` in ``vendor/llama.cpp``, target ``llama-server``. It gets a slot for every request, its
other settings are its own; prompts go to it as token ids, and it does not look for common prefixes. Times are those at
which this process reads the events.
"""

from __future__ import annotations

import concurrent.futures
import http.client
import json
import pathlib
import socket
import subprocess
import time

from cpu_peers import llama_cpp_peer

# of the same source
REQUIRES = llama_cpp_peer.REQUIRES
PATIENCE_S = 120.0


class Runner:
    """A running server; ``serve`` answers (tokens of each request, seconds from the start to each of its events)."""

    def __init__(self, checkpoint: str, converted: pathlib.Path, options: dict) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        capacity, threads = options["capacity"], str(options["threads"])
        # one token more than a request has: it stops where a slot is full
        context = capacity * -(-(options["longest"] + 1) // 256) * 256
        command = [options["llama_server"], "-m", str(converted / "model.gguf"), "--port", str(self.port), "--no-ui"]
        command += ["-t", threads, "-tb", threads, "--parallel", str(capacity), "-c", str(context)]
        self.process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        # whose memory is reported
        self.process_id = str(self.process.pid)
        self.pool = concurrent.futures.ThreadPoolExecutor(capacity)
        deadline = time.monotonic() + PATIENCE_S
        while not self._healthy():
            if self.process.poll() is not None or time.monotonic() > deadline:
                self.close()
                raise RuntimeError(f"llama-server did not start: exit code {self.process.returncode}")
            time.sleep(0.1)

    def _healthy(self) -> bool:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=5)
        try:
            connection.request("GET", "/health")
            return connection.getresponse().status == 200
        except OSError:
            return False
        finally:
            connection.close()

    def serve(self, prompts: list[list[int]], new_tokens: list[int]) -> tuple[list[list[int]], list[list[float]]]:
        start = time.perf_counter()
        rows = list(self.pool.map(lambda prompt, count: self._ask(prompt, count, start), prompts, new_tokens))
        return [tokens for tokens, _ in rows], [seconds for _, seconds in rows]

    def _ask(self, prompt: list[int], count: int, start: float) -> tuple[list[int], list[float]]:
        body = {"prompt": prompt, "n_predict": count, "temperature": 0.0, "ignore_eos": True, "cache_prompt": False}
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=600)
        tokens: list[int] = []
        seconds: list[float] = []
        try:
            content = json.dumps({**body, "stream": True, "return_tokens": True})
            connection.request("POST", "/completion", content, {"Content-Type": "application/json"})
            answer = connection.getresponse()
            if answer.status != 200:
                raise RuntimeError(f"llama-server answered {answer.status}: {answer.read(500)!r}")
            for line in answer:
                if line.startswith(b"data:"):
                    found = json.loads(line[5:]).get("tokens")
                    if found:
                        tokens += found
                        seconds.append(time.perf_counter() - start)
        finally:
            connection.close()
        return tokens, seconds

    def close(self) -> None:
        self.pool.shutdown(wait=False, cancel_futures=True)
        self.process.terminate()
        self.process.wait()
