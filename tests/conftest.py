"""Models for the tests: a random tiny Llama with everything that Llama 3.1 has, and the starter."""

import os

# before torch: spinning OpenMP threads make short steps slow on a busy machine
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ["HF_HUB_OFFLINE"] = "1"
if "PYTEST_XDIST_WORKER" in os.environ:  # several share the cores; for their processes as well
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import contextlib
import io
import json
import sys
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch

from interp_steer.model.model import SteeringModel

if TYPE_CHECKING:
    from transformers import LlamaConfig

if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)


def pytest_configure(config: pytest.Config) -> None:
    """Without `-m gpu` the tests run on the CPU, also on a machine with a GPU."""
    if config.option.markexpr != "gpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}"
    "<|start|>{{ m['role'] }}\n{{ m['content'] | trim }}<|end|>"
    "{% endfor %}{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)
CORPUS = [
    "The quick brown fox jumps over the lazy dog.",
    "user assistant system You are a helpful assistant.",
    "What is the tallest mountain, and who climbed it first? Name three fruits.",
    "I love the tower; I hate the rain. Yes, no, maybe: happy and sad.",
]


def make_llama(folder: Path, dtype: torch.dtype = torch.float32, seed: int = 0, **changes) -> Path:
    """A random Llama in the shape of 3.1: GQA, llama3 rope, untied embeddings, BOS, stop ids."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|begin|>", "<|end|>", "<|start|>", "<|stop|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<|begin|> $A", special_tokens=[("<|begin|>", 0)]
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<|begin|>", eos_token="<|end|>"
    )
    fast.chat_template = TEMPLATE
    settings = {
        "vocab_size": len(fast),
        "hidden_size": 64,
        "intermediate_size": 160,
        "num_hidden_layers": 6,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 24,  # not hidden_size / heads
        "max_position_embeddings": 512,
        "rms_norm_eps": 1e-5,
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 10000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 128,
        },
        "tie_word_embeddings": False,
        "bos_token_id": 0,
        "eos_token_id": [1, 3],
        "initializer_range": 0.15,  # wide enough that logits differ and attention is not flat
    }
    torch.manual_seed(seed)
    model = LlamaForCausalLM(LlamaConfig(**{**settings, **changes})).to(dtype)
    model.generation_config.eos_token_id = [1, 3]
    model.save_pretrained(folder)
    fast.save_pretrained(folder)
    return folder


def config_8b(**more) -> "LlamaConfig":
    """The configuration of Llama 3.1 8B."""
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32,
        num_attention_heads=32, num_key_value_heads=8, max_position_embeddings=131072,
        rms_norm_eps=1e-5, tie_word_embeddings=False,
        rope_parameters={
            "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0,
            "high_freq_factor": 4.0, "original_max_position_embeddings": 8192,
        },
        **more,
    )  # fmt: skip


def hf_streams(model: SteeringModel, ids: tuple[int, ...]) -> list[torch.Tensor]:
    """The stream [1, pos, d_model] before block 0 and after each block, from Hugging Face alone."""
    last = []
    hook = model.hf.model.layers[-1].register_forward_hook(
        lambda _m, _i, out: last.append(out[0] if isinstance(out, tuple) else out)
    )
    with torch.no_grad():
        states = model.hf(torch.tensor([ids]), output_hidden_states=True).hidden_states
    hook.remove()
    return [*states[:-1], last[0]]  # Hugging Face's last one is after the final norm


def state(model: SteeringModel) -> dict[str, object]:
    """What a study could leave on a model: attributes, weights that were written to or replaced,
    gradients, modes, and hooks on either view.
    """
    views = {"hf": model.hf, "hooked": model.hooked}  # the second is made when first asked for
    kept = {name for name, of in vars(SteeringModel).items() if isinstance(of, cached_property)}
    found: dict[str, object] = {"attributes": set(vars(model)) - kept}
    for name, view in views.items():
        for part, module in view.named_modules():
            hooks = len(module._forward_hooks) + len(module._forward_pre_hooks)
            own = len(getattr(module, "fwd_hooks", ())) + len(getattr(module, "bwd_hooks", ()))
            found[f"{name} {part}"] = hooks, own, module.training, set(vars(module))
        for part, weight in view.named_parameters():
            seen = weight.data_ptr(), weight._version, weight.requires_grad, weight.grad is None
            found[f"{name} {part} weight"] = seen
    return found


def command(*words: object, code: int = 0) -> tuple[str, str]:
    """What a command that ends with an exit code prints on stdout and on stderr."""
    from interp_steer.cli import main as cli

    out, err = io.StringIO(), io.StringIO()
    with (
        pytest.MonkeyPatch.context() as patch,
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
        pytest.raises(SystemExit) as ended,
    ):
        patch.setattr(sys, "argv", ["interp-steer", *map(str, words)])
        cli.main()
    assert ended.value.code == code, err.getvalue()
    return out.getvalue(), err.getvalue()


def error(code: int, *words: object) -> str:
    """The error of a command that must end with one clear line and nothing on stdout."""
    out, err = command(*words, code=code)
    assert out == "" and "Traceback" not in err
    (line,) = [line for line in err.splitlines() if line.startswith("error: ")]
    assert line == err.splitlines()[-1]
    return line


def memory(entry: str) -> int:
    """Bytes that this process has in memory (`VmRSS`), or had at its peak (`VmHWM`)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(entry))


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_llama(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def tiny(tiny_folder: Path) -> SteeringModel:
    return SteeringModel.load(str(tiny_folder), dtype="float32", device="cpu")


@pytest.fixture(scope="session")
def starter() -> SteeringModel:
    return SteeringModel.load("starter", dtype="float32", device="cpu")


@pytest.fixture
def changed_config(tiny_folder: Path, tmp_path: Path):
    """A function to a copy of the tiny model's folder with other entries in config.json."""

    def changed(**entries) -> str:
        for file in tiny_folder.iterdir():
            if file.name != "config.json":
                (tmp_path / file.name).symlink_to(file)
        config = json.loads((tiny_folder / "config.json").read_text())
        (tmp_path / "config.json").write_text(json.dumps({**config, **entries}))
        return str(tmp_path)

    return changed
