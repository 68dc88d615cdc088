"""Asks the live Neuronpedia what the label client relies on: a dozen requests, one at a time.

    python scripts/benchmarks/smoke_neuronpedia.py [--source llama3.1-8b/15-llamascope-res-32k]
        [--index 10] [--model meta-llama/Llama-3.1-8B]

For whoever has network: nothing else in this project talks to the live site, and its tests run
against a server on loopback that was made after the published source. Prints a line a check and
exits 1 if one fails; a failure means that the site has changed or that we misread it, so please
report the line. Of the 200 searches an hour it uses two, and of the export one file.

With --model, which needs 17 GB of memory or more, it also computes the feature's activations on the
text that fires it most, by SAELens before and after `fold_W_dec_norm`, and says which of the two
are Neuronpedia's: whether a label's maximum has the length of the decoder row in it already, as
`interp_steer.features.decoder.folds` takes it to have.
"""

import argparse
import copy
import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from interp_steer.errors import SteerError
from interp_steer.labels import Client
from interp_steer.labels.http import NotFound
from interp_steer.labels.label import Source, State

if TYPE_CHECKING:
    from torch import Tensor

ALIKE = 0.1  # relative error that two precisions of one model may have


def which_fits(sae: Any, x: "Tensor", index: int, shown: "Tensor") -> tuple[str, float, float]:
    """What a dashboard's activations of a feature are: "contribution" (the row's length is folded
    in), "activation" (it is not), "either" (it is 1) or "neither".

    Args:
        sae: SAELens's object, as it loads it.
        x: the activations that it encodes, [pos, d_model], without the first position.
        shown: the dashboard's values at those positions, [pos].

    Returns:
        The word, and the relative errors |ours - shown| / |shown| after and before folding.
    """
    folded = copy.deepcopy(sae)
    folded.fold_W_dec_norm()
    after, before = (
        ((one.encode(x)[..., index] - shown).norm() / shown.norm()).item() for one in (folded, sae)
    )
    fits = after <= ALIKE, before <= ALIKE
    words = {(True, True): "either", (True, False): "contribution", (False, True): "activation"}
    return words.get(fits, "neither"), after, before


def folding(client: Client, source: Source, index: int, name: str) -> str:
    """Compares one text of the live site with SAELens on the model; raises AssertionError if the
    numbers are not those that the toolkit takes them for.
    """
    import torch

    from interp_steer import SteeringModel
    from interp_steer.features.decoder import folds
    from interp_steer.features.feature import locate
    from interp_steer.features.sae import Sae

    data = client._ask("GET", f"/api/feature/{source}/{index}").json()
    assert data.get("activations"), "the feature comes without activations"
    best = max(data["activations"], key=lambda one: one["maxValue"])
    sae, model = Sae.load(str(source)), SteeringModel.load(name, dtype="bfloat16")
    encoded = model.encode("".join(best["tokens"][1:]))
    told = [model.decode_token(i) for i in encoded.ids]
    assert told[1:] == best["tokens"][1:], f"the text has other tokens here: {told[:8]}"
    x, _ = model.read(sae.site, [encoded])
    shown = torch.tensor(best["values"])[1:]
    word, after, before = which_fits(sae.inner, x[0, 1:].float().cpu(), index, shown)
    row = locate(str(source)).row(index)
    taken = "contribution" if folds(row.architecture, row.rescaled) else "activation"
    said = (
        f"{word}: row of length {row.vector.norm():.3f}, relative error after folding {after:.3f}, "
        f"before {before:.3f}"
    )
    assert word in (taken, "either"), f"{said}; the toolkit takes it for {taken}"
    return said


def main() -> None:
    parser = argparse.ArgumentParser(description="Checks the live Neuronpedia, gently.")
    parser.add_argument("--source", default="llama3.1-8b/15-llamascope-res-32k")
    parser.add_argument("--index", type=int, default=10)
    parser.add_argument("--model", help="compute the feature's activations on this model too")
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
        size = sum(file.size or 0 for file in files) / 1e6
        return f"{len(files)} files, {size:.0f} MB, {tagged} with ETag"

    def fetched() -> str:
        file = client.exports(source)[0]
        batch = client.download(file)
        assert batch is not None and batch.etag == file.etag, (batch and batch.etag, file.etag)
        assert client.download(file, batch.etag) is None, "no 304 for an unchanged file"
        kinds = {(row.explainer, row.type) for row in batch.rows}
        made = ", ".join(sorted(f"{explainer} {kind}" for explainer, kind in kinds))
        return f"{file.key}: {len(batch.rows)} labels in {batch.size} bytes, by {made}"

    def folded() -> str:
        return folding(client, source, args.index, args.model)

    failed = 0
    checks: list[Callable[[], str]] = [one, many, absent, searched, listed, fetched]
    checks += [folded] if args.model else []
    for check in checks:
        try:
            print(f"ok    {check.__name__:<9} {check()}")
        except (SteerError, AssertionError, NotImplementedError) as error:
            failed += 1
            print(f"FAIL  {check.__name__:<9} {error}")
        time.sleep(1)
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
