"""Arithmetic: questions about whole numbers in many wordings, made on this machine. The quickstart's data set.

    llmrecipes data create arithmetic
    python -m llmrecipes.finetuning --dataset custom_dataset \\
        --custom_dataset.file custom_datasets/arithmetic.py:get_preprocessed_arithmetic \\
        --model_name MODEL --output_dir OUTPUT

The first command writes arithmetic_train.csv, arithmetic_validation.csv and arithmetic_test.csv with the columns
instruction, input, output (what the model should say) and answer (the number alone). No two files share an
expression, so a model that has learned its training rows by heart gains nothing on the others; `3 + 4` and `4 + 3`
are one expression. The data are nobody's: do with them what you like.
"""

from dataclasses import dataclass
from itertools import chain, zip_longest
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

from llmrecipes.config.options import option
from llmrecipes.data.files import load_split, save_rows
from llmrecipes.data.rows import Row, text
from llmrecipes.errors import ConfigError
from llmrecipes.prompts import EncodedSamples, encode_pairs

FOLDER = "data/arithmetic"
PROMPT = "{question}\n---\nAnswer:\n"

SIGNS = {"addition": "+", "subtraction": "-", "multiplication": "*", "division": "/"}
COMMUTATIVE = ("addition", "multiplication")
WORDINGS = {
    "addition": (
        ("Add the two numbers.", "{a} + {b}"),
        ("Find the sum.", "{a} and {b}"),
        ("Calculate.", "{b} added to {a}"),
        ("Answer the question.", "What is {a} plus {b}?"),
        ("Where do you end?", "Start at {a} and go up by {b}."),
        (
            "Solve the word problem.",
            "One jar holds {a} beans and another holds {b}. How many beans do they hold together?",
        ),
    ),
    "subtraction": (
        ("Subtract the second number from the first.", "{a} - {b}"),
        ("Find the difference.", "{a} take away {b}"),
        ("Calculate.", "{b} subtracted from {a}"),
        ("Answer the question.", "What is {a} minus {b}?"),
        ("Where do you end?", "Start at {a} and go down by {b}."),
        ("Solve the word problem.", "It is {a} degrees, then {b} degrees colder. How many degrees is it now?"),
    ),
    "multiplication": (
        ("Multiply the two numbers.", "{a} * {b}"),
        ("Find the product.", "{a} and {b}"),
        ("Calculate.", "{a} multiplied by {b}"),
        ("Answer the question.", "What is {a} times {b}?"),
        ("Find the total.", "{a} groups of {b}"),
        ("Solve the word problem.", "A hall has {a} rows with {b} chairs each. How many chairs does it have?"),
    ),
    "division": (
        ("Divide the first number by the second and give the remainder.", "{a} / {b}"),
        ("Find the quotient and the remainder.", "{a} by {b}"),
        ("Calculate, with remainder.", "{a} divided by {b}"),
        ("Answer the question.", "How often does {b} go into {a}, and what is left over?"),
        ("Share out and say what remains.", "{a} among {b}"),
        (
            "Solve the word problem.",
            "{b} children share {a} nuts equally. How many does each get, and how many are left?",
        ),
    ),
}


def get_preprocessed_arithmetic(dataset_config: Any, tokenizer: Any, split: str) -> EncodedSamples:
    """Returns the split's samples: the question masked, the output and the end token supervised."""
    rows = load_split(dataset_config, split, ("instruction", "input", "output"), default_path=FOLDER)
    return encode_pairs(tokenizer, rows.map(lambda row: (_prompt(row), text(row, "output"))))


def _prompt(row: Row) -> str:
    parts = [text(row, "instruction"), text(row, "input", blank_allowed=True)]
    return PROMPT.format(question="\n".join(part for part in parts if part))


@dataclass(frozen=True)
class ArithmeticData:
    """llmrecipes data create arithmetic: questions about whole numbers, with answers."""

    output_dir: str = option(FOLDER, "folder to write the three files to")
    operations: list[str] = option(["addition", "subtraction"], "what is asked, in equal shares", choices=tuple(SIGNS))
    smallest: int = option(0, "smallest number in a question", at_least=0)
    largest: int = option(100, "largest number in a question; no sum is larger, a product may be", at_most=1000)
    negative_results: bool = option(False, "let subtractions go below zero")
    train_rows: int = option(9500, "rows of the train split; expressions may come again in another wording", at_least=1)
    validation_rows: int = option(500, "rows of the validation split, each another expression", at_least=1)
    test_rows: int = option(500, "rows of the test split, each another expression", at_least=1)
    seed: int = option(42, "the same seed writes the same files")


