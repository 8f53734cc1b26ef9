"""The training module against plain PyTorch loops in float64, and its errors."""

import copy
import math
from types import SimpleNamespace

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.loggers.logger import DummyLogger
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel

from kd_common.run.errors import NonFiniteLossError
from kd_common.schedules import TopKSchedule
from vision_kd.methods.dkd import DKD
from vision_kd.methods.kd import KD
from vision_kd.methods.vanilla import Vanilla
from vision_kd.models import ModelSpec, build_classifier
from vision_kd.policies import DOT, SGD, DeepKD
from vision_kd.training.classification import DistillationModule
from vision_kd.training.guards import FiniteGuard
from vision_kd.training.metrics import accuracy
from vision_kd.training.specs import DynamicTopK, TeacherSpec

LR, MU, WD, DELTA = 0.2, 0.9, 1e-2, 0.075
T, CE, KL = 4.0, 0.1, 0.9
SETTINGS = {"learning_rate": LR, "momentum": MU, "weight_decay": WD}


def start_of(module):
    """Copies of student and teacher as they are before training, in float64."""
    return copy.deepcopy(module.student).double(), copy.deepcopy(module.teacher).double()


def cosine(step, steps):
    return LR * 0.5 * (1 + math.cos(math.pi * step / steps))


def kd_losses(student, teacher, images, target):
    """Task, target-class and non-target-class loss of KD in probability space, summed over the samples."""
    z = student(images)
    p, q = (F.softmax(logits / T, dim=1) for logits in (teacher(images).detach(), z))
    hit = F.one_hot(target, z.shape[1]).bool()
    pt, qt = p[hit], q[hit]
    tckd = pt * (pt / qt).log() + (1 - pt) * ((1 - pt) / (1 - qt)).log()
    kl = (p * (p / q).log()).sum(1)
    return {
        "task": CE * F.cross_entropy(z, target, reduction="sum"),
        "target": KL * T**2 * tckd.sum(),
        "nontarget": KL * T**2 * (kl - tckd).sum(),
    }


def gradients(student, teacher, images, target):
    """Mean gradient of every component over the samples, by one plain backward pass each."""
    losses = kd_losses(student, teacher, images, target)
    params = list(student.parameters())
    return {name: torch.autograd.grad(loss / len(target), params, retain_graph=True) for name, loss in losses.items()}


def joined(batches):
    """One batch made of several."""
    return torch.cat([views["weak"] for views, _ in batches]), torch.cat([target for _, target in batches])


def assert_same_parameters(left, right, atol=1e-12):
    for a, b in zip(left.parameters(), right.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=atol)


class Recorder(pl.Callback):
    """Copies of the student before every batch, and the number of updates after it."""

    def __init__(self):
        self.students, self.updates = [], []

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        self.students.append(copy.deepcopy(module.student))

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        self.updates.append(trainer.global_step)


class MemoryLogger(DummyLogger):
    """Keeps what is logged."""

    def __init__(self):
        super().__init__()
        self.rows = []

    def log_metrics(self, metrics, step=None):
        self.rows.append({"step": step, **metrics})

    def series(self, name):
        return [row[name] for row in self.rows if name in row]


