"""Text to tokens with datatrove's executors: on this machine, or the same stages as jobs of Slurm.

    python examples/prepare_with_datatrove.py corpus/ --output tokens --tasks 8 --workers 4
    python examples/prepare_with_datatrove.py org/name --output tokens --tasks 500 --slurm PARTITION

For corpora that outgrow `tessera data prepare`. `--work` has to be on a file system that all machines share.
The first is under test; the second was never run on a cluster, only built.
"""

import argparse
from pathlib import Path

from datatrove.executor.slurm import SlurmPipelineExecutor

from tessera.data.datatrove_pipeline import Stage, build_stages, run_local
from tessera.data.filters import choose_filters
from tessera.data.mixing import Source


def slurm_executors(stages: list[Stage], work: Path, *, partition: str, time: str) -> SlurmPipelineExecutor:
    """A job array for each stage, each waiting for the one before; running the last one launches them all."""
    last = None
    for stage in stages:
        last = SlurmPipelineExecutor(
            stage.steps,
            tasks=stage.tasks,
            depends=last,
            job_name=f"prepare_{stage.name}",
            partition=partition,
            time=time,
            # The one that clusters holds all pairs of near duplicates; the others a batch of documents.
            mem_per_cpu_gb=16 if stage.name == "cluster" else 4,
            logging_dir=str(Path(work).resolve() / "logs" / stage.name),
        )
    return last


def main() -> None:
    """Reads the arguments and runs or launches the stages."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source", nargs="+", help="files, folders, Hub datasets (org/name)")
    parser.add_argument("--output", required=True)
    parser.add_argument("--work", default="work")
    parser.add_argument("--tokenizer")
    parser.add_argument("--filters", default="fineweb")
    parser.add_argument("--tasks", type=int, default=8)
    parser.add_argument("--workers", type=int, default=2, help="tasks at a time on this machine")
    parser.add_argument("--slurm", metavar="PARTITION", help="launch there instead")
    parser.add_argument("--time", default="10:00:00", help="limit of each job of Slurm")
    args = parser.parse_args()
    stages = build_stages(
        [Source(source) for source in args.source],
        args.work,
        args.output,
        tokenizer=args.tokenizer,
        filters=choose_filters(args.filters),
        tasks=args.tasks,
        explain=5,
    )
    if args.slurm:
        slurm_executors(stages, Path(args.work), partition=args.slurm, time=args.time).run()
    else:
        run_local(stages, args.work, workers=args.workers)


if __name__ == "__main__":
    main()
