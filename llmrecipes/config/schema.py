"""Every key of every command: name, type, default, range and help line, in one place.

The names and meanings are those of llama-recipes (train_config, fsdp_config, lora_config, ...); what is ours is marked
so in its help line. A class is a group of `--help`; a nested class is a section, `--lora_config.r 16` as a flag and
`lora_config: {r: 16}` in a file. What a combination of keys must satisfy stands in `rules.py`.
"""

from dataclasses import dataclass

from llmrecipes.config.dataset_schema import CacheOptions, DatasetOptions
from llmrecipes.config.options import REQUIRED, option, section

DTYPES = ("bfloat16", "float16", "float32")


@dataclass(frozen=True)
class QuantizationConfig:
    """Storage of the frozen base in 4 bits (bitsandbytes) or fp8"""

    quant_type: str = option("nf4", "4-bit code: nf4 (QLoRA's; llama-recipes' default was fp4)", choices=("nf4", "fp4"))
    compute_dtype: str | None = option(None, "4bit: data type of matmuls; unset: the run's precision", choices=DTYPES)
    compute: str = option(
        "auto", "ours: matmuls of the stored weights: bf16 (exact), int8 or fp8; auto: int8 where the first batch "
        "shows that it is near enough, on a GPU", choices=("auto", "bf16", "int8", "fp8"),
    )  # fmt: skip
    use_double_quant: bool = option(False, "4bit: quantize the scales as well: 0.4 bit a parameter less")
    quant_storage: str = option("bfloat16", "4bit: data type that packed weights are declared as", choices=DTYPES)


@dataclass(frozen=True)
class ModelOptions:
    """Model"""

    model_name: str = option(REQUIRED, "hub id, local folder or .gguf file of the base model")
    tokenizer_name: str | None = option(None, "hub id or folder of the tokenizer; unset: the model's own")
    model_revision: str | None = option(None, "ours: commit, tag or branch of a hub model")
    trust_remote_code: bool = option(False, "ours: run the Python code that a model folder brings along")
    quantization: str | None = option(
        None, "storage of the frozen base; fp8 is ours: float8_e4m3fn", choices=("4bit", "8bit", "fp8"), bare="8bit"
    )
    quantization_config: QuantizationConfig = section(QuantizationConfig, "with --quantization 4bit or fp8")
    use_fast_kernels: bool | None = option(
        None, "true: demand fast attention and layers; false: the plain reference path; unset: fast where it can be"
    )
    device: str = option("auto", "ours: auto (a GPU where there is one), cpu, cuda or cuda:N")


@dataclass(frozen=True)
class PrecisionOptions:
    """Precision"""

    mixed_precision: bool | None = option(
        None, "true: bfloat16 compute, false: float32; unset: bfloat16 where the hardware has it"
    )
    use_fp16: bool = option(False, "float16 compute with loss scaling, for GPUs without bfloat16")


@dataclass(frozen=True)
class BatchOptions:
    """Batches"""

    batching_strategy: str = option(
        "packing", "packing: rows of context_length filled with whole samples; padding: one sample a row",
        choices=("packing", "padding"),
    )  # fmt: skip
    context_length: int = option(4096, "tokens of the longest sample, and of a packed row", at_least=2)
    overlong: str = option(
        "error", "ours: what happens to a sample longer than context_length",
        choices=("error", "truncate", "drop", "split"),
    )  # fmt: skip
    leak_probe: bool = option(True, "ours: with packing, prove first that samples do not see each other")
    group_by_length: bool = option(False, "ours: with padding, batches of samples of like length")
    batch_size_training: int = option(4, "rows of one forward", at_least=1)
    val_batch_size: int = option(1, "rows of one forward in validation", at_least=1)
    gradient_accumulation_steps: int = option(1, "forwards of one optimizer step", at_least=1)
    num_workers_dataloader: int = option(0, "processes that prepare batches ahead; 0: the trainer itself", at_least=0)


