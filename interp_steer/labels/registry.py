"""What SAELens's registry says of every pretrained SAE, without importing SAELens.

`import sae_lens` takes ten seconds; the registry is one YAML file inside the package. That takes
most of a second to parse, so what is needed of it is kept as JSON in the cache, by version. One
entry more is the starter's SAE, which comes with this package.
"""

import json
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from importlib import metadata, util
from pathlib import Path
from typing import Any

from interp_steer.errors import RequestError, RunError, nearest
from interp_steer.util.files import cache_dir, whole

STARTER = "starter"
STARTER_DATA = Path(__file__).parents[1] / "data" / "starter_sae"
"""Where the starter's SAE lies, as SAELens saves one: cfg.json and sae_weights.safetensors."""
STARTER_LABELS = tuple(
    STARTER_DATA / kind / "batch-0.jsonl.gz" for kind in ("explanations", "features")
)
"""Its labels, as Neuronpedia exports them."""


@dataclass(frozen=True)
class Entry:
    """One pretrained SAE.

    Attributes:
        release, sae_id: SAELens's names for it.
        repo, path: the hub's repository, and the folder or file in it; empty for the starter's.
        loader: the layout of its files, in SAELens's words.
        model: the model that it was trained on.
        neuronpedia: `model/source` there, if it is there.
        norm_scaling_factor: what activations were multiplied by in training, if SAELens says it.
        overrides: settings that the registry puts in place of those in the SAE's own files.
    """

    release: str
    sae_id: str
    repo: str
    path: str
    loader: str
    model: str
    neuronpedia: str | None
    norm_scaling_factor: float | None
    overrides: tuple[tuple[str, str], ...] = ()

    @property
    def folder(self) -> Path | None:
        """The folder of this package that holds it, or None if the hub does."""
        return STARTER_DATA if self.release == STARTER else None


_STARTER = Entry(
    STARTER,
    "blocks.13.hook_resid_post",
    "",
    "",
    "sae_lens",
    "starter",
    "smollm2-135m-instruct/13-starter-res-6k",
    None,
)


def entry(release: str, sae_id: str | None = None) -> Entry:
    """An SAE by its names; without `sae_id` the only one of its release.

    Raises:
        RequestError: an unknown name; the message gives the nearest.
    """
    known = _releases()
    if release != STARTER and release not in known:
        here = "" if known else ": SAELens is not installed"
        raise RequestError(
            f"{release!r} is not a release of SAELens's registry{here}"
            f"{nearest(release, [*known, STARTER])}"
        )
    ids = [_STARTER.sae_id] if release == STARTER else list(known[release]["saes"])
    if sae_id is None and len(ids) != 1:
        raise RequestError(f"release {release!r} has {len(ids)} SAEs; name one{_some(ids)}")
    sae_id = ids[0] if sae_id is None else sae_id
    if sae_id not in ids:
        raise RequestError(
            f"release {release!r} has no SAE {sae_id!r}{nearest(sae_id, ids) or _some(ids)}"
        )
    return _STARTER if release == STARTER else _entry(release, sae_id)


def of_source(text: str) -> Entry:
    """The SAE of a Neuronpedia source, `model/source`.

    Raises:
        RequestError: the registry names no such source; the message gives the nearest.
    """
    found = _by_source().get(text)
    if found is None:
        raise RequestError(
            f"{text!r} is no Neuronpedia source that SAELens's registry knows"
            f"{nearest(text, _by_source())}"
        )
    return entry(*found)


def is_release(text: str) -> bool:
    """Whether a text names a release."""
    return text == STARTER or text in _releases()


def releases() -> list[str]:
    """The names of all releases."""
    return [*_releases(), STARTER]


@cache
def sources() -> dict[str, dict[str, str]]:
    """Which SAE has which source on Neuronpedia: `{release: {sae_id: "model/source"}}`.

    SAEs without one are left out; where SAELens is not installed only the starter's is there.
    """
    known = {
        release: {sae_id: sae[1] for sae_id, sae in about["saes"].items() if sae[1]}
        for release, about in _releases().items()
    }
    return {**known, STARTER: {_STARTER.sae_id: str(_STARTER.neuronpedia)}}


def _some(ids: Iterable[str]) -> str:
    """The first few names, where none is near to what was given."""
    names = list(ids)
    return "; such as " + ", ".join(names[:3]) if names else ""


def _entry(release: str, sae_id: str) -> Entry:
    about = _releases()[release]
    path, neuronpedia, factor = about["saes"][sae_id]
    return Entry(
        release,
        sae_id,
        about["repo"],
        path,
        about["loader"],
        about["model"],
        neuronpedia,
        factor,
        tuple(sorted(about["overrides"].items())),
    )


@cache
def _by_source() -> dict[str, tuple[str, str]]:
    """Release and sae_id of every source."""
    return {
        source: (release, sae_id)
        for release, saes in sources().items()
        for sae_id, source in saes.items()
    }


@cache
def _releases() -> dict[str, dict[str, Any]]:
    """What is needed of the YAML file, from the cache if it is there."""
    try:
        name = f"sae-lens-{metadata.version('sae-lens')}.json"
    except metadata.PackageNotFoundError:
        return {}
    try:
        kept: dict[str, dict[str, Any]] = json.loads((cache_dir("registry") / name).read_text())
        return kept
    except (OSError, ValueError, RunError):  # not there yet, or damaged: make it again
        pass
    found = _read()
    # a cache that cannot be written costs time only
    with suppress(RunError), whole(cache_dir("registry") / name) as part:
        part.write_text(json.dumps(found, separators=(",", ":")))
    return found


def _read() -> dict[str, dict[str, Any]]:
    spec = util.find_spec("sae_lens")  # finds the folder, imports nothing
    folder = Path(spec.origin).parent if spec and spec.origin else None
    if folder is None or not (file := folder / "pretrained_saes.yaml").is_file():
        return {}
    import yaml

    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    return {
        str(release): {
            "repo": str(about["repo_id"]),
            "model": str(about["model"]),
            "loader": about.get("conversion_func") or "sae_lens",
            "overrides": {
                key: value
                for key, value in (about.get("config_overrides") or {}).items()
                if isinstance(value, str)
            },
            "saes": {
                str(sae["id"]): [
                    str(sae["path"]),  # a number for some
                    sae.get("neuronpedia"),
                    sae.get("norm_scaling_factor"),
                ]
                for sae in about.get("saes", [])
            },
        }
        for release, about in yaml.load(file.read_text(encoding="utf-8"), Loader=loader).items()
    }
