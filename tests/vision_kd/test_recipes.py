"""The packaged recipes: published values, every combination, and one optimisation step of what they describe.

Combinations are parsed and built by the command line's own parser: every pair with one method and policy, and every
method with every policy on one pair. `test_every_combination_is_the_published_one` covers the rest of the product by
merging the files as plain dictionaries; every parsed combination is checked to agree with that merge.
"""

import inspect
import itertools
from functools import cache
from importlib import import_module

import pytest
import torch
import yaml
from torch.utils.data import DataLoader

from kd_common.registry import subclasses
from vision_kd.fit import CONFIG_DIR, build
from vision_kd.methods import Method
from vision_kd.models import MODELS, build_classifier
from vision_kd.policies import GradientPolicy

# pair: (learning rate, beta of DKD or None where none is published)
CIFAR_PAIRS = {
    "resnet56_resnet20": (0.05, 2),
    "resnet110_resnet20": (0.05, None),
    "resnet110_resnet32": (0.05, 2),
    "resnet32x4_resnet8x4": (0.05, 8),
    "wrn_40_2_wrn_16_2": (0.05, 6),
    "wrn_40_2_wrn_40_1": (0.05, 6),
    "vgg13_vgg8": (0.05, 6),
    "vgg13_MobileNetV2": (0.01, 6),
    "ResNet50_MobileNetV2": (0.01, 8),
    "ResNet50_vgg8": (0.05, None),
    "resnet32x4_ShuffleV1": (0.01, 8),
    "resnet32x4_ShuffleV2": (0.01, 8),
    "wrn_40_2_ShuffleV1": (0.01, 8),
    "resnet32x4_wrn_16_2": (0.05, None),
    "resnet32x4_wrn_40_2": (0.05, None),
    "wrn_40_2_resnet8x4": (0.05, None),
    "wrn_40_2_MobileNetV2": (0.01, None),
}
IMAGENET_PAIRS = {
    "imagenet_resnet34_resnet18": ("torchvision/resnet34", "torchvision/resnet18"),
    "imagenet_resnet50_MobileNetV1": ("torchvision/resnet50", "MobileNetV1"),
    "imagenet_regnet_deit_tiny": ("torchvision/regnet_y_16gf", "timm/deit_tiny_patch16_224"),
}


def dkd(temperature, beta, warmup):
    settings = {"temperature": temperature, "ce_weight": 1, "alpha": 1, "beta": beta}
    return "dkd.DKD", settings | {"warmup_epochs": warmup, "standardize": False}


def kd(temperature, ce, kd, standardize=False):
    return "kd.KD", {"temperature": temperature, "ce_weight": ce, "kd_weight": kd, "standardize": standardize}


def mlkd(temperatures, weight, standardize):
    settings = {"temperatures": temperatures, "ce_weight": 0.1, "kd_weight": weight}
    return "mlkd.MLKD", settings | {"standardize": standardize}


CIFAR_METHODS = {
    "vanilla": ("vanilla.Vanilla", {}),
    "kd": kd(4, 0.1, 0.9),
    "lskd": kd(2, 0.1, 9, standardize=True),
    "dkd_beta2": dkd(4, 2, 20),
    "dkd_beta6": dkd(4, 6, 20),
    "dkd_beta8": dkd(4, 8, 20),
    "mlkd": mlkd([4, 2, 3, 5, 6], 0.9, standardize=False),
    "mlkd_lskd": mlkd([2, 2, 3, 5, 6], 9, standardize=True),
    "crld": (
        "crld.CRLD",
        {"temperature": 4, "ce_weight": 1, "within_weight": 2, "cross_weight": 0.5}
        | {"weak_threshold": 0.9, "strong_threshold": 0.2, "standardize": False},
    ),
}
IMAGENET_METHODS = {
    "imagenet_kd": kd(1, 0.5, 0.5),
    "imagenet_dkd_beta1": dkd(1, 1, 1),
    "imagenet_dkd_beta2": dkd(1, 2, 1),
}
METHODS = CIFAR_METHODS | IMAGENET_METHODS | {"dkd_short": dkd(4, 2, 1)}
POLICIES = {
    "sgd": ("SGD", {}),
    "dot": ("DOT", {"delta": 0.075}),
    "deepkd": ("DeepKD", {"delta": 0.075, "preset": "paper", "decay_component": None}),
    "deepkd_released": ("DeepKD", {"delta": 0.075, "preset": "released", "decay_component": None}),
    "adamw": ("AdamW", {"beta2": 0.999}),
    "deepkd_adamw": ("DeepKDAdamW", {"delta": 0.075, "beta2": 0.999}),
}
DECOUPLING = {"dot", "deepkd", "deepkd_released", "deepkd_adamw"}
ONE_STEP = {
    "trainer.max_steps": 1,
    "trainer.limit_val_batches": 1,
    "trainer.logger": False,
    "trainer.enable_checkpointing": False,
    "trainer.enable_progress_bar": False,
    "trainer.accelerator": "cpu",
    "model.teacher.pretrained": False,
}


