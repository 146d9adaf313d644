# SPDX-License-Identifier: LGPL-2.1-or-later
"""RFC 9110 as tables: one row for each sentence that applies, named by its section.

The object of the tables has the ETag ``"v1"``, was last modified at ``MODIFIED``, and has 100 bytes.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
from email import message_from_bytes
from typing import NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kci_storage.errors import BadRequest
from kci_storage.http import accept, conditions, dates, digest_fields
from kci_storage.http.conditions import Decision, RequestHeaders
from kci_storage.http.ranges import ByteRange, MultipartRanges

MODIFIED = 784111777
AT = "Sun, 06 Nov 1994 08:49:37 GMT"
BEFORE = "Sun, 06 Nov 1994 08:49:36 GMT"
AFTER = "Sun, 06 Nov 1994 08:49:38 GMT"
SIZE = 100
HUGE = "9" * 5000  # more digits than Python's int takes


def decide(method: str = "GET", size: int = SIZE, **headers: str) -> Decision:
    return conditions.decide(method, RequestHeaders(**headers), "v1", MODIFIED, size)


class Row(NamedTuple):
    says: str
    headers: dict[str, str]
    status: int
    ranges: tuple[tuple[int, int], ...] = ()
    method: str = "GET"
    size: int = SIZE


PRECONDITIONS = [
    Row("13.2.1 no condition, no range", {}, 200),
    # If-Match
    Row("13.1.1 If-Match names the version", {"if_match": '"v1"'}, 200),
    Row("13.1.1 If-Match names another version", {"if_match": '"v2"'}, 412),
    Row("13.1.1 If-Match * with a version there", {"if_match": "*"}, 200),
    Row("13.1.1 If-Match * between blanks", {"if_match": " * "}, 200),
    Row("13.1.1 If-Match lists the version first", {"if_match": '"v1", "v2"'}, 200),
    Row("13.1.1 If-Match lists the version last", {"if_match": '"v0","v1"'}, 200),
    Row("13.1.1 If-Match lists others", {"if_match": '"v0", "v2"'}, 412),
    Row("13.1.1 If-Match compares strongly", {"if_match": 'W/"v1"'}, 412),
    Row("13.1.1 If-Match weak and strong in one list", {"if_match": 'W/"v1", "v1"'}, 200),
    Row("13.1.1 a quoted star is a tag", {"if_match": '"*"'}, 412),
    Row("13.1.1 If-Match empty names nothing", {"if_match": ""}, 412),
    Row("13.1.1 If-Match malformed names nothing", {"if_match": '"v1'}, 412),
    Row("13.1.1 If-Match malformed after a good member", {"if_match": '"v1", "v2'}, 412),
    Row("13.1.1 If-Match for HEAD", {"if_match": '"v2"'}, 412, method="HEAD"),
    Row("13.1.1 If-Match for DELETE", {"if_match": '"v2"'}, 412, method="DELETE"),
    Row("8.8.3 tags are case-sensitive", {"if_match": '"V1"'}, 412),
    Row("8.8.3 a tag without quotes, as scripts send it", {"if_match": "v1"}, 200),
    Row("8.8.3 a weak tag without quotes is none", {"if_match": "W/v1"}, 412),
    Row("8.8.3 W/ apart from its tag is malformed", {"if_match": 'W/ "v1"'}, 412),
    Row("8.8.3 w/ in lower case is malformed", {"if_none_match": 'w/"v1"'}, 200),
    Row("8.8.3 a comma inside a tag", {"if_match": '"a,v1", "b"'}, 412),
    Row("8.8.3 two tags without a comma are malformed", {"if_match": '"v1" "v2"'}, 412),
    Row("5.6.1.2 empty list members are ignored", {"if_match": ' , ,"v1", ,'}, 200),
    Row("5.6.1.2 tabs around members", {"if_match": '"v0"\t,\t"v1"\t'}, 200),
    # If-Unmodified-Since
    Row("13.1.4 unmodified since: the same second", {"if_unmodified_since": AT}, 200),
    Row("13.1.4 unmodified since a later time", {"if_unmodified_since": AFTER}, 200),
    Row("13.1.4 modified since", {"if_unmodified_since": BEFORE}, 412),
    Row("13.1.4 modified since, HEAD", {"if_unmodified_since": BEFORE}, 412, method="HEAD"),
    Row("13.1.4 modified since, DELETE", {"if_unmodified_since": BEFORE}, 412, method="DELETE"),
    Row("13.1.4 an invalid date is ignored", {"if_unmodified_since": "yesterday"}, 200),
    Row("13.1.4 ignored beside If-Match", {"if_match": '"v1"', "if_unmodified_since": BEFORE}, 200),
    Row("13.1.4 does not help a failed If-Match", {"if_match": '"v2"', "if_unmodified_since": AT}, 412),
    # If-None-Match
    Row("13.1.2 If-None-Match names the version", {"if_none_match": '"v1"'}, 304),
    Row("13.1.2 If-None-Match names another version", {"if_none_match": '"v2"'}, 200),
    Row("13.1.2 If-None-Match *", {"if_none_match": "*"}, 304),
    Row("13.1.2 If-None-Match lists the version", {"if_none_match": '"v0", "v1"'}, 304),
    Row("13.1.2 If-None-Match lists others", {"if_none_match": '"v0", "v2"'}, 200),
    Row("13.1.2 If-None-Match compares weakly", {"if_none_match": 'W/"v1"'}, 304),
    Row("13.1.2 If-None-Match weak in a list", {"if_none_match": '"v0",W/"v1"'}, 304),
    Row("13.1.2 If-None-Match without quotes", {"if_none_match": "v1"}, 304),
    Row("13.1.2 If-None-Match empty", {"if_none_match": ""}, 200),
    Row("13.1.2 If-None-Match malformed", {"if_none_match": 'v1"'}, 200),
    Row("13.1.2 If-None-Match for HEAD", {"if_none_match": '"v1"'}, 304, method="HEAD"),
    Row("13.1.2 If-None-Match for another method", {"if_none_match": '"v1"'}, 412, method="PUT"),
    # If-Modified-Since
    Row("13.1.3 not modified since: the same second", {"if_modified_since": AT}, 304),
    Row("13.1.3 not modified since a later time", {"if_modified_since": AFTER}, 304),
    Row("13.1.3 modified since", {"if_modified_since": BEFORE}, 200),
    Row("13.1.3 not modified since, HEAD", {"if_modified_since": AT}, 304, method="HEAD"),
    Row("13.1.3 an invalid date is ignored", {"if_modified_since": "tomorrow"}, 200),
    Row("13.1.3 several dates are no date", {"if_modified_since": f"{AT}, {AT}"}, 200),
    Row("13.1.3 ignored beside If-None-Match", {"if_none_match": '"v2"', "if_modified_since": AT}, 200),
    Row("13.1.3 beside a malformed If-None-Match too", {"if_none_match": '"', "if_modified_since": AT}, 200),
    Row("13.1.3 ignored but for GET and HEAD", {"if_modified_since": AT}, 200, method="PUT"),
    # their order
    Row("13.2.2 If-Match fails before If-None-Match hits", {"if_match": '"v2"', "if_none_match": '"v1"'}, 412),
    Row("13.2.2 If-None-Match after a held If-Match", {"if_match": '"v1"', "if_none_match": '"v1"'}, 304),
    Row("13.2.2 both held", {"if_match": '"v1"', "if_none_match": '"v2"'}, 200),
    Row("13.2.2 If-Modified-Since after a held If-Match", {"if_match": '"v1"', "if_modified_since": AT}, 304),
    Row("13.2.2 If-Unmodified-Since first", {"if_unmodified_since": BEFORE, "if_modified_since": AT}, 412),
    Row("13.2.2 If-None-Match after it", {"if_unmodified_since": AT, "if_none_match": '"v1"'}, 304),
    Row("13.2.2 412 comes before the range", {"if_match": '"v2"', "range": "bytes=0-9"}, 412),
    Row("13.2.2 412 comes before 416", {"if_match": '"v2"', "range": "bytes=100-"}, 412),
    Row("13.2.2 If-Match held, then the range", {"if_match": '"v1"', "range": "bytes=0-9"}, 206, ((0, 10),)),
    Row("13.2.2 304 comes before the range", {"if_none_match": '"v1"', "range": "bytes=0-9"}, 304),
    Row("13.2.2 304 comes before 416", {"if_modified_since": AT, "range": "bytes=100-"}, 304),
    Row("13.2.2 not known, then the range", {"if_none_match": '"v2"', "range": "bytes=0-9"}, 206, ((0, 10),)),
    Row("13.2.2 conditions of an empty file", {"if_none_match": '"v1"', "range": "bytes=0-"}, 304, size=0),
    # If-Range
    Row("13.1.5 If-Range names the version", {"if_range": '"v1"', "range": "bytes=0-9"}, 206, ((0, 10),)),
    Row("13.1.5 If-Range names another version", {"if_range": '"v2"', "range": "bytes=0-9"}, 200),
    Row("13.1.5 If-Range compares strongly", {"if_range": 'W/"v1"', "range": "bytes=0-9"}, 200),
    Row("13.1.5 If-Range is no list", {"if_range": '"v1", "v2"', "range": "bytes=0-9"}, 200),
    Row("13.1.5 If-Range knows no star", {"if_range": "*", "range": "bytes=0-9"}, 200),
    Row("13.1.5 If-Range empty", {"if_range": "", "range": "bytes=0-9"}, 200),
    Row("13.1.5 If-Range with exactly the date", {"if_range": AT, "range": "bytes=0-9"}, 206, ((0, 10),)),
    Row("13.1.5 If-Range with a later date", {"if_range": AFTER, "range": "bytes=0-9"}, 200),
    Row("13.1.5 If-Range with an earlier date", {"if_range": BEFORE, "range": "bytes=0-9"}, 200),
    Row("13.1.5 If-Range with an invalid date", {"if_range": "Sun, 06 Nov", "range": "bytes=0-9"}, 200),
    Row("13.1.5 If-Range without Range is ignored", {"if_range": '"v2"'}, 200),
    Row("13.1.5 a failed If-Range hides 416 too", {"if_range": '"v2"', "range": "bytes=100-"}, 200),
    Row("13.1.5 a held If-Range does not", {"if_range": '"v1"', "range": "bytes=100-"}, 416),
    Row("13.1.5 If-Range beside a hit If-None-Match", {"if_range": '"v1"', "if_none_match": '"v1"'}, 304),
]

WHOLE = ((0, 100),)


def ranged(says: str, value: str, status: int, *ranges: tuple[int, int], size: int = SIZE) -> Row:
    return Row(says, {"range": value}, status, ranges, size=size)


RANGES = [
    ranged("14.1.2 first and last", "bytes=0-9", 206, (0, 10)),
    ranged("14.1.2 last is inclusive", "bytes=5-5", 206, (5, 6)),
    ranged("14.1.2 in the middle", "bytes=50-59", 206, (50, 60)),
    ranged("14.1.2 the last byte", "bytes=99-99", 206, (99, 100)),
    ranged("14.1.2 open end", "bytes=90-", 206, (90, 100)),
    ranged("14.1.2 open end from the first byte", "bytes=0-", 206, (0, 100)),
    ranged("14.1.2 all of it", "bytes=0-99", 206, (0, 100)),
    ranged("14.1.2 last is clamped", "bytes=90-100", 206, (90, 100)),
    ranged("14.1.2 last is clamped, however large", f"bytes=90-{HUGE}", 206, (90, 100)),
    ranged("14.1.2 leading zeros", "bytes=0000-" + "0" * 5000 + "9", 206, (0, 10)),
    ranged("14.1.2 the last n", "bytes=-10", 206, (90, 100)),
    ranged("14.1.2 the last one", "bytes=-1", 206, (99, 100)),
    ranged("14.1.2 the last n, more than there are", "bytes=-1000", 206, (0, 100)),
    ranged("14.1.2 the last n, just all", "bytes=-100", 206, (0, 100)),
    ranged("14.1.2 the last n, however many", f"bytes=-{HUGE}", 206, (0, 100)),
    ranged("14.1.2 the last none", "bytes=-0", 416),
    ranged("14.1.2 the last none, in many digits", "bytes=-" + "0" * 5000, 416),
    ranged("14.1.2 first beyond the end", "bytes=100-", 416),
    ranged("14.1.2 first and last beyond the end", "bytes=100-200", 416),
    ranged("14.1.2 first however far beyond", f"bytes={HUGE}-", 416),
    ranged("14.1.2 both however far beyond", f"bytes={HUGE}-{HUGE}", 416),
    ranged("14.1.1 last before first is invalid", "bytes=9-0", 200),
    ranged("14.1.1 last before first beyond the end", "bytes=200-100", 200),
    ranged("14.1.1 one invalid range spoils the set", "bytes=0-9,9-0", 200),
    ranged("14.1.1 one malformed range spoils the set", "bytes=0-9,x", 200),
    ranged("14.1 units are case-insensitive", "Bytes=0-9", 206, (0, 10)),
    ranged("14.1 another unit", "lines=0-9", 200),
    ranged("14.1 a longer unit", "bytesx=0-9", 200),
    ranged("14.1 no unit", "=0-9", 200),
    ranged("14.1 no equals sign", "bytes 0-9", 200),
    ranged("14.1 blank before the equals sign", "bytes =0-9", 200),
    ranged("14.2 empty", "", 200),
    ranged("14.2 nothing but the unit", "bytes", 200),
    ranged("14.2 no range", "bytes=", 200),
    ranged("14.2 no range but commas", "bytes=, ,", 200),
    ranged("14.2 neither first nor last", "bytes=-", 200),
    ranged("14.2 no dash", "bytes=5", 200),
    ranged("14.2 two dashes", "bytes=0--9", 200),
    ranged("14.2 negative first", "bytes=-5-9", 200),
    ranged("14.2 plus sign", "bytes=+0-9", 200),
    ranged("14.2 underscore", "bytes=1_0-19", 200),
    ranged("14.2 blank inside", "bytes=0 - 9", 200),
    ranged("14.2 hexadecimal", "bytes=0x0-0x9", 200),
    ranged("14.2 digits that are not ASCII", "bytes=\u0660-\u0669", 200),
    ranged("14.2 superscripts, which Latin-1 has", "bytes=\xb2-\xb3", 200),
    ranged("14.2 line feed at the end", "bytes=0-9\n", 200),
    ranged("14.2 another = in it", "bytes=0-9=", 200),
    ranged("14.2 ignored for an empty file", "bytes=0-", 200, size=0),
    ranged("14.2 ignored for an empty file: first and last", "bytes=0-9", 200, size=0),
    ranged("14.2 ignored for an empty file: the last n", "bytes=-5", 200, size=0),
    ranged("14.2 ignored for an empty file: the last none", "bytes=-0", 200, size=0),
    ranged("14.2 ignored for an empty file: beyond", "bytes=5-", 200, size=0),
    ranged("14.2 a file of one byte", "bytes=0-0", 206, (0, 1), size=1),
    Row("14.2 Range for HEAD is ignored", {"range": "bytes=0-9"}, 200, method="HEAD"),
    Row("14.2 unsatisfiable Range for HEAD is ignored", {"range": "bytes=100-"}, 200, method="HEAD"),
    Row("14.2 Range for PUT is ignored", {"range": "bytes=0-9"}, 200, method="PUT"),
    # several
    ranged("14.2 two ranges", "bytes=0-9,20-29", 206, (0, 10), (20, 30)),
    ranged("14.2 blanks around the comma", "bytes=0-9 ,\t20-29", 206, (0, 10), (20, 30)),
    ranged("5.6.1.2 empty members are ignored", "bytes=,0-9,,20-29,", 206, (0, 10), (20, 30)),
    ranged("14.2 of all three kinds", "bytes=0-9,-5,50-51", 206, (0, 10), (95, 100), (50, 52)),
    ranged("15.3.7.2 in the order asked for", "bytes=50-59,0-9", 206, (50, 60), (0, 10)),
    ranged("15.3.7.2 unsatisfiable ones are left out", "bytes=0-9,100-,20-29,-0", 206, (0, 10), (20, 30)),
    ranged("15.3.7.2 one satisfiable is a plain 206", "bytes=100-,20-29", 206, (20, 30)),
    ranged("15.5.17 none satisfiable", "bytes=100-,200-300,-0", 416),
    ranged("15.3.7.2 overlapping ones are joined", "bytes=0-10,5-20", 206, (0, 21)),
    ranged("15.3.7.2 touching ones are joined", "bytes=0-9,10-19", 206, (0, 20)),
    ranged("15.3.7.2 the same twice", "bytes=5-9,5-9", 206, (5, 10)),
    ranged("15.3.7.2 one inside the other", "bytes=0-50,10-20", 206, (0, 51)),
    ranged("15.3.7.2 joined across a third", "bytes=0-9,20-29,10-19", 206, (0, 30)),
    ranged(
        "15.3.7.2 joined in the place of the first", "bytes=50-59,80-89,0-9,55-65", 206, (50, 66), (80, 90), (0, 10)
    ),
    ranged("15.3.7.2 a gap of one byte is kept", "bytes=0-9,11-19", 206, (0, 10), (11, 20)),
    ranged("15.3.7.2 joined, though more than the file", "bytes=0-60,30-99", 206, (0, 100)),
    # abuse
    ranged(
        "17.15 64 ranges",
        "bytes=" + ",".join(f"{i}-{i}" for i in range(0, 128, 2)),
        206,
        *((i, i + 1) for i in range(0, 128, 2)),
        size=200,
    ),
    ranged("17.15 65 ranges", "bytes=" + ",".join(f"{i}-{i}" for i in range(0, 130, 2)), 200, size=200),
    ranged("17.15 65 unsatisfiable ranges", "bytes=" + ",".join(["100-"] * 65), 200),
    ranged("17.15 64 members, the empty ones not counted", "bytes=" + "," * 99 + ",".join(["0-0"] * 64), 206, (0, 1)),
    ranged("17.15 together twice the file", "bytes=0-,0-", 200),
    ranged("17.15 together just less", "bytes=0-,1-", 206, (0, 100)),
    ranged("17.15 together many times the file", "bytes=" + ",".join(["0-"] * 64), 200),
]


@pytest.mark.parametrize("row", PRECONDITIONS + RANGES, ids=lambda row: row.says)
def test_decision(row: Row) -> None:
    decision = decide(row.method, row.size, **row.headers)
    assert decision == Decision(row.status, tuple(ByteRange(*part) for part in row.ranges))


def test_rows_are_named_once() -> None:
    names = [row.says for row in PRECONDITIONS + RANGES]
    assert len(names) == len(set(names))


def test_etag_with_bytes_that_are_not_ascii() -> None:
    headers = RequestHeaders(if_none_match='"\xe9,"')  # obs-text and a comma, section 8.8.3
    assert conditions.decide("GET", headers, "\xe9,", MODIFIED, SIZE).status == 304


def test_date_before_the_epoch_is_compared() -> None:
    headers = RequestHeaders(if_modified_since="Wed, 31 Dec 1969 23:59:59 GMT")
    assert conditions.decide("GET", headers, "v1", 0, SIZE).status == 200
    assert conditions.decide("GET", headers, "v1", -1, SIZE).status == 304


def test_headers_come_from_the_environment() -> None:
    environ = {
        "HTTP_IF_MATCH": "1",
        "HTTP_IF_UNMODIFIED_SINCE": "2",
        "HTTP_IF_NONE_MATCH": "3",
        "HTTP_IF_MODIFIED_SINCE": "4",
        "HTTP_IF_RANGE": "5",
        "HTTP_RANGE": "6",
        "HTTP_ACCEPT": "7",
    }
    assert RequestHeaders.from_environ(environ) == RequestHeaders("1", "2", "3", "4", "5", "6")
    assert RequestHeaders.from_environ({"HTTP_RANGE": ""}) == RequestHeaders(range="")
    assert RequestHeaders.from_environ({"PATH_INFO": "/"}) == RequestHeaders()


# Fragments that headers are made of, joined at random: no value may raise, whatever it is.
FRAGMENTS = st.sampled_from(
    ["*", '"', '"v1"', "W/", ",", " ", "\t", "bytes", "=", "-", "0", "5", "99", "100", HUGE, AT, "GMT", "\xff", "\n"]
)
VALUES = st.none() | st.lists(FRAGMENTS, max_size=12).map("".join) | st.text(max_size=20)


@given(
    st.sampled_from(["GET", "HEAD", "PUT"]),
    st.builds(RequestHeaders, VALUES, VALUES, VALUES, VALUES, VALUES, VALUES),
    st.integers(0, 200),
)
def test_no_header_raises_and_every_range_is_within_the_file(method: str, headers: RequestHeaders, size: int) -> None:
    decision = conditions.decide(method, headers, "v1", MODIFIED, size)
    assert (decision.status == 206) == bool(decision.ranges)
    assert decision.status in (200, 206, 304, 412, 416)
    assert all(0 <= part.start < part.stop <= size for part in decision.ranges)


SPECS = st.one_of(
    st.builds("{}-".format, st.integers(0, 120)),
    st.builds("-{}".format, st.integers(0, 120)),
    st.builds(lambda first, length: f"{first}-{first + length}", st.integers(0, 120), st.integers(0, 120)),
)


@given(st.lists(SPECS, min_size=1, max_size=6))
def test_ranges_are_the_bytes_asked_for_and_no_others(specs: list[str]) -> None:
    asked = [set(_bytes_of(spec)) for spec in specs]
    decision = decide(range="bytes=" + ",".join(specs))
    sent = [set(range(part.start, part.stop)) for part in decision.ranges]
    if sum(map(len, asked)) >= 2 * SIZE:
        assert decision.status == 200
    else:
        assert decision.status == (206 if any(asked) else 416)
        assert set().union(*sent) == set().union(*asked)
        assert sum(map(len, sent)) == len(set().union(*sent))  # each byte once


def _bytes_of(spec: str) -> range:
    """Section 14.1.2, in Python's own slices."""
    first, last = spec.split("-")
    if not first:
        return range(SIZE)[-int(last) :] if int(last) else range(0)
    return range(SIZE)[int(first) : int(last) + 1 if last else None]


