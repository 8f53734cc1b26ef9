"""The chunked head against a dense float64 loss with autograd: values, gradients, precision, bad input."""

import pytest
import torch

from kd_common.registry import subclasses
from llm_kd.head import KDHead, LMHead, TeacherHiddenStates
from llm_kd.objectives import Objective
from llm_kd.selection import Selection, Selector

OBJECTIVES = subclasses(Objective)
SELECTORS = subclasses(Selector)

F64 = torch.float64
N, H, H_TEACHER, V = 17, 6, 5, 23


class _Fixed(Selector):
    """Given weights; None rejects all."""

    def __init__(self, weights=None):
        super().__init__()
        self.weights = weights

    def score(self, student_logits, teacher_logits):
        return student_logits[:, 0]

    def select(self, score, noise=None):
        weights = torch.zeros_like(score) if self.weights is None else self.weights.to(score)
        return Selection(weights, (weights > 0).to(score))

    per_row = False


@pytest.mark.parametrize("student", [torch.float32, F64])
@pytest.mark.parametrize("teacher", [torch.bfloat16, torch.float32, F64])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_student_and_teacher_may_differ_in_precision(objective, teacher, student):
    """The loss is the one of a teacher that was rounded to its precision, in the student's."""
    inputs = Inputs(dtype=student)
    teacher_head = LMHead(inputs.teacher.weight.to(teacher), inputs.teacher.bias.to(teacher))
    hidden = inputs.teacher_hidden.to(teacher)
    logits = torch.nn.functional.linear(hidden, teacher_head.weight, teacher_head.bias).to(student)
    for selector in ("TopK", "SpecKExpected", "AdaKD"):
        head = KDHead(OBJECTIVES[objective](), SELECTORS[selector]())
        found = head(inputs.hidden, inputs.student, TeacherHiddenStates(hidden, teacher_head)).loss
        same = TeacherHiddenStates(logits, LMHead(torch.eye(V, dtype=student)))
        again = KDHead(OBJECTIVES[objective](), SELECTORS[selector]())
        expected = again(inputs.hidden, inputs.student, same).loss
        assert found.dtype == expected.dtype
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


class Inputs:
    """Hidden states and heads of a small teacher and student."""

    def __init__(self, rows=N, vocab=V, teacher_vocab=V, dtype=F64, bias=True, softcap=None, scale=1.0):
        def randn(*shape):
            return torch.randn(*shape, dtype=dtype)

        self.hidden = (scale * randn(rows, H)).requires_grad_()
        self.weight = randn(vocab, H).requires_grad_()
        self.bias = randn(vocab).requires_grad_() if bias else None
        self.teacher_hidden = scale * randn(rows, H_TEACHER)
        self.teacher = LMHead(randn(teacher_vocab, H_TEACHER), randn(teacher_vocab) if bias else None, softcap)
        self.softcap = softcap

    @property
    def student(self):
        return LMHead(self.weight, self.bias, self.softcap)

    @property
    def leaves(self):
        return [self.hidden, self.weight] + ([] if self.bias is None else [self.bias])

    @property
    def teacher_output(self):
        return TeacherHiddenStates(self.teacher_hidden, self.teacher)

    def run(self, head):
        return head(self.hidden, self.student, self.teacher_output)

    def gradients(self, head):
        output = self.run(head)
        return output, torch.autograd.grad(output.loss, self.leaves)


def capped(hidden, head):
    z = hidden @ head.weight.T + (0 if head.bias is None else head.bias)
    return z if head.softcap is None else head.softcap * torch.tanh(z / head.softcap)


def dense(inputs, head):
    """Loss, summands and selection from the logits of all tokens, for autograd."""
    z = capped(inputs.hidden, inputs.student)[:, : head.vocab_size]
    z_teacher = capped(inputs.teacher_hidden, inputs.teacher)[:, : head.vocab_size]
    with torch.no_grad():
        t = head.verify_temperature
        noise = head.selector.draw(len(z), z.device)
        selection = head.selector.select(head.selector.score(z / t, z_teacher / t), noise)
    tau = head.loss_temperature * torch.as_tensor(selection.temperature, dtype=z.dtype).expand(len(z))[:, None]
    rows = selection.weights * head.objective(z / tau, z_teacher / tau)
    if head.temperature_scale == "squared":
        rows = rows * tau[:, 0] ** 2
    count = selection.weights.sum() if head.normalize == "selected" else len(z)
    return rows.sum() / count, rows, selection


