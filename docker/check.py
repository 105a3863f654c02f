"""Run the built image as compose would, look at it from outside, and print one JSON object.

    docker/check.py [--image gram-server] [--buildah "buildah --storage-driver vfs"]

For machines without a Docker engine: needs root, buildah (which built the image), runc, iproute2 and PyYAML. The
container gets what docker/compose.yaml gives to `server-cpu`: user, read-only root, no capabilities, volumes,
environment, time to stop. It sits in a network of two containers without a way out (its default route ends in the other
one, where every packet is seen), and the other one asks. Ends with 1 when a check fails.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import shlex
import socket
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

import yaml

ROOT = Path(__file__).parents[1]
SERVICE: dict[str, Any] = yaml.safe_load((ROOT / "docker" / "compose.yaml").read_text())["services"]["server-cpu"]
ASKED, ASKING = ("gram-asked", "10.213.0.1"), ("gram-asking", "10.213.0.2")  # network namespaces and their addresses
PORT = 8000
PATIENCE_S = 120.0
STRANGERS = "strangers"  # the file that the sniffer writes

# Of a block that is kept for documents: nobody has them. Looking up any name asks the second.
STRANGER, RESOLVER = "198.51.100.1", "198.51.100.53"

CLIENT = f"""
import io, json
from PIL import Image
from server.client import GramClient

def picture(n):
    out = io.BytesIO()
    Image.linear_gradient("L").rotate(n * 20).convert("RGB").save(out, "PNG")
    return out.getvalue()

with GramClient("http://server:{PORT}") as client:
    answer = client.classify([picture(n) for n in range(8)], ["a ramp", "a cat", "a dog"])
told = [[one["label"], one["adaptation"]["method"], one["adaptation"]["status"]] for one in answer["results"]]
print(json.dumps(told))
"""


def main() -> int:
    options = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    options.add_argument("--image", default="gram-server")
    options.add_argument("--buildah", default="buildah")
    options.add_argument("--sniff", type=Path, help=argparse.SUPPRESS)
    chosen = options.parse_args()
    if chosen.sniff is not None:
        sniff(chosen.sniff)
    buildah = shlex.split(chosen.buildah)
    with tempfile.TemporaryDirectory() as folder, mounted(buildah, chosen.image) as image, network():
        checks = look(Image(*image), Path(folder))
    failed = [name for name, (passed, _) in checks.items() if not passed]
    sys.stdout.write(
        json.dumps({name: found for name, (_, found) in checks.items()} | {"failed": failed}, indent=1) + "\n"
    )
    return 1 if failed else 0


# ---- what is set up ----


@contextlib.contextmanager
def mounted(buildah: list[str], image: str) -> Iterator[tuple[Path, dict[str, Any]]]:
    """The root file system of the image, and its configuration."""
    name = output(*buildah, "from", "--pull-never", image)
    try:
        config = json.loads(output(*buildah, "inspect", "--type", "image", image))["Docker"]["config"]
        yield Path(output(*buildah, "mount", name)), config
    finally:
        quiet(*buildah, "rm", name)


@contextlib.contextmanager
def network() -> Iterator[None]:
    """Two namespaces with one cable between them."""
    try:
        for name, _ in (ASKED, ASKING):
            output("ip", "netns", "add", name)
        ends = ("gram-a", "gram-b")
        output("ip", "link", "add", ends[0], "type", "veth", "peer", "name", ends[1])
        for end, (name, address), (_, other) in zip(ends, (ASKED, ASKING), (ASKING, ASKED), strict=True):
            output("ip", "link", "set", end, "netns", name)
            for command in (
                f"addr add {address}/24 dev {end}",
                f"link set {end} up",
                "link set lo up",
                f"route add default via {other}",
            ):
                output("ip", "-n", name, *command.split())
        yield
    finally:
        for name, _ in (ASKED, ASKING):
            quiet("ip", "netns", "del", name)


class Image:
    """An image whose containers are made by runc."""

    def __init__(self, rootfs: Path, config: dict[str, Any]) -> None:
        self.rootfs, self.config = rootfs, config
        passwd = (rootfs / "etc" / "passwd").read_text()
        found = re.search(rf"^{SERVICE['user']}:[^:]*:(\d+):(\d+):", passwd, re.MULTILINE)
        assert found is not None, "the image has no such user"
        self.user = {"uid": int(found[1]), "gid": int(found[2])}

    def bundle(self, folder: Path, namespace: str, command: list[str], environment: dict[str, str]) -> Path:
        """A folder that `runc run` takes; volumes lie beside it, owned as the image's folders are."""
        folder.mkdir(parents=True)
        output("runc", "spec", "--bundle", str(folder))
        spec = json.loads((folder / "config.json").read_text())
        spec["process"] |= {
            "terminal": False,
            "user": self.user,
            "args": command,
            "cwd": self.config["WorkingDir"],
            "env": [*self.config["Env"], *(f"{name}={value}" for name, value in environment.items())],
            "noNewPrivileges": True,
            "capabilities": {kind: [] for kind in spec["process"]["capabilities"]},
        }
        spec["root"] = {"path": str(self.rootfs), "readonly": SERVICE["read_only"]}
        for target in SERVICE["tmpfs"]:
            spec["mounts"].append({"destination": target, "type": "tmpfs", "source": "tmpfs", "options": ["mode=1777"]})
        for volume in SERVICE["volumes"]:
            source, target, *mode = re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", volume).split(":")
            if not source.startswith("/"):
                source = str(folder.parent / source)
                Path(source).mkdir(exist_ok=True)
                os.chown(source, self.user["uid"], self.user["gid"])
            spec["mounts"].append(
                {"destination": target, "type": "bind", "source": source, "options": ["rbind", *(mode or ["rw"])]}
            )
        for each in spec["linux"]["namespaces"]:
            if each["type"] == "network":
                each["path"] = f"/run/netns/{namespace}"
        (folder / "hosts").write_text(f"127.0.0.1 localhost\n{ASKED[1]} server\n")  # as Docker's names do
        (folder / "resolv.conf").write_text(f"nameserver {RESOLVER}\noptions timeout:1 attempts:1\n")
        for name in ("hosts", "resolv.conf"):
            own = {"destination": f"/etc/{name}", "type": "bind", "source": str(folder / name)}
            spec["mounts"].append(own | {"options": ["rbind", "ro"]})
        spec["linux"].pop("resources", None)
        (folder / "config.json").write_text(json.dumps(spec))
        return folder


