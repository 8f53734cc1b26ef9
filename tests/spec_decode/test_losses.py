"""Losses and acceptance against written-out references."""

from collections import Counter
from types import SimpleNamespace

import pytest
import torch

from spec_decode import drafters
from spec_decode.data.datamodule import DraftBatch
from spec_decode.decoding.cost import expected_tokens
from spec_decode.training.drafter_module import DrafterModule
from spec_decode.training.losses import (
    AcceptanceTable,
    feature_loss,
    head_loss,
    level_batch,
    level_loss,
    level_weights,
    rejected_mass,
    soft_cross_entropy,
    teacher_forced_acceptance,
)


def test_soft_cross_entropy_in_float64():
    student, teacher = torch.randn(5, 7, dtype=torch.float64), torch.randn(5, 7, dtype=torch.float64)
    found, grad = soft_cross_entropy(student, teacher)
    for row in range(5):
        p, q = teacher[row].exp() / teacher[row].exp().sum(), student[row].exp() / student[row].exp().sum()
        assert float(found[row]) == pytest.approx(float(-sum(p * q.log())), rel=1e-12)
    assert (found >= soft_cross_entropy(teacher, teacher)[0]).all()
    student.requires_grad_()
    written_out = -(teacher.softmax(-1) * student.log_softmax(-1)).sum()
    torch.testing.assert_close(grad, torch.autograd.grad(written_out, student)[0])


def test_soft_cross_entropy_limits():
    student, hard = torch.randn(4, 6), torch.full((4, 6), -torch.inf)
    labels = torch.tensor([0, 5, 2, 2])
    hard[torch.arange(4), labels] = 0.0
    expected = torch.nn.functional.cross_entropy(student, labels, reduction="none")
    torch.testing.assert_close(soft_cross_entropy(student, hard)[0], expected)
    assert all(part.isfinite().all() for part in soft_cross_entropy(1e4 * student, student))
    assert all(part.dtype == torch.float32 for part in soft_cross_entropy(student.bfloat16(), student))
    before = student.clone()
    soft_cross_entropy(student, student)
    assert torch.equal(student, before)


def test_rejected_mass_in_float64():
    student, teacher = torch.randn(5, 7, dtype=torch.float64), torch.randn(5, 7, dtype=torch.float64)
    found, grad = rejected_mass(student, teacher)
    for row in range(5):
        p, q = teacher[row].exp() / teacher[row].exp().sum(), student[row].exp() / student[row].exp().sum()
        assert float(found[row]) == pytest.approx(float((p - q).abs().sum() / 2), rel=1e-12)  # the total variation
    student.requires_grad_()
    written_out = -torch.minimum(teacher.softmax(-1), student.softmax(-1)).sum()
    torch.testing.assert_close(grad, torch.autograd.grad(written_out, student)[0])


def test_rejected_mass_limits():
    z = torch.randn(4, 6)
    value, grad = rejected_mass(z, z)
    torch.testing.assert_close(value, torch.zeros(4), atol=1e-6, rtol=0)
    torch.testing.assert_close(grad, torch.zeros(4, 6))
    apart = torch.tensor([[9e4, -9e4]]), torch.tensor([[-9e4, 9e4]])
    value, grad = rejected_mass(*apart)
    assert value.tolist() == [1.0]
    assert grad.isfinite().all()
    assert all(part.dtype == torch.float32 for part in rejected_mass(z.bfloat16(), z))


@pytest.mark.parametrize("weight", [0.0, 2.5])
def test_a_level_loss_is_the_cross_entropy_and_the_weighted_rejected_mass(weight):
    student, teacher = torch.randn(5, 7, dtype=torch.float64), torch.randn(5, 7, dtype=torch.float64)
    parts = zip(soft_cross_entropy(student, teacher), rejected_mass(student, teacher), strict=True)
    for found, (entropy, missed) in zip(level_loss(weight)(student, teacher), parts, strict=True):
        torch.testing.assert_close(found, entropy + weight * missed)


@pytest.mark.parametrize("level", range(4))
def test_level_batch_supervises_answers_within_the_sequence(level):
    tokens = torch.arange(14).reshape(2, 7)
    answer = torch.tensor([[0, 0, 0, 1, 1, 1, 0], [0, 1, 1, 1, 1, 1, 1]]).bool()
    batch = level_batch(tokens, answer, level)
    expected = [
        (row, position, row * 7 + position + 2 + level)
        for row in range(2)
        for position in range(7)
        if position + 2 + level < 7 and answer[row, position + 2 + level]
    ]
    found = list(zip(*batch.rows.tolist(), batch.reached.tolist(), strict=True))
    assert found == expected
    assert batch.tokens.tolist() == [at for _, _, at in expected]  # token ids count up


