# SPDX-License-Identifier: LGPL-2.1-or-later
"""The configuration: contract section 3."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from kci_storage.config.checks import split_bind
from kci_storage.config.reading import load
from kci_storage.config.settings import SECTIONS, Config, ConfigError, User, expectation, settings

SECRET = 'jwt_secret = "a secret that is long enough for HS256"\n'
LOCAL = f'driver = "local"\n{SECRET}'
CHALLENGE = f"{LOCAL}[download_challenge]\n"
AZURE = f'{SECRET}[azure]\naccount = "kernelci"\nkey = "c2VjcmV0"\ncontainer = "artifacts"\n'


@pytest.fixture
def write(tmp_path: Path):
    """Writes a configuration file; returns its path."""

    def write_file(content: str | bytes) -> Path:
        path = tmp_path / "config.toml"
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return write_file


def failure(path: Path, **environ: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load(path, environ)
    message = str(caught.value)
    assert message.isprintable(), "a message is one line"
    return message


# Reading


def test_an_account_key_and_a_sas_token_may_both_be_there(write):
    config = load(write(f'{AZURE}sastoken = "sig=x"'), {})
    assert (config.azure.key, config.azure.sastoken) == ("c2VjcmV0", "sig=x")


def test_the_smallest_local_configuration_has_every_default(write, tmp_path):
    config = load(write(LOCAL), {})
    assert (config.driver, config.users, config.plugins) == ("local", (), {})
    assert config.server == Config(config.path).server
    assert config.local.storage_path == tmp_path / "storage"
    assert config.cache == dataclasses.replace(Config(config.path).cache, directory=tmp_path / "cache")


def test_the_defaults_are_the_contracts():
    config = Config(Path("config.toml"))
    assert config.driver == "azure"
    assert dataclasses.asdict(config.server) == {
        "bind": "127.0.0.1:3000",
        "workers": 0,
        "threads": 64,
        "connections": 0,
        "max_upload_bytes": 10737418240,
        "lock_timeout": 30,
        "trusted_proxies": 0,
        "accel_redirect": "",
        "cache_control": "public, no-cache",
        "send_timeout": 60,
        "certfile": "",
        "keyfile": "",
    }
    assert dataclasses.asdict(config.cache) == {
        "directory": Path("./cache"),
        "max_files": 1000000,
        "max_bytes": 0,
        "low_disk_percent": 12,
        "recover_disk_percent": 13,
        "cleanup_chunk_size": 100000,
        "interval": 300,
        "max_fills": 64,
        "revalidate_after": 0,
    }
    assert dataclasses.asdict(config.azure) == {
        "account": "",
        "key": "",
        "sastoken": "",
        "container": "",
        "endpoint": "",
        "connect_timeout": 5,
        "read_timeout": 20,
        "tags": "required",
        "verify": "own",
        "retry_timeout": 60,
    }
    assert config.local.storage_path == Path("./storage")


def test_every_key_can_be_set(write, tmp_path):
    config = load(
        write(
            f"""{SECRET}unified_secret = "the other"
            [server]
            bind = "[::1]:8080"
            workers = 3
            threads = 8
            connections = 1000
            max_upload_bytes = 1
            lock_timeout = 0.5
            trusted_proxies = 2
            accel_redirect = "/_cache/"
            cache_control = "public, max-age=60"
            send_timeout = 5
            [azure]
            account = "kernelci"
            sastoken = "?sv=2024&sig=abc"
            container = "artifacts"
            endpoint = "http://127.0.0.1:10000/kernelci"
            connect_timeout = 2
            read_timeout = 0.5
            [local]
            storage_path = "/srv/objects"
            [cache]
            directory = "sub/cache"
            max_files = 10
            max_bytes = 100
            low_disk_percent = 1.5
            recover_disk_percent = 2
            cleanup_chunk_size = 5
            interval = 1
            revalidate_after = 7
            [[users]]
            name = "a@example.com"
            prefixes = ["/x", ""]
            [[users]]
            name = "a@example.com"
            """
        ),
        {},
    )
    assert config.secrets == ("a secret that is long enough for HS256", "the other")
    assert config.server.bind == "[::1]:8080"
    assert (config.server.workers, config.server.lock_timeout) == (3, 0.5)
    assert config.azure.sastoken == "?sv=2024&sig=abc"
    assert (config.azure.connect_timeout, config.azure.read_timeout) == (2, 0.5)
    assert config.local.storage_path == Path("/srv/objects")
    assert config.cache.directory == tmp_path / "sub/cache"
    assert config.cache.recover_disk_percent == 2.0 and isinstance(config.cache.recover_disk_percent, float)
    assert config.users == (User("a@example.com", ("/x", "")), User("a@example.com", ()))


@pytest.mark.parametrize(
    ("content", "secrets"),
    [
        (SECRET, ("a secret that is long enough for HS256",)),
        ('unified_secret = "u"\n', ("u",)),
        ('unified_secret = "u"\njwt_secret = "j"\n', ("j", "u")),
    ],
)
def test_one_secret_of_the_two_is_enough(write, content, secrets):
    assert load(write(f'driver = "local"\n{content}'), {}).secrets == secrets


def test_azure_is_the_default_driver(write):
    config = load(write(AZURE), {})
    assert config.driver == "azure"
    assert (config.azure.account, config.azure.container) == ("kernelci", "artifacts")


def test_a_plugin_drivers_section_is_passed_on_untouched(write):
    config = load(write(f'driver = "s3"\n{SECRET}[s3]\nbucket = "b"\nnested = {{ x = [1, 2] }}'), {})
    assert config.plugins == {"s3": {"bucket": "b", "nested": {"x": [1, 2]}}}


def test_a_plugin_driver_needs_no_section(write):
    assert load(write(f'driver = "s3"\n{SECRET}'), {}).plugins == {}


def test_the_azure_section_need_not_be_complete_for_another_driver(write):
    assert load(write(f'{LOCAL}[azure]\naccount = "kernelci"'), {}).azure.account == "kernelci"


def test_a_byte_order_mark_does_no_harm(write):
    assert load(write(b"\xef\xbb\xbf" + LOCAL.encode()), {}).driver == "local"


def test_the_text_form_shows_no_secret(write):
    key, sas = "c2VjcmV0a2V5", "sv=1&sig=signature"
    content = f"""
    driver = "s3"
    jwt_secret = "first secret"
    unified_secret = "second secret"
    [azure]
    key = "{key}"
    sastoken = "{sas}"
    [s3]
    password = "third secret"
    """
    config = load(write(content), {})
    shown = f"{config!r} {config} {config.azure!r}"
    assert not [word for word in ("first secret", "second secret", "third secret", key, sas) if word in shown]


# The file's path


def test_without_a_path_the_environment_names_the_file(write):
    assert load(environ={"KCI_STORAGE_CONFIG": str(write(LOCAL))}).driver == "local"


def test_without_either_it_is_config_toml_in_the_working_directory(write, tmp_path, monkeypatch):
    write(LOCAL)
    monkeypatch.chdir(tmp_path)
    config = load(environ={"KCI_STORAGE_CONFIG": ""})
    assert config.path == tmp_path / "config.toml"
    assert config.cache.directory == tmp_path / "cache"


def test_a_missing_file_is_one_line_that_names_it(tmp_path):
    message = failure(tmp_path / "nowhere.toml")
    assert message.startswith(f"{tmp_path}/nowhere.toml: no such file")
    assert "KCI_STORAGE_CONFIG" in message


def test_a_folder_is_one_line(tmp_path):
    assert failure(tmp_path).startswith(f"{tmp_path}: cannot be read: Is a directory")


def test_an_unreadable_file_is_one_line():
    path = Path("/proc/self/mem")  # root cannot read its beginning either
    assert failure(path) == f"{path}: cannot be read: Input/output error"


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b'jwt_secret = "\xff"', "not valid TOML: byte 14 is not UTF-8"),
        ("jwt_secret = ", "not valid TOML: Invalid value (at end of document)"),
        ("x = " + "[" * 100_000, "not valid TOML: nested too deeply"),
        (f"{LOCAL}[server]\nworkers = {'9' * 5000}", "not valid TOML: Exceeds the limit"),
        (f"{SECRET}{SECRET}", "not valid TOML: Cannot overwrite a value"),
    ],
)
def test_what_is_not_toml_is_one_line(write, content, problem):
    path = write(content)
    assert failure(path).startswith(f"{path}: {problem}")


# KCI_STORAGE_PORT


@pytest.mark.parametrize(
    ("bind", "port", "expected"),
    [
        ("127.0.0.1:3000", "8080", "127.0.0.1:8080"),
        ("[::1]:3000", "1", "[::1]:1"),
        ("localhost:3000", "65535", "localhost:65535"),
        ("localhost:3000", "", "localhost:3000"),
    ],
)
def test_the_port_of_the_environment_wins(write, bind, port, expected):
    path = write(f'{LOCAL}[server]\nbind = "{bind}"')
    assert load(path, {"KCI_STORAGE_PORT": port}).server.bind == expected


@pytest.mark.parametrize("port", ["0", "65536", "http", "-1", "80 80", "1:2", "٣"])
def test_an_impossible_port_in_the_environment_is_refused(write, port):
    message = failure(write(LOCAL), KCI_STORAGE_PORT=port)
    assert message.startswith("KCI_STORAGE_PORT: expected a port from 1 to 65535, got ")


def test_a_port_for_a_unix_socket_is_refused(write):
    path = write(f'{LOCAL}[server]\nbind = "unix:/run/kci.sock"')
    assert failure(path, KCI_STORAGE_PORT="80").startswith("KCI_STORAGE_PORT: expected a server.bind that has a port")


# Secrets in files of their own


def test_a_secret_may_stand_in_a_file(write, tmp_path):
    (tmp_path / "jwt").write_text("from a file\n")
    (tmp_path / "sas").write_text("sv=1&sig=abc")
    config = load(
        write(
            f"""jwt_secret_file = "jwt"
            [azure]
            account = "kernelci"
            container = "artifacts"
            sastoken_file = "{tmp_path}/sas"
            """
        ),
        {},
    )
    assert (config.jwt_secret, config.azure.sastoken) == ("from a file", "sv=1&sig=abc")
    assert "from a file" not in repr(config) and "sig=abc" not in repr(config)


def test_systemd_says_where_a_secrets_file_is(write, tmp_path):
    credentials = tmp_path / "credentials"
    credentials.mkdir()
    (credentials / "jwt").write_text("a credential")
    path = write('driver = "local"\njwt_secret_file = "$CREDENTIALS_DIRECTORY/jwt"')
    assert load(path, {"CREDENTIALS_DIRECTORY": str(credentials)}).jwt_secret == "a credential"
    assert "No such file" in failure(path)


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (f'{LOCAL}jwt_secret_file = "jwt"', "jwt_secret: expected either jwt_secret or jwt_secret_file, got both"),
        ('jwt_secret_file = "none"', 'jwt_secret_file: expected a file that can be read, got "none": No such file'),
        ('jwt_secret_file = "."', 'jwt_secret_file: expected a file that can be read, got ".": Is a directory'),
        ('jwt_secret_file = "binary"', 'jwt_secret_file: expected a file that can be read, got "binary": not UTF-8'),
        ("jwt_secret_file = 1", "jwt_secret_file: expected a path, got 1"),
        ('jwt_secret_file = ""', 'jwt_secret_file: expected a path, got ""'),
        ('jwt_secret_file = "empty"', "jwt_secret: expected text that is not empty"),
        (f'{LOCAL}bind_file = "x"', "bind_file: unknown key"),
        (f'{LOCAL}[server]\nbind_file = "x"', "server.bind_file: unknown key"),
        (f'{SECRET}[azure]\nkey_file = "wrong"', "azure.key: expected base64 text"),
    ],
)
def test_secrets_files_that_are_refused(write, tmp_path, content, problem):
    (tmp_path / "binary").write_bytes(b"\xff")
    (tmp_path / "empty").write_bytes(b"\n")
    (tmp_path / "wrong").write_text("not base64: a secret")
    message = failure(write(content))
    assert f"config.toml: {problem}" in message
    assert "a secret" not in message


# Bind


@pytest.mark.parametrize("bind", ["0.0.0.0:1", "storage.example.com:65535", "[::]:3000", "[fe80::1%eth0]:3000"])
def test_binds_with_a_port(write, bind):
    config = load(write(f'{LOCAL}[server]\nbind = "{bind}"'), {})
    assert config.server.bind == bind
    assert split_bind(bind) == (bind.rpartition(":")[0].strip("[]"), int(bind.rpartition(":")[2]))


def test_a_unix_socket_is_relative_to_the_files_folder(write, tmp_path):
    config = load(write(f'{LOCAL}[server]\nbind = "unix:run/kci.sock"'), {})
    assert config.server.bind == f"unix:{tmp_path}/run/kci.sock"


def test_a_unix_sockets_path_has_the_systems_length(write):
    long = "/" + "x" * 107
    assert load(write(f'{LOCAL}[server]\nbind = "unix:{long[:107]}"'), {}).server.bind == f"unix:{long[:107]}"
    assert "at most 107 bytes" in failure(write(f'{LOCAL}[server]\nbind = "unix:{long}"'))


@pytest.mark.parametrize(
    "bind",
    ["", "3000", "localhost", "localhost:", ":3000", "::1:3000", "[::1]", "[nonsense]:3000", "localhost:0"]
    + ["localhost:65536", "localhost:30x", "localhost:٣", "a b:80", "http://localhost:80", "unix:", "unix"],
)
def test_impossible_binds(write, bind):
    path = write(f'{LOCAL}[server]\nbind = "{bind}"')
    assert failure(path).startswith(f"{path}: server.bind: expected host:port, [v6]:port or unix:path, got ")


# Refusals: one line with file, key and expectation


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        # secrets
        ('driver = "local"', "jwt_secret: expected a secret, it is missing; `kci-storage secret` prints a new one"),
        ('driver = "local"\njwt_secret = ""', "jwt_secret: expected text that is not empty"),
        (f'{LOCAL}unified_secret = ""', "unified_secret: expected text that is not empty"),
        ('driver = "local"\njwt_secret = 5', "jwt_secret: expected text that is not empty"),
        # unknown keys and sections
        (f"{LOCAL}[server]\nworker = 1", "server.worker: unknown key; did you mean workers?"),
        (
            f"{LOCAL}[local]\nqqq = 1",
            "local.qqq: unknown key; expected one of storage_path",
        ),
        (f"{LOCAL}[sever]\nworkers = 1", "sever: unknown key; did you mean server?"),
        (f"{LOCAL}[user]\nname = 1", "user: unknown key; did you mean users?"),
        (f"{LOCAL}jwt_secrt = 1", "jwt_secrt: unknown key; did you mean jwt_secret?"),
        (f"{LOCAL}[s3]\nbucket = 1", "s3: unknown key; expected one of driver, jwt_secret, "),
        (f'driver = "s3"\n{SECRET}s3 = 1', "s3: unknown key; expected one of "),
        (f'{LOCAL}"a\\nb" = 1', "a\\nb: unknown key; "),
        (f'{LOCAL}[[users]]\nname = "a"\nprefix = []', "users #1 prefix: unknown key; did you mean prefixes?"),
        # types
        (f'driver = ["local"]\n{SECRET}', "driver: expected a driver's name, got a list"),
        (f'driver = ""\n{SECRET}', 'driver: expected a driver\'s name, got ""'),
        (f"{LOCAL}server = 1", "server: expected a section, [server]"),
        (f"{LOCAL}[[cache]]\ninterval = 1", "cache: expected a section, [cache]"),
        (f"{LOCAL}[server]\nworkers = true", "server.workers: expected a whole number from 0 to 1024, got true"),
        (f"{LOCAL}[server]\nworkers = 1.0", "server.workers: expected a whole number from 0 to 1024, got 1.0"),
        (f'{LOCAL}[server]\nworkers = "1"', 'server.workers: expected a whole number from 0 to 1024, got "1"'),
        (
            f"{LOCAL}[server]\nlock_timeout = false",
            "server.lock_timeout: expected a number of seconds from 0 to 3600",
        ),
        (f"{LOCAL}[server]\nbind = 3000", "server.bind: expected host:port, [v6]:port or unix:path, got 3000"),
        (f"{LOCAL}[local]\nstorage_path = 1", "local.storage_path: expected a path, got 1"),
        (f'{LOCAL}[local]\nstorage_path = ""', 'local.storage_path: expected a path, got ""'),
        (f'{LOCAL}[local]\nstorage_path = "a\\u0000"', 'local.storage_path: expected a path, got "a\\x00"'),
        (f"{LOCAL}[cache]\ndirectory = 1979-05-27", "cache.directory: expected a path, got 1979-05-27"),
        # bounds
        (f"{LOCAL}[server]\nworkers = -1", "server.workers: expected a whole number from 0 to 1024, got -1"),
        (f"{LOCAL}[server]\nthreads = 0", "server.threads: expected a whole number from 1 to 10000, got 0"),
        (
            f"{LOCAL}[server]\nconnections = -1",
            "server.connections: expected a whole number from 0 to 1000000, got -1",
        ),
        (
            f"{LOCAL}[server]\nmax_upload_bytes = 0",
            "server.max_upload_bytes: expected a whole number of bytes from 1",
        ),
        (f"{LOCAL}[server]\nlock_timeout = nan", "server.lock_timeout: expected a number of seconds from 0 to 3600"),
        (f"{LOCAL}[server]\nsend_timeout = inf", "server.send_timeout: expected a number of seconds from 1 to 86400"),
        (f"{LOCAL}[server]\nsend_timeout = {'9' * 400}", "server.send_timeout: expected a number of seconds from 1"),
        (
            f"{LOCAL}[cache]\nlow_disk_percent = 101",
            "cache.low_disk_percent: expected a number from 0 to 100, got 101",
        ),
        (f"{LOCAL}[cache]\nlow_disk_percent = -0.1", "cache.low_disk_percent: expected a number from 0 to 100"),
        (f"{LOCAL}[cache]\ninterval = 0", "cache.interval: expected a number of seconds from 0.1 to 86400, got 0"),
        (f"{LOCAL}[cache]\nmax_bytes = {2**63}", "cache.max_bytes: expected a whole number of bytes from 0 to"),
        (
            f"{LOCAL}[cache]\nlow_disk_percent = 13.5",
            "cache.recover_disk_percent: expected not less than cache.low_disk_percent",
        ),
        # accel_redirect
        (f'{LOCAL}[server]\naccel_redirect = "/_cache"', "server.accel_redirect: expected nothing or a path that"),
        (f'{LOCAL}[server]\naccel_redirect = "_cache/"', "server.accel_redirect: expected nothing or a path that"),
        (f'{LOCAL}[server]\naccel_redirect = "/"', "server.accel_redirect: expected nothing or a path that"),
        (f'{LOCAL}[server]\naccel_redirect = "/a?b/"', "server.accel_redirect: expected nothing or a path that"),
        # cache_control
        (f'{LOCAL}[server]\ncache_control = ""', "server.cache_control: expected directives such as"),
        (f'{LOCAL}[server]\ncache_control = "a\\nb: c"', "server.cache_control: expected directives such as"),
        # azure
        (AZURE.replace("account", "#"), "azure.account: expected with the azure driver, it is missing"),
        (AZURE.replace("container", "#"), "azure.container: expected with the azure driver, it is missing"),
        (AZURE.replace("key", "#"), "azure.key: expected azure.key or azure.sastoken, both are missing"),
        (SECRET, "azure.account: expected with the azure driver, it is missing"),
        (AZURE.replace('"kernelci"', '"Kernel/CI"'), "azure.account: expected 3 to 24 lower-case letters and digits"),
        (AZURE.replace('"artifacts"', '"a--b"'), "azure.container: expected 3 to 63 lower-case letters, digits and"),
        (AZURE.replace('"artifacts"', '"ab"'), "azure.container: expected 3 to 63 lower-case letters, digits and"),
        (AZURE.replace("c2VjcmV0", "c2VjcmV"), "azure.key: expected base64 text"),
        (AZURE.replace("key", "sastoken"), 'azure.sastoken: expected a token that holds "sig="'),
        (f'{AZURE}endpoint = "localhost:80"', "azure.endpoint: expected nothing or an http(s) URL without a query"),
        (f'{AZURE}endpoint = "http://"', "azure.endpoint: expected nothing or an http(s) URL without a query"),
        (f'{AZURE}endpoint = "http://h:x"', "azure.endpoint: expected nothing or an http(s) URL without a query"),
        (
            f'{AZURE}endpoint = "http://h/?sig=1"',
            "azure.endpoint: expected nothing or an http(s) URL without a query",
        ),
        # download_challenge
        (f'{CHALLENGE}user_agents = ["Mozilla"]', "download_challenge.secret: expected with download_challenge.user"),
        (f'{CHALLENGE}secret = "{"s" * 31}"', "download_challenge.secret: expected nothing or text of at least 32"),
        (f'{CHALLENGE}user_agents = [""]', "download_challenge.user_agents: expected a list of texts that are not"),
        (f"{CHALLENGE}cookie_ttl_seconds = 29", "download_challenge.cookie_ttl_seconds: expected a whole number of"),
        (f"{CHALLENGE}ipv4_prefix_length = 33", "download_challenge.ipv4_prefix_length: expected a whole number of"),
        (f"{CHALLENGE}fallback_bytes_per_second = -1", "download_challenge.fallback_bytes_per_second: expected a w"),
        (f"{CHALLENGE}secure_cookie = 1", "download_challenge.secure_cookie: expected true or false, got 1"),
        # users
        (f'{LOCAL}[[users]]\nprefixes = ["a"]', "users #1 name: expected the user's email, it is missing"),
        (f'{LOCAL}[[users]]\nname = "a"\n[[users]]\nname = ""', "users #2 name: expected text that is not empty"),
        (f'{LOCAL}[[users]]\nname = "a"\nprefixes = "b"', 'users #1 prefixes: expected a list of texts, got "b"'),
        (f'{LOCAL}[[users]]\nname = "a"\nprefixes = [1]', "users #1 prefixes: expected a list of texts, got a list"),
        (f'{LOCAL}[users]\nname = "a"', "users: expected one section [[users]] for each user"),
        (f"{LOCAL}users = [1]", "users: expected one section [[users]] for each user"),
        # what the local driver would publish
        (f'{LOCAL}[local]\nstorage_path = "."', "local.storage_path: expected a folder that does not hold the conf"),
        (f'{LOCAL}[local]\nstorage_path = "/"', "local.storage_path: expected a folder that does not hold the conf"),
        (
            f'{LOCAL}[local]\nstorage_path = "cache"',
            "local.storage_path: expected a folder apart from cache.directory",
        ),
        (f'{LOCAL}[local]\nstorage_path = "cache/x"', "local.storage_path: expected a folder apart from cache.dir"),
        (f'{LOCAL}[cache]\ndirectory = "storage/x"', "local.storage_path: expected a folder apart from cache.dir"),
    ],
)
def test_one_line_names_the_file_the_key_and_what_was_expected(write, content, problem):
    path = write(content)
    assert failure(path).startswith(f"{path}: {problem}")


@pytest.mark.parametrize("key", ["jwt_secret", "unified_secret"])
def test_a_refused_secret_is_not_shown(write, key):
    assert "hush" not in failure(write(f'driver = "local"\n{key} = ["hush"]'))


def test_a_refused_secret_of_the_challenge_is_not_shown(write):
    assert "hush" not in failure(write(f'{CHALLENGE}secret = "hush"'))


@pytest.mark.parametrize("key", ["key", "sastoken"])
def test_a_refused_credential_is_not_shown(write, key):
    assert "hush" not in failure(write(f'{LOCAL}[azure]\n{key} = "hush!"'))


def test_a_link_to_a_configuration_inside_the_storage_is_refused_too(tmp_path):
    (tmp_path / "storage").mkdir()
    (tmp_path / "storage" / "real.toml").write_text(LOCAL)
    link = tmp_path / "config.toml"
    link.symlink_to("storage/real.toml")
    assert "local.storage_path: expected a folder that does not hold" in failure(link)


def test_a_link_inside_the_storage_to_a_configuration_is_refused_too(write, tmp_path):
    real = write(f'{LOCAL}[local]\nstorage_path = "{tmp_path}/storage"')
    link = tmp_path / "storage" / "config.toml"
    link.parent.mkdir()
    link.symlink_to(real)
    assert "local.storage_path: expected a folder that does not hold" in failure(link)


def test_equal_percentages_are_possible(write):
    content = f"{LOCAL}[cache]\nlow_disk_percent = 20\nrecover_disk_percent = 20"
    assert load(write(content), {}).cache.low_disk_percent == 20


# The definitions themselves


def definitions() -> list[tuple[str, type[Any], dataclasses.Field[Any]]]:
    sections = {"": Config, **SECTIONS, "users": User}
    return [(name, cls, item) for name, cls in sections.items() for item in settings(cls).values()]


@pytest.mark.parametrize(("section", "cls", "item"), definitions())
def test_every_setting_has_one_line_of_help_and_numbers_have_bounds(section, cls, item):
    setting = item.metadata["setting"]
    assert setting.help and "\n" not in setting.help
    if item.type in ("int", "float"):
        assert setting.minimum <= item.default <= setting.maximum
        assert expectation(setting, {"int": int, "float": float}[item.type])


@pytest.mark.parametrize("cls", [Config, User, *SECTIONS.values()])
def test_the_configuration_cannot_be_changed(cls):
    instance = cls(Path("x")) if cls is Config else cls()
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(instance, next(iter(settings(cls))), None)
