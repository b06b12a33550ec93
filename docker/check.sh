#!/usr/bin/env bash
# Checks the files of docker/, builds the CPU image and asks the server in it a question.
#
#   docker/check.sh               everything; root, buildah and, for the base image, mmdebstrap
#   docker/check.sh --lint-only   the files alone
#
# It needs no Docker: buildah builds without user namespaces or an overlay, in a folder of its own
# under TMPDIR that is gone in the end (5 GB at most). Each step is one line; the first that fails
# ends it with its output and exit code 1. In the environment:
#
#   PYTHON          a Python with Headlong's dev extra, for its linters and its pip; .venv's if not set
#   BASE_IMAGE      what to build on, as buildah pulls it: docker.io/library/debian:bookworm-slim, or
#                   oci-archive:FILE; if not set, a minimal system of this machine's own Debian
#                   release is made from its packages
#   PYTHON_VERSION  of the base image, as in 3.12; if not set, this machine's /usr/bin/python3's
#
# Wheels are downloaded by this machine's pip, however it is set up, and the build gets them as a
# folder: it asks no index.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
root=$(dirname "$here")
readonly here root

lint_only=no
case "${1:-}" in
  "") ;;
  --lint-only) lint_only=yes ;;
  *) echo "usage: docker/check.sh [--lint-only]" >&2; exit 2 ;;
esac

if [ -z "${PYTHON:-}" ]; then
  PYTHON=$root/.venv/bin/python
  [ -x "$PYTHON" ] || PYTHON=python3
fi
scripts=$("$PYTHON" -c 'import sysconfig; print(sysconfig.get_path("scripts"))')
PATH=$scripts:$PATH

work=$(mktemp --directory -t headlong-check.XXXXXX)
mkdir "$work/tmp"
export TMPDIR=$work/tmp
readonly server_log=$work/server.log
containers_cache=/var/lib/containers/cache
had_cache=yes

# Every process that began under this one, one a line.
descendants() {
  local child
  # shellcheck disable=SC2013
  for child in $(cat "/proc/$1/task/"*/children 2>/dev/null); do
    echo "$child"
    descendants "$child"
  done
}

clean_up() {
  code=$?
  trap - EXIT INT TERM
  # shellcheck disable=SC2046
  { kill -KILL $(descendants $$) || true; wait; } 2>/dev/null
  # buildah notes what it has seen of layers there, wherever its storage is.
  [ "$had_cache" = yes ] || rm -rf "$containers_cache"
  rm -rf --one-file-system "$work"
  exit "$code"
}
trap clean_up EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

fail() {
  echo "FAIL $1" >&2
  [ ! -s "${2:-/dev/null}" ] || tail -n 40 "$2" >&2
  exit 1
}

# step NAME COMMAND...: runs it, says how it went, and ends here if it went wrong. It runs in the
# background, because a signal reaches this script only between its commands.
step() {
  local name=$1 began=$SECONDS
  shift
  "$@" >"$work/output" 2>&1 </dev/null &
  wait $! || fail "$name" "$work/output"
  echo "ok   $name ($((SECONDS - began)) s)"
}

skip() { echo "skip $1: $2"; }
have() { command -v "$1" >/dev/null; }

# ---- files

# A copy with what the operator adds, so that nothing is written beside the sources.
prepare_compose() {
  mkdir -p "$work/compose"
  cp -r "$here" "$work/compose/docker"
  cp "$here/.env.example" "$work/compose/docker/.env"
  "$work/compose/docker/make-keys.sh"
}

compose_config() {
  local profile
  for profile in gpu cpu; do
    (cd "$work/compose/docker" && COMPOSE_PROFILES=$profile "$@" config --quiet) || return 1
  done
}

check_overlay() { "$@" "$overlay" | "$PYTHON" "$here/check_manifests.py"; }

whole_manifests() {
  find "$here/k8s/base" "$here/k8s/components" -name '*.yaml' ! -name kustomization.yaml
  echo "$here/k8s/secret.example.yaml"
}

