"""Fetching from a local server that cuts, refuses and lies; unpacking; formats; a full disk."""

import hashlib
import http.server
import io
import json
import os
import random
import re
import shutil
import signal
import stat
import subprocess
import tarfile
import threading
import time
import urllib.parse
import zipfile
from pathlib import Path

import numpy as np
import pytest
import soundfile

import fetching
from audio import AudioError
from command import DISK_FULL, UserError
from fetching import Bar, Damaged


class Server:
    """Files by path on 127.0.0.1, with Range; answers of the Hub where `hub` names datasets.

    `cuts` are numbers of body bytes after which the next answers break off; `statuses` are codes
    that the next answers give instead. `log` holds (path, Range).
    """

    def __init__(self):
        self.files, self.hub, self.gated = {}, {}, set()
        self.cuts, self.statuses, self.log = [], [], []
        self.ranges, self.refusal = True, 403
        outer = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self):
                outer.answer(self)

            do_HEAD = do_GET

            def log_message(self, *_):
                pass

        self.http = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_address[1]}"
        threading.Thread(target=self.http.serve_forever, args=(0.01,), daemon=True).start()

    def answer(self, request):
        path = request.path.partition("?")[0]
        self.log.append((path, request.headers.get("Range", "")))
        if self.statuses:
            return self.send(request, self.statuses.pop(0), b"")
        if path.startswith("/api/datasets/"):
            return self.answer_hub(request, path.removeprefix("/api/datasets/"))
        body = self.files.get(path)
        if "/resolve/" in path and "/".join(path.split("/")[2:4]) in self.gated:
            return self.send(request, self.refusal, b"", [("X-Error-Code", "GatedRepo")])
        if body is None:
            return self.send(request, 404, b"")
        return self.send_file(request, body)

    def send(self, request, status, body, headers=()):
        request.send_response(status)
        for name, value in headers:
            request.send_header(name, value)
        request.send_header("Content-Length", str(len(body)))
        request.end_headers()
        if request.command != "HEAD":
            request.wfile.write(body)

    def send_file(self, request, body):
        etag = f'"{hashlib.md5(body).hexdigest()}"'
        match = re.match(r"bytes=(\d+)-", request.headers.get("Range", ""))
        start = int(match.group(1)) if match and self.ranges else 0
        headers = [("ETag", etag), ("X-Repo-Commit", "0" * 40)]
        if start and start >= len(body):
            return self.send(request, 416, b"", [("Content-Range", f"bytes */{len(body)}")])
        if start:
            headers.append(("Content-Range", f"bytes {start}-{len(body) - 1}/{len(body)}"))
        request.send_response(206 if start else 200)
        for name, value in [*headers, ("Content-Length", str(len(body) - start))]:
            request.send_header(name, value)
        request.end_headers()
        rest = body[start:] if request.command == "GET" else b""
        if rest and self.cuts:
            rest = rest[: self.cuts.pop(0)]
            request.close_connection = True
        request.wfile.write(rest)

    def answer_hub(self, request, path):
        repo = "/".join(path.split("/")[:2])
        rest = path.removeprefix(repo).strip("/")
        if repo in self.gated:
            return self.send(request, self.refusal, b"{}", [("X-Error-Code", "GatedRepo")])
        if rest == "auth-check":
            return self.send(request, 200, b"{}")
        below = urllib.parse.unquote(rest.partition("/")[2].partition("/")[2])
        names = sorted(self.hub.get(repo, {}))
        found = [name for name in names if name.startswith(f"{below}/")] if below else names
        if not found:
            return self.send(request, 404, b"{}", [("X-Error-Code", "EntryNotFound")])
        entries = []
        for name in found:
            body = self.hub[repo][name]
            lfs = {"size": len(body), "oid": hashlib.sha256(body).hexdigest(), "pointerSize": 1}
            entries.append(
                {"type": "file", "path": name, "size": len(body), "oid": "0", "lfs": lfs}
            )
        return self.send(
            request, 200, json.dumps(entries).encode(), [("Content-Type", "application/json")]
        )

    def add_dataset(self, repo, files, revision="main"):
        """Files by path, listed and served as the Hub does."""
        self.hub[repo] = files
        for name, body in files.items():
            quoted = revision.replace("/", "%2F")
            self.files[f"/datasets/{repo}/resolve/{quoted}/{name}"] = body


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr(fetching, "RETRY_S", (0.0,) * 3)
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    made = Server()
    yield made
    made.http.shutdown()
    made.http.server_close()


