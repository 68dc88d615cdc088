"""`interp-steer direction list` `show` and `import`: stored directions, and what files hold."""

from pathlib import Path
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
    from interp_steer.steering.direction import members
    from interp_steer.steering.directions import Directions

    known, rows = Directions(), []
    for name in known:
        try:
            stored = known[name]
        except SteerError as error:
            note(f"{name}: {error}")
            continue
        parts = members(stored)
        one, numbers = parts[0], sorted(part.site.layer for part in parts)
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
    from interp_steer.steering.direction import members

    stored, known = look_up(file)
    if stored is None:
        raise RequestError(f"no direction {file}{nearest(file, known)}")
    parts = members(stored)
    if as_json:
        fields = ("name", "sha", "hook_point", "norm", "max_activation")
        common.print_json(
            [{**{f: getattr(m, f) for f in fields}, "source": dict(m.source)} for m in parts]
        )
        return
    print(safe(stored.label))
    for key, value in parts[0].source.items():
        shown = f"digests of {len(value.split())} prompts" if key == "asked" else safe(value)
        print(f"  {key}: {shown}")
    for one in parts:
        print(f"  {one.hook_point}  norm {one.norm:.4g}  {one.sha}")


def import_file(
    file: Annotated[Path, common.arg("A .gguf, .npy, .pt or .safetensors file of another tool.")],
    name: common.Name,
    at: Annotated[
        str | None,
        common.opt(
            "Where it belongs, if the file does not say: 15 is the output of block 15, counted "
            "from 0; 0-31 for a row a layer; 'mlp_out 15'."
        ),
    ] = None,
    key: Annotated[str | None, common.opt("Which tensor of a file that holds several.")] = None,
    out: common.Saved = None,
    as_json: common.Json = False,
) -> None:
    """Take a direction from another tool's file.

    GGUF control vectors (llama.cpp, repeng), NumPy arrays, tensors of torch (weights only: no code
    is run) and of safetensors, and lm-eval's steering files.
    """
    from interp_steer.export.incoming import imported
    from interp_steer.steering.direction import members
    from interp_steer.steering.intervention import sites_text
    from interp_steer.util.files import cache_dir

    common.check_name(name)
    common.writable("--out", out)
    found = imported(file, at=at, name=name, key=key)
    target = found.save(out or cache_dir("directions") / f"{name}.safetensors")
    parts = members(found)
    rows = [{"hook_point": m.hook_point, "norm": m.norm, "sha": m.sha} for m in parts]
    if as_json:
        common.print_json({"file": str(target), "members": rows})
        return
    common.table(tuple(rows[0]), [tuple(row.values()) for row in rows])
    print(safe(f"saved {target}"))
    called = name if out is None else str(target)
    steer = f"add({called}, 1 raw) at {sites_text([m.site for m in parts])} on all+first"
    print(safe(f"try   interp-steer generate '...' --steer '{steer}'    # at the file's lengths"))
