"""Ray Serve applications without Serve's own HTTP: started with the cause of a failure, stopped without others. Not of segmentation alone."""

from __future__ import annotations

from ray import serve
from ray.serve.handle import DeploymentHandle

OPTIONS = {"max_constructor_retry_count": 2, "health_check_period_s": 5, "health_check_timeout_s": 60, "graceful_shutdown_timeout_s": 20}
"""How long replicas of any service may take to start, to answer a health check, and to end."""


def run(app: serve.Application, name: str) -> DeploymentHandle:
    """The handle of the running application, once all replicas are ready. Raises RuntimeError with the cause where one does not come up."""
    serve.start(proxy_location="Disabled")  # no effect where Serve runs already
    try:
        return serve.run(app, name=name, route_prefix=None)
    except RuntimeError as error:  # Ray leaves the cause to its logs
        there = serve.status().applications.get(name)
        causes = [deployment.message for deployment in there.deployments.values() if deployment.message] if there else []
        raise RuntimeError("\n".join(["the replicas did not come up:", *(causes or [str(error)])])) from error


def stop(name: str) -> None:
    """Ends the application, and Ray Serve itself if that served nothing else."""
    serve.delete(name)
    if not serve.status().applications:
        serve.shutdown()
