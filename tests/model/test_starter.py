"""The starter model: fetched, checked, unpacked once; and a real model for what needs one."""

import os
import shutil
import subprocess
import sys

import pytest
import torch

from interp_steer.engine.engine import Engine
from interp_steer.engine.row import Row, Sampling
from interp_steer.engine.verify import verify
from interp_steer.errors import RunError
from interp_steer.model import starter
from interp_steer.prompts.prompt import chat


@pytest.fixture
def empty_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("INTERP_STEER_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def left_in(cache) -> list[str]:
    return os.listdir(cache / "models")


def test_a_damaged_file_is_refused_and_nothing_is_left(empty_cache, tmp_path, monkeypatch):
    for name in ("model.gguf", "package.whl"):
        damaged = tmp_path / name
        damaged.write_bytes(b"GGUF" + bytes(1000))
        monkeypatch.setenv("INTERP_STEER_STARTER", str(damaged))
        with pytest.raises(RunError, match="wrong checksum"):
            starter.folder()
        assert left_in(empty_cache) == []


def test_a_missing_file_is_said(empty_cache, tmp_path, monkeypatch):
    monkeypatch.setenv("INTERP_STEER_STARTER", str(tmp_path / "none.whl"))
    with pytest.raises(RunError, match="not a file"):
        starter.folder()


def test_without_network_the_error_says_what_to_do(empty_cache):
    """A process of its own: pip finds no index."""
    offline = {**os.environ, "PIP_NO_INDEX": "1", "PIP_FIND_LINKS": ""}
    offline.pop("INTERP_STEER_STARTER", None)
    done = subprocess.run(
        [sys.executable, "-m", "interp_steer", "generate", "--prompt", "Hello"],
        capture_output=True, text=True, env=offline,
    )  # fmt: skip
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "INTERP_STEER_STARTER" in done.stderr.splitlines()[-1]
    assert left_in(empty_cache) == []


def test_later_starts_read_the_cache_alone(starter, monkeypatch):  # the fixture has filled it
    from interp_steer.model import starter as module

    monkeypatch.setattr(module, "_fetch", lambda *_: pytest.fail("fetched again"))
    assert (module.folder() / "model.safetensors").is_file()


def test_it_is_the_model_it_should_be(starter):
    assert (starter.n_layers, starter.d_model, starter.n_heads, starter.n_kv_heads) == (
        30,
        576,
        9,
        3,
    )
    one = starter.encode(chat("Who are you?"))
    text = starter.tokenizer.decode(one.ids)
    assert text.startswith("<|im_start|>system") and text.endswith("<|im_start|>assistant\n")
    assert sum(one.content) == 4  # "Who are you?"


def test_its_greedy_text_is_that_of_transformers(starter):
    prompt = chat("What is the capital of France?")
    ids = torch.tensor([starter.encode(prompt).ids])
    with torch.no_grad():
        theirs = starter.hf.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=20, do_sample=False
        )[0, ids.shape[1] :].tolist()
    mine = Engine(starter).generate([Row(prompt, (), Sampling(max_new_tokens=20))])[0]
    assert list(mine.token_ids) == [i for i in theirs if i not in starter.stop_ids]
    assert "Paris" in mine.text


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_contract_holds_on_it(dtype):
    from interp_steer.model.model import SteeringModel

    failed = [c for c in verify(SteeringModel.load("starter", dtype=dtype)) if not c.passed]
    assert failed == []


@pytest.mark.slow
def test_a_damaged_cache_is_built_again(starter, empty_cache):
    from interp_steer.model import starter as module

    built = module.folder()
    weights = built / "model.safetensors"
    good = module.sha256(weights)
    with weights.open("r+b") as file:
        file.seek(1_000_000)
        file.write(b"damage")
    assert module.folder() == built and module.sha256(weights) == good
    shutil.rmtree(built)


@pytest.mark.slow
def test_the_demo_works_on_prompts_it_was_not_tuned_on(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "interp_steer", "demo", "--out", str(tmp_path)],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    told = done.stdout.split("and surprise below 2.0:")[1].splitlines()[1:4]
    works = {line.split()[0]: int(line.split()[1]) for line in told}
    assert works["contrast"] >= 3 and max(works["add"], works["clamp"]) >= 3
    assert (tmp_path / "demo.png").stat().st_size > 10_000
    assert done.stdout.count("unsteered |") == 8 and all(
        word in done.stdout for word in ("Eiffel", "Paris", "France")
    )
    assert "features fire on Eiffel, Paris, France; by output score:" in done.stdout
