"""From a name to weights in memory, and what is refused on the way."""

import copy
import json
import os
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from interp_steer.errors import RequestError, RunError, first_line, nearest
from interp_steer.model.device import KINDS
from interp_steer.model.shape import Bounds
from interp_steer.util.console import in_notebook, progress

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM, PreTrainedTokenizerBase

FORMATS = ("F32", "BF16", "F16", "F64")  # of weights, as safetensors names them


def find_folder(name: str, revision: str | None, weights: bool = True) -> tuple[Path, str]:
    """The folder with the files of a model, fetched if need be, and its commit.

    Args:
        weights: whether to fetch the weights too.
    """
    if not name.strip():
        raise RequestError("the model's name is empty; expected 'starter', a folder or a hub id")
    # os.path takes what can be no file's name, such as a very long one, for one that is not there
    path = Path(os.path.expanduser(name))
    there = os.path.exists(path)
    if revision is not None and (name == "starter" or there):
        raise RequestError(
            f"revision {revision!r} is of a model on the hub, and {name} is a folder here, which "
            "has one state: leave the revision out, or name the model by its hub id"
        )
    if name == "starter":
        from interp_steer.model import starter

        return starter.folder(), ""
    if os.path.isfile(path / "config.json"):
        return path, ""
    if there:
        refuse_adapter(path, name)
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
            allow_patterns=["*.json", "*.jinja", *["*.safetensors"] * weights],
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
        raise RunError(f"cannot fetch {name}: {first_line(error)}") from error
    return Path(folder), Path(folder).name


def glance(name: str, revision: str | None = None) -> Bounds | None:
    """What a model's configuration says of its sites, read in a moment; None where the file is not
    on this machine, or is not as expected: loading says what is wrong then.
    """
    with suppress(Exception):
        path = _config(name, revision)
        told = json.loads(path.read_text(encoding="utf-8"))
        heads = int(told["num_attention_heads"])
        width = int(told["hidden_size"])
        return Bounds(
            name, int(told["num_hidden_layers"]), heads, width,
            int(told.get("head_dim") or width // heads),
        )  # fmt: skip
    return None


def _config(name: str, revision: str | None) -> Path:
    """The configuration's file, if it is on this machine; some path that is not there, if not."""
    if name == "starter":
        from interp_steer.model import starter

        return starter.place() / "config.json"
    path = Path(os.path.expanduser(name)) / "config.json"
    if path.is_file() or name.count("/") != 1:
        return path
    from huggingface_hub import try_to_load_from_cache

    return Path(str(try_to_load_from_cache(name, "config.json", revision=revision)))


def has_weights(folder: Path) -> bool:
    """Whether a folder holds weights: every file that their index names, if there is an index."""
    index = folder / "model.safetensors.index.json"
    with suppress(Exception):  # a damaged index is told when the weights are read
        parts = set(json.loads(index.read_text())["weight_map"].values())
        return all((folder / part).is_file() for part in parts)
    return any(folder.glob("*.safetensors"))


def read(
    folder: Path, name: str, dtype: torch.dtype, device: torch.device, weights: bool = True
) -> tuple["LlamaForCausalLM", "PreTrainedTokenizerBase"]:
    """Configuration, tokenizer and weights of a folder, the weights in their final form at once.

    Args:
        weights: False for a model on the meta device, whose parameters have shapes and no values.

    Raises:
        RequestError: a kind of model that is not supported, or an adapter beside the weights.
        RunError: files that cannot be read, or whose tensors are not those of the configuration.
    """
    config = configuration(folder, name)
    if not weights:
        return _outline(folder, name, config, dtype)
    if not any(folder.glob("*.safetensors")):
        raise RequestError(f"{name} has no .safetensors weights in {folder}")
    refuse_other_formats(folder, name)
    from transformers import AutoTokenizer, LlamaForCausalLM

    try:
        with progress(f"loading {name}", every=5), _quiet():
            tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
            loaded: Any = LlamaForCausalLM.from_pretrained(
                folder,
                config=config,
                dtype=dtype,
                device_map={"": device},
                attn_implementation="sdpa",
                local_files_only=True,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # to name them below
            )
    except Exception as error:
        reason = next(_damaged(folder), first_line(error))
        raise RunError(f"{name} cannot be loaded: {reason}") from error
    model, found = loaded
    refuse_other_tensors(found, name)
    refuse_slow(tokenizer, name)
    return model, tokenizer


def configuration(folder: Path, name: str) -> Any:
    """The `LlamaConfig` of a folder.

    Raises:
        RequestError: a kind of model that is not supported, or an adapter beside the weights.
        RunError: it cannot be read.
    """
    if (
        in_notebook()
    ):  # progress is shown here without widgets, which tqdm asks for as it is imported
        warnings.filterwarnings("ignore", message="IProgress not found")
    from transformers import AutoConfig

    refuse_adapter(folder, name)
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True)
    except Exception as error:
        raise RunError(f"{name}: config.json cannot be read: {first_line(error)}") from error
    refuse_unsupported(config, name)
    return config