HOSTILE = [
    " ",
    "\t",
    ",",
    ", ",
    '"',
    '""',
    '"a',
    "W/",
    "*,",
    "a",
    "a ",
    ";",
    "a;",
    "; q=",
    "-",
    "0-",
    "0",
    "=",
    ":",
    "a=:",
    "a=::;b= ",
]


@pytest.mark.timeout(30)  # seconds; a pattern that backtracks takes minutes
@pytest.mark.parametrize("template", ["{}", '{}"x', "bytes={}", 'sha-256=::;a={}"'])
@pytest.mark.parametrize("piece", HOSTILE)
def test_long_headers_cost_no_more_than_their_length(piece: str, template: str) -> None:
    # A pattern passes over blanks so fast that only very many of them tell.
    value = template.format(piece * (600_000 if piece.isspace() else 60_000))
    conditions.decide("GET", RequestHeaders(if_match=value), "v1", MODIFIED, SIZE)
    conditions.decide("GET", RequestHeaders(None, value, None, value, value, value), "v1", MODIFIED, SIZE)
    conditions.decide("GET", RequestHeaders(if_none_match=value, range=value), "v1", MODIFIED, SIZE)
    accept.prefers_json(value)
    for parse in (digest_fields.parse_content_md5, digest_fields.parse_repr_digest):
        with contextlib.suppress(BadRequest):
            parse(value)


