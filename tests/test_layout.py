"""The repository's shape: one-way imports, equal versions, no shadowing test packages."""

import ast
import importlib
import re
import tomllib
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = {
    "kd_common": ROOT / "packages/common",
    "vision_kd": ROOT / "packages/vision_kd",
    "llm_kd": ROOT / "packages/llm_kd",
    "spec_decode": ROOT / "packages/spec_decode",
}
TORCH_ONLY = {"torch", "kd_common", "__future__", "collections", "dataclasses", "math", "typing"}


def imported_roots(file: Path) -> set[str]:
    """Top-level names of every absolute import in a file, nested ones included."""
    roots = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            roots |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            roots.add(node.module.split(".")[0])
    return roots


def sources(package: str) -> list[Path]:
    files = sorted((PACKAGES[package] / "src" / package).rglob("*.py"))
    assert files, f"no sources found for {package}"
    return files


@pytest.mark.parametrize("package", PACKAGES)
def test_packages_import_kd_common_only(package):
    forbidden = set(PACKAGES) - {package, "kd_common"}
    offenders = {str(f): imported_roots(f) & forbidden for f in sources(package) if imported_roots(f) & forbidden}
    assert not offenders, f"method packages must not import each other: {offenders}"


def imported_modules(name: str, file: Path, modules: dict[str, Path]) -> set[str]:
    """Modules of the packages that a file imports, those for annotations and inside functions included."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            parts = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= (parts & modules.keys()) or {node.module}
    return found & modules.keys() - {name}


def graph() -> dict[str, set[str]]:
    """Imported modules by module, over all packages."""
    modules = {}
    for package in PACKAGES:
        for file in sources(package):
            parts = file.relative_to(PACKAGES[package] / "src").with_suffix("").parts
            modules[".".join(parts).removesuffix(".__init__")] = file
    return {name: imported_modules(name, file, modules) for name, file in modules.items()}


def test_no_module_imports_itself_by_way_of_others():
    TopologicalSorter(graph()).prepare()  # raises a CycleError that names the circle


def commands() -> set[str]:
    """Names of the modules that a user runs."""
    files = [file for package in PACKAGES for file in sources(package) if "run_command(" in file.read_text()]
    return {f"{file.parent.name}.{file.stem}" for file in files if "__main__" in file.read_text()}


def test_a_method_package_holds_commands_and_folders():
    for package in set(PACKAGES) - {"kd_common"}:
        top = {f"{package}.{file.stem}" for file in (PACKAGES[package] / "src" / package).glob("*.py")}
        assert top - {f"{package}.__init__", f"{package}.__main__"} <= commands()


def test_nothing_below_the_top_level_imports_a_command():
    found = {name: wrong for name, used in graph().items() if name not in commands() and (wrong := used & commands())}
    assert not found


def test_functional_is_torch_only():
    for file in (PACKAGES["kd_common"] / "src/kd_common/functional").rglob("*.py"):
        assert imported_roots(file) <= TORCH_ONLY, f"{file.name} imports {imported_roots(file) - TORCH_ONLY}"


def test_versions_agree():
    versions = {name: importlib.import_module(name).__version__ for name in PACKAGES}
    versions["root"] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    citation = re.search(r"^version: (\S+)$", (ROOT / "CITATION.cff").read_text(), re.M)
    versions["citation"] = citation.group(1) if citation else "absent"
    assert len(set(versions.values())) == 1, versions


def test_no_module_beyond_400_lines():
    long = {f.name: n for p in PACKAGES for f in sources(p) if (n := len(f.read_text().splitlines())) > 400}
    assert not long, f"split these modules: {long}"


def test_test_folders_do_not_shadow_packages():
    assert not list((ROOT / "tests").glob("*/__init__.py"))


def test_every_constraint_is_name_and_version():
    lines = [ln for ln in (ROOT / "constraints.txt").read_text().splitlines() if ln and not ln.startswith("#")]
    assert lines
    bad = [ln for ln in lines if not re.fullmatch(r"[A-Za-z0-9._-]+==[A-Za-z0-9.!+_-]+", ln)]
    assert not bad, bad


def test_every_command_ends_with_a_message_where_its_user_can_mend_the_cause():
    files = [file for package in PACKAGES for file in sources(package) if file.stem != "__main__"]
    commands = [text for file in files if '__name__ == "__main__"' in (text := file.read_text())]
    assert len(commands) == 17
    assert all('if __name__ == "__main__":\n    run_command(' in text for text in commands)
