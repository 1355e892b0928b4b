"""A small hub on 127.0.0.1: what ``huggingface_hub`` asks of the real one to download and upload files.

Repositories are dictionaries: revision -> {path: bytes}. ``Hub.requests`` records what was asked for, ``Hub.commits``
what was uploaded.
"""

import base64
import hashlib
import http.server
import json
import threading
import urllib.parse


class Hub:
    """A running hub; ``endpoint`` goes into ``HF_ENDPOINT``.

    Args:
        repositories: "user/name" -> {"main": {path: bytes}, other revisions...}.
        tokens: "user/name" -> the token it needs; others are public.
    """

    def __init__(self, repositories, tokens=None):
        self.repositories = repositories
        self.tokens = tokens or {}
        self.requests = []
        self.commits = []
        hub = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_HEAD(self):
                hub.answer(self, body=False)

            def do_GET(self):
                hub.answer(self, body=True)

            def do_POST(self):
                hub.accept(self)

            def log_message(self, *_):
                pass

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True)

    @property
    def endpoint(self):
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *_):
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    @staticmethod
    def commit(repository, revision):
        """The commit hash of a revision: 40 hexadecimal digits."""
        return hashlib.sha1(f"{repository}@{revision}".encode()).hexdigest()

    def downloads(self):
        """Paths whose content was fetched."""
        return [path for method, path in self.requests if method == "GET" and "/resolve/" in path]

    def answer(self, request, body):
        path = urllib.parse.unquote(urllib.parse.urlsplit(request.path).path)
        self.requests.append((request.command, path))
        parts = path.strip("/").split("/")
        name = "/".join(parts[2:4]) if parts[:2] == ["api", "models"] else "/".join(parts[:2])
        repository = self.repositories.get(name)
        sent = request.headers.get("authorization", "")
        allowed = name not in self.tokens or sent == f"Bearer {self.tokens[name]}"
        if repository is None or not allowed:
            # the real hub does not tell strangers whether a private repository exists
            return self._error(request, 401, "RepoNotFound", "Repository not found")
        if parts[:2] == ["api", "models"]:
            return self._info(request, name, repository, parts, body)
        if len(parts) < 5 or parts[2] != "resolve":
            return self._error(request, 404, "EntryNotFound", "Not found")
        revision, file = parts[3], "/".join(parts[4:])
        found = self._revision(name, repository, revision)
        if found is None:
            return self._error(request, 404, "RevisionNotFound", "Invalid rev id")
        commit = self.commit(name, found)
        if file not in repository[found]:
            return self._error(request, 404, "EntryNotFound", "Entry not found", {"X-Repo-Commit": commit})
        data = repository[found][file]
        etag = f'"{hashlib.sha256(data).hexdigest()}"'
        status, first = 200, 0
        if request.headers.get("range"):
            status, first = 206, int(request.headers["range"].removeprefix("bytes=").split("-")[0])
        headers = {"ETag": etag, "X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
        if status == 206:
            headers["Content-Range"] = f"bytes {first}-{len(data) - 1}/{len(data)}"
        return self._send(request, status, headers, data[first:], body)

    def accept(self, request):
        """Uploading: make a repository, say how each file is sent, take a commit of files that travel in its body."""
        path = urllib.parse.unquote(urllib.parse.urlsplit(request.path).path)
        self.requests.append(("POST", path))
        body = self._body(request)
        token = request.headers.get("authorization", "").removeprefix("Bearer ")
        if not token:
            return self._error(request, 401, "", "Invalid username or password.")
        parts = path.strip("/").split("/")
        if parts == ["api", "repos", "create"]:
            made = json.loads(body)
            name = f"{made.get('organization') or 'me'}/{made['name']}"
            if name in self.repositories:
                known = {"url": f"{self.endpoint}/{name}", "error": "You already created this model repo"}
                return self._json(request, known, status=409)
            self.repositories[name] = {"main": {}}
            # newer clients send a visibility
            private = made.get("visibility", "private" if made.get("private") else "public") == "private"
            self.commits.append({"made": name, "private": private, "token": token})
            return self._json(request, {"url": f"{self.endpoint}/{name}", "name": name, "id": name})
        name, action = "/".join(parts[2:4]), parts[4]
        revision = urllib.parse.unquote(parts[5])
        if action == "branch" and name in self.repositories:
            made = self.repositories[name].setdefault(revision, {})
            return self._json(request, {}, status=409 if made else 200)
        if name not in self.repositories or revision not in self.repositories[name]:
            return self._error(request, 404, "RevisionNotFound", "Invalid rev id")
        if action == "preupload":
            asked = json.loads(body)["files"]
            return self._json(
                request, {"files": [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in asked]}
            )
        lines = [json.loads(line) for line in body.splitlines()]
        sent = {
            line["value"]["path"]: base64.b64decode(line["value"]["content"]) for line in lines if line["key"] == "file"
        }
        header = next(line["value"] for line in lines if line["key"] == "header")
        self.repositories[name][revision] = {**self.repositories[name][revision], **sent}
        self.commits.append({"name": name, "revision": revision, "files": sent, "token": token, **header})
        address = f"{self.endpoint}/{name}/commit/1"
        return self._json(request, {"commitOid": self.commit(name, revision), "commitUrl": address})

    @staticmethod
    def _body(request):
        if request.headers.get("transfer-encoding") != "chunked":
            return request.rfile.read(int(request.headers.get("content-length") or 0))
        data = b""
        while size := int(request.rfile.readline().split(b";")[0], 16):
            data += request.rfile.read(size)
            request.rfile.readline()
        request.rfile.readline()
        return data

    def _json(self, request, value, status=200):
        return self._send(request, status, {"Content-Type": "application/json"}, json.dumps(value).encode(), True)

    def _revision(self, name, repository, asked):
        for revision in repository:
            if asked in (revision, self.commit(name, revision)):
                return revision
        return None

    def _info(self, request, name, repository, parts, body):
        asked = parts[5] if len(parts) > 5 and parts[4] == "revision" else "main"
        found = self._revision(name, repository, asked)
        if found is None:
            return self._error(request, 404, "RevisionNotFound", "Invalid rev id")
        siblings = [{"rfilename": file} for file in sorted(repository[found])]
        info = {"id": name, "modelId": name, "sha": self.commit(name, found), "siblings": siblings, "private": False}
        return self._send(request, 200, {"Content-Type": "application/json"}, json.dumps(info).encode(), body)

    def _error(self, request, status, code, message, headers=None):
        extra = {"X-Error-Code": code, "X-Error-Message": message, **(headers or {})}
        return self._send(request, status, extra, message.encode(), request.command != "HEAD")

    @staticmethod
    def _send(request, status, headers, data, body):
        request.send_response(status)
        for key, value in headers.items():
            request.send_header(key, value)
        request.send_header("Content-Length", str(len(data)))
        request.end_headers()
        if body:
            request.wfile.write(data)