@pytest.mark.parametrize(
    ("says", "headers", "current", "allowed"),
    [
        ("13.2.1 no condition, new", {}, None, True),
        ("13.2.1 no condition, replaced", {}, "v1", True),
        ("13.1.2 If-None-Match * creates", {"if_none_match": "*"}, None, True),
        ("13.1.2 If-None-Match * does not replace", {"if_none_match": "*"}, "v1", False),
        ("13.1.2 If-None-Match names the version", {"if_none_match": '"v1"'}, "v1", False),
        ("13.1.2 If-None-Match compares weakly", {"if_none_match": 'W/"v1"'}, "v1", False),
        ("13.1.2 If-None-Match names another", {"if_none_match": '"v2"'}, "v1", True),
        ("13.1.2 If-None-Match lists the version", {"if_none_match": '"v2", "v1"'}, "v1", False),
        ("13.1.2 If-None-Match names one, none is there", {"if_none_match": '"v1"'}, None, True),
        ("13.1.1 If-Match * replaces", {"if_match": "*"}, "v1", True),
        ("13.1.1 If-Match * does not create", {"if_match": "*"}, None, False),
        ("13.1.1 If-Match names the version", {"if_match": '"v1"'}, "v1", True),
        ("13.1.1 If-Match names another", {"if_match": '"v2"'}, "v1", False),
        ("13.1.1 If-Match compares strongly", {"if_match": 'W/"v1"'}, "v1", False),
        ("13.1.1 If-Match lists the version", {"if_match": '"v0", "v1"'}, "v1", True),
        ("13.1.1 If-Match names one, none is there", {"if_match": '"v1"'}, None, False),
        ("13.1.1 If-Match malformed", {"if_match": '"v1'}, "v1", False),
        ("13.1.1 If-Match empty", {"if_match": ""}, "v1", False),
        ("13.1.4 unmodified since then", {"if_unmodified_since": AT}, "v1", True),
        ("13.1.4 modified since then", {"if_unmodified_since": BEFORE}, "v1", False),
        ("13.1.4 none is there, so no date", {"if_unmodified_since": BEFORE}, None, True),
        ("13.1.4 an invalid date is ignored", {"if_unmodified_since": "yesterday"}, "v1", True),
        ("13.1.4 ignored beside If-Match", {"if_match": '"v1"', "if_unmodified_since": BEFORE}, "v1", True),
        ("13.1.3 If-Modified-Since is for GET and HEAD", {"if_modified_since": AFTER}, "v1", True),
        ("14.2 a range is for GET", {"range": "bytes=5000-"}, "v1", True),
        ("13.2.2 both must hold: first fails", {"if_match": '"v2"', "if_none_match": '"v2"'}, "v1", False),
        ("13.2.2 both must hold: second fails", {"if_match": '"v1"', "if_none_match": '"v1"'}, "v1", False),
        ("13.2.2 both hold", {"if_match": '"v1"', "if_none_match": '"v2"'}, "v1", True),
    ],
)
def test_write_allowed(says: str, headers: dict[str, str], current: str | None, allowed: bool) -> None:
    modified = None if current is None else MODIFIED
    assert conditions.write_allowed(RequestHeaders(**headers), current, modified) is allowed, says


