"""Automatic tuning: real measurements, and the choice follows them."""

import itertools
import math
import random
from collections import defaultdict
from collections.abc import Callable, Iterator

import pytest
import torch

from spec_decode import drafters
from spec_decode.decoding import autotune as module
from spec_decode.decoding.autotune import autotune, measure_drafts, measure_passes
from spec_decode.decoding.decoder import SpeculativeDecoder
from spec_decode.decoding.speed_monitor import SpeedMonitor
from spec_decode.drafters import FastEagle, PromptLookup, WithLookup
from spec_decode.models import CausalLM


@pytest.fixture
def drafter(tiny):
    return FastEagle(depth=3).bind(tiny.target).eval().requires_grad_(False)


def test_measurements(tiny, drafter):
    passes = measure_passes(tiny.target, (1, 8), length=20, repeats=3)
    assert set(passes) == {1, 8}
    drafts = measure_drafts(tiny.target, drafter, 3, width=2, length=20, repeats=3)
    assert len(drafts) == 3
    assert all(0 < t < 5 for t in [*passes.values(), *drafts])


def test_of_two_calls_in_a_row_the_second_is_timed(monkeypatch):
    """On a clock of its own, where a call that follows another one takes longer, and the first turn longest."""
    state = {"now": 0.0, "last": "", "calls": 0}
    monkeypatch.setattr(module.time, "perf_counter", lambda: state["now"])

    def call(name: str, again: float) -> Callable[[], object]:
        def run() -> None:
            state["calls"] += 1
            warming = 100.0 if state["calls"] <= 4 else 0.0
            state.update(now=state["now"] + warming + (again if state["last"] == name else 10.0), last=name)

        return run

    calls = [call("a", 1.0), call("b", 2.0)]
    assert module.seconds(calls, torch.device("cpu"), repeats=2) == [1.0, 2.0]
    assert state["calls"] == 12


def test_the_choice_follows_acceptance_and_cost(tiny, drafter, monkeypatch):
    monkeypatch.setattr(module, "measure_passes", lambda *a, **k: {1: 1.0, 8: 1.2, 16: 5.0})
    monkeypatch.setattr(module, "measure_drafts", lambda *a, **k: [0.1, 0.2, 0.3])
    drafter.acceptance = [[0.8, 0.1], [0.7, 0.1], [0.6, 0.1]]
    good = autotune(tiny.target, drafter)
    assert len(good.branching) == 3
    assert sum(good.branching) == 6  # as many as fit into 8 nodes
    assert good.speedup > 1.5
    assert SpeculativeDecoder.tuned(tiny.target, drafter).tree == good.branching
    drafter.acceptance = [[0.1, 0.0], [0.1, 0.0], [0.1, 0.0]]
    assert autotune(tiny.target, drafter).branching == ()


def test_a_useless_drafter_is_never_called(tiny, drafter, monkeypatch):
    drafter.acceptance = [[0.0], [0.0], [0.0]]
    decoder = SpeculativeDecoder.tuned(tiny.target, drafter)
    assert decoder.tree == ()
    monkeypatch.setattr(drafter, "propose", lambda state: pytest.fail("called"))
    plain = SpeculativeDecoder(tiny.target).generate([[1, 2, 3]], max_new_tokens=8)
    assert torch.equal(decoder.generate([[1, 2, 3]], max_new_tokens=8).sequences, plain.sequences)


def decode(
    monitor: SpeedMonitor, length: int, cost: float, taus: Iterator[float], plain: float = 1.0
) -> tuple[float, int]:
    """Seconds of so many tokens, and how many passes were drafted."""
    seconds, tokens, passes = 0.0, 0.0, 0
    while tokens < length:
        if monitor.drafts():
            tau = next(taus)
            monitor.drafted(tau, cost)
            tokens, seconds, passes = tokens + tau, seconds + cost, passes + 1
        else:
            monitor.plain(plain)
            tokens, seconds = tokens + 1, seconds + plain
    return seconds, passes


@pytest.mark.parametrize("cost", [1.01, 1.2, 3.0, 50.0])
def test_drafting_that_never_pays_costs_little(cost):
    seconds, passes = decode(SpeedMonitor(), 20_000, cost, itertools.repeat(1.0))
    assert passes >= 1
    assert seconds <= 1.015 * 20_000 + 4 + cost  # the share, the first filling, and the last pass of a try


