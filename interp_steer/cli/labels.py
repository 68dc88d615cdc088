"""`interp-steer labels`: labels of SAE features, fetched, stored and searched."""

import sys
from typing import TYPE_CHECKING, Annotated

from interp_steer.cli import common
from interp_steer.util.console import safe

if TYPE_CHECKING:
    from interp_steer.labels.label import Coverage, Label
    from interp_steer.labels.searching import Mode

app = common.group()

_Sources = Annotated[
    list[str] | None,
    common.arg(
        "Releases of SAELens, such as llama_scope_lxr_8x, or sources of Neuronpedia, such as "
        "llama3.1-8b/15-llamascope-res-32k."
    ),
]
_Store = Annotated[
    str | None, common.opt("File of the label store; by default the one in the cache.")
]
_Wait = Annotated[bool, common.opt("Wait while Neuronpedia limits requests, instead of failing.")]


@app.command("sync")
def sync_command(
    sources: _Sources = None,
    layers: common.Layers = None,
    numbers: Annotated[
        bool, common.opt("Fetch each feature's density and largest activation too: large files.")
    ] = False,
    patience: Annotated[
        float, common.opt("Seconds until a server that keeps failing is given up.", min=0.1)
    ] = 30.0,
    wait: _Wait = False,
    store: _Store = None,
    as_json: common.Json = False,
) -> None:
    """Fetch the labels of sources from Neuronpedia.

    Only what is missing is fetched, so the command may be run again at any time.
    """
    from interp_steer.labels import Client, sync

    client = Client(patience=patience, wait=wait)
    covered = sync(*(sources or ()), layers=layers, numbers=numbers, store=store, client=client)
    _print_coverage(covered, as_json)
    _complain(covered)


@app.command("import")
def import_command(
    files: Annotated[
        list[str], common.arg("Exports of Neuronpedia, .jsonl or .jsonl.gz; or 'starter'.")
    ],
    store: _Store = None,
    as_json: common.Json = False,
) -> None:
    """Put labels from files on disk into the store."""
    from interp_steer.labels import import_files

    _print_coverage(import_files(files, store=store), as_json)


@app.command("pack")
def pack_command(
    out: Annotated[str, common.arg("The file to write.")],
    sources: _Sources = None,
    layers: common.Layers = None,
    force: Annotated[
        bool, common.opt("Replace the file even if it is no label store.", "--force")
    ] = False,
    store: _Store = None,
) -> None:
    """Write the store, or some of its sources, into one file.

    The other commands open it with --store.
    """
    from interp_steer.labels import naming, pack

    path = pack(out, naming.chosen(sources or [], layers), store=store, force=force)
    print(f"{path}: {path.stat().st_size / 1e6:.1f} MB")


@app.command("search")
def search_command(
    query: Annotated[
        str,
        common.arg(
            'Words, "a phrase", prefix* or -unwanted. Put -- before a query that begins with -.'
        ),
    ],
    source: Annotated[
        list[str] | None, common.opt("Only this release or source. May be repeated.", "--source")
    ] = None,
    layers: common.Layers = None,
    limit: Annotated[int, common.opt("At most so many features.", min=1)] = 20,
    semantic: Annotated[
        bool, common.opt("Search by meaning (needs the extra `semantic`).")
    ] = False,
    hybrid: Annotated[bool, common.opt("Search by words and by meaning.")] = False,
    remote: Annotated[
        bool, common.opt("Ask Neuronpedia, which sends the query to OpenAI.")
    ] = False,
    model: Annotated[
        str | None, common.opt("With --remote: only this model of Neuronpedia.")
    ] = None,
    wait: _Wait = False,
    store: _Store = None,
    as_json: common.Json = False,
) -> None:
    """Find features by their labels, offline unless --remote is given."""
    from interp_steer.errors import RequestError
    from interp_steer.labels import Client, naming, search

    if semantic + hybrid + remote > 1:
        raise RequestError("choose one of --semantic, --hybrid and --remote")
    if remote:
        chosen = naming.chosen(source or [], layers)
        labels = Client(wait=wait).search(query, sources=chosen, model=model, limit=limit)
    else:
        if model or wait:
            raise RequestError("--model and --wait go with --remote; offline, use --source")
        mode: Mode = "semantic" if semantic else "hybrid" if hybrid else "keyword"
        labels = search(
            query, source or (), layers=layers, limit=limit, mode=mode, store=store, note=_note
        )  # fmt: skip
    if as_json:
        common.print_json([label.as_json() for label in labels])
    elif labels:
        _print_labels(labels)
    else:
        _note("no label matches")


