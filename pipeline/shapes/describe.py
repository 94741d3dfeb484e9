"""Write docs/pairs.md from the code (a test compares them).

python -m pipeline.shapes.describe > docs/pairs.md
"""

import sys

from pipeline.shapes.captions import TEMPLATES_ONE, TEMPLATES_TWO
from pipeline.shapes.scene import (
    ALONE,
    BACKGROUNDS,
    COLOURS,
    EVALUATION_KINDS,
    HELD_OUT,
    RADIUS,
    RELATIONS,
    SHAPES,
    TWO_OBJECTS_PROB,
)
from pipeline.shapes.url_list import FAULTS


def describe() -> str:
    """Describe the drawn pairs in Markdown: their attributes, captions, faults and held-out combinations."""
    total = sum(EVALUATION_KINDS.values())
    return "\n".join(
        [
            "# The drawn pairs",
            "",
            'The demo trains on these pairs (`pairs.source = "drawn"`).',
            "Written by `python -m pipeline.shapes.describe`; do not edit.",
            "",
            f"A picture shows two objects ({TWO_OBJECTS_PROB:.0%}) or one on a plain background. Seed and index",
            "determine the picture and its caption.",
            "",
            f"- Shapes: {', '.join(SHAPES)}.",
            f"- Colours (sRGB): {_colours(COLOURS)}.",
            f"- Backgrounds (sRGB): {_colours(BACKGROUNDS)}.",
            "- Sizes (half the extent, in widths of the picture): "
            + ", ".join(f"{size} {radius}" for size, radius in RADIUS.items())
            + f"; an object alone is {ALONE} times as large.",
            f"- Relations: {', '.join(RELATIONS)}.",
            "",
            "## Captions",
            "",
            "Each template with its weight among those for the same number of objects; `{a}` is the colour's article.",
            "",
            *(f"- {weight} x `{template}`" for template, weight in (*TEMPLATES_ONE, *TEMPLATES_TWO)),
            "",
            "## Faulty URLs",
            "",
            *(f"- `{kind}`: {meaning}." for kind, meaning in FAULTS.items()),
            "",
            "## Held out",
            "",
            "These combinations are never in training; every evaluation prompt contains at least one. Shares of the "
            "evaluation prompts: "
            + "; ".join(f"{kind} {share}/{total}" for kind, share in EVALUATION_KINDS.items())
            + ".",
            "",
            f"{len(HELD_OUT.objects)} objects, on any background, alone or not:",
            "",
            *(f"- {colour} {shape}" for colour, shape in HELD_OUT.objects),
            "",
            f"{len(HELD_OUT.settings)} settings (an object on a background), alone or not:",
            "",
            *(f"- {colour} {shape} on {background}" for colour, shape, background in HELD_OUT.settings),
            "",
            f"{len(HELD_OUT.pairs)} pairs in one picture, in either order:",
            "",
            *(f"- {' '.join(first)} with {' '.join(second)}" for first, second in HELD_OUT.pairs),
            "",
        ]
    )


def _colours(palette: dict[str, tuple[int, int, int]]) -> str:
    return ", ".join(f"{name} ({red}, {green}, {blue})" for name, (red, green, blue) in palette.items())


if __name__ == "__main__":
    sys.stdout.write(describe())