POLICY_CLASSES = list(subclasses(GradientPolicy).values())
METHOD_CLASSES = subclasses(Method)


@cache
def packaged(name):
    return yaml.safe_load((CONFIG_DIR / f"{name}.yaml").read_text())


def packaged_names(folder):
    return {path.stem for path in (CONFIG_DIR / folder).glob("*.yaml")}


def merged(base, other):
    """Merge as the parser does; a complete block of another class replaces the one before."""
    if not (isinstance(base, dict) and isinstance(other, dict)):
        return other
    if other.get("class_path", base.get("class_path")) != base.get("class_path"):
        return other
    return {key: merged(base.get(key), other[key]) if key in other else base[key] for key in base | other}


def recipe(base, pair, method, policy):
    return [base, f"pairs/{pair}", f"methods/{method}", f"policies/{policy}"]


def merge_files(names):
    result = packaged("default")
    for name in names:
        result = merged(result, packaged(name))
    return result


def build_recipe(names, tmp_path, **overrides):
    overrides = ONE_STEP | {"run_dir": tmp_path / "run"} | overrides
    flags = [f"--{key}={str(value).lower() if isinstance(value, bool) else value}" for key, value in overrides.items()]
    return build([*itertools.chain.from_iterable(("--config", name) for name in names), *flags])


def assert_resolved(found, expected, skip=(), path=""):
    """Every value of the merged files is what the parser arrived at."""
    for key, value in expected.items():
        where = f"{path}.{key}".lstrip(".")
        if where in skip:
            continue
        if isinstance(value, dict):
            assert_resolved(found[key], value, skip, where)
        else:
            assert found[key] == (tuple(value) if isinstance(found[key], tuple) else value), where


def resolved(cli):
    return cli.config.as_dict()


def take_one_step(cli, size):
    """One update of the student from random images; returns the largest change of a parameter."""
    model, data = cli.model, cli.datamodule
    data_spec = {"num_classes": model.num_classes, "in_channels": data.in_channels, "mean": data.mean, "std": data.std}
    if model.method.needs_teacher:
        model.attach_teacher(build_classifier(model.teacher_spec.model, **data_spec))
    before = [p.detach().clone() for p in model.student.parameters()]
    views = {v: torch.rand(2, data.in_channels, size, size) for v in model.method.views}
    target = torch.randint(model.num_classes, (2,))
    train, val = (DataLoader([(v, target)], batch_size=None) for v in (views, {"clean": views["weak"]}))
    cli.trainer.fit(model, train, val)
    assert model.global_step == 1
    after = list(model.student.parameters())
    assert all(p.isfinite().all() for p in after)
    return max((a - b).abs().max().item() for a, b in zip(after, before, strict=True))


def in_module(module, entry):
    name, settings = entry
    return {"class_path": f"vision_kd.{module}.{name}"} | ({"init_args": settings} if settings else {})


# ---------------------------------------------------------------- the files


def test_the_tables_above_name_every_packaged_file():
    assert packaged_names("pairs") == CIFAR_PAIRS.keys() | IMAGENET_PAIRS.keys()
    assert packaged_names("methods") == METHODS.keys()
    assert packaged_names("policies") == POLICIES.keys()
    assert packaged_names("") == {"default", "cifar100", "imagenet", "fashion_mnist", "topk"}


def test_default_names_classes_without_settings():
    init_args = packaged("default")["model"]["init_args"]
    assert all(init_args[name].keys() == {"class_path"} for name in ("method", "policy", "lr_schedule"))


def class_blocks(tree):
    for value in tree.values():
        if isinstance(value, dict):
            if "class_path" in value:
                yield value
            yield from class_blocks(value)


