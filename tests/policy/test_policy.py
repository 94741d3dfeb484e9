"""Rules of the house that no linter knows."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from jobs.cli import COMMANDS
from pipeline.recipe.estimate import TIMES
from pipeline.recipe.plan import make_plan
from pipeline.recipe.recipe import load_recipe
from pipeline.recipe.steps import STEPS

ROOT = Path(__file__).parents[2]
RECIPES = sorted((ROOT / "configs").rglob("*.toml"))


def _tracked() -> list[str]:
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True)
    return [name for name in listed.stdout.splitlines() if (ROOT / name).exists()]


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_shipped_recipe_loads_and_plans(path: Path, tmp_path: Path) -> None:
    (tmp_path / "pairs.csv").write_text("url,caption\n")
    reads_a_list = load_recipe(path).pairs.each()[0].source == "list"
    recipe = load_recipe(path, [f"pairs.path={tmp_path / 'pairs.csv'}"] if reads_a_list else [])
    assert make_plan(recipe)
    assert recipe.name


@pytest.mark.parametrize(
    "arguments", [["--help"], ["plan", "configs/demo.toml"], ["status", "configs/demo.toml"], ["config"]]
)
def test_light_commands_load_neither_torch_nor_ray(arguments: list[str]) -> None:
    code = (
        "import sys; from jobs.cli import main; sys.argv = ['unclip', *sys.argv[1:]]\n"
        "try:\n    main()\nexcept SystemExit as stop:\n    assert not stop.code, stop.code\n"
        "heavy = {'torch', 'ray', 'mlflow', 'faiss', 'pyarrow', 'open_clip'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_a_training_loads_open_clip_only_where_it_needs_a_clip() -> None:
    code = "import sys, pipeline.train.job; sys.exit('open_clip' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


def test_the_process_of_a_run_loads_nothing_that_only_its_workers_need() -> None:
    code = "import sys, pipeline.runtime.run; sys.exit(bool({'torch', 'faiss', 'open_clip'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


def test_top_level_packages_are_ours() -> None:
    import jobs
    import models
    import pipeline

    for package in (jobs, models, pipeline):
        assert Path(str(package.__file__)).is_relative_to(ROOT)


def test_readme_file_tree_matches_the_repository() -> None:
    text = (ROOT / "README.md").read_text()
    block = re.search(r"<!-- tree -->\n```\n(.*?)```", text, re.DOTALL)
    assert block is not None
    named = {line.split()[0].rstrip("/") for line in block.group(1).splitlines() if line and not line.startswith(" ")}
    top = {name.split("/")[0] for name in _tracked() if not name.startswith(".")}
    assert named == top


def test_readme_names_every_page_once() -> None:
    text = (ROOT / "README.md").read_text().partition("| page | says |\n")[2]
    named = re.findall(r"\[docs/([a-z]+)\.md\]", text.partition("\n\n")[0])
    assert sorted(named) == sorted(path.stem for path in (ROOT / "docs").glob("*.md"))


def test_readme_lists_the_commands_in_the_groups_of_the_help() -> None:
    text = (ROOT / "README.md").read_text()
    tables = re.findall(r"^\| (\w+) \| \|\n\|---\|---\|\n((?:\|.*\n)+)", text, re.MULTILINE)
    listed = {group.capitalize(): re.findall(r"^\| `unclip ([a-z-]+)", rows, re.MULTILINE) for group, rows in tables}
    assert listed == {group: list(commands) for group, commands in COMMANDS.items()}


def test_commands_of_the_pages_exist() -> None:
    text = "".join(path.read_text() for path in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")])
    used = set(re.findall(r"(?:^|`)(?:\$ )?unclip ([a-z-]+)", text, re.MULTILINE))
    assert used
    assert used <= {name for commands in COMMANDS.values() for name in commands}


def test_the_commands_for_a_cluster_name_what_comes_first_and_a_workspace_that_machines_share() -> None:
    block = (ROOT / "README.md").read_text().partition("### On a cluster")[2].split("```")[1].splitlines()
    # Ray's providers import boto3, which no extra of ours brings.
    [launcher] = [line.partition("#")[0].split() for line in block if line.startswith(".venv/bin/python")]
    assert launcher[2:] == ["pip", "install", "-c", "constraints.txt", "boto3"]
    assert re.search("^boto3==", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert [line.split()[:2] for line in block if line.startswith((".venv", "ray get", "deploy/", "ray up"))] == [
        [".venv/bin/python", "-m"],
        ["ray", "get-auth-token"],
        ["deploy/aws-roles.sh", "BUCKET"],
        ["ray", "up"],
    ]
    [submit] = [line for line in block if line.startswith("unclip submit")]
    assert "--set workspace=s3://BUCKET/" in submit


def test_no_exit_code_is_answered_with_the_advice_to_remove_something() -> None:
    rows = re.findall(r"^\| (\d+) \|.*", (ROOT / "docs/operations.md").read_text(), re.MULTILINE)
    assert rows == ["2", "3", "4", "5", "130"]
    text = (ROOT / "docs/operations.md").read_text().partition("| exit code |")[2].partition("\n\n")[0]
    assert not re.search("remove|delete", text)


def test_the_page_of_operations_names_the_role_of_every_step() -> None:
    text = (ROOT / "docs/operations.md").read_text().partition("asks for the role of its step:")[2].partition(".")[0]
    said = {role: re.findall(r"\w+", names) for names, role in re.findall(r"([^;]+) for\s+`(\w+)`", text)}
    trainings = said.pop("train")
    assert trainings == ["trainings"]
    roles = {role: [row.name for row in STEPS if row.role == role] for role in said}
    assert {role: [name for name in names if name != "and"] for role, names in said.items()} == roles
    assert {row.role for row in STEPS} == {*roles, "train"}


def test_links_of_the_pages_lead_to_files() -> None:
    for page in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")]:
        links = re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text())
        assert not [link for link in links if "://" not in link and not (page.parent / link).exists()], page


def test_links_to_a_heading_name_one_that_is_there() -> None:
    for page in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")]:
        links = re.findall(r"\]\(([^):#]*)#([^)]+)\)", page.read_text())
        assert not [link for name, link in links if link not in _anchors(page.parent / name if name else page)], page


def _anchors(page: Path) -> set[str]:
    """What links into a page may name: its own ids, and GitHub's of its headings (lower case, letters, digits, hyphens)."""
    text = page.read_text()
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    slugs = {re.sub(r"[^a-z0-9_ -]", "", heading.lower()).replace(" ", "-") for heading in headings}
    return slugs | set(re.findall(r'<a id="([^"]+)">', text))