CONTENT = bytes(range(100))


@pytest.mark.parametrize(
    "ranges",
    [((0, 10), (20, 30)), ((50, 60), (0, 10), (99, 100)), ((0, 1), (2, 3))],
)
def test_multipart_body_is_read_back_by_an_independent_parser(ranges: tuple[tuple[int, int], ...]) -> None:
    parts = tuple(ByteRange(*part) for part in ranges)
    multipart = MultipartRanges(parts, len(CONTENT), "text/plain; charset=utf-8", "3d6b6a416f9b5")
    body = b"".join(
        piece if isinstance(piece, bytes) else CONTENT[piece.start : piece.stop] for piece in multipart.segments
    )
    assert multipart.content_length == len(body)
    head = f"Content-Type: {multipart.content_type}\r\nMIME-Version: 1.0\r\n\r\n".encode()
    message = message_from_bytes(head + body)
    assert message.get_content_type() == "multipart/byteranges"
    assert not message.defects
    assert [
        (part["Content-Type"], part["Content-Range"], part.get_payload(decode=True)) for part in message.get_payload()
    ] == [
        ("text/plain; charset=utf-8", f"bytes {start}-{stop - 1}/100", CONTENT[start:stop]) for start, stop in ranges
    ]


def test_multipart_body_byte_by_byte() -> None:
    multipart = MultipartRanges((ByteRange(0, 2), ByteRange(5, 6)), 7, "a/b", "B")
    assert multipart.segments == (
        b"\r\n--B\r\nContent-Type: a/b\r\nContent-Range: bytes 0-1/7\r\n\r\n",
        ByteRange(0, 2),
        b"\r\n--B\r\nContent-Type: a/b\r\nContent-Range: bytes 5-5/7\r\n\r\n",
        ByteRange(5, 6),
        b"\r\n--B--\r\n",
    )
    assert multipart.content_type == "multipart/byteranges; boundary=B"


