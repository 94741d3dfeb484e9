from typing import Any

from pipeline.evaluate.metrics import Rate
from pipeline.report.ablation import ablation_rows, format_ablation, order_rows, order_verdict


def _cell(difference: float, low: float, high: float, verdict: str) -> dict[str, Any]:
    return {"difference": difference, "low": low, "high": high, "verdict": verdict}


def _variant(score: float, frechet: float, hits: int) -> dict[str, Any]:
    return {
        "clip_score": {"mean": score},
        "r_precision": Rate(hits, 60).to_dict(),
        "frechet_clip": frechet,
        "pixel_check": {
            "two objects": {
                "relation": {"generated": Rate(hits, 30).to_dict(), "guess": {"rate": 0.21, "total": 30}},
                "both colours": {"generated": Rate(hits, 30).to_dict(), "guess": Rate(1, 30).to_dict()},
            }
        },
    }


HOLD, LEFT, TURNED = (
    _cell(0.031, 0.011, 0.052, "holds"),
    _cell(0.01, -0.02, 0.04, "open"),
    _cell(-0.1, -0.15, -0.05, "reversed"),
)
RESULT: dict[str, Any] = {
    "num_prompts": 60,
    "variants": {
        "caption": _variant(0.904, 0.0213, 24),
        "z_text": _variant(0.894, 0.0514, 18),
        "prior": _variant(0.913, 0.0241, 22),
    },
    "order": {
        "clip_score": {"caption over z_text": LEFT, "prior over caption": HOLD},
        "frechet_clip": {"caption over z_text": HOLD, "prior over caption": HOLD},
        "two objects: relation": {"caption over z_text": HOLD, "prior over caption": TURNED},
    },
}


def test_variants_stand_side_by_side_with_what_can_be_guessed() -> None:
    rows = {row["name"]: row for row in ablation_rows(RESULT)}
    assert list(rows) == [
        "Frechet distance", "CLIP score", "R-precision", "Two objects: both colours", "Two objects: relation",
    ]  # fmt: skip
    assert rows["Frechet distance"]["texts"] == {"caption": "0.0213", "z_text": "0.0514", "prior": "0.0241"}
    assert rows["Two objects: relation"]["texts"]["prior"] == "73.3%"
    assert rows["Two objects: relation"]["guess"] == "21.0%"


def test_the_order_is_read_by_names_and_not_by_the_places_in_the_file() -> None:
    rows = {row["name"]: row["cells"] for row in order_rows(RESULT)}
    assert rows["CLIP score"][0] == {"text": "+0.031 (+0.011 to +0.052)", "verdict": "holds"}
    assert rows["CLIP score"][1]["verdict"] == "open"
    assert rows["Two objects: relation"][0]["text"] == "-10.0 (-15.0 to -5.0)"


def test_the_verdict_says_by_which_measure_the_order_fails_and_how_far() -> None:
    assert order_verdict(RESULT) == [
        "The paper's order is prior over caption only over z_text.",
        "It holds by Frechet distance.",
        "Two objects: relation reverses prior over caption only: -10.0 (-15.0 to -5.0).",
        "60 prompts leave it open by CLIP score.",
    ]
    none = RESULT | {"order": {"clip_score": RESULT["order"]["clip_score"]}}
    assert order_verdict(none)[1] == "No measure shows the whole order."


def test_the_terminal_shows_both_tables_and_the_verdict() -> None:
    lines = format_ablation(RESULT).splitlines()
    assert lines[0].split()[-1] == "guessed"
    assert next(line for line in lines if "both colours" in line).split()[4:] == ["80.0%", "60.0%", "73.3%", "3.3%"]
    assert next(line for line in lines if "relation " in line and "reversed" in line).endswith("holds")
    assert lines[-4:] == order_verdict(RESULT)
    assert "so these were trained on." in format_ablation(RESULT | {"prompts": "training captions"})
