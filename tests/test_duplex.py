"""The engine, its queue, its latency definitions and its ledger, against fakes whose timing and
content are known exactly."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models

from checkpoints import save_checkpoint, save_export, stored_config
from codec import Codec, CodecConfig
from command import UserError
from data import EMOTIONS, LANGUAGES
from duplex import (
    BargeInFlush,
    DuplexEngine,
    PatchQueue,
    ReplyText,
    Story,
    check_codec_matches,
    load_models,
)
from ledger import LatencyLedger
from s2s import S2S, S2SConfig, Sampling

RATE = 24000
PATCH = 0.04


class FakeClock:
    def __init__(self):
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class FakeState:
    """Counts frames a slot, so that a test sees which slots advanced."""

    def __init__(self, slots: int):
        self.frames = torch.zeros(slots, dtype=torch.int64)

    def advance(self, frames: int, active: torch.Tensor | None) -> None:
        moved = torch.ones_like(self.frames, dtype=torch.bool) if active is None else active
        self.frames += frames * moved

    def reset(self, mask: torch.Tensor | None = None, seed: int | None = None) -> None:
        if mask is None:
            mask = torch.ones_like(self.frames, dtype=torch.bool)
        self.frames[mask] = 0


class FakeCodec:
    """A frame's code is its mean amplitude in hundredths (+ 512); decodes to that constant."""

    fingerprint, decoder_kind = "codec-a", "general"

    def __init__(self, clock: FakeClock, encode_seconds=0.002, decode_seconds=0.001):
        self.config = SimpleNamespace(
            sample_rate=RATE, hop=480, frame_rate=50.0, codebook_sizes=(1024,) * 8
        )
        self.clock, self.costs, self.encoded = clock, (encode_seconds, decode_seconds), []

    def init_encoder_state(self, slots):
        return FakeState(slots)

    init_decoder_state = init_encoder_state

    def encode(self, audio, num_codebooks=8):
        codes = (audio[:, 0].unflatten(-1, (-1, 480)).mean(-1) * 100).round().long() + 512
        return codes[:, None].repeat(1, num_codebooks, 1)

    def encode_step(self, audio, state, num_codebooks=8, active=None):
        self.clock.now += self.costs[0]
        self.encoded.append(audio.clone())
        state.advance(audio.shape[-1] // 480, active)
        return self.encode(audio, num_codebooks)

    def decode_step(self, codes, state, active=None):
        self.clock.now += self.costs[1]
        state.advance(codes.shape[-1], active)
        return ((codes[:, :1].float() - 512) / 100).repeat_interleave(480, dim=-1)


class FakeLM(torch.nn.Module):
    """Echoes the user's codes and counts its own steps in the text stream."""

    def __init__(self, clock: FakeClock, temporal=0.003, depth=0.004):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.config = SimpleNamespace(
            codec_fingerprint="codec-a",
            codebook_sizes=(1024,) * 8,
            frame_rate=50.0,
            frames_per_step=2,
            acoustic_delay=0,
            eagerness=0.0,
            emotions=EMOTIONS, emotion_dim=0,
            languages=LANGUAGES[:3],
        )
        self.tokenizer = SimpleNamespace(decode=lambda ids: " ".join(f"w{i}" for i in ids))
        self.clock, self.costs, self.calls = clock, (temporal, depth), []

    def init_state(self, slots, seed=0):
        return FakeState(slots)

    def step(self, codes, state, active=None, timer=None, sampling=None, **options):
        self.calls.append(options)
        self.clock.now += self.costs[0]
        timer()
        self.clock.now += self.costs[1]
        state.advance(1, active)
        slots = codes.shape[0]
        if options["forced"] is not None:
            mask, forced_codes, _ = options["forced"]
            codes = torch.where(mask[:, None, None], forced_codes, codes)
        return SimpleNamespace(
            agent_codes=codes,
            text=state.frames.clone(),
            user_speaking=torch.full((slots,), 0.9),
            user_emotion=torch.eye(8)[torch.ones(slots, dtype=torch.long)],
            language=torch.eye(3)[torch.zeros(slots, dtype=torch.long)],
            user_words=state.frames + 100,
            user_phones=torch.zeros(slots, 2, 1),
        )


def fake_engine(slots=1, **options) -> DuplexEngine:
    clock = FakeClock()
    return DuplexEngine(FakeCodec(clock), FakeLM(clock), slots=slots, clock=clock, **options)


def run_all(engine: DuplexEngine) -> list:
    """Back-to-back ticks until no slot has a patch waiting."""
    return list(iter(engine.run_once, None))


def patch(value: float) -> np.ndarray:
    return np.full(960, value, np.float32)


def tone(seconds: float, level: float = 0.5) -> np.ndarray:
    return (level * np.sin(2 * np.pi * 220 * np.arange(round(seconds * RATE)) / RATE)).astype("f")


def silence(seconds: float) -> np.ndarray:
    return np.zeros(round(seconds * RATE), np.float32)


# ---------------------------------------------------------------------------------- the pair


def test_codec_of_another_training_is_refused_with_both_fingerprints():
    engine = fake_engine()
    engine.codec.fingerprint = "codec-b"
    with pytest.raises(UserError, match=r"codec-a.*codec-b"):
        check_codec_matches(engine.codec, engine.lm)
    with pytest.raises(UserError, match="matching pair"):
        DuplexEngine(engine.codec, engine.lm)


@pytest.mark.parametrize(
    ("field", "value"), [("codebook_sizes", (512,) * 8), ("frame_rate", 12.5)]
)
def test_other_frame_rate_or_codebooks_are_refused(field, value):
    engine = fake_engine()
    setattr(engine.lm.config, field, value)
    with pytest.raises(UserError, match="matching pair"):
        check_codec_matches(engine.codec, engine.lm)


# ------------------------------------------------------------------------------------- queue


def test_queue_cuts_any_chunks_into_patches():
    queue = PatchQueue(4)
    for chunk in np.split(np.arange(12), [1, 2, 7]):
        queue.push(chunk, arrived=len(chunk), bounded=True)
    assert [p.audio.tolist() for p in queue] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]
    assert not any(p.lost for p in queue)


