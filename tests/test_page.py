"""The page in a real browser, headless, with a microphone fed from a file: it is heard, the reply
is played and written down; what goes wrong is said. Skipped without Chromium and Playwright."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
import soundfile
import torch

pytest.importorskip("fastapi")
pytest.importorskip("prometheus_client")
pytest.importorskip("playwright")
import test_serve  # noqa: E402
from playwright.sync_api import sync_playwright  # noqa: E402
from test_duplex import FakeClock, FakeCodec, FakeLM  # noqa: E402

from duplex import DuplexEngine  # noqa: E402

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs Debian's chromium")
RATE = 24000


class Talker(FakeLM):
    """Talks for a second, is silent for one, and so on, whatever it hears."""

    def step(self, codes, state, **options):
        out = super().step(codes, state, **options)
        out.agent_codes[:] = 562 if int(state.frames[0]) % 50 < 25 else 512
        out.text[:] = int(state.frames[0]) + 1
        return out


def engine(slots: int) -> DuplexEngine:
    import time

    clock = FakeClock()
    lm = Talker(clock)
    lm.tokenizer.decode = lambda ids: "".join(f" word{i}" for i in ids)
    lm.config.emotion_dim = 1
    return DuplexEngine(FakeCodec(clock, 0, 0), lm, slots, clock=time.perf_counter)


@pytest.fixture(scope="module")
def chromium(tmp_path_factory):
    microphone = tmp_path_factory.mktemp("page") / "microphone.wav"
    t = np.arange(4 * RATE) / RATE
    soundfile.write(microphone, 0.5 * np.sin(2 * np.pi * 440 * t) * (t % 1 < 0.6), RATE)
    flags = ["--no-sandbox", "--use-fake-device-for-media-stream",
             f"--use-file-for-fake-audio-capture={microphone}"]  # fmt: skip
    with sync_playwright() as playwright:

        def launch(*more: str):
            return playwright.chromium.launch(executable_path=CHROMIUM, args=[*flags, *more])

        yield launch


@pytest.fixture(scope="module")
def browser(chromium):
    browser = chromium("--use-fake-ui-for-media-stream")
    yield browser
    browser.close()


class Page:
    """One window on the page, whose errors are the test's."""

    def __init__(self, browser, running, width=1100, scheme="light", query=""):
        self.errors: list = []
        self.page = browser.new_page(viewport={"width": width, "height": 800}, color_scheme=scheme)
        self.page.on("pageerror", lambda error: self.errors.append(error))
        self.page.set_default_timeout(20_000)
        self.page.goto(f"http://{running.address}/{query}")

    def text(self, name: str) -> str:
        return self.page.inner_text(f"#{name}")

    def until(self, condition: str) -> None:
        self.page.wait_for_function(condition)

    def call(self) -> None:
        self.page.click("#call")
        self.until("document.getElementById('state').textContent.startsWith('connected')")

    def close(self) -> None:
        self.page.close()
        assert self.errors == []


def test_a_call_is_heard_played_and_written_down(browser):
    with test_serve.serving("--token", "t&1", engine=engine(1)) as running:
        page = Page(browser, running, query="?token=t%261")
        page.page.select_option("#emotion", "sad")
        page.call()
        page.until("samvad.played > 20 && samvad.received > 75")
        page.until("/Samvad\\s+word\\d word\\d/.test(document.getElementById('words').innerText)")
        page.until("/You\\s+word/.test(document.getElementById('words').innerText)")
        assert page.text("feeling") in ("happy", "not sure yet")
        for name in ("tick", "network", "buffers"):
            page.until(f"document.getElementById('{name}').textContent.endsWith('ms')")
        assert int(running.engine._asked_emotion[0]) == 3  # sad, asked for before the call
        page.page.select_option("#emotion", "happy")
        page.until("samvad.received > 100")
        assert int(running.engine._asked_emotion[0]) == 2
        page.close()
    heard = torch.cat(running.engine.codec.encoded, -1)[0, 0].numpy()
    heard = heard[np.abs(heard) > 0.02]
    assert len(heard) > RATE // 2  # echo canceller and noise suppression let the tone through
    spectrum = np.abs(np.fft.rfft(heard * np.hanning(len(heard))))
    assert spectrum.argmax() * RATE / len(heard) == pytest.approx(440, abs=40)


def test_a_full_server_is_said_and_the_page_can_call_again(browser):
    with test_serve.serving(engine=engine(1)) as running:
        first, second = Page(browser, running), Page(browser, running)
        first.call()
        second.page.click("#call")
        second.until("document.getElementById('message').textContent.includes('busy')")
        assert "full" in second.text("message") and second.text("call") == "Start the call"
        first.page.click("#call")
        first.until("document.getElementById('state').textContent.includes('over')")
        second.call()
        assert second.text("message") == ""
        first.close()
        second.close()


def test_a_wrong_token_is_said(browser):
    with test_serve.serving("--token", "right", engine=engine(1)) as running:
        page = Page(browser, running, query="?token=wrong")
        page.page.click("#call")
        page.until("document.getElementById('message').textContent.includes('token')")
        page.close()


def test_a_call_cut_off_goes_on(browser):
    with test_serve.serving("--rejoin_seconds", "10", engine=engine(1)) as running:
        page = Page(browser, running)
        page.call()
        page.until("samvad.received > 10")
        before = page.page.evaluate("samvad.token")
        page.page.evaluate("samvad.socket.close(3000)")  # as by a proxy: nobody said stop
        page.until("document.getElementById('state').textContent.startsWith('back')")
        assert page.page.evaluate("samvad.token") == before
        page.until("samvad.received > 30")
        page.close()


def test_it_works_by_keyboard_and_mutes(browser):
    with test_serve.serving(engine=engine(1)) as running:
        page = Page(browser, running)
        page.page.keyboard.press("Tab")
        assert page.page.evaluate("document.activeElement.id") == "call"
        page.page.keyboard.press("Enter")
        page.until("samvad.received > 10")
        page.page.keyboard.press("m")
        assert page.page.get_attribute("#mute", "aria-pressed") == "true"
        count = len(running.engine.codec.encoded)
        page.until("samvad.received > 45")
        assert not torch.cat(running.engine.codec.encoded[count + 15 :], -1).any()  # silence
        page.page.keyboard.press("Escape")
        page.until("document.getElementById('state').textContent.includes('over')")
        page.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_phone_s_width_holds_it(browser, scheme):
    with test_serve.serving(engine=engine(1)) as running:
        page = Page(browser, running, width=340, scheme=scheme)
        assert page.page.evaluate("document.documentElement.scrollWidth") <= 340
        for name in ("call", "mute", "emotion", "strength", "language"):
            box = page.page.locator(f"#{name}").bounding_box()
            assert box["height"] >= 44 and box["x"] >= 0 and box["x"] + box["width"] <= 340
        page.close()


def test_a_refused_microphone_is_said(chromium):
    browser = chromium("--deny-permission-prompts")
    with test_serve.serving(engine=engine(1)) as running:
        page = Page(browser, running)
        page.page.click("#call")
        page.until("document.getElementById('message').textContent.includes('refused')")
        assert page.text("call") == "Start the call" and not running.server.connections
        page.close()
    browser.close()
