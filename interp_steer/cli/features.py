"""`interp-steer features` and `interp-steer sae`: sparse autoencoders and their features."""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from interp_steer.cli import common
from interp_steer.errors import RequestError, RunError
from interp_steer.util.console import progress, safe

if TYPE_CHECKING:
    from interp_steer.features.sae import Sae
    from interp_steer.labels.label import Label
    from interp_steer.model.model import SteeringModel
    from interp_steer.prompts.prompt import Prompt

app, saes = common.group(), common.group()

DEMO = Path(__file__).parents[1] / "data" / "demo_texts"
COLUMNS = {
    "match": "how well the label answers the words (BM25)",
    "output_score": "how surely it promotes its own tokens when raised; from 0.01 on it may steer",
    "input_score": "share of the places where it fires most whose token it also promotes",
    "confidence": "how much surer, or less sure, of the next token the model becomes when raised",
    "norm": "length of the decoder row, in residual units",
    "density": "share of tokens on which it fires",
    "promoted": "tokens that the decoder row raises most",
    "auroc": "chance that a positive text has the larger mean activation than a negative one",
    "difference": "mean activation on positive texts less that on negative ones",
    "share": "of the positive texts in which it fires at all",
    "label": "fires on (promotes: tokens): a place where it fires most, for the SAE that ships",
}
SCREENED = 50  # features that a search finds, before the best of them are shown
Where = Annotated[
    str,
    common.arg(
        "The sparse autoencoder: starter, RELEASE/SAE_ID of SAELens, MODEL/SOURCE of "
        "Neuronpedia, or a folder that SAELens saved.",
        metavar="SAE",
    ),
]
Limit = Annotated[int, common.opt("Show at most so many.", min=1)]
Length = Annotated[int, common.opt("Cut longer texts into pieces of so many tokens.", min=2)]
Texts = Annotated[
    list[Path] | None, common.opt("File of texts: text, JSON or CSV. May be repeated.")
]


def _both(
    where: str, model: str, dtype: str | None, device: str | None
) -> "tuple[Sae, SteeringModel]":
    loaded = common.load(model, dtype, device)
    with progress("loading the SAE", every=5):
        from interp_steer.features.sae import Sae

        sae = Sae.load(where, device=loaded.device)
    sae.check(loaded)
    return sae, loaded


def _read(paths: Sequence[Path] | None) -> "list[Prompt]":
    with progress("starting", every=5):
        from interp_steer.prompts.file import read_prompts

    return [prompt for path in paths or () for prompt in read_prompts(path)]


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


def _show(
    features: Sequence[Any],
    labels: "Mapping[int, Label]",
    as_json: bool,
    columns: str,
    match: "Mapping[int, float | None] | None" = None,
) -> None:
    """Features with their labels: some columns as a table, or everything as JSON.

    On a terminal a line below the table says what each column is.
    """
    rows: list[dict[str, Any]] = []
    for one in features:
        label = labels[one.index].label if one.index in labels else None
        found = {"match": match.get(one.index)} if match else {}
        rows.append({**asdict(one), **found, "label": label})
    if as_json:
        common.print_json(rows)
        return
    names = [name for name in columns.split() if any(row.get(name) is not None for row in rows)]
    common.table(names, [[row[name] for name in names] for row in rows])
    if sys.stdout.isatty():
        print("\n" + "\n".join(f"{n:<12}  {COLUMNS[n]}" for n in names if n in COLUMNS))


@app.command()
def get(
    words: Annotated[
        list[str],
        common.arg(
            "MODEL/SOURCE/INDEX, the feature's address at Neuronpedia, RELEASE SAE_ID INDEX, "
            "or FOLDER INDEX.",
            metavar="FEATURE",
        ),
    ],
    name: Annotated[str | None, common.opt("The direction's name, for --steer.")] = None,
    out: common.Saved = None,
    offline: Annotated[bool, common.opt("Read files on disk only.")] = False,
    as_json: common.Json = False,
) -> None:
    """Save the decoder row of a feature as a direction.

    Nothing but that row is read of the sparse autoencoder.
    """
    common.writable("--out", out, new_folders=True)
    from interp_steer.features.feature import feature
    from interp_steer.util.files import cache_dir

    *names, last = words
    if names and not (last.isascii() and last.isdigit()):
        raise RequestError(f"{last!r} is not the index of a feature: expected a whole number")
    if len(names) > 2:
        raise RequestError(f"expected a feature in one to three words, got {len(words)}")
    place = [*names, int(last)] if names else [last]
    row = feature(*place, name=name, offline=offline)
    path = row.save(out or cache_dir("directions") / f"{row.name}.safetensors")
    facts = {
        "name": row.name, "sha": row.sha, "hook_point": row.hook_point, "norm": row.norm,
        "max_activation": row.max_activation, "source": dict(row.source), "file": str(path),
    }  # fmt: skip
    if as_json:
        common.print_json(facts)
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
    prompt: Annotated[str, common.opt("What the user says to the model.")],
    text: common.Text = False,
    limit: Limit = 20,
    model: common.Model = "starter",
    as_json: common.Json = False,
    dtype: common.Dtype = None,
    device: common.Device = None,
) -> None:
    """Show the features that fire most in a prompt.

    The tokens of the chat template are left out.
    """
    whole, loaded = _both(sae, model, dtype, device)
    from interp_steer.features.contexts import top_features
    from interp_steer.prompts.prompt import chat

    encoded = loaded.encode(prompt if text or not loaded.is_chat else chat(prompt))
    features = top_features(whole, loaded, encoded, limit)
    _show(features, _labels(whole), as_json, "index activation position token label")


