"""Asks ``/health`` of a server every so often, in a process of its own, and prints how long each answer took.

    python benchmarks/server_sections/health_probe.py HOST PORT SECONDS PAUSE     # seconds between questions

Like a supervisor's probe it has nothing to do with those who load the server: a busy client does not delay it. Each
question is a new connection. A JSON line for each: ``[status, seconds]``; status 0 is a connection that failed.
"""

from __future__ import annotations

import http.client
import json
import sys
import time

TIMEOUT_S = 10.0


def ask(host: str, port: int) -> tuple[int, float]:
    """Status and seconds of one question."""
    began = time.perf_counter()
    connection = http.client.HTTPConnection(host, port, timeout=TIMEOUT_S)
    try:
        connection.request("GET", "/health", headers={"Connection": "close"})
        answer = connection.getresponse()
        answer.read()
        status = answer.status
    except (OSError, http.client.HTTPException):
        status = 0
    finally:
        connection.close()
    return status, time.perf_counter() - began


def main(host: str, port: str, seconds: str, pause: str) -> None:
    end = time.perf_counter() + float(seconds)
    due = time.perf_counter()
    while due < end:
        time.sleep(max(0.0, due - time.perf_counter()))
        print(json.dumps(ask(host, int(port))), flush=True)
        # what was missed while it waited for an answer is not made up for
        due = max(due + float(pause), time.perf_counter())


if __name__ == "__main__":
    main(*sys.argv[1:])