@app.command("show")
def show_command(
    feature: Annotated[
        str, common.arg("MODEL/SOURCE/INDEX, or the feature's address at Neuronpedia.")
    ],
    fresh: Annotated[bool, common.opt("Ask Neuronpedia, and store the answer.", "--fetch")] = False,
    store: _Store = None,
    as_json: common.Json = False,
) -> None:
    """Show everything that is known of one feature."""
    from interp_steer.errors import RunError
    from interp_steer.labels import fetch, naming, show
    from interp_steer.labels.client import Client
    from interp_steer.labels.label import State

    record = fetch(feature, store=store)[0] if fresh else show(feature, store=store)
    if record.state is State.UNKNOWN:
        raise RunError(
            f"{record.id} was never fetched; run {naming.getting(str(record.source))}, "
            "or add --fetch for this feature alone"
        )
    address = f"{Client(offline=True).url}/{record.id}"
    facts = {
        "id": record.id, "state": str(record.state), "address": address,
        "layer": record.source.layer, "index": record.index,
        "release": record.source.release, "sae_id": record.source.sae_id,
        "density": record.density, "max_activation": record.max_activation,
    }  # fmt: skip
    labels = [
        {"label": each.label, "explainer": each.explainer, "type": each.type,
         "score": each.label_score, "id": each.uid}
        for each in record.labels
    ]  # fmt: skip
    files = [{"file": key, "etag": etag, "fetched": date} for key, etag, date in record.origins]
    if as_json:
        common.print_json({**facts, "labels": labels, "files": files})
        return
    for name, value in facts.items():
        if value is not None:
            _line(f"{name:<15}{value}")
    for each in labels:
        how = ", ".join(str(part) for part in (each["explainer"], each["type"]) if part is not None)
        score = f", score {each['score']:g}" if each["score"] is not None else ""
        _line(f"{'label':<15}{each['label']} ({how or 'unknown explainer'}{score})")
    for file in files:
        etag = f", ETag {file['etag']}" if file["etag"] else ""
        _line(f"{'from':<15}{file['file']}{etag}, {file['fetched']}")


@app.command("coverage")
def coverage_command(
    sources: _Sources = None,
    layers: common.Layers = None,
    store: _Store = None,
    as_json: common.Json = False,
) -> None:
    """Show what the store holds of each source."""
    from interp_steer.labels import coverage

    _print_coverage(coverage(sources or (), layers=layers, store=store), as_json)


def _complain(covered: "list[Coverage]") -> None:
    """Fails if something could not be fetched, after saying each thing once."""
    lost = [(str(each.source), why) for each in covered for why in each.missing]
    if not lost:
        return
    for source, why in lost[:20]:
        _note(f"missing: {source} {why}")
    if len(lost) > 20:
        _note(f"... and {len(lost) - 20} more")
    from interp_steer.errors import RunError

    raise RunError(f"missing files: {len(lost)}; what arrived is kept: run it again to go on")


def _print_coverage(covered: "list[Coverage]", as_json: bool) -> None:
    if as_json:
        rows = [
            {
                "source": str(each.source), "layer": each.source.layer,
                "release": each.source.release, "sae_id": each.source.sae_id,
                "complete": each.complete_at, "batches": each.batches, "labels": each.labels,
                "labelled": each.labelled, "unlabelled": each.unlabelled,
                "explainers": each.explainers, "missing": each.missing,
            }
            for each in covered
        ]  # fmt: skip
        common.print_json(rows)
        return
    common.table(
        ("source", "files", "labels", "labelled", "unlabelled", "explainers", "state"),
        [
            (
                str(each.source), f"{each.batches:,}", f"{each.labels:,}", f"{each.labelled:,}",
                f"{each.unlabelled:,}", ", ".join(each.explainers), _state(each),
            )
            for each in covered
        ],
    )  # fmt: skip


def _state(each: "Coverage") -> str:
    if each.missing:
        return f"{len(each.missing)} missing"
    if each.complete_at:
        return f"whole, {each.complete_at[:10]}"
    return "in part" if each.batches else "not synced"


def _print_labels(labels: "list[Label]") -> None:
    several = len({(label.model, label.source.partition("-")[2]) for label in labels}) > 1
    names = ("layer", "index", "label", "explainer", "density", "score", "source")
    rows = [
        (
            label.layer, label.index, label.label, label.explainer,
            "" if label.density is None else f"{label.density:.3%}",
            "" if label.score is None else f"{label.score:.3f}",
            f"{label.model}/{label.source}",
        )[: None if several else -1]
        for label in labels
    ]  # fmt: skip
    common.table(names[: None if several else -1], rows)
    if not several:
        print(f"source: {labels[0].model}/*-{labels[0].source.partition('-')[2]}", file=sys.stderr)


def _line(text: str) -> None:
    print(safe(text))


def _note(text: str) -> None:
    print(safe(text), file=sys.stderr)
