"""The names that people give sources of Neuronpedia: a SAELens release, one of its SAEs, or
model/source.
"""

from functools import cache

from interp_steer.errors import RequestError, nearest
from interp_steer.labels import registry
from interp_steer.labels.label import Source


def of_release(release: str) -> list[Source]:
    """The Neuronpedia sources of a release, by layer.

    Raises:
        RequestError: the release has no source on Neuronpedia.
    """
    saes = registry.sources()[release]
    found = [_known(text, release, sae_id) for sae_id, text in saes.items()]
    if not found:
        raise RequestError(
            f"release {release!r} has no labels: SAELens names no Neuronpedia source"
        )
    return sorted(found, key=lambda source: (source.layer or 0, source.name))


def resolve(text: str) -> list[Source]:
    """The sources that a word names: a release, `release/sae_id`, or `model/source`.

    A `model/source` that the registry does not know is taken as it is: the server knows more.

    Raises:
        RequestError: it is none of these; the message gives the nearest names.
    """
    known = registry.sources()
    if text in known:
        return of_release(text)
    release, _, rest = text.partition("/")
    if release in known:
        if rest in known[release]:
            return [_known(known[release][rest], release, rest)]
        raise RequestError(
            f"release {release!r} has no SAE {rest!r} with labels{nearest(rest, known[release])}"
        )
    if "/" not in text:
        raise RequestError(
            f"{text!r} is neither a SAELens release nor model/source{nearest(text, known)}"
        )
    source = Source.parse(text)
    return [next((s for s in _all() if str(s) == text), source)]


def getting(what: str) -> str:
    """The command that brings labels of a release or source; the starter's ship."""
    starters = {registry.STARTER, *map(str, of_release(registry.STARTER))}
    brings = f"import {registry.STARTER}" if what in starters else f"sync {what}"
    return f"`interp-steer labels {brings}`"


def like(source: Source) -> str:
    """The registry's sources most like one that is unknown, as the end of an error message."""
    return nearest(source, (str(each) for each in _all()))


@cache
def _all() -> list[Source]:
    return [
        _known(text, release, sae_id)
        for release, saes in registry.sources().items()
        for sae_id, text in saes.items()
    ]


def _known(text: str, release: str, sae_id: str) -> Source:
    model, _, name = text.partition("/")
    return Source(model, name, release, sae_id)


def parse_layers(text: str | None) -> set[int] | None:
    """Reads `12-20`, `3,7,12-20` or `15`; None means all.

    Raises:
        RequestError: it is not a list of layers.
    """
    if text is None:
        return None
    chosen: set[int] = set()
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        ends = (first, last if dash else first)
        if not all(end.isascii() and end.isdigit() and len(end) < 5 for end in ends):
            raise RequestError(f"layers {text!r}: expected numbers and ranges, like 3,7,12-20")
        if int(ends[0]) > int(ends[1]):
            raise RequestError(f"layers {text!r}: {part.strip()} runs backwards")
        chosen.update(range(int(ends[0]), int(ends[1]) + 1))
    return chosen


def chosen(names: tuple[str, ...] | list[str], layers: str | None = None) -> list[Source]:
    """The sources that the names and layers of a request stand for, each once.

    Raises:
        RequestError: a name is unknown, or a layer is in none of the sources.
    """
    sources = {str(source): source for name in names for source in resolve(name)}
    wanted = parse_layers(layers)
    if wanted is None:
        return list(sources.values())
    there = {source.layer for source in sources.values()}
    if lost := sorted(wanted - {layer for layer in there if layer is not None}):
        have = ", ".join(map(str, sorted(layer for layer in there if layer is not None)))
        raise RequestError(f"no layer {', '.join(map(str, lost))} there; layers: {have}")
    return [source for source in sources.values() if source.layer in wanted]
