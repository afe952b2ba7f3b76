"""A data set with pictures, from the hub or from its parquet files, as the JSONL and images that autosteer-eval reads.

    pip install datasets
    python tools/hub_to_jsonl.py MMMU/MMMU --config Art --split validation --output mmmu/
    python tools/hub_to_jsonl.py xai-org/RealworldQA --split test --output realworldqa/
    python tools/hub_to_jsonl.py downloaded.parquet --split train --output realworldqa/

Writes OUTPUT/<split>.jsonl with every field as it is, and each picture as a file in OUTPUT, by its name in that field.
MMMU has a config for each of its 30 subjects.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any


def write_rows(rows: Iterable[dict[str, Any]], output: Path, name: str) -> int:
    """One line a row; PIL images become <name>-<row>-<field>.png. Returns how many rows there were."""
    from PIL import Image

    output.mkdir(parents=True, exist_ok=True)
    n = 0
    with (output / f"{name}.jsonl").open("w", encoding="utf-8") as file:
        for n, row in enumerate(rows, 1):
            fields = dict(row)
            for field, value in row.items():
                if isinstance(value, Image.Image):
                    fields[field] = f"{name}-{n:05}-{field}.png"
                    value.save(output / fields[field])
            file.write(json.dumps(fields, ensure_ascii=False) + "\n")
    return n


def main() -> None:
    """Read the command line, write the files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", help="hub id, or a .parquet file")
    parser.add_argument("--config", help="configuration of the data set, such as MMMU's subject")
    parser.add_argument("--split", required=True)
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args()
    from datasets import load_dataset

    if options.source.endswith(".parquet"):
        rows = load_dataset("parquet", data_files={options.split: options.source}, split=options.split)
    else:
        rows = load_dataset(options.source, options.config, split=options.split)
    name = "-".join(filter(None, (options.config, options.split)))
    print(f"{write_rows(rows, options.output, name)} rows in {options.output / name}.jsonl")


if __name__ == "__main__":
    main()
