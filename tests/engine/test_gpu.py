"""Every path on a fake GPU: nothing is left on the CPU by mistake, results are those of the CPU,
and a step launches little and waits for little, whatever the rows.
"""

from pathlib import Path

import pandas
import pytest
import torch

from interp_steer.causal.ablate import ablate
from interp_steer.engine.engine import Engine
from interp_steer.engine.row import Result, Row, Sampling, Score
from interp_steer.features.feature import feature
from interp_steer.model.model import SteeringModel
from interp_steer.model.site import Site
from interp_steer.prompts.item import Item
from interp_steer.steering.grammar import parse
from interp_steer.steering.scale import Scale
from interp_steer.study.metrics import METRICS, Measured
from tests.conftest import make_llama
from tests.engine.samples import LINES, PROMPTS, directions
from tests.fakegpu import Counts, fake_gpu, on_gpu
from tests.features.test_sae import LAYER, saved

MOST_WAITS = 2  # of the CPU for the GPU in a decoding step, whatever the rows and taps
MOST_LAUNCHES = 38  # of kernels for each layer in an unsteered decoding step in bfloat16
MORE_LAUNCHES = 3  # for each further shelf: its own attention, and its keys and values

SAMPLINGS = (
    Sampling(max_new_tokens=4),
    Sampling(temperature=0.8, max_new_tokens=6),
    Sampling(0.9, top_p=0.9, top_k=30, repetition_penalty=1.3, max_new_tokens=5),
)
TAPS = (Site("resid_post", 2), Site("mlp_out", 1), Site("z", 4, 1))


@pytest.fixture(scope="module")
def rows() -> list[Row]:
    named = directions()
    return [
        Row(prompt, parse(text, named), SAMPLINGS[(i + j) % 3], seed=i)
        for i, text in enumerate(LINES)
        for j, prompt in enumerate(PROMPTS)
    ]


@pytest.fixture
def gpu():
    with fake_gpu() as counts:
        yield counts


@pytest.fixture
def moved(gpu: Counts, tiny_folder) -> SteeringModel:
    """The tiny model on the fake GPU; the counts begin after it is there."""
    model = on_gpu(SteeringModel.load(tiny_folder))
    assert model.device.type == "cuda"
    gpu.reset()
    return model


def close(mine: torch.Tensor | None, other: torch.Tensor | None) -> None:
    assert (mine is None) == (other is None)
    if mine is not None and other is not None:
        assert mine.device.type == "cpu" and mine.shape == other.shape
        assert torch.allclose(mine, other, atol=1e-4)


def check_results(mine: list[Result], other: list[Result]) -> None:
    for one, two in zip(mine, other, strict=True):
        assert (one.token_ids, one.text, one.finish) == (two.token_ids, two.text, two.finish)
        assert one.taps.keys() == two.taps.keys()
        for site, values in one.taps.items():
            close(values, two.taps[site])


def test_generate(tiny, gpu, moved, rows):
    mine = Engine(moved).generate(rows, taps=TAPS)
    assert gpu.launches.total() > 1000 and not gpu.doubles
    check_results(mine, Engine(tiny).generate(rows, taps=TAPS))


def read_texts(engine: Engine, rows: list[Row]) -> list[Score]:
    """Scores of one text; every row is compared with the unsteered one of its prompt."""
    text = tuple(engine.model.tokenizer("I love the tower", add_special_tokens=False)["input_ids"])
    reference = [row % len(PROMPTS) for row in range(len(rows))]
    return engine.score(rows, [text] * len(rows), reference=reference, last_logits=True, taps=TAPS)


def test_score(tiny, gpu, moved, rows):
    mine, other = (read_texts(Engine(model), rows) for model in (moved, tiny))
    assert gpu.launches.total() > 500 and not gpu.doubles
    for one, two in zip(mine, other, strict=True):
        for name in ("logprobs", "kl", "last_logits"):
            close(getattr(one, name), getattr(two, name))
        for site in TAPS:
            close(one.taps[site], two.taps[site])


def come_and_go(model: SteeringModel, rows: list[Row]) -> list[Result]:
    """A third of the rows at once, a third in the third step, a third when few are left."""
    stepper = Engine(model).stepper()
    ids = [stepper.add(row, TAPS) for row in rows[::3]]
    for number in range(40):
        if number == 2:
            ids += [stepper.add(row) for row in rows[1::3]]
            stepper.cancel(ids[1])
        if number == 7:
            ids += [stepper.add(row) for row in rows[2::3]]
        stepper.step()
    assert not stepper.busy
    return [stepper.pop(id) for id in ids]


def test_rows_come_and_go(tiny, gpu, moved, rows):
    check_results(come_and_go(moved, rows[::2]), come_and_go(tiny, rows[::2]))
    assert not gpu.doubles