def noise(size, seed=0):
    return random.Random(seed).randbytes(size)


def md5(body):
    return f"md5:{hashlib.md5(body).hexdigest()}"


def tar_of(files, gz=True):
    """A tar of {name: bytes}."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz" if gz else "w") as archive:
        for name, body in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(body)
            archive.addfile(member, io.BytesIO(body))
    return buffer.getvalue()


def zip_of(files):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, body in files.items():
            archive.writestr(name, body)
    return buffer.getvalue()


def killed(action):
    """Run `action` in a forked process, which must end by SIGKILL."""
    child = os.fork()
    if child == 0:
        try:
            action()
        finally:
            os._exit(1)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL


def asked_of(monkeypatch):
    """The list that all further questions to the disk about names go to, by Python's own calls."""
    asked = []

    def counting(name, call):
        def counted(*args, **more):
            asked.append(f"{name} {args}")
            return call(*args, **more)

        monkeypatch.setattr(os, name, counted)

    for name in ("stat", "lstat", "mkdir", "scandir", "rename", "replace", "unlink", "fsync"):
        counting(name, getattr(os, name))
    return asked


def dies_at(module, name, call):
    """Replace a function by one that kills the process at its `call`-th call. For killed()."""
    original, count = getattr(module, name), [0]

    def counted(*args, **more):
        count[0] += 1
        if count[0] == call:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*args, **more)

    setattr(module, name, counted)


# ---------------------------------------------------------------------------------------- HTTP


def test_twenty_cuts_at_random_bytes_leave_the_very_file(server, tmp_path):
    body = noise(2_000_000)
    server.files["/a.tar"] = body
    draw = random.Random(1)
    server.cuts = [draw.randrange(1, 150_000) for _ in range(20)]
    bar = Bar("a")
    fetching.download(f"{server.url}/a.tar", tmp_path / "a.tar", bar, checksum=md5(body))
    assert (tmp_path / "a.tar").read_bytes() == body
    assert [path.name for path in tmp_path.iterdir()] == ["a.tar"]
    starts = [int(re.search(r"\d+", asked).group()) for _, asked in server.log if asked]
    assert len(server.log) == 21 and starts == sorted(set(starts))
    assert bar.count == len(body)


def test_a_killed_download_goes_on_at_its_last_byte(server, tmp_path):
    body = noise(3_000_000)
    server.files["/a"] = body
    server.cuts = [1_500_000]

    def fetch():
        dies_at(fetching, "_receive", 2)
        fetching.download(f"{server.url}/a", tmp_path / "a", Bar("a"), checksum=md5(body))

    killed(fetch)
    assert (tmp_path / "a.part").stat().st_size == 1_500_000 and not (tmp_path / "a").exists()
    fetching.download(f"{server.url}/a", tmp_path / "a", Bar("a"), checksum=md5(body))
    assert (tmp_path / "a").read_bytes() == body
    assert server.log[-1] == ("/a", "bytes=1500000-")


def test_a_wrong_checksum_is_removed_and_said(server, tmp_path):
    server.files["/a"] = noise(1000)
    for _ in range(2):
        with pytest.raises(UserError, match="md5 .*; run again, or try another --mirror"):
            fetching.download(f"{server.url}/a", tmp_path / "a", Bar("a"), checksum=md5(b"other"))
        assert not list(tmp_path.iterdir())
    right = md5(server.files["/a"])
    fetching.download(f"{server.url}/a", tmp_path / "a", Bar("a"), checksum=right)
    assert (tmp_path / "a").read_bytes() == server.files["/a"]


def test_a_file_that_changed_on_the_server_is_no_mixture(server, tmp_path):
    server.files["/a"] = noise(1000, 2)
    (tmp_path / "a.part").write_bytes(noise(1000, 1)[:400])
    right = md5(noise(1000, 2))
    with pytest.raises(UserError, match="md5 .*; run again"):
        fetching.download(f"{server.url}/a", tmp_path / "a", Bar("a"), checksum=right)
    # One that is shorter now starts over.
    (tmp_path / "a.part").write_bytes(noise(2000, 1))
    bar = Bar("a")
    fetching.download(f"{server.url}/a", tmp_path / "a", bar, checksum=right)
    assert (tmp_path / "a").read_bytes() == noise(1000, 2) and bar.count == 1000


