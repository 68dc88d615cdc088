"""Every formula against a float64 reference written another way: matrices and loops in numpy."""

import math

import numpy as np
import pytest
import torch
from scipy.linalg import expm

from interp_steer.errors import RequestError
from interp_steer.steering.operators import (
    MAX_CONDITION,
    add,
    add_norm_kept,
    angular,
    clamp,
    dual_basis,
    orthonormal_plane,
    rotate,
)

ROWS, POSITIONS, WIDTH = 3, 5, 24
FORMATS = [torch.float32, torch.bfloat16]
ANGLES = [30.0, -135.0, 720.5]  # degrees, one a row
LOW, HIGH = -math.inf, math.inf


def unit(seed: int, width: int = WIDTH) -> torch.Tensor:
    vector = np.random.default_rng(seed).normal(size=width)
    return torch.tensor(vector / np.linalg.norm(vector), dtype=torch.float32)


def units(seed: int, rows: int = ROWS) -> torch.Tensor:
    return torch.stack([unit(100 * seed + row) for row in range(rows)])


def stream(dtype: torch.dtype = torch.float32) -> torch.Tensor:
    x = torch.tensor(np.random.default_rng(7).normal(size=(ROWS, POSITIONS, WIDTH)) * 2)
    x[:, 0] *= 60  # an attention sink
    return x.to(dtype)


def each(x: torch.Tensor, change) -> np.ndarray:
    """change(row, vector) at every position of every row, in float64."""
    wide = x.double().numpy()
    return np.array([[change(row, vector) for vector in part] for row, part in enumerate(wide)])


def limit(x: torch.Tensor) -> np.ndarray:
    lengths = np.linalg.norm(x.double().numpy(), axis=-1)
    if x.dtype == torch.float32:
        return 1e-5 * np.maximum(1, lengths)
    return 2.0**-8 * lengths


def same(got: torch.Tensor, want: np.ndarray, x: torch.Tensor) -> bool:
    assert got.dtype == x.dtype
    assert got.shape == x.shape
    errors = np.linalg.norm(got.double().numpy() - want, axis=-1)
    return bool((errors <= limit(x)).all())


def projections(x: torch.Tensor, vectors: torch.Tensor) -> np.ndarray:
    """x . v of each row's own vector, at every position."""
    return np.array(
        [[float(v @ y) for y in part] for v, part in zip(vectors.double(), x.double(), strict=True)]
    )


def lengths(x: torch.Tensor) -> np.ndarray:
    return np.sqrt((x.double().numpy() ** 2).sum(-1))


def hold(x: torch.Tensor, v: torch.Tensor, low: list[float], high: list[float]) -> torch.Tensor:
    """A clamp of one direction a row."""
    return clamp(x, v[:, None], v[:, None], torch.tensor(low)[:, None], torch.tensor(high)[:, None])


def planes() -> torch.Tensor:
    return torch.stack(
        [orthonormal_plane(unit(40 + row), unit(50 + row), "a and b") for row in range(ROWS)]
    )


def radians() -> torch.Tensor:
    return torch.tensor([math.radians(angle) for angle in ANGLES])


# --- formulas ---------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", FORMATS)
def test_add_is_x_plus_a_v(dtype):
    x, v, a = stream(dtype), units(1), [4.0, -2.5, 0.75]
    got = add(x, v * torch.tensor(a)[:, None])
    assert same(got, each(x, lambda row, y: y + a[row] * v[row].double().numpy()), x)


@pytest.mark.parametrize("dtype", FORMATS)
def test_add_norm_kept_points_at_x_plus_a_v_with_the_old_length(dtype):
    x, v, a = stream(dtype), units(2), [4.0, -2.5, 30.0]

    def wanted(row, y):
        moved = y + a[row] * v[row].double().numpy()
        return np.linalg.norm(y) * moved / np.linalg.norm(moved)

    got = add_norm_kept(x, v * torch.tensor(a)[:, None])
    if dtype == torch.float32:
        assert same(got, each(x, wanted), x)
    else:  # where |a| is a multiple of |x|, rounding scales with the longer of the two
        rest = [0, 1]
        assert same(got[rest], each(x, wanted)[rest], x[rest])
    assert (np.abs(lengths(got) - lengths(x)) <= limit(x)).all()


@pytest.mark.parametrize("dtype", FORMATS)
def test_clamp_replaces_the_component_along_v(dtype):
    x, v, a = stream(dtype), units(3), [5.0, -3.0, 0.5]

    def wanted(row, y):
        projector = np.outer(v[row].double(), v[row].double())
        return (np.eye(WIDTH) - projector) @ y + a[row] * v[row].double().numpy()

    got = hold(x, v, a, a)
    assert same(got, each(x, wanted), x)
    assert (np.abs(projections(got, v) - np.array(a)[:, None]) <= limit(x)).all()


