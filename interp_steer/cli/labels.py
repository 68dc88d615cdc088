"""`interp-steer labels`: assembles sync, store and search, and prints. Imports wait in commands."""

import json
import sys
from typing import TYPE_CHECKING, Annotated, Literal

import typer

if TYPE_CHECKING:
    from interp_steer.labels.label import Coverage, Label
    from interp_steer.labels.searching import Mode

app = typer.Typer(
    help="Feature labels: sync them from Neuronpedia, search them offline.",
    no_args_is_help=True,
    rich_markup_mode=None,
)

_Sources = Annotated[
    list[str] | None,
    typer.Argument(
        help="SAELens releases (llama_scope_lxr_8x) or Neuronpedia sources "
        "(llama3.1-8b/15-llamascope-res-32k)."
    ),
]
_Layers = Annotated[str | None, typer.Option(help="Only these layers, like 3,7,12-20.")]
_Store = Annotated[str | None, typer.Option(help="Another store than the one in the cache.")]
_Json = Annotated[bool, typer.Option("--json", help="Print JSON for programs.")]


@app.command("sync")
def sync_command(
    sources: _Sources = None,
    layers: _Layers = None,
    numbers: Annotated[
        bool, typer.Option(help="Also each feature's density and maximum (much larger files).")
    ] = False,
    patience: Annotated[
        float, typer.Option(min=0.1, help="Seconds until a server that keeps failing is given up.")
    ] = 30.0,
    wait: Annotated[bool, typer.Option(help="Sit out a rate limit instead of failing.")] = False,
    store: _Store = None,
    as_json: _Json = False,
) -> None:
    """Download the labels of sources. Run again at any time: it fetches only what is missing."""
    from interp_steer.labels import Client, sync

    client = Client(patience=patience, wait=wait)
    found = sync(*(sources or ()), layers=layers, numbers=numbers, store=store, client=client)
    _print_coverage(found, as_json)
    _complain(found)


@app.command("import")
def import_command(
    files: Annotated[
        list[str], typer.Argument(help="Export files, .jsonl or .jsonl.gz; or 'starter'.")
    ],
    store: _Store = None,
    as_json: _Json = False,
) -> None:
    """Bring files of labels that are on disk into the store."""
    from interp_steer.labels import import_files

    _print_coverage(import_files(files, store=store), as_json)


@app.command("pack")
def pack_command(
    out: Annotated[str, typer.Argument(help="The file to write.")],
    sources: _Sources = None,
    layers: _Layers = None,
    force: Annotated[
        bool, typer.Option("--force", help="Write over a file that is no label store.")
    ] = False,
    store: _Store = None,
) -> None:
    """Write the store, or some of its sources, as one file; open it elsewhere with --store."""
    from interp_steer.labels import naming, pack

    path = pack(out, naming.chosen(sources or [], layers), store=store, force=force)
    print(f"{path}: {path.stat().st_size / 1e6:.1f} MB")


@app.command("search")
def search_command(
    query: Annotated[
        str, typer.Argument(help='Words, "a phrase", prefix*; put -- before a query with -not.')
    ],
    source: Annotated[
        list[str] | None, typer.Option("--source", help="Only this release or source; repeatable.")
    ] = None,
    layers: _Layers = None,
    limit: Annotated[int, typer.Option(min=1, help="How many features.")] = 20,
    semantic: Annotated[bool, typer.Option(help="By meaning (extra: semantic).")] = False,
    hybrid: Annotated[bool, typer.Option(help="By words and by meaning.")] = False,
    remote: Annotated[
        bool, typer.Option(help="Ask Neuronpedia, which passes the query on to OpenAI.")
    ] = False,
    model: Annotated[
        str | None, typer.Option(help="With --remote: only this Neuronpedia model.")
    ] = None,
    wait: Annotated[bool, typer.Option(help="With --remote: sit out a rate limit.")] = False,
    store: _Store = None,
    as_json: _Json = False,
) -> None:
    """Find features by their labels, offline."""
    from interp_steer.errors import RequestError
    from interp_steer.labels import Client, naming, search

    if semantic + hybrid + remote > 1:
        raise RequestError("choose one of --semantic, --hybrid and --remote")
    if remote:
        chosen = naming.chosen(source or [], layers)
        found = Client(wait=wait).search(query, sources=chosen, model=model, limit=limit)
    else:
        if model or wait:
            raise RequestError("--model and --wait go with --remote; offline, use --source")
        mode: Mode = "semantic" if semantic else "hybrid" if hybrid else "keyword"
        found = search(
            query, source or (), layers=layers, limit=limit, mode=mode, store=store, note=_note
        )  # fmt: skip
    if as_json:
        print(json.dumps([label.as_json() for label in found]))
    elif found:
        _print_labels(found)
    else:
        _note("no label matches")


