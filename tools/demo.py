# SPDX-License-Identifier: LGPL-2.1-or-later
"""``make demo``: real files go through a real server and back, and are compared.

    demo.py [FOLDER]

Parallel clients upload every regular file of a folder by HTTP forms to a server with Azurite as its backend. Then the
server is restarted with an empty cache, and every file is downloaded twice, cold and warm, and compared by SHA-256.
The default is Debian's kernel package for arm64: the image, about a thousand device trees, thousands of modules.
"""

from __future__ import annotations

import hashlib
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import quote

import requests
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from tests.support.azurite import Azurite, running_azurite  # noqa: E402
from tests.support.harness import Server, running  # noqa: E402

CLIENTS = 8
BLOCK = 1 << 20  # bytes
TIMEOUT = 120  # seconds without a byte
KERNELS = (("arm64", "linux-image-arm64"), ("native", "linux-image-amd64"))
_local = threading.local()


def main() -> int:
    """Run the demonstration; returns 0 if every file came back unchanged."""
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else kernel_package(ROOT / ".tools" / "demo")
    files = regular_files(folder)
    if not files:
        print(f"demo: {folder} has no files", file=sys.stderr)
        return 1
    print(f"demo: {len(files)} files of {folder}, {CLIENTS} parallel clients", flush=True)
    with tempfile.TemporaryDirectory(prefix="kci-storage-demo-") as work:
        passes = run(files, Path(work))
    return report(passes)


# The input


def kernel_package(folder: Path) -> Path:
    """The folder of the unpacked kernel package, which is downloaded if necessary."""
    unpacked = folder / "unpacked"
    if not unpacked.exists():
        package = download_kernel(folder)
        shutil.rmtree(folder / "unpacking", ignore_errors=True)
        subprocess.run(["dpkg-deb", "-x", package, folder / "unpacking"], check=True)
        (folder / "unpacking").rename(unpacked)
    return unpacked


def download_kernel(folder: Path) -> Path:
    """Download the kernel package for arm64, or, if the apt sources have none, for this machine; returns its file."""
    for architecture, name in KERNELS:
        print(f"demo: downloading {name}", flush=True)
        try:
            # This package only depends on that of the current version.
            depends = subprocess.check_output(["dpkg-deb", "-f", download(folder, architecture, name), "Depends"])
            return download(folder, architecture, re.split(r"[ ,(]", depends.decode())[0])
        except subprocess.CalledProcessError:
            continue
    raise SystemExit("demo: no kernel package could be downloaded; name another folder: make demo DEMO_DIR=…")


def download(folder: Path, architecture: str, package: str) -> Path:
    """Download a Debian package; returns its file."""
    subprocess.run([ROOT / "tools" / "apt-download.sh", folder, architecture, package], check=True)
    return max(folder.glob(f"{package}_*.deb"), key=lambda path: path.stat().st_mtime)


@dataclass
class File:
    """One file of the input."""

    path: Path
    key: str
    size: int  # bytes
    sha256: str


def regular_files(folder: Path) -> list[File]:
    """Every regular file of a folder and its subfolders, without links and devices."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file() and not path.is_symlink())
    return [describe(folder, path) for path in paths]


def describe(folder: Path, path: Path) -> File:
    """The properties of a file, to compare."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256")
        return File(path, f"demo/{path.relative_to(folder)}", file.tell(), digest.hexdigest())


# The passes


@dataclass
class Pass:
    """The result of sending all files in one direction."""

    name: str
    files: int = 0
    size: int = 0  # bytes
    seconds: float = 0
    problems: list[str] = field(default_factory=list)
    served: dict[str, int] = field(default_factory=dict)  # downloads by cache result: hit, miss …


def run(files: list[File], work: Path) -> list[Pass]:
    """Upload all files, restart with an empty cache, and download them twice."""
    folders = [work / name for name in ("azurite", "server")]
    for folder in folders:
        folder.mkdir()
    with running_azurite(folders[0]) as azurite, running(server_over(azurite, folders[1])) as server:
        passes = [transfer("upload", files, lambda file: upload(server, file))]
        server.stop()
        shutil.rmtree(server.cache_directory)
        server.start()
        for name in ("cold download", "warm download"):
            before = served(server)
            passes.append(transfer(name, files, lambda file: fetch(server, file)))
            passes[-1].served = {result: count - before.get(result, 0) for result, count in served(server).items()}
    return passes


