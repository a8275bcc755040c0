"""The engine as a GPU keeps it: a tick recorded once and replayed in the same buffers, the number
of its kernels, and callers who neither hear nor delay one another."""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from test_duplex import fake_engine, noise_patches, patch, small_pair
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.utils._python_dispatch import TorchDispatchMode

import training
from audio import read_audio
from codec import Codec, CodecConfig
from command import UserError
from duplex import DuplexEngine, ReplyText, halve, load_models
from s2s import S2S, S2SConfig, Sampling
from tools.launches import counting
from train_s2s import train_tokenizer

WARM = Sampling(0.8, 25, 0.7, 10, 0.5)


@pytest.fixture(scope="module")
def shipped() -> tuple[Codec, S2S]:
    return load_models("checkpoints/tiny/codec", "checkpoints/tiny/s2s")


class Recorded(TorchDispatchMode):
    """What a CUDA graph is, on a CPU: the operations met while recording, done again on the very
    same tensors, without the Python that called them. Recording changes nothing in the end: `undo`
    has what was there before every change."""

    def __init__(self, undo: list) -> None:
        super().__init__()
        self.calls, self.undo = [], undo

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        for i, argument in enumerate(func._schema.arguments):
            if argument.alias_info is not None and argument.alias_info.is_write:
                written = args[i] if i < len(args) else kwargs[argument.name]
                self.undo.append((written, written.clone()))
        out = func(*args, **kwargs)
        self.calls.append((func, args, kwargs, out))
        return out

    def replay(self) -> None:
        while self.undo:
            written, before = self.undo.pop()
            written.copy_(before)
        for func, args, kwargs, kept in self.calls:
            new = func(*args, **kwargs)
            pairs = zip(new, kept, strict=True) if isinstance(new, (list, tuple)) else [(new, kept)]
            for one, two in pairs:
                if isinstance(one, torch.Tensor) and one.data_ptr() != two.data_ptr():
                    two.copy_(one)


class CpuGraph(training.StepGraph):
    undo: list = []  # noqa: RUF012

    def _capture(self):
        self._graphs.append(Recorded(self.undo))
        return self._graphs[-1]


def graphed(engine: DuplexEngine, warmup: int = 2) -> DuplexEngine:
    step = engine._step
    engine._step = CpuGraph(step.function, warmup, step.between)
    return engine


def rows(results: list, slot: int = 0) -> dict[str, np.ndarray]:
    names = ("audio", "codes", "text", "user_words", "user_emotion", "user_phones")
    return {name: np.stack([getattr(r, name)[slot] for r in results]) for name in names}


def assert_same(one: dict, two: dict, exact=("codes", "text", "user_words", "user_phones")) -> None:
    for name in one:
        if name in exact:
            np.testing.assert_array_equal(one[name], two[name], err_msg=name)
        else:
            np.testing.assert_allclose(one[name], two[name], atol=1e-4, err_msg=name)


# -- graphs ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("strength", [1.0, 2.0])
def test_a_replayed_tick_says_what_an_eager_one_says(strength):
    """Callers come, go, are muted, reset and set anew; nothing of it is frozen in the recording."""
    codec, lm = small_pair()
    options = {"sampling": WARM, "vad_flush": True, "emotion_strength": strength}
    eager, replayed = (DuplexEngine(codec, lm, 3, **options) for _ in range(2))
    graphed(replayed)
    spoken = np.stack([noise_patches(24, seed).reshape(24, 960) for seed in range(3)], axis=1)
    spoken *= 8
    active = np.random.default_rng(1).random((24, 3)) < 0.8
    for number in range(24):
        results = []
        for engine in (eager, replayed):
            if number == 9:
                engine.reset(1, seed=5)
                engine.set_voice(0, "sad", "hindi")
                engine.set_sampling(2, Sampling(0.1, 3, 0.0, 1, eagerness=20.0))
            if number == 12:
                engine.suspend(1)
            if number == 15:
                engine.resume(1)
            engine._flush.muted[2] = 16 <= number < 18
            engine._flush.voice[2] = number >= 16
            engine._quiet_ticks[0] = 20
            results.append(engine.tick(spoken[number], active[number]))
        one, two = results
        for slot in range(3):
            assert_same(rows([one], slot), rows([two], slot), exact=rows([one]))
    graph = replayed._step
    assert len(graph._graphs) == 4 and all(len(part.calls) > 10 for part in graph._graphs)
    times = one.times
    assert min(times) > 0 and sum(times[:4]) <= times.total


