"""Wire formats: what the documents of their owners say, and messages that nobody should send."""

from __future__ import annotations

import base64
import fractions
import json
import random

import numpy as np
import pytest
from test_duplex import tone

from protocols import (
    PROTOCOLS,
    MoshiChat,
    OpenAIRealtime,
    Protocol,
    ProtocolError,
    RawPCM,
    Telephone,
    to_pcm16,
)

RATE, PATCH = 24000, 960
READY = {"type": "ready", "call": "secret"}


def patches(audio: np.ndarray) -> np.ndarray:
    return audio[: len(audio) // PATCH * PATCH].reshape(-1, PATCH)


def speech(who: str, speaking: bool) -> dict:
    return {"type": "speech", "who": who, "speaking": speaking}


def text(words: str, who: str = "agent") -> dict:
    return {"type": "text", "who": who, "text": words, "turn": 1}


def loaded(messages: list) -> list[dict]:
    return [json.loads(message) for message in messages]


def told(protocol: Protocol) -> list:
    """What waits to be sent, taken out."""
    messages, protocol.out = protocol.out, []
    return messages


def said(protocol: Protocol, audio, *events) -> list:
    protocol.send(audio, events)
    return told(protocol)


def ignored(protocol: Protocol, message) -> bool:
    return protocol.receive(message) is None and not protocol.out


def refused(protocol: Protocol, message) -> int:
    with pytest.raises(ProtocolError) as caught:
        protocol.receive(message)
    assert str(caught.value) and "\n" not in str(caught.value)
    return caught.value.code


def likeness(one: np.ndarray, other: np.ndarray) -> float:
    """The largest correlation of two signals at any shift up to 50 ms."""
    n = min(len(one), len(other)) - 1200
    products = [other[k : k + n] @ one[:n] for k in range(1200)]
    k = int(np.argmax(products))
    return products[k] / np.linalg.norm(one[:n]) / np.linalg.norm(other[k : k + n])


# --------------------------------------------------------------------------------------- JSON


@pytest.mark.parametrize(
    "message",
    ["", "{", "[]", "3", "null", '"a"', '{"type": 3}', '{"type": null}', "{}", '{"a": NaN}',
     '{"type": "a", "b": Infinity}', '{"type": "a", "b": -Infinity}', "[" * 10**5, '{"a":' * 10**5,
     '{"type": ' + "9" * 10**4 + "}", '{"type": "\\ud800"}'],
)  # fmt: skip
def test_what_is_no_event_is_refused_with_a_code(message):
    assert refused(RawPCM({}), message) == 1007


# ---------------------------------------------------------------------------------------- PCM


def test_pcm_passes_audio_and_events_unchanged():
    protocol = RawPCM({})
    assert loaded(said(protocol, None, READY)) == [READY]
    audio = tone(0.04)
    heard = protocol.receive(to_pcm16(audio))
    np.testing.assert_allclose(heard, audio, atol=1e-4)
    sent = said(protocol, audio, text("a"), speech("agent", True))
    assert loaded(sent[:2]) == [text("a"), speech("agent", True)] and len(sent[2]) == 2 * PATCH
    assert refused(protocol, b"abc") == 1007
    assert ignored(protocol, '{"type": "from the future"}')
    for name in (7, 0.5, "seven"):
        protocol.receive(json.dumps({"type": "ping", "id": name}))
        assert loaded(told(protocol)) == [{"type": "pong", "id": name}]
    protocol.receive(json.dumps({"type": "ping", "id": "x" * 10**6}))
    assert len(told(protocol)[0]) < 200
    assert refused(protocol, '{"type": "emotion", "emotion": 3}') == 1007
    request = {"type": "emotion", "emotion": "happy", "strength": 2.0}
    assert protocol.receive(json.dumps(request)) == request


# -------------------------------------------------------------------------------------- Moshi


def test_moshi_handshake_opus_and_text():
    sphn = pytest.importorskip("sphn")
    protocol, audio = MoshiChat({"voice_prompt": "NATF2.pt", "text_prompt": "x"}), tone(1.0)
    assert said(protocol, None, READY) == [b"\x00"] and not protocol.rejoins
    writer, reader = sphn.OpusStreamWriter(RATE), sphn.OpusStreamReader(RATE)
    heard = [protocol.receive(b"\x01" + writer.append_pcm(part)) for part in patches(audio)]
    assert likeness(audio, np.concatenate(heard)) > 0.99
    sent = [said(protocol, part, text(" ja"), text("no", "user")) for part in patches(audio)]
    assert all(words == b"\x02 ja" and pages[0] == 1 for words, pages in sent)
    back = np.concatenate([reader.append_bytes(pages[1:]) for _, pages in sent])
    assert likeness(audio, back) > 0.99
    assert said(protocol, None, {"type": "error", "message": "full"}) == [b"\x05full"]
    for kind in (0, 2, 3, 4, 5, 6):
        assert ignored(protocol, bytes([kind]) + b"\xff")


def test_moshi_gives_its_rejoin_token_to_those_who_ask():
    pytest.importorskip("sphn")
    protocol = MoshiChat({"call": ""})
    handshake, metadata = said(protocol, None, READY)
    assert handshake == b"\x00" and metadata[0] == 4 and json.loads(metadata[1:]) == READY
    assert protocol.rejoins


def test_moshi_refuses_what_is_not_opus():
    pytest.importorskip("sphn")
    assert refused(MoshiChat({}), b"\x01" + bytes(100)) == 1007
    assert refused(MoshiChat({}), b"\x07") == 1003
    assert refused(MoshiChat({}), b"") == 1003
    assert refused(MoshiChat({}), "text") == 1003
    assert refused(MoshiChat({}), b"\x01" + bytes(9000)) == 1009


# ------------------------------------------------------------------------------------- OpenAI


def realtime_turn() -> list[dict]:
    """The messages of one turn of the user and the agent's answer."""
    protocol, silent, loud = OpenAIRealtime({}), np.zeros(PATCH, "f"), tone(0.04)
    protocol.send(silent, [READY])
    protocol.send(silent, [speech("user", True), text("hel", "user")])
    protocol.send(silent, [text("lo", "user"), speech("user", False), text(" Good")])
    protocol.send(loud, [speech("agent", True), text(" day")])
    protocol.send(loud, [])
    protocol.send(silent, [speech("agent", False)])
    return loaded(told(protocol))


def test_realtime_events_of_a_turn_come_in_the_documented_order():
    messages = realtime_turn()
    assert [m["type"] for m in messages] == [
        "session.created",
        "input_audio_buffer.speech_started",
        "input_audio_buffer.speech_stopped",
        "input_audio_buffer.committed",
        "conversation.item.added",
        "conversation.item.done",
        "conversation.item.input_audio_transcription.completed",
        "response.created",
        "response.output_item.added",
        "conversation.item.added",
        "response.content_part.added",
        "response.output_audio_transcript.delta",
        "response.output_audio_transcript.delta",
        "response.output_audio.delta",
        "response.output_audio.delta",
        "response.output_audio.done",
        "response.output_audio_transcript.done",
        "response.content_part.done",
        "response.output_item.done",
        "conversation.item.done",
        "response.done",
    ]
    by = {m["type"]: m for m in messages}
    assert len({m["event_id"] for m in messages}) == len(messages)
    assert by["input_audio_buffer.speech_started"]["audio_start_ms"] == 40
    assert by["input_audio_buffer.speech_stopped"]["audio_end_ms"] == 80
    heard = by["conversation.item.input_audio_transcription.completed"]
    assert heard["transcript"] == "hello"
    assert by["response.output_audio_transcript.done"]["transcript"] == " Good day"
    delta = base64.b64decode(by["response.output_audio.delta"]["delta"])
    assert delta == to_pcm16(tone(0.04))
    assert by["response.done"]["response"]["status"] == "completed"
    item = by["response.done"]["response"]["output"][0]
    assert item["role"] == "assistant" and item["content"][0]["transcript"] == " Good day"


def test_realtime_answers_what_clients_ask():
    protocol, audio = OpenAIRealtime({}), tone(0.04)

    def asked(**event) -> list:
        assert protocol.receive(json.dumps(event)) is None
        return [m["type"] for m in loaded(told(protocol))]

    appended = {"type": "input_audio_buffer.append"}
    appended["audio"] = base64.b64encode(to_pcm16(audio)).decode()
    np.testing.assert_allclose(protocol.receive(json.dumps(appended)), audio, atol=1e-4)
    session = {"type": "realtime", "instructions": "be kind"}
    session["audio"] = {"input": {"turn_detection": None}}
    assert asked(type="session.update", session=session) == ["session.updated"]
    item = {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "x"}]}
    added = ["conversation.item.added", "conversation.item.done"]
    assert asked(type="conversation.item.create", item=item) == added
    cut = {"item_id": "item_1", "content_index": 0, "audio_end_ms": 10}
    assert asked(type="conversation.item.truncate", **cut) == ["conversation.item.truncated"]
    assert asked(type="input_audio_buffer.clear") == ["input_audio_buffer.cleared"]
    for kind in ("input_audio_buffer.commit", "response.create", "response.cancel"):
        assert asked(type=kind) == []
    assert asked(type="conversation.item.retrieve") == ["error"]
    g711 = {"audio": {"output": {"format": {"type": "audio/pcmu"}}}}
    assert refused(protocol, json.dumps({"type": "session.update", "session": g711})) == 1003
    assert refused(protocol, json.dumps({**appended, "audio": "!"})) == 1007
    assert refused(protocol, b"binary") == 1003