def test_a_server_without_range_starts_over(server, tmp_path):
    server.files["/a"] = noise(1000)
    server.ranges, server.cuts = False, [600]
    fetching.download(f"{server.url}/a", tmp_path / "a", Bar("a"))
    assert (tmp_path / "a").read_bytes() == noise(1000)


def test_a_busy_server_is_asked_again_and_a_missing_file_is_not(server, tmp_path):
    server.files["/a"] = noise(100)
    server.statuses = [503, 429, 500]

    def fetch(name):
        def task():
            fetching.download(f"{server.url}/{name}", tmp_path / name, Bar(name))

        return fetching.side_by_side({name: task}, 1, threading.Event())[name]

    assert fetch("a") is None and len(server.log) == 4
    assert "/b: HTTP 404 Not Found; try another --mirror" in str(fetch("b"))
    assert len(server.log) == 5
    server.files["/c"], server.statuses = noise(100), [500] * 9
    assert re.search("/c: HTTP 500$", str(fetch("c"))) and len(server.log) == 9


def test_no_server_is_one_line(server, tmp_path):
    server.http.server_close()
    with pytest.raises(fetching.Busy, match="http://127.0.0.1:9/a: .*Connection refused$"):
        fetching.download("http://127.0.0.1:9/a", tmp_path / "a", Bar("a"))


def test_an_interrupt_stops_the_others_and_failures_do_not(tmp_path):
    stopped = threading.Event()

    def wait():
        bar = Bar("wait", stopped=stopped)
        while True:
            bar.advance(0)
            time.sleep(0.01)

    def interrupt():
        raise KeyboardInterrupt

    def fail():
        raise UserError("no")

    with pytest.raises(KeyboardInterrupt):
        fetching.side_by_side({"wait": wait, "interrupt": interrupt}, 2, stopped)
    found = fetching.side_by_side({"a": fail, "b": lambda: 1}, 1, threading.Event())
    assert str(found["a"]) == "no" and found["b"] == 1


@pytest.mark.parametrize(
    "error", [OSError(116, "Stale file handle"), TimeoutError("timed out"), fetching.Busy("busy")]
)
def test_a_passing_fault_is_waited_out_and_a_lasting_one_ends_its_own_job(
    monkeypatch, capsys, error
):
    monkeypatch.setattr(fetching, "RETRY_S", (0.0,) * 2)
    tries = []

    def passing():
        tries.append(1)
        if len(tries) < 3:
            raise error
        return "done"

    def lasting():
        raise error

    def bug():
        return {}["nothing"]

    tasks = {"passing": passing, "lasting": lasting, "bug": bug, "fine": lambda: 1}
    found = fetching.side_by_side(tasks, 2, threading.Event())
    assert (found["passing"], found["lasting"], found["fine"]) == ("done", error, 1)
    assert isinstance(found["bug"], KeyError)
    # A bug is not tried again.
    told = capsys.readouterr().err
    assert told.count("passing: ") == 2 and "bug: " not in told


# ------------------------------------------------------------------------------------ archives

FILES = {"a/1.txt": b"one", "a/b/2.txt": noise(5000), "empty": b""}


@pytest.mark.parametrize("kind", ["tar", "tar.gz", "zip"])
def test_archives_are_unpacked_whole(tmp_path, kind):
    body = zip_of(FILES) if kind == "zip" else tar_of(FILES, kind == "tar.gz")
    (tmp_path / "x").write_bytes(body)
    fetching.unpack(tmp_path / "x", tmp_path / "out", Bar("x"))
    found = {
        path.relative_to(tmp_path / "out").as_posix(): path.read_bytes()
        for path in (tmp_path / "out").rglob("*")
        if path.is_file()
    }
    assert found == FILES


