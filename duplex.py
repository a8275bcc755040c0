"""The real-time engine: microphone frames in, reply frames out, timed stage by stage.

One tick is one patch of the dialogue LM (`frames_per_step` codec frames, 40 ms by default):
samples -> `codec.encode_step` -> `lm.step` (temporal, text, depth) -> `codec.decode_step` ->
samples, for `slots` callers at once. On a GPU it is CUDA graphs, one a stage, in static buffers.

Letters in shapes: `B` slots, `T` samples, `K` codebooks, `p` codec frames in a patch.
Times are in seconds unless a name says otherwise; audio is 24 kHz mono float32 in [-1, 1].
"""

import argparse
import itertools
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from audio import SAMPLE_RATE
from codec import Codec, silence_codes
from command import UserError
from ledger import LEVEL_SECONDS, QUIET_DBFS, StageTimes, frame_levels
from s2s import PAD, S2S, Sampling, SlotSampling
from training import StepGraph, setup_distributed

MAX_QUEUED_PATCHES = 3
QUIET_TICKS = 12  # without sound of the agent: its turn is over


def check_codec_matches(codec: Codec, lm: S2S) -> None:
    """Raise `UserError` unless `lm` was trained on the codes of this very `codec`."""
    c, sizes = lm.config, codec.config.codebook_sizes[: len(lm.config.codebook_sizes)]
    wanted = (c.codec_fingerprint, float(c.frame_rate), *c.codebook_sizes)
    have = (codec.fingerprint, float(codec.config.frame_rate), *sizes)
    if wanted != have:
        raise UserError("the dialogue model was trained on another codec (fingerprint, frames a "
                        f"second, codebooks): {wanted}, not {have}; give the matching pair with "
                        "--codec and --lm")  # fmt: skip


def load_models(codec_path: Path, lm_path: Path, device="cpu", decoder=None) -> tuple[Codec, S2S]:
    """The codec and the dialogue LM of two checkpoint folders, checked to belong together. Replies
    are decoded by the agent's own decoder where the codec has one, or by the one that is named."""
    codec = Codec.from_checkpoint(codec_path, device, decoder)
    lm = S2S.from_checkpoint(lm_path, device=device)
    check_codec_matches(codec, lm)
    if torch.device(device).type == "cuda":
        halve(lm)
    return codec, lm


def halve(lm: S2S) -> None:
    """The LM's weights, and so its caches, in bf16, but for the emotion branch, which sums up a
    whole call. The codec, a tenth of the work, stays in fp32: its codes are what the LM learnt."""
    for child in lm.children():
        if child is not lm.emotion:
            child.bfloat16()


class ReplyText:
    """Token ids in, readable text out as soon as its bytes are complete. PAD adds nothing. A token
    is decoded behind what came out last, on which its leading space may hang."""

    def __init__(self, tokenizer: Any):
        self._decode, self._before, self._ids = tokenizer.decode, [], []

    def push(self, token: int) -> str:
        """The text this token adds, "" while a character's bytes are incomplete."""
        if token == PAD:
            return ""
        self._ids.append(int(token))
        new = self._decode(self._before + self._ids)[len(self._decode(self._before)) :]
        if not new or new.endswith("\ufffd"):
            return ""
        self._before, self._ids = self._ids, []
        return new


class QueuedPatch(NamedTuple):
    audio: np.ndarray  # [T]
    arrived: float  # when its last sample came in
    index: int
    lost: int = 0  # how many dropped patches this silence stands for


class PatchQueue(deque[QueuedPatch]):
    """One caller's input, cut into patches. Beyond `most` the oldest are dropped; a silent patch
    stands for all dropped in a row, lest speech around the gap be spliced into new words."""

    def __init__(self, patch_samples: int, most: int = MAX_QUEUED_PATCHES):
        super().__init__()
        self.patch_samples, self.most = patch_samples, most
        self._rest = np.zeros(0, np.float32)
        self._next_index = 0

    def push(self, audio: np.ndarray, arrived: float, bounded: bool = True) -> None:
        """Take samples [T] of any length; `bounded=False` never drops."""
        audio = np.concatenate([self._rest, np.asarray(audio, np.float32)])
        patches, self._rest = np.split(audio, [len(audio) - len(audio) % self.patch_samples])
        for patch in patches.reshape(-1, self.patch_samples):
            self.append(QueuedPatch(patch, arrived, self._next_index))
            self._next_index += 1
            if bounded and len(self) > self.most:
                oldest, last = self.popleft(), self.popleft()
                lost = max(oldest.lost, 1) + 1
                self.appendleft(last._replace(audio=np.zeros_like(patch), lost=lost))


