"""Phase 5: paced callers against a server: response latency, ticks, drops, refusals, its load.

    python load_test.py --server ws://127.0.0.1:8000 --callers 8
    python load_test.py --server ws://127.0.0.1:8000 --callers 1 2 4 8 16   # a ramp, a row each
    python load_test.py --server ws://127.0.0.1:8000 --find_capacity

A caller asks its recordings in turn, in real time, and hears out the answer to each. Latency is
what the caller hears, by the ledger's rules. The last line of stdout is all rows as JSON.
"""

import argparse
import asyncio
import base64
import contextlib
import json
import os
import time
import urllib.request
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

import ledger
from audio import SAMPLE_RATE, from_pcm16, read_audio, to_pcm16
from command import ArgumentParser, UserError, needed, number, run, whole
from ledger import UserTurn, find_speech, kind_of, percentiles, response_latencies
from protocols import PROTOCOLS, Protocol
from stream_demo import address

CHUNK_SECONDS = 0.04
MOST_WAITING = 0.08  # seconds of sound that wait to be played, before silence is left out
TARGET_MS = 400.0
COLUMNS = {"callers": "callers", "response_ms": "p95, ms", "turns": "turns", "answered": "answered",
           "tick_ms": "tick p95", "dropped_patches": "dropped", "refused": "refused",
           "cut_off": "cut off", "cpu_cores": "cores", "memory_mb": "MB",
           "gpu_percent": "GPU %", "gpu_memory_mb": "GPU MB"}  # fmt: skip
TWILIO_START = json.dumps({"event": "start", "streamSid": "1", "start": {"streamSid": "1"}})
PATHS = {"pcm": "/api/pcm", "moshi": "/api/chat", "openai": "/v1/realtime", "twilio": "/telephone"}


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = ArgumentParser(__doc__)
    add = parser.add_argument
    add("--server", default="ws://127.0.0.1:8000", help="ws://HOST:PORT or wss://HOST")
    add("--callers", nargs="+", type=whole(1, 4096), default=[4], help="at once; several: a ramp")
    add("--seconds", type=number(1, 86400), default=30.0, help="of each row, all callers on")
    add("--find_capacity", action="store_true", help="the most callers with p95 < 400 ms, no drop")
    add("--wav", nargs="+", type=Path, help="spoken questions [samples/*.wav]")
    add("--token", default=os.environ.get("SAMVAD_TOKEN"), help="of the server [$SAMVAD_TOKEN]")
    more = parser.add_argument_group("advanced").add_argument
    more("--protocol", choices=PATHS, default="pcm", help="what the callers speak")
    more("--ramp_seconds", type=number(0, 3600), default=2.0, help="until a row's last has come")
    more("--answer_seconds", type=number(1, 60), default=4.0, help="of silence after a question")
    more("--most_callers", type=whole(1, 4096), default=512, help="that --find_capacity tries")
    return parser.parse_args(argv)


class OpenAICaller(Protocol):
    """The client's end of `/v1/realtime`; the other formats are the same both ways."""

    def send(self, audio: np.ndarray, events: Sequence[dict]) -> None:
        coded = base64.b64encode(to_pcm16(audio)).decode()
        self.out.append(json.dumps({"type": "input_audio_buffer.append", "audio": coded}))

    def receive(self, message: str) -> np.ndarray | None:
        event = json.loads(message)
        is_audio = event["type"] == "response.output_audio.delta"
        return from_pcm16(base64.b64decode(event["delta"])) if is_audio else None


