import copy
import dataclasses
import errno
import hashlib
import json
import math
import os
import pickle
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from interp_steer.errors import RequestError, RunError
from interp_steer.steering.direction import Direction, DirectionSet, is_name, load
from interp_steer.steering.directions import Directions
from interp_steer.steering.file import FORMAT
from interp_steer.steering.grammar import parse

HOME = "blocks.3.hook_resid_post"
WIDTH = 16


def vector(seed: int, width: int = WIDTH) -> torch.Tensor:
    return torch.tensor(np.random.default_rng(seed).normal(size=width), dtype=torch.float32) * 3


def made(seed: int, name: str = "joy", **more) -> Direction:
    return Direction.of(vector(seed), HOME, name, **more)


def layered(seed: int = 0, layers: tuple[int, ...] = (2, 3, 5), name: str = "joy") -> DirectionSet:
    return DirectionSet(
        Direction.of(
            vector(seed + layer),
            f"blocks.{layer}.hook_resid_post",
            name,
            {"layer": str(layer), "label": 'a "quoted" é\n'},
            layer / 3,
        )
        for layer in layers
    )


def everything(direction: Direction) -> tuple[object, ...]:
    """All attributes, exactly."""
    return (
        direction.unit.dtype,
        direction.unit.numpy().tobytes(),
        direction.hook_point,
        direction.norm,
        direction.name,
        dict(direction.source),
        direction.max_activation,
    )


# --- a value ----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_of_keeps_the_length_apart_from_a_unit_vector(dtype):
    given = vector(1).to(dtype)
    direction = Direction.of(given, HOME)
    length = math.sqrt(sum(float(x) ** 2 for x in given))
    assert direction.norm == pytest.approx(length, rel=1e-12)
    assert direction.unit.dtype == torch.float32
    assert np.linalg.norm(direction.unit.double()) == pytest.approx(1, abs=1e-6)
    assert torch.allclose(direction.vector, given.float(), rtol=1e-5)


def test_vectors_of_extreme_length_are_directions():
    for scale in (1e-30, 1e30):
        direction = Direction.of(vector(1) * scale, HOME)
        assert direction.cosine(made(1)) == pytest.approx(1)
        assert direction.norm == pytest.approx(made(1).norm * scale, rel=1e-4)


def test_it_holds_its_own_copy_and_cannot_be_changed():
    unit, source = made(1).unit.clone(), {"method": "probe"}
    direction = Direction(unit, HOME, source=source)
    unit[0], source["method"] = 9, "other"
    assert direction == Direction(made(1).unit, HOME)
    assert dict(direction.source) == {"method": "probe"}
    with pytest.raises(dataclasses.FrozenInstanceError):
        direction.norm = 2
    with pytest.raises(TypeError):
        direction.source["method"] = "other"


def test_it_does_not_keep_a_graph():
    grown = vector(1).requires_grad_()
    assert not Direction.of(grown, HOME).unit.requires_grad


def test_equality_is_content_and_not_name_or_source():
    one = made(1)
    assert one == made(1, "other", source={"a": "b"}, max_activation=2.0)
    assert hash(one) == hash(made(1, "other"))
    assert one != made(2)
    assert one != one * 2
    assert one != one.at("blocks.4.hook_resid_post")
    assert one != "joy"
    assert len({one, made(1, "other"), made(2)}) == 2


def test_equal_directions_have_one_sha():
    zero = Direction.of(torch.tensor([1.0, 0.0]), HOME)
    minus = Direction.of(torch.tensor([1.0, -0.0]), HOME)
    assert zero == minus
    assert zero.sha == minus.sha
    assert hash(zero) == hash(minus)
    whole = Direction(zero.unit, HOME, 2)
    assert (whole.sha, type(whole.norm)) == ((zero * 2).sha, float)


def test_sha_is_that_of_unit_hook_point_and_norm():
    one = made(1)
    content = struct.pack(f"<{WIDTH}f", *one.unit.tolist()) + f"{HOME} {one.norm!r}".encode()
    assert one.sha == hashlib.sha256(content).hexdigest()[:8]
    assert one.label == f"joy@{one.sha}"
    changed = [made(2), one * 2, one.at("blocks.4.hook_resid_post"), -one]
    assert len({one.sha, *(other.sha for other in changed)}) == 5
    assert one.named("sad").sha == one.sha


