"""Wrong configurations, drawn from a seed and counted: each is built, or refused by what is wrong in it.

A packaged recipe is written out with every setting; one of them is then dropped, renamed or given a wrong value, or the
file itself is cut or hit by a flipped bit. `build` runs in a process of its own, because settings change global state.
"""

import contextlib
import copy
import io
import multiprocessing
import random
import warnings
from collections import Counter
from importlib import import_module

import pytest
import yaml

from kd_common.errors import UserError
from kd_common.hub.language_models import load_tokenizer
from llm_kd.data.encode import Encoder

pytestmark = pytest.mark.slow
RECIPES = {
    "vision_kd": ["methods/dkd_short", "methods/mlkd", "policies/deepkd"],
    "llm_kd": ["selectors/adakd", "objectives/taid", "rollouts/adaptive_replay"],
    "spec_decode": ["drafters/fast_eagle", "drafters/eagle3", "drafters/medusa"],
}
MISTAKES, DAMAGES = 40, 10  # per package
WRONG = [None, "text", "", -1, 0, 10**13, -0.5, 1e30, float("nan"), float("inf"), [], [1, "x"], {}, {"a": 1}, True]


def written_out(package, recipe, arguments):
    """Every setting of a recipe."""
    text = io.StringIO()
    with contextlib.redirect_stdout(text), pytest.raises(SystemExit):
        import_module(f"{package}.fit").build([f"--config={recipe}", *arguments, "--print_config"])
    return yaml.safe_load(text.getvalue())


def places(node, path=()):
    """Path of every setting, groups included."""
    for key, value in node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ():
        yield (*path, key)
        yield from places(value, (*path, key))


def mistaken(config, draws):
    """The configuration with one mistake, what it is, and the name that a refusal must hold."""
    config = copy.deepcopy(config)
    path = draws.choice(list(places(config)))
    parent = config
    for key in path[:-1]:
        parent = parent[key]
    names = [key for key in path if isinstance(key, str) and key not in ("init_args", "class_path")] or ["model"]
    kind = draws.choice(["drop", "rename", "value", "value", "value"])
    if kind == "drop":
        del parent[path[-1]]
        names = [""]  # a default takes its place, which may not suit the rest
    elif kind == "rename" and isinstance(parent, dict):
        parent[f"{path[-1]}x"] = parent.pop(path[-1])
    else:
        parent[path[-1]] = draws.choice(WRONG)
        kind = repr(parent[path[-1]])
    return config, f"{'.'.join(map(str, path))}: {kind}", names[-1]


def attempt(package, arguments):
    """``built``, or ``refused`` with the message that the command line shows; ``bare`` for what shows a traceback."""
    errors = io.StringIO()
    try:
        with contextlib.redirect_stderr(errors), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            import_module(f"{package}.fit").build(arguments)
    except SystemExit as left:
        return ("refused" if left.code == 2 else "bare"), errors.getvalue()
    except UserError as error:
        return "refused", str(error)
    except Exception as error:
        return "bare", repr(error)
    return "built", ""


@pytest.fixture
def outcome(tmp_path, target, monkeypatch):
    """What becomes of a configuration file, in a fresh fork of this process; the embedded model is a stand-in there."""
    monkeypatch.setattr("kd_common.hub.language_models.embedded_folder", lambda: target)
    Encoder(load_tokenizer(str(target)))  # its template is tried in a child, which a process of a pool cannot have
    with multiprocessing.get_context("fork").Pool(1, maxtasksperchild=1) as pool:

        def run(package, file):
            arguments = [f"--config={file}", f"--run_dir={tmp_path / 'run'}"]
            return pool.apply_async(attempt, (package, arguments)).get(timeout=200)

        yield run


@pytest.mark.parametrize("package", RECIPES)
def test_a_mistake_is_built_or_refused_by_its_name(package, tmp_path, tiny_run, outcome, record_property):
    draws, counts, bad = random.Random(package), Counter(), []
    arguments = tiny_run(package, tmp_path)
    recipes = [written_out(package, recipe, arguments) for recipe in RECIPES[package]]
    file = tmp_path / "config.yaml"
    for recipe in recipes:
        file.write_text(yaml.safe_dump(recipe))
        assert outcome(package, file) == ("built", "")
    for _ in range(MISTAKES):
        config, mistake, name = mistaken(draws.choice(recipes), draws)
        file.write_text(yaml.safe_dump(config))
        result, message = outcome(package, file)
        counts[result] += 1
        if result == "bare" or (result == "refused" and name not in message):
            bad.append(f"{mistake}: {result} {message[-400:]}")
    record_property("counts", dict(counts))
    print(f"\n{package}: {dict(counts)}")
    assert not bad, "\n".join(bad)


@pytest.mark.parametrize("package", RECIPES)
def test_a_damaged_file_is_built_or_refused(package, tmp_path, tiny_run, outcome, record_property):
    draws, counts, bad = random.Random(package), Counter(), []
    content = yaml.safe_dump(written_out(package, RECIPES[package][0], tiny_run(package, tmp_path))).encode()
    file = tmp_path / "config.yaml"
    for number in range(DAMAGES):
        place = draws.randrange(len(content))
        damaged = bytearray(content)
        damaged[place] ^= 1 << draws.randrange(8)
        file.write_bytes(damaged if number % 2 else content[:place])
        result, message = outcome(package, file)
        counts[result] += 1
        if result == "bare":
            bad.append(f"{'bit' if number % 2 else 'cut'} at {place}: {message[-400:]}")
    record_property("counts", dict(counts))
    print(f"\n{package}: {dict(counts)}")
    assert not bad, "\n".join(bad)
