# %% [markdown]
# Memory: what loading needs, as a share of the weights, and what a sweep needs at its peak, against
# what `interp-steer study plan` says beforehand.
#
#     python scripts/benchmarks/memory.py
#     python scripts/benchmarks/memory.py --rows 64 --new 128 --json
#
# Peaks are those of the operating system (Linux), each in a process of its own; what the imported
# libraries take (about 0.5 GB) is not counted. `load` is the weights in both views, read whole,
# from a file in their number format (pages of a file in another count too while it is converted),
# without the tokenizer, which has a column of its own.

# %%
import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

DTYPES = ("float32", "bfloat16")


# %%
def memory(entry: str) -> int:
    """Bytes that this process has (`VmRSS`), or had at its peak (`VmHWM`)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(entry))


def save(folder: str, dtype: str) -> None:
    """The starter as a folder in one number format."""
    from interp_steer import SteeringModel

    model = SteeringModel.load("starter", dtype=dtype)
    model.hf.save_pretrained(folder)
    model.tokenizer.save_pretrained(folder)


def measure(folder: str, dtype: str, rows: int, new: int) -> dict[str, float]:
    """Loads a model, plans a sweep of one chunk, runs it."""
    import torch
    import transformer_lens  # noqa: F401  both views' libraries, before anything is counted
    import transformers.models.llama.modeling_llama

    from interp_steer import Engine, SteeringModel
    from interp_steer.engine.row import Sampling
    from interp_steer.steering.direction import Direction
    from interp_steer.study.chunk import measure as run
    from interp_steer.study.plan import Plan, typical
    from interp_steer.study.study import Study

    Path("/proc/self/clear_refs").write_text("5")  # the peak of the imports does not count
    before = memory("VmRSS")
    transformers.AutoTokenizer.from_pretrained(folder)
    tokenizer = memory("VmRSS") - before
    model = SteeringModel.load(folder, dtype=dtype)
    for view in (model.hf, model.hooked):  # weights that nobody reads stay in the file
        for weight in view.parameters():
            weight.detach().as_strided(((weight.numel() - 1) // 1024 + 1,), (1024,)).max()
    weights = sum(p.numel() * p.element_size() for p in model.hf.parameters())
    loaded = memory("VmHWM") - before - tokenizer
    vector = torch.randn(model.d_model, generator=torch.Generator().manual_seed(0))
    study = Study(
        choose=[],
        prove=["Please describe a long and quiet walk through a small forest."],
        directions={"random": Direction.of(vector, "blocks.13.hook_resid_post", "random")},
        sites=f"each 0-{model.n_layers - 1}",
        coefficients=[5.0 + i for i in range(8)],
        sampling=Sampling(max_new_tokens=new),
        metrics=["rep3", "surprise"],
        chunk=rows,
    )
    planned = Plan.of(study, model, timed=False).memory
    chunk = typical(study, model, rows)
    model.__dict__["stop_ids"] = ()  # nobody may stop early
    Path("/proc/self/clear_refs").write_text("5")
    run(Engine(model), chunk)
    peak = memory("VmHWM") - before
    return {
        "load": loaded / weights,
        "weights": weights,
        "tokenizer": tokenizer,
        "planned": planned,
        "peak": peak,
    }


# %%
if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Memory: measured and as planned.")
    parser.add_argument("--rows", type=int, nargs="+", default=[64, 240])
    parser.add_argument("--new", type=int, default=64, help="tokens of an answer")
    parser.add_argument("--json", action="store_true", help="print JSON for programs")
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.one:
        folder, dtype = given.one
        rows = given.rows[0]
        print(json.dumps(measure(folder, dtype, rows, given.new) if rows else save(folder, dtype)))
        sys.exit()
    found = []
    for dtype in DTYPES:
        with tempfile.TemporaryDirectory() as folder:
            for rows in (0, *given.rows):  # 0 saves the model first, in a process of its own too
                asked = [sys.executable, __file__, "--one", folder, dtype]
                asked += ["--rows", str(rows), "--new", str(given.new)]
                done = subprocess.run(asked, stdout=subprocess.PIPE, check=True)
                if rows:
                    found.append({"dtype": dtype, "rows": rows, **json.loads(done.stdout)})
    if given.json:
        print(json.dumps(found))
        sys.exit()
    print("| | rows | load / weights | tokenizer | planned | peak | planned / peak |")
    print("|---|---|---|---|---|---|---|")
    for one in found:
        planned, peak = one["planned"] / 2**30, one["peak"] / 2**30
        print(
            f"| {one['dtype']} | {one['rows']} | {one['load']:.2f} "
            f"| {one['tokenizer'] / 2**20:.0f} MiB | {planned:.2f} GiB | {peak:.2f} GiB "
            f"| {planned / peak:.2f} |"
        )