@pytest.mark.parametrize(
    "copied", [copy.copy, copy.deepcopy, lambda one: pickle.loads(pickle.dumps(one))]
)
def test_copies_are_exact(copied):
    one = made(1, source={"a": "b"}, max_activation=2.5)
    assert everything(copied(one)) == everything(one)
    many = layered()
    assert [everything(m) for m in copied(many)] == [everything(m) for m in many]


# --- arithmetic -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("combined", "wanted"),
    [
        (lambda a, b: a + b, lambda a, b: a + b),
        (lambda a, b: a - b, lambda a, b: a - b),
        (lambda a, b: -a, lambda a, b: -a),
        (lambda a, b: a * 2.5, lambda a, b: a * 2.5),
        (lambda a, b: -3 * a, lambda a, b: a * -3),
        (lambda a, b: 0.5 * (a + b) - b, lambda a, b: (a + b) / 2 - b),
    ],
)
def test_arithmetic_is_that_of_the_vectors(combined, wanted):
    got = combined(made(1), made(2, "sad"))
    want = wanted(vector(1).double().numpy(), vector(2).double().numpy())
    assert np.allclose(got.unit.double().numpy() * got.norm, want, rtol=1e-5, atol=1e-5)
    assert got.norm == pytest.approx(np.linalg.norm(want), rel=1e-5)
    assert got.hook_point == HOME


def test_arithmetic_identities():
    a, b = made(1), made(2)
    assert a == -(-1 * a)
    assert a * -1 == -a
    assert a * 2 * 0.5 == a
    assert a - b == -(b - a)
    assert a + b == b + a


def test_arithmetic_says_where_it_came_from():
    a, b = made(1), made(2, "sad")
    assert (a + b).name == "joy+sad"
    assert dict((a - b).source) == {"expression": f"{a.label} - {b.label}"}
    assert dict((a * -2).source) == {"expression": f"-2 * {a.label}"}


def test_vectors_at_different_places_do_not_add():
    with pytest.raises(RequestError, match=r"blocks\.3\..* and .*blocks\.4\..*\.at\(hook_point\)"):
        made(1) + made(2).at("blocks.4.hook_resid_post")


@pytest.mark.parametrize("factor", [0, math.nan, math.inf])
def test_factors_that_leave_no_direction_are_refused(factor):
    with pytest.raises(RequestError, match="cannot multiply"):
        made(1) * factor


def test_the_difference_of_equals_is_refused():
    with pytest.raises(RequestError, match="points nowhere"):
        made(1) - made(1)


# --- refusals ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "values", [[0.0, 0.0], [1.0, math.nan], [math.inf, 1.0], [-math.inf, math.inf]]
)
def test_vectors_that_point_nowhere_are_refused(values):
    with pytest.raises(RequestError, match=r"'joy' has length .* points nowhere"):
        Direction.of(torch.tensor(values), HOME, "joy")


@pytest.mark.parametrize(
    ("unit", "norm"),
    [([3.0, 4.0], 1.0), ([0.6, 0.8], 0.0), ([0.6, 0.8], -1.0), ([0.0, 0.0], 1.0)],
)
def test_a_unit_vector_has_length_one_and_a_norm_above_zero(unit, norm):
    with pytest.raises(RequestError, match=r"use Direction\.of"):
        Direction(torch.tensor(unit), HOME, norm)


@pytest.mark.parametrize(("unit", "norm"), [([math.nan, 1.0], 1.0), ([0.6, 0.8], math.inf)])
def test_numbers_that_are_not_finite_are_refused(unit, norm):
    with pytest.raises(RequestError, match="not finite"):
        Direction(torch.tensor(unit), HOME, norm)


@pytest.mark.parametrize("name", ["eiffel", "L15_21576", "a+b-p1", "x.y", "joie_é", "-a", "infra"])
def test_names_that_a_line_can_hold(name):
    assert is_name(name)
    assert made(1, name).named("other").named(name).name == name


