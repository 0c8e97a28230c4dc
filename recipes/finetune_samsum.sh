#!/usr/bin/env bash
# Purpose: teach Llama-2-7B (4-bit, LoRA) to summarize chats (SAMSum), then compare it with its base by ROUGE.
# Cost:    the model must be at hand: 13 GB from the hub, which asks to accept its licence.
# Expect:  the adapter in outputs/samsum; outputs/samsum-report.md, the table of ROUGE scores.
#
# Then: recipes/infer_samsum.sh
# MODEL_NAME, QUANTIZATION (4bit, fp8, 8bit, none), DATA_DIR (train, validation and test as JSON, CSV or parquet; empty:
# the hub), OUTPUT_DIR and EVAL_SAMPLES may be set; flags go to the fine-tuning:
# recipes/finetune_samsum.sh --num_epochs 1
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

MODEL_NAME=${MODEL_NAME:-meta-llama/Llama-2-7b-hf}
QUANTIZATION=${QUANTIZATION:-4bit}
DATA_DIR=${DATA_DIR:-}
OUTPUT_DIR=${OUTPUT_DIR:-outputs/samsum}
EVAL_SAMPLES=${EVAL_SAMPLES:-100}

say "fine-tuning $MODEL_NAME into $OUTPUT_DIR"
"$python" -m llmrecipes.finetuning --config "$configs/samsum.yaml" --model_name "$MODEL_NAME" \
  --quantization "$QUANTIZATION" --samsum_dataset.data_path "$DATA_DIR" --output_dir "$OUTPUT_DIR" "$@"

say "comparing base and tuned model on $EVAL_SAMPLES dialogues that neither has seen"
"$python" -m llmrecipes.evaluation --model_name "$MODEL_NAME" --peft_model "$OUTPUT_DIR" \
  --quantization "$QUANTIZATION" --dataset samsum_dataset --samsum_dataset.data_path "$DATA_DIR" \
  --metric rouge --max_samples "$EVAL_SAMPLES" --max_new_tokens 100 \
  --output_file "$OUTPUT_DIR-report.md"
