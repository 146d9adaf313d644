# SPDX-License-Identifier: LGPL-2.1-or-later
"""Crashes at any step: the server serves what the backend has, and nothing is left behind."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import os
import secrets
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent import futures
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import requests

from kci_storage.cache.directory import Cache
from kci_storage.cache.names import CONTENT
from kci_storage.config.reading import load
from kci_storage.errors import ObjectNotFound, StorageError
from kci_storage.services import Services, build_services
from kci_storage.store.form_receiver import FormPlan, store_form
from kci_storage.store.uploads import ExpectedDigests
from tests.support.azurite import Azurite
from tests.support.backends import Pauses, install
from tests.support.harness import START_SECONDS, Server, toml, wait_until
from tests.support.peers import Peer, dies, peers
from tests.support.steps import CHANGING, GROWING, Steps, die_at, full_at
from tests.support.wire import BOUNDARY, FORM_TYPE, SECONDS, Wire, form, get, part, put, request

KEY = "folder/file.txt"
OLD, NEW = b"old content", b"the new content"
MAX_STEPS = 300
WORKERS = 3
SHARED_MEMORY = Path("/dev/shm")


# What is done to a server's folders in one step after the other; all of this runs in another process


def find_drivers(folder: Path) -> None:
    """Have this process find the drivers for tests."""
    sys.path.extend(install(folder).split(os.pathsep))


class Body(io.BytesIO):
    """A request's body that was received completely."""

    def __init__(self, content: bytes):
        super().__init__(content)
        self.length = len(content)


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
        self.services.uploads.put(KEY, "text/plain", Body(content), ExpectedDigests(), None)

    def put_form(self, *parts: bytes) -> None:
        plan = FormPlan(admit=lambda key: None, content_type=lambda key: "text/plain", tags=lambda key: {})
        store_form(self.services.uploads, Body(form(*parts)), BOUNDARY.encode(), plan)

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
            futures.wait(tuple(self.services.fills._submitted))
            for thread in threading.enumerate():
                if thread.name == "revalidate":
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
        world.cache.doubt(KEY, world.cache.known_version(KEY), time.time() + 60)


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
    cache.location(KEY).content("1" * 16).write_bytes(b"stray")
    cache.location("another key").fill.touch()
    (cache.locks.directory / cache.location(KEY).digest).touch()


FILES = part("file0", b"another", "another"), part("file1", NEW, KEY)
PATH = part("path", b"/")


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
    "form": Scenario(prepare_copy, lambda world: world.put_form(PATH, *FILES), OLD, NEW),
    "form that is spooled": Scenario(prepare_copy, lambda world: world.put_form(*FILES, PATH), OLD, NEW),
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
    for number in range(1, MAX_STEPS):
        scenario.prepare(world)

        def act(number: int = number) -> None:
            world.services = world.new_worker()  # in a fork there are no threads of the one that was
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
    first = world.get()  # by a worker that remembers the old version, before the entry is repaired
    assert first == stored or (killed and first == OLD), f"at first {first!r} is served, not {stored!r}"
    world.cache.recover_locks()
    for _ in range(2):
        then = world.get()
        assert then == stored, f"then {then!r} is served, not {stored!r}"
    world.cache.sweep()
    world.services.housekeeper._driver = None
    world.services.driver._driver._driver.inner.sweep()
    wrong = world.cache.check() + [str(path) for path in world.temporary_files()]
    assert wrong == [], wrong
    assert world.get() == stored


def fill_everywhere(folder: Path, name: str, for_ever: bool) -> int:
    """Have the cache's disk full at each step of a scenario; how many steps it has."""
    world, scenario = World(folder), SCENARIOS[name]
    for number in range(1, MAX_STEPS):
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


# Real servers