FILES = [
    f"{folder}/{name}".lstrip("/")
    for folder in ("", "pairs", "methods", "policies")
    for name in sorted(packaged_names(folder))
]


@pytest.mark.parametrize("file", [file for file in FILES if file != "default"])  # the default stands behind no other
def test_a_block_that_names_a_class_states_all_its_settings(file):
    """What a block leaves out would be inherited from the class chosen before it (jsonargparse issue 460)."""
    for block in class_blocks(packaged(file)):
        module, _, name = block["class_path"].rpartition(".")
        if module.startswith(("vision_kd.data", "vision_kd.training.classification")):
            continue
        parameters = list(inspect.signature(getattr(import_module(module), name)).parameters)
        assert list(block.get("init_args", {})) == parameters, block


def test_files_of_one_kind_write_the_same_keys():
    """So that each combination is determined by its files alone, and a pair, a method and a policy are independent."""
    writes = {
        "pairs": {"student", "teacher", "learning_rate"},
        "methods": {"method"},
        "policies": {"policy"},
    }
    further = {"mlkd": {"learning_rate"}, "mlkd_lskd": {"learning_rate"}, "vanilla": {"policy", "topk"}}
    further["imagenet_regnet_deit_tiny"] = {"lr_schedule", "weight_decay", "clip_norm"}
    for folder, keys in writes.items():
        for name in packaged_names(folder):
            assert packaged(f"{folder}/{name}")["model"]["init_args"].keys() == keys | further.get(name, set()), name


# ---------------------------------------------------------------- the whole product, as dictionaries


def test_every_combination_is_the_published_one():
    combinations = 0
    for pair, method, policy in itertools.product(CIFAR_PAIRS, CIFAR_METHODS, POLICIES):
        combinations += 1
        config = merge_files(recipe("cifar100", pair, method, policy))
        init = config["model"]["init_args"]
        lr, epochs = (0.025, 480) if method.startswith("mlkd") else (CIFAR_PAIRS[pair][0], 240)
        assert (init["learning_rate"], config["trainer"]["max_epochs"], config["name"]) == (lr, epochs, pair)
        teacher, student = init["teacher"]["name"], init["student"]["name"]
        assert f"{teacher}_{student}" == pair
        assert {teacher, student} <= set(MODELS.names())
        assert init["teacher"]["epochs"] == 240
        assert init["method"] == in_module("methods", METHODS[method])
        assert init["policy"] == in_module("policies", POLICIES[policy])
        assert (init["momentum"], init["weight_decay"], init["topk"]) == (0.9, 5e-4, None)
        assert init["lr_schedule"]["class_path"] == "kd_common.schedules.StepDecay"
        assert init["lr_schedule"]["init_args"]["milestones"] == [150, 180, 210]
        assert config["data"]["init_args"]["batch_size"] == 64
    assert combinations == 17 * 9 * 6


def test_every_imagenet_combination_is_the_published_one():
    for pair, method, policy in itertools.product(IMAGENET_PAIRS, IMAGENET_METHODS, POLICIES):
        config = merge_files(recipe("imagenet", pair, method, policy))
        init = config["model"]["init_args"]
        assert (init["teacher"]["name"], init["student"]["name"]) == IMAGENET_PAIRS[pair]
        # The literature's ResNet-50 teacher is torchvision's first set of weights, no longer its default.
        assert init["teacher"]["pretrained"] == ("IMAGENET1K_V1" if "resnet50" in pair else True)
        assert init["method"] == in_module("methods", METHODS[method])
        assert init["policy"] == in_module("policies", POLICIES[policy])
        values = (
            config["trainer"]["max_epochs"],
            config["data"]["init_args"]["batch_size"],
            init["learning_rate"],
            init["weight_decay"],
        )
        schedule = init["lr_schedule"]["init_args"]
        if pair == "imagenet_regnet_deit_tiny":
            assert values == (300, 1024, 1e-3, 0.05)
            assert schedule == {"warmup_epochs": 5, "final": 0.01, "warmup_start": 0.001}
        else:
            assert values == (100, 512, 0.2, 1e-4)
            assert (schedule["milestones"], schedule["gamma"]) == ([30, 60, 90], 0.1)


