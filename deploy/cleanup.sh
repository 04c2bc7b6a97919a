#!/usr/bin/env bash
# Remove what deploy.sh installed: ./cleanup.sh multinode-vllm, or all of it: ./cleanup.sh --all
set -euo pipefail

HERE=$(cd "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")" && pwd)
# shellcheck source=common.sh
. "$HERE/common.sh"

usage() {
  cat <<'TEXT'
Usage: ./cleanup.sh [OPTION...] [GRAPH...]

  ./cleanup.sh GRAPH...     removes these graphs
  ./cleanup.sh              removes all graphs of the namespace
  ./cleanup.sh --operator   all graphs of the namespace, and the operator in it with its roles and policies
  ./cleanup.sh --all        that; the CRDs, and with them the graphs of all namespaces; the Secret and the
                            namespace, if deploy.sh made them. Nothing is left

  -n, --namespace NAME      where (default: $NAMESPACE, else dynamo-cloud)
      --other-namespaces    with --all: also when other namespaces have graphs, which go, too
  -y, --yes                 do not ask
      --dry-run             say what would be removed, and change nothing
  -h, --help
TEXT
}

NAMESPACE=${NAMESPACE:-$DEFAULT_NAMESPACE}
SCOPE=graphs OTHER_NAMESPACES=no DRY_RUN=no YES=no GRAPHS=()
GONE_S=600

