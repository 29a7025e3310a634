#!/bin/sh
# Asks a running server about a picture from Python: once with stubs generated from proto/, once with server reflection alone.
#   tests/peers/python_client.sh HOST:PORT [PICTURE] [VENV] [QUESTION] [ANSWER]
# VENV is made when it is not there, from requirements.txt. Exits 0 when every call of both clients succeeded, and both got ANSWER, if one
# is given.
set -eu
here=$(cd "$(dirname "$0")" && pwd)
root=$(cd "$here/../.." && pwd)
server=${1:?usage: python_client.sh HOST:PORT [PICTURE] [VENV] [QUESTION] [ANSWER]}
picture=${2:-$root/tests/pictures/cat.jpg}
venv=${3:-$root/.venv/peers}
question=${4:-What is this?}
answer=${5:-}

if [ ! -x "$venv/bin/python" ]; then
    python3 -m venv "$venv"
fi
if ! cmp -s "$here/requirements.txt" "$venv/requirements.txt"; then
    "$venv/bin/pip" install --quiet --disable-pip-version-check -r "$here/requirements.txt"
    cp "$here/requirements.txt" "$venv/requirements.txt"
fi

stubs=$(mktemp -d)
trap 'rm -rf "$stubs"' EXIT
"$venv/bin/python" -m grpc_tools.protoc -I "$root/proto" --python_out="$stubs" --grpc_python_out="$stubs" \
    "$root/proto/lockstep/v1/inference.proto"

echo "== with generated stubs"
PYTHONPATH="$stubs" "$venv/bin/python" "$here/client_stubs.py" "$server" "$picture" "$question" "$answer"
echo "== with server reflection alone"
"$venv/bin/python" "$here/client_reflection.py" "$server" "$picture" "$question" "$answer"
