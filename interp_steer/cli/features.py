"""`interp-steer features` and `interp-steer sae`: assembles features, SAEs and screening, prints.

Imports wait in the commands.
"""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from interp_steer.cli.common import Device, Dtype, Json, Model, load
from interp_steer.errors import RequestError, RunError
from interp_steer.util.console import progress, safe

if TYPE_CHECKING:
    from interp_steer.features.sae import Sae
    from interp_steer.labels.label import Label
    from interp_steer.model.model import SteeringModel
    from interp_steer.prompts.prompt import Encoded

app = typer.Typer(
    help="Features of sparse autoencoders: as directions, over texts, screened for steering.",
    no_args_is_help=True,
    rich_markup_mode=None,
)
saes = typer.Typer(help="Check a sparse autoencoder.", no_args_is_help=True)

Where = Annotated[
    str,
    typer.Argument(
        metavar="SAE", help="starter, RELEASE/SAE_ID, MODEL/SOURCE, or a folder SAELens saved."
    ),
]
SCREENED = 50  # features that a search finds, before the best of them are shown
Limit = Annotated[int, typer.Option(min=1, help="How many to show.")]
Length = Annotated[int, typer.Option(min=2, help="Longer texts are cut into pieces of N tokens.")]


def _both(
    where: str, model: str, dtype: str | None, device: str | None
) -> "tuple[Sae, SteeringModel]":
    loaded = load(model, dtype, device)
    with progress("loading the SAE", every=5):
        from interp_steer.features.sae import Sae

        sae = Sae.load(where, device=loaded.device)
    sae.check(loaded)
    return sae, loaded


def _texts(model: "SteeringModel", paths: list[Path], length: int) -> "list[Encoded]":
    from interp_steer.features.contexts import windows
    from interp_steer.prompts.file import read_prompts

    return windows(model, [p for path in paths for p in read_prompts(path)], length)


def _labels(sae: "Sae") -> "dict[int, Label]":
    """What the label store knows of an SAE's features; nothing where there is none."""
    from interp_steer.labels import Store
    from interp_steer.labels.label import Source

    if not sae.where.neuronpedia:
        return {}
    try:
        with Store() as store:
            return store.best(Source.parse(sae.where.neuronpedia))
    except RunError:
        return {}


def _text(labels: "dict[int, Label]", index: int) -> str | None:
    return labels[index].label if index in labels else None


@app.command()
def get(
    feature_of: Annotated[
        list[str],
        typer.Argument(
            metavar="FEATURE",
            help="MODEL/SOURCE/INDEX, its Neuronpedia address, RELEASE SAE_ID INDEX, "
            "or FOLDER INDEX.",
        ),
    ],
    name: Annotated[str | None, typer.Option(help="What lines of text will call it.")] = None,
    out: Annotated[Path | None, typer.Option(help="File; default in the cache.")] = None,
    offline: Annotated[bool, typer.Option(help="Never open a connection.")] = False,
    as_json: Json = False,
) -> None:
    """Save a feature's decoder row as a direction, reading no more of the SAE than that."""
    from interp_steer.features.feature import feature
    from interp_steer.util.files import cache_dir

    *names, last = feature_of
    if names and not (last.isascii() and last.isdigit()):
        raise RequestError(f"{last!r} is not the index of a feature: expected a whole number")
    if len(names) > 2:
        raise RequestError(f"expected a feature in one to three words, got {len(feature_of)}")
    if len(names) == 2:
        row = feature(names[0], names[1], int(last), name=name, offline=offline)
    elif names:
        row = feature(names[0], int(last), name=name, offline=offline)
    else:
        row = feature(last, name=name, offline=offline)
    path = row.save(out or cache_dir("directions") / f"{row.name}.safetensors")
    facts = {
        "name": row.name, "sha": row.sha, "hook_point": row.hook_point, "norm": row.norm,
        "max_activation": row.max_activation, "source": dict(row.source), "file": str(path),
    }  # fmt: skip
    if as_json:
        print(json.dumps(facts, indent=1))
        return
    print(f"{row.label}  {row.hook_point}  norm {row.norm:.4g}")
    for key, value in row.source.items():
        if value:
            print(f"  {key}: {safe(str(value))}")
    print(f"saved {path}")
    line = f"add({row.name}, 0.5 dose) at {row.site} on prompt"
    print(f"try   interp-steer generate --prompt '...' --steer '{line}'")


