"""The import contracts of pyproject.toml: each refuses what it forbids, in every room, and docs/architecture.md says the same."""

import ast
import importlib.metadata
import itertools
import json
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest

from tests.policy import house

ROOT = Path(__file__).parents[2]
PYPROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())
CONTRACTS: dict[str, dict[str, Any]] = {row["name"]: row for row in PYPROJECT["tool"]["importlinter"]["contracts"]}
ROOMS = next(row["layers"] for row in CONTRACTS.values() if row.get("containers") == ["pipeline"])
LIGHT = CONTRACTS["the light core loads nothing heavy, on no way"]
INSTALLED_APART = {"clip_retrieval", "dalle2_pytorch", "k_diffusion", "streaming", "transformers"}
"""Other libraries that tests and benchmarks compare with, from folders of their own: the Makefile, docs/benchmarks.md."""
TORCH_ALONE = {*sys.stdlib_module_names, "torch", "numpy", "jaxtyping", "models"}


def _folders(root: Path) -> list[str]:
    """Every package of the tree, dotted."""
    inits = (path for name in house.PACKAGES for path in (root / name).rglob("__init__.py"))
    return sorted(".".join(path.parent.relative_to(root).parts) for path in inits)


def _plant(root: Path, package: str, name: str, imported: str) -> list[str]:
    """Write two modules into ``package``, with the import at the top and inside a function; returns their names."""
    folder = root / package.replace(".", "/")
    (folder / f"{name}_top.py").write_text(f"import {imported}\n")
    (folder / f"{name}_lazy.py").write_text(f"def call() -> None:\n    import {imported}\n")
    return [f"{package}.{name}_top", f"{package}.{name}_lazy"]


def _lint(root: Path) -> dict[str, str]:
    """Output of import-linter on the tree at ``root``, by contract; only broken ones."""
    command = [sys.executable, "-c", "from importlinter.cli import lint_imports_command as c; c()", "--no-cache"]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    _, _, broken = done.stdout.partition("Broken contracts\n")
    parts = re.split(r"^(.+)\n-{3,}\n", broken, flags=re.MULTILINE)
    texts = dict(zip(parts[1::2], parts[2::2], strict=True))
    assert set(texts) <= set(CONTRACTS), done.stdout + done.stderr
    return texts


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    for name in house.PACKAGES:
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    return tmp_path


def test_a_library_of_one_room_is_refused_in_every_other(tree: Path) -> None:
    protected = {name: row for name, row in CONTRACTS.items() if row["type"] == "protected"}
    planted: dict[str, list[str]] = {}
    for number, (name, row) in enumerate(protected.items()):
        (library,), (home,) = row["protected_modules"], row["allowed_importers"]
        strangers = [place for place in _folders(tree) if not f"{place}.".startswith(f"{home}.")]
        planted[name] = [new for place in strangers for new in _plant(tree, place, f"planted_{number}", library)]
        assert len(strangers) > len(_folders(tree)) / 2
    broken = _lint(tree)
    for name, modules in planted.items():
        library = protected[name]["protected_modules"][0]
        assert not [module for module in modules if f"- {module} -> {library} " not in broken[name]]


def test_the_light_core_is_refused_each_heavy_library_directly_and_through_others(tree: Path) -> None:
    graph = house.build_graph(ROOT)
    modules = {
        module for pattern in LIGHT["source_modules"] for top in graph.find_matching_modules(pattern)
        for module in {top} | graph.find_descendants(top)
    }  # fmt: skip
    assert {"pipeline.errors", "pipeline.recipe.plan", "models.prior.config"} <= modules
    direct = sorted(modules)
    for module in direct:
        path = tree / f"{module.replace('.', '/')}.py"
        path = path if path.exists() else tree / module.replace(".", "/") / "__init__.py"
        lines = "".join(f"    import {library}\n" for library in LIGHT["forbidden_modules"])
        path.write_text(f"{path.read_text()}\n\ndef planted() -> None:\n{lines}")
    (tree / "models/between.py").write_text("import torch\n")
    (tree / "pipeline/errors.py").write_text("import models.between\n")
    text = _lint(tree)[LIGHT["name"]]
    missing = [
        (module, library) for module in direct if module != "pipeline.errors" for library in LIGHT["forbidden_modules"]
        if f"{module} -> {library} " not in text
    ]  # fmt: skip
    assert not missing
    assert "pipeline.errors -> models.between " in text


def test_upward_imports_circles_and_unnamed_rooms_are_refused(tree: Path) -> None:
    upward = [(low, high) for high, low in itertools.pairwise(ROOMS)]
    for low, high in upward:
        if (tree / "pipeline" / low).is_dir():
            _plant(tree, f"pipeline.{low}", "planted", f"pipeline.{high}")
        else:
            with (tree / f"pipeline/{low}.py").open("a") as file:
                file.write(f"\n\ndef planted_lazy() -> None:\n    import pipeline.{high}\n")
    networks = sorted(path.parent.name for path in (tree / "models").glob("*/network.py"))
    for name, other in zip(networks, [*networks[1:], networks[0]], strict=True):
        with (tree / f"models/{name}/network.py").open("a") as file:
            file.write(f"\nimport models.{other}.network\nimport models.cascade\n")
    _plant(tree, "models", "planted", "pipeline.errors")
    _plant(tree, "pipeline.recipe", "above", "jobs.options")
    broken = _lint(tree)
    text = broken["rooms of pipeline: each imports only those below it"]
    assert not [
        pair for pair in upward if f"pipeline.{pair[0]} is not allowed to import pipeline.{pair[1]}" not in text
    ]
    text = broken["models: a network knows neither another network nor the cascade"]
    assert not [name for name in networks if f"models.{name}.network -> models.cascade " not in text]
    text = broken["packages: each imports only those below it"]
    assert "models.planted_lazy -> pipeline.errors " in text
    assert "pipeline.recipe.above_top -> jobs.options " in text
    assert "No cycles are allowed in pipeline." in broken["no import circle"]


