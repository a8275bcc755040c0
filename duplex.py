"""The real-time engine: microphone frames in, reply frames out, timed stage by stage.

One tick is one patch of the dialogue LM (`frames_per_step` codec frames, 40 ms by default):
input samples -> `codec.encode_step` -> `lm.step` (temporal, text, depth) -> `codec.decode_step`
-> output samples, for `slots` callers at once, each reset on its own.

Letters in shapes: `B` slots, `T` samples, `K` codebooks, `p` codec frames in a patch.
Times are in seconds unless a name says otherwise; audio is 24 kHz mono float32 in [-1, 1].
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from audio import SAMPLE_RATE
from codec import Codec
from command import UserError
from ledger import LEVEL_SECONDS, QUIET_DBFS, StageTimes, frame_levels
from s2s import PAD, S2S, Sampling

MAX_QUEUED_PATCHES = 3


# ----------------------------------------------------------------------------------- the models


def check_codec_matches(codec: Codec, lm: S2S) -> None:
    """Raise `UserError` unless `lm` was trained on the codes of this very `codec`."""
    sizes = tuple(lm.config.codebook_sizes)
    have_sizes = tuple(codec.config.codebook_sizes)[: len(sizes)]
    for what, wanted, have in (
        ("codec", lm.config.codec_fingerprint or "(none named)", codec.fingerprint),
        ("codebooks", sizes, have_sizes),
        ("frames a second", float(lm.config.frame_rate), float(codec.config.frame_rate)),
    ):
        if wanted != have:
            raise UserError(
                f"the dialogue model was trained on {what}: {wanted}, this codec has {have};"
                " give the matching pair with --codec and --lm"
            )


def load_models(
    codec_path: str | Path, lm_path: str | Path, device: str = "cpu"
) -> tuple[Codec, S2S]:
    """The codec and the dialogue LM of two checkpoint folders, checked to belong together."""
    codec = Codec.from_checkpoint(codec_path, device=device)
    lm = S2S.from_checkpoint(lm_path, device=device)
    check_codec_matches(codec, lm)
    return codec, lm


class ReplyText:
    """Token ids in, readable text out as soon as its bytes are complete. PAD adds nothing."""

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


# ------------------------------------------------------------------------------------ the queue


@dataclass(frozen=True)
class QueuedPatch:
    """A patch of input [T] that waits; `arrived` is when its last sample came in."""

    audio: np.ndarray
    arrived: float
    index: int
    gap: bool = False


class PatchQueue:
    """One caller's input, cut into patches; never more than `max_patches` wait.

    Beyond that the oldest are dropped and counted. One silent patch stands for all that were
    dropped in a row, so that speech from before and after the gap is not spliced into new words.
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
            if bounded and len(self._patches) > self.max_patches:
                self._drop()

    def pop(self) -> QueuedPatch:
        return self._patches.popleft()

    def _drop(self) -> None:
        """Silence in place of the two oldest."""
        oldest, last = self.pop(), self.pop()
        self.dropped += 1 if oldest.gap else 2
        silence = np.zeros(self.patch_samples, np.float32)
        self._patches.appendleft(QueuedPatch(silence, last.arrived, last.index, gap=True))


# ----------------------------------------------------------------------------------- the engine


class BargeInFlush:
    """`--vad_flush`: which slots' agents are silenced because their users talk over them.

    From `confirm` ticks of voice while the agent is audible to `release` ticks without voice.
    """

    def __init__(self, slots: int = 1, confirm: int = 2, release: int = 2):
        self.confirm, self.release = confirm, release
        self.flushing = np.zeros(slots, bool)
        self._voiced, self._unvoiced = np.zeros((2, slots), np.int64)  # ticks in a row

    def reset(self, slot: int) -> None:
        self.flushing[slot], self._voiced[slot], self._unvoiced[slot] = False, 0, 0

    def update(self, voice: np.ndarray, audible: np.ndarray, active: np.ndarray) -> np.ndarray:
        """A tick of the slots `active`: [B] bool, True = silence the agent in it."""
        self._voiced[active] = np.where(voice, self._voiced + 1, 0)[active]
        self._unvoiced[active] = np.where(voice, 0, self._unvoiced + 1)[active]
        begins = audible & (self._voiced >= self.confirm)
        goes_on = self._unvoiced < self.release
        self.flushing[active] = np.where(self.flushing, goes_on, begins)[active]
        return self.flushing & active


