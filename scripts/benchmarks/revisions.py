# %% [markdown]
# Two checkouts of this project side by side: the same rows on the same machine, in turns, a process
# each. It says how the second one's times compare with the first one's.
#
#     git worktree add ../before HEAD~1
#     python scripts/benchmarks/revisions.py ../before . --repeats 5
#     python scripts/benchmarks/revisions.py ../before . sweep mixed --dtype bfloat16 --json
#
# Only what both checkouts have in public is used: rows, engine, interventions.

# %%
import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

PLACE = "Please describe a long and quiet walk through a small forest."
WORD = " and then one more"
LENGTHS = (5, 12, 25, 50, 100, 150, 250, 400)  # of the prompts of `mixed`
CASES = {
    "decode 1": "1 row, 64 tokens",
    "decode 8": "8 rows, 64 tokens",
    "decode 32": "32 rows, 64 tokens",
    "decode 128": "128 rows, 64 tokens",
    "sweep": "1 prompt, 240 settings, 32 tokens",
    "mixed": "8 prompts of 5 to 400 tokens, 30 settings each, 32 tokens",
    "score late": "64 rows of one 67-token prompt steered from its end, 8 tokens read",
    "score pairs": "64 settings of one 67-token prompt, 4 answers each read",
    "score mixed": "8 prompts of 5 to 400 tokens, 4 settings each, 16 tokens read",
}


# %% [markdown]
# What a process does: it reads a case's name, and answers with seconds and what came out.


# %%
def worker(dtype: str) -> None:
    import torch

    from interp_steer import Direction, Engine, Row, Sampling, SteeringModel, steer

    model = SteeringModel.load("starter", dtype=dtype)
    vars(model)["stop_ids"] = ()  # every row generates all its tokens
    engine = Engine(model)

    def prompt(tokens: int) -> str:
        text = PLACE
        while len(model.encode(text).ids) < tokens:
            text += WORD
        return model.decode(model.encode(text).ids[:tokens])

    def setting(number: int, on: str = "all") -> tuple:
        layer, seed = number % model.n_layers, number // model.n_layers
        draw = torch.Generator().manual_seed(seed)
        hook = f"blocks.{layer}.hook_resid_post"
        vector = Direction.of(torch.randn(model.d_model, generator=draw), hook, f"v{seed}")
        return (steer("add", vector, coefficient=20.0, at=layer, on=on),)

    def rows(prompts: list[str], settings: list[tuple], new: int) -> list:
        sampling = Sampling(max_new_tokens=new)
        return [Row(p, s, sampling) for p in prompts for s in settings]

    settings = [setting(n) for n in range(240)]
    long, answer = prompt(67), list(range(100, 108))
    late = [setting(n, "generated") for n in range(64)]
    mixed = [prompt(n) for n in LENGTHS]
    answers = [[100 + n, *range(200, 204)] for n in range(4)]
    given = {
        "score late": (rows([long], late, 1), [answer] * 64),
        "score pairs": (
            rows([long] * 4, settings[:64], 1),
            [a for a in answers for _ in range(64)],
        ),
        "score mixed": (rows(mixed, settings[100:104], 1), [list(range(100, 116))] * 32),
    }
    work = {
        **{f"decode {n}": rows([PLACE], settings[100 : 100 + n], 64) for n in (1, 8, 32, 128)},
        "sweep": rows([PLACE], settings, 32),
        "mixed": rows(mixed, settings[::8], 32),
    }
    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        case = line.strip()
        begun = time.perf_counter()
        if case in work:
            out = [list(r.token_ids) for r in engine.generate(work[case])]
        else:
            out = [s.logprobs.tolist() for s in engine.score(*given[case])]
        print(json.dumps({"seconds": time.perf_counter() - begun, "out": out}), flush=True)


class Checkout:
    """A process that runs one checkout's code."""

    def __init__(self, folder: Path, dtype: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, Path(__file__), "--worker", "--dtype", dtype],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            env={**os.environ, "PYTHONPATH": str(folder.resolve())},
        )  # fmt: skip
        self.reply()

    def reply(self) -> dict:
        line = self.process.stdout.readline()
        if not line:
            sys.exit("a process ended; its error is above")
        return json.loads(line)

    def run(self, case: str) -> dict:
        print(case, file=self.process.stdin, flush=True)
        return self.reply()


def agreement(before: list, after: list) -> str:
    """How many rows came out alike: tokens to the bit, log probabilities to 1e-3."""
    alike = sum(
        len(x) == len(y) and all(abs(p - q) <= 1e-3 for p, q in zip(x, y, strict=True))
        for x, y in zip(before, after, strict=True)
    )
    return f"{alike} of {len(before)}"


# %%
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("before", nargs="?", type=Path, help="folder of one checkout")
    parser.add_argument("after", nargs="?", type=Path, help="folder of the other")
    parser.add_argument("cases", nargs="*", help=f"of {', '.join(CASES)}; all by default")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.worker:
        worker(given.dtype)
        return
    if unknown := [case for case in given.cases if case not in CASES]:
        parser.error(f"unknown case {unknown[0]!r}; choose from {', '.join(CASES)}")
    sides = [Checkout(folder, given.dtype) for folder in (given.before, given.after)]
    for side in sides:  # a first run is slower
        side.run("decode 1")
    table = []
    for case in given.cases or CASES:
        outs: list[list] = [[], []]
        took: list[list[float]] = [[], []]
        for repeat in range(given.repeats):
            for n in (0, 1) if repeat % 2 else (1, 0):
                reply = sides[n].run(case)
                took[n].append(reply["seconds"])
                outs[n] = reply["out"]
        ratios = [after / before for before, after in zip(*took, strict=True)]
        row = {
            "case": case,
            "before": statistics.median(took[0]),
            "after": statistics.median(took[1]),
            "ratio": statistics.median(ratios),
            "least": min(ratios),
            "most": max(ratios),
            "alike": agreement(*outs),
        }
        table.append(row)
        if not given.json:
            print(
                f"{case:12} {row['before']:8.2f} s {row['after']:8.2f} s  ratio {row['ratio']:.3f} "
                f"({row['least']:.3f}-{row['most']:.3f})  alike {row['alike']}  {CASES[case]}",
                flush=True,
            )
    if given.json:
        print(json.dumps(table, indent=1))


if __name__ == "__main__":
    main()