def test_realtime_in_a_call_rejoined_in_the_middle_of_a_turn():
    protocol = OpenAIRealtime({})
    assert said(protocol, tone(0.04), text(" x"), speech("agent", False)) == []
    assert said(protocol, tone(0.04), speech("user", False)) == []


def test_realtime_events_are_those_of_the_openai_package():
    """Each is built by the class that the package has for it, which names its fields."""
    types = pytest.importorskip("openai.types.realtime")
    from pydantic import TypeAdapter

    known = TypeAdapter(types.RealtimeServerEvent)
    for message in realtime_turn():
        event = known.validate_python(message)
        assert event.type == message["type"]


# ---------------------------------------------------------------------------------- telephone

TWILIO = {
    "event": "start", "sequenceNumber": "1", "streamSid": "MZ1",
    "start": {
        "accountSid": "AC1", "streamSid": "MZ1", "callSid": "CA1", "tracks": ["inbound"],
        "mediaFormat": {"encoding": "audio/x-mulaw", "sampleRate": 8000, "channels": 1},
        "customParameters": {"token": "open sesame"},
    },
}  # fmt: skip
EXOTEL = {
    "event": "start", "sequence_number": 1, "stream_sid": "ex1",
    "start": {
        "stream_sid": "ex1", "call_sid": "c1", "account_sid": "a1", "from": "0801", "to": "0802",
        "custom_parameters": {}, "media_format": {
            "encoding": "base64", "sample_rate": "8000", "bit_rate": "128kbps"
        },
    },
}  # fmt: skip
PLIVO = {
    "event": "start", "sequenceNumber": 1, "start": {
        "callId": "c1", "streamId": "pl1", "accountId": "MA1", "tracks": ["inbound"],
        "mediaFormat": {"encoding": "audio/x-l16", "sampleRate": 16000},
    }, "extra_headers": "{}",
}  # fmt: skip