class Question(NamedTuple):
    """One row before it is written; `a` and `b` in the order in which the wording has them."""

    operation: str
    a: int
    b: int
    wording: tuple[str, str]

    @property
    def expression(self) -> tuple[str, int, int]:
        """What makes two questions the same whatever their words, and whatever the order where that is free."""
        low, high = sorted((self.a, self.b))
        return (self.operation, low, high) if self.operation in COMMUTATIVE else (self.operation, self.a, self.b)

    def row(self) -> dict[str, str]:
        """Returns the row as it is written."""
        instruction, words = self.wording
        result = answer(self.operation, self.a, self.b)
        output = f"{self.a} {SIGNS[self.operation]} {self.b} = {result}"
        return {
            "instruction": instruction,
            "input": words.format(a=self.a, b=self.b),
            "output": output,
            "answer": result,
        }


def create_data(config: ArithmeticData) -> str:
    """Writes the three files and returns what was written, in a sentence or two."""
    operations = list(dict.fromkeys(config.operations))
    if not operations:
        raise ConfigError(f"--operations is empty: name one or more of {', '.join(SIGNS)}")
    random = Random(config.seed)
    splits: dict[str, list[Question]] = {"train": [], "validation": [], "test": []}
    for place, operation in enumerate(operations):
        shares = {name: _share(getattr(config, f"{name}_rows"), len(operations), place) for name in splits}
        for name, questions in _deal(config, operation, shares, random).items():
            splits[name] += questions
    for questions in splits.values():
        random.shuffle(questions)
    folder = Path(config.output_dir).expanduser()
    save_rows({folder / f"arithmetic_{name}.csv": [q.row() for q in splits[name]] for name in splits})
    return _summary(folder, operations, splits)


def answer(operation: str, a: int, b: int) -> str:
    """Returns the number, or `quotient remainder rest` for a division."""
    if operation == "division":
        return f"{a // b} remainder {a % b}"
    return str({"addition": a + b, "subtraction": a - b, "multiplication": a * b}[operation])


def _expressions(config: ArithmeticData, operation: str) -> list[tuple[int, int]]:
    """Returns every pair of numbers that may be asked, those of a free order once, the lower number first."""
    numbers = range(config.smallest, config.largest + 1)
    pairs = [(a, b) for a in numbers for b in numbers]
    if operation == "addition":
        return [(a, b) for a, b in pairs if a <= b and a + b <= config.largest]
    if operation == "subtraction":
        return [(a, b) for a, b in pairs if a >= b or config.negative_results]
    if operation == "multiplication":
        return [(a, b) for a, b in pairs if a <= b]
    return [(a, b) for a, b in pairs if a >= b > 0]


def _share(rows: int, operations: int, place: int) -> int:
    """Returns how many of `rows` one operation gets; the first ones take what does not divide."""
    return rows // operations + (place < rows % operations)


def _deal(config: ArithmeticData, operation: str, shares: dict[str, int], random: Random) -> dict[str, list[Question]]:
    """Returns the questions of one operation for each split. Every expression goes to one split only."""
    pairs = _expressions(config, operation)
    random.shuffle(pairs)
    held_out = shares["validation"] + shares["test"]
    range_name = f"{operation} with numbers from {config.smallest} to {config.largest}"
    if held_out >= len(pairs):
        raise ConfigError(
            f"{range_name} has {len(pairs)} different expressions, but validation and test ask for {held_out} and "
            "train needs some too: raise --largest, or lower --validation_rows and --test_rows"
        )
    validation, test = pairs[: shares["validation"]], pairs[shares["validation"] : held_out]
    train = [_wordings(operation, pair, random) for pair in pairs[held_out : held_out + shares["train"]]]
    rounds = chain.from_iterable(zip_longest(*train))  # each expression once before any comes again
    questions = [question for question in rounds if question is not None]
    if len(questions) < shares["train"]:
        raise ConfigError(
            f"{range_name} leaves {len(train)} expressions in {len(questions)} wordings for train, which asks for "
            f"{shares['train']}: raise --largest or lower --train_rows"
        )
    return {
        "train": questions[: shares["train"]],
        "validation": [_wordings(operation, pair, random)[0] for pair in validation],
        "test": [_wordings(operation, pair, random)[0] for pair in test],
    }


def _wordings(operation: str, pair: tuple[int, int], random: Random) -> list[Question]:
    """Returns all ways to ask for one expression, shuffled."""
    orders = {pair, pair[::-1]} if operation in COMMUTATIVE else {pair}
    ways = [Question(operation, a, b, wording) for a, b in sorted(orders) for wording in WORDINGS[operation]]
    random.shuffle(ways)
    return ways


def _summary(folder: Path, operations: list[str], splits: dict[str, list[Question]]) -> str:
    expressions = {name: {question.expression for question in questions} for name, questions in splits.items()}
    counts = ", ".join(
        f"{name} {len(splits[name])} rows of {len(expressions[name])} different expressions" for name in splits
    )
    shared = sum(map(len, expressions.values())) - len(set().union(*expressions.values()))
    return f"Wrote {', '.join(operations)} to {folder}/arithmetic_*.csv: {counts}; expressions in two splits: {shared}."
