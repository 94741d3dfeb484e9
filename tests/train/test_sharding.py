"""Trainings whose state is divided among workers: the same as by one worker up to rounding, in a share of the memory.

All of them run in one start of four processes; each training is one of four workers, or of the first two.
"""

import dataclasses
import functools
import multiprocessing
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing import connection
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed
from safetensors.torch import load_file
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel

from pipeline.data.batches import plan_order
from pipeline.data.order import Share
from pipeline.networks.costs import build_clip
from pipeline.recipe.recipe import Recipe
from pipeline.recipe.train_sections import TrainConfig, TrainPhase, TrainResources
from pipeline.train.assemble import TrainJob, assemble
from pipeline.train.job import run_job, start_training
from pipeline.train.loop import make_step
from pipeline.train.memory import count_memory
from pipeline.train.resume import CheckpointWriter, Keep, checkpoint_name, checkpoint_steps, load_newest_checkpoint
from pipeline.train.sharding import create_mesh, gathered_dtype
from pipeline.train.state import TrainState
from pipeline.train.stop import StoppedError
from pipeline.workspace.store import Artifact
from tests.tiny.training import bound_recipe, no_watch, tiny_inputs, training_recipe

NUM_STEPS = 3
Results = dict[tuple[str, int, int], dict[str, Any]]
"""What trainings came to, by (case, workers, shards)."""
CPU = torch.device("cpu")
FACTS = {"bytes", "compiled", "buckets", "beside"}


@dataclass(frozen=True)
class _Case:
    """A training of a few steps."""

    name: str
    world_size: int = 2
    num_shards: int = 0
    train: dict[str, Any] = field(default_factory=dict[str, Any])
    resources: dict[str, Any] = field(default_factory=dict[str, Any])
    model: dict[str, Any] = field(default_factory=dict[str, Any])
    tolerance: float = 1e-3
    """Relative difference that its arithmetic explains."""

    @property
    def step(self) -> str:
        """The step that trains it."""
        return self.name.partition(" ")[0]

    @property
    def batch_size(self) -> int:
        """Its global batch."""
        return self.recipe(1, 1).trained()[self.step].train.batch_size

    def recipe(self, world_size: int, num_shards: int) -> Recipe:
        """The recipe, for so many workers."""
        recipe = bound_recipe() if self.name.endswith("bound") else training_recipe()
        section = recipe.trained()[self.step]
        resources = self.resources | {"num_workers": world_size, "num_shards": num_shards}
        changed = dataclasses.replace(
            section,
            model=dataclasses.replace(section.model, **self.model),
            train=dataclasses.replace(section.train, eps=1e-4, **self.train),
            resources=dataclasses.replace(section.resources, **resources),
        )
        return dataclasses.replace(recipe, **{self.step: changed})


CASES = {
    "clip": _Case(
        "clip",
        resources={"micro_batch_size": 1, "checkpointing": True},
        model={"vision": "vit", "vision_width": 32, "vision_depth": 1, "vision_heads": 2, "patch_px": 8},
    ),
    "prior": _Case("prior", train={"grad_clip_norm": 0.1}),
    "prior half": _Case("prior half", train={"precision": "bfloat16"}, tolerance=0.05),
    "prior compiled": _Case("prior compiled", resources={"compiled": True}),
    "ar_prior": _Case("prior_2", resources={"checkpointing": True}),
    "decoder": _Case("decoder bound", 4, train={"batch_size": 6}, resources={"checkpointing": True}),
    "noisy_clip": _Case("noisy_clip", 4, train={"batch_size": 7}, resources={"micro_batch_size": 1}),
    "upsampler": _Case("upsampler_1", 4, train={"optimizer": "muon", "weight_decay": 0.1}),
    "two copies": _Case("upsampler_1", 4, 2, train={"optimizer": "muon", "batch_size": 5}),
}
_IN_PARTS = dataclasses.replace(CASES["decoder"], resources={"micro_batch_size": 1})