def test_drafting_that_pays_goes_on_whatever_single_passes_do():
    rng = random.Random(0)
    taus = iter(lambda: rng.choice([1.0, 1.0, 1.0, 3.0]), None)  # 1.5 tokens on average
    monitor = SpeedMonitor()
    _, passes = decode(monitor, 5000, 2.0, taus, plain=2.0 / 1.2)
    assert passes > 0.9 * 5000 / 1.5


def test_drafting_comes_back_soon_when_it_pays_again():
    """Text on which drafting does not pay, then text on which it is twice as fast: a short while is lost."""
    slow = []
    for seed in range(20):
        rng = random.Random(seed)
        monitor = SpeedMonitor()
        decode(monitor, 1000, 1.35, itertools.repeat(1.0))
        seconds, _ = decode(monitor, 400, 1.35, iter(rng.choices([1.0, 1.0, 1.0, 8.0], k=400)))
        slow.append(400 / seconds)
    assert sum(slow) / len(slow) > 1.5  # 2.04 without the while


@pytest.mark.parametrize("before", [0.3, 0.7, 1.5, 5.0])
def test_a_machine_that_changes_its_speed_misleads_for_a_while_only(before):
    """A plain pass takes 1 now, and took something else before."""
    for tau, least in ((5 / 3, 0.95 * (5 / 3) / 1.3), (1.0, 0.97)):
        monitor = SpeedMonitor()
        decode(monitor, 1000, 1.3 * before, itertools.repeat(tau), plain=before)
        seconds, _ = decode(monitor, 20_000, 1.3, itertools.repeat(tau))
        assert 20_000 / seconds > least


def test_a_stall_of_the_machine_is_not_charged_to_drafting():
    monitor = SpeedMonitor()
    decode(monitor, 500, 1.3, itertools.repeat(2.0))
    monitor.drafted(2.0, 500.0)
    seconds, _ = decode(monitor, 500, 1.3, itertools.repeat(2.0))
    assert seconds < 0.7 * 500  # 0.65 without any plain pass


def test_one_slow_pass_at_the_start_does_not_count():
    monitor = SpeedMonitor()
    decode(monitor, 1, 1.3, itertools.repeat(1.5), plain=50.0)
    seconds, _ = decode(monitor, 5000, 1.3, itertools.repeat(1.0))
    assert seconds < 1.02 * 5000


def test_a_plain_pass_behind_drafted_ones_does_not_count():
    """It is slower wherever a processor's cache holds the weights of one kind of pass only."""
    monitor, seconds, plain = SpeedMonitor(), 0.0, True
    for _ in range(
        5000
    ):  # drafting yields 1.5 tokens in 1.6 plain passes; the first plain pass takes 1.3 of a later one
        if monitor.drafts():
            monitor.drafted(1.5, 1.6)
            seconds, plain = seconds + 1.6 / 1.5, False
        else:
            cost, plain = 1.0 if plain else 1.3, True
            monitor.plain(cost)
            seconds += cost
    assert seconds < 1.025 * 5000


def test_the_first_plain_pass_of_a_generation_does_not_count():
    monitor = SpeedMonitor()
    for _ in range(20):  # answers of one pass, each behind its prompt
        monitor.begin()
        monitor.plain(9.0)
    assert not any(monitor.drafts() for _ in range(3))  # what a plain pass takes is still unknown


def until_it_stops(monitor: SpeedMonitor, cost: float, tokens: float, behind: float) -> int:
    """Drafted passes, each followed by a plain one of other seconds, until the account is empty; at most 50."""
    for passes in range(50):
        if not monitor._drafting:
            return passes
        monitor.drafted(tokens, cost)
        monitor.plain(behind)
    return 50


def test_a_slow_plain_pass_behind_a_draft_does_not_make_drafting_look_cheap():
    """Every drafted pass loses one plain pass of the four that the account begins with."""
    monitor = SpeedMonitor()
    for _ in range(6):
        monitor.plain(1.0)
    assert until_it_stops(monitor, cost=3.0, tokens=2.0, behind=9.0) == 5


