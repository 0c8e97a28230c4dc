#!/usr/bin/env bash
# Purpose: let the model of recipes/finetune_samsum.sh summarize one chat, in the very words it was trained with.
# Cost:    loading the model, then seconds.
# Expect:  one sentence: Ines will bring her tent and meet Paul at the station at seven.
#
# DIALOGUE, MODEL_NAME, QUANTIZATION and PEFT_MODEL (empty: the base alone) may be set; flags go to the command:
#   DIALOGUE="$(cat chat.txt)" recipes/infer_samsum.sh --do_sample --temperature 0.7
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

DIALOGUE=${DIALOGUE:-"Paul: the tent is gone, I think my brother took it
Ines: no problem, I have one. it's big enough for us both
Paul: you're a treasure! the train goes at ten past seven
Ines: then I'll be at the station at seven :)"}
MODEL_NAME=${MODEL_NAME:-meta-llama/Llama-2-7b-hf}
QUANTIZATION=${QUANTIZATION:-4bit}
PEFT_MODEL=${PEFT_MODEL-outputs/samsum}

prompt=$(mktemp)
trap 'rm -f "$prompt"' EXIT
# The text of custom_datasets/samsum.py, its last newline too: without it the model was asked something else.
printf 'Summarize this dialog:\n%s\n---\nSummary:\n' "$DIALOGUE" > "$prompt"

model=(--model_name "$MODEL_NAME" --quantization "$QUANTIZATION")
if [[ -n $PEFT_MODEL ]]; then model+=(--peft_model "$PEFT_MODEL"); fi
"$python" -m llmrecipes.inference "${model[@]}" --prompt_file "$prompt" --max_new_tokens 100 "$@"
