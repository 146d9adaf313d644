"""Whatever is interrupted wherever: what is served is what the backend has, and nothing is left behind."""

from __future__ import annotations

import contextlib
import io
import os
import secrets
import shutil
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from kci_storage.app import Services, build_services
from kci_storage.cache import CONTENT, Cache
from kci_storage.config import load
from kci_storage.errors import ObjectNotFound, StorageError
from kci_storage.upload import ExpectedDigests
from tests.backends import install
from tests.harness import toml
from tests.peers import Peer, dies, peers
from tests.steps import CHANGING, GROWING, Steps, die_at, full_at

KEY = "folder/file.txt"
OLD, NEW = b"old content", b"the new content"
MOST_STEPS = 300
SHARED_MEMORY = Path("/dev/shm")


# What is done to a server's folders in one step after the other; all of this runs in another process


def find_drivers(folder: Path) -> None:
    """Have this process find the drivers for tests."""
    sys.path.extend(install(folder).split(os.pathsep))


class World:
    """A server's folders, with a backend of files behind the cache, and the parts of a worker."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.cache_directory = folder / "cache"
        self._config_path = folder / "config.toml"
        self._config_path.write_text(
            toml(
                {
                    "driver": "remote",
                    "jwt_secret": "x" * 32,
                    "cache": {"directory": self.cache_directory},
                    "local": {"storage_path": folder / "storage"},
                }
            )
        )
        self.services = self.new_worker()

    def new_worker(self) -> Services:
        """The parts of one more worker."""
        return build_services(load(self._config_path))

    @property
    def cache(self) -> Cache:
        """The directory, as one more process sees it."""
        return Cache(self.cache_directory)

    def put(self, content: bytes) -> None:
        self.services.uploads.put(KEY, "text/plain", io.BytesIO(content), ExpectedDigests(), None)

    def delete(self) -> None:
        self.services.objects.delete(KEY)

    def get(self) -> bytes | None:
        """What a client gets, as soon as it has been brought into the cache."""
        try:
            with contextlib.closing(self.services.objects.open(KEY)) as content:
                return b"".join(content.read(0, content.info.size))
        except ObjectNotFound:
            return None
        finally:
            for thread in threading.enumerate():
                if thread.name in ("fill", "revalidate"):
                    thread.join()

    def stored(self) -> bytes | None:
        """What the backend has."""
        try:
            with self.services.driver.read(KEY) as reader:
                return b"".join(reader)
        except ObjectNotFound:
            return None

    def cool(self) -> None:
        """Have the backend's object, but no copy of it."""
        with self.cache.writing(KEY, 1):
            self.cache.remove(KEY)

    def content(self) -> Path:
        """The copy's content file."""
        return next(self.cache_directory.glob(f"??/*{CONTENT}"))

    def temporary_files(self) -> list[Path]:
        """Those of the backend."""
        return list((self.folder / "storage/.kci/tmp").glob("*"))


def prepare_copy(world: World) -> None:
    world.put(OLD)
    assert world.get() == OLD


def prepare_cold(world: World) -> None:
    prepare_copy(world)
    world.cool()


def prepare_nothing(world: World) -> None:
    if world.stored() is not None:
        world.delete()


def prepare_doubt(world: World) -> None:
    prepare_copy(world)
    with world.cache.writing(KEY, 1):
        world.cache.doubt(KEY)


def prepare_broken(world: World) -> None:
    prepare_copy(world)
    world.content().unlink()


def prepare_leftovers(world: World) -> None:
    """All that a crash can leave, at once."""
    prepare_doubt(world)
    cache = world.cache
    with cache.writing(KEY, 1):
        part, spool, other = cache.new_part(KEY), cache.new_spool(), cache.new_part("another key")
        for file in (part, spool, other):
            file.close()
    cache.slot(KEY).content("1" * 16).write_bytes(b"stray")
    cache.slot("another key").fill.touch()
    (cache.locks.directory / cache.slot(KEY).digest).touch()


def evict(world: World) -> None:
    content = world.content()
    status = content.stat()
    world.cache.evict(content, max(status.st_atime, status.st_mtime))


def sweep(world: World) -> None:
    world.cache.sweep()


class Scenario:
    """Something that a worker does.

    :param prepare: what there is before it.
    :param outcomes: what the backend may have after it was interrupted, the last being that of success.
    """

    def __init__(self, prepare: Callable[[World], None], act: Callable[[World], object], *outcomes: bytes | None):
        self.prepare = prepare
        self.act = act
        self.outcomes = outcomes