class BargeInFlush:
    """`--vad_flush`: silences an audible agent from two ticks of voice on, to two ticks without."""

    def __init__(self, slots: int = 1):
        self.voice, self.audible, self.muted = np.zeros((3, slots), bool)
        self._ticks = np.zeros(slots, np.int64)  # with voice in a row, or below 0 without

    def reset(self, slots: np.ndarray) -> None:
        for state in (self.voice, self.audible, self.muted, self._ticks):
            state[slots] = 0

    def update(self, active: np.ndarray) -> np.ndarray:
        """A tick of the slots `active`: [B] bool, True = silence the agent in it."""
        ticks = np.where(self.voice, self._ticks.clip(0) + 1, self._ticks.clip(None, 0) - 1)
        self._ticks[active] = ticks[active]
        muted = np.where(self.muted, ticks > -2, self.audible & (ticks >= 2))
        self.muted[active] = muted[active]
        return muted & active

    def mute(self, reply: np.ndarray, muted: np.ndarray, active: np.ndarray) -> None:
        """Silence the reply [B, T] where `muted`; what was audible fades out in 5 ms."""
        fade = int(LEVEL_SECONDS * SAMPLE_RATE)
        for slot in np.flatnonzero(muted):
            reply[slot, :fade] *= np.linspace(1, 0, fade) if self.audible[slot] else 0.0
            reply[slot, fade:] = 0.0
        loud = np.array([frame_levels(row).max() > QUIET_DBFS for row in reply])
        self.audible[active] = (loud & ~muted)[active]


class EmotionEstimate:
    """The users' emotions in `posterior` [B, 8]: a turn's log-probabilities in ticks with speech
    averaged, those of `MEMORY_SECONDS` ago at 1/e. A pause of `PAUSE_SECONDS` ends a turn."""

    MEMORY_SECONDS, PAUSE_SECONDS = 2.0, 0.6
    SURE_SECONDS, SURE = 0.4, 0.5  # of speech and of posterior, before a name is said

    def __init__(self, slots: int, names: Sequence[str], tick_seconds: float):
        self.names, self._tick = names, tick_seconds
        self._scores = np.zeros((slots, len(names)))
        self._speech, self._pause = np.zeros((2, slots))
        self.posterior = np.full((slots, len(names)), 1 / len(names))

    def reset(self, slots: np.ndarray) -> None:
        self._scores[slots], self._speech[slots], self._pause[slots] = 0, 0, 0
        self.posterior[slots] = 1 / len(self.names)

    def update(self, probabilities: np.ndarray, speaking: np.ndarray, active: np.ndarray) -> None:
        """A tick of the slots `active` [B]: probabilities [B, 8], of the user speaking [B]."""
        speaks = speaking > 0.5
        self.reset(active & speaks & (self._pause >= self.PAUSE_SECONDS))
        self._pause[active] = np.where(speaks, 0, self._pause + self._tick)[active]
        voiced = np.flatnonzero(active & speaks)
        keep = np.exp(-self._tick / self.MEMORY_SECONDS)
        logs = np.log(probabilities[voiced] + 1e-6)
        self._scores[voiced] = keep * self._scores[voiced] + self._tick * logs
        self._speech[voiced] = keep * self._speech[voiced] + self._tick
        mean = np.exp(self._scores[voiced] / self._speech[voiced, None])
        self.posterior[voiced] = mean / mean.sum(1, keepdims=True)

    def name(self, slot: int) -> str | None:
        """The user's emotion in this turn, None while not sure yet."""
        sure = self._speech[slot] >= self.SURE_SECONDS and self.posterior[slot].max() >= self.SURE
        return self.names[int(self.posterior[slot].argmax())] if sure else None


