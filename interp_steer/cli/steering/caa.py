"""`interp-steer caa`: contrastive activation addition, from a file of questions to its table."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from interp_steer.cli import common
from interp_steer.cli.steering.sweep import as_grid, print_grid
from interp_steer.errors import RequestError
from interp_steer.util.console import progress

if TYPE_CHECKING:
    from interp_steer.prompts.entry import Entry
    from interp_steer.prompts.file import PromptFile


def caa(
    file: Annotated[
        Path,
        common.arg(
            "Questions with both answers, such as CAA's generate_dataset.json.", show_default=False
        ),
    ],
    test: Annotated[
        Path | None,
        common.opt(
            "Held-out questions, such as CAA's test_dataset_ab.json. By default a half of FILE "
            "that makes no direction."
        ),
    ] = None,
    layers: common.Layers = None,
    multiples: Annotated[
        str, common.opt("Multiples of the mean difference, such as --multiples=-2,-1,1,2.")
    ] = "-1,1",
    name: Annotated[str, common.opt("What the direction is called.")] = "caa",
    seed: Annotated[int, common.opt("Of the split of FILE.")] = 16,
    system: common.System = None,
    text: common.Text = False,
    model: common.Model = "starter",
    out: Annotated[
        Path | None,
        common.opt("Folder of the rows; what is there goes on. By default in the cache."),
    ] = None,
    as_json: common.Json = False,
    dtype: common.Dtype = None,
    device: common.Device = None,
    date: common.Date = None,
) -> None:
    """Contrastive activation addition: propensity by layer and multiple.

    Rimsky et al. 2024 (arXiv 2312.06681). The direction is the mean difference at the answer's
    letter over the questions that build. Multiples of it, not normalised, are added from the
    prompt's last token on. The table has p(matching answer) over the two answers, a mean over
    the held-out questions.
    """
    common.writable_folder("--out", out)
    with progress("starting", every=5):
        from interp_steer.model.loading import glance
        from interp_steer.model.site import Site
        from interp_steer.prompts.file import PromptFile
        from interp_steer.steering.contrast import Contrast
        from interp_steer.steering.spread import spread
        from interp_steer.study.study import Study
        from interp_steer.util.files import cache_dir

    values = spread(f"{{{multiples}}}").lines
    try:
        steered = [value for value in values if float(value)]
    except ValueError:
        raise RequestError(f"--multiples is {multiples!r}, expected such as -2,-1,1,2") from None
    build = PromptFile.read(file)
    held = PromptFile.read(test) if test else None
    if held is None:
        build, held = _split(build, seed)
    bounds = glance(model)
    asked = common.indices("layers", layers) if layers else None
    if bounds:
        for layer in asked or ():
            bounds.check(Site("resid_post", layer), bounds.d_model)
    for part in (build, held):
        for number, one in enumerate(part.entries, start=1):
            if one.prompt is None or one.positive is None or one.negative is None:
                raise RequestError(
                    f"{part.path}, entry {number}: CAA needs a question with both answers "
                    "(question, answer_matching_behavior, answer_not_matching_behavior)"
                )
    loaded = common.load(model, dtype, device, date=date)
    as_chat = loaded.is_chat and not text
    sides = [build.side(side, as_chat or None) for side in ("positive", "negative")]
    asked_before = build.asked("positive")
    contrast = Contrast.measure(loaded, sides[0], sides[1], "answer", asked=asked_before)
    direction = contrast.directions(name=name)
    at = ",".join(map(str, asked if asked is not None else range(loaded.n_layers)))
    items = held.items(as_chat=as_chat, system=system)
    study = Study.sweep(
        f"add({name}, {{{','.join(steered)}}} raw) at {{{at}}} on generated",
        items,
        {name: direction},
        metrics=("p_matching", "propensity"),
        as_chat=False,  # they are chats already
        question=f"CAA: does adding {name} make the matching answer likelier?",
    )
    folder = out or cache_dir("runs") / f"{name}-{direction.sha}"
    run = study.run(loaded, folder, arguments=sys.argv)
    found = run.findings()
    if as_json:
        common.print_json({"folder": str(folder), "grid": as_grid(found)})
        return
    print_grid(found, ["p_matching"])
    print(
        f"\n{len(build.entries)} questions made the direction, {len(items)} others were asked\n"
        f"rows    {folder}\npage    interp-steer report {folder}"
    )


def _split(file: "PromptFile", seed: int) -> "tuple[PromptFile, PromptFile]":
    """Two files of one: questions that make the direction, and others that test it."""
    from interp_steer.prompts.file import PromptFile
    from interp_steer.prompts.parts import split_items

    items = file.items()
    first, _ = split_items(items, 0.5, seed)
    chosen = {id(item) for item in first}
    parts: tuple[list[Entry], list[Entry]] = [], []
    for item, entry in zip(items, file.entries, strict=True):
        parts[id(item) not in chosen].append(entry)
    build, held = (PromptFile(file.path, tuple(part)) for part in parts)
    return build, held
