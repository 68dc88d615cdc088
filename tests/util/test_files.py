"""Text of strangers: bounded before it is read, and every refusal one line."""

import json

import pytest

from interp_steer.errors import RequestError, RunError
from interp_steer.util import files
from interp_steer.util.files import cache_dir, parse_json, read_text


def test_json_is_what_the_standard_library_reads():
    given = {
        "a": [1, -2.5, None, True, '[[[{"\\\n'],
        "deep": [[[[{}]]]],
        "large": 10**299,
        "é": "\u2028 \U0001f600 \\\\ud800",
    }
    assert parse_json(json.dumps(given), "x") == given
    assert parse_json(json.dumps(["[" * 1000, '"' * 1000] * 99), "x")[0] == "[" * 1000
    assert parse_json("[" * 64 + "]" * 64, "x") == json.loads("[" * 64 + "]" * 64)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[" * 65 + "]" * 65, "nested more than 64 levels deep"),
        ("[" * 200_000, "nested more than 64 levels deep"),
        ('{"a":' * 100_000, "nested more than 64 levels deep"),
        ("[" + "[]," * 500_000 + "0]", "more than 500,000 lists"),
        ("[" + "9" * 6000 + "]", "a whole number of 6000 digits"),
        ('{"a": 1, "b": {"c": 1, "c": 2}}', "the key 'c' is there twice"),
        ('{"a": ["\\ud83d\\ude00", "x \\udE00"]}', "half a character"),
        ('{"\\ud800": 1}', "half a character"),
        ('{"a": 1', "is not valid JSON"),
        ("", "is not valid JSON"),
    ],
)
def test_json_that_is_refused(text, said):
    with pytest.raises(RequestError, match=said) as caught:
        parse_json(text, "p.jsonl, entry 3")
    assert str(caught.value).startswith("p.jsonl, entry 3 ") and "\n" not in str(caught.value)
    with pytest.raises(RunError):
        parse_json(text, "x", RunError)


def test_a_file_is_read_up_to_its_limit(tmp_path):
    path = tmp_path / "f.txt"
    path.write_bytes("\ufeffcafé\r\n".encode())
    assert read_text(path) == "café\r\n"
    assert read_text(path, limit=10) == "café\r\n"
    with pytest.raises(RequestError, match="more than 9 bytes"):
        read_text(path, limit=9)
    path.write_bytes(b"ab\xff")
    with pytest.raises(RequestError, match=r"not UTF-8 text \(byte 2\)"):
        read_text(path)
    with pytest.raises(RunError, match="not UTF-8"):
        read_text(path, error=RunError)
    with pytest.raises(RunError, match="No such file"):
        read_text(tmp_path / "gone")
    with path.open("wb") as file:
        file.truncate(2**36)  # sparse: 64 GiB that nobody should read
    with pytest.raises(RequestError, match="more than 16,777,216 bytes"):
        read_text(path)


@pytest.mark.parametrize(
    ("found", "own"),
    [
        ('[project]\nname = "interp-steer"\n', True),
        ('[project]\nname = "another"\n', False),
        ("[tool.ruff]\n", False),
        ("no [toml", False),
        (None, False),
    ],
)
def test_the_cache_lies_in_this_projects_own_checkout_alone(tmp_path, monkeypatch, found, own):
    folder = tmp_path / "site-packages"
    (folder / "interp_steer").mkdir(parents=True)
    if found:
        (folder / "pyproject.toml").write_text(found)
    monkeypatch.setattr(files, "__file__", str(folder / "interp_steer" / "util" / "files.py"))
    monkeypatch.delenv("INTERP_STEER_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    expected = folder / "cache" / "a" if own else tmp_path / "xdg" / "interp-steer" / "a"
    assert cache_dir("a") == expected and expected.is_dir()
