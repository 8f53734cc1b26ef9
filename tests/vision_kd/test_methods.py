"""Every method against a reference that works in probability space, sample by sample, in float64."""

import math

import pytest
import torch
from torch.nn import functional as F

from kd_common.registry import subclasses
from vision_kd.methods import Method
from vision_kd.methods.crld import CRLD
from vision_kd.methods.dkd import DKD
from vision_kd.methods.kd import KD
from vision_kd.methods.mlkd import MLKD
from vision_kd.methods.vanilla import Vanilla

N, C = 6, 7
MASKS = [None, 1, 3, C - 1]


def batch(names=("weak", "strong"), *, seed=0, scale=2.0, n=N, c=C, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)

    def logits():
        return {v: (scale * torch.randn(n, c, generator=generator, dtype=torch.float64)).to(dtype) for v in names}

    return logits(), logits(), torch.randint(c, (n,), generator=generator)


# ---------------------------------------------------------------- the reference: plain floats, no log space


def probabilities(z, temperature=1.0):
    weights = [math.exp(x / temperature) for x in z.tolist()]
    return [w / sum(weights) for w in weights]


def kl(p, q):
    return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))


def renormalised(p, classes):
    return [p[c] / sum(p[c] for c in classes) for c in classes]


def survivors(z_teacher, t, k):
    others = [c for c in range(len(z_teacher)) if c != t]
    return sorted(others, key=lambda c: -z_teacher[c])[: len(others) if k is None else k]


def tckd_nckd(z, z_teacher, t, temperature, k=None):
    """T^2 TCKD, T^2 NCKD and the teacher's probability of the target."""
    q, p = probabilities(z, temperature), probabilities(z_teacher, temperature)
    keep = survivors(z_teacher, t, k)
    tckd = kl([p[t], 1 - p[t]], [q[t], 1 - q[t]])
    return temperature**2 * tckd, temperature**2 * kl(renormalised(p, keep), renormalised(q, keep)), p[t]


def kd_parts(z, z_teacher, t, temperature, k=None):
    tckd, nckd, p_target = tckd_nckd(z, z_teacher, t, temperature, k)
    return tckd, (1 - p_target) * nckd


def cross_entropy(z, t):
    return -math.log(probabilities(z)[t])


def z_score(z):
    mean = sum(z.tolist()) / len(z)
    std = math.sqrt(sum((x - mean) ** 2 for x in z.tolist()) / (len(z) - 1))
    return torch.tensor([(x - mean) / (std + 1e-7) for x in z.tolist()], dtype=torch.float64)


def rows(table):
    return {name: torch.tensor([row[name] for row in table], dtype=torch.float64) for name in table[0]}


def maybe_standardised(m, *rows_of_logits):
    return [z_score(z) for z in rows_of_logits] if m.standardize else rows_of_logits


def reference_vanilla(m, student, teacher, target, epoch, k):
    return rows([{"task": cross_entropy(z, t)} for z, t in zip(student["weak"], target.tolist(), strict=True)])


def reference_kd(m, student, teacher, target, epoch, k):
    table = []
    for i, t in enumerate(target.tolist()):
        z, z_teacher = maybe_standardised(m, student["weak"][i], teacher["weak"][i])
        tckd, nckd = kd_parts(z, z_teacher, t, m.temperature, k)
        task = m.ce_weight * cross_entropy(student["weak"][i], t)
        table.append({"task": task, "target": m.kd_weight * tckd, "nontarget": m.kd_weight * nckd})
    return rows(table)


def reference_dkd(m, student, teacher, target, epoch, k):
    table = []
    ramp = min(epoch / m.warmup_epochs, 1.0)
    for i, t in enumerate(target.tolist()):
        z, z_teacher = maybe_standardised(m, student["weak"][i], teacher["weak"][i])
        tckd, nckd, _ = tckd_nckd(z, z_teacher, t, m.temperature, k)
        task = m.ce_weight * cross_entropy(student["weak"][i], t)
        table.append({"task": task, "target": ramp * m.alpha * tckd, "nontarget": ramp * m.beta * nckd})
    return rows(table)


