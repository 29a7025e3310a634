{{- define "lockstep.selector" -}}
app.kubernetes.io/name: lockstep
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end }}

{{- define "lockstep.labels" -}}
{{ include "lockstep.selector" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version }}
{{- end }}

{{- define "lockstep.name" -}}
{{- if contains "lockstep" .Release.Name }}{{ .Release.Name }}{{ else }}{{ printf "%s-lockstep" .Release.Name | trunc 63 }}{{ end }}
{{- end }}

{{/* The given limits, and a GPU for each shard. */}}
{{- define "lockstep.limits" -}}
{{- $limits := deepCopy (.Values.resources.limits | default dict) }}
{{- if eq .Values.device "cuda" }}{{- $_ := set $limits "nvidia.com/gpu" (int .Values.worldSize) }}{{- end }}
{{- if $limits }}{{ toYaml $limits }}{{- end }}
{{- end }}