check_files() {
  local overlay
  step "hadolint: Dockerfile" hadolint "$here/Dockerfile"
  step "compose.yaml: the compose specification's schema" \
    check-jsonschema --builtin-schema vendor.compose-spec "$here/compose.yaml"
  step "make-keys.sh makes keys" prepare_compose
  if have docker-compose; then
    step "compose.yaml: docker-compose config" compose_config docker-compose
  elif have docker && docker compose version >/dev/null 2>&1; then
    step "compose.yaml: docker compose config" compose_config docker compose
  else
    skip "compose.yaml: docker compose config" "there is no docker compose"
  fi
  # shellcheck disable=SC2046
  step "k8s: every manifest" "$PYTHON" "$here/check_manifests.py" $(whole_manifests)
  for overlay in "$here"/k8s/overlays/*; do
    if have kubectl; then
      step "k8s: overlay $(basename "$overlay")" check_overlay kubectl kustomize
    elif have kustomize; then
      step "k8s: overlay $(basename "$overlay")" check_overlay kustomize build
    else
      skip "k8s: overlay $(basename "$overlay")" "there is neither kubectl nor kustomize"
    fi
  done
  if have promtool; then
    step "promtool: alert rules" promtool check rules "$here/prometheus/alerts.yml"
    step "promtool: when they fire" promtool test rules "$here/prometheus/alerts_test.yml"
  else
    skip "promtool: alert rules" "there is no promtool"
  fi
  if have shellcheck; then
    step "shellcheck" shellcheck "$here"/*.sh
  else
    skip "shellcheck" "it is not installed"
  fi
}

# ---- image

readonly image=localhost/headlong-check/cpu
store() { buildah --storage-driver vfs --root "$work/store" --runroot "$work/run" "$@"; }

download_wheels() {
  local version=${PYTHON_VERSION:-} torch
  [ -n "$version" ] ||
    version=$(/usr/bin/python3 -c 'import sys; print("%d.%d" % sys.version_info[:2])')
  torch=$(grep '^torch==' "$root/constraints.txt")
  "$PYTHON" "$here/requirements.py" "$root/pyproject.toml" tracing >"$work/requirements.txt"
  "$PYTHON" -m pip --disable-pip-version-check --no-input download \
    --dest "$work/wheels" --only-binary :all: --python-version "$version" \
    --constraint "$root/constraints.txt" --requirement "$work/requirements.txt" \
    "$torch" setuptools
  printf '[global]\nno-index = true\nfind-links = /wheels\n' >"$work/pip.conf"
}

make_base() {
  local suite container
  # shellcheck source=/dev/null
  suite=$(. /etc/os-release && echo "$VERSION_CODENAME")
  # With mounts of its own, which are gone with it however it ends.
  unshare --mount mmdebstrap --mode=root --variant=minbase "$suite" "$work/base.tar"
  container=$(store from scratch)
  store add --quiet "$container" "$work/base.tar" /
  store commit --quiet --rm --disable-compression "$container" >"$work/base"
  rm "$work/base.tar"
}

pull_base() { store pull --quiet "$BASE_IMAGE" >"$work/base"; }

build() {
  store bud --format docker --isolation chroot --file "$here/Dockerfile" --target cpu \
    --build-arg CPU_BASE="$(cat "$work/base")" --build-arg CPU_TORCH_INDEX= \
    --secret id=pip-conf,src="$work/pip.conf" --volume "$work/wheels:/wheels:ro" \
    --tag "$image" "$root"
}

# config EXPRESSION: a part of the image's configuration, a word a line.
config() {
  store inspect --type image "$image" | "$PYTHON" -c '
import json, sys
part = json.load(sys.stdin)["Docker"]["config"]
for key in sys.argv[1].split("."):
    part = part[key]
print("\n".join(map(str, part if isinstance(part, list) else [part])))' "$1"
}

# in_image COMMAND...: runs it as the image's user, with its variables but for the address.
in_image() {
  store run --isolation chroot --env HEADLONG_HOST=127.0.0.1 --env HEADLONG_PORT="$port" \
    --env OMP_NUM_THREADS="$(nproc)" "$container" -- "$@"
}

is_as_configured() {
  [ "$(config User)" = 10001:10001 ] || { echo "it runs as $(config User)"; return 1; }
  config Env | grep -qx HEADLONG_HOST=0.0.0.0 || { echo "it listens on no address"; return 1; }
  [ "$(config Entrypoint | tail -n 1)" = headlong ] || { echo "its entrypoint is another"; return 1; }
  [ "$(config Healthcheck.Test | head -n 1)" = CMD ] || { echo "it has no health check"; return 1; }
  [ "$(config StopSignal)" = SIGTERM ] || { echo "it is stopped by another signal"; return 1; }
}

# What Triton does when a kernel first runs: a module in C, compiled by the server's user.
compiles() {
  # shellcheck disable=SC2016
  in_image sh -c '
    cd "$(mktemp --directory)" &&
    echo "#include <Python.h>
PyMODINIT_FUNC PyInit_it(void) { static struct PyModuleDef d = {PyModuleDef_HEAD_INIT, \"it\"};
  return PyModule_Create(&d); }" >it.c &&
    gcc -shared -fPIC -I"$(python -c "import sysconfig; print(sysconfig.get_path(\"include\"))")" \
      -o it.so it.c &&
    python -c "import it" &&
    touch "$TRITON_CACHE_DIR-is-writable"'
}

writes_nothing_else() {
  # shellcheck disable=SC2016
  in_image sh -c '
    found=$(find / -xdev -type d -writable ! -path "/cache*" ! -path "/tmp*" ! -path "/var/tmp*" \
      ! -path "/proc*" ! -path "/dev*" ! -path "/run/lock*" 2>/dev/null)
    [ -z "$found" ] || { echo "writable: $found"; exit 1; }'
}

start_server() {
  local command code=0
  mapfile -t command < <(config Entrypoint; config Cmd)
  in_image "${command[@]}" >"$server_log" 2>&1 </dev/null || code=$?
  echo "$code" >"$work/server.code"
}

# wait_for COMMAND...: until it succeeds in the image; no longer than the server runs, or 3 minutes.
wait_for() {
  local deadline=$((SECONDS + 180))
  until in_image "$@" >/dev/null 2>&1; do
    [ ! -e "$work/server.code" ] || { echo "the server ended:"; cat "$server_log"; return 1; }
    [ "$SECONDS" -lt "$deadline" ] || { echo "no answer:"; cat "$server_log"; return 1; }
    sleep 1
  done
}

is_healthy() {
  local test
  mapfile -t test < <(config Healthcheck.Test | tail -n +2)
  wait_for "${test[@]}"
}

# The process that is number 1 in a container of its own.
first_process() {
  local process
  for process in $(descendants "$server"); do
    [ "$(cat "/proc/$process/comm")" != tini ] || echo "$process"
  done
}

runs_as_nobody_else() {
  local first process uid count=0
  first=$(first_process)
  for process in $first $(descendants "$first"); do
    uid=$(stat --format %u "/proc/$process")
    [ "$uid" = 10001 ] || { echo "$(cat "/proc/$process/comm") runs as $uid"; return 1; }
    count=$((count + 1))
  done
  [ "$count" -ge 3 ] || { echo "tini, server and engine are not all there"; return 1; }
}

finds_the_needle() {
  local wanted
  in_image python -m headlong.demo.question --tokens 4096 --seed 6 \
    >"$work/question.json" 2>"$work/expected"
  wanted=$(sed -n 's/^expected answer: //p' "$work/expected")
  [ -n "$wanted" ] || { cat "$work/expected"; return 1; }
  "$PYTHON" - "http://127.0.0.1:$port/v1/chat/completions" "$work/question.json" "$wanted" <<'END'
import json, pathlib, sys, urllib.request

url, question, wanted = sys.argv[1:]
request = urllib.request.Request(
    url, pathlib.Path(question).read_bytes(), {"Content-Type": "application/json"}
)
opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
answer = json.load(opener.open(request, timeout=180))["choices"][0]["message"]["content"]
sys.exit(0 if wanted in answer else f"it answered {answer!r}, and {wanted!r} was hidden there")
END
}

# As `docker stop` does: SIGTERM to the image's first process.
ends_well() {
  local first deadline=$((SECONDS + 60))
  first=$(first_process)
  [ -n "$first" ] || { echo "tini does not run"; return 1; }
  kill -TERM "$first"
  while [ ! -e "$work/server.code" ]; do
    [ "$SECONDS" -lt "$deadline" ] || { echo "it does not end"; cat "$server_log"; return 1; }
    sleep 0.2
  done
  cat "$server_log"
  echo "it ended with $(cat "$work/server.code")"
  grep -q "Finishing requests" "$server_log" && [ "$(cat "$work/server.code")" = 0 ]
}

check_image() {
  local container port
  [ "$(id -u)" = 0 ] || fail "root is needed to build, or --lint-only"
  have buildah || fail "buildah is needed to build, or --lint-only"
  [ -n "${BASE_IMAGE:-}" ] || have mmdebstrap || fail "mmdebstrap is needed, or BASE_IMAGE"
  [ -e "$containers_cache" ] || had_cache=no
  step "wheels are downloaded" download_wheels
  if [ -n "${BASE_IMAGE:-}" ]; then
    step "the base image is pulled" pull_base
  else
    step "a base image is made" make_base
  fi
  step "the CPU image is built" build
  step "it says how it is to be run" is_as_configured
  container=$(store from "$image")
  port=$("$PYTHON" -c 'import socket; s = socket.create_server(("127.0.0.1", 0)); print(s.getsockname()[1])')
  step "its user can compile a Python module in C" compiles
  step "its user can write to /cache and /tmp alone" writes_nothing_else
  start_server &
  server=$!
  step "the health check finds it well" is_healthy
  step "it is ready" wait_for headlong-probe /ready
  step "server and engine run as user 10001" runs_as_nobody_else
  step "it finds a needle in 4096 tokens" finds_the_needle
  step "SIGTERM ends it with 0" ends_well
}

check_files
[ "$lint_only" = yes ] || check_image
echo "All is well ($SECONDS s)."
