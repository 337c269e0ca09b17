"""llama.cpp as a system under test: a child that speaks like `tllm.lab.system`, by llama-cpp-python's low-level calls.

    python scripts/llama_child.py serve MODEL.gguf THREADS          one JSON request a line, one answer a line
    python scripts/llama_child.py quantize FROM.gguf TO.gguf TYPE   Q8_0 or Q4_0, by llama.cpp's own quantizer
    python scripts/llama_child.py info                              what its build uses of the processor

It is given what a user could give it and what suits it best: as many threads for prompts as for tokens, prompts in
batches of 512, logits of the last token only, and flash attention on or off, whichever was faster when it was first
asked for a measurement of that kind. No sampling is counted.

The Python that runs it has llama-cpp-python; it need not have tllm, and this file does not know it.
"""

from __future__ import annotations

import ctypes
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import llama_cpp as api
import numpy as np

_BATCH = 512
_FILE_TYPES = {"Q8_0": api.LLAMA_FTYPE_MOSTLY_Q8_0, "Q4_0": api.LLAMA_FTYPE_MOSTLY_Q4_0}
_ATTENTIONS = {"on": api.LLAMA_FLASH_ATTN_TYPE_ENABLED, "off": api.LLAMA_FLASH_ATTN_TYPE_DISABLED}


class Context:
    """A model's KV with room for `num_sequences` of `num_positions` each. Remembers what it holds."""

    def __init__(
        self, model: Any, num_threads: int, flash_attention: int, *, num_sequences: int, num_positions: int
    ) -> None:
        params = api.llama_context_default_params()
        params.n_ctx = num_sequences * num_positions
        params.n_seq_max = num_sequences
        params.n_batch = params.n_ubatch = _BATCH
        params.n_threads = params.n_threads_batch = num_threads
        params.flash_attn_type = flash_attention
        params.no_perf = True
        self._context = api.llama_init_from_model(model, params)
        if not self._context:
            raise SystemExit(f"llama.cpp could not make a context of {num_sequences} x {num_positions} positions")
        self._memory = api.llama_get_memory(self._context)
        self._batch = api.llama_batch_init(_BATCH, 0, 1)
        self._vocab_size = api.llama_vocab_n_tokens(api.llama_model_get_vocab(model))
        self.lengths = [0] * num_sequences

    def close(self) -> None:
        api.llama_batch_free(self._batch)
        api.llama_free(self._context)

    def truncate(self, length: int) -> None:
        for seq in range(len(self.lengths)):
            self.lengths[seq] = min(self.lengths[seq], length)
            api.llama_memory_seq_rm(self._memory, seq, length, -1)

    def feed(self, rows: list[tuple[int, int]], *, all_logits: bool = False) -> None:
        """Compute one (sequence, token) after another, at most 512; logits of the last of each sequence, or of all."""
        batch = self._batch
        batch.n_tokens = len(rows)
        lasts = {seq: row for row, (seq, _) in enumerate(rows)}
        for row, (seq, token) in enumerate(rows):
            batch.token[row] = token
            batch.pos[row] = self.lengths[seq]
            batch.n_seq_id[row] = 1
            batch.seq_id[row][0] = seq
            batch.logits[row] = all_logits or lasts[seq] == row
            self.lengths[seq] += 1
        if (code := api.llama_decode(self._context, batch)) != 0:
            raise SystemExit(f"llama_decode failed with {code}")
        api.llama_synchronize(self._context)

    def prompt(self, seq: int, num_tokens: int) -> None:
        while (done := self.lengths[seq]) < num_tokens:
            stop = min(done + _BATCH, num_tokens)
            self.feed([(seq, self.token(seq, at)) for at in range(done, stop)])

    def token(self, seq: int, position: int) -> int:
        """The same texts as the other systems are given."""
        return (7 * seq + 13 * position + 5) % self._vocab_size

    def logits(self, row: int) -> np.ndarray[Any, np.dtype[np.float32]]:
        pointer = api.llama_get_logits_ith(self._context, row)
        return np.ctypeslib.as_array(pointer, (self._vocab_size,)).copy()


