"""The report's section about rows that are left out."""

import re
from pathlib import Path

import pytest

from pipeline.recipe.plan import make_plan
from pipeline.recipe.sections import FILTER_COLUMNS
from pipeline.report import filter as section
from pipeline.report.report import finished_steps, write_report
from pipeline.runtime.filter import run_filter
from pipeline.runtime.filter_embeddings import run_filter_embeddings
from pipeline.workspace.store import Workspace
from tests.filter.planted import commit, embed_by_eye, make_context, output_of, planted_pairs, tiny_recipe, without_ray
from tests.tiny.command import ROOT


def test_the_report_counts_every_row_and_shows_examples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    without_ray(monkeypatch)
    recipe = tiny_recipe(
        tmp_path,
        filter={"min_caption_words": 2, "languages": ["en"], "duplicates": "near"},
        filter_embeddings={"clip_score_share": 0.5},
    )
    planted = planted_pairs(22)
    planted.write(output_of(recipe, "download"))
    first = make_context(tmp_path, "filter", recipe)
    cheap = run_filter(first)
    commit(first, cheap)
    embed = make_context(tmp_path, "embed", recipe)
    embed_by_eye(embed)
    second = make_context(tmp_path, "filter_embeddings", recipe)
    result = run_filter_embeddings(second)
    commit(second, result)
    steps, workspace = make_plan(recipe), Workspace(recipe.workspace)
    view = section.filter_of(finished_steps(workspace, steps))
    assert view is not None
    left_out = {row["reason"]: row["count"] for row in view["rows"]}
    assert left_out == {
        name: count for name, count in (cheap.counts | result.counts).items() if name not in {"in", "ok"}
    }
    assert view["total"] == len(planted.pairs) == view["ok"] + sum(left_out.values())
    assert [row["count"] for row in view["rows"]] == sorted(left_out.values(), reverse=True)
    again = next(row for row in view["rows"] if row["reason"] == "near_duplicate")["examples"][0]
    assert len(again["pictures"]) == 2
    write_report(workspace, steps, recipe, tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    assert "What was left out" in page
    assert "Nearly the same picture" in page
    assert again["pictures"][1]["src"] in page


def test_the_page_of_filters_and_the_fields_name_every_column_of_known_lists() -> None:
    pages = [(ROOT / "docs" / name).read_text() for name in ("filter.md", "config.md")]
    rows, fields = (page.partition("## `[filter]`")[2].partition("\n## ")[0].splitlines() for page in pages)
    for name, columns in FILTER_COLUMNS.items():
        [row] = [row for row in rows if row.startswith("|") and f"`{name}`" in row]
        assert [column for column in columns if f"`{column}`" not in row] == [], name
        [field] = [field for field in fields if field.startswith(f"| `{name}` ")]
        assert [column for column in columns if not re.search(rf"\b{column}\b", field)] == [], name


def test_the_page_of_filters_and_the_report_name_the_same_reasons() -> None:
    text = (ROOT / "docs/filter.md").read_text()
    rows = re.findall(r"^\| (`[\w`, ]+`) \|", text, re.MULTILINE)
    names = {name for row in rows for name in re.findall(r"`(\w+)`", row)}
    assert names == set(section.REASONS)
    code = "".join(path.read_text() for path in (ROOT / "pipeline/filter").glob("*.py"))
    assert [name for name in section.REASONS if f'"{name}"' not in code and f"{name}_head" not in code] == []
