"""No file that is loaded can run code: pickles, remote code of models, YAML tags."""

import ast
import json
import pickle
import shutil
import zlib
from importlib import import_module
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import kd_common
from kd_common.hub.language_models import ModelFilesError, load_causal_lm, load_config, load_tokenizer
from kd_common.run.checkpoints import AtomicCheckpointIO
from llm_kd.evaluate import main as evaluate_language
from llm_kd.teacher import CacheError, CacheHeader, CacheWriter, TeacherCache
from spec_decode.decoding.session import find_drafter
from spec_decode.drafters import FastEagle, load_drafter, save_drafter
from spec_decode.drafters.files import WEIGHTS
from spec_decode.models import CausalLM
from vision_kd.data import Digits
from vision_kd.detection import build_detector, load_detector
from vision_kd.evaluate import main as evaluate_vision
from vision_kd.models import CheckpointError, ModelSpec, build_classifier, load_classifier
from vision_kd.training.classification import DistillationModule
from vision_kd.training.specs import TeacherSpec
from vision_kd.training.teacher import obtain_teacher, teacher_cache_path

PACKAGES = Path(kd_common.__file__).parents[3]


class Touch:
    """Makes a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.fixture
def marker(tmp_path):
    """A file that must not exist in the end."""
    path = tmp_path / "executed"
    yield path
    assert not path.exists(), "code in a file was run"


KINDS = ["zip", "legacy", "pickle"]


@pytest.fixture
def arm(marker):
    """Write a file that looks like weights or a training checkpoint, and runs code if it is unpickled."""

    def write(path, kind="zip", **content):
        content |= {"state_dict": {"w": torch.zeros(2)}, "optimizer_states": [], "loops": {}, "bonus": Touch(marker)}
        path.parent.mkdir(parents=True, exist_ok=True)
        if kind == "pickle":
            path.write_bytes(pickle.dumps(content, protocol=2))
        else:
            torch.save(content, path, _use_new_zipfile_serialization=kind == "zip")
        return path

    return write


def test_the_files_of_these_tests_are_armed(arm, tmp_path, marker):
    for kind in KINDS:
        path = arm(tmp_path / "evil.pt", kind)
        pickle.loads(path.read_bytes()) if kind == "pickle" else torch.load(path, weights_only=False)
        assert marker.exists()
        marker.unlink()


DATA_SPEC = {"num_classes": 10, "in_channels": 1, "mean": (0.4,), "std": (0.3,)}
DETECTOR = {"class_names": ("cat",), "mean": (0.4,) * 3, "std": (0.3,) * 3}


def cached_teacher(path):
    data, config = Digits(), {"class_path": "vision_kd.data.Digits", "init_args": {}}
    spec = TeacherSpec("resnet8")
    place = teacher_cache_path(spec, data, config, task=DistillationModule)
    place.parent.mkdir(parents=True)
    shutil.copy(path, place)
    with pytest.raises(CheckpointError, match=rf"(?s){place}.*Delete {place} to train it again") as caught:
        obtain_teacher(spec, data, config, task=DistillationModule)
    raise CheckpointError(f"{path} as {caught.value}")


VISION = {
    "teacher": lambda path: build_classifier(ModelSpec("resnet8", checkpoint=str(path)), **DATA_SPEC),
    "student": load_classifier,
    "cached teacher": cached_teacher,
    "detector": lambda path: build_detector(ModelSpec("fasterrcnn_resnet18_fpn", checkpoint=str(path)), **DETECTOR),
    "saved detector": load_detector,
    "evaluate": lambda path: evaluate_vision([f"--ckpt={path}", "--data=Digits", "--model.name=resnet8"]),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("loader", VISION)
def test_weights_of_images(loader, kind, arm, tmp_path):
    path = arm(tmp_path / "weights.pt", kind)
    with pytest.raises(CheckpointError, match=rf"{path}.*could run code"):
        VISION[loader](path)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("package", ["vision_kd", "llm_kd", "spec_decode"])
def test_a_checkpoint_to_resume_from(package, kind, arm, tmp_path):
    path = arm(tmp_path / "run/checkpoints/last.ckpt", kind)
    with pytest.raises(ValueError, match=rf"--ckpt_path {path}: not a readable checkpoint"):
        import_module(f"{package}.fit").build([f"--ckpt_path={path}", f"--run_dir={tmp_path / 'run'}"])


def test_lightnings_own_loading(arm, tmp_path):
    """What `Trainer.fit(..., weights_only=True)` calls, should the check before it ever be left out."""
    with pytest.raises(pickle.UnpicklingError):
        AtomicCheckpointIO().load_checkpoint(str(arm(tmp_path / "last.ckpt")), weights_only=True)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("file", ["manifest.json", "shard-00000.safetensors"])
def test_a_teacher_cache(file, kind, arm, tmp_path):
    from llm_kd.selection.acceptance import TruncatedDistribution

    with CacheWriter(tmp_path / "cache", CacheHeader("model", "w" * 64, "t" * 64, 30, 4, "float16")) as writer:
        writer.add(["a" * 64], [3], torch.arange(3), TruncatedDistribution.from_logits(torch.randn(3, 30), 4))
    path = arm(tmp_path / "cache" / file, kind)
    with pytest.raises(CacheError, match=rf"{path} is damaged"):
        TeacherCache(tmp_path / "cache")


def copied(target, folder):
    shutil.copytree(target, folder)
    return folder


MODELS = {
    "model": lambda folder: load_causal_lm(str(folder)),
    "student": lambda folder: evaluate_language(
        [f"--student={folder}", f"--data.val={folder.parent / 'val.jsonl'}", "--device=cpu"]
    ),
    "drafter": lambda folder: find_drafter(str(folder), CausalLM.from_transformers(load_causal_lm(str(folder) + "-"))),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("loader", MODELS)
def test_a_model_with_pickled_weights(loader, kind, arm, tmp_path, target):
    folder = copied(target, tmp_path / "model")
    copied(target, tmp_path / "model-")
    (folder / "model.safetensors").unlink()
    arm(folder / "pytorch_model.bin", kind)
    (tmp_path / "val.jsonl").write_text('{"instruction": "Count to 3.", "output": "1 2 3"}\n')
    with pytest.raises(ModelFilesError, match=rf"(?s){folder} cannot be loaded.*safetensors"):
        MODELS[loader](folder)


@pytest.mark.parametrize("kind", KINDS)
def test_safetensors_that_are_a_pickle(kind, arm, tmp_path, target):
    folder = copied(target, tmp_path / "model")
    arm(folder / "model.safetensors", kind)
    with pytest.raises(ModelFilesError, match=rf"{folder} cannot be loaded"):
        load_causal_lm(str(folder))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("checksum", [True, False])
def test_a_drafter(checksum, kind, arm, tmp_path, target):
    runner = CausalLM.from_transformers(load_causal_lm(str(target)))
    save_drafter(FastEagle(depth=1).bind(runner), tmp_path / "drafter", {})
    path = arm(tmp_path / "drafter" / WEIGHTS, kind)
    if not checksum:  # whoever armed it corrected that
        config = tmp_path / "drafter/drafter.json"
        content = json.loads(config.read_text()) | {"weights_crc32": zlib.crc32(path.read_bytes())}
        config.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=rf"{path} is damaged.*train the drafter again"):
        load_drafter(tmp_path / "drafter", runner)


@pytest.mark.filterwarnings("ignore")  # whatever the libraries say about the odd folders
@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter(kind, arm, tmp_path, target):
    peft = pytest.importorskip("peft")
    folder = tmp_path / "adapter"
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM", base_model_name_or_path=str(target))
    config.save_pretrained(folder)
    arm(folder / "adapter_model.bin", kind)
    with pytest.raises(ModelFilesError, match=rf"{folder} holds an adapter"):
        load_causal_lm(str(folder))


@pytest.mark.parametrize("load", [load_causal_lm, load_config, load_tokenizer])
def test_a_model_with_code_of_its_own(load, tmp_path, target, marker, monkeypatch):
    """Nobody is asked whether to run it, either."""
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    folder = copied(target, tmp_path / "model")
    (folder / "own.py").write_text(f"from pathlib import Path\nPath({str(marker)!r}).touch()\n")
    for file, key, entry in (
        ("config.json", "model_type", "own"),
        ("config.json", "auto_map", {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"}),
        ("tokenizer_config.json", "tokenizer_class", "OwnTokenizer"),
        ("tokenizer_config.json", "auto_map", {"AutoTokenizer": ["own.Tokenizer", "own.Tokenizer"]}),
    ):
        path = folder / file
        path.write_text(json.dumps(json.loads(path.read_text()) | {key: entry}))
    with pytest.raises(ModelFilesError, match=rf"{folder} cannot be loaded"):
        load(str(folder))


def test_a_configuration_with_python_tags(tmp_path, marker, capsys):
    path = tmp_path / "config.yaml"
    path.write_text(
        f"trainer: !!python/object/apply:pathlib.Path.touch [!!python/object/apply:pathlib.Path [{marker}]]"
    )
    with pytest.raises(SystemExit):
        import_module("vision_kd.fit").build([f"--config={path}"])
    assert f"--config {path}: not a readable YAML file" in capsys.readouterr().err


def test_the_sources_call_nothing_that_unpickles_or_evaluates():
    """Of the calls that could run a file's code only those are left whose arguments rule it out."""
    found = []
    for path in sorted(PACKAGES.glob("*/src/**/*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Call):
                continue
            name = ast.unparse(node.func)
            given = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
            safe = given.get("weights_only") == "True"
            if (
                name in ("pickle.load", "pickle.loads", "yaml.unsafe_load", "eval", "exec", "torch.jit.load")
                or (name == "yaml.load" and given.get("Loader") != "yaml.BaseLoader")  # which makes nothing but text
                or (name in ("torch.load", "np.load") and not safe)
                or ("ckpt_path" in given and name.endswith(".fit") and not safe)
                or given.get("trust_remote_code", "False") != "False"
                or given.get("allow_pickle", "False") != "False"
            ):
                found.append(f"{path.name}:{node.lineno}: {name}")
    assert not found


def test_weights_beside_which_a_pickle_lies_are_read_alone(arm, tmp_path, target):
    """Files that nobody asked for, such as the `training_args.bin` of other trainers, are not opened."""
    folder = copied(target, tmp_path / "model")
    for name in ("training_args.bin", "pytorch_model.bin", "optimizer.pt", "rng_state.pth"):
        arm(folder / name)
    load_causal_lm(str(folder))
    load_tokenizer(str(folder))
    save_file({"w": torch.zeros(2)}, tmp_path / "x.safetensors")