def assert_agrees(inputs, head, tolerance=1e-10):
    head.eval()  # Spec-k then draws the same numbers for both
    loss, rows, selection = dense(inputs, head)
    expected = torch.autograd.grad(loss, inputs.leaves)
    output, gradients = inputs.gradients(head)
    close = {"rtol": tolerance, "atol": tolerance}
    torch.testing.assert_close(output.loss.detach(), loss.detach(), **close)
    torch.testing.assert_close(output.row_loss, rows.detach(), **close)
    torch.testing.assert_close(output.weights, selection.weights)
    torch.testing.assert_close(output.accepted, selection.accepted)
    for gradient, wanted in zip(gradients, expected, strict=True):
        torch.testing.assert_close(gradient, wanted, **close)
    return output


def build(objective="ForwardKL", selector="TopK", /, objective_args=None, selector_args=None, **settings):
    return KDHead(
        OBJECTIVES[objective](**(objective_args or {})),
        SELECTORS[selector](**(selector_args or {})),
        **settings,
    )


@pytest.mark.parametrize("chunk_size", [3, 100])
@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("selector", SELECTORS)
def test_every_objective_with_every_selector(objective, selector, chunk_size):
    head = build(objective, selector, loss_temperature=1.7, verify_temperature=0.8, chunk_size=chunk_size)
    if selector == "AdaKD":
        head.selector.share = 0.6
    assert_agrees(Inputs(), head)


@pytest.mark.parametrize("chunk_size", [1, 2, 5, 8, 16, 17, 18, None])
@pytest.mark.parametrize("selector", ["SpecK", "AdaKD", "EntropyTopP"])
def test_any_chunk_size(selector, chunk_size):
    inputs = Inputs()
    output = assert_agrees(inputs, build("ReverseKL", selector, chunk_size=chunk_size))
    assert 0 < output.weights.sum() <= N


@pytest.mark.parametrize("normalize", ["valid", "selected"])
@pytest.mark.parametrize("scale", ["squared", "none"])
@pytest.mark.parametrize("beta", [0.0, 0.01, 1.0])
@pytest.mark.parametrize("selector", ["TopK", "SpecK", "SpecKExpected"])
def test_normalisation_scale_and_beta(selector, beta, scale, normalize):
    args = {"k": 2, "beta": beta}
    head = build(
        "JensenShannon",
        selector,
        selector_args=args,
        normalize=normalize,
        temperature_scale=scale,
        loss_temperature=2.0,
    )
    head.chunk_size = 4
    output = assert_agrees(Inputs(), head)
    assert 0 < output.accepted.mean() < 1
    expected = N if normalize == "valid" else output.weights.sum()
    assert output.denominator == expected
    torch.testing.assert_close(output.loss, output.loss_sum / expected)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("softcap", [None, 3.0])
def test_bias_and_softcap(bias, softcap):
    assert_agrees(Inputs(bias=bias, softcap=softcap), build("ReverseKL", "TSDKD", chunk_size=5, loss_temperature=1.3))


@pytest.mark.parametrize("selector", ["Uniform", "AdaKD"])
def test_padded_vocabularies_are_sliced(selector):
    inputs = Inputs(vocab=V + 4, teacher_vocab=V + 9, scale=2.0)
    with pytest.raises(ValueError, match=r"27 rows, the teacher's 32.*set vocab_size"):
        inputs.run(build())
    with pytest.raises(ValueError, match="vocab_size=28 exceeds the 27 rows"):
        inputs.run(build(vocab_size=28))
    head = build("ReverseKL", selector, vocab_size=V, chunk_size=4)
    assert_agrees(inputs, head)
    _, (_, weight, bias) = inputs.gradients(head)
    assert weight.shape == (V + 4, H)
    assert (weight[V:] == 0).all()
    assert (bias[V:] == 0).all()
    assert (weight[:V] != 0).any()


