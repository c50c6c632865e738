# Who may ask the node's server: reviews by the API server and how long they are remembered, and certificates that change on disk.

# Who may: alone, the node is configured anew.

# reviews: how many of tokens and of permissions were asked for since with_reviews; the run's whole log would take too long.
reviews() {
  local made
  made=$(tail -n "+$MARK" "$AUDIT" | jq -r 'select(.verb == "create" and .objectRef.subresource == null) | .objectRef.resource')
  echo "$(grep -cx tokenreviews <<< "$made" || true) $(grep -cx subjectaccessreviews <<< "$made" || true)"
}
# page TOKEN PATH: the status of an answer.
page() { curl -sk -m 30 -o /dev/null -w '%{http_code}' ${1:+-H "Authorization: Bearer $1"} "https://$NODE_IP:10250$2"; }
pages_are() { same "$(page "$2" "$3")" "$1"; }
# a_reader NAME: a service account that may read metrics, and one that may not (NAME-not); their tokens are $READER and $STRANGER.
a_reader() {
  k create serviceaccount reader
  k create serviceaccount stranger
  kubectl create clusterrole "$NS" --verb=get --resource=nodes/metrics
  kubectl create clusterrolebinding "$NS" --clusterrole="$NS" --serviceaccount="$NS:reader"
  READER=$(k create token reader)
  STRANGER=$(k create token stranger)
}
end_reader() { kubectl delete clusterrolebinding,clusterrole "$NS" > /dev/null; }
# with_reviews TTLS…: the node with other lifetimes of what the API server has said: token, yes, no.
with_reviews() {
  stop_node
  write_node_config
  sed -i "s/webhook: {enabled: true}/webhook: {enabled: true, cacheTTL: $1}/; s/^authorization: .*/authorization: {mode: Webhook, webhook: {cacheAuthorizedTTL: $2, cacheUnauthorizedTTL: $3}}/" "$WORK/kubelet.yaml"
  start_node
  within 30 node_ready
  MARK=$(($(wc -l < "$AUDIT") + 1))
}
without_reviews() { stop_node; write_node_config; start_node; within 30 node_ready; }
reviews_are_remembered() {
  new_namespace
  a_reader
  # As short as a loaded machine allows: all that goes by what is remembered is through before it is forgotten.
  with_reviews 30s 30s 10s
  within 30 pages_are 200 "$READER" /metrics/resource
  local before n begun=$EPOCHREALTIME
  before=$(reviews)
  for n in $(seq 20); do pages_are 200 "$READER" /metrics/resource; done
  [ $(( (${EPOCHREALTIME/./} - ${begun/./}) / 1000000 )) -lt 29 ]
  same "$(reviews)" "$before"
  sleep 31
  pages_are 200 "$READER" /metrics/resource
  same "$(reviews)" "$((${before% *} + 1)) $((${before#* } + 1))"
  # Nobody, and who may not: the no is remembered too, for its own time.
  pages_are 401 "" /metrics
  pages_are 401 "$READER-not" /metrics
  pages_are 403 "$STRANGER" /metrics
  pages_are 403 "$READER" /pods
  before=$(reviews)
  pages_are 403 "$STRANGER" /metrics
  pages_are 403 "$READER" /pods
  pages_are 401 "$READER-not" /metrics
  same "$(reviews)" "$before"
  sleep 11
  pages_are 403 "$STRANGER" /metrics
  same "$(reviews)" "${before% *} $((${before#* } + 1))"
  # What is given later is seen when the no is forgotten.
  kubectl create clusterrolebinding "$NS-2" --clusterrole="$NS" --serviceaccount="$NS:stranger"
  within 30 pages_are 200 "$STRANGER" /metrics
  kubectl delete clusterrolebinding "$NS-2"
  end_reader
  without_reviews
}
alone "what the API server says of a token and of a permission is remembered as long as configured" reviews_are_remembered

reviews_without_server() {
  new_namespace
  a_reader
  with_reviews 10m 10m 10m
  within 30 pages_are 200 "$READER" /metrics/resource
  pages_are 403 "$STRANGER" /metrics/resource
  local other
  other=$(k create token reader --duration=20m)
  stop_api_server
  pages_are 200 "$READER" /metrics/resource
  pages_are 403 "$STRANGER" /metrics/resource
  pages_are 401 "$other" /metrics/resource
  resume_api_server
  within 30 pages_are 200 "$other" /metrics/resource
  end_reader
  without_reviews
}
alone "without the API server, who was known is let in and nobody else" reviews_without_server

# Certificates that change on disk.

