#!/usr/bin/env bash
# Deploy a graph to Kubernetes, with all that it needs: ./deploy.sh multinode-vllm
set -euo pipefail

HERE=$(cd "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")" && pwd)
# shellcheck source=common.sh
. "$HERE/common.sh"

usage() {
  cat <<'TEXT'
Usage: ./deploy.sh [OPTION...] [GRAPH]

Deploys a graph: GRAPH.yaml or GRAPH/GRAPH.yaml of this folder, or the path of any manifest. Checks the cluster,
says what is missing (namespace, CRDs, operator, the token for Hugging Face), installs it, applies the graph and
waits until it is ready. Without GRAPH, asks for one.

  -n, --namespace NAME      where (default: $NAMESPACE, else dynamo-cloud)
      --engine ENGINE       run the workers with this engine: reference (on CPUs), sim (no model), vllm
      --model MODEL         run the workers with this model; /models/tiny is in Penstock's images
      --image IMAGE         for graphs that name no image of Penstock's (default: $PENSTOCK_IMAGE, else
                            penstock-vllm:latest); counts when the operator is installed
      --operator-image IMAGE    (default: $PENSTOCK_OPERATOR_IMAGE, else penstock:latest)
      --cluster-wide        install an operator for the graphs of all namespaces
      --upgrade             apply operator and CRDs of this folder although they are installed
      --no-wait             do not wait until the graph is ready
      --timeout SECONDS     how long to wait for the graph (default: 1800)
      --dry-run             say what would be done, and change nothing
  -h, --help

HF_TOKEN in the environment, which may be empty, becomes the Secret hf-token-secret where a graph names that and it
is not there.
TEXT
}

NAMESPACE=${NAMESPACE:-$DEFAULT_NAMESPACE}
GRAPH_IMAGE=${PENSTOCK_IMAGE:-penstock-vllm:latest}
OPERATOR_IMAGE=${PENSTOCK_OPERATOR_IMAGE:-penstock:latest}
ENGINE="" MODEL="" SCOPE=namespaced UPGRADE=no WAIT=yes TIMEOUT_S=1800 DRY_RUN=no GRAPH=""
TOKEN_SECRET=hf-token-secret

read_options() {
  while [ $# -gt 0 ]; do
    case $1 in
      -n | --namespace) NAMESPACE=$(value_of "$1" "$@"); shift ;;
      --engine) ENGINE=$(value_of "$1" "$@"); shift ;;
      --model) MODEL=$(value_of "$1" "$@"); shift ;;
      --image) GRAPH_IMAGE=$(value_of "$1" "$@"); shift ;;
      --operator-image) OPERATOR_IMAGE=$(value_of "$1" "$@"); shift ;;
      --timeout) TIMEOUT_S=$(value_of "$1" "$@"); shift ;;
      --cluster-wide) SCOPE=cluster-wide ;;
      --upgrade) UPGRADE=yes ;;
      --no-wait) WAIT=no ;;
      --dry-run) DRY_RUN=yes ;;
      -h | --help) usage && exit 0 ;;
      -*) wrong_usage "$1: no such option" ;;
      *) [ -z "$GRAPH" ] || wrong_usage "one graph at a time: $GRAPH, $1" && GRAPH=$1 ;;
    esac
    shift
  done
  check_name --namespace "$NAMESPACE"
  check_image --image "$GRAPH_IMAGE"
  check_image --operator-image "$OPERATOR_IMAGE"
  [[ $TIMEOUT_S =~ ^[1-9][0-9]*$ ]] || wrong_usage "--timeout: '$TIMEOUT_S' is no number of seconds"
}

