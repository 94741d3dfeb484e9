"""Measures of the tree: rooms, arrows between them, files, lines, functions.

``python tests/policy/house.py [ROOT]`` prints them, for any commit's tree: ``git worktree add ROOT COMMIT`` makes one.
"""

import ast
import json
import sys
from pathlib import Path

import grimp

PACKAGES = ("models", "pipeline", "jobs")


def room_of(module: str) -> str:
    """A room is a folder or file right below ``pipeline``, or one of the other packages as a whole."""
    package, _, rest = module.partition(".")
    return f"{package}.{rest.partition('.')[0]}" if package == "pipeline" and rest else package


def arrows_of(graph: grimp.ImportGraph) -> set[tuple[str, str]]:
    """Pairs (importing room, imported room), imports inside functions included."""
    ours = [module for module in graph.modules if module.partition(".")[0] in PACKAGES]
    pairs = {
        (room_of(module), room_of(to)) for module in ours for to in graph.find_modules_directly_imported_by(module)
    }
    return {(start, end) for start, end in pairs if start != end}


def upward_arrows(graph: grimp.ImportGraph) -> set[tuple[str, str]]:
    """Arrows that close a circle, so that they point upward in some order: of each circle the arrow with fewest imports.

    Those between packages point upward where the imported package stands later in ``PACKAGES``.
    """
    breakers = {pair for package in PACKAGES for pair in graph.nominate_cycle_breakers(package)}
    closing = {(room_of(start), room_of(end)) for start, end in breakers}
    rank = {package: number for number, package in enumerate(PACKAGES)}
    return closing | {
        (start, end) for start, end in arrows_of(graph) if rank[start.split(".")[0]] < rank[end.split(".")[0]]
    }


def build_graph(root: Path) -> grimp.ImportGraph:
    """The import graph of the tree at ``root``, read from its syntax trees: nothing is imported.

    One process can read one tree: grimp takes packages that are imported already from where they are.
    """
    sys.path.insert(0, str(root))
    return grimp.build_graph(*PACKAGES, cache_dir=None)


def measure(root: Path) -> dict[str, int]:
    """All measures of the tree at ``root``; lines as ``wc -l`` counts them, a function's from ``def`` to its end."""
    graph = build_graph(root)
    arrows = arrows_of(graph)
    inner = {
        (".".join(module.split(".")[:2]), ".".join(to.split(".")[:2]))
        for module in graph.modules
        for to in graph.find_modules_directly_imported_by(module)
        if module.startswith("models.") and to.startswith("models.")
    }
    files = [path for package in PACKAGES for path in sorted((root / package).rglob("*.py"))]
    tests = sorted((root / "tests").rglob("*.py"))
    lengths = sorted(
        (node.end_lineno or 0) - node.lineno + 1
        for path in files
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    )
    return {
        "rooms": len({room for arrow in arrows for room in arrow} - {"pipeline"}),
        "arrows between rooms": len(arrows),
        "upward arrows": len(upward_arrows(graph)),
        "places in models": len(graph.find_children("models")),
        "arrows in models": len({(start, end) for start, end in inner if start != end}),
        "files": sum(path.stat().st_size > 0 for path in files),
        "lines": _count_lines(files),
        "lines of tests": _count_lines(tests),
        "functions": len(lengths),
        "p90 of a function, in lines": lengths[len(lengths) * 9 // 10],
        "longest function, in lines": lengths[-1],
    }


def _count_lines(paths: list[Path]) -> int:
    return sum(len(path.read_text().splitlines()) for path in paths)


if __name__ == "__main__":
    print(json.dumps(measure(Path(sys.argv[1] if len(sys.argv) > 1 else ".").resolve()), indent=2))
