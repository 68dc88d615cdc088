# %% [markdown]
# Measures the starter SAE as it ships and prints the table of its card.
#
#     python scripts/starter/card.py --wikitext FOLDER --docs cache/starter_sae
#
# The held-out chats lie beside this script. WikiText-2's validation and test text (valid.txt and
# test.txt, CC BY-SA) and the held-out documentation (`texts.py`) are not part of the
# project; without them their rows are left out.

# %%
import argparse
import gzip
import json
import os
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from interp_steer import SteeringModel
from interp_steer.features.contexts import windows
from interp_steer.features.fit import Tally, check
from interp_steer.features.sae import Sae
from interp_steer.results.words import names
from interp_steer.util.console import progress

HELD_OUT = Path(__file__).with_name("heldout_chats.jsonl.gz")
CHATS = "held-out chats"
CONCEPT = ("paris", "eiffel", "france")


# %%
def texts(path: Path) -> list[str]:
    """A .jsonl file's texts; a .txt file's articles joined to pieces of 40 lines."""
    data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    lines = [line for line in data.decode("utf-8").splitlines() if line.strip()]
    if path.suffix == ".txt":
        return ["\n".join(lines[i : i + 40]) for i in range(0, len(lines), 40)]
    return [json.loads(line)["text"] for line in lines]


# %%
if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Measures the starter SAE as it ships.")
    parser.add_argument("--sae", default="starter")
    parser.add_argument("--wikitext", type=Path, help="folder with valid.txt and test.txt")
    parser.add_argument("--docs", type=Path, help="folder with docs_ and glosses_heldout.jsonl")
    parser.add_argument("--dtype", help="of the model; the SAE is in float32")
    parser.add_argument("--loss-texts", type=int, default=64)
    parser.add_argument("--most", type=int, help="fewer texts of each kind, for a trial")
    given = parser.parse_args()

    model = SteeringModel.load("starter", dtype=given.dtype)
    sae = Sae.load(given.sae)
    kinds = {CHATS: texts(HELD_OUT)}
    if given.wikitext:
        kinds["WikiText-2"] = [
            t for n in ("valid", "test") for t in texts(given.wikitext / f"{n}.txt")
        ]
    if given.docs:
        kinds["held-out documentation"] = texts(given.docs / "docs_heldout.jsonl")
        kinds["held-out WordNet glosses"] = texts(given.docs / "glosses_heldout.jsonl")

    tally = Tally(sae.d_model, sae.d_sae)
    print(
        "| text | tokens | massive | explained variance | with massive | L0 | norm ratio "
        "| CE-loss score | cross-entropy, nats: model / spliced / zeroed | names the concept |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|")
    for kind, found in kinds.items():
        encoded = windows(model, found, 256)
        if kind == CHATS:  # a chat begins at its beginning
            encoded = [one for text in found for one in windows(model, [text], 256)[:1]]
        encoded = encoded[: given.most]
        with progress(kind, len(encoded) + given.loss_texts) as report:
            fit = check(
                sae, model, encoded, loss_texts=given.loss_texts, tally=tally, report=report
            )
        named = sum(bool(names(text, CONCEPT)) for text in found) / len(found)
        score = "none" if fit.ce_score is None else f"{fit.ce_score:.3f}"
        print(
            f"| {kind} | {fit.tokens:,} | {fit.massive:.2%} | {fit.explained_variance:.3f} "
            f"| {fit.explained_variance_all:.3f} | {fit.l0:.1f} "
            f"| {fit.norm_ratio:.3f} | {score} "
            f"| {fit.ce:.3f} / {fit.ce_spliced:.3f} / {fit.ce_ablated:.3f} | {named:.1%} |",
            flush=True,
        )
    silent = (tally.fired == 0).double().mean().item()
    print(f"\nSilent over these {tally.tokens:,} held-out tokens: {silent:.1%} of features.")
