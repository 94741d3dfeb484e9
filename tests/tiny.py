"""The demo's recipe, shrunken: every step real, every size tiny. Used by the end-to-end and the fault tests.

One worker a step, for each of them loads torch and open_clip for five seconds: that is what such a run takes its time for.
"""

import contextlib
import io
import json
import os
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest

from jobs.cli import main

ROOT = Path(__file__).parents[1]

_TRAIN = """
num_steps = {num_steps}
batch_size = 8
learning_rate = 1e-3
ema_decay = 0.9
[{name}.resources]
save_every_steps = {save_every}
log_every_steps = 2
"""

_UNET = """
[{name}.model.unet]
channels = 8
channel_mults = [1, 2]
num_res_blocks = 1
attention_resolutions = [{attention}]
head_channels = 8
norm_groups = 4
dropout = 0.1
[{name}.model.sampler]
method = "ddim"
respacing = ""
num_steps = 3
"""


def tiny_recipe(folder: Path, *, port: int, num_steps: int = 4, num_pairs: int = 64, save_every: int = 2) -> Path:
    """Write the shrunken recipe into ``folder``; its workspace is beside it."""
    text = f"""
name = "tiny"
workspace = {json.dumps(str(folder / "workspace"))}
[pairs]
validation_prob = 0.15
[pairs.drawn]
num_pairs = {num_pairs}
image_px = 32
port = {port}
num_faulty = 5
[download]
samples_per_shard = 24
image_px = 32
timeout_s = 2
deadline_s = 4.0
retries = 0
resources.num_workers = 1
[clip.model]
embed_dim = 16
image_px = 32
vision_layers = [1, 1, 1, 1]
vision_width = 8
text_width = 16
text_heads = 2
text_layers = 1
context_length = 24
[embed]
batch_size = 8
resources.num_workers = 1
[index]
num_recall_queries = 8
[prior.model]
width = 32
depth = 1
num_heads = 2
[prior.model.sampler]
method = "ddim"
num_steps = 3
[decoder.model]
image_px = 8
[upsampler_1.model]
low_res_px = 8
image_px = 16
crop_px = 8
[upsampler_2.model]
low_res_px = 16
image_px = 32
crop_px = 16
[evaluate]
num_prompts = 8
num_shown = 2
num_images_per_shown = 2
batch_size = 4
resources.num_workers = 1
"""
    for name, attention in (("decoder", "4"), ("upsampler_1", ""), ("upsampler_2", "")):
        text += _UNET.format(name=name, attention=attention)
    for name in ("clip", "prior", "decoder", "upsampler_1", "upsampler_2"):
        text += f"[{name}.train]" + _TRAIN.format(name=name, num_steps=num_steps, save_every=save_every)
    path = folder / "tiny.toml"
    path.write_text(text)
    return path


def start_unclip(*arguments: str, cwd: Path = ROOT) -> subprocess.Popen[str]:
    """Start the command in a process group of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", "jobs.cli", *arguments],
        cwd=cwd,
        env=os.environ | {"PYTHONPATH": str(ROOT), "RAY_USAGE_STATS_ENABLED": "0"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def unclip(*arguments: str, cwd: Path = ROOT, timeout_s: float = 280) -> subprocess.CompletedProcess[str]:
    """Run the command to its end; its output, both streams in order, is in ``stdout``."""
    process = start_unclip(*arguments, cwd=cwd)
    try:
        output, _ = process.communicate(timeout=timeout_s)
    except subprocess.TimeoutExpired:
        process.kill()
        raise
    return subprocess.CompletedProcess(arguments, process.returncode, output)


def unclip_here(*arguments: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    """Run the command in this process, which has loaded torch already: for tests that are not about processes."""
    output, errors = io.StringIO(), io.StringIO()
    argv = sys.argv
    sys.argv = ["unclip", *arguments]
    try:
        with (
            contextlib.chdir(cwd),
            contextlib.redirect_stdout(output),
            contextlib.redirect_stderr(errors),
            warnings.catch_warnings(action="default"),
            pytest.raises(SystemExit) as exit_,
        ):
            main()
    finally:
        sys.argv = argv
    code = int(exit_.value.code or 0)
    return subprocess.CompletedProcess(arguments, code, output.getvalue(), errors.getvalue())


def unclip_json(*arguments: str) -> Any:
    """Run the command here with ``--json``; what it printed on standard output."""
    done = unclip_here(*arguments, "--json")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)
