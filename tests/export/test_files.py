"""Vectors as files: written, read by the readers' own classes, and read back."""

import sys

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from interp_steer.errors import RequestError, RunError
from interp_steer.export import control_vector, harness
from interp_steer.export.constant import constants
from interp_steer.export.incoming import imported
from interp_steer.model.shape import Bounds
from interp_steer.steering.direction import Direction, DirectionSet, load
from interp_steer.steering.grammar import parse
from tests.conftest import command

BOUNDS = Bounds("tiny", 6, 4, 64, 24)


@pytest.fixture
def every():
    """A direction for layers 1-5, each of another length."""
    draw = np.random.default_rng(1)
    points = [f"blocks.{n}.hook_resid_post" for n in range(1, 6)]
    return DirectionSet([Direction.of(draw.normal(size=64) * 3, p) for p in points], "every")


@pytest.fixture
def found(tiny, every):
    return constants(parse("add(every, 1 raw) at 1-5 on all+first", {"every": every}), tiny)


def repeng():
    """repeng's class; its 0.4 was written for NumPy 1."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(np, "float_", np.float64, raising=False)
        sys.modules.pop("repeng", None)
        return pytest.importorskip("repeng").ControlVector


def test_a_control_vector_is_as_llama_cpp_reads_it(found, tmp_path):
    path = control_vector.write(found, tmp_path / "v.gguf")
    reader = gguf.GGUFReader(path)
    assert [t.name for t in reader.tensors] == [f"direction.{n}" for n in range(1, 6)]
    for tensor, vector in zip(reader.tensors, found.values(), strict=True):
        assert tensor.tensor_type == gguf.GGMLQuantizationType.F32
        assert tensor.data.shape == (64,) and np.array_equal(tensor.data, vector.numpy())
    fields = {key: reader.get_field(f"controlvector.{key}").contents()
              for key in ("model_hint", "layer_count")}  # fmt: skip
    assert fields == {"model_hint": "llama", "layer_count": 5}


def test_repeng_reads_ours_and_we_read_its(found, every, tmp_path):
    ControlVector = repeng()
    theirs = ControlVector.import_gguf(control_vector.write(found, tmp_path / "ours.gguf"))
    assert sorted(theirs.directions) == [1, 2, 3, 4, 5] and theirs.model_type == "llama"
    assert all(np.array_equal(theirs.directions[s.layer], v.numpy()) for s, v in found.items())
    theirs.export_gguf(tmp_path / "theirs.gguf")
    for back in (imported(tmp_path / "theirs.gguf", name="every"), imported(theirs, name="every")):
        assert [m.hook_point for m in back] == [m.hook_point for m in every]
        for mine, other in zip(every, back, strict=True):
            assert torch.allclose(mine.vector, other.vector, rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", ["gguf", "npy", "pt", "by layer.pt", "safetensors", "lm-eval.pt"])
def test_round_trips(found, every, tmp_path, kind):
    """To float32's last digit: a vector is stored at its length, a direction as unit and length."""
    path = tmp_path / f"v.{kind}"
    rows, at = torch.stack([*found.values()]), None
    if kind == "gguf":
        control_vector.write(found, path)
    elif kind == "npy":
        np.save(path, rows.numpy())
        at = "1-5"
    elif kind == "pt":
        torch.save(rows, path)
        at = "1-5"
    elif kind == "by layer.pt":
        torch.save({site.layer: v for site, v in found.items()}, path)
    elif kind == "safetensors":
        save_file({f"layer_{site.layer}": v for site, v in found.items()}, path)
    else:
        harness.write(harness.entries(parse(
            "add(every, 1 raw) at 1-5 on all+first", {"every": every}), BOUNDS), path)  # fmt: skip
    back = imported(path, at=at, name="every")
    assert [m.hook_point for m in back] == [m.hook_point for m in every]
    for mine, other in zip(every, back, strict=True):
        assert torch.allclose(mine.vector, other.vector, rtol=3e-7, atol=1e-6)


def test_one_vector_goes_where_it_is_told(tmp_path):
    vector = np.random.default_rng(0).normal(size=64)
    for path, write in ((tmp_path / "a.npy", lambda p: np.save(p, vector)),
                        (tmp_path / "a.pt", lambda p: torch.save(torch.tensor(vector), p)),
                        (tmp_path / "a.safetensors",
                         lambda p: save_file({"direction": torch.tensor(vector)}, p))):  # fmt: skip
        write(path)
        one = imported(path, at="mlp_out 3", name="a")
        assert one.hook_point == "blocks.3.hook_mlp_out"
        assert one == Direction.of(vector, "blocks.3.hook_mlp_out")
        with pytest.raises(RequestError, match="do not say where they belong: give --at"):
            imported(path)
    assert imported(vector.astype(np.float16), at=2).norm == pytest.approx(
        np.linalg.norm(vector), rel=1e-3
    )


