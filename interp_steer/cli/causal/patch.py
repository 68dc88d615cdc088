"""`interp-steer patch`: where an answer is kept, by position or by head, from a pair of prompts."""

from pathlib import Path
from typing import Annotated

from interp_steer.cli import common
from interp_steer.cli.causal.ablate import brought_back, write
from interp_steer.errors import RequestError, nearest
from interp_steer.util.console import progress

BY = {"position": ("resid_pre", "each"), "head": ("z", "all")}


def patch(
    clean: Annotated[
        str | None, common.opt("The prompt whose answer is right: 'When Mary and John ..., John'.")
    ] = None,
    corrupt: Annotated[
        str | None, common.opt("A prompt of the same length in tokens, with another answer.")
    ] = None,
    answer: Annotated[
        str | None, common.opt("The clean prompt's answer, with its space: ' Mary'.")
    ] = None,
    wrong: Annotated[str | None, common.opt("The corrupted prompt's: ' John'.")] = None,
    prompts: Annotated[
        Path | None,
        common.opt("A file of such pairs instead: prompt, corrupted, positive, negative."),
    ] = None,
    by: Annotated[
        str, common.opt("position (residual stream, layer by layer) or head (all positions).")
    ] = "position",
    attribution: Annotated[
        bool,
        common.opt("Estimate all effects from two passes, to first order, in place of patching."),
    ] = False,
    layers: common.Layers = None,
    chat: Annotated[bool, common.opt("Put the prompts through the chat template.")] = False,
    out: Annotated[
        Path | None, common.opt("Write every row to this .csv or .parquet file.")
    ] = None,
    plot: Annotated[Path | None, common.opt("Draw to this .png or .svg file.")] = None,
    model: common.Model = "starter",
    as_json: common.Json = False,
    dtype: common.Dtype = None,
    device: common.Device = None,
) -> None:
    """Find where an answer is kept, by position or by head.

    Activation patching (Meng et al. 2022, arXiv 2202.05262; Wang et al. 2022, arXiv 2211.00593).
    Activations of the clean prompt are put into the corrupted prompt's pass, one place at a time.
    The share of the logit difference that a place brings back is 0 as corrupted and 1 as clean.
    """
    if by not in BY:
        raise RequestError(f"--by is {by!r}{nearest(by, BY)}")
    single = {"--clean": clean, "--corrupt": corrupt, "--answer": answer, "--wrong": wrong}
    missing = [name for name, value in single.items() if value is None]
    if (prompts is None) == bool(missing):
        lacks = f"; {', '.join(missing)} is not given" if 0 < len(missing) < 4 else ""
        raise RequestError(f"give --clean, --corrupt, --answer and --wrong, or --prompts{lacks}")
    common.writable("--out", out, (".csv", ".parquet"), new_folders=True)
    common.writable("--plot", plot, (".png", ".svg"), new_folders=True)
    with progress("starting", every=5):
        from interp_steer.causal.attribution import attribute
        from interp_steer.causal.patch import check
        from interp_steer.causal.patch import patch as exactly
        from interp_steer.model.loading import glance
        from interp_steer.model.site import Site
        from interp_steer.prompts.file import PromptFile

    pair = {"prompt": clean, "corrupted": corrupt, "positive": answer, "negative": wrong}
    file = PromptFile.read(prompts) if prompts else PromptFile.of("--clean", [pair])
    component, positions = BY[by]
    check(file.items(), [component], positions)
    numbers = common.indices("layers", layers) if layers else None
    if bounds := glance(model):
        for number in numbers or ():
            bounds.check(Site("resid_post", number), bounds.d_model)
    loaded = common.load(model, dtype, device)
    items = file.items(as_chat=chat)
    with progress("patching", 1.0) as report:
        run = attribute if attribution else exactly
        effects = run(
            loaded, items, [component], positions=positions, layers=numbers, report=report
        )
    write(brought_back(effects), out, plot, as_json)