def g711(data: bytes, encode: bool = False) -> bytes:
    """mu-law by FFmpeg, as telephone networks have it; PCM16 on the other side."""
    av = pytest.importorskip("av")
    coder = av.CodecContext.create("pcm_mulaw", "w" if encode else "r")
    coder.sample_rate, coder.layout, coder.format = 8000, "mono", "s16"
    if not encode:
        return b"".join(
            f.to_ndarray().astype("<i2").tobytes() for f in coder.decode(av.Packet(data))
        )
    coder.time_base = fractions.Fraction(1, 8000)
    frame = av.AudioFrame.from_ndarray(np.frombuffer(data, "<i2")[None], "s16", "mono")
    frame.sample_rate = 8000
    return b"".join(map(bytes, [*coder.encode(frame), *coder.encode(None)]))


def telephone(start: dict) -> Telephone:
    protocol = Telephone({})
    protocol.receive(json.dumps({"event": "connected", "protocol": "Call", "version": "1.0.0"}))
    assert not protocol.started
    protocol.receive(json.dumps(start))
    assert protocol.started and not protocol.rejoins
    return protocol


def slow_tone(rate: int) -> np.ndarray:
    t = np.arange(2 * rate) / rate
    return (0.4 * np.sin(2 * np.pi * (200 + 150 * t) * t)).astype("f")


