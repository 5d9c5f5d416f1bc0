"""objects.py RENDERED…: what rendered manifests must say, whatever the configuration: who may reach whom, what probes ask,
what selects which pods, and what a pod is not given.

What a container may do is checkov's to see; what must add up is arithmetic.py's.
"""

import sys
from ipaddress import ip_address, ip_network
from pathlib import Path

import yaml

NAME, COMPONENT = "app.kubernetes.io/name", "app.kubernetes.io/component"
SELECTED = {NAME: "crun-gateway", "app.kubernetes.io/instance": "crun-gateway"}
STANDARD = {*SELECTED, *(f"app.kubernetes.io/{label}" for label in ("component", "version", "part-of", "managed-by"))}

# Only readiness and the start wait for what a pod needs; whoever is restarted loses the cache.
PROBES = {"startupProbe": "/readyz", "readinessProbe": "/readyz", "livenessProbe": "/livez"}

OWN = {"kubernetes.io/metadata.name": "crun-gateway"}
CLIENTS = {"crun-gateway/client": "true"}
MONITORING = {"kubernetes.io/metadata.name": "monitoring"}
PROMETHEUS = {NAME: "prometheus"}
# Labels of a namespace and of a pod there, a port, and whether the gateway's pods are open to it: always, or where monitored.
INWARDS = [
    (CLIENTS, {}, "http", "always"),
    (CLIENTS, {}, "admin", "never"),
    ({}, {}, "http", "never"),
    (OWN, {}, "http", "never"),
    (OWN, SELECTED, "admin", "never"),
    (MONITORING, PROMETHEUS, "admin", "monitored"),
    (MONITORING, PROMETHEUS, "http", "never"),
    (MONITORING, {}, "admin", "never"),
    ({}, PROMETHEUS, "admin", "never"),
]
PUBLIC = ["203.0.113.9", "2001:db8::9"]
INSIDE = ["10.0.0.1", "100.64.0.1", "127.0.0.1", "169.254.169.254", "172.16.0.1", "192.168.0.1", "fd00::1", "fe80::1"]
# An address, a port, and whether the gateway's pods may go there. A node-local cache of names is at a link-local address.
OUTWARDS = [
    *((address, (443, "TCP"), True) for address in PUBLIC),
    *((address, (80, "TCP"), False) for address in PUBLIC),
    *((address, (443, "TCP"), False) for address in INSIDE),
    *((address, (53, protocol), True) for address in PUBLIC + INSIDE for protocol in ("UDP", "TCP")),
]


def selects(selector, labels):
    return (selector or {}).get("matchLabels", {}).items() <= labels.items()


def is_of(peer, who):
    """Whether a rule's peer may be `who`: an address, or the labels of a namespace and a pod."""
    block = peer.get("ipBlock")
    if isinstance(who, str):
        address = ip_address(who)
        within = block and address in ip_network(block["cidr"])
        return bool(within) and not any(address in ip_network(part) for part in block.get("except", []))
    namespace, pod = who
    # Any address may be a pod's.
    return bool(block) or (
        selects(peer.get("namespaceSelector", {"matchLabels": OWN}), namespace) and selects(peer.get("podSelector"), pod)
    )


def passes(policies, direction, who, port):
    """Whether these NetworkPolicies of a pod's let `who` through: a named port, or a number and a protocol."""
    policies = [policy for policy in policies if direction in policy["policyTypes"]]
    rules = [rule for policy in policies for rule in policy.get(direction.lower(), [])]
    for rule in rules:
        ports = [(at["port"], at["protocol"]) for at in rule.get("ports", [])]
        peers = rule.get("from", []) + rule.get("to", [])
        if (not ports or port in ports or (port, "TCP") in ports) and (not peers or any(is_of(peer, who) for peer in peers)):
            return True
    return not policies


