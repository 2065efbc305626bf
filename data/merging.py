"""Token ids that several tasks wrote, made one prepared folder.

What belongs here: putting the parts together in the order of the tasks, and the account of them. What a task
leaves is written by data/datatrove_pipeline.py: in `<work>/counts/<task>.json` what its filters did, in
`<work>/tokens/<task>` the ids of each split with a separator after every document (`<split>.bin`), how many
each document has (`<split>.lengths`, little-endian uint64), and `account.json`.
"""

import json
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from .deduplication import DUPLICATE, NEAR_DUPLICATE
from .hashing import file_sha256
from .token_files import DTYPES, FORMAT, META, SPLITS


def merge_shards(work: Path, output: Path, tokenizer: Path | None, given: dict[str, Any]) -> None:
    """Writes `train.bin`, `val.bin`, their `.idx`, the tokenizer and `data_meta.json`.

    Args:
        work: where the tasks left their parts.
        output: folder to write; it must not exist, or be empty.
        tokenizer: directory to keep a copy of; None for bytes.
        given: `sources`, `filters` and `val_fraction` as `data_meta.json` tells them.

    Raises:
        ValueError: if a split is empty.
    """
    shards = sorted((work / "tokens").iterdir())
    accounts = [json.loads((shard / "account.json").read_text(encoding="utf-8")) for shard in shards]
    counted = sorted((work / "counts").iterdir())
    counts = [json.loads(path.read_text(encoding="utf-8")) for path in counted]
    partial = output.with_name(output.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    encoder = accounts[0]["encoder"]
    splits = {split: _merge(partial, split, shards, accounts) for split in SPLITS}
    if tokenizer:
        shutil.copytree(tokenizer, partial / "tokenizer")
    written = sum(split["documents"] for split in splits.values())
    dropped, lines = Counter(), Counter()
    for count in counts:
        dropped.update(count["dropped"])
        lines.update(count["lines_dropped"])
    if twins := sum(count["kept"] for count in counts) - written:
        near = NEAR_DUPLICATE in given["filters"]["names"]
        dropped[NEAR_DUPLICATE if near else DUPLICATE] = twins
    sources = []
    for number, source in enumerate(given["sources"]):
        total = Counter(documents=0, tokens=0, bytes=0)
        for account in accounts:
            total.update(account["sources"].get(str(number), {}))
        read = sum(count["read"].get(str(number), 0) for count in counts)
        sources.append({**source, "read": read, **total, "ended": True})
    if encoder["eos_token_id"] is None:  # nothing stands after the last document of a split
        for split in SPLITS:
            ends = [account["splits"][split]["last_source"] for account in accounts]
            last = [number for number in ends if number is not None][-1]
            sources[last]["tokens"] -= len(encoder["separator"])
    meta = {
        "format": FORMAT,
        "dtype": encoder["dtype"],
        "vocab_size": encoder["vocab_size"],
        "eos_token_id": encoder["eos_token_id"],
        "tokenizer_sha256": file_sha256(tokenizer / "tokenizer.json") if tokenizer else None,
        **splits,
        "sha256": {
            f"{split}.{suffix}": file_sha256(partial / f"{split}.{suffix}")
            for split in SPLITS
            for suffix in ("bin", "idx")
        },
        "sources": sources,
        "filters": {**given["filters"], "dropped": dict(dropped), "lines_dropped": dict(lines)},
        "val_fraction": given["val_fraction"],
        "val_data": None,
        "val_drawn_by": "hash",  # of each document alone: tasks know nothing of the others
        "token_budget": None,
        "seed": None,
    }
    (partial / META).write_text(json.dumps(meta, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    if output.is_dir():
        output.rmdir()
    partial.rename(output)


def _merge(folder: Path, split: str, shards: list[Path], accounts: list[dict]) -> dict[str, int]:
    """One split: ids one after the other, and where each document starts."""
    lengths = np.concatenate([np.fromfile(shard / f"{split}.lengths", dtype="<u8") for shard in shards])
    if not len(lengths):
        raise ValueError(
            f"no document is left for {split}: choose other filters, another val_fraction, or more text"
        )
    with (folder / f"{split}.bin").open("wb") as merged:
        for shard in shards:
            with (shard / f"{split}.bin").open("rb") as part:
                shutil.copyfileobj(part, merged, 2**22)
        encoder = accounts[0]["encoder"]
        if encoder["eos_token_id"] is None:  # a separator stands between documents, not after the last
            lengths[-1] -= len(encoder["separator"])
            merged.truncate(int(lengths.sum()) * np.dtype(DTYPES[encoder["dtype"]]).itemsize)
    np.append(np.uint64(0), np.cumsum(lengths, dtype="<u8")).astype("<u8").tofile(folder / f"{split}.idx")
    return {
        "documents": len(lengths),
        "tokens": int(lengths.sum()),
        "bytes": sum(account["splits"][split]["bytes"] for account in accounts) + len(lengths) - 1,
        "max_id": max(account["splits"][split]["max_id"] for account in accounts),
    }