class LlamaCpp:
    def __init__(self, path: str, num_threads: int) -> None:
        params = api.llama_model_default_params()
        params.n_gpu_layers = 0
        self._model = api.llama_model_load_from_file(path.encode(), params)
        if not self._model:
            raise SystemExit(f"llama.cpp could not load {path}")
        self._num_threads = num_threads
        self._contexts: dict[tuple[str, int, int], Context] = {}
        self._faster: dict[tuple[Any, ...], str] = {}  # kind of measurement -> attention

    def prefill(self, num_tokens: int) -> float:
        def measure(context: Context) -> float:
            context.truncate(0)
            began_s = time.perf_counter()
            context.prompt(0, num_tokens)
            return time.perf_counter() - began_s

        return self._best(("prefill", num_tokens), 1, num_tokens, measure)

    def decode(self, batch: int, context: int, num_steps: int) -> float:
        def measure(kv: Context) -> float:
            kv.truncate(context)
            for seq in range(batch):
                kv.prompt(seq, context)
            began_s = time.perf_counter()
            for position in range(context, context + num_steps):
                kv.feed([(seq, kv.token(seq, position)) for seq in range(batch)])
            return time.perf_counter() - began_s

        return self._best(("decode", batch, context), batch, context + num_steps, measure)

    def logits(self, tokens: list[int], out: str) -> float:
        """Those after every token of a text, at most 512, as (T, V) float32 in a .npy file."""
        with_attention = self._context("off", 1, _BATCH)
        with_attention.truncate(0)
        with_attention.feed([(0, token) for token in tokens], all_logits=True)
        np.save(out, np.stack([with_attention.logits(row) for row in range(len(tokens))]))
        return 0.0

    def _best(self, kind: tuple[Any, ...], num_sequences: int, num_positions: int, measure: Any) -> float:
        if kind not in self._faster:
            trials = {
                name: [measure(self._context(name, num_sequences, num_positions)) for _ in range(3)][1:]
                for name in _ATTENTIONS
            }
            self._faster[kind] = min(trials, key=lambda name: min(trials[name]))
            for name in _ATTENTIONS:
                if name != self._faster[kind]:
                    self._contexts.pop((name, num_sequences, _rounded(num_positions))).close()
        seconds: float = measure(self._context(self._faster[kind], num_sequences, num_positions))
        return seconds

    def _context(self, attention: str, num_sequences: int, num_positions: int) -> Context:
        key = (attention, num_sequences, _rounded(num_positions))
        if key not in self._contexts:
            self._contexts[key] = Context(
                self._model,
                self._num_threads,
                _ATTENTIONS[attention],
                num_sequences=num_sequences,
                num_positions=key[2],
            )
        return self._contexts[key]


def _rounded(num_positions: int) -> int:
    return -(-num_positions // 256) * 256


def serve(path: str, num_threads: str) -> None:
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w", buffering=1)
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    system = LlamaCpp(path, int(num_threads))
    for line in sys.stdin:
        ((what, request),) = json.loads(line).items()
        value = {"load": lambda: 0.0, "prefill": system.prefill, "decode": system.decode, "logits": system.logits}[
            what
        ](**request)
        print(json.dumps({"value": value}), file=answers)


def quantize(source: str, target: str, file_type: str) -> None:
    params = api.llama_model_quantize_default_params()
    params.ftype = _FILE_TYPES[file_type]
    unfinished = target + ".unfinished"
    if api.llama_model_quantize(source.encode(), unfinished.encode(), ctypes.byref(params)) != 0:
        raise SystemExit(f"llama.cpp could not quantize {source}")
    Path(unfinished).rename(target)


def info() -> None:
    print(api.llama_print_system_info().decode())


@api.llama_log_callback
def _quiet(level: int, text: bytes, _: Any) -> None:
    if level == 4:  # GGML_LOG_LEVEL_ERROR
        sys.stderr.write(text.decode(errors="replace"))


def main() -> None:
    api.llama_log_set(_quiet, ctypes.c_void_p(0))
    api.llama_backend_init()
    verb, *arguments = sys.argv[1:]
    {"serve": serve, "quantize": quantize, "info": info}[verb](*arguments)


if __name__ == "__main__":
    main()
