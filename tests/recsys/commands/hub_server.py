"""A stand-in for the Hugging Face Hub: the routes that a push and a pull of a model call.

`python -m tests.recsys.commands.hub_server PORT` serves empty repositories from memory.
"""

import base64
import hashlib
import json
import re
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

COMMIT = "a" * 40


class Hub(ThreadingHTTPServer):
    """`repositories`: content of files by name, by repository. `private` has those made so."""

    def __init__(self, port: int = 0) -> None:
        super().__init__(("127.0.0.1", port), Handler)
        self.repositories: dict[str, dict[str, bytes]] = {}
        self.private: set[str] = set()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    """Answers as the Hub does, for files that it takes as regular ones."""

    server: Hub
    protocol_version = "HTTP/1.1"

    def respond(self, body: bytes, code: int = 200, **headers: str) -> None:
        self.send_response(code)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def respond_json(self, content: object, code: int = 200, **headers: str) -> None:
        self.respond(json.dumps(content).encode(), code, content_type="application/json", **headers)

    def missing(self) -> None:
        self.respond_json({"error": "not found"}, 404, X_Error_Code="RepoNotFound")

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.path == "/api/repos/create":
            request = json.loads(body)
            name = "/".join(filter(None, (request.get("organization"), request["name"])))
            self.server.repositories.setdefault(name, {})
            if request.get("private") or request.get("visibility") == "private":
                self.server.private.add(name)
            return self.respond_json({"url": f"{self.server.url}/{name}"})
        if self.path == "/api/validate-yaml":  # of the card
            return self.respond_json({"errors": [], "warnings": []})
        match = re.fullmatch(r"/api/models/(.+)/(preupload|commit)/main", self.path)
        if match is None or match[1] not in self.server.repositories:
            return self.missing()
        if match[2] == "preupload":
            return self.respond_json(
                {
                    "files": [
                        {"path": file["path"], "uploadMode": "regular", "shouldIgnore": False}
                        for file in json.loads(body)["files"]
                    ]
                }
            )
        for line in body.splitlines():
            entry = json.loads(line)
            if entry["key"] == "file":
                content = base64.b64decode(entry["value"]["content"])
                self.server.repositories[match[1]][entry["value"]["path"]] = content
            elif entry["key"] == "deletedFile":
                del self.server.repositories[match[1]][entry["value"]["path"]]
        url = f"{self.server.url}/{match[1]}/commit/{COMMIT}"
        self.respond_json({"success": True, "commitOid": COMMIT, "commitUrl": url})
        return None

    def do_GET(self) -> None:
        information = re.fullmatch(r"/api/models/(.+?)(/revision/\w+)?(\?.*)?", self.path)
        tree = re.fullmatch(r"/api/models/(.+)/tree/\w+.*", self.path)
        file = re.fullmatch(r"/(.+)/resolve/\w+/(.+)", self.path)
        match = file or tree or information
        files = self.server.repositories.get(match[1]) if match else None
        if match is None or files is None:
            return self.missing()
        if file:
            content = files[file[2]]
            etag = hashlib.sha1(content).hexdigest()
            return self.respond(content, ETag=f'"{etag}"', X_Repo_Commit=COMMIT)
        if tree:
            entries = [
                {"type": "file", "path": name, "size": len(content), "oid": COMMIT}
                for name, content in files.items()
            ]
            return self.respond_json(entries)
        siblings = [{"rfilename": name} for name in files]
        self.respond_json({"id": match[1], "sha": COMMIT, "siblings": siblings})
        return None

    do_HEAD = do_GET

    def log_message(self, format: str, *args: object) -> None:
        pass


if __name__ == "__main__":
    Hub(int(sys.argv[1])).serve_forever()