# ---- what is looked at ----


def look(image: Image, folder: Path) -> dict[str, tuple[bool, Any]]:
    """Every check by name: whether it passed, and what was found."""
    environment = {
        name: re.sub(r"\$\{\w+:[-+]([^}]*)\}", value_when_unset, value)
        for name, value in SERVICE["environment"].items()
    }
    serve = [*image.config["Entrypoint"], *image.config["Cmd"]]
    checks: dict[str, tuple[bool, Any]] = {}
    here = ["ip", "netns", "exec", ASKING[0], sys.executable, __file__, "--sniff", str(folder / STRANGERS)]
    sniffer = subprocess.Popen(here)
    began = time.monotonic()
    with (folder / "log").open("w") as log:
        bundle = image.bundle(folder / "server" / "bundle", ASKED[0], serve, environment)
        server = subprocess.Popen(["runc", "run", "--bundle", str(bundle), "gram-check"], stdout=log, stderr=log)
    try:
        while inside(*image.config["Healthcheck"]["Test"][1:]).returncode != 0:
            if server.poll() is not None or time.monotonic() - began > PATIENCE_S:
                raise SystemExit("never healthy:\n" + (folder / "log").read_text())
            time.sleep(0.2)
        checks["healthy after seconds"] = True, round(time.monotonic() - began, 1)
        asking = image.bundle(folder / "client" / "bundle", ASKING[0], ["python", "-c", CLIENT], {})
        answer = quiet("runc", "run", "--bundle", str(asking), "gram-asks")
        results = json.loads(answer.stdout) if answer.returncode == 0 else answer.stderr
        checks["answer to another container"] = answer.returncode == 0 and len(results) == 8, results
        ports = listening()
        checks["listening ports"] = ports == [PORT], ports
        for place in ("/", "/opt/gram", "/models", "/usr/bin"):
            write = inside("python", "-c", f"open('{place}/x', 'w')")
            checks[f"cannot write to {place}"] = write.returncode != 0, last_line(write.stderr)
        status = inside("cat", "/proc/1/status").stdout
        rights = dict(re.findall(r"^(Uid|CapEff|CapBnd|NoNewPrivs):\s*(\S+)", status, re.MULTILINE))
        none = "0" * 16
        wanted = {"Uid": str(image.user["uid"]), "CapEff": none, "CapBnd": none, "NoNewPrivs": "1"}
        checks["rights"] = rights == wanted, rights
        checks["packets to anyone else"] = (seen := heard(folder)) == [], seen
        # Would they have been noticed? Now the container does send some.
        inside("python", "-c", f"import socket; socket.socket(type=socket.SOCK_DGRAM).sendto(b'x', ('{STRANGER}', 9))")
        inside("python", "-c", "import socket; socket.getaddrinfo('example.org', 443)")
        seen = heard(folder)
        checks["packets of our own trial"] = seen == [STRANGER, RESOLVER], seen
        began = time.monotonic()
        output("runc", "kill", "gram-check", "TERM")
        code = server.wait(float(SERVICE["stop_grace_period"].removesuffix("s")))
        checks["SIGTERM: exit code, seconds"] = code == 0, [code, round(time.monotonic() - began, 1)]
    finally:
        quiet("runc", "delete", "--force", "gram-check")
        sniffer.kill()
        sniffer.wait()
    for name, more, expected in (
        ("no GPU", {"GRAM_DEVICE": "cuda"}, 65),
        ("unknown setting", {"GRAM_MAX_IMAGE": "1"}, 64),
        ("unwritable volume", {"GRAM_CLASS_SET_DIR": "/models/sets"}, 64),
        ("model that is not there", {"GRAM_MODEL": "ViT-B-16/openai"}, 65),
        ("checkpoint that is not there", {"GRAM_CHECKPOINT": "/state/none"}, 65),
    ):
        bundle = image.bundle(folder / name.replace(" ", "-") / "bundle", ASKED[0], serve, environment | more)
        done = quiet("runc", "run", "--bundle", str(bundle), "gram-check")
        checks[f"{name}: exit code, last line"] = (
            done.returncode == expected,
            [done.returncode, json.loads(last_line(done.stderr))["event"]],
        )
    return checks