class TestRealServers:
    """A worker of a real server, over a real Azurite, is killed in the middle of its work."""

    pytestmark = pytest.mark.expected_errors("was sent SIGKILL")

    @pytest.fixture
    def pauses(self, tmp_path: Path) -> Pauses:
        return Pauses(tmp_path, behind="azure")

    @pytest.fixture
    def server(self, start_server: Callable[..., Server], azurite: Azurite, pauses: Pauses) -> Iterator[Server]:
        """A server that waits where the test says, and of which nothing is left after a sweep."""
        settings = dataclasses.asdict(azurite.settings())
        server = start_server("pausing", azure=settings, server={"workers": WORKERS}, environ=pauses.environ)
        yield server
        server.stop()
        Cache(server.cache_directory).sweep()

    @pytest.mark.parametrize("method", ["PUT", "POST"])
    def test_in_the_middle_of_an_upload(self, server: Server, method: str) -> None:
        data = upload(server, method, secrets.token_bytes(20_000_000))  # Azure gets some blocks of it
        for share in (0.001, 0.5, 0.999):
            store(server, OLD)
            with Wire(server) as wire:
                wire.send(data[: int(len(data) * share)])
                [pid] = wait_until(lambda: writers(server), SECONDS, "the upload")
                kill(server, pid)
            assert get_from_all(server) == {OLD}
            store(server, NEW)
            assert get_from_all(server) == {NEW}

    @pytest.mark.parametrize(
        ("point", "expected"), [("before-commit", OLD), ("after-commit", NEW)], ids=["before", "after"]
    )
    def test_around_the_backends_commit(self, server: Server, pauses: Pauses, point: str, expected: bytes) -> None:
        store(server, OLD)
        assert get_from_all(server) == {OLD}  # every worker remembers it
        kill_at(server, pauses, point, lambda: store(server, NEW))
        # No request asks for it, but the next worker repairs it.
        wait_until(lambda: served(server) == expected, START_SECONDS, "the backend's version")
        assert get_from_all(server) == {expected}

    @pytest.mark.parametrize(
        ("point", "expected"), [("before-delete", OLD), ("after-delete", None)], ids=["before", "after"]
    )
    def test_around_the_backends_deletion(
        self, server: Server, pauses: Pauses, point: str, expected: bytes | None
    ) -> None:
        store(server, OLD)
        assert get_from_all(server) == {OLD}
        kill_at(server, pauses, point, lambda: delete(server))
        wait_until(lambda: served(server) == expected, START_SECONDS, "the backend's version")
        assert get_from_all(server) == {expected}

    def test_after_the_commit_of_a_new_file(self, server: Server, pauses: Pauses) -> None:
        assert get_from_all(server) == {None}
        kill_at(server, pauses, "after-commit", lambda: store(server, NEW))
        wait_until(lambda: served(server) == NEW, START_SECONDS, "the backend's version")
        assert get_from_all(server) == {NEW}

    def test_a_whole_server_between_the_backends_commit_and_the_caches(self, server: Server, pauses: Pauses) -> None:
        store(server, OLD)
        with pauses.during("after-commit"), ThreadPoolExecutor() as clients:
            clients.submit(store, server, NEW)
            wait_until(lambda: pauses.waiting("after-commit"), SECONDS, "the commit")
            server.kill()
        server.start()
        assert get_from_all(server) == {NEW}  # no worker takes a request before the dead have been seen to

    def test_a_dead_writers_key_is_served_while_the_backend_is_away(
        self, server: Server, pauses: Pauses, azurite: Azurite
    ) -> None:
        store(server, OLD)
        kill_at(server, pauses, "before-commit", lambda: store(server, NEW))
        wait_until(lambda: not Cache(server.cache_directory).locks.names(), START_SECONDS, "a doubt")
        with stopped(azurite):
            answer = get(server, KEY)
        assert (answer.content, answer.headers["X-Cache"]) == (OLD, "stale")

    def test_a_fill_from_before_a_commit_that_was_cut_off_is_not_kept(self, server: Server, pauses: Pauses) -> None:
        """It has read the old version, and ends after the writer's death."""
        store(server, OLD)
        cool(server)
        with ThreadPoolExecutor() as clients, pauses.during("in-read"):
            clients.submit(served, server)
            wait_until(lambda: pauses.waiting("in-read"), SECONDS, "a fill")
            kill_at(server, pauses, "after-commit", lambda: store(server, NEW))
        wait_until(lambda: served(server) == NEW, START_SECONDS, "the backend's version")
        assert get_from_all(server) == {NEW}

    @pytest.mark.parametrize("change", ["overwrite", "delete"])
    def test_a_request_after_a_change_gets_nothing_from_before_it(
        self, server: Server, pauses: Pauses, change: str
    ) -> None:
        """A fill that has read the old version is running, and has not told other processes yet."""
        store(server, OLD)
        cool(server)
        with ThreadPoolExecutor() as clients:
            with pauses.during("in-read"):
                before = clients.submit(served, server)
                wait_until(lambda: pauses.waiting("in-read"), SECONDS, "a fill")
                expected = NEW if change == "overwrite" else None
                store(server, NEW) if expected else delete(server)
                cool(server)
                after = clients.submit(served, server)
                wait_until(
                    lambda: after.done() or len(pauses.waiting("in-read")) == 2, SECONDS, "a question of its own"
                )
            assert after.result() == expected
            assert before.result() in (OLD, expected)
        assert get_from_all(server) == {expected}


