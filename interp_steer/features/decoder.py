"""One decoder row out of an SAE's files, in each layout that SAELens reads.

Every row equals SAELens's own `W_dec[index]` in float32 to the bit, and so follows its order: cast
to float32, then divide by the scale of the activations. No more of the files is read than needed.
"""

import json
import math
import re
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from interp_steer.errors import RequestError, RunError
from interp_steer.features.hub import Bytes, Folder, LocalFile, Repo, commit
from interp_steer.labels.registry import Entry
from interp_steer.model.site import COMPONENTS, Site
from interp_steer.util.files import read_text

LARGEST_HEADER = 2**24  # bytes; an SAE's has under 10,000
_GUESS = 4096  # bytes fetched at first, so that most headers come with one request
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}
SCALED = "expected_average_only_in"
"""SAELens's word for activations multiplied by one number so that their mean norm is sqrt(d_in)."""


@dataclass(frozen=True)
class DecoderRow:
    """What one unit of a feature adds to its place in the model.

    Attributes:
        vector: [d_model], float32, in residual units where `normalize` is "none".
        hook_point: where it is added.
        file, revision: its file in the repository or folder, and the hub's commit of that.
        normalize: how the SAE rescales activations by a number that is not in its weights, so that
            `vector` has no fixed length in the residual stream; "none" if it does not.
        rescaled: whether SAELens counts this SAE's activations in residual units already, dividing
            by the row's norm as it decodes.
        architecture: SAELens's word for the SAE's kind.
    """

    vector: Float[Tensor, " d_model"]
    hook_point: str
    file: str
    revision: str
    normalize: str = "none"
    rescaled: bool = False
    architecture: str = ""


def folds(architecture: str, rescaled: bool) -> bool:
    """Whether SAELens's `fold_W_dec_norm` moves the length of every row into the encoder.

    Neuronpedia's dashboards are made after it, so that their activations are lengths in the stream.
    SAELens refuses it where it would change which latents are active; an SAE of unknown kind is
    taken to be of the common kinds, which it folds.
    """
    if architecture in ("topk", "abstopk"):
        return rescaled
    return architecture not in ("temporal", "matching_pursuit")


# --- layouts ----------------------------------------------------------------------------------


def sae_lens(files: Repo | Folder, prefix: str, entry: Entry, index: int) -> DecoderRow:
    """SAELens's own layout: cfg.json, and `W_dec` [d_sae, d_in] in sae_weights.safetensors."""
    settings, path = _json(files, f"{prefix}cfg.json")
    about = {**settings, **(settings.get("metadata") or {}), **dict(entry.overrides)}
    hook = _hook_of(about, str(path))
    normalize = about.get("normalize_activations") or "none"
    if normalize is True:  # how the first versions wrote it
        normalize = SCALED
    if normalize == "covariance_whitening":
        raise RequestError(
            f"{path}: this SAE was trained on whitened activations and its files do not hold the "
            "way back, so its decoder rows are no directions of the residual stream"
        )
    name = f"{prefix}sae_weights.safetensors"
    file = Safetensors(files.parts(name))
    if "scaling_factor" in file and not torch.allclose(
        (factor := file.whole("scaling_factor")), torch.ones_like(factor)
    ):
        raise RequestError(
            f"{file.name} has a finetuning scaling factor, which SAELens no longer loads either"
        )
    vector = file.row("W_dec", index).float()
    if normalize == SCALED and entry.norm_scaling_factor is not None:
        vector /= entry.norm_scaling_factor
        normalize = "none"
    rescaled = bool(about.get("rescale_acts_by_decoder_norm"))
    kind = _kind(about)
    return DecoderRow(vector, hook, name, file.revision, str(normalize), rescaled, kind)


