#!/bin/sh
# A graph across hosts, without a launcher: plain commands, a folder that all hosts see, and a secret.
#
#   PENSTOCK=.venv/bin/penstock sh examples/several_hosts.sh
#
# To be seen at work, everything runs on this machine here. On real hosts, run each `penstock` line on its own
# one, let FOLDER be a shared folder (NFS) or PENSTOCK_DISCOVERY be an etcd (etcd://10.0.0.1:2379), and say where
# the others reach a worker: `--host 0.0.0.0 --advertise-host 10.0.0.11`.
set -eu

PENSTOCK=${PENSTOCK:-penstock}
MODEL=${MODEL:-models/tiny}
PORT=${PORT:-8000}
READY_S=60

FOLDER=$(mktemp -d)
export PENSTOCK_DISCOVERY="file:$FOLDER/discovery"
export PENSTOCK_LINK_SECRET_FILE="$FOLDER/secret"
(umask 077 && head -c 32 /dev/urandom | od -An -tx1 | tr -d ' \n' > "$FOLDER/secret")

pids=""
stop() {
    kill $pids 2> /dev/null || true
    wait
    rm -rf "$FOLDER"
}
trap stop EXIT INT TERM

$PENSTOCK worker --role prefill --model "$MODEL" > "$FOLDER/prefill.log" 2>&1 &    # host 1
pids="$pids $!"
$PENSTOCK worker --role decode --model "$MODEL" > "$FOLDER/decode.log" 2>&1 &      # host 2
pids="$pids $!"
# Any number of frontends, on any hosts: they share nothing with each other.
$PENSTOCK frontend --http-port "$PORT" --expect prefill,decode --disagg always > "$FOLDER/frontend.log" 2>&1 &
pids="$pids $!"

waited=0
until curl -sf "http://127.0.0.1:$PORT/health" > /dev/null; do
    waited=$((waited + 1))
    if [ "$waited" -gt "$READY_S" ]; then
        echo "not healthy after $READY_S s:" >&2
        tail -n 5 "$FOLDER"/*.log >&2
        exit 1
    fi
    sleep 1
done

$PENSTOCK chat --url "http://127.0.0.1:$PORT" "My name is Alice. What is my name?"
grep "KV transfer done" "$FOLDER/decode.log"
