"""One prompt, one answer: by the base model or a tuned one."""

import sys
from dataclasses import replace

import torch

from llmrecipes.config.loading import Loaded
from llmrecipes.config.schema import InferenceConfig
from llmrecipes.errors import ConfigError
from llmrecipes.generation.decoding import stream_text
from llmrecipes.models.adapters import load_adapter
from llmrecipes.models.folders import check_adapter_folder, local_path
from llmrecipes.models.loading import load_model, resolve_model
from llmrecipes.precision import out_of_memory_told
from llmrecipes.prompts import encode_prompt
from llmrecipes.reports.format import printable
from llmrecipes.run.preparing import (
    adapter_notices,
    answering_precision,
    answering_tokenizer,
    check_prompts_early,
    contract_of,
    generation_settings,
    set_seeds,
    stop_token_ids,
)


def infer(loaded: Loaded[InferenceConfig], config_path: str | None) -> int:
    """Prints the answer to the prompt as it is generated; notices go to standard error. Returns the exit code."""
    config = loaded.config
    settings = generation_settings(config, config.min_length)
    precision = answering_precision(config)
    if config.peft_model:
        check_adapter_folder(local_path(config.peft_model), "peft_model")
    source = resolve_model(config)
    notices = adapter_notices(config, source)
    tokenizer = answering_tokenizer(config, source)
    prompt = read_prompt(config)
    prompt_ids = encode_prompt(tokenizer, prompt)
    check_prompts_early(config, source, [prompt_ids], settings)
    contract = contract_of(config)
    mismatch = contract.mismatch(prompt) if contract else None
    for notice in (*loaded.notices, mismatch, *notices):
        if notice:
            print(f"note: {notice}", file=sys.stderr)
    model = load_model(config, source, precision)
    if config.peft_model:
        model = load_adapter(model, config.peft_model, "peft_model")
    set_seeds(config.seed)
    settings = replace(settings, stop_token_ids=stop_token_ids(model, tokenizer, contract))
    with precision.autocast(), torch.inference_mode(), out_of_memory_told("generating", "--quantization 4bit"):
        for piece in stream_text(model, tokenizer, prompt_ids, settings):
            print(printable(piece), end="", flush=True)
    print()
    return 0


def read_prompt(config: InferenceConfig) -> str:
    """Returns the prompt exactly as given, by flag, file or standard input; raises `ConfigError`."""
    if config.prompt is not None and config.prompt_file is not None:
        raise ConfigError("--prompt and --prompt_file are two prompts; give one")
    if config.prompt is not None:
        text = config.prompt
    elif config.prompt_file not in (None, "-"):
        path = local_path(str(config.prompt_file))
        try:
            text = path.read_bytes().decode("utf-8")
        except OSError as error:
            raise ConfigError(f"--prompt_file {path}: {error.strerror}") from None
        except UnicodeDecodeError as error:
            raise ConfigError(f"--prompt_file {path}: not UTF-8 text (byte {error.start})") from None
    else:
        if sys.stdin.isatty():
            print("Type the prompt; end with Ctrl-D.", file=sys.stderr)
        text = sys.stdin.read()
    if any("\ud800" <= letter <= "\udfff" for letter in text):
        raise ConfigError("the prompt is not UTF-8 text; give it in a file saved as UTF-8, with --prompt_file")
    if not text.strip():
        raise ConfigError("the prompt is empty; give --prompt, --prompt_file or text on standard input")
    return text
