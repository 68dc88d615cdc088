"""Builds a store of a million labels and measures it: build time, size, and how long queries take.

    python scripts/benchmarks/labels.py [--labels 1000000] [--keep FILE]

The labels are synthetic: a dozen words each, drawn from 20,000 made-up words so that a few are
common and most are rare (Zipf's law), about 78 characters, as exported ones are. They are read
from export files' lines (parsed, cleaned and indexed as a sync does it), 1,024 to a file, 32,768 to
a layer. Queries are words, pairs of words of one label, phrases, prefixes and negations.
"""

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

LAYER, FILE = 32_768, 1_024
QUERIES = 300
FEW = 10_000  # queries with fewer hits than this are the ones with a promise


def main() -> None:
    parser = argparse.ArgumentParser(description="Measures the label store.")
    parser.add_argument("--labels", type=int, default=1_000_000)
    parser.add_argument("--keep", type=Path, help="leave the store here")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        os.environ["INTERP_STEER_CACHE"] = folder
        path = args.keep or Path(folder) / "labels" / "labels.db"
        texts = build(path, args.labels)
        measure(path, texts)
        whole_process(path)


def build(path: Path, count: int) -> list[str]:
    """Writes the labels; prints the time that the store took, without making the texts."""
    from interp_steer.labels import Store
    from interp_steer.labels.label import Source
    from interp_steer.labels.rows import read_lines

    dice = random.Random(1)
    syllables = [a + b for a in "bcdfghklmnprstvz" for b in "aeiou"]
    words = ["".join(dice.choices(syllables, k=dice.randint(2, 4))) for _ in range(20_000)]
    weights = [1 / (rank + 10) for rank in range(len(words))]
    drawn = dice.choices(words, weights, k=12 * min(count, 100_000))
    texts: list[str] = []
    spent = parsing = 0.0
    with Store(path, write=True) as store:
        for start in range(0, count, FILE):
            source = Source("m", f"{start // LAYER}-res-32k", "release", f"l{start // LAYER}")
            lines = []
            for number in range(start, min(start + FILE, count)):
                at = dice.randrange(len(drawn) - 12)
                text = " ".join(drawn[at : at + 12])
                texts.append(text)
                lines.append(
                    json.dumps(
                        {
                            "id": f"clz{number:022d}",
                            "modelId": "m",
                            "layer": source.name,
                            "index": str(number % LAYER),
                            "description": text,
                            "explanationModelName": "gemini-2.0-flash",
                            "typeName": "np_max-act-logits",
                        }
                    )
                )
            data = "\n".join(lines).encode()
            began = time.perf_counter()
            rows = read_lines(data)
            parsing += time.perf_counter() - began
            store.commit(source, f"explanations/batch-{start // FILE}.jsonl.gz", f'"{start}"', rows)
            spent += time.perf_counter() - began
        began = time.perf_counter()
        for layer in range(-(-count // LAYER)):
            store.finish(Source("m", f"{layer}-res-32k"), complete=True)
    spent += time.perf_counter() - began
    mean = statistics.mean(map(len, texts))
    print(f"labels          {count:,} of {mean:.0f} characters")
    print(f"build           {spent:.1f} s ({parsing:.1f} s of it reading lines)")
    print(f"database        {path.stat().st_size / 1e6:.0f} MB")
    return texts


def measure(path: Path, texts: list[str]) -> None:
    """Times queries of every kind, by the number of labels that answer them."""
    from interp_steer.labels import Store, search
    from interp_steer.labels.searching import Query

    dice = random.Random(2)
    times: dict[str, list[float]] = {}
    few: list[float] = []
    many: list[float] = []
    with Store(path) as store:
        for _ in range(QUERIES):
            words = dice.choice(texts).split()
            word, other = dice.sample(words, 2)
            at = dice.randrange(len(words) - 1)
            kinds = {
                "word": word,
                "two words": f"{word} {other}",
                "phrase": f'"{words[at]} {words[at + 1]}"',
                "prefix": word[:4] + "*",
                "negation": f"{word} -{other}",
                "two words, one layer": f"{word} {other}",
            }
            for kind, query in kinds.items():
                where = ["m/15-res-32k"] if "layer" in kind else []
                began = time.perf_counter()
                search(query, where, store=path)
                taken = 1000 * (time.perf_counter() - began)
                times.setdefault(kind, []).append(taken)
                hits = store._db.execute(
                    "SELECT count(*) FROM fts WHERE fts MATCH ?", (Query.parse(query).all(),)
                ).fetchone()[0]
                (few if hits < FEW else many).append(taken)
    for kind, taken in times.items():
        print(f"{kind:<22} {spread(taken)}")
    print(f"fewer than {FEW:,} hits {spread(few)}")
    if many:
        print(f"more                   {spread(many)}")


def spread(taken: list[float]) -> str:
    taken = sorted(taken)
    p99 = taken[min(len(taken) - 1, int(0.99 * len(taken)))]
    return f"median {statistics.median(taken):6.1f} ms, p99 {p99:6.1f} ms, n = {len(taken)}"


def whole_process(path: Path) -> None:
    """Times `interp-steer labels search` from the shell, start to end, on this store."""
    code = "from interp_steer.cli.main import main; main()"
    command = [sys.executable, "-c", code, "labels", "search", "bada", "--store", str(path)]
    taken = []
    for _ in range(10):
        began = time.perf_counter()
        subprocess.run(command, check=True, capture_output=True)
        taken.append(1000 * (time.perf_counter() - began))
    print(f"whole process          {spread(taken)}")


if __name__ == "__main__":
    main()
