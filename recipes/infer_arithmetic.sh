#!/usr/bin/env bash
# Purpose: ask the model of recipes/finetune_arithmetic.sh one question, in the very words it was trained with.
# Cost:    loading the model, then a second.
# Expect:  46 + 27 = 73
#
# INSTRUCTION, INPUT, MODEL_NAME, QUANTIZATION and PEFT_MODEL (empty: the base alone) may be set; flags go to the
# command: INPUT="Start at 12 and go up by 30." INSTRUCTION="Where do you end?" recipes/infer_arithmetic.sh
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

INSTRUCTION=${INSTRUCTION:-Answer the question.}
INPUT=${INPUT:-What is 46 plus 27?}
MODEL_NAME=${MODEL_NAME:-meta-llama/Llama-2-7b-hf}
QUANTIZATION=${QUANTIZATION:-8bit}
PEFT_MODEL=${PEFT_MODEL-outputs/arithmetic}

prompt=$(mktemp)
trap 'rm -f "$prompt"' EXIT
# The text of custom_datasets/arithmetic.py, its last newline too: without it the model was asked something else.
printf '%s\n%s\n---\nAnswer:\n' "$INSTRUCTION" "$INPUT" > "$prompt"

model=(--model_name "$MODEL_NAME" --quantization "$QUANTIZATION")
if [[ -n $PEFT_MODEL ]]; then model+=(--peft_model "$PEFT_MODEL"); fi
"$python" -m llmrecipes.inference "${model[@]}" --prompt_file "$prompt" --max_new_tokens 24 "$@"