def reference_crld(m, student, teacher, target, epoch, k):
    table = []
    for i, t in enumerate(target.tolist()):
        sure = {v: max(probabilities(teacher[v][i])) for v in m.views}
        within = m.within_weight * (sure["weak"] >= m.weak_threshold)
        cross = m.cross_weight * (sure["strong"] >= m.strong_threshold)
        row = {"task": m.ce_weight * sum(cross_entropy(student[v][i], t) for v in m.views), "target": 0, "nontarget": 0}
        for s, v, weight in [
            ("weak", "weak", within),
            ("strong", "strong", within),
            ("strong", "weak", cross),
            ("weak", "strong", cross),
        ]:
            z, z_teacher = maybe_standardised(m, student[s][i], teacher[v][i])
            tckd, nckd = kd_parts(z, z_teacher, t, m.temperature, k)
            row["target"] += weight * tckd
            row["nontarget"] += weight * nckd
        table.append(row)
    return rows(table)


def median(values):
    ordered = sorted(values)
    middle = len(ordered) // 2
    return ordered[middle] if len(ordered) % 2 else (ordered[middle - 1] + ordered[middle]) / 2


def gram(vectors):
    return [[sum(a * b for a, b in zip(u, v, strict=True)) for v in vectors] for u in vectors]


def row_distances(left, right):
    return [sum((a - b) ** 2 for a, b in zip(x, y, strict=True)) for x, y in zip(gram(left), gram(right), strict=True)]


def reference_mlkd(m, student, teacher, target, epoch, k):
    weak = [probabilities(z) for z in teacher["weak"]]
    confidence = [max(p) for p in weak]
    mass = [sum(p[c] for p in weak) for c in range(C)]
    unsure = [x <= median(confidence) for x in confidence]
    rare = [x <= median(mass) for x in mass]

    table = []
    for i, t in enumerate(target.tolist()):
        table.append({"task": m.ce_weight * sum(cross_entropy(student[v][i], t) for v in m.views)})
        table[i] |= {"target": 0.0, "nontarget": 0.0, "relation": 0.0}
        for v in m.views:
            weight = m.kd_weight * (unsure[i] if v == "weak" else 1.0)
            for temperature in m.temperatures:
                z, z_teacher = maybe_standardised(m, student[v][i], teacher[v][i])
                tckd, nckd = kd_parts(z, z_teacher, t, temperature, k)
                table[i]["target"] += weight * tckd
                table[i]["nontarget"] += weight * nckd
    for v in m.views:
        for temperature in m.temperatures:
            q, p = ([probabilities(z, temperature) for z in logits[v]] for logits in (student, teacher))
            samples = row_distances(p, q)
            classes = row_distances(list(zip(*p, strict=True)), list(zip(*q, strict=True)))
            of_classes = sum(d * (r if v == "weak" else 1.0) for d, r in zip(classes, rare, strict=True)) / C
            for i in range(len(table)):
                table[i]["relation"] += m.kd_weight * (unsure[i] * samples[i] + of_classes)
    return rows(table)


REFERENCES = {
    "Vanilla": reference_vanilla,
    "KD": reference_kd,
    "DKD": reference_dkd,
    "CRLD": reference_crld,
    "MLKD": reference_mlkd,
}
# Published settings, settings that differ from them in every argument, and LSKD on each.
SETTINGS = [
    Vanilla(),
    KD(),
    KD(temperature=1.5, ce_weight=0.7, kd_weight=3.0),
    KD(temperature=2.0, kd_weight=9.0, standardize=True),
    DKD(),
    DKD(temperature=1.0, ce_weight=0.3, alpha=2.5, beta=0.4, warmup_epochs=3.0),
    DKD(standardize=True),
    CRLD(weak_threshold=0.6, strong_threshold=0.5),
    CRLD(2.0, ce_weight=0.3, within_weight=0.7, cross_weight=1.9, weak_threshold=0.5, strong_threshold=0.7),
    CRLD(weak_threshold=0.6, strong_threshold=0.5, standardize=True),
    MLKD(),
    MLKD((1.0, 2.5), ce_weight=1.3, kd_weight=0.4),
    MLKD(kd_weight=9.0, standardize=True),
]


