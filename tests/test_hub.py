"""Repositories of the Hugging Face hub, on a local server."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import huggingface_hub.constants
import pytest

from harness.errors import UserError
from harness.features.base import fetch_from_hub
from harness.io import hub

pytestmark = pytest.mark.contract
COMMIT = "0123456789abcdef0123456789abcdef01234567"
FILES = {"config.json": b"{}", "unet/weights.bin": b"pickle", "unet/weights.safetensors": b"data"}


@pytest.fixture
def server(tmp_path, monkeypatch):
    """A local hub with one repository; `server.requests` are the paths asked for."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self, body=True):
            http.requests.append(self.path)
            content, headers, status = b"", {"X-Repo-Commit": COMMIT}, 200
            file = self.path.partition(f"/resolve/{COMMIT}/")[2]
            if not self.path.lstrip("/").startswith(("api/models/owner/net", "owner/net/")):
                gated = "owner/gated" in self.path
                status, code = (403, "GatedRepo") if gated else (404, "RepoNotFound")
                headers = {"X-Error-Code": code}
            elif COMMIT not in self.path:
                status, headers = 404, {"X-Error-Code": "RevisionNotFound"}
            elif file:
                content = FILES[file]
                headers |= {"ETag": f'"{file.replace("/", "-")}"'}
            elif "/tree/" in self.path:
                facts = [(file, len(data)) for file, data in FILES.items()]
                rows = [{"type": "file", "path": f, "size": n, "oid": "0" * 40} for f, n in facts]
                content = json.dumps(rows).encode()
            else:
                names = [{"rfilename": name} for name in FILES]
                content = json.dumps({"id": "owner/net", "sha": COMMIT, "siblings": names}).encode()
            self.send_response(status)
            for key, value in (headers | {"Content-Length": str(len(content))}).items():
                self.send_header(key, value)
            self.end_headers()
            if body:
                self.wfile.write(content)

        def do_HEAD(self):
            self.do_GET(body=False)

        def log_message(self, *arguments):
            pass

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=http.serve_forever, daemon=True).start()
    http.requests = []
    address, constants = f"http://127.0.0.1:{http.server_port}", huggingface_hub.constants
    monkeypatch.setattr(constants, "ENDPOINT", address)
    template = address + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    yield http
    http.shutdown()
    http.server_close()


def test_a_snapshot_is_downloaded_once_and_read_offline(server, monkeypatch):
    patterns = ["*.json", "*.safetensors"]
    folder = hub.snapshot("owner/net", COMMIT, patterns=patterns)
    names = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert names == {"config.json", "unet/weights.safetensors"}
    assert (folder / "unet/weights.safetensors").read_bytes() == b"data"
    assert hub.cached_snapshot("owner/net", COMMIT) == folder
    server.requests.clear()
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert hub.snapshot("owner/net", COMMIT, patterns=patterns) == folder
    assert server.requests == []


@pytest.mark.parametrize(
    ("repository", "revision", "reason"),
    [
        ("owner/other", COMMIT, "no such model; if it is private, log in with `hf auth login`"),
        ("owner/gated", COMMIT, "accept its terms on its page, then log in with `hf auth login`"),
        ("owner/net", "f" * 40, "the repository has no such commit"),
    ],
)
def test_errors_are_one_line(server, repository, revision, reason):
    with pytest.raises(UserError) as error:
        hub.snapshot(repository, revision)
    name = f"{repository} at {revision[:12]}"
    assert str(error.value) == f"could not download {name} (Hugging Face): {reason}"


def test_a_repository_outside_the_cache_needs_the_network(server, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="not in the cache, and the hub could not be reached"):
        hub.snapshot("owner/net", COMMIT)
    assert hub.cached_snapshot("owner/net", COMMIT) is None


@pytest.mark.parametrize(
    ("source", "revision", "message"),
    [
        (
            "owner/net",
            "main",
            "expected a commit hash (40 hexadecimal digits), not 'main'; the content of branches and tags may change",
        ),
        (
            "folder/with/net",
            COMMIT,
            "not allowed: 'folder/with/net' is not the id of a repository (owner/name)",
        ),
        (
            "https://x/y",
            COMMIT,
            "not allowed: 'https://x/y' is not the id of a repository (owner/name)",
        ),
        ("owner/net", COMMIT, None),
        ("folder/with/net", None, None),
    ],
)
def test_a_revision_is_the_commit_of_a_repository(source, revision, message):
    found = [str(problem) for problem in hub.revision_problems("data", source, revision)]
    assert found == ([f"data.revision: {message}"] if message else [])


def test_weights_that_are_not_in_the_cache_are_named_offline(server, monkeypatch):
    """A pretrained network with HF_HUB_OFFLINE=1."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError) as error:
        fetch_from_hub("timm/resnet18", "model.safetensors", "put a copy at /cache/x")
    message = str(error.value)
    assert error.value.code == "download" and "\n" not in message and server.requests == []
    assert "model.safetensors of timm/resnet18" in message and "/cache/x" in message
