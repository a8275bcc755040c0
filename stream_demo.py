"""Phase 5: talk to Samvad, or let it answer a recording.

    python stream_demo.py                                      # microphone and speaker
    python stream_demo.py --wav question.wav --out reply.wav   # no sound card needed

Audio is 24 kHz mono. The reply file is on the question's clock: it begins when the question
does, so playing both together gives the conversation as it happened. The last line of stdout is
the latency ledger as JSON.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import os
import queue
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch

from audio import SAMPLE_RATE, AudioError, read_audio, write_audio
from command import ArgumentParser, UserError, number, run, whole, writable_file
from data import EMOTIONS, LANGUAGES
from duplex import DuplexEngine, ReplyText, TickResult, load_models
from ledger import (
    QUIET_DBFS,
    CallRecord,
    LatencyLedger,
    Response,
    StreamResampler,
    UserTurn,
    VoiceDetector,
    find_speech,
    frame_levels,
)
from s2s import PAD, S2S, Sampling
from training import setup_distributed

TINY = Path(__file__).parent / "checkpoints" / "tiny"
SPOKEN = LANGUAGES[:3]
BLOCK_SECONDS = 0.01  # what the sound card hands over at once
MAX_INPUT_BLOCKS = 100
MAX_OUTPUT_BLOCKS = 20
SILENT_CARD_SECONDS = 5.0
REPLY_OVERTIME_SECONDS = 10.0  # a reply under way at the end of the tail may take this long
NEW_LINE_SECONDS = 1.0


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = ArgumentParser(
        "Talk to Samvad through microphone and speaker, or let it answer recordings.",
        formatter_class=argparse.HelpFormatter,
    )
    add = parser.add_argument
    add("--wav", nargs="+", type=Path, help="spoken questions, instead of the microphone")
    add("--out", nargs="+", type=Path, help="reply files, one for each --wav [reply_NAME.wav]")
    add("--codec", type=Path, default=TINY / "codec", help="checkpoint folder [the tiny one]")
    add("--lm", type=Path, default=TINY / "s2s", help="checkpoint folder [the tiny one]")
    add("--emotion", choices=EMOTIONS, help="how the agent speaks [as it sees fit]")
    add("--language", choices=SPOKEN, help="of the call [heard by the model itself]")
    add("--seed", type=whole(0, 2**63 - 1), default=0, help="of the sampling [0]")
    more = parser.add_argument_group("advanced").add_argument
    more("--fast", action="store_true", help="with --wav: do not pace, never drop")
    more("--temperature", type=number(0, 100), help="of the sampling [the model's own]")
    more("--top_k", type=whole(1, 2**31), help="of the sampling [the model's own]")
    more("--eagerness", type=number(-100, 100), help="dB on its odds of speaking [the model's own]")
    more("--vad_flush", action="store_true", help="cut the agent off when the user barges in")
    more("--tail_seconds", type=number(0, 3600), default=4.0,
         help="listen on after each --wav [4]")  # fmt: skip
    more("--device", default="auto", help="auto, cpu, cuda or cuda:N [auto]")
    more("--threads", type=whole(1, 1024), default=1, help="CPU threads [1]")
    args = parser.parse_args(argv)
    _check(args)
    return args


def _check(args: argparse.Namespace) -> None:
    if args.out and not args.wav:
        raise UserError("--out needs --wav: the reply to a recording is what it holds")
    if args.fast and not args.wav:
        raise UserError("--fast needs --wav: a microphone runs in real time")
    if args.wav and args.out and len(args.wav) != len(args.out):
        raise UserError(
            f"{len(args.wav)} --wav files but {len(args.out)} --out files; give one for each"
        )
    if args.wav and not args.out:
        args.out = [Path(f"reply_{path.stem}.wav") for path in args.wav]


def check_outputs(wavs: Sequence[Path], outs: Sequence[Path]) -> None:
    """A reply must not be lost at the end of a call for want of a place to put it."""
    questions, places = [wav.resolve() for wav in wavs], [out.resolve() for out in outs]
    for out, place in zip(outs, places, strict=True):
        if places.count(place) > 1:
            raise UserError(f"{out}: two replies would be written there; name them with --out")
        if place in questions:
            raise UserError(f"{out}: is a question too; give the reply another name with --out")
        writable_file(out, "--out")
        with tempfile.TemporaryDirectory(dir=out.parent) as folder:
            try:
                write_audio(Path(folder) / f"reply{out.suffix}", np.zeros(SAMPLE_RATE, np.float32))
            except AudioError as error:
                reason = str(error).split(": ", 1)[-1]
                raise UserError(f"--out {out}: {reason}; end the name in .wav") from None


# ---------------------------------------------------------------------------------- what it says


class Transcript:
    """Prints the reply's text as it comes, and keeps what the user sounded like."""

    def __init__(self, lm: S2S, patch_seconds: float, write: Callable[[str], Any]):
        self._stream = ReplyText(lm.tokenizer)
        self._emotions, self._languages = lm.config.emotions, lm.config.languages
        self._write = write
        self._patch_seconds = patch_seconds
        self._silent = 0.0
        self._lines: list[str] = []
        self._emotion = np.zeros(len(self._emotions))
        self._language = np.zeros(len(self._languages))
        self._weight = 0.0

    @property
    def text(self) -> str:
        """All replies so far, a line each."""
        return "\n".join(line.strip() for line in [*self._lines, self._stream.text] if line.strip())

    def add(self, result: TickResult, slot: int = 0) -> None:
        weight = float(result.user_speaking[slot])
        if weight > 0.5:
            self._emotion += weight * result.user_emotion[slot]
            self._language += weight * result.language[slot]
            self._weight += weight
        new = self._stream.push(int(result.text[slot]))
        said = result.text[slot] != PAD
        self._silent = 0.0 if said else self._silent + self._patch_seconds
        if new:
            begins = self._stream.text == new
            self._write(("samvad: " + new.lstrip()) if begins else new)
        elif self._silent > NEW_LINE_SECONDS:
            self.end_line()

    def end_line(self) -> None:
        if self._stream.text:
            self._write("\n")
            self._lines.append(self._stream.text)
            self._stream.reset()

    def user_line(self) -> str:
        """What the model heard in the user's voice, from the moments it thought them speaking."""
        if not self._weight:
            return "you: the model heard nobody speak"
        emotion, language = self._emotion / self._weight, self._language / self._weight
        return (
            f"you: sounded {self._emotions[int(emotion.argmax())]} ({emotion.max():.0%}),"
            f" spoke {self._languages[int(language.argmax())]} ({language.max():.0%})"
        )


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def _response_line(response: Response) -> str:
    if response.latency is None:
        return "no answer within 2 s"
    if response.kind == "takeover":
        return f"began {-response.latency * 1000:.0f} ms before the end of the question"
    return f"answered {response.latency * 1000:.0f} ms after the end of the question"


