"""Logit processors against brute force, and the noise against a plain-integer reference."""

import math

import pytest
import torch

from spec_decode.decoding.sampling import (
    Sampling,
    Stream,
    check_logits,
    gumbel_argmax,
    gumbel_noise,
    keep_top_k,
    keep_top_p,
    row_seeds,
    uniform_noise,
)

MASK = (1 << 64) - 1


def splitmix64(start, index):
    z = (start + (index + 1) * 0x9E3779B97F4A7C15) & MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
    return z ^ (z >> 31)


def kept_tokens(logits):
    return [row.isfinite().nonzero().flatten().tolist() for row in logits]


def p_value(observed, expected):
    """Chi-square p-value of counts against expected counts."""
    statistic = ((observed - expected) ** 2 / expected).sum()
    return float(torch.special.gammaincc(torch.tensor((len(expected) - 1) / 2).double(), statistic / 2))


# --- noise ---


def test_reference_generator_gives_the_published_outputs():
    published = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431]
    assert [splitmix64(1234567, i) for i in range(4)] == published


@pytest.mark.parametrize("seed", [0, 1, -5, 2**62, -(2**63)])
def test_uniform_noise_equals_plain_integer_arithmetic(seed):
    positions, ids = torch.tensor([0, 1, 4095]), torch.tensor([0, 1, 7, 151_935])
    for stream in Stream:
        noise = uniform_noise(torch.tensor([seed] * 3), positions, ids, stream)
        for row, position in enumerate(positions.tolist()):
            key = splitmix64(splitmix64(seed & MASK, int(stream)), position)
            assert noise[row].tolist() == [((splitmix64(key, i) >> 12) + 0.5) / 2**52 for i in ids.tolist()]


def test_noise_depends_on_seed_position_and_id_only():
    seeds, ids = row_seeds(3, 4), torch.arange(11)
    whole = gumbel_noise(seeds.unsqueeze(1), torch.arange(6), ids, Stream.TARGET)
    assert whole.shape == (4, 6, 11)
    one = gumbel_noise(seeds[2:3], torch.tensor([5]), ids[4:7], Stream.TARGET)
    assert torch.equal(one[0], whole[2, 5, 4:7])
    assert len(whole.unique()) == whole.numel()
    streams = [uniform_noise(seeds[:1], torch.tensor([5]), ids, stream) for stream in Stream]
    assert len(torch.cat(streams).unique()) == 3 * 11
    assert torch.equal(row_seeds(3, 2), seeds[:2])


def test_uniform_noise_is_uniform_over_positions_and_over_ids():
    for noise in (
        uniform_noise(torch.tensor([9]), torch.arange(20_000).unsqueeze(1), torch.tensor([3]), Stream.TARGET),
        uniform_noise(torch.tensor([9]), torch.tensor([3]), torch.arange(20_000), Stream.TARGET),
        uniform_noise(torch.arange(20_000), torch.tensor(3), torch.tensor([0]), Stream.ACCEPT),
    ):
        counts = torch.histc(noise, 50, 0, 1)
        assert p_value(counts, torch.full_like(counts, 400)) > 1e-3
        flat = noise.flatten()
        assert abs(float(torch.corrcoef(torch.stack([flat[:-1], flat[1:]]))[0, 1])) < 0.03


def test_uniform_noise_never_reaches_its_ends(monkeypatch):
    for bits, expected in ((0, 2.0**-53), (-1, 1 - 2.0**-53)):
        monkeypatch.setattr(
            "spec_decode.decoding.sampling._splitmix64", lambda start, index, bits=bits: torch.tensor([bits])
        )
        ids = torch.arange(1)
        assert uniform_noise(torch.tensor([0]), torch.tensor([0]), ids, Stream.TARGET).item() == expected
        assert gumbel_noise(torch.tensor([0]), torch.tensor([0]), ids, Stream.TARGET).isfinite().all()


# --- processors ---


def test_temperature_divides_logits():
    logits = torch.randn(3, 7)
    for temperature in (0.3, 1.0, 2.5):
        expected = (logits.double() / temperature).log_softmax(-1)
        torch.testing.assert_close(Sampling(temperature).log_probs(logits), expected)


def test_temperature_limits():
    logits = torch.tensor([[1.0, 3.0, 3.0, -2.0], [0.0, 0.0, 0.0, 0.0]])
    zero = Sampling(0.0).log_probs(logits)
    assert zero.exp().tolist() == [[0, 1, 0, 0], [1, 0, 0, 0]]  # ties go to the lowest id
    tiny = Sampling(1e-300).log_probs(logits)
    torch.testing.assert_close(tiny.exp(), torch.tensor([[0, 0.5, 0.5, 0], [0.25] * 4]).double())
    torch.testing.assert_close(Sampling(1e300).log_probs(logits).exp(), torch.full((2, 4), 0.25).double())
    huge = torch.tensor([[3e38, -3e38, -torch.inf]])
    assert Sampling(1e-300).log_probs(huge).exp().tolist() == [[1, 0, 0]]