def _outline(
    folder: Path, name: str, config: Any, dtype: torch.dtype
) -> tuple["LlamaForCausalLM", "PreTrainedTokenizerBase"]:
    """A model without weights, and the tokenizer of its folder."""
    from transformers import AutoTokenizer, LlamaForCausalLM

    try:
        with _quiet():
            tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:
        raise RunError(f"{name}: the tokenizer cannot be read: {first_line(error)}") from error
    refuse_slow(tokenizer, name)
    with torch.device("meta"):
        empty: Any = LlamaForCausalLM(config)
    return empty.to(dtype), tokenizer


def refuse_slow(tokenizer: "PreTrainedTokenizerBase", name: str) -> None:
    """Refuses a tokenizer that cannot say which characters a token stands for."""
    if not tokenizer.is_fast:
        raise RequestError(f"{name} has no fast tokenizer (tokenizer.json)")


@contextmanager
def _quiet() -> Iterator[None]:
    """Without transformers' progress bar and its table of tensors: an error here names them."""
    from transformers.utils import logging

    bars, said = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(said)
        if bars:
            logging.enable_progress_bar()


def refuse_adapter(folder: Path, name: str) -> None:
    """Refuses a folder with a LoRA or another adapter, which the two views would not see."""
    found = sorted(file.name for file in folder.glob("adapter_*") if file.is_file())
    if found:
        raise RequestError(
            f"{name} holds an adapter ({found[0]}), which would be left out: merge it with peft's "
            "merge_and_unload(), save_pretrained() the result and load that, or remove "
            f"{' and '.join(found)} to steer the model without it"
        )


def refuse_other_formats(folder: Path, name: str) -> None:
    """Refuses weights of a number format that needs scales: transformers would read them as they
    are where config.json does not say that they are quantised.
    """
    from safetensors import safe_open

    found: list[str] = []
    for file in sorted(folder.glob("*.safetensors")):
        with suppress(Exception), safe_open(file, "pt") as opened:  # loading tells of damage
            kinds = ((key, opened.get_slice(key).get_dtype()) for key in opened.keys())  # noqa: SIM118
            found += [f"{key} {kind}" for key, kind in kinds if kind not in FORMATS]
    if found:
        raise RequestError(
            f"{name} holds weights that are no {', '.join(FORMATS)}: {_some(found)}; 4- and 8-bit "
            "weights are not supported"
        )


def refuse_other_tensors(found: Mapping[str, Any], name: str) -> None:
    """Refuses a checkpoint whose tensors are not those that its config.json describes.

    Args:
        found: the loading report of transformers. It leaves out what does no harm: the
            `rotary_emb.inv_freq` of old checkpoints, the head of a model whose embeddings are tied.
    """
    wrong = {
        "lack": _some(found["missing_keys"]),
        "have besides": _some(found["unexpected_keys"]),
        "have in another shape": _some(
            f"{key} {list(has)} for {list(wants)}" for key, has, wants in found["mismatched_keys"]
        ),
    }
    said = [f"{how} {tensors}" for how, tensors in wrong.items() if tensors]
    said += [first_line(Exception(message)) for message in list(found["error_msgs"])[:1]]
    if said:
        headless = set(found["missing_keys"]) == {"lm_head.weight"}
        correct = "'tie_word_embeddings': true in" if headless else "the names in the file or"
        raise RunError(
            f"{name}: the weights are not those of its config.json: they {'; they '.join(said)}; "
            f"fetch or export the model again, or correct {correct} config.json"
        )