def test_queue_never_holds_more_than_three_and_one_silence_stands_for_the_gap():
    queue = PatchQueue(2)
    for number in range(1, 8):
        queue.push(np.full(2, number), arrived=float(number))
        assert len(queue) <= 3
    assert [p.audio[0] for p in queue] == [0, 6, 7]
    assert [p.lost for p in queue] == [5, 0, 0]
    assert [p.index for p in queue] == [4, 5, 6]  # the silence takes the last lost patch's place


def test_unbounded_queue_never_drops():
    queue = PatchQueue(2, most=7)
    queue.push(np.arange(20), arrived=0.0)
    assert len(queue) == 7 and queue[0].lost == 4
    queue = PatchQueue(2)
    queue.push(np.arange(20), arrived=0.0, bounded=False)
    assert len(queue) == 10 and not any(p.lost for p in queue)


# ------------------------------------------------------------------------------------ engine


def test_tick_passes_audio_through_the_chain_and_times_each_stage():
    engine = fake_engine()
    engine.feed(0, np.concatenate([patch(0.25)[:480], patch(-0.5)[:480]]))
    result = engine.run_once()
    np.testing.assert_allclose(result.audio[0, :480], 0.25, atol=1e-6)
    np.testing.assert_allclose(result.audio[0, 480:], -0.5, atol=1e-6)
    assert result.text.tolist() == [1] and result.user_words.tolist() == [101]
    times = result.times
    got = (times.encode, times.temporal, times.depth, times.decode, times.total)
    np.testing.assert_allclose(got, (0.002, 0.003, 0.004, 0.001, 0.010), atol=1e-9)
    assert engine.run_once() is None


