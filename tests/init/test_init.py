import dataclasses
import errno
import tarfile
from pathlib import Path

import fsspec
import pytest
from PIL import Image

from pipeline.errors import ConfigError, DataError, StepError
from pipeline.init.recipe import write_recipe
from pipeline.recipe.recipe import Recipe, load_recipe
from tests.data.conftest import make_picture
from tests.tiny.command import ROOT


def _list(folder: Path, num_pairs: int, header: str = "url,caption") -> Path:
    path = folder / "pairs.csv"
    path.write_text(
        "\n".join([header, *(f"http://127.0.0.1/{row}.jpg,picture {row}" for row in range(num_pairs))]) + "\n"
    )
    return path


def _recipe(folder: Path, num_pairs: int, *, gpu: bool = False) -> Recipe:
    out = folder / f"{num_pairs}.toml"
    write_recipe(str(_list(folder, num_pairs)), str(out), gpu=gpu)
    return load_recipe(out)


def test_write_recipe_names_source_columns_and_size(tmp_path: Path) -> None:
    out = tmp_path / "mine.toml"
    listed = _list(tmp_path, 12, header="Image_URL,TEXT")
    summary = write_recipe(str(listed), str(out), gpu=False)
    assert summary.startswith("12 rows (url: Image_URL, caption: TEXT); sized for ")
    recipe = load_recipe(out)
    assert (recipe.name, recipe.workspace) == ("mine", "workspace/mine")
    assert (recipe.pairs.source, recipe.pairs.path) == ("list", str(listed))
    assert (recipe.pairs.url_column, recipe.pairs.caption_column) == ("Image_URL", "TEXT")
    assert f"{listed}: 12 pairs" in out.read_text().splitlines()[0]


def test_write_recipe_takes_a_folder_of_pictures(tmp_path: Path) -> None:
    for number in range(3):
        Image.new("RGB", (8, 8)).save(tmp_path / f"{number}.png")
        (tmp_path / f"{number}.txt").write_text(f"picture {number}")
    out = tmp_path / "mine.toml"
    assert write_recipe(str(tmp_path), str(out), gpu=False).startswith("3 pictures in a folder")
    recipe = load_recipe(out)
    assert (recipe.pairs.source, recipe.pairs.path) == ("folder", str(tmp_path))
    assert recipe.clip.train.batch_size == 4


def test_write_recipe_takes_a_folder_of_pictures_in_a_store(tmp_path: Path) -> None:
    store, out = fsspec.filesystem("memory"), tmp_path / "mine.toml"
    store.pipe("/photographs/train/0001.png", make_picture(0, kind="PNG"))
    store.pipe("/photographs/metadata.csv", b"file_name,text\ntrain/0001.png,a red house\n../0002.png,outside\n")
    store.pipe("/photographs/.hidden/0002.png", b"")
    summary = write_recipe("memory://photographs/", str(out), gpu=False)
    assert summary.startswith("1 pictures in a folder")
    assert "captions: 1 from metadata files" in summary
    assert "1 names in metadata files are no pictures here" in summary
    recipe = load_recipe(out)
    assert (recipe.pairs.source, recipe.pairs.path) == ("folder", "memory://photographs/")


def test_write_recipe_sizes_a_cpu_cascade_that_fits_together(tmp_path: Path) -> None:
    recipe = _recipe(tmp_path, 40)
    assert recipe.upsampler_2 is not None
    sides = (recipe.decoder.model.image_px, recipe.upsampler_1.model.image_px, recipe.upsampler_2.model.image_px)
    assert sides == (recipe.upsampler_1.model.low_res_px, recipe.upsampler_2.model.low_res_px, recipe.download.image_px)
    assert recipe.clip.model.image_px == 32
    assert (recipe.decoder.model.diffusion.prediction, recipe.decoder.train.beta2) == ("v", 0.99)
    assert recipe.upsampler_1.model.residual
    assert recipe.upsampler_2.model.residual
    networks = (recipe.decoder.model, recipe.upsampler_1.model, recipe.upsampler_2.model)
    assert {network.diffusion.loss_weighting for network in networks} == {"min_snr"}


@pytest.mark.parametrize(("num_pairs", "batch_size"), [(5, 4), (40, 32), (142, 64), (143, 128), (3000, 128)])
def test_write_recipe_contrasts_no_pair_with_itself(tmp_path: Path, num_pairs: int, batch_size: int) -> None:
    recipe = _recipe(tmp_path, num_pairs)
    assert recipe.clip.train.batch_size == batch_size
    assert batch_size <= max(4, num_pairs * (1 - recipe.pairs.validation_prob))


def test_write_recipe_gives_more_pairs_more_steps_and_larger_shards(tmp_path: Path) -> None:
    few, many = _recipe(tmp_path, 40), _recipe(tmp_path, 3000)
    assert few.decoder.train.num_steps < many.decoder.train.num_steps <= 8000
    assert few.download.samples_per_shard < many.download.samples_per_shard


