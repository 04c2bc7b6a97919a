{{- define "penstock.name" -}}penstock-operator{{- end }}

{{- define "penstock.serviceAccount" -}}
{{ .Values.serviceAccount.name | default "penstock-operator" }}
{{- end }}

{{- /* Names of objects that belong to no namespace: one installation per namespace must not touch another's. */}}
{{- define "penstock.clusterName" -}}
{{ .Release.Namespace }}-penstock-operator
{{- end }}

{{- define "penstock.selector" -}}
app.kubernetes.io/name: penstock-operator
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end }}

{{- define "penstock.labels" -}}
{{ include "penstock.selector" . }}
app.kubernetes.io/part-of: penstock
app.kubernetes.io/managed-by: {{ .Release.Service }}
{{- end }}

{{- /* What the operator does with the objects of graphs, in a namespace or in all of them. */}}
{{- define "penstock.rules" -}}
- apiGroups: [nvidia.com]
  resources: [dynamographdeployments]
  verbs: [get, list, watch]
- apiGroups: [nvidia.com]
  resources: [dynamographdeploymentscalingadapters]
  verbs: [get, list, watch, create, patch, delete]
- apiGroups: [nvidia.com]
  resources: [dynamographdeployments/status, dynamographdeploymentscalingadapters/status]
  verbs: [patch]
# To be named as the owner of objects where the cluster checks that.
- apiGroups: [nvidia.com]
  resources: [dynamographdeployments/finalizers, dynamographdeploymentscalingadapters/finalizers]
  verbs: [update]
- apiGroups: [apps]
  resources: [deployments]
  verbs: [get, list, watch, create, patch, delete]
- apiGroups: [""]
  resources: [services, serviceaccounts, secrets, persistentvolumeclaims]
  verbs: [get, list, watch, create, patch, delete]
- apiGroups: [networking.k8s.io]
  resources: [ingresses]
  verbs: [get, list, watch, create, patch, delete]
- apiGroups: [policy]
  resources: [poddisruptionbudgets]
  verbs: [get, list, watch, create, patch, delete]
- apiGroups: [leaderworkerset.x-k8s.io]
  resources: [leaderworkersets]
  verbs: [get, list, watch, create, patch, delete]
# Frontends may watch the pods of their graph, and log relays read their logs. Nobody can give what they do not
# have: hence the operator may do both.
- apiGroups: [rbac.authorization.k8s.io]
  resources: [roles, rolebindings]
  verbs: [get, list, watch, create, patch, delete]
- apiGroups: [""]
  resources: [pods/log]
  verbs: [get]
# patch: idle pods are marked to be the first that a smaller Deployment gives up.
- apiGroups: [""]
  resources: [pods]
  verbs: [get, list, watch, patch]
- apiGroups: [""]
  resources: [events]
  verbs: [create]
{{- end }}