class TickResult(NamedTuple):
    """What one tick gave, a row a slot; rows of slots that were not `active` are zero."""

    audio: np.ndarray  # [B, T] float32
    text: np.ndarray  # [B] token ids, `PAD` = none
    user_speaking: np.ndarray  # [B] probabilities, as the next two
    user_emotion: np.ndarray  # [B, 8]
    language: np.ndarray  # [B, 3]
    user_words: np.ndarray  # [B] token ids or `PAD`, of `listen_delay` patches ago, as the next
    user_phones: np.ndarray  # [B, p] ids
    codes: np.ndarray  # [B, K, p], the agent's
    active: np.ndarray  # [B]
    not_finite: np.ndarray  # [B] samples in or out that were not numbers and became silence
    times: StageTimes
    # By `run_once`: number of the input patch, its seconds in the queue, patches lost before it.
    index: np.ndarray | float = 0.0  # [B], dropped patches count
    waited: np.ndarray | float = 0.0  # [B]
    dropped: np.ndarray | float = 0.0  # [B]


class DuplexEngine:
    """Codec and dialogue LM in lock-step, for `slots` callers on one device.

    `feed` queues a slot's input, `run_once` runs a tick over the slots that have a patch waiting:
    a caller whose patch is late misses that tick. `tick` is the step itself, for callers with
    queues of their own. What a slot says depends on its input, settings and seed alone.

    sampling: what slots begin with (None: the LM's default) and their widest `top_k`. clock:
    seconds, monotonic. emotion_strength: of what `set_voice` sets; all but 1 cost a second row of
    the LM a slot. graphs: on a GPU, whether to capture. UserError where LM and codec are no pair.
    """

    def __init__(self, codec: Codec, lm: S2S, slots: int = 1, sampling: Sampling | None = None,
                 seed: int = 0, vad_flush: bool = False, clock: Callable = time.perf_counter,
                 emotion_strength: float = 1.0, graphs: bool = True):  # fmt: skip
        check_codec_matches(codec, lm)
        self.codec, self.lm = codec, lm
        self.slots, self.sampling, self.seed = slots, sampling or Sampling(), seed
        self.vad_flush, self.clock, self.emotion_strength = vad_flush, clock, emotion_strength
        self.frames_per_step = lm.config.frames_per_step
        self.num_codebooks = len(lm.config.codebook_sizes)
        self.patch_samples = self.frames_per_step * codec.config.hop
        self.patch_seconds = self.patch_samples / codec.config.sample_rate
        self.device = next(lm.parameters()).device
        self._encoder = codec.init_encoder_state(slots)
        self._decoder = codec.init_decoder_state(slots)
        self._lm_rows = slots if emotion_strength == 1.0 else 2 * slots
        self._lm_state = lm.init_state(self._lm_rows, seed=seed)
        self._make_buffers()
        self._asked_emotion = np.zeros(slots)
        self._quiet_ticks = np.full(slots, QUIET_TICKS)
        self._suspended = np.zeros(slots, bool)
        self.user_emotion = EmotionEstimate(slots, lm.config.emotions, self.patch_seconds)
        self.queues = [PatchQueue(self.patch_samples) for _ in range(slots)]
        self._flush = BargeInFlush(slots)
        self._silence = None  # codes [B, K, p]
        if vad_flush:
            silent = silence_codes(codec, self.device, self.num_codebooks)
            self._silence = silent[..., -self.frames_per_step :].repeat(slots, 1, 1)
        self._stream, self._got = None, None
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)  # all that is made here is there
            self._stream = torch.cuda.Stream(self.device)
        self._step = StepGraph(self._stages, 3 if self._stream and graphs else np.inf, self._mark)

    def _make_buffers(self) -> None:
        """What comes in, a row a slot, filled on the host: samples, whether active, whether muted,
        the agent's emotion and language, the emotion's strength, sampling (7 numbers)."""
        shape, pinned = (self.slots, self.patch_samples + 12), self.device.type == "cuda"
        self._given = torch.zeros(shape, pin_memory=pinned)
        self._inputs = self._given.to(self.device)  # on a CPU the same
        self._frames, rest = np.split(self._given.numpy(), [self.patch_samples], axis=1)
        self._active, self._muted, self._emotion, self._language, self._strength = rest.T[:5]
        self._sampling_rows, self._strength[:] = rest[:, 5:], self.emotion_strength
        places = self.frames_per_step * self.num_codebooks
        self._drawn = SlotSampling(self._inputs[:, -7:], self.sampling, places)
        for slot in range(self.slots):
            self.set_sampling(slot)

    def reset(self, slot: int | None = None, seed: int | None = None) -> None:
        """Forget a slot's call, or all; draw from `seed` (None: engine's). Voice, sampling stay."""
        chosen = np.arange(self.slots) == slot if slot is not None else np.ones(self.slots, bool)
        with torch.inference_mode(), torch.cuda.stream(self._stream):
            mask = torch.from_numpy(chosen).to(self.device)
            for state in (self._encoder, self._decoder):
                state.reset(mask)
            mask = mask.repeat(self._lm_rows // self.slots)
            self._lm_state.reset(mask, self.seed if seed is None else seed)
        self._quiet_ticks[chosen] = QUIET_TICKS
        self._suspended[chosen] = False
        self.user_emotion.reset(chosen)
        self._flush.reset(chosen)
        for one in np.flatnonzero(chosen):
            self.queues[one] = PatchQueue(self.patch_samples)

    def suspend(self, slot: int) -> None:
        """Stop a slot's clock: no ticks, what it is fed is dropped, the rest waits for `resume`."""
        self._suspended[slot] = True

    def resume(self, slot: int) -> None:
        """Go on where `suspend` stopped, as if no time had passed."""
        queue, now = self.queues[slot], self.clock()
        for i, patch in enumerate(queue if self._suspended[slot] else ()):
            queue[i] = patch._replace(arrived=now)
        self._suspended[slot] = False

    def set_sampling(self, slot: int, sampling: Sampling | None = None) -> None:
        """How a slot draws from its next tick on, None: as the engine. UserError: wider `top_k`."""
        sampling = sampling or self.sampling
        for name in ("top_k", "text_top_k"):
            asked, most = getattr(sampling, name), getattr(self.sampling, name)
            if asked > most:
                raise UserError(f"{name} {asked}: this engine draws from at most {most}")
        self._sampling_rows[slot] = sampling.row(self.lm.config.eagerness)

    def set_voice(self, slot: int, emotion: str | None = None, language: str | None = None,
                  strength: float | None = None) -> None:  # fmt: skip
        """The agent's emotion and language in one slot, None = its own choice; also mid-call, when
        the emotion waits for the agent's next turn. strength: of the emotion, None = the engine's.
        `UserError` for a name that the model does not know, a strength in an engine without."""
        c, emotions = self.lm.config, self._asked_emotion
        for what, name, known, ids in (("emotion", emotion, c.emotions, emotions),
                                       ("language", language, c.languages, self._language)):
            if name is not None and name not in known:
                raise UserError(f"{what} {name}: the dialogue model knows {', '.join(known)}")
            ids[slot] = 0 if name is None else known.index(name) + 1
        strength = self.emotion_strength if strength is None else strength
        if strength != self.emotion_strength and self._lm_rows == self.slots:
            raise UserError("the strength of emotions is fixed at 1 in this engine")
        self._strength[slot] = strength

    def set_user_voice(self, slot: int, speaking: bool) -> None:
        """For `vad_flush`: whether a detector finds voice in the user's audio now."""
        self._flush.voice[slot] = speaking

    def feed(self, slot: int, audio: np.ndarray, arrived=None, bounded: bool = True) -> None:
        """Queue a slot's input samples [T]; `arrived` (the clock's now by default) is when the
        last of them came in, and the start of what `waited` measures."""
        if not self._suspended[slot]:
            self.queues[slot].push(audio, self.clock() if arrived is None else arrived, bounded)

    def run_once(self) -> TickResult | None:
        """One tick over the slots with a patch waiting; None when there is none."""
        active = np.array([len(queue) > 0 for queue in self.queues]) & ~self._suspended
        if not active.any():
            return None
        started = self.clock()
        frames = np.zeros((self.slots, self.patch_samples), np.float32)
        index, waited, dropped = np.zeros((3, self.slots))
        for slot in np.flatnonzero(active):
            frames[slot], arrived, index[slot], dropped[slot] = self.queues[slot].popleft()
            waited[slot] = max(0.0, started - arrived)
        return self.tick(frames, active)._replace(index=index, waited=waited, dropped=dropped)

    def warm_up(self, ticks: int = 8) -> int:
        """Silent ticks, forgotten: initialisation and, in the fourth, capture delay no caller."""
        for _ in range(ticks):
            self.tick(np.zeros((self.slots, self.patch_samples), np.float32))
        self.reset()
        return ticks

    @torch.inference_mode()
    def tick(self, frames: np.ndarray, active: np.ndarray | bool = True) -> TickResult:
        """One patch for every slot. frames [B, T]; active [B], all by default; none suspended."""
        active = np.asarray(active, bool) & ~self._suspended
        muted = self._flush.update(active) if self.vad_flush else np.zeros(self.slots, bool)
        frames, lost = _finite(np.asarray(frames, np.float32))
        start = self.clock()
        self._frames[:], self._active[:], self._muted[:] = frames.clip(-1.0, 1.0), active, muted
        quiet = self._quiet_ticks >= QUIET_TICKS
        self._emotion[quiet] = self._asked_emotion[quiet]
        reply, *parts = np.split(self._run_stages(), self._ends[:-1], axis=1)
        spans = [two - one if self._stream is None else one.elapsed_time(two) / 1000
                 for one, two in itertools.pairwise(self._marks)]  # fmt: skip
        times = StageTimes(*spans, total=self.clock() - start)
        reply, lost_reply = _finite(reply)
        row = active[:, None].astype(np.float32)
        reply = reply * row
        if self.vad_flush:
            self._flush.mute(reply, muted, active)
        loud = np.abs(reply).max(1) > 10 ** (QUIET_DBFS / 20)
        self._quiet_ticks[active] = np.where(loud, 0, self._quiet_ticks + 1)[active]
        codes, phones, text, words, speaking, emotion, language = (part * row for part in parts)
        self.user_emotion.update(emotion, speaking[:, 0], active)
        codes = codes.astype(int).reshape(self.slots, -1, self.frames_per_step)
        return TickResult(reply, text[:, 0].astype(int), speaking[:, 0], emotion, language,
                          words[:, 0].astype(int), phones.astype(int), codes, active,
                          (lost + lost_reply) * active, times)  # fmt: skip

    def _stages(self, mode: None) -> dict[str, torch.Tensor]:
        """All that the device does in a tick, from `_inputs` alone; in `result` a row a slot."""
        audio, controls = self._inputs.split((self.patch_samples, 12), dim=1)
        active, muted = (controls[:, :2] > 0).unbind(1)
        emotion, language = controls[:, 2:4].long().unbind(1)
        audio, how = audio[:, None], {"num_codebooks": self.num_codebooks, "active": active}
        user_codes = self.codec.encode_step(audio, self._encoder, **how)  # [B, K, p]
        self._step.split()
        forced = None
        if self._silence is not None:  # in the streams of muted agents, so that they know
            forced = muted, self._silence, torch.full_like(emotion, PAD)
        step = self.lm.step(
            user_codes, self._lm_state, active=active, emotion=emotion, language=language,
            sampling=self._drawn, forced=forced, timer=self._step.split,
            strength=controls[:, 4] if self._lm_rows > self.slots else None)  # fmt: skip
        self._step.split()
        reply = self.codec.decode_step(step.agent_codes, self._decoder, active=active)[:, 0]
        parts = [
            reply, step.agent_codes.flatten(1), step.user_phones.argmax(-1), step.text[:, None],
            step.user_words[:, None], step.user_speaking[:, None], step.user_emotion,
            step.language]  # fmt: skip
        self._ends = np.cumsum([part.shape[1] for part in parts])
        return {"result": torch.cat([part.float() for part in parts], dim=1)}

    def _run_stages(self) -> np.ndarray:
        """What `_stages` gives, on the host; a mark in `_marks` at the ends of its stages."""
        self._marks = []
        with torch.cuda.stream(self._stream):
            self._inputs.copy_(self._given, non_blocking=True)
            self._mark()
            result = self._step()["result"]
            self._mark()
            if self._stream is None:
                return result.numpy()
            if self._got is None:
                self._got = torch.empty(result.shape, pin_memory=True)
            self._got.copy_(result, non_blocking=True)
            self._stream.synchronize()
        return self._got.numpy()

    def _mark(self) -> None:
        stream = self._stream
        self._marks.append(self.clock() if stream is None else
                           stream.record_event(torch.cuda.Event(enable_timing=True)))  # fmt: skip


def engine_of(args: argparse.Namespace, slots: int = 1,
              vad_flush: bool = False) -> tuple[DuplexEngine, str]:  # fmt: skip
    """The engine that the flags of demo and server ask for, and its models in words; a sampling
    flag that is None, or that a script does not have, stands for the model's own."""
    device = setup_distributed(args.device).device
    torch.set_num_threads(args.threads)
    codec, lm = load_models(args.codec, args.lm, str(device), args.decoder)
    drawn = {name: getattr(args, name, None) for name in ("temperature", "top_k", "eagerness")}
    sampling = Sampling(**{name: value for name, value in drawn.items() if value is not None})
    engine = DuplexEngine(codec, lm, slots, sampling, args.seed, vad_flush,
                          emotion_strength=args.emotion_strength)  # fmt: skip
    models = f"codec {args.codec}, {codec.decoder_kind} decoder, dialogue model {args.lm}"
    return engine, f"{models}, on {device}"


def _finite(audio: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Audio [B, T] with silence for what is not a number, as one NaN would stay in the caches for
    as long as the attention looks back; and how many samples that were, [B]."""
    numbers = np.isfinite(audio)
    return np.where(numbers, audio, np.float32(0)), (~numbers).sum(1)


class Story:
    """Ticks of one call → the events of protocols.py: speech, words, user's emotion, latency."""

    EMOTION_SECONDS, LATENCY_SECONDS = 0.2, 1.0

    def __init__(self, engine: DuplexEngine):
        self._lm, self._seconds = engine.lm, engine.patch_seconds
        self._feelings = engine.user_emotion
        self._words = {who: ReplyText(engine.lm.tokenizer) for who in ("agent", "user")}
        self._turn, self._quiet = Counter(agent=1, user=1), Counter()
        self.speaking, self._heard = {"agent": False, "user": False}, PAD
        self.counts = Counter(received=0, answered=0, dropped=0, late=0)
        self._ticks: list[tuple] = []  # (waited, *times) since the last latency event

    def tell(self, slot: int, result: TickResult, lost: int) -> list[dict]:
        """The events of a tick just run, in a client's order; it stands for `lost` patches."""
        self.counts.update(received=max(lost, 1), answered=1, dropped=lost)
        self.counts["late"] += result.times.total > self._seconds
        events = [{"type": "dropped", "patches": lost - 1}] if lost else []
        loud = float(np.abs(result.audio[slot]).max()) > 10 ** (QUIET_DBFS / 20)
        events += self._speech("agent", loud, int(result.text[slot]))
        heard, self._heard = self._heard, int(result.user_words[slot])
        new = PAD if heard == self._heard else self._heard  # the head repeats tokens, as with CTC
        events += self._speech("user", float(result.user_speaking[slot]) > 0.5, new)
        events += self._feeling(slot, result)
        self._ticks.append((result.waited[slot], *result.times))
        if len(self._ticks) * self._seconds >= self.LATENCY_SECONDS:
            events.append(self._latency())
        return events

    def _speech(self, who: str, sounds: bool, token: int) -> list[dict]:
        self._quiet[who] = 0 if sounds else self._quiet[who] + 1
        before, events = self.speaking[who], []
        now = self.speaking[who] = sounds or (before and self._quiet[who] < QUIET_TICKS)
        if now and not before:
            events.append({"type": "speech", "who": who, "speaking": True})
        if text := self._words[who].push(token):
            events.append({"type": "text", "who": who, "text": text, "turn": self._turn[who]})
        if before and not now:
            events.append({"type": "speech", "who": who, "speaking": False})
            self._words[who] = ReplyText(self._lm.tokenizer)
            self._turn[who] += 1
        return events

    def _feeling(self, slot: int, result: TickResult) -> list[dict]:
        due = self.counts["answered"] % max(1, round(self.EMOTION_SECONDS / self._seconds)) == 0
        if not (due and self.speaking["user"]):
            return []
        config, shares = self._lm.config, self._feelings.posterior[slot].round(3).tolist()
        name = self._feelings.name(slot) if config.emotion_dim else None
        language = config.languages[int(result.language[slot].argmax())]
        posterior = dict(zip(config.emotions, shares, strict=True))
        return [{"type": "emotion", "name": name, "posterior": posterior, "language": language}]

    def _latency(self) -> dict:
        ticks = 1000 * np.array(self._ticks)
        self._ticks = []
        most, (waited, *stages, total) = ticks.max(0).round(2), ticks.mean(0).round(2)
        named = dict(zip(StageTimes._fields, stages, strict=False))
        return {"type": "latency", "tick_ms": total, "tick_max_ms": most[-1], "waited_ms": waited,
                "waited_max_ms": most[0], **self.counts, "stages": named}  # fmt: skip
