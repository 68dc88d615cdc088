"""`interp-steer direction list` and `show`: the stored directions, and what a file holds."""

from typing import TYPE_CHECKING, Annotated

from interp_steer.cli import common
from interp_steer.errors import RequestError, nearest, note
from interp_steer.util.console import safe

if TYPE_CHECKING:
    from interp_steer.steering.directions import Directions
    from interp_steer.steering.intervention import Vector


def list_stored(as_json: common.Json = False) -> None:
    """List the stored directions, which --steer knows by their names."""
    from interp_steer.errors import SteerError
    from interp_steer.steering.direction import Direction
    from interp_steer.steering.directions import Directions

    known, rows = Directions(), []
    for name in known:
        try:
            stored = known[name]
        except SteerError as error:
            note(f"{name}: {error}")
            continue
        members = [stored] if isinstance(stored, Direction) else list(stored)
        one, numbers = members[0], sorted(member.site.layer for member in members)
        source = one.source
        rows.append(
            {
                "name": name,
                "layers": "-".join(map(str, dict.fromkeys((numbers[0], numbers[-1])))),
                "width": len(one.unit),
                "from": source.get("release") or source.get("method") or "",
                "model": source.get("model") or source.get("model_name") or "",
                "made": source.get("created_at", "")[:10],
            }
        )
    if as_json:
        common.print_json(rows)
    elif not rows:
        print("no stored directions; `direction make` and `features get` store them")
    else:
        common.table(tuple(rows[0]), [tuple(row.values()) for row in rows])


def look_up(text: str) -> "tuple[Vector | None, Directions]":
    """What a stored direction's name, a file or NAME=FILE stands for, if anything, and all that has
    a name.
    """
    from interp_steer.steering.directions import Directions

    name, sign, _ = text.partition("=")
    known = Directions([text] if sign else [])
    try:
        return known[name if sign else text], known
    except KeyError:
        return None, known


def show(
    file: Annotated[
        str, common.arg("As --steer finds it: the name of a stored direction, a file, NAME=FILE.")
    ],
    as_json: common.Json = False,
) -> None:
    """Show what a direction's file holds, and where it came from."""
    from interp_steer.steering.direction import Direction

    stored, known = look_up(file)
    if stored is None:
        raise RequestError(f"no direction {file}{nearest(file, known)}")
    members = [stored] if isinstance(stored, Direction) else list(stored)
    if as_json:
        fields = ("name", "sha", "hook_point", "norm", "max_activation")
        common.print_json(
            [{**{f: getattr(m, f) for f in fields}, "source": dict(m.source)} for m in members]
        )
        return
    print(safe(stored.label))
    for key, value in members[0].source.items():
        shown = f"digests of {len(value.split())} prompts" if key == "asked" else safe(value)
        print(f"  {key}: {shown}")
    for one in members:
        print(f"  {one.hook_point}  norm {one.norm:.4g}  {one.sha}")
