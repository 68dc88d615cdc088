# %% [markdown]
# What one decoder row costs in each layout that SAELens reads: time, and memory at the peak. Files
# of 4096 x 32768 full of zeros are made in a temporary folder (2.5 GB, mostly holes).
#
#     python scripts/benchmarks/rows.py
#
# Each layout runs in a process of its own, so that peaks do not add up.

# %%
import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
import yaml

from interp_steer.features.decoder import LAYOUTS
from interp_steer.features.hub import Folder
from interp_steer.labels.registry import Entry

WIDTH, LATENTS = 4096, 32768
HOOK = "blocks.15.hook_resid_post"


# %%
def safetensors(path: Path, key: str, shape: list[int], dtype: str, size: int) -> None:
    """A file with one tensor of zeros, as a hole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    end = shape[0] * shape[1] * size
    about = {key: {"dtype": dtype, "shape": shape, "data_offsets": [0, end]}}
    header = json.dumps(about).encode()
    with path.open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + end)


def make(layout: str, folder: Path) -> Entry:
    """The files of a layout; an entry of the registry that leads to them."""
    path, factor = "", None
    if layout == "sae_lens":
        settings = {"hook_name": HOOK, "architecture": "standard", "normalize_activations": "none"}
        (folder / "cfg.json").write_text(json.dumps(settings))
        safetensors(folder / "sae_weights.safetensors", "W_dec", [LATENTS, WIDTH], "F32", 4)
    elif layout == "llama_scope":
        factor = 5.92
        (folder / "hyperparams.json").write_text(json.dumps({"hook_point_in": HOOK}))
        file = folder / "checkpoints" / "final.safetensors"
        safetensors(file, "decoder.weight", [WIDTH, LATENTS], "BF16", 2)
    elif layout == "temporal":
        (folder / "layer_15").mkdir()
        (folder / "layer_15/conf.yaml").write_text(yaml.dump({"sae": {"scaling_factor": 0.5}}))
        file = folder / "layer_15" / "latest_ckpt.safetensors"
        safetensors(file, "D", [LATENTS, WIDTH], "F32", 4)
    elif layout == "dictionary_learning_1":
        (folder / "config.json").write_text(json.dumps({"trainer": {"layer": 15}}))
        torch.save({"decoder.weight": torch.zeros(WIDTH, LATENTS)}, folder / "ae.pt")
    else:
        path = "SAE-l15.pth"
        torch.save({"decoder_linear.weight": torch.zeros(WIDTH, LATENTS)}, folder / path)
    return Entry("release", "id", "", path, layout, "", None, factor)


def peak() -> int:
    """Bytes that this process had in memory at its peak."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


def measure(layout: str, folder: Path, path: str, factor: float | None) -> None:
    """Reads rows and prints milliseconds and bytes as JSON."""
    entry = Entry("release", "id", "", path, layout, "", None, factor)
    prefix = "layer_15/" if layout == "temporal" else ""
    before, times = peak(), []
    for index in range(0, LATENTS, LATENTS // 20):
        begun = time.perf_counter()
        LAYOUTS[layout](Folder(folder), prefix, entry, index)
        times.append(1000 * (time.perf_counter() - begun))
    print(json.dumps([times[0], statistics.median(times), peak() - before]))


# %%
if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="What one decoder row costs.")
    parser.add_argument("--measure", nargs=4, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.measure:
        layout, place, path, factor = given.measure
        measure(layout, Path(place), path, float(factor) if factor else None)
        sys.exit()
    print("| layout | first row | later rows | more memory at the peak |\n|---|---|---|---|")
    for layout in LAYOUTS:
        with tempfile.TemporaryDirectory() as name:
            entry = make(layout, Path(name))
            factor = "" if entry.norm_scaling_factor is None else str(entry.norm_scaling_factor)
            done = subprocess.run(
                [sys.executable, __file__, "--measure", layout, name, entry.path, factor],
                capture_output=True, text=True, check=True,
            )  # fmt: skip
        first, later, more = json.loads(done.stdout)
        print(f"| {layout} | {first:.1f} ms | {later:.1f} ms | {more / 1e6:.1f} MB |")
