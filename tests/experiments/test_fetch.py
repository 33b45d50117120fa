"""Downloads from a server of the test's own: whole files come through, and of anything else nothing is left."""

import errno
import gzip
import hashlib
import http.server
import io
import os
import random
import sys
import tarfile
import threading
import time

import pooch
import pytest

import experiments.data as data
from experiments.cli.fetch import download_bar
from experiments.data import fetch as fetching
from experiments.data.fetch import fetch
from experiments.data.source import Download, File, Source
from experiments.errors import ConfigError

FILES = {"a.bin": bytes(range(256)) * 4, "b.bin": b"b" * 100, "labels": random.Random(0).randbytes(300)}


def md5(content: bytes) -> str:
    return hashlib.md5(content).hexdigest()


def tar(members: dict[str, bytes]) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w:gz") as archive:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return stream.getvalue()


ARCHIVE = tar({"set/readme.txt": b"read me", "set/b.bin": FILES["b.bin"], "set/a.bin": FILES["a.bin"], "x": b"x"})
LABELS = gzip.compress(FILES["labels"], mtime=0)


class Server(http.server.ThreadingHTTPServer):
    """Serves `replies`, a status, a body and the length that it claims for a path; and notes what it was asked for."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.replies: dict[str, tuple[int, bytes, int | None]] = {}
        self.asked: list[str] = []
        self.delay = 0.0

    def handle_error(self, request, client_address):
        """A client that hangs up is part of the tests."""

    def url(self, path: str) -> str:
        return f"http://127.0.0.1:{self.server_port}{path}"


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.server.asked.append(self.path)
        time.sleep(self.server.delay)
        status, body, length = self.server.replies.get(self.path, (404, b"nothing here", None))
        self.send_response(status)
        if length is not None:
            self.send_header("Content-Length", str(length))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *arguments):
        pass


@pytest.fixture
def server(monkeypatch):
    """The server, and a data set `tiny` on it: an archive at one address, and a gzipped file at two."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with Server() as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        server.replies = {"/set.tar.gz": (200, ARCHIVE, len(ARCHIVE)), "/1/labels.gz": (200, LABELS, len(LABELS))}
        server.replies["/2/labels.gz"] = server.replies["/1/labels.gz"]
        a, b, labels = (File(name, len(content), md5(content)) for name, content in FILES.items())
        downloads = (
            Download((server.url("/set.tar.gz"),), md5(ARCHIVE), (a, b)),
            Download((server.url("/1/labels.gz"), server.url("/2/labels.gz")), md5(LABELS), (labels,)),
        )
        monkeypatch.setitem(data.SOURCES, "tiny", Source("tiny", None, "set", downloads))
        yield server
        server.shutdown()


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


WHOLE = {"set/a.bin": FILES["a.bin"], "set/b.bin": FILES["b.bin"], "set/labels.gz": LABELS}


def test_a_data_set_is_fetched_once(server, tmp_path):
    said = []
    assert fetch("tiny", tmp_path / "new" / "data", said.append) == tmp_path / "new" / "data" / "set"
    assert contents(tmp_path / "new" / "data") == WHOLE
    assert said == [
        f"downloading {server.url('/set.tar.gz')}",
        f"downloading {server.url('/1/labels.gz')}",
        f"tiny is in {tmp_path / 'new' / 'data' / 'set'}",
    ]
    asked, said[:] = list(server.asked), []
    assert fetch("tiny", tmp_path / "new" / "data", said.append) == tmp_path / "new" / "data" / "set"
    assert said == [f"tiny is already there: {tmp_path / 'new' / 'data' / 'set'}"]
    assert server.asked == asked


def test_a_flat_folder_that_has_it_is_there(server, tmp_path):
    for name, content in FILES.items():
        (tmp_path / name).write_bytes(content)
    assert fetch("tiny", tmp_path, lambda _: None) == tmp_path
    assert server.asked == []


