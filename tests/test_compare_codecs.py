"""Other codecs beside ours: rates against file sizes, who wins, and a program that fails."""
# ruff: noqa: F811 (fixtures of another test)

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from test_evaluate_codec import (  # noqa: F401
    checkpoint,
    codec,
    corpus,
    likeness,
    quick,
    speech,
    two_clips,
)

import evaluate_codec as e
from codec import CodecConfig
from command import UserError
from evaluate_codec import Coded, Skipped
from tools import compare_codecs as c


def test_nearest_rates_and_pairs():
    config = replace(CodecConfig.tiny(), codebook_sizes=(1024,) * 16)
    rates = [e.kbps_of(config, count) for count in (2, 8, 16)]
    peers = c.peer_points(["opus", "codec2", "speex"], rates, Path())
    assert list(peers) == [
        ("opus", 6), ("opus", 8),
        ("codec2", 1.2), ("codec2", 3.2),
        ("speex", 2.15), ("speex", 3.95), ("speex", 8),
    ]  # fmt: skip
    own = [("samvad", rate) for rate in rates]
    paired = {peer: point[1] for point, peer in c.pairs([*own, *peers])}
    assert paired["opus", 6] == 4 and paired["opus", 8] == 8 and paired["codec2", 3.2] == 4
    assert c.Peer(None, (1.6, 2.4), (), "").nearest(2.0) == 2.4


def test_bits_of_an_ogg_file_are_those_of_its_audio_packets():
    def page(*lacing):
        return b"OggS" + bytes(22) + bytes([len(lacing), *lacing]) + bytes(sum(lacing))

    data = page(19) + page(255, 30) + page(255, 255, 7, 100) + page(40)
    assert c.ogg_bits(data) == 8 * (255 + 255 + 7 + 100 + 40)


def loudness(audio: np.ndarray) -> np.ndarray:
    """Log energy every 5 ms, each over 20 ms, without its mean."""
    power = np.convolve(audio.astype(np.float64) ** 2, np.ones(480) / 480, "same")[::120]
    levels = np.log(power + 1e-6)
    return levels - levels.mean()


@pytest.mark.parametrize(("name", "kbps"), [("opus", 6), ("codec2", 3.2), ("speex", 3.95),
                                            ("speex", 12.8)])  # fmt: skip
def test_peers_code_at_the_rate_and_place_they_say(name, kbps, speech, tmp_path, monkeypatch):
    if any(not shutil.which(program) for program in c.PEERS[name].programs):
        pytest.skip(f"{c.PEERS[name].package} is not installed")
    coded = c.PEERS[name].code(speech, kbps, tmp_path)
    file = next(tmp_path.glob("coded.*"))
    assert coded.audio.shape == speech.shape and coded.audio.dtype == np.float32
    assert coded.bits / 2000 == pytest.approx(kbps, rel=0.25)
    assert coded.bits <= 8 * file.stat().st_size
    # In place: its loudness fits that of the recording best where it stands.
    ours, theirs = loudness(speech), loudness(coded.audio)
    fits = {lag: float((np.roll(theirs, -lag) * ours).sum()) for lag in range(-8, 9)}
    assert abs(max(fits, key=fits.get)) <= 2
    assert c.PEERS[name].code(speech[:400], kbps, tmp_path).audio.shape == (400,)


def test_a_missing_or_failing_program_is_named(monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda program: None)
    with pytest.raises(UserError, match="apt-get install opus-tools"):
        c.check_tools(["opus"])
    with pytest.raises(Skipped, match="ls failed"):
        c._tool("ls", "--no-such-option")