def test_byte_range_length() -> None:
    assert ByteRange(5, 15).length == 10


@pytest.mark.parametrize(
    ("timestamp", "date"),
    [
        (784111777, "Sun, 06 Nov 1994 08:49:37 GMT"),
        (0, "Thu, 01 Jan 1970 00:00:00 GMT"),
        (1709210096, "Thu, 29 Feb 2024 12:34:56 GMT"),
        (253402300799, "Fri, 31 Dec 9999 23:59:59 GMT"),
        (-1, "Thu, 01 Jan 1970 00:00:00 GMT"),
        (-(2**63), "Thu, 01 Jan 1970 00:00:00 GMT"),
        (2**63, "Fri, 31 Dec 9999 23:59:59 GMT"),
    ],
)
def test_date_is_sent_as_imf_fixdate(timestamp: int, date: str) -> None:
    assert dates.http_date(timestamp) == date


NOW = 1_800_000_000  # in the year 2027


@pytest.mark.parametrize(
    ("value", "timestamp"),
    [
        # section 5.6.7
        ("Sun, 06 Nov 1994 08:49:37 GMT", 784111777),
        ("Sunday, 06-Nov-94 08:49:37 GMT", 784111777),
        ("Sun Nov  6 08:49:37 1994", 784111777),
        ("Wed Nov 16 08:49:37 1994", 784975777),
        (" Sun, 06 Nov 1994 08:49:37 GMT ", 784111777),
        ("sun, 06 nov 1994 08:49:37 gmt", 784111777),
        ("Thu, 29 Feb 2024 12:34:56 GMT", 1709210096),
        ("Sat, 31 Dec 2016 23:59:60 GMT", 1483228800),  # a leap second
        ("Mon, 06 Nov 1994 08:49:37 GMT", 784111777),  # a wrong weekday is ignored
        ("Thu, 01 Jan 1970 00:00:00 GMT", 0),
        ("Fri, 31 Dec 9999 23:59:59 GMT", 253402300799),
        # two digits: at most 50 years ahead of now
        ("Friday, 01-Jan-27 00:00:00 GMT", 1798761600),
        ("Friday, 01-Jan-77 00:00:00 GMT", 3376684800),  # 2077
        ("Sunday, 01-Jan-78 00:00:00 GMT", 252460800),  # 1978
        ("Saturday, 01-Jan-00 00:00:00 GMT", 946684800),
        # none
        (None, None),
        ("", None),
        ("yesterday", None),
        ("784111777", None),
        ("1994-11-06T08:49:37Z", None),
        ("Sun, 06 Nov 1994 08:49:37", None),
        ("Sun, 06 Nov 1994 08:49:37 UTC", None),
        ("Sun, 06 Nov 1994 08:49:37 +0000", None),
        ("Sun, 06 Nov 1994 08:49:37 GMT; length=5", None),
        ("Sun, 06 Nov 1994 08:49:37 GMT\n", None),
        ("Sun, 6 Nov 1994 08:49:37 GMT", None),
        ("Sun, 06 Nov 94 08:49:37 GMT", None),
        ("Sunday, 06-Nov-1994 08:49:37 GMT", None),
        ("Sun, 06 Foo 1994 08:49:37 GMT", None),
        ("Sun, 00 Nov 1994 08:49:37 GMT", None),
        ("Sun, 31 Nov 1994 08:49:37 GMT", None),
        ("Wed, 29 Feb 2023 08:49:37 GMT", None),
        ("Sun, 06 Nov 1994 24:00:00 GMT", None),
        ("Sun, 06 Nov 1994 08:60:37 GMT", None),
        ("Sun, 06 Nov 1994 08:49:61 GMT", None),
        ("Sun, 06 Nov 0000 08:49:37 GMT", None),
        ("Sun Nov    08:49:37 1994", None),
        ("Sun, \u0660\u0666 Nov 1994 08:49:37 GMT", None),
    ],
)
def test_date_is_read_in_three_formats(value: str | None, timestamp: int | None) -> None:
    assert dates.parse_http_date(value, NOW) == timestamp


