"""`interp-steer direction`: makes directions from contrasting prompts, and shows their files."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from interp_steer.cli import common
from interp_steer.cli.steering import stored
from interp_steer.errors import RequestError, nearest, note
from interp_steer.util.console import progress

if TYPE_CHECKING:
    from interp_steer.prompts.item import Item

app = common.group()

DATA = Path(__file__).parents[2] / "data" / "demo_texts"
DEMO = (DATA / "positive.txt", DATA / "negative.txt")
REFUSING = ("I cannot", "Sorry", "As an AI")  # beginnings of refusals
SHOWN = 12  # candidates in a table
READ = """
d and AUC: how far apart the sides lie on held-out prompts (in standard deviations, * the largest;
0.5 is chance). Each half of the prompts is judged by the other's direction; halves is the cosine
of the two. pairs: cosine of a pair's difference with the mean of the others'; right: the share of
held-out pairs that project the right way. They say how well a layer tells the sides apart. Whether
the direction steers, and where best, `interp-steer sweep` and `tune` answer."""
MEASURES = ("d", "auc", "halves", "pairs", "right")
HARDLY = 0.02  # share of the stream below which a difference of means hardly steers


@app.command()
def make(
    positive: common.Positive,
    negative: common.Negative,
    name: common.Name = "direction",
    method: Annotated[
        str, common.opt("mean-difference, principal-component, logistic-probe or actadd.")
    ] = "mean-difference",
    position: Annotated[
        str,
        common.opt(
            "Where activations are read: mean (over the tokens), last, or answer (where the "
            "two answers of a pair first differ)."
        ),
    ] = "mean",
    layer: Annotated[
        int | None, common.opt("Save this layer only; by default all layers.", min=0)
    ] = None,
    as_chat: Annotated[
        bool | None,
        common.opt(
            "Read everything as a chat, or as plain text. By default a text is plain, and an "
            "entry with an answer, a system prompt or messages is a chat.",
            "--chat/--text",
        ),
    ] = None,
    out: common.Saved = None,
    model: common.Model = "starter",
    as_json: common.Json = False,
    dtype: common.Dtype = None,
    device: common.Device = None,
    date: common.Date = None,
) -> None:
    """Make a direction from contrasting prompts.

    One pass over the prompts gives the direction of every layer. A file that holds both sides of
    each pair, such as CAA's, may be given as --positive and as --negative.
    """
    common.writable("--out", out)
    with progress("starting", every=5):
        from interp_steer.model.loading import glance
        from interp_steer.model.site import Site
        from interp_steer.prompts.file import PromptFile
        from interp_steer.steering.contrast import (
            METHODS,
            POSITIONS,
            Contrast,
            act_add,
            template,
        )  # fmt: skip
        from interp_steer.steering.scale import Scale
        from interp_steer.steering.separation import separation
        from interp_steer.util.files import cache_dir

    for what, given, known in (
        ("method", method, (*METHODS, "actadd")), ("position", position, POSITIONS)
    ):  # fmt: skip
        if given not in known:
            raise RequestError(f"unknown {what} {given!r}{nearest(given, known)}")
    common.check_name(name)
    files = {"positive": PromptFile.read(positive), "negative": PromptFile.read(negative)}
    sides = [file.side(side, as_chat) for side, file in files.items()]
    if method == "actadd" and any(len(side) != 1 for side in sides):
        raise RequestError("actadd takes one positive and one negative prompt")
    if layer is not None and (bounds := glance(model)):
        bounds.check(Site("resid_post", layer), bounds.d_model)
    loaded = common.load(model, dtype, device, date=date)
    if as_chat is None and not loaded.is_chat:
        sides = [file.side(side, False) for side, file in files.items()]
    up, down = sides
    if layer is not None:
        loaded.check(Site("resid_post", layer), loaded.d_model)
    if method == "actadd":
        sets = act_add(loaded, up[0], down[0], name)
    else:
        asked = [prompt for side, file in files.items() for prompt in file.asked(side)]
        contrast = Contrast.measure(loaded, up, down, position, asked=asked)
        sets = [contrast.directions(method, name)]
    parted = [] if method == "actadd" else separation(contrast, method)
    scale = Scale.of(loaded, [loaded.encode(prompt) for prompt in (*up, *down)])
    target = out or cache_dir("directions") / f"{name}.safetensors"
    before = {str(path) for path in target.parent.glob(f"{target.stem}*")}
    rows: list[dict[str, Any]] = []
    for directions in sets:
        suffix = directions.name.removeprefix(name)
        path = target.with_name(f"{target.stem}{suffix}{target.suffix or '.safetensors'}")
        (directions if layer is None else directions[layer]).save(path)
        rows += [
            {
                "name": directions.name, "sha": one.sha, "layer": one.site.layer,
                "norm": one.norm, "dose": one.norm / scale.at(one.site), "file": str(path),
            } | (asdict(parted[one.site.layer]) if parted else {})
            for one in directions
            if layer in (None, one.site.layer)
        ]  # fmt: skip
    if as_json:
        common.print_json(rows)
        return
    best = max(parted, key=lambda one: (one.d or 0, one.auc or 0), default=None)
    marked = best.layer if best and best.auc is not None else None
    common.table(
        ("layer", "norm", "of |x|", "d", "AUC", "halves", "pairs", "right", "", "direction"),
        [
            (
                row["layer"], row["norm"], row["dose"],
                *(_short(row.get(measure)) for measure in MEASURES),
                "*" if row["layer"] == marked else "", f"{row['name']}@{row['sha']}",
            )
            for row in rows
        ],
    )  # fmt: skip
    if marked is not None:
        print(READ)
    print(f"\nread as {template([*up, *down])}")
    written = sorted({row["file"] for row in rows})
    print(f"saved {', '.join(written)}")
    if replaced := [file for file in written if file in before]:
        note(f"{', '.join(replaced)} was there; it holds the new direction now")
    largest = max(row["dose"] for row in rows)
    if position == "mean" and largest < HARDLY:
        note(
            f"the sides hardly differ: by at most {largest:.1%} of the residual stream's length. "
            "Where a pair is one question with two answers, take --position answer"
        )
    at = layer if layer is not None else loaded.n_layers // 2
    called = sets[0].name if out is None else rows[0]["file"]
    steer = f"add({called}, 0.5 dose) at {at} on prompt"
    print(f"try   interp-steer generate --model {model} --prompt '...' --steer '{steer}'")


@app.command()
def select(
    positive: common.Positive,
    negative: common.Negative,
    name: common.Name = "selected",
    word: Annotated[
        list[str] | None,
        common.opt(
            "How an answer with the behaviour begins. May be repeated. Default, for refusals: "
            "'I cannot', 'Sorry', 'As an AI'."
        ),
    ] = None,
    by: Annotated[
        str,
        common.opt("What ranks: add (what adding brings), ablate (what ablating takes), both."),
    ] = "ablate",
    layers: common.Layers = None,
    max_kl: Annotated[
        float, common.opt("Ablating it may move negative prompts by a KL of less than this.")
    ] = 0.1,
    seed: Annotated[int, common.opt("Of the split into three parts.")] = 16,
    out: common.Saved = None,
    model: common.Model = "starter",
    as_json: common.Json = False,
    dtype: common.Dtype = None,
    device: common.Device = None,
    date: common.Date = None,
) -> None:
    """Choose a direction over layers and positions, as for refusal.

    Arditi et al. 2024 (arXiv 2406.11717). Of each file a half makes the candidates, a quarter
    chooses one by what adding and ablating it does, and a quarter shows what the chosen one does.
    """
    common.writable("--out", out)
    with progress("starting", every=5):
        from interp_steer.causal.select import RANKED, select_direction
        from interp_steer.model.loading import glance
        from interp_steer.model.site import Site
        from interp_steer.prompts.file import PromptFile
        from interp_steer.util.files import cache_dir

    if by not in RANKED:
        raise RequestError(f"--by is {by!r}{nearest(by, RANKED)}")
    common.check_name(name)
    numbers = common.indices("layers", layers) if layers else None
    if bounds := glance(model):
        for number in numbers or ():
            bounds.check(Site("resid_post", number), bounds.d_model)
    files = [PromptFile.read(path) for path in (positive, negative)]
    for file in files:
        _parts(file.items(), file.path, seed)  # before the model loads
    loaded = common.load(model, dtype, device, date=date)
    parts = [_parts(file.items(as_chat=loaded.is_chat), file.path, seed) for file in files]
    build, choose, prove = zip(*parts, strict=True)
    with progress("trying candidates", 1.0) as report:
        found = select_direction(
            loaded, build, choose, prove, words=word or REFUSING, by=by, layers=numbers,
            max_kl=max_kl, name=name, report=report,
        )  # fmt: skip
    target = out or cache_dir("directions") / f"{name}.safetensors"
    found.direction.save(target)
    ranked = found.table.sort_values(
        ["chosen", "veto", "rank_by"], ascending=[False, True, False], kind="stable"
    )
    summary = found.summary()
    called = name if out is None else str(target)
    every = f"0-{loaded.n_layers - 1}"
    line = f"ablate({called}) at resid_pre {every} + attn_out {every} + mlp_out {every}"
    if as_json:
        common.print_json(
            {
                "file": str(target), "layer": found.layer, "position": found.position,
                "candidates": json.loads(ranked.to_json(orient="records")),
                "held_out": json.loads(summary.to_json(orient="records")), "steer": line,
            }
        )  # fmt: skip
        return
    heads = ("layer", "position", "added", "ablated", "kl", "veto")
    common.table(heads, ranked[list(heads)].head(SHOWN).itertuples(index=False))
    print(
        f"\n{len(found.table)} candidates; chosen: layer {found.layer}, position {found.position}."
        f" On {len(prove[0])} + {len(prove[1])} held-out prompts it does:"
    )
    common.table(tuple(summary.columns), summary.itertuples(index=False))
    print(f"saved {target}")
    print(f"try   interp-steer generate --model {model} --prompt '...' --steer '{line}'")


@app.command()
def word(
    words: Annotated[list[str], common.arg("One or more words, each one token of the model.")],
    layers: common.Layers = None,
    texts: Annotated[
        list[Path] | None,
        common.opt("File of texts to read. May be repeated. Default: the demo's sentences."),
    ] = None,
    lens: Annotated[
        Path | None,
        common.opt("A published lens file to take the directions from, in place of reading texts."),
    ] = None,
    published: Annotated[
        bool,
        common.opt("Read the word as published lenses do, without centring.", "--published"),
    ] = False,
    out: Annotated[
        Path | None, common.opt("File to save; by default the cache's directions/WORD.safetensors.")
    ] = None,
    model: common.Model = "starter",
    as_json: common.Json = False,
    dtype: common.Dtype = None,
    device: common.Device = None,
) -> None:
    """Make a direction for a word, without an SAE, labels or contrasting prompts.

    The Jacobian lens (Gurnee et al. 2026): the change of the stream that raises the word most
    against other words, here and at later positions, on average over texts.
    """
    common.writable("--out", out)
    if out and len(words) > 1:
        raise RequestError("--out is one file; give one word, or leave it out")
    with progress("starting", every=5):
        from interp_steer.features.contexts import windows
        from interp_steer.prompts.file import read_prompts
        from interp_steer.steering.direction import DirectionSet
        from interp_steer.steering.jacobian import LENGTH, Word, token_of, word_directions
        from interp_steer.steering.lens import JacobianLens
        from interp_steer.util.files import cache_dir

    numbers = common.indices("layers", layers) if layers else None
    if lens and not lens.is_file():
        raise RequestError(f"no lens file {lens}")
    if lens and texts:
        raise RequestError("give --lens or --texts, not both: a lens file was fitted on its own")
    read = [text for file in texts or DEMO for text in read_prompts(file)]
    if not all(isinstance(text, str) for text in read):
        raise RequestError("--texts holds chats; give plain texts")
    loaded = common.load(model, dtype, device)
    for one in words:
        token_of(loaded, one)
    if lens:
        whole = JacobianLens.load(lens, loaded)
        at = whole.layers if numbers is None else numbers
        found = {
            one: Word(
                token_of(loaded, one),
                DirectionSet([whole.word(loaded, one, layer, published) for layer in at]),
            )
            for one in words
        }
    else:
        encoded = windows(loaded, ["\n".join(map(str, read))], LENGTH)
        with progress("reading texts", len(encoded)) as report:
            found = word_directions(
                loaded, words, encoded, layers=numbers, published=published, report=report
            )
    rows: list[dict[str, Any]] = []
    for said in found.values():
        path = out or cache_dir("directions") / f"{said.directions.name}.safetensors"
        said.directions.save(path)
        rows += [
            {
                "word": said.directions.name, "layer": member.site.layer, "norm": member.norm,
                "halves": said.halves[i] if said.halves else None,
                "logit_lens": said.lens[i] if said.lens else None,
                "direction": member.label, "file": str(path),
            }
            for i, member in enumerate(said.directions)
        ]  # fmt: skip
    if as_json:
        common.print_json(rows)
        return
    common.table(
        ("word", "layer", "norm", "halves", "logit lens", "direction"),
        [
            (r["word"], r["layer"], r["norm"], _short(r["halves"]), _short(r["logit_lens"]),
             r["direction"])
            for r in rows
        ],
    )  # fmt: skip
    if not lens:
        print(
            "\nhalves: cosine of the directions of the even and of the odd texts; near 1, more "
            "texts change little.\nlogit lens: cosine with what reads the word from the last layer."
        )
    print(f"saved {', '.join(dict.fromkeys(r['file'] for r in rows))}")
    middle = rows[len(rows) // len(words) // 2]
    called = middle["word"] if out is None else str(out)
    steer = f"add({called}, 0.5 dose) at {middle['layer']} on prompt"
    print(f"try   interp-steer generate --model {model} --prompt '...' --steer '{steer}'")


def _parts(
    items: "list[Item]", path: str, seed: int
) -> "tuple[list[Item], list[Item], list[Item]]":
    """A half, a quarter and a quarter of the prompts."""
    from interp_steer.prompts.parts import split_items

    if len(items) < 8:
        raise RequestError(f"{path} holds {len(items)} prompts; three parts need at least 8")
    build, rest = split_items(items, 0.5, seed)
    choose, prove = split_items(rest, 0.5, seed)
    return build, choose, prove


def _short(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


app.command("list")(stored.list_stored)
app.command("import")(stored.import_file)
app.command()(stored.show)
