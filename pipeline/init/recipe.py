"""``unclip init``: look at a person's pairs and write a short recipe for them and for this machine."""

import tomllib
from pathlib import Path

from pipeline.data.captions import context_length, count_long
from pipeline.errors import ConfigError
from pipeline.init.fit import Fit, Watch, fit
from pipeline.init.look import look_at
from pipeline.init.sizes import (
    CPU_SIZES,
    GPU_SIZES,
    MOST_CPU_STEPS,
    MOST_GPU_STEPS,
    Size,
    Tables,
    as_toml,
    cpu_tables,
    default_steps,
    gpu_tables,
)
from pipeline.machine import num_cpus
from pipeline.recipe.estimate import save_times
from pipeline.recipe.pairs_sections import PairsConfig
from pipeline.recipe.recipe import Recipe, parse_recipe
from pipeline.workspace.store import Artifact


def write_recipe(
    source: str,
    out: str,
    *,
    url_column: str = "",
    caption_column: str = "",
    force: bool = False,
    gpu: bool | None = None,
    minutes: float | None = None,
    watch: Watch = lambda _what: None,
) -> str:
    """Write a recipe for a list of URLs and captions, or for a folder of pictures.

    Args:
        source: The list or the folder.
        out: Recipe file to write.
        url_column: Column of the URLs; empty: searched by name.
        caption_column: Column of the captions; empty: searched by name.
        force: Replace ``out`` if it is there.
        gpu: Whether this machine trains on a GPU; None: look for one.
        minutes: Longest time of the whole run on this machine, which is measured (see ``fit``); None: it depends on the
            pairs.
        watch: Called with what is measured next.

    Returns:
        A summary of the pairs, for a person.

    Raises:
        ConfigError: If ``out`` exists or its folder does not, or a column is not found (it names the existing ones), or
            the minutes are too few for anything useful.
        DataError: If the source cannot be read, or holds no pair.
        StepError: If ``out`` cannot be written.
    """
    target = Path(out)
    _require_free(target, source, force=force)
    look = look_at(source, url_column, caption_column)
    pairs, num_pairs = look.pairs, look.num_pairs
    on_gpu = Path("/proc/driver/nvidia/version").exists() if gpu is None else gpu
    machine = "one GPU" if on_gpu else f"{num_cpus()} CPU cores"
    sized_for = machine if minutes is None else f"{machine} and {minutes:g} minutes"
    # A comment cannot hold a line end, but a file's name can.
    header = f"{source}: {look.count} pairs, sized for {sized_for}. `unclip config {out}` prints every field."
    comment = "".join(letter if letter.isprintable() else "?" for letter in header)

    def text(size: Size, steps: int) -> str:
        return f"# {comment}\n" + as_toml(_tables(target.stem, pairs, num_pairs, size, steps))

    def recipe(size: Size, steps: int) -> Recipe:
        return parse_recipe(tomllib.loads(text(size, steps)), where=out)

    sizes = GPU_SIZES if on_gpu else CPU_SIZES
    chosen = Fit(sizes[0], default_steps(num_pairs, gpu=on_gpu))
    if minutes is not None:
        from pipeline.timing.measure import measure

        most_steps = MOST_GPU_STEPS if on_gpu else MOST_CPU_STEPS
        chosen = fit(recipe, sizes, most_steps, minutes, lambda candidate: measure(candidate, {}, watch))
    checked = recipe(chosen.size, chosen.steps)
    Artifact(str(target.parent.resolve())).write_bytes(target.name, text(chosen.size, chosen.steps).encode())
    if chosen.times:
        save_times(checked, chosen.times, chosen.crowding)
    context = context_length(checked.clip)
    if num_long := count_long(look.captions, context):
        share = f"{num_long} of {len(look.captions)} captions"
        look.remarks.append(f"{share} are longer than CLIP's {context} tokens: their ends are not read")
    return "; ".join([f"{look.text}; sized for {sized_for}: {chosen.size.text}, {chosen.steps} steps", *look.remarks])


def _require_free(target: Path, source: str, *, force: bool) -> None:
    """Refuse a recipe file that cannot be written."""
    if target.exists() and not force:
        raise ConfigError(f"{target} exists; choose another --out, or replace it with --force")
    for name in (source, str(target)):
        if not name.isprintable() and any("\ud800" <= letter <= "\udfff" for letter in name):
            raise ConfigError(f"{name!r}: this name is not UTF-8, but a recipe must be; rename the file")
    if not target.parent.is_dir():
        raise ConfigError(f"{target}: there is no folder {target.parent}; make it, or choose another --out")


def _tables(name: str, pairs: PairsConfig, num_pairs: int, size: Size, steps: int) -> Tables:
    validation_prob = 0.02 if num_pairs >= 1000 else 0.1
    columns = {"url_column": pairs.url_column, "caption_column": pairs.caption_column} if pairs.source == "list" else {}
    section = {"source": pairs.source, "path": pairs.path} | columns | {"validation_prob": validation_prob}
    on_gpu = size in GPU_SIZES
    sized = gpu_tables(num_pairs, steps) if on_gpu else cpu_tables(num_pairs, validation_prob, size, steps, num_cpus())
    return {"name": name, "workspace": f"workspace/{name}", "pairs": section} | sized
