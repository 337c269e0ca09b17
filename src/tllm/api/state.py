"""What the HTTP edge knows while it serves: the models and their cluster, who may ask, how much may be asked.
This file does not know routes, bodies or headers.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from tllm.api.errors import ModelNotFoundError, listed, unavailable
from tllm.api.metrics import Metrics
from tllm.api.traced import TracedRequests
from tllm.cluster.deployment import Deployment, DeploymentState
from tllm.cluster.status import Cluster
from tllm.core.errors import RequestError

logger = logging.getLogger(__name__)

MAX_NOTED_FIELDS = 256  # field names come from clients: neither the set nor the log may grow without end


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Bounds on what one request may ask of this process, whatever the model could do."""

    max_body_bytes: int = 32 * 1024 * 1024
    body_timeout_s: float = 60.0
    max_messages: int = 4096
    max_choices: int = 1024  # prompts times n
    max_stop: int = 256  # strings
    max_stop_chars: int = 4096  # of all of them: each choice keeps a small automaton of that size
    # These travel with every step of a sequence, so together they must stay well below what a frame may hold.
    max_stop_ids: int = 256
    max_biases: int = 1024
    max_allowed_ids: int = 1024
    ping_interval_s: float = 15.0  # a stream that is silent for so long says that it lives
    retry_after_s: float = 5.0  # told to clients while loading, degraded or draining
    deadline_s: float | None = None  # for a whole answer


@dataclass(slots=True, kw_only=True)
class ApiState:
    """All that the application knows. Whoever made it may change `deployments` and `draining` while it serves.

    `deployments` maps each served name to its deployment; several names may mean the same one. With `bind_host` on
    loopback, requests whose Host is neither a loopback name nor in `allowed_hosts` are refused (DNS rebinding), and
    so are those from web pages of other sites that `cors_origins` does not list ("*" lists all).
    """

    version: str
    deployments: Mapping[str, Deployment]
    cluster: Cluster | None = None  # None: nothing under /tllm/v1
    api_keys: tuple[str, ...] = ()
    bind_host: str = "127.0.0.1"
    allowed_hosts: tuple[str, ...] = ()
    cors_origins: tuple[str, ...] = ()
    limits: Limits = Limits()
    default_seed: int | None = None  # of requests that bring none; None draws one for each
    metrics: Metrics = field(default_factory=Metrics)
    traced: TracedRequests = field(default_factory=TracedRequests)
    draining: bool = False
    noted_fields: set[str] = field(default_factory=set)

    def status(self) -> str:
        """`ok`, or why nothing can be answered: draining, loading, degraded (replanning comes from a deployment)."""
        if self.draining:
            return DeploymentState.DRAINING.value
        states = [deployment.state for deployment in self.deployments.values()]
        if DeploymentState.SERVING in states:
            return "ok"
        return states[0].value if states else DeploymentState.LOADING.value

    def require_serving(self, deployment: Deployment) -> None:
        """Raise UnavailableError unless `deployment` takes new requests now."""
        if self.draining:
            raise unavailable(DeploymentState.DRAINING.value, self.limits.retry_after_s)
        if not deployment.takes_requests:
            raise unavailable(deployment.state.value, self.limits.retry_after_s)

    def note_ignored(self, fields: Iterable[str]) -> None:
        """Log, once per name, that a field of a request has no effect here."""
        for name in fields:
            if name not in self.noted_fields and len(self.noted_fields) < MAX_NOTED_FIELDS:
                self.noted_fields.add(name)
                logger.info("request field %.64r has no effect and is ignored", name)

    def find(self, name: str | None) -> Deployment:
        """The deployment called `name`, or the only one where the request names none.

        Raises ModelNotFoundError with the names there are, UnavailableError while there is none at all.
        """
        if not self.deployments:
            raise unavailable(DeploymentState.LOADING.value, self.limits.retry_after_s)
        if name:
            if name in self.deployments:
                return self.deployments[name]
            raise ModelNotFoundError(name, tuple(self.deployments))
        distinct = {id(deployment): deployment for deployment in self.deployments.values()}
        if len(distinct) == 1:
            return next(iter(distinct.values()))
        raise RequestError(
            f"This server has several models; name one of {listed(tuple(self.deployments))} in 'model'.", param="model"
        )