@app.command("show")
def show_command(
    feature: Annotated[str, typer.Argument(help="model/source/index, or its address.")],
    fresh: Annotated[bool, typer.Option("--fetch", help="Ask Neuronpedia, and store it.")] = False,
    store: _Store = None,
    as_json: _Json = False,
) -> None:
    """Print everything known of one feature."""
    from interp_steer.errors import RunError
    from interp_steer.labels import fetch, naming, show
    from interp_steer.labels.client import Client
    from interp_steer.labels.label import State

    found = fetch(feature, store=store)[0] if fresh else show(feature, store=store)
    if found.state is State.UNKNOWN:
        raise RunError(
            f"{found.id} was never fetched; run {naming.getting(str(found.source))}, "
            "or add --fetch for this feature alone"
        )
    address = f"{Client(offline=True).url}/{found.id}"
    facts = {
        "id": found.id, "state": str(found.state), "address": address,
        "layer": found.source.layer, "index": found.index,
        "release": found.source.release, "sae_id": found.source.sae_id,
        "density": found.density, "max_activation": found.max_activation,
    }  # fmt: skip
    said = [
        {"label": each.label, "explainer": each.explainer, "type": each.type,
         "score": each.label_score, "id": each.uid}
        for each in found.labels
    ]  # fmt: skip
    files = [{"file": key, "etag": etag, "fetched": date} for key, etag, date in found.origins]
    if as_json:
        print(json.dumps({**facts, "labels": said, "files": files}))
        return
    for name, value in facts.items():
        if value is not None:
            _line(f"{name:<15}{value}")
    for each in said:
        how = ", ".join(str(part) for part in (each["explainer"], each["type"]) if part is not None)
        score = f", score {each['score']:g}" if each["score"] is not None else ""
        _line(f"{'label':<15}{each['label']} ({how or 'unknown explainer'}{score})")
    for file in files:
        etag = f", ETag {file['etag']}" if file["etag"] else ""
        _line(f"{'from':<15}{file['file']}{etag}, {file['fetched']}")


@app.command("coverage")
def coverage_command(
    sources: _Sources = None,
    layers: _Layers = None,
    store: _Store = None,
    as_json: _Json = False,
) -> None:
    """Print what the store holds of each source."""
    from interp_steer.labels import coverage

    _print_coverage(coverage(sources or (), layers=layers, store=store), as_json)


def _complain(found: "list[Coverage]") -> None:
    """Fails if something could not be fetched, after saying each thing once."""
    lost = [(str(each.source), why) for each in found for why in each.missing]
    if not lost:
        return
    for source, why in lost[:20]:
        _note(f"missing: {source} {why}")
    if len(lost) > 20:
        _note(f"... and {len(lost) - 20} more")
    from interp_steer.errors import RunError

    raise RunError(f"missing files: {len(lost)}; what arrived is kept: run it again to go on")


def _print_coverage(found: "list[Coverage]", as_json: bool) -> None:
    if as_json:
        rows = [
            {
                "source": str(each.source), "layer": each.source.layer,
                "release": each.source.release, "sae_id": each.source.sae_id,
                "complete": each.complete_at, "batches": each.batches, "labels": each.labels,
                "labelled": each.labelled, "unlabelled": each.unlabelled,
                "explainers": each.explainers, "missing": each.missing,
            }
            for each in found
        ]  # fmt: skip
        print(json.dumps(rows))
        return
    _table(
        ("source", "files", "labels", "labelled", "unlabelled", "explainers", "state"),
        [
            (
                str(each.source), f"{each.batches:,}", f"{each.labels:,}", f"{each.labelled:,}",
                f"{each.unlabelled:,}", ", ".join(each.explainers), _state(each),
            )
            for each in found
        ],
        right=(1, 2, 3, 4),
    )  # fmt: skip


def _state(each: "Coverage") -> str:
    if each.missing:
        return f"{len(each.missing)} missing"
    if each.complete_at:
        return f"whole, {each.complete_at[:10]}"
    return "in part" if each.batches else "not synced"


def _print_labels(found: "list[Label]") -> None:
    several = len({(label.model, label.source.partition("-")[2]) for label in found}) > 1
    names = ("layer", "index", "label", "explainer", "density", "score")
    rows = [
        (
            "" if label.layer is None else str(label.layer), str(label.index),
            label.label if len(label.label) <= 300 else label.label[:299] + "…",
            label.explainer or "",
            "" if label.density is None else f"{label.density:.3%}",
            "" if label.score is None else f"{label.score:.3f}",
            f"{label.model}/{label.source}",
        )[: 7 if several else 6]
        for label in found
    ]  # fmt: skip
    _table((*names, "source") if several else names, rows, right=(0, 1, 4, 5))
    if not several:
        print(f"source: {found[0].model}/*-{found[0].source.partition('-')[2]}", file=sys.stderr)


def _table(
    names: tuple[str, ...], rows: list[tuple[str, ...]], right: tuple[int, ...] = ()
) -> None:
    """A table on a terminal with room for one; else a line a row, with tabs between if piped."""
    from interp_steer.util.console import safe

    clean = [tuple(safe(cell).replace("\t", " ").replace("\n", " ") for cell in r) for r in rows]
    if not sys.stdout.isatty():
        for row in (names, *clean):
            print("\t".join(row))
        return
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console()
    widths = [max(len(row[i]) for row in (names, *clean)) for i in range(len(names))]
    wide = {i for i, name in enumerate(names) if name in ("label", "explainers")}
    if console.width < sum(2 + w for i, w in enumerate(widths) if i not in wide) + 24 * len(wide):
        for row in clean:
            print("  ".join(cell for cell in row if cell))
        return
    table = Table(box=None, pad_edge=False, header_style="bold")
    filled = [i for i in range(len(names)) if any(row[i] for row in clean)]
    for i in filled:
        side: Literal["left", "right"] = "right" if i in right else "left"
        table.add_column(names[i], justify=side, no_wrap=i not in wide, overflow="fold")
    for row in clean:
        table.add_row(*(Text(row[i]) for i in filled))  # Text: a label is not markup
    console.print(table)


def _line(text: str) -> None:
    from interp_steer.util.console import safe

    print(safe(text))


def _note(text: str) -> None:
    from interp_steer.util.console import safe

    print(safe(text), file=sys.stderr)