@app.command()
def top(
    sae: Where,
    prompt: Annotated[str, typer.Option(help="A user's message; with --text plain text.")],
    text: Annotated[bool, typer.Option("--text", help="Plain text, no chat template.")] = False,
    limit: Limit = 20,
    model: Model = "starter",
    as_json: Json = False,
    dtype: Dtype = None,
    device: Device = None,
) -> None:
    """Show the features that fire most in a prompt, a chat's template left out."""
    from dataclasses import asdict

    whole, loaded = _both(sae, model, dtype, device)
    from interp_steer.features.contexts import top_features
    from interp_steer.prompts.prompt import chat

    said = prompt if text or not loaded.is_chat else chat(prompt)
    found = top_features(whole, loaded, loaded.encode(said), limit)
    labels = _labels(whole)
    rows = [{**asdict(one), "label": _text(labels, one.index)} for one in found]
    _show(rows, as_json, "index activation position token label")


@app.command()
def contexts(
    sae: Where,
    index: Annotated[int, typer.Argument(help="Of the feature.")],
    texts: Annotated[list[Path], typer.Option(help="Text, JSON or CSV; may be repeated.")],
    limit: Limit = 10,
    length: Length = 256,
    model: Model = "starter",
    as_json: Json = False,
    dtype: Dtype = None,
    device: Device = None,
) -> None:
    """Show where in texts a feature fires most."""
    from dataclasses import asdict

    whole, loaded = _both(sae, model, dtype, device)
    from interp_steer.features.contexts import top_contexts

    encoded = _texts(loaded, texts, length)
    with progress("reading texts", len(encoded)) as report:
        found = top_contexts(whole, loaded, encoded, [index], limit, report=report)[index]
    if as_json:
        print(json.dumps([asdict(one) for one in found], indent=1))
        return
    for one in found:
        shown = " ".join(f"{one.before}[[{one.token}]]{one.after}".split())
        print(f"{one.activation:>9.2f}  {safe(shown)}")
    if not found:
        print(f"feature {index} fires nowhere in {len(encoded)} texts")


@app.command()
def find(
    sae: Where,
    positive: Annotated[Path, typer.Option(help="Texts with the concept.")],
    negative: Annotated[Path, typer.Option(help="Texts without it.")],
    by: Annotated[str, typer.Option(help="auroc or difference.")] = "auroc",
    limit: Limit = 20,
    length: Length = 256,
    model: Model = "starter",
    as_json: Json = False,
    dtype: Dtype = None,
    device: Device = None,
) -> None:
    """Rank features by how well they tell two sets of texts apart; needs no labels."""
    from dataclasses import asdict

    if by not in ("auroc", "difference"):
        raise RequestError(f"features are ordered by auroc or difference, not by {by!r}")
    from interp_steer.prompts.file import PromptFile

    files = {"positive": PromptFile.read(positive), "negative": PromptFile.read(negative)}
    whole, loaded = _both(sae, model, dtype, device)
    from interp_steer.features.contexts import find as search
    from interp_steer.features.contexts import windows

    as_chat = None if loaded.is_chat else False
    up, down = (windows(loaded, f.side(side, as_chat), length) for side, f in files.items())
    with progress("reading texts", len(up) + len(down)) as report:
        found = search(whole, loaded, up, down, limit, by, report)
    labels = _labels(whole)
    rows = [{**asdict(one), "label": _text(labels, one.index)} for one in found]
    _show(rows, as_json, "index auroc difference positive negative share label")