@dataclass
class TickResult:
    """What one tick gave, a row a slot; rows of slots that were not `active` are zero.

    audio [B, T] float32; text [B] token ids (`PAD` = none); user_speaking, turn_end [B],
    user_emotion [B, 8], language [B, 3] probabilities; user_phones [B, p] ids, of `listen_delay`
    patches ago; muted [B] output silenced by `vad_flush`; not_finite [B] samples of input or output
    that were not numbers and became silence. Of the queue: index [B] the number of the input patch
    (dropped ones count), waited [B] seconds it lay there, dropped [B] patches lost since the slot's
    last tick.
    """

    audio: np.ndarray
    text: np.ndarray
    user_speaking: np.ndarray
    turn_end: np.ndarray
    user_emotion: np.ndarray
    language: np.ndarray
    user_phones: np.ndarray
    active: np.ndarray
    muted: np.ndarray
    not_finite: np.ndarray
    times: StageTimes
    index: np.ndarray
    waited: np.ndarray
    dropped: np.ndarray


class DuplexEngine:
    """Codec and dialogue LM in lock-step, for `slots` callers on one device.

    `feed` queues a slot's input, `run_once` runs a tick over the slots that have a patch waiting
    (None when there is none), `run_ready` runs them back to back. `tick` is the step itself, for
    callers with queues of their own.

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
        self._emotion, self._language = torch.zeros(
            (2, slots), dtype=torch.int64, device=self.device
        )
        self.queues = [PatchQueue(self.patch_samples, max_queued) for _ in range(slots)]
        self._reported_drops = np.zeros(slots, np.int64)
        self._flush = BargeInFlush(slots)
        self._user_voice, self._audible, self._muted = np.zeros((3, slots), bool)
        self._silence = self._silence_codes() if vad_flush else None

    @property
    def algorithmic_seconds(self) -> float:
        """Patch + acoustic delay; the codec looks nothing ahead."""
        return self.patch_seconds + self.lm.config.acoustic_delay / self.lm.config.frame_rate

    @torch.inference_mode()
    def _silence_codes(self) -> torch.Tensor:
        """The codes [B, K, p] that the codec settles on after a second of digital silence."""
        second = torch.zeros(1, 1, self.codec.config.sample_rate, device=self.device)
        codes = self.codec.encode(second, num_codebooks=self.num_codebooks)
        return codes[..., -self.frames_per_step :].repeat(self.slots, 1, 1)

    # ---- slots

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
            self._flush.reset(one)
            self._reported_drops[one] = 0
            self._user_voice[one] = self._audible[one] = self._muted[one] = False

    def set_voice(self, slot: int, emotion: str | None = None, language: str | None = None) -> None:
        """The agent's emotion and language in one slot, None = its own choice; also mid-call.

        Raises `UserError` for one that the model does not know.
        """
        config = self.lm.config
        self._emotion[slot] = _class_id(emotion, config.emotions, "emotion")
        self._language[slot] = _class_id(language, config.languages, "language")

    def set_user_voice(self, slot: int, speaking: bool) -> None:
        """For `vad_flush`: whether a detector finds voice in the user's audio now."""
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
        """Back-to-back ticks until no slot has a patch waiting."""
        while (result := self.run_once()) is not None:
            yield result

    def run_once(self) -> TickResult | None:
        """One tick over the slots with a patch waiting; None when there is none."""
        active = np.array([len(queue) > 0 for queue in self.queues])
        if not active.any():
            return None
        started = self.clock()
        frames = np.zeros((self.slots, self.patch_samples), np.float32)
        index, waited = np.zeros(self.slots, np.int64), np.zeros(self.slots)
        for slot in np.flatnonzero(active):
            patch = self.queues[slot].pop()
            frames[slot], index[slot] = patch.audio, patch.index
            waited[slot] = max(0.0, started - patch.arrived)
        dropped = np.array([queue.dropped for queue in self.queues]) - self._reported_drops
        dropped *= active
        self._reported_drops += dropped
        result = self.tick(frames, active)
        result.index, result.waited, result.dropped = index, waited, dropped
        return result

    def warm_up(self, ticks: int = 8) -> int:
        """Run silent ticks, then forget them: lazy initialisation is not a caller's latency."""
        for _ in range(ticks):
            self.tick(np.zeros((self.slots, self.patch_samples), np.float32))
        self.reset()
        return ticks

    @torch.inference_mode()
    def tick(self, frames: np.ndarray, active: np.ndarray | None = None) -> TickResult:
        """One patch for every slot. frames [B, T]; active [B] bool, all by default."""
        active = np.ones(self.slots, bool) if active is None else np.asarray(active, bool)
        muted = np.zeros(self.slots, bool)
        if self.vad_flush:
            muted = self._flush.update(self._user_voice, self._audible, active)
        frames, lost = _finite(np.asarray(frames, np.float32))
        frames = frames.clip(-1.0, 1.0)
        marks = [self._now()]
        audio = torch.from_numpy(frames).to(self.device)[:, None]  # [B, 1, T]
        mask = None if active.all() else torch.from_numpy(active).to(self.device)
        user_codes = self.codec.encode_step(
            audio, self._encoder, num_codebooks=self.num_codebooks, active=mask
        )  # [B, K, p]
        marks.append(self._now())
        step = self.lm.step(
            user_codes,
            self._lm_state,
            active=mask,
            emotion=self._emotion,
            language=self._language,
            sampling=self.sampling,
            timer=lambda stage: marks.append(self._now()),
            forced=self._forced(muted),
        )
        marks.append(self._now())
        reply = self.codec.decode_step(step.agent_codes, self._decoder, active=mask)[:, 0]
        reply = reply.float().cpu().numpy()  # [B, T]
        marks.append(self._now())
        reply, lost_reply = _finite(reply)
        row = active[:, None].astype(np.float32)
        none = np.zeros(self.slots, np.int64)
        return TickResult(
            audio=self._mute(reply * row, muted),
            text=np.where(active, _host(step.text), PAD),
            user_speaking=_host(step.user_speaking) * active,
            turn_end=_host(step.turn_end) * active,
            user_emotion=_host(step.user_emotion) * row,
            language=_host(step.language) * row,
            user_phones=_host(step.user_phones.argmax(-1)) * active[:, None],
            active=active,
            muted=muted,
            not_finite=(lost + lost_reply) * active,
            times=StageTimes.from_marks(*marks),
            index=none,
            waited=none * 0.0,
            dropped=none,
        )

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return self.clock()

    def _forced(self, muted: np.ndarray) -> tuple[torch.Tensor, ...] | None:
        """For `S2S.step`: silence in the stream of agents that are muted, so that they know."""
        if not muted.any():
            return None
        silent = torch.full_like(self._emotion, PAD)
        return torch.from_numpy(muted).to(self.device), self._silence, silent

    def _mute(self, reply: np.ndarray, muted: np.ndarray) -> np.ndarray:
        """Silence the muted slots; the first muted patch fades out in 5 ms, without a click."""
        if not self.vad_flush:
            return reply
        fade = int(LEVEL_SECONDS * SAMPLE_RATE)
        for slot in np.flatnonzero(muted):
            reply[slot, :fade] *= 0.0 if self._muted[slot] else np.linspace(1, 0, fade)
            reply[slot, fade:] = 0.0
        self._muted = muted
        self._audible = np.array([frame_levels(row).max() > QUIET_DBFS for row in reply])
        return reply


def _class_id(name: str | None, known: Sequence[str], what: str) -> int:
    """The LM's id: 0 for its own choice, else the place in `known`, from 1."""
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
    return (tensor.float() if tensor.is_floating_point() else tensor).cpu().numpy()