def _damaged(folder: Path) -> Iterator[str]:
    """Which files of weights are cut short, and how that shows."""
    from safetensors import safe_open

    for file in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(file, framework="pt"):
                pass
        except Exception as error:
            yield f"{file.name} is damaged or cut short: {first_line(error)}"


def refuse_wrong_weights(hf: "LlamaForCausalLM", name: str) -> None:
    """Refuses a model in memory that is not what its configuration says, or holds no numbers.

    A model without weights (all on the meta device) passes: its shapes are known.

    Raises:
        RequestError: another class, other parameters than the configuration's, layers of another
            type (an adapter, quantised), or weights on several devices or of several dtypes.
        RunError: weights that are not finite.
    """
    from transformers import LlamaForCausalLM

    if not isinstance(hf, LlamaForCausalLM):
        raise RequestError(
            f"{name} is a {type(hf).__name__}, expected a LlamaForCausalLM: load it with "
            "LlamaForCausalLM.from_pretrained; merge an adapter with merge_and_unload()"
        )
    for part, module in hf.named_modules():
        if part.endswith(("_proj", "lm_head")) and type(module) is not torch.nn.Linear:
            raise RequestError(
                f"{part} of {name} is a {type(module).__name__}, expected a Linear: both views "
                "read plain weights; merge an adapter into them first"
            )
    with torch.device("meta"):
        empty = LlamaForCausalLM(copy.deepcopy(hf.config))
    wanted = {key: weight.shape for key, weight in empty.state_dict().items()}
    found = {key: weight.shape for key, weight in hf.state_dict().items()}
    differ = {key for key in wanted.keys() | found.keys() if wanted.get(key) != found.get(key)}
    if differ:
        raise RequestError(
            f"the parameters of {name} are not those of its config, which differs in "
            f"{_some(differ)}: set hf.config to what the model is"
        )
    for what in ("device", "dtype"):
        several = {str(getattr(weight, what)) for weight in hf.parameters()}
        if len(several) > 1:
            raise RequestError(
                f"{name} has weights of several {what}s ({', '.join(sorted(several))}); both views "
                f"need one: hf.to({what})"
            )
    if (kind := hf.lm_head.weight.dtype) not in KINDS.values() and kind != torch.float64:
        raise RequestError(f"{name} has weights of {kind}; expected {', '.join(KINDS)}")
    rotary = hf.model.rotary_emb
    if not rotary.inv_freq.is_meta:
        right, used = type(rotary)(hf.config).inv_freq.double(), rotary.inv_freq.double().cpu()
        if not torch.allclose(used, right, rtol=1e-6, atol=0):
            raise RequestError(
                f"the rotary frequencies of {name} are not those of its config: hf.to(dtype) or "
                ".half() rounds them; load it with from_pretrained(..., dtype=...)"
            )
    wrong = [k for k, weight in hf.named_parameters() if not _is_finite(weight)]
    if wrong:
        raise RunError(
            f"{name} has weights that are no numbers (NaN or infinite): {_some(wrong)}; "
            "fetch or export the model again"
        )


@torch.no_grad()
def _is_finite(weight: torch.Tensor) -> bool:
    if weight.is_meta:
        return True
    low, high = torch.aminmax(weight)  # both are NaN where one number is; needs no second tensor
    return bool(torch.isfinite(low) & torch.isfinite(high))


def _some(names: Iterable[str], shown: int = 3) -> str:
    """The first names, and how many more there are."""
    every = sorted(names)
    more = f" and {len(every) - shown} more" if len(every) > shown else ""
    return ", ".join(every[:shown]) + more


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