@pytest.mark.skipif(os.name != "posix", reason="permissions as POSIX has them")
def test_a_fetched_file_may_be_read_by_others(server, tmp_path):
    folder = fetch("tiny", tmp_path)
    assert {path.stat().st_mode & 0o777 for path in folder.iterdir()} == {0o644}


def test_only_what_is_damaged_is_fetched(server, tmp_path):
    """A damaged plain file would be read in place of the gzipped one that is fetched, so it goes."""
    fetch("tiny", tmp_path)
    (tmp_path / "set" / "labels").write_bytes(b"damaged")
    server.asked.clear()
    fetch("tiny", tmp_path)
    assert server.asked == ["/1/labels.gz"]
    assert contents(tmp_path) == WHOLE


@pytest.mark.parametrize("variable", ["WN_JAX_DATA", "WN_JAX_CACHE"])
def test_the_folder_by_default(variable, server, tmp_path, monkeypatch):
    monkeypatch.delenv("WN_JAX_DATA", raising=False)
    monkeypatch.setenv("WN_JAX_CACHE", str(tmp_path / "other"))
    monkeypatch.setenv(variable, str(tmp_path / "here"))
    assert fetch("tiny") == tmp_path / "here" / "set"


# What a server may do to a file instead of serving it, and how the error tells.
FAILURES = {
    "not found": (lambda body: (404, b"", 0), "HTTP 404 Not Found"),
    "broken": (lambda body: (503, b"", 0), "HTTP 503 Service Unavailable"),
    "cut off": (lambda body: (200, body[:50], len(body)), ": Connection broken: IncompleteRead(50 bytes read, "),
    "short": (lambda body: (200, body[:50], 50), "damaged: MD5 hash of downloaded file"),
    "empty": (lambda body: (200, b"", 0), "damaged: MD5 hash of downloaded file"),
    "corrupted": (lambda body: (200, body[:-1] + b"?", len(body)), "damaged: MD5 hash of downloaded file"),
    "a page": (lambda body: (200, b"<html>Log in</html>", None), "damaged: MD5 hash of downloaded file"),
}


@pytest.mark.parametrize("failure", FAILURES)
def test_a_mirror_that_fails_is_followed_by_the_next(failure, server, tmp_path):
    server.replies["/1/labels.gz"] = FAILURES[failure][0](LABELS)
    fetch("tiny", tmp_path)
    assert contents(tmp_path) == WHOLE
    assert server.asked[-2:] == ["/1/labels.gz", "/2/labels.gz"]


@pytest.mark.parametrize("failure", FAILURES)
def test_no_mirror_serves_a_whole_file(failure, server, tmp_path):
    reply, cause = FAILURES[failure]
    for path in ("/1/labels.gz", "/2/labels.gz"):
        server.replies[path] = reply(LABELS)
    with pytest.raises(ConfigError) as error:
        fetch("tiny", tmp_path)
    first, one, two, last = str(error.value).splitlines()
    assert first == "tiny: labels.gz cannot be downloaded:"
    for line, path in ((one, "/1/labels.gz"), (two, "/2/labels.gz")):
        assert line.startswith(f"  {server.url(path)}: ")
        assert cause in line
    assert last == "try again later, or get the file by other means and set data.dir to the folder with labels"
    assert contents(tmp_path) == {name: content for name, content in WHOLE.items() if name != "set/labels.gz"}


@pytest.mark.parametrize("failure", FAILURES)
def test_an_archive_that_is_not_whole_leaves_nothing(failure, server, tmp_path):
    reply, cause = FAILURES[failure]
    server.replies["/set.tar.gz"] = reply(ARCHIVE)
    with pytest.raises(ConfigError) as error:
        fetch("tiny", tmp_path / "data")
    assert f"{server.url('/set.tar.gz')}: " in str(error.value)
    assert cause in str(error.value)
    assert str(error.value).endswith("set data.dir to the folder with a.bin, b.bin")
    assert list((tmp_path / "data").iterdir()) == []


