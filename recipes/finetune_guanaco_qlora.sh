#!/usr/bin/env bash
# Purpose: the Llama-2 QLoRA notebook as one command: 1,000 Guanaco chats, 4-bit base, ask it questions, merge.
# Cost:    the model must be at hand: 13 GB from the hub, which asks to accept its licence.
# Expect:  outputs/guanaco_qlora holds the adapter, outputs/guanaco_qlora-merged a plain model folder that transformers
#          loads.
#
# The data: mlabonne/guanaco-llama2-1k or any such file, named by DATA_DIR; else TRAIN_ROWS chats (1,000: give fewer for
# a small set), and a tenth of that each for validation and test, are drawn (seed 42) from the raw set, SOURCE (a local
# file) or the hub's. Curves: tensorboard --logdir outputs/guanaco_qlora
# MODEL_NAME, DATA_DIR, SOURCE, TRAIN_ROWS, OUTPUT_DIR, MERGED_DIR and QUESTIONS (one a line) may be set; flags go to
# the fine-tuning: recipes/finetune_guanaco_qlora.sh --optimizer adamw --max_train_step 50
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

MODEL_NAME=${MODEL_NAME:-meta-llama/Llama-2-7b-chat-hf}
DATA_DIR=${DATA_DIR:-data/guanaco}
TRAIN_ROWS=${TRAIN_ROWS:-1000}
OUTPUT_DIR=${OUTPUT_DIR:-outputs/guanaco_qlora}
MERGED_DIR=${MERGED_DIR:-$OUTPUT_DIR-merged}
QUESTIONS=${QUESTIONS:-"What is a large language model?
How can I learn to swim as a grown-up?"}

if [[ ! -e $DATA_DIR ]]; then
  say "drawing $TRAIN_ROWS chats into $DATA_DIR"
  held=$(((TRAIN_ROWS + 9) / 10))
  "$python" -m llmrecipes.data create guanaco --source "${SOURCE:-}" --output_dir "$DATA_DIR" \
    --train_rows "$TRAIN_ROWS" --validation_rows "$held" --test_rows "$held"
fi

say "fine-tuning $MODEL_NAME into $OUTPUT_DIR"
"$python" -m llmrecipes.finetuning --config "$configs/guanaco_qlora.yaml" --model_name "$MODEL_NAME" \
  --guanaco_dataset.data_path "$DATA_DIR" --output_dir "$OUTPUT_DIR" "$@"

while IFS= read -r question; do
  say "$question"
  # The text of custom_datasets/guanaco.py; the start token comes by itself, once.
  "$python" -m llmrecipes.inference --model_name "$MODEL_NAME" --peft_model "$OUTPUT_DIR" --quantization 4bit \
    --prompt "[INST] $question [/INST]" --max_new_tokens 200 < /dev/null
done <<< "$QUESTIONS"

say "merging into $MERGED_DIR"
"$python" -m llmrecipes.merging --model_name "$MODEL_NAME" --peft_model "$OUTPUT_DIR" --output_dir "$MERGED_DIR"
