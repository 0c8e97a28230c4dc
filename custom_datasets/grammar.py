"""Grammar: rewrite a sentence (`input`) in correct English (`target`).

    python -m llmrecipes.finetuning --dataset grammar_dataset --grammar_dataset.data_path FOLDER \\
        --model_name MODEL --output_dir OUTPUT

FOLDER holds `train.csv` and `validation.csv`. Or, as in llama-recipes, `--grammar_dataset.train_split` and
`--grammar_dataset.test_split` are themselves paths of CSV files. llama-recipes took its rows from JFLEG (Napoles et
al., 2017; CC BY-NC-SA 4.0, not for business) and C4_200M (Stahlberg and Kumar, 2021; CC BY 4.0).
"""

from pathlib import Path
from typing import Any

from llmrecipes.data.files import load_rows, load_split
from llmrecipes.data.rows import text
from llmrecipes.prompts import EncodedSamples, encode_pairs

COLUMNS = ("input", "target")
PROMPT = "Correct this to standard English: {input}\n---\nCorrected: "


def get_preprocessed_grammar(dataset_config: Any, tokenizer: Any, split: str) -> EncodedSamples:
    """Returns the split's samples: the prompt masked, the corrected sentence and the end token supervised.

    `split` is the name of a split, or the path of its file (looked for in `data_path` where that is given).
    """
    if Path(split).suffix:
        folder = getattr(dataset_config, "data_path", "") or ""
        rows = load_rows(Path(folder).expanduser() / Path(split).expanduser(), COLUMNS)
    else:
        rows = load_split(dataset_config, split, COLUMNS)
    return encode_pairs(tokenizer, rows.map(lambda row: (PROMPT.format(input=text(row, "input")), text(row, "target"))))