def test_a_step_of_one_stage_is_one_graph():
    memory, between = torch.zeros(2), []

    def step(mode, x):
        memory.add_(x)
        return {"sum": memory * mode}

    graph = CpuGraph(step, 2, lambda: between.append(1))
    seen = [graph(10, x=torch.full((2,), float(i)))["sum"].tolist() for i in range(5)]
    assert [s[0] for s in seen] == [0, 10, 30, 60, 100]
    assert not between and len(graph._graphs) == 1
    assert graph(2, x=torch.ones(2))["sum"][0] == 22 and not graph._graphs


def test_stages_are_captured_one_by_one_into_one_pool(monkeypatch):
    """The calls that CUDA would get, and no replay while a capture is open."""
    told = []

    class Graph:
        def __init__(self):
            self.name = sum(word[0] == "begin" for word in told)

        def pool(self):
            return "pool of the first" if self.name == 0 else "another"

        def replay(self):
            told.append(("replay", self.name))

    @contextlib.contextmanager
    def capturing(graph, pool=None, stream=None, *, capture_error_mode):
        told.append(("begin", pool, capture_error_mode))
        yield
        told.append(("end", graph.name))

    inspect.signature(torch.cuda.graph.__init__).bind(None, 1, 2, 3, capture_error_mode="")
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", capturing)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: "side")

    def step(mode):
        told.append("first")
        graph.split()
        told.append("second")
        return {}

    graph = training.StepGraph(step, 1, lambda: told.append("between"))
    graph()
    assert told == ["first", "between", "second"]
    told.clear()
    graph(), graph()
    modes = "thread_local"
    assert told == [
        ("begin", None, modes), "first", ("end", 0),
        ("begin", "pool of the first", modes), "second", ("end", 1),
        *[("replay", 0), "between", ("replay", 1)] * 2,
    ]  # fmt: skip


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_cuda_graphs_say_what_eager_cuda_says(tmp_path, record_property):
    """Replays are the same kernels: at most one code in a hundred may differ, by other sums."""
    codec, lm = load_models("checkpoints/tiny/codec", "checkpoints/tiny/s2s", "cuda")
    replayed, eager = (DuplexEngine(codec, lm, 4, WARM, graphs=on) for on in (True, False))
    replayed.warm_up(), eager.warm_up()
    assert len(replayed._step._graphs) == 4 and not eager._step._graphs
    spoken = 4 * np.stack([noise_patches(50, seed).reshape(50, 960) for seed in range(4)], axis=1)
    pairs = [(replayed.tick(frames), eager.tick(frames)) for frames in spoken]
    apart = np.mean([one.codes != two.codes for one, two in pairs])
    record_property("share_of_differing_codes", float(apart))
    print(f"codes that differ, graph against eager: {apart:.2%}")
    assert apart < 0.01 and min(pairs[-1][0].times) > 0


def test_the_lm_runs_in_half_precision_but_for_what_it_sums_up():
    """On a CPU as on a GPU, where it is the default; with and without an emotion branch."""
    for width in (0, 8):
        codec, _ = small_pair()
        lm = S2S(dataclasses.replace(small_pair()[1].config, emotion_dim=width)).eval()
        halve(lm.requires_grad_(False))
        engine = DuplexEngine(codec, lm, 2, WARM, emotion_strength=2.0)
        result = [engine.tick(noise_patches(2, n).reshape(2, 960)) for n in range(5)][-1]
        assert np.isfinite(result.audio).all() and result.codes.max() > 0
        state = engine._lm_state
        assert {state.temporal.keys.dtype, state.depth.keys.dtype} == {torch.bfloat16}
        assert all(tensor.dtype == torch.float32 for tensor in state.emotion)


# -- the number of kernels ------------------------------------------------------------------------


def launches(codec: Codec, lm: S2S, **options) -> int:
    engine = DuplexEngine(codec, lm, 2, WARM, **options)
    frames = noise_patches(4)[: 2 * engine.patch_samples].reshape(2, -1)
    engine.tick(frames)
    with counting() as counts:
        engine.tick(frames)
    assert counts.waits <= 1, counts.reads  # the result, which a CPU hands over as it is
    return counts.total


def bound(codec: CodecConfig, lm: S2SConfig) -> int:
    """Kernels of a tick by the sizes of its models. A transformer's layer: two norms, four matrix
    products, rotation, keys, values, attention, gate, two sums. A depth step adds its input and its
    draw."""
    layer, plan, conv, draw = 16, 22, 9, 15
    layers = codec.semantic_layers + codec.encoder_layers + codec.decoder_layers + lm.num_layers
    steps = len(lm.depth_schedule())
    convs = codec.encoder_front_blocks + codec.decoder_front_blocks
    vectors = 5 * 2 * len(lm.codebook_sizes)  # searched, subtracted; looked up, embedded
    fixed = 200  # noise, embeddings, heads, spectra, what comes in and goes out
    layers, plans = layers + steps * lm.depth_layers, 4
    return layer * layers + plan * plans + conv * convs + draw * steps + vectors + fixed


