"""Commands that change a workspace, in a folder where none is."""

from pathlib import Path

import pytest

from pipeline.workspace.forgotten import FORGOTTEN
from pipeline.workspace.store import Artifact, Workspace
from tests.tiny.command import unclip_here
from tests.tiny.recipe import write_recipe

URL = "http://127.0.0.1/cat.jpg"


@pytest.mark.parametrize("command", ["forget", "gc"])
@pytest.mark.parametrize("option", [[], ["--delete"]])
@pytest.mark.parametrize("file", ["", "notes.txt", "recipes/tiny/times.json"])
def test_where_no_workspace_is_nothing_is_made_and_nothing_called_done(
    command: str, option: list[str], file: str, tmp_path: Path
) -> None:
    recipe, root = write_recipe(tmp_path, port=1), tmp_path / "workspace"
    if file:  # of other things, or of `init` and `plan --time`
        Artifact(str(root)).write_bytes(file, b"mine")
    before = {*tmp_path.rglob("*")}
    words = [URL, "--recipe", str(recipe)] if command == "forget" else [str(recipe)]
    done = unclip_here(command, *words, *option)
    assert (done.returncode, done.stdout) == (2, "")
    assert f"{root}: no workspace is here" in done.stderr
    assert {*tmp_path.rglob("*")} == before


def test_forget_of_names_that_no_row_has_says_in_which_workspace_and_keeps_them_out(tmp_path: Path) -> None:
    workspace = Workspace(str(tmp_path / "workspace"))
    workspace.artifact("recipes", "tiny").write_bytes("plan.json", b"{}")
    words = ["forget", URL, "--workspace", workspace.root]
    assert f"0 pairs: none of 1 names is in {workspace.root}\n" in unclip_here(*words).stdout
    assert not (tmp_path / "workspace" / FORGOTTEN).exists()
    done = unclip_here(*words, "--delete")
    assert f"0 pairs: none of 1 names is in {workspace.root}\n" in done.stdout
    assert f"not in the workspace: {URL}; it will not be taken" in done.stderr
    assert (tmp_path / "workspace" / FORGOTTEN).exists()