@given(st.integers(0, 253402300799))
def test_date_is_read_back(timestamp: int) -> None:
    assert dates.parse_http_date(dates.http_date(timestamp)) == timestamp


BROWSER = "text/html,application/xhtml+xml,application/xml;q=0.9,image/avif,image/webp,*/*;q=0.8"


@pytest.mark.parametrize(
    ("value", "prefers"),
    [
        (None, False),
        ("", False),
        ("*/*", False),
        (BROWSER, False),
        ("text/plain", False),
        ("application/json", True),
        ("application/problem+json", True),
        ("Application/JSON", True),
        ("application/json; charset=utf-8", True),
        ("application/json;charset=utf-8;q=0.5", True),
        ("application/json;q=0", False),
        ("application/json;q=0.0", False),
        ("application/json;q=0, text/plain;q=0", False),
        ("application/json;q=0.001", True),
        ("application/json;Q=0", False),
        ("application/*", True),
        ("application/*, application/json;q=0, application/problem+json;q=0", False),
        ("application/json, */*", False),
        ("application/json, */*;q=0.5", True),
        ("application/json, text/plain, */*", False),
        ("application/json;q=0.9, text/plain", False),
        ("application/json, text/plain;q=0.9", True),
        ("application/json, text/*;q=0.9", True),
        ("text/plain;q=0, */*", True),
        ("text/plain;q=0.2, text/*;q=0.9, application/json;q=0.5", True),
        ("application/problem+json, application/json;q=0.1, text/plain;q=0.5", True),
        (" application/json ; q=1.000 , text/plain ; q=0.999 ", True),
        ("application/json, application/json;q=0.1, text/plain;q=0.5", True),
        ("application/json;q=2", False),
        ("application/json;q=-1", False),
        ("application/json;q=nan", False),
        ("application/json;q=inf", False),
        ("application/json;q=", False),
        ("application/json;q=x", False),
        ("application/json;q=1.5", False),
        ("application/json;q=0." + "9" * 5000, True),
        ("application/jsonx", False),
        (",,;;,=,", False),
        ("json", False),
    ],
)
def test_prefers_json_over_text(value: str | None, prefers: bool) -> None:
    assert accept.prefers_json(value) is prefers


