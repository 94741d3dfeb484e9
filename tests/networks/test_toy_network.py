"""A toy network in a copy of the tree, out of exactly the files that docs/extending.md names, from plan to report."""

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.tiny.command import ROOT

pytestmark = pytest.mark.timeout(600)

NEW_FILES = {
    "models/toy/__init__.py": "",
    "models/toy/config.py": '''"""Shape of the toy."""

from models.configclass import configclass


@configclass
class ToyConfig:
    """A linear map of z_text to z_image."""

    scale: float = 1.0
    """Factor of the output, dimensionless."""
''',
    "models/toy/network.py": '''"""The toy: z_image from z_text, by one matrix."""

from torch import Tensor, nn

from models.clip_config import ClipDims
from models.toy.config import ToyConfig


class Toy(nn.Module):
    """A linear map; D joint space."""

    def __init__(self, config: ToyConfig, dims: ClipDims) -> None:
        super().__init__()
        self.config = config
        self.dims = dims
        self.out = nn.Linear(dims.embed_dim, dims.embed_dim)

    def forward(self, z_text: Tensor) -> Tensor:
        """The guess of z_image, (B, D)."""
        return self.config.scale * self.out(z_text)
''',
    "pipeline/networks/toy.py": '''"""The toy: its loss, its measure and its cost."""

import torch
from torch import Tensor, nn

from models.toy.config import ToyConfig
from models.sample_random import SampleRandom
from models.toy.network import Toy
from pipeline.data.batch import Batch, TextEncoder
from pipeline.networks.counting import Work, count
from pipeline.networks.kind import NetworkKind
from pipeline.networks.measuring import COSINES_TO_CAPTIONS, ValidationRows, cosines_to_captions


class ToyObjective(nn.Module):
    """Squared error of z_image."""

    def __init__(self, network: Toy, encode_text: TextEncoder) -> None:
        super().__init__()
        self.network = network
        self._encode_text = encode_text

    def forward(self, batch: Batch, random: SampleRandom) -> Tensor:
        del random
        guess = self.network(self._encode_text(batch.captions).z_text)
        return (guess - batch.require_z_image()).square().mean()


def _measure(toy: Toy, rows: ValidationRows) -> dict[str, float]:
    return cosines_to_captions(toy(rows.text.z_text), rows)


def _work(toy: Toy, _clip: object) -> Work:
    def run(size: int) -> Tensor:
        return toy(torch.zeros(size, toy.dims.embed_dim)).sum()

    return Work(run, count(lambda: run(1)), 1)


TOY = NetworkKind(
    name="toy",
    config=ToyConfig,
    create=Toy,
    objective=ToyObjective,
    work=_work,
    measure=_measure,
    measures=COSINES_TO_CAPTIONS,
    embeddings=True,
    captions=True,
    meaning=("scale",),
)
''',
}
INSERTIONS = {
    "pipeline/networks/table.py": [
        ("from pipeline.networks.upsampler import", "from pipeline.networks.toy import TOY\n"),
        (")\n_BY_CONFIG", "    TOY,\n"),
    ],
    "pipeline/recipe/steps.py": [
        (
            ")\n\nSTEPS = (",
            '    StepRow(name="toy", title="A toy", inputs=("clip", "embed"), runner=_TRAINING, trains="toy", files=_INIT_FILES),\n',
        ),
    ],
    "pipeline/recipe/recipe.py": [
        ("from models.upsampler.config import", "from models.toy.config import ToyConfig\n"),
        ("    evaluate: EvaluateConfig", '    toy: NetworkStepConfig[ToyConfig] | None = None\n    """The toy."""\n'),
    ],
}
"""By file: (the text before which to insert, what to insert)."""

