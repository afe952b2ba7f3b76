"""Replicas of autosteer-serve behind Ray Serve, one engine each (docs/serving.md).

python examples/serve_on_ray.py PACKAGE local          # on this machine; 127.0.0.1:8000; Ctrl-C stops
python examples/serve_on_ray.py PACKAGE auto 0.0.0.0   # on a cluster that requires tokens; AUTOSTEER_API_KEY is the key
"""

import sys
from pathlib import Path

from starlette.applications import Starlette

from autosteer.runtime import Engine, Mode
from autosteer.runtime.cluster import connected
from autosteer.runtime.serve.access import is_loopback
from autosteer.runtime.serve.app import Settings, make_app
from autosteer.runtime.serve.cli import read_key
from autosteer.runtime.serve.limits import Limits

REPLICAS, THREADS = 2, 1
package, address, host = Path(sys.argv[1]).absolute(), sys.argv[2], (*sys.argv[3:], "127.0.0.1")[0]
key = read_key(None)
if key is None and not is_loopback(host):
    sys.exit(f"{host}: others could use this server; give a key in AUTOSTEER_API_KEY")


def replica() -> Starlette:
    """The app of one replica; called in its process."""
    engine = Engine.load(package, threads=THREADS)
    settings = Settings(engine.manifest.source.repo, engine.policy(Mode.STEER), Mode.STEER, Limits(), key)
    return make_app(engine, settings, package)


with connected(address):
    from ray import serve

    serve.start(http_options={"host": host, "port": 8000})
    replicas = serve.deployment(
        num_replicas=REPLICAS,
        ray_actor_options={"num_cpus": THREADS},
        max_ongoing_requests=8,  # of a replica: four compute, four wait
        max_queued_requests=32,  # beyond it: 503
    )(serve.ingress(replica)())
    serve.run(replicas.bind(), blocking=True)
