"""Downloads and local files."""

import hashlib
import os
import pickle
import threading
import urllib.error
import urllib.request
from fractions import Fraction
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch

from harness.errors import UserError
from harness.io.downloads import cache_dir, fetch, load_pickled

CONTENT = bytes(range(256)) * 5000
SHA256 = hashlib.sha256(CONTENT).hexdigest()


@pytest.fixture
def server(tmp_path, monkeypatch):
    """A server of one file. `server.requests`: first byte of each request; `server.limit`: bytes
    after which the connection breaks; `server.ranges`: whether the server continues downloads."""
    monkeypatch.setenv("ONESTEP_CACHE", str(tmp_path / "cache"))

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            start = int(self.headers.get("Range", "bytes=0-")[6:-1]) if http.ranges else 0
            http.requests.append(start)
            if self.path != "/net.pkl":
                return self.send_error(404)
            if start >= len(CONTENT):
                return self.send_error(416)
            self.send_response(206 if start else 200)
            self.send_header("Content-Length", str(len(CONTENT) - start))
            self.end_headers()
            self.wfile.write(CONTENT[start : http.limit])

        def log_message(self, *arguments):
            pass

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=http.serve_forever, daemon=True).start()
    http.limit, http.requests, http.ranges = None, [], True
    http.address = f"http://127.0.0.1:{http.server_port}/net.pkl"
    yield http
    http.shutdown()
    http.server_close()


def fails(source, sha256) -> tuple[str, str]:
    with pytest.raises(UserError) as error:
        fetch(str(source), sha256)
    assert "\n" not in str(error.value)
    return error.value.code, str(error.value)


def cached_files() -> list:
    return [path for path in cache_dir().iterdir() if path.suffix != ".lock"]


def test_downloads_are_cached(server):
    path = fetch(server.address, SHA256)
    assert path.read_bytes() == CONTENT and cached_files() == [path]
    server.shutdown()
    server.server_close()
    assert fetch(server.address, SHA256) == path
    assert server.requests == [0]


@pytest.mark.parametrize("ranges", [True, False])
def test_interrupted_download_is_continued(server, ranges):
    server.limit, server.ranges = 300_000, ranges
    code, message = fails(server.address, SHA256)
    assert code == "download" and f"{len(CONTENT) - 300_000} bytes are missing" in message
    assert [path.suffix for path in cached_files()] == [".partial"]
    server.limit = None
    path = fetch(server.address, SHA256)
    assert path.read_bytes() == CONTENT and cached_files() == [path]
    assert server.requests == [0, 300_000 if ranges else 0]


def test_complete_partial_file_is_downloaded_again(server):
    cache_dir().mkdir()
    (cache_dir() / f"{SHA256[:16]}-net.pkl.partial").write_bytes(CONTENT)
    assert fails(server.address, SHA256)[0] == "download"
    assert fetch(server.address, SHA256).read_bytes() == CONTENT


def test_refused_connection_is_no_error_of_the_file_system(server, monkeypatch):
    def refuse(*_, **__):
        raise urllib.error.URLError(PermissionError(13, "Permission denied"))

    monkeypatch.setattr(urllib.request, "urlopen", refuse)
    code, message = fails(server.address, SHA256)
    assert code == "download" and server.address in message and "Permission denied" in message


def test_download_with_another_hash_leaves_nothing(server):
    assert fails(server.address, "0" * 64)[0] == "checksum"
    assert cached_files() == []


def test_unreachable_host_names_file_hash_and_place(server, monkeypatch):
    code, message = fails(server.address + "x", SHA256)
    assert code == "download" and "404" in message and SHA256 in message
    assert str(cache_dir()) in message and "local path" in message
    server.shutdown()
    server.server_close()
    assert fails(server.address, SHA256)[0] == "download"


def test_local_files_are_verified(server, tmp_path):
    assert fails(server.address, None)[0] == "no-checksum"
    assert fails(tmp_path / "none", None)[0] == "missing-file"
    local = tmp_path / "local.pkl"
    local.write_bytes(CONTENT)
    assert fetch(str(local), SHA256) == local
    assert fails(local, "0" * 64)[0] == "checksum"


def test_damaged_cache_is_detected(server):
    path = fetch(server.address, SHA256)
    path.write_bytes(CONTENT[:-1])
    code, message = fails(server.address, SHA256)
    assert code == "checksum" and f"{path}" in message and "delete" in message


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (pickle.dumps(os.getcwd, 2), "it contains posix.getcwd, which is not a tensor"),
        (pickle.dumps(Fraction, 2), "it contains fractions.Fraction, which is not a tensor"),
        (pickle.dumps(Fraction, 4), "it is damaged or contains other objects than tensors"),
        (
            b"<!DOCTYPE html>\n<title>404</title>",
            "it is damaged or contains other objects than tensors",
        ),
        (b"no weights", "it is damaged or contains other objects than tensors"),
        (b"", "it is damaged or contains other objects than tensors"),
    ],
)
def test_pickles_of_other_objects_are_rejected(tmp_path, content, message):
    torch.save({"weight": torch.ones(2)}, tmp_path / "good.pth")
    assert torch.equal(load_pickled(tmp_path / "good.pth")["weight"], torch.ones(2))
    (tmp_path / "bad.pth").write_bytes(content)
    with pytest.raises(pickle.UnpicklingError) as caught:
        load_pickled(tmp_path / "bad.pth")
    assert str(caught.value) == message