@pytest.mark.parametrize(
    "name",
    [
        *["", " ", "a b", "a,b", "a@b", "a;b", "a(b", "a/b", "a\n"],
        *["12", "-3.5", "1e5", "1e-5", "..", "3-4", "nan", "-inf"],
    ],
)
def test_names_that_a_line_cannot_hold_are_refused(name):
    assert not is_name(name)
    with pytest.raises(RequestError, match="cannot name a direction"):
        made(1, name)
    with pytest.raises(RequestError, match="cannot name a direction"):
        DirectionSet([made(1)], name or " ")


@pytest.mark.parametrize("home", ["", "blocks.3", "resid_post 3", "blocks.x.hook_resid_post"])
def test_homes_that_are_no_hook_point_are_refused(home):
    with pytest.raises(RequestError, match=r"unknown hook point .* expected such as"):
        Direction.of(vector(1), home)


# --- neighbours and controls ------------------------------------------------------------------


def test_nearest_is_by_cosine_best_first():
    target = made(0)
    others = [made(seed, f"d{seed}") * 10.0**seed for seed in range(1, 8)]
    others.append((-target).named("opposite"))

    def cosine(other: Direction) -> float:
        u, v = target.unit.double().numpy(), other.vector.double().numpy()
        return float(u @ v / np.linalg.norm(v))

    found = target.nearest(others, k=3)
    wanted = sorted(others, key=cosine)[::-1]
    assert [one.name for one, _ in found] == [one.name for one in wanted[:3]]
    assert [c for _, c in found] == pytest.approx([cosine(one) for one, _ in found], abs=1e-6)
    last, worst = target.nearest(others, k=99)[-1]
    assert (last.name, worst) == ("opposite", pytest.approx(-1, abs=1e-6))


def test_the_random_control_has_the_norm_and_home_and_is_reproducible():
    one = made(1, max_activation=4.0)
    control = one.random(7)
    assert (control.norm, control.hook_point) == (one.norm, one.hook_point)
    assert everything(control) == everything(one.random(7))
    assert control != one.random(8)
    assert control.name == "joy-random7"
    assert dict(control.source) == {"control": "random", "seed": "7", "matched": one.label}
    assert control.max_activation is None


def test_random_controls_are_uniform_on_the_sphere():
    units = torch.stack([made(1).random(seed).unit for seed in range(2000)]).double().numpy()
    assert np.abs(units.mean(0)).max() < 5 / math.sqrt(2000 * WIDTH)
    covariance = units.T @ units / 2000 * WIDTH  # the identity, if uniform
    assert np.abs(covariance - np.eye(WIDTH)).max() < 5 * math.sqrt(2 / 2000)


def test_a_random_set_is_independent_from_layer_to_layer():
    control = layered(layers=tuple(range(20))).random(3)
    assert control.name == "joy-random3"
    for one, matched in zip(control, layered(layers=tuple(range(20))), strict=True):
        assert (one.norm, one.hook_point) == (matched.norm, matched.hook_point)
    units = torch.stack([one.unit for one in control]).double()
    off = units @ units.T - torch.eye(20, dtype=torch.float64)
    assert off.abs().max() < 0.9
    assert off.pow(2).mean() * WIDTH == pytest.approx(1, abs=0.4)
    assert control == layered(layers=tuple(range(20))).random(3)
    assert not set(control) & set(layered(layers=tuple(range(20))).random(4))


# --- sets -------------------------------------------------------------------------------------


def test_a_set_is_asked_by_layer():
    many = layered()
    assert many.layers == (2, 3, 5)
    assert [many[layer].site.layer for layer in (2, 3, 5)] == [2, 3, 5]
    assert len(many) == 3
    with pytest.raises(RequestError, match=r"no direction for layer 4; it has layers 2-5"):
        many[4]


def test_a_set_sorts_and_names_its_members():
    members = [Direction.of(vector(i), f"blocks.{i}.hook_mlp_out", f"n{i}") for i in (4, 1)]
    many = DirectionSet(members, "both")
    assert [one.site.layer for one in many] == [1, 4]
    assert {one.name for one in many} == {many.name} == {"both"}
    assert many == DirectionSet(reversed(members), "other")
    assert hash(many) == hash(DirectionSet(reversed(members), "other"))
    assert many.sha == DirectionSet(reversed(members), "other").sha
    assert many != DirectionSet(members[:1])
    assert many.sha != DirectionSet([members[0] * 2, members[1]]).sha


