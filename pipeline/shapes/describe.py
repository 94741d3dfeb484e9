"""Write docs/pairs.md from the code (a test compares them).

python -m pipeline.shapes.describe > docs/pairs.md
"""

import sys

from pipeline.shapes.captions import TEMPLATES_ONE, TEMPLATES_TWO
from pipeline.shapes.pairs import FAULTS
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


def describe() -> str:
    """Say in Markdown what the drawn pairs are made of and what training never shows."""
    total = sum(EVALUATION_KINDS.values())
    return "\n".join(
        [
            "# The drawn pairs",
            "",
            'What the demo trains on (`pairs.source = "drawn"`).',
            "Written by `python -m pipeline.shapes.describe`; do not edit.",
            "",
            f"Two objects ({TWO_OBJECTS_PROB:.0%}) or one, on a plain background. A picture and its caption follow",
            "from the seed and the index.",
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
            "How often a template is drawn beside the others of as many objects; `{a}` is the article of the colour.",
            "",
            *(f"- {weight} x `{template}`" for template, weight in (*TEMPLATES_ONE, *TEMPLATES_TWO)),
            "",
            "## Faulty URLs",
            "",
            *(f"- `{kind}`: {meaning}." for kind, meaning in FAULTS.items()),
            "",
            "## Held out",
            "",
            "Never in training; every evaluation prompt holds at least one. Shares of the evaluation prompts: "
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
