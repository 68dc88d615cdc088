"""Features of sparse autoencoders as directions: one decoder row, without loading the SAE.

`feature` takes SAELens's names, Neuronpedia's id or address, a label that a search found, or a
folder that SAELens saved; `locate` finds the whole SAE by the same names.
"""

import operator
import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from interp_steer.errors import RequestError, RunError, SteerError, nearest
from interp_steer.features.decoder import (
    LAYOUTS,
    DecoderRow,
    OutOfRange,
    check_index,
    folds,
    written_to,
)
from interp_steer.features.hub import Folder, Repo, why
from interp_steer.labels import registry
from interp_steer.labels.label import NUMBER, Label, Source
from interp_steer.labels.registry import Entry
from interp_steer.steering.direction import Direction
from interp_steer.util.files import cache_dir

if TYPE_CHECKING:
    from sae_lens import SAE

_FILES = ("cfg.json", "sae_weights.safetensors")  # of a folder that SAELens saved
_ADDRESS = re.compile(r"^(https?://[^/]*/|(www\.)?neuronpedia\.org/)", re.IGNORECASE)


@dataclass(frozen=True)
class Located:
    """An SAE that was found: an entry of the registry, or a folder that SAELens saved."""

    entry: Entry | None = None
    folder: Path | None = None

    @property
    def release(self) -> str:
        """SAELens's name of the release; of a folder, its path."""
        return self.entry.release if self.entry else str(self.folder)

    @property
    def sae_id(self) -> str:
        """SAELens's name of the SAE; '' for a folder."""
        return self.entry.sae_id if self.entry else ""

    @property
    def name(self) -> str:
        """Release and sae_id, for people."""
        return f"{self.release}/{self.sae_id}" if self.entry else self.release

    @property
    def model(self) -> str | None:
        """The model that it was trained on, as the registry says; None for a folder."""
        return self.entry.model if self.entry else None

    @property
    def neuronpedia(self) -> str | None:
        """`model/source`, if it is on Neuronpedia."""
        return self.entry.neuronpedia if self.entry else None

    def row(self, index: int, offline: bool = False) -> DecoderRow:
        """One decoder row, in residual units.

        Raises:
            RequestError: out of range, or a place that cannot be steered.
            RunError: its files cannot be had, or are damaged.
        """
        try:
            return self._row(index, offline)
        except OutOfRange as error:
            raise RequestError(
                f"feature {index} is out of range: {self.name} has features 0-{error.last}"
            ) from error

    def _row(self, index: int, offline: bool) -> DecoderRow:
        if self.folder:
            entry = Entry(self.release, "", "", "", "sae_lens", "", None, None)
            return LAYOUTS["sae_lens"](Folder(self.folder), "", entry, index)
        if self.entry and self.entry.loader in LAYOUTS:
            files = Repo(self.entry.repo, offline)
            return LAYOUTS[self.entry.loader](files, f"{self.entry.path}/", self.entry, index)
        return self._row_of_whole(index, offline)

    def whole(self, device: str = "cpu", offline: bool = False) -> "SAE[Any]":
        """The whole SAE in float32, loaded by SAELens.

        Raises:
            RunError: it cannot be fetched or loaded.
        """
        from huggingface_hub import constants
        from sae_lens import SAE

        online = constants.HF_HUB_OFFLINE
        constants.HF_HUB_OFFLINE = online or offline  # SAELens cannot be told
        try:
            if self.folder:
                return SAE.load_from_disk(self.folder, device=device, dtype="float32")
            return SAE.from_pretrained(self.release, self.sae_id, device=device)
        except Exception as error:  # its loaders raise whatever their libraries do
            raise RunError(f"SAELens cannot load {self.name}: {why(error)}") from error
        finally:
            constants.HF_HUB_OFFLINE = online

    def _row_of_whole(self, index: int, offline: bool) -> DecoderRow:
        """For layouts that only SAELens reads."""
        sae = self.whole(offline=offline)
        about = sae.cfg.metadata
        transcoder = "transcoder" in sae.cfg.architecture()
        hook_in, hook_out = str(about.hook_name or ""), str(about.hook_name_out or "")
        hook = written_to(hook_in, hook_out, transcoder, self.name)
        check_index(index, sae.cfg.d_sae)
        vector = sae.W_dec.detach()[index].float().clone()
        rescaled = bool(getattr(sae.cfg, "rescale_acts_by_decoder_norm", False))
        scaling, kind = sae.cfg.normalize_activations, sae.cfg.architecture()
        return DecoderRow(vector, hook, "", "", scaling, rescaled, kind)


