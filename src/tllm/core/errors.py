"""Every error that tllm raises on purpose.

    TllmError
    ├── UserError                 what was asked for cannot be done; the message says what was given, what is allowed
    │   ├── ConfigError           an option or a file of options
    │   ├── ModelError            a checkpoint, a tokenizer or a template that cannot be used
    │   └── RequestError          one request; `param` names the field, `code` is for programs
    │       ├── ContextLengthError   the prompt does not leave room in the context
    │       └── QueueFullError       too many requests wait; `retry_after_s` says when to come back
    ├── UnavailableError          not now: loading, draining, or without the nodes it needs
    ├── PlanError                 no placement satisfies memory and layers
    ├── TransportError            a peer is gone or talks nonsense
    │   ├── RefusedError          the peer answered, and said no
    │   └── FrameError            one frame is truncated, oversized or contradicts itself
    ├── EngineError               a shard could not load or compute
    │   └── MissingKVError        a step refers to KV that was never written in this epoch
    └── GenerationError           a sequence that had started failed

A bug is an `assert`, never one of these.
This file does not know who raises what, nor how an error is shown.
"""

from __future__ import annotations


class TllmError(Exception):
    """Root of the tree. `str(error)` is one or two sentences for a person."""


class UserError(TllmError):
    """What was asked for cannot be done as asked. Nothing was changed."""


class ConfigError(UserError):
    """An option is wrong or two contradict each other."""


class ModelError(UserError):
    """A checkpoint, tokenizer or template cannot be used; the message names the file, tensor or field."""


class RequestError(UserError):
    """One request is wrong. `param` names its field where one is to blame, `code` is stable for programs."""

    def __init__(self, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.param = param
        self.code = code


class ContextLengthError(RequestError):
    """The prompt leaves no room in the context."""

    def __init__(self, num_tokens: int, max_model_len: int, *, param: str = "messages") -> None:
        super().__init__(
            f"This model's maximum context length is {max_model_len} tokens, but the prompt has {num_tokens}. "
            "Shorten the prompt.",
            param=param,
            code="context_length_exceeded",
        )


class QueueFullError(RequestError):
    """As many requests wait as may; come back after `retry_after_s` seconds."""

    def __init__(self, num_waiting: int, retry_after_s: float) -> None:
        super().__init__(
            f"{num_waiting} requests are waiting, which is the limit. Try again in {retry_after_s:.0f} s.",
            code="queue_full",
        )
        self.retry_after_s = retry_after_s


class UnavailableError(TllmError):
    """The service cannot answer now. `state` is one of loading, replanning, degraded, draining."""

    def __init__(self, message: str, *, state: str, retry_after_s: float = 5.0) -> None:
        super().__init__(message)
        self.state = state
        self.retry_after_s = retry_after_s


class PlanError(TllmError):
    """No placement of the model on the nodes satisfies memory and layers; the message says what is missing."""


class TransportError(TllmError):
    """A peer is gone or cannot be reached. Messages not yet acknowledged may or may not have arrived."""


class RefusedError(TransportError):
    """The peer is there and does not want this one; its reason is the message."""


class FrameError(TransportError):
    """A frame is truncated, oversized, from another epoch, or contradicts itself. It was dropped unread."""


class EngineError(TllmError):
    """A shard could not load, allocate or compute. After a failed `forward` the engine serves the next step."""


class MissingKVError(EngineError):
    """A chunk refers to KV positions that nobody wrote in this epoch. Nothing was computed."""


class GenerationError(TllmError):
    """A sequence that had started cannot go on. Tokens already delivered are right."""