def value_when_unset(found: re.Match[str]) -> str:
    """Compose's `${NAME:-value}` and `${NAME:+value}` where NAME is not set."""
    return found[1] if ":-" in found[0] else ""


def listening() -> list[int]:
    """TCP and UDP ports on which anything listens in the server's network."""
    rows = [
        row.split()
        for table, wanted in (("tcp", "0A"), ("tcp6", "0A"), ("udp", "07"), ("udp6", "07"))
        for row in output("ip", "netns", "exec", ASKED[0], "cat", f"/proc/net/{table}").splitlines()[1:]
        if row.split()[3] == wanted
    ]
    return sorted({int(row[1].rpartition(":")[2], 16) for row in rows})


def heard(folder: Path) -> list[str]:
    """Whom the server's container has sent anything to, but for the other container."""
    time.sleep(1.0)  # for what is on its way
    told = folder / STRANGERS
    return sorted(set(told.read_text().split())) if told.exists() else []


def sniff(told: Path) -> NoReturn:
    """Write whom the first network sends to, but for the two of this network, until killed."""
    ours = {socket.inet_aton(address) for _, address in (ASKED, ASKING)}
    with socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(3)) as tap, told.open("a", buffering=1) as out:
        while True:
            packet = tap.recv(2048)
            (kind,) = struct.unpack("!H", packet[12:14])
            if kind == 0x0800 and packet[26:30] == socket.inet_aton(ASKED[1]) and packet[30:34] not in ours:
                out.write(socket.inet_ntoa(packet[30:34]) + "\n")


def inside(*command: str) -> subprocess.CompletedProcess[str]:
    """A command beside the server, in its container."""
    return quiet("runc", "exec", "gram-check", *command)


def quiet(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, check=False)


def last_line(text: str) -> str:
    return text.strip().rpartition("\n")[2]


def output(*command: str) -> str:
    """What a command prints; raises SystemExit with what it complained of."""
    done = quiet(*command)
    if done.returncode:
        raise SystemExit(f"{' '.join(command[:4])}: {done.stderr.strip()}")
    return done.stdout.strip()


if __name__ == "__main__":
    sys.exit(main())
