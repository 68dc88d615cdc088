"""`interp-steer export`: a line of interventions as a file that other tools read."""

import json
from pathlib import Path
from typing import Annotated, Any

from interp_steer.cli import common
from interp_steer.errors import RequestError, nearest
from interp_steer.util.console import progress, safe

# format -> (suffixes of its file; none is a folder; how it is used)
FORMATS: dict[str, tuple[tuple[str, ...], str]] = {
    "safetensors": (
        (".safetensors",),
        "interp-steer generate ... --steer 'add({out}, 1 raw) at {layers} on all+first'",
    ),
    "gguf": ((".gguf",), "llama-server -m MODEL.gguf --control-vector {out}"),
    "steered-gguf": ((".gguf",), "llama-server -m {out}"),
    "lm-eval": (
        (".pt", ".pth"),
        "lm_eval --model steered --model_args pretrained={model},steer_path={out} --tasks ...",
    ),
    "vllm-lens": ((".json",), "merge it into a request to vLLM with vllm-lens"),
    "interp-engine": ((".json",), "merge it into a request to interp-engine's /v1/generate"),
    "checkpoint": ((), "vllm serve {out}    or    transformers serve {out}"),
}
PRINTED = ("vllm-lens", "interp-engine")  # where no file is asked for


def export(
    to: Annotated[str, common.arg(f"{', '.join(FORMATS)}.", metavar="FORMAT")],
    steer: Annotated[str, common.opt("What is exported, such as 'add(eiffel, 8.5) at 15'.")],
    out: Annotated[
        Path | None, common.opt("File, or new folder of a checkpoint. Requests are else printed.")
    ] = None,
    include_first: Annotated[
        bool,
        common.opt("Steer the first position too, as every reader does, and tell what it changes."),
    ] = False,
    base: Annotated[
        Path | None, common.opt("For steered-gguf: the model's GGUF file.", "--gguf")
    ] = None,
    prompts: Annotated[
        Path | None,
        common.opt(
            "File of prompts: their residual stream is the unit of dose, and on them the first "
            "position is compared. By default 16 questions that come along."
        ),
    ] = None,
    model: common.Model = "starter",
    named: common.Named = None,
    system: common.System = None,
    text: common.Text = False,
    as_json: common.Json = False,
    dtype: common.Dtype = None,
    device: common.Device = None,
    date: common.Date = None,
) -> None:
    """Write steering as a file that other tools read, exactly or not at all.

    What leaves is a constant: a vector added at every position. Anything else is refused, with the
    nearest line that can leave.
    """
    if to not in FORMATS:
        raise RequestError(f"unknown format {to!r}{nearest(to, FORMATS)}")
    suffixes, use = FORMATS[to]
    if out is None and to not in PRINTED:
        kind = f"FILE{suffixes[0]}" if suffixes else "FOLDER"
        raise RequestError(f"nowhere to write: give --out {kind}")
    if suffixes:
        common.writable("--out", out, suffixes)
    else:
        common.writable_folder("--out", out)
    if (base is None) == (to == "steered-gguf"):
        raise RequestError(
            "steered-gguf needs --gguf MODEL.gguf" if base is None else "--gguf is for steered-gguf"
        )
    with progress("starting", every=5):
        from interp_steer.export import constant
        from interp_steer.export.harness import entries
        from interp_steer.export.request import interp_engine
        from interp_steer.model.loading import configuration, find_folder, glance
        from interp_steer.model.shape import Shape
        from interp_steer.prompts.file import QUESTIONS, PromptFile
        from interp_steer.steering.directions import Directions
        from interp_steer.steering.grammar import parse
        from interp_steer.steering.intervention import line, resolve
        from interp_steer.steering.scale import Scale

    written = parse(steer, Directions(named or []))
    wanted = constant.with_first(written) if include_first else written
    read = {"lm-eval": entries, "interp-engine": interp_engine}.get(to, constant.constants)
    if read is constant.constants:
        constant.refuse(wanted)
    bounds = glance(model)
    if bounds:  # with any unit of dose: what cannot leave is told before the model is loaded
        any_scale = Scale((1.0,) * (bounds.n_layers + 1))
        _check(to, read(resolve(wanted, any_scale), bounds), out, base)
    dosed = any(one.unit == "dose" for one in wanted)
    compared = include_first and written != wanted
    scale = difference = None
    if dosed or compared:
        file = PromptFile.read(prompts or QUESTIONS)
        loaded = common.load(model, dtype, device, date=date)
        items = file.items(as_chat=loaded.is_chat and not text, system=system)
        asked = [item.prompt for item in items]
        scale = Scale.of(loaded, [loaded.encode(p) for p in asked]) if dosed else None
        if compared:
            difference = constant.first_position(loaded, resolve(written, scale), asked)
    wanted = resolve(wanted, scale)
    if bounds is None:  # it was not on this machine
        folder, _ = find_folder(model, None, weights=False)
        bounds = Shape.of(configuration(folder, model)).bounds(model)
    told: dict[str, Any] = {"format": to, "model": model, "steer": line(wanted)}
    if difference:
        told["first_position"] = vars(difference)
    found = _write(to, read(wanted, bounds), out, base, told)
    if out is None:
        common.print_json(found)
        return
    told["out"] = str(out)
    if as_json:
        common.print_json(told)
        return
    print(safe(f"wrote {out}: {told['steer']}"))
    if difference:
        print(
            f"KL(as written || at the first position too) {difference.kl:.4g} nats a token, "
            f"at most {difference.largest:.4g}, {difference.prompts} prompts"
        )
    layers = ",".join(str(site.layer) for one in wanted for site in one.sites)
    known = model
    if model == "starter":  # other tools do not know it by this name
        from interp_steer.model import starter

        known = str(starter.place())
    print(safe(f"use   {use.format(out=out, model=known, layers=layers)}"))


