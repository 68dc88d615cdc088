"""A steered checkpoint in transformers, against a plain hook on the base."""

import json
import os
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from interp_steer.export import checkpoint
from interp_steer.export.constant import constants
from interp_steer.steering.direction import Direction
from interp_steer.steering.grammar import parse
from tests.conftest import command

ABOUT = {"model": "tiny", "steer": "a | b"}


@pytest.fixture
def known():
    draw = np.random.default_rng(3)
    return {n: Direction.of(draw.normal(size=64), "blocks.2.hook_resid_post", n) for n in "ab"}


def hooked(model, added):
    """Adds to the output of modules of transformers, at every position."""

    def hook(vector):
        def change(_module, _inputs, out):
            if isinstance(out, tuple):
                return (out[0] + vector, *out[1:])
            return out + vector

        return change

    return [model.get_submodule(m).register_forward_hook(hook(v)) for m, v in added.items()]


@pytest.mark.parametrize("line", [
    "add(a, 5) at 0", "add(a, 5) at 3; add(b, -4) at 3", "add(a, 5) at 5",
    "add(b, 3) at attn_out 2", "add(a, 5) at mlp_out 2; add(b, 3) at attn_out 0",
])  # fmt: skip
@pytest.mark.parametrize("sharded", [False, True])
def test_transformers_computes_the_line(tiny, tiny_folder, known, tmp_path, line, sharded):
    base = tiny_folder
    if sharded:
        base = tmp_path / "base"
        tiny.hf.save_pretrained(base, max_shard_size="200KB")
        tiny.tokenizer.save_pretrained(base)
        assert len([*base.glob("*.safetensors")]) > 2
    steps = parse("; ".join(f"{one} on all+first" for one in line.split("; ")), known)
    found = constants(steps, tiny)
    out = checkpoint.write(found, base, tiny.shape, tmp_path / "out", ABOUT)
    steered, told = AutoModelForCausalLM.from_pretrained(
        out, dtype=torch.float32, output_loading_info=True
    )
    assert not any(told.values()), told
    ids = AutoTokenizer.from_pretrained(out)("The quick brown fox", return_tensors="pt").input_ids
    parts = {"resid_post": "model.layers.{}", "attn_out": "model.layers.{}.self_attn"}
    plain = LlamaForCausalLM.from_pretrained(base, dtype=torch.float32)
    with torch.no_grad():
        before = plain(ids).logits
        handles = hooked(plain, {parts[s.component].format(s.layer): v for s, v in found.items()})
        expected = plain(ids).logits
        assert (steered(ids).logits - expected).abs().max() < 1e-4 * expected.abs().max()
        assert (expected - before).abs().max() > 0.1
        greedy = dict(max_new_tokens=24, do_sample=False)
        assert torch.equal(steered.generate(ids, **greedy), plain.generate(ids, **greedy))
    for handle in handles:
        handle.remove()
    # the keys are those of a fresh model of that configuration, and each is in the file it names
    index = json.loads((out / checkpoint.INDEX).read_text())
    assert set(index["weight_map"]) == set(LlamaForCausalLM(steered.config).state_dict())
    for name in {*index["weight_map"].values()}:
        held = set(load_file(out / name))
        assert held == {key for key, file in index["weight_map"].items() if file == name}


def test_weights_are_linked_or_copied(tiny, tiny_folder, known, tmp_path, monkeypatch):
    found = constants(parse("add(a, 5) at 3 on all+first", known), tiny)
    linked = checkpoint.write(found, tiny_folder, tiny.shape, tmp_path / "linked", ABOUT)
    weights = (tiny_folder / "model.safetensors").stat()
    assert (linked / "model-weights.safetensors").stat().st_ino == weights.st_ino
    assert not (linked / "model.safetensors").exists()  # it would be read without the index

    def refused(*_):
        raise OSError("another file system")

    monkeypatch.setattr(os, "link", refused)
    told = []
    copied = checkpoint.write(
        found, tiny_folder, tiny.shape, tmp_path / "copied", ABOUT, report=told.append
    )
    there = (copied / "model-weights.safetensors").stat()
    assert there.st_ino != weights.st_ino and told == [there.st_size] == [weights.st_size]


