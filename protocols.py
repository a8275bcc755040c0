"""Wire formats of the server: each turns a client's messages into audio and requests, and replies
into messages. They know nothing of sockets, slots or models.

Events are JSON objects whose `type` says what they are; `/api/pcm` sends them as they are. Audio is
24 kHz mono float32 in [-1, 1], `T` samples, or PCM16, which is 16-bit little-endian.
"""

from __future__ import annotations

import base64
import io
import itertools
import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from audio import SAMPLE_RATE
from command import UserError, check_fields
from ledger import StreamResampler

Message = bytes | str
MAX_ECHO = 100  # characters of a client's own that go back to it


class ProtocolError(Exception):
    """What a client did wrong; `code` is the WebSocket's close code."""

    def __init__(self, code: int, message: str):
        super().__init__(message)
        self.code = code


def from_json(message: Message, /, **kinds: str) -> dict:
    """The JSON object in a text message, its fields of these `kinds` (of `check_fields`).

    Raises `ProtocolError` where it is none, for NaN and Infinity too, which JSON does not have.
    """
    if not isinstance(message, str):
        raise ProtocolError(1003, "a binary message where JSON text is needed")
    try:
        event = json.loads(message, parse_constant=lambda name: float("no number"))
    except (ValueError, RecursionError):
        raise ProtocolError(1007, "a message is not JSON") from None
    if not isinstance(event, dict):
        raise ProtocolError(1007, "a message is not a JSON object")
    return fields(event, **kinds)


def fields(event: dict, /, **kinds: str) -> dict:
    """The event, its fields checked; `ProtocolError` names the first wrong one."""
    try:
        check_fields(event, kinds, str(event.get("type", "message"))[:40])
    except UserError as error:
        raise ProtocolError(1007, str(error)[:100]) from None
    return event


