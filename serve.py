"""Phase 5: a WebSocket server, many callers on one model.

    python serve.py --codec models/codec --lm models/s2s_emotion --slots 8 --token SECRET

`/` is a page to talk from a browser, `/ping` health, `/metrics` for Prometheus; callers connect to
`/api/pcm`, `/api/chat`, `/v1/realtime` or `/telephone` (protocols.py). SIGTERM or Ctrl-C lets the
agents finish their words; a second one ends at once.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import contextlib
import hmac
import importlib
import os
import secrets
import socket
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import numpy as np
import torch

from audio import SAMPLE_RATE
from command import ArgumentParser, UserError, number, run, whole
from duplex import DuplexEngine, PatchQueue, Story, TickResult, load_models
from protocols import PROTOCOLS, Message, Protocol, ProtocolError
from s2s import Sampling
from training import setup_distributed

HERE = Path(__file__).parent
TINY = HERE / "checkpoints" / "tiny"
MAX_MESSAGE = 2**20  # bytes
MAX_UNSENT = 25  # replies that wait for a slow client; audio beyond is dropped, oldest first
MESSAGES_A_SECOND, AUDIO_A_SECOND, BURST_SECONDS = 200, 20.0, 5.0  # more is refused
SEND_SECONDS, PING_SECONDS, START_SECONDS = 20.0, 20.0, 10.0
DRAIN_SECONDS = 10.0  # for the agents' last words
WATCH_SECONDS = 0.1
PACKAGES = "pip install fastapi uvicorn websockets prometheus-client sphn"
TAKEN_OVER = 4000  # close code of a connection whose call another one goes on with


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = ArgumentParser(__doc__)
    add = parser.add_argument
    add("--codec", type=Path, default=TINY / "codec", help="checkpoint folder")
    add("--lm", type=Path, default=TINY / "s2s", help="checkpoint folder")
    add("--port", type=whole(0, 65535), default=int(os.environ.get("PORT", 8000)), help="[$PORT]")
    add("--host", help="address to listen on [0.0.0.0 with a --token, else 127.0.0.1]")
    add("--slots", type=whole(1, 1024), default=4, help="callers at once")
    add("--token", default=os.environ.get("SAMVAD_TOKEN"), help="callers need it [$SAMVAD_TOKEN]")
    add("--allow_origin", nargs="+", default=[], help="pages of other hosts that may connect; *")
    more = parser.add_argument_group("advanced").add_argument
    more("--buffer_seconds", type=number(0.12, 60), default=0.6, help="of input that may wait")
    more("--rejoin_seconds", type=number(0, 3600), default=30.0, help="a call cut off is kept")
    more("--idle_seconds", type=number(0), default=0.0, help="without a message end a call; 0: no")
    more("--max_call_seconds", type=number(0), default=0.0, help="end a call; 0: never")
    more("--emotion_strength", type=number(0, 10), default=1.0, help="of emotions asked for")
    more("--temperature", type=number(0, 100), help="of the sampling [the model's own]")
    more("--seed", type=whole(0, 2**63 - 1), default=0, help="of the sampling")
    more("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    more("--threads", type=whole(1, 1024), default=1, help="CPU threads")
    return parser.parse_args(argv)


# ------------------------------------------------------------------------------------- the calls


class Budget:
    """A token bucket: how much of something is left, refilled steadily up to a burst."""

    def __init__(self, a_second: float, burst: float, clock: Callable[[], float] = time.monotonic):
        self.a_second, self.burst, self.clock = a_second, burst, clock
        self.left, self._seen = burst, clock()

    def take(self, amount: float = 1.0) -> bool:
        """Whether so much was left; it is taken then."""
        now = self.clock()
        self.left = min(self.burst, self.left + (now - self._seen) * self.a_second)
        self._seen = now
        if amount > self.left:
            return False
        self.left -= amount
        return True


class Call:
    """One conversation on one slot. It outlives the connections that carry it."""

    def __init__(self, slot: int, engine: DuplexEngine, buffer_seconds: float):
        self.slot, self.id = slot, secrets.token_urlsafe(16)
        self.connection: Connection | None = None
        self.began = self.heard = self.rests_since = time.monotonic()
        self.voice: dict[str, str | None] = {"emotion": None, "language": None}
        self.story = Story(engine)
        self._patch_samples = engine.patch_samples
        self._most = max(3, round(buffer_seconds / engine.patch_seconds))
        # A caller who sends too fast is served no faster than time goes, a full buffer aside.
        self.pace = Budget(1 / engine.patch_seconds, self._most, engine.clock)
        self.forget_input()

    def forget_input(self) -> None:
        self.inbox = PatchQueue(self._patch_samples, self._most)


class Share(NamedTuple):
    """What one tick gave one call."""

    lost: int  # dropped patches that it stands for
    result: TickResult


class Scheduler(threading.Thread):
    """The engine on a thread of its own: one cadence, on which all slots step together.

    A tick serves every slot with a patch waiting, at most one a patch's length; who has more
    waiting is caught up with in the time to spare before the next one. `deliver` gets each tick's
    shares, `fail` what ended the thread, both on that thread.
    """

    def __init__(
        self, engine: DuplexEngine, buffer_seconds: float,
        deliver: Callable[[list[tuple[Call, Any, Share]]], None],
        fail: Callable[[BaseException], None], threads: int = 1,
    ):  # fmt: skip
        super().__init__(name="engine", daemon=True)
        self.engine, self.calls, self.stopped = engine, {}, False
        self._buffer_seconds, self._threads = buffer_seconds, threads
        self._deliver, self._fail = deliver, fail
        self._wake = threading.Condition()
        self._jobs: list[Callable[[], Any]] = []
        self._idle, self._due, self._tick_seconds = False, 0.0, 0.0

    def open(self) -> Call | None:
        """A call on a free slot, whose last caller's state is forgotten; None without one."""
        with self._wake:
            free = set(range(self.engine.slots)) - self.calls.keys()
            if not free:
                return None
            call = Call(min(free), self.engine, self._buffer_seconds)
            self.calls[call.slot] = call
            self._add(lambda: self.engine.reset(call.slot))
            self._add(lambda: self.engine.set_voice(call.slot))
            return call

    def close(self, call: Call) -> None:
        with self._wake:
            if self.calls.get(call.slot) is call:
                del self.calls[call.slot]

    def rest(self, call: Call) -> None:
        """Until `call` has a connection again; what had not been answered is not."""
        with self._wake:
            call.connection, call.rests_since = None, time.monotonic()
            call.forget_input()

    def set_voice(self, call: Call, **voice: str | None) -> None:
        """Emotion and language of the agent. Raises `UserError` for one the model does not know."""
        known = self.engine.lm.config
        for name, names in (("emotion", known.emotions), ("language", known.languages)):
            if voice.get(name) is not None and voice[name] not in names:
                raise UserError(f"{name} {voice[name]}: the model knows {', '.join(names)}"[:300])
        call.voice |= voice
        chosen = dict(call.voice)
        with self._wake:
            self._add(lambda: self.engine.set_voice(call.slot, **chosen))

    def feed(self, call: Call, audio: np.ndarray) -> None:
        with self._wake:
            call.inbox.push(audio, self.engine.clock())
            if self._idle and call.inbox:
                self._wake.notify()

    def stop(self) -> None:
        with self._wake:
            self.stopped = True
            self._wake.notify()
        self.join()

    def run(self) -> None:
        torch.set_num_threads(self._threads)  # of this thread
        if self.engine.device.type == "cuda":
            torch.cuda.set_device(self.engine.device)
        try:
            while self._wait():
                self._tick()
        except BaseException as error:
            self.stopped = True
            self._fail(error)

    def _add(self, job: Callable[[], Any]) -> None:
        self._jobs.append(job)
        if self._idle:
            self._wake.notify()

    def _wait(self) -> bool:
        """Until a tick is due, or a job; False once stopped."""
        with self._wake:
            while not self.stopped:
                most = max((len(call.inbox) for call in self.calls.values()), default=0)
                early = self._due - self.engine.clock()
                if self._jobs or (most and early <= 0) or (most > 1 and self._spare(early)):
                    return True
                self._idle = not most
                self._wake.wait(early if most else None)
                self._idle = False
            return False

    def _spare(self, early: float) -> bool:
        return early > self._tick_seconds and any(
            len(call.inbox) > 1 and call.pace.left >= 1 for call in self.calls.values()
        )

    def _tick(self) -> None:
        with self._wake:
            jobs, self._jobs = self._jobs, []
            taken = [
                (call, call.connection, call.inbox.popleft())
                for call in self.calls.values()
                if call.inbox and call.pace.take()
            ]
        for job in jobs:
            job()
        if not taken:
            return
        started = self.engine.clock()
        for call, _, patch in taken:
            self.engine.feed(call.slot, patch.audio, patch.arrived, bounded=False)
        result = self.engine.run_once()
        self._deliver([(call, to, Share(patch.lost, result)) for call, to, patch in taken])
        # A patch that came late does not shift the cadence; an idle time or a catch-up does.
        on_time = self._due <= started < self._due + self.engine.patch_seconds
        self._due = (self._due if on_time else started) + self.engine.patch_seconds
        self._tick_seconds = self.engine.clock() - started


