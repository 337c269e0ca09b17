"""A cluster that computes nothing: nodes that can be drained and undrained as a head's can.

It does not know the API.
"""

from __future__ import annotations

from dataclasses import replace

from tllm.cluster.clocks import ClockOffset
from tllm.cluster.status import ClusterStatus, Joining, NodeState, NodeStatus, StageStatus
from tllm.cluster.tracing import Place, SequenceRecord, StageRecord, StepRecord, Trace
from tllm.core.errors import PlanError, RequestError
from tllm.core.types import Epoch, StepId

STAGE = StageStatus(
    first_layer=0, last_layer=4, embed=True, head=False, weight_bytes=3_000_000_000, kv_bytes=500_000_000
)
NODE = NodeStatus(
    id="n-00000001",
    name="mini",
    host="192.168.1.10",
    state=NodeState.READY,
    reason="",
    platform="Darwin arm64",
    device="cpu",
    num_threads=8,
    memory_bytes=12_000_000_000,
    free_bytes=2_000_000_000,
    decode_tokens_per_s=41.5,
    rtt_s=0.0008,
    stages=(STAGE,),
)
STATUS = ClusterStatus(
    cluster="tllm-demo",
    model="tllm-demo",
    state="serving",
    epoch=3,
    nodes=(
        NODE,
        replace(
            NODE,
            id="n-00000002",
            name="m3pro",
            host="192.168.1.11",
            stages=(replace(STAGE, first_layer=4, last_layer=8, embed=False, head=True),),
        ),
        replace(
            NODE,
            id="n-00000003",
            name="old laptop/2",
            host="192.168.1.12",
            free_bytes=None,
            decode_tokens_per_s=None,
            rtt_s=None,
            stages=(),
            reason="it would make every token 40 % slower",
        ),
    ),
    predicted_ttft_s=0.21,
    predicted_tokens_per_s=37.25,
    bound_by="memory bandwidth of mini",
    events=("06:24:11 mini joined", "06:24:12 m3pro joined", "06:24:15 serving in epoch 3"),
)
JOINING = Joining(cluster="tllm-demo", grpc_port=25001, fingerprint="00112233445566778899aabbccddeeff")

CLOCK = ClockOffset(offset_s=1000.0, error_s=0.00012, at_s=0.0)
_HEAD_ORDER = (12, 13, 0, 0, 3, 4, 5, 1, 2, 14, 15, 16)  # when the head passes each Point, in twentieths
_STAGE_ORDER = (5, 6, 7, 8, 9, 10, 11)


class FakeCluster:
    """`needed` are ids of nodes without which the model does not fit; `gone` of nodes that leave as one looks."""

    def __init__(self) -> None:
        self.current = STATUS
        self.needed: set[str] = set()
        self.gone: set[str] = set()
        self.step = StepId(1)  # that its traces have
        self.asked: list[tuple[float, float]] = []  # windows of which a trace was wanted

    def status(self) -> ClusterStatus:
        return self.current

    def joining(self) -> Joining:
        return JOINING

    async def drain(self, node: str) -> None:
        if node in self.needed:
            raise PlanError("The model needs 6 GB more than the other nodes have.")
        self._become(node, NodeState.DRAINING)

    async def undrain(self, node: str) -> None:
        self._become(node, NodeState.READY)

    async def trace(self, began_s: float, ended_s: float, sequences: tuple[SequenceRecord, ...] = ()) -> Trace:
        """One step on a stage of four layers, in which every sequence was."""
        self.asked.append((began_s, ended_s))
        gap_s = (ended_s - began_s) / 20
        times_s = tuple(began_s + number * gap_s for number in _HEAD_ORDER)
        stage_s = tuple(began_s + number * gap_s + CLOCK.offset_s for number in _STAGE_ORDER)
        step = StepRecord(
            epoch=Epoch(1), step=self.step, chunks=tuple((each.seq, 1) for each in sequences), times_s=times_s
        )
        stage = StageRecord(
            place=Place(node="mini", worker="w-1", first_layer=0, last_layer=4),
            epoch=Epoch(1),
            clock=CLOCK,
            times_s={self.step: stage_s},
        )
        return Trace(
            began_s=began_s,
            ended_s=ended_s,
            num_layers=4,
            head=Place(node="head"),
            steps=(step,),
            stages=(stage,),
            sequences=sequences,
            oldest_step=self.step,
        )

    def _become(self, node: str, state: NodeState) -> None:
        if node in self.gone or node not in {one.id for one in self.current.nodes}:
            raise RequestError(f"There is no node {node!r}.")
        nodes = tuple(replace(one, state=state) if one.id == node else one for one in self.current.nodes)
        self.current = replace(self.current, nodes=nodes)
