import asyncio
import dataclasses
import json
import re
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families
from starlette.testclient import TestClient

from models.cascade import Cascade
from models.request import SampleRequest
from pipeline.recipe.picture_card import ModelCard
from pipeline.serve.api import ApiSettings, create_app
from pipeline.serve.engine import Engine
from pipeline.serve.gate import Gate
from pipeline.serve.guards import Guards
from pipeline.serve.metrics import EngineMetrics, HttpMetrics
from pipeline.serve.protocols import Overloaded, TooLittleTime
from pipeline.serve.upkeep import Upkeep
from tests.serve.test_engine import wait_until

ROOT = Path(__file__).parents[2]


def values(text: str) -> dict[tuple[str, ...], float]:
    """Samples by name and the values of their labels, sorted by label."""
    return {
        (sample.name, *(value for _, value in sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if not sample.name.endswith("_bucket")
    }


def test_an_engine_measures_its_queue_steps_stages_and_requests(make_engine: Callable[..., Engine]) -> None:
    engine = make_engine(max_batch_size=4, max_waiting=2)
    first, second = engine.submit(SampleRequest("a", (1, 2))), engine.submit(SampleRequest("b", (3,)))
    sampled = first.result(60), second.result(60)
    text = asyncio.run(engine.metrics())[""]
    numbers = values(text)
    assert numbers["unclip_requests_total", "answered"] == 2
    assert numbers["unclip_pictures_total",] == 3
    assert numbers["unclip_queue_seconds_count",] == 2
    assert numbers["unclip_admission_seconds_count",] == 2
    assert numbers["unclip_admission_seconds_sum",] > 0
    assert numbers["unclip_sampling_seconds_count",] == 2
    for stage in ("prior", "decoder", "upsampler_1"):
        assert numbers["unclip_stage_seconds_count", stage] == 3
        assert numbers["unclip_step_seconds_sum", stage] > 0
    rows = sum(numbers["unclip_batch_pictures_sum", stage] for stage in ("prior", "decoder", "upsampler_1"))
    assert rows == sum(pictures.num_steps for pictures in sampled)
    assert (numbers["unclip_waiting_requests",], numbers["unclip_active_pictures",]) == (0, 0)


def test_the_last_engine_of_a_chain_measures_the_time_in_all(cascade: Cascade) -> None:
    first, last = (Engine(cascade, steps=steps) for steps in ({"clip", "prior"}, {"decoder", "upsampler_1"}))
    with closing(first), closing(last):
        request, begun_s = SampleRequest("a", (1,)), time.monotonic()
        work = first.submit(request).result(60)
        in_first_s = time.monotonic() - begun_s
        assert 0 < work.taken_s <= in_first_s
        last.submit(request, work=dataclasses.replace(work, taken_s=100.0)).result(60)
        numbers = values(asyncio.run(last.metrics())[""])
        assert 100 < numbers["unclip_sampling_seconds_sum",] < 100 + time.monotonic() - begun_s
        assert values(asyncio.run(first.metrics())[""])["unclip_sampling_seconds_count",] == 0


def test_steps_for_a_client_who_left_are_counted_as_wasted(make_engine: Callable[..., Engine]) -> None:
    engine = make_engine(max_batch_size=1, max_waiting=1)
    under_way = engine.submit(SampleRequest("a", tuple(range(10))))
    wait_until(lambda: engine.counts()["steps"] > 0)
    with pytest.raises(Overloaded):  # nine of its pictures wait
        engine.submit(SampleRequest("b", (1,)))
    under_way.cancel()
    wait_until(lambda: engine.counts()["dropped"] > 0)
    numbers = values(asyncio.run(engine.metrics())[""])
    assert numbers["unclip_wasted_steps_total", "cancelled"] >= 1
    assert numbers["unclip_requests_total", "cancelled"] == 1
    assert numbers["unclip_requests_total", "refused"] == 1


def test_engines_of_before_are_counted_while_they_finish_and_after(cascade: Cascade) -> None:
    metrics = EngineMetrics()
    before, now = (Engine(cascade, max_batch_size=1, metrics=metrics) for _ in range(2))
    with closing(now):
        with closing(before):
            for engine in (before, now):
                engine.submit(SampleRequest("a", (1,))).result(60)
            under_way = before.submit(SampleRequest("a", (1, 2), num_steps={"prior": 1000}))
            wait_until(lambda: before.counts()["active"] > 0)
            counts = asyncio.run(now.stats())
            assert (counts["requests"], counts["pictures"], counts["active"]) == (3, 2, 1)
            assert now.load().pictures == 2
            numbers = values(asyncio.run(now.metrics())[""])
            assert (numbers["unclip_pictures_total",], numbers["unclip_active_pictures",]) == (2, 1)
            with pytest.raises(TooLittleTime):  # this engine is idle, its device is not
                now.submit(SampleRequest("a", (0,), timeout_s=1e-9))
            under_way.cancel()
            wait_until(lambda: before.counts()["dropped"] > 0)
        before.close()  # once more
        counts = asyncio.run(now.stats())
        assert (counts["requests"], counts["refused"], counts["dropped"], counts["active"]) == (3, 1, 1, 0)
        assert values(asyncio.run(now.metrics())[""])["unclip_requests_total", "answered"] == 2


def test_the_samples_of_all_replicas_stand_beside_each_other() -> None:
    replicas: dict[str, str] = {}
    for number, name in enumerate(("a", "b"), 1):
        metrics = EngineMetrics()
        metrics.pictures.inc(number)
        metrics.step.labels("decoder").observe(0.1)
        replicas[name] = metrics.text()
    text = HttpMetrics().text(replicas)
    numbers = values(text)
    assert (numbers["unclip_pictures_total", "a"], numbers["unclip_pictures_total", "b"]) == (1, 2)
    assert numbers["unclip_step_seconds_count", "a", "decoder"] == 1
    assert text.count("# TYPE unclip_pictures_total counter") == 1


class Model:
    async def metrics(self) -> dict[str, str]:
        return {"r1": EngineMetrics().text()}

    async def stats(self) -> dict[str, int]:
        return {}

    async def sample(self, *_: Any) -> Any:
        raise Overloaded("2 requests are waiting already")


def test_answers_and_refusals_are_counted_by_route_and_cause() -> None:
    metrics, model = HttpMetrics(), Model()
    app = create_app(model, None, ApiSettings(ModelCard("tiny", 32), metrics=metrics))  # pyright: ignore[reportArgumentType]
    client = TestClient(Guards(app, metrics=metrics), base_url="http://127.0.0.1")
    for body in ({"prompt": "a"}, {"prompt": "a", "size": "1x1"}):
        client.post("/v1/images/generations", json=body)
    client.get("/v1/models", headers={"Host": "evil.example"})
    client.get("/v1/models/tiny")
    client.get("/anything/at/all")
    numbers = values(client.get("/metrics").text)
    assert numbers["unclip_http_seconds_count", "/v1/images/generations", "429"] == 1
    assert numbers["unclip_http_seconds_count", "/v1/models/{name}", "200"] == 1
    assert numbers["unclip_http_seconds_count", "other", "404"] == 1
    causes = {key[1]: value for key, value in numbers.items() if key[0] == "unclip_refusals_total"}
    assert causes == {"queue": 1, "invalid": 1, "host": 1, "unknown": 1}
    assert ("unclip_pictures_total", "r1") in numbers


def test_probes_are_no_unknown_routes() -> None:
    metrics, gate, model = HttpMetrics(), Gate(), Model()
    client = TestClient(Guards(gate, metrics=metrics), base_url="http://127.0.0.1")
    for path in ("/livez", "/readyz", "/nowhere"):
        client.get(path)
    gate.open(create_app(model, None, ApiSettings(ModelCard("tiny", 32), metrics=metrics)))  # pyright: ignore[reportArgumentType]
    for path in ("/livez", "/readyz", "/nowhere"):
        client.get(path)
    counts = {
        key[1:]: value for key, value in values(metrics.own_text()).items() if key[0] == "unclip_http_seconds_count"
    }
    assert counts == {
        ("/livez", "200"): 2,
        ("/readyz", "503"): 1,
        ("/readyz", "200"): 1,
        ("other", "503"): 1,
        ("other", "404"): 1,
    }


def test_the_dashboard_shows_only_what_is_measured_and_all_of_it() -> None:
    board = json.loads((ROOT / "deploy/grafana-dashboard.json").read_text())
    expressions = " ".join(target["expr"] for panel in board["panels"] for target in panel["targets"])
    shown = {re.sub(r"_(bucket|sum|count|total)$", "", name) for name in re.findall(r"unclip_\w+", expressions)}
    sources = "".join(path.read_text() for path in (ROOT / "pipeline").rglob("*.py"))
    measured = set(re.findall(r"\b(?:Counter|Gauge|Histogram|Summary)\(\s*\"(unclip_\w+)", sources))
    registries = [one.registry for one in (EngineMetrics(), HttpMetrics())]
    Upkeep(registries[-1])
    assert {metric.name for registry in registries for metric in registry.collect()} | {"unclip_spans"} == measured
    assert shown == measured
    page = (ROOT / "docs/serving.md").read_text()
    assert {re.sub(r"_total$", "", name) for name in re.findall(r"`(unclip_\w+)", page)} == measured