@pytest.mark.parametrize("selector", SELECTORS)
@pytest.mark.parametrize("normalize", ["valid", "selected"])
def test_batch_without_tokens_is_a_zero_with_a_gradient_path(selector, normalize):
    inputs = Inputs(rows=0)
    output, gradients = inputs.gradients(build("ReverseKL", selector, normalize=normalize))
    assert output.loss.item() == output.accepted_sum.item() == output.num_tokens == 0
    for gradient, leaf in zip(gradients, inputs.leaves, strict=True):
        assert torch.equal(gradient, torch.zeros_like(leaf))


@pytest.mark.parametrize("per_row", [True, False])
@pytest.mark.parametrize("normalize", ["valid", "selected"])
def test_all_rejected_batch_is_a_zero_with_a_gradient_path(normalize, per_row):
    inputs = Inputs()
    selector = _Fixed()
    selector.per_row = per_row
    head = KDHead(OBJECTIVES["ReverseKL"](), selector, normalize=normalize, chunk_size=4)
    output, gradients = inputs.gradients(head)
    assert output.loss.item() == output.accepted_sum.item() == 0
    assert output.num_tokens == N
    for gradient, leaf in zip(gradients, inputs.leaves, strict=True):
        assert torch.equal(gradient, torch.zeros_like(leaf))


@pytest.mark.parametrize("per_row", [True, False])
def test_rows_of_weight_zero_reach_neither_the_loss_nor_the_backward(per_row):
    inputs = Inputs()
    weights = torch.zeros(N)
    weights[[2, 9]] = torch.tensor([1.0, 0.5])
    seen = []

    class _Spy(OBJECTIVES["ForwardKL"]):
        def value_and_grad(self, log_q, log_p):
            seen.append(len(log_q))
            return super().value_and_grad(log_q, log_p)

    selector = SELECTORS["TopK"](k=3, beta=0.0) if per_row else _Fixed(weights)
    output = assert_agrees(inputs, KDHead(_Spy(), selector, chunk_size=4))
    assert sum(seen) == (output.weights > 0).sum() < N


def test_validation_builds_no_gradient():
    inputs = Inputs()
    head = build("ReverseKL", "TopK")
    with torch.no_grad():
        silent = inputs.run(head)
    assert not silent.loss.requires_grad
    torch.testing.assert_close(silent.loss, inputs.run(head).loss.detach())


def test_frozen_parts_get_no_gradient():
    inputs = Inputs()
    inputs.weight.requires_grad_(False)
    inputs.bias.requires_grad_(False)
    head = build("ReverseKL", "TopK", chunk_size=4)
    expected = torch.autograd.grad(dense(inputs, head)[0], inputs.hidden)[0]
    inputs.run(head).loss.backward()
    torch.testing.assert_close(inputs.hidden.grad, expected)
    assert inputs.weight.grad is None
    inputs.hidden.requires_grad_(False)
    assert not inputs.run(head).loss.requires_grad


def test_gradient_scales_with_the_upstream_gradient_and_is_used_once():
    inputs = Inputs()
    head = build("ReverseKL", "TopK", chunk_size=4)
    plain = torch.autograd.grad(inputs.run(head).loss_sum, inputs.leaves)
    loss = 3 * inputs.run(head).loss_sum
    for scaled, gradient in zip(torch.autograd.grad(loss, inputs.leaves, retain_graph=True), plain, strict=True):
        torch.testing.assert_close(scaled, 3 * gradient)
    with pytest.raises(RuntimeError, match="run the head again"):
        loss.backward()


