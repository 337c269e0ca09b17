#!/bin/sh
# Generates wire_pb2.py and wire_pb2.pyi from wire.proto, next to it or into the directory given as first argument.
# Both are committed: whoever installs tllm needs no compiler. tests/repo/test_proto_is_current.py compares them.
set -eu
root=$(cd "$(dirname "$0")/.." && pwd)
source="$root/src/tllm/transport"
target=${1:-$source}
python=${PYTHON:-"$root/.venv/bin/python"}
[ -x "$python" ] || python=python3
# protoc finds the plug-in that writes the stubs beside the interpreter, whether or not the environment is active.
PATH="$(dirname "$(command -v "$python")"):$PATH" "$python" -m grpc_tools.protoc \
    --proto_path="$source" --python_out="$target" --mypy_out="quiet:$target" "$source/wire.proto"
