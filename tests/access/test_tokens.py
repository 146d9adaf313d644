# SPDX-License-Identifier: LGPL-2.1-or-later
"""Valid and invalid tokens, and the keys that their owners may write."""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import subprocess
import sys
import time
from typing import Any, NamedTuple

import jwt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kci_storage.access import tokens
from kci_storage.access.permissions import Permissions
from kci_storage.access.tokens import Authenticator
from kci_storage.config.settings import User as Configured
from kci_storage.errors import Forbidden, Unauthorized

JWT_SECRET = "jwt" * 20
UNIFIED_SECRET = "unified" * 8
EMAIL = "user@example.com"

pytestmark = pytest.mark.filterwarnings("ignore::jwt.InsecureKeyLengthWarning")  # pytest resets the module's filter


def verify(authorization: str | None) -> str:
    return Authenticator([JWT_SECRET, UNIFIED_SECRET]).verify(authorization)


def token(secret: str = JWT_SECRET, **claims: Any) -> str:
    return forged(json.dumps({"email": EMAIL} | claims), secret=secret)


def forged(payload: str | bytes, header: str | bytes = '{"alg":"HS256"}', secret: str = JWT_SECRET) -> str:
    """A token with any content, signed with HMAC-SHA-256."""
    signed = f"{_base64(header)}.{_base64(payload)}"
    return f"{signed}.{_base64(hmac.digest(secret.encode(), signed.encode(), hashlib.sha256))}"


def _base64(data: str | bytes) -> str:
    raw = data if isinstance(data, bytes) else data.encode()
    return base64.urlsafe_b64encode(raw).rstrip(b"=").decode()


def refusal(authorization: str | None) -> Unauthorized:
    with pytest.raises(Unauthorized) as caught:
        verify(authorization)
    return caught.value


ACCEPTED = {
    "Bearer": "Bearer {}",
    "bare": "{}",
    "lower case": "bearer {}",
    "upper case": "BEARER {}",
    "blanks around it": "  Bearer   {}  ",
    "tab": "Bearer\t{}",
}


@pytest.mark.parametrize("form", ACCEPTED.values(), ids=ACCEPTED.keys())
def test_header_forms(form: str) -> None:
    assert verify(form.format(token())) == EMAIL


@pytest.mark.parametrize("secret", [JWT_SECRET, UNIFIED_SECRET])
def test_either_secret_signs(secret: str) -> None:
    assert verify(token(secret)) == EMAIL


def test_one_secret_is_enough() -> None:
    assert Authenticator([UNIFIED_SECRET]).verify(token(UNIFIED_SECRET)) == EMAIL


def test_a_secret_that_cannot_be_used_does_not_hide_the_next() -> None:
    assert Authenticator(["", UNIFIED_SECRET]).verify(token(UNIFIED_SECRET)) == EMAIL


def test_without_a_secret_every_token_is_refused() -> None:
    with pytest.raises(Unauthorized):
        Authenticator([]).verify(token())


NOW = int(time.time())
HOUR = 3600


@pytest.mark.parametrize(
    "claims",
    [
        {"exp": NOW + HOUR},
        {"exp": float(NOW + HOUR)},
        {"exp": str(NOW + HOUR)},
        {"nbf": NOW - HOUR},
        {"aud": "somebody else"},
        {"aud": []},
        {"aud": 5},
        {"iat": NOW + HOUR},
        {"iat": "then"},
        {"sub": 5},
        {"sub": None},
        {"jti": 5},
        {"iss": ["x"]},
        {"email": "A.Name+tag@Example.com"},
        {"email": "名@example.com"},
    ],
    ids=",".join,  # without the times: all processes that run tests must have the same names
)
def test_claims_that_do_not_matter_or_hold(claims: dict[str, Any]) -> None:
    assert verify(token(**claims)) == claims.get("email", EMAIL)


