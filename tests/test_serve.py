"""The server: callers who do as they should, callers who do not, and what the others notice."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request

import numpy as np
import pytest
from test_duplex import FakeClock, FakeCodec, FakeLM
from test_protocols import hostile

import serve
from audio import read_audio
from command import UserError
from duplex import DuplexEngine, load_models
from protocols import to_pcm16
from s2s import Sampling
from serve import TINY

pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")
pytest.importorskip("prometheus_client")
websockets = pytest.importorskip("websockets")

PATCH = 960


def echo_engine(slots: int = 2, **options) -> DuplexEngine:
    """An engine whose agents repeat what they hear, in no time."""
    clock = FakeClock()
    lm = FakeLM(clock)
    lm.tokenizer.decode = lambda ids: "".join(f" w{i}" for i in ids)
    return DuplexEngine(FakeCodec(clock, 0, 0), lm, slots, clock=time.perf_counter, **options)


class Running:
    """A server on a thread, on a free port of this machine."""

    def __init__(self, engine: DuplexEngine, *flags: str):
        self.args = serve.parse_args(["--port", "0", *flags])
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self.listener.getsockname()[1]}"
        self.engine, self.failure, self.ready = engine, None, threading.Event()
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()
        assert self.ready.wait(10)

    def _run(self) -> None:
        async def main():
            self.server = serve.Server(self.engine, self.args)
            self.loop = asyncio.get_running_loop()
            self.ready.set()
            await self.server.run(self.listener)

        try:
            asyncio.run(main())
        except BaseException as error:
            self.failure = error

    def stop(self) -> None:
        with contextlib.suppress(RuntimeError):
            for _ in range(2):
                self.loop.call_soon_threadsafe(self.server.drain)
        self.thread.join(10)
        assert not self.thread.is_alive()


@contextlib.contextmanager
def serving(*flags: str, engine: DuplexEngine | None = None):
    running = Running(engine or echo_engine(), *flags)
    try:
        yield running
    finally:
        running.stop()


def patch(level: float) -> bytes:
    return np.full(PATCH, round(level * 32767), "<i2").tobytes()


async def connect(running: Running, path: str = "/api/pcm", **options):
    # It reads whatever comes, and waits on a busy machine.
    options = {"max_queue": None, "max_size": None, "open_timeout": 60, **options}
    return await websockets.connect(f"ws://{running.address}{path}", **options)


async def until(websocket, kind: str) -> dict:
    """The next event of this kind; others and audio are passed over."""
    while True:
        message = await asyncio.wait_for(websocket.recv(), 10)
        if isinstance(message, str) and json.loads(message)["type"] == kind:
            return json.loads(message)


async def audio(websocket) -> np.ndarray:
    while not isinstance(message := await asyncio.wait_for(websocket.recv(), 10), bytes):
        pass
    return np.frombuffer(message, "<i2") / 32767


async def settled(running: Running, calls: int | None = None, resting: int | None = None) -> None:
    """Once the server has so many calls, of which so many rest."""
    for _ in range(1000):
        now = list(running.server.scheduler.calls.values())
        rest = sum(call.connection is None for call in now)
        if calls in (None, len(now)) and resting in (None, rest):
            return
        await asyncio.sleep(0.01)
    raise AssertionError(f"{len(now)} calls, {rest} rest")


def get(running: Running, path: str, headers: dict | None = None) -> tuple[int, str]:
    request = urllib.request.Request(f"http://{running.address}{path}", headers=headers or {})
    try:
        with urllib.request.urlopen(request, timeout=10) as reply:
            return reply.status, reply.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def test_a_caller_is_answered_patch_by_patch():
    async def call(running):
        async with await connect(running) as websocket:
            ready = await until(websocket, "ready")
            assert ready["sample_rate"] == 24000 and ready["patch_ms"] == 40.0
            for level in (0.25, -0.5, 0.1):
                await websocket.send(patch(level))
                np.testing.assert_allclose(await audio(websocket), level, atol=1e-2)
            await websocket.send(json.dumps({"type": "stop"}))
            assert (await until(websocket, "bye"))["reason"] == "stop"
            await websocket.wait_closed()
            assert websocket.close_code == 1000

    with serving() as running:
        asyncio.run(call(running))


def test_what_one_caller_says_no_other_hears():
    async def calls(running):
        async with await connect(running) as one, await connect(running) as other:
            for level in (0.3, 0.4):
                await one.send(patch(level))
                await other.send(patch(-level))
                np.testing.assert_allclose(await audio(one), level, atol=1e-2)
                np.testing.assert_allclose(await audio(other), -level, atol=1e-2)

    with serving() as running:
        asyncio.run(calls(running))


def test_health_and_metrics():
    with serving("--token", "secret") as running:
        status, body = get(running, "/ping")
        assert status == 200 and json.loads(body) == {"status": "healthy", "calls": 0, "slots": 2}
        assert get(running, "/metrics")[0] == 401
        status, body = get(running, "/metrics", {"Authorization": "Bearer secret"})
        assert status == 200 and "samvad_slots 2.0" in body and "samvad_live_calls 0.0" in body
        assert get(running, "/nothing")[0] == 404


# ------------------------------------------------------------------------------- who may call


@pytest.mark.parametrize(
    ("path", "options", "code"),
    [("/api/pcm?token=secret", {}, None),
     ("/api/pcm", {"additional_headers": {"Authorization": "Bearer secret"}}, None),
     ("/api/pcm", {"additional_headers": {"Authorization": "Basic YTpzZWNyZXQ="}}, None),
     ("/v1/realtime", {"subprotocols": ["realtime", "openai-insecure-api-key.secret"]}, None),
     ("/api/pcm?token=secret&voice_prompt=x", {"origin": "https://samvad.example"}, None),
     ("/api/pcm", {}, 1008), ("/api/pcm?token=Secret", {}, 1008), ("/api/pcm?token=", {}, 1008),
     ("/v1/realtime?token=%ff", {}, 1008), ("/api/chat", {}, 1008),
     ("/api/pcm?token=secret", {"origin": "https://elsewhere.example"}, 1008),
     ("/api/pcm?token=secret", {"origin": "http://[broken"}, 1008)],
)  # fmt: skip
def test_token_and_origin(guarded, path, options, code):
    async def call():
        async with await connect(guarded, path, **options) as websocket:
            if code is None:
                assert await asyncio.wait_for(websocket.recv(), 10)
            else:
                await asyncio.wait_for(websocket.wait_closed(), 10)
                assert websocket.close_code == code

    if "chat" in path:
        pytest.importorskip("sphn")
    asyncio.run(call())


@pytest.fixture(scope="module")
def guarded():
    flags = "--token", "secret", "--allow_origin", "https://samvad.example", "--rejoin_seconds", "0"
    with serving(*flags, engine=echo_engine(16)) as running:
        yield running


def test_a_telephone_gives_its_token_in_the_start_message(guarded, monkeypatch):
    async def call(token: str, code: int) -> None:
        start = {"streamSid": "a", "customParameters": {"token": token}}
        async with await connect(guarded, "/telephone") as websocket:
            await websocket.send(json.dumps({"event": "start", "start": start}))
            await websocket.send(json.dumps({"event": "stop"}))
            await asyncio.wait_for(websocket.wait_closed(), 10)
            assert websocket.close_code == code

    asyncio.run(call("secret", 1000))
    asyncio.run(call("guess", 1008))
    monkeypatch.setattr(serve, "START_SECONDS", 0.2)

    async def silent() -> None:
        async with await connect(guarded, "/telephone") as websocket:
            await asyncio.wait_for(websocket.wait_closed(), 10)
            assert websocket.close_code == 1008

    asyncio.run(silent())


def test_who_comes_when_all_lines_are_busy_is_told_so():
    async def calls(running):
        async with await connect(running) as one, await connect(running) as _:
            await until(one, "ready")
            rest = await asyncio.gather(*(connect(running) for _ in range(200)))
            for websocket in rest:
                assert "all 2 lines are busy" in (await until(websocket, "error"))["message"]
                await websocket.wait_closed()
                assert websocket.close_code == 1013
            await one.send(patch(0.2))  # the others go on
            np.testing.assert_allclose(await audio(one), 0.2, atol=1e-2)
        await settled(running, calls=0)
        async with await connect(running) as later:
            await until(later, "ready")

    with serving() as running:
        asyncio.run(calls(running))


# ---------------------------------------------------------------------------- cut off and back


def drop(websocket) -> None:
    """The connection is gone, without a word."""
    websocket.transport.abort()


def test_who_is_cut_off_comes_back_into_the_same_call():
    async def calls(running):
        websocket = await connect(running)
        call = (await until(websocket, "ready"))["call"]
        await websocket.send(patch(0.2))
        assert (await until(websocket, "text"))["text"] == " w1"
        drop(websocket)
        await settled(running, resting=1)
        async with await connect(running, f"/api/pcm?call={call}") as again:
            ready = await until(again, "ready")
            assert ready["rejoined"] and ready["call"] == call
            await again.send(patch(0.2))
            assert (await until(again, "text"))["text"] == " w2"
            async with await connect(running, f"/v1/realtime?call={call}") as third:
                await third.recv()
                await again.wait_closed()
                assert again.close_code == 4000
        await settled(running, calls=0)
        async with await connect(running, f"/api/pcm?call={call}") as late:
            ready = await until(late, "ready")
            assert not ready["rejoined"] and ready["call"] != call
            await late.send(patch(0.2))
            assert (await until(late, "text"))["text"] == " w1"

    with serving() as running:
        asyncio.run(calls(running))


def test_a_call_nobody_comes_back_to_ends():
    async def calls(running):
        for path in ("/api/pcm", "/telephone"):
            websocket = await connect(running, path)
            if path == "/telephone":
                start = {"event": "start", "start": {"streamSid": "a"}}
                await websocket.send(json.dumps(start))
            await settled(running, calls=1)
            drop(websocket)
            if path == "/api/pcm":
                await settled(running, resting=1)
            await settled(running, calls=0)

    with serving("--rejoin_seconds", "0.5") as running:
        asyncio.run(calls(running))


def test_half_open_connections_end(monkeypatch):
    monkeypatch.setattr(serve, "PING_SECONDS", 0.3)

    async def calls(running):
        reader, writer = await asyncio.open_connection(*running.address.split(":"))
        writer.write(HANDSHAKE % running.address.encode())
        assert b"101" in await reader.readline()
        await settled(running, calls=1)  # and then it answers no ping
        async with await connect(running) as other:
            await settled(running, calls=1)
            await other.send(patch(0.1))
            np.testing.assert_allclose(await audio(other), 0.1, atol=1e-2)
        writer.close()

    with serving("--rejoin_seconds", "0") as running:
        asyncio.run(calls(running))


HANDSHAKE = (
    b"GET /api/pcm HTTP/1.1\r\nHost: %s\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
    b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n\r\n"
)


def test_calls_end_when_idle_or_too_long():
    async def ended(websocket, pings: int) -> tuple[str, float]:
        began = time.monotonic()
        with contextlib.suppress(websockets.ConnectionClosed):
            for _ in range(pings):
                await websocket.send(json.dumps({"type": "ping"}))
                await asyncio.sleep(0.05)
        reason = (await until(websocket, "bye"))["reason"]
        await websocket.wait_closed()
        assert websocket.close_code == 1000
        return reason, time.monotonic() - began

    async def calls(running):
        async with await connect(running) as idle, await connect(running) as busy:
            one, other = await asyncio.gather(ended(idle, 0), ended(busy, 60))
            assert one[0] == "idle" and other[0] == "max_call_seconds" and one[1] < other[1]

    with serving("--idle_seconds", "0.6", "--max_call_seconds", "1.5") as running:
        asyncio.run(calls(running))


# ---------------------------------------------------------------------------- bad behaviour


async def converse(websocket, patches: int) -> None:
    """A caller as they should be, who loses nothing, whatever the others do."""
    for index in range(patches):
        level = 0.1 + index % 5 / 10
        await websocket.send(patch(level))
        np.testing.assert_allclose(await audio(websocket), level, atol=1e-2)
        await asyncio.sleep(0.02)


def test_who_sends_ten_times_too_fast_loses_it_and_others_lose_nothing():
    async def calls(running):
        async with await connect(running) as fast, await connect(running) as good:
            await until(fast, "ready")
            talk = asyncio.create_task(converse(good, 40))
            heard, lost = 0, 0
            for _ in range(20):
                await fast.send(patch(0.5) * 20)
                await asyncio.sleep(0.05)
            await talk
            with contextlib.suppress(asyncio.TimeoutError):
                while True:
                    message = await asyncio.wait_for(fast.recv(), 0.5)
                    heard += isinstance(message, bytes)
                    event = {} if isinstance(message, bytes) else json.loads(message)
                    lost += event.get("patches", 0)
            assert heard + lost == 400  # every patch is accounted for
            calls = list(running.server.scheduler.calls.values())
            assert [call.story.counts["dropped"] for call in calls][1] == 0
            assert heard < 100  # as time goes

    with serving() as running:
        asyncio.run(calls(running))


def test_a_server_that_was_held_up_is_on_time_again_though_a_tick_takes_most_of_its_time():
    """A tick of 0.6 of a patch leaves no room for another within the patch; the first takes ten."""
    engine = echo_engine()
    run_once, waits = engine.run_once, iter([0.4])

    def slow():
        time.sleep(next(waits, 0.6 * engine.patch_seconds))
        return run_once()

    engine.run_once = slow

    async def calls(running):
        async with await connect(running) as websocket:
            await until(websocket, "ready")
            (call,) = running.server.scheduler.calls.values()
            waiting, began = [], time.perf_counter()
            for index in range(60):
                await asyncio.sleep(began + 0.04 * index - time.perf_counter())
                await websocket.send(patch(0.2))
                waiting.append(len(call.inbox))
        assert max(waiting[:20]) >= 7 and min(waiting[-20:]) <= 1
        assert call.story.counts["dropped"] == 0

    with serving(engine=engine) as running:
        asyncio.run(calls(running))


def test_floods_are_closed(monkeypatch):
    async def calls(running):
        for message in (json.dumps({"type": "ping"}), bytes(2**19)):
            async with await connect(running) as flood:
                with contextlib.suppress(websockets.ConnectionClosed):
                    for _ in range(600):
                        await flood.send(message)
                await flood.wait_closed()
                assert flood.close_code == 1008
        async with await connect(running) as huge:
            with contextlib.suppress(websockets.ConnectionClosed):
                await huge.send(bytes(serve.MAX_MESSAGE + 2))
            await huge.wait_closed()
            assert huge.close_code == 1009

    monkeypatch.setattr(serve, "BURST_SECONDS", 0.5)
    with serving() as running:
        asyncio.run(calls(running))


def test_a_client_that_takes_nothing_loses_audio_and_then_its_connection(monkeypatch):
    monkeypatch.setattr(serve, "SEND_SECONDS", 0.5)

    async def calls(running):
        async with await connect(running) as good:
            mute = await connect(running, max_queue=1, ping_interval=None)
            for _ in range(3):
                await converse(good, 10)
            connection = next(c for c in running.server.connections if c.call.slot == 1)

            async def blocked(*_):
                await asyncio.sleep(60)

            connection.websocket.send_bytes = blocked
            with contextlib.suppress(websockets.ConnectionClosed):
                for _ in range(60):
                    await mute.send(patch(0.1))
                    await asyncio.sleep(0.02)
            assert connection not in running.server.connections
            assert len(connection._unsent) <= serve.MAX_UNSENT
            await converse(good, 10)
            drop(mute)

    with serving("--rejoin_seconds", "0") as running:
        asyncio.run(calls(running))


@pytest.mark.parametrize("path", serve.PROTOCOLS)
def test_garbage_ends_with_a_code_and_nobody_else_notices(path, capfd):
    pytest.importorskip("sphn")

    async def calls(running):
        codes = set()
        async with await connect(running) as good:
            talk = asyncio.create_task(converse(good, 30))
            for seed in range(15):
                websocket = await connect(running, path)
                with contextlib.suppress(websockets.ConnectionClosed):
                    for message in hostile(seed, 30):
                        await websocket.send(message)
                    await websocket.close()
                await asyncio.wait_for(websocket.wait_closed(), 10)
                codes.add(websocket.close_code)
                await settled(running, calls=1)
            reader, writer = await asyncio.open_connection(*running.address.split(":"))
            writer.write(HANDSHAKE.replace(b"/api/pcm", path.encode()) % running.address.encode())
            await reader.readuntil(b"\r\n\r\n")
            writer.write(b"\x81\x85\0\0\0\0\xff\xfe\xfd\xfc\xfb" + bytes(range(256)))  # no UTF-8
            await asyncio.wait_for(reader.read(), 10)
            writer.close()
            await talk
            assert codes <= {1000, 1003, 1007, 1009} and codes & {1003, 1007}
            call = running.server.scheduler.calls[0]
            assert call.story.counts["dropped"] == 0 and call.story.counts["answered"] == 30

    with serving("--rejoin_seconds", "0") as running:
        asyncio.run(calls(running))
    assert "Traceback" not in capfd.readouterr().err


def test_requests_that_cannot_be_met_leave_the_call_going():
    async def calls(running):
        async with await connect(running, "/api/pcm?language=klingon") as websocket:
            assert "klingon" in (await until(websocket, "error"))["message"]
            await websocket.send(json.dumps({"type": "emotion", "emotion": "bored"}))
            assert "bored" in (await until(websocket, "error"))["message"]
            await websocket.send(json.dumps({"type": "emotion", "emotion": "happy"}))
            await websocket.send(json.dumps({"type": "ping", "id": 1}))
            await until(websocket, "pong")
            await websocket.send(patch(0.1))
            await audio(websocket)
            emotion = running.engine.lm.calls[-1]["emotion"]
            assert emotion[0] == running.engine.lm.config.emotions.index("happy") + 1

    with serving() as running:
        asyncio.run(calls(running))


# -------------------------------------------------------------------------------- many, long


def test_nothing_is_left_of_callers_who_are_gone():
    count = int(os.environ.get("CONNECTS", "150"))  # 1000 takes a minute
    memory = []

    async def calls(running):
        for index in range(count):
            if index % 50 == 0:
                gc.collect()
                memory.append(resident_bytes())
            running.engine.codec.encoded.clear()
            running.engine.lm.calls.clear()
            websocket = await connect(running)
            await until(websocket, "ready")
            await websocket.send(patch(0.1))
            if index % 3 == 0:
                await websocket.close()
            elif index % 3 == 1:
                await websocket.send("nonsense")
                await websocket.wait_closed()
            else:
                drop(websocket)
            await settled(running, calls=0)

    with serving("--rejoin_seconds", "0") as running:
        asyncio.run(calls(running))
        gc.collect()
        kinds = serve.Call, serve.Connection, serve.Story
        left = [thing for thing in gc.get_objects() if type(thing) in kinds]
        assert len(left) <= 9  # what the last ticks hold, of this server and of other tests'
        assert not running.server.connections
        assert memory[-1] - memory[1] < 2**21


def resident_bytes() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


# ---------------------------------------------------------------------------------- the end


def test_shutdown_lets_the_agent_finish_and_refuses_new_callers():
    async def calls(running):
        async with await connect(running) as websocket, await connect(running) as silent:
            await websocket.send(patch(0.3))
            await audio(websocket)
            running.loop.call_soon_threadsafe(running.server.drain)
            assert (await until(silent, "bye"))["reason"] == "shutdown"
            with contextlib.suppress(OSError, websockets.InvalidStatus):
                late = await connect(running)
                await late.wait_closed()
                assert late.close_code == 1013
            assert get(running, "/ping")[0] == 503
            for _ in range(3):  # it still speaks
                await websocket.send(patch(0.3))
                np.testing.assert_allclose(await audio(websocket), 0.3, atol=1e-2)
            with contextlib.suppress(websockets.ConnectionClosed):
                for _ in range(50):
                    await websocket.send(patch(0.0))
                    await asyncio.sleep(0.02)
            assert (await until(websocket, "bye"))["reason"] == "shutdown"
            await websocket.wait_closed()
            assert websocket.close_code == 1001

    running = Running(echo_engine())
    asyncio.run(calls(running))
    running.thread.join(10)
    assert not running.thread.is_alive() and running.failure is None


def test_an_engine_that_breaks_ends_the_server_with_its_error():
    engine = echo_engine()

    async def calls(running):
        async with await connect(running) as websocket:
            await until(websocket, "ready")
            await websocket.send(patch(0.3))
            assert (await until(websocket, "bye"))["reason"] == "the engine failed"
            await websocket.wait_closed()
            assert websocket.close_code == 1011

    def broken(*args):
        raise RuntimeError("out of memory")

    engine.tick = broken
    running = Running(engine)
    asyncio.run(calls(running))
    running.thread.join(10)
    assert "out of memory" in str(running.failure)


# ------------------------------------------------------------------------ the shipped models


async def ask(running, sound: np.ndarray) -> bytes:
    """A call of its own, which says this patch by patch; its reply."""
    reply = b""
    async with await connect(running) as websocket:
        await until(websocket, "ready")
        for part in sound.reshape(-1, PATCH):
            await websocket.send(to_pcm16(part))
            while not isinstance(message := await websocket.recv(), bytes):
                pass
            reply += message
    await settled(running, calls=0)
    return reply


def test_calls_draw_apart_and_a_server_of_the_same_seed_again():
    question = read_audio(TINY.parent.parent / "samples" / "question_english.wav")[:9600]
    codec, lm = load_models(TINY / "codec", TINY / "s2s")

    async def calls(running) -> list[bytes]:
        return [await ask(running, question) for _ in range(2)]

    replies = []
    for seed in (3, 3, 5):
        engine = DuplexEngine(codec, lm, 1, Sampling(eagerness=100.0), seed)  # speaks at once
        with serving(engine=engine) as running:
            replies.append(asyncio.run(calls(running)))
    assert replies[0] == replies[1]
    assert len({*replies[0], *replies[2]}) == 4


def test_a_slot_is_as_new_for_the_next_caller():
    """Two callers, one after the other, on the slot of a third: the same question has the same
    answer, bit for bit, as on an engine that nobody used before."""
    question = read_audio(TINY.parent.parent / "samples" / "question_english.wav")[:9600]
    codec, lm = load_models(TINY / "codec", TINY / "s2s")
    engine = DuplexEngine(codec, lm, 1, Sampling(temperature=0, text_temperature=0))

    async def calls(running):
        first = await ask(running, question)
        other = await ask(running, np.sin(np.arange(PATCH * 5) / 9) * 0.3)
        assert len(first) == 2 * len(question) and other != first[: len(other)]
        assert await ask(running, question) == first

    with serving(engine=engine) as running:
        asyncio.run(calls(running))


def test_the_command_serves_until_it_is_told_to_stop():
    command = [sys.executable, "serve.py", "--port", "0", "--slots", "1", "--threads", "1"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, cwd=TINY.parent.parent, env=environment, **pipes)
    try:
        said = [process.stdout.readline() for _ in range(2)]
        assert "1 slots" in said[0]
        address = said[1].strip().removeprefix("http://").rstrip("/")

        async def call():
            async with await websockets.connect(f"ws://{address}/api/pcm") as websocket:
                await until(websocket, "ready")
                process.send_signal(signal.SIGTERM)
                assert (await until(websocket, "bye"))["reason"] == "shutdown"

        asyncio.run(call())
        out, err = process.communicate(timeout=30)
        assert process.returncode == 0 and "every call has ended" in out and err == ""
    finally:
        process.kill()


def test_the_image_holds_what_its_command_needs():
    root = TINY.parent.parent
    text = (root / "Dockerfile").read_text()
    for names in re.findall(r"^COPY (.*) \S+$", text, re.MULTILINE):
        assert all(list(root.glob(name)) for name in names.split())
    command = re.search(r"^CMD exec python serve.py (.*)$", text, re.MULTILINE)[1]
    values = dict(re.findall(r"(\w+)=(\S+)", re.search(r"^ENV (.*)$", text, re.MULTILINE)[1]))
    args = serve.parse_args(shlex.split(re.sub(r"\$(\w+)", lambda m: values[m[1]], command)))
    assert (args.host, args.port, args.slots) == ("0.0.0.0", 8000, 8)
    assert (root / args.codec).is_dir() and (root / args.lm).is_dir()


@pytest.mark.parametrize(
    ("flags", "said"),
    [(["--port", "70000"], "--port"), (["--slots", "0"], "--slots"),
     (["--codec", "nowhere"], "nowhere")],
)  # fmt: skip
def test_wrong_flags_end_in_one_line(flags, said):
    with pytest.raises((SystemExit, UserError)) as caught:
        serve.main([*flags, *(["--port", "0"] if "--codec" in flags else [])])
    assert said in str(caught.value) or caught.value.code == 2
