"""A Hub on this machine, for the tests: what the clients of Hugging Face ask of the real one, over real HTTP.

    with LoopbackHub() as hub:      hub.endpoint is HF_ENDPOINT; hub.environment() all that a process needs
        …                           hub.repositories["model", "me/x"].files() is what a commit left there

Git is reduced to what can be seen from outside: a repository has refs, a ref names a commit, a commit is a table of paths.
Large files come by the LFS protocol and are answered with 200, or with `redirect` by another origin, as the real Hub's are.
Errors are what the clients branch on: a status, `X-Error-Code` and `X-Error-Message`.

Written from the requests that huggingface_hub 2.4 makes. Not there: Xet, pull requests, discussions, gated repositories.
"""

import base64
import hashlib
import json
import os
import re
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

import yaml


TOKEN = "hf_loopback"
LARGE = re.compile(r"\.(safetensors|parquet|bin|pt|png|jpg|tar|onnx|gz)$")
KINDS = {"models": "model", "datasets": "dataset", "spaces": "space"}
FOLDERS = {"model": "", "dataset": "datasets/", "space": "spaces/"}


class HubError(Exception):
    """An answer that is none of the good ones."""

    def __init__(self, status: int, code: str, message: str, commit: str | None = None):
        self.status, self.code, self.message, self.commit = status, code, message, commit
        super().__init__(message)


