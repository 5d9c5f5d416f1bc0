"""arithmetic.py BINARY RENDERED…: what must add up between rendered manifests and their configuration.

The configuration is what BINARY (`check`) makes of the ConfigMap, defaults included, so that no default is written twice.
"""

import re
import subprocess
import sys
import tempfile
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parents[2]
VERSION = re.search(r'^version = "(.+)"$', (ROOT / "Cargo.toml").read_text(), re.M)[1]
UNITS = {"ms": 0.001, "s": 1, "m": 60, "h": 3600, "d": 86400}
SIZES = {"": 1, "Ki": 1 << 10, "Mi": 1 << 20, "Gi": 1 << 30, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30, "B": 1}

# What an open connection keeps, in bytes. A client's was measured at 22 KiB while hyper serves it and 3 KiB at rest, over TLS at
# 28 and 14 KiB; an upstream one has rustls's buffers for a record each way besides. The rest of a process that does nothing
# is 6 MiB.
PER_CLIENT = 24 << 10
PER_TLS_CLIENT = 40 << 10
PER_UPSTREAM = 48 << 10
# An unlisted account with its key and a refusal as large as is remembered, when strangers make up as many as there may be.
PER_ACCOUNT = 26 << 10
PROCESS = 32 << 20
# Answers on their way to the disk, once as they are and once sealed; redb's pages; 16 bytes for each answer there. And what is
# read there, four at a time, each at most as a page of redb's of up to twice its size and as a copy.
DISK = 64 << 20
DISK_READS = 4 * 3
# Allocator and bookkeeping, on top of the bytes that the limits count.
SLACK = 1.3
# Budgets of a hundred thousand accounts in the shared store, at 300 bytes each, and the server itself.
BUDGETS = 64 << 20
# Between the end of `drain` and SIGKILL, in seconds.
TO_SPARE = 5


def quantity(text, units):
    number, unit = re.fullmatch(r"([0-9.]+)\s*([A-Za-z]*)", str(text)).groups()
    return float(number) * units[unit]


def seconds(text):
    return sum(quantity(part, UNITS) for part in str(text).split())


def configuration(binary, text):
    """The text of a ConfigMap as BINARY understands it; key files are put where the file names them, but under a folder."""
    with tempfile.TemporaryDirectory() as folder:
        keys = Path(folder, "keys")
        keys.mkdir()
        example = yaml.safe_load((ROOT / "deploy/example/secret.example.yaml").read_text())
        for name, key in example["stringData"].items():
            (keys / name).write_text(key)
        mounted = text.replace("/etc/crun-gateway/keys", str(keys))
        file = Path(folder, "config.yaml")
        file.write_text(mounted)
        checked = subprocess.run([binary, "check", "--config", file], capture_output=True, text=True)
        if checked.returncode:
            sys.exit(f"the ConfigMap's configuration is wrong:\n{checked.stderr}")
        return yaml.safe_load(checked.stdout)


def selects(selector, labels):
    return selector.get("matchLabels", {}).items() <= labels.items()


def reaches_store(objects, shared, must):
    """The policies let the gateway's pods, and nobody else, to the store that these manifests bring, if they bring one; and
    what is there keeps within its memory."""
    host, port = re.fullmatch(r"redis://([^:]+):(\d+)", shared["url"]).groups()
    deployments = [o for o in objects if o["kind"] == "Deployment"]
    stores = [o for o in deployments if o["metadata"]["labels"]["app.kubernetes.io/component"] == "shared-store"]
    must(all(o["metadata"]["name"] == host for o in stores), f"shared.url names {host}, which is not the store that is here")
    policies = [o["spec"] for o in objects if o["kind"] == "NetworkPolicy"]
    out = [
        rule
        for policy in policies
        if policy["podSelector"]["matchLabels"]["app.kubernetes.io/name"] == "crun-gateway"
        for rule in policy.get("egress", [])
        if any(str(named["port"]) == port for named in rule["ports"])
    ]
    must(len(out) == 1, "one policy lets the gateway out to the store")
    for store in stores:
        spec = store["spec"]
        labels = spec["template"]["metadata"]["labels"]
        (container,) = spec["template"]["spec"]["containers"]
        must((spec["replicas"], spec["strategy"]) == (1, {"type": "Recreate"}), "two stores may overlap")
        must(all(selects(to["podSelector"], labels) for to in out[0]["to"]), "the gateway may not go to the store")
        (inwards,) = (p for p in policies if selects(p["podSelector"], labels))
        ((rule,), egress) = inwards["ingress"], inwards.get("egress")
        must(inwards["policyTypes"] == ["Ingress", "Egress"] and not egress, "the store may go somewhere")
        names = [peer["podSelector"]["matchLabels"]["app.kubernetes.io/name"] for peer in rule["from"]]
        must(names == ["crun-gateway"], f"the store is open to {names}")
        services = [o["spec"] for o in objects if o["kind"] == "Service" and o["metadata"]["name"] == host]
        must(len(services) == 1, f"there is no Service {host}")
        for service in services:
            must(service["selector"].items() <= labels.items(), "the store's Service is of other pods")
            must([str(p["port"]) for p in service["ports"]] == [port], f"the store's Service is not at {port}")
        filled = int(re.search(r"--maxmemory (\d+)mb ", container["args"][0])[1]) << 20
        allowed = quantity(container["resources"]["limits"]["memory"], SIZES)
        must(filled * 1.5 <= allowed, "the store's memory limit is less than half more than what it may fill")
        answers = quantity(shared.get("max_bytes", 0), SIZES)
        must(answers + BUDGETS <= filled, "where answers fill the store, budgets find no room")


