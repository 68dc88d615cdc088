import math
import random

import numpy as np
import pytest
import torch
from scipy.linalg import expm

from interp_steer.engine.bank import Bank, Hook, Operands, Steering
from interp_steer.errors import RequestError
from interp_steer.model.site import Site
from interp_steer.prompts.prompt import Encoded
from interp_steer.steering.direction import Direction, DirectionSet
from interp_steer.steering.grammar import parse, steer
from interp_steer.steering.intervention import CLAMPS, OPERATORS, Intervention, Scope

WIDTH, HEADS, HEAD_WIDTH = 12, 3, 6
PLAIN = [one for one in OPERATORS if one != "latent_clamp"]  # that needs an SAE: test_sae.py
CPU = torch.device("cpu")
Rows = list[tuple[tuple[Intervention, ...], Encoded]]
Spans = list[tuple[int, int]]


def way(seed: int, width: int = WIDTH, name: str | None = None, layer: int = 0, **more):
    vector = torch.randn(width, generator=torch.Generator().manual_seed(seed))
    return Direction.of(vector, f"blocks.{layer}.hook_resid_post", name or f"d{seed}", **more)


def prompt(length: int, content: list[bool] | None = None) -> Encoded:
    return Encoded(tuple(range(length)), tuple(content or [True] * length))


# --- a slow reference: one row, one head, one position at a time, in float64 ------------------


def in_scope(scope: Scope, content: tuple[bool, ...], position: int) -> bool:
    if position < 0:
        return False
    if position == 0 and not (scope.first or (scope.kind == "positions" and scope.begin == 0)):
        return False
    n = len(content)
    match scope.kind:
        case "all":
            return True
        case "prompt":
            return position < n
        case "generated":
            return position >= n - 1
        case "last":
            return position == n - 1
        case "content":
            return position >= n or content[position]
    return scope.begin <= position <= scope.end


def joint(y: np.ndarray, clamps: list[Intervention], site: Site) -> np.ndarray:
    v = np.array([one.at(site)[0].unit.double().numpy() for one in clamps])
    now, targets = v @ y, []
    for one, here in zip(clamps, now, strict=True):
        value = 0.0 if one.operator == "ablate" else one.value
        pick = {"clamp_min": max(here, value), "clamp_max": min(here, value)}
        targets.append(pick.get(one.operator, value))
    return y + np.linalg.lstsq(v, np.array(targets) - now, rcond=None)[0]


def changed(y: np.ndarray, one: Intervention, site: Site) -> np.ndarray:
    units = [direction.unit.double().numpy() for direction in one.at(site)]
    if one.operator == "add":
        return y + one.value * units[0]
    if one.operator == "add_norm_kept":
        moved = y + one.value * units[0]
        return moved * np.linalg.norm(y) / np.linalg.norm(moved)
    b1, b2 = np.linalg.qr(np.array(units).T)[0].T
    b1, b2 = b1 * np.sign(b1 @ units[0]), b2 * np.sign(b2 @ units[1])
    angle = math.radians(one.value)
    if one.operator == "rotate":
        return expm(angle * (np.outer(b2, b1) - np.outer(b1, b2))) @ y
    p, q = y @ b1, y @ b2
    radius = math.hypot(p, q)
    return y - p * b1 - q * b2 + radius * (math.cos(angle) * b1 + math.sin(angle) * b2)


def reference(rows: Rows, component: str, layer: int, x: torch.Tensor, positions: torch.Tensor):
    out = x.double().numpy().copy()
    for row, (steers, said) in enumerate(rows):
        for slot, position in enumerate(positions[row].tolist()):
            for head in range(HEADS) if component == "z" else [None]:
                site = Site(component, layer, head)
                where = (row, slot) if head is None else (row, slot, head)
                here = [one for one in steers if site in one.sites]
                clamps = [one for one in here if one.operator in CLAMPS]
                for one in here:
                    if not in_scope(one.scope, said.content, position):
                        continue
                    if one.operator not in CLAMPS:
                        out[where] = changed(out[where], one, site)
                    elif one is clamps[-1]:
                        out[where] = joint(out[where], clamps, site)
    return out


def close(got: torch.Tensor, want: np.ndarray) -> bool:
    errors = np.linalg.norm(got.double().numpy() - want, axis=-1)
    return bool((errors <= 5e-5 * np.maximum(1, np.linalg.norm(want, axis=-1))).all())


# --- random rows ------------------------------------------------------------------------------


def any_scope(draw: random.Random) -> Scope:
    kind = draw.choice(["all", "prompt", "generated", "last", "content", "positions"])
    begin = draw.randint(0, 6) if kind == "positions" else 0
    end = begin + draw.randint(0, 5) if kind == "positions" else 0
    return Scope(kind, begin, end, draw.random() < 0.3)