@pytest.mark.parametrize(("pair", "beta"), [(pair, beta) for pair, (_, beta) in CIFAR_PAIRS.items()])
def test_a_pair_names_its_published_dkd_weight(pair, beta):
    comment = (CONFIG_DIR / "pairs" / f"{pair}.yaml").read_text().splitlines()[0]
    assert ("none published" if beta is None else f"methods/dkd_beta{beta}.yaml") in comment


# ---------------------------------------------------------------- parsed, built and stepped


@pytest.mark.parametrize("pair", CIFAR_PAIRS)
@pytest.mark.quick("resnet32x4_resnet8x4")
def test_cifar_pair(pair, tmp_path):
    """Real networks at their real size; DKD with the pair's weight, DeepKD."""
    names = recipe("cifar100", pair, f"dkd_beta{CIFAR_PAIRS[pair][1] or 8}", "deepkd")
    cli = build_recipe(names, tmp_path)
    assert_resolved(resolved(cli), merge_files(names), skip=("trainer.accelerator",))
    assert (cli.model.num_classes, cli.datamodule.image_size) == (100, 32)
    assert cli.model.student.mean == (0.5071, 0.4867, 0.4408)
    assert cli.model.student.std == (0.2675, 0.2565, 0.2761)
    assert take_one_step(cli, 32) > 0


@pytest.mark.parametrize(("method", "policy"), [*itertools.product(CIFAR_METHODS, POLICIES)])
@pytest.mark.quick("kd-deepkd", "mlkd_lskd-dot", "vanilla-deepkd")
def test_cifar_method_with_policy(method, policy, tmp_path):
    names = recipe("cifar100", "resnet56_resnet20", method, policy)
    if method == "vanilla" and policy in DECOUPLING:
        with pytest.raises(ValueError, match=r"model\.policy .* target, nontarget apart.*use model\.policy SGD"):
            build_recipe(names, tmp_path)
        return
    cli = build_recipe(names, tmp_path)
    assert_resolved(resolved(cli), merge_files(names), skip=("trainer.accelerator",))
    for entry, instance in [(METHODS[method], cli.model.method), (POLICIES[policy], cli.model.policy)]:
        assert type(instance).__name__ == entry[0].split(".")[-1]
        for name, value in entry[1].items():
            assert getattr(instance, name) == (tuple(value) if isinstance(value, list) else value)
    assert take_one_step(cli, 8) > 0


@pytest.fixture(scope="module")
def imagenet(tmp_path_factory):
    """A tree with a thousand empty class folders."""
    root = tmp_path_factory.mktemp("imagenet")
    for number in range(1000):
        (root / "train" / f"n{number:04}").mkdir(parents=True)
    return root


@pytest.mark.parametrize(
    ("pair", "method", "policy", "size"),
    [
        ("imagenet_resnet34_resnet18", "imagenet_dkd_beta1", "deepkd", 64),
        ("imagenet_resnet50_MobileNetV1", "imagenet_dkd_beta2", "deepkd", 64),
        ("imagenet_regnet_deit_tiny", "imagenet_kd", "deepkd_adamw", 224),
    ],
)
@pytest.mark.quick("imagenet_resnet34_resnet18-imagenet_dkd_beta1-deepkd-64")
def test_imagenet_pair(pair, method, policy, size, imagenet, tmp_path):
    """Real networks without their published weights, in bf16-mixed as the recipe says."""
    names = recipe("imagenet", pair, method, policy)
    cli = build_recipe(names, tmp_path, **{"data.root": imagenet})
    skip = ("trainer.accelerator", "data.init_args.root", "model.init_args.teacher.pretrained")
    assert_resolved(resolved(cli), merge_files(names), skip)
    assert cli.model.num_classes == 1000
    assert take_one_step(cli, size) > 0


@pytest.mark.parametrize(("method", "policy"), [*itertools.product(IMAGENET_METHODS, POLICIES)])
@pytest.mark.quick("imagenet_kd-deepkd")
def test_imagenet_method_with_policy(method, policy, imagenet, tmp_path):
    names = recipe("imagenet", "imagenet_resnet34_resnet18", method, policy)
    small = {"model.student.name": "resnet8", "model.teacher.name": "resnet8"}
    cli = build_recipe(names, tmp_path, **{"data.root": imagenet}, **small)
    init = resolved(cli)["model"]["init_args"]
    for key, entry in {"method": METHODS[method], "policy": POLICIES[policy]}.items():
        assert_resolved(init[key], in_module(f"{key}s" if key == "method" else "policies", entry))
    assert take_one_step(cli, 16) > 0