@pytest.mark.parametrize("changes", [
    {}, {"num_layers": 5}, {"depth_layers": 3}, {"frames_per_step": 4}, {"depth_order": "frame"},
])  # fmt: skip
def test_a_tick_s_kernels_are_bounded_by_the_models_sizes(changes):
    codec, lm = small_pair()
    config = dataclasses.replace(lm.config, **changes)
    lm = S2S(config).eval().requires_grad_(False)
    found = launches(codec, lm)
    print(changes, found, bound(codec.config, config))
    assert found <= bound(codec.config, config)


def test_kernels_do_not_grow_with_callers_or_their_settings():
    pair = small_pair()
    assert launches(*pair) == launches(*pair)
    engine = DuplexEngine(*pair, 6, WARM)
    engine.tick(np.zeros((6, 960)))
    engine.set_sampling(3, Sampling(0.0, 1, 0.0, 1))
    engine.set_voice(2, "happy")
    with counting() as counts:
        engine.tick(np.zeros((6, 960)), active=np.arange(6) % 2 == 0)
    assert counts.total == launches(*pair)


# -- callers among others -------------------------------------------------------------------------


def question(ticks: int) -> np.ndarray:
    audio = read_audio("samples/question_english.wav")
    return np.resize(audio, ticks * 960).reshape(ticks, 960)


