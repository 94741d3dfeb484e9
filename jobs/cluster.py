"""``unclip submit``, ``jobs``, ``logs`` and ``stop``: the same recipe as a job on a Ray cluster."""

import sys
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any

import typer

from jobs.options import (
    DASHBOARD,
    AsJson,
    JobAddress,
    Next,
    Overrides,
    RecipePath,
    Until,
    print_json,
    print_next,
    print_warning,
    recipe_words,
    with_options,
)
from jobs.watch import Follower
from pipeline.addresses import words_without_secrets
from pipeline.recipe.recipe import Recipe, load_recipe
from pipeline.workspace.store import Workspace

if TYPE_CHECKING:
    from pipeline.runtime.jobs import Submission
    from pipeline.runtime.worker_logs import WorkerLog

JobId = Annotated[str, typer.Argument(metavar="JOB", help="Job id, as `unclip jobs` lists it, or its beginning.")]


def submit(
    recipe: RecipePath,
    overrides: Overrides = None,
    until: Until = "",
    address: JobAddress = DASHBOARD,
    follow: Annotated[
        bool, typer.Option("--follow", help="Show the job's lines and its live table until its end.")
    ] = False,
    again: Annotated[
        bool, typer.Option("--again", help="Run it again although it has succeeded (its workspace was removed).")
    ] = False,
    manifest: Annotated[
        str,
        typer.Option(
            "--manifest", metavar="IMAGE", help="Print KubeRay's RayJob with this image instead; submit nothing."
        ),
    ] = "",
    json: AsJson = False,
) -> Next:
    """Run a recipe as a job on a Ray cluster; the same recipe is not run twice.

    Example: unclip submit my.toml --set workspace=s3://BUCKET/my --address http://127.0.0.1:8265 --follow
    """
    resolved, words = load_recipe(recipe, overrides or []), recipe_words(recipe, overrides)
    shown_as = words_without_secrets(words)  # people read the job's command and its log on the cluster
    if manifest:
        from pipeline.runtime.kuberay import ray_job

        typer.echo(ray_job(resolved, manifest, until), nl=False)
        return ("kubectl apply -f FILE", "kubectl get rayjobs")

    if follow:
        code = _follow_submitted(resolved, address=address, until=until, again=again, shown_as=shown_as, json=json)
        following = (f"unclip jobs --address {address}", f"unclip status {words}")
        if code:
            if not json:
                options = {"--until": until, "--address": address, "--follow": True, "--again": again}
                print_next(with_options(f"unclip submit {words}", options), *following)
            raise typer.Exit(code)
        return following

    from pipeline.runtime.jobs import submit_recipe
    from pipeline.runtime.tunnel import reachable

    with reachable(address) as url:
        submitted = submit_recipe(resolved, address=url, until=until, again=again, shown_as=shown_as)
    _print_submission(submitted, address=address, json=json)
    return tuple(f"unclip {command} {submitted.job_id} --address {address}" for command in ("logs", "stop"))


def _print_submission(submitted: "Submission", *, address: str, json: bool) -> None:
    """Print where a recipe was submitted to; of a tunnel, the address that the person has given."""
    if address.startswith("ssh://"):
        submitted = replace(submitted, address=address)
    if json:
        print_json(submitted.to_dict())
    else:
        typer.echo(f"{submitted.job_id}: {submitted.message}")


def _follow_submitted(recipe: Recipe, *, address: str, json: bool, **options: Any) -> int:
    """Submit a recipe, print what its job prints and, on a terminal, its table; returns its exit code."""
    from pipeline.runtime import resubmit

    submissions = list["Submission"]()
    # With --json, one JSON document is all of standard output.
    with Follower(sys.stderr if json else sys.stdout) as follower:

        def announce(submitted: "Submission") -> None:
            submissions.append(submitted)
            if not json or len(submissions) == 1:
                with follower.aside():
                    _print_submission(submitted, address=address, json=json)

        def warn(message: str) -> None:
            with follower.aside():
                print_warning(message)

        person = resubmit.Follower(announce, warn, follower.write, follower.show if follower.is_live else None)
        try:
            return resubmit.submit_and_follow(recipe, person, address=address, **options)
        except KeyboardInterrupt:
            for submitted in submissions[-1:]:
                job = f"{submitted.job_id} --address {address}"
                with follower.aside():
                    typer.echo(
                        f"the job goes on; `unclip logs {job}` prints its log, `unclip stop {job}` ends it", err=True
                    )
            raise