def test_a_room_without_a_place_in_the_order_is_refused(tree: Path) -> None:
    (tree / "pipeline/cellar").mkdir()
    (tree / "pipeline/cellar/__init__.py").write_text("")
    command = [sys.executable, "-c", "from importlinter.cli import lint_imports_command as c; c()", "--no-cache"]
    done = subprocess.run(command, cwd=tree, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "pipeline.cellar" in done.stdout


def test_what_networks_share_has_a_place_in_the_order() -> None:
    ordered = set(CONTRACTS["models: what networks share, in its order"]["layers"])
    there = {
        path.stem for path in (ROOT / "models").iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()
    }
    networks = {path.parent.name for path in (ROOT / "models").glob("*/network.py")}
    assert there - networks - {"__init__"} == ordered


def _foreign_imports(root: Path, allowed: set[str]) -> set[tuple[str, str]]:
    foreign = set[tuple[str, str]]()
    for path in sorted(root.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            foreign |= {(path.name, top) for name in names if (top := name.partition(".")[0]) not in allowed}
    return foreign


def test_models_and_their_tests_need_torch_alone(tree: Path) -> None:
    """So that they run on any GPU machine; what is compared with others' code is in tests/oracles."""
    helpers = {path.stem for path in (ROOT / "tests/models").rglob("*.py")}
    assert not _foreign_imports(ROOT / "models", TORCH_ALONE)
    assert not _foreign_imports(ROOT / "tests/models", {*TORCH_ALONE, "pytest", "hypothesis", *helpers})
    for place in (name for name in _folders(tree) if name.startswith("models")):
        planted = _plant(tree, place, "planted", "requests")
        names = {f"{module.rpartition('.')[2]}.py" for module in planted}
        assert _foreign_imports(tree / place.replace(".", "/"), TORCH_ALONE) >= {(name, "requests") for name in names}


def test_architecture_page_names_every_room_in_the_order_of_the_contract() -> None:
    text = (ROOT / "docs/architecture.md").read_text()
    named = re.findall(r"^\| `pipeline/(\w+)(?:\.py|/)` \|", text, re.MULTILINE)
    there = {
        path.stem for path in (ROOT / "pipeline").iterdir() if (path / "__init__.py").exists() or path.suffix == ".py"
    }
    assert set(named) == there - {"__init__"}
    assert named == ROOMS


def test_architecture_page_says_where_each_protected_library_lives() -> None:
    text = (ROOT / "docs/architecture.md").read_text()
    said = dict(re.findall(r"^\| `(\w+)` \| `([\w/.]+?)(?:\.py|/)?` \|", text, re.MULTILINE))
    rules = {
        row["protected_modules"][0]: row["allowed_importers"][0].replace(".", "/")
        for row in CONTRACTS.values()
        if row["type"] == "protected"
    }
    assert {library: said.get(library) for library in rules} == rules


def test_no_arrow_points_upward_and_the_measure_sees_one_that_does(tree: Path) -> None:
    (tree / "tests").mkdir()
    assert _measure(tree)["upward arrows"] == 0
    _plant(tree, "pipeline.shapes", "planted", "pipeline.data.pairs")
    assert _measure(tree)["upward arrows"] == 1


def _measure(root: Path) -> dict[str, int]:
    done = subprocess.run([sys.executable, house.__file__, str(root)], capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


def _declared(key: str) -> dict[str, bool]:
    """Requirements of pyproject's list ``key``, and whether a comment says why each is there."""
    lines = re.search(rf"^{key} = \[\n(.*?)^\]", (ROOT / "pyproject.toml").read_text(), re.DOTALL | re.MULTILINE)
    assert lines is not None
    return {_canonical(line): "  # " in line for line in lines[1].splitlines()}


def _canonical(requirement: str) -> str:
    match = re.match(r'[\s"]*([\w.-]+)', requirement)
    assert match is not None
    return re.sub(r"[-_.]+", "-", match[1]).lower()


@pytest.mark.parametrize(("key", "folders"), [("dependencies", house.PACKAGES), ("dev", ("tests", "benchmarks"))])
def test_dependencies_are_the_imports(key: str, folders: tuple[str, ...]) -> None:
    """A direct dependency is imported, or a comment says why it is there; and what is imported is declared."""
    owners = importlib.metadata.packages_distributions()
    declared = _declared(key)
    optional = PYPROJECT["project"]["optional-dependencies"]
    extras = {_canonical(line) for name in ("cpu", "gpu", "traces") for line in optional[name]}
    allowed = set(declared) | extras | (set() if key == "dependencies" else set(_declared("dependencies")))
    expected_names = {*sys.stdlib_module_names, *house.PACKAGES, "tests", "benchmarks", *INSTALLED_APART}
    expected_names |= {path.stem for path in (ROOT / "tests").rglob("*.py")}
    tops = {top for folder in folders for _, top in _foreign_imports(ROOT / folder, expected_names)}
    names = {top: {_canonical(name) for name in owners.get(top, ())} for top in tops}
    assert not {top for top in tops if not names[top] & allowed}, f"declare them in pyproject.toml's {key}"
    imported = set[str]().union(*names.values())
    assert {name for name, has_reason in declared.items() if not has_reason} <= imported
    assert not {name for name, has_reason in declared.items() if has_reason} & imported


def test_constraints_pin_every_dependency() -> None:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pinned = {_canonical(line) for line in lines if "==" in line}
    assert _declared("dependencies").keys() | _declared("dev").keys() <= pinned