def main(binary, files):
    faults = []
    for file in files:
        objects = list(yaml.safe_load_all(Path(file).read_text()))

        def one(kind, name="crun-gateway", objects=objects):
            return next(o for o in objects if o["kind"] == kind and o["metadata"]["name"] == name)

        def must(holds, what, file=file):
            if not holds:
                faults.append(f"{Path(file).name}: {what}")

        config = configuration(binary, one("ConfigMap")["data"]["config.yaml"])
        (workload,) = (o for o in objects if o["kind"] in ("Deployment", "StatefulSet") and o["metadata"]["name"] == "crun-gateway")
        workload, kind = workload["spec"], workload["kind"]
        pod = workload["template"]["spec"]
        (container,) = pod["containers"]

        # The stop.
        pre_stop = container["lifecycle"]["preStop"]["sleep"]["seconds"]
        drain, grace = seconds(config["drain"]), pod["terminationGracePeriodSeconds"]
        must(
            pre_stop + drain + TO_SPARE <= grace,
            f"preStop {pre_stop} s + drain {drain} s + {TO_SPARE} s > terminationGracePeriodSeconds {grace}",
        )
        ready = container["readinessProbe"]
        must(pre_stop >= 5, "preStop is shorter than endpoints take to be removed")
        must(ready["timeoutSeconds"] < ready["periodSeconds"], "the readiness probe overlaps itself")

        # Memory.
        limits = config["limits"]
        kept = quantity(config["cache"]["max_bytes"], SIZES) * SLACK
        needed = (
            kept
            + quantity(limits["body_bytes"], SIZES) * SLACK
            + limits["connections"] * (PER_TLS_CLIENT if config.get("tls") else PER_CLIENT)
            + limits["upstream_connections"] * PER_UPSTREAM
            + config["max_accounts"] * PER_ACCOUNT
            + PROCESS
            + (DISK + DISK_READS * quantity(config["upstream"]["max_body"], SIZES) if config["cache"]["disk"] else 0)
        )
        memory = container["resources"]
        allowed, requested = (quantity(memory[of]["memory"], SIZES) for of in ("limits", "requests"))
        must(needed <= allowed, f"memory: {needed / 2**20:.0f} MiB may be needed, {allowed / 2**20:.0f} MiB are allowed")
        must(kept + PROCESS <= requested, "the memory request does not hold a full cache")
        must("cpu" in memory["requests"] and "cpu" not in memory["limits"], "a CPU request and no CPU limit")

        # The disk: the largest file, and a corrupt one beside it.
        claims = {v["name"]: v["persistentVolumeClaim"]["claimName"] for v in pod["volumes"] if "persistentVolumeClaim" in v}
        places = {m["mountPath"]: claims[m["name"]] for m in container["volumeMounts"] if m["name"] in claims}
        for claim in places.values():
            room = quantity(one("PersistentVolumeClaim", claim)["spec"]["resources"]["requests"]["storage"], SIZES)
            most = quantity(config["cache"]["disk_max_bytes"], SIZES)
            must(2 * most < room, f"claim {claim}: cache.disk may take {most / 2**20:.0f} MiB twice")
        disk = config["cache"]["disk"]
        must(not disk or str(Path(disk).parent) in places, f"cache.disk {disk} is on no claim")

        # Ports and paths.
        ports = {port["name"]: port["containerPort"] for port in container["ports"]}
        of = {"http": config["listen"], "admin": config["admin"]}
        must(ports == {name: int(address.rsplit(":", 1)[1]) for name, address in of.items()}, f"ports: {ports} and {of}")
        must(one("Service")["spec"]["ports"][0]["targetPort"] == "http", "the Service leads to the port of clients")
        mounts = {mount["name"]: mount for mount in container["volumeMounts"]}
        must(container["args"] == ["--config", mounts["config"]["mountPath"] + "/config.yaml"], "args name the mounted file")
        must(not any("subPath" in mount for mount in mounts.values()), "a subPath never follows a change")
        must("env" not in container and "envFrom" not in container, "configuration and keys come from directories")
        (keys,) = (volume["secret"] for volume in pod["volumes"] if volume["name"] == "keys")
        must(keys["optional"] is True, "the Secret is optional")
        shared = config["shared"]
        credentials = [key for account in config["accounts"] or [] for key in account["keys"]]
        credentials += [shared["password"]] if shared and shared["password"] else []
        paths = [credential["file"] for credential in credentials]
        example = yaml.safe_load((ROOT / "deploy/example/secret.example.yaml").read_text())
        must(all(Path(path).name in example["stringData"] for path in paths), "the example Secret has the keys named")
        must(keys["secretName"] == example["metadata"]["name"], "the example Secret has the name that is mounted")
        mounted = mounts["keys"]["mountPath"]
        must(mounted == "/etc/crun-gateway/keys", "where the configurations look for keys")

        # Versions.
        labels = workload["template"]["metadata"]["labels"]
        must(labels["app.kubernetes.io/version"] == VERSION, f"the label says another version than {VERSION}")
        image = container["image"]
        must(image == f"crun-gateway:{VERSION}" or "@sha256:" in image, f"image {image}")
        must(workload["selector"]["matchLabels"].keys() == {"app.kubernetes.io/name", "app.kubernetes.io/instance"},
             "selectors name the two labels that never change")

        # Never more pods at once than own a part of the budget.
        disrupts = [o["spec"] for o in objects if o["kind"] == "PodDisruptionBudget"]
        must(not any(o["kind"] == "HorizontalPodAutoscaler" for o in objects), "nothing but the configuration says how many")
        if shared:
            replicas, limit = shared["max_replicas"], config["budget"]["limit"]
            must(kind == "StatefulSet", "a pod may run beside the one that it replaces")
            must(workload["replicas"] == replicas, f"{workload['replicas']} replicas, of max_replicas {replicas}")
            must(limit % replicas == 0, f"{replicas} slices of {limit} do not add up to it")
            (disrupted,) = disrupts
            must(disrupted["maxUnavailable"] == 1, "a drain takes more than one replica at once")
            must(disrupted["unhealthyPodEvictionPolicy"] == "AlwaysAllow", "a replica that is not ready holds up a drain")
            must(disrupted["selector"] == workload["selector"], "the PodDisruptionBudget is of other pods")
            # Its start's second and window; readiness does not wait for them.
            quiet = 2 + seconds(config["budget"]["margin"])
            must(workload["minReadySeconds"] > quiet, "a roll-out goes on before the slice is lent again")
            apart = {spread["topologyKey"] for spread in pod["topologySpreadConstraints"]}
            must(apart == {"kubernetes.io/hostname", "topology.kubernetes.io/zone"}, "replicas are not spread")
            reaches_store(objects, shared, must)
        elif Path(file).name != "base.yaml":
            must((kind, workload["replicas"], workload["strategy"]) == ("Deployment", 1, {"type": "Recreate"}), "two pods may overlap")
            must(not disrupts, "a PodDisruptionBudget of one pod keeps its node from being drained")

        if any(o["kind"] == "PodMonitor" for o in objects):
            (endpoint,) = one("PodMonitor")["spec"]["podMetricsEndpoints"]
            must(endpoint["port"] in ports, "the PodMonitor's port is the pod's")
            must(seconds(endpoint["scrapeTimeout"]) < seconds(endpoint["interval"]), "a scrape may overlap the next")

    for fault in faults:
        print(fault, file=sys.stderr)
    if faults:
        sys.exit(1)
    print(f"{len(files)} manifests add up: stop, memory, ports, versions, replicas, store, scrapes")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