def llama_scope(files: Repo | Folder, prefix: str, entry: Entry, index: int) -> DecoderRow:
    """Llama Scope: `decoder.weight` [d_in, d_sae], for activations scaled to norm sqrt(d_in)."""
    about, path = _json(files, f"{prefix}hyperparams.json")
    hook = _need(about, "hook_point_in", str(path))
    if about.get("hook_point_out", hook) != hook:
        raise RequestError(
            f"{path}: a transcoder from {hook} to {about['hook_point_out']}; SAELens scales its "
            "rows by its input, so they have no known length where they are written"
        )
    hook = steerable(hook, str(path))
    name = f"{prefix}checkpoints/final.safetensors"
    file = Safetensors(LocalFile(files.path(name)))  # a column over HTTP would be d_in requests
    vector = file.column("decoder.weight", index).float()
    if entry.norm_scaling_factor is None:
        return DecoderRow(vector, hook, name, file.revision, SCALED, architecture="jumprelu")
    vector /= entry.norm_scaling_factor
    return DecoderRow(vector, hook, name, file.revision, architecture="jumprelu")


def dictionary_learning(files: Repo | Folder, prefix: str, entry: Entry, index: int) -> DecoderRow:
    """The dictionary_learning library: `decoder.weight` [d_in, d_sae], or its transpose `W_dec`."""
    about, path = _json(files, f"{prefix}config.json")
    trainer = _need(about, "trainer", str(path))
    hook = f"blocks.{_need(trainer, 'layer', str(path))}.hook_resid_post"
    steerable(hook, str(path))
    kind = _TRAINED.get(str(trainer.get("dict_class")), "standard")
    name = f"{prefix}ae.pt"
    file = files.path(name)
    held = _checkpoint(file)
    key, axis = ("W_dec", 0) if "W_dec" in held else ("decoder.weight", 1)
    vector = _picked(held, key, axis, index, file)
    return DecoderRow(vector, hook, name, commit(file), architecture=kind)


def goodfire(files: Repo | Folder, prefix: str, entry: Entry, index: int) -> DecoderRow:
    """Goodfire: one file without a configuration, `decoder_linear.weight` [d_in, d_sae]."""
    found = re.search(r"-l(\d+)\.pth?$", entry.path)
    if not found:
        raise RequestError(f"{entry.path} does not say its layer, expected such as ...-l19.pth")
    file = files.path(entry.path)
    vector = _picked(_checkpoint(file), "decoder_linear.weight", 1, index, file)
    hook = f"blocks.{found[1]}.hook_resid_post"
    return DecoderRow(vector, hook, entry.path, commit(file), architecture="standard")


def temporal(files: Repo | Folder, prefix: str, entry: Entry, index: int) -> DecoderRow:
    """Temporal SAEs: `D` [d_sae, d_in] in latest_ckpt.safetensors, settings in conf.yaml.

    SAELens multiplies activations by `scaling_factor` as it encodes and divides by it as it
    decodes, and leaves W_dec as it is. In residual units a row is therefore D / scaling_factor.
    """
    from interp_steer.util.yaml_text import parse_yaml

    path = files.path(f"{prefix}conf.yaml")
    try:
        factor = float(parse_yaml(read_text(path), path)["sae"]["scaling_factor"])
    except (ValueError, KeyError, TypeError) as error:
        raise RunError(f"{path} is damaged: it names no sae.scaling_factor") from error
    if not (math.isfinite(factor) and factor > 0):
        raise RunError(f"{path} is damaged: sae.scaling_factor is {factor}")
    layer = re.search(r"layer_(\d+)", prefix)
    told = dict(entry.overrides).get("hook_name")
    hook = steerable(told or (f"blocks.{layer[1]}.hook_resid_post" if layer else ""), str(path))
    name = f"{prefix}latest_ckpt.safetensors"
    file = Safetensors(files.parts(name))
    vector = file.row("D", index).float()
    vector /= factor
    return DecoderRow(vector, hook, name, file.revision, architecture="temporal")


LAYOUTS = {
    "sae_lens": sae_lens,
    "llama_scope": llama_scope,
    "dictionary_learning_1": dictionary_learning,
    "goodfire": goodfire,
    "temporal": temporal,
}
"""By SAELens's word for the loader; for any other, SAELens loads the whole SAE."""

ONE_KIND = {"llama_scope": "jumprelu", "goodfire": "standard", "temporal": "temporal"}
"""The architecture in layouts whose SAEs are all of one."""

