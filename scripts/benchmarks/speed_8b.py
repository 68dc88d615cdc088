# %% [markdown]
# Llama 3.1 8B in shape: random weights of the true configuration, steered decoding beside unsteered
# `transformers.generate` and beside what the memory's bandwidth allows.
#
#     python scripts/benchmarks/speed_8b.py                         # needs a GPU with 24 GB or more
#     python scripts/benchmarks/speed_8b.py --layers 2 --batches 1 8  # on any machine, to try it
#
# The limit: every step reads all weights but the embedding once, and every row's keys and values.

# %%
import argparse
import json
import os
import statistics
import sys
import time

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from interp_steer import Engine, Row, Sampling, SteeringModel, parse
from interp_steer.steering.direction import Direction
from interp_steer.util.console import progress

WORDS = 1000


# %%
def random_model(layers: int, device: str) -> SteeringModel:
    """The configuration of Llama 3.1 8B with random bfloat16 weights; words are w0 to w999."""
    config = LlamaConfig(
        vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=layers,
        num_attention_heads=32, num_key_value_heads=8, max_position_embeddings=131072,
        rms_norm_eps=1e-5, tie_word_embeddings=False, attn_implementation="sdpa",
        rope_parameters={
            "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0,
            "high_freq_factor": 4.0, "original_max_position_embeddings": 8192,
        },
    )  # fmt: skip
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(device):
            hf = LlamaForCausalLM(config)
    finally:
        torch.set_default_dtype(torch.float32)
    hf.generation_config.eos_token_id = None  # nobody stops early
    hf.generation_config.pad_token_id = 0
    vocabulary = {f"w{i}": i for i in range(WORDS)}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return SteeringModel(hf, PreTrainedTokenizerFast(tokenizer_object=words), "llama-3.1-8b shape")


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def bandwidth(device: torch.device) -> float:
    """Bytes a second that a large copy reads and writes."""
    size = 2**32 if device.type == "cuda" else 2**28
    source = torch.ones(size // 4, device=device)
    target = torch.empty_like(source)
    best = 0.0
    for _ in range(5):
        wait(device)
        begun = time.perf_counter()
        target.copy_(source)
        wait(device)
        best = max(best, 2 * size / (time.perf_counter() - begun))
    return best


def limit(model: SteeringModel, batch: int, context: float, rate: float) -> float:
    """Tokens a second if a step took no longer than its reading."""
    wide = model.dtype.itemsize
    read = sum(p.numel() for p in model.hf.parameters()) - model.d_vocab * model.d_model
    kept = 2 * model.n_layers * model.n_kv_heads * model.d_head * context * batch
    return batch * rate / ((read + kept) * wide)


# %%
if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Llama 3.1 8B in shape.")
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 32, 256])
    parser.add_argument("--prompt", type=int, default=64, help="tokens of a prompt")
    parser.add_argument("--new", type=int, default=128, help="tokens of an answer")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", action="store_true", help="print JSON for programs")
    given = parser.parse_args()
    if given.device == "cpu" and given.layers > 4:
        sys.exit("error: no GPU here: the whole model would take hours; try it with --layers 2")
    model = random_model(given.layers, given.device)
    engine, device = Engine(model), model.device
    rate = bandwidth(device)
    vector = torch.randn(model.d_model, generator=torch.Generator().manual_seed(0))
    directions = {"v": Direction.of(vector, "blocks.0.hook_resid_post", "v")}
    text = " ".join(f"w{i}" for i in range(1, given.prompt + 1))
    ids = torch.tensor([model.encode(text).ids], device=device)
    found = []
    for batch in given.batches:
        rows = [  # every row under a setting of its own
            Row(
                text,
                parse(f"add(v, {1 + i / 100}) at {i % given.layers}", directions),
                Sampling(max_new_tokens=given.new),
            )
            for i in range(batch)
        ]

        def steered(rows: list = rows, batch: int = batch) -> None:
            engine.generate(rows, batch=batch)

        def unsteered(batch: int = batch) -> None:
            many = ids.expand(batch, -1)
            with torch.no_grad():
                model.hf.generate(
                    many, attention_mask=torch.ones_like(many), do_sample=False,
                    max_new_tokens=given.new,
                )  # fmt: skip

        calls = {"steered": steered, "unsteered": unsteered}
        times: dict[str, list[float]] = {name: [] for name in calls}
        peak = 0
        with progress(f"batch {batch}", given.repeats) as report:
            for repeat in range(-1, given.repeats):  # the first is a warm-up
                for name in list(calls)[:: -1 if repeat % 2 else 1]:
                    if device.type == "cuda":
                        torch.cuda.reset_peak_memory_stats(device)
                    wait(device)
                    begun = time.perf_counter()
                    calls[name]()
                    wait(device)
                    if repeat >= 0:
                        times[name].append(time.perf_counter() - begun)
                    if name == "steered" and device.type == "cuda":
                        peak = max(peak, torch.cuda.max_memory_allocated(device))
                report(repeat + 1)
        tokens = {n: batch * given.new / statistics.median(t) for n, t in times.items()}
        most = limit(model, batch, given.prompt + given.new / 2, rate)
        found.append({"batch": batch, **tokens, "limit": most, "peak": peak, "seconds": times})
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    about = {"device": name, "layers": given.layers, "bandwidth": rate, "found": found}
    if given.json:
        print(json.dumps(about))
        sys.exit()
    print(f"{name}, {given.layers} layers, bandwidth {rate / 1e9:.0f} GB/s; medians\n")
    print("| batch | steered, tokens/s | unsteered transformers | ratio | of the limit | peak |")
    print("|---|---|---|---|---|---|")
    for one in found:
        peak = f"{one['peak'] / 2**30:.1f} GiB" if one["peak"] else "not read"
        ratio, share = one["steered"] / one["unsteered"], one["steered"] / one["limit"]
        print(
            f"| {one['batch']} | {one['steered']:.1f} | {one['unsteered']:.1f} | {ratio:.2f} "
            f"| {share:.0%} | {peak} |"
        )