class _Spy(KD):
    """KD that remembers the progress and the k it was called with."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __call__(self, student, teacher, target, *, epoch=0.0, k=None):
        self.seen.append((epoch, k))
        return super().__call__(student, teacher, target, epoch=epoch, k=k)


# ----------------------------------------------------------------------------------------------- against plain loops


@pytest.mark.parametrize("clip_norm", [None, 0.05])
def test_sgd_policy_equals_torch_sgd_on_ce_plus_kl(toy, clip_norm):
    batches, epochs = toy.batches(8, 8, 8), 3
    module = toy.module(policy=SGD(), clip_norm=clip_norm, **SETTINGS)
    student, teacher = start_of(module)
    optimizer = torch.optim.SGD(student.parameters(), LR, MU, weight_decay=WD)
    norms = []
    for step, (views, target) in enumerate(batches * epochs):
        optimizer.param_groups[0]["lr"] = cosine(step, 3 * epochs)
        z, z_teacher = student(views["weak"]), teacher(views["weak"]).detach()
        kl = F.kl_div(F.log_softmax(z / T, 1), F.log_softmax(z_teacher / T, 1), reduction="batchmean", log_target=True)
        optimizer.zero_grad()
        (CE * F.cross_entropy(z, target) + KL * T**2 * kl).backward()
        if clip_norm is not None:
            norms.append(torch.nn.utils.clip_grad_norm_(student.parameters(), clip_norm))
        optimizer.step()

    toy.train(module, batches, epochs)
    assert_same_parameters(module.student, student)
    assert all(norm > clip_norm for norm in norms)


def three_buffers(student, teacher, batches, steps):
    """DeepKD after the paper, with weight decay at the base momentum, as a loop over explicit buffers."""
    momenta = {"task": MU + DELTA, "target": MU - DELTA, "nontarget": MU + DELTA, "decay": MU}
    params = list(student.parameters())
    buffers = {name: [torch.zeros_like(p) for p in params] for name in momenta}
    for step, (images, target) in enumerate(batches):
        grads = gradients(student, teacher, images, target)
        grads["decay"] = [WD * p.detach() for p in params]
        with torch.no_grad():
            for i, p in enumerate(params):
                for name, mu in momenta.items():
                    buffers[name][i] = mu * buffers[name][i] + grads[name][i]
                p -= cosine(step, steps) * sum(buffers[name][i] for name in momenta)


def test_deepkd_policy_equals_hand_written_buffers(toy):
    batches, epochs = toy.batches(8, 8, 8), 4
    module = toy.module(policy=DeepKD(delta=DELTA), **SETTINGS)
    student, teacher = start_of(module)
    three_buffers(student, teacher, [joined([b]) for b in batches * epochs], 12)
    toy.train(module, batches, epochs)
    assert_same_parameters(module.student, student)


@pytest.mark.parametrize("measured", [0, 1])
@pytest.mark.parametrize("sizes", [(8, 8, 8, 8), (8, 8, 8, 3), (8, 8, 8, 8, 8, 5)], ids=["full", "ragged", "rest"])
def test_micro_batches_equal_one_batch(toy, sizes, measured):
    batches, epochs = toy.batches(*sizes), 2
    module = toy.module(accumulate=4, gsnr_every=measured, **SETTINGS)
    student, teacher = start_of(module)
    whole = [joined(batches[i : i + 4]) for i in range(0, len(sizes), 4)]
    three_buffers(student, teacher, whole * epochs, steps=epochs * len(whole))

    recorder, logger = Recorder(), MemoryLogger()
    trainer = toy.train(module, batches, epochs, callbacks=[recorder], logger=logger)
    assert_same_parameters(module.student, student)
    assert trainer.global_step == epochs * len(whole)
    assert recorder.updates[: len(sizes)] == [0, 0, 0, 1, 1, 2][: len(sizes)]
    expected = [cosine(step, trainer.global_step) for step in range(trainer.global_step)]
    assert logger.series("train/lr") == pytest.approx(expected, rel=1e-12)


def test_ema_is_what_is_validated_and_exported(toy):
    batches, decay = toy.batches(8, 8, 8), 0.7
    val = toy.batches(40, 23, view="clean")
    module = toy.module(ema_decay=decay, accumulate=2, **SETTINGS)
    recorder = Recorder()
    toy.train(module, batches, 2, val=val, callbacks=[recorder])

    # Updates follow batches 1, 2 (the last of its epoch), 4 and 5; the average starts at the first updated weights.
    updated = [recorder.students[i] for i in (2, 3, 5)] + [module.student]
    average = [p.detach().clone() for p in updated[0].parameters()]
    for student in updated[1:]:
        for mean, p in zip(average, student.parameters(), strict=True):
            mean.mul_(decay).add_(p.detach(), alpha=1 - decay)
    assert isinstance(module.ema, AveragedModel)
    assert module.inference_model is module.ema.module
    for mean, p, raw in zip(average, module.ema.module.parameters(), module.student.parameters(), strict=True):
        torch.testing.assert_close(p, mean, rtol=0, atol=1e-12)
        assert not torch.allclose(p, raw, atol=1e-4)
    with torch.no_grad():
        loss = [F.cross_entropy(module.ema.module(views["clean"]), target, reduction="sum") for views, target in val]
    last = module.history[-1]
    assert last["loss"] == pytest.approx(float(sum(loss)) / 63, rel=1e-5)
    assert last["top1"] == pytest.approx(accuracy(module.ema.module, val, toy.classes, "cpu")["top1"])
    optimized = {id(p) for group in module.configure_optimizers()["optimizer"].param_groups for p in group["params"]}
    assert optimized == {id(p) for p in module.student.parameters()}


# --------------------------------------------------------------------------------------------------- measurements


def test_measuring_leaves_the_training_alone(toy):
    batches = toy.batches(8, 8, 8, 8)
    plain = toy.module(topk=DynamicTopK(k_start=1, k_opt=3), **SETTINGS)
    measured = copy.deepcopy(plain)
    measured.gsnr_every = 2
    for module in (plain, measured):
        toy.train(module, batches, 3)
    assert_same_parameters(measured.student, plain.student)
    assert measured.gsnr_of_epoch()
    assert not plain.gsnr_of_epoch()


def test_logged_statistics_equal_two_passes_over_recorded_gradients(toy):
    batches = toy.batches(8, 8, 8, 8, 8)
    module = toy.module(gsnr_every=2, **SETTINGS)
    teacher = start_of(module)[1]
    recorder, logger = Recorder(), MemoryLogger()
    val = toy.batches(10, view="clean")
    toy.train(module, batches, 2, val=val, callbacks=[recorder], logger=logger)

    measured = [
        gradients(student, teacher, *joined([batch]))
        for step, (student, batch) in enumerate(zip(recorder.students, batches * 2, strict=True))
        if step % 2 == 0
    ]
    flat = [{name: torch.cat([g.flatten() for g in grads]) for name, grads in step.items()} for step in measured]
    last_epoch = flat[-2:]  # updates 6 and 8 of 5..9
    for name in ("task", "target", "nontarget"):
        assert logger.series(f"grad_norm/{name}") == pytest.approx([float(step[name].norm()) for step in flat])
        samples = torch.stack([step[name] for step in last_epoch])
        gsnr = samples.mean(0).square().sum() / samples.var(0).sum()
        assert module.history[-1][f"gsnr/{name}"] == pytest.approx(float(gsnr))
        assert logger.series(f"gsnr/{name}")[-1] == pytest.approx(float(gsnr))
    cosines = [float(F.cosine_similarity(step["nontarget"], step["task"], dim=0)) for step in flat]
    assert logger.series("grad_cosine/nontarget_task") == pytest.approx(cosines)


def test_k_and_warm_up_follow_the_updates(toy):
    topk = DynamicTopK(k_start=1, k_opt=2, phase_ends=(0.3, 0.6))
    logger, method = MemoryLogger(), _Spy()
    toy.train(toy.module(method=method, topk=topk, accumulate=2), toy.batches(4, 4, 4, 4), 3, logger=logger)
    schedule = TopKSchedule(toy.classes, 6, k_start=1, k_opt=2, phase_ends=(0.3, 0.6))
    assert method.seen == [(step / 2, schedule(step)) for step in range(6) for _ in range(2)]
    assert logger.series("train/k") == [schedule(step) for step in range(6)]


# ------------------------------------------------------------------------------------------------------- teacher


def test_teacher_stays_frozen_and_outside_the_module(toy):
    module = toy.module(gsnr_every=1)
    teacher = toy.classifier(width=12).train()
    module.attach_teacher(teacher)
    before = copy.deepcopy(teacher.state_dict())
    module.train()
    toy.train(module, toy.batches(8, 8))
    assert module.teacher is teacher
    assert not teacher.training
    assert not any(p.requires_grad or p.grad is not None for p in teacher.parameters())
    for key, value in teacher.state_dict().items():
        assert torch.equal(value, before[key].double())
    assert len(list(module.parameters())) == len(list(module.student.parameters()))
    assert all(key.startswith("student.") for key in module.state_dict())


def test_teacher_of_other_classes_names_both(toy):
    with pytest.raises(ValueError, match=f"teacher has 3 classes.* {toy.classes}"):
        toy.module().attach_teacher(toy.classifier(classes=3))


def test_training_without_the_teacher_attached_is_an_error(toy):
    with pytest.raises(ValueError, match="attach_teacher"):
        toy.train(toy.module(teacher=False), toy.batches(4))


# -------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"topk": DynamicTopK(k_start=6)}, r"k_start.* \[1, 5\]"),
        ({"topk": DynamicTopK(k_start=0)}, r"k_start.* \[1, 5\]"),
        ({"topk": DynamicTopK(k_start=4, k_opt=2)}, "k_start must not exceed k_opt"),
        ({"method": Vanilla(), "policy": SGD(), "topk": DynamicTopK()}, "model.topk masks .* Vanilla"),
        ({"method": Vanilla()}, "DeepKD treats the gradient of target, nontarget apart"),
        ({"method": Vanilla(), "policy": DOT()}, "DOT treats the gradient of target, nontarget apart"),
        ({"policy": DeepKD(delta=0.1), "momentum": 0.9}, r"outside \[0, 1\)"),
        ({"accumulate": 0}, "model.accumulate must be >= 1"),
        ({"gsnr_every": -1}, "model.gsnr_every must be >= 0"),
        ({"learning_rate": -0.1}, "model.learning_rate must be > 0"),
    ],
)
def test_bad_settings_fail_when_the_module_is_built(toy, settings, message):
    with pytest.raises(ValueError, match=message):
        toy.module(**settings)


def test_method_with_teacher_needs_a_specification(toy):
    from vision_kd.models import ModelSpec
    from vision_kd.training.classification import DistillationModule

    with pytest.raises(ValueError, match=r"DKD needs model\.teacher"):
        DistillationModule(ModelSpec("test_tiny"), toy.classes, 1, (0.0,), (1.0,), method=DKD())


def test_a_run_of_unknown_length_is_refused(toy):
    with pytest.raises(ValueError, match=r"trainer\.max_epochs"):
        toy.train(toy.module(), toy.batches(4), epochs=-1)


@pytest.mark.parametrize("precision", ["bf16-mixed", "32-true"])
def test_lower_precision_trains(toy, precision):
    module = toy.module(gsnr_every=2, clip_norm=1.0, ema_decay=0.5, **SETTINGS)
    reference = copy.deepcopy(module)
    batches, val = toy.batches(32, 32), toy.batches(16, view="clean")
    single = [({k: v.float() for k, v in views.items()}, target) for views, target in batches]
    single_val = [({k: v.float() for k, v in views.items()}, target) for views, target in val]
    toy.train(module, single, 5, val=single_val, precision=precision)
    toy.train(reference, batches, 5, val=val)
    assert all(p.dtype == torch.float32 for p in module.student.parameters())
    for a, b in zip(module.student.parameters(), reference.student.parameters(), strict=True):
        torch.testing.assert_close(a.double(), b, rtol=0, atol=5e-2 if "bf16" in precision else 1e-5)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_non_finite_loss_names_the_batch(toy, accumulate):
    batches = toy.batches(4, 4, 4, 4, 4)
    batches[2][0]["weak"][0] = torch.nan
    module = toy.module(accumulate=accumulate)
    with pytest.raises(NonFiniteLossError, match=r"epoch 0, batch 2 .*nan.* none written yet"):
        toy.train(module, batches)
    assert all(p.isfinite().all() for p in module.student.parameters())


def test_a_fit_after_an_interrupted_one_starts_without_its_gradients(toy):
    batches = toy.batches(4, 4, 4, 4)
    broken = copy.deepcopy(batches)
    broken[1][0]["weak"][0] = torch.nan
    module = toy.module(accumulate=4, **SETTINGS)
    fresh = copy.deepcopy(module)
    with pytest.raises(NonFiniteLossError):
        toy.train(module, broken)
    for m in (module, fresh):
        toy.train(m, batches)
    assert_same_parameters(module.student, fresh.student, atol=0)


def test_schedules_stretch_over_a_run_that_max_steps_ends(toy):
    module = toy.module(topk=DynamicTopK(k_start=1, k_opt=2), learning_rate=0.1)
    trainer = toy.train(module, toy.batches(4, 4, 4), epochs=4, max_steps=6)
    assert trainer.global_step == module.total_steps == 6
    assert trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(0)
    assert module.k_at(6) == toy.classes - 1


@pytest.mark.parametrize(
    ("names", "message"),
    [("abcdef", None), ("bacdef", "another order"), ("abcdeg", "other classes"), ("", None)],
)
def test_teacher_and_student_must_mean_the_same_classes(names, message):
    data_spec = {"num_classes": 6, "in_channels": 1, "mean": (0.4,), "std": (0.3,), "class_names": tuple("abcdef")}
    module = DistillationModule(ModelSpec("test_tiny"), **data_spec, teacher=TeacherSpec("test_tiny"))
    teacher = build_classifier(ModelSpec("test_tiny"), **data_spec | {"class_names": tuple(names)})
    if message is None:
        module.attach_teacher(teacher)
        assert module.teacher is teacher
    else:
        with pytest.raises(ValueError, match=f"the teacher was trained on .*{message}"):
            module.attach_teacher(teacher)


def test_a_non_finite_loss_between_logging_steps_is_noticed_at_the_end_of_the_epoch(toy, monkeypatch):
    """Where a look at every step would stall the device."""
    module = toy.module(**SETTINGS)
    monkeypatch.setattr(type(module), "device", torch.device("meta"))
    module._guard = FiniteGuard()
    module.trainer = SimpleNamespace(
        is_last_batch=False, log_every_n_steps=50, global_step=1, current_epoch=0, checkpoint_callbacks=[]
    )
    module._stop_if_not_finite({"task": torch.tensor(math.nan)}, 3)
    module.trainer.is_last_batch = True
    with pytest.raises(NonFiniteLossError, match="batch 3"):
        module._stop_if_not_finite({"task": torch.tensor(1.0)}, 4)


def test_the_average_takes_the_statistics_along():
    data_spec = {"num_classes": 4, "in_channels": 1, "mean": (0.5,), "std": (0.2,)}
    module = DistillationModule(ModelSpec("resnet8"), **data_spec, method=Vanilla(), policy=SGD(), ema_decay=0.75)
    (name, *_) = [name for name, _ in module.student.named_buffers() if name.endswith("running_mean")]
    for value in (1.0, 3.0):
        module.student.get_buffer(name).fill_(value)
        module.ema.update_parameters(module.student)
    assert module.ema.module.get_buffer(name).unique().tolist() == [0.75 * 1.0 + 0.25 * 3.0]


def test_ranks_share_gradients_statistics_and_what_they_log(toy, monkeypatch):
    """What two processes do is tested in tests/integration; here, that each of their meetings takes place."""
    module, averaged, logged = toy.module(learning_rate=LR, weight_decay=0.0), [], []
    start = copy.deepcopy(module.student)
    monkeypatch.setattr(
        "vision_kd.training.component_training.all_reduce_mean", lambda g: {k: [x * 0 for x in v] for k, v in g.items()}
    )
    monkeypatch.setattr("vision_kd.training.component_training.average_batchnorm_buffers", averaged.append)
    monkeypatch.setattr(module, "log", lambda name, value, **how: logged.append((name, how.get("sync_dist"))))
    monkeypatch.setattr(module, "log_dict", lambda values, **how: logged.append((list(values), how.get("sync_dist"))))
    toy.train(module, toy.batches(4, 4))
    for mine, before in zip(module.student.parameters(), start.double().parameters(), strict=True):
        assert torch.equal(mine, before)  # the mean of the ranks, here zero, is what moves the student
    assert averaged
    assert averaged[0] is module.student
    validated = [entry for entry in logged if entry[0] != "loss"]
    assert validated
    assert all(synced for _, synced in validated)
