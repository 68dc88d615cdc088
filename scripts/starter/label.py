# %% [markdown]
# Labels of the starter SAE's features, without a language model: the tokens a feature fires on, the
# tokens it promotes, and the place where it fires most, in the row format of Neuronpedia's exports.
#
#     python scripts/starter/label.py --texts cache/starter_sae/chats.jsonl ...
#
# `interp-steer labels import` reads both files.

# %%
import argparse
import gzip
import json
import os
import re
from collections import Counter
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch

from interp_steer import SteeringModel
from interp_steer.features.contexts import Context, top_contexts, windows
from interp_steer.features.decoder import folds
from interp_steer.features.fit import Tally
from interp_steer.features.sae import Sae
from interp_steer.features.screen import promoted
from interp_steer.util.console import progress

CONTEXTS = 40  # a label names the words of so many


# %%
def word(context: Context) -> str:
    """The whole word of the token that a feature fires on, "" for whitespace."""
    if not context.token.strip():
        return ""
    begin = "" if context.token[:1].isspace() else re.split(r"\s", context.before)[-1]
    end = re.split(r"\s", context.after)[0]
    return (begin + context.token.strip() + end).strip(".,;:!?()[]{}\"'`*")


def label(contexts: list[Context], tokens: list[str]) -> str:
    """`French, France, Paris (promotes: France, Louvre): the capital of [[France]], Paris`.

    Words by the sum of the feature's values on them, at most six and those worth a tenth of the
    first.
    """
    weight: Counter[str] = Counter()
    for context in contexts:
        weight[word(context)] += context.activation
    (_, most), *_ = weight.most_common(1)
    fires = [text for text, sum_ in weight.most_common(6) if text and sum_ > most / 10]
    up = dict.fromkeys(t.strip() for t in tokens if len(t.strip()) > 1)
    best = contexts[0]
    near = f"{best.before[-30:]}[[{best.token}]]{best.after[:30]}"
    promotes = ", ".join(list(up)[:4])
    return f"{', '.join(fires) or 'whitespace'} (promotes: {promotes}): {' '.join(near.split())}"


def write(path: Path, rows: list[dict[str, object]]) -> None:
    """A gzipped .jsonl file, the same bytes for the same rows."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    path.write_bytes(gzip.compress(lines.encode(), 9, mtime=0))


# %%
if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Labels the starter SAE.")
    parser.add_argument("--texts", type=Path, nargs="+", required=True, help=".jsonl files")
    parser.add_argument("--sae", default="starter")
    parser.add_argument("--out", type=Path, default=Path("interp_steer/data/starter_sae"))
    parser.add_argument("--most", type=int, default=1500, help="pieces of 256 tokens of each file")
    parser.add_argument("--dtype", help="of the model; what ships was made in bfloat16")
    given = parser.parse_args()

    model = SteeringModel.load("starter", dtype=given.dtype)
    sae = Sae.load(given.sae)
    encoded = []
    for file in given.texts:
        lines = file.read_text(encoding="utf-8").splitlines()
        pieces = windows(model, [json.loads(line)["text"] for line in lines], 256)
        encoded += pieces[:: max(1, len(pieces) // given.most)]
    tally = Tally(sae.d_model, sae.d_sae)
    with progress("contexts", len(encoded)) as report:
        contexts = top_contexts(sae, model, encoded, k=CONTEXTS, tally=tally, report=report)
    with progress("promoted tokens"):
        _, tokens = promoted(model, sae.rows(torch.arange(sae.d_sae)))

    # as on Neuronpedia's dashboards: the rows' lengths are in the activations where they can be
    peaks = tally.peak
    if folds(sae.architecture, bool(getattr(sae.inner.cfg, "rescale_acts_by_decoder_norm", False))):
        peaks = peaks * sae.rows(torch.arange(sae.d_sae)).norm(dim=-1)
    model_id, _, source = str(sae.where.neuronpedia).partition("/")
    place = {"modelId": model_id, "layer": source}
    explanations, features = [], []
    for index in range(sae.d_sae):
        features.append(
            {
                **place,
                "index": str(index),
                "frac_nonzero": round(tally.fired[index].item() / tally.tokens, 8),
                "maxActApprox": round(peaks[index].item(), 4),
            }
        )
        if contexts[index]:
            explanations.append(
                {
                    "id": f"starter-{index}",
                    **place,
                    "index": str(index),
                    "description": label(contexts[index], tokens[index]),
                    "typeName": "top-tokens-and-logits",
                    "explanationModelName": "interp-steer",
                }
            )
    write(given.out / "explanations" / "batch-0.jsonl.gz", explanations)
    write(given.out / "features" / "batch-0.jsonl.gz", features)
    print(f"{len(explanations)} labels of {sae.d_sae} features, from {tally.tokens:,} tokens")
