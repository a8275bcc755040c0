"""The real-time engine: microphone frames in, reply frames out, timed stage by stage.

One tick is one patch of the dialogue LM (`frames_per_step` codec frames, 40 ms by default):
input samples -> `codec.encode_step` -> `lm.step` (temporal, text, depth) -> `codec.decode_step`
-> output samples, for `slots` callers at once, each reset on its own. What is said about latency
is defined here too: where a reply begins, when that counts as an answer, and the ledger that all
scripts print.

Letters in shapes: `B` slots, `T` samples, `K` codebooks, `p` codec frames in a patch.
Times are in seconds unless a name says otherwise; audio is 24 kHz mono float32 in [-1, 1].
"""

from __future__ import annotations

import json
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import soxr
import torch

from audio import SAMPLE_RATE
from codec import Codec
from command import UserError
from s2s import PAD, S2S, Sampling

LEVEL_SECONDS = 0.005
MAX_QUEUED_PATCHES = 3
STAGES = ("encode", "temporal", "depth", "decode", "total")

# Where a reply begins, and what counts as one.
ONSET_DB = -40.0  # relative to the reply's peak
QUIET_DBFS = -45.0  # a reply that never rises above this is silence with codec noise
MERGE_SECONDS = 0.2  # shorter silences are pauses inside one utterance
MIN_SPEECH_SECONDS = 0.06  # shorter sounds are clicks
TAKEOVER_SECONDS = -0.2
UNANSWERED_SECONDS = 2.0

VAD_RATE = 16000
VAD_SAMPLES = 512
VAD_ON, VAD_OFF = 0.5, 0.35  # Silero's own defaults for entering and leaving speech
VAD_TURN_SILENCE = 0.5


# ---------------------------------------------------------------------------- models and results


def check_codec_matches(codec: Codec, lm: S2S) -> None:
    """Raise `UserError` unless `lm` was trained on the codes of this very `codec`."""
    wanted = lm.config.codec_fingerprint
    if wanted != codec.fingerprint:
        raise UserError(
            f"the dialogue model was trained on codes of codec {wanted or '(none named)'}, but this"
            f" codec is {codec.fingerprint}; give the matching pair with --codec and --lm"
        )
    sizes = tuple(lm.config.codebook_sizes)
    if tuple(codec.config.codebook_sizes)[: len(sizes)] != sizes:
        raise UserError(
            f"the dialogue model wants codebooks of {sizes}, the codec has"
            f" {tuple(codec.config.codebook_sizes)}; give the matching pair with --codec and --lm"
        )
    if float(lm.config.frame_rate) != float(codec.config.frame_rate):
        raise UserError(
            f"the dialogue model runs at {lm.config.frame_rate} frames a second, the codec at"
            f" {codec.config.frame_rate}; give the matching pair with --codec and --lm"
        )


def load_models(
    codec_path: str | Path, lm_path: str | Path, device: str = "cpu"
) -> tuple[Codec, S2S]:
    """The codec and the dialogue LM of two checkpoint folders, checked to belong together."""
    codec = Codec.from_checkpoint(codec_path, device=device)
    lm = S2S.from_checkpoint(lm_path, device=device)
    check_codec_matches(codec, lm)
    return codec, lm


@dataclass(frozen=True)
class StageTimes:
    """Seconds one tick took, stage by stage; `total` ends when the samples are on the host."""

    encode: float
    temporal: float
    depth: float
    decode: float
    total: float


@dataclass(frozen=True)
class TickResult:
    """What one tick gave, a row a slot; rows of slots that were not `active` are zero.

    audio [B, T] float32; text [B] token ids (`PAD` = none); user_speaking, turn_end [B]
    probabilities; user_emotion [B, 8], language [B, 3] probabilities; index [B] the number of the
    input patch heard (dropped ones count); waited [B] seconds the patch lay in the queue; dropped
    [B] patches lost since the slot's last tick; muted [B] output silenced by `vad_flush`;
    not_finite [B] samples, heard or spoken, that were not numbers and became silence.
    """

    audio: np.ndarray
    text: np.ndarray
    user_speaking: np.ndarray
    turn_end: np.ndarray
    user_emotion: np.ndarray
    language: np.ndarray
    active: np.ndarray
    index: np.ndarray
    waited: np.ndarray
    dropped: np.ndarray
    muted: np.ndarray
    not_finite: np.ndarray
    times: StageTimes


# --------------------------------------------------------------------------------- input queue


@dataclass(frozen=True)
class QueuedPatch:
    """A patch of input [T] that waits; `arrived` is when its last sample came in."""

    audio: np.ndarray
    arrived: float
    index: int
    gap: bool = False