def test_write_recipe_for_a_gpu_takes_the_networks_of_the_preset_over_a_public_clip(tmp_path: Path) -> None:
    recipe, preset = _recipe(tmp_path, 40, gpu=True), load_recipe(ROOT / "configs/single-gpu.toml")
    assert recipe.clip.source == "pretrained"
    assert recipe.evaluate == preset.evaluate
    assert recipe.embed == preset.embed
    for name in ("prior", "decoder", "upsampler_1"):
        ours, theirs = recipe.trained()[name], preset.trained()[name]
        assert ours.model == theirs.model
        assert ours.resources == theirs.resources
        assert dataclasses.replace(ours.train, num_steps=theirs.train.num_steps) == theirs.train


@pytest.mark.parametrize(
    ("header", "option", "words"),
    [
        ("address,words", {}, r"none of the columns url, .* it has address, words: name one with --url-column"),
        ("url,words", {}, "name one with --caption-column"),
        ("url,words", {"caption_column": "alt"}, "no column alt; it has url, words"),
    ],
)
def test_write_recipe_says_which_columns_there_are(
    tmp_path: Path, header: str, option: dict[str, str], words: str
) -> None:
    with pytest.raises(ConfigError, match=words):
        write_recipe(str(_list(tmp_path, 3, header)), str(tmp_path / "x.toml"), gpu=False, **option)


def test_write_recipe_replaces_nothing_unasked_and_makes_no_folder(tmp_path: Path) -> None:
    listed, out = _list(tmp_path, 3), tmp_path / "mine.toml"
    out.write_text("precious")
    with pytest.raises(ConfigError, match="--force"):
        write_recipe(str(listed), str(out), gpu=False)
    assert out.read_text() == "precious"
    write_recipe(str(listed), str(out), gpu=False, force=True)
    assert load_recipe(out).name == "mine"
    with pytest.raises(ConfigError, match="there is no folder"):
        write_recipe(str(listed), str(tmp_path / "no" / "mine.toml"), gpu=False)


def test_write_recipe_onto_a_full_disk_is_one_message_and_keeps_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    listed, out = _list(tmp_path, 3), tmp_path / "mine.toml"
    out.write_text("precious")

    def write(path: Path, _data: bytes) -> None:
        path.touch()
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", write)
    with pytest.raises(StepError, match=r"mine\.toml: the disk is full"):
        write_recipe(str(listed), str(out), gpu=False, force=True)
    assert out.read_text() == "precious"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine.toml", "pairs.csv"]


def test_write_recipe_refuses_a_list_without_rows(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="holds no pairs"):
        write_recipe(str(_list(tmp_path, 0)), str(tmp_path / "x.toml"), gpu=False)


@pytest.mark.parametrize("name", ["", "below/.hidden.csv"])
def test_write_recipe_of_an_empty_folder_says_what_it_looked_for(tmp_path: Path, name: str) -> None:
    folder = tmp_path / "pictures"
    (folder / "below").mkdir(parents=True)
    if name:
        (folder / name).write_text("url,caption")
    with pytest.raises(ConfigError, match=rf"{folder}: this folder holds no pictures \(.*\.jpg.*\.csv.*\.tar"):
        write_recipe(str(folder), str(tmp_path / "x.toml"), gpu=False)


def test_write_recipe_of_a_folder_of_lost_links_names_them(tmp_path: Path) -> None:
    folder = tmp_path / "lists"
    folder.mkdir()
    (folder / "a.csv").symlink_to(tmp_path / "gone.csv")
    with pytest.raises(DataError, match="1 of its files are links that lead to no file"):
        write_recipe(str(folder), str(tmp_path / "x.toml"), gpu=False)


@pytest.mark.parametrize("name", ["caf\u00e9 \U0001f680", 'a "b" \\ c', "two\nlines", "del\x7f", "tab\there"])
def test_write_recipe_takes_any_name_of_a_file(tmp_path: Path, name: str) -> None:
    listed = _list(tmp_path, 12).rename(tmp_path / f"{name}.csv")
    out = tmp_path / f"{name}.toml"
    write_recipe(str(listed), str(out), gpu=False)
    recipe = load_recipe(out)
    assert (recipe.pairs.path, recipe.name) == (str(listed), name)
    assert out.read_text(encoding="utf-8").startswith("# ")


def test_write_recipe_refuses_a_name_that_is_no_utf8_and_leaves_no_file(tmp_path: Path) -> None:
    listed = _list(tmp_path, 12).rename(tmp_path / "b\udcff.csv")
    with pytest.raises(ConfigError, match="not UTF-8"):
        write_recipe(str(listed), str(tmp_path / "mine.toml"), gpu=False)
    assert not (tmp_path / "mine.toml").exists()


def test_write_recipe_leaves_no_file_that_does_not_load(tmp_path: Path) -> None:
    out = tmp_path / ".hidden.toml"  # a recipe's name has no dot in front
    with pytest.raises(ConfigError, match="no dot in front"):
        write_recipe(str(_list(tmp_path, 12)), str(out), gpu=False)
    assert not out.exists()


