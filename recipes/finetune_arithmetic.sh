#!/usr/bin/env bash
# Purpose: teach Llama-2-7B (8-bit, LoRA) arithmetic with a preprocessor of one's own, then compare it with its base.
# Cost:    the model must be at hand: 13 GB from the hub, which asks to accept its licence.
# Expect:  the adapter in outputs/arithmetic; outputs/arithmetic-report.md, the table of exact matches.
#
# First: recipes/create_arithmetic_data.sh. Then: recipes/infer_arithmetic.sh
# MODEL_NAME, QUANTIZATION (8bit, fp8, 4bit, none), DATA_DIR, OUTPUT_DIR and EVAL_SAMPLES may be set; flags go to the
# fine-tuning: MODEL_NAME=models/SmolLM2-135M-Instruct.Q4_1.gguf recipes/finetune_arithmetic.sh --num_epochs 1
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

MODEL_NAME=${MODEL_NAME:-meta-llama/Llama-2-7b-hf}
QUANTIZATION=${QUANTIZATION:-8bit}
DATA_DIR=${DATA_DIR:-data/arithmetic}
OUTPUT_DIR=${OUTPUT_DIR:-outputs/arithmetic}
EVAL_SAMPLES=${EVAL_SAMPLES:-200}

say "fine-tuning $MODEL_NAME into $OUTPUT_DIR"
"$python" -m llmrecipes.finetuning --config "$configs/arithmetic.yaml" --model_name "$MODEL_NAME" \
  --quantization "$QUANTIZATION" --custom_dataset.data_path "$DATA_DIR" --output_dir "$OUTPUT_DIR" "$@"

say "comparing base and tuned model on $EVAL_SAMPLES questions that neither has seen"
"$python" -m llmrecipes.evaluation --model_name "$MODEL_NAME" --peft_model "$OUTPUT_DIR" \
  --quantization "$QUANTIZATION" --dataset custom_dataset \
  --custom_dataset.file arithmetic.py:get_preprocessed_arithmetic --custom_dataset.data_path "$DATA_DIR" \
  --metric exact_match --max_samples "$EVAL_SAMPLES" --max_new_tokens 24 --batch_size 50 \
  --output_file "$OUTPUT_DIR-report.md"
