"""Imported tokenizers against their originals, run by tiktoken and sentencepiece, on every text of a folder.

    python benchmarks/tokenizer_parity.py DATA --tokenizer o200k_base [--part 1/3] [--work DIR]

DATA holds `tok_tiktoken/*.tiktoken`, `tok_gpt2/` and `tok_mistral/*.model*`, and texts in any folder: each
file that is UTF-8 is one, as it is, .gz, .xz and .zip unpacked. Compared are ids and decoded text, on the
adversarial texts, on each character of Unicode and on all files, in pieces of 2^16 characters; `--part` takes
each n-th of them. `bytes` is the byte tokenizer's `tokenizer.json` against Python's own UTF-8. Exit code 1 if
anything differs.
"""

import argparse
import gzip
import lzma
import sys
import tempfile
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path

from transformers import AutoTokenizer
from transformers.utils import logging

from tessera.tokenization import import_tokenizer, train_tokenizer
from tessera.tokenization.probes import Probe, adversarial_texts, every_character
from tessera.tokenization.reference_codecs import Codec, huggingface_codec, open_codec
from tessera.tokenization.verify import compare

PIECE = 2**16
SOURCES = {
    "bytes": None,
    "r50k_base": "tok_tiktoken/r50k_base.tiktoken",
    "cl100k_base": "tok_tiktoken/cl100k_base.tiktoken",
    "o200k_base": "tok_tiktoken/o200k_base.tiktoken",
    "gpt2": "tok_gpt2",
    "mistral-v1": "tok_mistral/tokenizer.model.v1",
    "mistral-v2": "tok_mistral/mistral_instruct_tokenizer_240216.model.v2",
    "mistral-v3": "tok_mistral/mistral_instruct_tokenizer_240323.model.v3",
    "mistral-v7": "tok_mistral/mistral_instruct_tokenizer_241114.model.v7",
}


def read_files(folder: Path) -> Iterator[tuple[str, str]]:
    """Names and contents of the files that are text."""
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        name = str(path.relative_to(folder))
        if path.suffix == ".zip":
            with zipfile.ZipFile(path) as archive:
                members = [(f"{name}:{member}", archive.read(member)) for member in archive.namelist()]
        else:
            opener = {".gz": gzip.open, ".xz": lzma.open}.get(path.suffix, open)
            with opener(path, "rb") as file:
                members = [(name, file.read())]
        for member, data in members:
            try:
                yield member, data.decode("utf-8")
            except UnicodeDecodeError:
                continue  # weights, models


def pieces(folder: Path, part: int, parts: int) -> Iterator[Probe]:
    """Pieces of all texts, cut at line ends where there are any."""
    number = 0
    for name, text in read_files(folder):
        start = 0
        while start < len(text):
            end = min(start + PIECE, len(text))
            if end < len(text):
                end = text.rfind("\n", start, end) + 1 or end
            if number % parts == part - 1:
                yield Probe(f"{name} from character {start}", text[start:end])
            number += 1
            start = end


def byte_codec() -> Codec:
    """Bytes of UTF-8, by Python."""
    return Codec(
        "UTF-8",
        f"Python {sys.version.split()[0]}",
        lambda texts: [list(text.encode("utf-8")) for text in texts],
        lambda rows: [bytes(row).decode("utf-8", errors="replace") for row in rows],
        None,
    )


def main() -> None:
    """Prints what was compared."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("--tokenizer", choices=SOURCES, required=True)
    parser.add_argument("--part", default="1/1", help="of how many, as in 2/3")
    parser.add_argument("--work", type=Path, help="folder to keep the imported directory in")
    args = parser.parse_args()
    logging.disable_progress_bar()
    part, parts = map(int, args.part.split("/"))
    with tempfile.TemporaryDirectory() as scratch:
        folder = (args.work or Path(scratch)) / args.tokenizer
        source = SOURCES[args.tokenizer]
        if not folder.exists():
            if source is None:
                train_tokenizer(kind="bytes", output=folder)
            else:
                import_tokenizer(args.data / source, output=folder)
        written = huggingface_codec(AutoTokenizer.from_pretrained(folder), args.tokenizer)
    original = byte_codec() if source is None else open_codec(args.data / source)
    wrong = [
        name for name, index in original.special_tokens.items() if written.special_tokens.get(name) != index
    ]
    print(
        f"{args.tokenizer}: {original.library} and {written.library}; special tokens of the original "
        f"{len(original.special_tokens)}, with another id {len(wrong)}"
    )
    texts = {"every text": pieces(args.data, part, parts)}
    if part == 1:
        hard = adversarial_texts(sorted(written.special_tokens))
        texts = {"adversarial": hard, "every character": every_character()} | texts
    failed = bool(wrong)
    for what, probes in texts.items():
        start = time.perf_counter()
        found = compare(original, written, probes)
        same_ids = "ids equal" if found.difference is None else "ids DIFFER"
        same_text = "decoded alike" if found.decoding is None else "decoded DIFFERENTLY"
        print(
            f"  {what} (part {args.part}): {found.documents} texts, {found.num_bytes} bytes, {found.tokens} "
            f"tokens: {same_ids}, {same_text}, {found.came_back[1]} came back byte for byte "
            f"({time.perf_counter() - start:.0f} s)",
            flush=True,
        )
        if found.difference or found.decoding:
            print(found.report())
            failed = True
    sys.exit(failed)


if __name__ == "__main__":
    main()
