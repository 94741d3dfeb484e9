"""A process that computes networks: its threads, and the memory that its steps free."""

import os
import subprocess
import sys

import pytest
import torch

from pipeline.networks.cores import use_cores

# Steps of a thread that is not the main one, as Ray Train's are, and the page faults of the last of them. On some
# processors its heap grows a last time in the fifth step.
_STEPS = """
import resource, sys, threading
import torch
from torch import nn
from pipeline.allocator import keep_freed_heaps
from pipeline.networks.cores import use_cores

def block(width_in, width):
    return nn.Conv2d(width_in, width, 3, padding=1), nn.GroupNorm(8, width), nn.SiLU()

wide = nn.AvgPool2d(2), *block(64, 128), *block(128, 128), nn.Upsample(scale_factor=2), *block(128, 64)
network = nn.Sequential(*block(32, 64), *block(64, 64), *block(64, 64), *wide, *block(64, 32))
pictures = torch.randn(4, 32, 48, 48)

def step():
    network(pictures).square().mean().backward()
    network.zero_grad()

def run():
    for _ in range(8):
        step()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(6):
        step()
    print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)

torch.set_num_threads(1)
if sys.argv[1] == "keeps":
    use_cores(1)
    keep_freed_heaps()
thread = threading.Thread(target=run)
thread.start()
thread.join()
"""


def _page_faults(mode: str, **variables: str) -> int:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")} | variables
    command = [sys.executable, "-c", _STEPS, mode]
    return int(subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="mallopt is glibc's")
def test_the_memory_that_a_step_frees_is_there_for_the_next_step() -> None:
    assert 100 * _page_faults("keeps") < _page_faults("as it is")


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="mallopt is glibc's")
def test_who_sets_glibcs_variables_is_not_overruled() -> None:
    with_variable = _page_faults("keeps", MALLOC_TRIM_THRESHOLD_="131072")

    assert with_variable > _page_faults("keeps")


def test_a_process_has_as_many_threads_as_whole_cores_and_one_at_least() -> None:
    before = torch.get_num_threads()
    try:
        assert [use_cores(cpus) for cpus in (0.5, 1, 1.9)] == [1, 1, 1]
        assert torch.get_num_threads() == 1
        assert use_cores(2) == torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
