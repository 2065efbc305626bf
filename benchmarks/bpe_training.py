"""Training a BPE tokenizer: ours against the trainer of the library whose merges or pieces they are.

    python benchmarks/bpe_training.py --text corpus.txt --held-out valid.txt
    python benchmarks/bpe_training.py --text corpus.txt.xz --megabytes 20 --type sentencepiece

Each trains on the same text in a process of its own: `train_tokenizer` on the one side, on the other the
trainer of `tokenizers` (split as for GPT-4) or `sentencepiece` (the settings of tokenization/train.py), given
the text as it comes. Prints seconds, the most memory that the process and its children held together (looked
at ten times a second), and bytes per token on the held-out text; then ours as a share of theirs.
"""

import argparse
import io
import json
import multiprocessing
import os
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path


def read(path: str, num_bytes: int | None) -> Iterator[str]:
    """The documents that `tessera tokenizer train` would read."""
    from tessera.data.sources import read_texts

    return read_texts([path], limit_bytes=num_bytes)


def train_ours(texts: Iterator[str], kind: str, vocab_size: int, output: str) -> None:
    from tessera.tokenization import train_tokenizer

    train_tokenizer(texts, kind=kind, vocab_size=vocab_size, output=output)


def train_theirs(texts: Iterator[str], kind: str, vocab_size: int, output: str) -> None:
    from tessera.tokenization.byte_level import byte_level_backend
    from tessera.tokenization.chat import SPECIAL_TOKENS

    if kind == "bpe":
        from tokenizers import pre_tokenizers, trainers

        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size - len(SPECIAL_TOKENS),
            min_frequency=2,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        backend = byte_level_backend({}, [])
        backend.train_from_iterator(texts, trainer)
        Path(output).mkdir()
        backend.save(f"{output}/tokenizer.json")
        return
    import sentencepiece

    from tessera.tokenization.save import save_tokenizer
    from tessera.tokenization.sentencepiece_models import sentencepiece_tokenizer
    from tessera.tokenization.train import SENTENCEPIECE_SETTINGS

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=(line for text in texts for line in text.split("\n") if line),
        model_writer=model,
        vocab_size=vocab_size,
        **SENTENCEPIECE_SETTINGS,
    )
    save_tokenizer(sentencepiece_tokenizer(model.getvalue()), output)


def run(train, path: str, num_bytes: int | None, kind: str, vocab_size: int, output: str, results) -> None:
    """In a process of its own: train, watch memory."""
    import tessera.data.sources
    import tessera.tokenization.train  # noqa: F401 - imports are no part of training

    most, done = [0.0], threading.Event()

    def watch() -> None:
        while not done.wait(0.1):
            most[0] = max(most[0], memory_of(os.getpid()))

    watcher = threading.Thread(target=watch)
    watcher.start()
    start = time.perf_counter()
    train(read(path, num_bytes), kind, vocab_size, output)
    seconds = time.perf_counter() - start
    done.set()
    watcher.join()
    results.put((seconds, most[0]))


def memory_of(process: int) -> float:
    """MB in memory of a process and its children; Linux only."""
    try:
        pages = int(Path(f"/proc/{process}/statm").read_text().split()[1])
        children = [
            child
            for task in Path(f"/proc/{process}/task").iterdir()
            for child in (task / "children").read_text().split()
        ]
    except OSError:  # gone
        return 0.0
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6 + sum(memory_of(int(child)) for child in children)


def bytes_per_token(folder: str, path: str) -> float:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(f"{folder}/tokenizer.json")
    documents = list(read(path, None))
    encodings = tokenizer.encode_batch_fast(documents, add_special_tokens=False)
    return sum(len(document.encode()) for document in documents) / sum(map(len, encodings))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--text", required=True, help="what `tessera tokenizer train --data` takes")
    parser.add_argument("--held-out", help="text file to measure on; without it, bytes per token is left out")
    parser.add_argument("--vocab-size", type=int, default=32_000)
    parser.add_argument("--megabytes", type=float, default=0, help="of text, at most; 0 for all")
    parser.add_argument("--type", choices=["bpe", "sentencepiece"], default="bpe")
    arguments = parser.parse_args()
    num_bytes = int(arguments.megabytes * 1e6) or None
    peer = "tokenizers" if arguments.type == "bpe" else "sentencepiece"
    context = multiprocessing.get_context("spawn")
    rows, vocabularies = {}, []
    with tempfile.TemporaryDirectory() as folder:
        for name, train in ((peer, train_theirs), ("tessera", train_ours)):
            output, results = f"{folder}/{name}", context.Queue()
            process = context.Process(
                target=run,
                args=(
                    train,
                    arguments.text,
                    num_bytes,
                    arguments.type,
                    arguments.vocab_size,
                    output,
                    results,
                ),
            )
            process.start()
            seconds, megabytes = results.get()
            process.join()
            rows[name] = [seconds, megabytes]
            if arguments.held_out:
                rows[name].append(bytes_per_token(output, arguments.held_out))
            model = json.loads(Path(f"{output}/tokenizer.json").read_text(encoding="utf-8"))["model"]
            vocabularies.append(set(model["vocab"]))
    print(f"{'':15}{'seconds':>10}{'peak MB':>10}{'bytes/token':>13}")
    for name, (seconds, megabytes, *ratio) in rows.items():
        print(f"{name:15}{seconds:10.1f}{megabytes:10.0f}" + (f"{ratio[0]:13.4f}" if ratio else ""))
    shares = [ours / theirs for theirs, ours in zip(*rows.values(), strict=True)]
    print(
        f"{'ours / theirs':15}{shares[0]:10.2f}{shares[1]:10.2f}" + "".join(f"{x:13.4f}" for x in shares[2:])
    )
    theirs, ours = vocabularies
    print(f"tokens of theirs that ours has: {len(theirs & ours)} of {len(theirs)}")


if __name__ == "__main__":
    main()