class PatchQueue:
    """One caller's input, cut into patches; never more than `max_patches` wait.

    Beyond that the oldest are dropped and counted. One silent patch stands for a whole run of
    them, so that speech from before and after the gap is not spliced into new words, and the
    queue with it keeps to its bound: latency never grows.
    """

    def __init__(self, patch_samples: int, max_patches: int = MAX_QUEUED_PATCHES):
        self.patch_samples = patch_samples
        self.max_patches = max_patches
        self.clear()

    def clear(self) -> None:
        self._patches: deque[QueuedPatch] = deque()
        self._rest = np.zeros(0, np.float32)
        self._next_index = 0
        self.dropped = 0

    def __len__(self) -> int:
        return len(self._patches)

    def push(self, audio: np.ndarray, arrived: float, bounded: bool = True) -> None:
        """Take samples [T] of any length; `bounded=False` never drops."""
        audio = np.concatenate([self._rest, np.asarray(audio, np.float32)])
        whole = len(audio) // self.patch_samples * self.patch_samples
        self._rest = audio[whole:]
        for start in range(0, whole, self.patch_samples):
            patch = audio[start : start + self.patch_samples]
            self._patches.append(QueuedPatch(patch, arrived, self._next_index))
            self._next_index += 1
            if bounded:
                self._bound()

    def pop(self) -> QueuedPatch:
        return self._patches.popleft()

    def _bound(self) -> None:
        while len(self._patches) > self.max_patches:
            oldest = self._patches.popleft()
            replaced = self._patches.popleft()
            self.dropped += 1 if oldest.gap else 2
            silence = np.zeros(self.patch_samples, np.float32)
            self._patches.appendleft(
                QueuedPatch(silence, replaced.arrived, replaced.index, gap=True)
            )


# ---------------------------------------------------------------------------------- vad flush


class BargeInFlush:
    """`--vad_flush` for one slot: when to silence an agent whose user talks over it.

    Starts after `confirm` ticks of voice while the agent is heard, ends after `release` ticks
    without voice.
    """

    def __init__(self, confirm: int = 2, release: int = 2):
        self.confirm, self.release = confirm, release
        self.reset()

    def reset(self) -> None:
        self.flushing = False
        self._voiced = 0
        self._unvoiced = 0

    def update(self, user_voice: bool, agent_audible: bool) -> bool:
        """One tick's decision: True = mute this output, force silence into the agent's stream."""
        self._voiced = self._voiced + 1 if user_voice else 0
        self._unvoiced = 0 if user_voice else self._unvoiced + 1
        if self.flushing:
            self.flushing = self._unvoiced < self.release
        elif agent_audible and self._voiced >= self.confirm:
            self.flushing = True
        return self.flushing


# -------------------------------------------------------------------------------------- engine


