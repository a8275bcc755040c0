"""Wire formats of the server: each turns a client's messages into audio and requests, and replies
into messages. They know nothing of sockets, slots or models.

Events are JSON objects whose `type` says what they are; `/api/pcm` sends them as they are. Audio is
24 kHz mono float32 in [-1, 1], `T` samples, or PCM16, which is 16-bit little-endian.
"""

import base64
import io
import itertools
import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from audio import SAMPLE_RATE, from_pcm16, soundfile, to_pcm16
from command import UserError, check_fields, first_line
from ledger import StreamResampler

Message = bytes | str
MAX_ECHO = 100  # characters of a client's own that go back to it


class ProtocolError(Exception):
    """What a client did wrong; `code` is the WebSocket's close code."""

    def __init__(self, code: int, message: str):
        super().__init__(message)
        self.code = code


def from_json(message: Message, /, **kinds: str) -> dict:
    """The JSON object in a text message, its fields of these `kinds` (of `check_fields`)."""
    if not isinstance(message, str):
        raise ProtocolError(1003, "a binary message where JSON text is needed")
    event = json.loads(message, parse_constant=int)  # refuses NaN, which JSON does not have
    if not isinstance(event, dict):
        raise ValueError("a message is not a JSON object")
    return fields(event, **kinds)


def fields(event: dict, /, **kinds: str) -> dict:
    """The event, its fields checked; `UserError` names the first wrong one."""
    check_fields(event, kinds, str(event.get("type", "message"))[:40])
    return event


def inner(event: dict, /, *names: str) -> dict:
    """The object in fields within fields, {} where one is missing."""
    for name in names:
        event = fields(event, **{name: "object?"}).get(name) or {}
    return event


class Protocol:
    """A wire format as the server sees it; what is to be sent gathers in `out`."""

    rejoins = True  # whether its clients learn the token with which to come back
    started = True  # False until a client has said who it is in a message
    token: str | None = None  # what that message held

    def __init__(self, query: Mapping[str, str]):  # the parameters of the client's URL
        self.query, self.out = query, []

    def receive(self, message: Message) -> np.ndarray | dict | None:
        """The audio [T] in a message, or what it asks for. `ProtocolError` for another format."""
        try:
            return self._receive(message)
        except (ValueError, RecursionError, UserError) as error:
            raise ProtocolError(1007, first_line(error, 100)) from None

    def _receive(self, message: Message) -> np.ndarray | dict | None:
        """As `receive`; other exceptions tell what is malformed."""

    def send(self, audio: np.ndarray | None, events: Sequence[dict]) -> None:
        """A patch of the reply [T], or none, and what happened before it; `ready` is the first."""


class RawPCM(Protocol):
    """`/api/pcm`: PCM16 in binary messages, events in text messages, both ways."""

    def _receive(self, message: Message) -> np.ndarray | dict | None:
        if isinstance(message, bytes):
            return from_pcm16(message)
        event = from_json(message, type="text")
        if event["type"] == "ping":
            name = event.get("id")
            name = name if isinstance(name, (int, float)) else str(name)[:MAX_ECHO]
            self.send(None, [{"type": "pong", "id": name}])
        elif event["type"] in ("start", "emotion", "language", "stop"):
            return fields(event, emotion="text?", language="text?", strength="number?")

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

    def _receive(self, message: Message) -> np.ndarray | dict | None:
        if not isinstance(message, bytes) or not message or message[0] > self.PING:
            raise ProtocolError(1003, "neither audio, text nor control")
        if message[0] != self.AUDIO:
            return None
        if len(message) > self.MAX_OPUS:
            raise ProtocolError(1009, f"more than {self.MAX_OPUS} bytes of Opus in one message")
        return self._reader.append_bytes(message[1:])

    def send(self, audio: np.ndarray | None, events: Sequence[dict]) -> None:
        for event in events:
            if event["type"] == "ready":
                self.out.append(bytes([self.HANDSHAKE]))
                if self.rejoins:
                    self.out.append(bytes([self.METADATA]) + json.dumps(event).encode())
            elif event["type"] == "text" and event["who"] == "agent":
                self.out.append(bytes([self.TEXT]) + event["text"].encode())
            elif event["type"] == "error":
                self.out.append(bytes([self.ERROR]) + event["message"].encode())
        if audio is not None and (pages := self._writer.append_pcm(np.ascontiguousarray(audio))):
            self.out.append(bytes([self.AUDIO]) + pages)