graph_files() { grep -l '^kind: DynamoGraphDeployment$' "$HERE"/*.yaml; }

choose_graph() {
  [ -t 0 ] || wrong_usage "which graph? One of: $(graph_files | xargs -n1 basename | sed 's/\.yaml$//' | paste -sd' ' -)"
  local file answer
  say "Which graph?"
  local files=()
  while read -r file; do
    files+=("$file")
    printf '  %d) %-18s %s\n' "${#files[@]}" "$(basename "$file" .yaml)" "$(sed -n '1s/^# //p' "$file")"
  done < <(graph_files)
  read -r -p "Number: " answer
  [[ $answer =~ ^[1-9][0-9]*$ ]] && [ "$answer" -le ${#files[@]} ] || fail "there is no number '$answer'."
  GRAPH=$(basename "${files[answer - 1]}" .yaml)
}

find_manifest() {
  local candidate
  for candidate in "$HERE/$GRAPH/$GRAPH.yaml" "$HERE/$GRAPH.yaml" "$GRAPH"; do
    if [ -f "$candidate" ]; then
      MANIFEST=$candidate
      return
    fi
  done
  fail "there is no graph '$GRAPH'." "In $HERE: $(graph_files | xargs -n1 basename | sed 's/\.yaml$//' | paste -sd' ' -)" \
    "or the path of a manifest."
}

# Where the operator is, or will be: one that looks after all namespaces may be in another one.
find_operator() {
  local found
  found=$(kubectl get deployments --all-namespaces -l app.kubernetes.io/name=$OPERATOR \
    -o jsonpath='{range .items[*]}{.metadata.namespace}{" "}{.spec.template.spec.containers[0].args}{"\n"}{end}' \
    2>/dev/null) || true
  # Behind --watch-namespace, all namespaces are the empty one.
  OPERATOR_NAMESPACE=$(sed -n 's/^\([^ ]*\) .*"--watch-namespace","".*/\1/p' <<<"$found" | head -n 1)
  if [ -n "$OPERATOR_NAMESPACE" ]; then
    SCOPE=cluster-wide
  else
    OPERATOR_NAMESPACE=$NAMESPACE
  fi
}