def test_ready_patches_are_drained_back_to_back_and_their_wait_is_measured():
    engine = fake_engine()
    for value in (0.1, 0.2, 0.3):
        engine.feed(0, patch(value))
    results = run_all(engine)
    np.testing.assert_allclose([r.audio[0, 0] for r in results], (0.1, 0.2, 0.3), atol=1e-6)
    np.testing.assert_allclose([r.waited[0] for r in results], (0, 0.01, 0.02), atol=1e-9)
    assert [r.index[0] for r in results] == [0, 1, 2]


def test_drops_are_reported_once_and_silence_is_encoded_in_the_gap():
    engine = fake_engine()
    for value in (0.1, 0.2, 0.3, 0.4):
        engine.feed(0, patch(value))
    results = run_all(engine)
    assert [r.dropped[0] for r in results] == [2, 0, 0]
    first = [float(audio[0, 0, 0]) for audio in engine.codec.encoded]
    np.testing.assert_allclose(first, (0.0, 0.3, 0.4), atol=1e-6)


def test_slots_are_apart_and_reset_on_their_own():
    engine = fake_engine(slots=3)
    engine.feed(0, patch(0.1))
    engine.feed(2, np.concatenate([patch(0.2), patch(0.3)]))
    first, second = run_all(engine)
    assert first.active.tolist() == [True, False, True]
    assert second.active.tolist() == [False, False, True]
    assert not second.audio[:2].any() and second.audio[2].any()
    assert second.text.tolist() == [0, 0, 2] and not second.user_speaking[:2].any()
    assert engine._encoder.frames.tolist() == [2, 0, 4]
    engine.feed(2, patch(0.4)[:100])
    engine.reset(2)
    assert engine._encoder.frames.tolist() == [2, 0, 0]
    assert engine._lm_state.frames.tolist() == [1, 0, 0]
    engine.feed(2, patch(0.5))
    np.testing.assert_allclose(engine.run_once().audio[2], 0.5, atol=1e-6)


def test_what_is_no_number_becomes_silence_and_is_counted():
    engine, ledger = fake_engine(slots=2), LatencyLedger(PATCH)
    frames = np.stack([patch(0.5), patch(0.5)])
    frames[1, :480] = [np.nan, np.inf, -np.inf] * 160
    result = engine.tick(frames)
    ledger.tick(result)
    assert result.not_finite.tolist() == [0, 480]
    np.testing.assert_allclose(result.audio[0], 0.5, atol=1e-6)
    np.testing.assert_allclose(result.audio[1], np.repeat([0, 0.5], 480), atol=1e-6)
    assert engine.tick(1e30 * frames).audio.max() < 1.01
    engine.codec.decode_step = lambda codes, *_, **__: torch.full((2, 1, 960), torch.nan)
    ledger.tick(engine.tick(frames[:1].repeat(2, 0), active=np.array([True, False])))
    assert ledger.summary()["not_finite_samples"] == 480 + 960
    assert "1440 samples were not numbers" in ledger.table()


def test_a_nan_leaves_no_trace_in_the_real_models():
    codec, lm = small_pair()
    engine, clean = (DuplexEngine(codec, lm, seed=3) for _ in range(2))
    spoken = noise_patches(6).reshape(6, 960)
    broken, mended = spoken.copy(), spoken.copy()
    broken[2, 100:200], mended[2, 100:200] = np.nan, 0
    for one, two in zip(broken, mended, strict=True):
        np.testing.assert_array_equal(engine.tick(one[None]).audio, clean.tick(two[None]).audio)


def float_tensors(state) -> list[torch.Tensor]:
    """All that a state holds in numbers with a point, through its layers and caches."""
    if isinstance(state, torch.Tensor):
        return [state] if state.dtype == torch.float32 and state.dim() else []  # not constants
    parts = state if isinstance(state, list) else vars(state).values()
    parts = [part for part in parts if isinstance(part, (torch.Tensor, list))
             or type(part).__name__.endswith("State")]  # fmt: skip
    return [tensor for part in parts for tensor in float_tensors(part)]