def test_a_caller_among_many_hears_what_a_lone_one_hears(shipped):
    """Bit for bit in codes and text: others come and go, warmer, with other voices and seeds."""
    talks = dataclasses.replace(WARM, eagerness=30.0)
    lone, busy = DuplexEngine(*shipped, 1, talks), DuplexEngine(*shipped, 5, talks)
    lone.reset(0, seed=11)
    busy.reset(3, seed=11)
    rng, spoken, heard = np.random.default_rng(0), question(45), ([], [])
    busy.set_sampling(0, Sampling(1.5, 20, 1.5, 5, 1.0, 10.0))
    busy.set_sampling(1, Sampling(0.0, 1, 0.0, 1))
    busy.set_voice(1, "angry", "telugu")
    for number, frame in enumerate(spoken):
        frames = rng.normal(0, 0.2, (5, 960)).astype("f")
        frames[3] = frame
        if number in (20, 40):
            busy.reset(number // 10, seed=number)
        if number == 30:
            busy.suspend(1)
        heard[0].append(lone.tick(frame[None]))
        heard[1].append(busy.tick(frames, rng.random(5) < [0.7, 0.7, 0.7, 1.0, 0.1]))
    one, two = rows(heard[0], 0), rows(heard[1], 3)
    assert_same(one, two)
    assert len(np.unique(one["codes"])) > 100 and one["text"].any()


def test_seeds_are_a_slot_s_own(shipped):
    engine = DuplexEngine(*shipped, 4, Sampling(1.0, 25, 1.0, 10, 1.0), seed=7)
    for slot, seed in enumerate((7, 1, -1, None)):
        engine.reset(slot, seed)
    spoken = question(12)
    results = [engine.tick(np.repeat(frame[None], 4, 0)) for frame in spoken]
    said = [rows(results, slot)["codes"] for slot in range(4)]
    assert np.array_equal(said[0], said[3]) and not np.array_equal(said[0], said[1])
    assert not np.array_equal(said[1], said[2])


def test_a_suspended_call_goes_on_exactly(shipped):
    """Its own clock stands still: as if nothing had been between, though others talk on."""
    plain, paused = (DuplexEngine(*shipped, 2, WARM) for _ in range(2))
    spoken, noise = question(20), noise_patches(40).reshape(40, 960)
    heard = [[], []]
    for frame in spoken:
        plain.feed(1, frame)
        heard[0].append(plain.run_once())
    for number, frame in enumerate(spoken[:9]):
        paused.feed(0, noise[number])
        paused.feed(1, frame if number < 8 else np.concatenate([frame, spoken[9][:500]]))
        if number < 8:
            heard[1].append(paused.run_once())
    paused.suspend(1)  # with a patch and a half in its queue
    for number in range(9, 30):
        paused.feed(0, noise[number])
        paused.feed(1, noise[number])
        result = paused.run_once()
        assert result.active.tolist() == [True, False] and not result.audio[1].any()
    paused.resume(1)
    paused.feed(1, spoken[9][500:])
    heard[1] += [paused.run_once(), paused.run_once()]
    assert heard[1][-1].waited[1] < 1.0
    for frame in spoken[10:]:
        paused.feed(1, frame)
        heard[1].append(paused.run_once())
    assert_same(rows(heard[0], 1), rows(heard[1], 1))
    paused.suspend(1)
    paused.reset(1)
    paused.feed(1, spoken[0])
    assert_same(rows([paused.run_once()], 1), rows(heard[0][:1], 1))


def test_a_late_caller_misses_a_tick_and_delays_nobody():
    engine = fake_engine(slots=2)
    answered = []
    for number in range(6):
        engine.feed(0, patch(0.1 * number))
        if number != 2:  # a network that held back a patch, and brings two at once
            for _ in range(2 if number == 3 else 1):
                engine.feed(1, patch(0.5))
        result = engine.run_once()
        answered.append((result.active.tolist(), result.index.tolist(), result.waited.tolist()))
    assert [a[0][0] for a in answered] == [True] * 6
    assert [a[1][0] for a in answered] == list(range(6)) and max(a[2][0] for a in answered) == 0
    assert [a[0][1] for a in answered] == [True, True, False, True, True, True]
    assert len(engine.queues[1]) == 1


def test_sampling_wider_than_the_engine_is_refused():
    engine = fake_engine(sampling=Sampling(top_k=5))
    with pytest.raises(UserError, match="top_k 6: this engine draws from at most 5"):
        engine.set_sampling(0, Sampling(top_k=6))
    engine.set_sampling(0, Sampling(top_k=2, eagerness=3.0))
    np.testing.assert_allclose(engine._sampling_rows[0, -2:], (2, 3.0))
    engine.set_sampling(0)
    np.testing.assert_allclose(engine._sampling_rows[0, -2:], (5, 0.0))


def test_strength_is_a_slot_s_own_where_the_engine_has_it(shipped):
    with pytest.raises(UserError, match="strength"):
        DuplexEngine(*shipped).set_voice(0, "sad", strength=2.0)
    plain = DuplexEngine(*shipped, 1, WARM)
    guided = DuplexEngine(*shipped, 2, WARM, emotion_strength=3.0)
    for engine in (plain, guided):
        engine.set_voice(0, "sad", strength=1.0)
    guided.set_voice(1, "sad")
    heard = [(plain.tick(f[None]), guided.tick(np.repeat(f[None], 2, 0))) for f in question(25)]
    one, two = zip(*heard, strict=True)
    assert_same(rows(one), rows(two))
    assert not np.array_equal(rows(two)["codes"], rows(two, 1)["codes"])


# -- text -----------------------------------------------------------------------------------------

SAYINGS = (
    "नमस्ते, आप कैसे हैं? क्या हाल है", "నమస్కారం, మీరు ఎలా ఉన్నారు?", "so 😀 good 👩‍👩‍👧 !",
    "  two  spaces ", "naïve café",
)  # fmt: skip


def byte_tokenizer(texts=("so good two spaces naive",), size=300, first="<pad>") -> Tokenizer:
    """Bytes and merges in `texts`; by default every character that is not Latin is split over
    tokens. `first`: the token that comes before them."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=[first], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


@pytest.mark.parametrize("kind", ["bytes", "own", "words"])
def test_text_told_bit_by_bit_is_the_whole_text(kind):
    if kind == "bytes":
        tokenizer = byte_tokenizer()
    elif kind == "own":
        tokenizer = train_tokenizer(SAYINGS * 3, 200)
    else:
        words = {"<pad>": 0, **{w: i + 1 for i, w in enumerate(" ".join(SAYINGS).split())}}
        tokenizer = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
        tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    for saying in (*SAYINGS, " ".join(SAYINGS)):
        ids = tokenizer.encode(saying).ids
        stream, told = ReplyText(tokenizer), ""
        for number, token in enumerate(ids):
            told += stream.push(token)
            whole = tokenizer.decode(ids[: number + 1])
            assert told == (whole if not whole.endswith("\ufffd") else told)
            assert whole.startswith(told)
        assert told == tokenizer.decode(ids)


def test_each_token_is_decoded_with_few_others():
    decoded = []
    tokenizer = SimpleNamespace(decode=lambda ids: decoded.append(len(ids)) or "w" * len(ids))
    stream = ReplyText(tokenizer)
    told = [stream.push(token) for token in range(1, 300)]
    assert "".join(told) == "w" * 299 and max(decoded) == 2