def jobs(address: JobAddress = DASHBOARD, json: AsJson = False) -> Next:
    """List the cluster's unclip jobs, the newest first.

    Example: unclip jobs --address ssh://ubuntu@head.example.org
    """
    from pipeline.runtime.jobs import list_jobs
    from pipeline.runtime.tunnel import reachable

    with reachable(address) as url:
        rows = list_jobs(address=url)
    if json:
        print_json([row.to_dict() for row in rows])
        return ()
    for row in rows:
        typer.echo(f"{row.job_id:<40} {row.status:<10} {row.started}")
    if not rows:
        typer.echo("no jobs")
        return (f"unclip submit RECIPE --address {address}",)
    return tuple(f"unclip {command} {rows[0].job_id} --address {address}" for command in ("logs", "stop"))


def logs(
    job: Annotated[
        str,
        typer.Argument(
            metavar="JOB", help="Job id or its beginning; or the recipe of a run on this machine, such as my.toml."
        ),
    ],
    worker: Annotated[
        str, typer.Argument(metavar="[STEP[/WORKER]]", help="Workers whose logs are printed, in place of the job's.")
    ] = "",
    overrides: Overrides = None,
    address: JobAddress = DASHBOARD,
) -> Next:
    """Print a job's log, or those of a step's workers: what they printed, and their errors in full.

    Without a step, the names of the workers are said after the log.

    Example: unclip logs demo-1a2b3c4d5e download/2
    """
    if job.endswith(".toml"):
        from pipeline.runtime.worker_logs import logs_here

        _print_worker_logs(logs_here(Workspace(load_recipe(job, overrides or []).workspace).root), worker, [])
        return (f"unclip status {recipe_words(job, overrides)}",)

    from pipeline.runtime.jobs import job_logs
    from pipeline.runtime.tunnel import reachable
    from pipeline.runtime.worker_logs import logs_of_job

    with reachable(address) as url:
        if not worker:
            typer.echo(job_logs(job, address=url), nl=False)
        worker_logs, lost_machines = logs_of_job(job, address=url)
        _print_worker_logs(worker_logs, worker, lost_machines)
    return (f"unclip logs {job} STEP --address {address}", f"unclip stop {job} --address {address}")


def _print_worker_logs(logs: "list[WorkerLog]", words: str, lost_machines: list[str]) -> None:
    """Print the logs of the workers that are asked for; without any, the names of all."""
    from pipeline.runtime.worker_logs import logs_by_name

    if not words:
        names = ", ".join(dict.fromkeys(log.name for log in logs))
        typer.echo(
            f"logs of workers: {names}" if names else "no worker has begun on the machines that are there", err=True
        )
        return
    for log in logs_by_name(logs, words, lost_machines):
        typer.echo(f"== {log.name}{f' on {log.machine}' if log.machine else ''} ==")
        typer.echo(log.read(), nl=False)


def stop(job: JobId, address: JobAddress = DASHBOARD) -> Next:
    """Stop a job; its trainings write a checkpoint first, and the next submit continues.

    Example: unclip stop demo-1a2b3c4d5e
    """
    from pipeline.runtime.jobs import stop_job
    from pipeline.runtime.tunnel import reachable

    with reachable(address) as url:
        typer.echo(f"{job}: {stop_job(job, address=url)}")
    return (f"unclip logs {job} --address {address}", f"unclip submit RECIPE --address {address}")