@pytest.mark.parametrize("chunk", [1, 3, 10, 99])
def test_head_loss_in_chunks_equals_the_whole_with_its_gradients(chunk):
    states = torch.randn(10, 4, dtype=torch.float64, requires_grad=True)
    weight, unused = (torch.randn(6, 4, dtype=torch.float64, requires_grad=True) for _ in range(2))
    target, tokens = torch.randn(10, 6, dtype=torch.float64, requires_grad=True), torch.randint(6, (10,))
    logits = states @ weight.T
    whole = -(target.softmax(-1) * logits.log_softmax(-1)).sum()
    expected = torch.autograd.grad(3 * whole, (states, weight))
    loss, hits = head_loss(lambda x: x @ weight.T, states, target, tokens, chunk, (weight, unused))
    torch.testing.assert_close(loss.double(), whole.detach())
    assert int(hits) == int((logits.argmax(-1) == tokens).sum())
    (3 * loss).backward()
    torch.testing.assert_close((states.grad, weight.grad), expected)
    assert unused.grad is None
    assert target.grad is None


def test_head_loss_without_gradients():
    weight = torch.randn(6, 4, requires_grad=True)
    with torch.no_grad():
        loss, _ = head_loss(lambda x: x @ weight.T, torch.randn(5, 4), torch.randn(5, 6), torch.arange(5), 2, (weight,))
    assert not loss.requires_grad


def test_head_loss_of_nothing():
    states = torch.zeros(0, 4, requires_grad=True)
    loss, hits = head_loss(lambda x: x, states, torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64), 8)
    assert float(loss.detach()) == 0
    assert int(hits) == 0
    loss.backward()
    assert states.grad.shape == (0, 4)


def test_feature_loss():
    a, b = torch.randn(3, 5), torch.randn(3, 5)
    d = (a - b).abs()
    expected = torch.where(d < 1, d**2 / 2, d - 0.5).mean(1).sum()
    torch.testing.assert_close(feature_loss(a, b), expected)
    assert level_weights(3, 0.5) == [1, 0.5, 0.25]


def test_acceptance_against_walking_the_text():
    """Brute force: from every position, walk down while the best candidate is the text's token."""
    generator = torch.Generator().manual_seed(0)
    levels, ranks, tokens = 3, 2, torch.randint(3, (2, 60), generator=generator)
    answer = torch.rand(2, 60, generator=generator) < 0.9
    # The "states" are the candidates themselves, two of three tokens in random order.
    states = [torch.rand(2, 59, 3, generator=generator).argsort(-1)[..., :2].double() for _ in range(levels)]
    table = AcceptanceTable.empty(levels, ranks)
    teacher_forced_acceptance(table, tokens, answer, lambda level, x: x.long(), states)

    hits, reached = torch.zeros(levels, ranks), torch.zeros(levels)
    for row in range(2):
        for position in range(59):
            for level in range(levels):
                at = position + 2 + level
                if at >= 60 or not answer[row, at]:
                    break
                reached[level] += 1
                candidates = states[level][row, position].tolist()
                for rank, candidate in enumerate(candidates):
                    hits[level, rank] += candidate == tokens[row, at]
                if candidates[0] != tokens[row, at]:
                    break
    assert torch.equal(table.hits.float(), hits)
    assert torch.equal(table.reached.float(), reached)
    assert (reached > 0).all()
    acceptance = table.table()
    assert acceptance[0][0] == pytest.approx(float(hits[0, 0] / reached[0]))
    assert 1 < expected_tokens(acceptance, (1, 1, 1)) < 4


def test_levels_never_reached_are_left_out():
    table = AcceptanceTable.empty(2, 1)
    table.count(0, torch.tensor([[1]]), torch.tensor([2]), torch.tensor([True]))
    table.count(1, torch.tensor([[1]]), torch.tensor([1]), torch.tensor([False]))
    assert table.table() == [[0.0]]


def training_module(tiny, name, options, **settings):
    module = DrafterModule(SimpleNamespace(load=lambda: tiny.target), getattr(drafters, name)(**options), **settings)
    if module.drafter.vocabulary is not None:
        module.drafter.use_vocabulary(torch.arange(0, 34, 2))
    tokens, answer = torch.randint(40, (2, 13)), torch.rand(2, 13) < 0.8
    tokens[1, 9:], answer[1, 9:] = 0, False
    return module, DraftBatch(tokens, answer)


