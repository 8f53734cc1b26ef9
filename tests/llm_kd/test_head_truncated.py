"""Stored teachers in the head: dense where K = V, K + 1 categories where K < V; against plain float64 and autograd."""

import math

import pytest
import torch

from kd_common.registry import subclasses
from llm_kd.head import KDHead, LMHead, TeacherHiddenStates, teacher_output, truncate
from llm_kd.head.metrics import token_metrics
from llm_kd.head.rows import TAIL_FLOOR, truncated_loss
from llm_kd.objectives import Objective
from llm_kd.selection import Selector
from llm_kd.selection.acceptance import TruncatedDistribution
from llm_kd.teacher.records import RecordLayout

OBJECTIVES = subclasses(Objective)
SELECTORS = subclasses(Selector)

F64 = torch.float64
N, H, V = 19, 6, 23
BOUNDED = [name for name in OBJECTIVES if OBJECTIVES[name].data_processing]
PARTIAL = [name for name in SELECTORS if not SELECTORS[name].whole_teacher]


def divergence(name, p, q):
    """The objectives at their default settings, in probability space."""

    def kl(a, b):
        return (a * (a / b).log()).sum(-1)

    return {
        "ForwardKL": lambda: kl(p, q),
        "ReverseKL": lambda: kl(q, p),
        "JensenShannon": lambda: 0.5 * kl(p, 0.5 * (p + q)) + 0.5 * kl(q, 0.5 * (p + q)),
        "SkewForwardKL": lambda: kl(p, 0.1 * p + 0.9 * q),
        "SkewReverseKL": lambda: kl(q, 0.9 * p + 0.1 * q),
        "TotalVariation": lambda: 0.5 * (p - q).abs().sum(-1),
    }[name]()


class Case:
    """Hidden states and heads of a student with padding and of a teacher."""

    def __init__(self, rows=N, bias=True, softcap=None, padding=0):
        def randn(*shape):
            return torch.randn(*shape, dtype=F64)

        self.hidden, self.weight = randn(rows, H).requires_grad_(), randn(V + padding, H).requires_grad_()
        self.bias = randn(V + padding).requires_grad_() if bias else None
        self.softcap = softcap
        self.online = TeacherHiddenStates(randn(rows, H), LMHead(randn(V, H), None, softcap))

    @property
    def leaves(self):
        return [tensor for tensor in (self.hidden, self.weight, self.bias) if tensor is not None]

    def logits(self):
        z = self.hidden @ self.weight.T + (0 if self.bias is None else self.bias)
        return (z if self.softcap is None else self.softcap * torch.tanh(z / self.softcap))[:, :V]

    def run(self, head, teacher):
        output = head(self.hidden, LMHead(self.weight, self.bias, self.softcap), teacher)
        return output, torch.autograd.grad(output.loss, self.leaves)


def build(objective="ForwardKL", selector="Uniform", /, selector_args=None, **settings):
    return KDHead(OBJECTIVES[objective](), SELECTORS[selector](**(selector_args or {})), **settings).eval()


def merged(probabilities, indices):
    """K + 1 categories of V probabilities."""
    kept = probabilities.gather(-1, indices)
    return torch.cat([kept, 1 - kept.sum(-1, keepdim=True)], dim=-1)


def assert_all_close(actual, expected, tolerance=1e-9):
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)


def test_what_allows_truncation():
    assert set(BOUNDED) == {
        "ForwardKL",
        "ReverseKL",
        "JensenShannon",
        "SkewForwardKL",
        "SkewReverseKL",
        "TotalVariation",
    }
    assert set(PARTIAL) == {"Uniform", "TopK", "EntropyTopP"}


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("selector", SELECTORS)
def test_all_tokens_stored_equals_online(objective, selector):
    head = build(objective, selector, loss_temperature=1.7, verify_temperature=0.8, chunk_size=4)
    if selector == "AdaKD":
        head.selector.share = 0.6
    case = Case(softcap=4.0)
    online, expected = case.run(head, case.online)
    stored, gradients = case.run(head, truncate(case.online, V, V))
    assert torch.equal(stored.weights, online.weights) or selector in ("SpecKExpected", "TSDKD")
    assert_all_close([stored.row_loss, stored.weights, stored.accepted, *gradients],
                     [online.row_loss, online.weights, online.accepted, *expected], 1e-11)  # fmt: skip


