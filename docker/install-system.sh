#!/bin/sh
# Installs what the image needs of its distribution, and makes the user that the server runs as.
# Debian and Ubuntu alike; the base image, which is pinned, says which versions.
set -eu

export DEBIAN_FRONTEND=noninteractive
apt-get update
apt-get install --yes --no-install-recommends \
  ca-certificates gcc libc6-dev python3 python3-dev python3-venv tini
rm -rf /var/lib/apt/lists/* /var/cache/apt/*.bin

# Its home is the folder of caches: it writes there and to /tmp, and nowhere else. A new volume takes
# over the owner of the folder that it covers.
groupadd --gid 10001 headlong
useradd --uid 10001 --gid 10001 --home-dir /cache --no-create-home --shell /usr/sbin/nologin headlong
install --directory --owner 10001 --group 10001 /cache
