"""The step against torchvision's own losses and plain autograd of the total loss, in float64."""

import pytest
import torch
from torch.nn import functional as F
from torchvision.models.detection._utils import BalancedPositiveNegativeSampler

from vision_kd.detection import detection_step
from vision_kd.detection.review import ReviewFusion, review_distance
from vision_kd.detection.sampling import SeededSampler
from vision_kd.methods.dkd import DKD
from vision_kd.methods.kd import KD
from vision_kd.methods.vanilla import Vanilla
from vision_kd.policies import DOT, SGD, DeepKD

METHODS = {"KD": KD(1.0, 1.0, 1.0), "DKD": DKD(1.0, 1.0, 1.0, 0.25, 0.0), "KD, T 4": KD(4.0, 0.5, 2.0)}


def run(student, teacher, method, batch, params=None, **settings):
    class_indices = [] if teacher is None else teacher.class_indices(student.class_names)
    params = list(student.parameters()) if params is None else params
    return detection_step(student, teacher, method, *batch, params, class_indices=class_indices, **settings)


def torchvision_losses(student, images, targets):
    """The four losses of torchvision's own forward pass, which scales and normalises by itself."""
    network = student.network
    network.transform._skip_resize = True
    network.transform.image_mean, network.transform.image_std = student.mean, student.std
    network.rpn.fg_bg_sampler.seeds = [target["seed"] for target in targets]
    network.roi_heads.fg_bg_sampler.seeds = [target["seed"] + 1 for target in targets]
    return network.train()(images, targets)