# ------------------------------------------------------------------------------- the connections


class Metrics:
    """What `/metrics` tells, of one server."""

    def __init__(self, scheduler: Callable[[], Scheduler]):
        from prometheus_client import (
            CollectorRegistry,
            Counter,
            Gauge,
            Histogram,
            ProcessCollector,
        )

        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)  # CPU and memory
        kinds = {"registry": self.registry, "namespace": "samvad"}
        seconds = [0.005, 0.01, 0.02, 0.03, 0.04, 0.06, 0.08, 0.12, 0.2, 0.4, 1.0]
        self.calls = Counter("calls", "callers taken", ["how"], **kinds)
        self.refused = Counter("refused", "connections ended by close code", ["code"], **kinds)
        self.dropped = Counter("dropped_patches", "input that came too late or fast", **kinds)
        self.unsent = Counter("unsent_patches", "replies a slow client did not take", **kinds)
        self.ticks = Histogram("tick_seconds", "a step of all slots", buckets=seconds, **kinds)
        self.waited = Histogram("waited_seconds", "input until a tick", buckets=seconds, **kinds)
        Gauge("slots", "callers at most", **kinds).set_function(lambda: scheduler().engine.slots)
        memory = Gauge("gpu_memory_bytes", "taken by this process", **kinds)
        memory.set_function(torch.cuda.memory_reserved)  # 0 without a GPU
        live = Gauge("live_calls", "calls, those that rest among them", **kinds)
        live.set_function(lambda: len(scheduler().calls))

    def text(self) -> bytes:
        from prometheus_client import generate_latest

        return generate_latest(self.registry)


