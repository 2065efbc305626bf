"""What each of several processes does to train a tiny model for a few steps; started by torchrun.

    engine_ranks.py REPORT FOLDER PARALLEL [NAME=VALUE ...]

The report (JSON, of rank 0) has loss and gradient norm of each step, the micro-batches at the end, what was
said, and whether a forward pass left logits; the whole weights are beside it.
"""

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).parents[1]))

from helpers.runs import REPETITIVE, tiny_arguments, write_config, write_text  # noqa: E402
from tessera.training.parallel import whole_state_dict  # noqa: E402
from tessera.training.pretrain import Run  # noqa: E402

STEPS = 4
# Bytes of both halves of the table, which two processes share.
TEXT = REPETITIVE + "příliš žluťoučký kůň úpěl ďábelské ódy. " * 60


def main(report: str, folder: str, parallel: str, *given: str) -> None:
    torch.set_num_threads(1)
    options = dict(pair.split("=") for pair in given)
    fails_at, fails_on = int(options.pop("fails_at", -1)), int(options.pop("fails_on", -1))
    options = {name: int(value) if value.isdigit() else value for name, value in options.items()}
    options = {"optimizer": "adamw", "learning_rate": 1e-3, "batch_size": 8, **options}
    options["data_file"] = write_text(Path(folder), TEXT)
    if "balance" in options:
        coef = float(options.pop("balance"))
        options["config"] = write_config(Path(folder), options.pop("preset"), router_aux_loss_coef=coef)
    run = Run(tiny_arguments(Path(folder), parallel=parallel, **options))
    said = []
    run.engine.say = said.append
    run.model.train()
    wrote_logits = []
    run.model.register_forward_hook(lambda _, __, output: wrote_logits.append(output.logits is not None))
    losses, norms = [], []
    step, tried = 0, 0
    while step < STEPS:
        if tried == fails_at and run.layout.rank == fails_on:
            fail_once(run.engine.runner)
        tried += 1
        run.outcomes.add(step + 1, run.engine.step(step))
        step += 1
        for outcome in run.outcomes.settled():
            if outcome.no_memory:
                run.outcomes.forget()
                step = outcome.step - 1
                run.engine.halve()
                break
            losses.append(outcome.loss)
            norms.append(outcome.norm)
    in_training = any(wrote_logits)
    state = whole_state_dict(run.model)
    parts = [len(batch["input_ids"]) for batch in run.engine.rows.get(0).batches]
    held = sum(p.to_local().numel() if hasattr(p, "to_local") else p.numel() for p in run.model.parameters())
    run.log.writes = False
    evaluated = run._evaluate(whole=True).nats
    if run.layout.rank == 0:
        found = {"losses": losses, "norms": norms, "parts": parts, "said": said, "held": held, "tried": tried}
        found |= {"evaluated": evaluated, "wrote_logits": in_training}
        Path(report).write_text(json.dumps(found))
        save_file({name: value.clone() for name, value in state.items()}, Path(report).with_suffix(".st"))
    if dist.is_initialized():
        dist.destroy_process_group()


def fail_once(runner) -> None:
    """Memory runs out in the next forward pass, once it has begun."""
    model, whole = runner.model, runner.model.forward

    def forward(*args, **kwargs):
        model.forward = whole
        raise torch.OutOfMemoryError("injected")

    model.forward = forward


if __name__ == "__main__":
    main(*sys.argv[1:])
