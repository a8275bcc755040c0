"""Phase 5: talk to Samvad, or let it answer a recording.

    python stream_demo.py                                      # microphone and speaker
    python stream_demo.py --wav question.wav --out reply.wav   # no sound card needed

Audio is 24 kHz mono. The reply file is on the question's clock: it begins when the question
does, so playing both together gives the conversation as it happened. The last line of stdout is
the latency ledger as JSON.
"""

from __future__ import annotations

import argparse
import os
import queue
import tempfile
import time
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch

from audio import SAMPLE_RATE, WRITABLE, AudioError, read_audio, write_audio
from command import ArgumentParser, UserError, number, run, whole, writable_file
from data import EMOTIONS, LANGUAGES
from duplex import DuplexEngine, EmotionEstimate, ReplyText, TickResult, load_models
from ledger import (
    QUIET_DBFS,
    CallRecord,
    LatencyLedger,
    StreamResampler,
    UserTurn,
    VoiceDetector,
    find_speech,
    frame_levels,
)
from s2s import PAD, S2S, Sampling
from training import setup_distributed

TINY = Path(__file__).parent / "checkpoints" / "tiny"
BLOCK_SECONDS = 0.01  # what the sound card hands over at once
MAX_INPUT_BLOCKS, MAX_OUTPUT_BLOCKS = 100, 20
SILENT_CARD_SECONDS = 5.0
REPLY_OVERTIME_SECONDS = 10.0  # a reply under way at the end of the tail may take this long
NEW_LINE_SECONDS = 1.0


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = ArgumentParser(__doc__)
    add = parser.add_argument
    add("--wav", nargs="+", type=Path, help="spoken questions, instead of the microphone")
    add("--out", nargs="+", type=Path, help="reply files, one for each --wav [reply_NAME.wav]")
    add("--codec", type=Path, default=TINY / "codec", help="checkpoint folder")
    add("--lm", type=Path, default=TINY / "s2s", help="checkpoint folder")
    add("--emotion", choices=EMOTIONS, help="how the agent speaks [as it sees fit]")
    add("--emotion_strength", type=number(0, 10), default=1.0, help="of --emotion; 1 costs nothing")
    add("--language", choices=LANGUAGES[:3], help="of the call [recognised by the model]")
    add("--seed", type=whole(0, 2**63 - 1), default=0, help="of the sampling")
    more = parser.add_argument_group("advanced").add_argument
    more("--fast", action="store_true", help="with --wav: do not pace, never drop")
    more("--temperature", type=number(0, 100), help="of the sampling [the model's own]")
    more("--top_k", type=whole(1, 2**31), help="of the sampling [the model's own]")
    more("--eagerness", type=number(-100, 100), help="dB on its odds of speaking [the model's own]")
    more("--vad_flush", action="store_true", help="cut the agent off when the user barges in")
    more("--tail_seconds", type=number(0, 3600), default=4.0, help="of silence after each --wav")
    more("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    more("--threads", type=whole(1, 1024), default=1, help="CPU threads")
    args = parser.parse_args(argv)
    wavs, outs = args.wav or [], args.out or []
    if not wavs and (outs or args.fast):
        raise UserError(f"{'--out' if outs else '--fast'} needs --wav, a recording to answer")
    if outs and len(wavs) != len(outs):
        raise UserError(f"{len(wavs)} --wav files but {len(outs)} --out files; give one for each")
    args.out = outs or [Path(f"reply_{path.stem}.wav") for path in wavs]
    return args


def check_outputs(wavs: Sequence[Path], outs: Sequence[Path]) -> None:
    """A reply must not be lost at the end of a call for want of a place to put it."""
    questions, places = [wav.resolve() for wav in wavs], [out.resolve() for out in outs]
    for out, place in zip(outs, places, strict=True):
        if places.count(place) > 1:
            raise UserError(f"{out}: two replies would be written there; name them with --out")
        if place in questions:
            raise UserError(f"{out}: is a question too; give the reply another name with --out")
        writable_file(out, "--out")
        if out.suffix.lower() not in WRITABLE:
            raise UserError(f"--out {out}: cannot write '{out.suffix}' audio; end the name in .wav")


# ------------------------------------------------------------------------------------ transcript


class Transcript:
    """Prints the reply's text as it comes, and the user's emotion once an LM with an emotion branch
    is sure of it; averages what the model recognised of the user."""

    def __init__(
        self, lm: S2S, patch_seconds: float, write: Callable[[str], Any] | None = None,
        estimate: EmotionEstimate | None = None,
    ):  # fmt: skip
        self._lm, self._patch_seconds, self._shown = lm, patch_seconds, None
        self._estimate = estimate if lm.config.emotion_dim else None
        self._reply = ReplyText(lm.tokenizer)
        self._write = write or (lambda text: print(text, end="", flush=True))
        self._silent = 0.0
        self._emotion = np.zeros(len(lm.config.emotions))
        self._language = np.zeros(len(lm.config.languages))

    def add(self, result: TickResult) -> None:
        speaking, token = result.user_speaking[0], result.text[0]
        if speaking > 0.5:
            self._emotion += speaking * result.user_emotion[0]
            self._language += speaking * result.language[0]
        name = self._estimate.name(0) if self._estimate else None
        if name != self._shown and not self._reply.text:
            self._write(f"(you sound {name})\n" if name else "")
            self._shown = name
        new = self._reply.push(token)
        self._silent = 0.0 if token != PAD else self._silent + self._patch_seconds
        if new:
            self._write(f"samvad: {new.lstrip()}" if self._reply.text == new else new)
        elif self._silent > NEW_LINE_SECONDS:
            self.end_line()

    def end_line(self) -> None:
        if self._reply.text:
            self._write("\n")
            self._reply = ReplyText(self._lm.tokenizer)

    def user_line(self) -> str:
        """The user's emotion and language, from the moments the model found them speaking."""
        if not self._emotion.any():
            return "you: the model recognised no speech"
        config = self._lm.config
        pairs = (config.emotions, self._emotion), (config.languages, self._language)
        emotion, language = (f"{names[w.argmax()]} ({w.max() / w.sum():.0%})" for names, w in pairs)
        return f"you: sounded {emotion}, spoke {language}"


# ------------------------------------------------------------------------------------ recordings


def answer_recording(
    engine: DuplexEngine, audio: np.ndarray, ledger: LatencyLedger, transcript: Transcript,
    tail_seconds: float = 4.0, paced: bool = True, sleep: Callable[[float], None] = time.sleep,
) -> tuple[np.ndarray, CallRecord]:  # fmt: skip
    """Play `audio` [T] to slot 0, then silence; returns the reply [T'] and the call's record.

    `paced`: a patch is fed when its last sample is due, on the engine's clock. The tail lasts
    until a reply under way has ended. Dropped patches leave silence in the reply, so that it stays
    on the question's clock. What ends the call early, be it Ctrl-C, is the record's `stopped`.
    """
    engine.reset()
    seconds = engine.patch_seconds
    spoken = -(-len(audio) // engine.patch_samples)
    end = spoken + int(np.ceil(tail_seconds / seconds))
    most = end + int(np.ceil(REPLY_OVERTIME_SECONDS / seconds))
    patches = np.zeros((most, engine.patch_samples), np.float32)
    patches.reshape(-1)[: len(audio)] = audio
    reply, record = np.zeros_like(patches), CallRecord(seconds)
    detector = VoiceDetector() if engine.vad_flush else None
    start = engine.clock()

    fed = done = 0
    try:
        while done < most:
            until = fed if engine.queues[0] else fed + 1  # patches that have arrived, at least one
            if paced:
                sleep(max(0.0, start + until * seconds - engine.clock()))
                until = max(until, int((engine.clock() - start) / seconds + 1e-6))
            for patch in patches[fed:until]:
                fed += 1
                arrived = start + fed * seconds if paced else None
                engine.feed(0, patch, arrived, bounded=paced)
                if detector is not None:
                    engine.set_user_voice(0, detector.push(patch))
            result = engine.run_once()
            done = int(result.index[0]) + 1
            reply[done - 1] = result.audio[0]
            record.add(result)
            ledger.tick(result)
            transcript.add(result)
            last = reply[max(0, done - int(0.5 / seconds)) : done]
            if done >= end and frame_levels(last.reshape(-1)).max() < QUIET_DBFS:
                break
    except (Exception, KeyboardInterrupt) as error:
        record.stopped = error
    transcript.end_line()
    return reply[:done].reshape(-1), record


def answer_recordings(
    engine: DuplexEngine, questions: Sequence, ledger: LatencyLedger, args: argparse.Namespace
) -> None:
    """Answer every `--wav`, as `read_question` gave it, into its `--out`. Raises at the end what
    could not be written where it should, at once what stopped a call."""
    failures = []
    for path, out, (audio, turn) in zip(args.wav, args.out, questions, strict=True):
        transcript = Transcript(engine.lm, engine.patch_seconds, estimate=engine.user_emotion)
        end = f"speech ends at {turn.end:.2f} s, by {turn.source}" if turn else "no speech found"
        print(f"{path}: {len(audio) / SAMPLE_RATE:.2f} s, {end}")
        how = args.tail_seconds, not args.fast
        reply, record = answer_recording(engine, audio, ledger, transcript, *how)
        failure = save_reply(out, reply)
        failures += [failure] if failure else []
        for latency in ledger.call(record, [turn] if turn else []):
            late = "no answer within 2 s"
            if latency is not None:
                late = f"answered {latency * 1000:.0f} ms after the end of the question"
            print(late)
        print(f"{transcript.user_line()}\nreply: {failure or out}\n")
        if record.stopped:
            raise record.stopped
    if failures:
        raise UserError("; ".join(failures))


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


def read_question(path: Path) -> tuple[np.ndarray, UserTurn | None]:
    """A recording as 24 kHz mono [T], and when it is spoken in; `UserError` where there is none."""
    if not path.is_file():
        raise UserError(f"{path}: no such file; give --wav a recording of a spoken question")
    audio = read_audio(path)
    return audio, find_speech(audio)


# ------------------------------------------------------------------------------------ microphone


class SoundBridge:
    """Bounded queues of bytes between the sound card's thread and ours. One of output that runs dry
    once a reply plays is an underrun: counted, as is input that nobody takes for a second."""

    def __init__(self, block_bytes: int):
        self.block_bytes = block_bytes
        self.inputs: queue.Queue[tuple[float, bytes]] = queue.Queue(MAX_INPUT_BLOCKS)
        self.outputs: deque[bytes] = deque(maxlen=MAX_OUTPUT_BLOCKS)
        self.underruns = self.overflows = self.skipped = 0
        self._playing = False

    def callback(self, indata: Any, outdata: Any, frames: int, when: Any, status: Any) -> None:
        try:
            self.inputs.put_nowait((time.perf_counter(), bytes(indata)))
        except queue.Full:
            self.overflows += 1
        try:
            outdata[:] = self.outputs.popleft()
            self._playing = True
        except IndexError:
            outdata[:] = bytes(self.block_bytes)
            self.underruns += self._playing

    def play(self, block: bytes) -> None:
        """Queue a block; what the card is too late to play is given up, oldest first."""
        self.skipped += len(self.outputs) == MAX_OUTPUT_BLOCKS
        self.outputs.append(block)


def import_sounddevice() -> ModuleType:
    try:
        import sounddevice
    except ImportError as error:
        raise UserError("the microphone needs sounddevice: pip install sounddevice") from error
    except OSError as error:
        missing = "the microphone needs the PortAudio library: apt-get install libportaudio2"
        raise UserError(f"{missing}; or answer a recording: --wav question.wav") from error
    return sounddevice


def device_rate(sounddevice: Any) -> int:
    """24000 where microphone and speaker take it, else the microphone's own rate."""
    try:
        microphone = sounddevice.query_devices(kind="input")
        sounddevice.query_devices(kind="output")
    except (sounddevice.PortAudioError, ValueError) as error:
        missing = "no microphone and speaker found; plug them in"
        raise UserError(f"{missing}, or answer a recording: --wav question.wav") from error
    try:
        for check in (sounddevice.check_input_settings, sounddevice.check_output_settings):
            check(samplerate=SAMPLE_RATE, channels=1, dtype="int16")
        return SAMPLE_RATE
    except (sounddevice.PortAudioError, ValueError):
        return int(microphone["default_samplerate"])


class MicrophoneCall:
    """One live call on slot 0: sound card -> resampler -> engine -> resampler -> sound card."""

    def __init__(
        self, engine: DuplexEngine, sounddevice: Any, ledger: LatencyLedger,
        transcript: Transcript, detector: VoiceDetector,
    ):  # fmt: skip
        self.engine, self.ledger = engine, ledger
        self.transcript, self.detector = transcript, detector
        self.record = CallRecord(engine.patch_seconds)
        self._sounddevice = sounddevice
        self._rate = device_rate(sounddevice)
        self._block = int(self._rate * BLOCK_SECONDS)
        self.bridge = SoundBridge(self._block * 2)
        self._to_engine = StreamResampler(self._rate, SAMPLE_RATE)
        self._to_card = StreamResampler(SAMPLE_RATE, self._rate)
        self._unplayed = np.zeros(0, np.float32)

    def run(self, stop: Callable[[], bool] = lambda: False) -> None:
        """Talk until Ctrl-C or `stop()`; the ledger then holds the call, also after an error."""
        self.engine.reset()
        ledger, bridge = self.ledger, self.bridge
        ledger.resampler_seconds = self._to_engine.delay_seconds + self._to_card.delay_seconds
        settings = {"samplerate": self._rate, "blocksize": self._block, "channels": 1}
        settings |= {"dtype": "int16", "latency": "low", "callback": bridge.callback}
        try:
            with self._sounddevice.RawStream(**settings) as stream:
                ledger.device_seconds = float(sum(stream.latency))
                self._loop(stop)
        except KeyboardInterrupt:
            pass
        except self._sounddevice.PortAudioError as error:
            # A card that is gone cannot even be closed: what ended the call came before.
            if isinstance(error.__context__, UserError):
                raise error.__context__ from None
            if not isinstance(error.__context__, KeyboardInterrupt):
                why = f"the sound card refused: {error}; plug it in, close what else uses it"
                raise UserError(why) from error
        finally:
            self.transcript.end_line()
            ledger.counts["output_underruns"] = bridge.underruns
            ledger.counts["input_overflows"] = bridge.overflows
            ledger.counts["output_overflows"] = bridge.skipped
            ledger.call(self.record, self.detector.turns())

    def _loop(self, stop: Callable[[], bool]) -> None:
        inputs = self.bridge.inputs
        while not stop():
            try:
                if not self.engine.queues[0]:
                    self._take(*inputs.get(timeout=SILENT_CARD_SECONDS))
            except queue.Empty:
                silent = f"the microphone sent nothing for {SILENT_CARD_SECONDS:.0f} s"
                raise UserError(f"{silent}; is it unplugged?") from None
            while inputs.qsize():
                self._take(*inputs.get())
            if (result := self.engine.run_once()) is not None:
                self._give(result)

    def _take(self, arrived: float, pcm: bytes) -> None:
        audio = self._to_engine(np.frombuffer(pcm, np.int16).astype(np.float32) / 32768.0)
        self.engine.feed(0, audio, arrived)
        self.engine.set_user_voice(0, self.detector.push(audio))

    def _give(self, result: TickResult) -> None:
        backlog = len(self.bridge.outputs) * BLOCK_SECONDS
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


# -------------------------------------------------------------------------------------- main


def lm_sampling(args: argparse.Namespace) -> Sampling:
    """The model's own sampling, changed where the command line says so."""
    given = {name: getattr(args, name) for name in ("temperature", "top_k", "eagerness")}
    return Sampling(**{name: value for name, value in given.items() if value is not None})


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
        codec, lm, 1, lm_sampling(args), args.seed, args.vad_flush,
        emotion_strength=args.emotion_strength,
    )  # fmt: skip
    engine.set_voice(0, args.emotion, args.language)
    delay = lm.config.acoustic_delay / lm.config.frame_rate
    ledger = LatencyLedger(engine.patch_seconds, delay, engine.warm_up())
    try:
        if args.wav:
            answer_recordings(engine, questions, ledger, args)
        else:
            transcript = Transcript(engine.lm, engine.patch_seconds, estimate=engine.user_emotion)
            print("Speak when you like; Ctrl-C ends the call. Wear headphones, or it hears itself.")
            MicrophoneCall(engine, sounddevice, ledger, transcript, VoiceDetector()).run()
            print(f"\n{transcript.user_line()}\n")
    finally:  # whatever ended the call, what was measured is printed
        print(ledger.table())
        print(ledger.json_line())


if __name__ == "__main__":
    run(main, resumes=False)