# SAELens's reading of the dictionary_learning library's classes; any other is "standard".
_TRAINED = {
    "AutoEncoderTopK": "topk",
    "GatedAutoEncoder": "gated",
    "MatryoshkaBatchTopKSAE": "jumprelu",
    "BatchTopKSAE": "jumprelu",
    "JumpReluAutoEncoder": "jumprelu",
}


def _kind(about: dict[str, Any]) -> str:
    """The architecture in SAELens's own settings; before version 6 "topk" was a function's name."""
    function = about.get("activation_fn", about.get("activation_fn_str"))
    topk = function == "topk" and (about.get("activation_fn_kwargs") or {}).get("k") is not None
    return "topk" if topk else str(about.get("architecture") or "standard")


# --- places -----------------------------------------------------------------------------------


def steerable(hook: str, what: str) -> str:
    """A hook point that can be steered, by TransformerLens's name.

    Raises:
        RequestError: it cannot; the message says what can.
    """
    try:
        return Site.parse(hook).hook_point
    except RequestError as error:
        raise RequestError(
            f"{what}: this SAE is trained on {hook or 'an unnamed place'}, which cannot be "
            f"steered here; what can: {', '.join(COMPONENTS)} (z one head at a time)"
        ) from error


def written_to(hook_in: str, hook_out: str, transcoder: bool, what: str) -> str:
    """Where decoder rows are added: a transcoder reads one place and writes another.

    Raises:
        RequestError: that place cannot be steered, or is not named.
    """
    if transcoder and not hook_out:
        raise RequestError(f"{what}: a transcoder whose files do not say where it writes")
    return steerable(hook_out or hook_in, what)


def _hook_of(about: dict[str, Any], what: str) -> str:
    hook = str(about.get("hook_name") or about.get("hook_point") or "")
    head = about.get("hook_head_index", about.get("hook_point_head_index"))
    if hook.endswith("hook_z") and head is not None:
        hook = f"{hook}.{head}"
    transcoder = "transcoder" in str(about.get("architecture", ""))
    return written_to(hook, str(about.get("hook_name_out") or ""), transcoder, what)


# --- files ------------------------------------------------------------------------------------


class Safetensors:
    """Rows and columns of the matrices in a safetensors file, read by their bytes.

    The format: the header's length in 8 bytes, the header in JSON, the tensors row by row.
    """

    def __init__(self, file: Bytes) -> None:
        """Raises RunError if the header is damaged, or says more than the file holds."""
        self._file = file
        self.name = file.name
        head = file.read(0, _GUESS)
        length = int.from_bytes(head[:8], "little")
        if len(head) < 8 or length > LARGEST_HEADER or 8 + length > (file.size or 0):
            raise self._damaged(f"its header is said to be {length} bytes long")
        if 8 + length > len(head):
            head += file.read(len(head), 8 + length - len(head))
        try:
            self._tensors = dict(json.loads(head[8 : 8 + length]))
        except (ValueError, TypeError, RecursionError) as error:
            raise self._damaged("its header is not JSON") from error
        self._tensors.pop("__metadata__", None)
        self._start = 8 + length

    @property
    def revision(self) -> str:
        """The hub's commit, or ''."""
        return self._file.revision

    def __contains__(self, key: str) -> bool:
        return key in self._tensors

    def row(self, key: str, index: int) -> Float[Tensor, " columns"]:
        """A row of a matrix, in the dtype of the file."""
        dtype, (rows, columns), start = self._matrix(key)
        check_index(index, rows)
        return self._read(start + index * columns * dtype.itemsize, columns, dtype)

    def column(self, key: str, index: int) -> Float[Tensor, " rows"]:
        """A column of a matrix, one small read a row."""
        dtype, (rows, columns), start = self._matrix(key)
        check_index(index, columns)
        step, size = columns * dtype.itemsize, dtype.itemsize
        first = start + index * size
        data = b"".join(self._file.read(first + row * step, size) for row in range(rows))
        return self._tensor(data, rows, dtype)

    def whole(self, key: str) -> Float[Tensor, "*shape"]:
        """A tensor."""
        dtype, shape, start = self._about(key)
        return self._read(start, math.prod(shape), dtype).reshape(shape)

    def _read(self, start: int, count: int, dtype: torch.dtype) -> Tensor:
        return self._tensor(self._file.read(start, count * dtype.itemsize), count, dtype)

    def _tensor(self, data: bytes, count: int, dtype: torch.dtype) -> Tensor:
        if len(data) != count * dtype.itemsize:
            raise self._damaged("it ends too early")
        return torch.frombuffer(bytearray(data), dtype=dtype)

    def _matrix(self, key: str) -> tuple[torch.dtype, tuple[int, int], int]:
        dtype, shape, start = self._about(key)
        if len(shape) != 2 or 0 in shape:
            raise self._damaged(f"{key} has shape {list(shape)}, expected a matrix")
        return dtype, (shape[0], shape[1]), start

    def _about(self, key: str) -> tuple[torch.dtype, tuple[int, ...], int]:
        """Dtype, shape and place of a tensor, checked against the file's size."""
        if key not in self._tensors:
            raise self._damaged(f"it has no {key}, only {', '.join(sorted(self._tensors))[:200]}")
        try:
            entry = self._tensors[key]
            dtype, shape = _DTYPES[entry["dtype"]], tuple(entry["shape"])
            first, last = entry["data_offsets"]
            right = all(type(n) is int and n >= 0 for n in (*shape, first, last))
            right = right and last - first == math.prod(shape) * dtype.itemsize
            end = max(each["data_offsets"][1] for each in self._tensors.values())
        except (KeyError, TypeError, ValueError, IndexError) as error:
            raise self._damaged(f"its header says nothing sensible of {key}") from error
        if not right:
            raise self._damaged(f"its header contradicts itself about {key}")
        # a file cut short is refused even where the part that is asked for is there
        if self._start + end > (self._file.size or 0):
            raise self._damaged(f"{self._file.size or 0:,} bytes, and its header speaks of more")
        return dtype, shape, self._start + first

    def _damaged(self, reason: str) -> RunError:
        return RunError(f"{self.name} is damaged or no safetensors file: {reason}")


