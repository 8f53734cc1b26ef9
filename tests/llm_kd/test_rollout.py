"""Who writes the responses: GKD's mixture and DistiLLM's adaptive schedule."""

import random

import pytest

from llm_kd.data.example import Example
from llm_kd.training.rollout import AdaptiveReplay, OffPolicy, OnPolicy


def examples(*tokens):
    return [Example([1, token], [False, True], 1) for token in tokens]


def share(rollout, source, progress=0.5, draws=10_000):
    return sum(rollout.choose((i + 0.5) / draws, progress) == source for i in range(draws)) / draws


def test_off_policy_never_writes():
    assert share(OffPolicy(), "dataset") == 1
    assert not OffPolicy.generates


@pytest.mark.parametrize("fraction", [0.0, 0.25, 1.0])
def test_on_policy_writes_for_a_share_of_the_batches(fraction):
    assert share(OnPolicy(fraction), "generate") == pytest.approx(fraction)
    assert share(OnPolicy(fraction), "dataset") == pytest.approx(1 - fraction)


@pytest.mark.parametrize("fraction", [-0.1, 1.1])
def test_fraction_out_of_range(fraction):
    with pytest.raises(ValueError, match=r"fraction must lie in \[0, 1\]"):
        OnPolicy(fraction)


def test_the_threshold_rises_only_when_the_loss_does():
    rollout = AdaptiveReplay(step=0.4, tolerance=0.25)
    assert share(rollout, "dataset") == 1
    thresholds = []
    for loss in (3.0, 2.0, 2.25, 2.0, 2.125, 3.0, 4.0):  # first, falls, rises just enough, falls, too little, rises
        rollout.on_validation(loss)
        thresholds.append(round(rollout.threshold, 9))
    assert thresholds == [0, 0, 0.4, 0.4, 0.4, 0.8, 1.0]


def test_sources_have_the_published_shares():
    rollout = AdaptiveReplay(capacity=2, step=0.5)
    rollout.on_validation(1.0)
    rollout.on_validation(2.0)
    # Not full yet: whatever is not from the data is written anew.
    assert share(rollout, "generate", progress=0.8) == pytest.approx(0.5)
    rollout.keep(examples(2, 3))
    assert share(rollout, "generate", progress=0.8) == pytest.approx(0.5 * 0.2)
    assert share(rollout, "replay", progress=0.8) == pytest.approx(0.5 * 0.8)
    assert share(rollout, "dataset", progress=0.8) == pytest.approx(0.5)
    assert share(rollout, "replay", progress=1.0) == pytest.approx(0.5)


def test_the_memory_keeps_the_latest_and_draws_without_repeating():
    rollout = AdaptiveReplay(capacity=3)
    rollout.keep(examples(2, 3))
    rollout.keep(examples(4, 5))
    assert [example.input_ids[1] for example in rollout.memory] == [3, 4, 5]
    drawn = rollout.replay(2, random.Random(0))
    assert len({example.key for example in drawn}) == 2
    assert len(rollout.replay(9, random.Random(0))) == 3


def test_the_state_is_plain_and_complete():
    rollout = AdaptiveReplay(capacity=3, step=0.5)
    rollout.on_validation(1.0)
    rollout.on_validation(2.0)
    rollout.keep(examples(2, 3))
    restored = AdaptiveReplay(capacity=3, step=0.5)
    restored.load_state_dict(rollout.state_dict())
    assert restored.memory == rollout.memory
    assert (restored.threshold, restored.previous_loss) == (0.5, 2.0)
    assert all(isinstance(entry, dict) for entry in rollout.state_dict()["memory"])


@pytest.mark.parametrize(("settings", "match"), [({"capacity": 0}, "capacity"), ({"step": 0.0}, "step")])
def test_settings_out_of_range(settings, match):
    with pytest.raises(ValueError, match=match):
        AdaptiveReplay(**settings)
