"""The written dialogue scripts: what the data builder and the evaluation rely on."""

from __future__ import annotations

import json
import re
import unicodedata
from collections import Counter, defaultdict
from functools import cache
from itertools import combinations
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parent.parent / "conversations"
CODES = {"english": "en", "hindi": "hi", "telugu": "te"}
INTENTS = (
    "greeting", "name", "how_are_you", "time", "day", "weather", "sums", "capitals", "colours",
    "counting", "repeat", "small_talk", "comfort", "good_news", "not_understood", "thanks",
    "goodbye",
)  # fmt: skip
EMPATHY = "empathy"  # sad readings are 101…, glad readings of the same words 201…
MIN_PAIRS = 40
EMOTIONS = ("neutral", "happy", "sad", "angry", "fear", "disgust", "surprise", "calm")

MIN_EXCHANGES = 150
MIN_WORDINGS = 4
MIN_ARCHETYPE_WORDINGS = 10
MIN_ARCHETYPE_HELD_OUT = 3
MAX_REPLY_WORDS = 14

# Letters and marks of one script only: a digit, an abbreviation sign or a foreign letter would be
# read aloud differently by every speech engine. The joiners shape Indic clusters.
JOINERS = "\u200c\u200d"
SCRIPTS = {
    "english": re.compile(r"[A-Za-z ,.?!'\-]+"),
    "hindi": re.compile(rf"[\u0900-\u0965\u0971-\u097f{JOINERS} ,.?!'\-]+"),
    "telugu": re.compile(rf"[\u0c00-\u0c65{JOINERS} ,.?!'\-]+"),
}


@cache
def _read(language: str) -> tuple[dict, ...]:
    lines = (FOLDER / f"{language}.jsonl").read_text(encoding="utf-8").splitlines()
    return tuple(json.loads(line) for line in lines)


@pytest.fixture(params=CODES)
def language(request) -> str:
    if not (FOLDER / f"{request.param}.jsonl").exists():
        pytest.skip(f"conversations/{request.param}.jsonl is not written yet")
    return request.param


def _training(language: str) -> list[dict]:
    return [item for item in _read(language) if not item.get("held_out")]


def _held_out(language: str) -> list[dict]:
    return [item for item in _read(language) if item.get("held_out")]


def _turns(item: dict, who: str) -> list[dict]:
    return [turn for turn in item["turns"] if turn["who"] == who]


def _plain(text: str) -> str:
    """Wording as it is heard: no case, no punctuation."""
    heard = (c for c in text if c not in JOINERS + "'")
    spaced = (c if unicodedata.category(c)[0] in "LM" else " " for c in heard)
    return " ".join("".join(spaced).casefold().split())


def _opening(item: dict) -> list[str]:
    return [_plain(text) for text in _turns(item, "user")[0]["texts"]]


def _phrases(wording: str) -> set[str]:
    """All runs of one to three words."""
    words = wording.split()
    return {
        " ".join(words[start : start + length])
        for length in (1, 2, 3)
        for start in range(len(words) - length + 1)
    }


def _contains(wording: str, key: str) -> bool:
    # An ending may follow the key: Hindi and Telugu inflect their nouns.
    return f" {key}" in f" {wording}"


def test_all_three_languages_are_there():
    missing = [name for name in CODES if not (FOLDER / f"{name}.jsonl").exists()]
    assert not missing


def test_schema(language):
    for item in _read(language):
        where = item["id"]
        assert set(item) <= {"id", "language", "intent", "turns", "held_out"}, where
        assert item["language"] == language, where
        assert item["intent"] in (*INTENTS, EMPATHY), where
        assert item.get("held_out", True) is True, where
        tail = "-h" if item.get("held_out") else ""
        assert re.fullmatch(rf"{CODES[language]}-{item['intent']}-\d{{3}}{tail}", where), where
        for turn in item["turns"]:
            said = "texts" if turn["who"] == "user" else "text"
            assert set(turn) == {"who", said, "emotion"}, where
            assert turn["emotion"] in EMOTIONS, where
            assert isinstance(turn[said], list if said == "texts" else str), where


def test_ids_are_unique(language):
    counts = Counter(item["id"] for item in _read(language))
    assert not [name for name, count in counts.items() if count > 1]


