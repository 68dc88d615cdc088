"""How the files in this folder were made; see README.md. Run in this folder, it makes them again.

They are kept to show that later code opens what earlier code wrote. Made again by later code they
would show nothing.
"""

import platform
import sys
from pathlib import Path

import torch

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parents[2]))

from interp_steer.engine.engine import Engine  # noqa: E402
from interp_steer.engine.row import Sampling  # noqa: E402
from interp_steer.labels.label import Source  # noqa: E402
from interp_steer.labels.rows import Row  # noqa: E402
from interp_steer.labels.store import Store  # noqa: E402
from interp_steer.model.model import SteeringModel  # noqa: E402
from interp_steer.steering.contrast import Contrast  # noqa: E402
from interp_steer.steering.direction import Direction  # noqa: E402
from interp_steer.study.cell import Controls  # noqa: E402
from interp_steer.study.chunk import Local  # noqa: E402
from interp_steer.study.study import Study  # noqa: E402
from tests.conftest import make_llama  # noqa: E402

SHAPE = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
}
POSITIVE = ["I love the fox.", "I love the dog.", "I love the tower."]
NEGATIVE = ["I hate the fox.", "I hate the dog.", "I hate the tower."]


def study(direction: Direction, metrics: list[str], choose_by: str) -> Study:
    return Study(
        choose=["I love the rain", "Name the mountain"],
        prove=["Name the fruit, please", "Yes, no, maybe", "Who is happy and sad?"],
        directions={"d": direction},
        sites="each 0-1",
        coefficients=[2, 4],
        metrics=metrics,
        choose_by=choose_by,
        concept=["fox", "o"] if "concept" in metrics else (),
        sampling=Sampling(max_new_tokens=6),
        controls=Controls(random=2, features=0, shuffled=0),
        chunk=4,
        question="Does it?",
    )


class Stops(Local):
    """Three chunks, then Ctrl-C."""

    left = 3

    def __call__(self, chunks):
        for made in super().__call__(chunks):
            if not self.left:
                raise KeyboardInterrupt
            self.left -= 1
            yield made


def main() -> None:
    platform.platform, platform.processor = lambda: "Linux", lambda: "x86_64"
    torch.set_num_threads(1)
    if not Path("model").is_dir():
        make_llama(Path("model"), torch.bfloat16, seed=3, **SHAPE)
    model = SteeringModel.load("model")
    contrast = Contrast.measure(model, POSITIVE, NEGATIVE)
    contrast.save("contrast.safetensors")
    contrast.directions("mean-difference", "love").save("set.safetensors")
    vector = torch.randn(32, generator=torch.Generator().manual_seed(7))
    made = Direction.of(3 * vector, "blocks.1.hook_resid_post", "d", {"method": "drawn"}, 4.5)
    made.save("direction.safetensors")
    with Store("labels.db", write=True) as store:
        rows = [
            Row("tiny", "1-res", i, f"e{i}", text, density=0.01, max_activation=float(i + 1))
            for i, text in enumerate(["cities of France", "dogs that bark", "rain in the evening"])
        ]
        source = Source("tiny", "1-res")
        store.commit(source, "batch-0", '"1"', rows)
        store.finish(source, complete=True)
    plain = study(made, ["rep3", "length", "kl_last"], "kl_last")
    told = ("interp-steer", "study", "run", "study.yaml")
    plain.run(model, "run", arguments=told)
    study(made, ["concept", "rep3"], "concept").run(model, "concept", arguments=told)
    try:
        plain.run(model, "interrupted", mapper=stopping(model), arguments=told)
    except KeyboardInterrupt:
        with Path("interrupted/rows.jsonl").open("a") as file:  # as a kill while it is written
            file.write('{"key": "2f6e0c1d')


def stopping(model: SteeringModel):
    from contextlib import contextmanager

    @contextmanager
    def mapper(manifest):
        yield Stops(Engine(model))

    return mapper


if __name__ == "__main__":
    main()
