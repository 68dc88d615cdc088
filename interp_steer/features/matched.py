"""Features like a given one: the control that asks whether any feature would have done the same."""

import math
import tempfile
from pathlib import Path

from interp_steer.errors import RequestError
from interp_steer.features.feature import feature
from interp_steer.labels import import_files
from interp_steer.labels.label import Label, Source
from interp_steer.labels.naming import getting
from interp_steer.labels.registry import STARTER
from interp_steer.labels.store import Store, default_path
from interp_steer.steering.direction import Direction


def matched_features(to: Direction, n: int) -> list[Direction]:
    """The n features of the same SAE that are most alike in density and largest activation.

    Distance is Euclidean in (ln density, ln largest activation), both as the labels say them that
    are stored of the SAE, or that ship with the starter's.

    Raises:
        RequestError: the direction is no feature, or fewer than n others of its SAE are known.
    """
    if n <= 0:
        return []
    if not to.is_feature:
        raise RequestError(f"{to.label} is no feature of an SAE: nothing to match")
    labels = _labels(to)
    known = {i: point for i, label in labels.items() if (point := _point(label))}
    own = int(to.source["index"])
    if own not in known:
        place = to.source.get("neuronpedia", "").rpartition("/")[0]
        get = "its SAE has no labels on Neuronpedia: "
        if place:
            numbers = "" if to.source["release"] == STARTER else " --numbers"
            get = f"run {getting(place + numbers)}, or "
        raise RequestError(
            f"nothing is known of the density and largest activation of {to.label}, so no features "
            f"match it; {get}set controls: {{features: 0}}"
        )
    center = known.pop(own)
    if len(known) < n:
        raise RequestError(
            f"density and largest activation are known of {len(known)} other features of the SAE "
            f"of {to.label}, expected {n}; `interp-steer labels sync` its source, or set "
            f"controls: {{features: {len(known)}}}"
        )
    nearest = sorted(known, key=lambda i: (math.dist(known[i], center), i))[:n]
    return [feature(labels[i], name=f"{to.name}-like{i}") for i in nearest]


def _point(label: Label) -> tuple[float, float] | None:
    if not label.density or not label.max_activation:
        return None
    return math.log(label.density), math.log(label.max_activation)


def _labels(to: Direction) -> dict[int, Label]:
    name = to.source.get("neuronpedia", "").rpartition("/")[0]
    if default_path().is_file() and name:
        with Store() as store:
            source = next((s for s in store.sources() if str(s) == name), None)
            if source:
                return store.best(source)
    if to.source["release"] != STARTER:
        return {}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "labels.db"
        covered = import_files([STARTER], store=path)
        with Store(path) as store:
            return store.best(Source.parse(str(covered[0].source)))