class _Sent:
    """The buckets in which DistributedDataParallel adds up gradients, if a training has any; sizes are in bytes."""

    def __init__(self, objective: nn.Module, state: TrainState) -> None:
        self._network, self._buckets, self.beside = state.network, dict[int, torch.Tensor](), 0
        if isinstance(objective, DistributedDataParallel):
            objective.register_comm_hook(None, self._send)
            objective.register_forward_pre_hook(self._note)
            state.optimizer.register_step_pre_hook(self._note)

    @property
    def num_bytes(self) -> int:
        """Size of all buckets."""
        return sum(bucket.nbytes for bucket in self._buckets.values())

    def _send(self, _: None, bucket: torch.distributed.GradBucket) -> torch.futures.Future[torch.Tensor]:
        self._buckets[bucket.index()] = bucket.buffer()
        return allreduce_hook(None, bucket)

    def _note(self, *_: object) -> None:
        """Most bytes of gradients that are not in the buckets, before a pass and before the optimizer's step."""
        buckets = {bucket.untyped_storage().data_ptr() for bucket in self._buckets.values()}
        gradients = [parameter.grad for parameter in self._network.parameters() if parameter.grad is not None]
        beside = [gradient.nbytes for gradient in gradients if gradient.untyped_storage().data_ptr() not in buckets]
        self.beside = max(self.beside, sum(beside))


def _start(
    case: _Case, inputs: dict[str, Artifact], folder: str, share: Share, num_shards: int
) -> tuple[TrainJob, TrainState, _Sent, Callable[[int], list[float]]]:
    """A training, what it sends, and a function that takes some steps and returns the loss and the norm of each."""
    recipe, output = case.recipe(share.world_size, num_shards), Artifact(f"{folder}/out")
    job = TrainJob(case.step, recipe, inputs, output, "key", CPU, rank=share.rank, world_size=share.world_size)
    parts = assemble(job)
    objective, state = start_training(job, parts)
    sent = _Sent(objective, state)
    step = make_step(objective, job.section, share, seed=job.seed)
    order = plan_order(parts.train, job.seed, where=case.name)

    def take(num_steps: int) -> list[float]:
        history: list[float] = []
        for _ in range(num_steps):
            first = state.step * share.batch_size
            before = float(state.loss_sum[0])
            step(state, parts.train.batch(order.locations(first + share.start, first + share.stop)))
            history += [float(state.loss_sum[0]) - before, float(state.grad_norm)]
            state.step += 1
        return history

    return job, state, sent, take


def _train(case: _Case, inputs: dict[str, Artifact], folder: str, share: Share, num_shards: int) -> dict[str, Any]:
    """Some steps: losses, norms and the whole weights, on the first worker; the bytes of the state, on each."""
    job, state, sent, take = _start(case, inputs, folder, share, num_shards)
    network = state.network if state.sharding is None else state.sharding.network
    history, compiled = torch.tensor(take(NUM_STEPS)), _compiled_modules(network)
    words = "network" if compiled == {network} else "blocks" if compiled == set(job.kind.blocks(network)) else ""
    facts = {"compiled": words, "bytes": _state_bytes(state), "buckets": sent.num_bytes, "beside": sent.beside}
    return facts | {"history": history} | _weights(state)


def _compiled_modules(network: nn.Module) -> set[nn.Module]:
    return {module for module in network.modules() if module._compiled_call_impl is not None}


def _weights(state: TrainState) -> dict[str, torch.Tensor]:
    gather = dict[str, torch.Tensor] if state.sharding is None else state.sharding.gather
    return {
        f"{name}.{key}": tensor
        for name, part in (("network", state.network), ("ema", state.ema))
        for key, tensor in gather(part.state_dict()).items()
    }


def _go_on(case: _Case, inputs: dict[str, Artifact], folder: str, share: Share, last_step: int) -> dict[str, Any]:
    """Continue up to a step, and write a checkpoint."""
    job, state, _, take = _start(case, inputs, folder, share, 0)
    damages: list[str] = []
    load_newest_checkpoint(state, job.output, "key", lambda damage: damages.append(damage.text))
    first_step = state.step
    take(last_step - state.step)
    with CheckpointWriter(job.output, "key", Keep(3)) as writer:
        writer.save(state)
    return {"first_step": first_step, "damages": damages} | _weights(state)


