"""Asks the live Neuronpedia what the label client relies on: a dozen requests, one at a time.

    python scripts/smoke_neuronpedia.py [--source llama3.1-8b/15-llamascope-res-32k] [--index 10]

For whoever has network: nothing else in this project talks to the live site, and its tests run
against a server on loopback that was made after the published source. Prints a line a check and
exits 1 if one fails; a failure means that the site has changed or that we misread it, so please
report the line. Of the 200 searches an hour it uses two, and of the export one file.
"""

import argparse
import sys
import time
from collections.abc import Callable

from interp_steer.errors import SteerError
from interp_steer.labels import Client
from interp_steer.labels.http import NotFound
from interp_steer.labels.label import Source, State


def main() -> None:
    parser = argparse.ArgumentParser(description="Checks the live Neuronpedia, gently.")
    parser.add_argument("--source", default="llama3.1-8b/15-llamascope-res-32k")
    parser.add_argument("--index", type=int, default=10)
    args = parser.parse_args()
    client, source = Client(), Source.parse(args.source)
    print(f"{client.url} and {client.exports_url}, {source}")

    def one() -> str:
        found = client.feature(source, args.index)
        said = found.labels[0].label if found.labels else "no label"
        return f"{found.state}: {said[:60]!r}, density {found.density}"

    def many() -> str:
        asked = [(source, args.index + i) for i in range(20)] + [(source, 10**9)]
        found = client.features(asked)
        assert (source, 10**9) not in found, "a feature that cannot exist came back"
        labelled = sum(feature.state is State.LABELLED for feature in found.values())
        return f"{len(found)} of 20 features, {labelled} with a label"

    def absent() -> str:
        try:
            client.feature(Source(source.model, "0-no-such-set"), 0)
        except NotFound as error:
            assert "no source" in str(error), error
            return "an unknown source is told from an unknown feature"
        raise AssertionError("an unknown source was found")

    def searched() -> str:
        found = client.search("golden gate bridge", sources=[source], limit=20)
        scores = [label.score or 0.0 for label in found]
        assert found and scores == sorted(scores, reverse=True), scores
        return f"{len(found)} labels, best {found[0].label[:60]!r} at {scores[0]:.2f}"

    def listed() -> str:
        files = client.exports(source)
        assert files, "the bucket lists no file"
        tagged = sum(file.etag is not None for file in files)
        return f"{len(files)} files, {sum(f.size for f in files) / 1e6:.0f} MB, {tagged} with ETag"

    def fetched() -> str:
        file = client.exports(source)[0]
        batch = client.download(file)
        assert batch is not None and batch.etag == file.etag, (batch and batch.etag, file.etag)
        assert client.download(file, batch.etag) is None, "no 304 for an unchanged file"
        kinds = {(row.explainer, row.type) for row in batch.rows}
        made = ", ".join(sorted(f"{explainer} {kind}" for explainer, kind in kinds))
        return f"{file.key}: {len(batch.rows)} labels in {batch.size} bytes, by {made}"

    failed = 0
    checks: list[Callable[[], str]] = [one, many, absent, searched, listed, fetched]
    for check in checks:
        try:
            print(f"ok    {check.__name__:<9} {check()}")
        except (SteerError, AssertionError) as error:
            failed += 1
            print(f"FAIL  {check.__name__:<9} {error}")
        time.sleep(1)
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
