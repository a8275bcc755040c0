"""tools/probe_exchanges.py: what can be told is told, what cannot is chance; scripts to shares."""

import argparse
import json

import numpy as np
import pytest
import torch
from test_make_clips import espeak_role
from test_teachers import save_whisper

import speech
from command import UserError
from tools import probe_exchanges


def utterances(count: int, classes: int, tells: bool, seed: int = 0) -> tuple[list, torch.Tensor]:
    """Codes `[F, 2]` of sequences whose order of three codes is the class, or says nothing."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % classes
    codes = []
    for label in labels.tolist():
        length = int(torch.randint(30, 60, (1,), generator=generator))
        row = torch.randint(3, 16, (length, 2), generator=generator)
        if tells:
            at = int(torch.randint(0, length - 12, (1,), generator=generator))
            order = [[0, 1, 2], [2, 1, 0], [1, 0, 2]][label]
            row[at : at + 12, 0] = torch.tensor(order).repeat_interleave(4)
        codes.append(row)
    return codes, labels


@pytest.mark.parametrize("tells", [True, False])
def test_what_the_codes_tell_is_found_and_no_more(tells):
    args = argparse.Namespace(seed=0, steps=200, batch_size=16, lr=2e-3, drop=0.1)
    codes, labels = utterances(360, 3, tells)
    loss, right = probe_exchanges.classify(codes, labels, 60, args)
    share = float(right.float().mean())
    assert (share > 0.9 and loss < 0.3) if tells else 0.15 < share < 0.55


def test_from_the_scripts_to_shares_of_each_language(monkeypatch, tmp_path, capsys):
    pytest.importorskip("espeakng_loader", reason="speech for this test: espeakng-loader")
    monkeypatch.setattr(speech, "voices", espeak_role)
    monkeypatch.setattr(probe_exchanges, "CLUSTERS", 16)
    few = "--languages english hindi --intents greeting,name --train 8 --test 2 --steps 3"
    teacher = save_whisper(tmp_path / "whisper", positions=500)
    probe_exchanges.main([*few.split(), "--teacher", str(teacher)])
    printed = capsys.readouterr().out
    results = json.loads(printed.splitlines()[-1])
    assert [name.rsplit(", ")[-1] for name in results] == ["codebook 0", "8", "k-means"]
    for row in results.values():
        assert row.keys() == {"english", "hindi", "training_loss"}
        assert 0 <= row["english"] <= 1 and np.isfinite(row["training_loss"])
    assert "16 utterances learnt, 4 asked, 4 exchanges" in printed


def test_what_cannot_be_asked_is_one_line(monkeypatch):
    monkeypatch.setattr(speech, "voices", espeak_role)
    with pytest.raises(UserError, match="no english script has intent none"):
        probe_exchanges.main(["--languages", "english", "--intents", "none"])
