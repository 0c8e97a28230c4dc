# shellcheck shell=bash
# Sourced by every recipe, not run by itself. It goes to the root of the checkout, so that the folder a recipe is
# called from does not matter and relative paths count from there, and it picks the Python: $PYTHON, an activated
# environment, the checkout's own .venv, in this order. Recipes of an installed package stay in the current folder.

configs=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)/configs
if [[ -f ${configs%/configs}/setup.cfg ]]; then
  cd "${configs%/configs}" || exit
  configs=configs
fi

python=${PYTHON:-}
if [[ -z $python && -z ${VIRTUAL_ENV:-}${CONDA_PREFIX:-} && -x .venv/bin/python ]]; then
  python=.venv/bin/python
fi
python=${python:-python}

say() { printf '\n== %s\n' "$*" >&2; }
