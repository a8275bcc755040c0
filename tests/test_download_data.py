"""The table of corpora, what the flags choose, --list, --verify and the script as it is pasted."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from test_corpora import ROOT, ROWS, dataset, served
from test_fetching import Server, asked_of, server

import corpora
import data
import download_data
import fetching
from command import UserError, only_one
from corpora import FetchOptions

__all__ = ["Server", "server"]  # fixtures, found by name


# ------------------------------------------------------------------------ table, list and verify


def test_verify_at_full_size_fits_80_columns(capsys):
    found = [
        {**download_data.verify(row, Path("no")), "files": 1_234_567, "hours": row.hours,
         "hours_by_sample_rate": {"16000": row.hours},
         "state": "ok, small"}
        for row in ROWS.values() if row.default
    ]  # fmt: skip
    found.append(download_data.verify(ROWS["gramvaani"], Path("no")))
    assert not download_data.print_verified(found, Path("data"))
    printed = capsys.readouterr().out
    assert max(len(line) for line in printed.splitlines()) <= 80
    assert "missing in data: gramvaani" in printed


def test_the_table_holds_what_the_design_demands(capsys):
    names = [row.name for row in download_data.CORPORA]
    assert len(names) == len(set(names))
    for row in download_data.CORPORA:
        assert row.language in data.LANGUAGES
        assert type(row) in corpora.FETCHERS
        assert row.license and row.hours > 0
        assert row.name not in download_data.GROUPS
        if isinstance(row, corpora.Archives):
            assert sum(a.hours for a in row.archives) == pytest.approx(row.hours, rel=0.01)
        assert row.layout in ("", *corpora.LAYOUTS)
        assert row.default or row.note
    download_data.print_list(download_data.CORPORA)
    printed = capsys.readouterr().out
    assert max(len(line) for line in printed.splitlines()) <= 80
    for plan in ("Common Voice", "Gramvaani", "SPRING-INX", "- fisher"):
        assert plan in printed.partition("the plan's corpora")[2]


def test_the_default_set_is_real_enough_and_fits_the_plans_disk():
    chosen = download_data.choose(None, None)
    assert all(row.default and row.commercial_ok for row in chosen)
    for language in ("english", "hindi", "telugu"):
        assert sum(row.hours for row in chosen if row.language == language) >= 2000
    chosen.sort(key=lambda row: -row.transient_gb)
    # The largest archives come while the disk is empty; 2,000 h augmented as Opus beside it.
    assert download_data.peak_gigabytes(chosen, 4) + 2000 * 10.8e-3 < 500


def test_what_the_flags_choose():
    def names(*arguments):
        return [row.name for row in download_data.choose(*arguments)]

    assert set(names(["emotion"], None)) == {"crema-d", "ravdess", "rasa-hindi", "rasa-telugu"}
    assert names(["emotion"], ["hindi"]) == ["rasa-hindi"]
    assert names(["openslr-66", "gramvaani"], None) == ["gramvaani", "openslr-66"]
    # The user's own copies come alone, unless --corpora says more.
    own = FetchOptions(fisher_dir=Path("x"))
    assert names(None, None, own) == ["fisher"]
    assert names(["openslr-66"], None, own) == ["openslr-66", "fisher"]
    release = FetchOptions(cv_dataset_ids={"hindi": "x"})
    assert names(None, None, release) == names(None, ["hindi"], release) == ["common-voice-hindi"]
    everything = names(["default"], None, release)
    assert set(everything) == {*names(None, None), "common-voice-hindi"}
    with pytest.raises(UserError, match="no corpus 'packages'.*tools/package_recordings.py"):
        names(["packages"], None)
    with pytest.raises(UserError, match="no corpus of that language"):
        names(["gramvaani"], ["telugu"])


def test_all_missing_licences_are_told_at_once_before_anything_is_fetched(server):
    rows = [ROWS[name] for name in ("kathbath-hindi", "kathbath-telugu", "vaani-telugu")]
    rows.append(ROWS["fleurs-telugu"])
    mirrors = {row.name: server.url for row in rows}
    server.gated = {"ai4bharat/Kathbath", "ARTPARK-IISc/Vaani"}
    with pytest.raises(UserError) as caught:
        download_data.check_access(rows, mirrors)
    told = str(caught.value)
    for repo in server.gated:
        assert told.count(f"https://huggingface.co/datasets/{repo}") == 1
    assert "hf auth login" in told and "\n" not in told
    server.gated = set()
    download_data.check_access(rows, mirrors)
    assert not any("resolve" in path for path, _ in server.log)
    with pytest.raises(UserError, match="no answer from Hugging Face"):
        download_data.check_access(rows, {row.name: "http://127.0.0.1:9" for row in rows})


def test_what_may_not_be_fetched_is_skipped_with_its_reason(capsys):
    rows = download_data.choose(["emotion", "fisher"], None)
    left = download_data.without_forbidden(rows, False, None)
    assert {row.name for row in left} == {"crema-d", "rasa-hindi", "rasa-telugu"}
    printed = capsys.readouterr().out
    for reason in ("--allow_noncommercial", "--fisher_dir"):
        assert reason in printed.replace("\n  ", " ")
    left = download_data.without_forbidden(rows, True, Path("ldc"))
    assert {"ravdess", "fisher"} <= {row.name for row in left}
    with pytest.raises(UserError, match="nothing left to fetch"):
        download_data.without_forbidden([ROWS["gramvaani"]], False, None)


def test_disputed_licences_are_not_for_commercial_use_and_say_so(capsys):
    rows = [ROWS["openslr-103"], ROWS["indictts-telugu"]]
    download_data.print_list(rows)
    printed = capsys.readouterr().out.replace("\n  ", " ")
    assert printed.count("its licence differs from place to place") == 2
    for row in rows:
        assert not row.commercial_ok and not row.default
        assert re.search(rf"^{row.name} .* CC-BY-4.0 \(\?\) +n$", printed, re.MULTILINE)
    assert download_data.without_forbidden(rows, True, None) == rows
    with pytest.raises(UserError, match="nothing left"):
        download_data.without_forbidden(rows, False, None)


def test_hours_are_counted_from_the_shards_and_estimates_until_then(server, tmp_path, capsys):
    row = ROWS["indicvoices-telugu"]
    options = FetchOptions(mirrors={row.name: server.url})
    download_data.print_list([row])
    assert "~296 " in capsys.readouterr().out
    files = dataset(row, seconds=2)
    server.add_dataset(row.repo, files)
    size = sum(map(len, files.values())) / 1e9
    listed = download_data.as_listed(row, options)
    assert listed.gigabytes == pytest.approx(size)
    assert listed.hours == pytest.approx(row.hours * size / row.gigabytes)
    corpora.fetch(row, tmp_path, options)
    counted = download_data.verify(row, tmp_path)
    assert counted["hours"] == counted["expected_hours"] == pytest.approx(12 * 2 / 3600, abs=1e-4)
    # A Hub that does not answer is the fetch's to tell.
    nowhere = FetchOptions(mirrors={row.name: str(tmp_path / "no")})
    assert download_data.as_listed(row, nowhere) is row


def test_disk_and_money_are_told_first_and_a_small_disk_refused(tmp_path, monkeypatch, capsys):
    rows = download_data.choose(None, None)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=100e9))
    with pytest.raises(UserError, match="GB needed, 100 GB free.*--max_hours"):
        download_data.check_disk(rows, tmp_path, FetchOptions(), 4)
    printed = capsys.readouterr().out
    assert "WAV 16 kHz 691" in printed and "idle H200" in printed
    assert max(len(line) for line in printed.splitlines()) <= 80
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=150e9))
    download_data.check_disk(rows, tmp_path, FetchOptions(max_hours=10), 2)
    short = download_data._scaled(ROWS["librispeech"], 200)
    assert (short.hours, short.transient_gb) == (pytest.approx(464.2), pytest.approx(23.0))
    # One archive: --max_hours cannot cut it.
    release = ROWS["common-voice-english"]
    assert download_data._scaled(release, 1) == release
    # What an earlier run has brought needs no room any more.
    part = tmp_path / "telugu/.openslr-66.part"
    part.mkdir(parents=True)
    (part / "x").write_bytes(bytes(1000))
    monkeypatch.setattr(fetching, "folder_bytes", lambda folder: 460e9 if folder == part else 0)
    download_data.check_disk([ROWS["openslr-66"]], tmp_path, FetchOptions(), 4)


# ----------------------------------------------------------------------------------- the script


def script(folder, *flags):
    return subprocess.run(
        [sys.executable, ROOT / "download_data.py", "--data_dir", folder, *flags],
        capture_output=True,
        text=True,
        cwd=folder,
        env={**os.environ, "COLUMNS": "80"},
    )


def test_the_script_fetches_reports_and_verifies(server, tmp_path, monkeypatch, capsys):
    served(server, ROWS["openslr-66"])
    row = ROWS["kathbath-telugu"]
    server.add_dataset(row.repo, dataset(row))
    flags = ("--corpora", "openslr-66", row.name, "--max_hours", "0.001")
    mirrors = ("--mirror", f"openslr-66={server.url}", f"{row.name}={server.url}")
    made = script(tmp_path, *flags, *mirrors, "--json", "found.json")
    assert made.returncode == 0, made.stderr
    assert "to fetch: 2 corpora" in made.stdout and f"{row.name}: fetched" in made.stdout
    found = {one["corpus"]: one for one in json.loads((tmp_path / "found.json").read_text())}
    assert found["openslr-66"]["files"] == 1 and found[row.name]["state"] == "ok"
    monkeypatch.setattr(sys, "argv", ["x", "--data_dir", str(tmp_path), *flags, *mirrors])
    assert download_data.main() == 0 and "openslr-66: already there" in capsys.readouterr().out
    verify = ["--data_dir", str(tmp_path), "--verify", "--languages", "telugu"]
    monkeypatch.setattr(sys, "argv", ["x", *verify])
    assert download_data.main() == 1
    printed = capsys.readouterr().out
    assert "not there" in printed and max(len(line) for line in printed.splitlines()) <= 80


def test_one_that_fails_does_not_stop_the_others(server, tmp_path, monkeypatch, capsys):
    row = ROWS["fleurs-telugu"]
    server.add_dataset(row.repo, dataset(row), row.revision)
    monkeypatch.setattr(
        sys,
        "argv",
        ["download_data.py", "--data_dir", str(tmp_path), "--corpora", row.name, "openslr-66",
         "--mirror", f"{row.name}={server.url}", f"openslr-66={server.url}", "--jobs", "1"],
    )
    assert download_data.main() == 1
    printed = capsys.readouterr()
    assert f"{row.name}: fetched" in printed.out and "missing in" in printed.out
    assert "error: " in printed.err and "te_in_female.zip: HTTP 404 Not Found" in printed.err


def test_the_unforeseen_ends_its_own_job_in_a_line(server, tmp_path, monkeypatch, capsys):
    row = ROWS["fleurs-telugu"]
    server.add_dataset(row.repo, dataset(row), row.revision)
    hub = corpora.FETCHERS[corpora.Hub]
    stale = OSError(116, "Stale file handle", "data/x.flac")

    def fails(job):
        if job.corpus.name == "rasa-hindi":
            return {}["no such key"]
        return hub(job)

    def cannot(job):
        raise stale

    monkeypatch.setitem(corpora.FETCHERS, corpora.Hub, fails)
    monkeypatch.setitem(corpora.FETCHERS, corpora.Archives, cannot)
    monkeypatch.setattr(download_data, "check_access", lambda *_: None)
    monkeypatch.setattr(
        sys,
        "argv",
        ["download_data.py", "--data_dir", str(tmp_path), "--corpora", row.name, "openslr-66",
         "rasa-hindi", "--mirror", f"{row.name}={server.url}", f"rasa-hindi={server.url}"],
    )
    assert download_data.main() == 1
    printed = capsys.readouterr()
    assert f"{row.name}: fetched" in printed.out and "Traceback" not in printed.err
    told = printed.err.partition("error: 2 of 3 corpora failed")[2]
    assert re.search(r"openslr-66 +data/x.flac: Stale file handle; the same command goes on", told)
    assert re.search(r"rasa-hindi +KeyError: 'no such key'; this is a bug: see .*errors.log", told)
    log = (tmp_path / download_data.ERRORS).read_text()
    assert "Traceback" in log and "in fails" in log


def test_a_manifest_that_cannot_be_read_is_its_corpus_fault_alone(tmp_path, monkeypatch, capsys):
    for name in ("kathbath-telugu", "behavior-sd"):
        folder = tmp_path / ROWS[name].place / name
        folder.mkdir(parents=True)
        (folder / "manifest.jsonl").write_text('{"path": 3}\n')
        (folder / corpora.RECORD).write_text('{"hours": "many", "whole": true, "max_hours": 0}')
    flags = ["--data_dir", str(tmp_path), "--verify", "--corpora", "kathbath-telugu", "behavior-sd"]
    monkeypatch.setattr(sys, "argv", ["download_data.py", *flags])
    assert download_data.main() == 1
    printed = capsys.readouterr().out
    assert printed.count("cannot be read") == 2 and printed.count("line 1: path is 3") == 2


def test_verify_opens_each_file_once(server, tmp_path, monkeypatch):
    row = ROWS["kathbath-telugu"]
    server.add_dataset(row.repo, dataset(row))
    corpora.fetch(row, tmp_path, FetchOptions(mirrors={row.name: server.url}))
    asked = asked_of(monkeypatch)
    assert download_data.verify(row, tmp_path)["state"] == "ok, small"
    assert not [one for one in asked if ".flac" in one]


def test_a_second_download_and_folders_that_cannot_be_written_are_told(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("x")

    def refused(*flags):
        monkeypatch.setattr(sys, "argv", ["download_data.py", "--corpora", "crema-d", *flags])
        with pytest.raises(UserError) as caught:
            download_data.main()
        return str(caught.value)

    data_dir = str(tmp_path / "data")
    assert "--data_dir" in refused("--data_dir", str(tmp_path / "file"))
    assert "--json" in refused("--data_dir", data_dir, "--json", str(tmp_path / "file/x"))
    assert "--json" in refused("--data_dir", data_dir, "--json", str(tmp_path))
    (tmp_path / "data").mkdir()
    with only_one(data_dir):
        assert "another process" in refused("--data_dir", data_dir)


@pytest.mark.parametrize(
    "flags",
    [("--max_hours", "-1"), ("--max_hours", "nan"), ("--max_hours", "inf"), ("--jobs", "0"),
     ("--jobs", "1.5"), ("--language", "hindi"), ("--languages", "klingon")],
)  # fmt: skip
def test_flags_out_of_range_are_one_line(flags, capsys):
    with pytest.raises(SystemExit) as caught:
        download_data.parse_args(flags)
    told = capsys.readouterr().err
    assert caught.value.code == 2 and told.startswith("error: ") and told.count("\n") == 1
    assert flags[0] in told


def test_help_keeps_its_paragraphs_and_tells_defaults(capsys):
    with pytest.raises(SystemExit):
        download_data.parse_args(["--help"])
    printed = capsys.readouterr().out
    assert "    python download_data.py --list" in printed and "(default: 4)" in printed
    assert "None" not in printed


def test_bad_flags_are_one_line(tmp_path, monkeypatch, capsys):
    def refused(*flags):
        monkeypatch.setattr(sys, "argv", ["download_data.py", "--data_dir", str(tmp_path), *flags])
        with pytest.raises(UserError) as caught:
            download_data.main()
        assert "\n" not in str(caught.value)
        return str(caught.value)

    assert "no corpus 'nope'" in refused("--corpora", "nope")
    assert "NAME=VALUE" in refused("--mirror", "crema-d")
    assert "--mirror nope=x" in refused("--mirror", "nope=x")
    assert "nothing left" in refused("--corpora", "gramvaani")
    assert "no such folder" in refused("--corpora", "fisher", "--fisher_dir", "nowhere")