@pytest.mark.parametrize(
    ("page", "module"),
    [("config", "jobs.reference"), ("benchmarks", "benchmarks.page"), ("pairs", "pipeline.shapes.describe")],
)
def test_generated_pages_are_current(page: str, module: str) -> None:
    done = subprocess.run([sys.executable, "-m", module], cwd=ROOT, capture_output=True, text=True, check=True)
    assert (ROOT / f"docs/{page}.md").read_text() == done.stdout, "run: make docs"
    assert f"-m {module} > docs/{page}.md" in (ROOT / "Makefile").read_text()


def test_the_page_of_formats_names_the_files_of_running_steps() -> None:
    page = (ROOT / "docs/formats.md").read_text()
    code = "".join(path.read_text() for path in (ROOT / "pipeline").rglob("*.py"))
    names = set(re.findall(r"\{LIVE\}([a-z_]+\.[a-z]+)", code))
    assert names >= {"progress.json", "error.txt"}
    assert [name for name in sorted(names) if not re.search(rf"[`/]{re.escape(name)}`", page)] == []


def test_nothing_names_a_machine_or_a_registry() -> None:
    pattern = re.compile(r"(^|[^A-Za-z0-9_.])/(work|root|farm)/|index-url|extra-index|find-links *=")
    mentions = [
        f"{name}:{number}"
        for name in _tracked()
        if Path(name).suffix in {".py", ".toml", ".md", ".yaml", ".txt", ""} and name != "tests/policy/test_policy.py"
        for number, line in enumerate((ROOT / name).read_text(errors="ignore").splitlines(), 1)
        if pattern.search(line)
    ]
    assert not mentions


def test_decisions_are_short_dated_and_in_order() -> None:
    _, *entries = re.split(r"^## ", (ROOT / "docs/decisions.md").read_text(), flags=re.MULTILINE)
    dates = [entry[:10] for entry in entries]
    assert dates == sorted(dates)
    for entry in entries:
        title, *lines = entry.strip().splitlines()
        assert re.match(r"\d{4}-\d\d-\d\d \S", title)
        assert len([line for line in lines if line]) <= 15, title
        assert {"*Context.*", "*Decision.*"} <= set(re.findall(r"^\*[A-Z]\w+\.\*", "\n".join(lines), re.MULTILINE)), (
            title
        )


