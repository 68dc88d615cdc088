"""What the readers' own classes make of our files: lm-eval, vllm-lens, interp-engine.

They are an extra (`peers`), and each test is skipped without its reader.
"""

import importlib
import json

import numpy as np
import pytest
import torch

from interp_steer.errors import RequestError
from interp_steer.export import harness
from interp_steer.export.constant import constants
from interp_steer.export.request import interp_engine, vllm_lens
from interp_steer.steering.direction import Direction
from interp_steer.steering.grammar import parse
from tests.conftest import command


@pytest.fixture
def known():
    draw = np.random.default_rng(5)
    return {n: Direction.of(draw.normal(size=64), "blocks.2.hook_resid_post", n) for n in "ab"}


LINES = [
    "add(a, 5) at 3 on all+first",
    "add(a, 5) at 0 on all+first; add(b, 2) at 0 on all+first; add(b, -3) at 5 on all+first",
    "add(a, 0.4) at attn_out 2 on all+first; add(b, 3) at mlp_out 1 on all+first",
    "add(a, 0.4) at resid_pre 0 on all+first",
    "clamp(a, 4) at 2 on all+first",
    "ablate(a) at 2 on all+first; add(b, 2) at 4 on all+first",
    "clamp(a, 0.5) at attn_out 3 on all+first",
    "clamp(a, 0.5) at mlp_out 3 on all+first",
]


@pytest.mark.parametrize("line", LINES)
def test_lm_evals_own_class_computes_the_line(tiny, tiny_folder, known, tmp_path, line):
    """Its logits are those of our contract, TransformerLens's hooks under the same line."""
    steered = pytest.importorskip("lm_eval.models.hf_steered")
    from interp_steer.engine.hooks import fwd_hooks

    steps = parse(line, known)
    path = harness.write(harness.entries(steps, tiny), tmp_path / "steer.pt")
    theirs = steered.SteeredModel(
        pretrained=str(tiny_folder), steer_path=str(path), device="cpu", dtype="float32"
    )
    prompt = "The quick brown fox jumps"
    ids = torch.tensor([tiny.encode(prompt).ids])
    with torch.no_grad(), tiny.hooked.hooks(fwd_hooks=fwd_hooks(tiny, steps, prompt)):
        ours = tiny.hooked(ids)
        plain = tiny.hf(ids).logits
    with torch.no_grad():
        got = theirs._model_call(ids)
    assert (got - ours).abs().max() < 1e-4 * ours.abs().max()
    assert (got - plain).abs().max() > 0.01


@pytest.mark.parametrize(("line", "why"), [
    ("add(a, 5) at 2 on all+first; clamp(b, 3) at 2 on all+first", "adds and clamps there"),
    ("clamp(a, 5) at 2 on all+first; clamp(b, 3) at 2 on all+first", "clamps it twice"),
    ("clamp(a, 5) at 2", "lm-eval clamps at every position"),
    ("clamp_min(a, 5) at 2 on all+first", "depends on the activation"),
])  # fmt: skip
def test_what_lm_eval_has_no_entry_for(tiny, known, line, why):
    with pytest.raises(RequestError, match=why):
        harness.entries(parse(line, known), tiny)


def test_lm_eval_reads_other_endings(tmp_path):
    with pytest.raises(RequestError, match=r"lm-eval reads \.pt or \.pth"):
        harness.write({}, tmp_path / "steer.bin")


def test_vllm_lens_reads_our_request(tiny, known):
    lens = pytest.importorskip("vllm_lens")
    steps = parse("add(a, 5) at 3 on all+first; add(b, -2) at 1 on all+first", known)
    found = constants(steps, tiny)
    carried = vllm_lens(found)["vllm_xargs"]["apply_steering_vectors"]
    assert isinstance(carried, str)  # vLLM's type takes no lists of mappings
    (vector,) = map(lens.SteeringVector.model_validate, json.loads(carried))
    assert vector.layer_indices == [1, 3] and (vector.scale, vector.norm_match) == (1.0, False)
    assert torch.equal(vector.activations, torch.stack([*found.values()]))