def any_sites(draw: random.Random, component: str) -> tuple[Site, ...]:
    if component == "z":
        heads = draw.sample(range(HEADS), draw.randint(1, HEADS))
        return tuple(Site("z", draw.randint(0, 1), head) for head in heads)
    return tuple(Site(component, layer) for layer in draw.sample([0, 1], draw.randint(1, 2)))


def any_row(seed: int) -> tuple[tuple[Intervention, ...], Encoded]:
    draw = random.Random(seed)
    n = draw.randint(1, 6)
    said = prompt(n, [draw.random() < 0.6 for _ in range(n)])
    shared, steers, one_sided = any_scope(draw), [], draw.random() < 0.3
    for i in range(draw.randint(0, 4)):
        component = draw.choice(["resid_post", "resid_post", "mlp_out", "z"])
        width = HEAD_WIDTH if component == "z" else WIDTH
        operators = [o for o in PLAIN if o not in ("clamp_min", "clamp_max")]
        if one_sided:  # alone among clamps: no other one may join it
            operators = [o for o in PLAIN if o not in CLAMPS]
            operators += ["clamp_min", "clamp_max"] * (i == 0)
        operator = draw.choice(operators)
        count, units = OPERATORS[operator]
        steers.append(
            Intervention(
                operator,
                tuple(way(1000 * seed + 10 * i + j, width) for j in range(count)),
                draw.uniform(-60, 60) if "deg" in units else draw.uniform(-4, 4) * bool(units),
                "deg" if "deg" in units else "",
                any_sites(draw, component),
                shared if operator in CLAMPS else any_scope(draw),
            )
        )
    return tuple(steers), said


def any_batch(seed: int, size: int = 5) -> Rows:
    return [any_row(100 * seed + i) for i in range(size)]


def stream(component: str, batch: int, slots: int, seed: int = 0) -> torch.Tensor:
    shape = (batch, slots, HEADS, HEAD_WIDTH) if component == "z" else (batch, slots, WIDTH)
    return 2 * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def spans_of(rows: Rows, after: int) -> Spans:
    """Whole prompts, and `after` generated tokens behind each."""
    return [(0, len(said.ids) + after) for _, said in rows]


def positions_of(spans: Spans) -> torch.Tensor:
    """Absolute positions in a left-aligned batch, -1 at padding."""
    slots = torch.arange(max(length for _, length in spans))
    begin, length = torch.tensor(spans).T
    return torch.where(slots < length[:, None], begin[:, None] + slots, -1)


def banks_of(rows: Rows, spans: Spans) -> dict[Hook, Bank]:
    return Operands(CPU).banks([(Steering(steers, CPU), said) for steers, said in rows], spans)


def hooks_of(rows: Rows) -> set[Hook]:
    return {(site.component, site.layer) for row, _ in rows for one in row for site in one.sites}


def applied(banks: dict[Hook, Bank], hook: Hook, x: torch.Tensor, *place: torch.Tensor):
    """A bank may be left out where nobody is steered, and may write to what it is given."""
    return banks[hook].apply(x.clone(), *place) if hook in banks else x


BATCHES = range(25)


def test_random_batches_hold_every_operator_component_and_scope():
    steers = [one for seed in BATCHES for row, _ in any_batch(seed) for one in row]
    assert {one.operator for one in steers} == set(PLAIN)
    assert len({one.scope.kind for one in steers}) == 6
    assert {site.component for one in steers for site in one.sites} == {
        "resid_post",
        "mlp_out",
        "z",
    }
    joined = [s for seed in BATCHES for row, _ in any_batch(seed) for s in _joint_sites(row)]
    assert len(joined) > 5


def _joint_sites(row: tuple[Intervention, ...]) -> list[Site]:
    clamps = [one for one in row if one.operator in CLAMPS]
    sites = [site for one in clamps for site in one.sites]
    return [site for site in set(sites) if sites.count(site) > 1]


@pytest.mark.parametrize("seed", BATCHES)
def test_a_bank_is_the_slow_loop(seed):
    rows = any_batch(seed)
    spans = spans_of(rows, after=4)
    positions, banks = positions_of(spans), banks_of(rows, spans)
    assert set(banks) <= hooks_of(rows)
    for component, layer in hooks_of(rows):
        x = stream(component, len(rows), positions.shape[1], seed)
        got = applied(banks, (component, layer), x)
        assert close(got, reference(rows, component, layer, x, positions))
        assert torch.equal(got[positions < 0], x[positions < 0])


@pytest.mark.parametrize("seed", BATCHES)
def test_a_decoding_step_is_the_slow_loop(seed):
    rows = any_batch(seed)
    for step in (0, 1, 5, 20):
        spans = [(len(said.ids) + step, 1) for _, said in rows]
        banks = banks_of(rows, spans)
        for component, layer in hooks_of(rows):
            x = stream(component, len(rows), 1, seed + step)
            got = applied(banks, (component, layer), x)
            assert close(got, reference(rows, component, layer, x, positions_of(spans)))


