"""The table of networks against the table of steps and the recipe."""

import ast
from pathlib import Path

from pipeline.networks.table import NETWORKS, kind_named, kind_of
from pipeline.recipe.steps import STEP_ROWS, STEPS
from tests.tiny.command import ROOT
from tests.tiny.training import training_recipe


def test_every_step_that_trains_finds_its_row_by_its_configuration() -> None:
    kinds = {name: kind_of(section.model).name for name, section in training_recipe().trained().items()}
    assert kinds.pop("prior_2") == "ar_prior"  # the other kind of the same family
    assert kinds == {
        row.name: row.trains for row in STEPS if row.trains and row.name not in {"prior_2", "first_decoder"}
    }
    assert STEP_ROWS["first_decoder"].trains == STEP_ROWS["decoder"].trains
    assert {*kinds.values(), "ar_prior"} == {kind.name for kind in NETWORKS}


def test_rows_differ_by_name_and_by_configuration() -> None:
    assert len({kind.name for kind in NETWORKS}) == len({kind.config for kind in NETWORKS}) == len(NETWORKS)
    assert kind_named("painter") is None


def test_no_shared_file_of_the_trainer_asks_which_network_it_has() -> None:
    """What all networks share names none of their classes: it knows the rows alone."""
    rooms = [ROOT / "pipeline/train", ROOT / "pipeline/networks"]
    shared = ("kind.py", "files.py", "costs.py", "counting.py", "measuring.py", "diffusion_loss.py", "quality.py")
    classes = {"Prior", "ArPrior", "Decoder", "NoisyClip", "Upsampler"}
    classes |= {f"{name}Config" for name in classes}
    for path in [path for room in rooms for path in room.glob("*.py") if room.name == "train" or path.name in shared]:
        named = classes & _names(path)
        assert not named, f"{path.relative_to(ROOT)} names {sorted(named)}"


def _names(path: Path) -> set[str]:
    return {node.id for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Name)}