@pytest.mark.parametrize("operator", [
    "add(a, 5)", "clamp(a, 2)", "clamp_min(a, 2)", "clamp_max(a, -1)", "ablate(a)",
])  # fmt: skip
def test_interp_engine_computes_our_operators(tiny, known, operator):
    """Its schema reads the request, and what its functions add is what our operators add."""
    theirs = importlib.import_module(pytest.importorskip("interp_engine").__name__ + ".steer")
    schemas = importlib.import_module("interp_engine.server.schemas")
    body = interp_engine(parse(f"{operator} at 3 on all+first", known), tiny)
    assert body["steer_generated"] is True
    wire = schemas.SteeringWire.model_validate(json.loads(json.dumps(body["steering"][0])))
    (op,) = wire.to_spec(64).layers[3].operations
    x = torch.randn(2, 5, 64, generator=torch.Generator().manual_seed(0)) * 3
    unit, projection = known["a"].unit, x @ known["a"].unit
    name = operator.split("(")[0]
    if name == "add":
        assert torch.allclose(op.vector * op.scale, unit * 5) and not op.normalize
        return
    if name == "ablate":
        moved = x + theirs.ablate_delta(x, op.vector)
        target = torch.zeros_like(projection)
    else:
        moved = x + theirs.projection_cap_delta(x, op.vector, minimum=op.min, maximum=op.max)
        target = {"clamp": torch.full_like(projection, 2), "clamp_min": projection.clamp(min=2),
                  "clamp_max": projection.clamp(max=-1)}[name]  # fmt: skip
    expected = x + (target - projection)[..., None] * unit
    assert torch.allclose(moved, expected, atol=1e-5)


def test_interp_engine_and_the_prompt_alone(tiny, known):
    body = interp_engine(parse("add(a, 5) at 3 on prompt+first", known), tiny)
    assert body["steer_generated"] is False
    for line, why in (
        ("add(a, 5) at 3", "--include-first"),
        ("add(a, 5) at 3 on last", "every position"),
        ("add(a, 5) at mlp_out 3 on all+first", "is for resid_post"),
        ("clamp(a, 5) at 3 on all+first; clamp(b, 1) at 3 on all+first", "one after the other"),
        ("add_norm_kept(a, 5) at 3 on all+first", "adds, clamps and ablates"),
    ):
        with pytest.raises(RequestError, match=why):
            interp_engine(parse(line, known), tiny)


def test_requests_are_printed_and_written(tiny_folder, known, tmp_path):
    known["a"].save(tmp_path / "a.safetensors")
    steer = f"add({tmp_path}/a.safetensors, 2) at 3 on all+first"
    asked = ("--model", tiny_folder, "--steer", steer)
    shown, _ = command("export", "vllm-lens", *asked)
    command("export", "vllm-lens", *asked, "--out", tmp_path / "body.json")
    assert json.loads(shown) == json.loads((tmp_path / "body.json").read_text())
    printed, _ = command("export", "interp-engine", *asked)
    assert json.loads(printed)["steering"][0]["layers"]["3"][0]["scale"] == 2
    for words, why in (
        (("export", "lmeval", *asked), "unknown format 'lmeval'; nearest: lm-eval"),
        (("export", "gguf", *asked), "give --out FILE.gguf"),
        (("export", "gguf", *asked, "--out", tmp_path / "a.bin"), "expected a .gguf file"),
        (("export", "steered-gguf", *asked, "--out", tmp_path / "a.gguf"), "needs --gguf"),
        (("export", "gguf", *asked, "--out", tmp_path / "a.gguf", "--gguf", "b"), "--gguf is for"),
    ):
        assert why in command(*words, code=2)[1]
