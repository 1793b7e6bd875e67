#!/usr/bin/env bash
# Prints the data of each event of a filter: subscribe.sh FILTER
set -uo pipefail
url=${TIDEGATE_URL:-http://127.0.0.1:8080}
last_id='' retry=2000 type=message data=()

while true; do
  headers=(-H 'Accept: text/event-stream')
  [ -z "$last_id" ] || headers+=(-H "Last-Event-ID: $last_id")
  # Heartbeats come every 15 s: a connection that carries nothing for longer is dead.
  while IFS= read -r line; do
    value=${line#*:}
    value=${value# }
    case $line in
      event:*) type=$value ;;
      data:*) data+=("$value") ;;
      id:*) last_id=$value ;;
      retry:*) retry=$value ;;
      '')
        case $type in
          tidegate.gap) printf 'missed events: %s\n' "${data[*]}" >&2 ;;
          tidegate.binary) printf '%s\n' "${data[@]}" ;;
          tidegate.*) ;;
          *) [ ${#data[@]} = 0 ] || printf '%s\n' "${data[@]}" ;;
        esac
        type=message data=()
        ;;
    esac
  done < <(curl -sN --speed-limit 1 --speed-time 45 "${headers[@]}" "$url/events/${1//>/%3E}?from=first")
  type=message data=()
  sleep "$(printf '%d.%03d' $((retry / 1000)) $((retry % 1000)))"
done