@pytest.mark.parametrize(
    ("value", "prefers"),
    [("application/json", True), (BROWSER, False), ("text/html, application/json;q=0.9", False), ("*/*", False)],
)
def test_prefers_json_over_html(value: str, prefers: bool) -> None:
    assert accept.prefers_json(value, over="text/html") is prefers


@pytest.mark.parametrize(
    ("value", "preferred"),
    [
        (None, "text/plain"),
        ("*/*", "text/plain"),
        ("image/png", "text/plain"),
        ("image/png, */*;q=0.8", "text/plain"),
        ("text/*", "text/plain"),
        (BROWSER, "text/html"),
        ("text/html", "text/html"),
        ("text/html, text/plain;q=0.9", "text/html"),
        ("application/json", "application/json"),
        ("application/json, text/html", "application/json"),
        ("application/json;q=0.9, text/html", "text/html"),
    ],
)
def test_the_preferred_one_of_several(value: str | None, preferred: str) -> None:
    assert accept.preferred(value, ("text/plain", "application/json", "text/html")) == preferred


@given(
    st.text(max_size=40) | st.lists(st.sampled_from([*"*/;,=q. 01", "application/json"]), max_size=20).map("".join)
)
def test_quality_is_a_weight_for_any_header(value: str) -> None:
    assert 0 <= accept.quality(value, "application/json") <= 1