def test_decisions_are_listed_by_subject_at_the_head_but_for_the_newest_ten() -> None:
    head, *entries = re.split(r"^## ", (ROOT / "docs/decisions.md").read_text(), flags=re.MULTILINE)
    titles = [entry.splitlines()[0][11:] for entry in entries]
    listed = re.findall(r"^\[(.*)\]\(#", head, re.MULTILINE)
    assert sorted(listed) == sorted(title for title in titles if title in listed)
    assert [title for title in titles if title not in listed] == titles[len(listed) :][:10]


def test_the_lab_book_is_dated_and_in_order() -> None:
    headings = re.findall(r"^## (.*)$", (ROOT / "docs/lab.md").read_text(), re.MULTILINE)
    assert [one for one in headings if not re.match(r"\d{4}-\d\d-\d\d \S", one)] == []
    assert headings == sorted(headings, key=lambda one: one[:10])


def test_no_line_of_the_changelog_stands_twice() -> None:
    lines = [line for line in (ROOT / "CHANGELOG.md").read_text().splitlines() if line.strip()]
    assert [line for line in dict.fromkeys(lines) if lines.count(line) > 1] == []


def test_make_removes_nothing_that_a_person_made() -> None:
    words = [word for line in re.findall(r"\brm .*", (ROOT / "Makefile").read_text()) for word in line.split()[1:]]
    assert ".venv" in words
    assert [word for word in words if not word.startswith((".", "-"))] == []  # workspace, out


def test_make_installs_what_was_asked_for_and_keeps_it(tmp_path: Path) -> None:
    names = ("Makefile", "pyproject.toml", "constraints.txt")
    for name in names:
        shutil.copy(ROOT / name, tmp_path)
        os.utime(tmp_path / name, (0, 0))
    (tmp_path / ".venv").mkdir()

    def make(*words: str) -> str:
        path = {"PATH": os.environ["PATH"]}
        return subprocess.run(
            ["make", "-n", *words], cwd=tmp_path, env=path, text=True, capture_output=True, check=True
        ).stdout

    for before, extra in (("", "cpu"), ("cpu", "gpu"), ("gpu", "cpu,s3")):
        lines = make("setup", *([f"EXTRA={extra}"] if before else []))
        assert f"-e '.[{extra}]'" in lines
        assert "uninstall -q --python .venv/bin/python faiss-cpu faiss-gpu" in lines
        (tmp_path / f".venv/.ready-{before}").unlink(missing_ok=True)
        (tmp_path / f".venv/.ready-{extra}").touch()
        assert "Nothing to be done" in make("setup")
        assert "Nothing to be done" in make("setup", f"EXTRA={extra}")
        assert f"-e '.[{extra},dev]'" in make("dev")


def test_the_demo_is_measured_once_so_that_its_run_knows_its_time_from_the_start(tmp_path: Path) -> None:
    recipe = load_recipe(ROOT / "configs/demo.toml")
    times = tmp_path / recipe.workspace / "recipes" / recipe.name / TIMES
    for name in ("Makefile", "pyproject.toml", "constraints.txt", "configs/demo.toml", ".venv/.ready-cpu"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes((ROOT / name).read_bytes() if name == "Makefile" else b"")
        os.utime(tmp_path / name, (0, 0))

    def make() -> list[str]:
        return subprocess.check_output(
            ["make", "-n", "demo"], cwd=tmp_path, env={"PATH": os.environ["PATH"]}, text=True
        ).splitlines()

    plan, run = ".venv/bin/unclip plan configs/demo.toml --time", ".venv/bin/unclip run configs/demo.toml"
    assert make() == [plan, run]
    times.parent.mkdir(parents=True)
    times.touch()
    assert make() == [run]


def test_arrays_go_to_files_by_the_one_way_that_notices_a_full_disk() -> None:
    sources = [
        name for name in _tracked() if name.startswith(("models/", "pipeline/", "jobs/")) and name.endswith(".py")
    ]
    writing = [name for name in sources if re.search(r"\.tofile\(|\bnp\.savez?\(", (ROOT / name).read_text())]
    assert writing == ["pipeline/data/arrays.py"]


def test_text_is_ascii() -> None:
    for name in _tracked():
        if name.endswith((".py", ".toml")):
            assert (ROOT / name).read_bytes().isascii(), name
