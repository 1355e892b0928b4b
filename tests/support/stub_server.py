"""A server that speaks just enough of the OpenAI API to be measured, and misbehaves on demand."""

import asyncio
import contextlib
import json
import threading


class StubServer:
    """Answers every completion with ``max_tokens`` chunks; as a context manager it listens on ``url``.

    Attributes:
        gap: seconds before each chunk.
        fault: None, or what goes wrong: "refuse" (503), "break" (the connection ends after two chunks), "event" (an
            error in the stream), "silent" (no choices), "nonsense" (no JSON), "garbage" (no HTTP); may be a function of
            the request.
        framing: how a body's end is marked: "chunked", "length" or "close".
        usage: whether the last chunk says how many tokens there were.
        requests: what was asked, in order: (method, path, headers, body).
        connections, peak: connections that were opened; requests that were under way at once, at most.
    """

    def __init__(self, *, gap=0.0, fault=None, framing="chunked", usage=True, close_after=None):
        self.gap, self.fault, self.framing, self.usage, self.close_after = gap, fault, framing, usage, close_after
        self.requests = []
        self.connections = self.running = self.peak = 0

    def __enter__(self):
        ready = threading.Event()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._serve, args=(ready,), daemon=True)
        self._thread.start()
        assert ready.wait(10)
        return self

    def __exit__(self, *_):
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(10)
        self._loop.close()

    def _serve(self, ready):
        async def main():
            self._stop = asyncio.Event()
            server = await asyncio.start_server(self._connection, "127.0.0.1", 0)
            self.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
            ready.set()
            await self._stop.wait()
            server.close()
            for task in asyncio.all_tasks() - {asyncio.current_task()}:
                task.cancel()

        self._loop.run_until_complete(main())

    async def _connection(self, reader, writer):
        self.connections += 1
        served = 0
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
            while (line := await reader.readline()).strip():
                method, path, _ = line.decode().split(" ", 2)
                headers = {}
                while header := (await reader.readline()).decode().strip():
                    name, _, value = header.partition(":")
                    headers[name.lower()] = value.strip()
                data = await reader.readexactly(int(headers.get("content-length", 0)))
                body = json.loads(data) if data else None
                self.requests.append((method, path, headers, body))
                self.running += 1
                self.peak = max(self.peak, self.running)
                try:
                    stays = await self._answer(writer, path, body)
                finally:
                    self.running -= 1
                served += 1
                if not stays or served == self.close_after:
                    break
        writer.close()

    async def _answer(self, writer, path, body):
        if path == "/v1/models":
            return await self._send(writer, 200, [json.dumps({"data": [{"id": "stub"}]}).encode()])
        fault = self.fault(body) if callable(self.fault) else self.fault
        if fault == "refuse":
            return await self._send(writer, 503, [b'{"error": {"message": "too many requests wait"}}'])
        if fault == "garbage":
            writer.write(b"what?\r\n\r\n")
            await writer.drain()
            return False
        chat = path.endswith("/chat/completions")
        count = body["max_completion_tokens" if chat else "max_tokens"]
        return await self._send(writer, 200, self._events(count, chat, fault), broken=fault == "break")

    def _events(self, count, chat, fault):
        # a ping between events, as servers send them
        yield b": ping\n\n"
        for number in range(count):
            text = f" {number}"
            choice = {"index": 0, **({"delta": {"content": text}} if chat else {"text": text})}
            content = {"choices": [] if fault == "silent" else [choice]}
            if number == 1 and fault == "event":
                content = {"error": {"message": "numbers went wrong"}}
            data = b"data: what?\n\n" if fault == "nonsense" else f"data: {json.dumps(content)}\n\n".encode()
            # events need not come in one piece
            yield data[:9]
            yield data[9:]
        if self.usage:
            usage = {"prompt_tokens": 7, "completion_tokens": count}
            yield f"data: {json.dumps({'choices': [], 'usage': usage})}\n\n".encode()
        yield b"data: [DONE]\n\n"

    async def _send(self, writer, status, pieces, *, broken=False):
        head = f"HTTP/1.1 {status} said\r\nContent-Type: text/event-stream\r\n"
        if self.framing == "length":
            data = b"".join(pieces)
            writer.write(f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data)
        else:
            chunked = self.framing == "chunked"
            writer.write(
                (head + ("Transfer-Encoding: chunked\r\n\r\n" if chunked else "Connection: close\r\n\r\n")).encode()
            )
            for number, piece in enumerate(pieces):
                if broken and number == 5:
                    return False
                if piece.startswith(b"data: {"[:9]) and self.gap:
                    await asyncio.sleep(self.gap)
                writer.write(f"{len(piece):x}\r\n".encode() + piece + b"\r\n" if chunked else piece)
                await writer.drain()
            if chunked:
                writer.write(b"0\r\n\r\n")
        await writer.drain()
        return self.framing != "close"
