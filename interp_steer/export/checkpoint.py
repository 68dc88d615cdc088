"""A Hugging Face checkpoint that its own biases steer: any server of Llama models serves it.

With `mlp_bias`, transformers' Llama adds `down_proj.bias` to the output of a block's MLP, and so to
`resid_post`; with `attention_bias`, `o_proj.bias` to `attn_out`. All other biases are zero. Nothing
else of the model changes, and its weights are linked, not copied, where the file system allows.
"""

import json
import os
import re
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from interp_steer.errors import RequestError, RunError
from interp_steer.export.constant import Constants, refuse_others
from interp_steer.model.shape import Shape
from interp_steer.util.console import Report
from interp_steer.util.files import explained, parse_json, read_text

BIASES = "model-biases.safetensors"
INDEX = "model.safetensors.index.json"
ALONE = "model.safetensors"
BLOCK = 2**24  # bytes copied at once
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")  # which a card may call its base
_LEFT_OUT = (INDEX, "README.md", "starter.json")  # of the base; what stands there is no longer true
_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


def check(found: Constants, out: Path) -> None:
    """Refuses sites that no bias reaches, and a folder that is there."""
    refuse_others(found, ("resid_post", "attn_out"), "a bias")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise RequestError(f"{out} is there already; give a new folder")


def write(
    found: Constants,
    base: Path,
    shape: Shape,
    out: Path,
    about: Mapping[str, str],
    *,
    report: Report | None = None,
) -> Path:
    """Writes the folder, whole or not at all.

    Args:
        base: folder of the model, with safetensors.
        shape: of the model.
        about: `model`, `steer` and other facts for the model card.
        report: called with the bytes copied so far; nothing is called for what is linked.

    Raises:
        RequestError: a site that no bias reaches, a folder that is there, a base of another kind.
        RunError: the disk is full, or the base's files are damaged.
    """
    check(found, out)
    weights = sorted(path for path in base.glob("*.safetensors"))
    names = _renamed(weights)
    weight_map, dtype = _weight_map(base, weights, names)
    config = parse_json(read_text(base / "config.json"), base / "config.json", RunError)
    kinds = {site.component for site in found}
    biases = _biases(found, shape, dtype, kinds)
    config |= {"mlp_bias": "resid_post" in kinds, "attention_bias": "attn_out" in kinds}
    out.parent.mkdir(parents=True, exist_ok=True)
    with explained(out), tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}-") as tmp:
        folder = Path(tmp) / "checkpoint"
        folder.mkdir()
        for path in sorted(base.iterdir()):
            if path.suffix == ".safetensors" or path.name in _LEFT_OUT or not path.is_file():
                continue
            if path.suffix in (".json", ".jinja", ".txt", ".model") or "LICENSE" in path.name:
                shutil.copyfile(path, folder / path.name)
        _put(weights, names, folder, report)
        _save(biases, folder / BIASES)
        weight_map |= dict.fromkeys(biases, BIASES)
        size = sum((folder / name).stat().st_size for name in {*weight_map.values()})
        index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(weight_map.items()))}
        (folder / INDEX).write_text(json.dumps(index, indent=2))
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        (folder / "README.md").write_text(card(found, about), encoding="utf-8")
        if out.exists():  # and empty
            out.rmdir()
        folder.replace(out)
    return out


def _biases(
    found: Constants, shape: Shape, dtype: torch.dtype, kinds: set[str]
) -> dict[str, Tensor]:
    """Every bias of the model by its key; vLLM leaves what is not in a file uninitialised."""
    widths: dict[str, int] = {}
    if "resid_post" in kinds:
        widths |= {
            "mlp.gate_proj": shape.d_mlp, "mlp.up_proj": shape.d_mlp, "mlp.down_proj": shape.d_model
        }  # fmt: skip
    if "attn_out" in kinds:
        widths |= {
            "self_attn.q_proj": shape.n_heads * shape.d_head,
            "self_attn.k_proj": shape.n_kv_heads * shape.d_head,
            "self_attn.v_proj": shape.n_kv_heads * shape.d_head,
            "self_attn.o_proj": shape.d_model,
        }
    biases = {
        f"model.layers.{layer}.{part}.bias": torch.zeros(width, dtype=dtype)
        for layer in range(shape.n_layers)
        for part, width in widths.items()
    }
    parts = {"resid_post": "mlp.down_proj", "attn_out": "self_attn.o_proj"}
    for site, vector in found.items():
        biases[f"model.layers.{site.layer}.{parts[site.component]}.bias"] = vector.to(dtype)
    return biases