class Steering:
    """As steering-vectors' SteeringVector has its attributes."""

    def __init__(self, layers, kind="decoder_block"):
        self.layer_activations, self.layer_type = layers, kind


def test_objects_of_other_tools():
    layers = {3: torch.ones(64), 4: torch.zeros(64)}
    assert imported(Steering(layers), name="a").hook_point == "blocks.3.hook_resid_post"
    with pytest.raises(RequestError, match="only those of whole blocks"):
        imported(Steering(layers, "self_attn"))
    with pytest.raises(RequestError, match="expected floating-point numbers"):
        imported([1, 2, 3], at=3)


def test_what_cannot_be_read_says_how(tmp_path, monkeypatch):
    """Objects are not unpickled; what is damaged, unclear or of another kind is told."""

    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "ran"), "w"))

    torch.save({"direction": Evil()}, tmp_path / "evil.pt")
    (tmp_path / "torn.gguf").write_bytes(b"GGUF" + b"\0" * 40)
    (tmp_path / "torn.npy").write_bytes(b"\x93NUMPY garbage")
    (tmp_path / "torn.pt").write_bytes(b"PK\3\4 garbage")
    np.save(tmp_path / "objects.npy", np.array([{}], dtype=object), allow_pickle=True)
    save_file({"a": torch.ones(4), "b": torch.ones(4)}, tmp_path / "two.safetensors")
    save_file({"a": torch.full((4,), float("nan"))}, tmp_path / "nan.safetensors")
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "llama")
    writer.add_tensor("token_embd.weight", np.ones((4, 4), np.float32))
    for step in ("header", "kv_data", "tensors"):
        getattr(writer, f"write_{step}_to_file")()
    writer.close()
    for name, kind, said in (
        ("evil.pt", RequestError, "would run their code"),
        ("torn.gguf", RunError, "is damaged|holds no direction"),
        ("model.gguf", RunError, "holds 'token_embd.weight'; a control vector holds direction.1"),
        ("torn.npy", RunError, "damaged"),
        ("torn.pt", RunError, "damaged"),
        ("objects.npy", RunError, "damaged or holds objects"),
        ("two.safetensors", RequestError, "holds 2 tensors; name one by --key: a, b"),
        ("nan.safetensors", RequestError, "points nowhere"),
        ("none.npy", RequestError, "no file"),
    ):
        with pytest.raises(kind, match=said):
            imported(tmp_path / name, at=3)
    assert not (tmp_path / "ran").exists()
    with pytest.raises(RequestError, match="no tensor 'c'; choices: a, b"):
        imported(tmp_path / "two.safetensors", at=3, key="c")
    assert imported(tmp_path / "two.safetensors", at=3, key="b").norm == 2
    # the tool that opens a direction says what opens these
    for name, said in (("two.safetensors", "direction import .*two.safetensors"),
                       ("torn.npy", "direction import .*torn.npy")):  # fmt: skip
        with pytest.raises(RequestError, match=said):
            load(tmp_path / name)


def test_the_command_imports(tmp_path, monkeypatch):
    monkeypatch.setenv("INTERP_STEER_CACHE", str(tmp_path / "cache"))
    np.save(tmp_path / "v.npy", np.arange(1.0, 65))
    done, _ = command("direction", "import", tmp_path / "v.npy", "--name", "warm", "--at", "3")
    assert "add(warm, 1 raw) at resid_post 3 on all+first" in done
    shown, _ = command("direction", "show", "warm")
    assert "file: v.npy" in shown and "blocks.3.hook_resid_post" in shown
    _, wrong = command("direction", "import", tmp_path / "v.npy", "--name", "warm", code=2)
    assert "give --at" in wrong


def test_layer_0_and_names_with_a_colon_are_refused(tiny, tmp_path):
    one = Direction.of(np.ones(64), "blocks.0.hook_resid_post", "one")
    at_0 = constants(parse("add(one, 2) at 0 on all+first", {"one": one}), tiny)
    with pytest.raises(RequestError, match=r"no layer 0.*steered-gguf"):
        control_vector.write(at_0, tmp_path / "v.gguf")
    at_1 = constants(parse("add(one, 2) at 1 on all+first", {"one": one}), tiny)
    with pytest.raises(RequestError, match="follows a colon for a strength"):
        control_vector.write(at_1, tmp_path / "v:1.gguf")
    begins = constants(parse("add(one, 2) at resid_pre 0 on all+first", {"one": one}), tiny)
    with pytest.raises(RequestError, match="adds at resid_post, and the line does at resid_pre 0"):
        control_vector.write(begins, tmp_path / "v.gguf")
    assert not [*tmp_path.iterdir()]