def test_write_recipe_for_a_plain_list_of_urls_says_that_there_are_no_captions(tmp_path: Path) -> None:
    (tmp_path / "urls.txt").write_text("\ufeffhttp://a/1.jpg\nhttp://a/2.jpg\n")
    out = tmp_path / "mine.toml"
    summary = write_recipe(str(tmp_path / "urls.txt"), str(out), gpu=False)
    assert summary.startswith("2 rows (url: url; no captions: nothing can be trained to follow a text)")
    assert load_recipe(out).pairs.caption_column == "-"
    assert "empty" not in summary


def test_write_recipe_takes_a_list_whose_captions_are_declared_absent(tmp_path: Path) -> None:
    (tmp_path / "list.csv").write_text("url,size\nhttp://a/1.jpg,3\n")
    with pytest.raises(ConfigError, match="say that there is none with --caption-column -"):
        write_recipe(str(tmp_path / "list.csv"), str(tmp_path / "mine.toml"), gpu=False)
    assert "no captions" in write_recipe(
        str(tmp_path / "list.csv"), str(tmp_path / "mine.toml"), caption_column="-", gpu=False
    )


def test_write_recipe_refuses_a_needed_column_that_stands_twice_in_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "dup.csv").write_text("url,caption,caption\nhttp://a/1.jpg,x,y\n")
    with pytest.raises(DataError, match=r"dup\.csv: has column caption 2 times; rename all but one"):
        write_recipe(str(tmp_path / "dup.csv"), str(tmp_path / "mine.toml"), gpu=False)


def test_write_recipe_counts_empty_and_long_captions_and_rows_that_cannot_be_read(tmp_path: Path) -> None:
    rows = [f"http://a/{number}.jpg,{'word ' * 60 if number < 3 else ''}" for number in range(5)]
    (tmp_path / "list.csv").write_text("\n".join(["url,caption", *rows, "one,two,three"]))
    summary = write_recipe(str(tmp_path / "list.csv"), str(tmp_path / "mine.toml"), gpu=False)
    assert "2 of 5 captions are empty" in summary
    assert "3 of 5 captions are longer than CLIP's 32 tokens: their ends are not read" in summary
    assert f"1 of 6 rows cannot be read, such as {tmp_path}/list.csv:7: 3 cells, not 2" in summary


def test_write_recipe_counts_captions_of_metadata_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "in/1.png")
    (tmp_path / "in/metadata.csv").write_text("file_name,text\n1.png,one\n,two\n")
    summary = write_recipe(str(tmp_path / "in"), str(tmp_path / "mine.toml"), gpu=False)
    reason = f"{tmp_path}/in/metadata.csv: 1 rows without a file name"
    assert f"1 captions in metadata and annotations cannot be read, such as {reason}" in summary


def test_write_recipe_says_where_the_captions_of_a_folder_come_from(tmp_path: Path) -> None:
    (tmp_path / "in/train").mkdir(parents=True)
    for name in ("1.png", "2.png", "3.png"):
        Image.new("RGB", (8, 8)).save(tmp_path / "in/train" / name)
    (tmp_path / "in/train/metadata.csv").write_text("file_name,text\n./1.png,one\n9.png,nine\n")
    (tmp_path / "in/train/2.txt").write_text("two")
    summary = write_recipe(str(tmp_path / "in"), str(tmp_path / "mine.toml"), gpu=False)
    assert "captions: 1 from metadata files, 1 from files beside them, 1 from the pictures' names" in summary
    assert "1 names in metadata files are no pictures here" in summary


def test_write_recipe_reads_the_first_rows_of_a_long_list_and_estimates_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.init.look._MOST_ROWS", 10)
    monkeypatch.setattr("pipeline.data.lists.BATCH_ROWS", 10)
    monkeypatch.setattr("pipeline.data.lists._SAMPLE_BYTES", 2000)
    summary = write_recipe(str(_list(tmp_path, 3000)), str(tmp_path / "mine.toml"), gpu=False)
    count = int(summary.removeprefix("about ").split()[0])
    assert count == pytest.approx(3000, rel=0.2)


def test_write_recipe_takes_shards_that_are_there_already(tmp_path: Path) -> None:
    (tmp_path / "shards").mkdir()
    with tarfile.open(tmp_path / "shards/00000.tar", "w") as tar:
        for name in ("1.jpg", "1.txt", "2.jpg", "2.txt"):
            (tmp_path / name).write_bytes(make_picture(0) if name.endswith("jpg") else b"a text")
            tar.add(tmp_path / name, name)
    out = tmp_path / "mine.toml"
    assert write_recipe(str(tmp_path / "shards"), str(out), gpu=False).startswith("2 pictures in shards (*.tar)")
    assert load_recipe(out).pairs.source == "shards"
