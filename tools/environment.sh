#!/bin/sh
# SPDX-License-Identifier: LGPL-2.1-or-later
# Make or update the virtual environment, with this project installed in it:
#
#     environment.sh FOLDER [EXTRA,…]
#
# Debian's python3 alone has neither pip nor python3-venv, which would install it. Then pip is taken from Debian's
# package, which is unpacked into a folder, so root is not needed. PYTHON names another Python.
set -eu

python=${PYTHON:-python3}
project=$(cd "$(dirname "$0")/.." && pwd)
folder=${1:?usage: environment.sh FOLDER [EXTRA,…]}
extras=${2:+[$2]}

fail() {
    echo "environment: $*" >&2
    exit 1
}

check_python() {
    command -v "$python" >/dev/null || fail "$python is missing; on Debian: apt-get install python3"
    "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
        fail "Python 3.11 or newer is needed, but this is $("$python" --version); name another one with PYTHON="
    "$python" -c 'import venv' 2>/dev/null ||
        fail "$python has no module venv; on Debian: apt-get install python3-venv"
}

create() {
    rm -rf "$folder"
    if "$python" -c 'import ensurepip' 2>/dev/null; then
        "$python" -m venv "$folder"
    else
        "$python" -m venv --without-pip "$folder"
        add_pip
    fi
}

add_pip() {
    "$project/tools/apt-download.sh" "$project/.tools/pip" native python3-pip-whl ||
        fail "pip is missing, and could not be fetched; on Debian: apt-get install python3-venv"
    dpkg-deb -x "$project"/.tools/pip/python3-pip-whl_*.deb "$project/.tools/pip"
    wheel=$(ls "$project"/.tools/pip/usr/share/python-wheels/pip-*.whl)
    "$folder/bin/python" "$wheel/pip" install --quiet --no-index "$wheel"
}

check_python
"$folder/bin/python" -m pip --version >/dev/null 2>&1 || create
# pip prints only its errors.
echo "environment: installing the packages into $folder" >&2
"$folder/bin/python" -m pip install --quiet --disable-pip-version-check --use-pep517 --editable "$project$extras"