@pytest.mark.parametrize(
    ("served", "message"),
    [
        (tar({"set/a.bin": FILES["a.bin"]}), "b.bin: no such file"),
        (tar({"set/a.bin": FILES["a.bin"], "set/b.bin": b"b" * 99}), "b.bin: its content has md5 "),
        (b"no archive", "damaged: "),
    ],
)
def test_the_content_is_checked_after_unpacking(served, message, server, tmp_path, monkeypatch):
    """A checksum of the archive that was written down wrong does not let wrong files through."""
    (archive, labels) = data.SOURCES["tiny"].downloads
    downloads = (Download(archive.urls, md5(served), archive.files), labels)
    monkeypatch.setitem(data.SOURCES, "tiny", Source("tiny", None, "set", downloads))
    server.replies["/set.tar.gz"] = (200, served, len(served))
    with pytest.raises(ConfigError) as error:
        fetch("tiny", tmp_path)
    assert message in str(error.value)
    assert list(tmp_path.iterdir()) == []


def test_no_server(server, tmp_path):
    server.shutdown()
    server.server_close()
    with pytest.raises(ConfigError, match=r"set\.tar\.gz: .*Connection refused") as error:
        fetch("tiny", tmp_path)
    assert "ConnectionPool" not in str(error.value)


def test_a_server_that_does_not_answer(server, tmp_path, monkeypatch):
    monkeypatch.setattr(fetching, "_TIMEOUT", 0.05)
    server.delay = 0.5
    with pytest.raises(ConfigError, match=r"set\.tar\.gz: .*[Tt]imed out"):
        fetch("tiny", tmp_path)


def test_a_folder_that_cannot_be(server, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"set: cannot be written: .*make room or get permission, or choose another"):
        fetch("tiny", tmp_path / "file")
    assert server.asked == []


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="everything may be written")
def test_a_folder_without_permission(server, tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(ConfigError, match=r"cannot be written: .*Permission denied"):
        fetch("tiny", tmp_path)
    tmp_path.chmod(0o700)


@pytest.mark.parametrize(
    ("trouble", "raised"),
    [(OSError(errno.ENOSPC, "No space left on device"), ConfigError), (KeyboardInterrupt(), KeyboardInterrupt)],
)
def test_what_stops_a_download_leaves_nothing(trouble, raised, server, tmp_path, monkeypatch):
    class Downloader(pooch.HTTPDownloader):
        def __call__(self, url, output_file, pooch, check_only=False):
            super().__call__(url, output_file, pooch)
            raise trouble

    monkeypatch.setattr(pooch, "HTTPDownloader", Downloader)
    with pytest.raises(raised, match="No space left" if raised is ConfigError else None):
        fetch("tiny", tmp_path)
    assert server.asked == ["/set.tar.gz"]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("terminal", [True, False])
def test_a_progress_bar_is_for_a_terminal(terminal, server, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal, raising=False)
    fetch("tiny", tmp_path, lambda _: None, download_bar)
    printed = capsys.readouterr()
    assert printed.out == ""
    assert ("labels.gz" in printed.err) is terminal


def test_nothing_to_fetch(capsys):
    assert fetch("digits") is None
    assert capsys.readouterr().out == "digits needs no download\n"


def test_an_unknown_data_set():
    with pytest.raises(
        ConfigError, match=r"unknown data set 'cifar' \(did you mean 'cifar10'\?\); data sets: digits, "
    ):
        fetch("cifar")


def test_what_the_data_sets_say_of_their_files():
    for source in data.SOURCES.values():
        assert len({file.name for file in source.files}) == len(source.files)
        for download in source.downloads:
            assert all(url.startswith("https://") and url.endswith(f"/{download.name}") for url in download.urls)
            assert len({len(hashed) for hashed in (download.md5, *(file.md5 for file in download.files))} | {32}) == 1