def look(name, objects, must):
    def all_of(*kinds):
        return [o for o in objects if o["kind"] in kinds]

    (gateway,) = (o for o in all_of("Deployment", "StatefulSet") if o["metadata"]["name"] == "crun-gateway")
    spec = gateway["spec"]
    labels, pod = spec["template"]["metadata"]["labels"], spec["template"]["spec"]
    (container,) = pod["containers"]
    for probe, path in PROBES.items():
        asked = container.get(probe, {}).get("httpGet")
        must(asked == {"path": path, "port": "admin"}, f"{probe} asks {asked}")

    policies = [o["spec"] for o in all_of("NetworkPolicy") if selects(o["spec"]["podSelector"], labels)]
    is_monitored = bool(all_of("PodMonitor"))
    for namespace, peer, port, when in INWARDS:
        expected = when == "always" or when == "monitored" and is_monitored
        is_open = passes(policies, "Ingress", (namespace, peer), port)
        must(is_open == expected, f"port {port} is {'open' if is_open else 'closed'} to pods {peer} of namespaces {namespace}")
    for address, port, expected in OUTWARDS:
        is_open = passes(policies, "Egress", address, port)
        must(is_open == expected, f"the way to {address}, port {port}, is {'open' if is_open else 'closed'}")

    # What a pod is not given, and what it may not be.
    for account in all_of("ServiceAccount"):
        must(account.get("automountServiceAccountToken") is False, "the ServiceAccount hands out its token")
    for workload in all_of("Deployment", "StatefulSet"):
        given = workload["spec"]["template"]["spec"]
        must(given.get("automountServiceAccountToken") is False, f"{workload['metadata']['name']} has a token")
        must(given.get("enableServiceLinks") is False, f"{workload['metadata']['name']} has service links")
    levels = [o["metadata"].get("labels", {}).get("pod-security.kubernetes.io/enforce") for o in all_of("Namespace")]
    must(levels == ([] if name == "base.yaml" else ["restricted"]), f"namespaces enforce {levels}")

    # Labels, and what goes by them.
    pods = [o["spec"]["template"]["metadata"]["labels"] for o in all_of("Deployment", "StatefulSet")]
    chosen = [(o, {"matchLabels": o["spec"]["selector"]}) for o in all_of("Service")]
    chosen += [(o, o["spec"]["podSelector"]) for o in all_of("NetworkPolicy")]
    chosen += [(o, o["spec"]["selector"]) for o in all_of("PodMonitor")]
    for o, selector in chosen:
        is_ours = NAME in selector["matchLabels"] and any(selects(selector, labels) for labels in pods)
        must(is_ours, f"{o['kind']} {o['metadata']['name']} selects none of these pods")
    must(SELECTED.items() <= labels.items(), "pods have other names")
    for o in all_of("Deployment", "StatefulSet", "Service", "ServiceAccount", "ConfigMap", "NetworkPolicy"):
        if o["metadata"]["name"] == "crun-gateway":
            missing = STANDARD - o["metadata"].get("labels", {}).keys()
            must(not missing, f"{o['kind']} crun-gateway lacks the labels {sorted(missing)}")
    must(STANDARD <= labels.keys(), "pods lack standard labels")

    # Rules, alerts and dashboard say job="crun-gateway".
    for monitor in all_of("PodMonitor"):
        must(monitor["spec"].get("jobLabel") == NAME, "the PodMonitor names another job than the rules")
        (endpoint,) = monitor["spec"]["podMetricsEndpoints"]
        must(endpoint["path"] == "/metrics", f"scraped at {endpoint['path']}")
    if is_monitored:
        boards = [o for o in all_of("ConfigMap") if any(key.endswith(".json") for key in o["data"])]
        marks = [board["metadata"].get("labels", {}).get("grafana_dashboard") for board in boards]
        must(marks == ["1"], "Grafana's sidecar finds the dashboard")

    if gateway["kind"] == "StatefulSet":
        update = spec["updateStrategy"]
        must(update["type"] == "RollingUpdate", f"a change reaches pods by {update['type']}")
        must(update.get("rollingUpdate", {}).get("maxUnavailable", 1) == 1, "a roll-out takes more than one replica at once")
        must(spec["serviceName"] in [o["metadata"]["name"] for o in all_of("Service")], "the StatefulSet's Service is none of these")
        for spread in pod["topologySpreadConstraints"]:
            must(spread["labelSelector"] == spec["selector"], "other pods are spread")
            must(spread["whenUnsatisfiable"] == "ScheduleAnyway", "a replica without a node of its own does not run")

    for store in (o for o in all_of("Deployment") if o["metadata"]["labels"].get(COMPONENT) == "shared-store"):
        (container,) = store["spec"]["template"]["spec"]["containers"]
        for flag in ("--maxmemory-policy noeviction", '--requirepass "`cat ', "--save ''", "--appendonly no"):
            must(flag in container["args"][0], f"the store runs without {flag}")


def main(files):
    faults = []
    for file in map(Path, files):
        objects = list(yaml.safe_load_all(file.read_text()))
        look(file.name, objects, lambda holds, what, file=file: holds or faults.append(f"{file.name}: {what}"))
    if faults:
        sys.exit("\n".join(faults))
    print(f"{len(files)} manifests say so: probes, policies, tokens, selectors, labels, roll-out, scrapes")


if __name__ == "__main__":
    main(sys.argv[1:])