def test_labels_alone_give_torchvisions_loss_and_gradient(tools):
    student, batch = tools.detector().train(), tools.batch()
    params = list(student.parameters())
    step = run(student, None, Vanilla(), batch)
    total = sum(torchvision_losses(student, *batch).values())
    torch.testing.assert_close(step.components["task"], total.detach())
    for found, expected in zip(step.gradients["task"], torch.autograd.grad(total, params), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


def roi_logits(student, teacher, batch):
    """Logits of both ROI heads on the student's proposals, and the labels, taken from the passes themselves."""
    own = student.training_pass(*batch)
    with torch.no_grad():
        images = teacher.batch(batch[0])
        theirs = teacher.network.roi_heads.box_roi_pool(
            teacher.network.backbone(images.tensors), own.proposals, images.image_sizes
        )
        logits, _ = teacher.network.roi_heads.box_predictor(teacher.network.roi_heads.box_head(theirs))
    return own.class_logits, logits, own.labels


def test_kd_is_the_kl_divergence_of_the_class_logits_of_the_sampled_proposals(tools):
    student, teacher, batch = tools.detector().train(), tools.teacher(), tools.batch()
    params = list(student.parameters())
    step = run(student, teacher, METHODS["KD"], batch)
    own, theirs, _ = roi_logits(student, teacher, batch)
    total = sum(torchvision_losses(student, *batch).values())
    total = total + F.kl_div(own.log_softmax(-1), theirs.softmax(-1), reduction="batchmean")
    torch.testing.assert_close(sum(step.components.values()), total.detach())
    sums = [sum(g for g in column if g is not None) for column in zip(*step.gradients.values(), strict=True)]
    for found, expected in zip(sums, torch.autograd.grad(total, params), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


def test_dkd_against_a_loop_over_the_proposals(tools):
    """TCKD and NCKD of DKD written out class by class, with a mask of the teacher's two best other classes."""
    student, teacher, batch = tools.detector().train(), tools.teacher(), tools.batch()
    step = run(student, teacher, METHODS["DKD"], batch, k=2)
    own, theirs, labels = roi_logits(student, teacher, batch)
    tckd = nckd = 0.0
    for z, t, label in zip(own.detach(), theirs, labels.tolist(), strict=True):
        q, p = z.softmax(0), t.softmax(0)
        for a, b in ((p[label], q[label]), (1 - p[label], 1 - q[label])):
            tckd += a * (a / b).log()
        others = sorted((c for c in range(4) if c != label), key=lambda c: -t[c].item())[:2]
        p, q = p[others] / p[others].sum(), q[others] / q[others].sum()
        nckd += (p * (p / q).log()).sum()
    torch.testing.assert_close(step.components["target"], tckd / len(labels))
    torch.testing.assert_close(step.components["nontarget"], 0.25 * nckd / len(labels))
    assert {0, 1, 2} <= set(labels.tolist()), "background and both classes are among the proposals"


@pytest.mark.parametrize("policy", [SGD(), DOT(), DeepKD(), DeepKD(preset="released")], ids=lambda p: type(p).__name__)
@pytest.mark.parametrize("method", METHODS)
def test_merged_and_separate_components_agree_with_features(tools, method, policy):
    student, teacher, batch = tools.detector().train(), tools.teacher(fpn_channels=24), tools.batch()
    fusion = ReviewFusion(5, 16, 24, 8).double()
    params = [*student.parameters(), *fusion.parameters()]
    settings = {"fusion": fusion, "feature_weight": 0.7, "k": 2}
    apart = run(student, teacher, METHODS[method], batch, params, **settings)
    assert tuple(apart.gradients) == ("task", "target", "nontarget", "feature")

    optimizer = policy.optimizer(student, tuple(apart.gradients), lr=0.1, momentum=0.9, weight_decay=0.0)
    merged = run(student, teacher, METHODS[method], batch, params, buckets=optimizer.buckets, **settings)
    for bucket, grads in merged.gradients.items():
        for i, grad in enumerate(grads):
            parts = [apart.gradients[c][i] for c in bucket.split("+") if c in apart.gradients]
            reached = [g for g in parts if g is not None]
            assert (grad is None) == (not reached)
            if grad is not None:
                torch.testing.assert_close(grad, sum(reached), rtol=1e-9, atol=1e-12)


def test_feature_component_is_the_distance_of_the_fused_maps(tools):
    student, teacher, batch = tools.detector().train(), tools.teacher(fpn_channels=24), tools.batch()
    fusion = ReviewFusion(5, 16, 24, 8).double()
    params = [*student.parameters(), *fusion.parameters()]
    step = run(student, teacher, METHODS["KD"], batch, params, fusion=fusion, feature_weight=0.7)
    own, theirs = (net.features(net.batch(batch[0])) for net in (student, teacher))
    distance = 0.7 * review_distance(dict(zip(own, fusion(list(own.values())), strict=True)), theirs)
    torch.testing.assert_close(step.components["feature"], distance.detach())
    expected = torch.autograd.grad(distance, params, allow_unused=True)
    for found, reference in zip(step.gradients["feature"], expected, strict=True):
        assert (found is None) == (reference is None)
        if found is not None:
            torch.testing.assert_close(found, reference, rtol=1e-9, atol=1e-12)


def test_each_network_runs_once(tools):
    student, teacher, batch = tools.detector().train(), tools.teacher(), tools.batch()
    calls = []
    for who, network in (("student", student.network), ("teacher", teacher.network)):
        for part in ("backbone.body", "backbone.fpn", "rpn.head", "roi_heads.box_head"):
            module = network.get_submodule(part)
            module.register_forward_hook(lambda *_, name=f"{who} {part}": calls.append(name))
    run(student, teacher, METHODS["DKD"], batch)
    expected = [f"student {part}" for part in ("backbone.body", "backbone.fpn", "rpn.head", "roi_heads.box_head")]
    expected += [f"teacher {part}" for part in ("backbone.body", "backbone.fpn", "roi_heads.box_head")]
    assert sorted(calls) == sorted(expected)


def test_both_networks_see_the_same_pixels_each_normalised_as_it_expects(tools):
    student = tools.detector().train()
    teacher = tools.teacher(mean=(0.1, 0.2, 0.3), std=(0.9, 0.8, 0.7))
    images, targets = tools.batch()
    seen = {}
    for name, net in (("student", student), ("teacher", teacher)):
        net.network.backbone.register_forward_pre_hook(lambda _, args, name=name: seen.update({name: args[0]}))
    run(student, teacher, METHODS["KD"], (images, targets))
    for name, net in (("student", student), ("teacher", teacher)):
        mean, std = (torch.tensor(v, dtype=torch.float64)[:, None, None] for v in (net.mean, net.std))
        for found, image in zip(seen[name], images, strict=True):
            height, width = image.shape[1:]
            torch.testing.assert_close(found[:, :height, :width] * std + mean, image, rtol=1e-6, atol=1e-6)
            assert not found[:, height:].any()
            assert not found[:, :, width:].any(), "the padding is zero after normalisation"


@pytest.mark.parametrize("k", [None, 2])
def test_outputs_of_unused_categories_take_no_part(tools, k):
    """Fill, drop and reorder outputs of the teacher that no category of the data uses: nothing changes."""
    student, batch = tools.detector("abc").train(), tools.batch()
    teacher = tools.teacher(("c", "N/A", "a", "N/A", "b"))
    before = run(student, teacher, METHODS["DKD"], batch, k=k)
    head = teacher.network.roi_heads.box_predictor.cls_score
    head.bias[[2, 4]] += 50.0
    after = run(student, teacher, METHODS["DKD"], batch, k=k)
    assert before.components["nontarget"] > 0
    for name in ("target", "nontarget"):
        assert torch.equal(before.components[name], after.components[name])

    order = [0, 3, 5, 1]
    for kind in ("weight", "bias"):
        setattr(head, kind, torch.nn.Parameter(getattr(head, kind)[order], requires_grad=False))
    teacher.class_names = ("a", "b", "c")
    alone = run(student, teacher, METHODS["DKD"], batch, k=k)
    torch.testing.assert_close(alone.components, before.components)


def test_all_surviving_classes_are_no_mask(tools):
    student, teacher, batch = tools.detector().train(), tools.teacher(), tools.batch()
    full = run(student, teacher, METHODS["DKD"], batch, k=3)
    assert torch.equal(
        full.components["nontarget"], run(student, teacher, METHODS["DKD"], batch).components["nontarget"]
    )
    one = run(student, teacher, METHODS["DKD"], batch, k=1)
    assert one.components["nontarget"] == 0


def test_a_teacher_of_other_classes_is_refused(tools):
    with pytest.raises(ValueError, match=r"does not know 2 of the 3 categories.*: b, c \(it knows a, x\)"):
        tools.teacher(("a", "N/A", "x")).class_indices("abc")


def test_losses_are_computed_in_fp32_under_autocast(tools):
    student, teacher = tools.detector(dtype=torch.float32).train(), tools.teacher(dtype=torch.float32)
    batch = tools.batch(torch.float32)
    plain = run(student, teacher, METHODS["DKD"], batch)
    with torch.autocast("cpu", torch.bfloat16):
        low = run(student, teacher, METHODS["DKD"], batch)
    for name, value in low.components.items():
        assert value.dtype == torch.float32
        assert value.item() == pytest.approx(plain.components[name].item(), rel=0.1), name
    assert all(g.dtype == torch.float32 for g in low.gradients["task"])


# ---------------------------------------------------------------- sampling


def test_an_images_sample_depends_on_its_own_seed_alone(tools):
    sampler, labels = SeededSampler(8, 0.5), [torch.randint(-1, 3, (60,)) for _ in range(3)]
    state = torch.get_rng_state()
    sampler.seeds = [4, 5, 6]
    positive, negative = sampler(labels)
    assert torch.equal(torch.get_rng_state(), state)
    sampler.seeds = [6, 4]
    again = sampler([labels[2], labels[0]])
    for here, there in ((0, 2), (1, 0)):
        assert torch.equal(again[0][here], positive[there])
        assert torch.equal(again[1][here], negative[there])
    sampler.seeds = [7, 8, 9]
    assert not torch.equal(sampler(labels)[1][0], negative[0])


def test_the_sample_is_torchvisions(tools):
    labels = torch.randint(-1, 3, (60,))
    sampler = SeededSampler(8, 0.25)
    sampler.seeds = [11]
    (positive,), (negative,) = sampler([labels])
    torch.manual_seed(11)
    (expected,), (other,) = BalancedPositiveNegativeSampler(8, 0.25)([labels])
    assert torch.equal(positive, expected)
    assert torch.equal(negative, other)


def test_one_seed_per_image(tools):
    sampler = SeededSampler(8, 0.5)
    with pytest.raises(ValueError, match="1 images need as many seeds, got 0"):
        sampler([torch.zeros(4)])


def test_box_losses_are_those_of_torchvision(tools, monkeypatch):
    """On proposals beside the objects; those of an untrained RPN overlap none, so that nothing is to be regressed."""
    student, (images, targets) = tools.detector().train(), tools.batch()
    nudge = torch.tensor([3.0, -2.0, 4.0, 1.0], dtype=torch.float64)
    beside = [torch.cat([target["boxes"] + nudge, target["boxes"] - nudge]) for target in targets]
    monkeypatch.setattr(student.network.rpn, "filter_proposals", lambda *_: (beside, None))
    found = student.training_pass(images, targets)
    losses = torchvision_losses(student, images, targets)
    torch.testing.assert_close(found.box_loss, losses["loss_box_reg"])
    torch.testing.assert_close(F.cross_entropy(found.class_logits, found.labels), losses["loss_classifier"])
    assert found.rpn_losses.keys() == losses.keys() - {"loss_box_reg", "loss_classifier"}
    for name, value in found.rpn_losses.items():
        torch.testing.assert_close(value, losses[name])