class Connection:
    """One WebSocket: what its client sends goes to the call, what waits for it is bounded."""

    def __init__(self, websocket: Any, protocol: Protocol):
        self.websocket, self.protocol = websocket, protocol
        self.call: Call | None = None
        self.closing: tuple[int, str] | None = None  # code and reason, once told to
        self.left = False  # the client itself ended the call
        self._unsent: deque[list] = deque()  # [audio or None, events or messages]
        self._more = asyncio.Event()
        self._messages = Budget(MESSAGES_A_SECOND, MESSAGES_A_SECOND * BURST_SECONDS)
        most = AUDIO_A_SECOND * SAMPLE_RATE
        self._samples = Budget(most, most * BURST_SECONDS)

    def put(self, audio: np.ndarray | None, events: list[dict]) -> int:
        """Queue a reply; returns how many patches of audio a client too slow has lost by it."""
        if self.closing is not None:
            return 0
        self._unsent.append([audio, events])
        self._more.set()
        if len(self._unsent) <= MAX_UNSENT:
            return 0
        oldest = self._unsent.popleft()
        self._unsent[0][1][:0] = oldest[1]
        return int(oldest[0] is not None)

    def say(self, messages: Sequence[Message]) -> None:
        self._unsent.append([None, [], *messages])
        self._more.set()

    def end(self, code: int, reason: str, message: str = "") -> None:
        """Say goodbye, send what waits, close with `code`. `message`: what the client did wrong."""
        if self.closing is None:
            error = [{"type": "error", "message": message}] if message else []
            self.put(None, [*error, {"type": "bye", "reason": reason}])
            self.closing = code, reason

    async def read(self) -> dict | None:
        """The next message, as ASGI has it; None once the client has gone."""
        message = await self.websocket.receive()
        if message["type"] == "websocket.disconnect":
            # A lost connection has no reason; a proxy that ends one says 1001 or 1006.
            self.left = "reason" in message and message["code"] in (1000, 1005)
            return None
        return message

    def take(self, message: dict) -> tuple[np.ndarray | None, Sequence[dict]]:
        """Audio and requests in a message. Raises `ProtocolError`."""
        if not self._messages.take():
            raise ProtocolError(1008, f"more than {MESSAGES_A_SECOND} messages a second")
        data = message.get("bytes")
        received = self.protocol.receive(message.get("text") if data is None else data)
        if received.audio is not None and not self._samples.take(len(received.audio)):
            raise ProtocolError(1008, f"audio at more than {AUDIO_A_SECOND:.0f} times real time")
        if received.answers:
            self.say(received.answers)
        return received.audio, received.requests

    async def send(self) -> None:
        """Send what is queued until told to end; then close."""
        while True:
            await self._more.wait()
            self._more.clear()
            while self._unsent:
                audio, events, *messages = self._unsent.popleft()
                for message in [*self.protocol.send(audio, events), *messages]:
                    await asyncio.wait_for(self.write(message), SEND_SECONDS)
            if self.closing is not None:
                await self.websocket.close(self.closing[0], self.closing[1][:100])
                return

    async def write(self, message: Message) -> None:
        if isinstance(message, bytes):
            await self.websocket.send_bytes(message)
        else:
            await self.websocket.send_text(message)


