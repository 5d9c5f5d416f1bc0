"""image.py BINARY_DIR MANIFEST ROOT: builds the image and starts the binary out of its root file system, into ROOT.

No registry is needed: of the build stage only what it copies is looked at, its result is BINARY_DIR, what deploy/build made,
and the last stage is built as it stands. Then, in that root file system and nothing else, as the image's user, with its environment and the arguments of the
pod: the ConfigMap is accepted, upstream is found by a name that only DNS knows, a poll is answered, SIGTERM ends it with 0.

Not the same as in a cluster: the process has no namespaces, no cgroup and no seccomp profile of its own. Needs root.
"""

import json
import os
import re
import shutil
import signal
import socket
import stat
import struct
import subprocess
import sys
import threading
import urllib.request
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parents[2]
TAG = "localhost/crun-gateway:check"
NAME = "upstream.crun-gateway.test"
# Of loopback, so that port 53 is free where a resolver runs already.
RESOLVER = "127.0.0.153"


def build(binary_dir, store):
    """The image's configuration, and the folder that holds its root file system."""
    # Of its own, and without overlay mounts, which not every machine allows inside a container.
    buildah = ["buildah", "--root", store / "store", "--runroot", store / "run", "--storage-driver", "vfs"]

    def run(*args):
        return subprocess.run([*buildah, *args], check=True, capture_output=True, text=True).stdout.strip()

    def image(dockerfile, tag, *args):
        ignored = ROOT / "deploy/Dockerfile.dockerignore"
        run("bud", "--isolation", "chroot", "--ignorefile", ignored, "-f", dockerfile, "-t", tag, *args, ROOT)
        return Path(run("mount", run("from", tag)))

    # That what the build stage copies is there: the ignore file lets each of it through by name.
    dockerfile = ROOT / "deploy/Dockerfile"
    stage = dockerfile.read_text().split("\nFROM scratch")[0]
    copies = [line for line in stage.splitlines() if line.startswith(("WORKDIR ", "COPY "))]
    begun = store / "Dockerfile.begun"
    begun.write_text("\n".join(["FROM scratch", *copies]))
    image(begun, f"{TAG}-begun")

    mounted = image(dockerfile, TAG, "--build-context", f"build={binary_dir}", "--build-arg", "REVISION=check")
    config = json.loads(run("inspect", "--type", "image", TAG))["OCIv1"]["config"]
    return config, mounted


def answer_names(server):
    """Answers every A question for NAME with 127.0.0.1, everything else with no such name."""
    wanted = b"".join(bytes([len(part)]) + part.encode() for part in NAME.split(".")) + b"\0"
    while True:
        query, peer = server.recvfrom(512)
        end = query.index(b"\0", 12) + 1
        name, (kind,) = query[12:end].lower(), struct.unpack(">H", query[end : end + 2])
        found = name == wanted and kind == 1
        flags = 0x8180 if name == wanted else 0x8183
        head = query[:2] + struct.pack(">HHHHH", flags, 1, int(found), 0, 0)
        record = b"\xc0\x0c" + struct.pack(">HHIH", 1, 1, 1, 4) + bytes([127, 0, 0, 1])
        server.sendto(head + query[12 : end + 4] + (record if found else b""), peer)