SCENARIOS = {
    "upload": Scenario(prepare_nothing, lambda world: world.put(NEW), None, NEW),
    "overwrite": Scenario(prepare_copy, lambda world: world.put(NEW), OLD, NEW),
    "overwrite cold": Scenario(prepare_cold, lambda world: world.put(NEW), OLD, NEW),
    "overwrite doubtful": Scenario(prepare_doubt, lambda world: world.put(NEW), OLD, NEW),
    "delete": Scenario(prepare_copy, World.delete, OLD, None),
    "fill": Scenario(prepare_cold, World.get, OLD),
    "revalidate": Scenario(prepare_doubt, World.get, OLD),
    "heal": Scenario(prepare_broken, World.get, OLD),
    "evict": Scenario(prepare_copy, evict, OLD),
    "sweep": Scenario(prepare_leftovers, sweep, OLD),
}
scenarios = pytest.mark.parametrize("name", SCENARIOS)


def kill_everywhere(folder: Path, name: str) -> int:
    """Kill a worker at each step of a scenario; how many steps it has."""
    world, scenario = World(folder), SCENARIOS[name]
    for number in range(1, MOST_STEPS):
        scenario.prepare(world)

        def act(number: int = number) -> None:
            with Steps(folder, CHANGING, die_at(number)).counted():
                scenario.act(world)

        killed = dies(act)
        try:
            check_after_kill(world, scenario, killed)
        except AssertionError as exc:
            raise AssertionError(f"killed at step {number}: {exc}") from None
        if not killed:
            return number - 1
    raise AssertionError("it does not end")


def check_after_kill(world: World, scenario: Scenario, killed: bool) -> None:
    stored = world.stored()
    assert stored in (scenario.outcomes if killed else scenario.outcomes[-1:]), f"the backend has {stored!r}"
    world.services = world.new_worker() if stored is None or scenario.outcomes[0] is None else world.services
    first = world.get()  # by a worker that remembers the old version, before anybody has cleared up
    assert first == stored or (killed and first == OLD), f"at first {first!r} is served, not {stored!r}"
    world.cache.recover_locks()
    for _ in range(2):
        then = world.get()
        assert then == stored, f"then {then!r} is served, not {stored!r}"
    world.cache.sweep()
    world.services.housekeeper._driver = None
    world.services.driver._driver.inner.sweep()
    wrong = world.cache.check() + [str(path) for path in world.temporary_files()]
    assert wrong == [], wrong
    assert world.get() == stored


def fill_everywhere(folder: Path, name: str, for_ever: bool) -> int:
    """Have the cache's disk full at each step of a scenario; how many steps it has."""
    world, scenario = World(folder), SCENARIOS[name]
    for number in range(1, MOST_STEPS):
        scenario.prepare(world)
        steps = Steps(world.cache_directory, GROWING, full_at(number, for_ever))
        failed = False
        with steps.counted():
            try:
                scenario.act(world)
            except StorageError:
                failed = True
            served = world.get()
        try:
            check_after_full_disk(world, scenario, failed, served)
        except AssertionError as exc:
            raise AssertionError(f"full at step {number}: {exc}") from None
        if steps.count < number:
            return steps.count
    raise AssertionError("it does not end")


def check_after_full_disk(world: World, scenario: Scenario, failed: bool, served: bytes | None) -> None:
    stored = world.stored()
    assert stored in (scenario.outcomes if failed else scenario.outcomes[-1:]), f"the backend has {stored!r}"
    assert served == stored, f"with a full disk {served!r} is served, not {stored!r}"
    assert world.get() == stored
    if scenario.prepare is not prepare_leftovers:
        wrong = [problem for problem in world.cache.check() if not problem.startswith("usage")]
        assert wrong == [], wrong
    world.cache.sweep()
    assert world.cache.check() == [], world.cache.check()


@pytest.fixture(scope="module")
def worker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Peer]:
    """A process that finds the drivers for tests."""
    with peers(1) as [peer]:
        peer.call(find_drivers, tmp_path_factory.mktemp("packages"))
        yield peer


class TestEveryStep:
    @pytest.fixture
    def folder(self, tmp_path: Path) -> Iterator[Path]:
        """In memory, where there is such a place: thousands of files are flushed."""
        if not os.access(SHARED_MEMORY, os.W_OK):
            yield tmp_path
            return
        folder = SHARED_MEMORY / f"kci-storage-test-{secrets.token_hex(8)}"
        folder.mkdir()
        yield folder
        shutil.rmtree(folder)

    @scenarios
    def test_killed(self, worker: Peer, folder: Path, name: str) -> None:
        assert worker.call(kill_everywhere, folder, name) >= 2

    @scenarios
    @pytest.mark.parametrize("for_ever", [False, True], ids=["once", "from_then_on"])
    def test_full_disk(self, worker: Peer, folder: Path, name: str, for_ever: bool) -> None:
        assert worker.call(fill_everywhere, folder, name, for_ever) >= 1
