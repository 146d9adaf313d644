# SPDX-License-Identifier: LGPL-2.1-or-later
"""``make image-test``: builds the container's image, and tests it.

    image.py [BASE]

The default base is made of Debian's packages. So no registry of images is needed, only Debian's mirror and PyPI, as
configured on this machine. Podman keeps everything in .tools/image-test, and needs no daemon.

Run as root, with the Debian packages podman, runc, iptables, netavark and mmdebstrap.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
KEPT = ROOT / ".tools" / "image-test"
PACKAGES = {"podman": "podman", "runc": "runc", "iptables": "iptables", "mmdebstrap": "mmdebstrap"}  # by program
RELEASE = "trixie"  # of Debian; it has Python 3.13, as the Dockerfile expects
BASE, IMAGE = "localhost/kci-storage-base", "localhost/kci-storage"
AUTHORITIES = Path("/etc/ssl/certs/ca-certificates.crt")
SECONDS = 60  # the time-out of every wait; each should take a few
BIND = "0.0.0.0:3000"
CONFIGURATION = f"""\
driver = "local"
jwt_secret = "only-to-try-it-0123456789abcdef0123456789"
[server]
bind = "{BIND}"
[local]
storage_path = "/var/lib/kci-storage"
[cache]
directory = "/var/cache/kci-storage"
"""


def main() -> int:
    """Build and test the image; returns the exit code."""
    if missing := [package for program, package in PACKAGES.items() if shutil.which(program) is None]:
        print(f"image-test: apt-get install {' '.join(missing)}", file=sys.stderr)
        return 1
    KEPT.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="kci-storage-image-") as work:
        podman = Podman(Path(work))
        base = sys.argv[1] if len(sys.argv) > 1 else made_base(podman, Path(work))
        build(podman, base)
        for trial in TRIALS:
            trial(podman, Path(work))
            say(f"ok: {trial.__name__.replace('_', ' ')}")
    return 0


def say(text: str) -> None:
    """Print the progress."""
    print(f"image-test: {text}", flush=True)


class Podman:
    """Podman with its own store, also on machines without systemd and with low resource limits."""

    def __init__(self, folder: Path):
        self._settings = folder / "containers.conf"
        self._settings.write_text("[containers]\ndefault_ulimits = []\n")  # which a sandbox could not raise
        places = [f"--root={KEPT}/storage", f"--runroot={KEPT}/run"]
        options = ["--runtime=runc", "--cgroup-manager=cgroupfs", "--storage-opt=overlay.skip_mount_home=true"]
        self._command = ["podman", *places, *options]

    def try_it(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Run a command of podman; returns its output and exit code."""
        environ = {**os.environ, "CONTAINERS_CONF": str(self._settings)}
        return subprocess.run([*self._command, *arguments], env=environ, capture_output=True, text=True, cwd=ROOT)

    def __call__(self, *arguments: str) -> str:
        """Run a command of podman, which must succeed; returns its output."""
        done = self.try_it(*arguments)
        if done.returncode:
            raise SystemExit(f"image-test: podman {' '.join(arguments)}\n{done.stdout[-4000:]}{done.stderr[-4000:]}")
        return done.stdout.strip()


# The image


def made_base(podman: Podman, folder: Path) -> str:
    """The name of a base image of Debian with Python, made if necessary. It trusts what this machine trusts."""
    if podman.try_it("image", "exists", BASE).returncode:
        say(f"making a base of Debian {RELEASE}'s packages, once")
        bootstrap = ["mmdebstrap", "--quiet", "--variant=minbase", "--include=python3-venv,ca-certificates"]
        subprocess.run([*bootstrap, RELEASE, folder / "base.tar"], check=True)
        podman("import", str(folder / "base.tar"), f"{BASE}:plain")
        (folder / "Dockerfile").write_text(f"FROM {BASE}:plain\nCOPY {AUTHORITIES.name} {AUTHORITIES}\n")
        shutil.copy(AUTHORITIES, folder)
        podman("build", "--isolation=chroot", f"--tag={BASE}", str(folder))
    return BASE


def build(podman: Podman, base: str) -> None:
    """Build the image from the unchanged Dockerfile. pip has the same configuration as on this machine."""
    begun = time.monotonic()
    secret = ["--secret=id=pip,src=/etc/pip.conf"] if Path("/etc/pip.conf").exists() else []
    options = ["--isolation=chroot", "--network=host", "--format=docker", f"--build-arg=BASE={base}", *secret]
    files = ["--file=deploy/container/Dockerfile", "--ignorefile=deploy/container/Dockerfile.dockerignore"]
    podman("build", *options, *files, f"--tag={IMAGE}", ".")
    sizes = [int(podman("image", "inspect", "--format={{.Size}}", name)) for name in (IMAGE, base)]
    size, of_base = (round(size / 1e6) for size in sizes)
    say(f"built in {time.monotonic() - begun:.0f} s: {size} MB, of which the base is {of_base} MB")


# The tests


class Container:
    """A running container."""

    def __init__(self, podman: Podman, name: str):
        self._podman = podman
        self.name = name
        self.port = int(podman("port", name, "3000/tcp").rpartition(":")[2])

    def exec(self, *command: str) -> str:
        """Run a command in the container; returns its output."""
        return self._podman("exec", self.name, *command)

    def wait_until_healthy(self) -> None:
        """Wait until the image's own health check succeeds."""
        deadline = time.monotonic() + SECONDS
        while self._podman.try_it("healthcheck", "run", self.name).returncode:
            if time.monotonic() > deadline:
                raise SystemExit(f"image-test: not healthy\n{self._podman('logs', self.name)}")

    def connect(self) -> http.client.HTTPConnection:
        """A connection to the server, from outside."""
        return http.client.HTTPConnection("127.0.0.1", self.port, timeout=SECONDS)

    def put(self, key: str, body: object) -> int:
        """Upload a body; returns the status. An iterator is sent in chunks."""
        headers = {"Authorization": f"Bearer {self.exec('kci-storage', 'token', 'me@example.com')}"}
        with contextlib.closing(self.connect()) as connection:
            connection.request("PUT", f"/{key}", body, headers)  # type: ignore[arg-type]
            return connection.getresponse().status

    def get(self, key: str) -> bytes:
        """Download a file."""
        with contextlib.closing(self.connect()) as connection:
            connection.request("GET", f"/{key}")
            return connection.getresponse().read()


