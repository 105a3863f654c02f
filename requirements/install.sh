#!/usr/bin/env bash
# Fill a virtual environment from the hashed lock file; needs Python 3.11 or newer and a package index, nothing else.
# PYTHON names the interpreter to use. Safe to run again, also after an interruption.
set -euo pipefail
venv=${1:?usage: requirements/install.sh VENV}
cd "$(dirname "$0")/.."

python=
for candidate in ${PYTHON:-python3.11 python3.12 python3.13 python3}; do
    if "$candidate" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
        python=$candidate
        break
    fi
done
if [ -z "$python" ]; then
    echo "no Python 3.11 or newer with its venv and ensurepip modules (${PYTHON:-python3.11 .. python3.13, python3}); set PYTHON" >&2
    exit 1
fi

# pip and then uv, which installs the lock file several times faster than pip does.
"$venv/bin/python" -m pip --version >/dev/null 2>&1 || "$python" -m venv "$venv"
"$venv/bin/python" -m pip install --quiet --disable-pip-version-check --require-hashes -r requirements/uv.txt

# uv reads none of pip's settings: hand over those that say where packages come from.
while read -r theirs ours; do
    if [ -z "${!theirs:-}" ] || [ -n "${!ours:-}" ]; then continue; fi
    # pip passes over a folder that is not there; uv stops.
    if [ "$theirs" = PIP_FIND_LINKS ] && [[ ${!theirs} != *://* && ! -d ${!theirs} ]]; then continue; fi
    export "$ours=${!theirs}"
done <<'SETTINGS'
PIP_INDEX_URL UV_DEFAULT_INDEX
PIP_EXTRA_INDEX_URL UV_INDEX
PIP_FIND_LINKS UV_FIND_LINKS
PIP_NO_INDEX UV_NO_INDEX
PIP_TRUSTED_HOST UV_INSECURE_HOST
PIP_CERT SSL_CERT_FILE
PIP_PROXY ALL_PROXY
PIP_DEFAULT_TIMEOUT UV_HTTP_TIMEOUT
SETTINGS

uv=("$venv/bin/uv" pip install --python "$venv/bin/python")
"${uv[@]}" --require-hashes -r requirements/lock.txt
"${uv[@]}" --no-deps --no-build-isolation -e .

# Byte code of what every process imports, even where the environment says to write none: without it each start of
# the server, and each test that starts one, compiles torch again (12 s of 19 on two cores).
env -u PYTHONDONTWRITEBYTECODE "$venv/bin/python" -c 'import gram_core.evaluate, gram_core.train, server.app'