def _state_bytes(state: TrainState) -> int:
    """Weights, average, moments, and gradients, which are as large as the weights."""
    moments = [value for values in state.optimizer.state.values() for value in values.values()]
    weights = list(state.network.parameters())
    tensors = [*weights, *weights, *state.network.buffers(), *state.ema.state_dict().values(), *moments]
    return sum(tensor.untyped_storage().nbytes() for tensor in tensors)


def _run(inputs: dict[str, Artifact], folder: str, rank: int, world_size: int, num_shards: int = 0) -> dict[str, Any]:
    """A whole training, with its checkpoints, its validation and its artifact."""
    resources = {"save_every_steps": 2, "validation": "in_line"}
    recipe = _Case("upsampler_1", resources=resources).recipe(world_size, num_shards)
    output = Artifact(f"{folder}/run-{world_size}")
    return run_job(
        TrainJob("upsampler_1", recipe, inputs, output, "key", CPU, rank=rank, world_size=world_size), no_watch
    )


def _stop_and_go_on(
    inputs: dict[str, Artifact], folder: str, rank: int, world_size: int, num_shards: int = 0
) -> dict[str, Any]:
    """The same run, which the last worker wants to end early at its third step, and which goes on then."""
    recipe = _Case("upsampler_1", resources={"save_every_steps": 2}).recipe(world_size, num_shards)
    output, calls = Artifact(f"{folder}/stopped-{world_size}"), list[int]()
    job = TrainJob("upsampler_1", recipe, inputs, output, "key", CPU, rank=rank, world_size=world_size)

    def wants_stop() -> str:
        calls.append(rank)
        return "its machine is taken away" if rank == world_size - 1 and len(calls) >= 3 else ""

    ends = list[str]()
    try:
        run_job(job, no_watch, wants_stop)
    except StoppedError as error:
        ends.append(str(error))
    torch.distributed.barrier()
    steps = checkpoint_steps(output)
    torch.distributed.barrier()
    run_job(job, no_watch)
    return {"ends": ends, "steps": steps}


def _timeouts_s(resources: TrainResources) -> list[float]:
    """How long a worker waits in each of its groups, in seconds."""
    mesh = create_mesh(resources, CPU, 4)
    assert mesh is not None
    backends = [mesh[name].get_group()._get_backend(CPU) for name in mesh.mesh_dim_names or ()]
    return [backend.options._timeout.total_seconds() for backend in backends]


def _work(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    torch.compile = functools.partial(torch.compile, backend="eager")  # without the code generator, which takes minutes
    inputs = {name: Artifact(f"{folder}/{name}") for name in ("download", "embed", "clip")}
    results: Results = {}
    for number, (name, case) in enumerate(CASES.items()):
        if number % 4 == rank:
            results[name, 1, 1] = _train(case, inputs, folder, Share(case.batch_size), 1)
    if rank == 3:
        results["run", 1, 0] = _run(inputs, folder, 0, 1)
    for number, world_size in enumerate((4, 2, 3, 4)):
        if rank < world_size:
            store = f"file://{folder}/store{number}"
            torch.distributed.init_process_group("gloo", store, rank=rank, world_size=world_size)
            results |= _work_together(number, rank, world_size, inputs, folder)
            torch.distributed.destroy_process_group()
    torch.save(results, f"{folder}/{rank}.pt")


def _work_together(number: int, rank: int, world_size: int, inputs: dict[str, Artifact], folder: str) -> Results:
    """The trainings of several workers: first those of the cases, then one that goes on with other numbers of them."""
    results: Results = {}
    for name, case in CASES.items():
        if number < 2 and case.world_size == world_size:
            share = Share(case.batch_size, rank, world_size)
            results[name, world_size, 0] = _train(case, inputs, folder, share, case.num_shards)
    if number == 1:
        results["run", 2, 0] = _run(inputs, folder, rank, 2)
        return results | {("stopped", 2, 0): _stop_and_go_on(inputs, folder, rank, 2)}
    if number == 2:  # none of them divided: each worker has all of the state
        results["run", 3, 1] = _run(inputs, folder, rank, 3, 1)
        results["stopped", 3, 1] = _stop_and_go_on(inputs, folder, rank, 3, 1)
    share = Share(CASES["decoder"].batch_size, rank, world_size)
    if number == 0:
        results["timeouts", 4, 2] = {"s": _timeouts_s(TrainResources(num_workers=4, num_shards=2, hang_timeout_s=77))}
        results["decoder", 4, 1] = _train(CASES["decoder"], inputs, folder, share, 1)
        results["decoder in parts", 4, 1] = _train(_IN_PARTS, inputs, folder, share, 1)
    if number == 3 and rank == 0:  # a bit of the second of three files
        file = Path(f"{folder}/out") / checkpoint_name(2).replace(".safetensors", ".2-of-3.safetensors")
        whole = file.read_bytes()
        file.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    torch.distributed.barrier()
    last_step = {0: 1, 2: 2, 3: 3}[number]
    return results | {("resumed", number, 0): _go_on(CASES["decoder"], inputs, folder, share, last_step)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("workers")


@pytest.fixture(scope="module")
def trained(folder: Path) -> list[Results]:
    """Of each rank: what every training came to, by (case, workers, shards)."""
    tiny_inputs(folder)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__, "pipeline.clip.frozen", "torch._dynamo"])  # imported once for all workers
    workers = [context.Process(target=_work, args=(rank, str(folder))) for rank in range(4)]
    for worker in workers:
        worker.start()
    left = list(workers)
    while left:
        connection.wait([worker.sentinel for worker in left])
        left = [worker for worker in left if worker.is_alive()]
        if any(worker.exitcode for worker in workers):  # the others wait for it
            for worker in left:
                worker.terminate()
    assert [worker.exitcode for worker in workers] == [0] * len(workers)
    return [torch.load(folder / f"{rank}.pt") for rank in range(4)]


