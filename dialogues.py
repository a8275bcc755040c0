"""What conversations are written as: dialogue scripts, manifests of two-channel recordings, and the
code datasets that train_s2s.py reads. No speech engine, no codec, no audio.
"""

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow

import command
from command import UserError, atomic_write, check_fields, first_line, json_lines, read_json
from data import EMOTIONS, LANGUAGES, SPLITS, split_for
from phones import PHONES, clean_text

SPOKEN = tuple(language for language in LANGUAGES if language != "other")
INFO_FILE = "samvad.json"
CODEBOOKS = 8  # what the LM reads and writes
TURN_PAUSE = 0.8  # seconds: words of one speaker with a longer pause between them are two turns


@dataclass(frozen=True)
class Line:
    """One turn as written; `texts` are wordings to choose from (the agent has one)."""

    who: str
    texts: tuple[str, ...]
    emotion: str


@dataclass(frozen=True)
class Exchange:
    """One line of `conversations/<language>.jsonl`. The held-out wordings of an exchange have its
    `id` too ("-h" more in the file): a reply is right if it is that of the same exchange."""

    id: str
    language: str
    intent: str
    lines: tuple[Line, ...]
    held_out: bool = False


ANY_EMOTION = "scripts, any emotion"  # source of conversations whose words tell no emotion

_EXCHANGE_FIELDS = {"id": "text", "language": SPOKEN, "intent": "text", "turns": "list of object",
                    "held_out": "true or false?"}  # fmt: skip
_LINE_FIELDS = {"who": ("user", "agent"), "texts": "list of text?", "emotion": (*EMOTIONS, None)}


def load_scripts(path: str | Path) -> list[Exchange]:
    """The exchanges of a `.jsonl` file, or of all of a folder. UserError where one is bad."""
    path = Path(path)
    if not (files := sorted(path.glob("*.jsonl")) if path.is_dir() else [path]):
        raise UserError(f"{path}: no scripts (*.jsonl) there; check --scripts")
    found: dict[tuple, Exchange] = {}
    for file in files:
        for number, fields in json_lines(file):
            exchange = _exchange(fields, f"{file}, line {number}")
            if (key := (exchange.language, exchange.id, exchange.held_out)) in found:
                raise UserError(f"{file}: the id {exchange.id!r} is there twice")
            found[key] = exchange
    return list(found.values())