def test_a_reset_forgets_what_is_not_a_number():
    """A caller whose every cache holds NaN, in all models; the next one hears nothing of it."""
    codec, lm = small_pair()
    engine, fresh = (DuplexEngine(codec, lm, 2, Sampling(0.0, 25, 0.0)) for _ in range(2))
    spoken = np.stack([noise_patches(6, seed).reshape(6, 960) for seed in (0, 1)], axis=1)
    for state in (engine._encoder, engine._decoder, engine._lm_state):
        tensors = float_tensors(state)
        assert tensors
        for tensor in tensors:
            row = tensor[:, 0] if tensor.dim() == 5 else tensor[0]  # caches: layers come first
            row.fill_(torch.nan)
    engine.reset(0)
    for frames in spoken:
        np.testing.assert_array_equal(engine.tick(frames).audio, fresh.tick(frames).audio)


def test_a_voice_that_the_model_does_not_know_is_named():
    with pytest.raises(UserError, match="language french: the dialogue model knows english"):
        fake_engine().set_voice(0, language="french")


def test_voice_settings_reach_the_lm_and_survive_reset():
    engine = fake_engine(slots=2)
    engine.set_voice(1, "happy", "telugu")
    engine.reset(1)
    engine.tick(np.zeros((2, 960)))
    assert engine.lm.calls[-1]["emotion"].tolist() == [0, 2]
    assert engine.lm.calls[-1]["language"].tolist() == [0, 3]


def test_warm_up_leaves_no_trace():
    engine = fake_engine()
    assert engine.warm_up(5) == 5
    assert engine._lm_state.frames.tolist() == [0]


# --------------------------------------------------------------------------------- vad flush


def test_flush_waits_for_confirmation_and_for_the_end_of_voice():
    flush = BargeInFlush(2)
    inputs = [(1, 0), (1, 0), (0, 1), (1, 1), (1, 1), (1, 0), (0, 0), (1, 0), (0, 0), (0, 0)]
    decided = []
    for voice, audible in inputs:
        flush.voice[0], flush.audible[0] = voice, audible
        decided.append(flush.update(np.ones(2, bool)))
    assert [both[0] for both in decided] == [False] * 4 + [True] * 5 + [False]
    assert not any(both[1] for both in decided)


def test_what_was_audible_fades_out_in_5_ms():
    flush, one = BargeInFlush(1), np.ones(1, bool)
    flush.audible[0] = True
    first, second = np.ones((2, 1, 960))
    flush.mute(first, one, one)
    flush.mute(second, one, one)
    np.testing.assert_array_equal(first[0], np.r_[np.linspace(1, 0, 120), np.zeros(840)])
    assert not second.any()


def test_vad_flush_mutes_then_forces_silence_codes_and_pad():
    engine = fake_engine(vad_flush=True)
    for _ in range(2):
        engine.tick(patch(0.5)[None])
    engine.set_user_voice(0, True)
    before, muted, after = (engine.tick(patch(0.5)[None]) for _ in range(3))
    assert np.abs(before.audio).min() > 0.4
    assert engine._flush.muted[0] and not muted.audio[0, 120:].any()
    assert not after.audio.any()
    slots, forced_codes, forced_text = engine.lm.calls[-1]["forced"]
    assert slots.tolist() == [True] and forced_text.tolist() == [0]
    assert (forced_codes == 512).all() and forced_codes.shape == (1, 8, 2)


def test_without_vad_flush_nothing_is_forced():
    engine = fake_engine()
    engine.set_user_voice(0, True)
    for _ in range(4):
        engine.tick(patch(0.5)[None])
    assert all(call["forced"] is None for call in engine.lm.calls)


# ---------------------------------------------------------------------------------- text