@pytest.mark.parametrize(
    ("name", "draft_vocab"),
    [("FastEagle", None), ("FastEagle", 17), ("Eagle3", 17), ("Medusa", None), ("DraftModel", 17)],
)
def test_every_level_is_compared_with_the_targets_distribution_of_the_token_it_predicts(tiny, name, draft_vocab):
    """Token by token: transformers' distribution of token t is that at t - 1, the draft's stands in row t - 2 - i."""
    options = {"depth": 3, "draft_vocab": draft_vocab}
    module, batch = training_module(tiny, name, options, acceptance_weight=0.7, feature_weight=0.3, chunk=5)
    drafter = module.drafter
    vocabulary = torch.arange(40) if draft_vocab is None else drafter.vocabulary
    losses, counts, hits = module.level_losses(batch, *module.outputs(batch))
    assert len(losses) == (1 if name == "DraftModel" else 3)
    with torch.no_grad():
        theirs = tiny.model(batch.tokens, output_hidden_states=True)
        levels = drafter.level_states(batch.tokens, tiny.target(batch.tokens))
    for level, (loss, number, right) in enumerate(zip(losses, counts, hits, strict=True)):
        expected, seen, correct = 0.0, 0, 0
        for row in range(2):
            for t in range(2 + level, 13):
                if not batch.answer[row, t] or batch.tokens[row, t] not in vocabulary:
                    continue
                state = levels[level][row, t - 2 - level]
                p = theirs.logits[row, t - 1, vocabulary].double().softmax(-1)
                z = drafter.level_logits(level, state).detach().double()
                gap = (state - theirs.hidden_states[-1][row, t - 1]).double().abs()
                near = torch.where(gap < 1, gap**2 / 2, gap - 0.5).mean()
                missed = (p - z.softmax(-1)).abs().sum() / 2
                expected += float(-(p * (z - z.logsumexp(-1))).sum() + 0.7 * missed + 0.3 * near)
                seen, correct = seen + 1, correct + int(vocabulary[z.argmax()] == batch.tokens[row, t])
        assert float(loss.detach()) == pytest.approx(expected, rel=1e-4)
        assert (int(number), int(right)) == (seen, correct)
        assert seen > 3


def test_an_update_weighs_the_levels_and_is_divided_by_the_tokens_of_the_first(tiny, monkeypatch):
    """Over two micro-batches, of whose sum Lightning makes the mean."""
    module, first = training_module(tiny, "FastEagle", {"depth": 3}, level_decay=0.5)
    second = DraftBatch(first.tokens[:1].flip(1), first.answer[:1])
    parameters = list(module.drafter.parameters())
    total, tokens = 0.0, 0
    for batch in (first, second):
        losses, counts, _ = module.level_losses(batch, *module.outputs(batch))
        total = total + losses[0] + losses[1] / 2 + losses[2] / 4
        tokens += int(counts[0])
    expected = torch.autograd.grad(total / tokens, parameters)

    monkeypatch.setattr(module, "log_dict", lambda *_, **__: None)
    module.trainer = SimpleNamespace(log_every_n_steps=100, global_step=1, accumulate_grad_batches=2)
    module.on_train_start()
    for batch in (first, second):
        (module.training_step(batch, 0) / 2).backward()
    module.on_before_optimizer_step(None)
    for parameter, gradient in zip(parameters, expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-4, atol=1e-6)


def test_validation_runs_target_and_drafter_once_a_batch(tiny, monkeypatch):
    """What it counts is what the level losses and the teacher-forced acceptance of the batch are."""
    module, batch = training_module(tiny, "FastEagle", {"depth": 3})
    losses, counts, _ = module.level_losses(batch, *module.outputs(batch))
    expected = AcceptanceTable.empty(3, module.ranks)
    levels = module.drafter.level_states(batch.tokens, tiny.target(batch.tokens))
    best = lambda level, x: module.drafter.level_logits(level, x).topk(module.ranks).indices  # noqa: E731
    teacher_forced_acceptance(expected, batch.tokens, batch.answer, best, levels)
    calls = Counter()

    def counted(name, real):
        def count(*arguments):
            calls[name] += 1
            return real(*arguments)

        return count

    for owner, name in ((type(tiny.target), "_run"), (type(module.drafter), "level_states")):
        monkeypatch.setattr(owner, name, counted(name, getattr(owner, name)))
    module.on_validation_start()
    module.validation_step(batch, 0)
    assert calls == {"_run": 1, "level_states": 1}
    assert module._val.tolist() == pytest.approx([float(sum(losses).detach()), float(sum(counts))])
    assert torch.equal(module._table.hits, expected.hits)
    assert torch.equal(module._table.reached, expected.reached)