def test_every_generation_times_plain_passes_before_it_drafts():
    """Also one whose drafter has paid before."""
    monitor = SpeedMonitor()
    decode(monitor, 50, 1.3, itertools.repeat(3.0), plain=2.0)
    for _ in range(3):
        monitor.begin()
        asked = []
        for _ in range(6):
            asked.append(monitor.drafts())
            monitor.drafted(3.0, 1.3) if asked[-1] else monitor.plain(1.0)
        assert asked == [False] * 4 + [True] * 2  # the first one only warms up


@pytest.mark.parametrize("probe", [3, 5, 16])
def test_two_passes_in_a_row_of_so_many_are_plain(probe):
    monitor = SpeedMonitor(interval=probe)
    decode(monitor, 3 * probe + 12, 1.3, itertools.repeat(3.0))
    asked = []
    for _ in range(6 * probe):
        asked.append(monitor.drafts())
        monitor.drafted(3.0, 1.3) if asked[-1] else monitor.plain(1.0)
    runs = [(drafts, len(list(run))) for drafts, run in itertools.groupby(asked)][1:-1]
    assert len(runs) > 8
    assert set(runs) == {(False, 2), (True, probe - 2)}


@pytest.mark.parametrize("pays", [False, True])
def test_a_guarded_generation_emits_the_same_tokens(tiny, drafter, monkeypatch, pays):
    drafter.acceptance = [[0.9, 0.0], [0.9, 0.0], [0.9, 0.0]]
    monkeypatch.setattr(module, "measure_passes", lambda *a, **k: {1: 1.0, 8: 1.0})
    monkeypatch.setattr(module, "measure_drafts", lambda *a, **k: [0.0, 0.0, 0.0])
    decoder = SpeculativeDecoder.tuned(tiny.target, drafter)
    monitor = decoder.monitors[1]
    monkeypatch.setattr(SpeedMonitor, "drafted", lambda self, tokens, seconds: setattr(self, "_drafting", pays))
    calls, propose = [], drafter.propose
    monkeypatch.setattr(drafter, "propose", lambda state: calls.append(1) or propose(state))
    plain = SpeculativeDecoder(tiny.target).generate([[1, 2, 3]], max_new_tokens=40)
    monitor.retry = math.inf
    found = decoder.generate([[1, 2, 3]], max_new_tokens=40)
    assert torch.equal(found.sequences, plain.sequences)
    passes = len(found.acceptance_lengths[0])
    assert len(calls) == (passes - monitor.warmup - 1 if pays else 1)  # the first passes are plain ones
    assert passes > 7
    before = len(calls)
    decoder.generate([[1, 2, 3]], max_new_tokens=8)
    assert (len(calls) > before) == pays


def test_a_generation_does_not_trust_what_plain_passes_took_in_an_earlier_one():
    """The machine is twice as fast by then: measured by the old times a useless drafter would seem to pay."""
    monitor = SpeedMonitor()
    decode(monitor, 50, 2.6, itertools.repeat(1.0), plain=2.0)
    monitor.begin()
    assert [monitor.drafts() for _ in range(4)] == [False] * 4
    seconds, _ = decode(monitor, 2000, 1.3, itertools.repeat(1.0))
    assert seconds < 2000 * 1.02


def test_the_guard_of_a_batch_counts_tokens_per_unfinished_row(tiny, monkeypatch):
    drafter = FastEagle(depth=3).bind(tiny.target).eval().requires_grad_(False)
    decoder = SpeculativeDecoder(tiny.target, drafter, tree=(2, 2, 2))
    decoder.monitors, counted = defaultdict(SpeedMonitor), []
    monkeypatch.setattr(SpeedMonitor, "drafted", lambda self, tokens, seconds: counted.append(tokens))
    found = decoder.generate([[1, 2, 3], list(range(30))])  # up to the context's end, which the longer one meets first
    passes = max(map(len, found.acceptance_lengths))
    drafted = [[row[i] for row in found.acceptance_lengths if i < len(row)] for i in range(passes)][-len(counted) :]
    assert 1 in map(len, drafted)
    assert 2 in map(len, drafted)
    assert counted == pytest.approx([sum(kept) / len(kept) for kept in drafted])
    assert set(decoder.monitors) == {2}


