"""Laws of the loop: when it validates, saves, stops and reports, and what a validation means."""

import math
from collections.abc import Callable, Iterable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from llmrecipes.batch import Sample, Window
from llmrecipes.data.loaders import Loader
from llmrecipes.errors import DataError
from llmrecipes.precision import resolve_precision
from llmrecipes.training.loop import Hooks, Record, TrainPlan, TrainResult, evaluate, train
from llmrecipes.training.schedules import SCHEDULES
from llmrecipes.training.updater import Health, Updater

Samples = Callable[..., list[Sample]]

FP32 = resolve_precision("cpu", mixed_precision=False, use_fp16=False)


class Bigram(torch.nn.Module):
    """Logits by the token before alone. `spoil` is added to them in evaluation mode: NaN for a sick validation."""

    def __init__(self, spoil: float = 0.0) -> None:
        super().__init__()
        self.table = torch.nn.Parameter(torch.zeros(260, 260))
        self.config = SimpleNamespace(_attn_implementation="none")
        self.spoil = spoil

    def forward(self, input_ids: torch.Tensor, logits_to_keep: torch.Tensor, **options: Any) -> Any:
        logits = self.table[input_ids][:, logits_to_keep]
        return SimpleNamespace(logits=logits if self.training else logits + self.spoil)


def loaders(samples: list[Sample], validation: list[Sample] | None = None, rows: int = 4) -> tuple[Loader, Loader]:
    return (
        Loader(samples, "padding", 64, batch_rows=rows, seed=0),
        Loader(validation or samples, "padding", 64, batch_rows=3),
    )


class Run:
    """A training whose reports and saved names are written down in their order."""

    def __init__(self, model: Any, training: Loader, validation: Loader | None, lr: float = 1.0, **plan: Any) -> None:
        self.events: list[str] = []
        self.records: list[Record] = []
        self.stop_after: int | None = plan.pop("stop_after", None)
        epochs = plan.setdefault("epochs", 2)
        plan.setdefault("steps", sum(len(training.window_rows(epoch)) for epoch in range(epochs)))
        updater = Updater(model, torch.optim.SGD(model.parameters(), lr=lr), SCHEDULES["constant"], FP32)
        hooks = Hooks(
            self.report,
            save=lambda name, place: self.events.append(f"save {name}"),
            checkpoint=lambda place: self.events.append(f"checkpoint {place.step}"),
            stop_requested=self.stop,
        )
        self.result: TrainResult = train(model, training, validation, updater, TrainPlan(**plan), hooks)

    def report(self, record: Record) -> None:
        self.records.append(record)
        self.events.append(f"{record['kind']} {record.get('step')}")

    def stop(self) -> bool:
        return self.stop_after is not None and self.stop_after <= max(record["step"] for record in self.records)


@pytest.fixture
def samples(random_samples: Samples) -> list[Sample]:
    return random_samples(12)


def test_a_validation_after_each_epoch_and_the_best_saved(samples: list[Sample]) -> None:
    run = Run(Bigram(), *loaders(samples))
    assert run.events == [
        "step 1", "step 2", "step 3", "evaluation 3", "save best",
        "step 4", "step 5", "step 6", "evaluation 6", "save best",
    ]  # fmt: skip
    assert run.result.best_step == run.result.steps == 6 and not run.result.stopped


def test_a_worse_validation_is_not_the_best_and_the_last_is_kept_too(
    samples: list[Sample], random_samples: Samples
) -> None:
    run = Run(Bigram(), *loaders(samples, random_samples(12, seed=9)), lr=50.0)
    curve = [record["eval_loss"] for record in run.records if record["kind"] == "evaluation"]
    assert curve[1] > curve[0]
    assert [event for event in run.events if "save" in event] == ["save best", "save last"]
    assert run.result.best_loss == curve[0] and run.result.best_step == 3


def test_without_a_validation_the_last_is_saved(samples: list[Sample]) -> None:
    run = Run(Bigram(), loaders(samples)[0], None, epochs=1)
    assert run.events == ["step 1", "step 2", "step 3", "save last"]
    assert run.result.best_loss is None and run.result.best_step == 0


@pytest.mark.parametrize("spoil", [math.nan, math.inf])
def test_a_validation_that_is_not_a_number_loses_nothing(spoil: float, samples: list[Sample]) -> None:
    run = Run(Bigram(spoil), *loaders(samples))
    # None is better than the other: the newest weights are kept.
    assert [event for event in run.events if "save" in event] == ["save best", "save best"]
    assert not math.isfinite(run.result.best_loss or 0.0)


def test_a_number_is_better_than_none(samples: list[Sample]) -> None:
    model = Bigram(math.nan)
    training, validation = loaders(samples)

    class Healed(Loader):
        def windows(self, epoch: int, start: int = 0) -> Iterable[Window]:
            yield from validation.windows(epoch)
            model.spoil = 0.0

    run = Run(model, training, Healed(samples, "padding", 64, batch_rows=3))
    assert [event for event in run.events if "save" in event] == ["save best", "save best"]
    assert math.isfinite(run.result.best_loss or math.nan)


