"""Rules that look like lossless verification and are not: the checks of test_verify_exact must reject each of them.

The numbers are total variation distances to the target for k = 3, p = (.40, .25, .20, .10, .05) and
q = (.55, .10, .05, .25, .05); those of X1-X9 come from an independent enumeration made when the rules were chosen.
Y1, Y2 and Y9 are the mistakes X1, X2 and X9 in the rule for draws without replacement, the one of the package.
"""

from itertools import product

import pytest


def best_first(draws, q):
    return sorted(draws, key=lambda x: (-q[x], x))


def one_hot_without_zeroing(exact):
    """Top-k candidates tested with probability p(x), without taking a rejected one out of p."""

    def rule(p, q, k):
        for weight, draws in exact.best(q, k):
            alive = weight
            for x in draws:
                yield alive * p[x], draws, x, True
                alive *= 1 - p[x]
            for token, mass in enumerate(p):
                yield alive * mass, draws, token, False

    return rule


def redrawn_mismatch(exact):
    """An independent target draw for every candidate path; if none of them matches, yet another draw is emitted."""

    def rule(p, q, k):
        for weight, draws in exact.best(q, k):
            for targets in product(range(len(p)), repeat=k):
                mass = weight
                for y in targets:
                    mass *= p[y]
                hit = next((x for x, y in zip(draws, targets, strict=True) if x == y), None)
                if hit is not None:
                    yield mass, draws, hit, True
                else:
                    for token, share in enumerate(p):
                        yield mass * share, draws, token, False

    return rule


def wrong_rules(exact):
    def on_candidates(q):
        top = next(exact.best(q, 3))[1]
        return exact.normalised([mass if x in top else 0 for x, mass in enumerate(q)])

    def squared(q):  # the distribution at temperature 0.5
        return exact.normalised([mass**2 for mass in q])

    return {
        "X1 top-k taken for iid draws": (exact.reject(exact.best, shrink=False), 0.350),
        "X2 the same, q renormalised on them": (exact.reject(exact.best, shrink=False, ratio=on_candidates), 0.350),
        "X3 tested best first": (exact.reject(exact.without_replacement, tested=best_first), 0.304),
        "X4 q not renormalised": (exact.reject(exact.without_replacement, shrink=False), 0.035),
        "X5 repeated draws skipped": (exact.reject(exact.iid, shrink=False, skip_repeats=True), 0.009),
        "X6 last token from p": (exact.reject(exact.without_replacement, final="target"), 0.057),
        "X7 one-hot without zeroing": (one_hot_without_zeroing(exact), 0.163),
        "X8 mismatch drawn again": (redrawn_mismatch(exact), 0.163),
        "X9 iid draws of another temperature": (exact.reject(exact.iid, shrink=False, ratio=squared), 0.135),
        "Y1 top-k taken for draws without replacement": (exact.reject(exact.best), 0.327),
        "Y2 the same, q renormalised on them": (exact.reject(exact.best, ratio=on_candidates), 0.315),
        "Y9 drawn at another temperature": (exact.reject(exact.without_replacement, ratio=squared), 0.124),
    }


NAMES = [f"X{i}" for i in range(1, 10)] + ["Y1", "Y2", "Y9"]


@pytest.mark.parametrize("name", NAMES)
def test_one_level_distribution_rejects(exact, name):
    rule, distance = next(entry for full, entry in wrong_rules(exact).items() if full.startswith(name))
    distribution, _ = exact.one_level(rule, exact.p, exact.q, 3)
    assert sum(distribution) == 1  # a distribution, but another one
    assert distribution != exact.p
    assert float(exact.total_variation(distribution, exact.p)) == pytest.approx(distance, abs=6e-4)


@pytest.mark.parametrize("name", NAMES)
def test_two_level_distribution_rejects(exact, name):
    rule = next(entry for full, entry in wrong_rules(exact).items() if full.startswith(name))[0]
    p1, q1, q2 = exact.fractions(50, 25, 15, 10), exact.fractions(20, 50, 20, 10), exact.fractions(55, 30, 10, 5)
    p2 = [exact.normalised([p1[(x + shift) % 4] for x in range(4)]) for shift in range(4)]
    expected = [p1[a] * p2[a][b] for a, b in product(range(4), repeat=2)]
    distribution = list(exact.two_levels(rule, p1, p2, q1, q2, 3).values())
    assert sum(distribution) == 1
    assert distribution != expected


def test_a_wrong_rule_may_look_faster(exact):
    correct = exact.one_level(exact.reject(exact.without_replacement), exact.p, exact.q, 3)[1]
    wrong = exact.one_level(exact.reject(exact.without_replacement, tested=best_first), exact.p, exact.q, 3)[1]
    assert wrong > correct
