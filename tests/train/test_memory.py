"""The counted memory of a training against what its first steps allocate, byte by byte."""

import dataclasses
import re
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from models.layers.ema import AveragePairs, create_average, update_average
from pipeline.data.order import Share
from pipeline.networks.costs import build_clip
from pipeline.networks.counting import backward_in_modes
from pipeline.networks.table import kind_of
from pipeline.recipe.recipe import Recipe, load_recipe
from pipeline.recipe.train_sections import TrainPhase
from pipeline.train.assemble import assemble
from pipeline.train.fitting import advice, format_memory, memory_of, recipe_memory
from pipeline.train.loop import make_step
from pipeline.train.memory import USABLE, GpuAutocast, LiveBytes, WorkerMemory, count_memory
from pipeline.train.state import create_state
from pipeline.workspace.progress import byte_size
from pipeline.workspace.store import Artifact
from tests.tiny.command import ROOT
from tests.tiny.training import tiny_inputs, tiny_job, training_recipe

FOR_CPUS = ("demo", "demo-hour")
FOR_GPUS = ("dalle2-paper", "karlo", "laion-vit-l14", "single-gpu")


def _changed(name: str, train: dict[str, object], resources: dict[str, object]) -> Recipe:
    recipe = training_recipe()
    section = recipe.trained()[name]
    changed = dataclasses.replace(
        section,
        train=dataclasses.replace(section.train, **train),
        resources=dataclasses.replace(section.resources, **resources),
    )
    return dataclasses.replace(recipe, **{name: changed})


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Artifact]:
    return tiny_inputs(tmp_path_factory.mktemp("inputs"))


def _counted(recipe: Recipe, name: str) -> WorkerMemory:
    with torch.device("meta"):
        clip = build_clip(recipe)
    return count_memory(name, recipe.trained()[name], recipe, clip)


def _measured(recipe: Recipe, name: str, inputs: dict[str, Artifact], folder: Path) -> int:
    """Most bytes of tensors in the second step of the real training: its state, and what the step allocates."""
    job = tiny_job(name, inputs, folder, recipe)
    parts = assemble(job)
    state = create_state(parts.network, job.section.train, job.device)
    share = Share(job.section.train.batch_size)
    step = make_step(parts.objective(state.network).train(), job.section, share, seed=1)
    batch = parts.train.batch(torch.stack([torch.zeros(len(share)), torch.arange(len(share)) % 3], 1).long().numpy())
    if name == "prior":  # captions of full length are counted
        batch = dataclasses.replace(batch, captions=("a red circle " * 9,) * len(batch))
    step(state, batch)
    state.step = 1
    moments = [value for values in state.optimizer.state.values() for value in values.values()]
    own = [*state.network.state_dict().values(), *state.ema.state_dict().values(), *moments]
    with LiveBytes(own) as live:
        step(state, batch)
    clip = 0 if parts.clip is None else sum(tensor.nbytes for tensor in parts.clip.model.state_dict().values())
    return sum(tensor.nbytes for tensor in own) + live.peak + clip


def test_an_average_that_may_skip_steps_takes_no_copy_of_the_weights() -> None:
    network = nn.Sequential(*(nn.Linear(100, 100) for _ in range(4)))
    average = create_average(network)
    with LiveBytes([*network.state_dict().values(), *average.state_dict().values()]) as live:
        update_average(AveragePairs.of(average, network), 0.9, 1, skips=torch.tensor(False))
    assert live.peak < 100


@pytest.mark.parametrize(
    ("name", "train", "resources"),
    [
        ("upsampler_1", {"batch_size": 32}, {}),
        ("upsampler_1", {"batch_size": 32, "precision": "bfloat16"}, {}),
        ("upsampler_1", {"batch_size": 32}, {"checkpointing": True}),
        ("upsampler_1", {"batch_size": 32}, {"micro_batch_size": 8}),
        ("upsampler_1", {"batch_size": 32, "optimizer": "muon"}, {}),
        ("prior", {"batch_size": 64}, {}),
        ("decoder", {"batch_size": 16, "precision": "bfloat16"}, {}),
        ("clip", {"batch_size": 16}, {}),
        ("noisy_clip", {"batch_size": 32}, {}),
        ("noisy_clip", {"batch_size": 512}, {}),  # its logits are half of it
        ("noisy_clip", {"batch_size": 1024}, {"micro_batch_size": 32}),  # and here most of it
    ],
)
def test_counted_memory_is_that_of_the_real_step(
    inputs: dict[str, Artifact], tmp_path: Path, name: str, train: dict[str, object], resources: dict[str, object]
) -> None:
    recipe = _changed(name, train, resources)
    counted = _counted(recipe, name)
    assert counted.total == pytest.approx(_measured(recipe, name, inputs, tmp_path), rel=0.1)