@dataclass(frozen=True)
class MemoryOptions:
    """Memory"""

    fit: str = option(
        "auto", "ours: memory of the GPU that the run may take, such as 24GiB; auto: all that is free. Batches that do "
        "not fit are cut, with the same update"
    )  # fmt: skip
    activation_memory: str = option(
        "auto", "ours: what layers keep for the backward pass: keep (all), recompute, offload, or so much, such as "
        "8GiB; auto: what fits"
    )  # fmt: skip


@dataclass(frozen=True)
class LoraOptions:
    """LoRA, with --use_peft --peft_method lora"""

    r: int = option(8, "rank", at_least=1)
    lora_alpha: float = option(32, "scale: the update is multiplied by lora_alpha / r", above=0)
    target_modules: list[str] = option(["q_proj", "v_proj"], "names of the linears adapted, or all-linear")
    bias: str = option("none", "which biases train", choices=("none", "all", "lora_only"))
    task_type: str = option("CAUSAL_LM", "kind of model", choices=("CAUSAL_LM",))
    lora_dropout: float = option(0.05, "share of an adapter's inputs dropped in training", at_least=0, at_most=0.99)
    inference_mode: bool = option(False, "must be false: a frozen adapter cannot train")
    use_rslora: bool = option(False, "ours: rank-stabilized scale lora_alpha / sqrt(r)")
    use_dora: bool = option(False, "ours: weight-decomposed LoRA")


@dataclass(frozen=True)
class LlamaAdapterOptions:
    """LLaMA-Adapter, with --use_peft --peft_method llama_adapter"""

    adapter_len: int = option(10, "learned prompt tokens a layer", at_least=1)
    adapter_layers: int = option(30, "layers adapted, counted from the last", at_least=1)
    task_type: str = option("CAUSAL_LM", "kind of model", choices=("CAUSAL_LM",))


@dataclass(frozen=True)
class PrefixOptions:
    """Prefix tuning, with --use_peft --peft_method prefix"""

    num_virtual_tokens: int = option(30, "learned key/value positions before the prompt", at_least=1)
    task_type: str = option("CAUSAL_LM", "kind of model", choices=("CAUSAL_LM",))


@dataclass(frozen=True)
class TrainedOptions:
    """What trains"""

    use_peft: bool = option(False, "train an adapter on the frozen base instead of the whole model")
    peft_method: str = option("lora", "kind of adapter", choices=("lora", "llama_adapter", "prefix"))
    lora_config: LoraOptions = section(LoraOptions, "")
    llama_adapter_config: LlamaAdapterOptions = section(LlamaAdapterOptions, "")
    prefix_config: PrefixOptions = section(PrefixOptions, "")
    from_peft_checkpoint: str = option("", "folder of an adapter whose weights training continues from")
    allow_base_mismatch: bool = option(
        False, "ours: go on with that adapter though it was trained on another base, if its shapes fit"
    )
    freeze_layers: bool = option(False, "full fine-tuning: freeze the first num_freeze_layers layers")
    num_freeze_layers: int = option(1, "decoder layers frozen, counted from the first", at_least=1)
    freeze_LLM_only: bool = option(False, "for vision models, which are not supported yet")  # noqa: N815


