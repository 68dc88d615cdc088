"""Judges label search: recall@10 and MRR of keyword, semantic and hybrid, by kind of query.

    python scripts/benchmarks/label_search.py [--also FILE] [--contexts] [--save FILE]

The queries and the labels that they should find are in tests/labels/relevance.json, written for
this: labels in the style of Neuronpedia's, queries in the labels' own words, in other forms of
them, in other words, and misspelt. The labels were written first and the queries after them, by
one author: read the figures as a comparison of the three searches, not as an estimate of how well
they do on all the labels of a model. `--also` mixes in other labels that no query asks for: JSON
lines with `concept` or `description`, such as AxBench's concepts.

`--contexts` gives each label the form of those that ship, `label (promotes: tokens): context`. The
context is another label of the set, drawn at random (seed 0): a search that counts it as much as
the label is misled. `--save` writes every query's scores; `--against FILE` compares with such a
file, query by query, with the paired interval of `interp_steer.stats`.

Semantic and hybrid need the extra `semantic`; without it they are left out.
"""

import argparse
import json
import math
import os
import random
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path

MODES = ("keyword", "semantic", "hybrid")
RELEVANCE = Path(__file__).parents[2] / "tests" / "labels" / "relevance.json"


def main() -> None:
    parser = argparse.ArgumentParser(description="Judges label search.")
    parser.add_argument("--also", type=Path, help="more labels, for the search to be misled by")
    parser.add_argument("--contexts", action="store_true", help="give labels misleading contexts")
    parser.add_argument("--save", type=Path, help="write the scores of every query")
    parser.add_argument("--against", type=Path, help="compare with saved scores")
    args = parser.parse_args()
    judged = json.loads(RELEVANCE.read_text(encoding="utf-8"))
    more = []
    if args.also:
        rows = map(json.loads, args.also.read_text(encoding="utf-8").splitlines())
        more = [row.get("concept") or row["description"] for row in rows]
    with tempfile.TemporaryDirectory() as folder:
        os.environ["INTERP_STEER_CACHE"] = folder
        print(f"{len(judged['labels'])} labels, {len(more)} more, {len(judged['queries'])} queries")
        labels = [*judged["labels"], *more]
        fill(in_context(labels) if args.contexts else labels)
        every = {}
        for mode in MODES:
            try:
                every[mode] = judge(judged["queries"], mode)
                report(mode, every[mode])
            except ValueError as error:
                print(f"{mode}: {error}")
    if args.save:
        args.save.write_text(json.dumps(every), encoding="utf-8")
    if args.against:
        compare(every, json.loads(args.against.read_text(encoding="utf-8")))


def in_context(labels: Sequence[str]) -> list[str]:
    """Labels with another one as their context, each once."""
    others = list(range(len(labels)))
    random.Random(0).shuffle(others)
    return [
        f"{text} (promotes: of, the): {labels[other]}"
        for text, other in zip(labels, others, strict=True)
    ]


def compare(now: dict[str, dict], before: dict[str, dict]) -> None:
    """Prints by how much each search does better than before, paired over queries."""
    import numpy as np

    from interp_steer.stats.intervals import difference

    for mode in now:
        new, old = (
            np.array([pair for pairs in scores[mode].values() for pair in pairs])
            for scores in (now, before)
        )
        for i, name in enumerate(("recall@10", "MRR")):
            gain = difference(new[:, i], old[:, i])
            print(f"{mode:<9} {name:<9} {gain}")


def fill(texts: Sequence[str]) -> None:
    """Makes a store of the labels."""
    from interp_steer.labels import Store
    from interp_steer.labels.label import Source
    from interp_steer.labels.rows import Row

    with Store(write=True) as store:
        source = Source("m", "0-res")
        rows = [Row("m", "0-res", i, f"e{i}", text) for i, text in enumerate(texts)]
        store.commit(source, "a", None, rows)
        store.finish(source, complete=True)


def judge(queries: Sequence[dict], mode: str) -> dict[str, list[tuple[float, float]]]:
    """(recall@10, reciprocal rank) of every query, by kind."""
    from interp_steer.labels import search

    scores: dict[str, list[tuple[float, float]]] = {}
    for query in queries:
        expected = set(query["expected"])
        ranked = [label.index for label in search(query["query"], mode=mode, limit=10)]
        recall = len(expected & set(ranked)) / len(expected)
        place = next((i for i, index in enumerate(ranked, 1) if index in expected), None)
        scores.setdefault(query["kind"], []).append((recall, 1 / place if place else 0.0))
    return scores


def report(mode: str, scores: dict[str, list[tuple[float, float]]]) -> None:
    """Prints a line a kind of query, and one for all, with a 95 % interval over queries."""
    scores = {**scores, "all": [pair for pairs in scores.values() for pair in pairs]}
    for kind, pairs in scores.items():
        recall, mrr = (interval([pair[i] for pair in pairs]) for i in (0, 1))
        print(f"{mode:<9} {kind:<9} n = {len(pairs):<3} recall@10 {recall}  MRR {mrr}")


def interval(values: Sequence[float]) -> str:
    """The mean of values in [0, 1] with a 95 % interval, by Wilson's formula.

    It is exact in form for rates and errs on the wide side for other values in [0, 1], whose
    variance is at most m (1 - m). A percentile bootstrap would give a perfect score no width.
    """
    n, m, z = len(values), statistics.fmean(values), 1.96
    centre = (m + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(m * (1 - m) / n + z * z / (4 * n * n))
    return f"{m:.2f} [{max(0.0, centre - half):.2f}, {min(1.0, centre + half):.2f}]"


if __name__ == "__main__":
    main()
