from pathlib import Path

from pipeline.shapes.describe import describe


def test_docs_list_what_the_code_holds_out() -> None:
    page = Path(__file__).parents[2] / "docs" / "pairs.md"
    assert page.read_text(encoding="utf-8") == describe(), "run: python -m pipeline.shapes.describe > docs/pairs.md"