def feature(
    where: str | Path | Label,
    sae_id: str | int | None = None,
    index: int | str | None = None,
    *,
    name: str | None = None,
    offline: bool = False,
) -> Direction:
    """The decoder row of one feature as a direction, in the model's residual units.

    `feature(release, sae_id, index)`, `feature("model/source/index")` or its address on
    Neuronpedia, `feature(label)`, `feature(folder, index)`; and any other form of `locate` with an
    index. Rows of pretrained SAEs are kept in the cache: the second time needs neither network nor
    the SAE's files.

    The row is read as SAELens's `W_dec[index]` to the bit, in float32 and with the training's scale
    of activations folded in (as `unit` times `norm` it is rounded once more).
    `source["normalize_activations"]` names a scaling that has no fixed size, so that the
    direction's norm is in the SAE's own units. A transcoder's row is placed where it writes.

    Args:
        where: a release, "model/source/index", an address, a label, or a folder.
        sae_id: with a release, which of its SAEs.
        index: which feature, from 0.
        name: what lines of text call it; by default such as `f15-21576`, for layer and index.
        offline: never open a connection.

    Returns:
        A direction with `source`: release, sae_id, index, repo, file, revision, model,
        architecture; neuronpedia where known, and label and density where a label was given or the
        label store has one. From the label also `max_activation`: its number is a length in the
        stream already where SAELens folds the rows' norms (see `decoder.folds`), else it is
        multiplied by the row's norm. `label_max_activation` in `source` is the number as it was,
        `label_max_activation_is` which of the two it was taken for.

    Raises:
        RequestError: an unknown name, no such feature, or an SAE of a place that cannot be steered.
        RunError: its files are not here and offline, cannot be fetched, or are damaged.
    """
    label = where if isinstance(where, Label) else None
    found, at = _split(where, sae_id, index)
    made = kept = _kept(found, at) if found.folder is None else None
    if made is None or "architecture" not in made.source:  # kept by an earlier version
        try:
            made = _made(found, at, found.row(at, offline))
        except RunError:
            if kept is None:
                raise
            made = kept
        if made is not kept and found.folder is None:
            with suppress(SteerError):  # a cache that cannot be written costs time only
                made.save(_place(found, at))
    made = made.named(f"f{made.site.layer}-{at}" if name is None else name)
    label = _with_numbers(label, found, at)
    return _labelled(made, label) if label else made


def locate(where: str | Path | Label, sae_id: str | None = None) -> Located:
    """The SAE that a request names.

    Args:
        where: a release, "release/sae_id", Neuronpedia's "model/source" or its address, a label,
            a folder that SAELens saved, or "starter".
        sae_id: with a release, which of its SAEs; may be left out where it has only one.

    Raises:
        RequestError: it is none of these; the message gives the nearest names.
    """
    if isinstance(where, Label):
        if where.release and where.sae_id:
            return _of(registry.entry(where.release, where.sae_id))
        return _of(registry.of_source(f"{where.model}/{where.source}"))
    if isinstance(where, Path):
        if sae_id is not None:
            raise RequestError(f"{where} is a folder: it has no SAE {sae_id!r}; leave that out")
        return _in_folder(where)
    if sae_id is not None or registry.is_release(where):
        return _of(registry.entry(where, sae_id))
    if where.startswith(("/", "./", "../", "~")):
        return _in_folder(Path(where))
    text = _plain(where)
    release, slash, rest = text.partition("/")
    if slash and registry.is_release(release):
        return _of(registry.entry(release, rest))
    if text == where and Path(where).is_dir():
        return _in_folder(Path(where))
    if text.count("/") == 1:
        return _of(registry.of_source(text))
    raise RequestError(
        f"{where!r} is no release of SAELens, no model/source of Neuronpedia and no folder"
        f"{nearest(where, registry.releases())}"
    )


def _split(
    where: str | Path | Label, sae_id: str | int | None, index: int | str | None
) -> tuple[Located, int]:
    """The SAE and the index out of the arguments of `feature`."""
    if isinstance(where, Label):
        if sae_id is not None or index is not None:
            raise RequestError("feature(label) takes no SAE and no index: the label names both")
        return locate(where), as_index(where.index)
    if index is None and sae_id is not None and not isinstance(sae_id, str):
        return locate(where), as_index(sae_id)  # feature(where, index)
    if index is None and sae_id is None and isinstance(where, str):
        head, _, last = _plain(where).rpartition("/")
        if head and NUMBER.fullmatch(last):
            return locate(head), int(last)
    if index is None:
        told = f"{where}, {sae_id}" if sae_id is not None else f"{where}"
        raise RequestError(
            f"which feature of {told}? expected feature(release, sae_id, index), "
            'feature("model/source/index") or feature(folder, index)'
        )
    at = as_index(index)
    return locate(where, None if sae_id is None else str(sae_id)), at


def as_index(given: object) -> int:
    if not isinstance(given, bool):
        with suppress(TypeError):
            number = operator.index(given)  # type: ignore[arg-type]
            if number >= 0:
                return number
    raise RequestError(f"{given!r} is not the index of a feature: expected a whole number from 0")