@pytest.mark.parametrize("seed", BATCHES)
def test_place_says_where_each_row_stands(seed):
    rows = any_batch(seed)
    spans = spans_of(rows, after=2)
    order = torch.randperm(len(rows) + 2, generator=torch.Generator().manual_seed(seed))
    place = order[: len(rows)]  # two more rows stand there, of no bank
    banks = banks_of(rows, spans)
    for hook in banks:
        x = stream(hook[0], len(order), positions_of(spans).shape[1], seed)
        got = applied(banks, hook, x, place)
        assert torch.allclose(got[place], applied(banks, hook, x[place]), atol=1e-6)
        others = order[len(rows) :]
        assert torch.equal(got[others], x[others])


def test_rows_do_not_depend_on_their_neighbours():
    rows = [row for seed in range(3) for row in any_batch(seed)]
    spans = spans_of(rows, after=2)
    banks = banks_of(rows, spans)
    for i, row in enumerate(rows):
        own = banks_of([row], spans[i : i + 1])
        for hook in own:
            x = stream(hook[0], len(rows), positions_of(spans).shape[1], i)
            alone = applied(own, hook, x[i : i + 1, : spans[i][1]])
            together = applied(banks, hook, x)[i : i + 1, : spans[i][1]]
            assert torch.allclose(alone, together, atol=1e-5)


def test_what_rows_share_is_kept_once():
    """256 rows of one ablation at 96 sites: a vector and its dual, and no copies of them."""
    v = way(1, 512)
    sites = [Site(component, n) for n in range(32) for component in ("resid_pre", "mlp_out")]
    steering = Steering((steer("ablate", v, at=[*sites]),), CPU)
    operands = Operands(CPU)
    rows = [(steering, prompt(40))] * 256
    banks = operands.banks(rows, [(0, 40)] * 256)
    assert len(banks) == 64 and len(operands) == 1
    tensors = {
        part.untyped_storage().data_ptr(): part.untyped_storage().nbytes()
        for bank in banks.values()
        for stage in bank.stages
        for part in (*stage.operands, stage.rows, stage.which, stage.mask)
    }
    assert sum(tensors.values()) <= 2 * 512 * 4 + 256 * (40 + 3 * 8) + 64


# --- by hand ----------------------------------------------------------------------------------


@pytest.mark.parametrize("operator", PLAIN)
def test_padding_is_never_touched_even_if_it_is_not_finite(operator):
    count, units = OPERATORS[operator]
    coefficient = {"clamp_max": "-50", "clamp_min": "50", "ablate": "0"}.get(operator, "30")
    coefficient += " deg" if "deg" in units else ""
    ways = [way(i) for i in range(count)]
    one = steer(operator, *ways, coefficient=coefficient, at=0, on="all+first")
    spans = [(0, 4), (0, 2)]
    (bank,) = banks_of([((one,), prompt(3)), ((one,), prompt(1))], spans).values()
    x = stream("resid_post", 2, 4)
    x[1, 2], x[1, 3] = math.nan, math.inf
    got = bank.apply(x.clone())
    assert got[1, 2].isnan().all() and (got[1, 3] == math.inf).all()
    assert got[0].isfinite().all() and got[1, :2].isfinite().all()
    assert not (got == x)[positions_of(spans) >= 0].all(-1).any()


def test_rows_without_interventions_are_unchanged_to_the_bit():
    rows = [(parse("add(v, 3) at 0", {"v": way(1)}), prompt(2)), ((), prompt(3))]
    for spans in (spans_of(rows, 0), [(2, 1), (3, 1)]):
        bank = banks_of(rows, spans)["resid_post", 0]
        x = stream("resid_post", 2, positions_of(spans).shape[1])
        assert torch.equal(bank.apply(x.clone())[1], x[1])
    assert banks_of([((), prompt(2))], [(0, 2)]) == {}


@pytest.mark.parametrize(
    ("scope", "live"),
    [
        ("all", True),
        ("generated", True),
        ("content", True),
        ("prompt", False),
        ("last", False),
        ("positions 0-3", False),
        ("positions 3-5", True),
        ("positions 6-9", False),
    ],
)
def test_a_decoding_step_steers_only_rows_whose_scope_goes_on(scope, live):
    add = f"add(v, 3) at 0 on {scope}"
    rows = [
        (parse(add, {"v": way(1)}), prompt(4)),
        (parse("add(w, 1) at 0", {"w": way(2)}), prompt(2)),
    ]
    bank = banks_of(rows, [(4, 1), (2, 1)])["resid_post", 0]
    assert len(bank.stages[0].rows) == 1 + live
    x = stream("resid_post", 2, 1)
    got = bank.apply(x.clone())
    step = 3 * way(1).unit if live else torch.zeros(WIDTH)
    assert torch.allclose(got[0, 0], x[0, 0] + step, atol=1e-6)
    assert torch.allclose(got[1, 0], x[1, 0] + way(2).unit, atol=1e-6)