def test_an_sae_acts(tiny, gpu, moved, tmp_path):
    latents = {"f": feature(saved(tmp_path / "sae", "topk"), 5)}
    chosen = parse(f"add(f, 3) at 2; latent_clamp(f, 2) at {LAYER}", latents)
    rows = [Row(prompt, chosen, SAMPLINGS[0]) for prompt in PROMPTS]
    check_results(Engine(moved).generate(rows), Engine(tiny).generate(rows))


def test_ablation(tiny, gpu, moved):
    items = [
        Item("The quick brown fox jumps", " dog", " fox", corrupted="The lazy brown dog jumps")
    ]
    components, methods = ["block", "z", "direction"], ["zero", "resample"]
    mine, other = (
        ablate(model, items, components, methods, vector=directions()["one"]).table
        for model in (moved, tiny)
    )
    assert len(other) > 100
    pandas.testing.assert_frame_equal(mine, other, atol=1e-4)


def test_scale_and_metrics(tiny, moved):
    prompts = [tiny.encode(prompt) for prompt in PROMPTS]
    assert Scale.of(moved, prompts).medians == pytest.approx(Scale.of(tiny, prompts).medians, 1e-5)
    steered = parse("add(one, 4) at 2", directions())
    items = [Item("The quick brown", " dog", " fox"), Item("I love", " the", " fox")]
    given = [(item, steer) for item in items for steer in ((), steered)]
    rows = [Row(item.prompt, steer, SAMPLINGS[0]) for item, steer in given]
    answers = [result.token_ids for result in Engine(tiny).generate(rows)]
    unsteered = [answers[at - at % 2] for at in range(len(rows))]
    asked = [item for item, _ in given]
    measured = [Measured(Engine(model), rows, asked, unsteered) for model in (moved, tiny)]
    for name in ("length", "surprise", "kl_mean", "propensity"):
        mine, other = (METRICS[name](one) for one in measured)
        assert mine == pytest.approx(other, abs=1e-4), name


# --- what a step costs ----------------------------------------------------------------------------


def a_step(gpu: Counts, model: SteeringModel, rows: list[Row], taps=()) -> Counts:
    """The counts of one decoding step after some others, in which no row came or went."""
    stepper = Engine(model).stepper()
    for row in rows:
        stepper.add(row, taps)
    for _ in range(4):
        gpu.reset()
        assert [event.finish for event in stepper.step()] == [None] * len(rows)
    return gpu


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[int, Path]:
    """Models in bfloat16, by their number of layers."""
    return {
        layers: make_llama(
            tmp_path_factory.mktemp("layers"), torch.bfloat16, num_hidden_layers=layers
        )
        for layers in (6, 3)
    }


def endless(folder: Path) -> SteeringModel:
    """A model on the fake GPU that chooses no stop id."""
    model = SteeringModel.load(folder, dtype="bfloat16")
    with torch.no_grad():
        model.hf.lm_head.weight[list(model.stop_ids)] = 0
    return on_gpu(model)


def going(rows: list[Row]) -> list[Row]:
    sampling = Sampling(0.5, top_k=20, repetition_penalty=1.1, max_new_tokens=9)
    return [Row(row.prompt, row.steer, sampling, row.seed) for row in rows]


@pytest.mark.parametrize("taps", [(), TAPS], ids=["no taps", "taps"])
@pytest.mark.parametrize("count", [1, 8, 42])
def test_a_step_waits_little_whatever_the_rows(gpu, folders, rows, count, taps):
    step = a_step(gpu, endless(folders[6]), going(rows[-count:]), taps)
    assert step.waits <= MOST_WAITS, step.syncs


@pytest.mark.parametrize(("prompts", "shelves"), [(PROMPTS[:1], 1), (PROMPTS, 3)])
def test_an_unsteered_step_launches_little(gpu, folders, prompts, shelves):
    rows = going([Row(prompt) for prompt in prompts])
    many, few = (a_step(gpu, endless(folders[n]), rows).launches.total() for n in (6, 3))
    assert few * 2 > many > few
    joined = shelves > 1  # parts of z, one after the other
    assert (many - few) / 3 <= MOST_LAUNCHES + MORE_LAUNCHES * (shelves - 1) + joined


def test_steering_of_the_prompt_alone_costs_a_step_nothing(gpu, folders):
    text = "add_norm_kept(one, 4) at 2 on prompt; clamp(two, 3) at mlp_out 1 on prompt"
    model = endless(folders[6])
    plain, steered = (
        a_step(gpu, model, going([Row(prompt, steer) for prompt in PROMPTS])).launches
        for steer in ((), parse(text, directions()))
    )
    assert steered == plain


@pytest.mark.parametrize("work", [Engine.generate, read_texts])
def test_attention_is_fused_and_nothing_is_in_float64(gpu, folders, rows, work):
    model = endless(folders[6])
    gpu.reset()
    work(Engine(model), going(rows))
    assert gpu.launches and not gpu.doubles and not gpu.math_attention