@pytest.mark.parametrize("num_shards", [1, 2])
def test_a_count_takes_one_pass_and_every_parameter_has_its_moments(
    monkeypatch: pytest.MonkeyPatch, num_shards: int
) -> None:
    passes: list[Tensor] = []

    def take(loss: Tensor) -> None:
        passes.append(loss)
        backward_in_modes(loss)

    monkeypatch.setattr("pipeline.train.memory.backward_in_modes", take)
    train, workers = {"batch_size": 4, "optimizer": "adamw"}, {"num_workers": 2, "num_shards": num_shards}
    recipe = _changed("decoder", train, workers)
    counted = _counted(recipe, "decoder")
    assert len(passes) == 1
    network = kind_of(recipe.decoder.model).create(recipe.decoder.model, recipe.clip.model.dims())
    assert counted.optimizer == 2 * counted.gradients + 4 * len([*network.parameters()])  # each has a number of steps


def test_a_gpu_computes_norms_in_float32_under_autocast() -> None:
    network, x = nn.Sequential(nn.Conv2d(4, 8, 3), nn.GroupNorm(2, 8)), torch.randn(1, 4, 8, 8)
    with GpuAutocast():
        assert network.double()(x.double()).dtype == torch.float64
        network.float()
        with torch.autocast("cpu", torch.bfloat16):
            assert (network[0](x).dtype, network(x).dtype) == (torch.bfloat16, torch.float32)
    halves = {"precision": "bfloat16", "batch_size": 64}
    on_cpu, on_gpu = (
        _counted(_changed("decoder", halves, {"accelerator": device}), "decoder") for device in ("cpu", "cuda")
    )
    assert on_gpu.state == on_cpu.state
    assert 1.1 < on_gpu.work / on_cpu.work < 2.5


@pytest.mark.parametrize(("first", "then"), [("bfloat16", "float32"), ("float32", "bfloat16")])
def test_the_phase_that_takes_most_memory_is_counted(first: str, then: str) -> None:
    phases = (TrainPhase(from_step=3, precision=then),)
    halves, whole, both = (
        _counted(_changed("decoder", {"batch_size": 64, **train}, {"accelerator": "cuda"}), "decoder")
        for train in ({"precision": "bfloat16"}, {}, {"precision": first, "phases": phases})
    )
    assert halves.total != whole.total  # in halves there are copies of the weights, and smaller activations
    assert both == max(halves, whole, key=lambda memory: memory.total)


def test_blocks_that_are_run_again_are_counted_as_a_gpu_runs_them() -> None:
    halves = {"precision": "bfloat16", "batch_size": 64}
    kept, again = (
        _counted(_changed("decoder", halves, {"accelerator": "cuda", "checkpointing": value}), "decoder")
        for value in (False, True)
    )
    assert again.state == kept.state
    assert again.work < kept.work


def test_several_workers_keep_gradients_in_buckets_and_beside_them_while_they_add_up_parts() -> None:
    alone, two, parts = (
        _counted(_changed("upsampler_1", {"batch_size": 8}, resources), "upsampler_1")
        for resources in ({}, {"num_workers": 2}, {"num_workers": 2, "micro_batch_size": 2})
    )
    assert (alone.samples, two.samples, parts.samples) == (8, 4, 2)
    assert (alone.buckets, two.buckets, parts.buckets) == (0, 0, parts.gradients)
    assert parts.work < two.work < alone.work


def test_a_divided_state_is_counted_by_its_parts_and_by_what_is_gathered() -> None:
    train, gpus = {"batch_size": 8, "precision": "bfloat16"}, {"num_workers": 4, "accelerator": "cuda"}
    whole, quarter = (
        _counted(_changed("upsampler_1", train, gpus | {"num_shards": num_shards}), "upsampler_1")
        for num_shards in (1, 0)
    )
    for field in ("weights", "gradients", "optimizer", "average"):
        assert 0.25 <= getattr(quarter, field) / getattr(whole, field) < 0.3
    assert whole.gathered == 0
    assert 0 < quarter.gathered < 2 * whole.weights  # a tiny network is a few blocks
    assert quarter.work < whole.work + whole.weights  # no copies of the whole weights in half precision


