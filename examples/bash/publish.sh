#!/usr/bin/env bash
# Publishes one event: publish.sh SUBJECT DATA. Prints the event's id. curl retries with one idempotency key, so that the
# event is stored once.
set -euo pipefail
url=${TIDEGATE_URL:-http://127.0.0.1:8080}
key=$(od -An -N16 -tx1 /dev/urandom | tr -d ' \n')

curl -fsS --retry 5 --retry-connrefused --max-time 10 -H "Idempotency-Key: $key" \
  --data-binary "$2" "$url/events/$1" | sed -E 's/.*"id":"([^"]+)".*/\1/'