@pytest.mark.parametrize("kind", ["tar", "tar.gz", "zip"])
def test_a_cut_or_altered_archive_is_damaged(tmp_path, kind):
    files = {"a": noise(20_000), "b": noise(20_000, 1)}
    body = zip_of(files) if kind == "zip" else tar_of(files, kind == "tar.gz")
    (tmp_path / "cut").write_bytes(body[: len(body) // 2])
    with pytest.raises(Damaged, match="damaged"):
        fetching.unpack(tmp_path / "cut", tmp_path / "out", Bar("x"))
    if kind != "tar":
        altered = bytearray(body)
        altered[len(body) // 2] ^= 255
        (tmp_path / "altered").write_bytes(altered)
        with pytest.raises(Damaged, match="damaged"):
            fetching.unpack(tmp_path / "altered", tmp_path / "out2", Bar("x"))


@pytest.mark.parametrize("name", ["../out.wav", "/etc/out.wav", "a/../../out.wav"])
def test_archive_paths_that_escape_are_refused(tmp_path, name):
    (tmp_path / "in").mkdir()
    for make in (tar_of, zip_of):
        (tmp_path / "x").write_bytes(make({"fine": b"1", name: b"2"}))
        with pytest.raises(UserError, match="outside its folder"):
            fetching.unpack(tmp_path / "x", tmp_path / "in", Bar("x"))
    assert not list(tmp_path.rglob("*.wav")) and not Path("/etc/out.wav").exists()


def test_names_that_no_disk_takes_are_mended_and_none_is_lost(tmp_path):
    long = "న" * 90  # 270 bytes
    files = {f"{long}{n}.wav": bytes([n]) for n in range(2)} | {"caf\udce9.wav": b"x"}
    (tmp_path / "x.tar").write_bytes(tar_of(files))
    fetching.unpack(tmp_path / "x.tar", tmp_path / "out", Bar("x"))
    made = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    assert sorted(made.values()) == [b"\0", b"\1", b"x"]
    assert all(name.endswith(".wav") and len(name.encode()) <= 240 for name in made)


@pytest.mark.parametrize("make", [tar_of, zip_of])
def test_unpacking_asks_the_disk_nothing_about_a_file(tmp_path, monkeypatch, make):
    (tmp_path / "x").write_bytes(make({f"{n % 2}/{n}.bin": b"x" * n for n in range(60)}))
    asked = asked_of(monkeypatch)
    for _ in range(2):
        fetching.unpack(tmp_path / "x", tmp_path / "out", Bar("x"))
    assert not [one for one in asked if ".bin" in one]


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE])
def test_links_and_devices_are_refused(tmp_path, kind):
    member = tarfile.TarInfo("a.wav")
    member.type, member.linkname = kind, "/etc/passwd"
    with tarfile.open(tmp_path / "x.tar", "w") as archive:
        archive.addfile(member)
    with pytest.raises(UserError, match="link or device"):
        fetching.unpack(tmp_path / "x.tar", tmp_path / "in", Bar("x"))
    link = zipfile.ZipInfo("a.wav")
    link.external_attr = (stat.S_IFLNK | 0o777) << 16
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        archive.writestr(link, "/etc/passwd")
    with pytest.raises(UserError, match="link or device"):
        fetching.unpack(tmp_path / "x.zip", tmp_path / "in", Bar("x"))
    assert not (tmp_path / "in").exists()


# --------------------------------------------------------------------------------------- audio


def sine(seconds=0.3, rate=16000, hertz=440.0):
    return 0.5 * np.sin(2 * np.pi * hertz * np.arange(round(seconds * rate)) / rate)


def coded(suffix, seconds=0.3, rate=16000, hertz=440.0):
    """The bytes of a file with a tone in it."""
    formats = {".wav": "WAV", ".flac": "FLAC", ".ogg": "OGG", ".opus": "OGG", ".mp3": "MP3",
               ".aiff": "AIFF"}  # fmt: skip
    buffer = io.BytesIO()
    subtype = {".opus": "OPUS"}.get(suffix)
    soundfile.write(buffer, sine(seconds, rate, hertz), rate, subtype, format=formats[suffix])
    return buffer.getvalue()


@pytest.mark.parametrize("suffix", [".wav", ".flac", ".ogg", ".opus", ".mp3", ".aiff"])
def test_formats_are_told_by_their_bytes(suffix):
    packed, found = fetching.packed(io.BytesIO(coded(suffix)), True)
    assert found == (".flac" if suffix == ".aiff" else suffix)
    assert (packed is None) == (found == suffix)
    pointer = io.BytesIO(b"version https://git-lfs.github.com/spec/v1")
    assert fetching.packed(pointer, True) == (None, "")


@pytest.mark.parametrize("subtype", ["PCM_16", "PCM_24"])
def test_wav_is_packed_without_loss_and_all_else_left_alone(tmp_path, subtype):
    soundfile.write(tmp_path / "b.aiff", sine(), 16000, subtype)
    assert fetching.make_readable(tmp_path / "b.aiff", keep_wav=True)[0] == tmp_path / "b.flac"
    path = tmp_path / "a.wav"
    soundfile.write(path, sine(2.0), 16000, subtype)
    before, _ = soundfile.read(path, dtype="int32")
    size = path.stat().st_size
    assert fetching.make_readable(path, keep_wav=True)[0] == path
    packed = fetching.make_readable(path, keep_wav=False)[0]
    after, rate = soundfile.read(packed, dtype="int32")
    assert packed == tmp_path / "a.flac" and rate == 16000 and not path.exists()
    np.testing.assert_array_equal(after, before)
    assert packed.stat().st_size < size
    assert fetching.make_readable(packed, keep_wav=False)[0] == packed
    soundfile.write(path, sine(), 16000, "FLOAT")
    assert fetching.make_readable(path, keep_wav=False)[0] == path


def aac(seconds=1.0):
    """The bytes of an m4a file with a tone in it."""
    av = pytest.importorskip("av")
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as container:
        stream = container.add_stream("aac", rate=16000, layout="mono")
        frame = av.AudioFrame.from_ndarray(
            sine(seconds).astype(np.float32)[None], format="fltp", layout="mono"
        )
        frame.sample_rate = 16000
        for packet in [*stream.encode(frame), *stream.encode(None)]:
            container.mux(packet)
    return buffer.getvalue()


def test_aac_stays_as_it_is_and_a_cut_one_is_no_audio(tmp_path):
    body = aac()
    (tmp_path / "a.m4a").write_bytes(body)
    path, duration, rate = fetching.make_readable(tmp_path / "a.m4a", keep_wav=False)
    assert path.read_bytes() == body and rate == 16000 and duration == pytest.approx(1.0, abs=0.2)
    (tmp_path / "b.m4a").write_bytes(body[:40])
    with pytest.raises(AudioError):
        fetching.make_readable(tmp_path / "b.m4a", keep_wav=True)


def sphere(samples, coding="pcm", rate=8000):
    """A NIST SPHERE file of int16 `[T, C]` (or of mu-law bytes)."""
    width = 1 if "ulaw" in coding else 2
    lines = [
        "NIST_1A",
        "   1024",
        f"channel_count -i {samples.shape[1]}",
        f"sample_count -i {len(samples)}",
        f"sample_rate -i {rate}",
        f"sample_n_bytes -i {width}",
        f"sample_byte_format {'-s2 01' if width == 2 else '-s1 1'}",
        f"sample_coding -s{len(coding)} {coding}",
        "end_head",
    ]
    return ("\n".join(lines) + "\n").encode().ljust(1024) + samples.tobytes()


def test_sphere_is_read_as_pcm_and_as_mu_law(tmp_path, monkeypatch):
    pcm = np.stack([np.arange(100), -np.arange(100)], axis=1).astype("<i2")
    (tmp_path / "a.sph").write_bytes(sphere(pcm))
    samples, rate = fetching.read_sphere(tmp_path / "a.sph")
    assert rate == 8000
    np.testing.assert_array_equal(samples * 32768, pcm)
    every = np.arange(256, dtype=np.uint8).reshape(128, 2)
    (tmp_path / "u.sph").write_bytes(sphere(every, "ulaw"))
    samples, _ = fetching.read_sphere(tmp_path / "u.sph")
    # libsndfile's own mu-law decoder, over a headerless file of the same bytes.
    (tmp_path / "u.raw").write_bytes(every.tobytes())
    expected, _ = soundfile.read(
        tmp_path / "u.raw", dtype="float32", channels=2, samplerate=8000, format="RAW",
        subtype="ULAW",
    )
    np.testing.assert_array_equal(samples, expected)
    (tmp_path / "s.sph").write_bytes(sphere(pcm, "pcm,embedded-shorten-v2.00"))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match="sph2pipe"):
        fetching.read_sphere(tmp_path / "s.sph")
    (tmp_path / "x.sph").write_bytes(b"RIFF")
    with pytest.raises(AudioError, match="cannot be read as NIST SPHERE"):
        fetching.read_sphere(tmp_path / "x.sph")


