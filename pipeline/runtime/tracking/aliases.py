"""Aliases of the tracker's registered model, such as ``champion``: which evaluation has one now."""

import threading
import urllib.parse
from concurrent.futures import Future
from pathlib import Path

from pipeline.errors import ConfigError, StepError, UnclipError
from pipeline.recipe.champion import read_promotions
from pipeline.recipe.recipe import Recipe
from pipeline.runtime.tracking.place import OFF, Place, check_scheme
from pipeline.runtime.tracking.tracker import NoAliasError, tags_by_alias
from pipeline.workspace.store import Workspace

CHAMPION = "champion"
_PATIENCE_S = 30.0
"""A first import of mlflow takes some of it."""


def evaluation_of(recipe: Recipe, alias: str, patience_s: float = _PATIENCE_S) -> tuple[str, str]:
    """What has an alias of a recipe's registered model, in words, and the key of the evaluation that it stands for.

    The champion of a workspace in an object store without a server of its own is what the workspace says: there the
    database of the default tracker, and the alias in it, are those of the machine that was the last to publish.

    Args:
        recipe: Its ``tracking`` table names the server.
        alias: The alias.
        patience_s: How long the server is waited for, in seconds.

    Raises:
        ConfigError: If no version has the alias, or there is no tracker.
        StepError: If the tracker does not answer in time, or not well.
        UnclipError: If the workspace does not answer, or its file of champions is damaged.
    """
    place = Place(recipe, Workspace(recipe.workspace))
    if place.uri == OFF:
        raise ConfigError(f'serve.networks = "{alias}" needs a tracker, and tracking.uri is "off"')
    check_scheme(place.uri)
    if alias == CHAMPION and place.has_far_database and place.experiment == recipe.name:
        champion = read_promotions(Workspace(recipe.workspace), recipe.name).champion
        if champion is None:
            raise ConfigError(
                f'serve.networks = "{alias}": {recipe.name} has no champion in {place.root}; it comes by '
                "`unclip promote RECIPE`"
            )
        return "what `unclip promote` has chosen", champion.evaluate
    answer = Future[tuple[str, dict[str, str]]]()

    def ask() -> None:
        try:
            with place.database_to_read() as uri:
                _require_database(uri)
                answer.set_result(tags_by_alias(uri, place.experiment, alias))
        except BaseException as error:  # noqa: BLE001  (raised where the answer is read)
            answer.set_exception(error)

    threading.Thread(target=ask, name="unclip-alias", daemon=True).start()  # a server that hangs does not hold the end
    try:
        version, tags = answer.result(patience_s)
    except NoAliasError:
        raise ConfigError(
            f'serve.networks = "{alias}": no version of {place.experiment} has this alias on the tracker '
            f"{place.shown_uri}; the alias champion comes by `unclip promote RECIPE`"
        ) from None
    except UnclipError:  # of the workspace's store: it says itself what is wrong
        raise
    except Exception as error:  # noqa: BLE001  (what mlflow and the drivers of databases throw)
        reason = f"does not answer within {patience_s:g} s" if isinstance(error, TimeoutError) else "does not answer"
        raise StepError(
            f'serve.networks = "{alias}": the tracker {place.shown_uri} {reason} ({type(error).__name__}); try again '
            "when it does, or serve the recipe's own networks (leave serve.networks out)"
        ) from None
    if "unclip.key" not in tags:
        raise ConfigError(f'serve.networks = "{alias}": version {version} was not registered by unclip: it has no key')
    return f"version {version} of the tracker's model", tags["unclip.key"]


def _require_database(uri: str) -> None:
    """Raise NoAliasError for a database file that is not there, which mlflow would make."""
    if uri.startswith("sqlite") and not Path(urllib.parse.urlsplit(uri).path[1:]).exists():
        raise NoAliasError(uri)