def test_turns_alternate_and_end_with_the_agent(language):
    for item in _read(language):
        who = [turn["who"] for turn in item["turns"]]
        assert who and who == ["user", "agent"] * (len(who) // 2), item["id"]


def test_enough_exchanges_in_every_intent(language):
    counts = Counter(item["intent"] for item in _training(language))
    assert sum(counts.values()) >= MIN_EXCHANGES
    assert [name for name in INTENTS if counts[name] < 3] == []
    assert any(len(item["turns"]) >= 4 for item in _training(language))


def test_both_sides_show_several_emotions(language):
    for who in ("user", "agent"):
        shown = {turn["emotion"] for item in _training(language) for turn in _turns(item, who)}
        assert len(shown) >= 4, (who, shown)


def test_every_question_has_several_wordings(language):
    for item in _training(language):
        for turn in _turns(item, "user"):
            wordings = {_plain(text) for text in turn["texts"]}
            assert len(wordings) == len(turn["texts"]), f"{item['id']}: a wording twice"
            assert len(wordings) >= MIN_WORDINGS, item["id"]


def test_only_the_native_script(language):
    for item in _read(language):
        for turn in item["turns"]:
            for text in turn.get("texts", [turn.get("text")]):
                assert SCRIPTS[language].fullmatch(text), f"{item['id']}: {text!r}"
                assert text == unicodedata.normalize("NFC", text), f"{item['id']}: not NFC"
                assert text == " ".join(text.split()), f"{item['id']}: stray spaces in {text!r}"


def test_replies_are_short(language):
    for item in _training(language):
        for turn in _turns(item, "agent"):
            assert 1 <= len(_plain(turn["text"]).split()) <= MAX_REPLY_WORDS, item["id"]


def test_a_wording_gets_one_reply_only(language):
    """The same question, said alike, must not be taught two different replies."""
    owners = defaultdict(set)
    for item in _read(language):
        tone = item["turns"][0]["emotion"] if item["intent"] == EMPATHY else None
        for wording in ((wording, tone) for wording in _opening(item)):
            # A longer exchange may open as a short one does, if it gets the same first reply.
            owners[wording].add(item["turns"][1]["text"])
    assert {wording: texts for wording, texts in owners.items() if len(texts) > 1} == {}


def test_sad_and_glad_readings_of_the_same_words_get_different_replies(language):
    items = {item["id"]: item for item in _read(language) if item["intent"] == EMPATHY}
    pairs = [name for name in items if re.search(r"-1\d\d(-h)?$", name)]
    assert len([name for name in pairs if not name.endswith("-h")]) >= MIN_PAIRS
    assert len(items) == 2 * len(pairs)
    for name in pairs:
        sad, glad = (items[name.replace("-1", f"-{digit}")] for digit in "12")
        assert sad["turns"][0]["texts"] == glad["turns"][0]["texts"], name
        assert [item["turns"][0]["emotion"] for item in (sad, glad)] == ["sad", "happy"], name
        assert sad["turns"][1]["text"] != glad["turns"][1]["text"], name


def test_held_out_wordings_are_never_trained_on(language):
    trained = {
        _plain(text)
        for item in _training(language)
        for turn in _turns(item, "user")
        for text in turn["texts"]
    }
    for item in _held_out(language):
        for turn in _turns(item, "user"):
            assert turn["texts"], item["id"]
            leaked = [text for text in turn["texts"] if _plain(text) in trained]
            assert not leaked, f"{item['id']}: {leaked}"


def test_held_out_lines_differ_from_their_exchange_in_wording_only(language):
    held = {item["id"].removesuffix("-h"): item for item in _held_out(language)}
    base = {item["id"]: item for item in _training(language)}
    assert set(held) == set(base)
    for name, item in base.items():
        twin = held[name]
        assert _turns(twin, "agent") == _turns(item, "agent"), name
        emotions = [turn["emotion"] for turn in item["turns"]]
        assert [turn["emotion"] for turn in twin["turns"]] == emotions, name


def test_archetypes_are_well_covered(language):
    items = {item["id"]: item for item in _read(language)}
    replies = set()
    for intent in INTENTS:
        name = f"{CODES[language]}-{intent}-001"
        assert len(items[name]["turns"]) == 2, name
        assert len(set(_opening(items[name]))) >= MIN_ARCHETYPE_WORDINGS, name
        assert len(set(_opening(items[f"{name}-h"]))) >= MIN_ARCHETYPE_HELD_OUT, name
        replies.add(_plain(items[name]["turns"][1]["text"]))
    assert len(replies) == len(INTENTS)


def test_archetypes_are_told_apart_by_one_or_two_key_phrases(language):
    """One or two phrases, absent from all other archetypes, cover every wording of each.

    Each must occur in two training wordings at least, so that it is learnt and not an exception.
    Hindi and Telugu do not meet it yet; which intents fail is said, not hidden.
    """
    items = {item["id"]: item for item in _read(language)}
    wordings, trained = {}, {}
    for intent in INTENTS:
        name = f"{CODES[language]}-{intent}-001"
        trained[intent] = _opening(items[name])
        wordings[intent] = trained[intent] + _opening(items[f"{name}-h"])
    uncovered = []
    for intent, own in wordings.items():
        others = [text for name, texts in wordings.items() if name != intent for text in texts]
        keys = {
            key
            for text in own
            for key in _phrases(text)
            if not any(_contains(other, key) for other in others)
            and sum(_contains(known, key) for known in trained[intent]) >= 2
        }
        covers = {frozenset(i for i, text in enumerate(own) if _contains(text, k)) for k in keys}
        whole = frozenset(range(len(own)))
        if whole not in covers and not any(a | b == whole for a, b in combinations(covers, 2)):
            uncovered.append(intent)
    if uncovered and language != "english":
        pytest.xfail(f"{language}: not told apart by one or two phrases: {', '.join(uncovered)}")
    assert uncovered == []
