#!/bin/sh
# Makes the keys that compose.yaml wants in secrets/, unless they are there: one for clients, one
# for Prometheus, and Grafana's password.
set -eu
cd "$(dirname "$0")"

new_key() { od -An -N24 -tx1 /dev/urandom | tr -d ' \n'; }

# Containers run as users of their own and must read the files; the folder keeps others out.
mkdir -p secrets
chmod 0700 secrets
if [ ! -e secrets/api-keys.txt ]; then
  prometheus_key=$(new_key)
  printf '%s' "$prometheus_key" >secrets/prometheus-key
  printf 'client:%s\nprometheus:%s\n' "$(new_key)" "$prometheus_key" >secrets/api-keys.txt
fi
[ -e secrets/grafana-password ] || new_key >secrets/grafana-password
chmod 0644 secrets/api-keys.txt secrets/prometheus-key secrets/grafana-password
echo "Keys of the API are in $(pwd)/secrets/api-keys.txt, the password of Grafana's user admin in" \
  "$(pwd)/secrets/grafana-password."