@pytest.mark.parametrize("name", CASES)
def test_a_divided_training_is_that_of_one_worker(trained: list[Results], name: str) -> None:
    case = CASES[name]
    expected = next(results[name, 1, 1] for results in trained if (name, 1, 1) in results)
    actual = trained[0][name, case.world_size, 0]
    assert actual.keys() == expected.keys()
    assert expected["history"].isfinite().all()
    for key in expected.keys() - FACTS:
        torch.testing.assert_close(
            actual[key], expected[key], rtol=case.tolerance, atol=case.tolerance / 50, msg=f"{name} {key}"
        )


def test_blocks_are_gathered_in_half_precision_on_a_gpu_that_computes_in_it_in_every_phase() -> None:
    half = TrainConfig(precision="bfloat16")
    mixed = dataclasses.replace(half, phases=(TrainPhase(from_step=9, precision="float32"),))
    types = [
        gathered_dtype(*case) for case in ((half, "cuda"), (half, "cpu"), (mixed, "cuda"), (TrainConfig(), "cuda"))
    ]
    assert types == [torch.bfloat16, torch.float32, torch.float32, torch.float32]


def test_a_divided_network_is_compiled_block_by_block_and_a_whole_one_as_a_whole(trained: list[Results]) -> None:
    keys = [(rank, key) for rank, results in enumerate(trained) for key in results if key[0] in CASES]
    how = {(key[0], key[2] != 1): trained[rank][key]["compiled"] for rank, key in keys}
    assert how.pop(("prior compiled", True)) == "blocks"
    assert how.pop(("prior compiled", False)) == "network"
    assert set(how.values()) == {""}


@pytest.mark.usefixtures("trained")  # for the inputs
@pytest.mark.parametrize("name", [name for name in CASES if name != "ar_prior"])  # its shape is measured on the data
def test_of_a_divided_training_the_first_worker_alone_builds_the_weights(name: str, folder: Path) -> None:
    inputs = {step: Artifact(str(folder / step)) for step in ("download", "embed", "clip")}
    case = CASES[name]
    for rank, num_shards, has_weights in ((0, 0, True), (1, 0, False), (1, 1, True)):
        recipe, output = case.recipe(2, num_shards), Artifact(str(folder / "unused"))
        job = TrainJob(case.step, recipe, inputs, output, "key", CPU, rank=rank, world_size=2)
        tensors = [*(network := assemble(job).network).parameters(), *network.buffers()]
        assert [tensor.is_meta for tensor in tensors] == [not has_weights] * len(tensors)