@dataclass(frozen=True)
class TrainingOptions:
    """Training"""

    num_epochs: int = option(3, "passes over the training split", at_least=1)
    max_train_step: int = option(0, "optimizer steps after which training ends; 0: num_epochs decide", at_least=0)
    lr: float = option(1e-4, "peak learning rate", above=0)
    weight_decay: float = option(0.0, "decoupled weight decay", at_least=0)
    optimizer: str = option(
        "adamw", "ours: optimizer, or FILE.py:FUNCTION", plugin=True,
        choices=("adamw", "adamw_fused", "adamw_8bit", "paged_adamw_32bit", "paged_adamw_8bit", "adafactor", "sgd"),
    )  # fmt: skip
    lr_scheduler: str = option(
        "step", "ours: learning-rate schedule, or FILE.py:FUNCTION; step multiplies by gamma each epoch", plugin=True,
        choices=("constant", "linear", "cosine", "step"),
    )  # fmt: skip
    gamma: float = option(0.85, "factor of the learning rate each epoch, with --lr_scheduler step", above=0, at_most=1)
    warmup_steps: int = option(0, "ours: steps over which the learning rate rises from 0", at_least=0)
    warmup_ratio: float = option(0.0, "ours: the same as a share of all steps", at_least=0, at_most=1)
    gradient_clipping: bool = option(False, "bound the gradient's norm")
    gradient_clipping_threshold: float = option(1.0, "largest gradient norm, with --gradient_clipping", above=0)
    seed: int = option(
        42, "seed of the adapter's start, of dropout and of the order of samples", at_least=0, at_most=2**63 - 1
    )
    deterministic: bool = option(False, "ours: only operations whose every run gives the same bits; slower on a GPU")
    max_skipped_steps: int = option(
        3, "ours: steps skipped in a row, their loss or gradient not finite, after which the run stops", at_least=1
    )
    spike_sigma: float = option(
        6.0, "ours: a loss or gradient norm so many standard deviations above the last 128 steps is told; 0: none",
        at_least=0,
    )  # fmt: skip
    skip_spikes: bool = option(False, "ours: leave such steps out of the weights")


@dataclass(frozen=True)
class ValidationOptions:
    """Validation"""

    run_validation: bool = option(True, "measure the loss on the test split while training")
    eval_steps: int = option(0, "ours: optimizer steps between validations; 0: after each epoch", at_least=0)
    max_eval_step: int = option(0, "batches of one validation; 0: all", at_least=0)


@dataclass(frozen=True)
class WandbConfig:
    """Weights & Biases, with --use_wandb"""

    project: str = option("llmrecipes", "project to log to")
    entity: str | None = option(None, "user or team")
    job_type: str | None = option(None, "kind of job")
    tags: list[str] | None = option(None, "tags of the run")
    group: str | None = option(None, "group of runs")
    notes: str | None = option(None, "free text")
    mode: str | None = option(None, "online, offline or disabled", choices=("online", "offline", "disabled"))


@dataclass(frozen=True)
class OutputOptions:
    """Output"""

    output_dir: str = option(REQUIRED, "folder for the adapter or model, metrics and run.yaml")
    overwrite_output_dir: bool = option(False, "ours: replace the run that output_dir holds")
    save_model: bool = option(True, "write the trained weights")
    save_steps: int = option(
        0, "ours: optimizer steps between checkpoints, each all that --resume needs; 0: only when stopped", at_least=0
    )
    save_on: str = option(
        "", "ours: save a checkpoint and go on when this file appears in output_dir, or with `signal` at SIGUSR2"
    )
    keep_last: int = option(2, "ours: checkpoints kept; the best stays too, 0 keeps all", at_least=0)
    resume: str = option(
        "never", "ours: go on with a run exactly: auto (from the newest whole checkpoint in output_dir, if one is "
        "there), never, or a checkpoint's folder"
    )  # fmt: skip
    resume_allow_changes: bool = option(
        False, "ours: go on though settings or data changed since the checkpoint, as long as the epoch that it stands "
        "in has the same steps of the same samples"
    )  # fmt: skip
    logging_steps: int = option(1, "ours: optimizer steps between records of metrics", at_least=1)
    save_metrics: bool = option(True, "write metrics.jsonl")
    report_to: list[str] = option([], "ours: tensorboard, wandb or FILE.py:FUNCTION, separated by commas")
    use_wandb: bool = option(False, "log to Weights & Biases")
    wandb_config: WandbConfig = section(WandbConfig, "")
    flop_counter: bool = option(
        False, "tell each step's TFLOP/s (what is made again is not counted) and its share of a large matmul's here"
    )
    flop_counter_start: int = option(3, "step from which they are told, with --flop_counter", at_least=0)
    use_profiler: bool = option(False, "profile steps 4 to 6")
    profiler_dir: str = option("", "folder for the profile, with --use_profiler; unset: output_dir/profile")