def test_eval_steps_and_the_end(samples: list[Sample]) -> None:
    run = Run(Bigram(), *loaders(samples), epochs=3, eval_steps=4)
    assert [event for event in run.events if "evaluation" in event] == ["evaluation 4", "evaluation 8", "evaluation 9"]
    once = Run(Bigram(), *loaders(samples), epochs=2, eval_steps=3)
    assert [event for event in once.events if "evaluation" in event] == ["evaluation 3", "evaluation 6"]


@pytest.mark.parametrize("steps", [1, 3, 4, 6])
def test_the_plan_decides_where_it_ends(steps: int, samples: list[Sample]) -> None:
    run = Run(Bigram(), *loaders(samples), steps=steps)
    assert run.result.steps == steps
    assert f"evaluation {steps}" in run.events and run.events.count(f"evaluation {steps}") == 1
    assert run.events[-1].startswith("save")


def test_save_steps_and_logging_steps(samples: list[Sample]) -> None:
    run = Run(Bigram(), loaders(samples)[0], None, save_steps=2, logging_steps=4)
    assert run.events == ["checkpoint 2", "step 4", "checkpoint 4", "step 6", "checkpoint 6", "save last"]


def test_a_wish_to_stop_is_heard_after_the_step_and_what_is_there_is_saved(samples: list[Sample]) -> None:
    run = Run(Bigram(), *loaders(samples), stop_after=2)
    assert run.events == ["step 1", "step 2", "checkpoint 2", "save last"] and run.result.stopped
    after_validation = Run(Bigram(), *loaders(samples), stop_after=3, eval_steps=3)
    assert after_validation.events == ["step 1", "step 2", "step 3", "checkpoint 3", "save last"]


def test_the_loss_of_a_record_is_the_mean_over_its_supervised_tokens(samples: list[Sample]) -> None:
    run = Run(Bigram(), Loader(samples, "padding", 64, batch_rows=3, window_batches=4), None, epochs=1)
    (record,) = run.records
    assert record["loss"] == pytest.approx(math.log(260), rel=1e-6)
    assert record["supervised_tokens"] == sum(sample.supervised_tokens for sample in samples)
    assert record["useful_tokens"] == sum(len(sample.input_ids) for sample in samples) == run.result.useful_tokens
    assert record["tokens_per_second"] == pytest.approx(record["useful_tokens"] / record["seconds"])


# --- validation -------------------------------------------------------------------------------------------------------


def test_a_validation_weighs_every_supervised_token_the_same(tiny_model: Any, samples: list[Sample]) -> None:
    model = tiny_model()
    total, tokens = 0.0, 0
    for sample in samples:  # one at a time, nothing of ours
        ids = torch.tensor(sample.input_ids.tolist())
        logits = model(input_ids=ids[None]).logits[0, :-1]
        labels = torch.tensor(sample.labels.tolist())[1:]
        total += float(F.cross_entropy(logits, labels, ignore_index=-100, reduction="sum").detach())
        tokens += int((labels != -100).sum())
    for rows, strategy in ((1, "padding"), (5, "padding"), (2, "packing")):
        metrics = evaluate(model, Loader(samples, strategy, 64, batch_rows=rows), FP32)
        assert metrics.tokens == tokens
        assert metrics.loss == pytest.approx(total / tokens, rel=1e-5)
        assert metrics.perplexity == pytest.approx(math.exp(total / tokens), rel=1e-5)


def test_a_short_validation_is_divided_by_what_it_saw_and_reads_no_more(samples: list[Sample]) -> None:
    read: list[int] = []

    class Counted(Loader):
        def window(self, batches: list[list[list[int]]]) -> Window:
            read.append(len(batches))
            return super().window(batches)

    model = Bigram()
    torch.nn.init.normal_(model.table)
    first = evaluate(model, Loader(samples[:6], "padding", 64, batch_rows=3), FP32)
    limited = evaluate(model, Counted(samples, "padding", 64, batch_rows=3), FP32, max_batches=2)
    assert (limited.loss, limited.tokens) == (first.loss, first.tokens)
    assert sum(read) == 2


def test_a_validation_too_large_for_the_memory_is_computed_in_halves(samples: list[Sample]) -> None:
    model = Bigram()
    torch.nn.init.normal_(model.table)
    whole = evaluate(model, Loader(samples, "padding", 64, batch_rows=5), FP32)
    most = [2]

    def small_memory(module: Any, arguments: Any, options: Any) -> None:
        if len(options["input_ids"]) > most[0]:
            raise torch.OutOfMemoryError("not enough")

    model.register_forward_pre_hook(small_memory, with_kwargs=True)
    halved = evaluate(model, Loader(samples, "padding", 64, batch_rows=5), FP32)
    assert halved.tokens == whole.tokens and halved.loss == pytest.approx(whole.loss, rel=1e-6)
    most[0] = 0
    with pytest.raises(torch.OutOfMemoryError):
        evaluate(model, Loader(samples, "padding", 64, batch_rows=5), FP32)


