"""Makes a run fit its GPU before it begins: how much of a batch at once, and what layers keep for the backward pass.

The largest real batch is rehearsed, forward and backward, and leaves no trace. Cutting a batch costs little, so that
comes first; only what does not fit then is computed again or moved to the host's memory. Neither changes the update.
"""

import gc
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from llmrecipes.batch import Batch
from llmrecipes.config.options import size_in_bytes
from llmrecipes.config.schema import RunConfig
from llmrecipes.data.loaders import Loader
from llmrecipes.errors import ConfigError, HardwareError
from llmrecipes.kernels.decoder import Keep
from llmrecipes.kernels.footprint import Shape, keeps_within
from llmrecipes.kernels.layers import FusedLayer
from llmrecipes.precision import is_out_of_memory
from llmrecipes.reports.format import gib
from llmrecipes.run.speed import Fused, replay_batches
from llmrecipes.training.optimizers import state_bytes, tensor_bytes
from llmrecipes.training.updater import Updater

MARGIN = 0.95
"""Share of the free memory that a run plans with: the allocator's gaps take up to 3 % (measured)."""

CONTEXT = 512 << 20
"""Bytes that CUDA itself takes of a card, beside PyTorch's tensors."""

KEEPS = {"keep": Keep.ALL, "recompute": Keep.INPUT, "offload": Keep.OFFLOADED}


@dataclass(frozen=True)
class Fitted:
    """A run that fits."""

    training: Loader
    told: str
    """for the plan; empty where nothing was decided"""
    peak_bytes: int | None
    """most memory that a step takes, by the rehearsal; None without one"""
    batch_seconds: float | None = None
    """time of the largest batch, forward and backward, when rehearsed again"""


def fit_memory(config: RunConfig, model: Any, loader: Loader, updater: Updater, fused: Fused) -> Fitted:
    """Returns the loader, its batches cut so that they fit, and what was decided; sets what each layer keeps.

    Raises `ConfigError` for what the device or the model cannot do, `HardwareError` where nothing fits.
    """
    if not fused.layers:
        plain_layers(config, model)
    if updater.precision.device.type != "cuda":
        settle_layers(config, fused, loader.batch(loader.window_rows(0)[0][0]))
        return Fitted(loader, "", None)
    limit = memory_limit(config, updater.precision.device)
    gradients = tensor_bytes(updater.parameters)
    for pieces in divisors(loader.batch_rows):
        cut = loader.cut(pieces)
        batch = largest_batch(cut)
        # What the rehearsal has not made: the optimizer's state, and the gradient of the batch before.
        later = state_bytes(config.optimizer, updater.parameters) + (gradients if cut.window_batches > 1 else 0)
        settle_layers(config, fused, batch)
        peak = rehearse(model, batch, updater)
        if cut.batch_rows == 1 and config.activation_memory == "auto" and not fits(peak, limit - later):
            peak = keep_what_fits(model, batch, updater, fused, limit - later)
        if peak is not None and fits(peak, limit - later):
            started = time.perf_counter()
            rehearse(model, batch, updater)  # once more, now that the kernels are compiled
            seconds = time.perf_counter() - started
            replayed = replay_batches(config, fused, cut, updater, peak, limit - later)
            texts = (told(model, fused.layers, pieces, cut), replayed)
            return Fitted(cut, "; ".join(text for text in texts if text), peak + later, seconds)
    need = "more" if peak is None else gib(peak + later)
    raise HardwareError(
        f"rehearsal: one row of {batch.input_ids.shape[1]} tokens takes {need}, and {gib(limit)} are free; try "
        + remedies(config, fused)
    )


def remedies(config: RunConfig, fused: Fused) -> str:
    """Returns what a run that does not fit may still try."""
    least = "offload" if fused.layers else "recompute"
    tried = config.activation_memory in ("auto", least)
    small = config.optimizer in ("adamw_8bit", "paged_adamw_8bit")
    return ", ".join(
        [
            *(["--quantization 4bit"] if config.use_peft and config.quantization != "4bit" else []),
            *([] if tried else [f"--activation_memory {least}"]),
            *([] if small else ["--optimizer adamw_8bit"]),
            "a smaller --context_length or a smaller model",
        ]
    )


def check_fit(config: RunConfig, device: torch.device) -> None:
    """Raises `ConfigError` where `--fit` is given and there is no GPU."""
    if config.fit != "auto" and device.type != "cuda":
        raise ConfigError("--fit is about a GPU's memory, and this run computes on the CPU; leave it out")


def fits(peak: int | None, limit: int) -> bool:
    """Returns whether a rehearsal came to its end, and stayed below a limit in bytes."""
    return peak is not None and peak <= limit


def plain_layers(config: RunConfig, model: Any) -> None:
    """Has a model whose layers are not fused keep as much as is asked for; raises `ConfigError` for what it cannot."""
    if config.activation_memory == "recompute":
        compute_again(model)
    elif config.activation_memory not in ("auto", "keep"):
        raise ConfigError(
            f"--activation_memory {config.activation_memory} needs the fused layers, which this run does not have; "
            "use keep or recompute"
        )


def compute_again(model: Any) -> None:
    """Has a model whose layers are not fused keep their input only, by transformers' gradient checkpointing."""
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})