def test_wins_and_criteria():
    rows, points = two_clips()
    (wins,) = c.comparisons(rows)
    # A tie is no win; a clip that one of the two lacks does not count.
    assert wins["share"] == {"snr": 1.0, "pesq": 0.0, "mos": 0.5}
    assert wins["measured"] == {"snr": 2, "pesq": 1, "mos": 2}
    factors = {"stream_40ms": 0.1, "stream_80ms": 0.05, "mimi_80ms": 0.45}
    group = e.summarise(rows, points) | {"better_than": [wins]}
    assert {r["criterion"]: r["met"] for r in c.criteria(group, factors)} == {
        "times cheaper than Mimi, 40 ms steps": False,
        "times cheaper than Mimi, 80 ms steps": True,
        "clips won from speex at 3.95 kbit/s": False,
    }
    assert max(map(len, c.wins_table("english", group).splitlines())) <= 80


def test_the_whole_comparison(checkpoint, corpus, tmp_path, quick, monkeypatch, capsys):
    def halved(audio, kbps, folder):
        return Coded(0.5 * audio, len(audio))

    monkeypatch.setitem(c.PEERS, "opus", c.Peer(halved, (6,), (), ""))
    monkeypatch.setitem(e.JUDGES, "stoi", (likeness, ""))
    monkeypatch.chdir(tmp_path)
    flags = ("--codec", checkpoint, "--data_dirs", corpus, "--against", "opus", "--device", "cpu")
    c.main([*map(str, flags), "--judges", "stoi", "--codebooks", "8"])
    printed = capsys.readouterr().out
    summary = json.loads(printed.splitlines()[-1])
    pooled = summary["groups"]["all"]
    opus = pooled["points"][-1]
    # |x - x/2|² is a quarter of |x|², and the better-scaled reference leaves nothing over.
    assert opus["scores"]["snr"] == pytest.approx(6.0206, abs=1e-3)
    assert opus["scores"]["si_sdr"] > 60 and opus["scores"]["stoi"] == pytest.approx(1, abs=1e-3)
    assert opus["net_kbps"] == 24
    assert pooled["better_than"][0]["samvad_kbps"] == 4
    assert "hindi: clips on which samvad is better" in printed
    assert max(map(len, printed.splitlines()[3:-1])) <= 80


def test_codecs_that_are_not_known_end_in_one_line():
    with pytest.raises(UserError, match="--against mp3: not one of opus, codec2, speex, mimi"):
        c.main(["--against", "mp3"])


def test_mimi_is_timed_beside_it(codec, quick):
    try:
        mimi, _ = c.load_mimi(torch.device("cpu"))
    except UserError as error:
        pytest.skip(str(error))
    books = [m.embedding for m in mimi.modules() if hasattr(m, "embedding_sum")]
    assert books and all(float(book.std()) > 0.5 for book in books)
    with c.timed_mimi(torch.device("cpu")) as timed:
        factors = e.real_time_factors(codec, timed)["factors"]
    assert factors["mimi_80ms"] > factors["stream_80ms"]


def test_one_bad_clip_costs_neither_the_run_nor_its_figures(
    checkpoint,
    corpus,
    tmp_path,
    quick,
    monkeypatch,
    capsys,
):
    """A peer's program and a judge that fail now and then; then the disk is full."""

    def opus(audio, kbps, folder):
        if np.abs(audio).max() > 0.99:
            raise Skipped("opusenc failed (too loud)")
        return Coded(audio, len(audio))

    def stumbling(audio, reference):
        raise ZeroDivisionError("no frames")

    def full(path, text):
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setitem(c.PEERS, "opus", c.Peer(opus, (6,), (), ""))
    monkeypatch.setattr(e, "load_judges", lambda names: {"stoi": stumbling})
    monkeypatch.setattr(e.command, "write_text", full)
    monkeypatch.chdir(tmp_path)
    flags = ("--codec", checkpoint, "--data_dirs", corpus, "--against", "opus", "--device", "cpu")
    with pytest.raises(OSError, match="No space"):
        c.main([*map(str, flags), "--output", "out.json"])
    printed = capsys.readouterr()
    summary = json.loads(printed.out.splitlines()[-1])
    assert summary["skipped"]["opusenc failed (too loud)"] == 1
    assert summary["groups"]["all"]["clips"] == 3
    assert summary["groups"]["all"]["points"][0]["measured"]["stoi"] == 0
    assert "stoi failed on a clip: no frames" in printed.err
