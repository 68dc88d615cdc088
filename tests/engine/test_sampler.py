import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy import stats
from transformers import (
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from interp_steer.engine.row import Sampling
from interp_steer.engine.sampler import Sampler, gumbel
from interp_steer.errors import RequestError

CPU = torch.device("cpu")
VOCAB = 60
DRAWS = 20_000
UNLIKELY = 1e-4  # the draws are fixed by their seeds: a test that passes once passes always


def random_logits(batch: int, seed: int = 0, vocab: int = VOCAB) -> torch.Tensor:
    rng = np.random.default_rng(seed)
    return torch.tensor(rng.normal(size=(batch, vocab)) * 3, dtype=torch.float32)


def steps(batch: int, value: int = 0) -> torch.Tensor:
    return torch.full((batch,), value)


def any_sampling(draw: random.Random) -> Sampling:
    return Sampling(
        temperature=draw.choice([0.0, 0.2, 0.7, 1.0, 3.0]),
        top_p=draw.choice([1.0, 1.0, 0.95, 0.5, 0.1, 1e-6]),
        top_k=draw.choice([0, 0, 1, 5, VOCAB, 10 * VOCAB]),
        repetition_penalty=draw.choice([1.0, 1.1, 2.0, 0.8]),
    )


def mask_of(seen_ids: list[list[int]], vocab: int = VOCAB) -> torch.Tensor:
    mask = torch.zeros(len(seen_ids), vocab, dtype=torch.bool)
    for row, ids in enumerate(seen_ids):
        for i in ids:
            mask[row, i] = True
    return mask


def hugging_face(logits: torch.Tensor, ids: list[int], how: Sampling) -> torch.Tensor:
    """One row's scores by `transformers`, in the order of its `generate`."""
    parts = LogitsProcessorList()
    if how.repetition_penalty != 1:
        parts.append(RepetitionPenaltyLogitsProcessor(how.repetition_penalty))
    if how.temperature > 0:
        parts.append(TemperatureLogitsWarper(how.temperature))
        if how.top_k:
            parts.append(TopKLogitsWarper(how.top_k))
        if how.top_p < 1:
            parts.append(TopPLogitsWarper(how.top_p))
    return parts(torch.tensor([ids]), logits[None].clone())[0]


# --- scores -----------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(20))
def test_scores_without_noise_are_hugging_faces(seed):
    draw = random.Random(seed)
    settings = [any_sampling(draw) for _ in range(8)]
    seeds = [draw.randint(-(2**70), 2**70) for _ in settings]
    ids = [[draw.randrange(VOCAB) for _ in range(draw.randint(1, 30))] for _ in settings]
    logits = random_logits(8, seed)
    if seed % 2:  # none needs all of its scores ranked
        settings = [replace(s, top_k=draw.choice([1, 5, 17])) for s in settings]
    if seed % 4 < 2:
        logits = logits.round()  # ties
    if seed % 4 < 2:  # a cut by probability is decided by order among ties, which is free
        settings = [Sampling(s.temperature, 1.0, s.top_k, s.repetition_penalty) for s in settings]
    sampler = Sampler(settings, seeds, mask_of(ids), CPU)
    scores = sampler.scores(logits, steps(8, 3))
    for row, how in enumerate(settings):
        got = scores[row]
        if how.temperature > 0:
            got = got - gumbel(sampler.seeds[row : row + 1], steps(1, 3), VOCAB)[0]
        want = hugging_face(logits[row], ids[row], how)
        assert torch.equal(got.isinf(), want.isinf())
        kept = ~want.isinf()
        assert torch.allclose(got[kept], want[kept], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("how", [Sampling(0.8, top_p=1e-9), Sampling(0.8, top_k=1)])
def test_the_best_token_always_stays(how):
    logits = random_logits(30)
    sampler = Sampler([how] * 30, list(range(30)), None, CPU)
    assert torch.equal(sampler.pick(logits, steps(30)), logits.argmax(-1))


def test_top_p_keeps_the_smallest_set_that_reaches_it():
    logits = torch.tensor([[0.5, 0.25, 0.125, 0.0625, 0.0625]]).log()
    for top_p, kept in [(0.4, 1), (0.6, 2), (0.75 - 1e-4, 2), (0.75 + 1e-4, 3), (0.9, 4), (1, 5)]:
        scores = Sampler([Sampling(1.0, top_p=top_p)], [0], None, CPU).scores(logits, steps(1))
        assert (~scores.isinf()).sum() == kept


def test_top_p_counts_only_what_top_k_kept():
    logits = torch.tensor([[0.4, 0.3, 0.2, 0.1]]).log()
    how = Sampling(1.0, top_p=0.55, top_k=2)  # 4/7 is more than 0.55, 0.4 would not be
    scores = Sampler([how], [0], None, CPU).scores(logits, steps(1))
    assert (~scores.isinf()).sum() == 1


def test_scores_of_half_precision_logits_are_float32():
    logits = random_logits(2).bfloat16()
    for how in (Sampling(), Sampling(0.7)):
        assert Sampler([how] * 2, [1, 2], None, CPU).scores(logits, steps(2)).dtype == torch.float32


# --- greedy -----------------------------------------------------------------------------------


def test_temperature_zero_is_greedy_whatever_its_seed_and_neighbours():
    logits = random_logits(40)
    settings = [Sampling(0.0, top_p=0.5, top_k=3) if i % 2 else Sampling(2.0) for i in range(40)]
    alone = Sampler(settings[1::2], list(range(20)), None, CPU).pick(logits[1::2], steps(20))
    mixed = Sampler(settings, list(range(40)), None, CPU).pick(logits, steps(40))
    assert torch.equal(alone, logits[1::2].argmax(-1))
    assert torch.equal(mixed[1::2], logits[1::2].argmax(-1))
    assert not torch.equal(mixed[::2], logits[::2].argmax(-1))


def test_what_was_chosen_counts_as_seen():
    logits = torch.tensor([[2.0, 1.5, -1.0], [2.0, 1.5, -1.0]])
    settings = [Sampling(repetition_penalty=2.0), Sampling()]
    sampler = Sampler(settings, [0, 0], torch.zeros(2, 3, dtype=torch.bool), CPU)
    chosen = []
    for i in range(4):
        picked = sampler.pick(logits, steps(2, i))
        assert torch.equal(picked, sampler.pick(logits, steps(2, i)))  # marks nothing
        sampler.mark(picked)
        chosen.append(picked.tolist())
    assert chosen == [[0, 0], [1, 0], [0, 0], [0, 0]]  # 2.0, then 1.5, then 1.0 against .75


# --- draws ------------------------------------------------------------------------------------


def fits(chosen: torch.Tensor, probabilities: np.ndarray) -> bool:
    counts = np.bincount(chosen.numpy(), minlength=len(probabilities))
    possible = probabilities > 0
    assert counts[~possible].sum() == 0
    expected = probabilities[possible] / probabilities.sum() * len(chosen)
    return bool(stats.chisquare(counts[possible], expected).pvalue > UNLIKELY)


def softmax(row: torch.Tensor) -> np.ndarray:
    wide = np.exp(row.double().numpy() - float(row.max()))
    return wide / wide.sum()


@pytest.mark.parametrize("first", [0, -DRAWS // 2, 2**32 - 77, 2**63 - 5000])
@pytest.mark.parametrize("temperature", [0.6, 1.7])
def test_draws_over_seeds_follow_softmax(first, temperature):
    row = random_logits(1, vocab=12)[0] / 2
    seeds = list(range(first, first + DRAWS))
    sampler = Sampler([Sampling(temperature)] * DRAWS, seeds, None, CPU)
    chosen = sampler.pick(row.expand(DRAWS, 12), steps(DRAWS, 5))
    assert fits(chosen, softmax(row / temperature))


@pytest.mark.parametrize("seed", [0, 1, -1, 123456789, 2**63, -(2**63)])
def test_draws_over_steps_follow_softmax(seed):
    row = random_logits(1, 1, vocab=12)[0] / 2
    sampler = Sampler([Sampling(1.0)] * DRAWS, [seed] * DRAWS, None, CPU)
    assert fits(sampler.pick(row.expand(DRAWS, 12), torch.arange(DRAWS)), softmax(row))


def test_draws_under_a_cut_follow_the_renormalised_softmax():
    row = random_logits(1, 2, vocab=12)[0] / 2
    how = Sampling(0.9, top_p=0.9, top_k=7)
    sampler = Sampler([how] * DRAWS, list(range(DRAWS)), None, CPU)
    chosen = sampler.pick(row.expand(DRAWS, 12), steps(DRAWS))
    assert fits(chosen, softmax(hugging_face(row, [0], how)))


@pytest.mark.parametrize(
    ("seed_apart", "step_apart"), [(1, 0), (2, 0), (2**32, 0), (0, 1), (0, 2), (1, 1), (1, -1)]
)
def test_draws_of_neighbouring_seeds_and_steps_are_independent(seed_apart, step_apart):
    row = torch.zeros(DRAWS, 6)

    def drawn(seed: int, step: int) -> np.ndarray:
        seeds = [seed + 2 * (i // 100) for i in range(DRAWS)]
        where = torch.tensor([step + 2 * (i % 100) for i in range(DRAWS)])
        return Sampler([Sampling(1.0)] * DRAWS, seeds, None, CPU).pick(row, where).numpy()

    table = np.zeros((6, 6))
    np.add.at(table, (drawn(7, 9), drawn(7 + seed_apart, 9 + step_apart)), 1)
    assert stats.chi2_contingency(table).pvalue > UNLIKELY


def test_noise_is_gumbel_and_uncorrelated_between_tokens():
    noise = gumbel(torch.arange(2000), steps(2000), 50).double().numpy()
    assert stats.kstest(noise.ravel()[:50_000], stats.gumbel_r.cdf).pvalue > UNLIKELY
    correlations = np.corrcoef(noise.T)[np.triu_indices(50, 1)]
    assert np.abs(correlations).max() < 5 / np.sqrt(2000)


def test_noise_is_finite_over_a_large_vocabulary():
    noise = gumbel(torch.tensor([0, -1, 2**62, -(2**63)]), steps(4), 500_000)
    assert noise.isfinite().all()
    assert noise.max() > 10


def test_a_row_draws_the_same_alone_and_among_any_neighbours():
    draw = random.Random(1)
    settings = [any_sampling(draw) for _ in range(12)]
    seeds = [draw.randint(-(2**40), 2**40) for _ in settings]
    ids = [[draw.randrange(VOCAB) for _ in range(9)] for _ in settings]
    logits, where = random_logits(12), torch.arange(12) * 7
    together = Sampler(settings, seeds, mask_of(ids), CPU).scores(logits, where)
    for i in range(12):
        part = slice(i, i + 1)
        alone = Sampler(settings[part], seeds[part], mask_of(ids[part]), CPU)
        assert torch.equal(alone.scores(logits[part], where[part])[0], together[i])
    order = torch.randperm(12)
    turned = Sampler(
        [settings[i] for i in order],
        [seeds[i] for i in order],
        mask_of([ids[i] for i in order]),
        CPU,
    )
    assert torch.equal(turned.scores(logits[order], where[order]), together[order])


def test_equal_seeds_draw_equally_and_others_do_not():
    logits = torch.zeros(1, VOCAB)
    seeds = [3, -3, 3 + 2**32, 3 + 2**40, 3 - 2**63, 4, 2**62, 0, -1]

    def drawn(seed: int) -> tuple[int, ...]:
        sampler = Sampler([Sampling(1.0)] * 30, [seed] * 30, None, CPU)
        return tuple(sampler.pick(logits.expand(30, -1), torch.arange(30)).tolist())

    assert drawn(3) == drawn(3)
    assert len({drawn(seed) for seed in seeds}) == len(seeds)
    assert drawn(2**64 + 3) == drawn(3)  # a seed has 64 bits
    assert drawn(2**63) == drawn(-(2**63))


@pytest.mark.parametrize(
    "wrong",
    [
        {"temperature": -0.1},
        {"temperature": float("nan")},
        {"temperature": float("inf")},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"top_k": -1},
        {"repetition_penalty": 0.0},
        {"repetition_penalty": float("inf")},
        {"max_new_tokens": 0},
    ],
    ids=str,
)
def test_settings_that_mean_nothing_are_refused(wrong):
    (name,) = wrong
    with pytest.raises(RequestError, match=f"{name} is .*, expected "):
        Sampling(**wrong)


def test_a_row_of_numbers_that_are_none_is_told_apart():
    logits = torch.randn(4, 30)
    logits[1] = torch.nan
    logits[2, 5] = torch.inf
    logits[3, :29] = -torch.inf
    sampler = Sampler([Sampling()] * 2 + [Sampling(1.0)] * 2, [0] * 4, None, CPU)
    picked = sampler.pick(logits, steps(4)).tolist()
    assert picked == [int(logits[0].argmax()), -1, -1, 29]
