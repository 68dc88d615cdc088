"""What the commands share: numbers in options, files that can be written, tables."""

import io
import sys

import pytest

from interp_steer.cli.common import indices, table, writable
from interp_steer.errors import RequestError


@pytest.mark.parametrize(
    ("text", "sign", "expected"),
    [("3,7,12-14", "", [3, 7, 12, 13, 14]), (" 5 ", "", [5]), ("-1,0,2-3", "-?", [-1, 0, 2, 3])],
)
def test_indices(text, sign, expected):
    assert indices("layers", text, sign) == expected


@pytest.mark.parametrize("text", ["", "2-", "-1", "5-3", "a", "1,,2", "0-999999999"])
def test_what_is_no_index_is_refused_with_the_option(text):
    with pytest.raises(RequestError, match=f"--layers is '{text}', expected such as 3,7,12-20"):
        indices("layers", text)


def test_a_file_that_cannot_be_written_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    writable("--out", None)
    writable("--out", tmp_path / "a.csv", (".csv",))
    writable("--out", tmp_path / "deep" / "a.csv", (".csv",), new_folders=True)
    for path, expected in [
        (tmp_path, "is a folder"),
        (tmp_path / "a.txt", "expected a .csv file"),
        (tmp_path / "deep" / "a.csv", "there is no folder"),
        (tmp_path / "file" / "a.csv", "cannot be written"),
    ]:
        with pytest.raises(RequestError, match=expected):
            writable("--out", path, (".csv",) if path.suffix else ())


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


ROWS = [
    (7, 0.123456, "a [bold]dog[/bold] \x1b[31m\nruns", None),
    (12, float("nan"), ["one", "two"], None),
]


def test_a_table_has_tabs_where_no_terminal_reads_it(capsys):
    table(("index", "score", "label", "none"), ROWS)
    assert capsys.readouterr().out.splitlines() == [
        "index\tscore\tlabel\tnone",
        "7\t0.1235\ta [bold]dog[/bold] \ufffd[31m\\nruns\t",
        "12\t\tone two\t",
    ]


def test_a_table_is_aligned_on_a_terminal_without_empty_columns(monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setenv("TERM", "dumb")
    monkeypatch.setattr(sys, "stdout", Terminal())
    table(("index", "score", "label", "none"), ROWS)
    lines = [line.rstrip() for line in sys.stdout.getvalue().splitlines()]
    assert lines == [
        "index   score  label",
        "    7  0.1235  a [bold]dog[/bold] \ufffd[31m\\nruns",
        "   12          one two",
    ]


def test_a_table_wider_than_the_terminal_keeps_its_numbers_whole(monkeypatch):
    monkeypatch.setenv("COLUMNS", "20")
    monkeypatch.setattr(sys, "stdout", Terminal())
    table([f"number{i}" for i in range(6)], [[123456.0] * 6])
    assert sys.stdout.getvalue().splitlines()[1].split() == ["1.235e+05"] * 6
