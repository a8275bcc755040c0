"""Wire formats of the server: each turns a client's messages into audio and requests, and replies
into messages. They know nothing of sockets, slots or models.

Events are JSON objects whose `type` says what they are; `/api/pcm` sends them as they are. Audio
is 24 kHz mono float32 in [-1, 1], `T` samples; `PCM16` is its 16-bit little-endian form.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from command import UserError, check_fields

Message = bytes | str


class ProtocolError(Exception):
    """What a client did wrong; `code` is the WebSocket's close code."""

    def __init__(self, code: int, message: str):
        super().__init__(message)
        self.code = code


class Received(NamedTuple):
    """What one message of a client held: audio [T], requests to the server, answers to send."""

    audio: np.ndarray | None = None
    requests: Sequence[dict] = ()
    answers: Sequence[Message] = ()


def to_json(event: dict) -> str:
    return json.dumps(event, allow_nan=False)


def from_json(message: Message, kinds: Mapping[str, str] | None = None) -> dict:
    """The JSON object of a text message, its fields of these `kinds` (of `check_fields`).

    Raises `ProtocolError` where it is none: also of NaN and Infinity, which JSON lacks.
    """
    if not isinstance(message, str):
        raise ProtocolError(1003, "a binary message where JSON text is needed")
    try:
        event = json.loads(message, parse_constant=_refuse_constant)
    except (ValueError, RecursionError):
        raise ProtocolError(1007, "a message is not JSON") from None
    if not isinstance(event, dict):
        raise ProtocolError(1007, "a message is not a JSON object")
    return fields(event, kinds or {"type": "text"})


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def fields(event: dict, kinds: Mapping[str, str]) -> dict:
    """The event, its fields checked; `ProtocolError` that names the first wrong one."""
    try:
        check_fields(event, dict(kinds), str(event.get("type", "message"))[:40])
    except UserError as error:
        raise ProtocolError(1007, str(error)[:100]) from None
    return event


def from_pcm16(data: bytes) -> np.ndarray:
    if len(data) % 2:
        raise ProtocolError(1007, "16-bit samples, but an odd number of bytes")
    return np.frombuffer(data, "<i2").astype(np.float32) / 32768.0


def to_pcm16(audio: np.ndarray) -> bytes:
    return (np.clip(audio, -1.0, 1.0) * 32767.0).astype("<i2").tobytes()


class Protocol:
    """What the server asks of a wire format. `query`: of the client's URL."""

    rejoins = True  # whether its clients learn the token with which to come back
    started = True  # False until a client has said who it is in a message
    token: str | None = None  # what that message held

    def __init__(self, query: Mapping[str, str]):
        self.query = query

    def greet(self, ready: dict) -> list[Message]:
        """The first messages to a client; `ready` is the event of that name."""
        return []

    def receive(self, message: Message) -> Received:
        """Raises `ProtocolError` for a message that is none of this format's."""
        raise NotImplementedError

    def send(self, audio: np.ndarray | None, events: Sequence[dict]) -> list[Message]:
        """A patch of the reply [T], or none, and what happened before it."""
        raise NotImplementedError


class RawPCM(Protocol):
    """`/api/pcm`: PCM16 in binary messages, events in text messages, both ways."""

    REQUESTS = {
        "start": {"emotion": "text?", "language": "text?", "strength": "number?"},
        "emotion": {"emotion": "text?", "strength": "number?"},
        "language": {"language": "text?"},
        "stop": {},
    }

    def greet(self, ready: dict) -> list[Message]:
        return [to_json(ready)]

    def receive(self, message: Message) -> Received:
        if isinstance(message, bytes):
            return Received(from_pcm16(message))
        event = from_json(message)
        if event["type"] == "ping":
            return Received(answers=[to_json({"type": "pong", "id": event.get("id")})])
        if event["type"] not in self.REQUESTS:
            return Received()
        return Received(requests=[fields(event, self.REQUESTS[event["type"]])])

    def send(self, audio: np.ndarray | None, events: Sequence[dict]) -> list[Message]:
        return [*map(to_json, events), *([] if audio is None else [to_pcm16(audio)])]


PROTOCOLS: dict[str, Any] = {"/api/pcm": RawPCM}