class Server:
    """Callers on one side, the scheduler on the other; everything here is on one event loop."""

    def __init__(self, engine: DuplexEngine, args: argparse.Namespace):
        self.engine, self.args = engine, args
        self.loop = asyncio.get_running_loop()
        self.connections: set[Connection] = set()
        self.draining: float | None = None  # since when
        self.failure: BaseException | None = None
        self.stop = asyncio.Event()
        self.metrics = Metrics(lambda: self.scheduler)
        later = self.loop.call_soon_threadsafe
        self.scheduler = Scheduler(
            engine, args.buffer_seconds, lambda shares: later(self._deliver, shares),
            lambda error: later(self._fail, error), args.threads,
        )  # fmt: skip

    # ---- a client comes
    def allows_token(self, *given: str | None) -> bool:
        wanted = (self.args.token or "").encode("utf-8", "replace")
        same = [hmac.compare_digest((g or "").encode("utf-8", "replace"), wanted) for g in given]
        return not wanted or any(same)

    def allows_origin(self, headers: Any) -> bool:
        """Whether a browser's page may connect: one of this host's own, or an allowed one."""
        origin = headers.get("origin")
        hosts = (headers.get("host"), headers.get("x-forwarded-host"))
        allowed = self.args.allow_origin
        return origin in (None, *allowed) or "*" in allowed or _netloc(origin) in hosts

    async def serve_client(self, websocket: Any, make_protocol: Callable[..., Protocol]) -> None:
        """One WebSocket from its handshake to its end, whatever its client does."""
        offered = websocket.scope.get("subprotocols", ())
        await websocket.accept(subprotocol="realtime" if "realtime" in offered else None)
        connection = Connection(websocket, make_protocol(websocket.query_params))
        self.connections.add(connection)
        try:
            await self._serve(connection)
        except ConnectionError:
            pass
        except Exception:
            traceback.print_exc()
            with contextlib.suppress(Exception):
                await websocket.close(1011)
        finally:
            self.connections.discard(connection)
            self._leave(connection)

    async def _serve(self, connection: Connection) -> None:
        sending = asyncio.create_task(connection.send())
        reading = asyncio.create_task(self._read(connection))
        try:
            await asyncio.wait({sending, reading}, return_when=asyncio.FIRST_COMPLETED)
            if connection.closing is not None:
                await asyncio.wait({sending}, timeout=SEND_SECONDS)
        finally:
            sending.cancel()
            reading.cancel()
            ends = await asyncio.gather(sending, reading, return_exceptions=True)
        for end in ends:
            if isinstance(end, Exception) and not _is_gone(end):
                raise end

    async def _read(self, connection: Connection) -> None:
        try:
            await self._join(connection)
            while connection.call and (message := await connection.read()) is not None:
                connection.call.heard = time.monotonic()
                self._take(connection, *connection.take(message))
        except ProtocolError as error:
            self.metrics.refused.labels(str(error.code)).inc()
            connection.left = True
            connection.end(error.code, "refused", str(error))

    async def _join(self, connection: Connection) -> None:
        """Check a client and give it a call. Raises `ProtocolError` where it gets none."""
        protocol, websocket = connection.protocol, connection.websocket
        requests = []
        if not self.allows_origin(websocket.headers):
            raise ProtocolError(1008, "pages of this origin may not connect")
        waits_until = time.monotonic() + START_SECONDS
        while not protocol.started:
            left = waits_until - time.monotonic()
            try:
                message = await asyncio.wait_for(connection.read(), left)
            except asyncio.TimeoutError:
                raise ProtocolError(1008, "no start message came") from None
            if message is None:
                return
            requests += connection.take(message)[1]
        if not self.allows_token(*_tokens(websocket), protocol.token):
            raise ProtocolError(1008, "a wrong token, or none")
        if self.draining is not None:
            raise ProtocolError(1013, "the server is shutting down; try again")
        call = self._known_call(websocket.query_params.get("call"))
        rejoined = call is not None
        call = call or self.scheduler.open()
        if call is None:
            lines = f"all {self.engine.slots} lines are busy; try again in a minute"
            raise ProtocolError(1013, lines)
        if call.connection is not None:
            call.connection.call = None
            call.connection.end(TAKEN_OVER, "taken over")
            self.scheduler.rest(call)
        call.heard = time.monotonic()
        config = self.engine.lm.config
        ready = {
            "type": "ready", "call": call.id, "rejoined": rejoined, "sample_rate": SAMPLE_RATE,
            "patch_ms": self.engine.patch_seconds * 1000, "emotions": list(config.emotions),
            "languages": list(config.languages), "recognises_emotion": bool(config.emotion_dim),
            "rejoin_seconds": self.args.rejoin_seconds,
        }  # fmt: skip
        connection.say(protocol.greet(ready))
        connection.call, call.connection = call, connection
        self.metrics.calls.labels("rejoined" if rejoined else "new").inc()
        start = {k: v for k in ("emotion", "language") if (v := websocket.query_params.get(k))}
        self._take(connection, None, [{"type": "start", **start}, *requests])

    def _known_call(self, token: str | None) -> Call | None:
        calls = list(self.scheduler.calls.values())
        given = (token or "").encode("utf-8", "replace")
        return next((c for c in calls if hmac.compare_digest(c.id.encode(), given)), None)

    def _take(
        self, connection: Connection, audio: np.ndarray | None, requests: Sequence[dict]
    ) -> None:
        call = connection.call
        if audio is not None:
            self.scheduler.feed(call, audio)
        for request in requests:
            if request["type"] == "stop":
                connection.left = True
                connection.end(1000, "stop")
                continue
            voice = {k: request[k] for k in ("emotion", "language") if k in request}
            try:
                self.scheduler.set_voice(call, **voice)
            except UserError as error:
                connection.put(None, [{"type": "error", "message": str(error)}])

    def _leave(self, connection: Connection) -> None:
        """A connection has ended: its call too, or it rests until its caller is back."""
        call, connection.call = connection.call, None
        if call is None:
            return
        if connection.left or not connection.protocol.rejoins or not self.args.rejoin_seconds:
            self.scheduler.close(call)
        else:
            self.scheduler.rest(call)

    # ---- the engine answers
    def _deliver(self, shares: list[tuple[Call, Connection, Share]]) -> None:
        for call, connection, share in shares:
            events = call.story.tell(call.slot, share.result, share.lost)
            self.metrics.waited.observe(share.result.waited[call.slot])
            self.metrics.dropped.inc(share.lost)
            if connection is not None and connection.call is call:
                audio = share.result.audio[call.slot]
                self.metrics.unsent.inc(connection.put(audio, events))
        self.metrics.ticks.observe(shares[0][2].result.times.total)

    def _fail(self, error: BaseException) -> None:
        self.failure = error
        self._end_all(1011, "the engine failed")
        self.stop.set()

    # ---- time passes
    async def watch(self) -> None:
        """Ends what has lasted too long, and the server once it is drained."""
        while not self.stop.is_set():
            await asyncio.sleep(WATCH_SECONDS)
            now, args = time.monotonic(), self.args
            calls = list(self.scheduler.calls.values())
            for call in calls:
                if call.connection is None:
                    if now - call.rests_since > args.rejoin_seconds:
                        self.scheduler.close(call)
                elif args.idle_seconds and now - call.heard > args.idle_seconds:
                    self._end(call, "idle")
                elif args.max_call_seconds and now - call.began > args.max_call_seconds:
                    self._end(call, "max_call_seconds")
                elif self.draining is not None and not call.story.speaking["agent"]:
                    self._end(call, "shutdown")
            if self.draining is not None:
                live = any(call.connection for call in calls)
                if not live or now - self.draining > DRAIN_SECONDS:
                    self._end_all(1001, "shutdown")
                    self.stop.set()

    def _end(self, call: Call, reason: str) -> None:
        call.connection.left = True
        call.connection.end(1001 if reason == "shutdown" else 1000, reason)

    def _end_all(self, code: int, reason: str) -> None:
        for connection in self.connections:
            connection.left = True
            connection.end(code, reason)

    def drain(self) -> None:
        """No new calls; those there are end with their agent's words. A second time: at once."""
        if self.draining is not None:
            self._end_all(1001, "shutdown")
            self.stop.set()
        self.draining = time.monotonic()

    async def run(self, listener: socket.socket) -> None:
        """Serve until SIGTERM or Ctrl-C and the agents' last words. Raises what broke it."""
        import uvicorn

        settings = {"ws_max_size": MAX_MESSAGE, "ws_per_message_deflate": False}
        settings |= {"ws_ping_interval": PING_SECONDS, "ws_ping_timeout": PING_SECONDS}
        settings |= {"log_level": "critical", "timeout_graceful_shutdown": 2, "lifespan": "off"}
        web = uvicorn.Server(uvicorn.Config(build_app(self), **settings))
        web.handle_exit = lambda *_: self.loop.call_soon_threadsafe(self.drain)
        self.scheduler.start()
        watching = asyncio.create_task(self.watch())
        serving = asyncio.create_task(web.serve(sockets=[listener]))
        await self.stop.wait()
        web.should_exit = True
        await serving
        watching.cancel()
        self.scheduler.stop()
        if self.failure is not None:
            raise self.failure


