"""Clients that others wrote converse with the server: moshi's, OpenAI's, Pipecat's, LiveKit's."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import sys
import types

import numpy as np
import pytest
from test_duplex import FakeClock, FakeCodec
from test_protocols import likeness
from test_serve import echo_engine, serving

from audio import read_audio
from ledger import frame_levels
from protocols import to_pcm16
from serve import TINY

QUESTION = TINY.parent.parent / "samples" / "question_english.wav"


class EchoCodec(FakeCodec):
    """Decodes to the very sound that it encoded last."""

    def decode_step(self, codes, state, active=None):
        super().decode_step(codes, state, active)
        return self.encoded[-1]


def echoing(*flags: str):
    """A server whose agents repeat what they hear."""
    engine = echo_engine()
    engine.codec = EchoCodec(FakeClock(), 0, 0)
    return serving("--buffer_seconds", "30", *flags, engine=engine)  # a busy machine drops none


def loudness_likeness(one: np.ndarray, other: np.ndarray) -> float:
    """The largest correlation of two sounds' loudness at any shift up to 300 ms: Opus keeps no
    waveform. Two passes of it give 0.97, other stretches of speech at most 0.45."""
    a, b = (np.maximum(frame_levels(sound), -60) for sound in (one, other))
    n = min(len(a), len(b)) - 60
    return max(np.corrcoef(a[:n], b[k : k + n])[0, 1] for k in range(60))


@pytest.fixture(scope="module")
def question() -> np.ndarray:
    """Two seconds of a recording [T], 24 kHz; the server's agents say it back."""
    return read_audio(QUESTION)[12000:60000]


def test_moshi_client(question, monkeypatch, capsys):
    """`moshi.client.Connection`, with a sound card that plays the recording and keeps the reply."""
    pytest.importorskip("aiohttp")
    card = types.ModuleType("sounddevice")
    heard: list[np.ndarray] = []

    class Stream:
        def __init__(self, blocksize, callback, **settings):
            self.block, self.callback = blocksize, callback

        def __enter__(self):
            self.task = asyncio.get_running_loop().create_task(self.run())

        def __exit__(self, *error):
            self.task.cancel()

    class InputStream(Stream):
        async def run(self):
            for start in range(0, len(question) - self.block, self.block):
                block = question[start : start + self.block, None]
                self.callback(block, self.block, None, None)
                await asyncio.sleep(self.block / 24000)

    class OutputStream(Stream):
        async def run(self):
            while True:
                block = np.zeros((self.block, 1), np.float32)
                self.callback(block, self.block, None, None)
                if block.any():  # no underrun of its queue
                    heard.append(block[:, 0])
                await asyncio.sleep(self.block / 24000)

    card.InputStream, card.OutputStream = InputStream, OutputStream
    monkeypatch.setitem(sys.modules, "sounddevice", card)
    monkeypatch.delitem(sys.modules, "moshi.client", raising=False)
    client = pytest.importorskip("moshi.client")

    async def call(url: str) -> None:
        arguments = types.SimpleNamespace(url=url)
        printer = client.RawPrinter()
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(client.run(printer, arguments), 6)

    with echoing() as running:
        asyncio.run(call(f"ws://{running.address}"))
    assert loudness_likeness(question[:36000], np.concatenate(heard)[:42000]) > 0.9
    assert " w1 w2" in capsys.readouterr().out


def test_openai_realtime_client(question):
    openai = pytest.importorskip("openai")

    async def call(url: str) -> tuple[list[str], bytes, str]:
        client = openai.AsyncOpenAI(api_key="secret", base_url=f"http://{url}/v1",
                                    websocket_base_url=f"ws://{url}/v1")  # fmt: skip
        kinds, reply, words = [], b"", ""
        async with client.realtime.connect(model="samvad") as connection:
            session = {"type": "realtime", "instructions": "be kind"}
            await connection.session.update(session=session)

            async def speak() -> None:
                sound = np.concatenate([question[:36000], np.zeros(24000, np.float32)])
                for start in range(0, len(sound), 2400):
                    part = base64.b64encode(to_pcm16(sound[start : start + 2400])).decode()
                    await connection.input_audio_buffer.append(audio=part)
                    await asyncio.sleep(0.1)

            speaking = asyncio.create_task(speak())
            async for event in connection:
                kinds.append(event.type)
                if event.type == "response.output_audio.delta":
                    reply += base64.b64decode(event.delta)
                elif event.type == "response.output_audio_transcript.done":
                    words = event.transcript
                elif event.type == "response.done":
                    break
            await speaking
        return kinds, reply, words

    with echoing("--token", "secret") as running:
        kinds, reply, words = asyncio.run(asyncio.wait_for(call(running.address), 20))
    assert kinds[:2] == ["session.created", "session.updated"]
    assert "input_audio_buffer.speech_started" in kinds and "error" not in kinds
    said = np.frombuffer(reply, "<i2").astype(np.float32) / 32768
    whole = np.concatenate([np.zeros(1200, np.float32), said])
    assert max(likeness(question[s : s + 24000], whole[:26000]) for s in (0, 960, 1920)) > 0.9
    assert words.count(" w") > 20