def _exchange(fields: dict, where: str) -> Exchange:
    check_fields(fields, _EXCHANGE_FIELDS, where)
    lines = tuple(_line(turn, f"{where}: turn {i}") for i, turn in enumerate(fields["turns"], 1))
    speakers = [line.who for line in lines]
    if not speakers or speakers != ["user", "agent"] * (len(speakers) // 2):
        raise UserError(f"{where}: turns must go user, agent, user, agent…")
    held_out = bool(fields.get("held_out"))
    name = fields["id"].removesuffix("-h") if held_out else fields["id"]
    return Exchange(name, fields["language"], fields["intent"], lines, held_out)


def _line(turn: dict, where: str) -> Line:
    one = turn.get("texts") is None
    check_fields(turn, _LINE_FIELDS | {"text": "text" if one else "text?"}, where)
    texts = [turn["text"]] if one else turn["texts"]
    for text in texts or [""]:
        if not any(c.isalnum() for c in clean_text(text)):
            raise UserError(f"{where}: {text!r} has nothing to say")
    return Line(turn["who"], tuple(texts), turn.get("emotion") or "neutral")


def choose_exchanges(exchanges: Iterable[Exchange], language: str, split: str,
                     intents: Sequence[str] = (),
                     archetypes: bool = False) -> list[Exchange]:  # fmt: skip
    """Training wordings for train, else held-out; `archetypes`: an intent's first, simplest."""
    mine = [e for e in exchanges if e.language == language]
    if unknown := set(intents) - {e.intent for e in mine}:
        raise UserError(f"no {language} script has intent {', '.join(sorted(unknown))}")
    mine = [e for e in mine if not intents or e.intent in intents]
    mine = [e for e in mine if not archetypes or e.id.endswith("-001")]
    if not (chosen := [e for e in mine if e.held_out == (split != "train")]):
        raise UserError(f"no {language} script left for split {split}; check --intents, --scripts")
    return chosen


@dataclass(frozen=True)
class Recording:
    """A two-channel file; `turns` as in the code dataset, possibly without the user's."""

    id: str
    path: Path
    agent_channel: int
    user_channel: int
    language: str
    source: str
    split: str
    turns: tuple


_RECORDING_FIELDS = {"id": "text?", "path": "path", "agent_channel": "whole number?",
                     "user_channel": "whole number?", "language": (*LANGUAGES, None),
                     "source": "text?", "split": (*SPLITS, None),
                     "turns": "list of object?"}  # fmt: skip
_TURN_TEXTS = ("text", "emotion", "intent", "exchange", "voice")
_TURN_FIELDS = {**dict.fromkeys(_TURN_TEXTS, "text?"), "who": ("user", "agent"), "start": "number",
                "end": "number", "emotion": (*EMOTIONS, None), "interrupted": "true or false?",
                **dict.fromkeys(("phones", "words"), "list of [text, start, end]?")}  # fmt: skip


def read_recordings(folder: str | Path, language: str = "other",
                    dropped: list[str] | None = None) -> list[Recording]:  # fmt: skip
    """Recordings of every `*.jsonl` below a folder: Samvad's lines or moshi-finetune's. Samvad:
    {id, path, agent_channel, user_channel, language, source, turns}. moshi-finetune: {path,
    duration}, with `<path>.json` {"alignments": [[word, [start, end], speaker], …]}; the left
    channel is the agent, SPEAKER_MAIN. `language`: where a line has none. A recording that is
    listed twice is taken once, and `dropped` says so. UserError names what is malformed."""
    folder = Path(folder)
    command.existing_folder(folder, "--conversations")
    found: dict[tuple, Recording] = {}
    for manifest in sorted(folder.rglob("*.jsonl")):
        for number, fields in json_lines(manifest):
            where = f"{manifest}, line {number}"
            recording = _recording(fields, manifest, folder, language, where)
            same = (recording.id, recording.path, recording.agent_channel)
            if found.setdefault(same, recording) is not recording and dropped is not None:
                dropped.append(f"{where}: the recording {recording.id!r} was there before")
    if not found:
        raise UserError(f"{folder}: no conversation manifest (*.jsonl) with lines there")
    return list(found.values())


def _recording(fields: dict, manifest: Path, root: Path, language: str, where: str) -> Recording:
    check_fields(fields, _RECORDING_FIELDS, where)
    path = manifest.parent / fields["path"]
    within = path if path.is_relative_to(root) else root / fields["path"]
    below = within.with_suffix("").relative_to(root).as_posix()
    name = fields.get("id") or command.printable(below)
    agent = fields.get("agent_channel") or 0
    user = 1 if fields.get("user_channel") is None else fields["user_channel"]
    if min(agent, user) < 0 or agent == user:
        raise UserError(f"{where}: agent_channel {agent} and user_channel {user}: two are needed")
    turns, aligned = fields.get("turns"), path.with_suffix(".json")
    if turns is None:
        turns = _turns_of_alignments(aligned) if aligned.exists() else []
    for i, turn in enumerate(turns, 1):
        check_fields(turn, _TURN_FIELDS, f"{where}: turn {i}")
        if not 0 <= turn["start"] <= turn["end"]:
            raise UserError(f"{where}: turn {i} goes from {turn['start']} to {turn['end']} s")
        if unknown := {phone for phone, _, _ in turn.get("phones") or ()} - set(PHONES):
            raise UserError(f"{where}: turn {i}: no phone {sorted(unknown)[0]!r} is known")
    source = fields.get("source") or command.printable(manifest.parent.resolve().name)
    spoken, split = fields.get("language") or language, fields.get("split") or split_for(name)
    return Recording(name, path, agent, user, spoken, source, split, tuple(turns))


def _turns_of_alignments(path: Path) -> list[dict]:
    """The turns of a moshi-finetune file, each with its words; UserError on any other file."""
    needed = '{"alignments": [[word, [start, end], speaker], …]} is needed'
    fields = read_json(path, needed)
    try:
        words = [([word, start, end], who) for word, (start, end), who in fields["alignments"]]
    except (KeyError, TypeError, ValueError):
        raise UserError(f"{path}: {needed}") from None
    for word, who in words:
        kinds = {"word": "[text, start, end]", "speaker": "text"}
        check_fields({"word": word, "speaker": who}, kinds, f"{path}: alignments")
    turns, current = [], {}
    for (word, start, end), speaker in sorted(words, key=lambda found: found[0][1]):
        who = "agent" if speaker == "SPEAKER_MAIN" else "user"
        turn = current.get(who)
        if turn is None or start - turn["end"] > TURN_PAUSE:
            turn = current[who] = {"who": who, "start": start, "end": end, "words": []}
            turns.append(turn)
        turn["end"] = max(end, turn["end"])
        turn["words"].append([word.strip(), start, end])
    return [{**turn, "text": " ".join(word for word, _, _ in turn["words"])} for turn in turns]


_SPANS = (("phones", "phone"), ("words", "word"))


def _features():
    """Columns of the code dataset. Arrow has no mixed lists: spans are structs on disk."""
    from datasets import Array2D, Features, List, Value

    text, codes = Value("string"), Array2D((None, CODEBOOKS), "uint16")
    times = dict.fromkeys(("start", "end"), Value("float32"))
    turn = {"who": text, **times, **dict.fromkeys(_TURN_TEXTS, text), "interrupted": Value("bool")}
    turn |= {column: List({name: text, **times}) for column, name in _SPANS}
    row = dict.fromkeys(("id", "language", "source", "split"), text)
    return Features({**row, "agent_codes": codes, "user_codes": codes, "turns": List(turn)})


def _turn_to_disk(turn: dict) -> dict:
    stored = {name: turn.get(name) for name in ("who", "start", "end", *_TURN_TEXTS)}
    stored["interrupted"] = bool(turn.get("interrupted"))
    for column, name in _SPANS:
        spans = turn.get(column)
        stored[column] = spans and [{name: s[0], "start": s[1], "end": s[2]} for s in spans]
    return stored


def _decode_batch(batch: dict) -> dict:
    for column in batch.keys() & {"agent_codes", "user_codes"}:
        batch[column] = [np.asarray(c, np.uint16).reshape(-1, CODEBOOKS) for c in batch[column]]
    for turn in (turn for turns in batch.get("turns", ()) for turn in turns):
        for column, name in _SPANS:
            spans = turn[column]
            turn[column] = spans and [[s[name], s["start"], s["end"]] for s in spans]
    return batch


def write_arrow(path: Path, rows: Iterable[dict]) -> None:
    """One Arrow file of rows: {id, language, source, split, agent_codes `[F, 8]`, user_codes
    `[F, 8]`, turns}; a turn is {who, start, end, text, emotion?, intent?, exchange?, voice?,
    interrupted?, phones?, words?}."""
    from datasets.arrow_writer import ArrowWriter

    with atomic_write(path) as part, ArrowWriter(path=str(part), features=_features()) as writer:
        for row in rows:
            writer.write({**row, "turns": [_turn_to_disk(turn) for turn in row["turns"]]})
        writer.finalize()


def filter_arrow(path: Path, new: Path, chosen: Sequence[bool]) -> None:
    """Writes the `chosen` rows of an Arrow file to another."""
    with pyarrow.ipc.open_stream(str(path)) as reader:
        rows = reader.read_all().filter(pyarrow.array(chosen))
    with atomic_write(new) as part, pyarrow.ipc.new_stream(str(part), rows.schema) as writer:
        writer.write_table(rows)


def finish_dataset(folder: Path, files: Sequence[str], info: dict) -> None:
    """Makes a folder of Arrow files a code dataset; `state.json` is written last. `info` needs
    codec_fingerprint, frame_rate and codebook_sizes."""
    from datasets import DatasetInfo

    DatasetInfo(features=_features()).write_to_directory(str(folder))
    write_json(folder / INFO_FILE, info)
    state = {"_data_files": [{"filename": name} for name in files], "_format_kwargs": {},
             "_fingerprint": digest(info["codec_fingerprint"], *files),
             "_output_all_columns": False,
             **dict.fromkeys(("_format_columns", "_format_type", "_split"))}  # fmt: skip
    write_json(folder / "state.json", state)


def load_code_dataset(path: str | Path, codec_fingerprint: str | None = None):
    """(Dataset, info) of a code dataset folder; a row is as `write_arrow` takes it. Codes
    come as uint16 `[F, 8]` arrays, phones and words as `[[symbol, start, end], …]` or None. The
    Arrow files stay on disk (memory-mapped). UserError where the folder is not a complete one, and
    where its codes were made by another codec than `codec_fingerprint`."""
    from datasets import load_from_disk

    folder = Path(path)
    if not (folder / "state.json").exists() or not (folder / INFO_FILE).exists():
        raise UserError(f"{folder}: no complete code dataset there; run make_conversations.py")
    try:
        info = read_json(folder / INFO_FILE)
        made_by = info["codec_fingerprint"]
        dataset = load_from_disk(str(folder))
    except Exception as error:  # Arrow and JSON each raise their own kinds on damaged files
        reason = f"damaged code dataset ({first_line(error)}); make it anew"
        raise UserError(f"{folder}: {reason}") from error
    if codec_fingerprint not in (None, made_by):
        codecs = f"dataset {made_by[:16]}…, codec {codec_fingerprint[:16]}…"
        raise UserError(f"{folder}: codes of another codec: {codecs}; make it anew with this one")
    return dataset.with_transform(_decode_batch), info


def write_json(path: Path, value: dict) -> None:
    command.write_text(path, json.dumps(value, indent=1) + "\n")


def digest(*values: object) -> str:
    return hashlib.sha256(command.printable(repr(values)).encode()).hexdigest()[:20]
