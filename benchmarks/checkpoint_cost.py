"""What a checkpoint costs training: written beside it, and waited for.

    python benchmarks/checkpoint_cost.py --preset nanochat-d12 --steps 20 --folder DIR

A model trains on random tokens, with a checkpoint half-way. Printed are seconds that the loop stood still for
it, seconds that it took to be written, and by how much the steps around it were slower than the others. The
weights that were written are compared with those at the moment of the snapshot. What belongs here: the cost
of `CheckpointWriter` on a device; that its checkpoints are whole is tested.
"""

import argparse
import shutil
import time
from pathlib import Path

import torch
from accelerate import Accelerator
from safetensors.torch import load_file

from tessera import TesseraConfig, TesseraForCausalLM
from tessera.training.checkpoints.policy import CheckpointPolicy
from tessera.training.checkpoints.writer import CheckpointWriter
from tessera.training.optimizers import build_optimizer


def measure(args: argparse.Namespace, background: bool) -> dict[str, float]:
    """Trains with two checkpoints, of which the first warms the memory of snapshots up."""
    accelerator = Accelerator(cpu=not torch.cuda.is_available())
    device = accelerator.device
    torch.manual_seed(0)
    model = TesseraForCausalLM(TesseraConfig.from_preset(args.preset)).to(device).train()
    optimizer = build_optimizer(model)
    folder = Path(args.folder) / ("beside" if background else "waited")
    shutil.rmtree(folder, ignore_errors=True)
    ids = torch.randint(0, model.config.vocab_size, (args.batch_size, args.length), device=device)
    seconds = []
    with CheckpointWriter(folder, accelerator, CheckpointPolicy(), background) as writer:
        for step in range(2 * args.steps):
            started = time.perf_counter()
            with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                loss = model(ids, labels=ids, use_cache=False).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            if step in (1, args.steps):
                writer.wait()
                expected = {name: t.detach().clone() for name, t in model.state_dict().items()}
                writer.save(step, model, optimizer, {})
            if device.type == "cuda":
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - started)
        writer.finish()
    saved = {}
    for file in (folder / f"step-{args.steps:06d}").glob("model*.safetensors"):
        saved |= load_file(file)
    same = all(torch.equal(tensor, expected[name].cpu()) for name, tensor in saved.items())
    size = sum(file.stat().st_size for file in (folder / f"step-{args.steps:06d}").iterdir())
    shutil.rmtree(folder)
    usual = sorted(seconds[args.steps // 2 : args.steps])[args.steps // 4]
    return {
        "GB": size / 1e9,
        "seconds a step": usual,
        "stood still": writer.cost,
        "seconds to write": writer.writing,
        "slower in all": sum(seconds[args.steps :]) - args.steps * usual,
        "same weights": same,
    }


def main() -> None:
    """Prints both ways."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", default="llama-tiny")
    parser.add_argument("--steps", type=int, default=20, help="between the checkpoints")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--folder", default="runs/checkpoint-cost")
    args = parser.parse_args()
    for background in (True, False):
        values = measure(args, background)
        shown = ", ".join(f"{k} {v:.3f}" if isinstance(v, float) else f"{k} {v}" for k, v in values.items())
        print(f"{'beside training' if background else 'waited for'}: {shown}", flush=True)


if __name__ == "__main__":
    main()