# ------------------------------------------------------------------------- Hugging Face datasets


@pytest.fixture
def shard(server):
    """A shard of a small dataset on the server, as it is listed there."""
    server.add_dataset("a/b", {"x/0.parquet": noise(300_000)})
    (found,) = fetching.hub_shards("a/b", "main", ("x",), ".parquet", server.url)
    return found


def test_a_shard_that_is_cut_goes_on_at_its_last_byte(server, shard, tmp_path):
    server.cuts = [100_000]
    bar = Bar("x")
    path = fetching.fetch_shard(shard, tmp_path, bar)
    assert path.read_bytes() == noise(300_000) and bar.count == 300_000
    assert [asked for path, asked in server.log if asked] == ["bytes=100000-"]
    asked = len(server.log)
    assert fetching.fetch_shard(shard, tmp_path, bar) == path and len(server.log) == asked


@pytest.mark.parametrize("status", [401, 403])
def test_a_shard_behind_a_licence_names_its_page_in_one_line(server, shard, tmp_path, status):
    server.gated, server.refusal = {"a/b"}, status
    for ask in (
        lambda: fetching.fetch_shard(shard, tmp_path, Bar("x")),
        lambda: fetching.hub_shards("a/b", "main", ("x",), ".parquet", server.url),
    ):
        with pytest.raises(UserError, match="huggingface.co/datasets/a/b, then `hf auth") as caught:
            ask()
        assert "\n" not in str(caught.value) and not isinstance(caught.value, fetching.Busy)
    assert fetching.licence_page("a/b", server.url) == "https://huggingface.co/datasets/a/b"