def media(payload: bytes, **where) -> str:
    return json.dumps({"event": "media", **where, "media": {
        "track": "inbound", "chunk": "2", "timestamp": "5",
        "payload": base64.b64encode(payload).decode()}})  # fmt: skip


@pytest.mark.parametrize(
    ("start", "rate", "ulaw", "kind", "key", "stream"),
    [(TWILIO, 8000, True, "media", "streamSid", "MZ1"),
     (EXOTEL, 8000, False, "media", "stream_sid", "ex1"),
     (PLIVO, 16000, False, "playAudio", "streamId", "pl1")],
    ids=["twilio", "exotel", "plivo"],
)  # fmt: skip
def test_a_telephone_call_is_heard_and_answered(start, rate, ulaw, kind, key, stream):
    protocol, spoken = telephone(start), slow_tone(rate)
    pcm = to_pcm16(spoken)
    wire = g711(pcm, encode=True) if ulaw else pcm
    step = rate // 50 * (1 if ulaw else 2)
    parts = [wire[start : start + step] for start in range(0, len(wire), step)]
    heard = [protocol.receive(media(part, **{key: stream})) for part in parts]
    assert likeness(slow_tone(RATE), np.concatenate(heard)) > 0.995
    sent = loaded(sum((said(protocol, part) for part in patches(slow_tone(RATE))), []))
    assert all(m["event"] == kind and m[key] == stream for m in sent)
    payloads = [base64.b64decode(m["media"]["payload"]) for m in sent]
    if start is EXOTEL:
        assert all(len(p) >= 3200 and len(p) % 320 == 0 for p in payloads)
    if start is PLIVO:
        assert all(m["media"]["contentType"] == "audio/x-l16" for m in sent)
    back = b"".join(payloads)
    back = np.frombuffer(g711(back) if ulaw else back, "<i2") / 32768
    assert likeness(spoken, back.astype("f")) > 0.995