class Caller:
    """One call, from which come latencies (None: unanswered), ticks and counts."""

    def __init__(self, args: argparse.Namespace, questions: Sequence):
        self._args, self._questions = args, questions
        self.counts, self.ticks, self.late = Counter(), [], 0.0
        self._turns: list[UserTurn] = []
        self._levels, self._times, self._ready = [np.zeros(0)], [np.zeros(0)], False
        path = PATHS[args.protocol]
        self._url = address(args.server, path)
        self._format = (OpenAICaller if args.protocol == "openai" else PROTOCOLS[path])({})
        if args.protocol == "twilio":
            self._format.receive(TWILIO_START)
            self._format.out.append(TWILIO_START)

    async def call(self, first: int, wait: float) -> None:
        """From question `first` on, `wait` seconds from now, for as long as is asked."""
        import websockets

        await asyncio.sleep(wait)
        token = self._args.token
        bearer = {"Authorization": f"Bearer {token}"} if token else {}
        options = {"additional_headers": bearer, "compression": None, "open_timeout": 20}
        try:
            async with websockets.connect(self._url, **options) as socket:
                self._start = time.perf_counter()
                listening = asyncio.create_task(self._listen(socket))
                listening.add_done_callback(lambda task: task.cancelled() or task.exception())
                await self._speak(socket, first)
                await asyncio.sleep(0.5)  # for what is under way
                if not listening.cancel():
                    listening.result()  # what went wrong in it
        except (OSError, websockets.exceptions.WebSocketException):
            self.counts["cut_off" if self._ready else "refused"] += 1

    async def _speak(self, socket: Any, first: int) -> None:
        chunk, sent = round(CHUNK_SECONDS * SAMPLE_RATE), 0
        pause = np.zeros(round(self._args.answer_seconds * SAMPLE_RATE), np.float32)
        while sent < self._args.seconds * SAMPLE_RATE:
            audio, turn = self._questions[first % len(self._questions)]
            first, began = first + 1, sent / SAMPLE_RATE
            said = np.concatenate([audio, pause])
            for at in range(0, len(said) // chunk * chunk, chunk):
                sent += chunk
                due = self._start + sent / SAMPLE_RATE - time.perf_counter()
                await asyncio.sleep(max(0.0, due))
                self.late = max(self.late, -due)
                self._format.send(said[at : at + chunk], [])
                while self._format.out:
                    await socket.send(self._format.out.pop(0))
            self._turns.append(UserTurn(began + turn.start, began + turn.end))

    async def _listen(self, socket: Any) -> None:
        played = 0.0  # until when what came before is heard
        async for message in socket:
            event = json.loads(message) if isinstance(message, str) else {}
            if event.get("type") == "latency":
                self.ticks.append(event["tick_ms"] / 1000)  # a second's mean
                self.counts["dropped_patches"] = event["dropped"]
            elif isinstance(heard := self._format.receive(message), np.ndarray):
                now, levels = time.perf_counter() - self._start, ledger.frame_levels(heard)
                self._ready = True
                if played - now > MOST_WAITING and levels.max(initial=-np.inf) < ledger.QUIET_DBFS:
                    continue  # as page.html does after a stall: else what comes stays late for good
                played = max(played, now)
                self._levels.append(levels)
                self._times.append(played + ledger.LEVEL_SECONDS * np.arange(len(levels)))
                played += len(heard) / SAMPLE_RATE

    def latencies(self) -> list[float | None]:
        levels, times = np.concatenate(self._levels), np.concatenate(self._times)
        return response_latencies(levels, self._turns, times)


def server_metrics(args: argparse.Namespace) -> dict[str, float]:
    """The server's `/metrics`, those without labels; {} where it does not tell."""
    url = address(args.server, "/metrics").replace("ws", "http", 1)
    request = urllib.request.Request(url, headers={"Authorization": f"Bearer {args.token}"})
    with contextlib.suppress(OSError, ValueError):
        lines = urllib.request.urlopen(request, timeout=5).read().decode().splitlines()
        rows = [line.split() for line in lines if line and not {"#", "{"} & set(line)]
        return {name: float(value) for name, value in rows if value != "NaN"}
    return {}


async def measure(args: argparse.Namespace, questions: Sequence, callers: int) -> dict:
    """A row of the table: so many callers at once, for as long as is asked."""
    crowd = [Caller(args, questions) for _ in range(callers)]
    before, began = await asyncio.to_thread(server_metrics, args), time.perf_counter()
    calls = [caller.call(n, n * args.ramp_seconds / callers) for n, caller in enumerate(crowd)]
    together = asyncio.gather(*calls)
    await asyncio.wait([together], timeout=args.ramp_seconds + args.seconds)  # all still on
    after, seconds = await asyncio.to_thread(server_metrics, args), time.perf_counter() - began
    await together
    counts = sum((caller.counts for caller in crowd), Counter())
    latencies = [latency for caller in crowd for latency in caller.latencies()]
    answered = [one for one in latencies if kind_of(one) == "answered"]
    cpu = after.get("process_cpu_seconds_total", 0) - before.get("process_cpu_seconds_total", 0)
    memory, gpu = (after.get(f"{name}_memory_bytes") for name in ("process_resident", "samvad_gpu"))
    busy = after.get("samvad_gpu_utilization")
    return {"callers": callers, "seconds": round(seconds, 1), "response_ms": percentiles(answered),
        "turns": len(latencies), "answered": len(answered),
        "tick_ms": percentiles([tick for caller in crowd for tick in caller.ticks]),
        **{name: counts[name] for name in ("dropped_patches", "refused", "cut_off")},
        "cpu_cores": round(cpu / seconds, 2) if cpu else None,
        "memory_mb": memory and round(memory / 2**20), "gpu_memory_mb": gpu and round(gpu / 2**20),
        "gpu_percent": busy if busy is None else round(100 * busy),
        "caller_late_ms": round(1000 * max(caller.late for caller in crowd), 1)}  # fmt: skip


def holds(row: dict) -> bool:
    """Whether the server keeps so many: all answered in time at p95, none lost."""
    lost = row["dropped_patches"] + row["refused"] + row["cut_off"]
    return row["response_ms"] is not None and row["response_ms"]["p95"] < TARGET_MS and not lost


def find_capacity(measured: Callable[[int], dict], most: int) -> int:
    """The largest number of callers that the server holds: by doubling, then by halves."""
    holding, failing = 0, most + 1
    while failing - holding > 1:
        middle = (holding + failing) // 2
        callers = min(2 * holding or 1, most, middle) if failing > most else middle
        holding, failing = (callers, failing) if holds(measured(callers)) else (holding, callers)
    return holding


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    needed("websockets", "load_test.py needs websockets: pip install websockets")
    wavs = args.wav or sorted((Path(__file__).parent / "samples").glob("*.wav"))
    questions = [(audio, find_speech(audio)) for audio in map(read_audio, wavs)]
    if not all(turn for _, turn in questions):
        raise UserError("nobody speaks in one of the recordings; give --wav spoken questions")
    rows: list[dict] = []

    def measured(callers: int) -> dict:
        row = asyncio.run(measure(args, questions, callers))
        rows.append(row)
        columns = {k: v for k, v in COLUMNS.items() if "gpu" not in k or rows[0][k] is not None}
        for line in (columns.values(), [row[name] for name in columns])[len(rows) > 1 :]:
            shown = ((cell["p95"] if isinstance(cell, dict) else cell) for cell in line)
            print("".join(f"{'-' if cell is None else cell:>10}" for cell in shown))
        if row["refused"] == callers:
            raise UserError(f"{args.server}: took no caller; is serve.py there, and --token right?")
        if row["caller_late_ms"] > 1000 * CHUNK_SECONDS:
            print(f"  callers ran {row['caller_late_ms']:.0f} ms late: this machine is too busy")
        return row

    result = {"server": args.server, "protocol": args.protocol, "rows": rows}
    try:
        if args.find_capacity:
            result["capacity"] = find_capacity(measured, args.most_callers)
            print(f"capacity: {result['capacity']} callers at p95 < {TARGET_MS:.0f} ms, none lost")
            tick = (rows[-1]["tick_ms"] or {}).get("p95", 0)
            if tick > 1000 * CHUNK_SECONDS:  # at one caller as at all: every slot is computed
                print(f"a tick of all its slots takes {tick:.0f} ms: give the server fewer --slots")
        else:
            for callers in args.callers:
                measured(callers)
    finally:
        print(json.dumps(result, allow_nan=False))


if __name__ == "__main__":
    run(main, resumes=False)