class DuplexEngine:
    """Codec and dialogue LM in lock-step, for `slots` callers on one device.

    `feed` queues a slot's input, `run_once` runs a tick over the slots that have a whole patch
    waiting (None when there is none), `run_ready` runs them back to back. `tick` is the step
    itself, for callers with queues of their own.

    sampling: None for the LM's default. clock: seconds, monotonic.
    Raises `UserError` when the two models do not belong together.
    """

    def __init__(
        self,
        codec: Codec,
        lm: S2S,
        slots: int = 1,
        sampling: Sampling | None = None,
        seed: int = 0,
        vad_flush: bool = False,
        max_queued: int = MAX_QUEUED_PATCHES,
        clock: Callable[[], float] = time.perf_counter,
    ):
        check_codec_matches(codec, lm)
        self.codec, self.lm = codec, lm
        self.slots, self.sampling, self.seed = slots, sampling, seed
        self.vad_flush, self.clock = vad_flush, clock
        self.frames_per_step = lm.config.frames_per_step
        self.num_codebooks = len(lm.config.codebook_sizes)
        self.patch_samples = self.frames_per_step * codec.config.hop
        self.patch_seconds = self.patch_samples / codec.config.sample_rate
        self.device = next(lm.parameters()).device
        self._encoder = codec.init_encoder_state(slots)
        self._decoder = codec.init_decoder_state(slots)
        self._lm_state = lm.init_state(slots, seed=seed)
        self._emotion = torch.zeros(slots, dtype=torch.int64, device=self.device)
        self._language = torch.zeros(slots, dtype=torch.int64, device=self.device)
        self.queues = [PatchQueue(self.patch_samples, max_queued) for _ in range(slots)]
        self._reported_drops = np.zeros(slots, np.int64)
        self._user_voice = np.zeros(slots, bool)
        self._audible = np.zeros(slots, bool)
        self._muted = np.zeros(slots, bool)
        self._flush = [BargeInFlush() for _ in range(slots)]
        self._silence = self._silence_codes() if vad_flush else None

    @property
    def algorithmic_seconds(self) -> float:
        """Patch + acoustic delay; the codec looks nothing ahead."""
        return self.patch_seconds + self.lm.config.acoustic_delay / self.lm.config.frame_rate

    # ---- per slot

    def reset(self, slot: int | None = None) -> None:
        """Forget one slot's call; or all of them, and draw from the seed again. The voice
        settings stay."""
        chosen = range(self.slots) if slot is None else [slot]
        mask = torch.zeros(self.slots, dtype=torch.bool, device=self.device)
        mask[list(chosen)] = True
        for state in (self._encoder, self._decoder, self._lm_state):
            state.reset(mask)
        if slot is None:
            self._lm_state.generator.manual_seed(self.seed)
        for one in chosen:
            self.queues[one].clear()
            self._flush[one].reset()
            self._reported_drops[one] = 0
            self._user_voice[one] = self._audible[one] = self._muted[one] = False

    def set_voice(
        self, slot: int, emotion: str | None = None, language: str | None = None
    ) -> None:
        """The agent's emotion and language in one slot, None = its own choice; also mid-call.

        Raises `UserError` for one that the model does not know.
        """
        config = self.lm.config
        self._emotion[slot] = _number_of(emotion, config.emotions, "emotion")
        self._language[slot] = _number_of(language, config.languages, "language")

    def set_user_voice(self, slot: int, speaking: bool) -> None:
        """Tell `vad_flush` whether a detector hears the user of this slot now."""
        self._user_voice[slot] = speaking

    def feed(
        self, slot: int, audio: np.ndarray, arrived: float | None = None, bounded: bool = True
    ) -> None:
        """Queue a slot's input samples [T]; `arrived` (the clock's now by default) is when the
        last of them came in, and the start of what `waited` measures."""
        now = self.clock() if arrived is None else arrived
        self.queues[slot].push(audio, now, bounded)

    # ---- ticks

    def run_ready(self) -> Iterator[TickResult]:
        """Back-to-back ticks until no slot has a whole patch waiting."""
        while (result := self.run_once()) is not None:
            yield result

    def run_once(self) -> TickResult | None:
        """One tick over the slots with a patch waiting; None when there is none."""
        active = np.array([len(queue) > 0 for queue in self.queues])
        if not active.any():
            return None
        started = self.clock()
        frames = np.zeros((self.slots, self.patch_samples), np.float32)
        index = np.zeros(self.slots, np.int64)
        waited = np.zeros(self.slots)
        for slot in np.flatnonzero(active):
            patch = self.queues[slot].pop()
            frames[slot], index[slot] = patch.audio, patch.index
            waited[slot] = max(0.0, started - patch.arrived)
        total = np.array([queue.dropped for queue in self.queues])
        dropped = np.where(active, total - self._reported_drops, 0)
        self._reported_drops += dropped
        return self._tick(frames, active, index, waited, dropped)

    def tick(self, frames: np.ndarray, active: np.ndarray | None = None) -> TickResult:
        """One patch for every slot. frames [B, T]; active [B] bool, all by default."""
        active = np.ones(self.slots, bool) if active is None else np.asarray(active, bool)
        zeros = np.zeros(self.slots, np.int64)
        return self._tick(np.asarray(frames, np.float32), active, zeros, zeros * 0.0, zeros)

    def warm_up(self, ticks: int = 8) -> int:
        """Run silent ticks, then forget them: lazy initialisation is not a caller's latency."""
        for _ in range(ticks):
            self.tick(np.zeros((self.slots, self.patch_samples), np.float32))
        self.reset()
        return ticks

    @torch.inference_mode()
    def _tick(
        self,
        frames: np.ndarray,
        active: np.ndarray,
        index: np.ndarray,
        waited: np.ndarray,
        dropped: np.ndarray,
    ) -> TickResult:
        forced = self._decide_flush(active)
        frames, not_finite = _finite(frames)
        frames = frames.clip(-1.0, 1.0)
        marks: dict[str, float] = {}
        self._mark(marks, "start")
        audio = torch.from_numpy(frames).to(self.device)[:, None]  # [B, 1, T]
        mask = None if active.all() else torch.from_numpy(active).to(self.device)
        user_codes = self.codec.encode_step(
            audio, self._encoder, num_codebooks=self.num_codebooks, active=mask
        )  # [B, K, p]
        self._mark(marks, "encode")
        step = self.lm.step(
            user_codes,
            self._lm_state,
            active=mask,
            emotion=self._emotion,
            language=self._language,
            sampling=self.sampling,
            timer=lambda stage: self._mark(marks, stage),
            **self._forcing(forced),
        )
        self._mark(marks, "lm")
        reply = self.codec.decode_step(step.agent_codes, self._decoder, active=mask)[:, 0]
        reply = reply.float().cpu().numpy()  # [B, T]
        self._mark(marks, "decode")
        keep = active[:, None].astype(np.float32)
        reply, lost = _finite(reply)
        reply = self._mute(reply * keep, forced)
        return TickResult(
            audio=reply,
            text=np.where(active, _host(step.text), PAD),
            user_speaking=_host(step.user_speaking) * active,
            turn_end=_host(step.turn_end) * active,
            user_emotion=_host(step.user_emotion) * keep,
            language=_host(step.language) * keep,
            active=active,
            index=index,
            waited=waited,
            dropped=dropped,
            muted=forced,
            not_finite=(not_finite + lost) * active,
            times=_stage_times(marks),
        )

    def _forcing(self, forced: np.ndarray) -> dict:
        """What `S2S.step` is told of the slots that are silenced."""
        if not forced.any():
            return {}
        return {
            "forced": torch.from_numpy(forced).to(self.device),
            "forced_agent_codes": self._silence,
            "forced_text": torch.full_like(self._emotion, PAD),
        }

    def _decide_flush(self, active: np.ndarray) -> np.ndarray:
        """[B] bool: slots whose agent is silenced in this tick."""
        forced = np.zeros(self.slots, bool)
        if self.vad_flush:
            for slot in np.flatnonzero(active):
                forced[slot] = self._flush[slot].update(
                    bool(self._user_voice[slot]), bool(self._audible[slot])
                )
        return forced

    def _mute(self, reply: np.ndarray, forced: np.ndarray) -> np.ndarray:
        """Silence the forced slots; the first muted patch fades out in 5 ms, without a click."""
        fade = int(LEVEL_SECONDS * SAMPLE_RATE)
        for slot in np.flatnonzero(forced):
            reply[slot, :fade] *= 0.0 if self._muted[slot] else np.linspace(1, 0, fade)
            reply[slot, fade:] = 0.0
        self._muted = forced
        for slot in range(self.slots) if self.vad_flush else ():
            self._audible[slot] = frame_levels(reply[slot]).max() > QUIET_DBFS
        return reply

    @torch.inference_mode()
    def _silence_codes(self) -> torch.Tensor:
        """The codes [B, K, p] that the codec settles on after a second of digital silence."""
        second = torch.zeros(1, 1, self.codec.config.sample_rate, device=self.device)
        codes = self.codec.encode(second, num_codebooks=self.num_codebooks)
        return codes[..., -self.frames_per_step :].repeat(self.slots, 1, 1)

    def _mark(self, marks: dict[str, float], stage: str) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        marks[stage] = self.clock()


