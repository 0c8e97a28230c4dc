"""What a sample must keep to, and what becomes of one that is too long."""

from dataclasses import dataclass, field, replace

from llmrecipes.batch import Sample
from llmrecipes.data.made_rows import named


@dataclass(frozen=True)
class SampleLimits:
    """What a sample must keep to."""

    context_length: int
    max_positions: int
    """the model's own limit"""
    vocabulary_size: int
    overlong: str = "error"
    """error, truncate, drop or split"""

    @property
    def longest(self) -> int:
        """Tokens that a sample may have."""
        return min(self.context_length, self.max_positions)

    @property
    def reason(self) -> str:
        """What sets the limit, for messages."""
        own = f"the model's {self.max_positions} positions"
        return own if self.max_positions < self.context_length else f"--context_length {self.context_length}"

    @property
    def remedy(self) -> str:
        """What to do about samples that are longer."""
        raised = "" if self.max_positions < self.context_length else "raise it, or "
        return f"{raised}say with --overlong what becomes of them: truncate, drop or split"


@dataclass
class Overlong:
    """Rows longer than the limits allow, their lengths, and those of which nothing was left."""

    limits: SampleLimits
    tokens: dict[int, int] = field(default_factory=dict)
    """row -> its length"""
    lost: list[int] = field(default_factory=list)

    def stretches(self, sample: Sample) -> list[slice]:
        """Returns which stretches of an overlong sample are left: those that still hold a supervised token."""
        self.tokens[sample.row] = len(sample.input_ids)
        length = self.limits.longest
        ends = {"split": len(sample.input_ids), "truncate": length}.get(self.limits.overlong, 0)
        cut = [slice(start, min(start + length, len(sample.input_ids))) for start in range(0, ends, length)]
        kept = [at for at in cut if piece(sample, at).supervised_tokens]
        if not kept:
            self.lost.append(sample.row)
        return kept

    @property
    def fault(self) -> str:
        """What is wrong with these rows, and what to do."""
        return f"longer than {self.limits.reason} (longest {max(self.tokens.values())} tokens; {self.limits.remedy})"

    @property
    def notice(self) -> str:
        """What became of these rows."""
        verb = {"truncate": "cut", "drop": "dropped"}.get(self.limits.overlong, "split")
        longest = max(self.tokens.values())
        told = f"{verb} {named(list(self.tokens))}: longer than {self.limits.reason} (longest {longest} tokens)"
        if self.limits.overlong == "drop" or not self.lost:
            return told
        return f"{told}; left out {named(self.lost)}: no supervised token was left"


def piece(sample: Sample, at: slice) -> Sample:
    """Returns a stretch of a sample."""
    return replace(sample, input_ids=sample.input_ids[at], labels=sample.labels[at])
