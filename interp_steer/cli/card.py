"""`interp-steer card`: one page for a direction."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from interp_steer.cli import common
from interp_steer.cli.steering.stored import look_up
from interp_steer.errors import RequestError, nearest
from interp_steer.util.console import progress, safe

if TYPE_CHECKING:
    from interp_steer.steering.direction import Direction


def card(
    what: Annotated[
        str,
        common.arg(
            "A feature, as MODEL/SOURCE/INDEX or SOURCE/INDEX (starter/2652), or a direction: a "
            "stored one's name, or a file.",
            metavar="ID|FILE",
        ),
    ],
    model: common.Model = "starter",
    concept: Annotated[
        str | None,
        common.opt("Words that it should bring about; by default those of the feature's label."),
    ] = None,
    prompts: Annotated[
        Path | None,
        common.opt("Questions: half choose the dose, half test it. By default 16 that ship."),
    ] = None,
    texts: Annotated[
        Path | None, common.opt("Texts that show where a feature fires. By default 48 that ship.")
    ] = None,
    layer: Annotated[int | None, common.opt("Which, of a file with several layers.")] = None,
    kl: Annotated[
        float, common.opt("Nats a token that the dose may cost on the selection prompts.")
    ] = 1.0,
    controls: Annotated[
        int, common.opt("Random directions that make the same choice.", min=0)
    ] = 19,
    out: Annotated[
        Path | None, common.opt("Folder of the rows and the page. By default in the cache.")
    ] = None,
    as_json: common.Json = False,
    dtype: common.Dtype = None,
    device: common.Device = None,
    date: common.Date = None,
) -> None:
    """Say of one direction whether it steers, how strongly, at what damage, beside asking.

    Whether it steers is read from the probability of the concept's words on held-out prompts, at
    the dose that selection prompts choose, against random directions that choose theirs.
    """
    common.writable_folder("--out", out)
    with progress("starting", every=5):
        from interp_steer.prompts.file import read_items, read_prompts
        from interp_steer.steering.grammar import steer
        from interp_steer.steering.intervention import sites_text
        from interp_steer.tune import card as made
        from interp_steer.util.files import whole

    direction = _direction(what, layer)
    words = common.words(concept)
    items = read_items(prompts) if prompts else ()
    given = read_prompts(texts) if texts else ()
    site = sites_text((direction.site,))
    common.check_fits(model, [(steer("add", direction, coefficient="0.1 dose", at=site),)])
    loaded = common.load(model, dtype, device, date=date)
    content = [direction.sha, model, dtype, words, kl, controls, [item.id for item in items]]
    folder = out or common.run_folder("card", content)
    found = made.card(
        loaded, direction, folder, words=words, prompts=items, texts=given, budget=kl,
        controls=controls,
    )  # fmt: skip
    page, told = found.write(folder / "card.html"), found.as_json()
    with whole(folder / "card.json") as part:
        part.write_text(json.dumps(told, indent=1), encoding="utf-8")
    if as_json:
        common.print_json(told)
        return
    print(safe(str(found)))
    print(f"page  {page}")


def _direction(what: str, layer: int | None) -> "Direction":
    """The direction that a word, a file or a feature's address stands for."""
    from interp_steer.features.feature import feature
    from interp_steer.steering.direction import Direction

    found, known = look_up(what)
    if found is None:
        where, _, index = what.rpartition("/")
        if where and index.isdecimal():
            return feature(where, int(index)) if where.count("/") != 1 else feature(what)
        raise RequestError(
            f"no direction and no feature {what!r}{nearest(what, known)}; a feature is "
            "MODEL/SOURCE/INDEX, as smollm2-135m-instruct/13-starter-res-6k/2652"
        )
    if isinstance(found, Direction):
        if layer not in (None, found.site.layer):
            raise RequestError(f"{what} is at layer {found.site.layer}, not {layer}")
        return found
    layers = ", ".join(str(one.site.layer) for one in found)
    if layer is None or layer not in [one.site.layer for one in found]:
        raise RequestError(f"{what} has layers {layers}; choose one with --layer")
    return found[layer]
