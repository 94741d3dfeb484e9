"""The scripts of deploy/, with small programs in the place of Slurm's, Ray's and AWS's."""

import subprocess
from pathlib import Path

import pytest

from tests.tiny.command import ROOT


def _stub(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/usr/bin/env bash\n{text}\n")
    path.chmod(0o755)


def _on_slurm(folder: Path, *, ray_start: str) -> subprocess.CompletedProcess[str]:
    """Run slurm.sh as a job of two machines; `ray start` is a line of bash."""
    stubs = folder / ".venv/bin"
    _stub(stubs / "srun", 'while [[ $1 == --* ]]; do shift; done\nexec "$@"')
    _stub(stubs / "scontrol", "printf 'one\\ntwo\\n'")
    _stub(stubs / "hostname", "echo 10.0.0.1 10.0.0.2")
    _stub(
        stubs / "ray",
        f'case $1 in\nstart) echo "$@" >>{folder}/started\n{ray_start} ;;\n*) test -e {folder}/up ;;\nesac',
    )
    _stub(stubs / "unclip", f'echo "$@" >{folder}/words\ntouch {folder}/over\nexit 3')
    job = {
        "SLURM_JOB_ID": "7",
        "SLURM_JOB_NODELIST": "one,two",
        "SLURM_CPUS_ON_NODE": "4",
        "SLURM_TMPDIR": f"{folder}/tmp",
    }
    return subprocess.run(
        ["bash", str(ROOT / "deploy/slurm.sh"), "my.toml", "--until", "embed"],
        env={"PATH": "/usr/bin:/bin", "UNCLIP_ROOT": str(folder)} | job,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_a_slurm_job_runs_the_recipe_on_its_machines_and_ends_as_the_run_does(tmp_path: Path) -> None:
    up, over = tmp_path / "up", tmp_path / "over"
    done = _on_slurm(tmp_path, ray_start=f"sleep 1; touch {up}; until [ -e {over} ]; do sleep 0.1; done")
    assert done.returncode == 3, done.stderr
    assert (tmp_path / "words").read_text() == "run my.toml --address 10.0.0.1:6379 --until embed\n"
    head, worker = (tmp_path / "started").read_text().splitlines()
    assert "--head --port=6379 --node-ip-address=10.0.0.1" in head
    assert "--address=10.0.0.1:6379" in worker
    assert not list(tmp_path.glob(".ray-token-*"))


def test_a_slurm_job_ends_where_rays_head_does_not_start(tmp_path: Path) -> None:
    done = _on_slurm(tmp_path, ray_start="echo port 6379 is taken >&2; exit 1")
    assert done.returncode == 4
    assert done.stderr.splitlines() == [
        "port 6379 is taken",
        "Ray's head did not start on one at 10.0.0.1:6379; another port: RAY_PORT=6380 sbatch ...",
    ]
    assert not (tmp_path / "words").exists()


_AWS = """
folder=$(dirname "$0")/account
mkdir -p "$folder"
echo "$2" >>"$folder/../calls"
[[ $(wc -l <"$folder/../calls") -ne ${FAILS_AT:-0} ]] || exit 254
declare -A given
for ((n = 3; n < $#; n += 2)); do given[${!n}]=${@:n+1:1}; done
case $2 in
get-caller-identity) echo 123 ;;
get-role) test -e "$folder/role-${given[--role-name]}" ;;
get-instance-profile)
    test -e "$folder/profile-${given[--instance-profile-name]}" && cat "$folder/profile-${given[--instance-profile-name]}" ;;
create-role) (set -C && : >"$folder/role-${given[--role-name]}") ;;
create-instance-profile) (set -C && : >"$folder/profile-${given[--instance-profile-name]}") ;;
add-role-to-instance-profile)
    test ! -s "$folder/profile-${given[--instance-profile-name]}" &&
        echo "${given[--role-name]}" >"$folder/profile-${given[--instance-profile-name]}" ;;
put-role-policy) echo "${given[--policy-document]}" >"$folder/policy-${given[--role-name]}-${given[--policy-name]}" ;;
attach-role-policy) : >"$folder/attached-${given[--role-name]}-${given[--policy-arn]##*/}" ;;
*) exit 252 ;;
esac
"""
"""An account, in which what exists cannot be made again; the call of the number FAILS_AT is refused."""
_FILES = {
    *(f"{kind}-unclip-{role}" for kind in ("role", "profile") for role in ("workspace", "head")),
    *(f"policy-unclip-{role}-bucket-one" for role in ("workspace", "head")),
    "policy-unclip-head-pass-role",
    "attached-unclip-head-AmazonEC2FullAccess",
    "attached-unclip-head-AmazonSSMReadOnlyAccess",
}


def _make_roles(folder: Path, bucket: str, *, fails_at: int = 0) -> int:
    _stub(folder / "aws", _AWS)
    environment = {"PATH": f"{folder}:/usr/bin:/bin", "FAILS_AT": str(fails_at)}
    return subprocess.run(
        ["bash", str(ROOT / "deploy/aws-roles.sh"), bucket], env=environment, capture_output=True, check=False
    ).returncode


def _account(folder: Path) -> set[str]:
    return {path.name for path in (folder / "account").iterdir()}


@pytest.mark.parametrize("fails_at", [0, 3, 4, 6, 8, 10, 15, 18])
def test_the_roles_of_aws_are_made_whole_by_a_second_call(fails_at: int, tmp_path: Path) -> None:
    assert _make_roles(tmp_path, "one", fails_at=fails_at) == (254 if fails_at else 0)
    assert (_account(tmp_path) == _FILES) == (not fails_at)
    (tmp_path / "calls").unlink()
    assert _make_roles(tmp_path, "one") == 0
    assert _account(tmp_path) == _FILES
    for role in ("unclip-workspace", "unclip-head"):
        assert (tmp_path / f"account/profile-{role}").read_text() == f"{role}\n"


def test_a_second_bucket_is_added_and_the_first_one_stays(tmp_path: Path) -> None:
    for bucket in ("one", "two"):
        assert _make_roles(tmp_path, bucket) == 0
    assert _account(tmp_path) == _FILES | {f"policy-unclip-{role}-bucket-two" for role in ("workspace", "head")}
    for bucket in ("one", "two"):
        assert f"arn:aws:s3:::{bucket}/*" in (tmp_path / f"account/policy-unclip-head-bucket-{bucket}").read_text()
