"""The server: callers who do as they should, callers who do not, and what the others notice."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import threading
import time

import numpy as np
import pytest
from test_duplex import FakeClock, FakeCodec, FakeLM

import serve
from duplex import DuplexEngine

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