def name_of(method):
    return f"{type(method).__name__}-{SETTINGS.index(method)}"


@pytest.mark.parametrize("k", MASKS)
@pytest.mark.parametrize("method", SETTINGS, ids=name_of)
def test_components_are_those_of_the_reference(method, k):
    student, teacher, target = batch()
    found = method(student, teacher, target, epoch=2.0, k=k)
    expected = REFERENCES[type(method).__name__](method, student, teacher, target, 2.0, k)
    assert found.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-9, atol=1e-10, msg=f"{name}: {found[name]}")


def test_the_reference_covers_every_method_and_its_masks_bite():
    assert REFERENCES.keys() == subclasses(Method).keys()
    _, teacher, _ = batch()
    for view in ("weak", "strong"):
        confidence = teacher[view].softmax(-1).amax(-1)
        for threshold in (0.5, 0.6, 0.7):
            assert 0 < (confidence >= threshold).sum() < N


# ---------------------------------------------------------------- identities of the papers


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_kd_components_add_up_to_the_classical_loss_of_every_sample(temperature):
    student, teacher, target = batch(("weak",))
    found = sum(KD(temperature, ce_weight=0.1, kd_weight=0.9)(student, teacher, target).values())
    z, z_teacher = student["weak"] / temperature, teacher["weak"] / temperature
    kl = F.kl_div(z.log_softmax(-1), z_teacher.softmax(-1), reduction="none").sum(-1)
    expected = 0.1 * F.cross_entropy(student["weak"], target, reduction="none") + 0.9 * temperature**2 * kl
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("method", [KD(), DKD(), CRLD(weak_threshold=0.0), MLKD()], ids=lambda m: type(m).__name__)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_mask_of_all_classes_is_no_mask_bit_for_bit(method, dtype):
    student, teacher, target = batch(dtype=dtype)
    free = method(student, teacher, target, epoch=50.0, k=None)
    full = method(student, teacher, target, epoch=50.0, k=C - 1)
    assert all(torch.equal(free[name], full[name]) for name in method.components)


def test_the_mask_touches_the_nontarget_component_alone():
    for method in (KD(), DKD(), CRLD(weak_threshold=0.0), MLKD()):
        student, teacher, target = batch()
        free, masked = (method(student, teacher, target, epoch=50.0, k=k) for k in (None, 2))
        changed = {name for name in method.components if not torch.equal(free[name], masked[name])}
        assert changed == {"nontarget"}


def test_lskd_ignores_shift_and_scale_of_the_logits():
    for method in (KD(standardize=True), DKD(standardize=True), CRLD(weak_threshold=0.0, standardize=True)):
        student, teacher, target = batch()
        stretched = {view: 3.0 * z - 5.0 for view, z in student.items()}
        plain, moved = (method(z, teacher, target, epoch=50.0) for z in (student, stretched))
        for name in ("target", "nontarget"):
            torch.testing.assert_close(moved[name], plain[name], rtol=1e-6, atol=1e-9)
        assert not torch.allclose(moved["task"], plain["task"]), "the label loss reads the plain logits"


def test_dkd_warms_up_linearly_and_only_the_distillation_terms():
    student, teacher, target = batch(("weak",))
    method = DKD(warmup_epochs=20.0)
    full = method(student, teacher, target, epoch=20.0)
    for epoch, share in [(0.0, 0.0), (0.5, 0.025), (10.0, 0.5), (20.0, 1.0), (240.0, 1.0)]:
        found = method(student, teacher, target, epoch=epoch)
        assert torch.equal(found["task"], full["task"])
        for name in ("target", "nontarget"):
            torch.testing.assert_close(found[name], share * full[name], rtol=1e-14, atol=0)
    at_once = DKD(warmup_epochs=0.0)(student, teacher, target, epoch=0.0)
    assert all(torch.equal(at_once[name], full[name]) for name in full)


