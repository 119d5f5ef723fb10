#!/usr/bin/env bash
# Drives scripts/start-services.sh as a person would, with data and ports of its own: start, start again, occupied
# ports, restart with the data kept, stop. Run by scripts/test.
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=../lib.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/../lib.sh"

services=$root/scripts/start-services.sh
work=$(mktemp -d)
trap '"$services" --stop --data "$work/a" >/dev/null 2>&1; rm -rf "$work"' EXIT

# Ports below the range from which the kernel takes them for outgoing connections.
free_port() {
  local port
  while :; do
    port=$((20000 + RANDOM % 10000))
    port_in_use "$port" || break
  done
  echo "$port"
}

# expect CODE PATTERN COMMAND...: the exit code, and a line of what it says.
expect() {
  local code=$1 pattern=$2 said got=0
  shift 2
  said=$("$@" 2>&1) || got=$?
  if ((got != code)) || ! [[ $said =~ $pattern ]]; then
    printf 'FAILED: %s\nexpected exit %s and "%s"; got exit %s and:\n%s\n' "$*" "$code" "$pattern" "$got" "$said" >&2
    exit 1
  fi
}

redis_port=$(free_port)
etcd_port=$(free_port)
while ((etcd_port == redis_port)); do etcd_port=$(free_port); done
spare_port=$(free_port)
while ((spare_port == redis_port || spare_port == etcd_port)); do spare_port=$(free_port); done
ports=(--redis-port "$redis_port" --etcd-port "$etcd_port")

expect 64 'is no port' "$services" --redis-port 70000
expect 64 'unknown option' "$services" --colour
expect 64 'needs a value' "$services" --data

expect 0 "redis .*:$redis_port +started" "$services" "${ports[@]}" --data "$work/a"
expect 0 "redis .*was running.*etcd .*was running" "$services" "${ports[@]}" --data "$work/a"
expect 0 OK redis-cli -p "$redis_port" set kept yes
expect 0 'always' redis-cli -p "$redis_port" config get appendfsync
expect 0 'noeviction' redis-cli -p "$redis_port" config get maxmemory-policy

expect 69 "port $redis_port is in use.*--redis-port" "$services" "${ports[@]}" --data "$work/b"
expect 69 "port $etcd_port is in use.*--etcd-port" \
  "$services" --redis-port "$spare_port" --etcd-port "$etcd_port" --data "$work/b"
expect 64 "runs on port $redis_port already" \
  "$services" --redis-port "$spare_port" --etcd-port "$etcd_port" --data "$work/a"

expect 0 'redis stopped.*etcd stopped' "$services" --stop --data "$work/a"
expect 0 'redis is not running' "$services" --stop --data "$work/a"
if port_in_use "$redis_port"; then fail 1 "redis still listens on $redis_port after --stop"; fi
expect 0 'started' "$services" "${ports[@]}" --data "$work/a"
expect 0 yes redis-cli -p "$redis_port" get kept

echo "start-services.sh: as its help says"
