"""`tree="auto"`: real measurements, and the choice follows them."""

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


def test_a_guard_stops_what_does_not_pay_and_tries_more_and_more_rarely():
    guard = PayGuard(plain_seconds=1.0, window=3)
    drafted = []
    for _ in range(20):
        drafted.append(guard.begin())
        if drafted[-1]:
            assert guard.pays(1, 1.5)
            assert guard.pays(3, 1.5)
            assert not guard.pays(1, 2.5)  # five tokens in 5.5 seconds
    assert [n for n, found in enumerate(drafted) if found] == [0, 2, 6, 14]
    while not guard.begin():
        pass
    assert all(guard.pays(2, 1.5) for _ in range(6))
    assert guard.failures == 0
    assert guard.begin()


@pytest.mark.parametrize(("plain_seconds", "windows"), [(0.0, 1), (1e9, 99)])
def test_a_guarded_generation_emits_the_same_tokens(tiny, drafter, monkeypatch, plain_seconds, windows):
    drafter.acceptance = [[0.9, 0.0], [0.9, 0.0], [0.9, 0.0]]
    monkeypatch.setattr(module, "measure_passes", lambda *a, **k: {1: 1.0, 8: 1.0})
    monkeypatch.setattr(module, "measure_drafts", lambda *a, **k: [0.0, 0.0, 0.0])
    decoder = SpeculativeDecoder(tiny.target, drafter, tree="auto")
    decoder.guard = PayGuard(plain_seconds, window=4)
    calls, propose = [], drafter.propose
    monkeypatch.setattr(drafter, "propose", lambda state: calls.append(1) or propose(state))
    plain = SpeculativeDecoder(tiny.target).generate([[1, 2, 3]], max_new_tokens=40)
    found = decoder.generate([[1, 2, 3]], max_new_tokens=40)
    assert torch.equal(found.sequences, plain.sequences)
    passes = len(found.acceptance_lengths[0])
    assert len(calls) == min(passes, 4 * windows + 1)  # the first reads the prompt and is not counted
    assert passes > 4
    decoder.generate([[1, 2, 3]], max_new_tokens=8)
    assert (len(calls) == 5) == (windows == 1)  # this one is skipped after a failure


def test_a_drafter_without_measured_acceptance_is_guarded(tiny, drafter):
    """Prompt lookup is never trained; what it brings shows while decoding."""
    for unmeasured, depth in ((drafter, 3), (PromptLookup(), 4)):
        decoder = SpeculativeDecoder(tiny.target, unmeasured, tree="auto")
        assert decoder.tree == (1,) * depth
        assert decoder.guard.plain_seconds > 0


def test_short_generations_share_a_window():
    """A useless drafter must not run in every generation only because each of them is short."""
    guard = PayGuard(plain_seconds=1.0, window=12)
    for _ in range(2):
        assert guard.begin()
        assert all(guard.pays(1, 1.5) for _ in range(5))
    assert guard.begin()
    assert guard.pays(1, 1.5)
    assert not guard.pays(1, 1.5)
    assert not guard.begin()


def test_a_drafter_of_another_target_is_refused(tiny, drafter):
    with pytest.raises(ValueError, match="was built for another target"):
        SpeculativeDecoder(CausalLM.from_transformers(tiny.make(9)), drafter)
