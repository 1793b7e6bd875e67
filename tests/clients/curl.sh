#!/usr/bin/env bash
# Follows a stream with curl, for good: prints the type, the id and the data of each event, each with a NUL behind it.
#
#   curl.sh URL [CURL-OPTION ...]
url=$1
shift
show() { printf '%s\0%s\0%s\0' "$kind" "$id" "$data"; }

# docs: curl
id='' retry=2000
while :; do
  kind=message next=$id data='' lines=0
  while IFS= read -r line; do
    case $line in
      'data: '*) data+=${line#data: }$'\n' lines=$((lines + 1)) ;;
      'event: '*) kind=${line#event: } ;;
      'id: '*) next=${line#id: } ;;
      'retry: '*) retry=${line#retry: } ;;
      '')
        id=$next data=${data%$'\n'}
        if [ "$lines" -gt 0 ]; then show; fi
        kind=message data='' lines=0
        ;;
    esac
  done < <(curl -sN "$@" -H 'Accept: text/event-stream' ${id:+-H "Last-Event-ID: $id"} "$url")
  sleep "$((retry / 1000)).$(printf '%03d' $((retry % 1000)))"
done
# docs end
