#!/bin/sh
# Builds the demo twice with ./filo: first the base image, then a multi-stage Dockerfile into an OCI layout.
# Everything it makes is in .demo; the base's program is compiled here, so Go is all it needs.
set -eu
cd "$(dirname "$0")/../.."
demo=$PWD/.demo
export FILO_ROOT="$demo/state"
mkdir -p "$demo/bin"

CGO_ENABLED=0 ${GO:-go} build -trimpath -ldflags='-s -w' -o "$demo/bin/toybox" ./testdata/toybox

build() { rm -rf "$demo/layout" && ./filo build --progress plain -o type=oci,tar=false,dest="$demo/layout" --load -t demo testdata/demo; }

echo "== the base image, from scratch"
./filo build --progress plain -t toybox --build-context bin="$demo/bin" testdata/base
echo
echo "== the demo: two stages, into the OCI layout .demo/layout"
build
first=$(cat "$demo/layout/index.json")
echo
echo "== the same again: every step is CACHED and the digest is the same"
build
[ "$first" = "$(cat "$demo/layout/index.json")" ] || { echo "the second build differs from the first" >&2; exit 1; }
echo
echo "== its layers"
./filo history demo