def _check(to: str, found: Any, out: Path | None, base: Path | None) -> None:
    """What a format refuses of sites and names."""
    from interp_steer.export import checkpoint, control_vector, steered_gguf

    if to == "gguf" and out:
        control_vector.check(found, out)
    elif to == "checkpoint" and out:
        checkpoint.check(found, out)
    elif to == "steered-gguf" and out and base:
        steered_gguf.check(found, base, out)


def _write(to: str, found: Any, out: Path | None, base: Path | None, told: dict[str, Any]) -> Any:
    """Writes the file or folder of a format; gives the body of a request."""
    from interp_steer.export import checkpoint, control_vector, harness, steered_gguf
    from interp_steer.export.constant import directions
    from interp_steer.export.request import vllm_lens
    from interp_steer.model import starter
    from interp_steer.model.loading import configuration, find_folder
    from interp_steer.model.shape import Shape
    from interp_steer.steering.direction import is_name
    from interp_steer.util.files import whole

    if to in PRINTED:
        body = vllm_lens(found) if to == "vllm-lens" else found
        if out:
            with whole(out) as part:
                part.write_text(json.dumps(body, indent=1), encoding="utf-8")
        return body
    assert out is not None
    if to == "gguf":
        control_vector.write(found, out)
    elif to == "lm-eval":
        harness.write(found, out)
    elif to == "safetensors":
        directions(found, out.stem if is_name(out.stem) else "exported", told["steer"]).save(out)
    elif to == "steered-gguf":
        assert base is not None
        with progress("writing", base.stat().st_size) as report:
            steered_gguf.write(found, base, out, report=report)
    else:
        given = told["model"]
        folder, commit = find_folder(given, None)
        shape = Shape.of(configuration(folder, given))
        name = {"starter": starter.HUB}.get(given, given)
        name = Path(name).name if Path(name).is_dir() else name  # nobody's business elsewhere
        about = {"model": name, "revision": commit or "", "steer": told["steer"]}
        if given == "starter":
            about["weights"] = f"rounded to 4 bits ({starter.PACKAGE} {starter.VERSION})"
        if first := told.get("first_position"):
            about["KL(first position left out || as here)"] = f"{first['kl']:.4g} nats a token"
        size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
        with progress("writing", size) as report:
            checkpoint.write(found, folder, shape, out, about, report=report)
    return None