@pytest.mark.parametrize(
    "members",
    [
        [],
        [made(1), made(2)],
        [made(1), made(2).at("blocks.4.hook_mlp_out")],
        [made(1), Direction.of(vector(1, 8), "blocks.4.hook_resid_post")],
    ],
    ids=["none", "one layer twice", "two components", "two widths"],
)
def test_sets_that_are_none_are_refused(members):
    with pytest.raises(RequestError, match="a DirectionSet needs"):
        DirectionSet(members)


# --- files ------------------------------------------------------------------------------------


@pytest.mark.parametrize("home", [HOME, "blocks.3.attn.hook_z.7", "blocks.0.hook_resid_pre"])
@pytest.mark.parametrize("peak", [None, 4.77, 1e-17])
def test_a_direction_is_read_back_exactly(tmp_path, home, peak):
    source = {"label": 'naïve "x"\n', "": "empty key", "n": "1"}
    one = Direction.of(vector(1) / 7, home, "joy+é", source, peak)
    one.save(tmp_path / "one.safetensors")
    assert everything(Direction.load(tmp_path / "one.safetensors")) == everything(one)


def test_a_set_is_read_back_exactly(tmp_path):
    many = layered()
    path = many.save(str(tmp_path / "deep" / "er" / "many.safetensors"))
    found = DirectionSet.load(str(path))
    assert isinstance(load(path), DirectionSet)
    assert [everything(m) for m in found] == [everything(m) for m in many]
    assert (found.name, found.layers, found.sha) == (many.name, many.layers, many.sha)
    alone = layered(layers=(4,))
    alone.save(path)
    assert isinstance(load(path), DirectionSet)
    with pytest.raises(RequestError, match=r"each of 1 layers; take one with .*\[layer\]"):
        Direction.load(path)


def test_a_single_direction_is_also_a_set_of_one(tmp_path):
    found = DirectionSet.load(made(1).save(tmp_path / "one"))
    assert [everything(m) for m in found] == [everything(made(1))]


def test_the_safetensors_library_reads_the_file(tmp_path):
    many = layered()
    path = many.save(tmp_path / "many.safetensors")
    tensors = load_file(path)
    assert set(tensors) == {m.hook_point for m in many}
    for one in many:
        assert torch.equal(tensors[one.hook_point], one.unit)
    with safe_open(path, "pt") as file:
        about = file.metadata()
    assert (about["format"], about["kind"], about["name"]) == (FORMAT, "set", "joy")
    assert [m["hook_point"] for m in json.loads(about["members"])] == [m.hook_point for m in many]


def error_of(path: Path, kind: type[Exception]) -> str:
    messages = []
    for read in (load, Direction.load, DirectionSet.load):
        with pytest.raises(kind) as caught:
            read(path)
        assert type(caught.value) is kind
        messages.append(str(caught.value))
    assert len(set(messages)) == 1
    assert str(path) in messages[0]
    assert "\n" not in messages[0]
    return messages[0]


def test_a_missing_file_or_a_folder_is_a_wrong_request(tmp_path):
    for path in (tmp_path / "none.safetensors", tmp_path):
        assert "no direction file" in error_of(path, RequestError)


def test_a_foreign_file_is_a_wrong_request(tmp_path):
    path = tmp_path / "weights.safetensors"
    save_file({"weight": vector(1)}, path)
    assert "not a direction" in error_of(path, RequestError)
    save_file({"weight": vector(1)}, path, {"format": "pt"})
    assert "not a direction" in error_of(path, RequestError)


def test_every_truncation_is_damage(tmp_path):
    path = made(1).save(tmp_path / "one.safetensors")
    whole = path.read_bytes()
    for end in range(0, len(whole), 7):
        path.write_bytes(whole[:end])
        assert "damaged" in error_of(path, RunError)


@pytest.mark.parametrize(
    "content", [b"\x00" * 500, b"{}", b"hello\n" * 99, b"\xff" * 64, b"\x89PNG\r\n"]
)
def test_a_file_of_another_format_is_damage(tmp_path, content):
    path = tmp_path / "one.safetensors"
    path.write_bytes(content)
    assert "damaged or not a safetensors file" in error_of(path, RunError)


