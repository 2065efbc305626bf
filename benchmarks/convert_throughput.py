"""Conversion against copying the same files: seconds and their ratio, in one run.

    python benchmarks/convert_throughput.py [--gigabytes 2.5] [--rounds 3] [--work DIR]

A Llama with random bf16 weights is written to DIR (a temporary directory by default; three times the size
must be free there). Then, in turn: its weights are copied with `shutil.copyfile` and forced to disk, and it
is converted. `written` is from the call to weights on disk: reading, translating, the look for NaN, writing,
checksums, fsync. `verified` adds reading source and result again, bit for bit, the hashes for the report, and
logits of a sample of the layers. Of each the median is shown. Best on an idle machine: copying is the
kernel's work alone, so other processes slow it down less.
"""

import argparse
import datetime
import os
import platform
import shutil
import statistics
import tempfile
import time
from pathlib import Path

import torch
import transformers
from transformers.utils import logging

from tessera.conversion.convert import convert
from tessera.conversion.rules import Changed
from tessera.conversion.tensor_files import write_safetensors


def write_llama(folder: Path, gigabytes: float) -> int:
    """Writes a Llama of about this size in files of 1 GB; gives its bytes."""
    sizes = {"hidden_size": 2048, "intermediate_size": 5632, "num_attention_heads": 16}
    sizes |= {"num_key_value_heads": 4, "vocab_size": 32000, "max_position_embeddings": 2048}
    layer = 2 * (2 * 2048 * 2048 + 2 * 2048 * 512 + 3 * 2048 * 5632)
    depth = max(1, round((gigabytes * 1e9 - 4 * 32000 * 2048) / layer))
    config = transformers.LlamaConfig(num_hidden_layers=depth, dtype="bfloat16", **sizes)
    config.architectures = ["LlamaForCausalLM"]
    with torch.device("meta"):
        state = transformers.LlamaForCausalLM(config).to(torch.bfloat16).state_dict()
    generator = torch.Generator().manual_seed(0)

    def fill(name: str, meta: torch.Tensor) -> torch.Tensor:
        return (0.02 * torch.randn(meta.shape, generator=generator)).bfloat16()

    folder.mkdir(parents=True)
    write_safetensors(folder, Changed(state, fill), largest_file=10**9)
    config.save_pretrained(folder)
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def copy_files(source: Path, target: Path) -> float:
    """Copies the weights and forces them to disk; gives the seconds."""
    target.mkdir()
    began = time.perf_counter()
    for file in sorted(source.glob("*.safetensors")):
        shutil.copyfile(file, target / file.name)
        handle = os.open(target / file.name, os.O_RDWR)
        os.fsync(handle)
        os.close(handle)
    return time.perf_counter() - began


def processor() -> str:
    """The processor's name, where the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gigabytes", type=float, default=2.5)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--work", type=Path)
    arguments = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    targets = {"llama -> tessera": {}, "llama -> native, 1 rank": {"mp": 1}, "llama -> native, 4": {"mp": 4}}
    copied, seconds = [], {name: ([], []) for name in targets}
    with tempfile.TemporaryDirectory(dir=arguments.work) as scratch:
        work = Path(scratch)
        size = write_llama(work / "llama", arguments.gigabytes)
        os.sync()
        for _ in range(arguments.rounds):
            for name, options in targets.items():
                copied.append(copy_files(work / "llama", work / "copy"))
                shutil.rmtree(work / "copy")
                began = time.perf_counter()
                done = convert(work / "llama", work / "out", verify="sample", max_shard_size=10**9, **options)
                seconds[name][0].append(done.report.seconds["writing"])
                seconds[name][1].append(time.perf_counter() - began)
                shutil.rmtree(work / "out")
    copy = statistics.median(copied)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    print(f"{size / 1e9:.2f} GB in bf16; {processor()}, {cores} cores; {datetime.date.today()}")
    print(f"median of {arguments.rounds} rounds; copies took {min(copied):.1f} to {max(copied):.1f} s\n")
    print("| | written, s | against copying | verified, s | against copying |\n|---|---|---|---|---|")
    print(f"| copyfile and fsync | {copy:.1f} | 1.00 | | |")
    for name, (written, verified) in seconds.items():
        one, both = statistics.median(written), statistics.median(verified)
        print(f"| {name} | {one:.1f} | {one / copy:.2f} | {both:.1f} | {both / copy:.2f} |")


if __name__ == "__main__":
    main()
