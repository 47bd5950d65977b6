#!/usr/bin/env bash
# Make an environment for a tool, once, and compare its rewards there with those of `interop.py`.
#
#     benchmarks/interop.sh NAME TOOL "PACKAGES" ["PACKAGES WITHOUT WHAT THEY ASK FOR"]
set -euo pipefail
environment=.venv-interop-$1
pip=("$environment/bin/python" -m pip install --quiet --disable-pip-version-check)
if [ -z "$3" ] && [ ! -e "$environment/done" ]; then
	echo "$2: skipped; its build for this machine is named by hand, as in docs/serving.md"
	exit
fi
if [ ! -e "$environment/done" ]; then
	"${PYTHON:-python3}" -m venv "$environment"
	# shellcheck disable=SC2086 # several packages
	"${pip[@]}" "$(grep ^torch== requirements.txt)" $3
	# shellcheck disable=SC2086
	[ -z "${4:-}" ] || "${pip[@]}" --no-deps $4
	touch "$environment/done"
fi
"$environment/bin/python" benchmarks/interop_check.py interop --tool "$2"
