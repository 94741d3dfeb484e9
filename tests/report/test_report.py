import math
import re
import shlex
import subprocess
import sys
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image

from pipeline.errors import DataError
from pipeline.evaluate.ablate import ablation_step
from pipeline.evaluate.metrics import Rate, difference_of
from pipeline.pictures.png import to_png
from pipeline.recipe.pairs_sections import PairsConfig, PairsList
from pipeline.recipe.plan import artifact_of, make_plan, manifest_of
from pipeline.recipe.recipe import Recipe, load_recipe, parse_recipe
from pipeline.report.report import failures_about, format_metrics, next_commands, short_count, write_report
from pipeline.report.sections import Finished, covered_s, download_of, pairs_of, recipe_changes
from pipeline.report.tables import failure_groups, measure_rows, novelty_groups, quality_groups, tiles_of
from pipeline.shapes.captions import canonical_caption
from pipeline.shapes.scene import evaluation_scenes
from pipeline.workspace.store import Artifact, Workspace
from tests.report.finished_run import METRICS, fill_workspace, make_recipe
from tests.report.test_ablation import RESULT

_COLOUR = {"colour": METRICS["pixel_check"]["one object"]["colour"]}
SECTIONS = ("samples", "quality", "failures", "stages", "reconstructions", "neighbours", "training", "data", "next")