def test_text_waits_for_whole_characters():
    class Bytes:
        def decode(self, ids):
            return bytes(ids).decode("utf-8", errors="replace")

    stream = ReplyText(Bytes())
    pushed = [stream.push(byte) for byte in "aन".encode()]
    assert pushed == ["a", "", "", "न"]
    assert stream.push(0) == ""


def test_a_word_that_the_head_repeats_over_patches_is_told_once_as_ctc_merges():
    engine = fake_engine()
    engine.lm.tokenizer.decode = lambda ids: "".join(map(chr, ids))
    story, told = Story(engine), []
    for token in (*b"oo", 0, 0, *b"oohh", 0):
        engine.feed(0, patch(0.1))
        result = engine.run_once()
        result.user_words[0] = token
        told += story.tell(0, result, 0)
    words = {who: "".join(e["text"] for e in told if e["type"] == "text" and e["who"] == who)
             for who in ("user", "agent")}  # fmt: skip
    assert words == {"user": "ooh", "agent": "".join(map(chr, range(1, 10)))}


# --------------------------------------------------------------------------------- real models


def small_pair() -> tuple[Codec, S2S]:
    """Random weights at real shapes; the LM has a tokenizer of a few words."""
    torch.manual_seed(0)
    codec = Codec(
        CodecConfig(
            front_dim=16, encoder_dim=32, semantic_width=32, decoder_front_dim=16, decoder_dim=32,
            num_heads=2,
        )
    ).eval()
    lm = S2S(
        S2SConfig(
            codec_fingerprint=codec.fingerprint,
            vocab_size=32,
            dim=32,
            num_layers=1,
            num_heads=2,
            depth_dim=16,
            depth_layers=1,
            depth_heads=2,
            code_dim=8,
        )
    ).eval()
    words = {"<pad>": 0, **{f"word{i}": i for i in range(1, 32)}}
    lm.tokenizer = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    return codec, lm


def noise_patches(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, 0.1, count * 960).astype("f")


def drain(engine: DuplexEngine, audio: np.ndarray, slot: int = 0) -> list:
    engine.feed(slot, audio, bounded=False)
    return run_all(engine)


def test_the_engine_adds_nothing_to_the_codec():
    """An echoing LM between a real encoder and decoder gives what the codec gives offline."""
    codec, _ = small_pair()
    lm = FakeLM(FakeClock())
    lm.config.codec_fingerprint = codec.fingerprint
    engine = DuplexEngine(codec, lm)
    audio = noise_patches(20)
    engine.warm_up(2)
    streamed = np.concatenate([result.audio[0] for result in drain(engine, audio)])
    offline = codec.decode(codec.encode(torch.from_numpy(audio)[None, None]))[0, 0].numpy()
    np.testing.assert_allclose(streamed, offline, atol=1e-4)


def test_real_models_repeat_by_seed_and_give_every_field():
    codec, lm = small_pair()
    engine = DuplexEngine(codec, lm, seed=3)
    engine.set_voice(0, "happy", "hindi")
    engine.warm_up(2)
    first = drain(engine, noise_patches(10))
    engine.reset()
    again = drain(engine, noise_patches(10))
    for one, two in zip(first, again, strict=True):
        np.testing.assert_array_equal(one.audio, two.audio)
        np.testing.assert_array_equal(one.text, two.text)
    last = first[-1]
    assert last.audio.shape == (1, 960) and last.audio.dtype == np.float32
    assert last.user_emotion.shape == (1, 8) and last.language.shape == (1, 3)
    np.testing.assert_allclose(last.user_emotion.sum(), 1.0, atol=1e-5)
    times = last.times
    assert min(times.encode, times.temporal, times.depth, times.decode) > 0
    assert times.total >= times.encode + times.temporal + times.depth + times.decode - 1e-9


