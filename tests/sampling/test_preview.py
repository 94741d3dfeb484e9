from pathlib import Path

import torch
from PIL import Image

from models.stage import StageStep
from pipeline.sampling.preview import PREVIEW, Preview


def test_preview_shows_the_latest_pictures_and_goes_at_the_end(tmp_path: Path) -> None:
    steps: list[StageStep] = []
    red = torch.tensor([1.0, -1.0, -1.0]).view(1, 3, 1, 1).expand(2, 3, 8, 8)
    with Preview(tmp_path, steps.append, every_s=0.0) as preview:
        preview(StageStep("prior", 1, 2, torch.zeros(2, 16)))
        assert not (tmp_path / PREVIEW).exists()
        preview(StageStep("decoder", 1, 2, red))
        with Image.open(tmp_path / PREVIEW) as page:
            assert page.convert("RGB").getpixel((page.width // 4, page.height // 2)) == (255, 0, 0)
        assert [path.name for path in tmp_path.iterdir()] == [PREVIEW]
    assert [step.stage for step in steps] == ["prior", "decoder"]
    assert not list(tmp_path.iterdir())


def test_preview_is_not_drawn_at_every_step(tmp_path: Path) -> None:
    with Preview(tmp_path, every_s=60.0) as preview:
        preview(StageStep("decoder", 1, 2, torch.zeros(1, 3, 8, 8)))
        assert not (tmp_path / PREVIEW).exists()