def test_a_state_that_is_too_large_is_proposed_to_be_divided() -> None:
    train, resources = {"batch_size": 8, "optimizer": "adamw"}, {"num_workers": 8, "micro_batch_size": 1}
    whole, divided = (
        _counted(_changed("upsampler_1", train, resources | {"num_shards": num_shards}), "upsampler_1")
        for num_shards in (1, 8)
    )
    assert divided.total < whole.state
    room = (divided.total + whole.state) / 2
    recipe = _changed("upsampler_1", train, resources | {"gpu_memory_gb": room / USABLE / 1e9})
    assert advice(_counted(recipe, "upsampler_1"), recipe).startswith("resources: num_shards = ")


def test_a_changing_number_of_workers_is_proposed_to_divide_a_state_that_is_too_large() -> None:
    train = {"batch_size": 8, "optimizer": "adamw"}
    resources = {"num_workers": (4, 8), "micro_batch_size": 1, "checkpointing": True}
    whole, divided = (
        _counted(_changed("upsampler_1", train, resources | {"num_shards": num_shards}), "upsampler_1")
        for num_shards in (1, 0)
    )
    assert divided.total < whole.state
    room = (divided.total + whole.state) / 2
    recipe = _changed("upsampler_1", train, resources | {"gpu_memory_gb": room / USABLE / 1e9})
    assert advice(_counted(recipe, "upsampler_1"), recipe) == "resources: num_shards = 0"


def test_a_contrastive_loss_is_counted_however_small_the_parts_are_and_divided_among_workers() -> None:
    train = {"batch_size": 1024}
    whole, part, half = (
        _counted(_changed("noisy_clip", train, resources), "noisy_clip")
        for resources in ({}, {"micro_batch_size": 1}, {"micro_batch_size": 1, "num_workers": 2})
    )
    assert whole.contrast == pytest.approx(part.contrast, rel=0.05)
    assert part.contrast == pytest.approx(16 * 1024**2, rel=0.05)
    assert half.contrast == pytest.approx(part.contrast / 2, rel=0.1)  # it has the features of all workers
    assert part.contrast <= part.work < 1.1 * part.contrast
    assert half.work < 0.6 * part.work
    assert _counted(training_recipe(), "decoder").contrast == 0


def test_a_training_whose_logits_do_not_fit_is_told_that_smaller_parts_are_no_help() -> None:
    train, resources = {"batch_size": 1024, "optimizer": "adamw"}, {"micro_batch_size": 1, "checkpointing": True}
    memory = _counted(_changed("noisy_clip", train, resources), "noisy_clip")
    room = memory.state + memory.contrast / 2
    recipe = _changed("noisy_clip", train, resources | {"gpu_memory_gb": room / USABLE / 1e9})
    words = advice(_counted(recipe, "noisy_clip"), recipe)
    assert (
        words
        == f"more workers, or a smaller batch_size: its contrastive loss takes {byte_size(memory.contrast)} anyhow"
    )


def test_the_text_tower_alone_is_counted_where_no_picture_is_embedded() -> None:
    prior, decoder = (_counted(training_recipe(), name).clip for name in ("prior", "decoder"))
    assert 0 < prior < decoder


@pytest.mark.parametrize("name", ["prior", "decoder", "noisy_clip"])
def test_a_frozen_clip_in_half_precision_takes_half_the_memory(
    name: str, inputs: dict[str, Artifact], tmp_path: Path
) -> None:
    recipe = _changed(name, {"clip_precision": "bfloat16"}, {})
    counted = [_counted(each, name).clip for each in (training_recipe(), recipe)]
    assert counted[0] == pytest.approx(2 * counted[1], rel=1e-3)  # batch norms count their batches in integers
    whole, half = (assemble(tiny_job(name, inputs, tmp_path, each)).clip for each in (training_recipe(), recipe))
    assert whole is not None
    assert half is not None
    sizes = [sum(tensor.nbytes for tensor in clip.model.state_dict().values()) for clip in (whole, half)]
    assert counted == pytest.approx(sizes, rel=1e-2)  # the mask of the text tower is no weight
    ours, theirs = (clip.encode_text(["a red circle", ""]) for clip in (whole, half))
    assert not torch.equal(ours.hidden, theirs.hidden)
    torch.testing.assert_close(ours.z_text, theirs.z_text, rtol=0, atol=0.02)