@pytest.mark.parametrize("size", [1, 6, V - 1])
@pytest.mark.parametrize("objective", BOUNDED)
@pytest.mark.parametrize("selector", PARTIAL)
def test_tail_is_one_category(objective, selector, size):
    arguments = {"k": 1, "beta": 0.3} if selector == "TopK" else None
    head = build(objective, selector, arguments, verify_temperature=0.8, chunk_size=4, vocab_size=V)
    case = Case(softcap=4.0, padding=3)
    teacher = truncate(case.online, size, V)
    output, gradients = case.run(head, teacher)
    online, _ = case.run(head, case.online)
    assert torch.equal(output.weights, online.weights)
    assert torch.equal(output.accepted, online.accepted)
    p, q = torch.cat([teacher.log_probs.exp(), teacher.tail_mass[:, None]], dim=-1), case.logits().softmax(-1)
    rows = online.weights * divergence(objective, p, merged(q, teacher.indices))
    expected = torch.autograd.grad(rows.sum() / N, case.leaves)
    assert_all_close([output.row_loss, *gradients], [rows.detach(), *expected])
    assert all((gradient[V:] == 0).all() for gradient in gradients[1:])


@pytest.mark.parametrize("objective", BOUNDED)
def test_gradient_against_finite_differences(objective):
    z = 2 * torch.randn(4, 9, dtype=F64)
    teacher = TruncatedDistribution.from_logits(2 * torch.randn(4, 9, dtype=F64), 3)
    step = 1e-6
    _, gradient = truncated_loss(OBJECTIVES[objective](), z, teacher, with_gradient=True)
    for v in range(9):
        shift = torch.zeros(9, dtype=F64)
        shift[v] = step
        up, down = (truncated_loss(OBJECTIVES[objective](), z + s, teacher, with_gradient=False)[0]
                    for s in (shift, -shift))  # fmt: skip
        torch.testing.assert_close(gradient[:, v], (up - down) / (2 * step), rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("scale", [0.1, 1.0, 5.0])
@pytest.mark.parametrize("objective", BOUNDED)
def test_truncation_is_a_lower_bound_that_rises_to_the_divergence(objective, scale):
    z, z_teacher = scale * torch.randn(2, 400, V, dtype=F64)
    dense = OBJECTIVES[objective]()(z, z_teacher)
    last = torch.zeros(400, dtype=F64)
    for size in range(1, V):
        teacher = TruncatedDistribution.from_logits(z_teacher, size)
        bound, _ = truncated_loss(OBJECTIVES[objective](), z, teacher, with_gradient=False)
        assert (bound >= last - 1e-12).all()
        last = bound
    assert (last <= dense + 1e-12).all()
    torch.testing.assert_close(last, dense, rtol=1e-9, atol=1e-12)  # V - 1 tokens leave one: nothing is merged


@pytest.mark.parametrize("objective", BOUNDED)
def test_truncation_loses_nothing_where_the_tails_are_proportional(objective):
    z_teacher = torch.randn(5, V, dtype=F64)
    teacher = TruncatedDistribution.from_logits(z_teacher, 4)
    z = (z_teacher + 0.7).scatter(-1, teacher.indices, torch.randn(5, 4, dtype=F64))
    bound, _ = truncated_loss(OBJECTIVES[objective](), z, teacher, with_gradient=False)
    torch.testing.assert_close(bound, OBJECTIVES[objective]()(z, z_teacher))


@pytest.mark.parametrize(
    ("objective", "p", "q"),
    [
        (OBJECTIVES["AlphaBeta"](alpha=1.0, beta=1.0), [0.4, 0.3, 0.3], [0.2, 0.4, 0.4]),
        (OBJECTIVES["TAID"](), [0.5, 0.499, 0.001], [0.989, 0.001, 0.01]),
    ],
)
def test_refused_objectives_are_no_lower_bound(objective, p, q):
    log_p, log_q = (torch.tensor([row], dtype=F64).log() for row in (p, q))
    stored = TruncatedDistribution.from_logits(log_p, 1)
    assert truncated_loss(objective, log_q, stored, with_gradient=False)[0] > 1.3 * objective(log_q, log_p)


@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize("objective", BOUNDED)
def test_tail_without_mass_is_floored(objective, dtype):
    z = torch.randn(3, V, dtype=dtype)
    z[1, 5:] = -1e4  # nor has the student's
    z[2] *= 1e4
    teacher = TruncatedDistribution(
        torch.tensor([0.5, 0.3, 0.2], dtype=dtype).log().expand(3, 3), torch.tensor([4, 0, 2]).expand(3, 3),
        torch.zeros(3, dtype=dtype), V)  # fmt: skip
    loss, gradient = truncated_loss(OBJECTIVES[objective](), z, teacher, with_gradient=True)
    assert loss.isfinite().all()
    assert gradient.isfinite().all()
    q = merged(z[0].double().softmax(-1), teacher.indices[0])
    p = torch.tensor([0.5, 0.3, 0.2, TAIL_FLOOR], dtype=F64)
    torch.testing.assert_close(loss[0].double(), divergence(objective, p, q), rtol=1e-5, atol=1e-6)
    assert objective != "ReverseKL" or loss.max() < 90  # the student's tail costs at most -log(1.2e-38) = 87.3


def test_small_tails_keep_their_digits():
    z = torch.tensor([[20.0, 0.0, -1.0, -2.0]])
    z_teacher = torch.tensor([[20.0, 1.0, 0.0, -1.0]])
    loss, gradient, exact_loss, exact = (
        part
        for dtype in (torch.float32, F64)
        for part in truncated_loss(
            OBJECTIVES["ForwardKL"](),
            z.to(dtype),
            TruncatedDistribution.from_logits(z_teacher.to(dtype), 1),
            with_gradient=True,
        )
    )
    assert math.exp(-20) < exact.abs().max() < 1e-8
    torch.testing.assert_close(gradient[:, 1:].double(), exact[:, 1:], rtol=1e-4, atol=0)
    assert abs(loss - exact_loss) < 1e-7


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_rounded_probabilities_are_normalised(dtype):
    case = Case()
    exact = truncate(case.online, 6, V)
    rounded = TruncatedDistribution(
        exact.log_probs.to(dtype), exact.indices.to(torch.int32), exact.tail_mass.float(), V
    )
    z = case.logits().detach()
    for name in BOUNDED:
        objective = OBJECTIVES[name]()
        loss, gradient = truncated_loss(objective, z, rounded, with_gradient=True)
        wanted, _ = truncated_loss(objective, z, exact, with_gradient=True)
        torch.testing.assert_close(loss, wanted, rtol=0.05, atol=0.01)
        torch.testing.assert_close(gradient.sum(-1), torch.zeros(N, dtype=F64), rtol=0, atol=1e-12)
        at_teacher = (rounded.tail_mass.double()[:, None] / (V - 6)).log().expand(-1, V)
        at_teacher = at_teacher.scatter(-1, exact.indices, rounded.log_probs.double())
        assert (truncated_loss(objective, at_teacher, rounded, with_gradient=False)[0].abs() < 1e-9).all()


@pytest.mark.parametrize("selector", PARTIAL)
@pytest.mark.parametrize("size", [3, V])
def test_batch_without_tokens(selector, size):
    case = Case(rows=0)
    head = build("ReverseKL", selector, {"k": 2} if selector == "TopK" else None)
    output, gradients = case.run(head, truncate(case.online, size, V))
    assert output.loss.item() == output.num_tokens == 0
    assert all((gradient == 0).all() for gradient in gradients)


@pytest.mark.parametrize("selector", sorted(set(SELECTORS) - set(PARTIAL)))
def test_selectors_that_need_the_whole_teacher_refuse(selector):
    case, head = Case(), build("ReverseKL", selector)
    with pytest.raises(ValueError, match=r"whole distribution, but only 6 of 23 tokens are stored; use TopK"):
        head.check_truncated(6, V)
    with pytest.raises(ValueError, match="whole distribution"):
        case.run(head, truncate(case.online, 6, V))
    head.check_truncated(V, V)


def test_what_cannot_be_computed_is_refused():
    for objective in set(OBJECTIVES) - set(BOUNDED):
        with pytest.raises(ValueError, match=r"only 6 of 23 tokens are stored; store all, or run.*ForwardKL"):
            build(objective).check_truncated(6, V)
        build(objective).check_truncated(V, V)
    with pytest.raises(ValueError, match=r"loss_temperature=2.0 needs.*set loss_temperature to 1"):
        build("ReverseKL", loss_temperature=2.0).check_truncated(6, V)
    build("ReverseKL", loss_temperature=2.0).check_truncated(V, V)
    build("ReverseKL", "TopK", {"k": 6}, verify_temperature=2.0).check_truncated(6, V)
    for size in (6, 4):
        with pytest.raises(ValueError, match="k=7 needs the teacher's first 7 tokens"):
            build("ReverseKL", "TopK", {"k": 7}).check_truncated(size, V)
    with pytest.raises(ValueError, match=r"vocabulary of 23 tokens, the head vocab_size=22"):
        build(vocab_size=22).check_truncated(6, V)


def test_vocabularies_must_agree():
    case = Case(padding=2)
    teacher = truncate(case.online, 6, V)
    with pytest.raises(ValueError, match=r"head has 25 rows, the teacher's 23.*set vocab_size"):
        case.run(build(), teacher)
    with pytest.raises(ValueError, match="vocab_size=24 exceeds"):
        case.run(build(vocab_size=24), teacher)
    with pytest.raises(ValueError, match="vocabulary of 23 tokens, the head vocab_size=22"):
        case.run(build(vocab_size=22), teacher)
    with pytest.raises(ValueError, match="the same N tokens"):
        case.run(build(vocab_size=V), teacher[:-1])


@pytest.mark.parametrize("softcap", [None, 3.0])
def test_truncate_works_in_chunks_and_leaves_padding_out(softcap, monkeypatch):
    case = Case(softcap=softcap)
    whole = case.online.hidden @ case.online.head.weight.T
    whole = whole if softcap is None else softcap * torch.tanh(whole / softcap)
    expected = TruncatedDistribution.from_logits(whole[:, :20], 5)
    for chunk in (1, 4, 100):
        monkeypatch.setattr(teacher_output, "rows_per_chunk", lambda *_, chunk=chunk: chunk)
        stored = truncate(case.online, 5, 20)
        assert stored.vocab_size == 20
        assert torch.equal(stored.indices, expected.indices)
        assert_all_close([stored.log_probs, stored.tail_mass], [expected.log_probs, expected.tail_mass], 1e-12)
    with pytest.raises(ValueError, match="vocab_size=24 exceeds the 23 rows of the teacher's head"):
        truncate(case.online, 5, 24)
    with pytest.raises(ValueError, match=r"size must lie in \[1, 20\]"):
        truncate(case.online, 21, 20)


def rounded(logits, dtype="float16"):
    """All tokens of a teacher as a cache gives them back."""
    layout = RecordLayout(logits.shape[-1], logits.shape[-1], dtype)
    tokens = torch.zeros(len(logits), dtype=torch.int64)
    return layout.unpack(layout.pack(tokens, TruncatedDistribution.from_logits(logits, logits.shape[-1])))[1]


def test_ranks_survive_rounding_where_all_tokens_are_stored():
    logits = torch.zeros(1, V)
    logits[0, 5], logits[0, 2] = 3.0001, 3.0  # equal in float16, where the lower id would rank first
    stored, student = rounded(logits), 4 * torch.eye(V)[[5]]
    assert (stored.log_probs[0, 0] == stored.log_probs[0, 1]).item()
    for teacher in (TeacherHiddenStates(logits, LMHead(torch.eye(V))), stored):
        head = build("ForwardKL", "TopK", selector_args={"k": 1})
        assert head(student, LMHead(torch.eye(V)), teacher).accepted.item() == 1
        sums = token_metrics(student, LMHead(torch.eye(V)), teacher, torch.tensor([5]), V, k=1)
        assert sums["accepted"] == sums["agreement"] == 1


def test_a_stored_teachers_likelihood_is_summed_in_float32():
    logits, labels = torch.randn(400, V), torch.randint(V, (400,))
    stored = rounded(logits)
    sums = token_metrics(torch.randn(400, V), LMHead(torch.eye(V)), stored, labels, V, k=5)
    assert sums["teacher_nll"].dtype == torch.float32
    expected = -stored.dense_log_probs().double().log_softmax(-1).gather(-1, labels[:, None]).sum()
    assert sums["teacher_nll"].item() == pytest.approx(expected.item(), rel=1e-5)
