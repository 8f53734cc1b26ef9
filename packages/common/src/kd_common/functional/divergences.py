"""Divergences between the teacher's distribution p and the student's q, both given by logits of shape (..., V).

Every function returns one value per row, shape (...), in at least float32, and is differentiable. Values are true
divergences, 0 at p = q, without a hidden T^2 factor. Multiply by `temperature ** 2` to keep the scale of gradients.
Everything is computed from log-probabilities, so logit gaps of any size are safe. A class with a logit of -inf has
probability exactly 0 and gives neither NaN nor a gradient. A divergence that is infinite because of such a class is
returned as inf.
"""

import math

import torch
from torch import Tensor

from kd_common.errors import UserError
from kd_common.functional.logits import scaled_pair


def log_probs(student_logits: Tensor, teacher_logits: Tensor, temperature: float | None) -> tuple[Tensor, Tensor]:
    """Return the log-probabilities (log p, log q).

    The teacher comes first, as in the formulas. If the temperature is None, the arguments are log-probabilities
    already.
    """
    if temperature is None:
        return teacher_logits, student_logits
    student, teacher = scaled_pair(student_logits, teacher_logits, temperature)
    return teacher.log_softmax(dim=-1), student.log_softmax(dim=-1)


def kl_from_log_probs(log_a: Tensor, log_b: Tensor) -> Tensor:
    """Return KL(a || b) of log-probabilities of shape (..., V), shape (...)."""
    # A class with a = 0 adds nothing. Its ratio is replaced before the product, so that the gradient is 0, not 0 * inf.
    log_ratio = (log_a - log_b).masked_fill(log_a == -math.inf, 0.0)
    return (log_a.exp() * log_ratio).sum(dim=-1)


def _log_mixture(log_a: Tensor, log_b: Tensor, weight: float) -> Tensor:
    """Return log(weight * a + (1 - weight) * b) for weight in [0, 1); any finite number where a = b = 0."""
    if weight == 0:
        return log_b
    # The gradient of logaddexp(-inf, -inf) is NaN; no divergence gives weight to such a class.
    absent = (log_a == -math.inf) & (log_b == -math.inf)
    return torch.logaddexp(log_a.masked_fill(absent, 0.0) + math.log(weight), log_b + math.log1p(-weight))


def _check_skew(alpha: float) -> None:
    if not 0 <= alpha < 1:
        raise UserError(f"alpha must lie in [0, 1), got {alpha}; alpha = 0 is the plain KL divergence")


def forward_kl(student_logits: Tensor, teacher_logits: Tensor, *, temperature: float | None = 1.0) -> Tensor:
    """Return the forward Kullback-Leibler divergence KL(p || q).

    Args:
        student_logits: Student logits of shape (..., V).
        teacher_logits: Teacher logits of shape (..., V).
        temperature: Positive divisor of both logits; None if they are log-probabilities already.

    Returns:
        Divergence per row in nats, shape (...).

    Raises:
        UserError: If the shapes differ or the temperature is not a positive finite number.

    References:
        Hinton et al., Distilling the knowledge in a neural network, arXiv 1503.02531.
    """
    log_p, log_q = log_probs(student_logits, teacher_logits, temperature)
    return kl_from_log_probs(log_p, log_q)


def reverse_kl(student_logits: Tensor, teacher_logits: Tensor, *, temperature: float | None = 1.0) -> Tensor:
    """Return the reverse Kullback-Leibler divergence KL(q || p).

    Args:
        student_logits: Student logits of shape (..., V).
        teacher_logits: Teacher logits of shape (..., V).
        temperature: Positive divisor of both logits; None if they are log-probabilities already.

    Returns:
        Divergence per row in nats, shape (...).

    Raises:
        UserError: If the shapes differ or the temperature is not a positive finite number.

    References:
        MiniLLM, arXiv 2306.08543.
    """
    log_p, log_q = log_probs(student_logits, teacher_logits, temperature)
    return kl_from_log_probs(log_q, log_p)


def jensen_shannon(
    student_logits: Tensor, teacher_logits: Tensor, *, temperature: float | None = 1.0, beta: float = 0.5
) -> Tensor:
    """Return the generalised Jensen-Shannon divergence JS(p, q) = beta * KL(p || m) + (1 - beta) * KL(q || m).

    Here m = beta * p + (1 - beta) * q. JS / beta tends to forward KL as beta goes to 0. JS / (1 - beta) tends to
    reverse KL as beta goes to 1.

    Args:
        student_logits: Student logits of shape (..., V).
        teacher_logits: Teacher logits of shape (..., V).
        temperature: Positive divisor of both logits; None if they are log-probabilities already.
        beta: Weight of the teacher, in (0, 1); 0.5 is the symmetric divergence.

    Returns:
        Divergence per row in nats, shape (...), at most log 2.

    Raises:
        UserError: If beta is outside (0, 1), the shapes differ or the temperature is not a positive finite number.

    References:
        Generalised knowledge distillation (GKD), arXiv 2306.13649.
    """
    if not 0 < beta < 1:
        raise UserError(
            f"beta must lie strictly between 0 and 1, got {beta}; the divergence vanishes at the ends: "
            "use forward_kl in place of beta = 0 and reverse_kl in place of beta = 1"
        )
    log_p, log_q = log_probs(student_logits, teacher_logits, temperature)
    log_m = _log_mixture(log_p, log_q, beta)
    return beta * kl_from_log_probs(log_p, log_m) + (1 - beta) * kl_from_log_probs(log_q, log_m)