def test_flipped_bits_are_damage(tmp_path):
    path = made(1).save(tmp_path / "one.safetensors")
    content = bytearray(path.read_bytes())
    content[-1] ^= 0x7F
    path.write_bytes(content)
    assert "damaged" in error_of(path, RunError)


ENTRY = {"hook_point": HOME, "norm": (2.0).hex(), "source": {}, "max_activation": None}
ABOUT = {"format": FORMAT, "kind": "direction", "name": "joy", "members": json.dumps([ENTRY])}


@pytest.mark.parametrize(
    "changes",
    [
        {"kind": None},
        {"name": None},
        {"members": None},
        {"name": "a b"},
        {"members": "["},
        {"members": "[]"},
        {"members": "{}"},
        {"members": "3"},
        {"members": '["a"]'},
        {"members": json.dumps([{**ENTRY, "hook_point": "blocks.9.hook_resid_post"}])},
        {"members": json.dumps([{**ENTRY, "norm": "-0x1p0"}])},
        {"members": json.dumps([{**ENTRY, "norm": "nan"}])},
        {"members": json.dumps([{**ENTRY, "norm": 3}])},
        {"members": json.dumps([{"hook_point": HOME}])},
        {"members": json.dumps([ENTRY, ENTRY])},
    ],
    ids=str,
)
def test_wrong_metadata_is_damage(tmp_path, changes):
    path = tmp_path / "one.safetensors"
    save_file({HOME: made(1).unit}, path, ABOUT)
    assert load(path) == Direction(made(1).unit, HOME, 2.0)
    about = {key: value for key, value in {**ABOUT, **changes}.items() if value is not None}
    save_file({HOME: made(1).unit}, path, about)
    assert "damaged" in error_of(path, RunError)


UNIT = made(1).unit
LONG = json.dumps([{**ENTRY, "source": {"x": "y" * 2**23}}])
HOSTILE = {
    "a norm beyond floats": (UNIT, {"norm": "0x1p+99999"}),
    "a norm of words": (UNIT, {"norm": "long"}),
    "a column": (UNIT[:, None], {}),
    "a row": (UNIT[None], {}),
    "a scalar": (torch.tensor(1.0), {}),
    "nothing": (torch.zeros(0), {}),
    "int64": (torch.eye(WIDTH, dtype=torch.int64)[0].clone(), {}),
    "float64": (UNIT.double(), {}),
    "bfloat16": (UNIT.bfloat16(), {}),
    "complex": (UNIT.to(torch.complex64), {}),
    "NaN": (UNIT * math.nan, {}),
    "not a unit": (UNIT * 2, {}),
    "a million and more numbers": (torch.full((2**20 + 1,), (2**20 + 1) ** -0.5), {}),
    "a text as maximum": (UNIT, {"max_activation": "12"}),
    "true as maximum": (UNIT, {"max_activation": True}),
    "NaN as maximum": (UNIT, {"max_activation": math.nan}),
    "an infinite maximum": (UNIT, {"max_activation": math.inf}),
    "a maximum beyond floats": (UNIT, {"max_activation": 10**400}),
    "a maximum below 0": (UNIT, {"max_activation": -1.0}),
    "a list as maximum": (UNIT, {"max_activation": [1]}),
    "a place that cannot be steered": (UNIT, {"hook_point": "blocks.3.mlp.hook_post"}),
    "z without a head": (UNIT, {"hook_point": "blocks.3.attn.hook_z"}),
    "a number as hook point": (UNIT, {"hook_point": 3}),
    "a list as source": (UNIT, {"source": ["a"]}),
    "numbers in the source": (UNIT, {"source": {"index": 3}}),
    "members too deep": (UNIT, "[" * 100_000 + "]" * 100_000),
    "a member of 6,000 digits": (UNIT, "[" + "1" * 6000 + "]"),
    "huge metadata": (UNIT, LONG),
}


@pytest.mark.parametrize("what", HOSTILE)
def test_a_hostile_file_is_one_line(tmp_path, what):
    unit, change = HOSTILE[what]
    path = tmp_path / "one.safetensors"
    members = change if isinstance(change, str) else json.dumps([{**ENTRY, **change}])
    hook = change["hook_point"] if "hook_point" in change and "cannot" in what else HOME
    save_file({hook: unit.contiguous()}, path, {**ABOUT, "members": members})
    assert "damaged" in error_of(path, RunError)