def test_a_validation_that_is_to_stop_is_broken_off(samples: list[Sample]) -> None:
    asked: list[int] = []

    def stop() -> bool:
        asked.append(1)
        return len(asked) > 2

    model = Bigram()
    assert evaluate(model, loaders(samples)[1], FP32, stop_requested=stop) is None
    assert model.training and len(asked) <= 4


def test_a_spike_is_told_and_left_out_where_that_is_asked(random_samples: Samples) -> None:
    samples = random_samples(60)
    norms = {}
    for skip in (False, True):
        model = Bigram()
        updater = Updater(
            model, torch.optim.SGD(model.parameters(), lr=0.0), SCHEDULES["constant"], FP32,
            health=Health(spike_sigma=6.0, skip_spikes=skip),
        )  # fmt: skip
        records: list[Record] = []

        def report(record: Record, records: list[Record] = records, model: Bigram = model) -> None:
            records.append(record)
            if record.get("step") == 40 and record["kind"] == "step":
                with torch.no_grad():
                    model.table[:, 7] = 500.0  # the next loss is far off
            elif record.get("step") == 41 and record["kind"] == "step":
                with torch.no_grad():
                    model.table.zero_()

        train(
            model,
            Loader(samples, "padding", 64, batch_rows=1, seed=0),
            None,
            updater,
            TrainPlan(1, 60),
            Hooks(report, print),
        )
        steps = [record for record in records if record["kind"] == "step"]
        assert [record["step"] for record in steps if "spike" in record] == [41]
        assert steps[40]["skipped"] is skip and len(steps[40]["rows"]) == 1
        (notice,) = [record["text"] for record in records if record["kind"] == "notice"]
        assert ("skipped, the weights are as they were (loss " in notice) is skip and "sigma above the mean" in notice
        norms[skip] = updater.spikes.plain()
    assert norms[False] == norms[True]


def test_a_validation_leaves_mode_and_gradients_as_they_were(samples: list[Sample]) -> None:
    model = Bigram()
    for mode in (True, False):
        model.train(mode)
        evaluate(model, loaders(samples)[1], FP32)
        assert model.training is mode and model.table.grad is None


def test_a_loss_beyond_all_bounds_has_an_infinite_perplexity(samples: list[Sample]) -> None:
    model = Bigram()
    with torch.no_grad():
        model.table.fill_(0.0)[:, 0] = 1e4
    assert evaluate(model, loaders(samples)[1], FP32).perplexity == math.inf


def test_batches_without_a_supervised_token_are_told(samples: list[Sample]) -> None:
    class Bare(Loader):
        def windows(self, epoch: int, start: int = 0) -> Iterable[Window]:
            return []

    with pytest.raises(DataError, match="validation: no supervised token"):
        evaluate(Bigram(), Bare(samples, "padding", 64, batch_rows=3), FP32)


class Narrow(Bigram):
    """Runs out of memory where a batch has more than some rows, on the way back as well as forward."""

    def __init__(self, rows: int) -> None:
        super().__init__()
        self.rows, self.failures = rows, 0

    def forward(self, input_ids: torch.Tensor, logits_to_keep: torch.Tensor, **options: Any) -> Any:
        found = super().forward(input_ids, logits_to_keep, **options)
        if len(input_ids) > self.rows:
            self.failures += 1
            if self.failures % 2:
                raise torch.OutOfMemoryError("CUDA out of memory")
            found.logits.register_hook(self.fail)
        return found

    @staticmethod
    def fail(gradient: torch.Tensor) -> None:
        raise RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`")


@pytest.mark.parametrize("rows", [1, 2, 3])
def test_out_of_memory_is_met_by_smaller_batches_and_the_same_update(rows: int, samples: list[Sample]) -> None:
    plain, narrow = Bigram(), Narrow(rows)
    expected = Run(plain, loaders(samples)[0], None)
    found = Run(narrow, loaders(samples)[0], None)
    assert torch.allclose(narrow.table, plain.table, atol=1e-6)
    counts = [(record["useful_tokens"], record["supervised_tokens"]) for record in expected.records]
    told = [record for record in found.records if record["kind"] == "notice"]
    steps = [record for record in found.records if record["kind"] == "step"]
    assert [(record["useful_tokens"], record["supervised_tokens"]) for record in steps] == counts
    pieces = 2 if rows >= 2 else 4
    assert [record["text"].split(", ")[0] for record in told] == [
        f"step 1: the memory did not suffice; batches are cut into {pieces} from now on"
    ]
    assert narrow.failures == (1 if rows >= 2 else 2)


def test_a_single_row_that_does_not_fit_ends_the_run(samples: list[Sample]) -> None:
    with pytest.raises(torch.OutOfMemoryError):
        Run(Narrow(0), loaders(samples)[0], None)
