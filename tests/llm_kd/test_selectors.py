"""Weights, acceptance and temperatures of every selector against plain formulas; AdaKD's share; states."""

import math
import statistics

import pytest
import torch

from kd_common.registry import subclasses
from llm_kd.selection import Selector
from llm_kd.selection.acceptance import speck_accept_probability, topk_accept

SELECTORS = subclasses(Selector)

F64 = torch.float64
CPU = torch.device("cpu")


def pair(rows=30, vocab=12):
    return 2 * torch.randn(rows, vocab, dtype=F64), 2 * torch.randn(rows, vocab, dtype=F64)


def apply(selector, student, teacher):
    return selector.select(selector.score(student, teacher), selector.draw(len(student), CPU))


def entropies(logits):
    p = logits.softmax(-1)
    return -(p * p.log()).sum(-1)


def test_every_file_is_a_selector():
    assert set(SELECTORS) == {"Uniform", "TopK", "SpecK", "SpecKExpected", "AdaKD", "EntropyTopP", "TSDKD"}


@pytest.mark.parametrize("name", SELECTORS)
def test_shapes_dtypes_and_empty_batches(name):
    selector = SELECTORS[name]()
    for dtype in (torch.float32, F64):
        for rows in (0, 1, 7):
            chosen = apply(selector, *(z.to(dtype) for z in pair(rows)))
            assert chosen.weights.shape == chosen.accepted.shape == (rows,)
            assert chosen.weights.dtype == chosen.accepted.dtype == dtype
            assert ((chosen.weights >= 0) & (chosen.weights <= 1)).all()
            assert torch.as_tensor(chosen.temperature).isfinite().all()


@pytest.mark.parametrize("name", [n for n in SELECTORS if SELECTORS[n].per_row])
def test_per_row_selectors_do_not_depend_on_the_split(name):
    selector = SELECTORS[name]().eval()
    student, teacher = pair()
    noise = selector.draw(30, CPU)
    whole = selector.select(selector.score(student, teacher), noise).weights
    cut = slice(11, 17)
    part = selector.select(selector.score(student[cut], teacher[cut]), None if noise is None else noise[cut]).weights
    assert torch.equal(part, whole[cut])


def test_none_weighs_all_tokens_alike():
    chosen = apply(SELECTORS["Uniform"](), *pair())
    assert (chosen.weights == 1).all()
    assert (chosen.accepted == 1).all()


@pytest.mark.parametrize("beta", [0.0, 0.01, 0.3])
def test_topk_and_speck_expected(beta):
    student, teacher = pair()
    for name, accepted in (
        ("TopK", topk_accept(student, teacher, 3).double()),
        ("SpecKExpected", speck_accept_probability(student, teacher, 3)),
    ):
        chosen = apply(SELECTORS[name](k=3, beta=beta), student, teacher)
        torch.testing.assert_close(chosen.accepted, accepted)
        torch.testing.assert_close(chosen.weights, beta + (1 - beta) * accepted)
        assert 0 < accepted.mean() < 1


def test_speck_accepts_with_its_probability():
    student, teacher = (2 * torch.randn(12, dtype=F64) for _ in range(2))
    selector = SELECTORS["SpecK"](k=2, beta=0.1)
    chosen = apply(selector, student.expand(20_000, -1), teacher.expand(20_000, -1))
    chance = speck_accept_probability(student, teacher, 2).item()
    assert chosen.accepted.mean().item() == pytest.approx(chance, abs=4 * math.sqrt(chance * (1 - chance) / 20_000))
    assert set(chosen.weights.tolist()) == {0.1, 1.0}


def test_speck_does_not_reject_what_is_not_a_number():
    student, teacher = pair(rows=3)
    student[1] = math.nan
    weights = apply(SELECTORS["SpecK"](beta=0.0, seed=0), student, teacher).weights
    assert weights[1] == 1  # with weight 0 the row would be skipped, and no loss would show that the model is broken


def test_speck_noise_is_new_per_batch_and_resumes():
    selector = SELECTORS["SpecK"](seed=5)
    first, second = selector.draw(50, CPU), selector.draw(50, CPU)
    assert not torch.equal(first, second)
    twin = SELECTORS["SpecK"](seed=5)
    twin.load_state_dict(selector.state_dict())
    selector.eval()
    in_validation = selector.draw(50, CPU)
    selector.train()
    third = selector.draw(50, CPU)
    assert torch.equal(in_validation, third)  # validation did not advance the state
    assert torch.equal(twin.draw(50, CPU), third)
    assert torch.equal(SELECTORS["SpecK"](seed=5).draw(50, CPU), first)
    assert not torch.equal(SELECTORS["SpecK"](seed=6).draw(50, CPU), first)
    with pytest.raises(ValueError, match="Spec-k is random"):
        selector.select(torch.ones(3))


def test_speck_noise_differs_between_ranks(monkeypatch):
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    draws = []
    for rank in range(2):
        monkeypatch.setattr(torch.distributed, "get_rank", lambda rank=rank: rank)
        draws.append(SELECTORS["SpecK"]().draw(50, CPU))
    monkeypatch.undo()
    assert not torch.equal(*draws)


