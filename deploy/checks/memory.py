"""memory.py BINARY MANIFEST: the memory limit of MANIFEST holds what its configuration allows the process to take.

Fills the cache with small answers and turns it over with large ones, as many at once as `limits.body_bytes` lets in, twice;
adds what the connections that are not open here would take; and compares the most that was resident with the limit.
"""

import asyncio
import re
import resource
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from pathlib import Path

import yaml

import arithmetic

ROOT = Path(__file__).resolve().parents[2]
# Opened here, as many as a process may with 4096 descriptors; the limit of the configuration is reckoned up from it.
CONNECTIONS = 1500
AT_ONCE = 100
# A little more than it takes a connection to come to rest.
REST = 1.2
# What an idle connection may keep, in bytes, what the allocator makes of it included.
RESTING = 6 << 10


# A field that changes nothing, but no poll with it is a plain one: hyper serves it, which takes the most memory.
NOT_PLAIN = "cache-control: no-transform\r\n"


async def poll(connection, key, task, more=""):
    reader, writer = connection
    line = f"GET /api/v1/client/job/TaskInfo?task_id={task} HTTP/1.1"
    writer.write(f"{line}\r\nhost: gateway\r\nx-api-key: {key}\r\n{more}\r\n".encode())
    head = await reader.readuntil(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 200 "), head
    await reader.readexactly(int(re.search(rb"content-length: (\d+)", head, re.I)[1]))


async def fill(address, kind, count, at_once):
    """Asks for COUNT tasks that nobody has asked for before, of two accounts: one alone may fill only half the cache."""
    turns = iter(range(count))

    async def ask():
        connection = await asyncio.open_connection(*address, limit=1 << 25)
        for turn in turns:
            await poll(connection, ("ak_a", "ak_b")[turn % 2], f"{kind}.{time.monotonic_ns()}")
        connection[1].close()

    await asyncio.gather(*[ask() for _ in range(at_once)])


def resident(process, what):
    status = Path(f"/proc/{process.pid}/status").read_text()
    return int(re.search(rf"{what}:\s+(\d+) kB", status)[1]) << 10


def requests_in_flight(admin):
    with urllib.request.urlopen(f"http://{admin}/metrics", timeout=30) as metrics:
        return int(re.search(r"^crun_gateway_requests_in_flight (\d+)$", metrics.read().decode(), re.M)[1])


async def measure(process, address, admin, config):
    """What a client connection takes at rest, while a poll waits and while hyper serves it, and the most that was resident."""
    empty = resident(process, "VmRSS")
    connections = []
    while len(connections) < CONNECTIONS:
        some = await asyncio.gather(*[asyncio.open_connection(*address) for _ in range(AT_ONCE)])
        connections += some
        await asyncio.gather(*[poll(connection, "ak_a", "ended.same") for connection in some])
        # The next ones get the memory that these give up.
        await asyncio.sleep(REST)
        if len(connections) == AT_ONCE:
            first = resident(process, "VmRSS")
    resting = (resident(process, "VmRSS") - first) / (CONNECTIONS - AT_ONCE)

    each = []
    for turn, more in enumerate(("", NOT_PLAIN)):
        slow = f"slow-5000ms.{turn}"
        polls = asyncio.gather(*[poll(connection, "ak_a", slow, more) for connection in connections])
        while requests_in_flight(admin) < CONNECTIONS:
            assert not polls.done(), "the polls did not wait together"
            await asyncio.sleep(0.05)
        each.append((resident(process, "VmRSS") - empty) / CONNECTIONS)
        await polls
    waiting, served = each

    size = {name: arithmetic.quantity(config[of][name], arithmetic.SIZES) for of, name in
            (("cache", "max_bytes"), ("limits", "body_bytes"), ("upstream", "max_body"))}
    small, large = 16 << 10, int(size["max_body"]) - (1 << 20)
    at_once = int(size["body_bytes"]) // large
    for _ in range(2):
        await fill(address, f"big-{large}", 3 * at_once, at_once)
        await fill(address, f"big-{small}", int(size["max_bytes"]) // small, 32)
    await fill(address, f"big-{large}", 3 * at_once, at_once)
    for _, writer in connections:
        writer.close()
    return resting, waiting, served, resident(process, "VmHWM")


def main(binary, manifest):
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 8192), hard))
    objects = list(yaml.safe_load_all(Path(manifest).read_text()))
    text = next(o for o in objects if o["kind"] == "ConfigMap")["data"]["config.yaml"]
    config = arithmetic.configuration(binary, text)
    pod = next(o for o in objects if o["kind"] == "Deployment")["spec"]["template"]["spec"]
    allowed = arithmetic.quantity(pod["containers"][0]["resources"]["limits"]["memory"], arithmetic.SIZES)
    # The image's.
    dockerfile = (ROOT / "deploy/Dockerfile").read_text()
    env = dict(re.findall(r"^ENV (\w+)=(\S+)$", dockerfile, re.M))

    simulate = [binary, "upstream", "--listen", "127.0.0.1:0", "--limit", "1000000", "--latency", "1ms"]
    with (
        tempfile.TemporaryDirectory() as folder,
        subprocess.Popen(simulate, stdout=subprocess.PIPE, text=True) as upstream,
    ):
        url = upstream.stdout.readline().split()[-1]
        served = config | {"listen": "127.0.0.1:0", "admin": "127.0.0.1:0", "worker_threads": 4}
        served["upstream"] = config["upstream"] | {"url": url}
        served["log"] = {"format": "text"}
        # A budget that fills the cache in seconds.
        served["budget"] = {"limit": 3000}
        file = Path(folder, "config.yaml")
        file.write_text(yaml.safe_dump(served))
        with subprocess.Popen([binary, "--config", file], env=env, stderr=subprocess.PIPE, text=True) as gateway:
            try:
                # Where few file descriptors are allowed, that is said first.
                while not (serving := re.search(r" listen=(\S+):(\d+) admin=(\S+)", gateway.stderr.readline())):
                    assert gateway.poll() is None
                host, port, admin = serving.groups()
                # Each query is logged, and a full pipe would hold the gateway up.
                threading.Thread(target=lambda: [None for _ in gateway.stderr], daemon=True).start()
                measuring = measure(gateway, (host, int(port)), admin, config)
                resting, waiting, served, most = asyncio.run(asyncio.wait_for(measuring, 300))
            finally:
                gateway.kill()
                upstream.kill()
    limits = config["limits"]
    more = (limits["connections"] - CONNECTIONS) * served + limits["upstream_connections"] * arithmetic.PER_UPSTREAM
    each = (
        f"a client connection takes {resting / 1024:.1f} KiB at rest, {waiting / 1024:.1f} KiB while a poll waits,"
        f" {served / 1024:.1f} KiB while hyper serves it"
    )
    assert resting <= RESTING and served <= arithmetic.PER_CLIENT, each
    assert most + more <= allowed, f"{most / 2**20:.0f} + {more / 2**20:.0f} MiB, {allowed / 2**20:.0f} MiB are allowed"
    print(
        f"memory: {most / 2**20:.0f} MiB at most, {more / 2**20:.0f} MiB more with every connection open and served,"
        f" {allowed / 2**20:.0f} MiB allowed; {each}"
    )


main(*sys.argv[1:])
