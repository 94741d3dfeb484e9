"""A file for `serve deploy`: Ray Serve then runs the HTTP interface too, behind its own proxies."""

from pathlib import Path
from typing import Any

import yaml
from ray import serve
from ray.serve.schema import ServeDeploySchema

from pipeline.errors import ConfigError
from pipeline.recipe.recipe import Recipe
from pipeline.runtime.deployments import replica_of
from pipeline.runtime.draining import Announce
from pipeline.runtime.front_replica import FrontReplica
from pipeline.runtime.ledger import Ledger
from pipeline.runtime.parts import (
    BYTES_PER_GB,
    HEALTH_CHECK_PERIOD_S,
    networks_options,
    part_tables,
    parts_of,
    scaling_of,
    write_tables,
)
from pipeline.runtime.served import served_by, server_name
from pipeline.serve.guards import require_keys
from pipeline.serve.http_server import is_loopback
from pipeline.serve.keys import read_keys

HTTP = "http"
LEDGER = "ledger"
_HTTP_REQUESTS = 1000
"""Most requests of one HTTP process; the engines decide how many may wait."""

PROXY_ENVIRONMENT = {
    "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": "pipeline.serve.proxy_answers:middlewares",
    "RAY_SERVE_PROXY_HEALTH_CHECK_PERIOD_S": "1",
}
"""Of every `ray start`: Ray Serve's proxies then answer in the API's form, and a dead one is missed for 4 s, not 28."""

_ALONE = """\
# Have no other file on its cluster: `serve deploy` ends the servers of the file before, with their requests.
# Where `unclip serve` has run before, first `serve shutdown`: Ray Serve keeps the HTTP options of its start.
"""

_LEDGER_TABLE = {"name": LEDGER, "num_replicas": 1, "ray_actor_options": {"num_cpus": 0}}
_http: Any = serve.deployment(serve.ingress()(FrontReplica), name=HTTP)


def application(parts: dict[str, Any]) -> serve.Application:
    """What the file imports; the recipe comes with the options of its deployments.

    Args:
        parts: ``names``: the deployments of the parts, CLIP's first; ``shared``: whether several processes speak HTTP.
    """
    networks: Any = {name: serve.deployment(replica_of(name), name=name) for name in parts["names"]}
    ledger: Any = serve.deployment(Ledger, name=LEDGER)
    shared = {LEDGER: ledger.bind()} if parts["shared"] else {}
    return _http.bind(**shared, **{name: deployment.bind() for name, deployment in networks.items()})


def serve_file(recipe: Recipe, announce: Announce) -> str:
    """The file, in YAML. Another file with other networks swaps them without a restart.

    Args:
        recipe: A checked recipe whose networks are finished.
        announce: Takes lines for people: which version has an alias, and why there are no neighbours.

    Raises:
        ConfigError: If a network is not finished, a key is wrong, or the server would be open to other machines
            without keys.
    """
    config = recipe.serve
    if config.mode == "process":
        raise ConfigError('serve.mode = "process" uses no Ray; choose "replica" or "chain" for a file of Ray Serve')
    require_keys(config)
    if config.keys and Path(config.keys).exists():  # else it is in the image, or on those machines alone
        read_keys(Path(config.keys))
    served = served_by(recipe)
    for fact in served.facts:
        announce(fact)
    recipe = served.recipe
    tables = write_tables(recipe, served.artifacts)
    gateway, is_shared = config.gateway, config.gateway.replicas[1] > 1
    http = {
        "name": HTTP,
        **scaling_of(gateway),
        "ray_actor_options": {
            "num_cpus": gateway.cpus_per_replica,
            **({"memory": int(gateway.memory_gb_per_replica * BYTES_PER_GB)} if gateway.memory_gb_per_replica else {}),
            "label_selector": gateway.label_selector,
        },
        "max_ongoing_requests": _HTTP_REQUESTS,
        "graceful_shutdown_timeout_s": config.drain_s,
        "health_check_period_s": HEALTH_CHECK_PERIOD_S,
        "user_config": tables,
    }
    parts = {
        name: {
            "name": name,
            **networks_options(config, name),
            "user_config": part_tables(recipe, tables, name),
        }
        for name in parts_of(recipe)
    }
    file = {
        "proxy_location": "HeadOnly" if is_loopback(config.host) else "EveryNode",
        "http_options": {"host": config.host, "port": config.port},
        "logging_config": {"log_level": "WARNING", "enable_access_log": False},
        "applications": [
            {
                "name": server_name(recipe),
                "route_prefix": "/",
                "import_path": f"{__name__}:application",
                "args": {"names": list(parts), "shared": is_shared},
                "deployments": [http, *parts.values(), *([_LEDGER_TABLE] if is_shared else [])],
            }
        ],
    }
    ServeDeploySchema.model_validate(file)
    environment = " ".join(f"{name}={value}" for name, value in PROXY_ENVIRONMENT.items())
    return f"# Start Ray on every machine with: {environment}\n{_ALONE}{yaml.safe_dump(file, sort_keys=False)}"