@pytest.mark.parametrize("dtype", FORMATS)
def test_ablate_is_clamp_at_zero_and_removes_the_projection(dtype):
    x, v = stream(dtype), units(4)

    def wanted(row, y):
        return y - np.outer(v[row].double(), v[row].double()) @ y

    got = hold(x, v, [0.0] * ROWS, [0.0] * ROWS)
    assert same(got, each(x, wanted), x)
    assert (np.abs(projections(got, v)) <= limit(x)).all()


@pytest.mark.parametrize("dtype", FORMATS)
@pytest.mark.parametrize("side", [max, min])
def test_one_sided_clamps_only_raise_or_only_lower(dtype, side):
    x, v, a = stream(dtype), units(5), [1.0, -1.0, 0.0]

    def wanted(row, y):
        direction = v[row].double().numpy()
        return y + (side(y @ direction, a[row]) - y @ direction) * direction

    low, high = (a, [HIGH] * ROWS) if side is max else ([LOW] * ROWS, a)
    got = hold(x, v, low, high)
    assert same(got, each(x, wanted), x)
    before, targets = projections(x, v), np.array(a)[:, None]
    allowed = before > targets + 1e-3 if side is max else before < targets - 1e-3
    assert allowed.any() and not allowed.all()
    assert torch.equal(got[torch.tensor(allowed)], x[torch.tensor(allowed)])


@pytest.mark.parametrize("dtype", FORMATS)
@pytest.mark.parametrize("k", [2, 3])
def test_joint_clamp_is_the_shortest_step_to_all_targets(dtype, k):
    x = stream(dtype)
    v = torch.stack([_leaning(row, k) for row in range(ROWS)])
    targets = torch.tensor(np.random.default_rng(1).uniform(-3, 3, (ROWS, k)), dtype=torch.float32)

    def wanted(row, y):  # min |z - y|^2 under V z = c, from its Lagrange equations
        matrix = v[row].double().numpy()
        system = np.block([[np.eye(WIDTH), matrix.T], [matrix, np.zeros((k, k))]])
        return np.linalg.solve(system, np.concatenate([y, targets[row].double()]))[:WIDTH]

    got = clamp(x, v, torch.stack([dual_basis(one) for one in v]), targets, targets)
    assert same(got, each(x, wanted), x)
    for i in range(k):
        errors = np.abs(projections(got, v[:, i]) - targets[:, i, None].double().numpy())
        assert (errors <= limit(x)).all()


def _leaning(row: int, k: int) -> torch.Tensor:
    """k directions at angles of about 45 degrees."""
    first = unit(60 + row)
    others = [first + 0.9 * unit(70 + 10 * row + i) for i in range(1, k)]
    return torch.stack([first, *(one / one.norm() for one in others)])


def test_one_clamp_after_the_other_misses_the_first_target():
    x, v = stream(), torch.stack([_leaning(row, 2) for row in range(ROWS)])
    targets = torch.tensor([[2.0, -1.0]] * ROWS)
    joint = clamp(x, v, torch.stack([dual_basis(one) for one in v]), targets, targets)
    chained = hold(x, v[:, 0], [2.0] * ROWS, [2.0] * ROWS)
    chained = hold(chained, v[:, 1], [-1.0] * ROWS, [-1.0] * ROWS)
    assert (np.abs(projections(joint, v[:, 0]) - 2) <= limit(x)).all()
    assert (np.abs(projections(chained, v[:, 0]) - 2) > 0.1).mean() > 0.9


@pytest.mark.parametrize("dtype", FORMATS)
def test_rotate_is_the_exponential_of_the_planes_generator(dtype):
    x, plane = stream(dtype), planes()

    def wanted(row, y):
        b1, b2 = plane[row].double().numpy()
        return expm(math.radians(ANGLES[row]) * (np.outer(b2, b1) - np.outer(b1, b2))) @ y

    got = rotate(x, plane, radians())
    assert same(got, each(x, wanted), x)
    assert (np.abs(lengths(got) - lengths(x)) <= limit(x)).all()


@pytest.mark.parametrize("dtype", FORMATS)
def test_angular_sets_the_angle_in_the_plane_and_leaves_the_rest(dtype):
    x, plane = stream(dtype), planes()

    def wanted(row, y):
        basis = np.linalg.qr(
            np.column_stack([*plane[row].double().numpy(), np.eye(WIDTH)[:, : WIDTH - 2]])
        )[0]
        basis[:, :2] = plane[row].double().numpy().T  # QR may turn signs
        parts = basis.T @ y
        radius, angle = math.hypot(parts[0], parts[1]), math.radians(ANGLES[row])
        parts[:2] = radius * math.cos(angle), radius * math.sin(angle)
        return basis @ parts

    got = angular(x, plane, radians())
    assert same(got, each(x, wanted), x)
    assert (np.abs(lengths(got) - lengths(x)) <= limit(x)).all()


# --- identities -------------------------------------------------------------------------------


