"""Researcher scripts, at a size that shows that they run."""

import json
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from interp_steer.direction import Direction

SCRIPTS = Path(__file__).parents[1] / "scripts"


def test_eiffel_tower_8b_on_a_tiny_llama(tiny_folder, tmp_path):
    file = Direction.of(torch.randn(64), "blocks.3.hook_resid_post", "eiffel").save(
        tmp_path / "d.safetensors"
    )
    prompts = tmp_path / "prompts.json"
    prompts.write_text(json.dumps([{"instruction": "Name three fruits."}, {"instruction": "Why?"}]))
    done = subprocess.run(
        [sys.executable, str(SCRIPTS / "eiffel_tower_8b.py"), "--model", str(tiny_folder),
         "--direction", str(file), "--layer", "3", "--prompts", str(prompts),
         "--max-new-tokens", "8", "--out", str(tmp_path / "out.json")],
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("\n") == 5 and "clamp, improved sampling" in done.stdout
    records = json.loads((tmp_path / "out.json").read_text())
    assert len(records) == 8 and records[2]["coefficient"] == [8.5]


def test_eiffel_tower_8b_without_network_is_one_line(tmp_path):
    prompts = tmp_path / "p.txt"
    prompts.write_text("Why?\n")
    done = subprocess.run(
        [sys.executable, str(SCRIPTS / "eiffel_tower_8b.py"), "--prompts", str(prompts)],
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 1
    assert done.stderr.startswith("error: ") and "Traceback" not in done.stderr


@pytest.mark.parametrize("name", ["layer_sweep", "layer_ablation", "steerability"])
def test_studies_run_at_small_size(name, tiny_folder, tmp_path, monkeypatch, capsys):
    texts = {"INTERP_STEER_DATA": "/nonexistent", "RUN": str(tmp_path), "MODEL": str(tiny_folder)}
    for key, value in texts.items():
        monkeypatch.setenv(key, value)
    monkeypatch.setattr(sys, "argv", [name, "--small"])
    runpy.run_path(str(SCRIPTS / f"{name}.py"))
    wrote = tmp_path / ("profile.png" if name == "layer_ablation" else "report.html")
    assert wrote.stat().st_size > 5000 and str(wrote) in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="reads peaks as Linux does")
def test_memory_is_as_planned():
    done = subprocess.run(
        [sys.executable, str(SCRIPTS / "benchmark_memory.py"), "--rows", "64", "--json"],
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    for one in json.loads(done.stdout):
        assert one["load"] <= 1.10
        assert 0.8 <= one["planned"] / one["peak"] <= 1.2