@contextlib.contextmanager
def started(podman: Podman, folder: Path, configuration: str = CONFIGURATION) -> Iterator[Container]:
    """A container as in the comment at the Dockerfile's beginning; only its volumes are writable."""
    (folder / "config.toml").write_text(configuration)
    mounts = [f"--volume={folder}/config.toml:/etc/kci-storage/config.toml:ro"]
    mounts += [f"--volume=kci-{place}:/var/{place}/kci-storage" for place in ("cache", "lib")]
    podman("run", "--detach", "--name=kci", "--publish=127.0.0.1::3000", "--read-only", *mounts, IMAGE)
    try:
        yield Container(podman, "kci")
    finally:
        podman("rm", "--force", "--time=0", "kci")
        podman("volume", "rm", "--force", "kci-cache", "kci-lib")


def expect(what: str, found: object, wanted: object) -> None:
    """End the program with a message if a value is not the expected one."""
    if found != wanted:
        raise SystemExit(f"image-test: {what}: {found!r}, not {wanted!r}")


def runs_without_privileges(podman: Podman, folder: Path) -> None:
    """The user is not root, has no capabilities, and is a number, as Kubernetes needs it."""
    with started(podman, folder) as container:
        container.wait_until_healthy()
        status = dict(line.split(":", 1) for line in container.exec("cat", "/proc/1/status").splitlines())
        expect("user ids", status["Uid"].split(), ["3000"] * 4)
        expect("group ids", status["Gid"].split(), ["3000"] * 4)
        expect("capabilities", int(status["CapEff"], 16), 0)
    expect("the image's user", podman("image", "inspect", "--format={{.Config.User}}", IMAGE), "3000:3000")


def stores_files(podman: Podman, folder: Path) -> None:
    """Large and small files are stored in the volumes, also after a restart."""
    content = {"try/small": b"content", "try/large": os.urandom(32 << 20)}
    with started(podman, folder) as container:
        container.wait_until_healthy()
        for key, body in content.items():
            expect(f"upload of {key}", container.put(key, body), http.client.CREATED)
        podman("restart", "--time=30", container.name)
        container = Container(podman, container.name)
        container.wait_until_healthy()
        for key, body in content.items():
            expect(f"download of {key} as uploaded", container.get(key) == body, True)


def ends_in_order(podman: Podman, folder: Path) -> None:
    """After SIGTERM, as by ``docker stop``, the container ends with 0 once the running upload has ended."""
    is_running, may_end, statuses = threading.Event(), threading.Event(), []

    def body() -> Iterator[bytes]:
        yield b"first"
        is_running.set()
        may_end.wait(SECONDS)
        yield b"-done"

    with started(podman, folder) as container:
        container.wait_until_healthy()
        upload = threading.Thread(target=lambda: statuses.append(container.put("try/slow", body())))
        upload.start()
        is_running.wait(SECONDS)
        podman("kill", "--signal=TERM", container.name)
        expect("the container during the upload", inspect(podman, container)["Status"], "running")
        may_end.set()
        upload.join()
        podman("wait", container.name)
        expect("the upload's status", statuses, [http.client.CREATED])
        expect("exit code", inspect(podman, container)["ExitCode"], 0)


def reloads_on_sighup(podman: Podman, folder: Path) -> None:
    """After SIGHUP, the same container applies other users."""
    with started(podman, folder) as container:
        container.wait_until_healthy()
        expect("an upload's status before", container.put("try/before", b"content"), http.client.CREATED)
        user = '[[users]]\nname = "other@example.com"\nprefixes = [""]\n'
        (folder / "config.toml").write_text(CONFIGURATION + user)
        podman("kill", "--signal=HUP", container.name)
        deadline = time.monotonic() + SECONDS
        while (status := container.put("try/after", b"content")) != http.client.FORBIDDEN:
            expect("an upload's status until then", status in (http.client.CREATED, http.client.OK), True)
            expect("applied in time", time.monotonic() < deadline, True)


def refuses_a_broken_configuration(podman: Podman, folder: Path) -> None:
    """The container ends with 78 and one line that says what is wrong."""
    (folder / "config.toml").write_text(CONFIGURATION.replace(BIND, "nowhere"))
    mount = f"--volume={folder}/config.toml:/etc/kci-storage/config.toml:ro"
    done = podman.try_it("run", "--rm", mount, IMAGE)
    expect("exit code", done.returncode, os.EX_CONFIG)
    [line] = [line for line in done.stderr.splitlines() if line.startswith("kci-storage: ")]
    expect("what is wrong", "server.bind: expected host:port" in line, True)


def inspect(podman: Podman, container: Container) -> dict[str, object]:
    """The state of a container."""
    state: dict[str, object] = json.loads(podman("inspect", "--format={{json .State}}", container.name))
    return state


TRIALS = (
    runs_without_privileges,
    stores_files,
    reloads_on_sighup,
    ends_in_order,
    refuses_a_broken_configuration,
)


if __name__ == "__main__":
    sys.exit(main())
