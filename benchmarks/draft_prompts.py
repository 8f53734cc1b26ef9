"""Prompts to train a drafter on: ``uv run python benchmarks/draft_prompts.py prompts.jsonl [--add FILE.jsonl ...]``.

Writes, shuffled, one JSONL file for ``spec_decode.fit --data.prompts``: the packaged prompts, functions of Python's
standard library to complete (signature and docstring, read from the interpreter's own files), and prompts of further
JSONL files. None of the sets that speculative decoding is evaluated on is in it unless it is added.
"""

import argparse
import ast
import json
import random
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from kd_common.run.errors import run_command
from kd_common.text import Row
from spec_decode.data.prompts import packaged_prompts, read_prompts

ASK = (
    "Complete this Python function.\n\n{code}",
    "Complete the following code.\n{code}",
    "Write the body of this function.\n\n{code}",
)


def library_functions(longest: int = 900) -> Iterator[str]:
    """Signature and docstring of documented public functions of the standard library, at most `longest` characters."""
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).rglob("*.py")):
        if {"site-packages", "test", "tests", "idlelib", "lib2to3"} & set(path.parts):
            continue
        try:
            tree = ast.parse(path.read_text(encoding="utf-8"))
        except (SyntaxError, UnicodeDecodeError):  # the library holds files of other encodings and versions on purpose
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef) and not node.name.startswith("_") and ast.get_docstring(node):
                code = f'def {node.name}({ast.unparse(node.args)}):\n    """{ast.get_docstring(node)}\n    """\n'
                if 60 < len(code) <= longest:
                    yield code


def record(prompt: str | Row) -> dict:
    if isinstance(prompt, str):
        return {"prompt": prompt}
    return {"messages": [{"role": turn.role, "content": turn.content} for turn in prompt.messages]}


def main() -> None:
    """Write the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    parser.add_argument("--add", type=Path, nargs="*", default=[], help="JSONL files whose prompts are added")
    parser.add_argument("--most", type=int, default=2200, help="prompts taken of each source at most")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    rng = random.Random(args.seed)
    code = [ASK[i % len(ASK)].format(code=c) for i, c in enumerate(dict.fromkeys(library_functions()))]
    prompts = []
    added = [(file.name, read_prompts(file)) for file in args.add]
    for name, source in [("packaged", packaged_prompts()), ("code", code), *added]:
        taken = rng.sample(source, min(args.most, len(source)))
        print(f"{len(taken):5d} of {len(source):5d}  {name}")
        prompts += taken
    rng.shuffle(prompts)
    args.output.write_text("".join(json.dumps(record(p)) + "\n" for p in prompts))
    print(f"{len(prompts):5d} in {args.output}")


if __name__ == "__main__":
    run_command(main)