def test_a_shard_of_other_bytes_is_fetched_anew(server, shard, tmp_path):
    (path,) = [path for path in server.files if "resolve" in path]
    for size in (300_000, 300_001):
        server.files[path] = noise(size, 1)
        with pytest.raises(UserError, match="x/0.parquet: sha256 .* not .*; run again, or "):
            fetching.fetch_shard(shard, tmp_path, Bar("x"))
    assert not list(tmp_path.iterdir())
    server.files[path] = noise(300_000)
    assert fetching.fetch_shard(shard, tmp_path, Bar("x")).read_bytes() == noise(300_000)


def test_a_hub_that_is_away_is_asked_again_later(server, shard, tmp_path, monkeypatch):
    monkeypatch.setattr(time, "sleep", lambda _: None)
    server.statuses = [503] * 20
    with pytest.raises(fetching.Busy, match="x/0.parquet: HTTP 503"):
        fetching.fetch_shard(shard, tmp_path, Bar("x"))
    for url in (server.url, "http://127.0.0.1:9"):
        with pytest.raises(fetching.Busy, match="a/b: no answer from Hugging Face .*(503|refused)"):
            fetching.hub_shards("a/b", "main", ("x",), ".parquet", url)


def test_an_interrupt_ends_a_shard_in_mid_byte(server, shard, tmp_path):
    stopped = threading.Event()
    bar = Bar("x", stopped=stopped)
    stopped.set()
    with pytest.raises(fetching.Stopped):
        fetching.fetch_shard(shard, tmp_path, bar)


# ------------------------------------------------------------------------------------ full disk


@pytest.fixture
def small_disk(tmp_path):
    """A function that makes or grows a tmpfs of so many KiB; skips where that is not allowed."""
    folder = tmp_path / "small"
    folder.mkdir()

    def sized(kilobytes):
        how = ["-o", f"{'remount,' if os.path.ismount(folder) else ''}size={kilobytes}k"]
        command = ["mount", "-t", "tmpfs", *how, "tmpfs", str(folder)]
        if os.geteuid() or subprocess.run(command, capture_output=True).returncode:
            pytest.skip("needs root and mount")
        return folder

    yield sized
    if os.path.ismount(folder):
        subprocess.run(["umount", "-l", str(folder)], check=True)


def test_an_archive_that_fills_the_disk_is_whole_after_a_second_run(small_disk, tmp_path):
    folder = small_disk(200)
    files = {f"{n}.bin": noise(50_000, n) for n in range(6)}
    (tmp_path / "x.tar").write_bytes(tar_of(files))
    with pytest.raises(OSError) as caught:
        fetching.unpack(tmp_path / "x.tar", folder / "out", Bar("x"))
    assert caught.value.errno in DISK_FULL
    small_disk(2000)
    fetching.unpack(tmp_path / "x.tar", folder / "out", Bar("x"))
    assert {p.name: p.read_bytes() for p in (folder / "out").glob("*.bin")} == files


def test_packing_on_a_full_disk_is_no_damage(small_disk):
    folder = small_disk(200)
    audio = np.random.default_rng(0).uniform(-0.9, 0.9, 60_000)
    soundfile.write(folder / "a.wav", audio, 16000)
    with pytest.raises(OSError) as caught:
        fetching.make_readable(folder / "a.wav", keep_wav=False)[0]
    assert caught.value.errno in DISK_FULL and (folder / "a.wav").exists()
    small_disk(1000)
    assert fetching.make_readable(folder / "a.wav", keep_wav=False)[0].suffix == ".flac"
    shutil.rmtree(folder, ignore_errors=True)