class OutOfRange(RequestError):
    """The SAE has no such feature; `last` is its last one."""

    def __init__(self, index: int, last: int) -> None:
        super().__init__(f"feature {index} is out of range: the SAE has features 0-{last}")
        self.last = last


def check_index(index: int, d_sae: int) -> None:
    """Raises OutOfRange if an SAE of `d_sae` features has no such feature."""
    if not 0 <= index < d_sae:
        raise OutOfRange(index, d_sae - 1)


def _checkpoint(path: Path) -> dict[str, Tensor]:
    """A dictionary of tensors that torch saved: mapped, so that only what is used is read."""
    mapped = zipfile.is_zipfile(path)  # torch maps no file of the format before 1.6
    try:
        held: dict[str, Tensor] = torch.load(
            path, map_location="cpu", mmap=mapped, weights_only=True
        )
    except Exception as error:  # of any kind: its unpickler follows a damaged stream anywhere
        raise RunError(f"{path} is damaged or no file of tensors: torch cannot read it") from error
    if not isinstance(held, dict):
        raise RunError(f"{path} is damaged: expected tensors by name, got {type(held).__name__}")
    return held


def _picked(
    held: dict[str, Tensor], key: str, axis: int, index: int, path: Path
) -> Float[Tensor, " d_model"]:
    """The slice of a matrix at `index` of an axis, in float32."""
    matrix = held.get(key)
    if not isinstance(matrix, Tensor) or matrix.ndim != 2:
        raise RunError(f"{path} is damaged: it has no matrix {key}, only {', '.join(held)[:200]}")
    check_index(index, matrix.shape[axis])
    return matrix.detach().select(axis, index).to(torch.float32, copy=True).contiguous()


def _json(files: Repo | Folder, name: str) -> tuple[dict[str, Any], Path]:
    path = files.path(name)
    try:
        return dict(json.loads(path.read_text(encoding="utf-8"))), path
    except (ValueError, TypeError, OSError, RecursionError) as error:
        raise RunError(f"{path} is damaged: expected settings in JSON") from error


def _need(about: Any, key: str, what: str) -> Any:
    if not isinstance(about, dict) or key not in about:
        raise RunError(f"{what} is damaged: it names no {key}")
    return about[key]