class _Page(HTMLParser):
    """Collects ids, pictures and links, and checks that every element is closed."""

    VOID = frozenset({"meta", "img", "br", "link", "input", "path", "line", "circle", "rect"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.sources: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        if tag not in self.VOID:
            self.open.append(tag)
        if values.get("id"):
            self.ids.append(str(values["id"]))
        self.sources += [str(values[name]) for name in ("src", "href") if values.get(name)]

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.VOID:
            assert self.open.pop() == tag, f"</{tag}> closes nothing"


def _report(recipe: Recipe, path: Path, recipe_file: str = "configs/demo.toml") -> str:
    write_report(Workspace(recipe.workspace), make_plan(recipe), recipe, path, recipe_file)
    return path.read_text(encoding="utf-8")


def test_report_of_a_finished_run_has_every_section(recipe: Recipe, tmp_path: Path) -> None:
    fill_workspace(recipe)
    text = _report(recipe, tmp_path / "report.html")
    page = _Page(text)
    assert page.open == []
    assert [name for name in page.ids if name in SECTIONS] == list(SECTIONS)
    for words in (
        canonical_caption(evaluation_scenes(8, seed=0)[0].scene),
        "98.3 %",  # one object: colour
        "12 min 17 s",  # all steps together
        "http-404",
        "17 pictures have one pixel",
        "at least 1,234 URLs gave one file, such as www.example.com/none.png",
        "recall at 10",
        "Colour on its shape",
        "unclip sample configs/demo.toml",
        "decoder.model.image_px",  # in the recipe's differences
        "torch 2.13.0",
    ):
        assert words in text, words
    assert "None" not in re.sub(r"<script.*</script>", "", text, flags=re.DOTALL).replace("display: None", "")


def test_report_needs_nothing_outside_itself(recipe: Recipe, tmp_path: Path) -> None:
    fill_workspace(recipe)
    text = _report(recipe, tmp_path / "report.html")
    page = _Page(text)
    assert len(page.sources) == 4 * 4 + 2 + 4 * 3 + 4 * 3 + 4 * 4
    assert all(source.startswith("data:image/") for source in page.sources)
    assert "http://" not in text
    assert "https://" not in text
    assert "@import" not in text
    assert len(text) < 2_000_000


def test_report_draws_a_curve_for_each_trained_network(recipe: Recipe, tmp_path: Path) -> None:
    fill_workspace(recipe)
    text = _report(recipe, tmp_path / "report.html")
    assert text.count('<svg class="chart"') == 5
    assert "Loss of Decoder over 1200 steps" in text
    assert "&lt;svg" not in text


def test_report_shows_the_ablation_of_these_networks_and_says_where_the_order_fails(
    recipe: Recipe, tmp_path: Path
) -> None:
    fill_workspace(recipe)
    step = ablation_step(recipe, num_prompts=60, num_shown=1)
    artifact = artifact_of(Workspace(recipe.workspace), step)
    artifact.write_bytes("samples/a.png", to_png(Image.new("RGB", (32, 32))))
    shown = [{"prompt": "a blue cross", "pictures": [{"file": "samples/a.png", "label": "prior"}]}]
    artifact.write_json("ablation.json", RESULT | {"shown": shown})
    assert 'id="ablation"' not in _report(recipe, tmp_path / "report.html")  # not committed yet
    artifact.commit(manifest_of(step, artifact))
    text = _report(recipe, tmp_path / "report.html")
    for words in ("a blue cross", "Two objects: relation reverses prior over caption only: -10.0", "73.3%", "+0.031"):
        assert words in text
    assert _Page(text).open == []
    other = make_recipe(Path(recipe.workspace), seed=5)
    fill_workspace(other)
    assert 'id="ablation"' not in _report(other, tmp_path / "other.html")


@pytest.mark.parametrize(("until", "there", "left_out"), [
    ("pairs", {"next", "data"}, {"samples", "quality", "training"}),
    ("decoder", {"training", "data", "next"}, {"samples", "quality", "neighbours"}),
])  # fmt: skip
def test_report_of_a_part_leaves_out_what_is_missing_and_says_so(
    recipe: Recipe, tmp_path: Path, until: str, there: set[str], left_out: set[str]
) -> None:
    fill_workspace(recipe, until=until)
    text = _report(recipe, tmp_path / "report.html")
    ids = set(_Page(text).ids)
    assert there <= ids
    assert not left_out & ids
    assert "of 10 steps are done" in text
    assert "unclip run configs/demo.toml" in text


def test_report_of_an_empty_workspace_can_be_written(recipe: Recipe, tmp_path: Path) -> None:
    text = _report(recipe, tmp_path / "report.html")
    assert "0 of 10 steps are done" in text
    assert set(_Page(text).ids) & set(SECTIONS) == {"next"}


def test_report_escapes_what_people_wrote(tmp_path: Path) -> None:
    recipe = make_recipe(tmp_path / "w", name="<script>alert(1)")
    fill_workspace(recipe, until="pairs")
    text = _report(recipe, tmp_path / "report.html", shlex.quote("my recipe's.toml"))
    assert "<script>alert" not in text
    assert "&lt;script&gt;" in text


@pytest.mark.parametrize("until", ["pairs", "evaluate"])
def test_report_shows_no_password(until: str, tmp_path: Path) -> None:
    uri = "http://me:secret@host:5000"
    folders = {"allowed_folders": ["s3://me:secret@bucket/a"]}
    recipe = make_recipe(tmp_path / "w", tracking={"uri": uri}, download={"image_px": 128} | folders)
    fill_workspace(recipe, until=until)
    text = _report(recipe, tmp_path / "report.html", f"demo.toml --set tracking.uri={uri}")
    assert "secret" not in text
    assert "http://me:***@host:5000" in text
    assert "s3://me:***@bucket/a" in text


def test_commands_of_a_report_show_no_secret_of_an_address() -> None:
    words = [
        "my recipe.toml",
        "--set",
        "tracking.uri=http://me:it's secret@host:5000",
        "--set",
        "pairs.path=https://me:secret@lists.example/a.parquet?X-Signature=secret",
        "--set",
        'pairs.lists=[{path="https://me:secret@lists.example/b.csv", weight=2}]',
        "--set",
        "decoder.train.num_steps=10",
    ]
    [_, (_, command)] = next_commands(parse_recipe({}), shlex.join(words), "a", set())
    assert "secret" not in command
    for text in ("http://me:***@host:5000", "https://me:***@lists.example/a.parquet?***", "/b.csv", "num_steps=10"):
        assert text in command
    assert shlex.split(command)[:3] == ["unclip", "run", "my recipe.toml"]


def test_report_names_a_broken_curve(recipe: Recipe, tmp_path: Path) -> None:
    steps = {step.name: step for step in fill_workspace(recipe)}
    artifact = artifact_of(Workspace(recipe.workspace), steps["prior"])
    artifact.write_bytes("metrics.jsonl", b'{"step": 0, "loss": 1.0}\n{"step": 20, "lo')
    with pytest.raises(DataError, match=r"prior/.*metrics\.jsonl: line 2"):
        _report(recipe, tmp_path / "report.html")
    assert not (tmp_path / "report.html").exists()


def test_report_names_a_broken_picture(recipe: Recipe, tmp_path: Path) -> None:
    steps = {step.name: step for step in fill_workspace(recipe)}
    artifact = artifact_of(Workspace(recipe.workspace), steps["evaluate"])
    artifact.write_bytes("samples/0-1.png", b"no picture")
    with pytest.raises(DataError, match=r"samples/0-1\.png: not a picture"):
        _report(recipe, tmp_path / "report.html")


def test_writing_a_report_loads_neither_torch_nor_ray() -> None:
    code = "import sys, pipeline.report.report; sys.exit(bool({'torch', 'ray', 'mlflow'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_format_metrics_prints_every_rate_with_ceiling_and_floor() -> None:
    lines = format_metrics(METRICS).splitlines()
    line = next(line for line in lines if "Both colours" in line)
    assert line.split()[2:] == ["80.8%", "72.9-86.9", "100.0%", "3.3%"]
    line = next(line for line in lines if "Relation, given" in line)
    assert line.split()[5:] == ["(60", "of", "97)", "61.9%", "51.9-70.9", "100.0%", "24.0%"]
    line = next(line for line in lines if line.strip().startswith("Both shapes") and "to" in line)
    assert line.split()[2:] == ["50.0%,", "trained", "60.0%", "-10", "(-25", "to", "+6)"]
    assert any("Caption preferred" in line and "78.7 - 88.3" in line and "50.0 %" in line for line in lines)
    assert any("CLIP score" in line and "0.671" in line for line in lines)
    assert format_metrics({}) == ""


def test_measures_stand_between_floor_and_ceiling() -> None:
    rows = {row["name"]: row for row in measure_rows(METRICS)}
    assert rows["CLIP score"]["place"] == pytest.approx((0.612 - 0.082) / (0.671 - 0.082))
    assert rows["R-precision"]["place"] == pytest.approx(150 / 189)
    for name, texts in (
        ("R-precision", ("62.9 %", "79.2 %", "0.4 %")),
        ("Upsampler 1: PSNR", ("27.4 dB", "", "23.2 dB")),
        ("Upsampler 1: sharpness", ("812", "934", "205")),
    ):
        assert tuple(rows[name][kind] for kind in ("value", "ceiling", "floor")) == texts


def test_measures_that_say_nothing_have_no_bar_or_no_row() -> None:
    (row,) = measure_rows({"clip_score": {"generated": 0.502, "real": 0.505, "shuffled": 0.5}})
    assert (row["value"], row["place"]) == ("0.502", None)
    assert measure_rows({"cmmd": {"generated": math.inf}, "recall": {"generated": math.nan}}) == []


def test_report_says_that_a_file_of_prompts_was_cut(recipe: Recipe, tmp_path: Path) -> None:
    steps = {step.name: step for step in fill_workspace(recipe)}
    metrics = {**METRICS, "prompts": "file", "num_prompts_in_file": 1000}
    artifact_of(Workspace(recipe.workspace), steps["evaluate"]).write_json("metrics.json", metrics)
    sentence = "Prompts from your own file: the first 240 of 1,000, by evaluate.num_prompts."
    for text in (_report(recipe, tmp_path / "report.html"), format_metrics(metrics)):
        assert sentence in text
    assert "Prompts from your own file." in format_metrics(metrics | {"num_prompts_in_file": 240})


def test_report_of_trained_pictures_calls_nothing_unseen_or_validation(recipe: Recipe, tmp_path: Path) -> None:
    steps = {step.name: step for step in fill_workspace(recipe)}
    metrics = {
        **METRICS,
        "prompts": "training captions",
        "rows": "training",
        "memorisation": {"generated": {"mean": 1}},
    }
    artifact_of(Workspace(recipe.workspace), steps["evaluate"]).write_json("metrics.json", metrics)
    text = _report(recipe, tmp_path / "report.html")
    measures = text.partition('id="quality"')[2].partition('id="failures"')[0]
    assert "trained on" in text.partition('id="samples"')[2].partition('id="quality"')[0]
    assert "Nearest training picture" in measures
    assert "real, unseen" not in measures
    assert "alidation" not in measures.replace("there are no validation rows", "")
    assert "CLIP embeds training pictures" in text


def test_pixel_check_is_printed_in_its_order_and_only_where_something_was_checked() -> None:
    one, two = quality_groups(METRICS)
    assert [row["name"] for row in one["rows"]] == [
        "Colour", "Shape", "Size", "Background", "Number of objects", "Everything",
    ]  # fmt: skip
    assert two["title"] == "Two objects, 120 pictures"
    unchecked = {"generated": {"rate": 0.0, "total": 0}}
    (half,) = quality_groups({"pixel_check": {"a": {"shape": unchecked}, "b": {"shape": unchecked, **_COLOUR}}})
    assert [row["name"] for row in half["rows"]] == ["Colour"]


def test_tiles_show_the_pixel_check_or_else_the_measures() -> None:
    assert [tile["value"] for tile in tiles_of(METRICS)] == ["79.2", "80.8", "59.2", "30.8"]
    general = {name: value for name, value in METRICS.items() if name != "pixel_check"}
    assert [tile["label"] for tile in tiles_of(general)][:2] == ["CLIP score", "R-precision"]
    assert quality_groups(general) == []
    assert tiles_of({}) == []


def test_covered_time_counts_steps_that_run_side_by_side_once() -> None:
    assert covered_s([(0, 10), (5, 12), (20, 21), (6, 7)]) == 13
    assert covered_s([]) == 0


def test_recipe_changes_are_the_fields_that_differ(recipe: Recipe) -> None:
    changes = {name: (value, default) for name, value, default in recipe_changes(recipe)}
    assert changes["decoder.train.num_steps"] == ("1200", "1000")
    assert changes["upsampler_1.model.image_px"] == ("64", "256")
    assert "upsampler_1.train.num_steps" not in changes
    assert "prior.train.num_steps" not in changes


def test_parameters_are_those_of_the_manifests_and_no_weights_are_read(recipe: Recipe, tmp_path: Path) -> None:
    """From a store they would be fetched whole."""
    for step in fill_workspace(recipe):
        if step.name in recipe.trained():
            artifact_of(Workspace(recipe.workspace), step).write_bytes("model.safetensors", b"cannot be read")
    text = _report(recipe, tmp_path / "report.html")
    assert text.count("1.8M parameters") == 5
    assert "<b>9.0M</b> parameters in 5 networks" in text


def test_the_parameters_of_a_first_decoder_are_the_decoders(tmp_path: Path) -> None:
    recipe = make_recipe(tmp_path / "workspace", first_decoder={})
    fill_workspace(recipe)
    text = _report(recipe, tmp_path / "report.html")
    assert text.count("1.8M parameters") == 6
    assert "<b>9.0M</b> parameters in 5 networks" in text


def test_counts_for_people() -> None:
    assert [short_count(n) for n in (950, 12_300, 1_800_000, 3.5e9)] == ["950", "12.3k", "1.8M", "3.5B"]


def test_every_measure_is_on_the_page_and_in_the_terminal(recipe: Recipe, tmp_path: Path) -> None:
    fill_workspace(recipe)
    page, text = _report(recipe, tmp_path / "report.html"), format_metrics(METRICS)
    expected = {
        "Frechet distance, own features": ["31.250"],
        "CMMD": ["1.750", "0.250"],
        "Precision": ["75.0 %", "90.0 %"],
        "Recall": ["50.0 %", "89.2 %"],
        "Memorisation rate": ["5.8 %"],
        "Upsampler 1: PSNR": ["27.4 dB", "23.2 dB"],
        "Upsampler 1: SSIM": ["0.912", "0.871"],
        "Upsampler 1: sharpness": ["812", "934", "205"],
    }
    for name, values in expected.items():
        line = next(line for line in text.splitlines() if line.strip().startswith(name))
        assert [value for value in values if value in line] == values
        assert name in page
        assert all(value in page for value in values)
    assert "validation 0.0457" in page


def test_failures_by_the_judgement_of_clip_stand_beside_those_of_real_pictures() -> None:
    pictures = [{"prompt": "a b", "seed": 1, "preferred": "b a"}]
    groups = [{"title": "captions with a hard negative", "total": 98, "failed": 1, "pictures": pictures}]
    real = {"real": Rate(65, 100).to_dict() | {"without_negative": 3}}
    (group,) = failure_groups(groups, {"preference": real})
    assert group["title"] == "Captions with a hard negative: 1 of 98; of real pictures 35 of 100"
    assert failures_about({"preference": real}).endswith(
        "It does so with 35 % of the real pictures too, so a picture is not wrong for that alone."
    )
    assert failure_groups(groups, {})[0]["title"].endswith(": 1 of 98")
    checked = [{"title": "one object", "total": 5, "failed": 1, "pictures": [{"wrong": ["colour"]}]}]
    assert failure_groups(checked, {"preference": real})[0]["title"] == "One object: 1 of 5"


def test_new_combinations_of_two_objects_are_compared_in_both_sizes() -> None:
    rate = Rate(3, 4)
    checks = {
        name: {"held_out": rate.to_dict(), "trained": rate.to_dict(), "difference": difference_of(rate, rate)}
        for name in ("everything", "sizes", "background", "binding")
    }
    (group,) = novelty_groups({"held_out": {"two objects": {"new pair": checks}}})
    assert [row["name"] for row in group["rows"]] == ["Colour on its shape", "Both sizes", "Everything"]


def test_the_changed_field_that_a_report_proposes_is_one_without_a_schedule() -> None:
    demo = load_recipe("configs/demo.toml")
    *_, (_, command) = next_commands(demo, "configs/demo.toml", "a", {"evaluate"})
    changed = load_recipe("configs/demo.toml", [shlex.split(command)[-1]])
    assert changed.prior.train.total_steps == 2 * demo.prior.train.total_steps
    assert changed.decoder == demo.decoder


def test_failures_of_the_download_are_those_of_its_manifest_and_none_is_left_out(tmp_path: Path) -> None:
    recipe = make_recipe(tmp_path / "w")
    step = next(step for step in make_plan(recipe) if step.name == "download")
    output = artifact_of(Workspace(recipe.workspace), step)
    causes = {f"http-{400 + number}": 10 * number for number in range(1, 12)}
    counts = {"in": 1000, "ok": 300, "failed_to_download": 700}
    manifest = replace(manifest_of(step, output, counts), metrics={"failures": causes})
    section = download_of({"download": Finished(step, Artifact(str(tmp_path / "absent")), manifest)})
    assert section is not None
    errors = {error["reason"]: error["count"] for error in section["errors"]}
    assert list(errors)[:2] == ["http-411", "http-410"]
    assert errors["other causes"] == 10 + 20 + 30 + (700 - sum(causes.values()))
    assert sum(errors.values()) == 700
    assert max(error["share"] for error in section["errors"]) == 1


def test_captions_that_are_too_long_are_counted_in_the_list_and_not_in_its_sample(tmp_path: Path) -> None:
    recipe = make_recipe(tmp_path / "w")
    step = make_plan(recipe, until="pairs")[0]
    output = artifact_of(Workspace(recipe.workspace), step)
    metrics = {"long_captions": 120, "long_caption_share": 0.012, "captions_measured": 10_000, "context_length": 77}
    manifest = replace(manifest_of(step, output, {"in": 5_000_000, "ok": 5_000_000}), metrics=metrics)
    section = pairs_of({"pairs": Finished(step, output, manifest)})
    assert section is not None
    [odd] = section["odd"]
    assert odd["count"] == 60_000
    assert odd["words"].endswith("(estimated from 10,000 captions)")


def test_report_names_what_is_odd_about_the_list_of_pairs(recipe: Recipe, tmp_path: Path) -> None:
    workspace, steps = Workspace(str(tmp_path / "w")), make_plan(recipe, until="pairs")
    output = artifact_of(workspace, steps[0])
    counts = {"in": 1000, "ok": 900, "duplicate": 60, "malformed": 40}
    metrics = {
        "validation": 18,
        "empty_captions": 7,
        "long_captions": 90,
        "long_caption_share": 0.1,
        "context_length": 77,
    }
    metrics |= {"captions_measured": 900, "malformed_rows": ["list.csv:3: <b>3 cells, not 2</b>"]}
    output.commit(replace(manifest_of(steps[0], output, counts), metrics=metrics))
    write_report(workspace, steps, recipe, tmp_path / "report.html", "r.toml")
    page = (tmp_path / "report.html").read_text()
    for words in (
        "900 <small>of 1,000 rows, 18 for validation",
        "60 repeated",
        "40 could not be read",
        "7 empty captions",
        "90 captions (10.0 %) longer than 77 tokens",
        "list.csv:3: &lt;b&gt;3 cells",
    ):
        assert words in page, words
    lists = (PairsList(path="a.csv"), PairsList(path="s3://me:secret@bucket/b.csv", weight=0.5))
    recipe = replace(recipe, pairs=PairsConfig(source="list", lists=lists))
    metrics["lists"] = [{"in": 700, "ok": 690, "duplicate": 0}, {"in": 300, "ok": 210, "duplicate": 60}]
    output.remove("manifest.json")
    output.commit(replace(manifest_of(steps[0], output, counts), metrics=metrics))
    write_report(workspace, steps, recipe, tmp_path / "report.html", "r.toml")
    page = (tmp_path / "report.html").read_text()
    assert "list 2 (s3://me:***@bucket/b.csv): 210 of 300 rows, 60 came before; weight 0.5" in page
    assert "secret" not in page
