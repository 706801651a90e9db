{{/* The reasons for what is here stand in k8s/, which the chart renders to. */}}

{{- define "leasehold.election" -}}
{{ .Values.election | default (printf "jobs/%s" .Release.Name) }}
{{- end }}

{{- define "leasehold.stopGrace" -}}
{{ .Values.stopGrace | default (get (dict "wrapper" "10s" "sidecar" "5s" "plain-sidecar" "20s") .Values.form) }}
{{- end }}

{{/* The containers' variables. */}}
{{- define "leasehold.env" -}}
{{- with .Values.leaderService.name -}}
- {name: LEASEHOLD_KUBERNETES_SERVICE, value: {{ . | quote }}}
- name: LEASEHOLD_KUBERNETES_POD_IP
  valueFrom: {fieldRef: {fieldPath: status.podIP}}
{{ end -}}
- name: LEASEHOLD_ELECTION
  value: {{ include "leasehold.election" . | quote }}
- name: LEASEHOLD_IDENTITY
  valueFrom: {fieldRef: {fieldPath: metadata.name}}
- name: LEASEHOLD_ENDPOINTS
  {{- with .Values.etcd.endpoints }}
  value: {{ join "," . | quote }}
  {{- else }}
  valueFrom: {configMapKeyRef: {name: {{ .Values.etcd.configMap | quote }}, key: endpoints}}
  {{- end }}
{{- if .Values.etcd.tlsSecret }}
- {name: LEASEHOLD_TLS_CA_FILE, value: /etc/leasehold/etcd/ca.crt}
- {name: LEASEHOLD_TLS_CERT_FILE, value: /etc/leasehold/etcd/tls.crt}
- {name: LEASEHOLD_TLS_KEY_FILE, value: /etc/leasehold/etcd/tls.key}
{{- end }}
- {name: LEASEHOLD_TTL, value: {{ .Values.ttl }}}
- {name: LEASEHOLD_STOP_GRACE, value: {{ include "leasehold.stopGrace" . }}}
{{- with .Values.lossGrace }}
- {name: LEASEHOLD_LOSS_GRACE, value: {{ . }}}
{{- end }}
- {name: LEASEHOLD_LISTEN, value: ":4040"}
- {name: LEASEHOLD_STATE_DIR, value: /var/lib/leasehold}
{{- with .Values.env }}
{{ toYaml . }}
{{- end }}
{{- end }}

{{/* The ports and probes of leasehold's container: liveness gives up after the TTL, readiness before. */}}
{{- define "leasehold.probes" -}}
{{- $ttl := trimSuffix "s" .Values.ttl | int -}}
livenessProbe:
  httpGet: {path: /livez, port: leasehold}
  periodSeconds: 10
  timeoutSeconds: 5
  failureThreshold: {{ max 3 (add 1 (div $ttl 10)) }}
readinessProbe:
  httpGet: {path: /readyz, port: leasehold}
  periodSeconds: {{ min 5 $ttl }}
  timeoutSeconds: 2
  failureThreshold: {{ min 2 (max 1 (div $ttl 5)) }}
terminationMessagePolicy: FallbackToLogsOnError
{{- end }}

{{/* leasehold's container in both forms of the sidecar. */}}
{{- define "leasehold.sidecar" -}}
- name: leasehold
  image: "{{ .Values.image.repository }}:{{ .Values.image.tag }}"
  imagePullPolicy: {{ .Values.image.pullPolicy }}
  args: [elect]
  {{- if eq .Values.form "sidecar" }}
  restartPolicy: Always
  {{- end }}
  env:
  {{- include "leasehold.env" . | nindent 2 }}
  ports:
  - {name: leasehold, containerPort: 4040}
  {{- include "leasehold.probes" . | nindent 2 }}
  resources:
    {{- toYaml .Values.sidecar.resources | nindent 4 }}
  securityContext:
    {{- toYaml .Values.securityContext | nindent 4 }}
  volumeMounts:
  {{- if .Values.etcd.tlsSecret }}
  - {name: etcd-tls, mountPath: /etc/leasehold/etcd, readOnly: true}
  {{- end }}
  - {name: state, mountPath: /var/lib/leasehold}
  {{- if .Values.leaderService.name }}
  - {name: account, mountPath: /var/run/secrets/kubernetes.io/serviceaccount, readOnly: true}
  {{- end }}
{{- end }}

{{/* Times that do not fit each other are refused. */}}
{{- define "leasehold.checkTimes" -}}
{{- $fifth := div (add (trimSuffix "s" .Values.ttl | int) 4) 5 -}}
{{- $stop := include "leasehold.stopGrace" . | trimSuffix "s" | int -}}
{{- $loss := $fifth -}}
{{- if .Values.lossGrace }}{{ $loss = trimSuffix "s" .Values.lossGrace | int }}{{ end -}}
{{- if and (ne .Values.form "wrapper") (lt $stop (int $loss)) -}}
{{- fail (printf "stopGrace: %ds is less than lossGrace (%ds): the app could still work when the next one begins" $stop $loss) -}}
{{- end -}}
{{- $need := add (max $stop $loss) $fifth 5 -}}
{{- if eq .Values.form "sidecar" }}{{ $need = add $need $loss }}{{ end -}}
{{- if lt (int .Values.terminationGracePeriodSeconds) (int $need) -}}
{{- fail (printf "terminationGracePeriodSeconds: %d is too short for these ttl, stopGrace and lossGrace: set at least %d" (int .Values.terminationGracePeriodSeconds) $need) -}}
{{- end -}}
{{- end }}

{{/*
Old and new pods in two elections would each have a leader. A rollback is not checked: Helm renders
nothing for it.
*/}}
{{- define "leasehold.checkElection" -}}
{{- $election := include "leasehold.election" . -}}
{{- range (lookup "v1" "Pod" .Release.Namespace "").items -}}
{{- $pod := . -}}
{{- $labels := .metadata.labels | default dict -}}
{{- $ended := has .status.phase (list "Succeeded" "Failed") -}}
{{- if and (eq (get $labels "app.kubernetes.io/name") $.Release.Name) (not $ended) -}}
{{- range concat (.spec.initContainers | default list) .spec.containers -}}
{{- range .env -}}
{{- if and (eq .name "LEASEHOLD_ELECTION") (ne (.value | default "") $election) -}}
{{- fail (printf "election: pod %s is in the election %s; two jobs would run at once, one of them in %s: run `kubectl scale deployment/%s --replicas=0` and wait until no pod is left" $pod.metadata.name .value $election $.Release.Name) -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- end }}
