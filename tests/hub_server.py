"""A small Hugging Face hub on the loopback, for the real client: repositories in memory, with commits, files and uploads.

Large files are elsewhere, as on the real hub: a file's own address redirects to another host, which must not see the token.
"""

import base64
import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

LARGE = (".safetensors", ".pth")  # kept by their SHA-256, as git-lfs does
TOKEN = "hf_secret"


@dataclass
class Repository:
    """Commits from old to new, each all files by name; names of revisions."""

    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    revisions: dict[str, str] = field(default_factory=dict)
    gated: bool = False
    private: bool = False

    def commit(self, files: dict[str, bytes], revision: str = "main") -> str:
        """Add files to those of the revision, which moves on; its new commit."""
        whole = self.commits.get(self.revisions.get(revision, ""), {}) | files
        number = hashlib.sha1(f"{len(self.commits)}".encode()).hexdigest()
        self.commits[number] = whole
        self.revisions[revision] = number
        return number


class Hub:
    """The server; `requests` lists what it was asked for, as ("GET", "/path", authorization)."""

    def __init__(self):
        self.repositories: dict[str, Repository] = {}
        self.blobs: dict[str, bytes] = {}
        self.requests: list[tuple[str, str, str | None]] = []
        self.broken = False  # answers 503 to everything
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (Handler,), {"hub": self}))
        self.port = self.server.server_address[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.elsewhere = f"http://localhost:{self.port}"
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()

    def add(self, name: str, files: dict[str, bytes], revision: str = "main") -> str:
        return self.repositories.setdefault(name, Repository()).commit(files, revision)

    def files(self, name: str) -> dict[str, bytes]:
        """The newest ones."""
        repository = self.repositories[name]
        return repository.commits[repository.revisions["main"]]

    def stop(self) -> None:
        self.server.shutdown()
        self.server.server_close()


class Handler(BaseHTTPRequestHandler):
    hub: Hub

    def do_HEAD(self) -> None:  # noqa: N802
        self.route()

    do_GET = do_POST = do_PUT = do_HEAD  # noqa: N815

    def log_message(self, *arguments) -> None:
        pass

    def answer(self, status: int, body: bytes = b"", **headers) -> None:
        self.send_response(status)
        headers = {name.replace("_", "-"): value for name, value in headers.items()}
        for name, value in ({"Content-Length": str(len(body))} | headers).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def answer_json(self, values: dict) -> None:
        self.answer(200, json.dumps(values).encode(), Content_Type="application/json")

    def refuse(self, status: int, code: str, **headers) -> None:
        self.answer(status, X_Error_Code=code, X_Error_Message=code, **headers)

    def route(self) -> None:
        path = self.path.partition("?")[0]
        authorization = self.headers.get("Authorization")
        self.hub.requests.append((self.command, path, authorization))
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.hub.broken:
            self.answer(503)
        elif match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            self.resolve(*match.groups())
        elif match := re.fullmatch(r"/large/(\w+)", path):
            assert authorization is None, "the token was sent to another host"
            self.large(match[1], body)
        elif authorization != f"Bearer {TOKEN}":
            self.answer(401, X_Error_Message="Invalid username or password.")
        elif path == "/api/validate-yaml":
            self.answer_json({"errors": [], "warnings": []})
        elif (match := re.fullmatch(r"/api/models/([^/]+/[^/]+)", path)) and self.command == "GET":
            repository = self.hub.repositories.get(match[1])
            if repository is None:
                self.refuse(404, "RepoNotFound")
            else:
                self.answer_json({"id": match[1], "private": repository.private, "siblings": [], "tags": []})
        elif path == "/api/repos/create":
            self.create(json.loads(body))
        elif match := re.fullmatch(r"/api/models/(.+)/preupload/main", path):
            modes = {True: "lfs", False: "regular"}
            paths = [file["path"] for file in json.loads(body)["files"]]
            files = [{"path": p, "uploadMode": modes[p.endswith(LARGE)], "shouldIgnore": False} for p in paths]
            self.answer_json({"files": files})
        elif path.endswith(".git/info/lfs/objects/batch"):
            objects = json.loads(body)["objects"]
            uploads = [{"upload": {"href": f"{self.hub.elsewhere}/large/{entry['oid']}"}} for entry in objects]
            objects = [entry | {"actions": actions} for entry, actions in zip(objects, uploads, strict=True)]
            self.answer_json({"transfer": "basic", "objects": objects})
        elif match := re.fullmatch(r"/api/models/(.+)/commit/main", path):
            self.commit(match[1], [json.loads(line) for line in body.splitlines()])
        else:
            self.answer(404)

    def resolve(self, name: str, revision: str, file: str) -> None:
        """What `name` has at an address such as /owner/name/resolve/main/file."""
        repository = self.hub.repositories.get(name)
        if repository is None:
            return self.refuse(401, "RepoNotFound")
        if repository.gated:
            return self.refuse(401, "GatedRepo")
        commit = repository.revisions.get(revision, revision)
        if commit not in repository.commits:
            return self.refuse(404, "RevisionNotFound")
        contents = repository.commits[commit].get(file)
        if contents is None:
            return self.refuse(404, "EntryNotFound", X_Repo_Commit=commit)
        if not file.endswith(LARGE):
            tag = hashlib.sha1(contents).hexdigest()
            return self.answer(200, contents, ETag=f'"{tag}"', X_Repo_Commit=commit)
        digest = hashlib.sha256(contents).hexdigest()
        self.hub.blobs[digest] = contents
        return self.answer(
            302,
            Location=f"{self.hub.elsewhere}/large/{digest}",
            ETag=f'"{commit}"',
            X_Repo_Commit=commit,
            X_Linked_ETag=f'"{digest}"',
            X_Linked_Size=str(len(contents)),
        )

    def large(self, digest: str, body: bytes) -> None:
        if self.command == "PUT":
            assert hashlib.sha256(body).hexdigest() == digest
            self.hub.blobs[digest] = body
            self.answer(200)
        else:
            self.answer(200, self.hub.blobs[digest])

    def create(self, values: dict) -> None:
        name = f"{values['organization']}/{values['name']}"
        is_private = bool(values.get("private")) or values.get("visibility") == "private"  # by the client's version
        self.hub.repositories.setdefault(name, Repository(private=is_private))
        self.answer_json({"url": f"{self.hub.url}/{name}", "name": name})

    def commit(self, name: str, lines: list[dict]) -> None:
        files = {}
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.hub.blobs[value["oid"]]
        number = self.hub.add(name, files)
        self.answer_json({"commitUrl": f"{self.hub.url}/{name}/commit/{number}", "commitOid": number})