def _plain(text: str) -> str:
    """A Neuronpedia address without host, query and fragment; any other text as it is."""
    if not (host := _ADDRESS.match(text.strip())):
        return text
    return re.split(r"[?#]", text.strip()[host.end() :])[0].strip("/")


def _of(entry: Entry) -> Located:
    if entry.folder is None:
        return Located(entry)
    if lost := _lost(entry.folder):
        raise RunError(
            f"the starter's SAE is not part of this installation: {entry.folder} has no {lost}; "
            "install interp-steer anew"
        )
    return Located(entry, entry.folder)


def _in_folder(given: Path) -> Located:
    try:
        folder = given.expanduser().resolve()
    except (OSError, RuntimeError) as error:  # an unknown ~user, a loop of links
        raise RequestError(f"no folder {given}") from error
    if not folder.is_dir():
        raise RequestError(f"no folder {given}")
    if lost := _lost(folder):
        raise RequestError(
            f"{given} has no {lost}; expected a folder that SAELens saved, with {_FILES[0]} and "
            f"{_FILES[1]}"
        )
    return Located(folder=folder)


def _lost(folder: Path) -> str:
    """The first file that a folder of SAELens lacks, or ''."""
    return next((name for name in _FILES if not (folder / name).is_file()), "")


def _made(found: Located, index: int, row: DecoderRow) -> Direction:
    """The direction of a row, with all that is known of it but a label."""
    entry = found.entry
    source = {
        "release": found.release,
        "sae_id": found.sae_id,
        "index": str(index),
        "repo": entry.repo if entry else "",
        "file": row.file,
        "revision": row.revision,
        "model": found.model or "",
        "architecture": row.architecture,
    }
    if found.neuronpedia:
        source["neuronpedia"] = f"{found.neuronpedia}/{index}"
    if row.normalize != "none":
        source["normalize_activations"] = row.normalize
    if row.rescaled:
        source["rescale_acts_by_decoder_norm"] = "true"
    if entry and (factor := _factor(entry)):
        source["norm_scaling_factor"] = factor
    return Direction.of(row.vector, row.hook_point, "feature", source)


def _labelled(made: Direction, label: Label) -> Direction:
    """A direction with what a label says of its feature."""
    source = dict(made.source)
    if label.label:
        source["label"] = label.label
    if label.density is not None:
        source["density"] = repr(label.density)
    if label.max_activation is None:
        return replace(made, source=source)
    counted, maximum = largest(source, made.norm, label.max_activation)
    return replace(made, source=counted, max_activation=maximum)


def _with_numbers(label: Label | None, found: Located, index: int) -> Label | None:
    """A label with density and largest activation from the label store, where it has none."""
    if found.neuronpedia is None or (label and label.max_activation is not None):
        return label
    from interp_steer.labels.store import Store, default_path

    with suppress(SteerError):  # a store that cannot be read costs the label only
        if default_path().is_file():
            with Store() as store:
                known = store.feature(Source.parse(found.neuronpedia), index)
            best = label or next(iter(known.labels), None)
            blank = Label(known.source.model, known.source.name, index, "")
            best = best or blank
            density = known.density if best.density is None else best.density
            return replace(best, density=density, max_activation=known.max_activation)
    return label


def _place(found: Located, index: int) -> Path:
    """Where a row is kept. Names come from the registry, and quoting leaves no slash in them."""
    parts = (quote(found.release, safe=""), quote(found.sae_id, safe=""))
    return cache_dir("features", *parts) / f"{index}.safetensors"


def _kept(found: Located, index: int) -> Direction | None:
    """The row as the cache keeps it, unless the registry now says otherwise of its SAE."""
    try:
        kept = Direction.load(_place(found, index))
    except SteerError:  # not there yet, or damaged: make it again
        return None
    entry = found.entry
    if entry is None or kept.source.get("repo") != entry.repo:
        return None
    return kept if kept.source.get("norm_scaling_factor") == _factor(entry) else None


def _factor(entry: Entry) -> str | None:
    factor = entry.norm_scaling_factor
    return None if factor is None else repr(factor)


def largest(
    source: Mapping[str, str], norm: float, number: float
) -> tuple[Mapping[str, str], float | None]:
    """(source, largest activation in residual units) of a row of that norm, of a label's number."""
    if "normalize_activations" in source:  # no activation of it has a fixed length
        return source, None
    rescaled = "rescale_acts_by_decoder_norm" in source
    kind = source.get("architecture", "")
    contributes = folds(kind, rescaled)
    unit = "contribution" if kind else "contribution (assumed)"
    source = {
        **source,
        "label_max_activation": repr(number),
        "label_max_activation_is": unit if contributes else "activation",
    }
    return source, number if contributes or rescaled else number * norm