@pytest.mark.parametrize("kind", ["direction", "set"])
def test_members_and_tensors_are_the_same(tmp_path, kind):
    path, about = tmp_path / "one.safetensors", {**ABOUT, "kind": kind}
    other = {**ENTRY, "hook_point": "blocks.4.hook_resid_post"}
    for tensors, members in (
        ({HOME: UNIT, "blocks.4.hook_resid_post": UNIT}, [ENTRY]),
        ({HOME: UNIT}, [ENTRY, other]),
        ({HOME: UNIT}, []),
    ):
        save_file({key: unit.clone() for key, unit in tensors.items()}, path,
                  {**about, "members": json.dumps(members)})  # fmt: skip
        assert "damaged" in error_of(path, RunError)


def test_a_header_that_claims_gigabytes_is_refused_unread(tmp_path):
    path = tmp_path / "one.safetensors"
    path.write_bytes((2**33).to_bytes(8, "little") + b"{}")
    assert "8,589,934,592 bytes long" in error_of(path, RunError)


@pytest.mark.parametrize(
    ("number", "said"),
    [(errno.ENOSPC, "the disk is full"), (errno.EACCES, "permission denied")],
)
def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch, number, said):
    path = made(1).save(tmp_path / "one.safetensors")
    write = Path.write_bytes

    def half(self: Path, data: bytes) -> int:
        write(self, data[: len(data) // 2])
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(Path, "write_bytes", half)
    with pytest.raises(RunError, match=said) as caught:
        made(2).save(path)
    assert str(path) in str(caught.value)
    assert load(path) == made(1)
    with pytest.raises(RunError, match=said):
        made(2).save(tmp_path / "new.safetensors")
    assert list(tmp_path.iterdir()) == [path]


def test_an_interrupted_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    path = made(1).save(tmp_path / "one.safetensors")

    def interrupted(self: Path, data: bytes) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "write_bytes", interrupted)
    with pytest.raises(KeyboardInterrupt):
        made(2).save(path)
    assert load(path) == made(1)
    assert list(tmp_path.iterdir()) == [path]


def test_a_file_where_a_folder_should_be_is_one_clear_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match=r"file/one\.safetensors: "):
        made(1).save(tmp_path / "file" / "one.safetensors")


def test_a_write_replaces_the_old_file(tmp_path):
    path = made(1).save(tmp_path / "one.safetensors")
    made(2).save(path)
    assert load(path) == made(2)
    assert list(tmp_path.iterdir()) == [path]


SIDE = torch.zeros(4, 3, WIDTH)
SOURCE = {"source": json.dumps({"model": "tiny"})}
CONTRASTS = {
    "a side missing": ({"positive": SIDE}, {}),
    "float64": ({"positive": SIDE.double(), "negative": SIDE.double()}, {}),
    "int64": ({"positive": SIDE.long(), "negative": SIDE.long()}, {}),
    "two axes": ({"positive": SIDE[0], "negative": SIDE[0]}, {}),
    "no prompts": ({"positive": SIDE[:, :0], "negative": SIDE}, {}),
    "other layers": ({"positive": SIDE, "negative": SIDE[:2]}, {}),
    "other widths": ({"positive": SIDE, "negative": SIDE[..., :8]}, {}),
    "NaN": ({"positive": SIDE, "negative": SIDE * math.nan}, {}),
    "no source": ({"positive": SIDE, "negative": SIDE}, {"source": None}),
    "a list as source": ({"positive": SIDE, "negative": SIDE}, {"source": "[1]"}),
    "numbers in the source": ({"positive": SIDE, "negative": SIDE}, {"source": '{"a": 1}'}),
    "a source too deep": ({"positive": SIDE, "negative": SIDE}, {"source": "[" * 100_000}),
    "huge metadata": ({"positive": SIDE, "negative": SIDE}, {"source": LONG}),
}


