"""Do Jacobian-lens directions say their word? Two read-outs, and the logit lens, at equal dose.

    python scripts/benchmarks/words.py

For 20 words, each one token of the starter model, and eight chats: the log-probability and the rank
of the word as the answer's first token, steered at every position, at several layers and doses.
Rows: the read-out gamma (W_U[t] - mean W_U), which `word_directions` takes; W_U[t] alone, as
published; the first without a Jacobian (the logit lens's direction); a random direction. Means over
words with intervals over words; the difference of the first two is paired.
"""

import numpy as np
import torch

from interp_steer import Direction, Engine, Row, Scale, SteeringModel, chat, steer
from interp_steer.features.contexts import windows
from interp_steer.prompts.file import read_prompts
from interp_steer.stats import intervals
from interp_steer.steering.jacobian import readout, token_of, word_directions
from interp_steer.util.console import progress

WORDS = ["ocean", "music", "war", "doctor", "winter", "horse", "money", "science", "church",
         "garden", "bread", "king", "school", "rain", "fire", "mother", "car", "gold", "dream",
         "computer"]  # fmt: skip
LAYERS, DOSES = (8, 12, 16, 20), (0.2, 0.4)
TEXTS = "interp_steer/data/demo_texts"

model = SteeringModel.load("starter", dtype="float32")
engine = Engine(model)
sentences = [t for side in ("positive", "negative") for t in read_prompts(f"{TEXTS}/{side}.txt")]
texts = windows(model, ["\n".join(map(str, sentences))], 128)
chats = [chat(str(text)) for text in read_prompts(f"{TEXTS}/choose.txt")]
scale = Scale.of(model, [model.encode(one) for one in chats])
tokens = [token_of(model, word) for word in WORDS]
ours = word_directions(model, WORDS, texts, layers=LAYERS)
theirs = word_directions(model, WORDS, texts, layers=LAYERS, published=True)
rows = readout(model, tokens)


def directions(word: int, layer: int) -> dict[str, Direction]:
    """The word's directions at a layer, by kind."""
    lens = Direction.of(rows[word], f"blocks.{layer}.hook_resid_post")
    named = WORDS[word]
    return {
        "jacobian": ours[named].directions[layer],
        "jacobian, published": theirs[named].directions[layer],
        "logit lens": lens,
        "random": lens.random(word),
    }


def heard(word: int, row_logits: list[torch.Tensor]) -> tuple[float, float]:
    """Mean log-probability of the word, and its mean rank (1 is the likeliest)."""
    logprobs = torch.stack(row_logits).log_softmax(-1)
    own = logprobs[:, tokens[word]]
    return own.mean().item(), 1 + (logprobs > own[:, None]).sum(1).float().mean().item()


found: dict[tuple[str, int, float], list[tuple[float, float]]] = {}
with progress("words", len(WORDS)) as report:
    for word in range(len(WORDS)):
        settings = {
            (kind, layer, dose): (
                steer("add", one, coefficient=dose * scale.medians[layer + 1], at=layer),
            )
            for layer in LAYERS
            for kind, one in directions(word, layer).items()
            for dose in DOSES
        }
        asked = [Row(one, setting) for setting in settings.values() for one in chats]
        scores = engine.score(asked, [()] * len(asked), last_logits=True)
        logits = [score.last_logits for score in scores if score.last_logits is not None]
        for n, key in enumerate(settings):
            found.setdefault(key, []).append(
                heard(word, logits[n * len(chats) : (n + 1) * len(chats)])
            )
        report(word + 1)

print(f"{len(WORDS)} words, {len(chats)} chats, {len(texts)} texts; ln p and rank of the word")
print("layer  dose  kind                  ln p                     median rank of", model.d_vocab)
for layer in LAYERS:
    for dose in DOSES:
        for kind in ("jacobian", "jacobian, published", "logit lens", "random"):
            values = found[kind, layer, dose]
            mean = intervals.mean(np.array([p for p, _ in values]))
            rank = torch.tensor([r for _, r in values]).median().item()
            span = f"{mean.estimate:7.2f} [{mean.low:.2f}, {mean.high:.2f}]"
            print(f"{layer:5}  {dose:4}  {kind:20}  {span:24} {rank:8.0f}")
        pairs = zip(found["jacobian", layer, dose], found["jacobian, published", layer, dose],
                    strict=True)  # fmt: skip
        gain = intervals.mean(np.array([a - b for (a, _), (b, _) in pairs]))
        ends = f"[{gain.low:+.2f}, {gain.high:+.2f}]"
        print(f"               first - second  {gain.estimate:+.2f} {ends}")