def test_a_clamp_twice_is_a_clamp_once():
    x, v = stream(), torch.stack([_leaning(row, 2) for row in range(ROWS)])
    targets = torch.tensor([[2.0, -1.0]] * ROWS)
    dual = torch.stack([dual_basis(one) for one in v])
    once = clamp(x, v, dual, targets, targets)
    assert same(clamp(once, v, dual, targets, targets), once.double().numpy(), x)


@pytest.mark.parametrize("dtype", FORMATS)
def test_adding_then_subtracting_is_the_identity(dtype):
    x, delta = stream(dtype), 2 * units(8)
    assert same(add(add(x, delta), -delta), x.double().numpy(), x)


def test_rotating_there_and_back_is_the_identity():
    x, plane = stream(), planes()
    assert same(rotate(rotate(x, plane, radians()), plane, -radians()), x.double().numpy(), x)


def test_rotations_add_up_and_angular_does_not():
    x, plane, twice = stream(), planes(), 2 * radians()
    turned = rotate(rotate(x, plane, radians()), plane, radians())
    assert same(turned, rotate(x, plane, twice).double().numpy(), x)
    fixed = angular(angular(x, plane, twice), plane, radians())
    assert same(fixed, angular(x, plane, radians()).double().numpy(), x)


@pytest.mark.parametrize("dtype", FORMATS)
def test_at_zero_add_norm_kept_add_and_rotate_are_exact(dtype):
    x = stream(dtype)
    x[1, 2] = 0
    nothing = torch.zeros(ROWS, WIDTH)
    assert torch.equal(add(x, nothing), x)
    assert torch.equal(add_norm_kept(x, nothing), x)
    assert torch.equal(rotate(x, planes(), torch.zeros(ROWS)), x)


def test_norm_kept_add_of_the_opposite_of_x_is_finite():
    x = stream()
    assert add_norm_kept(x, -x[:, 1]).isfinite().all()


@pytest.mark.parametrize(
    "operator",
    [
        lambda x: add(x, units(1)),
        lambda x: add_norm_kept(x, units(1)),
        lambda x: hold(x, units(1), [1.0] * ROWS, [1.0] * ROWS),
        lambda x: rotate(x, planes(), radians()),
        lambda x: angular(x, planes(), radians()),
    ],
    ids=["add", "add_norm_kept", "clamp", "rotate", "angular"],
)
@pytest.mark.parametrize("dtype", FORMATS)
def test_the_number_format_stays_and_the_input_is_not_written_to(operator, dtype):
    x = stream(dtype)
    before = x.clone()
    assert operator(x).dtype == dtype
    assert torch.equal(x, before)


# --- solvers ----------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [1, 2, 5])
def test_dual_basis_is_the_pseudoinverse(k):
    v = units(9, k)
    expected = np.linalg.pinv(v.double().numpy()).T
    assert np.allclose(dual_basis(v).double().numpy(), expected, atol=1e-6)


@pytest.mark.parametrize("sign", [1, -1])
def test_nearly_parallel_directions_are_refused_by_name(sign):
    first = unit(1)
    second = sign * first + 1e-3 * unit(2)
    near = torch.stack([first, second / second.norm()])
    with pytest.raises(RequestError, match=r"joy@1 and sun@2 are nearly parallel .* 1e\+04"):
        dual_basis(near, "joy@1 and sun@2")
    with pytest.raises(RequestError, match="joy and sun are nearly parallel"):
        orthonormal_plane(first, near[1], "joy and sun")


def test_equal_directions_are_refused():
    with pytest.raises(RequestError, match="nearly parallel"):
        dual_basis(torch.stack([unit(1), unit(1)]))


@pytest.mark.parametrize(("share", "refused"), [(0.9, False), (1.1, True)])
def test_the_condition_number_decides_what_is_too_parallel(share, refused):
    # two unit vectors at angle t have a Gram matrix of condition number cot(t/2)^2
    angle = 2 * math.atan(1 / math.sqrt(share * MAX_CONDITION))
    near = torch.zeros(2, WIDTH)
    near[0, 0], near[1, 0], near[1, 1] = 1, math.cos(angle), math.sin(angle)
    if refused:
        with pytest.raises(RequestError):
            dual_basis(near)
    else:
        assert torch.allclose(dual_basis(near) @ near.T, torch.eye(2), atol=1e-4)


def test_a_plane_starts_at_the_first_direction_and_leans_to_the_second():
    first, second = 3 * unit(1), unit(2)
    plane = orthonormal_plane(first, second, "a and b").double()
    assert torch.allclose(plane @ plane.T, torch.eye(2, dtype=torch.float64), atol=1e-6)
    assert torch.allclose(plane[0] * 3, first.double(), atol=1e-6)
    assert torch.dot(plane[1], second.double()) > 0
    rest = second.double() - plane.T @ (plane @ second.double())
    assert rest.norm() < 1e-6
