#!/usr/bin/env bash
# Purpose: write questions about whole numbers, in many wordings, as CSV: 9,500 to train, 500 to validate, 500 to test.
# Cost:    a second.
# Expect:  data/arithmetic/arithmetic_{train,validation,test}.csv; no expression stands in two of them.
#
# DATA_DIR may be set; flags go to the command (python -m llmrecipes.data create arithmetic --help):
#   recipes/create_arithmetic_data.sh --operations addition,subtraction,multiplication,division --largest 1000
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

"$python" -m llmrecipes.data create arithmetic --output_dir "${DATA_DIR:-data/arithmetic}" "$@"