@dataclass(frozen=True)
class FsdpConfig:
    """Sharding over several GPUs, with --enable_fsdp (not supported yet)"""

    mixed_precision: bool | None = option(None, "must agree with the run's --mixed_precision")
    use_fp16: bool = option(False, "must agree with the run's --use_fp16")
    sharding_strategy: str = option(
        "FULL_SHARD", "what is sharded", choices=("FULL_SHARD", "SHARD_GRAD_OP", "NO_SHARD", "HYBRID_SHARD")
    )
    hsdp: bool = option(False, "shard within groups, replicate across them")
    sharding_group_size: int = option(0, "GPUs of a sharding group", at_least=0)
    replica_group_size: int = option(0, "replicas of the model", at_least=0)
    checkpoint_type: str = option(
        "SHARDED_STATE_DICT", "layout of checkpoints", choices=("SHARDED_STATE_DICT", "FULL_STATE_DICT")
    )
    fsdp_activation_checkpointing: bool = option(True, "recompute activations in the backward pass")
    fsdp_cpu_offload: bool = option(False, "keep parameters in main memory")
    pure_bf16: bool = option(False, "train bfloat16 weights without a float32 copy; on one GPU too")
    optimizer: str = option("AdamW", "must agree with the run's --optimizer", choices=("AdamW", "anyprecision"))


@dataclass(frozen=True)
class DistributedOptions:
    """Several GPUs"""

    enable_fsdp: bool = option(False, "shard the model over several GPUs: not supported yet")
    low_cpu_fsdp: bool = option(False, "load the weights on one rank only, with --enable_fsdp")
    fsdp_config: FsdpConfig = section(FsdpConfig, "")
    dist_checkpoint_root_folder: str = option("", "folder of sharded checkpoints, with --enable_fsdp")
    dist_checkpoint_folder: str = option("fine-tuned", "name of a sharded checkpoint, with --enable_fsdp")
    save_optimizer: bool = option(False, "write the optimizer's state, with --enable_fsdp")
    one_gpu: bool = option(False, "accepted and ignored: it never did anything")


@dataclass(frozen=True)
class RunConfig(
    DistributedOptions,
    OutputOptions,
    ValidationOptions,
    TrainingOptions,
    TrainedOptions,
    MemoryOptions,
    BatchOptions,
    CacheOptions,
    DatasetOptions,
    PrecisionOptions,
    ModelOptions,
):
    """python -m llmrecipes.finetuning: fine-tune a model on a data set."""


@dataclass(frozen=True)
class PlanConfig(RunConfig):
    """python -m llmrecipes.plan: what a fine-tuning would take on a GPU that need not be here; no weights are read."""

    card: str = option(
        "4090", "the GPU; --fit says where it has less memory", any_case=True,
        choices=("3090", "4090", "a100", "h100", "h200"),
    )  # fmt: skip
    output_dir: str = option("", "not written to")


@dataclass(frozen=True)
class GenerationOptions:
    """Generation"""

    max_new_tokens: int = option(100, "tokens generated at most", at_least=1)
    min_new_tokens: int = option(0, "tokens generated at least", at_least=0)
    do_sample: bool = option(False, "draw tokens at random; false: the likeliest token (llama-recipes' default: true)")
    temperature: float = option(1.0, "with --do_sample: below 1 is more certain", above=0)
    top_p: float = option(1.0, "with --do_sample: smallest set of tokens of this probability", above=0, at_most=1)
    top_k: int = option(50, "with --do_sample: the k likeliest tokens; 0: all", at_least=0)
    repetition_penalty: float = option(1.0, "above 1 makes repeated tokens less likely", above=0)
    length_penalty: float = option(1.0, "accepted; only beam search would use it, and there is none here")
    use_cache: bool = option(True, "keep keys and values of the tokens before")
    seed: int = option(42, "seed of --do_sample", at_least=0)