@dataclass
class Repository:
    """Commits by id, each a table of files; and the names of some."""

    kind: str
    name: str
    private: bool
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)

    def __post_init__(self):
        self.commit("main", {".gitattributes": b"*.safetensors filter=lfs\n"})

    def commit(self, branch: str, files: dict[str, bytes]) -> str:
        commit = os.urandom(20).hex()  # clients cache what a commit holds: an id is never used twice
        self.commits[commit] = files
        self.branches[branch] = commit
        return commit

    def resolve(self, revision: str) -> str:
        found = {**self.commits.fromkeys(self.commits), **self.branches, **self.tags}
        if revision not in found:
            raise HubError(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return found[revision] or revision

    def files(self, revision: str = "main") -> dict[str, bytes]:
        return self.commits[self.resolve(revision)]


def is_large(path: str, content: bytes) -> bool:
    return bool(content) and (LARGE.search(path) is not None or len(content) > 10 * 2**20)


def git_id(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


class LoopbackHub:
    """The server and what it holds.

    Args:
        redirect: answer large files by a redirect to another origin.

    Attributes:
        repositories: by kind and name.
        objects: large files by their SHA-256.
        requests: method and path of every request.
        cut_after: so many bytes of an upload are read, then the connection is closed; None for all.
    """

    def __init__(self, redirect: bool = False):
        self.redirect = redirect
        self.repositories: dict[tuple[str, str], Repository] = {}
        self.objects: dict[str, bytes] = {}
        self.requests: list[tuple[str, str]] = []
        self.cut_after: int | None = None
        self.lock = threading.RLock()
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), type("Answers", (Answers,), {"hub": self}))
        self.server.daemon_threads = True
        self.port = self.server.server_address[1]
        self.endpoint = f"http://127.0.0.1:{self.port}"

    def __enter__(self) -> "LoopbackHub":
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_) -> None:
        self.server.shutdown()
        self.server.server_close()

    def environment(self, home: os.PathLike | str, token: str | None = TOKEN) -> dict[str, str]:
        """Environment of a process whose Hub this is, with a cache of its own."""
        environment = {name: value for name, value in os.environ.items() if not name.startswith("HF_HUB_OFFLINE")}
        environment |= {"HF_ENDPOINT": self.endpoint, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1"}
        environment |= {
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "NO_PROXY": "127.0.0.1,localhost",
        }
        environment.pop("HF_TOKEN", None)
        return environment | ({"HF_TOKEN": token} if token else {})

    def repository(self, kind: str, name: str, token: str | None) -> Repository:
        found = self.repositories.get((kind, name))
        if found is None or (found.private and token != TOKEN):
            raise HubError(401 if token != TOKEN else 404, "RepoNotFound", f"Repository {name} not found")
        return found


def route(method: str, pattern: str) -> Callable:
    """Marks a method as the answer to requests of this method and path; groups of the path are its arguments."""

    def mark(function: Callable) -> Callable:
        function.route = (method, re.compile(pattern + "$"))
        return function

    return mark


class Answers(BaseHTTPRequestHandler):
    """One connection."""

    protocol_version = "HTTP/1.1"
    hub: LoopbackHub

    def log_message(self, *_) -> None:
        """Quiet."""

    @property
    def token(self) -> str | None:
        return (self.headers.get("Authorization") or "").removeprefix("Bearer ") or None

    def need_token(self) -> None:
        if self.token != TOKEN:
            raise HubError(401, "", "Invalid credentials in Authorization header")

    def answer(self) -> None:
        parts = urlsplit(self.path)
        self.query, path = parse_qs(parts.query), parts.path
        self.hub.requests.append((self.command, path))
        self.body = self.read_body()
        if self.body is None:
            return
        method = "GET" if self.command == "HEAD" else self.command
        try:
            for name in dir(type(self)):
                function = getattr(type(self), name)
                if callable(function) and hasattr(function, "route") and function.route[0] == method:
                    found = function.route[1].match(path)
                    if found:
                        with self.hub.lock:
                            return function(self, *(part and unquote(part) for part in found.groups()))
            raise HubError(404, "", f"no answer to {self.command} {path}")
        except HubError as error:
            headers = {"X-Error-Code": error.code, "X-Error-Message": error.message}
            if error.commit:
                headers["X-Repo-Commit"] = error.commit
            self.send({"error": error.message}, error.status, headers)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = answer

    def read_body(self) -> bytes | None:
        """The body; None after the connection was cut in it."""
        if self.headers.get("Transfer-Encoding") == "chunked":
            parts = []
            while size := int(self.rfile.readline(), 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)
        length = int(self.headers.get("Content-Length") or 0)
        if self.command == "PUT" and self.hub.cut_after is not None and length > self.hub.cut_after:
            self.rfile.read(self.hub.cut_after)
            self.close_connection = True
            self.connection.close()
            return None
        return self.rfile.read(length)

    def send(self, content: object, status: int = 200, headers: dict[str, str] | None = None) -> None:
        """JSON, or bytes as they are."""
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(body))} | (headers or {})).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def named(self, folder: str, name: str, revision: str = "main") -> tuple[Repository, str]:
        repository = self.hub.repository(KINDS[folder], name, self.token)
        return repository, repository.resolve(revision)

    @route("GET", "/api/whoami-v2")
    def whoami(self) -> None:
        self.need_token()
        token = {"type": "access_token", "accessToken": {"displayName": "loopback", "role": "write"}}
        self.send({"type": "user", "name": "me", "fullname": "me", "orgs": [], "auth": token})

    @route("POST", "/api/repos/create")
    def create(self) -> None:
        self.need_token()
        asked = json.loads(self.body)
        kind, name = asked.get("type") or "model", f"{asked.get('organization') or 'me'}/{asked['name']}"
        url = f"{self.hub.endpoint}/{FOLDERS[kind]}{name}"
        if (kind, name) in self.hub.repositories:
            return self.send({"url": url, "error": "You already created this repo"}, 409)
        private = asked.get("private", asked.get("visibility") == "private")
        self.hub.repositories[kind, name] = Repository(kind, name, bool(private))
        self.send({"url": url})

    @route("DELETE", "/api/repos/delete")
    def delete(self) -> None:
        self.need_token()
        asked = json.loads(self.body)
        del self.hub.repositories[asked.get("type") or "model", f"{asked.get('organization') or 'me'}/{asked['name']}"]
        self.send({})

    @route("POST", "/api/validate-yaml")
    def validate_yaml(self) -> None:
        content = json.loads(self.body)["content"]
        try:
            _, front, _ = content.split("---", 2)
            errors = (
                []
                if isinstance(yaml.safe_load(front), dict)
                else [{"message": "the metadata must be keys and values"}]
            )
        except (ValueError, yaml.YAMLError) as error:
            errors = [{"message": str(error)}] if content.startswith("---") else []
        self.send({"errors": errors, "warnings": []}, 400 if errors else 200)

    @route("POST", "/api/(models|datasets|spaces)/([^/]+/[^/]+)/preupload/([^/]+)")
    def preupload(self, folder: str, name: str, revision: str) -> None:
        self.need_token()
        repository, commit = self.named(folder, name, revision)
        present, answers = repository.commits[commit], []
        for file in json.loads(self.body)["files"]:
            sample = base64.b64decode(file["sample"])
            large = bool(file["size"]) and (LARGE.search(file["path"]) is not None or file["size"] > 10 * 2**20)
            content = present.get(file["path"])
            known = (
                None if content is None else sha256(content) if is_large(file["path"], content) else git_id(content)
            )
            assert len(sample) <= 512
            answers.append(
                {
                    "path": file["path"],
                    "uploadMode": "lfs" if large else "regular",
                    "shouldIgnore": False,
                    "oid": known,
                }
            )
        self.send({"files": answers})

    @route("POST", "/(?:(datasets|spaces)/)?([^/]+/[^/]+).git/info/lfs/objects/batch")
    def batch(self, folder: str | None, name: str) -> None:
        self.need_token()
        self.named(folder or "models", name)
        answers = []
        for wanted in json.loads(self.body)["objects"]:
            answer = {"oid": wanted["oid"], "size": wanted["size"]}
            if wanted["oid"] not in self.hub.objects:
                href = f"{self.hub.endpoint}/lfs/{wanted['oid']}"
                answer["actions"] = {"upload": {"href": href, "header": {}}, "verify": {"href": f"{href}/verify"}}
            answers.append(answer)
        self.send({"transfer": "basic", "objects": answers})

    @route("PUT", "/lfs/([0-9a-f]{64})")
    def upload(self, oid: str) -> None:
        if sha256(self.body) != oid:
            raise HubError(422, "", "the upload is not what was announced")
        self.hub.objects[oid] = self.body
        self.send({})

    @route("POST", "/lfs/([0-9a-f]{64})/verify")
    def verify(self, oid: str) -> None:
        if len(self.hub.objects.get(oid, b"")) != json.loads(self.body)["size"]:
            raise HubError(422, "", "the upload is not there")
        self.send({})

    @route("POST", "/api/(models|datasets|spaces)/([^/]+/[^/]+)/commit/([^/]+)")
    def commit(self, folder: str, name: str, revision: str) -> None:
        self.need_token()
        repository, parent = self.named(folder, name, revision)
        files = dict(repository.commits[parent])
        for line in self.body.decode().splitlines():
            change = json.loads(line)
            key, value = change["key"], change["value"]
            if key == "header" and value.get("parentCommit") not in (None, parent):
                raise HubError(412, "", "a commit has happened since")
            if key == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif key == "lfsFile":
                files[value["path"]] = self.hub.objects[value["oid"]]
            elif key == "deletedFile":
                del files[value["path"]]
            elif key == "deletedFolder":
                files = {path: content for path, content in files.items() if not path.startswith(value["path"])}
        commit = repository.commit(revision, files)
        url = f"{self.hub.endpoint}/{FOLDERS[repository.kind]}{name}/commit/{commit}"
        self.send({"success": True, "commitOid": commit, "commitUrl": url})

    @route("GET", "/api/(models|datasets|spaces)/([^/]+/[^/]+?)(?:/revision/([^/]+))?")
    def info(self, folder: str, name: str, revision: str | None) -> None:
        repository, commit = self.named(folder, name, revision or "main")
        files = repository.commits[commit]
        siblings = [{"rfilename": path} | self.about(path, content) for path, content in sorted(files.items())]
        found = {
            "id": name, "modelId": name, "author": "me", "sha": commit, "private": repository.private, "gated": False,
            "disabled": False, "downloads": 0, "likes": 0, "tags": [], "siblings": siblings,
            "lastModified": "2026-11-01T00:00:00.000Z", "createdAt": "2026-11-01T00:00:00.000Z",
        }  # fmt: skip
        readme = files.get("README.md", b"").decode()
        if readme.startswith("---"):
            card = yaml.safe_load(readme.split("---", 2)[1])
            found |= {"cardData": card, "tags": card.get("tags", [])}
            found |= {key: card[key] for key in ("pipeline_tag", "library_name") if key in card}
        self.send(found)

    @staticmethod
    def about(path: str, content: bytes) -> dict:
        found = {"oid": git_id(content), "size": len(content)}
        if is_large(path, content):
            found["lfs"] = {
                "oid": sha256(content),
                "sha256": sha256(content),
                "size": len(content),
                "pointerSize": 134,
            }
        return found

    @route("GET", "/api/(models|datasets|spaces)/([^/]+/[^/]+)/tree/([^/]+)(?:/(.*))?")
    def tree(self, folder: str, name: str, revision: str, below: str | None) -> None:
        repository, commit = self.named(folder, name, revision)
        below = f"{below}/" if below else ""
        recursive = self.query.get("recursive") == ["true"] or self.query.get("recursive") == ["True"]
        entries, folders = [], set()
        for path, content in sorted(repository.commits[commit].items()):
            if not path.startswith(below):
                continue
            parents = path.removeprefix(below).split("/")[:-1]
            folders |= {
                below + "/".join(parents[: depth + 1])
                for depth in range(len(parents) if recursive else min(1, len(parents)))
            }
            if recursive or not parents:
                entries.append({"type": "file", "path": path} | self.about(path, content))
        if below and not entries and not folders:
            raise HubError(404, "EntryNotFound", f"{below} does not exist on {revision}", commit)
        entries += [
            {"type": "directory", "oid": git_id(path.encode()), "size": 0, "path": path} for path in sorted(folders)
        ]
        self.send(entries)

    @route("POST", "/api/(models|datasets|spaces)/([^/]+/[^/]+)/paths-info/([^/]+)")
    def paths_info(self, folder: str, name: str, revision: str) -> None:
        repository, commit = self.named(folder, name, revision)
        files = repository.commits[commit]
        wanted = parse_qs(self.body.decode()).get("paths", [])
        self.send([{"type": "file", "path": path} | self.about(path, files[path]) for path in wanted if path in files])

    @route("GET", "/api/(models|datasets|spaces)/([^/]+/[^/]+)/refs")
    def refs(self, folder: str, name: str) -> None:
        repository, _ = self.named(folder, name)

        def listed(names: dict[str, str], prefix: str) -> list[dict]:
            return [
                {"name": ref, "ref": f"refs/{prefix}/{ref}", "targetCommit": commit} for ref, commit in names.items()
            ]

        branches, tags = listed(repository.branches, "heads"), listed(repository.tags, "tags")
        self.send({"branches": branches, "tags": tags, "converts": [], "pullRequests": []})

    @route("POST", "/api/(models|datasets|spaces)/([^/]+/[^/]+)/(branch|tag)/([^/]+)")
    def new_ref(self, folder: str, name: str, what: str, ref: str) -> None:
        self.need_token()
        asked = json.loads(self.body or b"{}")
        repository, commit = self.named(folder, name, asked.get("startingPoint", "main") if what == "branch" else ref)
        names, new = (repository.branches, ref) if what == "branch" else (repository.tags, asked["tag"])
        if new in names:
            raise HubError(409, "", f"{new} exists")
        names[new] = commit
        self.send({})

    @route("GET", "/cdn/([0-9a-f]{64})")
    def cdn(self, oid: str) -> None:
        self.send_file(self.hub.objects[oid], {"ETag": f'"{oid}"'})

    @route("GET", "/(?:(datasets|spaces)/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)")
    def resolve(self, folder: str | None, name: str, revision: str, path: str) -> None:
        repository, commit = self.named(folder or "models", name, revision)
        content = repository.commits[commit].get(path)
        if content is None:
            raise HubError(404, "EntryNotFound", f"{path} does not exist on {revision}", commit)
        headers = {"X-Repo-Commit": commit, "ETag": f'"{git_id(content)}"'}
        if is_large(path, content):
            oid = sha256(content)
            headers |= {"ETag": f'"{oid}"', "X-Linked-Etag": f'"{oid}"', "X-Linked-Size": str(len(content))}
            if self.hub.redirect:
                self.hub.objects[oid] = content
                location = f"http://localhost:{self.hub.port}/cdn/{oid}"  # not 127.0.0.1: another origin
                return self.send(b"", 302, headers | {"Location": location})
        self.send_file(content, headers)

    def send_file(self, content: bytes, headers: dict[str, str]) -> None:
        """All of a file, or the range that is asked for."""
        headers = headers | {"Accept-Ranges": "bytes", "Content-Type": "application/octet-stream"}
        asked = re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range") or "")
        if asked is None:
            return self.send(content, 200, headers)
        first, last = asked.groups()
        begin = int(first) if first else max(0, len(content) - int(last))
        end = min(int(last) + 1, len(content)) if first and last else len(content)
        if begin >= len(content):
            return self.send(b"", 416, headers | {"Content-Range": f"bytes */{len(content)}"})
        self.send(content[begin:end], 206, headers | {"Content-Range": f"bytes {begin}-{end - 1}/{len(content)}"})