@pytest.mark.parametrize("share", [0.1, 0.29, 0.5, 1.0])
def test_adakd_keeps_the_hardest_tokens_with_their_temperature(share):
    student, teacher = pair(100)
    selector = SELECTORS["AdaKD"](c=0.6)
    selector.share = share
    chosen = apply(selector, student, teacher)
    hellinger = ((student.softmax(-1).sqrt() - teacher.softmax(-1).sqrt()) ** 2).sum(-1).sqrt() / math.sqrt(2)
    count = round(100 * share)
    hardest = set(hellinger.topk(count).indices.tolist())
    assert set(chosen.weights.nonzero()[:, 0].tolist()) == hardest
    assert torch.equal(chosen.accepted, chosen.weights)
    assert chosen.weights.sum() == count
    median = statistics.median_low([hellinger[i].item() for i in hardest])
    torch.testing.assert_close(chosen.temperature, torch.exp(-0.6 * torch.tanh(torch.log(hellinger / median))))
    order = hellinger.argsort()
    assert (chosen.temperature[order].diff() <= 0).all()  # hard tokens get a low temperature


def test_adakd_on_equal_models_and_one_token():
    student, teacher = pair(6)
    equal = apply(SELECTORS["AdaKD"](), student, student)
    torch.testing.assert_close(equal.temperature, torch.ones(6, dtype=F64))
    selector = SELECTORS["AdaKD"]()
    selector.share = 0.1
    single = apply(selector, student[:1], teacher[:1])
    assert single.weights.tolist() == [1.0]
    assert single.temperature.tolist() == [1.0]


def test_adakd_share_follows_the_loss():
    selector = SELECTORS["AdaKD"](tolerance=0.1, rate=0.5, warmup=0.1, ema=0.0, min_share=0.2)
    for step, loss in ((1, 9.0), (9, 7.0)):  # warm-up: steps below 10 of 100
        selector.on_step(loss, step, 100)
    assert (selector.share, selector.reference) == (1.0, None)
    selector.on_step(5.0, 10, 100)
    assert (selector.share, selector.reference) == (1.0, 5.0)
    for step, (loss, share, reference) in enumerate(
        [
            (4.6, 1.0, 5.0),  # within the tolerance
            (4.4, 0.5, 4.4),  # fell: focus
            (3.0, 0.25, 3.0),
            (2.0, 0.2, 2.0),  # floor
            (2.1, 0.2, 2.0),
            (2.5, 0.3, 2.5),  # rose: widen
            (9.0, 0.45, 9.0),
            (20.0, 0.675, 20.0),
            (40.0, 1.0, 40.0),  # ceiling
        ],
        start=11,
    ):
        selector.on_step(loss, step, 100)
        assert selector.share == pytest.approx(share)
        assert selector.reference == reference


def test_adakd_running_mean_and_state():
    selector = SELECTORS["AdaKD"](ema=0.9)
    mean = None
    for step, loss in enumerate([4.0, 3.0, 1.0], start=1):
        selector.on_step(loss, step, 10)
        mean = loss if mean is None else 0.9 * mean + 0.1 * loss
        assert selector.mean_loss == pytest.approx(mean)
    twin = SELECTORS["AdaKD"](ema=0.9)
    twin.load_state_dict(selector.state_dict())
    for module in (selector, twin):
        module.on_step(0.1, 4, 10)
    assert (twin.share, twin.mean_loss, twin.reference) == (selector.share, selector.mean_loss, selector.reference)
    assert twin.share < 1
    with pytest.raises(ValueError, match="which is inf after step 5"):
        twin.on_step(math.inf, 5, 10)


def test_entropy_top_p_keeps_the_least_sure_tokens():
    student, teacher = pair(40)
    chosen = apply(SELECTORS["EntropyTopP"](p=0.25), student, teacher)
    assert set(chosen.weights.nonzero()[:, 0].tolist()) == set(entropies(student).topk(10).indices.tolist())
    assert torch.equal(chosen.accepted, chosen.weights)
    ties = apply(SELECTORS["EntropyTopP"](p=0.25), student[:1].expand(8, -1), teacher[:1].expand(8, -1))
    assert ties.weights.tolist() == [1.0, 1.0] + [0.0] * 6


def test_tsdkd_weighs_by_the_entropy_gap():
    student, teacher = pair()
    chosen = apply(SELECTORS["TSDKD"](), student, teacher)
    torch.testing.assert_close(chosen.weights, torch.sigmoid(entropies(student) - entropies(teacher)))
    assert (chosen.accepted == 1).all()


@pytest.mark.parametrize("name", SELECTORS)
def test_extreme_logits(name):
    student, teacher = pair()
    student, teacher = (z.float() * 1e4 for z in (student, teacher))
    student[:, 3] = teacher[:, 3] = -math.inf
    chosen = apply(SELECTORS[name](), student, teacher)
    assert chosen.weights.isfinite().all()
    assert torch.as_tensor(chosen.temperature).isfinite().all()


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("TopK", {"k": 0}),
        ("TopK", {"beta": -0.1}),
        ("SpecK", {"beta": 1.1}),
        ("SpecKExpected", {"k": 0}),
        ("AdaKD", {"c": -1.0}),
        ("AdaKD", {"rate": 1.0}),
        ("AdaKD", {"min_share": 0.0}),
        ("EntropyTopP", {"p": 0.0}),
        ("EntropyTopP", {"p": 1.1}),
    ],
)
def test_bad_settings_fail_at_once(name, settings):
    with pytest.raises(ValueError, match=next(iter(settings))):
        SELECTORS[name](**settings)