def memory_limit(config: RunConfig, device: torch.device) -> int:
    """Returns how many bytes PyTorch's tensors may take, and holds the allocator to `--fit`."""
    free, total = torch.cuda.mem_get_info(device)
    mine = free + torch.cuda.memory_reserved(device)
    asked = size_in_bytes(config.fit)
    if asked is None:
        return int(MARGIN * mine)
    if not 0 < asked - CONTEXT <= mine:
        raise HardwareError(
            f"--fit {config.fit}: CUDA itself takes {gib(CONTEXT)}, and {gib(mine)} are free; give a size between"
        )
    torch.cuda.set_per_process_memory_fraction((asked - CONTEXT) / total, device)
    return int(MARGIN * (asked - CONTEXT))


def divisors(number: int) -> list[int]:
    """Returns the numbers that divide a number, ascending."""
    return [divisor for divisor in range(1, number + 1) if number % divisor == 0]


def largest_batch(loader: Loader) -> Batch:
    """Returns the first epoch's batch of the most tokens, padding counted, and of those that of the most samples."""
    return loader.batch(max((batch for window in loader.window_rows(0) for batch in window), key=_size(loader)))


def largest_tokens(loader: Loader) -> int:
    """Returns the tokens of that batch, which need not be made for it."""
    size = _size(loader)
    return max(size(batch)[0] for window in loader.window_rows(0) for batch in window)


def _size(loader: Loader) -> Callable[[list[list[int]]], tuple[int, int]]:
    lengths = loader.lengths

    def size(rows: list[list[int]]) -> tuple[int, int]:
        longest = max(sum(lengths[index] for index in row) for row in rows)
        shape = (loader.batch_rows, loader.row_tokens) if loader.fixed_shapes else (len(rows), longest)
        return shape[0] * shape[1], sum(map(len, rows))

    return size


def asked_keeps(config: RunConfig, shape: Shape, tokens: int) -> list[Keep]:
    """Returns what each layer keeps as the flag says; `auto` keeps all, to begin with."""
    budget = size_in_bytes(config.activation_memory)
    if budget is not None:
        return keeps_within(shape, tokens, budget)
    return [KEEPS.get(config.activation_memory, Keep.ALL)] * shape.layers


def settle_layers(config: RunConfig, fused: Fused, batch: Batch) -> None:
    """Sets what each fused layer keeps as the flag says."""
    if fused.shape is not None:
        keep_each(fused, asked_keeps(config, fused.shape, batch.input_ids.numel()))


def keep_alike(fused: Fused, keep: Keep) -> None:
    """Has every layer keep the same."""
    for layer in fused.layers:
        layer.keep = keep


def keep_each(fused: Fused, keeps: Sequence[Keep]) -> None:
    """Has each layer keep its own."""
    for layer, keep in zip(fused.layers, keeps, strict=True):
        layer.keep = keep


def keep_what_fits(model: Any, batch: Batch, updater: Updater, fused: Fused, limit: int) -> int | None:
    """Has layers keep as much as fits; returns the peak in bytes, None where it was not to be found out."""
    if fused.shape is None:
        compute_again(model)
        return rehearse(model, batch, updater)
    keep_alike(fused, Keep.INPUT)
    peak = rehearse(model, batch, updater)
    if peak is None or peak > limit:
        keep_alike(fused, Keep.OFFLOADED)
        return rehearse(model, batch, updater)
    tokens = batch.input_ids.numel()
    room = len(fused.layers) * tokens * fused.shape.kept_bytes(Keep.INPUT) + limit - peak
    for share in (1.0, 0.8, 0.5):
        keep_each(fused, keeps_within(fused.shape, tokens, int(share * room)))
        better = rehearse(model, batch, updater)
        if better is not None and better <= limit:
            return better
    keep_alike(fused, Keep.INPUT)
    return peak


def rehearse(model: Any, batch: Batch, updater: Updater) -> int | None:
    """Returns the most memory, in bytes, that a forward and backward take; None where it does not suffice.

    Random generators, gradients and weights are as before.
    """
    device = updater.precision.device
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    with torch.random.fork_rng(devices=[device]):
        model.train()
        try:
            updater.backward(updater.loss(model, batch.to(device), updater.precision) / max(1, batch.supervised_tokens))
            torch.cuda.synchronize(device)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            return None
        finally:
            updater.forget()
            gc.collect()
    return int(torch.cuda.max_memory_allocated(device))


def told(model: Any, layers: Sequence[FusedLayer], pieces: int, loader: Loader) -> str:
    """Returns what was decided, for the plan."""
    again = "layers keep their input" if getattr(model, "is_gradient_checkpointing", False) else ""
    cut = f"batches cut into {pieces} of {loader.batch_rows} rows, with the same update" if pieces > 1 else ""
    return "; ".join(text for text in (kept_text([layer.keep for layer in layers]), again, cut) if text)


def kept_text(keeps: Sequence[Keep]) -> str:
    """Returns what layers keep, in words."""
    words = {
        Keep.ALL: "all",
        Keep.WITHOUT_GATE_UP: "all but gate and up",
        Keep.INPUT: "their input",
        Keep.OFFLOADED: "their input in the host's memory",
    }
    return ", ".join(f"{keeps.count(keep)} layers keep {words[keep]}" for keep in reversed(Keep) if keep in keeps)