def test_a_divided_training_is_validated_and_published_as_that_of_one_worker(
    trained: list[Results], folder: Path
) -> None:
    expected, actual = trained[3]["run", 1, 0], trained[0]["run", 2, 0]
    assert trained[1]["run", 2, 0] == {}
    assert actual.keys() == expected.keys()
    assert actual == pytest.approx(expected, rel=1e-3)
    one, two = (load_file(folder / f"run-{world_size}" / "model.safetensors") for world_size in (1, 2))
    assert one.keys() == two.keys()
    for name, weight in one.items():
        torch.testing.assert_close(two[name], weight, rtol=1e-3, atol=2e-5, msg=name)
    assert checkpoint_steps(Artifact(str(folder / "run-2"))) == [2, 4]


def test_workers_end_after_the_same_step_if_one_wants_to_and_go_on_as_if_they_had_not(
    trained: list[Results], folder: Path
) -> None:
    for world_size, num_shards in ((2, 0), (3, 1)):  # a ring of three begins to add up a number at the place of it
        for results in trained[:world_size]:
            stopped = results["stopped", world_size, num_shards]
            assert stopped["ends"] == ["ended after step 3, with a checkpoint: its machine is taken away"]
            assert stopped["steps"] == [2, 3]
        run, stopped = (folder / f"{name}-{world_size}" / "model.safetensors" for name in ("run", "stopped"))
        assert run.read_bytes() == stopped.read_bytes(), world_size


def test_groups_of_some_workers_wait_no_longer_than_the_recipe_says(trained: list[Results]) -> None:
    assert [results["timeouts", 4, 2]["s"] for results in trained] == [[77.0, 77.0]] * 4


def test_four_workers_hold_less_than_a_third_of_what_each_holds_alone(trained: list[Results]) -> None:
    divided, alone = (max(results["decoder", 4, shards]["bytes"] for results in trained) for shards in (0, 1))
    assert divided <= 0.30 * alone


@pytest.mark.parametrize("case", ["decoder", "decoder in parts"])
def test_the_buckets_of_several_workers_are_as_large_as_they_are_counted(trained: list[Results], case: str) -> None:
    """They hold the gradients; a worker that adds up parts first has its own gradients beside them."""
    recipe = (_IN_PARTS if case == "decoder in parts" else CASES[case]).recipe(4, 1)
    with torch.device("meta"):
        clip = build_clip(recipe)
    counted = count_memory("decoder", recipe.decoder, recipe, clip)
    assert (counted.buckets > 0) == (case == "decoder in parts")
    measured = [results[case, 4, 1] for results in trained]
    sizes = max(facts["buckets"] for facts in measured), max(facts["beside"] for facts in measured)
    assert sizes == pytest.approx((counted.gradients, counted.buckets), rel=0.1)
    assert not any(results["decoder", 4, 0]["buckets"] for results in trained)  # FSDP has none


def test_the_state_of_a_divided_training_is_as_large_as_it_is_counted(trained: list[Results]) -> None:
    recipe = CASES["decoder"].recipe(4, 0)
    with torch.device("meta"):
        clip = build_clip(recipe)
    counted = count_memory("decoder", recipe.decoder, recipe, clip)
    own = counted.weights + counted.gradients + counted.optimizer + counted.average
    assert own == pytest.approx(max(results["decoder", 4, 0]["bytes"] for results in trained), rel=0.1)


def test_a_divided_training_goes_on_with_other_numbers_of_workers_and_past_a_damaged_file(
    trained: list[Results],
) -> None:
    expected = next(results["decoder", 1, 1] for results in trained if ("decoder", 1, 1) in results)
    assert [trained[0]["resumed", number, 0]["first_step"] for number in (0, 2, 3)] == [0, 1, 1]
    for results in trained:
        damage = results["resumed", 3, 0]["damages"]  # whoever does not read that file hears of it, too
        assert len(damage) == 1
        assert "the checkpoint of step 2 is damaged" in damage[0]
    for key in expected.keys() - FACTS - {"history"}:
        actual = trained[0]["resumed", 3, 0][key]
        torch.testing.assert_close(actual, expected[key], rtol=1e-3, atol=2e-5, msg=key)