@pytest.mark.parametrize("what", CONTRASTS)
def test_a_hostile_contrast_file_is_one_line(tmp_path, what):
    from interp_steer.steering.contrast import FORMAT as OF_CONTRASTS
    from interp_steer.steering.contrast import Contrast

    path = tmp_path / "contrast.safetensors"
    tensors, change = CONTRASTS[what]
    about = {"format": OF_CONTRASTS, **SOURCE}
    save_file({"positive": SIDE.clone(), "negative": SIDE.clone()}, path, about)
    assert Contrast.load(path).source == {"model": "tiny"}
    about = {key: value for key, value in {**about, **change}.items() if value is not None}
    save_file({key: side.contiguous().clone() for key, side in tensors.items()}, path, about)
    with pytest.raises(RunError, match=r"^[^\n]*contrast\.safetensors is damaged [^\n]*$"):
        Contrast.load(path)


# --- by name ----------------------------------------------------------------------------------


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("INTERP_STEER_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    return tmp_path / "cache" / "directions"


def test_names_are_given_or_files_or_in_the_cache(tmp_path, cache):
    made(1).save(cache / "kept.safetensors")
    made(2).save(cache / "both.safetensors")
    made(3).save(tmp_path / "file.safetensors")
    found = Directions([f"both={tmp_path / 'file.safetensors'}"])
    assert found["kept"] == made(1)
    assert found["both"] == made(3)
    assert found["file"] == found["file.safetensors"] == made(3)
    assert found[str(tmp_path / "file.safetensors")] == made(3)
    assert list(found) == ["both", "kept"]
    assert len(found) == 2


def test_a_line_finds_a_file_by_its_path_in_an_empty_cache(tmp_path, cache):
    path = made(1).save(tmp_path / "file.safetensors")
    assert len(Directions()) == 0
    (one,) = parse(f"add({path}, 1) at 3", Directions())
    assert one.directions == (made(1),)


def test_a_damaged_file_is_said_to_be_damaged_and_no_namesake_takes_its_place(tmp_path, cache):
    made(1).save(cache / "joy.safetensors")
    (tmp_path / "joy.safetensors").write_bytes(b"damaged")
    (cache / "sad.safetensors").write_bytes(b"damaged")
    for name in ("./joy.safetensors", "joy.safetensors", "sad"):
        with pytest.raises(RunError, match=r"(joy|sad)\.safetensors is damaged"):
            Directions()[name]


def test_a_bare_name_is_a_stored_direction_and_a_path_a_file(tmp_path, cache):
    made(1).save(cache / "joy.safetensors")
    made(2).save(tmp_path / "joy.safetensors")
    (tmp_path / "joy").write_text("notes of somebody")
    for name in ("joy.safetensors", "./joy.safetensors", str(tmp_path / "joy.safetensors")):
        assert Directions()[name] == made(2)
    with pytest.raises(RequestError, match=r"'joy' is the stored direction .* and another file"):
        Directions()["joy"]
    made(1).save(tmp_path / "joy.safetensors")  # the same: nothing to decide
    assert Directions()["joy"] == made(1)
    (tmp_path / "joy.safetensors").unlink()
    assert Directions()["joy"] == made(1)  # whatever else has that name
    assert Directions([f"joy={made(3).save(tmp_path / 'other')}"])["joy"] == made(3)


def test_files_beside_a_study_come_before_those_of_the_working_directory(tmp_path, cache):
    made(1).save(tmp_path / "joy.safetensors")
    made(2).save(tmp_path / "study" / "joy.safetensors")
    assert Directions(beside=tmp_path / "study")["joy.safetensors"] == made(2)
    assert Directions(beside=tmp_path / "elsewhere")["joy.safetensors"] == made(1)


@pytest.mark.parametrize("name", ["none", "../directions/kept", "../outside", "", "."])
def test_unknown_names_are_key_errors(tmp_path, cache, name):
    made(1).save(cache.parent / "outside.safetensors")
    made(1).save(cache / "kept.safetensors")
    with pytest.raises(KeyError):
        Directions()[name]


@pytest.mark.parametrize("entry", ["joy", "=file", "joy=", "a b=file", "12=file"])
def test_entries_that_are_not_name_and_file_are_refused(entry):
    with pytest.raises(RequestError, match="expected NAME=FILE"):
        Directions([entry])