def test_tied_embeddings_add_up():
    inputs = Inputs(bias=False)
    tokens = torch.randint(0, V, (N,))
    head = build("ReverseKL", "Uniform", chunk_size=4)

    def gradient(loss_of):
        inputs.hidden = inputs.weight[tokens]
        return torch.autograd.grad(loss_of(), inputs.weight)[0]

    torch.testing.assert_close(
        gradient(lambda: inputs.run(head).loss), gradient(lambda: dense(inputs, head)[0]), rtol=1e-10, atol=1e-12
    )


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_extreme_logits_in_float32(objective):
    inputs = Inputs(dtype=torch.float32, scale=100.0)
    inputs.weight.data[:, 0] *= 10
    head = build(objective, "SpecK", chunk_size=4)
    output, gradients = inputs.gradients(head)
    assert output.loss.isfinite()
    assert all(gradient.isfinite().all() for gradient in gradients)


def test_bfloat16_models_are_summed_in_float32():
    rows = 40
    inputs = Inputs(rows, dtype=torch.bfloat16)
    output, gradients = inputs.gradients(build("ForwardKL", "Uniform", chunk_size=1))
    assert output.row_loss.dtype == torch.float32
    assert [g.dtype for g in gradients] == [torch.bfloat16] * 3
    exact = Inputs(rows)
    exact.softcap = None
    exact.hidden, exact.weight, exact.bias = (x.detach().double().requires_grad_() for x in inputs.leaves)
    exact.teacher_hidden = inputs.teacher_hidden.double()
    exact.teacher = LMHead(inputs.teacher.weight.double(), inputs.teacher.bias.double())
    loss, expected = exact.gradients(build("ForwardKL", "Uniform"))
    torch.testing.assert_close(output.loss.double(), loss.loss, rtol=1e-2, atol=1e-2)
    for gradient, wanted in zip(gradients, expected, strict=True):
        assert (gradient.double() - wanted).norm() < 0.01 * wanted.norm()


def test_autocast_projects_in_low_precision_and_keeps_parameter_dtypes():
    inputs = Inputs(dtype=torch.float32)
    head = build("ForwardKL", "Uniform", chunk_size=4)
    full, expected = inputs.gradients(head)
    with torch.autocast("cpu", torch.bfloat16):
        low, gradients = inputs.gradients(head)
    assert low.row_loss.dtype == torch.float32
    assert not torch.equal(low.row_loss, full.row_loss)
    torch.testing.assert_close(low.loss, full.loss, rtol=2e-2, atol=1e-2)
    for gradient, wanted in zip(gradients, expected, strict=True):
        assert gradient.dtype == torch.float32
        assert (gradient - wanted).norm() < 0.03 * wanted.norm()


def test_steps_and_state_pass_through():
    head = build("TAID", "AdaKD", objective_args={"rate": 0.1})
    for step, loss in enumerate([4.0, 3.0, 2.0, 0.1], start=1):
        head.on_step(loss, step, 20)
    twin = build("TAID", "AdaKD", objective_args={"rate": 0.1})
    twin.load_state_dict(head.state_dict())
    assert twin.objective.t == head.objective.t > 0.4
    assert twin.selector.mean_loss == head.selector.mean_loss
    before = head.state_dict()
    Inputs().gradients(head)
    Inputs().gradients(head.eval())
    assert head.state_dict() == before


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"normalize": "all"}, "normalize must be"),
        ({"temperature_scale": "T2"}, "temperature_scale must be"),
        ({"loss_temperature": 0.0}, "loss_temperature must be"),
        ({"verify_temperature": float("inf")}, "verify_temperature must be"),
        ({"vocab_size": 0}, "vocab_size must be"),
        ({"chunk_size": 0}, "chunk_size must be"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        build(**settings)


def test_bad_tensors():
    inputs, head = Inputs(), build()
    with pytest.raises(ValueError, match=r"the same N tokens, got shape \(1, 17, 6\) and 17 rows"):
        head(inputs.hidden[None], inputs.student, inputs.teacher_output)
    inputs.teacher_hidden = inputs.teacher_hidden[:-1]
    with pytest.raises(ValueError, match=r"got shape \(17, 6\) and 16 rows; pick the supervised tokens"):
        inputs.run(head)
    with pytest.raises(ValueError, match=r"k must lie in \[1, 23\]"):
        Inputs().run(build("ForwardKL", "TopK", selector_args={"k": 24}))
