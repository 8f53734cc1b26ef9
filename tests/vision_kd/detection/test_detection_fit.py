"""Whole runs of detectors: the command line, results, resuming, evaluation of the files, overfitting."""

import json
import math
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
import yaml

from kd_common.grads import clip_components
from kd_common.run.cli import find_config
from kd_common.run.errors import NonFiniteLossError
from vision_kd.compare import main as compare_main
from vision_kd.detection import DetectionModule, DetectionRecord, DigitScenes, FeatureDistillation, average_precision
from vision_kd.evaluate import main as evaluate
from vision_kd.fit import CONFIG_DIR, build, main, run
from vision_kd.methods.kd import KD
from vision_kd.methods.mlkd import MLKD
from vision_kd.methods.vanilla import Vanilla
from vision_kd.models import ModelSpec, save_student
from vision_kd.policies import SGD, DeepKD
from vision_kd.training.specs import DynamicTopK, TeacherSpec

PAIRS = {
    "r101_r18": ("fasterrcnn_resnet101_fpn", "fasterrcnn_resnet18_fpn", 1.2),
    "r101_r50": ("fasterrcnn_resnet101_fpn", "fasterrcnn_resnet50_fpn", 1.0),
    "r50_mv2": ("fasterrcnn_resnet50_fpn", "fasterrcnn_mobilenet_v2_fpn", 2.0),
}
DATA_SPEC = {"class_names": tuple("0123456789"), "mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}


@pytest.fixture
def teacher(tools, tmp_path):
    """A file with an untrained teacher of the digits."""
    detector = tools.detector("0123456789", seed=3, dtype=torch.float32)
    save_student(tmp_path / "teacher.pt", detector, ModelSpec(tools.name, tools.args))
    return tmp_path / "teacher.pt"


def arguments(tools, tmp_path, teacher, *extra):
    return [
        "--config=detection/demo",
        f"--run_dir={tmp_path / 'run'}",
        f"--model.teacher.checkpoint={teacher}",
        "--trainer.accelerator=cpu",
        "--trainer.enable_progress_bar=false",
        "--trainer.max_epochs=2",
        "--trainer.limit_val_batches=1",
        "--trainer.log_every_n_steps=1",
        "--data.train_subset=12",
        "--data.batch_size=4",
        "--data.train_sizes=[64]",
        "--data.val_size=64",
        "--baseline=null",
        *(f"--model.{who}.args={json.dumps(tools.args)}" for who in ("student", "teacher")),
        *extra,
    ]


@pytest.mark.slow
def test_the_demo_in_small(scenes, tmp_path, tools, teacher, capsys):
    """Student alone, distilled student and teacher in one table; files that evaluate reads; resuming."""
    args = arguments(
        tools,
        tmp_path,
        teacher,
        "--baseline=[--model.learning_rate=0.04]",
        "--model.gsnr_every=1",
        '--model.features={"channels": 8}',
    )
    result = main(args)
    shown = capsys.readouterr().out
    for text in ("AP75", "APl", "│ teacher ", "│ student alone, last ", "GSNR of feature", "of 10 non-target classes"):
        assert text in shown, shown
    folder = tmp_path / "run"
    assert result.metric == "AP"
    assert result.alone is not None
    assert len(result.alone.history) == len(result.history) == 2
    assert result.alone.teacher == {}
    alone = yaml.safe_load((folder / "student_alone/config.yaml").read_text())["model"]["init_args"]
    assert (alone["learning_rate"], alone["features"], alone["topk"]) == (0.04, None, None)
    assert (folder / "detections.png").read_bytes().startswith(b"\x89PNG")
    assert isinstance(json.loads((folder / "detections.json").read_text()), list)
    state = torch.load(folder / "student_last.pt", weights_only=True)
    assert not [key for key in state["model"] if "auxiliary" in key or "fusion" in key], "the student alone is exported"
    assert state["meta"]["class_names"] == list("0123456789")

    found = evaluate(
        ["--ckpt", str(folder / "student_last.pt"), "--device=cpu", "--images", str(tmp_path / "p"), "--pictures=2"]
    )
    assert found.keys() == {"AP", "AP50", "AP75", "APs", "APm", "APl"}
    assert len(list((tmp_path / "p").glob("*.png"))) == 2
    assert (folder / "student_last.pt.detections.json").is_file()
    with pytest.raises(ValueError, match="--export writes classifiers only"):
        evaluate(["--ckpt", str(folder / "student_last.pt"), "--export", str(tmp_path / "x.pt2")])

    cli = build([f"--ckpt_path={folder / 'checkpoints/last.ckpt'}", "--trainer.max_epochs=3", "--baseline=null"])
    assert [epoch["epoch"] for epoch in run(cli).history] == [0, 1, 2]


def recipe(name):
    return yaml.safe_load((CONFIG_DIR / "detection" / f"{name}.yaml").read_text())


def test_the_published_settings():
    shared = []
    for name, (teacher, student, weight) in PAIRS.items():
        assert f"--model.features.weight={weight}" in (CONFIG_DIR / "detection" / f"{name}.yaml").read_text()
        config = recipe(name)
        init = config["model"]["init_args"]
        assert (init["teacher"]["name"], init["student"]["name"]) == (teacher, student)
        assert (init["learning_rate"], init["momentum"], init["weight_decay"]) == (0.01, 0.9, 1e-4)
        assert config["trainer"]["max_steps"] == 180_000
        milestones = init["lr_schedule"]["init_args"]["milestones"]
        assert [round(m * 14_658, -3) for m in milestones] == [120_000, 160_000]
        kd = {"temperature": 1.0, "ce_weight": 1.0, "alpha": 1.0, "beta": 0.25}
        assert init["method"]["init_args"] == kd | {"warmup_epochs": 0.0, "standardize": False}
        shared.append({**init, "student": None, "teacher": None, "data": config["data"], "trainer": config["trainer"]})
    assert shared[0] == shared[1] == shared[2]


@pytest.mark.quick("r50_mv2")
@pytest.mark.parametrize("name", PAIRS)
def test_every_recipe_builds_and_takes_a_step(name, tools, tmp_path):
    """A real step at small size on networks without downloaded weights."""
    for split in ("train2017", "val2017"):
        entries = [{"image_id": i, "category_id": 3, "bbox": [4, 5, 20, 20]} for i in (10, 20)]
        tools.write_coco(tmp_path, entries, split=split, sizes=((64, 64),) * 2)
    small = json.dumps({"rpn_post_nms_top_n_train": 50, "box_batch_size_per_image": 8})
    cli = build(
        [
            f"--config=detection/{name}",
            f"--data.root={tmp_path}",
            "--data.num_workers=0",
            "--data.batch_size=2",
            "--data.train_sizes=[64]",
            f"--model.student.args={small}",
            f"--model.teacher.args={small}",
            "--model.teacher.pretrained=false",
            '--model.features={"channels": 8}',
            f"--run_dir={tmp_path / name}",
            "--trainer.accelerator=cpu",
        ]
    )
    model = cli.model
    assert model.num_classes == 4
    data_spec = model.data_spec(cli.datamodule)
    model.attach_teacher(model.build(model.teacher_spec.model, **data_spec))
    cli.datamodule.setup("fit")
    optimizer = model.build_optimizer()
    params = [p for group in optimizer.param_groups for p in group["params"]]
    batch = next(iter(cli.datamodule.train_dataloader()))
    step = model.train().component_step(batch, params, epoch=0.0, k=2, buckets=optimizer.buckets)
    assert step.components.keys() == {"task", "target", "nontarget", "feature"}
    assert all(math.isfinite(value) for value in step.components.values())
    optimizer.step(components=step.gradients)
    assert all(p.isfinite().all() for p in params)


@pytest.mark.slow
def test_packaged_comparison_parses_and_builds(scenes, tmp_path):
    settings = yaml.safe_load(Path(find_config("compare/detection", CONFIG_DIR)).read_text())
    assert len(settings["variants"]) == 10
    assert settings["seeds"] == [0, 1, 2]
    for name, configs in settings["variants"].items():
        entries = [e if e.startswith("--") else f"--config={e}" for e in [*settings["base"], *configs]]
        model = build([*entries, f"--run_dir={tmp_path / 'run'}", "--trainer.accelerator=cpu"]).model
        assert isinstance(model, DetectionModule)
        assert isinstance(model.policy, DeepKD if "DeepKD" in name else SGD)
        assert (model.topk is not None) == ("mask" in name)
        assert (model.momentum, model.learning_rate) == (0.825 if "DeepKD" in name else 0.9, 0.05)
        assert (model.features is not None) == ("features" in name)
        assert type(model.method).__name__ == ("Vanilla" if "alone" in name else "DKD" if "DKD" in name else "KD")


@pytest.mark.slow
def test_comparison_of_detectors(scenes, tmp_path, tools, teacher):
    overrides = [a for a in arguments(tools, tmp_path, teacher) if not a.startswith(("--config", "--run_dir"))]
    variants = {"alone": ["methods/vanilla"], "KD": ["detection/kd", "policies/sgd"]}
    rows = compare_main(
        [
            "--base=[detection/demo]",
            f"--variants={json.dumps(variants)}",
            f"--output={tmp_path / 'out'}",
            "--seeds=[0]",
            f"--overrides={json.dumps(overrides)}",
        ]
    )
    assert [run.variant for run in rows] == ["alone", "KD"]
    table = (tmp_path / "out/results.md").read_text()
    assert "| last AP | best AP | last AP50 |" in table
    assert (tmp_path / "out/accuracy.png").is_file()


# ---------------------------------------------------------------- the module


def module(tools, **settings):
    spec = ModelSpec(tools.name, tools.args)
    return DetectionModule(spec, **DATA_SPEC, teacher=TeacherSpec(tools.name, tools.args), **settings)


def test_a_method_of_several_views_is_refused(tools):
    with pytest.raises(ValueError, match=r"model\.method MLKD compares several views"):
        module(tools, method=MLKD())


@pytest.mark.parametrize("features", [FeatureDistillation(weight=0.0), FeatureDistillation(channels=0)])
def test_feature_settings_out_of_range(tools, features):
    with pytest.raises(ValueError, match=r"model\.features needs a weight > 0 and channels >= 1"):
        module(tools, features=features)


def test_features_need_a_teacher(tools):
    with pytest.raises(ValueError, match=r"need model\.teacher; it is not set"):
        DetectionModule(
            ModelSpec(tools.name, tools.args),
            **DATA_SPEC,
            method=Vanilla(),
            policy=SGD(),
            features=FeatureDistillation(),
        )


def test_a_teacher_that_does_not_fit(tools):
    with pytest.raises(ValueError, match="does not know 9 of the 10 categories"):
        module(tools).attach_teacher(tools.teacher("0ab"))
    with pytest.raises(ValueError, match=r"FPN has 24 channels, model\.teacher\.args says 16"):
        module(tools, features=FeatureDistillation()).attach_teacher(tools.teacher("0123456789", fpn_channels=24))


def test_the_mask_may_let_all_categories_and_the_background_through(tools):
    """Ten categories and the background: ten non-target classes."""
    made = module(tools, topk=DynamicTopK(k_start=0.05, k_opt=0.5, phase_ends=(0.3, 0.6)))
    assert made.num_classes == 11
    assert made._topk_schedule(100)(99) == 10


def test_weights_of_other_categories_do_not_train(tools, tmp_path):
    """Their outputs would silently take on other meanings."""
    save_student(tmp_path / "d.pt", tools.detector("9876543210"), ModelSpec(tools.name, tools.args))
    with pytest.raises(ValueError, match=r"know 10 categories, 9, 8, 7, \.\.\., and the data have 10, 0, 1, 2"):
        DetectionModule(
            ModelSpec(tools.name, tools.args, checkpoint=str(tmp_path / "d.pt")),
            **DATA_SPEC,
            method=Vanilla(),
            policy=SGD(),
        )


def test_bf16_weights_are_refused(tools, scenes):
    trainer = pl.Trainer(
        accelerator="cpu", precision="bf16-true", max_epochs=1, logger=False, enable_checkpointing=False
    )
    with pytest.raises(ValueError, match="steps of 8 pixels; use bf16-mixed"):
        trainer.fit(module(tools), datamodule=DigitScenes(train_subset=8))


@pytest.mark.slow
def test_a_training_checkpoint_of_a_run_with_features_is_scored(scenes, tmp_path, tools, teacher):
    """It holds the fusion beside the student. The run ends inside its epoch, and is validated there."""
    extra = ('--model.features={"channels": 8}', "--trainer.max_steps=2", "--trainer.max_epochs=1")
    cli = build(arguments(tools, tmp_path, teacher, *extra))
    history = run(cli).history
    assert cli.trainer.global_step == 2
    assert len(history) == 1
    name = ["--model.name", tools.name, f"--model.args={json.dumps(tools.args)}"]
    data = ["--data=DigitScenes", "--data.train_sizes=[64]", "--data.val_size=64", "--device=cpu"]
    checkpoint = str(tmp_path / "run/checkpoints/last.ckpt")
    assert evaluate(["--ckpt", checkpoint, *name, *data]).keys() >= {"AP", "AP50"}


@pytest.mark.slow
def test_a_finished_run_resumed_without_further_epochs(scenes, tmp_path, tools, teacher):
    cli = build(arguments(tools, tmp_path, teacher, "--trainer.max_epochs=1"))
    history = run(cli).history
    again = build([f"--ckpt_path={tmp_path / 'run/checkpoints/last.ckpt'}", "--baseline=null"])
    assert run(again).history == history


@pytest.mark.slow
def test_a_resumed_run_ends_bit_for_bit_like_one_that_went_through(scenes, tmp_path, tools, teacher):
    """With every part that has a state: momenta, warm-up, fusion, and the order of the scenes."""
    torch.set_num_threads(1)
    steady = "--model.lr_schedule=StepDecay", "--model.lr_schedule.milestones=[]"  # does not depend on max_epochs
    extra = (*steady, "--model.topk=null", '--model.features={"channels": 8}', "--trainer.max_epochs")
    whole = build(arguments(tools, tmp_path / "whole", teacher, *extra, "2"))
    half = build(arguments(tools, tmp_path / "half", teacher, *extra, "1"))
    history = run(whole).history
    run(half)
    checkpoint = f"--ckpt_path={tmp_path / 'half/run/checkpoints/last.ckpt'}"
    resumed = build([checkpoint, "--trainer.max_epochs=2", "--baseline=null"])
    assert [epoch["AP"] for epoch in run(resumed).history] == [epoch["AP"] for epoch in history]
    ends = [
        torch.load(tmp_path / f"{name}/run/student_last.pt", weights_only=True)["model"] for name in ("whole", "half")
    ]
    assert ends[0].keys() == ends[1].keys()
    assert all(torch.equal(value, ends[1][key]) for key, value in ends[0].items())


def test_a_baseline_is_for_one_process(tools, tmp_path, teacher, monkeypatch, scenes):
    cli = build(arguments(tools, tmp_path, teacher, "--baseline=[]"))
    monkeypatch.setattr(type(cli.trainer), "world_size", 2)
    with pytest.raises(ValueError, match="with several set it to null"):
        run(cli)


@pytest.mark.slow
def test_an_exploding_student_is_not_saved(scenes, tmp_path, tools, teacher):
    cli = build(arguments(tools, tmp_path, teacher, "--model.learning_rate=1e30", "--model.clip_norm=null"))
    with pytest.raises(NonFiniteLossError):
        run(cli)
    assert not list((tmp_path / "run").rglob("student_last.pt"))


@pytest.mark.slow
def test_overfitting_a_handful_of_scenes_reaches_ap_above_60(scenes, tools, tmp_path):
    """DeepKD with a teacher that knows the scenes no better than chance and weighs little; scored by pycocotools."""
    torch.set_num_threads(1)
    data = DigitScenes(train_sizes=(80,), val_size=80, batch_size=4, train_subset=4)
    data.setup("fit")
    args = tools.args | {"fpn_channels": 32, "representation_size": 64, "box_batch_size_per_image": 32}
    made = DetectionModule(
        ModelSpec(tools.name, args),
        **DATA_SPEC,
        teacher=TeacherSpec(tools.name, args),
        method=KD(temperature=1.0, ce_weight=1.0, kd_weight=0.01),
    )
    made.attach_teacher(tools.teacher("0123456789", dtype=torch.float32))
    student, optimizer = made.student.train(), made.build_optimizer()
    params = [p for group in optimizer.param_groups for p in group["params"]]
    loader, updates = data.train_dataloader(), 200
    for update in range(updates):
        loader.sampler.set_epoch(update)
        optimizer.param_groups[0]["lr"] = 0.005 * min(1.0, (update + 1) / 20) * (1 - update / updates)
        (batch,) = loader
        step = made.component_step(batch, params, epoch=0.0, k=None, buckets=optimizer.buckets)
        clip_components(step.gradients, 5.0)
        optimizer.step(components=step.gradients)
    record = DetectionRecord(data.split("train"), student.class_names)
    ((images, targets),) = loader
    with torch.no_grad():
        record.update(student.eval()([image / 255 for image in images]), targets)
    rows, seen = record.gather()
    assert len(seen) == 4
    ap = average_precision(record.split, rows, seen)["AP"]
    assert ap > 0.6