def _netloc(origin: str) -> str | None:
    try:
        return urlsplit(origin).netloc
    except ValueError:
        return None


def _tokens(request: Any) -> list[str]:
    """What a client gives as its token: in a header, in the URL, or as OpenAI's browsers do."""
    kind, _, value = request.headers.get("authorization", "").partition(" ")
    if kind.lower() == "basic":
        with contextlib.suppress(ValueError):
            value = base64.b64decode(value).decode("utf-8", "replace").rpartition(":")[2]
    mark = "openai-insecure-api-key."
    offered = request.scope.get("subprotocols", ())
    keys = [name.removeprefix(mark) for name in offered if name.startswith(mark)]
    return [value, request.query_params.get("token", ""), *keys]


def _is_gone(error: Exception) -> bool:
    """Whether this is how a client's leaving shows."""
    from starlette.websockets import WebSocketDisconnect

    return isinstance(error, (WebSocketDisconnect, ConnectionError, asyncio.TimeoutError))


# ------------------------------------------------------------------------------------------ main


def build_app(server: Server) -> Any:
    """The web application: the page, health, metrics, and a WebSocket a protocol."""
    from fastapi import FastAPI
    from starlette.responses import FileResponse, JSONResponse, PlainTextResponse, Response
    from starlette.routing import Route, WebSocketRoute

    async def page(request: Any) -> Response:
        return FileResponse(HERE / "page.html", headers={"cache-control": "no-cache"})

    async def ping(request: Any) -> Response:
        calls, draining = len(server.scheduler.calls), server.draining is not None
        status = {"status": "draining" if draining else "healthy", "calls": calls}
        return JSONResponse({**status, "slots": server.engine.slots}, 503 if draining else 200)

    async def metrics(request: Any) -> Response:
        if not server.allows_token(*_tokens(request)):
            return PlainTextResponse("a wrong token, or none\n", 401)
        return PlainTextResponse(server.metrics.text(), media_type="text/plain; version=0.0.4")

    def converse(protocol: Callable[..., Protocol]) -> Callable:
        async def endpoint(websocket: Any) -> None:
            await server.serve_client(websocket, protocol)

        return endpoint

    pages = {"/": page, "/ping": ping, "/metrics": metrics}
    routes: list = [Route(path, endpoint) for path, endpoint in pages.items()]
    routes += [WebSocketRoute(path, converse(protocol)) for path, protocol in PROTOCOLS.items()]
    return FastAPI(routes=routes, openapi_url=None)