class OpenAIRealtime(Protocol):
    """`/v1/realtime`: OpenAI's Realtime events by their general-availability names.

    The model takes its turns itself: turn detection, `response.create` and `response.cancel` are
    accepted and change nothing. A response is a turn of the agent, its audio sent while it lasts.
    """

    FORMAT = {"type": "audio/pcm", "rate": SAMPLE_RATE}

    def __init__(self, query: Mapping[str, str]):
        super().__init__(query)
        self._count, self._seconds, self._began = itertools.count(1), 0.0, 0.0  # of answered input
        self._said, self._item = {"agent": "", "user": ""}, {"agent": None, "user": None}
        self._last = None  # id of the last item; `_item`: of those that last now
        self._session = {
            "type": "realtime", "object": "realtime.session", "id": "", "model": "samvad",
            "output_modalities": ["audio"],
            "audio": {side: {"format": self.FORMAT} for side in ("input", "output")}}  # fmt: skip

    def _say(self, kind: str, **content: Any) -> None:
        event = {"type": kind, "event_id": f"event_{next(self._count)}", **content}
        self.out.append(json.dumps(event))

    def _part(self, kind: str, **content: Any) -> None:
        name, place = self._item["agent"], {"output_index": 0, "content_index": 0}
        self._say(f"response.{kind}", response_id=f"resp_{name}", item_id=name, **place, **content)

    def _error(self, message: str) -> None:
        error = {"type": "invalid_request_error", "code": None, "param": None, "message": message}
        self._say("error", error=error)

    def _message(self, name: str, role: str, content: list, status: str = "completed") -> dict:
        item = {"id": name, "object": "realtime.item", "type": "message", "role": role}
        return {**item, "status": status, "content": content}

    def _add(self, item: dict, *states: str) -> None:
        for state in states:
            self._say(f"conversation.item.{state}", previous_item_id=self._last, item=item)
        self._last = item["id"]

    def _receive(self, message: Message) -> np.ndarray | dict | None:
        event = from_json(message, type="text")
        kind = event["type"]
        if kind == "input_audio_buffer.append":
            return from_pcm16(base64.b64decode(fields(event, audio="text")["audio"], validate=True))
        if kind == "session.update":
            for side in ("input", "output"):
                form = inner(event, "session", "audio", side, "format") or self.FORMAT
                if form.get("type") != "audio/pcm" or form.get("rate") not in (None, SAMPLE_RATE):
                    raise ProtocolError(1003, f"only audio/pcm at {SAMPLE_RATE} Hz is supported")
            self._say("session.updated", session=self._session)
        elif kind == "conversation.item.create":
            name = fields(inner(event, "item"), id="text?").get("id") or f"item_{next(self._count)}"
            self._add(self._message(name[:MAX_ECHO], "user", []), "added", "done")
        elif kind == "conversation.item.truncate":
            where = {"content_index": "whole number", "audio_end_ms": "whole number"}
            cut = fields(event, item_id="text", **where)
            self._say("conversation.item.truncated", item_id=cut["item_id"][:MAX_ECHO],
                      **{name: cut[name] for name in where})  # fmt: skip
        elif kind == "input_audio_buffer.clear":
            self._say("input_audio_buffer.cleared")
        elif kind not in ("input_audio_buffer.commit", "response.create", "response.cancel"):
            self._error(f"{kind[:MAX_ECHO]} is not supported")

    def send(self, audio: np.ndarray | None, events: Sequence[dict]) -> None:
        for event in events:
            kind, who = event["type"], event.get("who")
            if kind == "ready":
                self._session["id"] = event["call"]
                self._say("session.created", session=self._session)
            elif kind == "error":
                self._error(event["message"])
            elif kind == "dropped":
                self._seconds += event["patches"] * len(audio) / SAMPLE_RATE
            elif kind == "text":
                self._said[who] += event["text"]
                if who == "agent" and self._item[who]:
                    self._part("output_audio_transcript.delta", delta=event["text"])
            # Who rejoins in a turn has not seen its beginning, and shall not see its end.
            elif kind == "speech" and (event["speaking"] or self._item[who]):
                self._item[who] = self._item[who] or f"item_{next(self._count)}"
                (self._agent_turn if who == "agent" else self._user_turn)(event["speaking"])
                if not event["speaking"]:
                    self._item[who], self._said[who] = None, ""
        if audio is not None:
            self._seconds += len(audio) / SAMPLE_RATE
            if self._item["agent"]:
                self._part("output_audio.delta", delta=base64.b64encode(to_pcm16(audio)).decode())

    def _agent_turn(self, begins: bool) -> None:
        name, said = self._item["agent"], self._said["agent"]
        content = [] if begins else [{"type": "output_audio", "transcript": said}]
        item = self._message(name, "assistant", content, "in_progress" if begins else "completed")
        response = {"id": f"resp_{name}", "object": "realtime.response", "status": item["status"]}
        response |= {"output": [] if begins else [item]}
        place = {"response_id": response["id"], "output_index": 0, "item": item}
        if begins:
            self._say("response.created", response=response)
            self._say("response.output_item.added", **place)
            self._add(item, "added")
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

    def _user_turn(self, begins: bool) -> None:
        name, said, buffer = self._item["user"], self._said["user"], "input_audio_buffer"
        now = round(self._seconds * 1000)
        if begins:
            self._began = self._seconds
            self._say(f"{buffer}.speech_started", audio_start_ms=now, item_id=name)
            return
        self._say(f"{buffer}.speech_stopped", audio_end_ms=now, item_id=name)
        self._say(f"{buffer}.committed", previous_item_id=self._last, item_id=name)
        content = [{"type": "input_audio", "transcript": said}]
        self._add(self._message(name, "user", content), "added", "done")
        usage = {"type": "duration", "seconds": round(self._seconds - self._began, 3)}
        self._say("conversation.item.input_audio_transcription.completed", item_id=name,
                  content_index=0, transcript=said, usage=usage)  # fmt: skip


