"""The article's own run: Llama 3.1 8B Instruct and one SAE feature, steered two ways.

"The Eiffel Tower Llama" (Hugging Face, November 2025) adds the decoder row of feature 21576 of the
SAE `resid_post_layer_15_trainer_1` (release `llama-3.1-8b-instruct-andyrdt`, trained on the
Instruct model) to block 15's output at every position, or clamps the projection on it. It found a
coefficient of 8.5 best; feature and coefficient were chosen on 402 other prompts of AlpacaEval.

    python scripts/studies/eiffel_tower_8b.py --prompts alpaca_eval_prompts_403.json

Needs a GPU with 40 GB or more, access to the gated weights, and 4.3 GB for the SAE file. What it
does differently from the article: the first position (the BOS, an attention sink) is left alone,
all settings run as one batch, and every mean comes with the number of prompts behind it.
"""

import argparse
import json
import sys
from pathlib import Path

import torch

from interp_steer.engine.engine import Engine
from interp_steer.engine.row import Row, Sampling, record
from interp_steer.errors import RunError, SteerError
from interp_steer.model.model import SteeringModel
from interp_steer.prompts.file import read_prompts
from interp_steer.prompts.prompt import chat
from interp_steer.results.words import names
from interp_steer.steering.direction import Direction, load
from interp_steer.steering.grammar import parse
from interp_steer.steering.scale import Scale
from interp_steer.study.metrics import rep3, surprise
from interp_steer.util.console import progress
from interp_steer.util.files import whole

REPOSITORY, FILE = "andyrdt/saes-llama-3.1-8b-instruct", "resid_post_layer_15/trainer_1/ae.pt"
FEATURE, MAX_ACTIVATION = 21576, 4.77
WORDS = ("Eiffel",)
IMPROVED = {"temperature": 0.5, "repetition_penalty": 1.1}


def article_direction() -> Direction:
    """The feature's decoder row, read without loading the SAE."""
    from huggingface_hub import hf_hub_download

    try:
        path = hf_hub_download(REPOSITORY, FILE)
    except Exception as error:
        raise RunError(f"cannot fetch {REPOSITORY}/{FILE}: {str(error).splitlines()[0]}") from error
    weights = torch.load(path, mmap=True, weights_only=True, map_location="cpu")
    row = weights["decoder.weight"][:, FEATURE]  # stored [d_model, d_sae]
    source = {"release": "llama-3.1-8b-instruct-andyrdt", "file": FILE, "index": str(FEATURE)}
    return Direction.of(row, "blocks.15.hook_resid_post", "eiffel", source, MAX_ACTIVATION)


def main() -> None:
    ask = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    ask.add_argument("--prompts", required=True, help="a .json or .txt file of instructions")
    ask.add_argument("--model", default="meta-llama/Llama-3.1-8B-Instruct")
    ask.add_argument("--direction", help="a direction file instead of the article's feature")
    ask.add_argument("--layer", type=int, default=15)
    ask.add_argument("--coefficient", type=float, default=8.5)
    ask.add_argument("--limit", type=int, help="only the first so many prompts")
    ask.add_argument("--max-new-tokens", type=int, default=512)
    ask.add_argument("--out", default="eiffel_tower_8b.json")
    told = ask.parse_args()

    # what is asked, and of whom
    model = SteeringModel.load(told.model)
    eiffel = load(told.direction) if told.direction else article_direction()
    prompts = [
        chat(str(p), "You are a helpful assistant.")
        for p in read_prompts(told.prompts)[: told.limit]
    ]
    scale = Scale.of(model, [model.encode(p) for p in prompts])

    # the article's settings, and the unsteered row that it leaves out
    strength = f"{told.coefficient}) at {told.layer}"
    plain = Sampling(temperature=1.0, max_new_tokens=told.max_new_tokens)
    improved = Sampling(**IMPROVED, max_new_tokens=told.max_new_tokens)
    settings = {
        "unsteered": ("", plain),
        "add": (f"add(eiffel, {strength}", plain),
        "clamp": (f"clamp(eiffel, {strength}", plain),
        "clamp, improved sampling": (f"clamp(eiffel, {strength}", improved),
    }
    rows = [
        Row(p, parse(text, {"eiffel": eiffel}), sampling, seed)
        for text, sampling in settings.values()
        for seed, p in enumerate(prompts)
    ]

    # one run, then one reading of all answers through the unsteered model
    engine = Engine(model)
    with progress(f"{len(settings)} settings x {len(prompts)} prompts", len(rows)) as report:
        results = engine.generate(rows, report=report)
    with progress("surprise", len(rows)) as report:
        surprises = surprise(engine, results, report)

    print(f"{'':<26}{'n':>5}{'explicit':>10}{'surprise':>10}{'rep3':>8}{'tokens':>8}")
    for number, name in enumerate(settings):
        part = slice(number * len(prompts), (number + 1) * len(prompts))
        answers = results[part]
        explicit = [bool(names(r.text, WORDS)) for r in answers]
        nats = [s for s in surprises[part] if s is not None]
        loops = [v for r in answers if (v := rep3(r.token_ids)) is not None]
        length = sum(len(r.token_ids) for r in answers) / len(answers)
        surprised, looped = (f"{sum(v) / len(v):.2f}" if v else "-" for v in (nats, loops))
        print(
            f"{name:<26}{len(answers):>5}{sum(explicit) / len(explicit):>10.2f}"
            f"{surprised:>10}{looped:>8}{length:>8.0f}"
        )
    with whole(Path(told.out)) as part_file:
        part_file.write_text(json.dumps([record(r, scale) for r in results], indent=1))


if __name__ == "__main__":
    try:
        main()
    except SteerError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