def test_nothing_is_left_of_a_failure(tiny, tiny_folder, known, tmp_path, monkeypatch):
    import safetensors.torch

    found = constants(parse("add(a, 5) at 3 on all+first", known), tiny)

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(safetensors.torch, "save_file", full)
    with pytest.raises(Exception, match="the disk is full"):
        checkpoint.write(found, tiny_folder, tiny.shape, tmp_path / "out", ABOUT)
    assert not [*tmp_path.iterdir()]


def test_lengths_need_no_weights(tiny_folder, known, tmp_path, monkeypatch):
    """A checkpoint of 8B is written on a machine that cannot hold it: only headers are read.
    Weights that are no numbers show it, since loading refuses them.
    """
    from safetensors.torch import save_file

    base = tmp_path / "base"
    shutil.copytree(tiny_folder, base)
    held = load_file(base / "model.safetensors")
    save_file(
        {k: torch.full_like(v, torch.nan) for k, v in held.items()}, base / "model.safetensors"
    )
    monkeypatch.setenv("INTERP_STEER_CACHE", str(tmp_path / "cache"))
    known["a"].save(tmp_path / "a.safetensors")
    asked = ("export", "checkpoint", "--model", base, "--out", tmp_path / "out", "--steer")
    command(*asked, f"add({tmp_path}/a.safetensors, 5) at 3 on all+first")
    bias = load_file(tmp_path / "out" / checkpoint.BIASES)["model.layers.3.mlp.down_proj.bias"]
    assert bias.norm().item() == pytest.approx(5)
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "model_type": "mistral"}))
    asked = (*asked[:5], tmp_path / "other", "--steer")
    _, told = command(*asked, f"add({tmp_path}/a.safetensors, 5) at 3 on all+first", code=2)
    assert "mistral" in told and not (tmp_path / "other").exists()


def test_the_command_and_its_card(tiny_folder, known, tmp_path, monkeypatch):
    monkeypatch.setenv("INTERP_STEER_CACHE", str(tmp_path / "cache"))
    known["a"].save(tmp_path / "a.safetensors")
    out = tmp_path / "steered"
    asked = ("export", "checkpoint", "--model", tiny_folder, "--out", out, "--device", "cpu")
    steer = f"add({tmp_path}/a.safetensors, 0.3 dose) at 3"
    _, refused = command(*asked, "--steer", steer, code=2)
    assert "'add(a, 0.3 dose) at 3'" in refused and "--include-first" in refused
    assert not out.exists()
    told = json.loads(command(*asked, "--steer", steer, "--include-first", "--json")[0])
    assert told["first_position"]["kl"] > 0 and told["steer"].endswith("on all+first")
    card = (out / "README.md").read_text()
    assert told["steer"] in card and "SGLang ignores" in card and "nats a token" in card
    assert f"| model | {tiny_folder.name} |" in card and str(tiny_folder) not in card
    assert "base_model" not in card and "revision" not in card  # a folder's name is no hub id
    hub = checkpoint.card({}, {"model": "meta-llama/Llama-3.1-8B", "revision": "abc"})
    assert hub.startswith("---\nbase_model: meta-llama/Llama-3.1-8B\ntags: [steering]\n---\n")
    config = json.loads((out / "config.json").read_text())
    assert (config["mlp_bias"], config["attention_bias"]) == (True, False)
    bias = load_file(out / checkpoint.BIASES)["model.layers.3.mlp.down_proj.bias"]
    length = float(told["steer"].split(", ")[1].split(")")[0])
    assert bias.norm().item() == pytest.approx(length, rel=1e-5)
    _, again = command(*asked, "--steer", steer, "--include-first", code=2)
    assert "is there already" in again
