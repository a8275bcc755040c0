"""Schemas of JSON lines and names of files in the making."""

import os

import pytest

import command


@pytest.mark.parametrize(
    "kind, right, wrong",
    [
        ("text", ["", "न\u2028ा"], [1, None, ["a"], True, "\ud83d"]),
        ("text?", ["a", None], [0, []]),
        ("path", ["../a.wav", "/b", "\udcff.wav"], ["", None, 3, "a\0"]),
        ("number", [0, -1.5], [float("nan"), float("inf"), 10**400, "1", True, None]),
        ("whole", [3], [3.0, False, "3"]),
        ("flag", [True, False], ["false", 0, 1, None]),
        ("list of text", [[], ["a"]], ["ab", [1], None]),
        ("list of span?", [None, [["a", 0, 0.5]]],
         ["ab", [["a", 0.5, 0]], [["a", -1, 0]], [[1, 0, 1]], [["a", 0, None]], [["a", 0]]]),
        (("hindi", "english"), ["hindi"], ["urdu", 0, None, ["hindi"]]),
        (("happy", None), ["happy", None], ["", "glad", 1]),
    ],
)  # fmt: skip
def test_a_field_is_of_its_kind_or_named(kind, right, wrong):
    for value in right:
        command.check_fields({"field": value}, {"field": kind}, "x.jsonl, line 7")
    for value in wrong:
        with pytest.raises(command.UserError, match="x.jsonl, line 7: field is"):
            command.check_fields({"field": value}, {"field": kind}, "x.jsonl, line 7")


@pytest.mark.parametrize(
    "line", [b"{", b"\xff\xfe{}", b"[1]", b"null", b'{"a": "\n', b"[" * 100000, b"{} {}"]
)
def test_a_bad_json_line_is_named(tmp_path, line):
    (tmp_path / "a.jsonl").write_bytes('\ufeff{"a": "\u2028\u2029\x85"}\r\n\n'.encode() + line)
    rows = command.json_lines(tmp_path / "a.jsonl")
    assert next(rows) == (1, {"a": "\u2028\u2029\x85"})
    with pytest.raises(command.UserError, match=r"a\.jsonl, line 3: not") as caught:
        next(rows)
    assert "\n" not in str(caught.value)


def test_a_file_in_the_making_has_a_short_name_of_its_own(tmp_path):
    names = ["न" * 80 + "abc.wav.textgr1", "న" * 80 + "abd.wav.textgr1", "\udcff.wav"]
    parts = {command.part_name(tmp_path / name) for name in names}
    assert len(parts) == 3 and all(len(os.fsencode(part.name)) < 50 for part in parts)
    for part in parts:
        part.touch()
