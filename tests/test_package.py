"""What a newcomer sees first: names, README, files on disk, text on a terminal."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import interp_steer
from interp_steer.errors import RunError, nearest
from interp_steer.prompts.file import read_prompts
from interp_steer.util.console import progress, safe
from interp_steer.util.files import cache_dir, whole

ROOT = Path(__file__).parents[1]


def test_import_is_free_and_every_name_is_there():
    code = (
        "import sys, interp_steer\n"
        "assert 'torch' not in sys.modules\n"
        "for name in interp_steer.__all__: assert callable(getattr(interp_steer, name)), name\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    with pytest.raises(AttributeError, match="no attribute 'Steering'"):
        _ = interp_steer.Steering


def test_readme_has_exactly_one_command_under_each_heading():
    text = (ROOT / "README.md").read_text()
    for heading in ("Try it", "Test it"):
        section = text.split(f"\n## {heading}\n")[1].split("\n## ")[0]
        block = section.split("```")[1].split("\n")[1:-1]
        assert len(block) == 1, block


def test_the_demos_prompts_play_one_part_each():
    data = ROOT / "interp_steer" / "data" / "demo_texts"
    parts = [
        read_prompts(data / f"{part}.txt") for part in ("positive", "negative", "choose", "show")
    ]
    assert [len(part) for part in parts] == [24, 24, 8, 8]
    everything = [prompt for part in parts for prompt in part]
    assert len(set(everything)) == len(everything)
    neutral = " ".join(str(prompt) for part in parts[1:] for prompt in part)
    assert not any(word in neutral for word in ("Eiffel", "Paris", "France", "French"))


def test_a_file_is_written_whole_or_not_at_all(tmp_path):
    target = tmp_path / "deep" / "file.txt"
    with whole(target) as part:
        part.write_text("old")
    with pytest.raises(KeyError), whole(target) as part:
        part.write_text("half")
        raise KeyError
    assert target.read_text() == "old" and os.listdir(target.parent) == ["file.txt"]
    (tmp_path / "wall").write_text("")
    with pytest.raises(RunError, match="wall"), whole(tmp_path / "wall" / "file") as part:
        pass


def test_the_cache_moves_where_it_is_told(tmp_path, monkeypatch):
    monkeypatch.setenv("INTERP_STEER_CACHE", str(tmp_path / "here"))
    assert cache_dir("models") == tmp_path / "here" / "models"
    monkeypatch.delenv("INTERP_STEER_CACHE")
    assert cache_dir() == ROOT / "cache"


def test_escape_codes_do_not_reach_the_terminal():
    assert safe("a\x1b[31mb\x00\u202ec\n\td") == "a\ufffd[31mb\ufffd\ufffdc\n\td"


def test_progress_tells_the_time_left(capsys):
    with progress("work", 4, every=0) as report:
        report(1)
    assert "work: 25%" in capsys.readouterr().err


def test_nearest_names_what_was_meant():
    assert nearest("mean", ["mean-difference", "probe"]) == "; nearest: mean-difference"
    assert nearest("x", ["a", "b"]) == "; choices: a, b"
    assert nearest("x", map(str, range(100))) == ""
