#!/usr/bin/env bash
# The tests with the lowest and the newest dependencies, on every Python at hand.
#
#   tools/check_versions.sh                      # the whole default suite, 6 times
#   tools/check_versions.sh tests/training       # what pytest is to run instead
#   PYTHONS="3.11" tools/check_versions.sh       # on these versions of Python alone
#
# "lowest" are the bounds of pyproject.toml themselves, what they need at its newest;
# "newest" ignores constraints.txt. Prints one line each; exit code 1 if any failed.
set -uo pipefail
cd "$(dirname "$0")/.."
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/uv" && "$work/uv/bin/pip" install -q uv || exit 1
failed=0
for version in ${PYTHONS:-3.11 3.12 3.13}; do
  python=""
  for candidate in "python$version" "$HOME/.pyenv/versions/$version".*/bin/python; do
    if "$candidate" -c 'import venv' 2>/dev/null; then
      python=$candidate
    fi
  done
  if [[ -z $python ]]; then
    printf '%-7s not at hand\n' "$version"
    continue
  fi
  for bound in lowest-direct highest; do
    place="$work/$version-$bound"
    log="$place.log"
    {
      "$python" -m venv "$place" &&
        VIRTUAL_ENV="$place" "$work/uv/bin/uv" pip install -q --resolution "$bound" -e '.[test]' &&
        "$place/bin/python" -m pytest -p no:cacheprovider "$@"
    } >"$log" 2>&1
    code=$?
    found=$("$place/bin/python" -c '
from importlib.metadata import version
names = ("jax", "flax", "optax", "orbax-checkpoint", "grain", "numpy")
print(", ".join(f"{name} {version(name)}" for name in names))' 2>/dev/null)
    printf '%-7s %-13s %s: %s\n' "$version" "$bound" "${found:-not installed}" "$(tail -n 1 "$log")"
    if ((code)); then
      failed=1
      tail -n 40 "$log" >&2
    fi
  done
done
exit $failed
