"""The public names of the packages and how they are called, against the committed listing."""

import importlib
import inspect
import pkgutil
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LISTING = ROOT / "tests" / "public_api.txt"
PACKAGES = ("kd_common", "vision_kd", "llm_kd", "spec_decode")
UPDATE = "uv run python tests/test_public_api.py"
DOCUMENTED = re.compile(rf"^\s*from ((?:{'|'.join(PACKAGES)})[\w.]*) import (?:\(([^)]*)\)|([^\n(]+))", re.MULTILINE)
PLAIN = (type(None), bool, int, float, str)


class _Other:
    """A default whose text may change with the version of a library."""

    def __repr__(self):
        return "..."


def exported():
    """Module and name of everything in an `__all__`, and of what builds and runs a command."""
    for package in map(importlib.import_module, PACKAGES):
        for found in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
            module = importlib.import_module(found.name)
            entries = [name for name in ("build", "run", "main") if hasattr(module, "main") and hasattr(module, name)]
            yield from ((found.name, name) for name in getattr(module, "__all__", entries))


def documented():
    """Module and name of everything that README, documentation and notebooks import."""
    for file in [ROOT / "README.md", *ROOT.glob("docs/**/*.md"), *ROOT.glob("notebooks/*.py")]:
        for module, several, one in DOCUMENTED.findall(file.read_text()):
            yield from ((module, part.split()[0]) for part in (several or one).split(",") if part.strip())


def signature(thing):
    """Names, kinds and plain defaults of the parameters; empty for what is not called, or by another library's rules.

    Annotations are left out: their text depends on the version of Python.
    """
    makers = [thing.__init__, thing.__new__] if inspect.isclass(thing) else [thing]
    for maker in filter(inspect.isfunction, makers):
        if maker.__module__.split(".")[0] in PACKAGES or hasattr(thing, "_fields"):
            parameters = list(inspect.signature(maker).parameters.values())[inspect.isclass(thing) :]
            return str(inspect.Signature([_without_types(parameter) for parameter in parameters]))
    return ""


def _without_types(parameter):
    default = parameter.default
    parts = default if isinstance(default, tuple) else (default,)
    plain = default is parameter.empty or all(type(part) in PLAIN for part in parts)
    return parameter.replace(annotation=parameter.empty, default=default if plain else _Other())


def listing():
    """One line per public name."""
    names = {*exported(), *documented()}
    lines = {f"{module}.{name}{signature(getattr(importlib.import_module(module), name))}" for module, name in names}
    return "".join(f"{line}\n" for line in sorted(lines))


def test_public_names_and_signatures():
    found, listed = set(listing().splitlines()), set(LISTING.read_text().splitlines())
    changes = [f"- {line}" for line in sorted(listed - found)] + [f"+ {line}" for line in sorted(found - listed)]
    assert not changes, f"the public interface changed; if that is meant, run `{UPDATE}`:\n" + "\n".join(changes)


def test_listing_ignores_annotations_and_other_defaults():
    def public(a: int, *b: str, c: dict = {}, d: float = 0.5, **e: object) -> None:  # noqa: B006
        """Stands for a function of a package."""

    public.__module__ = "kd_common"
    assert signature(public) == "(a, *b, c=..., d=0.5, **e)"
    assert signature(ValueError) == signature(3) == ""


if __name__ == "__main__":
    LISTING.write_text(listing())