# ------------------------------------------------------------------------------------ recordings


class PacedInput:
    """A recording that arrives like a microphone's: a patch when its last sample is due."""

    def __init__(self, patch_seconds: float, clock: Callable[[], float], sleep: Callable):
        self.patch_seconds, self._clock, self._sleep = patch_seconds, clock, sleep
        self._start = clock()

    def due(self, patch: int) -> float:
        return self._start + (patch + 1) * self.patch_seconds

    def arrived(self, patch: int) -> bool:
        return self._clock() >= self.due(patch)

    def wait(self, patch: int) -> None:
        self._sleep(max(0.0, self.due(patch) - self._clock()))


def answer_recording(
    engine: DuplexEngine,
    audio: np.ndarray,
    ledger: LatencyLedger,
    transcript: Transcript,
    tail_seconds: float = 4.0,
    paced: bool = True,
    detector: VoiceDetector | None = None,
    clock: Callable[[], float] = time.perf_counter,
    sleep: Callable[[float], None] = time.sleep,
) -> tuple[np.ndarray, CallRecord]:
    """Play `audio` [T] to slot 0, then silence; returns the reply [T'] and the call's record.

    The tail lasts `tail_seconds`, and until a reply under way has ended. Patches dropped by a
    machine too slow leave silence in the reply, so that it stays on the question's clock. What
    ends the call early, be it Ctrl-C, stands in the record's `stopped`; the reply lasts until then.
    """
    engine.reset()
    length = engine.patch_samples
    spoken = -(-len(audio) // length)
    tail = int(np.ceil(tail_seconds / engine.patch_seconds))
    overtime = int(np.ceil(REPLY_OVERTIME_SECONDS / engine.patch_seconds))
    patches = np.zeros((spoken + tail + overtime, length), np.float32)
    patches.reshape(-1)[: len(audio)] = audio
    reply = np.zeros_like(patches)
    record = CallRecord(engine.patch_seconds)
    pacer = PacedInput(engine.patch_seconds, clock, sleep) if paced else None
    fed = heard = 0
    try:
        while heard < len(patches):
            before, fed = fed, _feed_due(engine, patches, fed, pacer)
            if detector is not None:
                engine.set_user_voice(0, detector.push(patches[before:fed].reshape(-1)))
            result = engine.run_once()
            heard = int(result.index[0]) + 1
            reply[heard - 1] = result.audio[0]
            record.add(result)
            ledger.tick(result)
            transcript.add(result)
            if heard >= spoken + tail and _quiet(reply[:heard], engine.patch_seconds):
                break
    except (Exception, KeyboardInterrupt) as error:
        record.stopped = error
    transcript.end_line()
    return reply[:heard].reshape(-1), record


def _feed_due(engine: DuplexEngine, patches: np.ndarray, fed: int, pacer: PacedInput | None) -> int:
    """Feed what has arrived by now, waiting where nothing has; returns the patches fed."""
    if pacer is None:
        engine.feed(0, patches[fed], bounded=False)
        return fed + 1
    if not len(engine.queues[0]):
        pacer.wait(fed)
    waiting = not len(engine.queues[0])
    while fed < len(patches) and (waiting or pacer.arrived(fed)):
        engine.feed(0, patches[fed], arrived=pacer.due(fed))
        fed, waiting = fed + 1, False
    return fed


def _quiet(reply: np.ndarray, patch_seconds: float) -> bool:
    last = reply[-max(1, int(0.5 / patch_seconds)) :]
    return frame_levels(last.reshape(-1)).max() < QUIET_DBFS


Question = tuple[np.ndarray, UserTurn | None]  # a recording [T] and when it is spoken in


def answer_recordings(
    engine: DuplexEngine,
    questions: Sequence[Question],
    ledger: LatencyLedger,
    args: argparse.Namespace,
) -> None:
    """Answer every `--wav` into its `--out`, one ledger for all.

    Raises at the end what could not be written where it should, at once what stopped a call.
    """
    misplaced = []
    for path, out, (audio, turn) in zip(args.wav, args.out, questions, strict=True):
        transcript = Transcript(engine.lm, engine.patch_seconds, _write)
        end = f"speech ends at {turn.end:.2f} s, by {turn.source}" if turn else "no speech found"
        print(f"{path}: {len(audio) / SAMPLE_RATE:.2f} s, {end}")
        reply, record = answer_recording(
            engine,
            audio,
            ledger,
            transcript,
            tail_seconds=args.tail_seconds,
            paced=not args.fast,
            detector=VoiceDetector() if args.vad_flush else None,
        )
        kept, failure = save_reply(out, reply)
        misplaced += [failure] if failure else []
        for response in ledger.call(record, [turn] if turn else []):
            print(_response_line(response))
        print(f"{transcript.user_line()}\nreply: {kept}\n")
        if record.stopped:
            raise record.stopped
    if misplaced:
        raise UserError("; ".join(misplaced))


def save_reply(out: Path, reply: np.ndarray) -> tuple[Path | None, str | None]:
    """Writes a reply [T]; where that fails, as WAV beside it, or in the system's folder for such.

    Returns where it lies, None where it could not be written at all, and what went wrong.
    """
    try:
        write_audio(out, reply)
        return out, None
    except (AudioError, OSError) as error:
        failure = str(error)
    for folder in (out.parent, Path(tempfile.gettempdir())):
        rescue = folder / f"{out.stem[:40]}-{os.getpid()}.wav"
        with contextlib.suppress(AudioError, OSError):
            write_audio(rescue, reply)
            return rescue, f"{failure}; the reply is kept in {rescue}"
    return None, f"{failure}; the reply is lost"


def read_question(path: Path) -> Question:
    """A recording as 24 kHz mono [T], and when it is spoken in.

    `UserError` where it is missing, empty or no audio.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such file; give --wav a recording of a spoken question")
    audio = read_audio(path)
    if not len(audio):
        raise UserError(f"{path}: holds no samples; record it again")
    return audio, find_speech(audio)


# ------------------------------------------------------------------------------------ microphone


class SoundBridge:
    """Between the sound card's thread and ours: bounded queues of bytes, nothing else.

    An output queue that runs dry once a reply is playing is an underrun: counted, heard as
    silence. Input that nobody takes for a second is dropped and counted.
    """

    def __init__(self, block_bytes: int):
        self.block_bytes = block_bytes
        self.inputs: queue.Queue[tuple[float, bytes]] = queue.Queue(MAX_INPUT_BLOCKS)
        self.outputs: queue.Queue[bytes] = queue.Queue(MAX_OUTPUT_BLOCKS)
        self.underruns = 0
        self.overflows = 0
        self.skipped = 0
        self._playing = False

    def callback(self, indata: Any, outdata: Any, frames: int, when: Any, status: Any) -> None:
        try:
            self.inputs.put_nowait((time.perf_counter(), bytes(indata)))
        except queue.Full:
            self.overflows += 1
        try:
            outdata[:] = self.outputs.get_nowait()
            self._playing = True
        except queue.Empty:
            outdata[:] = bytes(self.block_bytes)
            self.underruns += self._playing

    def play(self, block: bytes) -> None:
        """Queue a block; what the card is too late to play is given up, oldest first."""
        while True:
            try:
                return self.outputs.put_nowait(block)
            except queue.Full:
                with contextlib.suppress(queue.Empty):
                    self.outputs.get_nowait()
                    self.skipped += 1

    def heard(self, timeout: float) -> list[tuple[float, bytes]]:
        """Every input block that has come, waiting `timeout` seconds for a first one."""
        blocks = [self.inputs.get(timeout=timeout)]
        while True:
            try:
                blocks.append(self.inputs.get_nowait())
            except queue.Empty:
                return blocks


def import_sounddevice() -> ModuleType:
    """The sounddevice module, or a `UserError` that names what to install."""
    try:
        import sounddevice
    except ImportError as error:
        raise UserError("the microphone needs sounddevice: pip install sounddevice") from error
    except OSError as error:
        raise UserError(
            "the microphone needs the PortAudio library: apt-get install libportaudio2"
            " (or answer a recording: --wav question.wav --out reply.wav)"
        ) from error
    return sounddevice


def device_rate(sounddevice: Any) -> int:
    """24000 where microphone and speaker take it, else the microphone's own rate."""
    try:
        microphone = sounddevice.query_devices(kind="input")
        sounddevice.query_devices(kind="output")
    except (sounddevice.PortAudioError, ValueError) as error:
        raise UserError(
            "no microphone and speaker found; plug them in, or answer a recording:"
            " python stream_demo.py --wav question.wav --out reply.wav"
        ) from error
    try:
        sounddevice.check_input_settings(samplerate=SAMPLE_RATE, channels=1, dtype="int16")
        sounddevice.check_output_settings(samplerate=SAMPLE_RATE, channels=1, dtype="int16")
        return SAMPLE_RATE
    except (sounddevice.PortAudioError, ValueError):
        return int(microphone["default_samplerate"])


class MicrophoneCall:
    """One live call on slot 0: sound card -> resampler -> engine -> resampler -> sound card."""

    def __init__(
        self,
        engine: DuplexEngine,
        sounddevice: Any,
        ledger: LatencyLedger,
        transcript: Transcript,
        detector: VoiceDetector,
    ):
        self.engine, self.ledger, self.transcript = engine, ledger, transcript
        self.detector = detector
        self.record = CallRecord(engine.patch_seconds)
        self._sounddevice = sounddevice
        self._rate = device_rate(sounddevice)
        self._block = int(self._rate * BLOCK_SECONDS)
        self.bridge = SoundBridge(self._block * 2)
        self._to_engine = StreamResampler(self._rate, SAMPLE_RATE)
        self._to_card = StreamResampler(SAMPLE_RATE, self._rate)
        self._unplayed = np.zeros(0, np.float32)
        self._unheard: list[np.ndarray] = []  # patches the detector has not had yet

    def run(self, stop: Callable[[], bool] = lambda: False) -> None:
        """Talk until Ctrl-C or `stop()`; the ledger then holds the call, also after an error."""
        self.engine.reset()
        try:
            with self._open() as stream:
                self._note_delays(stream)
                self._loop(stop)
        except KeyboardInterrupt:
            pass
        except self._sounddevice.PortAudioError as error:
            # A card that is gone cannot even be closed: what ended the call came before.
            if isinstance(error.__context__, UserError):
                raise error.__context__ from None
            if not isinstance(error.__context__, KeyboardInterrupt):
                raise UserError(
                    f"the sound card refused: {error}; plug it in, close what else uses it"
                ) from error
        finally:
            self._finish()

    def _finish(self) -> None:
        self.transcript.end_line()
        self.ledger.output_underruns += self.bridge.underruns
        self.ledger.input_overflows += self.bridge.overflows
        self.ledger.output_overflows += self.bridge.skipped
        self.ledger.call(self.record, self.detector.turns(ended=True))

    def _open(self) -> Any:
        return self._sounddevice.RawStream(
            samplerate=self._rate,
            blocksize=self._block,
            channels=1,
            dtype="int16",
            latency="low",
            callback=self.bridge.callback,
        )

    def _note_delays(self, stream: Any) -> None:
        self.ledger.device_seconds = float(sum(stream.latency))
        self.ledger.resampler_seconds = self._to_engine.delay_seconds + self._to_card.delay_seconds

    def _loop(self, stop: Callable[[], bool]) -> None:
        while not stop():
            try:
                self._take(self.bridge.heard(SILENT_CARD_SECONDS))
            except queue.Empty:
                raise UserError(
                    f"the microphone sent nothing for {SILENT_CARD_SECONDS:.0f} s; is it unplugged?"
                ) from None
            while (result := self.engine.run_once()) is not None:
                self._give(result)
                if not self.bridge.inputs.empty():
                    self._take(self.bridge.heard(0.0))

    def _take(self, blocks: list[tuple[float, bytes]]) -> None:
        for arrived, block in blocks:
            samples = np.frombuffer(block, np.int16).astype(np.float32) / 32768.0
            audio = self._to_engine(samples)
            self.engine.feed(0, audio, arrived=arrived)
            if self.engine.vad_flush:  # it decides within this very tick
                self.engine.set_user_voice(0, self.detector.push(audio))
            else:
                self._unheard.append(audio)

    def _give(self, result: TickResult) -> None:
        backlog = self.bridge.outputs.qsize() * BLOCK_SECONDS
        samples = np.concatenate([self._unplayed, self._to_card(result.audio[0])])
        whole = len(samples) // self._block * self._block
        self._unplayed = samples[whole:]
        pcm = (np.clip(samples[:whole], -1.0, 1.0) * 32767.0).astype(np.int16)
        for start in range(0, whole, self._block):
            self.bridge.play(pcm[start : start + self._block].tobytes())
        delay = self.ledger.device_seconds + self.ledger.resampler_seconds + backlog
        self.record.add(result, extra_seconds=delay)
        self.ledger.tick(result)
        self.transcript.add(result)
        for audio in self._unheard:
            self.detector.push(audio)
        self._unheard.clear()


def talk(engine: DuplexEngine, sounddevice: Any, ledger: LatencyLedger) -> None:
    """A live call through the sound card until Ctrl-C."""
    transcript = Transcript(engine.lm, engine.patch_seconds, _write)
    call = MicrophoneCall(engine, sounddevice, ledger, transcript, VoiceDetector())
    print("Speak when you like; Ctrl-C ends the call. Wear headphones, or it hears itself.")
    call.run()
    print(f"\n{transcript.user_line()}\n")


# -------------------------------------------------------------------------------------- main


def lm_sampling(args: argparse.Namespace) -> Sampling:
    """The model's own sampling, changed where the command line says so."""
    given = {name: getattr(args, name) for name in ("temperature", "top_k", "eagerness")}
    return dataclasses.replace(
        Sampling(), **{name: value for name, value in given.items() if value is not None}
    )


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    device = setup_distributed(args.device).device
    if device.type == "cpu":
        torch.set_num_threads(args.threads)
    questions = [read_question(path) for path in args.wav or ()]
    if args.wav:
        check_outputs(args.wav, args.out)
    else:
        sounddevice = import_sounddevice()
        device_rate(sounddevice)
    codec, lm = load_models(args.codec, args.lm, str(device))
    print(f"codec {args.codec}, dialogue model {args.lm}, on {device}, seed {args.seed}")
    engine = DuplexEngine(
        codec,
        lm,
        sampling=lm_sampling(args),
        seed=args.seed,
        vad_flush=args.vad_flush,
    )
    engine.set_voice(0, args.emotion, args.language)
    ledger = LatencyLedger(
        engine.patch_seconds, engine.algorithmic_seconds, warmup_ticks=engine.warm_up()
    )
    try:
        if args.wav:
            answer_recordings(engine, questions, ledger, args)
        else:
            talk(engine, sounddevice, ledger)
    finally:  # whatever ended the call, what was measured is told
        print(ledger.table())
        print(ledger.json_line())


if __name__ == "__main__":
    run(main, resumes=False)
