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
import functools
import hmac
import importlib.util
import os
import secrets
import socket
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import torch

from audio import SAMPLE_RATE
from command import ArgumentParser, UserError, number, run, whole
from duplex import DuplexEngine, PatchQueue, Story, TickResult, load_models
from protocols import PROTOCOLS, Protocol, ProtocolError
from s2s import Sampling
from training import setup_distributed

HERE = Path(__file__).parent
TINY = HERE / "checkpoints" / "tiny"
MAX_MESSAGE = 2**20  # bytes
MESSAGES_A_SECOND, TIMES_REAL_TIME, BURST_SECONDS = 200, 20, 5  # more from a client is refused
MAX_UNSENT = 25  # replies that wait for a slow client; audio beyond is dropped, oldest first
SEND_SECONDS, PING_SECONDS, START_SECONDS = 20.0, 20.0, 10.0
DRAIN_SECONDS = 10.0  # for the agents' last words
WATCH_SECONDS = 0.1
TAKEN_OVER = 4000  # close code of a connection whose call goes on with another


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = ArgumentParser(__doc__)
    add = parser.add_argument
    add("--codec", type=Path, default=TINY / "codec", help="checkpoint folder")
    add("--lm", type=Path, default=TINY / "s2s", help="checkpoint folder")
    add("--port", type=whole(0, 65535), default=os.environ.get("PORT", "8000"), help="or $PORT")
    add("--host", help="address to listen on [0.0.0.0 with a --token, else 127.0.0.1]")
    add("--slots", type=whole(1, 1024), default=4, help="callers at once")
    add("--token", help="that callers must give [$SAMVAD_TOKEN]")
    add("--allow_origin", nargs="+", default=[], help="pages of other hosts that may connect, or *")
    add("--idle_seconds", type=number(0), default=0.0, help="without a message end a call; 0: no")
    add("--max_call_seconds", type=number(0), default=0.0, help="end a call; 0: never")
    add("--rejoin_seconds", type=number(0), default=30.0, help="that a call cut off is kept")
    more = parser.add_argument_group("advanced").add_argument
    more("--buffer_seconds", type=number(0.1, 60), default=0.6, help="of a caller's input may wait")
    more("--emotion_strength", type=number(0, 10), default=1.0, help="of emotions; 1 costs nothing")
    more("--temperature", type=number(0, 100), help="of the sampling [the model's own]")
    more("--seed", type=whole(0, 2**63 - 1), default=0, help="of the sampling")
    more("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    more("--threads", type=whole(1, 1024), default=1, help="CPU threads")
    args = parser.parse_args(argv)
    args.token = args.token or os.environ.get("SAMVAD_TOKEN")
    return args


# ------------------------------------------------------------------------------------- the calls


class Budget:
    """A token bucket: refilled steadily up to a burst."""

    def __init__(self, a_second: float, burst: float, clock: Callable[[], float] = time.monotonic):
        self.a_second, self.burst, self.clock = a_second, burst, clock
        self.left, self._seen = burst, clock()

    def take(self, amount: float = 1.0) -> bool:
        """Whether so much was left; it is taken then."""
        now = self.clock()
        self.left = min(self.burst, self.left + (now - self._seen) * self.a_second)
        enough, self._seen = amount <= self.left, now
        self.left -= amount * enough
        return enough


class Call:
    """One conversation on one slot. It outlives the connections that carry it."""

    def __init__(self, slot: int, engine: DuplexEngine, buffer_seconds: float):
        self.slot, self.id = slot, secrets.token_urlsafe(16)
        self.connection: Connection | None = None
        self.began = self.heard = self.rests_since = time.monotonic()
        self.voice: dict[str, Any] = {}
        self.story = Story(engine)
        most = max(3, round(buffer_seconds / engine.patch_seconds))
        self.inbox = PatchQueue(engine.patch_samples, most)
        # Who sends too fast is served no faster than time goes, one full buffer aside.
        self.pace = Budget(1 / engine.patch_seconds, most, engine.clock)


class Scheduler(threading.Thread):
    """The engine, on a thread of its own and one cadence, on which all slots step together.

    A tick serves every slot with a patch waiting, one a patch's length; who has more waiting is
    caught up with in the time that is left before the next. On this thread, `deliver` gets (call,
    its connection, audio or None, events) of each call served, and what the tick gave; `fail` what
    ended the thread.
    """

    def __init__(self, engine: DuplexEngine, args: argparse.Namespace, deliver: Callable,
                 fail: Callable[[BaseException], Any]):  # fmt: skip
        super().__init__(name="engine", daemon=True)
        self.engine, self.args, self.calls = engine, args, {}
        self._deliver, self._fail = deliver, fail
        self._wake, self._jobs, self._stopped = threading.Condition(), deque(), False
        self._idle, self._due, self._tick_seconds = False, 0.0, 0.0

    def open(self) -> Call | None:
        """A call on a free slot, whose last caller is forgotten; None where all are taken."""
        with self._wake:
            free = set(range(self.engine.slots)) - self.calls.keys()
            if not free:
                return None
            call = Call(min(free), self.engine, self.args.buffer_seconds)
            self.calls[call.slot] = call
            self._add(lambda: (self.engine.reset(call.slot), self.engine.set_voice(call.slot)))
            return call

    def close(self, call: Call) -> None:
        with self._wake:
            if self.calls.get(call.slot) is call:
                del self.calls[call.slot]

    def rest(self, call: Call) -> None:
        """Until `call` has a connection again; input that was not answered yet is forgotten."""
        with self._wake:
            call.connection, call.rests_since = None, time.monotonic()
            call.inbox = PatchQueue(self.engine.patch_samples, call.inbox.most)

    def set_voice(self, call: Call, **voice: Any) -> None:
        """Emotion and language of the agent; an event tells the caller what the model lacks."""

        def job() -> None:
            try:
                self.engine.set_voice(call.slot, **{**call.voice, **voice})
                call.voice |= voice
            except UserError as error:
                event = {"type": "error", "message": str(error)}
                self._deliver([(call, call.connection, None, [event])], None)

        self._add(job)

    def feed(self, call: Call, audio: np.ndarray) -> None:
        with self._wake:
            call.inbox.push(audio, self.engine.clock())
            if self._idle and call.inbox:
                self._wake.notify()

    def stop(self) -> None:
        with self._wake:
            self._stopped = True
            self._wake.notify()
        self.join()

    def run(self) -> None:
        torch.set_num_threads(self.args.threads)  # of this thread
        if self.engine.device.type == "cuda":
            torch.cuda.set_device(self.engine.device)
        try:
            while self._wait():
                self._tick()
        except BaseException as error:
            self._fail(error)

    def _add(self, job: Callable[[], Any]) -> None:
        with self._wake:
            self._jobs.append(job)
            self._wake.notify()

    def _wait(self) -> bool:
        """Until a tick or a job is due; False once stopped."""
        with self._wake:
            while not self._stopped:
                waiting = [(len(c.inbox), c.pace.left) for c in self.calls.values() if c.inbox]
                early = self._due - self.engine.clock()
                behind = any(patches > 1 and left >= 1 for patches, left in waiting)
                spare = behind and early > self._tick_seconds
                if self._jobs or spare or (waiting and early <= 0):
                    return True
                self._idle = not waiting
                self._wake.wait(early if waiting else None)
            return False

    def _tick(self) -> None:
        with self._wake:
            jobs, self._jobs = self._jobs, deque()
            waiting = [c for c in self.calls.values() if c.inbox and c.pace.take()]
            taken = [(call, call.connection, call.inbox.popleft()) for call in waiting]
        for job in jobs:
            job()
        started, length = self.engine.clock(), self.engine.patch_seconds
        if not taken:
            self._due = max(self._due, started + length / 4)  # all who wait were too fast
            return
        for call, _, patch in taken:
            self.engine.feed(call.slot, patch.audio, patch.arrived, bounded=False)
        result = self.engine.run_once()
        for call, _, patch in taken:
            result.dropped[call.slot] = patch.lost
        told = [(c, to, c.story.tell(c.slot, result, patch.lost)) for c, to, patch in taken]
        self._deliver([(c, to, result.audio[c.slot], events) for c, to, events in told], result)
        # A patch that came late does not shift the cadence; a pause or a catch-up does.
        on_time = self._due <= started < self._due + length
        self._due = (self._due if on_time else started) + length
        self._tick_seconds = self.engine.clock() - started


# ------------------------------------------------------------------------------- the connections


class Connection:
    """One WebSocket: its messages become audio and requests, what waits for it is bounded."""

    def __init__(self, websocket: Any, protocol: Protocol):
        self.websocket, self.protocol = websocket, protocol
        self.call: Call | None = None
        self.closing: tuple[int, str] | None = None  # code and reason, once told to
        self.left = False  # the call ends with this connection
        self._unsent: deque[tuple[np.ndarray | None, list[dict]]] = deque()
        self._more = asyncio.Event()
        rates = MESSAGES_A_SECOND, TIMES_REAL_TIME * SAMPLE_RATE
        self._messages, self._samples = (Budget(rate, rate * BURST_SECONDS) for rate in rates)

    def put(self, audio: np.ndarray | None = None, events: Iterable[dict] = ()) -> int:
        """Queue a reply; returns how many patches of audio a slow client has lost by it."""
        self._more.set()
        if self.closing is not None:
            return 0
        self._unsent.append((audio, list(events)))
        if len(self._unsent) <= MAX_UNSENT:
            return 0
        lost, events = self._unsent.popleft()
        self._unsent[0][1][:0] = events
        return int(lost is not None)

    def end(self, code: int, reason: str, message: str = "") -> None:
        """Say goodbye, send what waits, close. `message`: what the client did wrong."""
        error = [{"type": "error", "message": message}] if message else []
        self.put(None, [*error, {"type": "bye", "reason": reason}])
        self.closing, self.left = self.closing or (code, reason), True

    async def receive(self) -> tuple[np.ndarray | None, list[dict]] | None:
        """Audio and requests of the next message; None once the client has gone.

        Raises `ProtocolError`.
        """
        message = await self.websocket.receive()
        if message["type"] == "websocket.disconnect":
            # A lost connection has no reason; a proxy that ends one, or a page's reload, says 1001.
            self.left |= "reason" in message and message["code"] != 1001
            return None
        if not self._messages.take():
            raise ProtocolError(1008, f"more than {MESSAGES_A_SECOND} messages a second")
        data = message.get("bytes")
        audio = self.protocol.receive(message.get("text") if data is None else data)
        if audio is not None and not self._samples.take(len(audio)):
            raise ProtocolError(1008, f"audio at more than {TIMES_REAL_TIME} times real time")
        requests, self.protocol.requests = self.protocol.requests, []
        self._more.set()  # it may have answered
        return audio, requests

    async def send(self) -> None:
        """Send what is queued, as it comes, until told to end; then close."""
        while self.closing is None or self._unsent:
            await self._more.wait()
            self._more.clear()
            while self._unsent or self.protocol.out:
                if self._unsent:
                    self.protocol.send(*self._unsent.popleft())
                messages, self.protocol.out = self.protocol.out, []
                for message in messages:
                    to = self.websocket
                    write = to.send_bytes if isinstance(message, bytes) else to.send_text
                    try:
                        await asyncio.wait_for(write(message), SEND_SECONDS)
                    except RuntimeError as error:  # malformed: the WebSocket's layer closed it
                        raise ConnectionError(str(error)) from error
        await self.websocket.close(self.closing[0], self.closing[1])


def make_metrics(engine: DuplexEngine, calls: Callable[[], int]) -> SimpleNamespace:
    """What `/metrics` tells of one server."""
    from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector

    to = {"registry": CollectorRegistry(), "namespace": "samvad"}
    times = to | {"buckets": [0.005, 0.01, 0.02, 0.03, 0.04, 0.06, 0.08, 0.12, 0.2, 0.4, 1.0]}
    ProcessCollector(registry=to["registry"])  # CPU and memory
    memory = Gauge("gpu_memory_bytes", "taken by this process; 0 without a GPU", **to)
    memory.set_function(torch.cuda.memory_reserved)
    Gauge("slots", "callers at most", **to).set(engine.slots)
    Gauge("live_calls", "those that rest among them", **to).set_function(calls)
    return SimpleNamespace(
        registry=to["registry"],
        calls=Counter("calls", "callers taken", ["how"], **to),
        refused=Counter("refused", "clients refused, by close code", ["code"], **to),
        dropped=Counter("dropped_patches", "input that came too late or too fast", **to),
        unsent=Counter("unsent_patches", "replies that a slow client did not take", **to),
        ticks=Histogram("tick_seconds", "a step of all slots", **times),
        waited=Histogram("waited_seconds", "input until its tick", **times),
    )


class Server:
    """Callers on one side, the scheduler on the other, on one event loop."""

    def __init__(self, engine: DuplexEngine, args: argparse.Namespace):
        self.engine, self.args, self.loop = engine, args, asyncio.get_running_loop()
        self.connections: set[Connection] = set()
        self.draining: float | None = None  # since when
        self.failure: BaseException | None = None
        self.stopped = asyncio.Event()
        later = self.loop.call_soon_threadsafe
        self.scheduler = Scheduler(
            engine, args, lambda *told: later(self._deliver, *told), lambda e: later(self._fail, e)
        )
        self.metrics = make_metrics(engine, lambda: len(self.scheduler.calls))

    # ---- a client comes
    def allows(self, tokens: Iterable[str]) -> bool:
        return not self.args.token or any(same(token, self.args.token) for token in tokens)

    def allows_origin(self, headers: Any) -> bool:
        """Whether a page may connect: one of this host's own, or an allowed one. Only browsers
        name an origin."""
        origin, allowed = headers.get("origin"), self.args.allow_origin
        if origin is None or "*" in allowed or origin in allowed:
            return True
        with contextlib.suppress(ValueError):
            return urlsplit(origin).netloc in (headers.get("host"), headers.get("x-forwarded-host"))
        return False

    async def serve_client(self, websocket: Any, make_protocol: type[Protocol]) -> None:
        """One WebSocket from its handshake to its end, whatever its client does."""
        from starlette.websockets import WebSocketDisconnect

        offered = websocket.scope.get("subprotocols", ())
        await websocket.accept(subprotocol="realtime" if "realtime" in offered else None)
        connection = Connection(websocket, make_protocol(websocket.query_params))
        self.connections.add(connection)
        tasks = [asyncio.create_task(t) for t in (connection.send(), self._read(connection))]
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            ends = connection.closing is not None  # else wait for the reason to be read
            await asyncio.wait(tasks[: 2 - ends], timeout=SEND_SECONDS if ends else WATCH_SECONDS)
        finally:
            for task in tasks:
                task.cancel()
            self.connections.discard(connection)
            self._leave(connection)
        gone = WebSocketDisconnect, ConnectionError, asyncio.TimeoutError
        for end in await asyncio.gather(*tasks, return_exceptions=True):
            if isinstance(end, Exception) and not isinstance(end, gone):  # a bug
                traceback.print_exception(type(end), end, end.__traceback__)
                with contextlib.suppress(Exception):
                    await websocket.close(1011)

    async def _read(self, connection: Connection) -> None:
        try:
            await self._join(connection)
            while connection.call and (received := await connection.receive()) is not None:
                if connection.call is not None:
                    self._take(connection.call, *received)
        except ProtocolError as error:
            self.metrics.refused.labels(str(error.code)).inc()
            connection.end(error.code, "refused", str(error))

    async def _join(self, connection: Connection) -> None:
        """Check a client and give it a call. Raises `ProtocolError` where it gets none."""
        protocol, websocket, requests = connection.protocol, connection.websocket, []
        if not self.allows_origin(websocket.headers):
            raise ProtocolError(1008, "pages of this origin may not connect")
        until = time.monotonic() + START_SECONDS
        while not protocol.started:
            left = until - time.monotonic()
            try:
                received = await asyncio.wait_for(connection.receive(), left)
            except asyncio.TimeoutError:
                raise ProtocolError(1008, "no start message came") from None
            if received is None:
                return
            requests += received[1]
        if not self.allows([*tokens_of(websocket), protocol.token or ""]):
            raise ProtocolError(1008, "a wrong token, or none")
        if self.draining is not None:
            raise ProtocolError(1013, "the server is shutting down; try again")
        known, calls = websocket.query_params.get("call", ""), self.scheduler.calls.values()
        calls = [call for call in calls if same(call.id, known)]
        call = calls[0] if calls else self.scheduler.open()
        if call is None:
            lines = f"all {self.engine.slots} lines are busy"
            raise ProtocolError(1013, f"{lines}; try again in a minute")
        if (other := call.connection) is not None:
            other.call = None
            other.end(TAKEN_OVER, "taken over")
            self.scheduler.rest(call)
        connection.call, call.connection = call, connection
        config = self.engine.lm.config
        protocol.greet({
            "type": "ready", "call": call.id, "rejoined": bool(calls), "sample_rate": SAMPLE_RATE,
            "patch_ms": self.engine.patch_seconds * 1000, "emotions": list(config.emotions),
            "languages": list(config.languages), "recognises_emotion": bool(config.emotion_dim),
            "rejoin_seconds": self.args.rejoin_seconds,
        })  # fmt: skip
        self.metrics.calls.labels("rejoined" if calls else "new").inc()
        voice = {k: v for k in ("emotion", "language") if (v := websocket.query_params.get(k))}
        self._take(call, None, [{"type": "start", **voice}, *requests])
        connection.put()

    def _take(self, call: Call, audio: np.ndarray | None, requests: list[dict]) -> None:
        call.heard = time.monotonic()
        if audio is not None:
            self.scheduler.feed(call, audio)
        for request in requests:
            names = "emotion", "language", "strength"
            voice = {name: request[name] for name in names if name in request}
            if voice.get("strength") is not None:
                voice["strength"] = float(np.clip(voice["strength"], 0, 10))
            if request["type"] == "stop":
                call.connection.end(1000, "stop")
            elif voice:
                self.scheduler.set_voice(call, **voice)

    def _leave(self, connection: Connection) -> None:
        """A connection has ended: its call too, or it rests until its caller is back."""
        call, connection.call = connection.call, None
        if call is not None:
            rests = not connection.left and connection.protocol.rejoins and self.args.rejoin_seconds
            (self.scheduler.rest if rests else self.scheduler.close)(call)

    # ---- the engine answers
    def _deliver(self, told: list[tuple], result: TickResult | None) -> None:
        for call, connection, audio, events in told:
            if connection is not None and connection.call is call:
                self.metrics.unsent.inc(connection.put(audio, events))
        if result is not None:
            self.metrics.ticks.observe(result.times.total)
            self.metrics.dropped.inc(result.dropped.sum())
            for waited in result.waited[result.active]:
                self.metrics.waited.observe(waited)

    def _fail(self, error: BaseException) -> None:
        self.failure = error
        self._end_all(1011, "the engine failed")

    # ---- time passes
    async def watch(self) -> None:
        """Ends what has lasted too long, and the server once its calls have ended."""
        while not self.stopped.is_set():
            await asyncio.sleep(WATCH_SECONDS)
            now, args, calls = time.monotonic(), self.args, list(self.scheduler.calls.values())
            for call in calls:
                if call.connection is None:
                    if now - call.rests_since > args.rejoin_seconds:
                        self.scheduler.close(call)
                elif args.idle_seconds and now - call.heard > args.idle_seconds:
                    call.connection.end(1000, "idle")
                elif args.max_call_seconds and now - call.began > args.max_call_seconds:
                    call.connection.end(1000, "max_call_seconds")
                elif self.draining is not None and not call.story.speaking["agent"]:
                    call.connection.end(1001, "shutdown")
            if self.draining is not None:
                over = not any(call.connection for call in calls)
                if over or now - self.draining > DRAIN_SECONDS:
                    self._end_all(1001, "shutdown")

    def _end_all(self, code: int, reason: str) -> None:
        for connection in self.connections:
            connection.end(code, reason)
        self.stopped.set()

    def drain(self) -> None:
        """No new calls; those there are end with their agent's words. A second time: at once."""
        if self.draining is not None:
            self._end_all(1001, "shutdown")
        self.draining = time.monotonic()

    async def run(self, listener: socket.socket) -> None:
        """Serve until SIGTERM or Ctrl-C and the agents' last words. Raises what broke it."""
        import uvicorn

        settings = {"ws_max_size": MAX_MESSAGE, "ws_per_message_deflate": False, "lifespan": "off"}
        settings |= {"ws_ping_interval": PING_SECONDS, "ws_ping_timeout": PING_SECONDS}
        settings |= {"log_level": "critical", "timeout_graceful_shutdown": 2}
        web = uvicorn.Server(uvicorn.Config(build_app(self), **settings))
        web.handle_exit = lambda *_: self.loop.call_soon_threadsafe(self.drain)
        self.scheduler.start()
        tasks = [asyncio.create_task(part) for part in (self.watch(), web.serve([listener]))]
        await self.stopped.wait()
        until = time.monotonic() + 2.0  # for goodbyes
        while web.server_state.connections and time.monotonic() < until:
            await asyncio.sleep(WATCH_SECONDS)
        web.should_exit = True
        await asyncio.wait(tasks)
        self.scheduler.stop()
        if self.failure is not None:
            raise self.failure


def same(one: str, other: str) -> bool:
    """Compared in a time that does not tell how much of it is right."""
    return hmac.compare_digest(*(text.encode("utf-8", "replace") for text in (one, other)))


def tokens_of(request: Any) -> list[str]:
    """What a client gives as its token: in a header, in the URL, or as OpenAI's browsers do."""
    kind, _, value = request.headers.get("authorization", "").partition(" ")
    if kind.lower() == "basic":
        with contextlib.suppress(ValueError):
            value = base64.b64decode(value).decode("utf-8", "replace").rpartition(":")[2]
    keys = [
        k.partition("openai-insecure-api-key.")[2] for k in request.scope.get("subprotocols", ())
    ]
    return [value, request.query_params.get("token", ""), *keys]


def build_app(server: Server) -> Any:
    """The web application: the page, health, metrics, and a WebSocket for each protocol."""
    from fastapi import FastAPI
    from prometheus_client import generate_latest
    from starlette.responses import FileResponse, JSONResponse, PlainTextResponse, Response
    from starlette.routing import Route, WebSocketRoute

    async def page(request: Any) -> Response:
        return FileResponse(HERE / "page.html", headers={"cache-control": "no-cache"})

    async def ping(request: Any) -> Response:
        state, code = ("healthy", 200) if server.draining is None else ("draining", 503)
        counts = {"calls": len(server.scheduler.calls), "slots": server.engine.slots}
        return JSONResponse({"status": state, **counts}, code)

    async def metrics(request: Any) -> Response:
        if not server.allows(tokens_of(request)):
            return PlainTextResponse("a wrong token, or none\n", 401)
        return Response(generate_latest(server.metrics.registry), media_type="text/plain")

    routes: list = [Route("/", page), Route("/ping", ping), Route("/metrics", metrics)]
    for path, protocol in PROTOCOLS.items():
        serve_client = functools.partial(server.serve_client, make_protocol=protocol)
        routes.append(WebSocketRoute(path, serve_client))
    return FastAPI(routes=routes, openapi_url=None)


# ------------------------------------------------------------------------------------------ main


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    for name in ("fastapi", "uvicorn", "websockets", "prometheus_client", "sphn"):
        if importlib.util.find_spec(name) is None:
            pip = "pip install fastapi uvicorn websockets prometheus-client sphn"
            raise UserError(f"the server needs {name}: {pip}")
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
        print("whoever reaches this port may call: give it a --token")
    print(f"http://{host}:{listener.getsockname()[1]}/", flush=True)

    async def serve() -> None:
        await Server(engine, args).run(listener)

    asyncio.run(serve())
    print("every call has ended")


if __name__ == "__main__":
    run(main, resumes=False)
