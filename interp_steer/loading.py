"""From a name to weights in memory, and what is refused on the way."""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from interp_steer.console import progress
from interp_steer.errors import RequestError, RunError, nearest

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM, PreTrainedTokenizerBase


def pick_device(told: str | torch.device | None) -> torch.device:
    if told is None:
        return torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(told)
        torch.empty(0, device=device)
    except Exception as error:  # torch raises several kinds, with paragraphs of advice
        raise RequestError(f"device {str(told)!r} is not available here; try 'cpu'") from error
    return device


def pick_dtype(told: torch.dtype | str | None, device: torch.device) -> torch.dtype:
    kinds = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if told is None:
        return torch.float32 if device.type == "cpu" else torch.bfloat16
    if isinstance(told, torch.dtype):
        told = str(told).removeprefix("torch.")
    if told not in kinds:
        raise RequestError(f"unknown dtype {told!r}{nearest(told, kinds)}")
    return kinds[told]


def find_folder(name: str, revision: str | None) -> tuple[Path, str]:
    """The folder with the files of a model, fetched if need be, and its commit."""
    if not name.strip():
        raise RequestError("the model's name is empty; expected 'starter', a folder or a hub id")
    if name == "starter":
        from interp_steer import starter

        return starter.folder(), ""
    path = Path(name).expanduser()
    if (path / "config.json").is_file():
        return path, ""
    if path.exists():
        raise RequestError(f"{name} holds no config.json: not a Hugging Face model folder")
    if name.count("/") != 1 or name[0] in "./~":
        raise RequestError(
            f"unknown model {name!r}: neither 'starter', nor a folder, nor a hub id 'owner/name'"
            + (nearest(name, ["starter"]) if "/" not in name else "")
        )
    from huggingface_hub import errors, snapshot_download

    try:
        folder = snapshot_download(
            name,
            revision=revision,
            allow_patterns=["*.json", "*.safetensors", "*.jinja"],
            ignore_patterns=["original/*"],
        )
    except errors.GatedRepoError as error:
        raise RunError(
            f"{name} is gated: accept its licence at https://huggingface.co/{name} and set "
            "HF_TOKEN to a token of that account"
            + (" (it is set)" if "HF_TOKEN" in os.environ else "")
        ) from error
    except errors.RevisionNotFoundError as error:
        raise RequestError(f"{name} has no revision {revision!r}") from error
    except (errors.RepositoryNotFoundError, errors.HFValidationError) as error:
        raise RequestError(
            f"unknown model {name!r}: the hub has none of that name, or it is private and HF_TOKEN "
            "is not set"
        ) from error
    except errors.LocalEntryNotFoundError as error:
        raise RunError(
            f"{name} is not in the local cache and the hub cannot be reached: no network, or "
            "HF_HUB_OFFLINE is set"
        ) from error
    except Exception as error:  # the hub's library raises its HTTP client's errors as they are
        raise RunError(f"cannot fetch {name}: {_first_line(error)}") from error
    return Path(folder), Path(folder).name


def read(
    folder: Path, name: str, dtype: torch.dtype, device: torch.device
) -> tuple["LlamaForCausalLM", "PreTrainedTokenizerBase"]:
    """Configuration, tokenizer and weights of a folder, the weights in their final form at once."""
    from transformers import AutoConfig, AutoTokenizer, LlamaForCausalLM
    from transformers.utils import logging

    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True)
    except Exception as error:
        raise RunError(f"{name}: config.json cannot be read: {_first_line(error)}") from error
    refuse_unsupported(config, name)
    if not any(folder.glob("*.safetensors")):
        raise RequestError(f"{name} has no .safetensors weights in {folder}")
    bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        with progress(f"loading {name}", every=5):
            tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
            model = LlamaForCausalLM.from_pretrained(
                folder,
                config=config,
                dtype=dtype,
                device_map={"": device},
                attn_implementation="sdpa",
                local_files_only=True,
            )
    except Exception as error:
        raise RunError(f"{name} cannot be loaded: {_first_line(error)}") from error
    finally:
        if bars:
            logging.enable_progress_bar()
    if not tokenizer.is_fast:
        raise RequestError(f"{name} has no fast tokenizer (tokenizer.json)")
    return model, tokenizer


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def refuse_unsupported(config: Any, name: str) -> None:
    """Refuses what one of the two views would silently compute wrongly."""
    if config.model_type != "llama":
        raise RequestError(
            f"{name} is of model_type {config.model_type!r}; only 'llama' is supported "
            "(Llama 2 and 3, SmolLM2, and others of that architecture)"
        )
    rope = config.rope_parameters or {}
    if rope.get("rope_type") not in ("default", "llama3"):
        raise RequestError(
            f"{name} has rope_type {rope.get('rope_type')!r}; known are 'default' and 'llama3'"
        )
    wrong = {
        "attention_bias": config.attention_bias,
        "mlp_bias": config.mlp_bias,
        "quantization_config": getattr(config, "quantization_config", None),
        "partial_rotary_factor": rope.get("partial_rotary_factor", 1.0) != 1.0,
    }
    for key, value in wrong.items():
        if value:
            raise RequestError(
                f"{name} sets {key}, which the TransformerLens view would leave out: "
                "its results would be wrong"
            )
    if config.hidden_act != "silu":
        raise RequestError(f"{name} has hidden_act {config.hidden_act!r}; only 'silu' is supported")