def store(server: Server, content: bytes) -> None:
    put(server, KEY, content).raise_for_status()


def delete(server: Server) -> None:
    requests.delete(f"{server.url}/{KEY}", headers=server.headers(), timeout=SECONDS).raise_for_status()


def upload(server: Server, method: str, content: bytes) -> bytes:
    """The bytes of a request that stores a content."""
    if method == "PUT":
        return request("PUT", f"/{KEY}", server.headers(), content)
    folder, _, name = KEY.rpartition("/")
    body = form(part("path", folder.encode()), part("file0", content, name))
    return request("POST", "/upload", {**server.headers(), **FORM_TYPE}, body)


def served(server: Server) -> bytes | None:
    """What a client gets; None: there is nothing."""
    answer = get(server, KEY)
    assert answer.status_code in (200, 404)
    return answer.content if answer.status_code == 200 else None


def get_from_all(server: Server) -> set[bytes | None]:
    """What many clients at once get, from all workers."""
    with ThreadPoolExecutor(4 * WORKERS) as clients:
        return set(clients.map(served, [server] * 12 * WORKERS))


def writers(server: Server) -> list[int]:
    """The process that holds the key's lock, if one does."""
    cache = Cache(server.cache_directory)
    return server.holders(cache.locks.directory / cache.location(KEY).digest)


def cool(server: Server) -> None:
    """Remove the copy, but not the backend's object."""
    cache = Cache(server.cache_directory)
    with cache.writing(KEY, SECONDS):
        cache.remove(KEY)


def kill(server: Server, pid: int) -> None:
    """Kill a worker (SIGKILL), and wait until another one has replaced it."""
    assert pid in server.worker_pids()
    os.kill(pid, signal.SIGKILL)
    wait_until(
        lambda: pid not in (pids := server.worker_pids()) and len(pids) == WORKERS,
        START_SECONDS,
        "a worker's successor",
    )


def kill_at(server: Server, pauses: Pauses, point: str, act: Callable[[], None]) -> None:
    """Let a worker die at a certain point of an action; the client gets no answer."""
    with pauses.during(point), ThreadPoolExecutor() as clients:
        outcome = clients.submit(act)
        [pid] = wait_until(lambda: pauses.waiting(point), SECONDS, point)
        kill(server, pid)
        assert isinstance(outcome.exception(SECONDS), requests.ConnectionError)


@contextlib.contextmanager
def stopped(azurite: Azurite) -> Iterator[None]:
    """The backend accepts connections during the block, but does not answer."""
    azurite.process.send_signal(signal.SIGSTOP)
    try:
        yield
    finally:
        azurite.process.send_signal(signal.SIGCONT)
