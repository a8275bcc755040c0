"""Speech engines: closed inventory, phones where the sound is, same request same bytes."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import evaluate_s2s
import praat
import speech
from audio import SAMPLE_RATE
from command import UserError
from phones import (
    _ESPEAK_UNITS,
    PHONES,
    SILENCE,
    VOWELS,
    clean_text,
    espeak,
    espeak_language,
    fold_ipa,
    phonemize,
)
from tools import toy_voices

ROOT = Path(speech.__file__).parent
TEXTS = {
    "english": ["Hello there, what is the weather like today?", "I lost my keys near the park."],
    "hindi": ["नमस्ते, आप कैसे हैं?", "आज मौसम बहुत अच्छा है।"],
    "telugu": ["నమస్కారం, మీరు ఎలా ఉన్నారు?", "ఈ రోజు వాతావరణం బాగుంది."],
}
ODD = '25% of [1/2] — café \\ "quote" (x) ☂ नमस्ते మీరు #!? 3.14'
ENGINES = ("espeak", "hibari", "joe", "flite", "festival")
CASES = [(engine, language) for engine in ENGINES for language in TEXTS]
FOREIGN = [
    (name, language)
    for _, name, _, languages in toy_voices._RECORDED
    if name in toy_voices._FOREIGN
    for language in languages
]


def a_voice(engine: str, language: str) -> speech.Voice:
    """The first training voice of an engine, or a skip that says what is missing."""
    try:
        found = [v for v in speech.voices(language) if v.engine == engine]
    except UserError as error:
        pytest.skip(str(error))
    if not found:
        pytest.skip(f"no {engine} voice for {language}: {toy_voices.INSTALL[engine]}")
    return found[0]


def needs_espeak() -> None:
    try:
        phonemize("a", "english")
    except UserError as error:
        pytest.skip(str(error))


def a_foreign_voice(name: str, language: str) -> speech.Voice:
    """A Czech, Italian or Finnish speaker of a language, or a skip that says what is missing."""
    needs_espeak()
    if not toy_voices._installed("festival", name):
        pytest.skip(f"no {name}: {toy_voices.INSTALL['festival']}")
    return next(v for v in speech.voices(language) if v.name == name)


def say(voice: speech.Voice, texts: list[str], **changes) -> list[speech.Utterance]:
    requests = [speech.Request(t, voice.language, voice, seed=1, **changes) for t in texts]
    return speech.synthesize(requests)


def written_sentences(language: str) -> list[str]:
    """Every turn of the dialogue scripts."""
    path = Path(speech.__file__).parent / "conversations" / f"{language}.jsonl"
    turns = [t for line in path.open(encoding="utf-8") for t in json.loads(line)["turns"]]
    return [text for t in turns for text in t.get("texts", [t.get("text")])]


def test_inventory_has_no_doubles_and_starts_with_silence():
    assert PHONES[0] == SILENCE == "_"
    assert len(set(PHONES)) == len(PHONES) <= 80
    folded = {p for units in _ESPEAK_UNITS.values() for p in units.split()}
    assert folded <= set(PHONES)
    assert set(toy_voices._RADIO.values()) <= set(PHONES)


@pytest.mark.parametrize("language", TEXTS)
def test_every_phone_can_be_said_by_every_engine(language):
    for phone in PHONES[1:]:
        assert toy_voices._engine_phones(phone, toy_voices._TO_RADIO)
        assert toy_voices._engine_phones(phone, toy_voices._TO_NSK)
        assert set(toy_voices._engine_phones(phone, toy_voices._TO_RADIO)) <= set(toy_voices._RADIO)


def spoken_words(text, language):
    """Words of IPA symbols, as espeak says the text."""
    return espeak().ipa(clean_text(text), espeak_language(language))


@pytest.mark.parametrize("language", TEXTS)
def test_phones_of_all_scripts_are_in_the_inventory(language):
    needs_espeak()
    unknown: list[str] = []
    sentences = written_sentences(language)
    assert len(sentences) > 100
    words = [word for text in sentences for word in spoken_words(text, language)]
    phones = {p for word in words for unit in word for p in fold_ipa(unit, language, unknown)}
    assert unknown == []
    assert phones <= set(PHONES[1:])


@pytest.mark.parametrize(
    ("language", "word", "phones"),
    [
        ("english", "thing", "θ ɪ ŋ"),
        ("english", "boat", "b oʊ t"),
        ("english", "weather", "w ɛ ð ɚ"),
        ("hindi", "नमस्ते", "n ə m ə s t e"),
        ("hindi", "घोड़ा", "ɡʰ o ɽ aː"),
        ("hindi", "मैं", "m ɛ ŋ"),
        ("telugu", "మీరు", "m i r ʊ"),
        ("telugu", "నమస్కారం", "n a m a s k aː r a m"),
    ],
)
def test_known_words(language, word, phones):
    needs_espeak()
    assert phonemize(word, language) == phones.split()


JOINED = [("telugu", "సాఫ్ట్\u200cవేర్"), ("telugu", "ఫేస్\u200cబుక్\u200cలో"), ("hindi", "बिल्\u200dकुल"),
          ("hindi", "क्\u200dया")]  # fmt: skip


@pytest.mark.parametrize(("language", "word"), JOINED)
def test_a_joiner_is_no_border_of_words(language, word):
    plain = word.replace("\u200c", "").replace("\u200d", "")
    assert clean_text(f"\u200c {word}\u200d, \u200d{word}.") == f"{word}, {word}."
    assert clean_text("so\u00adft\u200b\ufeff") == "soft"
    assert evaluate_s2s.normalise(word) == plain
    needs_espeak()
    assert len(spoken_words(word, language)) == 1
    assert phonemize(word, language) == phonemize(plain, language)
    assert [w.text for w in toy_voices._words(word, language)] == [word]


@pytest.mark.parametrize("engine", ["espeak", "hibari"])
@pytest.mark.parametrize(("language", "word"), [JOINED[1], JOINED[2]])
def test_a_joined_word_is_said_as_one(engine, language, word):
    plain = word.replace("\u200c", "").replace("\u200d", "")
    said = say(a_voice(engine, language), [f"{word}.", f"{plain}."])
    assert [w for w, _, _ in said[0].words] == [word]
    assert [p for p, _, _ in said[0].phones] == [p for p, _, _ in said[1].phones]


def test_unknown_symbols_are_reported():
    unknown: list[str] = []
    assert fold_ipa("aʘ", "english", unknown) == ["a"]
    assert unknown == ["ʘ"]


@pytest.mark.parametrize(("engine", "language"), CASES)
def test_same_request_same_bytes(engine, language):
    voice = a_voice(engine, language)
    first, again = say(voice, TEXTS[language][:1]), say(voice, TEXTS[language])
    assert first[0].audio.tobytes() == again[0].audio.tobytes()
    assert first[0].phones == again[0].phones


@pytest.mark.parametrize(("engine", "language"), CASES)
def test_phones_tile_the_audio_and_match_its_sound(engine, language):
    for utterance in say(a_voice(engine, language), TEXTS[language]):
        audio, phones = utterance.audio, utterance.phones
        assert audio.dtype == np.float32 and np.abs(audio).max() <= 1.0
        assert phones[0][1] == 0.0
        assert phones[-1][2] == pytest.approx(len(audio) / SAMPLE_RATE, abs=1e-3)
        for (_, _, end), (_, start, _) in zip(phones, phones[1:], strict=False):
            assert start == pytest.approx(end, abs=1e-6)
        assert all(end > start and phone in PHONES for phone, start, end in phones)

        def samples(kind, audio=audio, phones=phones):
            cut = [
                (round(s * SAMPLE_RATE), round(e * SAMPLE_RATE)) for p, s, e in phones if p in kind
            ]
            return np.concatenate([audio[s:e] for s, e in cut] or [np.zeros(0)])

        def level(x):
            return 10 * np.log10(np.mean(x**2) + 1e-12)

        def brightness(x):
            return level(np.diff(x)) - level(x)

        vowels, hiss = samples(VOWELS), samples(["s", "ʃ", "tʃ", "tʃʰ"])
        assert level(samples([SILENCE])) < level(vowels) - 25
        if len(hiss):
            assert brightness(hiss) > brightness(vowels) + 5


@pytest.mark.parametrize(("engine", "language"), CASES)
def test_phones_are_those_of_the_text(engine, language):
    voice = a_voice(engine, language)
    for text, utterance in zip(TEXTS[language], say(voice, TEXTS[language]), strict=True):
        said = [p for p, _, _ in utterance.phones if p != SILENCE]
        expected = phonemize(text, language)
        # English engines have dictionaries of their own, so a few phones differ.
        assert abs(len(said) - len(expected)) <= 3
        same = len(
            set(zip(said, said[1:], strict=False)) & set(zip(expected, expected[1:], strict=False))
        )
        assert same >= 0.6 * len(set(zip(expected, expected[1:], strict=False)))


@pytest.mark.parametrize(("engine", "language"), CASES)
def test_words_are_in_order(engine, language):
    for text, utterance in zip(
        TEXTS[language], say(a_voice(engine, language), TEXTS[language]), strict=True
    ):
        if utterance.words is None:
            assert (engine, language) == ("flite", "english")
            continue
        assert len(utterance.words) == len(text.split())
        starts = [s for _, s, _ in utterance.words]
        assert starts == sorted(starts)
        assert all(
            0 <= s < e <= len(utterance.audio) / SAMPLE_RATE + 1e-3 for _, s, e in utterance.words
        )


@pytest.mark.parametrize(("engine", "language"), CASES)
def test_digits_and_odd_characters_do_no_harm(engine, language):
    voice = a_voice(engine, language)
    for utterance in say(voice, [ODD, "", "...", "☂"]):
        assert len(utterance.audio) > 0 and utterance.phones


@pytest.mark.parametrize("engine", ENGINES)
def test_speed_and_emotion_change_the_speech(engine):
    voice = a_voice(engine, "english")
    (plain,), (fast,) = (
        say(voice, TEXTS["english"][:1]),
        say(voice, TEXTS["english"][:1], speed=1.4),
    )
    assert 0.55 < len(fast.audio) / len(plain.audio) < 0.9
    (sad,) = say(voice, TEXTS["english"][:1], emotion="sad")
    assert len(sad.audio) > len(plain.audio)
    assert np.sqrt(np.mean(sad.audio**2)) < np.sqrt(np.mean(plain.audio**2))


def test_a_tilt_is_so_many_decibels_an_octave():
    noise = np.random.default_rng(0).standard_normal(SAMPLE_RATE).astype(np.float32)
    power = [np.abs(np.fft.rfft(x)) ** 2 for x in (noise, speech._tilted(noise, -2.0))]
    for low, high, octaves in ((100, 400, 0), (980, 1020, 1), (3900, 4100, 3), (9000, 11000, 4)):
        before, after = (10 * np.log10(p[low:high].sum()) for p in power)
        assert after - before == pytest.approx(-2.0 * octaves, abs=0.05)
    assert speech._tilted(noise, 0.0) is noise


@pytest.mark.parametrize("name", toy_voices._FOREIGN)
def test_every_phone_can_be_said_by_foreign_voices(name):
    for language in TEXTS:
        table = toy_voices._phone_set(name).of(language)
        for phone in PHONES[1:]:
            assert toy_voices._engine_phones(phone, table)
    if not toy_voices._installed("festival", name):
        pytest.skip(f"no {name}: {toy_voices.INSTALL['festival']}")
    known = {unit for diphone in toy_voices._diphones(name) for unit in diphone.split("-")}
    asked = {unit for p in PHONES[1:] for unit in toy_voices._engine_phones(p, table)}
    instead = toy_voices._phone_set(name).instead
    assert all({unit, *instead.get(unit, "").split()} & known for unit in asked)


@pytest.mark.parametrize(("name", "language"), FOREIGN)
def test_foreign_voices_say_the_phones_of_the_text(name, language):
    voice = a_foreign_voice(name, language)
    assert voice.split == "train"
    for text, utterance in zip(TEXTS[language], say(voice, TEXTS[language]), strict=True):
        said = [p for p, _, _ in utterance.phones if p != SILENCE]
        assert said == phonemize(text, language)
        assert len(utterance.words) == len(text.split())
        assert np.sqrt(np.mean(utterance.audio**2)) > 0.02 and np.abs(utterance.audio).max() < 1
        assert 0.04 < len(utterance.audio) / SAMPLE_RATE / len(said) < 0.2


@pytest.mark.parametrize(("name", "language"), FOREIGN)
def test_odd_characters_do_no_harm_to_foreign_voices(name, language):
    for utterance in say(a_foreign_voice(name, language), [ODD, "", "..."]):
        assert len(utterance.audio) > 0 and utterance.phones


def test_a_missing_diphone_is_stood_for_or_said_as_two(monkeypatch):
    diphones = {"#-s", "s-a:", "a:-#", "a:-z", "z-#", "#-z"}
    monkeypatch.setattr(toy_voices, "_diphones", lambda name: frozenset(diphones))
    asked = [(unit, 0.1, 100.0) for unit in ("#", "s", "a", "z", "z", "#")]
    said = [unit for unit, _, _ in toy_voices._recorded_units(asked, "czech_dita")]
    assert said == ["#", "s", "a:", "z", "#", "z", "#"]


def test_units_that_were_not_asked_for_are_refused():
    words = [toy_voices._Word("sa", ("s", "a"), "")]
    units = [("#", 0.0, 0.1), ("s", 0.1, 0.2), ("a:", 0.2, 0.3), ("#", 0.3, 0.4)]
    table = toy_voices._TO_CZECH
    assert toy_voices._units_to_phones(units, words, table) is None
    assert toy_voices._units_to_phones(units, words, table, ["s", "a"]) is None
    phones = toy_voices._units_to_phones(units, words, table, ["s", "a:"])
    assert [p for p, _, _ in phones] == ["_", "s", "a", "_"]


def test_festival_says_why_it_failed():
    said = "SIOD ERROR: could not open file hindi_phones.scm\nclosing a file left open: x.scm\n"
    assert toy_voices._festival_reason(said).endswith("hindi_phones.scm")
    assert toy_voices._festival_reason("") == "no reason given"


@pytest.mark.parametrize("language", ["hindi", "telugu"])
def test_nsk_says_the_phones_of_the_text_where_listed(language):
    needs_espeak()
    name = f"{language}_NSK_diphone"
    if not toy_voices._installed("festival", name):
        pytest.skip(f"no {name}: {toy_voices.INSTALL['festival']}")
    voice = next(v for v in speech.voices(language, "user") if v.name == name)
    for text, utterance in zip(TEXTS[language], say(voice, TEXTS[language]), strict=True):
        said = [p for p, _, _ in utterance.phones if p != SILENCE]
        assert said == phonemize(text, language)


def test_hibari_durations_are_those_it_used():
    a_voice("hibari", "english")
    model = toy_voices._hibari(0)
    agent = speech.voices("english", "agent")[0]
    order = speech._order(speech.Request(TEXTS["english"][1], "english", agent))
    pieces, _ = toy_voices._hibari_sentences(model, order)[0]
    symbols = "".join(s for s, _ in pieces)
    audio, lengths, _ = model.say(symbols, order.rate, order.seed)
    assert lengths.sum() == len(audio)  # durations are those that the model used


@pytest.mark.parametrize("language", TEXTS)
def test_held_out_speakers_are_in_no_other_split(language):
    needs_espeak()
    splits = {}
    for split in ("train", "validation", "test"):
        try:
            splits[split] = speech.voices(language, "user", split)
        except UserError as error:
            pytest.skip(str(error))
    speakers = {split: {v.speaker for v in found} for split, found in splits.items()}
    assert not speakers["test"] & (speakers["train"] | speakers["validation"])
    assert not speakers["validation"] & speakers["train"]
    assert len({v.id for found in splits.values() for v in found}) == sum(map(len, splits.values()))


@pytest.mark.parametrize("language", TEXTS)
def test_the_agent_is_one_voice_and_no_user(language):
    try:
        agents = speech.voices(language, "agent")
        users = speech.voices(language)
    except UserError as error:
        pytest.skip(str(error))
    assert len(agents) == 1

    def sound(v):
        return (v.engine, v.name, v.formant, v.pitch, v.pitch_range)

    assert sound(agents[0]) not in {sound(v) for v in users}


def test_a_missing_engine_names_its_install_line(monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    voice = speech.Voice("x", "flite", "english", "slt", "slt")
    with pytest.raises(UserError, match="apt-get install flite"):
        say(voice, ["hello"])


# What Praat looped over: a surprised agent whose stretched contour fell below 0 Hz.
LOOPED = [
    speech.Request("Do you remember who I am?", "english", None, 0.943, "surprise", 26),
    speech.Request("तुम कौन हो?", "hindi", None, 1.0, "happy"),
]


@pytest.mark.parametrize("request_", LOOPED)
def test_a_stretched_pitch_that_falls_below_zero_is_narrowed(request_):
    try:
        agent = speech.voices(request_.language, "agent")[0]
    except UserError as error:
        pytest.skip(str(error))
    said = speech.synthesize([dataclasses.replace(request_, voice=agent)])
    assert len(said[0].audio) > SAMPLE_RATE / 2


def buzz(hertz: np.ndarray) -> np.ndarray:
    """A buzzing sound whose pitch goes through `hertz`, 0.3 s each: [T] at 24 kHz."""
    phase = np.cumsum(np.repeat(hertz, SAMPLE_RATE * 3 // 10)) / SAMPLE_RATE
    return (0.1 * np.sum([np.sin(2 * np.pi * k * phase) / k for k in range(1, 20)], 0)).astype("f4")


@pytest.mark.parametrize("spread", [1.2, 1.55, 4.0, 20.0])
@pytest.mark.parametrize("median", [0.0, 60.0, 250.0])
def test_the_range_of_a_pitch_is_what_its_contour_bears(spread, median):
    contour = np.array([0, 220, 210, 74, 0, 230, 180, 200.0])
    bounded = praat._bounded_range(contour, median, spread)
    middle = np.median(contour[contour > 0])
    stretched = (median or middle) * (1 + (contour[contour > 0] / middle - 1) * bounded)
    assert 1.0 <= bounded <= spread
    assert bounded == 1.0 or stretched.min() > praat.LOWEST_HZ - 1e-6
    assert praat._bounded_range(contour[:1], median, spread) == spread  # nothing voiced
    assert praat._bounded_range(np.array([200.0]), median, spread) <= spread


def test_a_call_of_praat_that_does_not_end_is_ended(monkeypatch):
    pytest.importorskip("parselmouth")
    audio = buzz(np.array([220.0, 180.0]))
    before = praat.change_voice(audio, SAMPLE_RATE, 1.1)
    monkeypatch.setattr(praat, "LIMIT_SECONDS", (0.01, 0.0))
    with pytest.raises(UserError, match="did not come to an end"):
        praat.change_voice(audio, SAMPLE_RATE, 1.1, duration=300.0)
    monkeypatch.undo()
    np.testing.assert_array_equal(before, praat.change_voice(audio, SAMPLE_RATE, 1.1))
    with pytest.raises(praat.TooShort):
        praat.change_voice(audio[:50], SAMPLE_RATE)


def test_bad_requests_are_refused():
    voice = speech.Voice("x", "espeak", "english", "e", "gmw/en-US")
    with pytest.raises(UserError, match="emotion"):
        say(voice, ["hello"], emotion="bored")
    with pytest.raises(UserError, match="no voice speaks"):
        phonemize("hola", "spanish")
    with pytest.raises(UserError, match="engines are"):
        say(speech.Voice("x", "nobody", "english", "e", "e"), ["hello"])


class Natural:
    """An engine that knows no times: a buzz for each word, as loud as it likes, at 16 kHz."""

    name, install = "natural", "pip install natural"

    def voices(self, language):
        return speech.own_and_changed(self.name, language, ["ann", "ben", "cat"])

    def say(self, orders):
        def said(order):
            pieces = []
            for _ in order.text.split():
                hertz = np.full(2, {"ann": 210.0, "ben": 110.0, "cat": 180.0}[order.name])
                pieces += [3 * buzz(hertz)[:6000], np.zeros(480, np.float32)]
            return np.concatenate([np.zeros(16000, np.float32), *pieces, np.zeros(9000, "f4")])

        return [speech.Raw(said(order), 16000) for order in orders]


@pytest.fixture
def natural(monkeypatch):
    monkeypatch.setattr(speech, "all_engines", lambda: {"natural": Natural()})


def test_an_engine_without_times_is_trimmed_and_levelled(natural):
    needs_espeak()
    agent, *_ = speech.voices("telugu", "agent")
    said = speech.synthesize(
        [speech.Request(t, "telugu", agent) for t in (*TEXTS["telugu"], "")]
    )
    for utterance in said[:2]:
        assert utterance.phones is None and utterance.words is None
        loud = np.flatnonzero(np.abs(utterance.audio) > 0.01)
        assert 0.03 < loud[0] / SAMPLE_RATE < 0.06
        assert 0.03 < (len(utterance.audio) - loud[-1]) / SAMPLE_RATE < 0.06
        level = np.sqrt(np.mean(utterance.audio[loud[0] : loud[-1]] ** 2))
        assert level == pytest.approx(speech.SPEECH_RMS, rel=0.15)
    assert len(said[2].audio) and not said[2].audio.any()


def test_voices_of_an_engine_are_an_agent_and_users_split_by_speaker(natural):
    splits = {s: speech.voices("hindi", "user", s) for s in ("train", "validation", "test")}
    speakers = {s: {v.speaker for v in found} for s, found in splits.items()}
    assert speakers == {"train": {"natural-ann"}, "validation": {"natural-ben"},
                        "test": {"natural-cat"}}  # fmt: skip
    two = speech.own_and_changed("x", "hindi", ["ann", "ben"])
    held_out = {v.speaker for v in two if v.split != "train"}
    assert len(held_out) == 4 and not held_out & {v.speaker for v in two if v.split == "train"}
    with pytest.raises(UserError, match="engines are natural"):
        speech.voices("hindi", engines=["flite"])


WITHOUT_TOOLS = """
import contextlib, importlib, pathlib, re, sys
sys.argv[1:] = ["--help"]
for path in sorted(pathlib.Path().glob("*.py")):
    module = importlib.import_module(path.stem)
    if re.search(r"\\brun\\(main[,)]", path.read_text(encoding="utf-8")):
        with contextlib.suppress(SystemExit):
            module.main()
            raise AssertionError(f"{path} --help does not end")
        print("helped by", path)
import speech
print(*speech.all_engines())
speech.voices("hindi", engines=["flite"])
"""


def test_every_script_does_without_the_tools(tmp_path):
    """Imports and --help of the root's files, and one line where a voice of the toy is wanted."""
    for path in ROOT.glob("*.py"):
        shutil.copy(path, tmp_path)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": ""}
    done = subprocess.run([sys.executable, "-c", WITHOUT_TOOLS], cwd=tmp_path, env=environment,
                          capture_output=True, text=True)  # fmt: skip
    assert "no speech engine 'flite'" in done.stderr.splitlines()[-1], done.stderr
    assert done.stdout.count("helped by") >= 8
    assert done.stdout.splitlines()[-1] == "indictts parler piper mms"