def test_marks_clears_and_the_end_of_a_telephone_call():
    protocol = telephone(TWILIO)
    assert protocol.token == "open sesame"
    assert said(protocol, None, speech("agent", True), text("a")) == []
    mark = {"event": "mark", "mark": {"name": "turn 1"}, "streamSid": "MZ1"}
    assert loaded(said(protocol, None, speech("agent", False))) == [mark]
    said(protocol, None, speech("agent", True), speech("user", True))
    clear, mark = loaded(said(protocol, None, speech("agent", False)))
    assert clear == {"event": "clear", "streamSid": "MZ1"} and mark["mark"]["name"] == "turn 2"
    outbound = {"event": "media", "media": {"track": "outbound", "payload": "AAAA"}}
    digit = {"event": "dtmf", "dtmf": {"digit": "1"}}
    for event in (outbound, {"event": "mark", "mark": {}}, digit):
        assert ignored(protocol, json.dumps(event))
    assert protocol.receive('{"event": "stop"}') == {"type": "stop"}
    assert refused(protocol, media(b"").replace('"payload": ""', '"payload": 3')) == 1007
    assert refused(protocol, b"\x00") == 1003
    plivo = telephone(PLIVO)
    said(plivo, None, speech("agent", True), speech("user", True))
    assert [m["event"] for m in loaded(said(plivo, None, speech("agent", False)))] == [
        "clearAudio", "checkpoint"
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("start", "code"),
    [({"start": {}}, 1007), ({"start": 3}, 1007), ({"start": {"streamSid": 3}}, 1007),
     ({"start": {"streamSid": "a", "mediaFormat": 3}}, 1007),
     ({"start": {"streamSid": "a", "customParameters": [1]}}, 1007),
     ({"start": {"stream_sid": "a", "media_format": {"sample_rate": 44100}}}, 1003)],
)  # fmt: skip
def test_a_start_message_that_cannot_be_met_is_refused(start, code):
    assert refused(Telephone({}), json.dumps({"event": "start", **start})) == code


# --------------------------------------------------------------------------------------- fuzz


def hostile(seed: int, count: int):
    """Random bytes, JSON of wrong types, real messages cut short or spoilt."""
    rng = random.Random(seed)
    kinds = ["start", "emotion", "language", "ping", "stop", "media", "mark", "connected",
             "session.update", "input_audio_buffer.append", "conversation.item.create",
             "conversation.item.truncate", "response.create"]  # fmt: skip
    keys = ["type", "event", "audio", "session", "item", "start", "media", "payload", "streamSid",
            "id", "emotion", "mediaFormat", "customParameters", "format", "input", "track",
            "item_id", "content_index", "audio_end_ms", "instructions", "sampleRate"]  # fmt: skip

    def value(depth: int):
        leaves = [None, True, -1, 2**70, 1e308, "", "a", "\ud800", "AAAA", "x" * 999, "happy"]
        leaves += kinds
        if depth and rng.random() < 0.5:
            return {rng.choice(keys): value(depth - 1) for _ in range(rng.randrange(5))}
        return [value(depth - 1)] if depth and rng.random() < 0.2 else rng.choice(leaves)

    for _ in range(count):
        event = {k: value(3) for k in rng.sample(keys, rng.randrange(6))}
        event |= {rng.choice(["type", "event"]): rng.choice(kinds)}
        words = json.dumps(rng.choice([event, value(2)]))
        spoilt = words.replace("-1", rng.choice(["NaN", "Infinity", "1e999", "0" * 5]))
        whole = rng.randbytes(rng.choice([0, 1, 2, 3, 27, 960, 5000]))
        ogg = bytes([rng.randrange(9)]) + b"OggS" + whole
        yield rng.choice([words, words[: rng.randrange(len(words) + 1)], spoilt, whole, ogg])


@pytest.mark.parametrize("path", PROTOCOLS)
def test_whatever_comes_is_taken_or_refused_with_a_code(path):
    pytest.importorskip("sphn")
    codes, taken = set(), 0
    for seed in range(60):
        protocol = PROTOCOLS[path]({})
        for message in hostile(seed, 40):
            try:
                audio = protocol.receive(message)
            except ProtocolError as error:
                codes.add(error.code)
                continue
            taken += 1
            assert audio is None or isinstance(audio, dict) or np.isfinite(audio).all()
            assert all(len(m if isinstance(m, bytes) else m.encode()) < 5000 for m in protocol.out)
            if protocol.started:
                protocol.send(np.zeros(PATCH, np.float32), [speech("agent", True), text("a")])
    assert taken and codes <= {1003, 1007, 1009} and 1007 in codes