# What is missing goes to TODO, for all to see before anything is changed.
look_around() {
  step "What is there"
  check_cluster
  say "namespace: $NAMESPACE"
  say "graph:     $MANIFEST"
  TODO=()
  exists namespace "$NAMESPACE" || TODO+=(namespace)
  check_crds
  find_operator
  if ! exists deployment "$OPERATOR" -n "$OPERATOR_NAMESPACE" || [ "$UPGRADE" = yes ]; then
    TODO+=(operator)
  fi
  if ! exists networkpolicy penstock-graphs -n "$NAMESPACE" || [ "$UPGRADE" = yes ]; then
    TODO+=(network-policies)
  fi
  check_secrets
  [ ${#TODO[@]} -gt 0 ] || say "Nothing is missing."
}

check_crds() {
  local kind owner release
  for kind in "${GROUP_KINDS[@]}"; do
    if ! owner=$(kubectl get crd "$kind" -o jsonpath="$CRD_OWNER" 2>/dev/null); then
      TODO+=("crd/$kind")
    elif [ "$owner" != penstock ]; then
      release=$(kubectl get crd "$kind" -o jsonpath='{.metadata.annotations.meta\.helm\.sh/release-name}')
      fail "the kind $kind is in this cluster already, and is not Penstock's${release:+ but of the Helm release $release}." \
        "Two operators must not run the same graphs. If the other one and its graphs are gone for good:" \
        "kubectl delete crd $kind"
    elif [ "$UPGRADE" = yes ]; then
      TODO+=("crd/$kind")
    fi
  done
}

check_secrets() {
  local secret
  while read -r secret; do
    exists secret "$secret" -n "$NAMESPACE" || check_missing_secret "$secret"
  done < <(sed -n 's/^ *envFromSecret: *"\{0,1\}\([a-z0-9.-]*\)"\{0,1\} *$/\1/p' "$MANIFEST" | sort -u)
}

check_missing_secret() {
  [ "$1" = "$TOKEN_SECRET" ] ||
    fail "the graph takes environment variables from the Secret $1, which is not in $NAMESPACE." \
      "Make it: kubectl create secret generic $1 --from-literal=NAME=VALUE -n $NAMESPACE"
  # Only vLLM downloads models.
  if [ -n "${HF_TOKEN+set}" ] || { [ -n "$ENGINE" ] && [ "$ENGINE" != vllm ]; }; then
    TODO+=("secret/$1")
    return
  fi
  fail "the graph takes its Hugging Face token from the Secret $1, which is not in $NAMESPACE." \
    "Give the token:  HF_TOKEN=hf_... ./deploy.sh $GRAPH" \
    "Without one (for models that anybody may download):  HF_TOKEN= ./deploy.sh $GRAPH"
}

install_missing() {
  [ ${#TODO[@]} -gt 0 ] || return 0
  step "Installing what is missing"
  local item
  for item in "${TODO[@]}"; do say "  $item"; done
  for item in "${TODO[@]}"; do
    case $item in
      namespace)
        change kubectl create namespace "$NAMESPACE"
        change kubectl label namespace "$NAMESPACE" "$MADE_HERE"
        ;;
      crd/*)
        change apply_crd "${item#crd/}"
        change kubectl wait --for=condition=Established "$item" --timeout=60s
        ;;
      secret/*) make_secret ;;
      operator) install_operator ;;
      network-policies) change kubectl apply -n "$NAMESPACE" -f "$HERE/kubernetes/network-policies/policies.yaml" ;;
    esac
  done
}

make_secret() {
  if [ "$DRY_RUN" = yes ]; then
    say "would make the Secret $TOKEN_SECRET in $NAMESPACE, with HF_TOKEN ${HF_TOKEN:+of the environment}"
    return
  fi
  # Not as an argument, where everybody on this machine could read it.
  kubectl create secret generic "$TOKEN_SECRET" -n "$NAMESPACE" \
    --from-env-file=<(printf 'HF_TOKEN=%s\n' "${HF_TOKEN:-}")
  kubectl label secret "$TOKEN_SECRET" -n "$NAMESPACE" "$MADE_HERE"
}

# The manifest of deploy/kubernetes with this namespace and these images.
operator_manifest() {
  sed -e "s|dynamo-cloud|$OPERATOR_NAMESPACE|" -e "s|image: penstock:latest|image: $OPERATOR_IMAGE|" \
    -e "s|value: penstock-vllm:latest|value: $GRAPH_IMAGE|" "$HERE/kubernetes/$SCOPE/operator.yaml"
}

install_operator() {
  if [ "$DRY_RUN" = yes ]; then
    say "would apply to $OPERATOR_NAMESPACE, with the image $OPERATOR_IMAGE, $GRAPH_IMAGE for graphs:"
    operator_manifest | sed -n 's/^kind: /  /p' | sort | uniq -c
    return
  fi
  operator_manifest | kubectl apply -n "$OPERATOR_NAMESPACE" -f -
  kubectl rollout status "deployment/$OPERATOR" -n "$OPERATOR_NAMESPACE" --timeout=180s || operator_fails
}

operator_fails() {
  kubectl get pods -n "$OPERATOR_NAMESPACE" -l app.kubernetes.io/name=$OPERATOR || true
  kubectl logs -n "$OPERATOR_NAMESPACE" "deployment/$OPERATOR" --tail=20 || true
  fail "the operator does not start." "Can nodes pull $OPERATOR_IMAGE? deploy/docker has its Dockerfile." \
    "kubectl describe pods -n $OPERATOR_NAMESPACE -l app.kubernetes.io/name=$OPERATOR"
}

apply_graph() {
  step "Applying the graph"
  local said
  if [ "$DRY_RUN" = yes ]; then
    say "would run: kubectl apply -f $MANIFEST -n $NAMESPACE"
    [ -z "$ENGINE$MODEL" ] || say "with the annotations penstock.dev/engine=$ENGINE penstock.dev/model=$MODEL"
    return
  fi
  # Annotated before it is applied, so that no pod starts without.
  local annotations=()
  [ -z "$ENGINE" ] || annotations+=("penstock.dev/engine=$ENGINE")
  [ -z "$MODEL" ] || annotations+=("penstock.dev/model=$MODEL")
  if [ ${#annotations[@]} -gt 0 ]; then
    said=$(kubectl annotate --local --overwrite -f "$MANIFEST" -o yaml "${annotations[@]}" |
      kubectl apply -n "$NAMESPACE" -f - 2>&1) || refused "$said"
  else
    said=$(kubectl apply -f "$MANIFEST" -n "$NAMESPACE" 2>&1) || refused "$said"
  fi
  say "$said"
  NAME=$(sed -n 's|^dynamographdeployment.nvidia.com/\([^ ]*\) .*|\1|p' <<<"$said" | head -n 1)
  [ -n "$NAME" ] || fail "there is no DynamoGraphDeployment in $MANIFEST."
}

refused() { fail "the cluster does not take the graph." "$1"; }

wait_until_ready() {
  [ "$WAIT" = yes ] || return 0
  step "Waiting for $NAME, $TIMEOUT_S s at most (Ctrl-C leaves it running)"
  local deadline=$((SECONDS + TIMEOUT_S)) told="" state generation
  while [ $SECONDS -lt $deadline ]; do
    generation=$(field '{.metadata.generation}')
    state=$(field '{.status.observedGeneration} {.status.state} {.status.conditions[?(@.type=="Ready")].message}')
    if [ "$state" != "$told" ]; then
      told=$state
      [ "$state" != "  " ] || state="- the operator has not looked at it yet"
      say "  ${state#* }"
    fi
    case $state in
      "$generation successful"*) return 0 ;;
      "$generation failed"*) not_ready "${state#"$generation failed "}" ;;
    esac
    sleep 2
  done
  not_ready "still not ready after $TIMEOUT_S s"
}

field() { kubectl get dynamographdeployment "$NAME" -n "$NAMESPACE" -o jsonpath="$1" 2>/dev/null || true; }

not_ready() {
  kubectl get pods -n "$NAMESPACE" -l "app=$NAME" || true
  kubectl get events -n "$NAMESPACE" --sort-by=.lastTimestamp 2>/dev/null | tail -n 15 || true
  fail "$NAME is not ready: $1" "kubectl describe dynamographdeployment $NAME -n $NAMESPACE" \
    "kubectl logs -n $NAMESPACE -l app=$NAME --prefix --tail=20" \
    "docs/kubernetes.md has a table of what goes wrong, and what to do."
}

tell_the_end() {
  if [ "$DRY_RUN" = yes ]; then
    step "Nothing was changed: --dry-run"
    return
  fi
  step "What runs"
  kubectl get dynamographdeployment "$NAME" -n "$NAMESPACE"
  kubectl get pods -n "$NAMESPACE" -l "app=$NAME" --show-labels
  if [ "$WAIT" = yes ]; then step "READY: $NAME in $NAMESPACE. Next:"; else step "Applied: $NAME in $NAMESPACE. Next:"; fi
  cat <<TEXT
  kubectl port-forward svc/$NAME-frontend 8000:8000 -n $NAMESPACE     # in another terminal
  curl http://localhost:8000/health
  $HERE/test.sh -n $NAMESPACE $NAME                  # health, a chat, a second turn
  kubectl logs -n $NAMESPACE -l app=$NAME,role=prefill -f
  kubectl patch dynamographdeployment $NAME -n $NAMESPACE --type merge -p '{"spec":{"services":{"PrefillWorker":{"replicas":3}}}}'
  $HERE/cleanup.sh -n $NAMESPACE $NAME               # remove the graph
TEXT
}

read_options "$@"
[ -n "$GRAPH" ] || choose_graph
find_manifest
look_around
install_missing
apply_graph
[ "$DRY_RUN" = yes ] || wait_until_ready
tell_the_end
