"""Downloads: hash-checked, resumable, cached; mistakes are one clear line."""

import hashlib
import os
import pickle
import threading
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
    """A server of one file that knows ranges; `server.requests` holds what was asked for."""
    monkeypatch.setenv("ONESTEP_CACHE", str(tmp_path / "cache"))
    requests = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            asked = self.headers.get("Range")
            requests.append(asked)
            start = int(asked.removeprefix("bytes=").rstrip("-")) if asked else 0
            if self.path != "/net.pkl" or start >= len(CONTENT):
                return self.send_error(404 if self.path != "/net.pkl" else 416)
            self.send_response(206 if asked else 200)
            self.send_header("Content-Length", str(len(CONTENT) - start))
            self.end_headers()
            self.wfile.write(CONTENT[start:][: http.limit])

        def log_message(self, *arguments):
            pass

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=http.serve_forever, daemon=True).start()
    http.limit = None
    http.requests, http.address = requests, f"http://127.0.0.1:{http.server_port}/net.pkl"
    yield http
    http.shutdown()
    http.server_close()


def part_of(address):
    return cache_dir() / f"{SHA256[:16]}-net.pkl.part"


def test_a_download_is_cached_and_then_needs_no_network(server):
    path = fetch(server.address, SHA256)
    assert path.read_bytes() == CONTENT
    server.shutdown()
    server.server_close()
    assert fetch(server.address, SHA256) == path
    assert server.requests == [None]


@pytest.mark.parametrize("have", [1000, len(CONTENT)])
def test_an_interrupted_download_goes_on(server, have):
    cache_dir().mkdir(parents=True)
    part_of(server.address).write_bytes(CONTENT[:have])
    assert fetch(server.address, SHA256).read_bytes() == CONTENT
    assert server.requests == [f"bytes={have}-"]


def test_a_broken_connection_loses_nothing(server):
    server.limit = 300_000
    with pytest.raises(UserError, match=r"broke off after 300000 of 1280000 bytes.*run again"):
        fetch(server.address, SHA256)
    server.limit = None
    assert fetch(server.address, SHA256).read_bytes() == CONTENT
    assert server.requests == [None, "bytes=300000-"]


def test_a_wrong_hash_leaves_nothing(server):
    wrong = "0" * 64
    with pytest.raises(UserError, match=f"of sha256 {SHA256}, not {wrong}"):
        fetch(server.address, wrong)
    assert [p for p in cache_dir().iterdir() if p.suffix != ".lock"] == []


def test_mistakes_are_one_line(server, tmp_path):
    with pytest.raises(UserError, match=r"404 Not Found.*or name it as a local file") as caught:
        fetch(server.address + "x", SHA256)
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="needs its sha256"):
        fetch(server.address, None)
    with pytest.raises(UserError, match="does not exist"):
        fetch(str(tmp_path / "none"), None)
    local = tmp_path / "local.pkl"
    local.write_bytes(CONTENT)
    assert fetch(str(local), SHA256) == local
    with pytest.raises(UserError, match="has sha256"):
        fetch(str(local), "0" * 64)


def test_a_damaged_cache_is_noticed(server):
    path = fetch(server.address, SHA256)
    path.write_bytes(CONTENT[:-1])
    with pytest.raises(UserError, match="delete it and run again"):
        fetch(server.address, SHA256)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (pickle.dumps(os.getcwd, 2), "it asks for posix.getcwd, which weights do not need"),
        (pickle.dumps(Fraction, 2), "it asks for fractions.Fraction, which weights do not need"),
        (pickle.dumps(Fraction, 4), "it is damaged or holds other things than weights"),
        (b"no weights", "it is damaged or holds other things than weights"),
        (b"", "it is damaged or holds other things than weights"),
    ],
)
def test_a_foreign_pickle_is_refused_without_a_way_around_it(tmp_path, content, message):
    torch.save({"weight": torch.ones(2)}, tmp_path / "good.pth")
    assert torch.equal(load_pickled(tmp_path / "good.pth")["weight"], torch.ones(2))
    (tmp_path / "bad.pth").write_bytes(content)
    with pytest.raises(pickle.UnpicklingError) as caught:
        load_pickled(tmp_path / "bad.pth")
    assert str(caught.value) == message