@pytest.mark.parametrize("claim", ["exp", "nbf"])
def test_clocks_may_be_off_by_the_leeway(claim: str) -> None:
    off = {"exp": -100, "nbf": 100}[claim]
    late = token(**{claim: int(time.time()) + off})
    assert Authenticator([JWT_SECRET], leeway=10_000).verify(late) == EMAIL
    with pytest.raises(Unauthorized):
        Authenticator([JWT_SECRET], leeway=0).verify(late)


class TestMemory:
    """A token that was verified is not verified again before it may have expired."""

    @pytest.fixture
    def authenticator(self, monkeypatch: pytest.MonkeyPatch) -> Authenticator:
        """An authenticator that notes in ``decoded`` which tokens it verifies."""
        made = Authenticator([JWT_SECRET], leeway=0)
        decode = made._decode
        made.decoded = []
        monkeypatch.setattr(made, "_decode", lambda *args: made.decoded.append(args[0]) or decode(*args))
        return made

    def test_a_token_is_looked_at_once(self, authenticator: Authenticator) -> None:
        one, other = token(), token(email="other@example.com")
        for _ in range(3):
            assert authenticator.verify(f"Bearer {one}") == authenticator.verify(one) == EMAIL
            assert authenticator.verify(other) == "other@example.com"
        assert authenticator.decoded == [one, other]

    def test_one_that_may_have_expired_is_looked_at_again(
        self, authenticator: Authenticator, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        expires = int(time.time()) + HOUR
        short = token(exp=expires)
        assert authenticator.verify(short) == EMAIL
        for now, looks in ((expires - 1, 1), (expires, 2)):
            monkeypatch.setattr(time, "time", lambda now=now: now)
            authenticator.verify(short)
            assert len(authenticator.decoded) == looks

    def test_what_was_refused_is_looked_at_again(self, authenticator: Authenticator) -> None:
        for _ in range(2):
            with pytest.raises(Unauthorized):
                authenticator.verify(token(UNIFIED_SECRET))
        assert len(authenticator.decoded) == 2

    def test_it_is_bounded(self, authenticator: Authenticator, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(tokens, "REMEMBERED", 3)
        for number in range(10):
            authenticator.verify(token(number=number))
            assert len(authenticator._known) <= 3


def test_leeway_is_there_unless_it_is_set() -> None:
    assert verify(token(exp=int(time.time()) - 1, nbf=int(time.time()) + 1)) == EMAIL


class Refused(NamedTuple):
    authorization: str | None
    reason: str


GOOD = token()
HEAD, BODY, SIGNATURE = GOOD.split(".")
REFUSED = {
    "no header": Refused(None, "no Authorization"),
    "empty": Refused("", "neither"),
    "blank": Refused("  ", "neither"),
    "scheme alone": Refused("Bearer", "neither"),
    "scheme twice": Refused(f"Bearer Bearer {GOOD}", "neither"),
    "other scheme": Refused(f"Basic {GOOD}", "neither"),
    "colon": Refused(f"Bearer: {GOOD}", "neither"),
    "two tokens": Refused(f"{GOOD} {GOOD}", "neither"),
    "list": Refused(f"Bearer {GOOD}, Bearer {GOOD}", "neither"),
    "non-ASCII": Refused(f"Bearer {GOOD}é", "neither"),
    "lone surrogate": Refused(f"Bearer {GOOD}\ud800", "neither"),
    "too long": Refused("Bearer " + "a" * tokens.MAX_HEADER, "more than 8192"),
    "far too long": Refused("a " * 5_000_000, "more than 8192"),
    "no token": Refused("Bearer secret", "malformed"),
    "dots": Refused("Bearer ..", "malformed"),
    "two segments": Refused(f"Bearer {HEAD}.{BODY}", "malformed"),
    "four segments": Refused(f"Bearer {GOOD}.x", "malformed"),
    "no base64": Refused(f"Bearer !.{BODY}.{SIGNATURE}", "malformed"),
    "signature missing": Refused(f"Bearer {HEAD}.{BODY}.", "another secret"),
    "signature of another": Refused(f"Bearer {HEAD}.{BODY}.{token('x' * 32).split('.')[2]}", "another secret"),
    "signed with another secret": Refused(f"Bearer {token('x' * 32)}", "another secret"),
    "another payload": Refused(f"Bearer {HEAD}.{_base64('{}')}.{SIGNATURE}", "another secret"),
    "alg none": Refused(f"Bearer {_base64(json.dumps({'alg': 'none'}))}.{BODY}.", "HS256"),
    "alg none, signed": Refused("Bearer " + forged("{}", '{"alg":"none"}'), "HS256"),
    "alg HS512": Refused("Bearer " + jwt.encode({"email": EMAIL}, JWT_SECRET * 2, "HS512"), "HS256"),
    "alg RS256": Refused("Bearer " + forged("{}", '{"alg":"RS256"}'), "HS256"),
    "alg part of the name": Refused("Bearer " + forged("{}", '{"alg":"HS"}'), "HS256"),
    "alg no text": Refused("Bearer " + forged("{}", '{"alg":["HS256"]}'), "HS256"),
    "alg missing": Refused("Bearer " + forged("{}", "{}"), "HS256"),
    "critical extension": Refused("Bearer " + forged("{}", '{"alg":"HS256","crit":["x\\n"]}'), "malformed"),
    "header no object": Refused("Bearer " + forged("{}", "[]"), "malformed"),
    "header nested": Refused("Bearer " + forged("{}", '{"alg":' + "[" * 4000), "malformed"),
    "header not UTF-8": Refused("Bearer " + forged("{}", b"\xff"), "malformed"),
    "payload no object": Refused("Bearer " + forged("[]"), "malformed"),
    "payload no JSON": Refused("Bearer " + forged("email"), "malformed"),
    "payload nested": Refused("Bearer " + forged("[" * 4000), "malformed"),
    "payload with a huge number": Refused("Bearer " + forged('{"exp":' + "9" * 5000 + "}"), "malformed"),
    "expired": Refused("Bearer " + token(exp=NOW - HOUR), "expired"),
    "expired, other secret": Refused("Bearer " + token(UNIFIED_SECRET, exp=NOW - HOUR), "expired"),
    "expired in text": Refused("Bearer " + token(exp=str(NOW - HOUR)), "expired"),
    "exp null": Refused("Bearer " + token(exp=None), "malformed"),
    "exp text": Refused("Bearer " + token(exp="tomorrow"), "malformed"),
    "exp list": Refused("Bearer " + token(exp=[NOW + HOUR]), "malformed"),
    "exp infinite": Refused("Bearer " + token(exp=float("inf")), "malformed"),
    "exp no number": Refused("Bearer " + token(exp=float("nan")), "malformed"),
    "not yet": Refused("Bearer " + token(nbf=NOW + HOUR), "not yet"),
    "nbf text": Refused("Bearer " + token(nbf="tomorrow"), "malformed"),
    "no email": Refused("Bearer " + forged("{}"), "no claim 'email'"),
    "email null": Refused("Bearer " + token(email=None), "no claim 'email'"),
    "email a number": Refused("Bearer " + token(email=5), "no claim 'email'"),
    "email a list": Refused("Bearer " + token(email=[EMAIL]), "no claim 'email'"),
    "email empty": Refused("Bearer " + token(email=""), "no claim 'email'"),
    "email blank": Refused("Bearer " + token(email=" \t"), "no claim 'email'"),
    "email with a line feed": Refused("Bearer " + token(email="a\nb"), "control character"),
    "email with a NUL": Refused("Bearer " + token(email="a\0b"), "control character"),
    "email with C1": Refused("Bearer " + token(email="a\x85b"), "control character"),
    "email with a line separator": Refused("Bearer " + token(email="a\u2028b"), "control character"),
    "email with a paragraph separator": Refused("Bearer " + token(email="a\u2029b"), "control character"),
    "email with a lone surrogate": Refused("Bearer " + token(email="a\ud800b"), "control character"),
}


@pytest.mark.parametrize("row", REFUSED.values(), ids=REFUSED.keys())
def test_everything_else_is_unauthorized_and_only_the_log_learns_why(row: Refused) -> None:
    error = refusal(row.authorization)
    assert error.message == "Unauthorized"
    assert row.reason in error.detail
    assert error.detail.isprintable() and len(error.detail) < 100


@pytest.mark.parametrize("row", REFUSED.values(), ids=REFUSED.keys())
def test_no_piece_of_a_token_is_in_the_detail(row: Refused) -> None:
    detail = refusal(row.authorization).detail
    words = (row.authorization or "").replace(",", " ").split()
    pieces = [piece for word in words for piece in word.split(".") if len(piece) > 10]
    assert not [piece for piece in pieces if piece in detail]


@given(
    st.text(max_size=60)
    | st.lists(st.sampled_from([HEAD, BODY, SIGNATURE, ".", " ", "Bearer", "=", "é"])).map("".join)
)
def test_no_header_does_anything_but_name_the_owner_or_refuse(authorization: str) -> None:
    try:
        assert verify(authorization) == EMAIL
    except Unauthorized:
        assert GOOD not in authorization.split()


USING_A_SHORT_SECRET = """
from kci_storage.access import tokens
token = tokens.issue("user@example.com", "short", None)
assert tokens.check_secret("short") is None
print(tokens.Authenticator(["short"]).verify(token))
"""


def test_short_secret_works_without_a_warning_at_each_use() -> None:
    # In a process of its own, as pytest has its own filters; -W error would turn a warning into a failure.
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", USING_A_SHORT_SECRET], capture_output=True, text=True, check=False
    )
    assert (done.stdout.strip(), done.stderr) == (EMAIL, "")


@pytest.mark.parametrize(
    ("secret", "weak"),
    [("", True), ("x" * 31, True), ("x" * 32, False), ("é" * 15, True), ("é" * 16, False)],
)
def test_weak_is_less_than_32_bytes(secret: str, weak: bool) -> None:
    assert tokens.is_weak(secret) is weak


PEM = "-----BEGIN PUBLIC KEY-----\nMFkwEwYHKoZIzj0CAQYI\n-----END PUBLIC KEY-----"


@pytest.mark.parametrize("secret", ["", PEM, "ssh-rsa AAAAB3NzaC1yc2E", '{"kty":"oct","k":"c2VjcmV0"}'])
def test_secret_that_pyjwt_refuses_is_known_at_start(secret: str) -> None:
    reason = tokens.check_secret(secret)
    assert reason and reason.isprintable()
    assert not secret or secret not in reason


@pytest.mark.parametrize("secret", ["short", "x" * 64, "12345", '"quoted"', '{"a": 1}', " ", "пароль"])
def test_any_other_secret_signs_and_verifies(secret: str) -> None:
    assert tokens.check_secret(secret) is None
    assert Authenticator([secret]).verify(tokens.issue(EMAIL, secret, None)) == EMAIL


def test_new_secrets_are_strong_and_differ() -> None:
    secrets = {tokens.new_secret() for _ in range(10)}
    assert len(secrets) == 10
    assert not any(map(tokens.is_weak, secrets)) and not any(map(tokens.check_secret, secrets))


def claims_of(issued: str) -> dict[str, Any]:
    return jwt.decode(issued, JWT_SECRET, algorithms=["HS256"], options={"verify_exp": False})


def test_issued_token_is_for_ever_unless_it_is_to_expire() -> None:
    assert "exp" not in claims_of(tokens.issue(EMAIL, JWT_SECRET, None))
    claims = claims_of(tokens.issue(EMAIL, JWT_SECRET, 1.5))
    assert claims["email"] == EMAIL
    assert claims["exp"] - claims["iat"] == 36 * HOUR


def test_issued_token_is_accepted_until_it_expires() -> None:
    assert verify(tokens.issue(EMAIL, JWT_SECRET, 1)) == EMAIL
    assert "expired" in refusal(tokens.issue(EMAIL, JWT_SECRET, -1)).detail


class User(NamedTuple):
    """A user of the configuration."""

    name: str
    prefixes: tuple[str, ...]


COVERED = [
    # prefix, key, covered
    ("", "anything/at/all", True),
    ("/", "anything", True),
    ("//", "anything", True),
    ("/allowed/path1", "allowed/path1/x", True),
    ("/allowed/path1", "allowed/path1/x/y", True),
    ("/allowed/path1", "allowed/path1", True),
    ("/allowed/path1", "allowed/path10/x", False),
    ("/allowed/path1", "allowed/path10", False),
    ("/allowed/path1", "allowed/path", False),
    ("/allowed/path1", "allowed", False),
    ("/allowed/path1", "x/allowed/path1", False),
    ("/allowed/path1", "Allowed/path1/x", False),
    ("allowed/path1", "allowed/path1/x", True),
    ("allowed/path1/", "allowed/path1/x", True),
    ("allowed/path1/", "allowed/path1", True),
    ("//allowed/path1//", "allowed/path1/x", True),
    ("allowed//path1", "allowed/path1/x", False),
    ("文", "文/x", True),
    ("文", "文件/x", False),
    ("a.b", "aXb/x", False),
    ("*", "anything/at/all", True),
    ("/*", "anything", True),
    ("/allowed/path*", "allowed/path", True),
    ("/allowed/path*", "allowed/path10/x", True),
    ("/allowed/path*", "allowed/pat", False),
    ("/allowed/path*", "x/allowed/path1", False),
    ("allowed/*", "allowed/x", True),
    ("allowed/*", "allowed", False),
    ("allowed/*", "allowed10/x", False),
    ("a*b", "axb/y", False),
    ("a*b", "a*b/y", True),
    ("a*b*", "a*bc", True),
    ("a**", "a*b", True),
    ("a**", "ab", False),
    ("a*/", "a*/b", True),
    ("a*/", "ab/c", False),
]


@pytest.mark.parametrize(("prefix", "key", "covered"), COVERED)
def test_prefix_covers_whole_segments_or_plain_text_up_to_a_star(prefix: str, key: str, covered: bool) -> None:
    permissions = Permissions([User(EMAIL, (prefix,))])
    if covered:
        permissions.check(EMAIL, key)
    else:
        with pytest.raises(Forbidden):
            permissions.check(EMAIL, key)


def test_without_users_everybody_may_write_everywhere() -> None:
    Permissions([]).check(EMAIL, "any/key")


USERS = [User("a@x", ("one", "two")), User("b@x", ("three",)), User("a@x", ("four",)), User("c@x", ())]


@pytest.mark.parametrize(
    ("email", "key"),
    [("a@x", "one/f"), ("a@x", "two/f"), ("a@x", "four/f"), ("b@x", "three/f")],
)
def test_prefixes_of_one_name_add_up(email: str, key: str) -> None:
    Permissions(USERS).check(email, key)


@pytest.mark.parametrize(
    ("email", "key"),
    [("a@x", "three/f"), ("b@x", "one/f"), ("b@x", "four/f"), ("c@x", "one/f"), ("A@x", "one/f"), ("d@x", "one/f")],
)
def test_other_names_and_a_user_without_prefixes_may_not(email: str, key: str) -> None:
    with pytest.raises(Forbidden) as caught:
        Permissions(USERS).check(email, key)
    assert email not in caught.value.message
    assert email in caught.value.detail and key in caught.value.detail


def test_the_configuration_names_users_in_the_same_way() -> None:
    user = Configured(name=EMAIL, prefixes=("allowed",))
    Permissions([user]).check(EMAIL, "allowed/x")