MD5 = hashlib.md5(b"content").digest()
SHA256 = hashlib.sha256(b"content").digest()
MD5_TEXT = base64.b64encode(MD5).decode()
SHA256_TEXT = base64.b64encode(SHA256).decode()
SHA512_TEXT = base64.b64encode(hashlib.sha512(b"content").digest()).decode()


@pytest.mark.parametrize("value", [MD5_TEXT, f" {MD5_TEXT} ", MD5_TEXT.rstrip("=")])
def test_content_md5(value: str) -> None:
    assert digest_fields.parse_content_md5(value) == MD5


@pytest.mark.parametrize(
    "value",
    [
        "",
        "x",
        "====",
        MD5.hex(),
        MD5_TEXT[:-4],
        SHA256_TEXT,
        f"{MD5_TEXT},{MD5_TEXT}",
        MD5_TEXT[:5] + "-" + MD5_TEXT[6:],
        "é" * 22,
    ]
    + [f"{MD5_TEXT[:8]} {MD5_TEXT[8:]}", MD5_TEXT + "\n"],
)
def test_malformed_content_md5_is_a_bad_request(value: str) -> None:
    with pytest.raises(BadRequest, match="Content-MD5 has no base64 of 16 bytes"):
        digest_fields.parse_content_md5(value)


@pytest.mark.parametrize(
    ("value", "digest"),
    [
        (f"sha-256=:{SHA256_TEXT}:", SHA256),
        (f" sha-256=:{SHA256_TEXT}: ", SHA256),
        (f"sha-256=:{SHA256_TEXT.rstrip('=')}:", SHA256),
        (f"sha-512=:{SHA512_TEXT}:,\tsha-256=:{SHA256_TEXT}:", SHA256),
        (f"sha-256=:{SHA256_TEXT}:, sha-512=:{SHA512_TEXT}:", SHA256),
        (f"sha-256=:{SHA256_TEXT}:;a;b=1", SHA256),
        (f"sha-256=:AAAA:, sha-256=:{SHA256_TEXT}:", SHA256),  # RFC 8941 section 3.2: the last one counts
        (f"sha-512=:{SHA512_TEXT}:", None),
        (f"md5=:{MD5_TEXT}:", None),
        ("unknown=::", None),
        ("", None),
        ("  ", None),
    ],
)
def test_repr_digest(value: str, digest: bytes | None) -> None:
    assert digest_fields.parse_repr_digest(value) == digest


@pytest.mark.parametrize(
    "value",
    [
        "sha-256",
        "sha-256=",
        "sha-256=::",
        "sha-256=:x:",
        f"sha-256={SHA256_TEXT}",
        f'sha-256="{SHA256_TEXT}"',
        f"sha-256=:{SHA256_TEXT}",
        f"sha-256=:{SHA256_TEXT}:x",
        f"sha-256=:{SHA256_TEXT}:\n",
        f"sha-256 = :{SHA256_TEXT}:",
        f"SHA-256=:{SHA256_TEXT}:",
        f"sha-256=:{SHA256.hex()}:",
        f"sha-256=:{SHA512_TEXT}:",
        f"sha-256=:{MD5_TEXT}:",
        f"sha-256=:{SHA256_TEXT}:,",
        f"sha-256=:{SHA256_TEXT}:, sha-256=:AAAA:",
        f",sha-256=:{SHA256_TEXT}:",
        f"sha-256=:{SHA256_TEXT}: sha-512=:{SHA512_TEXT}:",
        f"sha-256=:={SHA256_TEXT[1:]}:",
    ],
)
def test_malformed_repr_digest_is_a_bad_request(value: str) -> None:
    with pytest.raises(BadRequest, match="Repr-Digest") as caught:
        digest_fields.parse_repr_digest(value)
    assert caught.value.message.isprintable()


def test_etag_is_sent_quoted() -> None:
    assert conditions.etag_header("0x8D4BCC2E4835CD0") == '"0x8D4BCC2E4835CD0"'