read_options() {
  while [ $# -gt 0 ]; do
    case $1 in
      -n | --namespace) NAMESPACE=$(value_of "$1" "$@"); shift ;;
      --operator) SCOPE=operator ;;
      --all) SCOPE=all ;;
      --other-namespaces) OTHER_NAMESPACES=yes ;;
      -y | --yes) YES=yes ;;
      --dry-run) DRY_RUN=yes ;;
      -h | --help) usage && exit 0 ;;
      -*) wrong_usage "$1: no such option" ;;
      *) check_name GRAPH "$1" && GRAPHS+=("$1") ;;
    esac
    shift
  done
  check_name --namespace "$NAMESPACE"
  [ ${#GRAPHS[@]} -eq 0 ] || [ "$SCOPE" = graphs ] || wrong_usage "--$SCOPE is for all graphs: name none"
}

graphs_in() { # "NAMESPACE NAME" lines; arguments as for kubectl get
  kubectl get "${GROUP_KINDS[0]}" "$@" --ignore-not-found \
    -o jsonpath='{range .items[*]}{.metadata.namespace}{" "}{.metadata.name}{"\n"}{end}' 2>/dev/null || true
}

made_here() { exists "$1" "$2" "${@:3}" && [ -n "$(kubectl get "$1" "$2" "${@:3}" -o jsonpath='{.metadata.labels.penstock\.dev/made-by}')" ]; }

look_around() {
  step "What will be removed"
  check_cluster
  local name
  if [ ${#GRAPHS[@]} -eq 0 ]; then
    while read -r _ name; do
      [ -z "$name" ] || GRAPHS+=("$name")
    done < <(graphs_in -n "$NAMESPACE")
  fi
  for name in ${GRAPHS[@]+"${GRAPHS[@]}"}; do say "  graph $name of $NAMESPACE, with its pods, Services and Secrets"; done
  [ "$SCOPE" = graphs ] || say "  the operator in $NAMESPACE, its roles and NetworkPolicies"
  if [ "$SCOPE" = all ]; then
    say "  the kinds ${GROUP_KINDS[*]}"
    check_kinds
    ! made_here secret hf-token-secret -n "$NAMESPACE" || say "  the Secret hf-token-secret of $NAMESPACE"
    ! made_here namespace "$NAMESPACE" || say "  the namespace $NAMESPACE, and all that is in it"
  fi
}

# Before anything is removed: a kind takes the graphs of all namespaces with it.
check_kinds() {
  local kind others
  for kind in "${GROUP_KINDS[@]}"; do
    if exists crd "$kind" && [ "$(kubectl get crd "$kind" -o jsonpath="$CRD_OWNER")" != penstock ]; then
      fail "the kind $kind is not Penstock's, so --all is not for this cluster. Nothing was removed."
    fi
  done
  others=$(graphs_in --all-namespaces | { grep -v "^$NAMESPACE " || true; } | sed 's/\(.*\) \(.*\)/  graph \2 of \1/')
  if [ -n "$others" ] && [ "$OTHER_NAMESPACES" = no ]; then
    fail "other namespaces have graphs, which --all would remove, too. Nothing was removed." "$others" \
      "Remove them first, or say --other-namespaces."
  fi
  say "$others"
}

ask() {
  if [ "$YES" = yes ] || [ "$DRY_RUN" = yes ]; then
    return
  fi
  [ -t 0 ] || wrong_usage "say --yes to remove it"
  local answer
  read -r -p "Remove it? [y/N] " answer
  [[ $answer =~ ^[yY] ]] || fail "nothing was removed."
}

# While the operator still runs, so that it sees them go. Pods finish their requests first.
remove_graphs() {
  local name
  for name in ${GRAPHS[@]+"${GRAPHS[@]}"}; do
    step "Removing the graph $name"
    change kubectl delete "${GROUP_KINDS[0]}" "$name" -n "$NAMESPACE" --ignore-not-found --timeout="${GONE_S}s"
    [ "$DRY_RUN" = yes ] || wait_for_pods "nvidia.com/dynamo-graph-deployment-name=$name" -n "$NAMESPACE"
  done
}

wait_for_pods() { # LABEL, then where, as for kubectl get
  local deadline=$((SECONDS + GONE_S)) left
  while left=$(kubectl get pods -l "$@" -o name 2>/dev/null) && [ -n "$left" ]; do
    [ $SECONDS -lt $deadline ] || fail "pods are still there after $GONE_S s:" "$left"
    sleep 1
  done
}

remove_operator() {
  step "Removing the operator"
  local mine="app.kubernetes.io/name=$OPERATOR,app.kubernetes.io/instance=penstock"
  if exists deployment "$OPERATOR" -n "$NAMESPACE"; then
    change kubectl scale deployment "$OPERATOR" -n "$NAMESPACE" --replicas=0
    [ "$DRY_RUN" = yes ] || wait_for_pods "app.kubernetes.io/name=$OPERATOR" -n "$NAMESPACE"
  fi
  end_conversion
  change kubectl delete deployments,services,networkpolicies,serviceaccounts,roles,rolebindings \
    -n "$NAMESPACE" -l "$mine" --ignore-not-found
  change kubectl delete clusterroles,clusterrolebindings --ignore-not-found \
    "$NAMESPACE-$OPERATOR" "$NAMESPACE-$OPERATOR-crds"
  # Made by the operator itself, and left for the next one.
  change kubectl delete lease "$OPERATOR" -n "$NAMESPACE" --ignore-not-found
  change kubectl delete secret "$OPERATOR-webhook" -n "$NAMESPACE" --ignore-not-found
}

# A kind that is converted by a webhook that is gone cannot be read, and the cluster's garbage collector waits for
# it: nothing at all that has an owner would be deleted.
end_conversion() {
  local kind=${GROUP_KINDS[0]} webhook
  webhook=$(kubectl get crd "$kind" -o jsonpath='{.spec.conversion.webhook.clientConfig.service.namespace}' 2>/dev/null) || return 0
  [ "$webhook" = "$NAMESPACE" ] || return 0
  change kubectl patch crd "$kind" --type merge -p '{"spec":{"conversion":{"strategy":"None","webhook":null}}}'
  # Which serves only the version that is stored.
  change apply_crd "$kind"
}

remove_the_rest() {
  step "Removing the kinds, and what deploy.sh made"
  local kind
  for kind in "${GROUP_KINDS[@]}"; do
    if ! exists crd "$kind"; then
      continue
    fi
    change kubectl delete crd "$kind" --timeout="${GONE_S}s"
  done
  ! made_here secret hf-token-secret -n "$NAMESPACE" || change kubectl delete secret hf-token-secret -n "$NAMESPACE"
  ! made_here namespace "$NAMESPACE" || change kubectl delete namespace "$NAMESPACE" --timeout="${GONE_S}s"
}

read_options "$@"
look_around
ask
remove_graphs
[ "$SCOPE" = graphs ] || remove_operator
[ "$SCOPE" != all ] || remove_the_rest
if [ "$DRY_RUN" = yes ]; then step "Nothing was changed: --dry-run"; else step "REMOVED."; fi
