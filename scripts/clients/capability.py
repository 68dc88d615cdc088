# %% [markdown]
# # lm-eval on a steered model, three ways, beside the project's own metric
# A multiple-choice and a generation task on questions made here, in lm-eval (EleutherAI): against
# our server (`local-completions`, steering in the model's name), on the exported `.pt`
# (`--model steered`), and on the exported checkpoint (`--model hf`). Every way must tell the
# accuracies that our own engine tells.
#
# `pip install 'lm-eval[api]>=0.4.13'; python scripts/clients/capability.py [--questions N]`

# %% settings
import json
import os
import random
import re
import socket
import sys
import tempfile
import threading
import time
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")

import uvicorn
from lm_eval import simple_evaluate
from lm_eval.tasks import TaskManager

from interp_steer import (
    Engine,
    Item,
    Row,
    Sampling,
    SteeringModel,
    Study,
    feature,
    parse,
    read_prompts,
    resolve,
)
from interp_steer.export import checkpoint, harness
from interp_steer.export.constant import constants
from interp_steer.model.loading import find_folder
from interp_steer.prompts.file import QUESTIONS
from interp_steer.serve.app import create_app
from interp_steer.serve.service import Service, Shelf

COUNT = int(sys.argv[sys.argv.index("--questions") + 1]) if "--questions" in sys.argv else 100
LINE = "add(eiffel, 0.3 dose) at 13 on all+first"

# %% questions
draw = random.Random(0)
rows = []
for _ in range(COUNT):
    a, b = draw.randrange(2, 10), draw.randrange(2, 10)
    others = draw.sample([n for n in range(4, 19) if n != a + b], 3)
    choices = draw.sample([a + b, *others], 4)
    rows.append({"question": f"What is {a} plus {b}?", "choices": [str(n) for n in choices],
                 "answer": choices.index(a + b), "sum": str(a + b)})  # fmt: skip
work = Path(tempfile.mkdtemp())
(work / "questions.jsonl").write_text("\n".join(map(json.dumps, rows)))
listed = "\\n".join(f"{letter}. {{{{choices[{n}]}}}}" for n, letter in enumerate("ABCD"))
common = f"""
dataset_path: json
dataset_kwargs: {{data_files: {{test: {work}/questions.jsonl}}}}
test_split: test
"""
(work / "letters.yaml").write_text(f"""
task: letters
{common}
output_type: multiple_choice
doc_to_text: "{{{{question}}}}\\n{listed}\\nAnswer:"
doc_to_choice: [A, B, C, D]
doc_to_target: answer
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
""")
SHOTS = "Question: What is 2 plus 2?\nAnswer: 4\nQuestion: {}\nAnswer:"
shown = SHOTS.format("{{question}}").replace("\n", "\\n")
(work / "sums.yaml").write_text(f"""
task: sums
{common}
output_type: generate_until
doc_to_text: "{shown}"
doc_to_target: sum
generation_kwargs: {{until: ["\\n"], max_gen_toks: 8, do_sample: false}}
filter_list:
  - name: number
    filter: [{{function: regex, regex_pattern: '([0-9]+)'}}, {{function: take_first}}]
metric_list: [{{metric: exact_match, aggregation: mean, higher_is_better: true}}]
""")

# %% the model, our own metric
model = SteeringModel.load("starter", dtype="float32")
known = {"eiffel": feature("starter", 2652)}
shelf = Shelf(work)
shelf.put(known["eiffel"].named("eiffel"))
questions = [Item.of({"prompt": text}, as_chat=model.is_chat) for text in read_prompts(QUESTIONS)]
service = Service.of(model, shelf, {"eiffel": LINE}, [one.prompt for one in questions], "starter")
steps = resolve(parse(LINE, known), service.scale)
items = [{"question": r["question"], "choices": r["choices"], "answer": r["answer"]} for r in rows]
study = Study.sweep(
    [str(steps[0])], ["The tower"], known, metrics=["kl_mean"], capability={"letters": items},
    as_chat=False, sampling=Sampling(max_new_tokens=4),
)  # fmt: skip
table = study.run(model, work / "run").findings().capability
print(table.to_string(index=False))
asked = [Row(SHOTS.format(r["question"]), line, Sampling(max_new_tokens=8))
         for line in ((), steps) for r in rows]  # fmt: skip
said = [re.findall(r"\d+", result.text.split("\n")[0]) for result in Engine(model).generate(asked)]
right = [text[:1] == [row["sum"]] for text, row in zip(said, rows * 2, strict=True)]
print(f"ours    sums, unsteered {sum(right[:COUNT]) / COUNT:.4f}, "
      f"steered {sum(right[COUNT:]) / COUNT:.4f}")  # fmt: skip

# %% exports and the server
folder, _ = find_folder("starter", None)
exported = checkpoint.write(
    constants(steps, model), folder, model.shape, work / "checkpoint",
    {"model": "starter", "steer": LINE},
)  # fmt: skip
file = harness.write(harness.entries(steps, model), work / "steer.pt")
server = uvicorn.Server(uvicorn.Config(create_app(service), log_level="warning"))
place = socket.create_server(("127.0.0.1", 0))
threading.Thread(target=server.run, kwargs={"sockets": [place]}, daemon=True).start()
while not server.started:
    time.sleep(0.1)
url = f"http://127.0.0.1:{place.getsockname()[1]}/v1/completions"

# %% lm-eval
local = {"base_url": url, "tokenizer": str(folder), "num_concurrent": 8, "max_length": 2048,
         "tokenized_requests": True}  # fmt: skip
plain = {"dtype": "float32", "device": "cpu"}
ways = {
    "server, unsteered": ("local-completions", {"model": "starter", **local}),
    "server, steered": ("local-completions", {"model": "starter+eiffel", **local}),
    "hf, unsteered": ("hf", {"pretrained": str(folder), **plain}),
    ".pt, steered": ("steered", {"pretrained": str(folder), "steer_path": str(file), **plain}),
    "checkpoint, steered": ("hf", {"pretrained": str(exported), **plain}),
}
print(f"\n{'lm-eval':22}{'letters':>9}{'sums':>9}")
for way, (kind, arguments) in ways.items():
    found = simple_evaluate(
        model=kind, model_args=arguments, tasks=["letters", "sums"], batch_size=8,
        task_manager=TaskManager(include_path=str(work)), bootstrap_iters=0, verbosity="ERROR",
    )["results"]  # fmt: skip
    print(f"{way:22}{found['letters']['acc,none']:9.4f}{found['sums']['exact_match,number']:9.4f}",
          flush=True)  # fmt: skip
server.should_exit = True