def test_top_k_keeps_exactly_k_with_ties_in_order_of_id():
    logits = torch.tensor([[1.0, 2.0, 1.0, 2.0, 1.0], [5.0, 4.0, 3.0, 2.0, 1.0]])
    assert kept_tokens(keep_top_k(logits, 3)) == [[0, 1, 3], [0, 1, 2]]
    assert kept_tokens(keep_top_k(logits, 1)) == [[1], [0]]
    assert keep_top_k(logits, 5) is logits
    assert keep_top_k(logits, 9) is logits


def test_top_p_keeps_the_smallest_set_that_reaches_it():
    logits = torch.tensor([[0.125, 0.5, 0.25, 0.125]]).double().log()
    for top_p, expected in ((0.5, [1]), (0.51, [1, 2]), (0.75, [1, 2]), (0.76, [0, 1, 2]), (0.9, [0, 1, 2, 3])):
        assert kept_tokens(keep_top_p(logits, top_p)) == [expected]
    assert kept_tokens(keep_top_p(logits, 1e-12)) == [[1]]
    assert keep_top_p(logits, 1.0) is logits


def test_top_p_equals_sorting_in_plain_python():
    logits = torch.randn(4, 3000).double() * torch.tensor([[0.0], [0.1], [1.0], [5.0]])  # flat rows need wide searches
    for top_p in (0.1001, 0.8001, 0.9991):  # never on a boundary of the flat row
        kept = kept_tokens(keep_top_p(logits, top_p))
        for row, tokens in zip(logits.softmax(-1).tolist(), kept, strict=True):
            mass, expected = 0.0, []
            for token in sorted(range(len(row)), key=lambda t: (-row[t], t)):
                if mass >= top_p:
                    break
                expected.append(token)
                mass += row[token]
            assert tokens == sorted(expected)


def test_order_is_temperature_then_top_k_then_top_p():
    logits = torch.tensor([[0.4, 0.3, 0.2, 0.1]]).log()
    # After top-k the two survivors have 4/7 and 3/7, so that 0.5 is reached by the first alone.
    assert kept_tokens(Sampling(top_k=2, top_p=0.5).log_probs(logits)) == [[0]]
    assert kept_tokens(Sampling(top_p=0.5).log_probs(logits)) == [[0, 1]]
    # At temperature 0.5 the distribution is 16:9:4:1, the first has 0.53.
    assert kept_tokens(Sampling(temperature=0.5, top_p=0.5).log_probs(logits)) == [[0]]
    torch.testing.assert_close(
        Sampling(top_k=2).log_probs(logits).exp(), torch.tensor([[4 / 7, 3 / 7, 0, 0]]).double(), rtol=1e-6, atol=0
    )


def test_log_probs_are_float64_and_normalised_in_any_dtype():
    logits = torch.randn(2, 3, 50)
    for dtype in (torch.bfloat16, torch.float32, torch.float64):
        distribution = Sampling(0.7, 20, 0.9).log_probs(logits.to(dtype))
        assert distribution.dtype == torch.float64
        torch.testing.assert_close(distribution.exp().sum(-1), torch.ones(2, 3).double())


# --- draws ---


def test_draws_follow_the_distribution_and_never_leave_its_support():
    logits, sampling = torch.tensor([1.0, 0.5, 0.0, -0.5, -3.0, 2.0]), Sampling(0.8, 5, 0.95)
    distribution, count = sampling.log_probs(logits).exp(), 40_000
    rows, seeds = logits.expand(count, -1), torch.tensor(7).expand(count)
    observed = sampling.draw(rows, seeds, torch.arange(count)).bincount(minlength=6)
    assert observed[distribution == 0].sum() == 0
    assert 0 < (distribution == 0).sum() < 5
    assert p_value(observed[distribution > 0], count * distribution[distribution > 0]) > 1e-3


def test_greedy_draw_equals_the_general_rule_at_temperature_0():
    logits = torch.randint(3, (200, 9)).float()
    seeds, positions = row_seeds(1, 200), torch.arange(200)
    expected = gumbel_argmax(Sampling(0.0).log_probs(logits), seeds, positions)
    assert torch.equal(Sampling(0.0).draw(logits, seeds, positions), expected)


# --- bad input ---


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_broken_logits_are_refused(bad, temperature):
    logits = torch.zeros(3, 4)
    logits[1, 2] = bad
    with pytest.raises(ValueError, match=r"row \(1,\) hold NaN"):
        Sampling(temperature).draw(logits, row_seeds(0, 3), torch.arange(3))
    with pytest.raises(ValueError, match="all -inf"):
        check_logits(torch.full((2, 4), -torch.inf))
    check_logits(logits, torch.tensor([True, False, True]))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": math.nan}, "temperature"),
        ({"temperature": math.inf}, "temperature"),
        ({"top_k": -1}, "top_k"),
        ({"no_repeat_ngram_size": 2}, "no_repeat_ngram_size"),
        ({"temperature": 0.0, "top_p": 0.5}, "temperature 0"),
        ({"top_p": 0.0}, "top_p"),
        ({"top_p": 1.1}, "top_p"),
        ({"top_p": math.nan}, "top_p"),
    ],
)
def test_settings_out_of_range_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        Sampling(**settings)