class Telephone(Protocol):
    """`/telephone`: the JSON media streams of Twilio, Exotel and Plivo.

    8 kHz mu-law or, as their start message says, PCM16 of up to 24 kHz. Who cannot send a header
    gives the token as a custom parameter `token`."""

    rejoins, started = False, False
    PROVIDERS = {  # field with the stream's id → events that play and clear, bytes taken at once
        "streamSid": ("media", "clear", 1),  # Twilio
        "stream_sid": ("media", "clear", 3200),  # Exotel: no less, in multiples of 320
        "streamId": ("playAudio", "clearAudio", 1),  # Plivo
    }
    _provider, _id, _format, _waits, _turns, _barged_in = "streamSid", "", {}, b"", 0, False

    def _receive(self, message: Message) -> np.ndarray | dict | None:
        event = from_json(message, event="text")
        if event["event"] == "start" and not self.started:
            self._start(event, inner(event, "start"))
        elif event["event"] == "media" and self.started:
            media = fields(inner(event, "media"), payload="text")
            if media.get("track", "inbound") == "inbound":
                return self._decode(base64.b64decode(media["payload"], validate=True))
        elif event["event"] == "stop":
            return {"type": "stop"}

    def _start(self, event: dict, start: dict) -> None:
        ids = {**event, **start}
        ids = [(name, ids[name]) for name in self.PROVIDERS if isinstance(ids.get(name), str)]
        if not ids:
            raise ValueError("a start message without the id of its stream")
        self._provider, self._id = ids[0]
        form = inner(start, "mediaFormat") or inner(start, "media_format")
        extra = inner(start, "customParameters") or inner(start, "custom_parameters")
        coding = form.get("encoding")
        self._ulaw = self._provider == "streamSid" or "mulaw" in str(coding).lower()
        rate = str(form.get("sampleRate") or form.get("sample_rate") or 8000)
        if rate not in (("8000",) if self._ulaw else ("8000", "16000", "24000")):
            raise ProtocolError(1003, f"audio at {rate[:20]} Hz is not supported")
        self._rate = int(rate)
        if self._provider == "streamId":
            self._format = {"contentType": coding, "sampleRate": self._rate}
        self._in = StreamResampler(self._rate, SAMPLE_RATE)
        self._out = StreamResampler(SAMPLE_RATE, self._rate)
        token = extra.get("token")
        self.token, self.started = token if isinstance(token, str) else None, True

    def _decode(self, data: bytes) -> np.ndarray:
        if not self._ulaw or not data:
            return self._in(from_pcm16(data))
        raw = {"samplerate": self._rate, "channels": 1, "format": "RAW", "subtype": "ULAW"}
        return self._in(soundfile.read(io.BytesIO(data), dtype="float32", **raw)[0])

    def _encode(self, audio: np.ndarray) -> bytes:
        audio = np.clip(self._out(audio), -1.0, 1.0)
        if not self._ulaw:
            return to_pcm16(audio)
        file = io.BytesIO()
        soundfile.write(file, audio, self._rate, "ULAW", format="RAW")
        return file.getvalue()

    def _say(self, kind: str, **content: Any) -> None:
        self.out.append(json.dumps({"event": kind, self._provider: self._id, **content}))

    def send(self, audio: np.ndarray | None, events: Sequence[dict]) -> None:
        play, clear, least = self.PROVIDERS[self._provider]
        self._waits += b"" if audio is None else self._encode(audio)
        if whole := len(self._waits) // least * least:
            payload = base64.b64encode(self._waits[:whole]).decode()
            self._say(play, media={"payload": payload, **self._format})
            self._waits = self._waits[whole:]
        for event in events:
            if event["type"] == "speech" and event["who"] == "user":
                self._barged_in = event["speaking"]
            elif event["type"] == "speech" and not event["speaking"]:  # the agent's turn is over
                self._turns += 1
                if self._barged_in:  # who did shall not hear what is left of it
                    self._say(clear)
                name = {"name": f"turn {self._turns}"}
                self._say("checkpoint", **name) if self._format else self._say("mark", mark=name)


PROTOCOLS: dict[str, type[Protocol]] = {"/api/pcm": RawPCM, "/api/chat": MoshiChat,
    "/v1/realtime": OpenAIRealtime, "/telephone": Telephone}  # fmt: skip
