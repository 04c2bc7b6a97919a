#!/usr/bin/env bash
# Try a graph that runs on Kubernetes: ./test.sh multinode-vllm
set -euo pipefail

HERE=$(cd "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")" && pwd)
# shellcheck source=common.sh
. "$HERE/common.sh"

usage() {
  cat <<'TEXT'
Usage: ./test.sh [OPTION...] [GRAPH]

Tries a graph (default: multinode-vllm) through kubectl port-forward: its health, a chat, and a second turn whose
answer is in the first. Ends with 0 when all of it worked. It takes kubectl, curl and jq.

  -n, --namespace NAME      where the graph is (default: $NAMESPACE, else dynamo-cloud)
      --model MODEL         which to ask (default: the first that the graph serves)
  -h, --help
TEXT
}

NAMESPACE=${NAMESPACE:-$DEFAULT_NAMESPACE}
GRAPH="" MODEL="" FORWARD_PID="" FORWARD_LOG=""
START_S=30 ANSWER_S=120

read_options() {
  while [ $# -gt 0 ]; do
    case $1 in
      -n | --namespace) NAMESPACE=$(value_of "$1" "$@"); shift ;;
      --model) MODEL=$(value_of "$1" "$@"); shift ;;
      -h | --help) usage && exit 0 ;;
      -*) wrong_usage "$1: no such option" ;;
      *) [ -z "$GRAPH" ] || wrong_usage "one graph at a time: $GRAPH, $1" && GRAPH=$1 ;;
    esac
    shift
  done
  GRAPH=${GRAPH:-multinode-vllm}
  check_name --namespace "$NAMESPACE"
  check_name GRAPH "$GRAPH"
}

check_tools() {
  local tool
  for tool in kubectl curl jq; do
    command -v "$tool" >/dev/null 2>&1 || fail "$tool is not installed, or not on PATH."
  done
}

# The frontend's Service is named by its key in the manifest, which need not be Frontend.
frontend_service() {
  local found
  found=$(kubectl get services -n "$NAMESPACE" -l "nvidia.com/dynamo-graph-deployment-name=$GRAPH" \
    -o jsonpath='{range .items[?(@.spec.ports[0].name=="http")]}{.metadata.name}{"\n"}{end}' 2>&1) ||
    fail "no cluster answers." "$found"
  SERVICE=$(head -n 1 <<<"$found")
  [ -n "$SERVICE" ] || fail "there is no frontend of a graph $GRAPH in $NAMESPACE." \
    "kubectl get dynamographdeployments --all-namespaces"
}

# A port of this machine that is free, which kubectl chooses and prints.
forward() {
  FORWARD_LOG=$(mktemp)
  trap stop_forwarding EXIT
  kubectl port-forward "svc/$SERVICE" :http -n "$NAMESPACE" >"$FORWARD_LOG" 2>&1 &
  FORWARD_PID=$!
  local port="" deadline=$((SECONDS + START_S))
  until port=$(sed -n 's/^Forwarding from 127\.0\.0\.1:\([0-9]*\) .*/\1/p' "$FORWARD_LOG" | head -n 1) && [ -n "$port" ]; do
    kill -0 "$FORWARD_PID" 2>/dev/null && [ $SECONDS -lt $deadline ] ||
      fail "kubectl port-forward svc/$SERVICE does not get through." "$(cat "$FORWARD_LOG")" \
        "Is a frontend ready? kubectl get pods -n $NAMESPACE -l app=$GRAPH"
    sleep 0.2
  done
  URL=http://127.0.0.1:$port
}

stop_forwarding() {
  [ -z "$FORWARD_PID" ] || kill "$FORWARD_PID" 2>/dev/null || true
  rm -f "$FORWARD_LOG"
}

check_health() {
  step "Health"
  local answer
  answer=$(curl --silent --show-error --max-time "$START_S" "$URL/health" 2>&1) || fail "no answer." "$answer"
  jq -r '"\(.status)", (.instances[]? | "  \(.role) \(.instance_id): \(.state) \(.reason)")' <<<"$answer" 2>/dev/null || say "$answer"
  [ "$(jq -r .status <<<"$answer" 2>/dev/null)" = healthy ] ||
    fail "not healthy: a role has no worker that is ready." "kubectl get pods -n $NAMESPACE -l app=$GRAPH"
  [ -n "$MODEL" ] || MODEL=$(curl --silent --max-time "$START_S" "$URL/v1/models" | jq -r '.data[0].id // empty')
  [ -n "$MODEL" ] || fail "the graph serves no model."
  say "model: $MODEL"
}

chat() { # MAX_TOKENS MESSAGES...: the text of the answer, in ANSWER
  local body answer
  body=$(jq -n --arg model "$MODEL" --argjson most "$1" --argjson messages "$2" \
    '{model: $model, messages: $messages, max_tokens: $most, temperature: 0}')
  answer=$(curl --silent --show-error --max-time "$ANSWER_S" -H 'Content-Type: application/json' \
    -d "$body" "$URL/v1/chat/completions" 2>&1) || fail "no answer." "$answer"
  ANSWER=$(jq -er '.choices[0].message | .content // .reasoning // empty' <<<"$answer" 2>/dev/null) ||
    fail "the frontend did not answer with a text:" "$answer"
  say "$ANSWER"
}

check_chats() {
  step "A chat"
  chat 200 '[{"role": "system", "content": "You are a helpful assistant."},
    {"role": "user", "content": "Explain disaggregated serving benefits"}]'
  step "A second turn: who am I?"
  chat 50 '[{"role": "system", "content": "You are a helpful assistant."},
    {"role": "user", "content": "My name is Alice."},
    {"role": "assistant", "content": "Hello Alice! Nice to meet you."},
    {"role": "user", "content": "What is my name?"}]'
  case $ANSWER in
    *Alice*) ;;
    *) fail "the answer does not say Alice." \
      "A model that thinks aloud may need more tokens; with --engine sim, answers have no sense." ;;
  esac
}

read_options "$@"
check_tools
frontend_service
forward
check_health
check_chats
step "PASSED: $GRAPH in $NAMESPACE is healthy and answers."