def from_base64(text: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except ValueError:
        raise ProtocolError(1007, "audio is not base64") from None


def from_pcm16(data: bytes) -> np.ndarray:
    if len(data) % 2:
        raise ProtocolError(1007, "16-bit samples, but an odd number of bytes")
    return np.frombuffer(data, "<i2").astype(np.float32) / 32768.0


def to_pcm16(audio: np.ndarray) -> bytes:
    return (np.clip(audio, -1.0, 1.0) * 32767.0).astype("<i2").tobytes()


class Protocol:
    """A wire format as the server sees it. What is to be sent gathers in `out`, what a client asks
    for in `requests`, as events. `query`: the parameters of the client's URL."""

    rejoins = True  # whether its clients learn the token with which to come back
    started = True  # False until a client has said who it is in a message
    token: str | None = None  # what that message held

    def __init__(self, query: Mapping[str, str]):
        self.query, self.out, self.requests = query, [], []

    def greet(self, ready: dict) -> None:
        """A client has a call; `ready` is the event of that name."""

    def receive(self, message: Message) -> np.ndarray | None:
        """The audio [T] in a message, if any. Raises `ProtocolError` for one of another format."""
        raise NotImplementedError

    def send(self, audio: np.ndarray | None, events: Sequence[dict]) -> None:
        """A patch of the reply [T], or none, and what happened before it."""
        raise NotImplementedError


class RawPCM(Protocol):
    """`/api/pcm`: PCM16 in binary messages, events in text messages, both ways."""

    REQUESTS = {
        "start": {"emotion": "text?", "language": "text?", "strength": "number?"},
        "emotion": {"emotion": "text?", "strength": "number?"},
        "language": {"language": "text?"}, "stop": {},
    }  # fmt: skip

    def greet(self, ready: dict) -> None:
        self.send(None, [ready])

    def receive(self, message: Message) -> np.ndarray | None:
        if isinstance(message, bytes):
            return from_pcm16(message)
        event = from_json(message, type="text")
        if event["type"] == "ping":
            name = event.get("id")
            name = name if isinstance(name, (int, float)) else str(name)[:MAX_ECHO]
            self.send(None, [{"type": "pong", "id": name}])
        elif event["type"] in self.REQUESTS:
            self.requests.append(fields(event, **self.REQUESTS[event["type"]]))

    def send(self, audio: np.ndarray | None, events: Sequence[dict]) -> None:
        self.out += [*map(json.dumps, events), *([] if audio is None else [to_pcm16(audio)])]


class MoshiChat(Protocol):
    """`/api/chat`, Moshi's: binary messages whose first byte is their kind; audio is Opus in Ogg.
    Metadata, the rejoin token among it, goes only to clients that ask for it: `?call=`."""

    HANDSHAKE, AUDIO, TEXT, CONTROL, METADATA, ERROR, PING = range(7)
    MAX_OPUS = 8192  # bytes; a packet of one byte decodes to 120 ms

    def __init__(self, query: Mapping[str, str]):
        from sphn import OpusStreamReader, OpusStreamWriter

        super().__init__(query)
        self.rejoins = "call" in query
        self._reader, self._writer = OpusStreamReader(SAMPLE_RATE), OpusStreamWriter(SAMPLE_RATE)

    def _say(self, kind: int, content: Message) -> None:
        self.out.append(bytes([kind]) + (content.encode() if isinstance(content, str) else content))

    def greet(self, ready: dict) -> None:
        self._say(self.HANDSHAKE, b"")
        if self.rejoins:
            self._say(self.METADATA, json.dumps(ready))

    def receive(self, message: Message) -> np.ndarray | None:
        if not isinstance(message, bytes) or not message or message[0] > self.PING:
            raise ProtocolError(1003, "neither audio, text nor control")
        if message[0] != self.AUDIO:
            return None
        if len(message) > self.MAX_OPUS:
            raise ProtocolError(1009, f"more than {self.MAX_OPUS} bytes of Opus in one message")
        try:
            return self._reader.append_bytes(message[1:])
        except ValueError:
            raise ProtocolError(1007, "not Opus in Ogg") from None

    def send(self, audio: np.ndarray | None, events: Sequence[dict]) -> None:
        for event in events:
            if event["type"] == "text" and event["who"] == "agent":
                self._say(self.TEXT, event["text"])
            elif event["type"] == "error":
                self._say(self.ERROR, event["message"])
        if audio is not None and (pages := self._writer.append_pcm(np.ascontiguousarray(audio))):
            self._say(self.AUDIO, pages)


class OpenAIRealtime(Protocol):
    """`/v1/realtime`: OpenAI's Realtime events by their general-availability names.

    The model takes its turns itself: turn detection, `response.create` and `response.cancel` are
    accepted and change nothing. A response is a turn of the agent, its audio sent while it lasts.
    """

    FORMAT = {"type": "audio/pcm", "rate": SAMPLE_RATE}

    def __init__(self, query: Mapping[str, str]):
        super().__init__(query)
        self._count, self._seconds = itertools.count(1), 0.0  # of input that was answered
        self._began, self._said = 0.0, {"agent": "", "user": ""}
        self._last = self._user = self._agent = self._response = None  # ids
        audio = {side: {"format": self.FORMAT} for side in ("input", "output")}
        self._session = {"type": "realtime", "object": "realtime.session", "model": "samvad"}
        self._session |= {"id": "", "output_modalities": ["audio"], "audio": audio}

    def _id(self, kind: str) -> str:
        return f"{kind}_{next(self._count)}"

    def _say(self, kind: str, **content: Any) -> None:
        self.out.append(json.dumps({"type": kind, "event_id": self._id("event"), **content}))

    def _error(self, message: str) -> None:
        error = {"type": "invalid_request_error", "code": None, "param": None, "message": message}
        self._say("error", error=error)

    def greet(self, ready: dict) -> None:
        self._session["id"] = ready["call"]
        self._say("session.created", session=self._session)

    def receive(self, message: Message) -> np.ndarray | None:
        event = from_json(message, type="text")
        kind = event["type"]
        if kind == "input_audio_buffer.append":
            return from_pcm16(from_base64(fields(event, audio="text")["audio"]))
        if kind == "session.update":
            self._check(fields(event, session="object")["session"])
            self._say("session.updated", session=self._session)
        elif kind == "conversation.item.create":
            name = fields(fields(event, item="object")["item"], id="text?").get("id")
            self._add((name or self._id("item"))[:MAX_ECHO], "user", "completed", [])
        elif kind == "conversation.item.truncate":
            where = {"content_index": "whole number", "audio_end_ms": "whole number"}
            cut = fields(event, item_id="text", **where)
            self._say("conversation.item.truncated", item_id=cut["item_id"][:MAX_ECHO],
                      **{name: min(cut[name], 2**53) for name in where})  # fmt: skip
        elif kind == "input_audio_buffer.clear":
            self._say("input_audio_buffer.cleared")
        elif kind not in ("input_audio_buffer.commit", "response.create", "response.cancel"):
            self._error(f"{kind[:MAX_ECHO]} is not supported")

    def _check(self, session: dict) -> None:
        audio = fields(session, audio="object?").get("audio") or {}
        for side in ("input", "output"):
            form = fields(audio, **{side: "object?"}).get(side) or {}
            form = fields(form, format="object?").get("format") or self.FORMAT
            if form.get("type") != "audio/pcm" or form.get("rate") not in (None, SAMPLE_RATE):
                raise ProtocolError(1003, f"only audio/pcm at {SAMPLE_RATE} Hz is supported")

    def _add(self, name: str, role: str, status: str, content: list) -> None:
        item = {"id": name, "object": "realtime.item", "type": "message", "role": role}
        item |= {"status": status, "content": content}
        for state in ("added", "done")[: 1 + (status == "completed")]:
            self._say(f"conversation.item.{state}", previous_item_id=self._last, item=item)
        self._last = name

    def send(self, audio: np.ndarray | None, events: Sequence[dict]) -> None:
        for event in events:
            if event["type"] == "error":
                self._error(event["message"])
            elif event["type"] == "dropped":
                self._seconds += event["patches"] * len(audio) / SAMPLE_RATE
            elif event["type"] == "text":
                self._said[event["who"]] += event["text"]
                if event["who"] == "agent" and self._agent:
                    self._part("output_audio_transcript.delta", delta=event["text"])
            elif event["type"] == "speech":
                user = event["who"] == "user"
                # Who rejoins in a turn has not seen its beginning, and shall not see its end.
                if event["speaking"] or (self._user if user else self._agent):
                    (self._user_turn if user else self._agent_turn)(event["speaking"])
        if audio is not None:
            self._seconds += len(audio) / SAMPLE_RATE
            if self._agent:
                self._part("output_audio.delta", delta=base64.b64encode(to_pcm16(audio)).decode())

    def _part(self, kind: str, **content: Any) -> None:
        place = {"response_id": self._response, "item_id": self._agent, "output_index": 0}
        self._say(f"response.{kind}", **place, content_index=0, **content)

    def _agent_turn(self, begins: bool) -> None:
        if begins:
            self._response, self._agent = self._id("resp"), self._id("item")
        said, status = self._said["agent"], "in_progress" if begins else "completed"
        content = [] if begins else [{"type": "output_audio", "transcript": said}]
        item = {"id": self._agent, "object": "realtime.item", "type": "message"}
        item |= {"role": "assistant", "status": status, "content": content}
        response = {"id": self._response, "object": "realtime.response", "status": status}
        response |= {"output": [] if begins else [item]}
        place = {"response_id": self._response, "output_index": 0, "item": item}
        if begins:
            self._say("response.created", response=response)
            self._say("response.output_item.added", **place)
            self._add(self._agent, "assistant", status, [])
            self._part("content_part.added", part={"type": "audio", "transcript": ""})
            if said:
                self._part("output_audio_transcript.delta", delta=said)
            return
        self._part("output_audio.done")
        self._part("output_audio_transcript.done", transcript=said)
        self._part("content_part.done", part={"type": "audio", "transcript": said})
        self._say("response.output_item.done", **place)
        self._say("conversation.item.done", previous_item_id=None, item=item)
        self._say("response.done", response=response)
        self._agent, self._said["agent"] = None, ""

    def _user_turn(self, begins: bool) -> None:
        now, buffer = round(self._seconds * 1000), "input_audio_buffer"
        if begins:
            self._began, self._user = self._seconds, self._id("item")
            self._say(f"{buffer}.speech_started", audio_start_ms=now, item_id=self._user)
            return
        said, self._said["user"] = self._said["user"], ""
        self._say(f"{buffer}.speech_stopped", audio_end_ms=now, item_id=self._user)
        self._say(f"{buffer}.committed", previous_item_id=self._last, item_id=self._user)
        content = [{"type": "input_audio", "transcript": said}]
        self._add(self._user, "user", "completed", content)
        usage = {"type": "duration", "seconds": round(self._seconds - self._began, 3)}
        self._say("conversation.item.input_audio_transcription.completed", item_id=self._user,
                  content_index=0, transcript=said, usage=usage)  # fmt: skip


class Telephone(Protocol):
    """`/telephone`: the JSON media streams of Twilio, Exotel and Plivo.

    8 kHz mu-law or, as their start message says, PCM16 of up to 24 kHz. Who cannot send a header
    gives the token as a custom parameter `token`.
    """

    rejoins, started = False, False
    STREAM_ID = {"streamSid": "twilio", "stream_sid": "exotel", "streamId": "plivo"}
    EXOTEL_BYTES = 3200  # it takes no less at once, and multiples of 320
    _provider, _place, _waits, _turns, _barged_in = "", {}, b"", 0, False

    def receive(self, message: Message) -> np.ndarray | None:
        event = from_json(message, event="text")
        if event["event"] == "start" and not self.started:
            self._start(event, fields(event, start="object")["start"])
        elif event["event"] == "media" and self.started:
            media = fields(fields(event, media="object")["media"], payload="text")
            if media.get("track", "inbound") == "inbound":
                return self._decode(from_base64(media["payload"]))
        elif event["event"] == "stop":
            self.requests.append({"type": "stop"})

    def _start(self, event: dict, start: dict) -> None:
        place = {k: {**event, **start}[k] for k in self.STREAM_ID if k in event or k in start}
        if not place or not isinstance(next(iter(place.values())), str):
            raise ProtocolError(1007, "a start message without the id of its stream")
        form, extra = (
            fields(start, **{a: "object?", b: "object?"}).get(a) or start.get(b) or {}
            for a, b in (("mediaFormat", "media_format"), ("customParameters", "custom_parameters"))
        )
        rate, self._encoding = form.get("sampleRate", form.get("sample_rate")), form.get("encoding")
        self._place = dict([next(iter(place.items()))])
        self._provider = self.STREAM_ID[next(iter(place))]
        self._ulaw = self._provider == "twilio" or "mulaw" in str(self._encoding).lower()
        if str(rate or 8000) not in ("8000", *(() if self._ulaw else ("16000", "24000"))):
            raise ProtocolError(1003, f"audio at {str(rate)[:20]} Hz is not supported")
        self._rate = int(rate or 8000)
        self._in = StreamResampler(self._rate, SAMPLE_RATE)
        self._out = StreamResampler(SAMPLE_RATE, self._rate)
        token = extra.get("token")
        self.token, self.started = token if isinstance(token, str) else None, True

    def _decode(self, data: bytes) -> np.ndarray:
        if not self._ulaw or not data:
            return self._in(from_pcm16(data))
        import soundfile  # not at the top: a client of raw PCM may lack it

        raw = {"samplerate": self._rate, "channels": 1, "format": "RAW", "subtype": "ULAW"}
        return self._in(soundfile.read(io.BytesIO(data), dtype="float32", **raw)[0])

    def _encode(self, audio: np.ndarray) -> bytes:
        audio = np.clip(self._out(audio), -1.0, 1.0)
        if not self._ulaw:
            return to_pcm16(audio)
        import soundfile

        file = io.BytesIO()
        soundfile.write(file, audio, self._rate, "ULAW", format="RAW")
        return file.getvalue()

    def _say(self, kind: str, **content: Any) -> None:
        self.out.append(json.dumps({"event": kind, **self._place, **content}))

    def send(self, audio: np.ndarray | None, events: Sequence[dict]) -> None:
        plivo, exotel = self._provider == "plivo", self._provider == "exotel"
        self._waits += b"" if audio is None else self._encode(audio)
        if len(self._waits) >= (self.EXOTEL_BYTES if exotel else 1):
            whole = len(self._waits) - (len(self._waits) % 320 if exotel else 0)
            media = {"payload": base64.b64encode(self._waits[:whole]).decode()}
            self._waits = self._waits[whole:]
            media |= {"contentType": self._encoding, "sampleRate": self._rate} if plivo else {}
            self._say("playAudio" if plivo else "media", media=media)
        for event in events:
            if event["type"] != "speech":
                continue
            if event["who"] == "user":
                self._barged_in = event["speaking"]
            elif not event["speaking"]:  # a turn of the agent is over
                self._turns += 1
                if self._barged_in:  # who did shall not hear what is left of it
                    self._say("clearAudio" if plivo else "clear")
                name = {"name": f"turn {self._turns}"}
                self._say("checkpoint", **name) if plivo else self._say("mark", mark=name)


PROTOCOLS: dict[str, type[Protocol]] = {
    "/api/pcm": RawPCM, "/api/chat": MoshiChat, "/v1/realtime": OpenAIRealtime,
    "/telephone": Telephone,
}  # fmt: skip