def test_pipecat_realtime_service(question):
    """Pipecat's OpenAI Realtime service in a pipeline of its own, fed with audio frames."""
    service = pytest.importorskip("pipecat.services.openai.realtime.llm")
    frames = pytest.importorskip("pipecat.frames.frames")
    testing = pytest.importorskip("pipecat.tests.utils")
    sound = np.concatenate([question[:36000], np.zeros(24000, np.float32)])
    spoken = []
    for start in range(0, len(sound), 960):
        part = to_pcm16(sound[start : start + 960])
        spoken += [frames.InputAudioRawFrame(part, 24000, 1), testing.SleepFrame(0.04)]

    async def call(url: str) -> list:
        llm = service.OpenAIRealtimeLLMService(api_key="secret", base_url=f"ws://{url}/v1/realtime")
        down, up = await testing.run_test(
            llm, frames_to_send=[testing.SleepFrame(1.0), *spoken, testing.SleepFrame(1.0)],
            start_timeout=20.0,
        )  # fmt: skip
        return [*down, *up]

    with echoing("--token", "secret") as running:
        got = asyncio.run(asyncio.wait_for(call(running.address), 60))
    kinds = [type(frame).__name__ for frame in got]
    assert not [frame.error for frame in got if isinstance(frame, frames.ErrorFrame)]
    for kind in ("LLMFullResponseStartFrame", "TTSStartedFrame", "TTSStoppedFrame"):
        assert kind in kinds
    reply = b"".join(f.audio for f in got if isinstance(f, frames.TTSAudioRawFrame))
    said = np.frombuffer(reply, "<i2").astype(np.float32) / 32768
    whole = np.concatenate([np.zeros(1200, np.float32), said])
    assert max(likeness(question[s : s + 24000], whole[:26000]) for s in (0, 960, 1920)) > 0.9
    words = "".join(f.text for f in got if isinstance(f, frames.TTSTextFrame))
    assert words.count("w") > 20


def test_livekit_personaplex_plugin(question):
    """LiveKit's plug-in for PersonaPlex's protocol, Moshi's with a prompt in the URL."""
    rtc = pytest.importorskip("livekit.rtc")
    realtime = pytest.importorskip("livekit.plugins.nvidia.experimental.realtime")
    aiohttp = pytest.importorskip("aiohttp")

    async def call(url: str) -> tuple[np.ndarray, str]:
        async with aiohttp.ClientSession() as http:
            model = realtime.RealtimeModel(base_url=f"ws://{url}", http_session=http)
            session, made = model.session(), asyncio.get_running_loop().create_future()
            session.on("generation_created", lambda event: made.done() or made.set_result(event))
            heard, words = [], []

            async def speak() -> None:
                for start in range(0, 45600, 480):
                    part = to_pcm16(question[start : start + 480])
                    session.push_audio(rtc.AudioFrame(part, 24000, 1, 480))
                    await asyncio.sleep(0.02)

            async def listen() -> None:
                async for message in (await made).message_stream:
                    await asyncio.gather(hear(message.audio_stream), read(message.text_stream))

            async def hear(stream) -> None:
                async for frame in stream:
                    heard.append(np.frombuffer(frame.data, np.int16).astype(np.float32) / 32768)

            async def read(stream) -> None:
                async for text in stream:
                    words.append(text)

            listening = asyncio.create_task(listen())
            await speak()
            await asyncio.wait_for(listening, 10)  # half a second without audio ends a generation
            await session.aclose()
        return np.concatenate(heard), "".join(words)

    with echoing() as running:
        said, words = asyncio.run(call(running.address))
    assert loudness_likeness(question[:36000], said[:42000]) > 0.9
    assert words.startswith(" w1 w2 w3")