def test_default_is_deepkd_with_the_dynamic_mask_on_digits(tmp_path):
    cli = build_recipe([], tmp_path)
    model = cli.model
    assert (type(model.method).__name__, type(model.policy).__name__) == ("KD", "DeepKD")
    assert (type(model.lr_schedule).__name__, type(cli.datamodule).__name__) == ("CosineDecay", "Digits")
    assert (model.topk.k_start, model.topk.k_opt, model.topk.phase_ends) == (0.05, 0.5, (0.3, 0.6))
    assert take_one_step(cli, cli.datamodule.image_size) > 0


def test_fashion_mnist_recipe(tmp_path):
    names = ["fashion_mnist", "topk", "methods/dkd_short", "policies/dot"]
    cli = build_recipe(names, tmp_path)
    assert_resolved(resolved(cli), merge_files(names), skip=("trainer.accelerator",))
    assert cli.model.topk.k_opt == 0.5
    assert take_one_step(cli, cli.datamodule.image_size) > 0


def test_topk_needs_a_nontarget_term(tmp_path):
    assert build_recipe(["topk", "methods/vanilla"], tmp_path).model.topk is None, "vanilla switches the mask off"
    with pytest.raises(ValueError, match=r"model\.topk.*Vanilla"):
        build_recipe(["methods/vanilla", "topk"], tmp_path)


# ---------------------------------------------------------------- choosing classes on the command line


@pytest.mark.parametrize("name", METHOD_CLASSES)
def test_choosing_a_method_by_name_gives_its_own_defaults(name, tmp_path):
    topk = {"model.topk": "null", "model.policy": "SGD"} if name == "Vanilla" else {}
    method = build_recipe([], tmp_path, **{"model.method": name}, **topk).model.method
    assert vars(method) == vars(METHOD_CLASSES[name]())


@pytest.mark.parametrize("cls", POLICY_CLASSES, ids=lambda cls: cls.__name__)
def test_choosing_a_policy_by_name_gives_its_own_defaults(cls, tmp_path):
    assert vars(build_recipe([], tmp_path, **{"model.policy": cls.__name__}).model.policy) == vars(cls())


def test_settings_of_a_class_can_be_given_one_by_one(tmp_path):
    flags = {"model.method": "DKD", "model.method.beta": 2, "model.policy": "DeepKD", "model.policy.delta": 0.05}
    model = build_recipe([], tmp_path, **flags).model
    assert (model.method.beta, model.method.alpha, model.policy.delta) == (2, 1, 0.05)
    parts = '{"task": 0.01, "target": 0.02, "nontarget": 0.03}'
    model = build_recipe([], tmp_path, **{"model.policy": "DeepKD", "model.policy.delta": parts}).model
    assert model.policy.delta == {"task": 0.01, "target": 0.02, "nontarget": 0.03}


def test_a_method_file_after_another_inherits_nothing(tmp_path):
    for first, second in [("dkd_beta8", "kd"), ("crld", "mlkd"), ("mlkd_lskd", "dkd_beta2"), ("lskd", "crld")]:
        cli = build_recipe([f"methods/{first}", f"methods/{second}"], tmp_path)
        assert_resolved(resolved(cli)["model"]["init_args"]["method"], in_module("methods", METHODS[second]))


HELPED = {f"model.method.help={name}": cls for name, cls in METHOD_CLASSES.items()}
HELPED |= {f"model.policy.help={cls.__name__}": cls for cls in POLICY_CLASSES}
HELPED |= {f"model.lr_schedule.help={name}": name for name in ("StepDecay", "CosineDecay")}
HELPED |= {f"data.help={name}": name for name in ("Digits", "FashionMNIST", "CIFAR10", "CIFAR100", "ImageFolder")}


@pytest.mark.parametrize("flag", HELPED)
def test_help_lists_every_setting(flag, capsys):
    cls = HELPED[flag]
    if isinstance(cls, str):
        cls = getattr(import_module("vision_kd.data" if flag.startswith("data") else "kd_common.schedules"), cls)
    with pytest.raises(SystemExit, match="0"):
        build([f"--{flag}"])
    shown = capsys.readouterr().out
    prefix = flag.split(".help")[0].split(".")[-1]
    for name in inspect.signature(cls).parameters:
        assert f"--{prefix}.{name}" in shown