def test_a_student_equal_to_its_teacher_has_nothing_to_distil():
    student, _, target = batch()
    same = dict.fromkeys(student, student["weak"])  # CRLD compares the views with each other
    for method in (KD(), DKD(), CRLD(weak_threshold=0.0), MLKD()):
        parts = method(same, same, target, epoch=50.0)
        for name in set(parts) - {"task"}:
            torch.testing.assert_close(parts[name], torch.zeros(N, dtype=torch.float64), rtol=0, atol=1e-12)


# ---------------------------------------------------------------- which samples a value depends on


@pytest.mark.parametrize("cls", subclasses(Method).values(), ids=subclasses(Method))
def test_permuting_the_batch_permutes_the_components(cls):
    """Also those of MLKD: its median is that of the same batch, and its class relation is the same for all samples."""
    student, teacher, target = batch()
    order = torch.randperm(N)
    plain = cls()(student, teacher, target, epoch=9.0, k=3)
    moved = cls()(
        {v: z[order] for v, z in student.items()},
        {v: z[order] for v, z in teacher.items()},
        target[order],
        epoch=9.0,
        k=3,
    )
    for name, values in plain.items():
        torch.testing.assert_close(moved[name], values[order], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    "method", [Vanilla(), KD(), DKD(), CRLD(weak_threshold=0.6, strong_threshold=0.5)], ids=lambda m: type(m).__name__
)
def test_a_sample_does_not_depend_on_its_batch(method):
    student, teacher, target = batch()
    whole = method(student, teacher, target, epoch=9.0, k=3)
    for i in range(N):
        alone = method(
            {v: z[i : i + 1] for v, z in student.items()},
            {v: z[i : i + 1] for v, z in teacher.items()},
            target[i : i + 1],
            epoch=9.0,
            k=3,
        )
        for name, values in whole.items():
            torch.testing.assert_close(alone[name], values[i : i + 1], rtol=1e-12, atol=1e-12)


def test_mlkd_couples_the_samples_through_its_masks_and_relations():
    student, teacher, target = batch()
    z = student["weak"].clone().requires_grad_()
    parts = MLKD()({**student, "weak": z}, teacher, target)
    (of_relation,) = torch.autograd.grad(parts["relation"][0], z, retain_graph=True)
    assert (of_relation.abs().amax(-1) > 0).all(), "the relation of a sample moves every other sample"
    (of_target,) = torch.autograd.grad(parts["target"].sum(), z)
    confidence = teacher["weak"].softmax(-1).amax(-1)
    unsure = confidence <= confidence.quantile(0.5)
    assert torch.equal(of_target.abs().amax(-1) > 0, unsure), "the mask is one of samples, not a factor"


def test_crld_masks_are_per_sample_and_per_teacher_view():
    sure, unsure = [6.0, 0, 0, 0], [0.1, 0, 0, 0]
    teacher = {
        "weak": torch.tensor([sure, sure, unsure, unsure], dtype=torch.float64),
        "strong": torch.tensor([sure, unsure, sure, unsure], dtype=torch.float64),
    }
    student, _, target = batch(n=4, c=4)

    def reached(within, cross):
        method = CRLD(within_weight=within, cross_weight=cross, weak_threshold=0.9, strong_threshold=0.9)
        return (method(student, teacher, target)["nontarget"] > 0).tolist()

    assert reached(within=2.0, cross=0.0) == [True, True, False, False]
    assert reached(within=0.0, cross=0.5) == [True, False, True, False]


# ---------------------------------------------------------------- the contract every method fulfils


