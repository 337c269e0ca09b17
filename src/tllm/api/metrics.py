"""Prometheus: what requests cost as the edge saw them, and what the deployments say of themselves when asked.

Names are vLLM's behind a prefix of our own; `Metrics(prefix="vllm")` lets its dashboards and gateways read them.
Durations are differences of one clock, this process's. Labels are bounded: model names, route templates, statuses.
This file does not know what a request contains.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector

from tllm.cluster.deployment import Deployment, DeploymentState, DeploymentStatistics, GenerationUsage

SHORT_S = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0)
FIRST_TOKEN_S = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80, 160)
LONG_S = (0.01, 0.05, 0.1, 0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960)
TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000, 20000, 50000, 100000, 200000)
CHOICES = (1, 2, 5, 10, 20, 64)

METHODS = frozenset(("GET", "POST", "OPTIONS", "HEAD", "PUT", "DELETE", "PATCH"))
UNMATCHED = "unmatched"


class Metrics:
    """One registry of one application. Nothing is global: two applications in a process do not meet."""

    def __init__(self, prefix: str = "tllm") -> None:
        self.prefix = prefix
        self.registry = CollectorRegistry(auto_describe=False)
        self.http_requests = Counter(
            "http_requests", "Requests by route, method and status.", ("handler", "method", "status"),
            registry=self.registry,
        )  # fmt: skip
        self.http_duration = Histogram(
            "http_request_duration_seconds", "From the request's head to the end of its response.",
            ("handler", "method"), registry=self.registry, buckets=LONG_S,
        )  # fmt: skip
        self.success = Counter(
            f"{prefix}:request_success", "Finished choices by reason.", ("model_name", "finished_reason"),
            registry=self.registry,
        )  # fmt: skip
        self.first_token = self._histogram("time_to_first_token_seconds", "Arrival to first token.", FIRST_TOKEN_S)
        self.inter_token = self._histogram("inter_token_latency_seconds", "Between tokens of a choice.", SHORT_S)
        self.e2e = self._histogram("e2e_request_latency_seconds", "Arrival to last token.", LONG_S)
        self.queue = self._histogram("request_queue_time_seconds", "Waiting to be scheduled.", LONG_S)
        self.prefill = self._histogram("request_prefill_time_seconds", "First scheduling to first token.", LONG_S)
        self.decode = self._histogram("request_decode_time_seconds", "First token to last token.", LONG_S)
        self.inference = self._histogram("request_inference_time_seconds", "First scheduling to last token.", LONG_S)
        self.prompt_tokens = self._histogram("request_prompt_tokens", "Prompt tokens of a choice.", TOKENS)
        self.generation_tokens = self._histogram("request_generation_tokens", "Tokens sampled for a choice.", TOKENS)
        self.params_n = self._histogram("request_params_n", "Choices asked for per prompt.", CHOICES)
        self.params_max_tokens = self._histogram("request_params_max_tokens", "Token limit in force.", TOKENS)

    def watch(self, deployments: Mapping[str, Deployment]) -> None:
        """Report the statistics of `deployments`, as the mapping stands at each scrape."""
        self.registry.register(_DeploymentCollector(self.prefix, deployments))

    def observe_http(self, handler: str, method: str, status: int, duration_s: float) -> None:
        known = method if method in METHODS else "OTHER"
        self.http_requests.labels(handler, known, str(status)).inc()
        self.http_duration.labels(handler, known).observe(duration_s)

    def observe_request(self, model: str, *, n: int, max_tokens: int) -> None:
        self.params_n.labels(model).observe(n)
        self.params_max_tokens.labels(model).observe(max_tokens)

    def observe_choice(
        self, model: str, *, reason: str, usage: GenerationUsage, first_token_s: float | None, e2e_s: float
    ) -> None:
        """One choice ended for `reason` (stop, length, abort, error), `e2e_s` after its request arrived.

        `first_token_s` is None where there was none; such a choice adds nothing to the histograms of time.
        """
        self.success.labels(model, reason).inc()
        self.prompt_tokens.labels(model).observe(usage.num_prompt_tokens)
        self.generation_tokens.labels(model).observe(usage.num_output_tokens)
        if first_token_s is not None:
            self.first_token.labels(model).observe(first_token_s)
            self.e2e.labels(model).observe(e2e_s)
            self.queue.labels(model).observe(usage.queue_s)
            self.prefill.labels(model).observe(usage.prefill_s)
            self.decode.labels(model).observe(usage.decode_s)
            self.inference.labels(model).observe(usage.prefill_s + usage.decode_s)

    def exposition(self, accept: str) -> tuple[bytes, str]:
        """The whole page and its content type, in the format that `accept` prefers."""
        encode, content_type = choose_encoder(accept)
        return encode(self.registry), content_type

    def _histogram(self, name: str, help_text: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(f"{self.prefix}:{name}", help_text, ("model_name",), registry=self.registry, buckets=buckets)


class _DeploymentCollector(Collector):
    """Asks each deployment for its statistics once per scrape."""

    def __init__(self, prefix: str, deployments: Mapping[str, Deployment]) -> None:
        self.prefix = prefix
        self.deployments = deployments

    def describe(self) -> Iterable[Metric]:
        return ()

    def collect(self) -> Iterator[Metric]:
        distinct = {id(deployment): deployment for deployment in self.deployments.values()}
        taken = [(deployment.names[0], deployment, deployment.statistics()) for deployment in distinct.values()]
        for name, help_text, read in _GAUGES:
            gauge = GaugeMetricFamily(f"{self.prefix}:{name}", help_text, labels=("model_name",))
            for model, _, statistics in taken:
                gauge.add_metric((model,), read(statistics))
            yield gauge
        for name, help_text, read in _COUNTERS:
            counter = CounterMetricFamily(f"{self.prefix}:{name}", help_text, labels=("model_name",))
            for model, _, statistics in taken:
                counter.add_metric((model,), read(statistics))
            yield counter
        cache = GaugeMetricFamily(
            f"{self.prefix}:cache_config_info", "The KV cache as allocated.",
            labels=("model_name", "block_size", "num_gpu_blocks"),
        )  # fmt: skip
        for model, _, statistics in taken:
            cache.add_metric((model, str(statistics.block_size), str(statistics.num_blocks)), 1)
        yield cache
        state = GaugeMetricFamily(
            f"{self.prefix}:deployment_state", "1 for the state in force.", labels=("model_name", "state")
        )
        for model, deployment, _ in taken:
            for candidate in DeploymentState:
                state.add_metric((model, candidate.value), float(deployment.state is candidate))
        yield state


_Row = tuple[str, str, Callable[[DeploymentStatistics], float]]

_GAUGES: tuple[_Row, ...] = (
    ("num_requests_running", "Sequences being computed.", lambda s: s.num_running),
    ("num_requests_waiting", "Sequences waiting to be scheduled.", lambda s: s.num_waiting),
    ("kv_cache_usage_perc", "Share of KV blocks in use, 0 to 1.", lambda s: s.kv_usage),
    ("epoch", "Number of the plan in force.", lambda s: s.epoch),
)
_COUNTERS: tuple[_Row, ...] = (
    ("prefix_cache_queries", "Prompt tokens looked up in the prefix tree.", lambda s: s.prefix_queries),
    ("prefix_cache_hits", "Prompt tokens found in the prefix tree.", lambda s: s.prefix_hits),
    ("num_preemptions", "Sequences that lost their KV to others.", lambda s: s.num_preemptions),
    ("prompt_tokens", "Prompt tokens taken.", lambda s: s.num_prompt_tokens),
    ("generation_tokens", "Tokens sampled.", lambda s: s.num_output_tokens),
    ("steps", "Steps completed.", lambda s: s.num_steps),
)