def _number_of(name: str | None, known: Sequence[str], what: str) -> int:
    """What the LM is told: 0 for its own choice, else the place in `known`, from 1."""
    if name is not None and name not in known:
        raise UserError(f"{what} {name}: the dialogue model knows {', '.join(known)}")
    return 0 if name is None else known.index(name) + 1


def _finite(audio: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Audio [B, T] with silence for what is not a number, and how many samples that were, [B].

    One NaN would stay in the caches for as long as the attention looks back.
    """
    wrong = ~np.isfinite(audio)
    return (np.where(wrong, np.float32(0), audio) if wrong.any() else audio), wrong.sum(1)


def _host(tensor: torch.Tensor) -> np.ndarray:
    if tensor.is_floating_point():
        tensor = tensor.float()
    return tensor.cpu().numpy()


def _stage_times(marks: dict[str, float]) -> StageTimes:
    return StageTimes(
        encode=marks["encode"] - marks["start"],
        temporal=marks["temporal"] - marks["encode"],
        depth=marks["depth"] - marks["temporal"],
        decode=marks["decode"] - marks["lm"],
        total=marks["decode"] - marks["start"],
    )


class ReplyText:
    """Token ids in, readable text out as soon as its bytes are whole. PAD adds nothing."""

    def __init__(self, tokenizer: Any):
        self._tokenizer = tokenizer
        self.reset()

    def reset(self) -> None:
        self._ids: list[int] = []
        self.text = ""

    def push(self, token: int) -> str:
        """The text this token adds, "" while a character's bytes are incomplete."""
        if token == PAD:
            return ""
        self._ids.append(int(token))
        text = self._tokenizer.decode(self._ids)
        if text.endswith("\ufffd"):
            return ""
        new, self.text = text[len(self.text) :], text
        return new


# ----------------------------------------------------------------------------------- resampling


class StreamResampler:
    """Chunks at one rate in, the same stretch of time at another rate out.

    soxr's fixed-ratio modes work in blocks and hold back a varying 0 to 20 ms (LQ) or 40 ms (HQ),
    measured in 10 ms chunks; its variable-ratio mode holds back a constant 5 ms at 48 -> 24 kHz
    and 10 ms at 24 -> 48 kHz. That lag is filled with silence first, so every chunk comes out
    whole at once, `delay_seconds` late in content.
    """

    def __init__(self, in_rate: int, out_rate: int):
        self.in_rate, self.out_rate = int(in_rate), int(out_rate)
        self.delay_seconds = 0.0
        self._stream = None
        if self.in_rate != self.out_rate:
            self.delay_seconds = self._measured_lag()
            self._stream = self._open()
            primer = int(np.ceil(self.delay_seconds * self.in_rate))
            self._stream.resample_chunk(np.zeros(primer, np.float32))

    def _open(self) -> soxr.ResampleStream:
        return soxr.ResampleStream(self.in_rate, self.out_rate, 1, dtype="float32", vr=True)

    def _measured_lag(self) -> float:
        stream, chunk = self._open(), self.in_rate // 100
        lags, taken, given = [], 0, 0
        for _ in range(20):
            taken += chunk
            given += len(stream.resample_chunk(np.zeros(chunk, np.float32)))
            lags.append(taken / self.in_rate - given / self.out_rate)
        return max(lags)

    def __call__(self, audio: np.ndarray) -> np.ndarray:
        """[T] at `in_rate` -> [T * out_rate / in_rate] at `out_rate`."""
        audio = np.ascontiguousarray(audio, np.float32)
        return audio if self._stream is None else self._stream.resample_chunk(audio)


# ------------------------------------------------------------------------------ voice detection


@dataclass(frozen=True)
class UserTurn:
    """When the user spoke, in seconds of the input stream; `source` says who found it."""

    start: float
    end: float
    source: str = "manifest"


class VoiceDetector:
    """Silero VAD beside a live call: 512 samples at 16 kHz a decision, loaded on first use.

    `push` takes 24 kHz samples of any length; `speaking` is the latest decision and `turns()`
    the finished ones. A turn is over once half a second is unvoiced. Silero goes on for 30 to
    80 ms after the last sound, which would flatter the response latency: a turn's end is the
    last 5 ms of it within 40 dB of its peak.
    """

    def __init__(self, probability: Callable[[np.ndarray], float] | None = None):
        self._probability = probability or _silero()
        self._resample = StreamResampler(SAMPLE_RATE, VAD_RATE)
        self._rest = np.zeros(0, np.float32)
        self._levels = LevelHistory()
        self._decided = 0  # samples at 16 kHz
        self._start: float | None = None
        self._last_voice = 0.0
        self._turns: list[UserTurn] = []
        self.speaking = False

    def push(self, audio: np.ndarray) -> bool:
        audio = _finite(np.asarray(audio, np.float32)[None])[0][0]
        self._levels.push(audio)
        samples = np.concatenate([self._rest, self._resample(audio)])
        whole = len(samples) // VAD_SAMPLES * VAD_SAMPLES
        self._rest = samples[whole:]
        for start in range(0, whole, VAD_SAMPLES):
            self._decide(self._probability(samples[start : start + VAD_SAMPLES]))
        if self._start is None:
            self._levels.forget()
        return self.speaking

    def turns(self, ended: bool = False) -> list[UserTurn]:
        """The finished turns; with `ended`, one still open closes at its last voice."""
        return self._turns + ([self._turn()] if ended and self._start is not None else [])

    def _decide(self, probability: float) -> None:
        begins = self._decided / VAD_RATE - self._resample.delay_seconds
        self._decided += VAD_SAMPLES
        ends = begins + VAD_SAMPLES / VAD_RATE
        self.speaking = probability >= (VAD_OFF if self.speaking else VAD_ON)
        if self.speaking:
            self._start = begins if self._start is None else self._start
            self._last_voice = ends
        elif self._start is not None and ends - self._last_voice >= VAD_TURN_SILENCE:
            self._turns.append(self._turn())
            self._start = None

    def _turn(self) -> UserTurn:
        end = self._levels.last_loud(self._start, self._last_voice)
        return UserTurn(self._start, end, "silero")


class LevelHistory:
    """Loudness of the recent past of a stream, every 5 ms."""

    KEEP = int(2 / LEVEL_SECONDS)

    def __init__(self):
        self._levels = np.zeros(0)
        self._forgotten = 0
        self._rest = np.zeros(0, np.float32)

    def push(self, audio: np.ndarray) -> None:
        audio = np.concatenate([self._rest, audio])
        hop = int(LEVEL_SECONDS * SAMPLE_RATE)
        self._rest = audio[len(audio) // hop * hop :]
        self._levels = np.concatenate([self._levels, frame_levels(audio)])

    def forget(self) -> None:
        """Keep the last two seconds only."""
        surplus = max(0, len(self._levels) - self.KEEP)
        self._levels = self._levels[surplus:]
        self._forgotten += surplus

    def last_loud(self, start: float, end: float) -> float:
        """End of the last 5 ms in [start, end) within 40 dB of the loudest there; `end` if none."""
        first, last = (int(round(s / LEVEL_SECONDS)) - self._forgotten for s in (start, end))
        levels = self._levels[max(0, first) : max(0, last)]
        if not len(levels):
            return end
        loud = np.flatnonzero(levels > levels.max() + ONSET_DB)
        return (self._forgotten + max(0, first) + int(loud[-1]) + 1) * LEVEL_SECONDS


def _silero() -> Callable[[np.ndarray], float]:
    threads = torch.get_num_threads()
    try:
        import silero_vad
    except ImportError as error:
        raise UserError("voice detection needs Silero VAD: pip install silero-vad") from error
    model = silero_vad.load_silero_vad()
    torch.set_num_threads(threads)  # importing silero_vad sets it to 1

    def probability(samples: np.ndarray) -> float:
        with torch.inference_mode():
            return float(model(torch.from_numpy(np.ascontiguousarray(samples)), VAD_RATE))

    return probability


def find_speech(audio: np.ndarray, sample_rate: int = SAMPLE_RATE) -> UserTurn | None:
    """The stretch of a recording [T] from its first to its last voice, or None in silence.

    By energy (-40 dB of the peak) where the recording's background lies below that, which is
    exact; else by Silero VAD.
    """
    levels = frame_levels(audio, sample_rate)
    if not len(levels) or levels.max() < QUIET_DBFS:
        return None
    if np.percentile(levels, 5) < levels.max() + ONSET_DB:
        segments = voiced_segments(levels, levels.max() + ONSET_DB)
        if segments:
            return UserTurn(segments[0][0], segments[-1][1], "energy")
    detector = VoiceDetector()
    detector.push(_at_24k(audio, sample_rate))
    detector.push(np.zeros(SAMPLE_RATE, np.float32))
    turns = detector.turns(ended=True)
    return UserTurn(turns[0].start, turns[-1].end, "silero") if turns else None


def _at_24k(audio: np.ndarray, sample_rate: int) -> np.ndarray:
    return audio if sample_rate == SAMPLE_RATE else soxr.resample(audio, sample_rate, SAMPLE_RATE)


# ------------------------------------------------------------------------------ response latency


@dataclass(frozen=True)
class Response:
    """What followed one user turn; `kind`: "answered", "takeover" or "unanswered".

    onset: when the reply reached the ear, on the input's clock, or None; latency: onset - turn
    end, or None when unanswered.
    """

    turn_end: float
    onset: float | None
    latency: float | None
    kind: str


def frame_levels(audio: np.ndarray, sample_rate: int = SAMPLE_RATE) -> np.ndarray:
    """Loudness in dBFS of every whole 5 ms of audio [T]."""
    hop = int(round(LEVEL_SECONDS * sample_rate))
    frames = np.asarray(audio, np.float64)[: len(audio) // hop * hop].reshape(-1, hop)
    return 10.0 * np.log10(np.mean(frames**2, axis=1) + 1e-12)


def voiced_segments(levels: np.ndarray, threshold_db: float) -> list[tuple[float, float]]:
    """Utterances as (start, end) seconds: frames above the threshold, pauses under 0.2 s bridged,
    clicks under 60 ms left out."""
    above = np.flatnonzero(levels > threshold_db)
    if not len(above):
        return []
    breaks = np.flatnonzero(np.diff(above) * LEVEL_SECONDS > MERGE_SECONDS + LEVEL_SECONDS)
    firsts = above[np.r_[0, breaks + 1]] * LEVEL_SECONDS
    lasts = (above[np.r_[breaks, len(above) - 1]] + 1) * LEVEL_SECONDS
    return [(a, b) for a, b in zip(firsts, lasts, strict=True) if b - a >= MIN_SPEECH_SECONDS]


@dataclass(frozen=True)
class ReplyClock:
    """Where a reply's own seconds fall on the clock of the input.

    Section "response" of the ledger: (patch + 1) x patch length + that patch's delay + offset in
    the patch. delays [patches]: measured tick (with its wait in the queue), device and resampler;
    zeros give the audio clock. index [patches]: the input patch each answers; None = in order.
    """

    patch_seconds: float
    delays: np.ndarray | None = None
    index: np.ndarray | None = None

    def ear(self, seconds: float) -> float:
        patch = int(seconds / self.patch_seconds + 1e-6)
        heard, delay = patch, 0.0
        if self.index is not None and len(self.index):
            heard = int(self.index[min(patch, len(self.index) - 1)])
        if self.delays is not None and len(self.delays):
            delay = float(self.delays[min(patch, len(self.delays) - 1)])
        offset = seconds - patch * self.patch_seconds
        return (heard + 1) * self.patch_seconds + delay + offset


def response_latencies(
    levels: np.ndarray, turns: Sequence[UserTurn], clock: ReplyClock
) -> list[Response]:
    """One `Response` for each user turn, from the agent's loudness (`frame_levels`).

    A reply's onset is the first utterance to begin after the turn began and before the next one,
    at -40 dB of the peak in that stretch. Before -200 ms it is a takeover; later than 2 s after
    the turn's end, or never, it is unanswered.
    """
    ear = np.array([clock.ear(i * LEVEL_SECONDS) for i in range(len(levels))])
    responses = []
    for number, turn in enumerate(turns):
        until = turns[number + 1].start if number + 1 < len(turns) else np.inf
        inside = (ear > turn.start) & (ear < until)
        onset = _first_onset(levels, inside, clock, turn.start, until)
        responses.append(_classify(turn.end, onset))
    return responses


def _first_onset(
    levels: np.ndarray, inside: np.ndarray, clock: ReplyClock, after: float, until: float
) -> float | None:
    if not inside.any() or levels[inside].max() < QUIET_DBFS:
        return None
    for start, _ in voiced_segments(levels, levels[inside].max() + ONSET_DB):
        if after < clock.ear(start) < until:
            return clock.ear(start)
    return None


def _classify(turn_end: float, onset: float | None) -> Response:
    if onset is None or onset - turn_end > UNANSWERED_SECONDS:
        return Response(turn_end, None, None, "unanswered")
    latency = onset - turn_end
    kind = "takeover" if latency < TAKEOVER_SECONDS else "answered"
    return Response(turn_end, onset, latency, kind)


def barge_in_latencies(
    levels: np.ndarray, turns: Sequence[UserTurn], clock: ReplyClock
) -> list[float]:
    """For each turn that begins while the agent is heard: seconds until the agent is silent."""
    if not len(levels) or levels.max() < QUIET_DBFS:
        return []
    heard = [
        (clock.ear(start), clock.ear(end - LEVEL_SECONDS) + LEVEL_SECONDS)
        for start, end in voiced_segments(levels, levels.max() + ONSET_DB)
    ]
    return [end - t.start for t in turns for start, end in heard if start < t.start < end]


@dataclass
class CallRecord:
    """What the ledger needs of one caller's call: loudness and delay of every output patch.

    Half a kilobyte a second, so that a call of hours can be judged at its end.
    """

    patch_seconds: float
    slot: int = 0
    levels: list[np.ndarray] = field(default_factory=list)
    delays: list[float] = field(default_factory=list)
    index: list[int] = field(default_factory=list)
    stopped: BaseException | None = None  # what ended the call early

    def add(self, result: TickResult, extra_seconds: float = 0.0) -> None:
        """Note a tick; `extra_seconds`: device, buffers and resamplers."""
        self.levels.append(frame_levels(result.audio[self.slot]))
        waited = float(result.waited[self.slot])
        self.delays.append(waited + result.times.total + extra_seconds)
        self.index.append(int(result.index[self.slot]))

    def responses(self, turns: Sequence[UserTurn]) -> list[Response]:
        return response_latencies(self._levels(), turns, self._clock())

    def barge_ins(self, turns: Sequence[UserTurn]) -> list[float]:
        return barge_in_latencies(self._levels(), turns, self._clock())

    def _levels(self) -> np.ndarray:
        return np.concatenate(self.levels) if self.levels else np.zeros(0)

    def _clock(self) -> ReplyClock:
        return ReplyClock(self.patch_seconds, np.array(self.delays), np.array(self.index))


# ---------------------------------------------------------------------------------------- ledger


class LatencyLedger:
    """p50/p95/p99 of everything that delays a reply; the warm-up is not in it.

    `tick` and `call` collect, `table` is for the terminal, `json_line` for the last line of
    stdout. Milliseconds in both.
    """

    def __init__(
        self, patch_seconds: float, algorithmic_seconds: float | None = None, warmup_ticks: int = 0
    ):
        self.patch_seconds = patch_seconds
        self.algorithmic_seconds = algorithmic_seconds or patch_seconds
        self.warmup_ticks = warmup_ticks
        self.stages: dict[str, list[float]] = {stage: [] for stage in STAGES}
        self.responses: list[Response] = []
        self.barge_ins: list[float] = []
        self.mouth_to_ear: list[float] = []
        self.turn_end_sources: set[str] = set()
        self.device_seconds = 0.0
        self.resampler_seconds = 0.0
        self.dropped_patches = 0
        self.not_finite_samples = 0
        self.late_ticks = 0
        self.output_underruns = 0
        self.output_overflows = 0
        self.input_overflows = 0

    def tick(self, result: TickResult) -> None:
        """Count one tick: late when it took longer than its own length, drops as it reports."""
        for stage, seconds in asdict(result.times).items():
            self.stages[stage].append(seconds)
        self.late_ticks += result.times.total > self.patch_seconds
        self.dropped_patches += int(result.dropped.sum())
        self.not_finite_samples += int(result.not_finite.sum())

    def call(self, record: CallRecord, turns: Sequence[UserTurn]) -> list[Response]:
        """Judge a finished call by its user's turns; returns its responses."""
        responses = record.responses(turns)
        self.responses += responses
        self.barge_ins += record.barge_ins(turns)
        self.turn_end_sources |= {turn.source for turn in turns}
        return responses

    def summary(self) -> dict:
        """All of it as plain numbers (ms), None where nothing was measured."""
        kinds = [response.kind for response in self.responses]
        answered = [r.latency for r in self.responses if r.kind == "answered"]
        return {
            "patch_ms": _ms(self.patch_seconds),
            "algorithmic_ms": _ms(self.algorithmic_seconds),
            "tick_ms": {stage: percentiles(values) for stage, values in self.stages.items()},
            "response_ms": percentiles(answered),
            "turns": len(kinds),
            "answered": kinds.count("answered"),
            "takeovers": kinds.count("takeover"),
            "unanswered": kinds.count("unanswered"),
            "answered_share": round(kinds.count("answered") / len(kinds), 4) if kinds else None,
            "turn_end_source": "+".join(sorted(self.turn_end_sources)) or None,
            "barge_in_ms": percentiles(self.barge_ins),
            "mouth_to_ear_ms": percentiles(self.mouth_to_ear),
            "device_ms": _ms(self.device_seconds),
            "resampler_ms": _ms(self.resampler_seconds),
            "dropped_patches": self.dropped_patches,
            "not_finite_samples": self.not_finite_samples,
            "late_ticks": self.late_ticks,
            "output_underruns": self.output_underruns,
            "output_overflows": self.output_overflows,
            "input_overflows": self.input_overflows,
            "warmup_ticks": self.warmup_ticks,
        }

    def json_line(self) -> str:
        return json.dumps(self.summary(), allow_nan=False)

    def table(self) -> str:
        """A small table for the terminal, 80 columns."""
        s = self.summary()
        rows = [f"{'latency, ms':<16}{'p50':>8}{'p95':>8}{'p99':>8}{'n':>7}"]
        rows.append(f"{'algorithmic':<16}{s['algorithmic_ms']:>8.1f}   patch + acoustic delay")
        for stage in STAGES:
            note = f"   of {s['patch_ms']:.0f}" if stage == "total" else ""
            rows.append(_row(f"tick {stage}", s["tick_ms"][stage], note))
        share = f"   answered {s['answered']}/{s['turns']}" if s["turns"] else ""
        rows.append(_row("response", s["response_ms"], share))
        rows.append(_row("barge-in", s["barge_in_ms"]))
        rows.append(_row("mouth-to-ear", s["mouth_to_ear_ms"]))
        rows.append(
            f"dropped patches {s['dropped_patches']}, late ticks {s['late_ticks']}, underruns"
            f" {s['output_underruns']}, takeovers {s['takeovers']}, unanswered {s['unanswered']}"
        )
        rows.append(
            f"device {s['device_ms']:.1f}, resamplers {s['resampler_ms']:.1f}; end of turn by"
            f" {s['turn_end_source'] or 'nothing'}; {s['warmup_ticks']} warm-up ticks left out"
        )
        if s["not_finite_samples"]:
            rows.append(f"{s['not_finite_samples']} samples were not numbers and became silence")
        return "\n".join(rows)


def percentiles(seconds: Sequence[float]) -> dict | None:
    """{"p50", "p95", "p99"} in ms and "n"; None for an empty list."""
    if not len(seconds):
        return None
    p50, p95, p99 = np.percentile(seconds, (50, 95, 99))
    return {"p50": _ms(p50), "p95": _ms(p95), "p99": _ms(p99), "n": len(seconds)}


def _ms(seconds: float) -> float:
    return round(float(seconds) * 1000.0, 2)


def _row(name: str, values: dict | None, note: str = "") -> str:
    if values is None:
        return f"{name:<16}{'-':>8}{'-':>8}{'-':>8}{0:>7}{note}"
    figures = "".join(f"{values[key]:>8.1f}" for key in ("p50", "p95", "p99"))
    return f"{name:<16}{figures}{values['n']:>7}{note}"