class Pausing(SpeedMonitor):
    """Drafts one pass in four."""

    def drafts(self) -> bool:
        """See the base class."""
        self._passes += 1
        return self._passes % 4 == 0


@pytest.mark.parametrize("name", ["FastEagle", "Eagle3", "Medusa", "DraftModel"])
@pytest.mark.parametrize("prompts", [[[1, 2, 3]], [[1, 2, 3], [4, 5, 6, 7, 8, 9]]])
def test_a_draft_after_a_pause_has_read_what_it_missed(tiny, monkeypatch, name, prompts):
    """It proposes what a generation proposes that starts at this place, whose prompt is all that came before."""
    drafter = getattr(drafters, name)(depth=3).bind(tiny.target).eval().requires_grad_(False)
    decoder = SpeculativeDecoder(tiny.target, drafter, tree=(2, 2, 2))
    propose, drafts = drafter.propose, []

    def listen(state):
        draft = propose(state)
        drafts.append(([list(context) for context in state.contexts], draft))
        return draft

    monkeypatch.setattr(drafter, "propose", listen)
    decoder.monitors = defaultdict(Pausing)
    plain = SpeculativeDecoder(tiny.target).generate(prompts, max_new_tokens=40)
    assert torch.equal(decoder.generate(prompts, max_new_tokens=40).sequences, plain.sequences)
    paused, decoder.monitors = list(drafts), None
    assert len(paused) >= 5
    for contexts, draft in paused:
        drafts.clear()
        decoder.generate([context[:-1] for context in contexts], max_new_tokens=2)
        assert drafts[0][0] == contexts
        assert torch.equal(drafts[0][1].tokens, draft.tokens)


class DraftsLate(SpeedMonitor):
    """Drafts once behind the first plain passes and again behind a long pause."""

    def drafts(self) -> bool:
        """See the base class."""
        self._passes += 1
        return self._passes == 5 or self._passes > 30


@pytest.mark.parametrize("name", ["FastEagle", "Eagle3", "DraftModel"])
def test_what_one_row_missed_fits_behind_another_that_is_full(tiny, name):
    """The short row has much to read when the long one, finished, fills the context."""
    drafter = getattr(drafters, name)(depth=2).bind(tiny.target).eval().requires_grad_(False)
    decoder = SpeculativeDecoder(tiny.target, drafter, tree=(1,))
    decoder.monitors = defaultdict(DraftsLate)
    prompts = [[5] * 60, [1, 2, 3]]
    plain = SpeculativeDecoder(tiny.target).generate(prompts)
    assert torch.equal(decoder.generate(prompts).sequences, plain.sequences)


def test_the_choice_leaves_room_for_the_branch_of_lookup(tiny, drafter, monkeypatch):
    drafter.acceptance = [[0.9, 0.05, 0.02]] * 3
    monkeypatch.setattr(module, "measure_passes", lambda *a, **k: {1: 1.0, 8: 1.0, 16: 9.0})
    monkeypatch.setattr(module, "measure_drafts", lambda *a, **k: [0.0, 0.0, 0.0])
    alone = SpeculativeDecoder.tuned(tiny.target, drafter)
    both = SpeculativeDecoder.tuned(tiny.target, WithLookup(drafter))
    assert sum(alone.tree) == 7
    assert sum(both.tree) == 4
    assert len(both.tree) == 3
    both.monitors = None
    found = both.generate([[1, 2, 3] * 6], max_new_tokens=30)
    assert set(found.pass_sizes) == {8}


def test_a_drafter_without_measured_acceptance_is_guarded(tiny, drafter):
    """Prompt lookup is never trained; what it brings shows while decoding."""
    for unmeasured, depth in ((drafter, 3), (PromptLookup(), 7)):
        decoder = SpeculativeDecoder.tuned(tiny.target, unmeasured)
        assert decoder.tree == (1,) * depth
        assert decoder.monitors is not None


def test_a_drafter_of_another_target_is_refused(tiny, drafter):
    with pytest.raises(ValueError, match="was built for another target"):
        SpeculativeDecoder(CausalLM.from_transformers(tiny.make(9)), drafter)