def server_over(azurite: Azurite, folder: Path) -> Server:
    """A server with a new container of Azurite."""
    azure = {"account": azurite.account, "key": azurite.key, "endpoint": azurite.endpoint}
    return Server(folder, {"driver": "azure", "azure": {**azure, "container": azurite.new_container()}})


def transfer(name: str, files: list[File], send: Callable[[File], str | None]) -> Pass:
    """Call a function for every file, by parallel clients.

    :param send: returns what went wrong, or None.
    """
    result = Pass(name)
    start = time.monotonic()
    interval = 0.1 if sys.stderr.isatty() else 10  # seconds between two updates of the bar
    total = sum(file.size for file in files)
    with (
        ThreadPoolExecutor(CLIENTS) as clients,
        tqdm(total=total, desc=f"{name:13}", unit="B", unit_scale=True, mininterval=interval) as bar,
    ):
        for file, problem in zip(files, clients.map(lambda file: attempt(send, file), files), strict=True):
            bar.update(file.size)
            result.problems += [f"{name}: {file.key}: {problem}"] if problem else []
    result.seconds = time.monotonic() - start
    result.files, result.size = len(files), total
    return result


def attempt(send: Callable[[File], str | None], file: File) -> str | None:
    """Send a file; a failed request is a problem of this file alone."""
    try:
        return send(file)
    except (requests.RequestException, OSError) as exc:
        return str(exc)


def session() -> requests.Session:
    """The session of the calling thread."""
    if not hasattr(_local, "session"):
        _local.session = requests.Session()
    found: requests.Session = _local.session
    return found


def upload(server: Server, file: File) -> str | None:
    """Upload a file by a form, as KernelCI's own clients do; returns what went wrong, or None."""
    folder, _, name = file.key.rpartition("/")
    with file.path.open("rb") as content:
        response = session().post(
            f"{server.url}/upload",
            headers={"Authorization": server.token("demo@example.com")},
            data={"path": folder},
            files={"file0": (name, content)},
            timeout=TIMEOUT,
        )
    if response.status_code != 200:
        return f"{response.status_code} {response.text.strip()}"
    (stored,) = response.json()["files"]
    return difference(file, stored["path"], stored["size"], stored["sha256"])


def fetch(server: Server, file: File) -> str | None:
    """Download a file, and compare it; returns what is wrong, or None."""
    digest, size = hashlib.sha256(), 0
    with session().get(f"{server.url}/{quote(file.key)}", stream=True, timeout=TIMEOUT) as response:
        if response.status_code != 200:
            return f"{response.status_code} {response.text.strip()}"
        for block in response.iter_content(BLOCK):
            digest.update(block)
            size += len(block)
    return difference(file, file.key, size, digest.hexdigest())


def difference(file: File, key: str, size: int, sha256: str) -> str | None:
    """The difference between a file and the one that came back; None: there is none."""
    if (key, size, sha256) == (file.key, file.size, file.sha256):
        return None
    return f"expected {file.size} bytes with SHA-256 {file.sha256}, got {key}, {size} bytes with {sha256}"


def served(server: Server) -> dict[str, int]:
    """The number of downloads by cache result, of all workers since the server's start."""
    text = requests.get(f"{server.url}/metrics", timeout=TIMEOUT).text
    found = re.findall(r'^kci_storage_cache_requests_total\{result="(\w+)"\} (\S+)$', text, flags=re.MULTILINE)
    return {result: round(float(count)) for result, count in found}


# The outcome


def report(passes: Iterable[Pass]) -> int:
    """Print the figures; returns the exit code."""
    print(f"\n{'':13} {'files':>7} {'MiB':>9} {'seconds':>8} {'files/s':>8} {'MiB/s':>7}  cache")
    problems = []
    for item in passes:
        mebibytes = item.size / 2**20
        rates = f"{item.files / item.seconds:8.1f} {mebibytes / item.seconds:7.1f}"
        cache = ", ".join(f"{count} {result}" for result, count in item.served.items() if count)
        print(f"{item.name:13} {item.files:7} {mebibytes:9.1f} {item.seconds:8.1f} {rates}  {cache}")
        problems += item.problems
    print("\nevery file came back as it went" if not problems else f"\n{len(problems)} problems:")
    print("\n".join(problems[:20]))
    return bool(problems)


if __name__ == "__main__":
    sys.exit(main())
