"""The pasted chain of phase 1 into phase 2, from nothing to a checkpoint, on small corpora."""

import os
import re
import shlex
import subprocess
import sys

import pytest
from test_corpora import ROOT, ROWS, dataset, served
from test_fetching import Server, coded, server, tar_of

import checkpoints
import data
import training
from codec import Codec

pytest.importorskip("parselmouth")
__all__ = ["Server", "server"]  # fixtures, found by name

# Mozilla's client, as far as the script uses it: a release that lies there already.
CLIENT = """
import shutil

def download_dataset(dataset, download_directory):
    return shutil.copy(dataset, download_directory)
"""


@pytest.fixture
def sources(server, tmp_path):
    """Flags that lead to small corpora, by archive, by parquet folder and by Mozilla's client."""
    served(server, ROWS["openslr-66"])
    # Copies of the datasets, as --mirror takes them: two shards of 24 clips of 4 s each.
    for row in (ROWS["kathbath-hindi"], ROWS["kathbath-telugu"]):
        for name, body in dataset(row, count=24, seconds=4).items():
            (tmp_path / "kathbath" / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / "kathbath" / name).write_bytes(body)
    rows = "".join(f"reader{n}\tcv_{n}.mp3\ta sentence\n" for n in range(6))
    release = {"cv/te/validated.tsv": f"client_id\tpath\tsentence\n{rows}".encode()}
    for n in range(6):
        release[f"cv/te/clips/cv_{n}.mp3"] = coded(".mp3", seconds=2, rate=48000, hertz=200 + n)
    (tmp_path / "release.tar.gz").write_bytes(tar_of(release))
    (tmp_path / "client").mkdir()
    (tmp_path / "client/datacollective.py").write_text(CLIENT)
    return [
        "--corpora", "kathbath-hindi", "kathbath-telugu", "openslr-66", "common-voice-telugu",
        "--max_hours", "1",  # else a small disk is refused: the table's hours are the real ones
        "--cv_dataset_id", f"telugu={tmp_path / 'release.tar.gz'}",
        "--mirror", f"openslr-66={server.url}",
        f"kathbath-hindi={tmp_path / 'kathbath'}", f"kathbath-telugu={tmp_path / 'kathbath'}",
    ]  # fmt: skip


def pasted(folder, *commands):
    """Run `python SCRIPT … && python SCRIPT …` in an empty folder."""
    line = " && ".join(
        f"{sys.executable} {ROOT / script} {shlex.join(map(str, flags))}"
        for script, *flags in commands
    )
    environment = {"PYTHONPATH": folder.parent / "client", "MDC_API_KEY": "key"}
    environment |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    folder.mkdir(exist_ok=True)
    return subprocess.run(
        ["bash", "-c", line], cwd=folder, capture_output=True, text=True, timeout=1800,
        env={**os.environ, **{name: str(value) for name, value in environment.items()}},
    )  # fmt: skip


def test_from_nothing_to_a_checkpoint(sources, tmp_path):
    folder = tmp_path / "work"
    made = pasted(
        folder,
        ("download_data.py", *sources),
        ("augment_telugu.py", "--num_workers", 0),
        ("train_codec.py", "--data_dirs", "data/hindi", "data/telugu",
         "--batch_size", 2, "--num_epochs", 1, "--gen_lr", 1e-4, "--disc_lr", 1e-4,
         "--checkpoint_dir", "checkpoints_codec", "--num_workers", 0, "--preset", "tiny",
         "--epoch_hours", 0.01, "--window_seconds", 0.5, "--max_steps", 3),
    )  # fmt: skip
    assert made.returncode == 0, made.stdout + made.stderr

    checkpoint = checkpoints.load_checkpoint(folder / "checkpoints_codec")
    assert checkpoint.step == 3 and checkpoint.trainer is not None
    model = Codec.from_checkpoint(folder / "checkpoints_codec")
    assert model.decode(model.encode(0.1 * training.torch.randn(1, 1, 4800))).shape == (1, 1, 4800)

    # The hours that training starts with: all of Telugu, and more with the copies than without.
    clips = data.load_clips([folder / "data/telugu"], "train")
    real = [clip for clip in clips if not clip.augmented]
    assert {path.name for path in (folder / "data/telugu").iterdir()} >= {"augmented"}
    assert len(clips) == 6 * len(real)
    hours, without = (data.hours_by_language(some)["telugu"] for some in (clips, real))
    told = re.search(r"^data: .*telugu ([\d.]+) h", made.stdout, re.MULTILINE)
    assert told and told.group(1) == f"{hours:.1f}" != f"{without:.1f}"