@app.command()
def contexts(
    sae: Where,
    index: Annotated[int, common.arg("Index of the feature.")],
    texts: Annotated[list[Path], common.opt("File of texts: text, JSON or CSV. May be repeated.")],
    limit: Limit = 10,
    length: Length = 256,
    model: common.Model = "starter",
    as_json: common.Json = False,
    dtype: common.Dtype = None,
    device: common.Device = None,
) -> None:
    """Show where in texts a feature fires most."""
    prompts = _read(texts)
    whole, loaded = _both(sae, model, dtype, device)
    from interp_steer.features.contexts import top_contexts, windows

    encoded = windows(loaded, prompts, length)
    with progress("reading texts", len(encoded)) as report:
        places = top_contexts(whole, loaded, encoded, [index], limit, report=report)[index]
    if as_json:
        common.print_json([asdict(place) for place in places])
        return
    for place in places:
        shown = " ".join(f"{place.before}[[{place.token}]]{place.after}".split())
        print(f"{place.activation:>9.2f}  {safe(shown)}")
    if not places:
        print(f"feature {index} fires nowhere in {len(encoded)} texts")


@app.command()
def find(
    sae: Where,
    positive: common.Positive,
    negative: common.Negative,
    by: Annotated[
        str, common.opt("What ranks them: auroc, or difference (of mean activations).")
    ] = "auroc",
    limit: Limit = 20,
    length: Length = 256,
    model: common.Model = "starter",
    as_json: common.Json = False,
    dtype: common.Dtype = None,
    device: common.Device = None,
) -> None:
    """Rank features by how well they tell two sets of texts apart.

    No labels are needed.
    """
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
        features = search(whole, loaded, up, down, limit, by, report)
    columns = "index auroc difference positive negative share label"
    _show(features, _labels(whole), as_json, columns)


@app.command()
def rank(
    sae: Where,
    features: Annotated[str | None, common.opt("Indices of the features, such as 12,4711.")] = None,
    search: Annotated[
        str | None, common.opt("Take the features whose labels match these words.")
    ] = None,
    texts: Texts = None,
    limit: Limit = 20,
    length: Length = 256,
    model: common.Model = "starter",
    as_json: common.Json = False,
    dtype: common.Dtype = None,
    device: common.Device = None,
) -> None:
    """Rank features by output score: how likely they are to steer.

    With --search, the label counts as much: features are ordered by their rank by label and their
    rank by output score together. Each feature takes one forward pass. With --texts, the input
    score is measured as well.
    """
    if (features is None) == (search is None):
        raise RequestError("which features? give --features 12,4711 or --search 'a concept'")
    chosen = [] if features is None else common.indices("features", features)
    match: dict[int, float | None] = {}
    prompts = _read(texts)
    whole, loaded = _both(sae, model, dtype, device)
    if search is not None:
        from interp_steer.labels import search as look_up

        if not whole.where.neuronpedia:
            raise RequestError(f"{whole.name} has no Neuronpedia source, so no labels to search")
        hits = look_up(search, [whole.where.neuronpedia], limit=max(limit, SCREENED))
        match = {hit.index: hit.score for hit in hits}
        chosen = list(match)
        if not chosen:
            raise RequestError(f"no label of {whole.name} answers {search!r}")
    from interp_steer.features.contexts import top_contexts, windows
    from interp_steer.features.screen import screen

    places = None
    if texts:
        encoded = windows(loaded, prompts, length)
        with progress("reading texts", len(encoded)) as report:
            places = top_contexts(whole, loaded, encoded, chosen, report=report)
    labels = _labels(whole)
    density = {i: share for i, one in labels.items() if (share := one.density) is not None}
    with progress("screening", len(chosen)) as report:
        scored = screen(whole, loaded, chosen, contexts=places, density=density, report=report)
    best = sorted(scored, key=lambda one: -one.output_score)
    if match:
        from interp_steer.labels.searching import fused

        orders = (list(match), [one.index for one in best])
        together = fused(orders)
        best.sort(key=lambda one: -together[one.index])
    columns = "index match output_score input_score confidence norm density promoted label"
    _show(best[:limit], labels, as_json, columns, match)


@saes.command()
def check(
    sae: Where,
    texts: Texts = None,
    loss_texts: Annotated[
        int, common.opt("Texts on which the model's cross-entropy is measured.", min=0)
    ] = 32,
    length: Length = 256,
    model: common.Model = "starter",
    as_json: common.Json = False,
    dtype: common.Dtype = None,
    device: common.Device = None,
) -> None:
    """Measure how well a sparse autoencoder fits your model.

    That is how much of the model's activations it gives back, and what that costs the model. Give
    your own kind of text with --texts; by default the demo's sentences are read.
    """
    prompts = _read(texts or [DEMO / "positive.txt", DEMO / "negative.txt"])
    whole, loaded = _both(sae, model, dtype, device)
    from interp_steer.features.contexts import windows
    from interp_steer.features.fit import check as measure

    encoded = windows(loaded, prompts, length)
    total = len(encoded) + min(loss_texts, len(encoded))
    with progress("reading texts", total) as report:
        fit = measure(whole, loaded, encoded, loss_texts=loss_texts, report=report)
    if as_json:
        common.print_json({"sae": whole.name, "model": loaded.name, **fit.as_json()})
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
