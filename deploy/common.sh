# What deploy.sh, test.sh and cleanup.sh have in common. They read this file; it does nothing by itself.
# shellcheck shell=bash

GROUP_KINDS=(dynamographdeployments.nvidia.com dynamographdeploymentscalingadapters.nvidia.com)
# Penstock's CRDs have the label part-of=penstock; Dynamo's own have not.
CRD_OWNER='{.metadata.labels.app\.kubernetes\.io/part-of}'
DEFAULT_NAMESPACE=dynamo-cloud
OPERATOR=penstock-operator
# On what these scripts make besides the operator: the token's Secret, the namespace. cleanup.sh goes by it.
MADE_HERE=penstock.dev/made-by=deploy.sh

say() { printf '%s\n' "$*"; }
step() { printf '\n== %s\n' "$*"; }
fail() {
  printf '\nFAILED: %s\n' "$1" >&2
  shift
  [ $# -eq 0 ] || printf '  %s\n' "$@" >&2
  exit 1
}
wrong_usage() {
  printf '%s: %s (--help tells what there is)\n' "${0##*/}" "$1" >&2
  exit 2
}

# The value of an option: `value_of --image "$@"`.
value_of() {
  [ $# -ge 3 ] && [ -n "$3" ] || wrong_usage "$1 takes a value"
  printf '%s' "$3"
}

# A command that changes the cluster: run, or only shown with --dry-run.
change() {
  if [ "$DRY_RUN" = yes ]; then
    say "would run: $*"
  else
    "$@"
  fi
}

exists() { kubectl get "$@" -o name >/dev/null 2>&1; }

check_name() {
  [[ $2 =~ ^[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?$ ]] ||
    wrong_usage "$1: '$2' is no name for that: a-z, 0-9 and - only, 63 at most"
}

check_image() {
  [[ $2 =~ ^[A-Za-z0-9][A-Za-z0-9._/:@-]*$ ]] || wrong_usage "$1: '$2' is no name of an image"
}

# On the server: kinds are too large for the annotation that the client would make. Without what it says of
# conversion, which is the operator's to say.
apply_crd() {
  sed '/^  conversion:$/,/^    strategy: None$/d' "$HERE/crds/nvidia.com_${1%%.*}.yaml" |
    kubectl apply --server-side --force-conflicts -f -
}

check_cluster() {
  command -v kubectl >/dev/null 2>&1 || fail "kubectl is not installed, or not on PATH."
  local answer
  answer=$(kubectl get --raw /version --request-timeout=15s 2>&1) ||
    fail "no cluster answers." "$answer" \
      "Which one is asked: kubectl config current-context. On EKS: aws eks update-kubeconfig --name CLUSTER"
  say "cluster:   $(kubectl config current-context 2>/dev/null || say "in this pod")," \
    "Kubernetes $(sed -n 's/.*"gitVersion": *"\([^"]*\)".*/\1/p' <<<"$answer")"
}
