"""How often a study declares that a random direction steers: at most 5 % is what p <= 0.05 means.

Each random direction goes through the whole pipeline: the grid on `choose` prompts, the choice of
the best cell, the controls and the verdict on `prove` prompts. Beside it: how often the same
numbers would be declared if the choice among cells were not accounted for.

    python scripts/studies/null_studies.py --studies 200

The statistics do not care what the model knows, so it is a small one with random weights, unless
--model names another.
"""

import argparse
import json
import os
import tempfile
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch

import numpy as np
import torch

from interp_steer import Controls, Direction, DirectionSet, SteeringModel, Study, read_items
from interp_steer.stats import intervals as statistics
from interp_steer.util.console import progress

TEXTS = Path(__file__).parent / "texts"
NULLS = 19


def study(number: int, layers: list[int], width: int) -> Study:
    """A study of a random direction, another one at each layer."""
    draw = torch.Generator().manual_seed(1_000_000 + number)
    directions = DirectionSet(
        Direction.of(torch.randn(width, generator=draw), f"blocks.{layer}.hook_resid_post", "d")
        for layer in layers
    )
    items = read_items(TEXTS / "feelings.jsonl")
    return Study(
        choose=items[:10],
        prove=items[10:22],
        directions={"d": directions},
        sites=layers,
        coefficients=["0.3 dose", "0.6 dose"],
        metrics="logit_difference",
        controls=Controls(
            random=NULLS, selected=NULLS, flip=False, wrong_layer=False, seed=number + 1
        ),
        as_chat=False,
        chunk=256,
    )


def random_model() -> SteeringModel:
    """A Llama of 6 layers with random weights and the starter's tokenizer."""
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = SteeringModel.load("starter").tokenizer
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=160,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=False,
        initializer_range=0.15,  # wide enough that activations matter
    )
    return SteeringModel(LlamaForCausalLM(config), tokenizer, name="random")


def main() -> None:
    """Runs the studies and prints the shares that were declared to steer."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--studies", type=int, default=200)
    parser.add_argument("--model", default="random")
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    model = random_model() if given.model == "random" else SteeringModel.load(given.model)
    layers = [round(model.n_layers * share) for share in (0.4, 0.6, 0.8)]
    declared, naive, rare, rare_at_cell = [], [], [], []
    with progress("null studies", given.studies) as report:
        for number in range(given.studies):
            with tempfile.TemporaryDirectory() as folder:
                found = study(number, layers, model.d_model).run(model, folder).findings()
            declared.append(bool(found.verdict.steers))
            at_cell = found.p[found.p["control"] == "random"]["p"].iloc[0]
            claim = found.claims[found.claims["role"] == "chosen"].iloc[0]
            naive.append(bool(at_cell <= 0.05 and claim["low"] > 0))
            rare.append(found.verdict.p is not None and found.verdict.p <= 0.05)
            rare_at_cell.append(bool(at_cell <= 0.05))
            report(number + 1)
    told = {
        "declared to steer": statistics.rate(np.array(declared)),
        "by p alone, without the interval on the prompts": statistics.rate(np.array(rare)),
        "declared if the choice of the cell were not accounted for": statistics.rate(
            np.array(naive)
        ),
        "by p alone, if it were not accounted for": statistics.rate(np.array(rare_at_cell)),
    }
    if given.json:
        print(json.dumps({name: one.as_json() for name, one in told.items()}, indent=1))
        return
    print(f"{given.studies} random directions, {2 * len(layers)} cells, {NULLS} nulls each")
    for name, one in told.items():
        print(f"{one}  {name}")


if __name__ == "__main__":
    main()
