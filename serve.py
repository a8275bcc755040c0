"""Phase 5: a WebSocket server, many callers on one model.

    python serve.py --codec models/codec --lm models/s2s_emotion --slots 8 --token SECRET

`/` is a page to talk from a browser, `/ping` health, `/metrics` for Prometheus; callers connect to
`/api/pcm`, `/api/chat`, `/v1/realtime` or `/telephone` (protocols.py). SIGTERM or Ctrl-C lets the
agents finish their words; a second one ends at once.
"""

import argparse
import asyncio
import base64
import contextlib
import hmac
import itertools
import os
import secrets
import socket
import subprocess
import time
import traceback
from collections import deque
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from audio import SAMPLE_RATE
from command import ArgumentParser, UserError, needed, number, run, whole
from duplex import DuplexEngine, PatchQueue, Story, TickResult, engine_of
from protocols import PROTOCOLS, Protocol, ProtocolError

HERE = Path(__file__).parent
TINY = HERE / "checkpoints" / "tiny"
MAX_MESSAGE = 2**20  # bytes
MESSAGES_A_SECOND, TIMES_REAL_TIME, BURST_SECONDS = 200, 20, 5  # more from a client is refused
MAX_UNSENT = 25  # replies that wait for a slow client; audio beyond is dropped, oldest first
SEND_SECONDS, PING_SECONDS, START_SECONDS = 20.0, 20.0, 10.0
VOICE = "emotion", "language", "strength"
DRAIN_SECONDS, WATCH_SECONDS = 10.0, 0.1  # for the agents' last words; between two looks
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
    more("--seed", type=whole(0, 2**63 - 1), default=0, help="of the first call; each has its own")
    more("--decoder", choices=("general", "agent"), help="of the codec [the agent's, if any]")
    more("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    more("--threads", type=whole(1, 1024), default=1, help="CPU threads")
    args = parser.parse_args(argv)
    args.token = args.token or os.environ.get("SAMVAD_TOKEN")
    return args


class Budget:
    """A token bucket: refilled steadily up to a burst."""

    def __init__(self, a_second: float, burst: float):
        self.a_second, self.burst, self.left, self._seen = a_second, burst, burst, time.monotonic()

    def take(self, amount: float = 1.0) -> bool:
        """Whether so much was left; it is taken then."""
        now = time.monotonic()
        self.left = min(self.burst, self.left + (now - self._seen) * self.a_second)
        enough, self._seen = amount <= self.left, now
        self.left -= amount * enough
        return enough


class Call:
    """One conversation on one slot. It outlives the connections that carry it."""

    def __init__(self, slot: int, engine: DuplexEngine, buffer_seconds: float, seed: int):
        self.slot, self.seed, self.id = slot, seed, secrets.token_urlsafe(16)
        self.connection: Connection | None = None
        self.began = self.heard = time.monotonic()
        self.voice: dict[str, Any] = {}
        self.story = Story(engine)
        most = max(3, round(buffer_seconds / engine.patch_seconds))
        self.inbox = PatchQueue(engine.patch_samples, most)
        # Served no faster than time goes (and clocks differ), but for what the server owes.
        self.pace = Budget(1.01 / engine.patch_seconds, most)
        self.pace.left = 2.0

    def rest(self) -> None:
        """Until it has a connection again; input that was not answered yet is forgotten."""
        self.connection, self.heard = None, time.monotonic()
        self.inbox = PatchQueue(self.inbox.patch_samples, self.inbox.most)


class Scheduler:
    """The engine on one cadence, on which all slots step together; its steps run on a thread."""

    def __init__(self, engine: DuplexEngine, buffer_seconds: float, threads: int):
        self.engine, self.buffer_seconds, self.calls = engine, buffer_seconds, {}
        self.fed, self._seeds = asyncio.Event(), itertools.count(engine.seed)
        self._thread = ThreadPoolExecutor(1, "engine", torch.set_num_threads, (threads,))

    def open(self) -> Call:
        """A call on a free slot; `ProtocolError` where all are taken."""
        if not (free := set(range(self.engine.slots)) - self.calls.keys()):
            raise ProtocolError(1013, f"all {self.engine.slots} lines are busy; try again later")
        call = Call(min(free), self.engine, self.buffer_seconds, next(self._seeds))
        self.calls[call.slot] = call
        self.engine.set_voice(call.slot)
        return call

    async def ticks(self) -> AsyncIterator[tuple[list, TickResult]]:
        """(call, its connection, events) of each call served, and what the engine gave, a tick.

        A tick serves every slot with a patch waiting, one a patch's length, but without a pause for
        as long as the server is behind with a call: else what once came late stays late."""
        length, clock, due = self.engine.patch_seconds, self.engine.clock, 0.0
        while True:
            self.fed.clear()
            waiting = [call for call in self.calls.values() if call.inbox]
            began = clock()
            behind = any(len(call.inbox) > 1 and call.pace.left >= 1 for call in waiting)
            if not waiting:
                await self.fed.wait()
            elif began < due and not behind:
                await asyncio.sleep(due - began)
            elif taken := [(c, c.connection, c.inbox.popleft()) for c in waiting if c.pace.take()]:
                step = asyncio.get_running_loop().run_in_executor(self._thread, self._step, taken)
                yield await step
                # A patch that came late does not shift the cadence; a pause or a catch-up does.
                due = (due if due <= began < due + length else began) + length
            else:
                due = max(due, began + length / 4)  # all who wait were too fast

    def _step(self, taken: list[tuple]) -> tuple[list, TickResult]:
        for call, _, patch in taken:
            if not call.story.counts["received"]:  # the slot's last caller is forgotten
                self.engine.reset(call.slot, call.seed)
            self.engine.queues[call.slot].append(patch)
        result = self.engine.run_once()
        return [(c, to, c.story.tell(c.slot, result, patch.lost)) for c, to, patch in taken], result


class Connection:
    """One WebSocket: its messages become audio and requests, what waits for it is bounded."""

    def __init__(self, websocket: Any, protocol: Protocol):
        self.websocket, self.protocol = websocket, protocol
        self.call: Call | None = None
        self.closing: tuple[int, str] | None = None  # code and reason, once told to
        self.left = False  # the call ends with this connection
        self._unsent: deque[tuple[np.ndarray | None, list[dict]]] = deque()
        self._more, self._allowance = asyncio.Event(), Budget(1, BURST_SECONDS)

    def put(self, audio: np.ndarray | None, events: list[dict]) -> int:
        """Queue a reply; returns how many patches of audio a slow client has lost by it."""
        self._more.set()
        lost = None
        if self.closing is None:
            self._unsent.append((audio, events))
        if len(self._unsent) > MAX_UNSENT:
            lost, events = self._unsent.popleft()
            self._unsent[0][1][:0] = events
        return int(lost is not None)

    def end(self, code: int, reason: str, message: str = "") -> None:
        """Say goodbye, send what waits, close. `message`: what the client did wrong."""
        error = [{"type": "error", "message": message}] if message else []
        self.put(None, [*error, {"type": "bye", "reason": reason}])
        self.closing, self.left = self.closing or (code, reason), True

    async def receive(self) -> np.ndarray | dict | None:
        """What the next message holds. Raises `ProtocolError`, and `ConnectionError` at the end."""
        message = await self.websocket.receive()
        if message["type"] == "websocket.disconnect":
            # Who hangs up says 1000, or no code; a lost line has no reason, a proxy other codes.
            self.left |= "reason" in message and message["code"] in (1000, 1005)
            raise ConnectionError
        data = message.get("bytes")
        said = self.protocol.receive(message.get("text") if data is None else data)
        seconds = len(said) / SAMPLE_RATE if isinstance(said, np.ndarray) else 0
        if not self._allowance.take(max(1 / MESSAGES_A_SECOND, seconds / TIMES_REAL_TIME)):
            most = f"{MESSAGES_A_SECOND} messages a second, or {TIMES_REAL_TIME} times real time"
            raise ProtocolError(1008, f"more than {most}")
        self._more.set()  # it may have answered
        return said

    async def send(self) -> None:
        """Send what is queued, as it comes, until told to end or the client has gone."""
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
                    except Exception:  # a lost client, or one that takes nothing
                        return


def gpu_utilization(device: torch.device) -> float:
    """The share of its last moment in which a GPU was busy; NaN where nvidia-smi cannot say."""
    which = f"GPU-{torch.cuda.get_device_properties(device).uuid}"
    ask = "nvidia-smi", "--query-gpu=utilization.gpu", "--format=csv,noheader,nounits", "-i", which
    try:
        return float(subprocess.run(ask, capture_output=True, check=True, timeout=5).stdout) / 100
    except (OSError, subprocess.SubprocessError, ValueError):
        return np.nan


def make_metrics(engine: DuplexEngine, calls: dict) -> SimpleNamespace:
    """What `/metrics` tells of one server."""
    from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector

    to = {"registry": CollectorRegistry(), "namespace": "samvad"}
    times = to | {"buckets": [0.005, 0.01, 0.02, 0.03, 0.04, 0.06, 0.08, 0.12, 0.2, 0.4, 1.0]}
    ProcessCollector(registry=to["registry"])  # CPU and memory
    if (device := engine.device).type == "cuda":
        memory = Gauge("gpu_memory_bytes", "taken by this process", **to)
        memory.set_function(lambda: torch.cuda.memory_reserved(device))
        busy = Gauge("gpu_utilization", "of its last moment, 0 to 1, by whatever process", **to)
        busy.set_function(lambda: gpu_utilization(device))
    Gauge("slots", "callers at most", **to).set(engine.slots)
    Gauge("live_calls", "those that rest among them", **to).set_function(lambda: len(calls))
    return SimpleNamespace(registry=to["registry"],
        calls=Counter("calls", "callers taken", ["how"], **to),
        refused=Counter("refused", "clients refused, by close code", ["code"], **to),
        dropped=Counter("dropped_patches", "input that came too late or too fast", **to),
        unsent=Counter("unsent_patches", "replies that a slow client did not take", **to),
        ticks=Histogram("tick_seconds", "a step of all slots", **times),
        waited=Histogram("waited_seconds", "input until its tick", **times))  # fmt: skip


class Server:
    """Callers on one side, the engine on the other, on one event loop."""

    def __init__(self, engine: DuplexEngine, args: argparse.Namespace):
        self.engine, self.args = engine, args
        self.scheduler = Scheduler(engine, args.buffer_seconds, args.threads)
        self.metrics = make_metrics(engine, self.scheduler.calls)
        self.connections: set[Connection] = set()
        self.draining: float | None = None  # since when

    def allows(self, request: Any, said: str | None = None) -> bool:
        """Whether a client gives the token: in a header, the URL, as a subprotocol, or `said`."""
        kind, _, value = request.headers.get("authorization", "").partition(" ")
        if kind.lower() == "basic":
            with contextlib.suppress(ValueError):
                value = base64.b64decode(value).decode("utf-8", "replace").rpartition(":")[2]
        offered = request.scope.get("subprotocols", ())
        keys = [name.partition("openai-insecure-api-key.")[2] for name in offered]
        given = [value, request.query_params.get("token", ""), said or "", *keys]
        return not self.args.token or any(same(token, self.args.token) for token in given)

    def allows_origin(self, headers: Any) -> bool:
        """Whether a page may connect: one of this host, or an allowed one; only pages name one."""
        origin, allowed = headers.get("origin"), self.args.allow_origin
        own = headers.get("host"), headers.get("x-forwarded-host")
        return "*" in allowed or origin in (None, *allowed) or origin.partition("://")[2] in own

    async def serve_client(self, make_protocol: type[Protocol], websocket: Any) -> None:
        """One WebSocket from its handshake to its end, whatever its client does."""
        offered = websocket.scope.get("subprotocols", ())
        await websocket.accept(subprotocol="realtime" if "realtime" in offered else None)
        connection = Connection(websocket, make_protocol(websocket.query_params))
        self.connections.add(connection)
        parts = connection.send(), self._read(connection)
        sending, reading = tasks = [asyncio.create_task(part) for part in parts]
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            # Last words are to be sent, or a client's reason to leave may not be read yet.
            last, most = (sending, SEND_SECONDS) if connection.closing else (reading, WATCH_SECONDS)
            await asyncio.wait([last], timeout=most)
        finally:
            for task in tasks:
                task.cancel()
            self.connections.discard(connection)
            call, connection.call = connection.call, None
            if call is not None and (connection.left or not connection.protocol.rejoins):
                del self.scheduler.calls[call.slot]
            elif call is not None:
                call.rest()
        for end in await asyncio.gather(*tasks, return_exceptions=True):
            if isinstance(end, Exception):  # a bug
                traceback.print_exception(end)
                connection.closing = 1011, "an internal error"
        if connection.closing is not None:
            with contextlib.suppress(Exception):  # it may be closed
                await websocket.close(*connection.closing)

    async def _read(self, connection: Connection) -> None:
        until = time.monotonic() + START_SECONDS
        try:
            if not self.allows_origin(connection.websocket.headers):
                raise ProtocolError(1008, "pages of this origin may not connect")
            while connection.closing is None:
                if connection.call is None and connection.protocol.started:
                    self._join(connection)
                left = None if connection.call else until - time.monotonic()
                said = await asyncio.wait_for(connection.receive(), left)
                if connection.call is not None:
                    self._take(connection.call, said)
        except ConnectionError:
            return
        except (ProtocolError, asyncio.TimeoutError) as error:
            code = getattr(error, "code", 1008)
            self.metrics.refused.labels(str(code)).inc()
            connection.end(code, "refused", str(error) or "no start message came")

    def _join(self, connection: Connection) -> None:
        """Give a client a call, a new one or its own. `ProtocolError` where it gets none."""
        query = connection.websocket.query_params
        if not self.allows(connection.websocket, connection.protocol.token):
            raise ProtocolError(1008, "a wrong token, or none")
        if self.draining is not None:
            raise ProtocolError(1013, "the server is shutting down; try again")
        own = [c for c in self.scheduler.calls.values() if same(c.id, query.get("call", ""))]
        call = own[0] if own else self.scheduler.open()
        if call.connection is not None:
            call.connection.call = None
            call.connection.end(TAKEN_OVER, "taken over")
            call.rest()
        connection.call, call.connection = call, connection
        self.metrics.calls.labels("rejoined" if own else "new").inc()
        config = self.engine.lm.config
        connection.put(None, [{
            "type": "ready", "call": call.id, "rejoined": bool(own), "sample_rate": SAMPLE_RATE,
            "patch_ms": self.engine.patch_seconds * 1000, "emotions": list(config.emotions),
            "languages": list(config.languages), "recognises_emotion": bool(config.emotion_dim),
            "rejoin_seconds": self.args.rejoin_seconds}])  # fmt: skip
        voice = {name: query[name] for name in VOICE if query.get(name)}
        self._take(call, {"type": "start", **voice})

    def _take(self, call: Call, said: np.ndarray | dict | None) -> None:
        call.heard = time.monotonic()
        if isinstance(said, np.ndarray):
            call.inbox.push(said, self.engine.clock())
            self.scheduler.fed.set()
        elif said and said["type"] == "stop":
            call.connection.end(1000, "stop")
        elif said:
            voice = call.voice | {name: said[name] for name in VOICE if name in said}
            try:
                if voice.get("strength") is not None:
                    voice["strength"] = number(0, 10)(str(voice["strength"]))
                self.engine.set_voice(call.slot, **voice)
                call.voice = voice
            except (UserError, argparse.ArgumentTypeError) as error:
                call.connection.put(None, [{"type": "error", "message": str(error)}])

    async def _answer(self) -> None:
        async for told, result in self.scheduler.ticks():
            for call, connection, events in told:
                if connection.call is call:
                    self.metrics.unsent.inc(connection.put(result.audio[call.slot], events))
            self.metrics.ticks.observe(result.times.total)
            self.metrics.dropped.inc(result.dropped.sum())
            for waited in result.waited[result.active]:
                self.metrics.waited.observe(waited)

    def _watch(self) -> bool:
        """Ends what has lasted too long; True once a server that is to end has no calls left."""
        now, args, calls = time.monotonic(), self.args, self.scheduler.calls
        for call in list(calls.values()):
            if call.connection is None:
                if now - call.heard > args.rejoin_seconds:
                    del calls[call.slot]
            elif 0 < args.idle_seconds < now - call.heard:
                call.connection.end(1000, "idle")
            elif 0 < args.max_call_seconds < now - call.began:
                call.connection.end(1000, "max_call_seconds")
            elif self.draining is not None and not call.story.speaking["agent"]:
                call.connection.end(1001, "shutdown")
        over = not any(call.connection for call in calls.values())
        return self.draining is not None and (over or now - self.draining > DRAIN_SECONDS)

    def drain(self) -> None:
        """No new calls; those there are end with their agent's words. A second time: at once."""
        self.draining = time.monotonic() if self.draining is None else -np.inf

    async def run(self, listener: socket.socket) -> None:
        """Serve until SIGTERM or Ctrl-C and the agents' last words. Raises what broke it."""
        import uvicorn

        settings = {"ws_max_size": MAX_MESSAGE, "ws_per_message_deflate": False, "lifespan": "off"}
        settings |= {"ws_ping_interval": PING_SECONDS, "ws_ping_timeout": PING_SECONDS}
        settings |= {"log_level": "critical", "timeout_graceful_shutdown": 2}
        web = uvicorn.Server(uvicorn.Config(build_app(self), **settings))
        loop = asyncio.get_running_loop()
        web.handle_exit = lambda *_: loop.call_soon_threadsafe(self.drain)
        serving, answering = (loop.create_task(t) for t in (web.serve([listener]), self._answer()))
        while not (answering.done() or self._watch()):
            await asyncio.wait([answering], timeout=WATCH_SECONDS)
        why = (1011, "the engine failed") if answering.done() else (1001, "shutdown")
        for connection in self.connections:
            connection.end(*why)
        until = time.monotonic() + 2.0  # for goodbyes
        while web.server_state.connections and time.monotonic() < until:
            await asyncio.sleep(WATCH_SECONDS)
        web.should_exit = True
        await serving
        answering.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await answering


def same(one: str, other: str) -> bool:
    """Compared in a time that does not tell how much of it is right."""
    return hmac.compare_digest(*(text.encode("utf-8", "replace") for text in (one, other)))


def build_app(server: Server) -> Any:
    """The web application: the page, health, metrics, and a WebSocket for each protocol."""
    from fastapi import FastAPI
    from prometheus_client import generate_latest
    from starlette.responses import FileResponse, JSONResponse, Response
    from starlette.routing import Route, WebSocketRoute

    async def page(request: Any) -> Response:
        return FileResponse(HERE / "page.html", headers={"cache-control": "no-cache"})

    async def ping(request: Any) -> Response:
        state, code = ("healthy", 200) if server.draining is None else ("draining", 503)
        counts = {"calls": len(server.scheduler.calls), "slots": server.engine.slots}
        return JSONResponse({"status": state, **counts}, code)

    async def metrics(request: Any) -> Response:
        if not server.allows(request):
            return Response("a wrong token, or none\n", 401)
        text = await asyncio.to_thread(generate_latest, server.metrics.registry)  # nvidia-smi waits
        return Response(text, media_type="text/plain")

    routes = [Route(*place) for place in (("/", page), ("/ping", ping), ("/metrics", metrics))]
    routes += [WebSocketRoute(at, partial(server.serve_client, p)) for at, p in PROTOCOLS.items()]
    return FastAPI(routes=routes, openapi_url=None)


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    for name in ("fastapi", "uvicorn", "websockets", "prometheus_client", "sphn"):
        needed(name, f"the server needs {name}: pip install -r requirements.txt")
    host = args.host or ("0.0.0.0" if args.token else "127.0.0.1")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.create_server((host, args.port), family=family)
    engine, models = engine_of(args, args.slots)
    engine.warm_up()
    print(f"{models}, {args.slots} slots")
    if not args.token and host not in ("127.0.0.1", "::1", "localhost"):
        print("whoever reaches this port may call: give it a --token")
    print(f"http://{host}:{listener.getsockname()[1]}/", flush=True)
    asyncio.run(Server(engine, args).run(listener))
    print("every call has ended")


if __name__ == "__main__":
    run(main, resumes=False)