@app.command()
def rank(
    sae: Where,
    features: Annotated[str | None, typer.Option(help="Indices, such as 12,4711.")] = None,
    search: Annotated[str | None, typer.Option(help="Those whose labels answer this.")] = None,
    texts: Annotated[
        list[Path] | None, typer.Option(help="For input scores; may be repeated.")
    ] = None,
    limit: Limit = 20,
    length: Length = 256,
    model: Model = "starter",
    as_json: Json = False,
    dtype: Dtype = None,
    device: Device = None,
) -> None:
    """Rank features by how likely they steer (output score), from one forward pass each."""
    if (features is None) == (search is None):
        raise RequestError("which features? give --features 12,4711 or --search 'a concept'")
    chosen: list[int] = []
    for part in (features or "").split(",") if features is not None else ():
        if not (part.strip().isascii() and part.strip().isdigit()):
            raise RequestError(f"--features {features!r}: expected indices, such as 12,4711")
        chosen.append(int(part))
    whole, loaded = _both(sae, model, dtype, device)
    if search is not None:
        from interp_steer.labels import search as look_up

        if not whole.where.neuronpedia:
            raise RequestError(f"{whole.name} has no Neuronpedia source, so no labels to search")
        hits = look_up(search, [whole.where.neuronpedia], limit=max(limit, SCREENED))
        chosen = list(dict.fromkeys(hit.index for hit in hits))
        if not chosen:
            raise RequestError(f"no label of {whole.name} answers {search!r}")
    from interp_steer.features.contexts import top_contexts
    from interp_steer.features.screen import screen

    known = None
    if texts:
        encoded = _texts(loaded, texts, length)
        with progress("reading texts", len(encoded)) as report:
            known = top_contexts(whole, loaded, encoded, chosen, report=report)
    labels = _labels(whole)
    density = {i: share for i, one in labels.items() if (share := one.density) is not None}
    with progress("screening", len(chosen)) as report:
        scored = screen(whole, loaded, chosen, contexts=known, density=density, report=report)
    scored.sort(key=lambda one: -one.output_score)
    rows = [
        {**one.as_json(), "label": _text(labels, one.index), "promoted": list(one.promoted)}
        for one in scored[:limit]
    ]
    _show(rows, as_json, "index output_score input_score confidence norm density promoted label")


@saes.command()
def check(
    sae: Where,
    texts: Annotated[
        list[Path] | None,
        typer.Option(help="Text, JSON or CSV of your own kind of text; may be repeated."),
    ] = None,
    loss_texts: Annotated[int, typer.Option(min=0, help="Texts for the cross-entropies.")] = 32,
    length: Length = 256,
    model: Model = "starter",
    as_json: Json = False,
    dtype: Dtype = None,
    device: Device = None,
) -> None:
    """Measure how much of your model's activations an SAE gives back, on your own texts."""
    from interp_steer.cli.demo import TEXTS

    paths = texts or [TEXTS / "positive.txt", TEXTS / "negative.txt"]
    for path in paths:
        if not path.is_file():
            raise RequestError(f"no prompt file {path}")
    whole, loaded = _both(sae, model, dtype, device)
    from interp_steer.features.fit import check as measure

    encoded = _texts(loaded, paths, length)
    total = len(encoded) + min(loss_texts, len(encoded))
    with progress("reading texts", total) as report:
        fit = measure(whole, loaded, encoded, loss_texts=loss_texts, report=report)
    if as_json:
        print(json.dumps({"sae": whole.name, "model": loaded.name, **fit.as_json()}, indent=1))
        return
    print(f"{whole} on {loaded.name}: {fit.tokens:,} tokens of {fit.texts:,} texts")
    print(
        f"  explained variance   {fit.explained_variance:.3f} without massive activations "
        f"({fit.massive:.2%} of tokens); {fit.explained_variance_all:.3f} with them"
    )
    print(f"  L0                   {fit.l0:.1f}")
    print(f"  |x^| / |x|           {fit.norm_ratio:.3f} (median); cosine {fit.cosine:.3f}")
    print(f"  silent latents       {fit.silent:.1%}")
    if fit.ce is not None:
        score = "none" if fit.ce_score is None else f"{fit.ce_score:.3f}"
        print(
            f"  cross-entropy        {fit.ce:.3f} nats; spliced {fit.ce_spliced:.3f}, "
            f"zeroed {fit.ce_ablated:.3f}: CE-loss score {score}"
        )
    for warning in fit.warnings:
        print(f"warning: {safe(warning)}")


def _show(rows: list[dict[str, Any]], as_json: bool, columns: str) -> None:
    """A table of some columns, or everything as JSON."""
    if as_json:
        print(json.dumps(rows, indent=1, ensure_ascii=False))
        return
    names = [c for c in columns.split() if any(row.get(c) is not None for row in rows)]
    cells = [[_cell(row[name]) for name in names] for row in rows]
    widths = [max(map(len, column)) for column in zip(names, *cells, strict=False)]
    for line in (names, *cells):
        aligned = [
            cell.ljust(width) if name in ("label", "promoted", "token") else cell.rjust(width)
            for cell, width, name in zip(line, widths, names, strict=True)
        ]
        print("  ".join(aligned).rstrip())


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.3f}" if abs(value) >= 0.1 or value == 0 else f"{value:.2g}"
    if isinstance(value, list):
        return safe(" ".join(repr(v)[1:-1].strip() for v in value[:6]))
    text = "" if value is None else safe(str(value)).strip().replace("\n", "\\n")
    return text if len(text) <= 100 else text[:99] + "…"