# a_certificate CA NAME SUBJECT [EXTENSIONS]: NAME.crt and NAME.key in $OWN, signed by CA.crt; with CA - an authority of its own.
a_certificate() {
  openssl req -newkey rsa:2048 -nodes -keyout "$OWN/$2.key" -out "$OWN/$2.csr" -subj "$3" 2> /dev/null
  if [ "$1" = - ]; then
    openssl x509 -req -in "$OWN/$2.csr" -signkey "$OWN/$2.key" -days 1 -out "$OWN/$2.crt" -extfile <(echo "basicConstraints=critical,CA:TRUE") 2> /dev/null
  else
    openssl x509 -req -in "$OWN/$2.csr" -CA "$1.crt" -CAkey "$1.key" -CAcreateserial -days 1 -out "$OWN/$2.crt" \
      -extfile <(echo "extendedKeyUsage=clientAuth,serverAuth"; echo "${4:-}") 2> /dev/null
  fi
}
served_serial() { openssl s_client -connect "$NODE_IP:10250" < /dev/null 2> /dev/null | openssl x509 -noout -serial; }
serves() { same "$(served_serial)" "$(openssl x509 -in "$1" -noout -serial)"; }
as_certified() { same "$(curl -sk -o /dev/null -w '%{http_code}' --cert "$OWN/$1.crt" --key "$OWN/$1.key" "https://$NODE_IP:10250/healthz")" "$2"; }
certificates_reload() {
  own_folder
  a_certificate - one "/CN=one"
  a_certificate - two "/CN=two"
  a_certificate "$OWN/one" client-one "/O=system:masters/CN=by-one"
  a_certificate "$OWN/two" client-two "/O=system:masters/CN=by-two"
  a_certificate "$OWN/one" serve-one "/CN=node" "subjectAltName=IP:$NODE_IP"
  a_certificate "$OWN/one" serve-two "/CN=node" "subjectAltName=IP:$NODE_IP"
  cat "$CONTROL_PLANE/pki/ca.crt" "$OWN/one.crt" > "$OWN/bundle.crt"
  cp "$OWN/serve-one.crt" "$OWN/serving.crt"
  cp "$OWN/serve-one.key" "$OWN/serving.key"
  stop_node
  write_node_config "tlsCertFile: $OWN/serving.crt" "tlsPrivateKeyFile: $OWN/serving.key"
  sed -i "s#clientCAFile: [^}]*#clientCAFile: $OWN/bundle.crt#" "$WORK/kubelet.yaml"
  start_node
  within 30 node_ready
  local pid
  pid=$(node_pid)
  within 30 serves "$OWN/serve-one.crt"
  as_certified client-one 200
  as_certified client-two 401
  # As a tool exchanges them: one file after the other.
  cp "$OWN/serve-two.key" "$OWN/serving.key"
  cp "$OWN/serve-two.crt" "$OWN/serving.crt"
  within 30 serves "$OWN/serve-two.crt"
  cat "$CONTROL_PLANE/pki/ca.crt" "$OWN/two.crt" > "$OWN/bundle.new"
  mv "$OWN/bundle.new" "$OWN/bundle.crt"
  within 30 as_certified client-two 200
  as_certified client-one 401
  same "$(node_pid)" "$pid"
  kill -0 "$pid"
  # The API server's own authority has stayed.
  same "$(kubectl get --raw "/api/v1/nodes/$NODE_NAME/proxy/healthz")" ok
  without_reviews
}
alone "a serving certificate and authorities of clients that change on disk count without a restart" certificates_reload

# Which certificate the node's calls were made with lately.
credential() { tail -n 40 "$AUDIT" | jq -r '.user.extra["authentication.kubernetes.io/credential-id"][0] // empty' | tail -n 1; }
credential_is() { same "$(credential)" "X509SHA256=$(openssl x509 -in "$1" -outform der | sha256sum | cut -d' ' -f1)"; }
kubeconfig_reload() {
  own_folder
  stop_node
  local name
  for name in one two; do a_certificate "$CONTROL_PLANE/pki/ca" "$name" "/O=system:nodes/CN=system:node:$NODE_NAME"; done
  cp "$OWN/one.crt" "$OWN/now.crt"
  cp "$OWN/one.key" "$OWN/now.key"
  cp "$CONTROL_PLANE/kubelet.conf" "$OWN/kept.conf"
  kubectl config --kubeconfig "$CONTROL_PLANE/kubelet.conf" set-credentials "system:node:$NODE_NAME" --client-certificate="$OWN/now.crt" --client-key="$OWN/now.key"
  start_node
  within 30 node_ready
  within 30 credential_is "$OWN/one.crt"
  local pid
  pid=$(node_pid)
  # The key alone does not fit: the old pair stays in use meanwhile.
  cp "$OWN/two.key" "$OWN/now.key"
  cp "$OWN/two.crt" "$OWN/now.crt"
  within 40 credential_is "$OWN/two.crt"
  node_ready
  # The kubeconfig itself is exchanged: another pair, inside it.
  a_certificate "$CONTROL_PLANE/pki/ca" three "/O=system:nodes/CN=system:node:$NODE_NAME"
  cp "$CONTROL_PLANE/kubelet.conf" "$OWN/three.conf"
  kubectl config --kubeconfig "$OWN/three.conf" set-credentials "system:node:$NODE_NAME" --client-certificate="$OWN/three.crt" --client-key="$OWN/three.key" --embed-certs
  mv "$OWN/three.conf" "$CONTROL_PLANE/kubelet.conf"
  within 40 credential_is "$OWN/three.crt"
  same "$(node_pid)" "$pid"
  node_ready
  stop_node
  cp "$OWN/kept.conf" "$CONTROL_PLANE/kubelet.conf"
  start_node
  within 30 node_ready
}
alone "a kubeconfig's client certificate that changes on disk is used without a restart" kubeconfig_reload
