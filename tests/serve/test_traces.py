"""Spans of requests at a collector that decodes them, and requests beside collectors that are down, slow or full."""

import sys
import time
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from starlette.testclient import TestClient

from models.cascade import Cascade
from models.request import SampleRequest
from pipeline.errors import ConfigError
from pipeline.recipe.picture_card import ModelCard
from pipeline.recipe.serve_sections import ServeConfig
from pipeline.serve import otlp
from pipeline.serve.api import ApiSettings, create_app
from pipeline.serve.engine import Engine
from pipeline.serve.guards import Guards
from pipeline.serve.local_neighbours import LocalNeighbours
from pipeline.serve.metrics import EngineMetrics, span_counter
from pipeline.serve.traces import open_traces
from tests.ports import free_port
from tests.serve.conftest import Server
from tests.serve.test_engine import wait_until
from tests.tiny.collector import Collector, collecting

TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
SECRET = "a hat of nobody's business"
STEPS = {"prior": 6, "decoder": 7, "upsampler_1": 4}


@pytest.fixture(scope="module")
def collector() -> Iterator[Collector]:
    with collecting() as one:
        yield one


def client_of(app: Any, traces: Any) -> TestClient:
    return TestClient(Guards(app, traces=traces), base_url="http://127.0.0.1")


@contextmanager
def traced(cascade: Cascade, url: str, index: LocalNeighbours | None = None) -> Generator[TestClient]:
    """The API around an engine, each with its own way to the collector, as in two processes; sent at the end."""
    metrics = EngineMetrics()
    of_http, of_engine = open_traces(url, "hats"), open_traces(url, "hats", metrics.spans)
    engine = Engine(cascade, max_batch_size=4, traces=of_engine, metrics=metrics)
    try:
        yield client_of(create_app(engine, index, ApiSettings(ModelCard("tiny", 32))), of_http)
    finally:
        engine.close()
        assert of_http is not None
        of_http.close()


def generate(client: TestClient, flags: str = "01", **body: Any) -> Any:
    headers = {"traceparent": f"00-{TRACE}-{PARENT}-{flags}", "X-Request-Id": "number-1"}
    return client.post("/v1/images/generations", json={"prompt": SECRET, "seed": 1, **body}, headers=headers)


def test_a_request_is_one_trace_of_what_is_done_for_it(cascade: Cascade, collector: Collector) -> None:
    with traced(cascade, collector.url) as client:
        assert generate(client, n=2).status_code == 200
        client.get("/healthz")
    spans = {span.name: span for span in collector.spans(TRACE)}
    root = spans["POST /v1/images/generations"]
    assert (root.parent_id, root.is_error, root.resource["service.name"]) == (PARENT, False, "hats")
    assert root.attributes == {
        "http.request.method": "POST",
        "http.route": "/v1/images/generations",
        "http.response.status_code": 200,
        "unclip.request_id": "number-1",
    }
    children = ["queue", *STEPS, "encode"]
    assert [span.name for span in collector.spans() if span.parent_id == root.span_id] == children
    for name, steps in STEPS.items():
        assert spans[name].attributes == {"unclip.steps": 2 * steps, "unclip.mean_batch": 2.0}
    ends = [root.start_ns, *(time_ns for name in children for time_ns in (spans[name].start_ns, spans[name].end_ns))]
    assert sorted(ends) == ends
    assert ends[-1] <= root.end_ns
    assert len(spans) == len(collector.spans()) == 1 + len(children)  # no probe has a span
    assert not [body for body in collector.bodies if b"hat of" in body]


def test_a_request_that_the_client_does_not_sample_is_not_recorded(cascade: Cascade, collector: Collector) -> None:
    before = len(collector.spans())
    with traced(cascade, collector.url) as client:
        assert generate(client, flags="00").status_code == 200
    assert len(collector.spans()) == before


def test_neighbours_and_searches_are_spans(server: Server, neighbours: LocalNeighbours, collector: Collector) -> None:
    traces = open_traces(collector.url, "")
    assert traces is not None
    app = create_app(server.engine, neighbours, ApiSettings(ModelCard("tiny", 32)))
    client = client_of(app, traces)
    client.post("/v1/images/generations", json={"prompt": "a", "neighbours": 1})
    client.post("/knn-service", json={"text": "a", "modality": "image", "num_images": 1, "indice_name": "tiny"})
    client.post("/v1/images/generations", json={"prompt": "a", "size": "1x1"})
    traces.close()
    spans = [span for span in collector.spans() if span.resource["service.name"] == "unclip"]
    roots = {span.span_id: span.name for span in spans if not span.parent_id}
    children = {(roots[span.parent_id], span.name) for span in spans if span.parent_id}
    generations, search = "POST /v1/images/generations", "POST /knn-service"
    assert children == {(generations, "neighbours"), (generations, "encode"), (search, "neighbours")}
    statuses = [span.attributes["http.response.status_code"] for span in spans if not span.parent_id]
    assert statuses == [200, 200, 400]


