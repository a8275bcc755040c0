"""Phase 5: talk to Samvad, or let it answer a recording.

    python stream_demo.py                                      # microphone and speaker
    python stream_demo.py --wav question.wav --out reply.wav   # no sound card needed
    python stream_demo.py --server wss://HOST --token SECRET   # the model is at serve.py's

With --server it needs numpy, websockets and, for a microphone, sounddevice alone. The reply file
begins when the question does: playing both together gives the conversation as it happened. The last
line of stdout is the latency ledger as JSON. Audio is 24 kHz mono.
"""

import argparse
import contextlib
import json
import os
import queue
import shutil
import sys
import tempfile
import threading
import time
import wave
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np

import command
import ledger
from audio import SAMPLE_RATE, WRITABLE, AudioError, from_pcm16, read_audio, to_pcm16, write_audio
from command import ArgumentParser, UserError, first_line, number, run, whole, writable_file
from ledger import CallRecord, Delay, LatencyLedger, Reply, StageTimes, StreamResampler, UserTurn

TINY = Path(__file__).parent / "checkpoints" / "tiny"
BLOCK_SECONDS = 0.01  # what the sound card hands over at once
POLL_SECONDS, PANEL_SECONDS = 0.002, 0.2
MAX_INPUT_BLOCKS = 100
SILENT_SECONDS = 5.0  # without a sample of the microphone, or a word of the server: it is gone
REPLY_OVERTIME_SECONDS = 10.0  # a reply under way at the end of the tail may take this long


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = ArgumentParser(__doc__)
    add = parser.add_argument
    add("--wav", nargs="+", type=Path, help="spoken questions, instead of the microphone")
    add("--out", nargs="+", type=Path, help="reply files, one for each --wav [reply_NAME.wav]")
    add("--codec", type=Path, default=TINY / "codec", help="checkpoint folder")
    add("--lm", type=Path, default=TINY / "s2s", help="checkpoint folder")
    add("--server", help="wss://HOST or ws://HOST:PORT of a serve.py, instead of models here")
    add("--token", default=os.environ.get("SAMVAD_TOKEN"), help="of the server [$SAMVAD_TOKEN]")
    add("--emotion", choices=command.EMOTIONS, help="how the agent speaks [as it sees fit]")
    add("--emotion_strength", type=number(0, 10), default=1.0, help="of --emotion; 1 costs nothing")
    add("--language", choices=command.LANGUAGES[:3], help="of the call [recognised by the model]")
    add("--seed", type=whole(0, 2**63 - 1), default=0, help="of the sampling")
    add("--record", type=Path, metavar="WAV", help="the whole call: you left, the agent right")
    add("--list_devices", action="store_true", help="name microphones and speakers, and end")
    add("--input_device", help="microphone, by number or a part of its name [the system's]")
    add("--output_device", help="speaker, likewise [the system's]")
    add("--echo_cancel", action="store_true", help="for loudspeakers (pip install livekit)")
    add("--loopback", action="store_true", help="first time the way from speaker to microphone")
    more = parser.add_argument_group("advanced").add_argument
    more("--fast", action="store_true", help="with --wav: do not pace, never drop")
    more("--temperature", type=number(0, 100), help="of the sampling [the model's own]")
    more("--top_k", type=whole(1, 2**31), help="of the sampling [the model's own]")
    more("--eagerness", type=number(-100, 100), help="dB on its odds of speaking [the model's own]")
    more("--vad_flush", action="store_true", help="cut the agent off when the user barges in")
    more("--tail_seconds", type=number(0, 3600), default=4.0, help="of silence after each --wav")
    more("--decoder", choices=("general", "agent"), help="of the codec [the agent's, if any]")
    more("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    more("--threads", type=whole(1, 1024), default=1, help="CPU threads")
    args = parser.parse_args(argv)
    wavs, outs = args.wav or [], args.out or []
    if not wavs and (outs or args.fast):
        raise UserError(f"{'--out' if outs else '--fast'} needs --wav, a recording to answer")
    if outs and len(wavs) != len(outs):
        raise UserError(f"{len(wavs)} --wav files but {len(outs)} --out files; give one for each")
    here = {"codec", "lm", "seed", "fast", "temperature", "top_k", "eagerness", "vad_flush",
            "decoder", "device", "threads"} & parser.given(argv)  # fmt: skip
    if args.server and here:
        raise UserError(f"--{min(here)} is for models here, not for a --server; leave one out")
    args.out = outs or [Path(f"reply_{path.stem}.wav") for path in wavs]
    return args


def check_outputs(args: argparse.Namespace) -> None:
    """A reply must not be lost at the end of a call for want of a place to put it."""
    written = [("--out", out) for out in args.out]
    written += [("--record", args.record)] if args.record else []
    places = [path.resolve() for path in [*(args.wav or ()), *(path for _, path in written)]]
    for flag, path in written:
        if places.count(path.resolve()) > 1:
            raise UserError(f"{flag} {path}: is a question too, or of two replies; name it anew")
        writable_file(path, flag)
        if path.suffix.lower() not in (WRITABLE if flag == "--out" else (".wav",)):
            kind = f"cannot write '{path.suffix}' audio; end the name in .wav"
            raise UserError(f"{flag} {path}: {kind}")


class Screen:
    """Shows the events of `duplex.Story`: the words of both sides, a line a turn, and the user's
    emotion once the model is sure. `panel`: how loud and how late, on the terminal's next line."""

    def __init__(self, write: Callable[[str], Any] | None = None, panel: bool = False):
        self._print = write or (lambda text: print(text, end="", flush=True))
        self._panel, self._renewed = panel, 0.0
        self._line: tuple = ()  # who is speaking and the number of their turn
        self._speaking, self._held = Counter(), []  # words of the user over the agent's
        self._feeling, self._emotions, self._languages = "", Counter(), Counter()

    def event(self, event: dict) -> None:
        if event["type"] == "speech":
            self._speaking[event["who"]] = event["speaking"]
        elif event["type"] == "text":
            self._held.append(event)
        elif event["type"] == "emotion":
            self._emotions.update(event["posterior"])
            self._languages.update(filter(None, [event["language"]]))
            if event["name"] not in (None, self._feeling):
                self._say(f"(you sound {event['name']})\n")
            self._feeling = event["name"] or ""
        elif event["type"] == "error":
            self._say(f"({event['message']})\n")
        self._show_words()

    def _show_words(self) -> None:
        held, self._held = self._held, []
        for event in held:
            line, words = (event["who"], event["turn"]), event["text"]
            if (line[0], *self._line[:1]) == ("user", "agent") and self._speaking["agent"]:
                self._held.append(event)
            elif line == self._line:
                self._write(words)
            else:
                self._say(f"{'samvad' if line[0] == 'agent' else 'you'}: {words.lstrip()}", line)

    def _say(self, text: str, line: tuple = ()) -> None:
        """On a line of its own."""
        self._write("\n" * bool(self._line) + text)
        self._line = line

    def _write(self, text: str) -> None:
        if text := "\x1b[J" * self._panel + text:  # over the panel
            self._print(text)

    def user_line(self) -> str:
        """The user's emotion and language, from the moments the model found them speaking."""
        counts = self._emotions, self._languages
        if not all(counts):
            return "you: the model recognised no speech"
        best = [(max(c, key=c.get), max(c.values()) / sum(c.values())) for c in counts]
        return "you: sounded {} ({:.0%}), spoke {} ({:.0%})".format(*best[0], *best[1])

    def renew(self, heard: Sequence, record: CallRecord, dropped: int, now: float) -> None:
        """Draw the panel again. `heard`: the user's loudness, a block of 10 ms each."""
        if not self._panel or now - self._renewed < PANEL_SECONDS:
            return
        self._renewed, row = now, ""
        for who, blocks in (("you", heard[-20:]), ("samvad", record.levels[-5:])):
            loudest = np.concatenate(blocks).max(initial=-99.0)
            row += f"{who} {'#' * int(max(0, loudest + 60) / 10):6} "
        row += " ".join(f"{name} {1000 * s:.0f}" for name, s in record.delays[-1]._asdict().items())
        row = f"{row} ms, {dropped} dropped  {self._feeling}"[: shutil.get_terminal_size()[0]]
        self._write(f"\x1bD\x1b[A\x1b7\x1b[B\r{row}\x1b8")  # and back to where the words go on

    def close(self) -> None:
        self._speaking.clear()
        self._show_words()
        self._say("")


class Recorder:
    """`--record`: both sides in one WAV, user left, agent right, valid at any moment. The user's is
    the clock; what the agent says waits for it, the oldest given up as in `Playout`."""

    def __init__(self, path: Path):
        self._file = wave.open(os.fspath(path), "wb")  # noqa: SIM115
        self._file.setparams((2, 2, SAMPLE_RATE, 0, "NONE", ""))
        self._agent = np.zeros(0, np.float32)  # not written yet

    def add(self, side: int, audio: np.ndarray) -> None:
        """Samples [T] of side 0, the user, or 1, the agent."""
        if side == 1:
            self._agent = np.concatenate([self._agent, audio])[-int(Playout.MOST * SAMPLE_RATE) :]
            return
        both = np.zeros((len(audio), 2))
        agent, self._agent = np.split(self._agent, [len(audio)])
        both[:, 0], both[: len(agent), 1] = audio, agent
        self._file.writeframes(to_pcm16(both))

    def close(self) -> None:
        self.add(0, np.zeros(len(self._agent)))
        self._file.close()


# The agent's end, a line, carries one call after another: `start`, `send` samples of the user and
# `receive` replies and the events of `duplex.Story`, None while there is no more.
class LocalLine:
    """The models in this process. What needs torch is imported here: calls to a server do not."""

    def __init__(self, args: argparse.Namespace):
        from duplex import Story, engine_of

        engine, models = engine_of(args, vad_flush=args.vad_flush)
        self.engine, self.name = engine, f"{models}, seed {args.seed}"
        engine.set_voice(0, args.emotion, args.language)
        self._new_story, self._listens = lambda: Story(engine), args.vad_flush or not args.wav
        self.clock, self.patch_seconds = engine.clock, engine.patch_seconds
        delay = engine.lm.config.acoustic_delay / engine.lm.config.frame_rate
        self.ledger = LatencyLedger(engine.patch_seconds, delay, engine.warm_up())

    def start(self) -> None:
        self.engine.reset()
        self._story, self._said = self._new_story(), deque()
        self._detector = ledger.VoiceDetector() if self._listens else None

    def send(self, audio: np.ndarray, arrived: float | None) -> None:
        """Samples [T], the last of which came in at `arrived`; without that none are dropped."""
        self.engine.feed(0, audio, arrived, bounded=arrived is not None)
        if self._detector is not None:
            self.engine.set_user_voice(0, self._detector.push(audio))

    def receive(self) -> Reply | dict | None:
        if not self._said and (result := self.engine.run_once()) is not None:
            self.ledger.tick(result)
            late = Delay(gpu=result.waited[0] + result.times.total)
            self._said += self._story.tell(0, result, int(result.dropped[0]))
            self._said.append(Reply(result.audio[0], int(result.index[0]), late))
        return self._said.popleft() if self._said else None

    def turns(self, heard: np.ndarray) -> list[UserTurn]:
        return self._detector.turns()


def address(server: str, path: str = "/api/pcm") -> str:
    """The WebSocket URL of a server; `UserError` for none."""
    url = urlsplit(server if "//" in server else f"ws://{server}")
    url = url._replace(scheme={"http": "ws", "https": "wss"}.get(url.scheme, url.scheme))
    if url.scheme not in ("ws", "wss") or not url.netloc:
        raise UserError(f"--server {server}: give an address like wss://HOST or ws://HOST:8000")
    return url._replace(path=url.path.rstrip("/") or path, fragment="").geturl()


class RemoteLine:
    """A call to `serve.py` over `/api/pcm`; a thread takes what it says as it comes, and goes back
    into the call when the connection is lost. What is said meanwhile nobody hears."""

    ANSWER_SECONDS, RETRY_SECONDS = 10.0, 0.5
    turns = staticmethod(ledger.energy_turns)

    def __init__(self, args: argparse.Namespace):
        missing = "--server needs websockets: pip install websockets"
        self._client = command.needed("websockets.sync.client", missing)
        self._errors = command.needed("websockets.exceptions", missing)
        self._args, self.clock = args, time.perf_counter
        self._lost = OSError, ValueError, self._errors.WebSocketException
        self._connect()
        self.patch_seconds = self._ready["patch_ms"] / 1000
        self.ledger = LatencyLedger(self.patch_seconds)
        self.name = f"the server at {urlsplit(address(args.server)).netloc}"

    def _dial(self, call: str | None = None) -> dict:
        """The server's first word, and the "socket" in it. UserError where it refuses."""
        args, url = self._args, address(self._args.server)
        bearer = {"Authorization": f"Bearer {args.token}"} if args.token else {}
        settings = {"additional_headers": bearer, "compression": None, "close_timeout": 1}
        url += f"{'&' if '?' in url else '?'}call={call}" if call else ""
        # Entered, as new versions want it; left by `close`.
        socket = self._client.connect(url, **settings).__enter__()
        ready = json.loads(socket.recv(timeout=self.ANSWER_SECONDS))
        if ready.get("type") != "ready":
            raise UserError(f"{args.server}: {ready.get('message', 'is no Samvad server')}")
        return ready | {"socket": socket}

    def _connect(self) -> None:
        args = self._args
        wishes = {"type": "start", "emotion": args.emotion, "language": args.language}
        wishes |= {} if args.emotion_strength == 1.0 else {"strength": args.emotion_strength}
        try:
            self._ready = self._dial()
        except self._lost as error:
            said = f"{args.server}: no answer ({first_line(error)}); does serve.py run there?"
            raise UserError(said) from error
        self._say(json.dumps(wishes))
        self._inbox: queue.SimpleQueue = queue.SimpleQueue()
        self._sent, self._answered, self._gpu, self._seen = 0, 0, 0.0, Counter()
        self._unsaid = 0  # samples to leave out, up to a whole patch
        self._arrived: list[float] = []  # a patch each: when its last sample came in

    def start(self) -> None:
        if self._sent:  # another recording: a call of its own
            self.close()
            self._connect()
        threading.Thread(target=self._read, args=(self._ready, self._inbox), daemon=True).start()

    def _read(self, ready: dict | None, inbox: queue.SimpleQueue) -> None:
        while ready:
            socket, said = ready["socket"], None
            try:
                while not isinstance(said, dict) or said["type"] != "bye":
                    said = socket.recv(timeout=self.ANSWER_SECONDS)
                    said = said if isinstance(said, bytes) else json.loads(said)
                    inbox.put((self.clock(), said))
                return
            except self._lost as error:
                silent = said is None and isinstance(error, TimeoutError)
                with contextlib.suppress(*self._lost):
                    socket.close(1001)  # which is not to hang up
            ready = self._go_back(inbox, ready["call"], 0.0 if silent else ready["rejoin_seconds"])

    def _go_back(self, inbox: queue.SimpleQueue, call: str, kept: float) -> dict | None:
        """What the server says to who comes back into a call that it keeps for so many seconds;
        None, with the reason in the inbox, where nobody can."""

        def tell(kind: str, text: str) -> None:
            inbox.put((self.clock(), {"type": kind, "reason": text, "message": text}))

        began = self.clock()
        tell("error", "cut off; going back into the call")
        while self._inbox is inbox and self.clock() - began < kept:
            time.sleep(self.RETRY_SECONDS)
            try:
                again = self._dial(call)
            except UserError as error:
                return tell("bye", f"cut off, then refused: {error}")
            except self._lost:
                continue
            if again["rejoined"] and self._inbox is inbox:
                inbox.put((self.clock(), again))
                tell("error", f"back in the call after {self.clock() - began:.1f} s")
                return again
            again["socket"].close()
            return tell("bye", "cut off, and the server did not keep it")
        return tell("bye", f"cut off or silent; no way back within {kept:.0f} s")

    def _say(self, message: bytes | str) -> None:
        with contextlib.suppress(self._errors.ConnectionClosed):  # `_read` tells
            self._ready["socket"].send(message)

    def send(self, audio: np.ndarray, arrived: float) -> None:
        """Samples [T], the last of which came in at `arrived`."""
        self._sent += len(audio)
        complete = int(self._sent / (self.patch_seconds * SAMPLE_RATE) + 1e-6)
        self._arrived += [arrived] * (complete - len(self._arrived))
        audio, self._unsaid = audio[self._unsaid :], max(0, self._unsaid - len(audio))
        self._say(to_pcm16(audio))

    def receive(self) -> Reply | dict | None:
        if self._inbox.empty():
            return None
        heard_at, event = self._inbox.get()
        if isinstance(event, bytes):
            index, self._answered = self._answered, self._answered + 1
            late = heard_at - self._arrived[index] if index < len(self._arrived) else 0.0
            gpu = min(self._gpu, late)
            return Reply(from_pcm16(event), index, Delay(gpu, late - gpu))
        if event["type"] == "ready":  # back: the server begins a patch with what it hears now
            patch, self._ready = round(self.patch_seconds * SAMPLE_RATE), event
            index = -(-self._sent // patch)
            self.ledger.counts["dropped_patches"] += index - self._answered
            self._answered, self._unsaid = index, index * patch - self._sent
        elif event["type"] == "dropped":
            self._answered += event["patches"]
        elif event["type"] == "latency":  # a second's means, in the ledger as one tick
            self._gpu = (event["tick_ms"] + event["waited_ms"]) / 1000
            stages = {name: ms / 1000 for name, ms in event["stages"].items()}
            self.ledger.times.append(StageTimes(**stages, total=event["tick_ms"] / 1000))
            counts = Counter(dropped_patches=event["dropped"], late_ticks=event["late"])
            self.ledger.counts.update(counts - self._seen)
            self._seen = counts
        elif event["type"] == "bye":
            raise UserError(f"{self._args.server}: the call was ended ({event['reason']})")
        return event

    def close(self) -> None:
        self._inbox = queue.SimpleQueue()  # by which the thread knows that nobody listens
        self._ready["socket"].close()


Line = LocalLine | RemoteLine


# The user's end: `heard` gives (samples [T], when the last of them came in) and waits for at most
# so long; `play` takes a reply and returns how long it will wait; `over` ends the call.
class Recording:
    """A recorded question [T], then silence: as the user's end of a call. `paced`: a patch is said
    when its last sample is due, on the line's clock. The tail lasts until a reply under way has
    ended. Dropped patches leave silence in the reply, so that it stays on the question's clock."""

    def __init__(self, audio: np.ndarray, line: Line, tail_seconds: float = 4.0,
                 paced: bool = True, sleep: Callable[[float], None] = time.sleep):  # fmt: skip
        self._line, self._paced, self._sleep, self._seconds = line, paced, sleep, line.patch_seconds
        seconds, samples = self._seconds, round(self._seconds * SAMPLE_RATE)
        self._end = -(-len(audio) // samples) + int(np.ceil(tail_seconds / seconds))
        self._most = self._end + int(np.ceil(REPLY_OVERTIME_SECONDS / seconds))
        self._patches = np.zeros((self._most, samples), np.float32)
        self._patches.reshape(-1)[: len(audio)] = audio
        self.reply, self._fed, self._done = np.zeros_like(self._patches), 0, 0

    def __enter__(self) -> None:
        self._start = self._line.clock()

    def __exit__(self, *_: object) -> None:
        self.reply = self.reply[: self._done].reshape(-1)  # [T]

    def heard(self, wait: float) -> Iterator[tuple[np.ndarray, float | None]]:
        until = self._fed + 1
        if self._paced:
            early = self._start + until * self._seconds - self._line.clock()
            self._sleep(max(0.0, min(wait, early)))
            until = int((self._line.clock() - self._start) / self._seconds + 1e-6)
        for patch in self._patches[self._fed : until]:
            self._fed += 1
            yield patch, self._start + self._fed * self._seconds if self._paced else None

    def play(self, reply: Reply) -> float:
        if reply.index < self._most:
            self.reply[reply.index] = reply.audio
            self._done = reply.index + 1
        return 0.0

    def over(self, record: CallRecord) -> bool:
        last = record.levels[-max(1, int(0.5 / self._seconds)) :]
        quiet = self._done >= self._end and np.max(last, initial=-np.inf) < ledger.QUIET_DBFS
        return quiet or self._done >= self._most


def answer_recordings(line: Line, questions: Sequence, recorder: Recorder | None, args) -> None:
    """Answer every `--wav`, its samples [T] and when it is spoken in, into its `--out`. Raises at
    the end what could not be written where it should, at once what stopped a call."""
    failures = []
    for path, out, (audio, turn) in zip(args.wav, args.out, questions, strict=True):
        end = f"speech ends at {turn.end:.2f} s, by {turn.source}" if turn else "no speech found"
        print(f"{path}: {len(audio) / SAMPLE_RATE:.2f} s, {end}")
        screen, sound = Screen(), Recording(audio, line, args.tail_seconds, not args.fast)
        record, _ = converse(line, sound, screen, recorder)
        failures.append(save_reply(out, sound.reply))
        for late in line.ledger.call(record, [turn] if turn else []):
            answer = late is not None and f"{late * 1000:.0f} ms after the end of the question"
            print(f"answered {answer}" if answer else "no answer within 2 s")
        print(f"{screen.user_line()}\nreply: {failures[-1] or out}\n")
        if record.stopped:
            raise record.stopped
    if any(failures):
        raise UserError("; ".join(filter(None, failures)))


def save_reply(out: Path, reply: np.ndarray) -> str | None:
    """Writes a reply [T], or else into the folder for temporary files; returns what went wrong."""
    failure = None
    for place in (out, Path(tempfile.gettempdir()) / f"{out.stem[:40]}-{os.getpid()}.wav"):
        try:
            write_audio(place, reply)
            return failure and f"{failure}; the reply is in {place}"
        except AudioError as error:
            failure = failure or str(error)
    return f"{failure}; the reply is lost"


class Playout:
    """What waits to be played, between our thread and the sound card's, which has a clock of its
    own: where the least that waited in a `WINDOW` was under `LOW` or over `HIGH`, patches are
    stretched or shortened by 0.2 %, which nobody hears. `inserted` counts those samples and the
    silence where it ran dry, as `underruns` does; `removed` those taken and those beyond `MOST`."""

    LOW, HIGH, MOST, WINDOW = 0.01, 0.03, 0.2, 5.0  # seconds

    def __init__(self, rate: int):
        self.rate, self.inserted, self.removed, self.underruns = rate, 0, 0, 0
        self._waiting, self._lock = np.zeros(0, np.float32), threading.Lock()
        self._least, self._pulled, self._stretch, self._playing = np.inf, 0, 0, False

    def push(self, audio: np.ndarray) -> float:
        """Queue samples [T]; returns for how many seconds the first of them will wait."""
        if more := self._stretch * (len(audio) // 500):
            places = np.linspace(0, len(audio) - 1, len(audio) + more)
            audio = np.interp(places, np.arange(len(audio)), audio)
        with self._lock:
            waits, most = len(self._waiting) / self.rate, int(self.MOST * self.rate)
            beyond = max(0, len(self._waiting) + len(audio) - most)
            self.inserted += max(0, more)
            self.removed += max(0, -more) + beyond
            self._waiting = np.concatenate([self._waiting, audio])[beyond:]
            self._playing = True
        return min(waits, self.MOST)

    def pull(self, count: int) -> np.ndarray:
        """The next samples for the card, silence where there are too few."""
        with self._lock:
            taken, self._waiting = self._waiting[:count], self._waiting[count:]
            missing = (count - len(taken)) * self._playing
            self.inserted += missing
            self.underruns += missing > 0
            self._least = min(self._least, len(self._waiting) / self.rate)
            self._pulled += count * self._playing
            if self._pulled >= self.WINDOW * self.rate:
                self._stretch = int(self._least < self.LOW) - int(self._least > self.HIGH)
                self._least, self._pulled = np.inf, 0
        return np.concatenate([taken, np.zeros(count - len(taken), np.float32)])


def import_sounddevice() -> Any:
    try:
        import sounddevice
    except (ImportError, OSError) as error:  # the latter: without the PortAudio library
        missing = isinstance(error, ImportError)
        get = "pip install sounddevice" if missing else "apt-get install libportaudio2"
        raise UserError(f"the microphone needs {get}; or answer one: --wav question.wav") from error
    return sounddevice


def device_rate(sounddevice: Any, kind: str, device: int | str | None = None) -> int:
    """24000 where the "input" or "output" device takes it, else its own rate."""
    refused = sounddevice.PortAudioError, ValueError
    try:
        rate = int(sounddevice.query_devices(device, kind)["default_samplerate"])
    except refused as error:
        missing = f"no {kind} device {'found' if device is None else device}"
        remedy = "--list_devices names what there is; or answer a recording: --wav question.wav"
        raise UserError(f"{missing}; plug it in; {remedy}") from error
    with contextlib.suppress(*refused):
        check = getattr(sounddevice, f"check_{kind}_settings")
        check(device=device, samplerate=SAMPLE_RATE, channels=1, dtype="int16")
        return SAMPLE_RATE
    return rate


class SoundCard:
    """Microphone and speaker, as the user's end of a call: two devices with a clock each."""

    def __init__(self, sounddevice: Any, args: argparse.Namespace):
        self._sounddevice, self.ledger = sounddevice, LatencyLedger(0.0)
        names = args.input_device, args.output_device
        self._devices = [int(name) if name and name.isdigit() else name for name in names]
        ends = zip(("input", "output"), self._devices, strict=True)
        self._rates = [device_rate(sounddevice, kind, device) for kind, device in ends]
        self._to_engine = StreamResampler(self._rates[0], SAMPLE_RATE)
        self._to_card = StreamResampler(SAMPLE_RATE, self._rates[1])
        self.playout = Playout(self._rates[1])
        self._echo = None
        if args.echo_cancel:
            command.needed("livekit", "--echo_cancel needs LiveKit's SDK: pip install livekit")
            from livekit import rtc  # WebRTC's echo canceller

            self._frame = lambda pcm, rate: rtc.AudioFrame(bytearray(pcm), rate, 1, len(pcm) // 2)
            self._echo = rtc.AudioProcessingModule(echo_cancellation=True)
        self._inputs: queue.Queue[tuple[float, bytes]] = queue.Queue(MAX_INPUT_BLOCKS)

    def __enter__(self) -> None:
        ledger, card, self._open = self.ledger, self._sounddevice, contextlib.ExitStack()
        ledger.resampler_seconds = self._to_engine.delay_seconds + self._to_card.delay_seconds
        ends = (card.RawInputStream, self._heard), (card.RawOutputStream, self._played)
        settings, latency = {"channels": 1, "dtype": "int16", "latency": "low"}, 0.0
        try:
            for (kind, call), device, rate in zip(ends, self._devices, self._rates, strict=True):
                settings |= {"device": device, "samplerate": rate, "callback": call}
                stream = kind(blocksize=int(rate * BLOCK_SECONDS), **settings)
                latency += float(self._open.enter_context(stream).latency)
        except card.PortAudioError as error:
            self.__exit__()
            said = f"the sound card refused: {error}; plug it in, close what else uses it"
            raise UserError(said) from error
        if ledger.loopback_seconds is None:
            ledger.device_seconds = latency
        self._heard_at = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(self._sounddevice.PortAudioError):  # of a card that is gone
            self._open.close()
        counts, playout = self.ledger.counts, self.playout
        counts["output_underruns"] = playout.underruns
        counts["inserted_samples"], counts["removed_samples"] = playout.inserted, playout.removed

    def _heard(self, indata: Any, frames: int, when: Any, status: Any) -> None:
        try:
            self._inputs.put_nowait((time.perf_counter(), bytes(indata)))
        except queue.Full:
            self.ledger.counts["input_overflows"] += 1

    def _played(self, outdata: Any, frames: int, when: Any, status: Any) -> None:
        pcm = to_pcm16(self.playout.pull(frames))
        outdata[:] = pcm
        if self._echo:
            self._echo.process_reverse_stream(self._frame(pcm, self._rates[1]))

    def heard(self, wait: float) -> Iterator[tuple[np.ndarray, float]]:
        with contextlib.suppress(queue.Empty):
            while True:
                arrived, pcm = self._inputs.get(timeout=wait) if wait else self._inputs.get_nowait()
                wait, self._heard_at = 0.0, time.perf_counter()
                if self._echo:
                    frame = self._frame(pcm, self._rates[0])
                    self._echo.set_stream_delay_ms(round(1000 * self.ledger.device_seconds))
                    self._echo.process_stream(frame)  # in place
                    pcm = bytes(frame.data)
                yield self._to_engine(from_pcm16(pcm)), arrived
        if time.perf_counter() - self._heard_at > SILENT_SECONDS:
            silent = f"sent nothing for {SILENT_SECONDS:.0f} s"
            raise UserError(f"the microphone {silent}; is it unplugged?")

    def play(self, reply: Reply) -> float:
        return self.playout.push(self._to_card(reply.audio))

    def over(self, record: CallRecord) -> bool:
        return False


def converse(line: Line, sound: Recording | SoundCard, screen: Screen,
             recorder: Recorder | None = None) -> tuple[CallRecord, np.ndarray]:  # fmt: skip
    """One call: its record, `stopped` by what ended it, be it Ctrl-C, and the user's loudness."""
    record, levels, said = CallRecord(line.patch_seconds), [np.zeros(0)], None
    keep = recorder.add if recorder else lambda side, audio: None
    try:
        line.start()
        with sound:
            fixed = line.ledger.device_seconds + line.ledger.resampler_seconds
            while not sound.over(record):
                for audio, arrived in sound.heard(0.0 if said else POLL_SECONDS):
                    line.send(audio, arrived)
                    keep(0, audio)
                    levels.append(ledger.frame_levels(audio))
                while isinstance(said := line.receive(), dict):
                    screen.event(said)
                if said is None:
                    continue
                record.add(said, buffers=fixed + sound.play(said))
                keep(1, said.audio)
                screen.renew(levels, record, line.ledger.counts["dropped_patches"], line.clock())
    except (Exception, KeyboardInterrupt) as error:
        record.stopped = error
    screen.close()
    return record, np.concatenate(levels)


def measure_loopback(card: SoundCard) -> float:
    """Seconds from the speaker to the microphone, by chirps: where headphones lie on it, or a cable
    joins them. Raises `UserError` where none comes back."""
    t = np.arange(int(0.08 * SAMPLE_RATE)) / SAMPLE_RATE
    chirp = 0.5 * np.hanning(len(t)) * np.sin(2 * np.pi * (500 + 2.5e4 * t) * t)
    said = np.zeros(5 * SAMPLE_RATE, np.float32)  # the last 2.5 s are for the slowest devices
    for at in (0.3, 0.7, 1.2, 1.8, 2.3):  # unevenly: no shift but the right one fits
        said[int(at * SAMPLE_RATE) :][: len(t)] = chirp
    heard, waits, ledger = np.zeros(0, np.float32), [], card.ledger
    with card:
        while len(heard) < len(said):
            for audio, _ in card.heard(POLL_SECONDS):
                waits.append(card.play(Reply(said[len(heard) :][: len(audio)], 0)))
                heard = np.concatenate([heard, audio])
    size = 2 * len(said)  # correlation
    spectrum = np.fft.rfft(heard[: len(said)], size) * np.fft.rfft(said, size).conj()
    fit = np.abs(np.fft.irfft(spectrum, size)[: len(said) // 2])
    if fit.max() < 10 * np.median(fit) or np.abs(heard).max() < 1e-3:
        raise UserError("--loopback: no chirp came back; lay the headphones on the microphone")
    ledger.loopback_seconds = float(fit.argmax() / SAMPLE_RATE - np.mean(waits))
    ledger.device_seconds = ledger.loopback_seconds - ledger.resampler_seconds
    return ledger.loopback_seconds


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    if args.list_devices:
        print(import_sounddevice().query_devices())
        return
    questions = [(audio, ledger.find_speech(audio)) for audio in map(read_audio, args.wav or ())]
    check_outputs(args)
    card = SoundCard(import_sounddevice(), args) if args.loopback or not args.wav else None
    line = RemoteLine(args) if args.server else LocalLine(args)
    recorder = Recorder(args.record) if args.record else None
    print(line.name)
    try:
        if card:
            card.ledger = line.ledger
        if args.loopback:
            print(f"from speaker to microphone: {1000 * measure_loopback(card):.0f} ms")
        if args.wav:
            answer_recordings(line, questions, recorder, args)
        else:
            how = "an echo canceller listens" if args.echo_cancel else "or it hears itself"
            print(f"Speak when you like; Ctrl-C ends the call. Wear headphones, {how}.")
            screen = Screen(panel=sys.stdout.isatty() and os.environ.get("TERM") != "dumb")
            record, levels = converse(line, card, screen, recorder)
            line.ledger.call(record, line.turns(levels))
            print(f"\n{screen.user_line()}\n")
            if record.stopped and not isinstance(record.stopped, KeyboardInterrupt):
                raise record.stopped
    finally:  # whatever ended the call, what was measured is printed
        for one in filter(None, (recorder, args.server and line)):
            one.close()
        print(line.ledger.table())
        print(json.dumps(line.ledger.summary(), allow_nan=False))


if __name__ == "__main__":
    run(main, resumes=False)
