"""One entry point per package: `vision-kd fit ...` runs `python -m vision_kd.fit ...`."""

import ast
import runpy
import sys
from importlib.util import find_spec
from pathlib import Path

from kd_common.registry import suggest


def commands(package: str) -> dict[str, str]:
    """Name and one line of explanation of every command of a package, without importing it.

    Args:
        package: Name of the package. Every module at its top level is a command.
    """
    spec = find_spec(package)
    assert spec is not None
    assert spec.origin is not None
    found = {}
    for file in sorted(Path(spec.origin).parent.glob("[!_]*.py")):
        docstring = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or ""
        found[file.stem] = docstring.partition("\n")[0].partition("`: ")[2]
    return found


def dispatch(package: str) -> None:
    """Run the command that the first argument names with the remaining ones; without arguments, list the commands.

    Args:
        package: Name of the package.

    Raises:
        SystemExit: With 2 if there is no such command, else as the command ends.
    """
    known, (program, *args) = commands(package), sys.argv
    name = args[0] if args else "--help"
    if name in ("-h", "--help"):
        print(
            f"usage: python -m {package}.COMMAND, or {package.replace('_', '-')} COMMAND; --help after it explains it\n"
        )
        for command, line in known.items():
            print(f"  {command:<{max(map(len, known))}}  {line}")
        return
    if name not in known:
        print(f"{package} has no command {name!r}{suggest(name, known)} It has: {', '.join(known)}", file=sys.stderr)
        raise SystemExit(2)
    sys.argv = [program, *args[1:]]
    runpy.run_module(f"{package}.{name}", run_name="__main__", alter_sys=True)