@dataclass(frozen=True)
class AdapterOptions:
    """Adapter"""

    peft_model: str | None = option(None, "folder of the adapter, as fine-tuning wrote it; unset: the base alone")
    allow_base_mismatch: bool = option(
        False, "ours: use the adapter though it was trained on another base, if its shapes fit"
    )


@dataclass(frozen=True)
class PromptOptions:
    """Prompt"""

    prompt: str | None = option(None, "ours: the prompt itself; without it --prompt_file, else standard input")
    prompt_file: str | None = option(None, "file that holds one prompt, taken exactly as it is; - is standard input")
    min_length: int | None = option(None, "tokens of prompt and answer together at least", at_least=0)
    max_padding_length: int | None = option(None, "accepted and ignored: one prompt is never padded")
    use_auditnlg: bool = option(False, "accepted and ignored: safety checkers are not shipped")
    enable_azure_content_safety: bool = option(False, "not shipped: an error when set")
    enable_sensitive_topics: bool = option(False, "not shipped: an error when set")
    enable_salesforce_content_safety: bool = option(False, "not shipped: an error when set")
    enable_llamaguard_content_safety: bool = option(False, "not shipped: an error when set")
    share_gradio: bool = option(False, "no web page is shipped: an error when set")


@dataclass(frozen=True)
class InferenceConfig(PromptOptions, GenerationOptions, AdapterOptions, PrecisionOptions, ModelOptions):
    """python -m llmrecipes.inference: answer one prompt with a base model or a tuned one."""


@dataclass(frozen=True)
class ComparisonOptions:
    """Comparison"""

    split: str = option("test", "split to answer")
    metric: list[str] = option(
        ["exact_match"], "how answers are scored, or FILE.py:FUNCTION; several with commas", plugin=True,
        choices=("exact_match", "numeric_match", "rouge"),
    )  # fmt: skip
    max_samples: int = option(0, "rows answered, the first ones; 0: all", at_least=0)
    batch_size: int = option(16, "prompts answered together", at_least=1)
    compare_base: bool = option(True, "answer with the base model as well, for the table")
    examples: int = option(5, "examples shown under the table", at_least=0)
    output_file: str | None = option(None, "Markdown file to write the report to as well")
    context_length: int = option(4096, "tokens of prompt and answer together", at_least=2)
    overlong: str = option(
        "error", "what happens to a sample longer than context_length or the model's positions",
        choices=("error", "drop"),
    )  # fmt: skip


@dataclass(frozen=True)
class EvaluationConfig(
    ComparisonOptions,
    CacheOptions,
    DatasetOptions,
    GenerationOptions,
    AdapterOptions,
    PrecisionOptions,
    ModelOptions,
):
    """python -m llmrecipes.evaluation: score the base model, the tuned one or both on a split of a data set."""


@dataclass(frozen=True)
class MergingConfig:
    """python -m llmrecipes.merging: write an adapter and its base as one plain model folder."""

    model_name: str = option(REQUIRED, "hub id, local folder or .gguf file of the base model")
    peft_model: str = option(REQUIRED, "folder of the adapter, as fine-tuning wrote it")
    allow_base_mismatch: bool = option(False, "merge though the adapter was trained on another base, if its shapes fit")
    output_dir: str = option(REQUIRED, "folder to write the merged model to")
    dtype: str = option("bfloat16", "data type of the weights written", choices=DTYPES)
    model_revision: str | None = option(None, "commit, tag or branch of a hub model")
    trust_remote_code: bool = option(False, "run the Python code that a model folder brings along")
    overwrite_output_dir: bool = option(False, "replace what output_dir holds")
