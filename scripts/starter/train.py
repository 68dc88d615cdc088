# %% [markdown]
# Trains the starter SAE: a TopK autoencoder of the starter model's residual stream after block 13,
# the block that the demo's grid chose. Chats and documentation come from `texts.py`.
#
#     python scripts/starter/train.py --texts cache/starter_sae \
#         --out interp_steer/data/starter_sae
#
# Afterwards `label.py` writes the labels, and
# `interp-steer sae check starter --texts ...` measures what was saved.

# %%
import argparse
import json
import os
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
from sae_lens import LoggingConfig, TopKTrainingSAE, TopKTrainingSAEConfig
from sae_lens.config import SAETrainerConfig
from sae_lens.training.sae_trainer import SAETrainer

from interp_steer import SteeringModel
from interp_steer.prompts.prompt import Encoded
from interp_steer.util.console import progress

LAYER = 13
LENGTH = 256  # tokens a row; the first one is an attention sink and left out
D_SAE, K = 6144, 48
# file of `texts.py`, how often in a round, at most so many rows
KINDS = (("chats", 4, 4000), ("docs", 1, 1500), ("glosses", 1, 4000))
BATCH = 4096  # activations a training step
LEARNING_RATE = 8e-4
# Silent for so many steps counts as dead: the auxiliary loss then revives it. SAELens's 1000 is
# longer than this whole run.
DEAD_AFTER = 40


# %%
def rows(model: SteeringModel, file: Path) -> list[Encoded]:
    """The texts of a .jsonl file as rows of LENGTH tokens; what is left over is dropped."""
    made = []
    for line in file.read_text(encoding="utf-8").splitlines():
        ids = model.tokenizer(json.loads(line)["text"], verbose=False)["input_ids"]
        ids = ids[:LENGTH] if ids[0] == model.tokenizer.bos_token_id else ids  # a chat is one row
        for start in range(0, len(ids) - LENGTH + 1, LENGTH):
            made.append(Encoded(tuple(ids[start : start + LENGTH]), (True,) * LENGTH))
    return made


def activations(model: SteeringModel, some: list[Encoded], batch: int = 32) -> torch.Tensor:
    """resid_post of block LAYER without the first position, as float16 [tokens, d_model]."""
    out = torch.empty(len(some), LENGTH - 1, model.d_model, dtype=torch.float16)
    with progress("reading activations", len(some)) as report:
        for start in range(0, len(some), batch):
            part = some[start : start + batch]
            stream = next(x for layer, x, _ in model.residuals(part) if layer == LAYER)
            out[start : start + len(part)] = stream[:, 1:].half()
            report(start + len(part))
    return out.flatten(0, 1)


def batches(parts: list[tuple[torch.Tensor, int]], seed: int) -> Iterator[torch.Tensor]:
    """Every part's activations, each so many times a round, in random order, for ever."""
    draw = torch.Generator().manual_seed(seed)
    everything = torch.cat([part for part, _ in parts])
    starts = torch.tensor([0, *(len(part) for part, _ in parts)]).cumsum(0)
    while True:
        order = torch.cat(
            [
                torch.arange(start, start + len(part)).repeat(times)
                for start, (part, times) in zip(starts.tolist(), parts, strict=False)
            ]
        )
        order = order[torch.randperm(len(order), generator=draw)]
        for at in range(0, len(order) - BATCH + 1, BATCH):
            yield everything[order[at : at + BATCH]].float()


# %%
def train(data: Iterator[torch.Tensor], tokens: int) -> TopKTrainingSAE:
    """SAELens's own trainer on given activations."""
    torch.manual_seed(0)
    sae = TopKTrainingSAE(
        TopKTrainingSAEConfig(
            d_in=576,
            d_sae=D_SAE,
            k=K,
            normalize_activations="expected_average_only_in",
            apply_b_dec_to_input=True,
        )
    )
    steps = tokens // BATCH
    trainer = SAETrainer(
        SAETrainerConfig(
            total_training_samples=tokens,
            train_batch_size_samples=BATCH,
            lr=LEARNING_RATE,
            lr_end=LEARNING_RATE / 10,
            lr_warm_up_steps=steps // 20,
            lr_decay_steps=steps // 3,
            dead_feature_window=DEAD_AFTER,
            n_batches_for_norm_estimate=20,
            autocast=True,
            logger=LoggingConfig(log_to_wandb=False),
        ),
        sae,
        data,
    )
    return trainer.fit()


def save(sae: TopKTrainingSAE, out: Path, tokens: int) -> None:
    """SAELens's own format in float16, decoder rows at length 1."""
    sae.fold_W_dec_norm()
    sae.cfg.rescale_acts_by_decoder_norm = False
    sae.cfg.metadata.model_name = "SmolLM2-135M-Instruct"
    sae.cfg.metadata.hook_name = f"blocks.{LAYER}.hook_resid_post"
    sae.cfg.metadata.context_size = LENGTH
    sae.cfg.metadata.seqpos_slice = (1, None)
    sae.cfg.metadata.prepend_bos = False
    sae.cfg.metadata.training_tokens = tokens
    sae.cfg.metadata.neuronpedia_id = "smollm2-135m-instruct/13-starter-res-6k"
    sae.cfg.dtype = "float16"
    for path in sae.half().save_inference_model(out):
        path.chmod(0o644)


# %%
if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Trains the starter SAE.")
    parser.add_argument("--texts", type=Path, default=Path("cache/starter_sae"))
    parser.add_argument("--out", type=Path, default=Path("cache/starter_sae/sae"))
    parser.add_argument("--tokens", type=int, default=3_300_000)
    parser.add_argument("--dtype", help="of the model; what ships was made in bfloat16")
    given = parser.parse_args()

    model = SteeringModel.load("starter", dtype=given.dtype)
    parts = []
    for name, times, most in KINDS:
        found = rows(model, given.texts / f"{name}.jsonl")
        found = found[:: -(-len(found) // most)]
        parts.append((activations(model, found), times))
        print(f"{name}: {len(parts[-1][0]):,} activations, {times} times a round")
    save(train(batches(parts, seed=0), given.tokens), given.out, given.tokens)
