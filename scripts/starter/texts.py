# %% [markdown]
# Texts for the starter SAE: chats that the starter model samples by itself, and free documentation.
#
#     python scripts/starter/texts.py chats --chats 1000
#     python scripts/starter/texts.py docs FOLDER ... --name docs
#     python scripts/starter/texts.py docs WORDNET --name glosses --most 10000000
#
# Chats: left alone after the template's "user" mark, an instruction-tuned model writes a user's
# message (Magpie, Xu et al. 2024, arXiv 2406.08464), then its answer, then the next message, until
# the row is full. Nobody chooses the topics, so no topic is enriched.

# %%
import argparse
import html
import json
import os
import random
import re
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from interp_steer import Engine, Row, Sampling, SteeringModel
from interp_steer.util.console import progress

LENGTH = 256  # tokens a row, all of them used
BATCH = 128  # chats at once
OPEN = "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face"
USER, ANSWER, END = "\n<|im_start|>user\n", "\n<|im_start|>assistant\n", "<|im_end|>"


# %%
def sample(engine: Engine, seed: int) -> list[str]:
    """A batch of chats, each at least LENGTH tokens long or dropped."""
    texts = [OPEN + END + USER] * BATCH
    for turn in range(8):
        speaker, temperature = ("user", 1.0) if turn % 2 == 0 else ("assistant", 0.7)
        short = [i for i, text in enumerate(texts) if missing(engine.model, text) > 0]
        rows = [
            Row(
                texts[i],
                sampling=Sampling(temperature, max_new_tokens=96 if speaker == "user" else LENGTH),
                seed=(seed * BATCH + i) * 8 + turn,
            )
            for i in short
        ]
        if not rows:
            break
        for i, result in zip(short, engine.generate(rows, batch=BATCH), strict=True):
            # a user's message without end is no message
            broken = speaker == "user" and result.finish != "stop"
            after = ANSWER if speaker == "user" else USER
            texts[i] = "" if broken else texts[i] + result.text.strip() + END + after
        texts = [text for text in texts if text]
    return [text for text in texts if missing(engine.model, text) <= 0]


def missing(model: SteeringModel, text: str) -> int:
    """How many tokens a chat is short of a full row."""
    return LENGTH - len(model.encode(text).ids)


def chats(out: Path, wanted: int, first_seed: int, dtype: str | None) -> None:
    """Appends batches until there are enough; a batch is written whole, so a rerun goes on."""
    model = SteeringModel.load("starter", dtype=dtype)
    engine = Engine(model)
    done = out.read_text(encoding="utf-8").splitlines() if out.exists() else []
    seed = 1 + max((json.loads(line)["seed"] for line in done), default=first_seed - 1)
    with progress(f"sampling chats into {out}", wanted) as report:
        while len(done) < wanted:
            new = [
                json.dumps({"seed": seed, "text": text}, ensure_ascii=False)
                for text in sample(engine, seed)
            ]
            with out.open("a", encoding="utf-8") as file:
                file.write("".join(line + "\n" for line in new))
            done += new
            seed += 1
            report(len(done))


# %%
PAGE = 6000
PROSE = (".html", ".htm", ".xhtml", ".txt", ".noun")


def prose(path: Path) -> list[str]:
    """The paragraphs of a text, an HTML page or a WordNet file; tags, code and menus left out."""
    text = path.read_text(encoding="utf-8", errors="ignore")
    if path.name.startswith("data."):  # WordNet: lemma and gloss of each line, twelve a paragraph
        lines = [line for line in text.splitlines() if " | " in line and line[0].isdigit()]
        glosses = [f"{i.split()[4].replace('_', ' ')}: {i.split(' | ')[1].strip()}." for i in lines]
        return [" ".join(glosses[i : i + 12]) for i in range(0, len(glosses), 12)]
    if path.suffix in (".html", ".htm", ".xhtml"):
        text = re.sub(r"(?is)<(script|style|pre|head|nav|table)\b.*?</\1>", "\n\n", text)
        text = re.sub(r"(?i)</?(p|div|li|h\d|dd|dt|br|section)\b[^>]*>", "\n\n", text)
        text = html.unescape(re.sub(r"(?s)<[^>]+>", "", text))
    paragraphs = [" ".join(p.split()) for p in re.split(r"\n\s*\n", text)]
    return [p for p in paragraphs if len(p) > 80 and sum(c.isalpha() for c in p) > 0.7 * len(p)]


def docs(out: Path, places: list[Path], most: int) -> None:
    """Pages of at most PAGE characters, at most `most` characters of each place, drawn at random;
    every seventh goes to a file of its own, held out.
    """
    draw = random.Random(0)
    seen: set[str] = set()
    held = out.with_name(f"{out.stem}_heldout.jsonl")
    with out.open("w", encoding="utf-8") as file, held.open("w", encoding="utf-8") as held_file:
        for place in places:
            pages: list[str] = []
            for path in sorted(place.rglob("*")):
                if not path.is_file() or path.suffix not in PROSE:
                    continue
                page = ""
                for paragraph in prose(path):
                    if paragraph in seen:
                        continue
                    seen.add(paragraph)
                    if page and len(page) + len(paragraph) > PAGE:
                        pages.append(page)
                        page = ""
                    page += paragraph + "\n\n"
                pages += [page] if len(page) > 400 else []
            draw.shuffle(pages)
            taken = 0
            for number, page in enumerate(pages):
                if taken < most:
                    taken += len(page)
                    line = json.dumps({"place": place.name, "text": page.strip()}) + "\n"
                    (held_file if number % 7 == 6 else file).write(line)
            print(f"{place}: {taken:,} characters")


# %%
if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Texts for the starter SAE.")
    parser.add_argument("kind", choices=("chats", "docs"))
    parser.add_argument("places", nargs="*", type=Path, help="folders of documentation")
    parser.add_argument("--out", type=Path, default=Path("cache/starter_sae"))
    parser.add_argument("--name", default="chats", help="file to write, without .jsonl")
    parser.add_argument("--chats", type=int, default=2000)
    parser.add_argument("--most", type=int, default=2_000_000, help="characters of each folder")
    parser.add_argument("--seed", type=int, default=0, help="of the first batch")
    parser.add_argument("--dtype", help="of the model; what ships was made in bfloat16")
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    if given.kind == "docs":
        docs(given.out / f"{given.name}.jsonl", given.places, given.most)
    else:
        chats(given.out / f"{given.name}.jsonl", given.chats, given.seed, given.dtype)
