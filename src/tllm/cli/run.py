"""`tllm run`: talk to a model in the terminal."""

from __future__ import annotations

from contextlib import ExitStack
from typing import TYPE_CHECKING, Annotated

import typer

from tllm.cli import options
from tllm.core.config import EMBEDDED_MODEL, ServeConfig
from tllm.core.errors import TllmError

if TYPE_CHECKING:
    import httpx

    from tllm.cli.client import Turn

_HELP = """\
  /set NAME VALUE   temperature, top_p, top_k, min_p, max_tokens, seed
  /system TEXT      what the model is told first; without TEXT, nothing
  /new              forget the conversation
  /show             the settings
  /bye              leave (so does Ctrl-D); Ctrl-C stops an answer"""

_SETTINGS: dict[str, type[int] | type[float]] = {
    "temperature": float,
    "top_p": float,
    "top_k": int,
    "min_p": float,
    "max_tokens": int,
    "seed": int,
}


def run(
    context: typer.Context,
    model: options.Model = EMBEDDED_MODEL,
    prompt: Annotated[str | None, typer.Argument(help="Answer this and leave, instead of a conversation.")] = None,
    url: Annotated[str | None, typer.Option(help="Talk to this server instead of starting one.")] = None,
    api_key: Annotated[str | None, typer.Option(help="Of that server.", envvar="TLLM_API_KEY")] = None,
    temperature: Annotated[float | None, typer.Option(help="0 is greedy; the model's own by default.")] = None,
    workers: options.Workers = 1,
    dtype: options.ModelDType = None,
    quantize: options.Quantize = None,
    device: options.Device = "cpu",
    threads: options.Threads = None,
    max_model_len: options.MaxModelLen = None,
    log_level: options.Log = options.LogLevel.ERROR,
) -> None:
    """Chat with a model: streaming, and Ctrl-C stops an answer, not the session."""
    options.set_up_logging(log_level)
    from tllm.cli.client import connected, first_model

    if url is None:
        options.refuse_beside("a server of its own (no --url)", context, "api_key")
    else:
        options.refuse_beside("--url", context, "workers", "dtype", "quantize", "device", "threads", "max_model_len")
    with ExitStack() as stack:
        if url is None:
            from rich.console import Console

            from tllm.cli.serving import background_service
            from tllm.cli.view import StartView
            from tllm.models.repository import resolve_model

            config = ServeConfig(
                port=0,
                grpc_port=0,
                model=options.model_config(model=model, dtype=dtype, quantize=quantize, max_model_len=max_model_len),
                local_node=options.node_config(workers=workers, device=device, threads=threads),
            )
            resolve_model(model)  # a download happens here, where Ctrl-C still ends it
            view = stack.enter_context(StartView(Console(stderr=True)))
            service = stack.enter_context(background_service(config, view))
            url, name = service.url, service.deployment.names[0]
        else:
            name = ""
        client = stack.enter_context(connected(url, api_key=api_key))
        if not name:
            name = first_model(client) if model == EMBEDDED_MODEL else model
        settings: dict[str, float | int] = {} if temperature is None else {"temperature": temperature}
        session = _Session(client, name, settings)
        if prompt is not None:
            session.answer(prompt)
        else:
            session.converse()


class _Session:
    """A conversation: what was said, and how answers are sampled."""

    def __init__(self, client: httpx.Client, model: str, settings: dict[str, float | int]) -> None:
        self._client = client
        self._model = model
        self._settings = settings
        self._system: str | None = None
        self._turns: list[Turn] = []

    def converse(self) -> None:
        import readline  # noqa: F401  gives input() a history and editing

        print(f"{self._model}. /? for help.")
        while True:
            try:
                line = input("\n> ").strip()
            except KeyboardInterrupt:
                print("\n(/bye or Ctrl-D leaves)")
                continue
            except EOFError:
                print()
                return
            if line == "/bye":
                return
            if line.startswith("/"):
                self._command(*line[1:].split(maxsplit=1))
            elif line:
                self._try_answer(line)

    def answer(self, question: str) -> None:
        """Stream the answer to stdout and remember it; an answer stopped by Ctrl-C is remembered as far as it came."""
        from tllm.cli.client import Turn, ask

        turns = [*self._turns, Turn(role="user", content=question)]
        system = [Turn(role="system", content=self._system)] if self._system else []
        with ask(self._client, model=self._model, turns=system + turns, options=self._settings) as answer:
            try:
                for piece in answer.text():
                    print(piece, end="", flush=True)
            except KeyboardInterrupt:
                print(" …", end="")
        print()
        self._turns = [*turns, Turn(role="assistant", content="".join(answer.pieces))]

    def _try_answer(self, question: str) -> None:
        try:
            self.answer(question)
        except KeyboardInterrupt:
            print("(stopped)")
        except TllmError as error:
            print(f"\n({error})")

    def _command(self, name: str = "?", rest: str = "") -> None:
        match name:
            case "set":
                self._set(*rest.split(maxsplit=1))
            case "system":
                self._system = rest or None
            case "new":
                self._turns = []
            case "show":
                print(f"model {self._model}, system {self._system!r}, {self._settings or 'the model’s own settings'}")
            case _:
                print(_HELP)

    def _set(self, name: str = "", value: str = "") -> None:
        kind = _SETTINGS.get(name)
        try:
            if kind is None:
                raise ValueError(f"{name!r} cannot be set; these can: {', '.join(_SETTINGS)}")
            self._settings[name] = kind(value)
        except ValueError as error:
            print(f"({error})")
