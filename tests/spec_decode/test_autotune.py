"""`tree="auto"`: real measurements, and the choice follows them."""

import itertools
import random
from collections.abc import Iterator

import pytest
import torch

from spec_decode import autotune as module
from spec_decode.autotune import autotune, measure_drafts, measure_passes
from spec_decode.decoder import SpeculativeDecoder
from spec_decode.drafters import DrafterSpec, PromptLookup
from spec_decode.guard import PayGuard
from spec_decode.models import CausalLM


@pytest.fixture
def drafter(tiny):
    return DrafterSpec("fast_eagle", {"depth": 3}).build(tiny.target).eval().requires_grad_(False)


def test_measurements(tiny, drafter):
    passes = measure_passes(tiny.target, (1, 8), length=20, repeats=3)
    assert set(passes) == {1, 8}
    drafts = measure_drafts(tiny.target, drafter, 3, width=2, length=20, repeats=3)
    assert len(drafts) == 3
    assert all(0 < t < 5 for t in [*passes.values(), *drafts])


def test_the_choice_follows_acceptance_and_cost(tiny, drafter, monkeypatch):
    monkeypatch.setattr(module, "measure_passes", lambda *a, **k: {1: 1.0, 8: 1.2, 16: 5.0})
    monkeypatch.setattr(module, "measure_drafts", lambda *a, **k: [0.1, 0.2, 0.3])
    drafter.acceptance = [[0.8, 0.1], [0.7, 0.1], [0.6, 0.1]]
    good = autotune(tiny.target, drafter)
    assert len(good.widths) == 3
    assert sum(good.widths) == 6  # as many as fit into 8 nodes
    assert good.speedup > 1.5
    assert SpeculativeDecoder(tiny.target, drafter, tree="auto").tree == good.widths
    drafter.acceptance = [[0.1, 0.0], [0.1, 0.0], [0.1, 0.0]]
    assert autotune(tiny.target, drafter).widths == ()


def test_a_useless_drafter_is_never_called(tiny, drafter, monkeypatch):
    drafter.acceptance = [[0.0], [0.0], [0.0]]
    decoder = SpeculativeDecoder(tiny.target, drafter, tree="auto")
    assert decoder.tree == ()
    monkeypatch.setattr(drafter, "propose", lambda state: pytest.fail("called"))
    plain = SpeculativeDecoder(tiny.target).generate([[1, 2, 3]], max_new_tokens=8)
    assert torch.equal(decoder.generate([[1, 2, 3]], max_new_tokens=8).sequences, plain.sequences)


def decode(guard: PayGuard, generations: int, length: int, cost: float, taus: Iterator[float]) -> tuple[float, int]:
    """Seconds of generations of so many tokens, a plain pass taking 1, and how many passes were drafted."""
    seconds, passes = 0.0, 0
    for _ in range(generations):
        drafting, tokens = guard.begin(), 0.0
        while tokens < length:
            if drafting:
                tau = next(taus)
                drafting = guard.pays(tau, cost)
                tokens, seconds, passes = tokens + tau, seconds + cost, passes + 1
            else:
                guard.plain()
                tokens, seconds = tokens + 1, seconds + 1
    return seconds, passes


@pytest.mark.parametrize("cost", [1.01, 1.2, 3.0, 50.0])
def test_drafting_that_never_pays_costs_little(cost):
    seconds, passes = decode(PayGuard(plain_seconds=1.0), 200, 100, cost, itertools.repeat(1.0))
    assert passes >= 1
    assert seconds <= 1.01 * 200 * 100 + 2 * (8 + cost)  # the share, the first filling, and the last pass of a try


def test_drafting_that_pays_goes_on_whatever_single_passes_do():
    rng = random.Random(0)
    taus = iter(lambda: rng.choice([1.0, 1.0, 1.0, 3.0]), None)  # 1.5 tokens on average
    guard = PayGuard(plain_seconds=2.0 / 1.2)
    _, passes = decode(guard, 50, 100, 2.0, taus)
    assert passes > 0.9 * 50 * 100 / 1.5


def test_drafting_is_tried_again():
    guard = PayGuard(plain_seconds=1.0)
    decode(guard, 10, 100, 2.0, itertools.repeat(1.0))
    _, passes = decode(guard, 20, 100, 1.2, itertools.repeat(2.0))
    assert passes > 500


@pytest.mark.parametrize(("plain_seconds", "stopped"), [(1e-9, True), (1e9, False)])
def test_a_guarded_generation_emits_the_same_tokens(tiny, drafter, monkeypatch, plain_seconds, stopped):
    drafter.acceptance = [[0.9, 0.0], [0.9, 0.0], [0.9, 0.0]]
    monkeypatch.setattr(module, "measure_passes", lambda *a, **k: {1: 1.0, 8: 1.0})
    monkeypatch.setattr(module, "measure_drafts", lambda *a, **k: [0.0, 0.0, 0.0])
    decoder = SpeculativeDecoder(tiny.target, drafter, tree="auto")
    decoder.guard = PayGuard(plain_seconds)
    calls, propose = [], drafter.propose
    monkeypatch.setattr(drafter, "propose", lambda state: calls.append(1) or propose(state))
    plain = SpeculativeDecoder(tiny.target).generate([[1, 2, 3]], max_new_tokens=40)
    found = decoder.generate([[1, 2, 3]], max_new_tokens=40)
    assert torch.equal(found.sequences, plain.sequences)
    passes = len(found.acceptance_lengths[0])
    assert len(calls) == (2 if stopped else passes)  # the first reads the prompt and is not counted
    assert passes > 2
    decoder.generate([[1, 2, 3]], max_new_tokens=8)
    assert (len(calls) == 2) == stopped  # this one does not draft at all


def test_a_drafter_without_measured_acceptance_is_guarded(tiny, drafter):
    """Prompt lookup is never trained; what it brings shows while decoding."""
    for unmeasured, depth in ((drafter, 3), (PromptLookup(), 4)):
        decoder = SpeculativeDecoder(tiny.target, unmeasured, tree="auto")
        assert decoder.tree == (1,) * depth
        assert decoder.guard.plain_seconds > 0


def test_short_generations_share_an_account():
    """A useless drafter must not run in every generation only because each of them is short."""
    seconds, passes = decode(PayGuard(plain_seconds=1.0), 1000, 5, 1.5, itertools.repeat(1.0))
    assert 16 <= passes <= 16 + 0.02 * 5000
    assert seconds <= 1.01 * 5000 + 2 * (8 + 1.5)


def test_a_drafter_of_another_target_is_refused(tiny, drafter):
    with pytest.raises(ValueError, match="was built for another target"):
        SpeculativeDecoder(CausalLM.from_transformers(tiny.make(9)), drafter)