@pytest.mark.parametrize("text", ["add(v, 3) at 0", "clamp(v, 3) at 0; add(w, 1) at 0"])
def test_bfloat16_stays_bfloat16(text):
    rows = [(parse(text, {"v": way(1), "w": way(2)}), prompt(2))] * 2
    bank = banks_of(rows, [(2, 1), (2, 1)])["resid_post", 0]
    x = stream("resid_post", 2, 1).bfloat16()
    got = bank.apply(x.clone())
    assert got.dtype == torch.bfloat16
    assert torch.equal(got, bank.apply(x.clone()))


def test_a_set_steers_each_layer_with_its_own_and_max_is_each_layers():
    many = DirectionSet(way(i, name="v", layer=i, max_activation=1.0 + i) for i in range(3))
    rows = [((steer("add", many, coefficient="2 max", at="0-2"),), prompt(1))]
    banks = banks_of(rows, [(1, 1)])
    for layer in range(3):
        got = banks["resid_post", layer].apply(torch.zeros(1, 1, WIDTH))
        assert torch.allclose(got[0, 0], 2 * (1.0 + layer) * many[layer].unit)


def test_clamps_join_at_the_place_of_the_last_one():
    known = {name: way(i, name=name) for i, name in enumerate("vwu")}
    site = Site("resid_post", 0)
    text = (
        "add(u, 1) at 0; clamp(v, 2) at 0; rotate(v, u, 5 deg) at 0; ablate(w) at 0; add(w, 3) at 0"
    )
    steps = Steering(parse(text, known), CPU).steps
    assert [step.kind for step in steps[site]] == ["add", "rotate", "clamp", "add"]
    assert set(steps) == {site}


def test_joined_clamps_hold_every_target():
    known = {name: way(i, name=name) for i, name in enumerate("vwu")}
    text = "clamp(v, 2) at 0; clamp(w, -1) at 0; ablate(u) at 0"
    rows = [(parse(text, known), prompt(1)), (parse("clamp(v, 7) at 0", known), prompt(1))]
    bank = banks_of(rows, [(0, 4), (0, 4)])["resid_post", 0]
    got = bank.apply(stream("resid_post", 2, 4))[:, 1:]
    for name, target in (("v", 2.0), ("w", -1.0), ("u", 0.0)):
        assert torch.allclose(got[0] @ known[name].unit, torch.tensor(target), atol=1e-5)
    assert torch.allclose(got[1] @ known["v"].unit, torch.tensor(7.0), atol=1e-5)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("clamp(v, 1) at 0; clamp_min(w, 1) at 0", "clamp_min cannot be joined .* resid_post 0"),
        ("clamp_max(v, 1) at 0; ablate(w) at 0", "clamp_max cannot be joined"),
        ("clamp_min(v, 1) at 0; clamp_max(v, 2) at 0", "clamp_min cannot be joined"),
        ("clamp(v, 1) at 0 on prompt; clamp(w, 1) at 0", r"different scopes \(prompt, all\)"),
        ("ablate(v) at 0 on all+first; clamp(w, 1) at 0", r"different scopes \(all\+first, all\)"),
        ("clamp(v, 1) at 0; clamp(near, 2) at 0", "v@.* and near@.* are nearly parallel"),
        ("clamp(v, 1) at 0; clamp(v, 2) at 0", "nearly parallel"),
        ("rotate(v, near, 3 deg) at 0", "v@.* and near@.* are nearly parallel"),
        ("add(v, 0.5 dose) at 0", "has a dose: call .resolve"),
        ("clamp(v, 0.5 dose) at 0", "has a dose: call .resolve"),
        ("add(v, 2 max) at 0", "has no maximum activation"),
    ],
)
def test_what_cannot_be_stacked_is_refused(text, said):
    near = way(1) + 1e-3 * way(2)
    known = {"v": way(1, name="v"), "w": way(2, name="w"), "near": near.named("near")}
    with pytest.raises(RequestError, match=said):
        Steering(parse(text, known), CPU)


def test_clamps_at_different_places_are_not_joined():
    known = {"v": way(1), "w": way(2)}
    text = "clamp(v, 1) at 0 on prompt; clamp_min(w, 1) at 1; clamp_max(w, 2) at mlp_out 0"
    assert len(banks_of([(parse(text, known), prompt(2))], [(0, 2)])) == 3