@pytest.mark.parametrize("cls", subclasses(Method).values(), ids=subclasses(Method))
class TestContract:
    def test_declared_views_are_enough_and_declared_components_returned(self, cls):
        method = cls()
        student, teacher, target = batch(cls.views, dtype=torch.float32)
        parts = method(student, teacher if method.needs_teacher else {}, target)
        assert tuple(parts) == cls.components
        assert cls.components[0] == "task"
        for value in parts.values():
            assert value.shape == (N,)
            assert value.dtype == torch.float32
            assert value.isfinite().all()
            assert (value >= 0).all()

    def test_a_missing_view_raises(self, cls):
        student, teacher, target = batch(cls.views)
        for view in cls.views:
            fewer = {v: z for v, z in student.items() if v != view}
            with pytest.raises(KeyError, match=view):
                cls()(fewer, teacher, target)

    def test_every_component_has_a_gradient_in_every_view(self, cls):
        student, teacher, target = batch(cls.views)
        student = {v: z.requires_grad_() for v, z in student.items()}
        parts = cls()(student, teacher, target, epoch=1.0)
        for part in parts.values():
            for gradient in torch.autograd.grad(part.mean(), list(student.values()), retain_graph=True):
                assert gradient is not None

    def test_gradients(self, cls):
        student, teacher, target = batch(cls.views, n=3, c=5)

        def components(*logits):
            views = dict(zip(cls.views, logits, strict=True))
            return tuple(cls()(views, teacher, target, epoch=7.0, k=3).values())

        assert torch.autograd.gradcheck(components, tuple(z.requires_grad_() for z in student.values()))

    @pytest.mark.parametrize("settings", [{}, {"standardize": True}], ids=["plain", "lskd"])
    @pytest.mark.parametrize("k", [None, 2])
    def test_extreme_logits(self, cls, settings, k):
        method = cls(**settings if cls is not Vanilla else {})
        student, teacher, target = batch(cls.views, scale=1e4, dtype=torch.float32)
        student["weak"][0] = 0.0  # a constant row, whose standard deviation is 0
        student = {v: z.requires_grad_() for v, z in student.items()}
        parts = method(student, teacher, target, epoch=50.0, k=k)
        for name, part in parts.items():
            assert part.isfinite().all(), name
            for gradient in torch.autograd.grad(part.sum(), list(student.values()), retain_graph=True):
                assert gradient.isfinite().all(), name

    def test_only_vanilla_needs_no_teacher(self, cls):
        assert cls().needs_teacher == (cls is not Vanilla)


def test_the_methods_by_name():
    assert list(subclasses(Method)) == ["CRLD", "DKD", "KD", "MLKD", "Vanilla"]


@pytest.mark.parametrize(
    ("cls", "setting", "value"),
    [(cls, "temperature", bad) for cls in (KD, DKD, CRLD) for bad in (0.0, -1.0, math.nan, math.inf)]
    + [(cls, "ce_weight", bad) for cls in (KD, DKD, CRLD, MLKD) for bad in (-0.1, math.nan, math.inf)]
    + [(KD, "kd_weight", -1.0), (MLKD, "kd_weight", -1.0), (DKD, "alpha", -1.0), (DKD, "beta", -1.0)]
    + [(DKD, "warmup_epochs", -1.0), (CRLD, "within_weight", -1.0), (CRLD, "cross_weight", -1.0)]
    + [(CRLD, f"{view}_threshold", bad) for view in ("weak", "strong") for bad in (-0.1, 1.1)]
    + [(MLKD, "temperatures", ())],
)
def test_bad_settings_are_refused_by_name(cls, setting, value):
    with pytest.raises(ValueError, match=setting):
        cls(**{setting: value})


def test_a_bad_temperature_in_the_list_is_named_by_its_place():
    with pytest.raises(ValueError, match=r"temperatures\[1\] must be .*got 0"):
        MLKD((4.0, 0.0))


@pytest.mark.parametrize("k", [0, C])
def test_k_out_of_range_is_refused(k):
    student, teacher, target = batch()
    for cls in (KD, DKD, CRLD, MLKD):
        with pytest.raises(ValueError, match="k must lie in"):
            cls()(student, teacher, target, k=k)