def skew_forward_kl(
    student_logits: Tensor, teacher_logits: Tensor, *, temperature: float | None = 1.0, alpha: float = 0.1
) -> Tensor:
    """Return the skew forward KL divergence KL(p || alpha * p + (1 - alpha) * q).

    Args:
        student_logits: Student logits of shape (..., V).
        teacher_logits: Teacher logits of shape (..., V).
        temperature: Positive divisor of both logits; None if they are log-probabilities already.
        alpha: Share of the teacher in the mixture, in [0, 1); 0 is forward KL.

    Returns:
        Divergence per row in nats, shape (...), at most -log(alpha).

    Raises:
        UserError: If alpha is outside [0, 1), the shapes differ or the temperature is not a positive finite number.

    References:
        DistiLLM, arXiv 2402.03898.
    """
    _check_skew(alpha)
    log_p, log_q = log_probs(student_logits, teacher_logits, temperature)
    return kl_from_log_probs(log_p, _log_mixture(log_p, log_q, alpha))


def skew_reverse_kl(
    student_logits: Tensor, teacher_logits: Tensor, *, temperature: float | None = 1.0, alpha: float = 0.1
) -> Tensor:
    """Return the skew reverse KL divergence KL(q || (1 - alpha) * p + alpha * q).

    Args:
        student_logits: Student logits of shape (..., V).
        teacher_logits: Teacher logits of shape (..., V).
        temperature: Positive divisor of both logits; None if they are log-probabilities already.
        alpha: Share of the student in the mixture, in [0, 1); 0 is reverse KL.

    Returns:
        Divergence per row in nats, shape (...), at most -log(alpha).

    Raises:
        UserError: If alpha is outside [0, 1), the shapes differ or the temperature is not a positive finite number.

    References:
        DistiLLM, arXiv 2402.03898.
    """
    _check_skew(alpha)
    log_p, log_q = log_probs(student_logits, teacher_logits, temperature)
    return kl_from_log_probs(log_q, _log_mixture(log_q, log_p, alpha))


def total_variation(student_logits: Tensor, teacher_logits: Tensor, *, temperature: float | None = 1.0) -> Tensor:
    """Return the total variation distance 0.5 * sum_v |p_v - q_v|.

    Args:
        student_logits: Student logits of shape (..., V).
        teacher_logits: Teacher logits of shape (..., V).
        temperature: Positive divisor of both logits; None if they are log-probabilities already.

    Returns:
        Distance per row, shape (...), in [0, 1].

    Raises:
        UserError: If the shapes differ or the temperature is not a positive finite number.

    References:
        f-DISTILL, arXiv 2307.15190.
    """
    log_p, log_q = log_probs(student_logits, teacher_logits, temperature)
    return 0.5 * (log_p.exp() - log_q.exp()).abs().sum(dim=-1)


def alpha_beta(
    student_logits: Tensor, teacher_logits: Tensor, alpha: float, beta: float, *, temperature: float | None = 1.0
) -> Tensor:
    """Return the alpha-beta divergence, which joins forward KL at (1, 0) and reverse KL at (0, 1).

    With s = alpha + beta it is the sum over classes of (alpha / s * p^s + beta / s * q^s - p^alpha * q^beta) / (alpha *
    beta). If alpha or beta is 0, it is the limit of this sum.

    Args:
        student_logits: Student logits of shape (..., V).
        teacher_logits: Teacher logits of shape (..., V).
        alpha: Power of the teacher, >= 0.
        beta: Power of the student, >= 0; not 0 together with alpha.
        temperature: Positive divisor of both logits; None if they are log-probabilities already.

    Returns:
        Divergence per row, shape (...).

    Raises:
        UserError: If alpha or beta is negative or not finite, both are 0, the shapes differ or the temperature is not
            a positive finite number.

    References:
        ABKD, arXiv 2505.04560; Cichocki et al., Entropy 13(1), 2011.
    """
    if not (0 <= alpha < math.inf and 0 <= beta < math.inf and alpha + beta > 0):
        raise UserError(f"alpha and beta must be finite, >= 0 and not both 0, got alpha={alpha} and beta={beta}")
    log_p, log_q = log_probs(student_logits, teacher_logits, temperature)
    if beta == 0:
        return _power_kl(alpha * log_p, alpha * log_q) / alpha**2
    if alpha == 0:
        return _power_kl(beta * log_q, beta * log_p) / beta**2
    total = alpha + beta
    # The larger power of the two is factored out of each class. A difference of two expm1 of non-positive numbers
    # remains. It cannot overflow, and it keeps its digits where p and q are close.
    absent = (log_p == -math.inf) & (log_q == -math.inf)
    gap = -(log_p - log_q).masked_fill(absent, 0.0).abs()
    power = torch.full_like(log_p, alpha).masked_fill(log_p >= log_q, beta)
    rest = power / total * torch.expm1(total * gap) - torch.expm1(power * gap)
    return ((total * torch.maximum(log_p, log_q)).exp() * rest).sum(dim=-1) / (alpha * beta)


def _power_kl(log_a: Tensor, log_b: Tensor) -> Tensor:
    """Return the KL divergence of positive measures that need not sum to 1: sum of a * log(a / b) - a + b."""
    return kl_from_log_probs(log_a, log_b) + (log_b.exp() - log_a.exp()).sum(dim=-1)