def test_a_slot_s_words_do_not_depend_on_its_neighbours_coming_and_going():
    """Greedy: one caller alone, then beside another who joins late and is reset."""
    codec, lm = small_pair()
    greedy = Sampling(temperature=0, text_temperature=0)
    alone = drain(DuplexEngine(codec, lm, sampling=greedy), noise_patches(12))
    engine = DuplexEngine(codec, lm, slots=2, sampling=greedy)
    shared = []
    for number, patch in enumerate(noise_patches(12).reshape(12, 960)):
        engine.feed(1, patch)
        if 3 <= number < 8:
            engine.feed(0, noise_patches(1, seed=number))
        if number == 6:
            engine.reset(0)
        shared += run_all(engine)
    for one, two in zip(alone, shared, strict=True):
        np.testing.assert_allclose(one.audio[0], two.audio[1], atol=1e-4)
        assert one.text[0] == two.text[1]


def test_vad_flush_reaches_the_real_model_s_memory():
    codec, lm = small_pair()
    engine = DuplexEngine(codec, lm, vad_flush=True)
    engine._flush.muted[0] = True
    engine.set_user_voice(0, True)
    result = engine.tick(noise_patches(1)[None])
    assert engine._flush.muted[0] and result.text[0] == 0
    silence_codes = engine._silence[0].T  # the LM keeps [p, K]
    assert torch.equal(engine._lm_state.agent[0], silence_codes)


def test_load_models_checks_the_pair(tmp_path):
    codec, lm = small_pair()
    save_pair(codec, lm, tmp_path)
    loaded_codec, loaded_lm = load_models(tmp_path / "codec", tmp_path / "s2s")
    assert loaded_lm.config.codec_fingerprint == loaded_codec.fingerprint
    other = dataclasses.replace(lm.config, codec_fingerprint="f00")
    save_pair(codec, lm, tmp_path / "other", lm_config=other)
    with pytest.raises(UserError, match=f"f00.*{loaded_codec.fingerprint}"):
        load_models(tmp_path / "other" / "codec", tmp_path / "other" / "s2s")


def test_replies_are_decoded_by_the_agents_own_decoder(tmp_path):
    """Where the codec's folder has one, unless the general one is asked for; the codes stay."""
    codec, lm = small_pair()
    config = stored_config("codec", codec.config)
    save_export(tmp_path / "codec", 1, config, codec.export_tensors())
    fingerprint = Codec.from_checkpoint(tmp_path / "codec").fingerprint
    made = dataclasses.replace(lm.config, codec_fingerprint=fingerprint)
    save_pair(codec, lm, tmp_path / "lm", lm_config=made)

    def reply(decoder: str | None = None) -> tuple[str, np.ndarray]:
        pair = load_models(tmp_path / "codec", tmp_path / "lm" / "s2s", "cpu", decoder)
        engine = DuplexEngine(*pair, seed=3)
        heard = [engine.tick(patch[None]).audio[0] for patch in np.split(noise_patches(6), 6)]
        return pair[0].decoder_kind, np.concatenate(heard)

    kind, before = reply()
    assert kind == "general" and before.any()
    with torch.no_grad():
        codec.decoder[-1].linear.bias[: codec.decoder[-1].bins] += 0.7  # twice as loud
    codec.export_decoder(tmp_path / "codec")
    assert reply("general")[0] == "general" and np.array_equal(reply("general")[1], before)
    (kind, own), named = reply(), reply("agent")
    assert kind == named[0] == "agent" and np.array_equal(own, named[1])
    assert np.abs(own - before * np.exp(0.7)).max() < 0.02 * np.abs(own).max()


def save_pair(codec: Codec, lm: S2S, folder: Path, lm_config: S2SConfig | None = None) -> None:
    """Two checkpoint folders, as the trainers write them."""
    config = stored_config("codec", codec.config)
    save_checkpoint(folder / "codec", 1, config, codec.state_dict())
    config = stored_config("s2s", lm_config or lm.config)
    tokenizer = lm.tokenizer.to_str()
    save_checkpoint(folder / "s2s", 1, config, lm.state_dict(), tokenizer=tokenizer)