def main(binary_dir, manifest, folder):
    assert os.geteuid() == 0, "needs root: the storage of images and chroot"
    folder = Path(folder).resolve()
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    config, mounted = build(Path(binary_dir).resolve(), folder)

    version = re.search(r'^version = "(.+)"$', (ROOT / "Cargo.toml").read_text(), re.M)[1]
    objects = list(yaml.safe_load_all(Path(manifest).read_text()))
    pod = next(o for o in objects if o["kind"] == "Deployment")["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    text = next(o for o in objects if o["kind"] == "ConfigMap" and o["metadata"]["name"] == "crun-gateway")
    text = text["data"]["config.yaml"]
    secret = yaml.safe_load((ROOT / "deploy/example/secret.example.yaml").read_text())["stringData"]

    labels = {key.removeprefix("org.opencontainers.image."): value for key, value in config["Labels"].items()}
    assert labels["version"] == version and labels["revision"] == "check" and labels["title"], labels
    assert config["Cmd"] == container["args"], f"{config['Cmd']} is not what the pod says, {container['args']}"
    uid, gid = (int(part) for part in config["User"].split(":"))
    assert (uid, gid) == (pod["securityContext"]["runAsUser"], pod["securityContext"]["runAsGroup"]) and uid > 0
    files = [path for path in mounted.rglob("*") if path.is_file()]
    assert files == [mounted / "crun-gateway"], f"the image holds {files}"
    linked = subprocess.run(["ldd", files[0]], capture_output=True, text=True)
    assert "not a dynamic executable" in linked.stderr or "statically linked" in linked.stdout, linked

    # What the container runtime and the kubelet mount.
    root = folder / "root"
    shutil.copytree(mounted, root)
    (root / "dev").mkdir()
    for name, minor in (("null", 3), ("random", 8), ("urandom", 9)):
        os.mknod(root / "dev" / name, 0o666 | stat.S_IFCHR, os.makedev(1, minor))
        (root / "dev" / name).chmod(0o666)
    for mount in container["volumeMounts"]:
        Path(root, mount["mountPath"].lstrip("/")).mkdir(parents=True)
    keys = root / "etc/crun-gateway/keys"
    for name, key in secret.items():
        (keys / name).write_text(key)
        os.chown(keys / name, 0, gid)
        (keys / name).chmod(0o440)
    Path(root, "etc/resolv.conf").write_text(f"nameserver {RESOLVER}\n")
    Path(root, "etc/hosts").write_text("127.0.0.1 localhost\n")
    file = Path(root, config["Cmd"][1].lstrip("/"))

    def inside():
        os.chroot(root)
        os.chdir("/")
        os.setgroups([gid])
        os.setgid(gid)
        os.setuid(uid)

    env = dict(entry.split("=", 1) for entry in config["Env"])

    def start(args, **options):
        return subprocess.Popen([*config["Entrypoint"], *args], preexec_fn=inside, env=env, text=True, **options)

    file.write_text(text)
    checked = start(["check", *config["Cmd"]], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    out, err = checked.communicate(timeout=60)
    assert checked.returncode == 0 and out, err

    resolver = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    resolver.bind((RESOLVER, 53))
    threading.Thread(target=answer_names, args=(resolver,), daemon=True).start()
    binary = root / "crun-gateway"
    upstream = subprocess.Popen([binary, "upstream", "--listen", "127.0.0.1:0"], stdout=subprocess.PIPE, text=True)
    serving = None
    try:
        port = upstream.stdout.readline().rsplit(":", 1)[1].strip()
        served = yaml.safe_load(text)
        served |= {"listen": "127.0.0.1:0", "admin": "127.0.0.1:0"}
        served["upstream"] = {"url": f"http://{NAME}:{port}"}
        file.write_text(yaml.safe_dump(served))
        serving = start(config["Cmd"], stderr=subprocess.PIPE)
        # Where few file descriptors are allowed, that is said first.
        said = []
        while not said or said[-1]["message"] != "serving":
            text = serving.stderr.readline()
            assert text, said
            said.append(json.loads(text))
        line = said[-1]
        assert line["version"] == version, line

        def get(address, path, **headers):
            with urllib.request.urlopen(urllib.request.Request(f"http://{address}{path}", headers=headers), timeout=60) as got:
                return got.status, got.read()

        for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
            status, _ = get(line["admin"], container[probe]["httpGet"]["path"])
            assert status == 200, probe
        path = "/api/v1/client/job/TaskInfo?task_id=ended.song"
        status, body = get(line["listen"], path, **{"x-api-key": secret["studio-token"]})
        assert status == 200 and json.loads(body)["data"]["status"] == "success", body
        serving.send_signal(signal.SIGTERM)
        assert serving.wait(timeout=60) == 0
    finally:
        for process in (upstream, serving):
            if process:
                process.kill()
    size = binary.stat().st_size / 2**20
    print(f"image built ({size:.1f} MiB), started as {uid}:{gid} out of its root, upstream found by DNS, stopped with 0")


main(*sys.argv[1:])
