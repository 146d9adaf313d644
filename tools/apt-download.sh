#!/bin/sh
# SPDX-License-Identifier: LGPL-2.1-or-later
# Download Debian packages into a folder, as root or not, without touching the system's package lists:
#
#     apt-download.sh FOLDER ARCHITECTURE PACKAGE…
#
# The sources are the system's own; "native" is this machine's architecture. The lists are kept in FOLDER/.apt for the
# next run.
set -eu

fail() {
    echo "apt-download: $*" >&2
    exit 1
}

[ $# -ge 3 ] || fail "usage: apt-download.sh FOLDER ARCHITECTURE PACKAGE…"
command -v apt-get >/dev/null || fail "apt-get is missing: this is no Debian system"
mkdir -p "$1"
folder=$(cd "$1" && pwd)
architecture=$2
shift 2
[ "$architecture" != native ] || architecture=$(dpkg --print-architecture)

private_apt() {
    apt-get -qq \
        -o Dir::State="$folder/.apt/$architecture/state" \
        -o Dir::State::status="$folder/.apt/$architecture/status" \
        -o Dir::Cache="$folder/.apt/$architecture/cache" \
        -o APT::Architecture="$architecture" \
        -o APT::Architectures="$architecture" \
        -o APT::Sandbox::User="$(id -un)" \
        -o Acquire::Languages=none \
        "$@"
}

mkdir -p "$folder/.apt/$architecture/state/lists/partial" "$folder/.apt/$architecture/cache/archives/partial"
: >"$folder/.apt/$architecture/status"
# A source may have nothing for this architecture, or be unreachable; the download reports what is missing.
private_apt update || true
cd "$folder"
private_apt download "$@" || fail "cannot download $* for $architecture"