def test_a_request_that_is_cancelled_or_waits_says_so(cascade: Cascade, collector: Collector) -> None:
    traces = open_traces(collector.url, "cancelled")
    engine = Engine(cascade, max_batch_size=1, traces=traces)
    parent = f"00-{'1' * 32}-{PARENT}-01"
    under_way = engine.submit(SampleRequest("a", (1,), num_steps={"prior": 1000}, traceparent=parent))
    wait_until(lambda: engine.counts()["steps"] > 0)
    waits = engine.submit(SampleRequest("b", (2,), traceparent=parent))
    waits.cancel()
    under_way.cancel()
    engine.close()
    spans = [(span.name, span.attributes.get("error.type"), span.is_error) for span in collector.spans("1" * 32)]
    assert sorted(spans, key=str) == [
        ("prior", "cancelled", True),
        ("queue", "cancelled", True),
        ("queue", None, False),
    ]


def lost(client: TestClient) -> dict[str, float]:
    lines = client.get("/metrics").text.splitlines()
    counts: dict[str, float] = {}
    for line in lines:
        if line.startswith("unclip_spans_total"):
            outcome = line.partition('outcome="')[2].partition('"')[0]
            counts[outcome] = counts.get(outcome, 0) + float(line.rpartition(" ")[2])
    return counts


@pytest.mark.parametrize("kind", ["down", "refuses", "hangs"])
def test_a_collector_that_takes_nothing_changes_no_request(
    cascade: Cascade, kind: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "10")
    monkeypatch.setattr(otlp, "_MOST_WAITING", 4)
    monkeypatch.setenv("OTEL_BSP_MAX_EXPORT_BATCH_SIZE", "2")
    monkeypatch.setattr(otlp, "_CLOSE_S", 0.2)
    with collecting(status=400, hangs=kind == "hangs") as broken:
        url = f"http://127.0.0.1:{free_port()}" if kind == "down" else broken.url
        began_s = 0.0
        with traced(cascade, url) as client:
            for _ in range(3):
                assert generate(client).status_code == 200
            deadline = time.monotonic() + 10
            while not lost(client).get("lost"):  # for want of room, or refused
                assert time.monotonic() < deadline
                time.sleep(0.02)
            assert "sent" not in lost(client)
            began_s = time.monotonic()
        assert time.monotonic() - began_s < 2
    if kind == "refuses":
        assert [record.message for record in caplog.records if "takes no spans" in record.message]


def test_a_collector_that_is_back_is_said_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    results = iter(["FAILURE", "FAILURE", "SUCCESS", "SUCCESS"])
    inner = otlp.OTLPSpanExporter("http://127.0.0.1:1")  # this one alone: those of other tests may still end
    monkeypatch.setattr(inner, "export", lambda _: otlp.SpanExportResult[next(results)])
    exporter = otlp._CountingExporter(inner, "URL", otlp.Traces("http://a", "").spans)
    for _ in range(4):
        exporter.export([])
    said = [record.message for record in caplog.records if " URL " in record.message]
    assert said == [
        "serve.traces: URL takes no spans; they are lost until it does",
        "serve.traces: URL takes spans again",
    ]


def test_a_batch_whose_sending_raises_is_lost_and_makes_room(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: Any) -> Any:
        raise RuntimeError("broken")

    inner = otlp.OTLPSpanExporter("http://127.0.0.1:1")
    monkeypatch.setattr(inner, "export", fail)
    spans: Any = [object(), object()]
    exporter = otlp._CountingExporter(inner, "URL", counter := span_counter())
    monkeypatch.setattr(otlp, "_MOST_WAITING", 2)
    for _ in range(3):
        assert [exporter.takes_one() for _ in spans] == [True, True]
        with pytest.raises(RuntimeError, match="broken"):
            exporter.export(spans)
    assert counter.labels("lost")._value.get() == 6


@pytest.mark.parametrize(
    ("endpoint", "whole"),
    [
        ("http://a:4318", "http://a:4318/v1/traces"),
        ("http://a:4318/?x=1", "http://a:4318/v1/traces?x=1"),
        ("http://a?x=1", "http://a/v1/traces?x=1"),
        ("http://a/mine", "http://a/mine"),
    ],
)
def test_a_collector_without_a_path_is_asked_at_that_of_traces(
    endpoint: str, whole: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, exporter = list[str](), otlp.OTLPSpanExporter

    def noted(place: str) -> Any:
        asked.append(place)
        return exporter(place)

    monkeypatch.setattr(otlp, "OTLPSpanExporter", noted)
    otlp.Traces(endpoint, "").close()
    assert asked == [whole]


def test_missing_packages_and_urls_that_are_none_are_errors_for_people(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "pipeline.serve.otlp")
    monkeypatch.setitem(sys.modules, "opentelemetry.exporter.otlp.proto.http.trace_exporter", None)
    assert open_traces("", "hats") is None
    with pytest.raises(ConfigError, match=r"serve\.traces: no module opentelemetry.*pip install 'unclip\[traces\]'"):
        open_traces("http://127.0.0.1:4318", "hats")
    with pytest.raises(ValueError, match="traces = 'collector:4318' is no URL"):
        ServeConfig(traces="collector:4318")
