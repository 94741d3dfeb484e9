"""What a picture costs: clients get equal shares of the work, and not of the pictures."""

from collections.abc import Mapping, Sequence

from models.request import SampleRequest
from models.stage import Stage
from pipeline.serve.estimate import StageLoad


def cost_of(stages: Mapping[int, Stage], request: SampleRequest, loads: Sequence[StageLoad]) -> float:
    """The steps of one picture, each times its rows; 1 is a step of mean cost with as many rows as usual.

    Args:
        stages: Those that the picture passes, by number; none: it costs 1.
        request: It may have other steps, guidance and candidates than usual.
        loads: Of all stages. A stage that has not taken a step yet counts as the mean of the others.
    """
    full_steps = {
        number: load.times.of(load.limit) / load.limit for number, load in enumerate(loads) if load.times.num_steps
    }
    mean_s = sum(full_steps.values()) / len(full_steps) if full_steps else 0.0
    cost = 0.0
    for number, stage in stages.items():
        steps = request.num_steps.get(stage.name) or stage.settings.get("num_steps") or loads[number].steps or 1
        share = full_steps.get(number, mean_s) / mean_s if mean_s else 1.0
        cost += steps * share * _rows(stage, request) / _rows(stage)
    return cost or 1.0


def candidates(stage: Stage, request: SampleRequest | None) -> float:
    """Candidates of a picture in a stage, in those that are usual there: a request may ask a prior for more."""
    usual = getattr(stage, "num_candidates", 0)
    return request.num_candidates / usual if request and request.num_candidates and usual else 1.0


def _rows(stage: Stage, request: SampleRequest | None = None) -> float:
    """Rows of a picture in a call of the network, in candidates that are usual; a guided one has two."""
    scale = stage.settings.get("guidance_scale", 1.0)
    if request is not None:
        scale = request.guidance_scale.get(stage.name, scale)
    is_guided = scale != 1.0 and getattr(stage, "has_guidance", True)
    return candidates(stage, request) * (1 + is_guided)