def check_packages() -> None:
    try:
        for name in ("fastapi", "uvicorn", "websockets", "prometheus_client", "sphn"):
            importlib.import_module(name)
    except ImportError as error:
        raise UserError(f"serving needs {error.name}: {PACKAGES}") from error


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    check_packages()
    host = args.host or ("0.0.0.0" if args.token else "127.0.0.1")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.create_server((host, args.port), family=family)
    device = setup_distributed(args.device).device
    if device.type == "cpu":
        torch.set_num_threads(args.threads)
    codec, lm = load_models(args.codec, args.lm, str(device))
    sampling = Sampling() if args.temperature is None else Sampling(args.temperature)
    engine = DuplexEngine(
        codec, lm, args.slots, sampling, args.seed, emotion_strength=args.emotion_strength
    )
    engine.warm_up()
    print(f"codec {args.codec}, dialogue model {args.lm}, on {device}, {args.slots} slots")
    if not args.token and host not in ("127.0.0.1", "::1", "localhost"):
        print("anyone who reaches this port may call: give it a --token")
    print(f"http://{host}:{listener.getsockname()[1]}/", flush=True)

    async def serve() -> None:
        await Server(engine, args).run(listener)

    asyncio.run(serve())
    print("every call has ended")


if __name__ == "__main__":
    run(main, resumes=False)