def test_a_training_that_does_not_fit_is_told_what_would_make_it_fit() -> None:
    train = {"batch_size": 8, "optimizer": "adamw"}
    whole = _counted(_changed("upsampler_1", train, {}), "upsampler_1")
    quarter = _counted(_changed("upsampler_1", train, {"micro_batch_size": 2}), "upsampler_1")
    checkpointed = _counted(
        _changed("upsampler_1", train, {"micro_batch_size": 1, "checkpointing": True}), "upsampler_1"
    )
    one = _counted(_changed("upsampler_1", train, {"micro_batch_size": 1}), "upsampler_1")
    assert checkpointed.total < one.total < quarter.total < whole.total
    words = {
        whole.total: None,
        quarter.total: "resources: micro_batch_size = 2",
        (checkpointed.total + one.total) // 2: "resources: checkpointing = true and micro_batch_size = ",
        whole.state // 2: "its state alone is larger",
    }
    for num_bytes, expected in words.items():
        gpu = round((num_bytes + 1) / USABLE)
        recipe = _changed("upsampler_1", train, {"gpu_memory_gb": gpu / 1e9})
        memory = dataclasses.replace(whole, gpu=gpu)
        assert memory.fits == (expected is None)
        last_line = format_memory([memory], recipe).splitlines()[-1]
        if expected is not None:
            assert last_line.startswith(f"upsampler_1 does not fit: {byte_size(whole.total)} of")
            assert f"; what would make it fit: {expected}" in last_line


@pytest.mark.slow
def test_the_largest_part_that_fits_is_found_and_checkpointing_proposed_where_none_does() -> None:
    train = {"batch_size": 12, "optimizer": "adamw"}
    sizes = {
        size: _counted(_changed("upsampler_1", train, {"micro_batch_size": size}), "upsampler_1") for size in (0, 4, 1)
    }
    clip = build_clip(training_recipe())
    for room, samples in (
        (sizes[0].total, 12),
        (sizes[0].total - 1000, 6),
        (sizes[4].total, 4),
        (sizes[1].total - 1000, 1),
    ):
        gpu_gb = (room + 1) / USABLE / 1e9
        recipe = _changed("upsampler_1", train, {"micro_batch_size": "auto", "gpu_memory_gb": gpu_gb})
        memory = memory_of("upsampler_1", recipe.trained()["upsampler_1"], recipe, clip)
        assert (memory.samples, memory.fits) == (samples, room >= sizes[1].total)
    assert advice(memory, recipe) == "resources: checkpointing = true"
    assert "upsampler_1 does not fit" in format_memory(recipe_memory(recipe), recipe)


def test_every_training_of_a_recipe_is_counted() -> None:
    recipe = training_recipe()
    memories = recipe_memory(recipe)
    assert [memory.name for memory in memories] == list(recipe.trained())
    assert all(memory.fits and memory.work > 0 for memory in memories)  # no GPU is named
    assert "does not fit" not in format_memory(memories, recipe)


def test_every_shipped_recipe_is_counted_against_its_machine() -> None:
    assert {*FOR_CPUS, *FOR_GPUS} == {path.stem for path in (ROOT / "configs").glob("*.toml")}


@pytest.mark.parametrize("name", FOR_CPUS)
def test_the_trainings_of_a_recipe_for_cpus_fit_into_half_of_the_memory_that_the_readme_names(name: str) -> None:
    """All of them at once, each worker of each; the other half is for the processes and the data."""
    recipe = load_recipe(ROOT / "configs" / f"{name}.toml")
    row = re.search(
        rf"^\| `configs/{name}\.toml` \|.* CPU cores, (\d+) GB \|", (ROOT / "README.md").read_text(), re.MULTILINE
    )
    assert row is not None
    resources = {network: section.resources for network, section in recipe.trained().items()}
    assert {one.accelerator for one in resources.values()} == {"cpu"}
    memories = recipe_memory(recipe)
    assert [memory.name for memory in memories] == list(resources)
    assert sum(memory.total * resources[memory.name].most_workers for memory in memories) < int(row[1]) / 2 * 1e9


@pytest.mark.slow  # minutes
@pytest.mark.parametrize("name", FOR_GPUS)
def test_every_training_of_the_shipped_recipes_fits_into_the_gpu_that_it_names(name: str) -> None:
    memories = recipe_memory(load_recipe(ROOT / "configs" / f"{name}.toml"))
    assert all(memory.gpu and memory.fits for memory in memories)
