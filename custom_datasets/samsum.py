"""SAMSum: summarise a chat of a few people (`dialogue`) in a sentence or two (`summary`).

    python -m llmrecipes.finetuning --dataset samsum_dataset --model_name MODEL --output_dir OUTPUT

Source: Gliwa et al., "SAMSum Corpus" (2019), https://aclanthology.org/D19-5409, from the hub or, with
`--samsum_dataset.data_path FOLDER`, from local files. Licence CC BY-NC-ND 4.0: for research, not for business.
"""

from typing import Any

from llmrecipes.data.files import load_split
from llmrecipes.data.rows import Row, text, with_text
from llmrecipes.prompts import EncodedSamples, encode_pairs

HUB = "knkarthick/samsum"
PROMPT = "Summarize this dialog:\n{dialogue}\n---\nSummary:\n"


def get_preprocessed_samsum(dataset_config: Any, tokenizer: Any, split: str) -> EncodedSamples:
    """Returns the split's samples: the prompt masked, the summary and the end token supervised.

    A row with a blank dialogue (the corpus has one, in train) would teach to invent a summary, so it is left out.
    """
    rows = load_split(dataset_config, split, ("dialogue", "summary"), hub_name=HUB)
    return encode_pairs(tokenizer, with_text(rows, "dialogue", f"samsum, {split}").map(_pair))


def _pair(row: Row) -> tuple[str, str]:
    return PROMPT.format(dialogue=row["dialogue"]), text(row, "summary")