def _renamed(weights: list[Path]) -> dict[Path, str]:
    """The new names: a `model.safetensors` beside an index would be read without its index."""
    return {
        path: "model-weights.safetensors" if path.name == ALONE else path.name for path in weights
    }


def _weight_map(
    base: Path, weights: list[Path], names: Mapping[Path, str]
) -> tuple[dict[str, str], torch.dtype]:
    """Tensor -> file, and the format that most of the tensors have."""
    from safetensors import SafetensorError, safe_open

    found: dict[str, str] = {}
    dtypes: list[str] = []
    if not weights:
        raise RequestError(f"{base} has no .safetensors weights")
    for path in weights:
        try:
            with explained(path), safe_open(path, "pt") as file:
                for key in list(file.keys()):
                    found[key] = names[path]
                    dtypes.append(file.get_slice(key).get_dtype())
        except SafetensorError as error:
            raise RunError(f"{path} is damaged: {error}") from error
    common = max(sorted(set(dtypes)), key=dtypes.count)
    if common not in _DTYPES or any(key.endswith("down_proj.bias") for key in found):
        raise RequestError(
            f"{base} holds {common} weights"
            + (" and biases" if common in _DTYPES else "")
            + "; expected a Llama without biases in float32, bfloat16 or float16"
        )
    return found, _DTYPES[common]


def _put(
    weights: list[Path], names: Mapping[Path, str], folder: Path, report: Report | None
) -> None:
    """Weights under their new names: hard links, or copies where there can be none."""
    done = 0
    for path in weights:
        target, real = folder / names[path], path.resolve()
        try:
            os.link(real, target)
            continue
        except OSError:
            pass  # another file system, or one without links
        with real.open("rb") as source, target.open("wb") as sink:
            while block := source.read(BLOCK):
                sink.write(block)
                done += len(block)
                if report:
                    report(done)


def _save(biases: dict[str, Tensor], path: Path) -> None:
    from safetensors.torch import save_file

    save_file(biases, path, {"format": "pt"})


def card(found: Constants, about: Mapping[str, str]) -> str:
    """The model card: what was changed, and who honours it."""
    facts = "\n".join(f"| {key} | {_cell(value)} |" for key, value in about.items() if value)
    sites = "\n".join(
        f"| {site} | {'mlp.down_proj' if site.component == 'resid_post' else 'self_attn.o_proj'}"
        f".bias of layer {site.layer} | {vector.norm():.4g} |"
        for site, vector in found.items()
    )
    keys = sorted({"mlp_bias" if s.component == "resid_post" else "attention_bias" for s in found})
    sglang = (
        "SGLang ignores `mlp_bias` without a word: there this model is the unsteered one.\n"
        if "mlp_bias" in keys
        else ""
    )
    base = about.get("model", "")
    head = [f"base_model: {base}"] if HUB_ID.fullmatch(base) else []
    front = "\n".join(["---", *head, "tags: [steering]", "---"])
    return f"""{front}
# A steered Llama

The base model with a constant vector added to its residual stream at every position, by
interp-steer. Weights are the base's own; {" and ".join(f"`{key}`" for key in keys)} is set, and all
biases are zero but these:

| site | tensor | length |
|---|---|---|
{sites}

| | |
|---|---|
{facts}

transformers, vLLM and TensorRT-LLM honour the biases. {sglang}The licence of the base model holds.
"""


def _cell(value: Any) -> str:
    return " ".join(str(value).split()).replace("|", "\\|")