RUN = """
import json, sys
from pathlib import Path
import torch
from pipeline.clip.model import create_clip
from pipeline.networks.clip import save_clip_artifact
from pipeline.networks.files import load_network
from pipeline.recipe.plan import artifact_of, inputs_of, make_plan, manifest_of
from pipeline.recipe.recipe import load_recipe
from pipeline.report.report import write_report
from pipeline.train.assemble import TrainJob
from pipeline.train.job import run_job
from pipeline.workspace.store import Workspace
from tests.tiny.command import unclip_json
from tests.tiny.recipe import write_recipe
from tests.tiny.shards import write_download, write_embed

folder = Path(sys.argv[1])
path = write_recipe(folder, port=1)
with path.open("a") as file:
    file.write("[toy.model]\\nscale = 2.0\\n[toy.train]\\nnum_steps = 40\\nbatch_size = 8\\nlearning_rate = 1e-2\\n")
    file.write("ema_decay = 0.5\\n[toy.resources]\\nsave_every_steps = 10\\nlog_every_steps = 5\\n")
before = unclip_json("status", str(path))
recipe = load_recipe(path)
workspace, steps = Workspace(recipe.workspace), {step.name: step for step in make_plan(recipe)}
outputs = {name: artifact_of(workspace, step) for name, step in steps.items()}
torch.manual_seed(0)
write_embed(Path(outputs["embed"].uri), write_download(Path(outputs["download"].uri)))
save_clip_artifact(outputs["clip"], create_clip(recipe.clip.model))
job = TrainJob("toy", recipe, inputs_of(workspace, steps["toy"]), outputs["toy"], steps["toy"].key, torch.device("cpu"))
metrics = run_job(job, lambda done, total, message: None)
for name in ("download", "clip", "embed", "toy"):
    outputs[name].commit(manifest_of(steps[name], outputs[name]))
write_report(workspace, list(steps.values()), recipe, folder / "report.html")
print(json.dumps({
    "before": before,
    "after": unclip_json("status", str(path)),
    "costs": unclip_json("plan", str(path), "--cost"),
    "metrics": metrics,
    "rows": [json.loads(line) for line in outputs["toy"].path("metrics.jsonl").read_text().splitlines()],
    "loaded": type(load_network(outputs["toy"])).__name__,
    "scale": load_network(outputs["toy"]).config.scale,
}))
"""


def listed_files() -> set[str]:
    """The files that docs/extending.md names for a network, with the toy's name filled in."""
    page = (ROOT / "docs/extending.md").read_text()
    section = page.partition("## Add a network\n")[2].partition("\n## ")[0]
    return {name.replace("<name>", "toy") for name in re.findall(r"^\| `([^`]+\.py)` \|", section, re.MULTILINE)}


def _digests(root: Path) -> dict[str, str]:
    names = [path for folder in ("models", "pipeline", "jobs", "tests") for path in (root / folder).rglob("*")]
    return {
        str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in names
        if path.is_file() and "__pycache__" not in path.parts
    }


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("copy")
    for name in ("models", "pipeline", "jobs", "tests"):
        shutil.copytree(ROOT / name, root / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", root)
    before = _digests(root)
    for name, text in NEW_FILES.items():
        path = root / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    for name, insertions in INSERTIONS.items():
        text = (root / name).read_text()
        for anchor, inserted in insertions:
            assert text.count(anchor) == 1, (name, anchor)
            text = text.replace(anchor, inserted + anchor)
        (root / name).write_text(text)
    after = _digests(root)
    changed = {name for name in before.keys() | after.keys() if before.get(name) != after.get(name)}
    assert changed == listed_files()
    return root


@pytest.fixture(scope="module")
def outcome(copy: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("toy")
    done = subprocess.run(
        [sys.executable, "-c", RUN, str(folder)],
        cwd=copy,
        env=os.environ | {"PYTHONPATH": str(copy), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1]) | {"report": (folder / "report.html").read_text()}


def test_a_new_network_is_planned_and_shown(outcome: dict[str, Any]) -> None:
    states = [{row["step"]: row["state"] for row in outcome[when]} for when in ("before", "after")]
    assert [state["toy"] for state in states] == ["todo", "done"]
    assert "evaluate" in states[1]


def test_a_new_network_is_trained_and_measured(outcome: dict[str, Any]) -> None:
    metrics, rows = outcome["metrics"], outcome["rows"]
    assert metrics["num_parameters"] == 16 * 17
    assert [row["step"] for row in rows if "val_loss" in row] == [10, 20, 30, 40]
    losses = [row["loss"] for row in rows if "loss" in row]
    assert losses[-1] < 0.9 * losses[0]
    assert {"val_cos_z_image", "val_cos_z_text", "val_cos_unrelated_text"} <= metrics.keys()
    assert (outcome["loaded"], outcome["scale"]) == ("Toy", 2.0)


def test_a_new_network_is_counted(outcome: dict[str, Any]) -> None:
    cost = next(row for row in outcome["costs"]["networks"] if row["name"] == "toy")
    assert cost["num_parameters"] == 16 * 17
    assert cost["sampling_flops"] == 2 * 16 * 16
    assert cost["num_samples"] == 40 * 8


def test_a_new_network_is_on_the_report_under_its_title(outcome: dict[str, Any]) -> None:
    assert "Loss of A toy over 40 steps" in outcome["report"]
