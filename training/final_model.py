"""The end of a run: `final/`, a complete Hugging Face directory, the weights alone, curves and sample.

What belongs here: files that are written once, after the last step.
"""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

from accelerate import Accelerator
from torch import nn
from transformers import PreTrainedTokenizerBase

from .inputs import TOKENIZER_META
from .parallel import save_whole
from .records.curves import draw_course, draw_curve, read_metrics
from .records.run_log import METRICS_FILE


def write_final(
    folder: Path,
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    tokenizer_meta: Path | None,
    weights_file: Path | None,
    accelerator: Accelerator,
) -> Path:
    """Writes the model aside, and renames it; all processes call it.

    Args:
        folder: of the run.
        model: unwrapped.
        tokenizer: that the model reads with.
        tokenizer_meta: notes on the tokenizer, to be copied beside it.
        weights_file: gets the weights alone, for pipelines that look for one file.
        accelerator: of the run.

    Returns:
        `final/` in the run's folder.
    """
    final, aside = folder / "final", folder / ".final.partial"
    if accelerator.is_main_process:
        shutil.rmtree(aside, ignore_errors=True)
    save_whole(model, aside, accelerator.is_main_process)
    if accelerator.is_main_process:
        tokenizer.save_pretrained(aside)
        if tokenizer_meta:
            shutil.copyfile(tokenizer_meta, aside / TOKENIZER_META)
        shutil.rmtree(final, ignore_errors=True)
        aside.rename(final)
        if weights_file:
            partial = weights_file.with_suffix(".partial")
            shutil.copyfile(final / "model.safetensors", partial)
            os.replace(partial, weights_file)
    accelerator.wait_for_everyone()
    return final


def draw_curves(folder: Path, title: str, say: Callable[[str], None]) -> None:
    """Draws what the log of a run has; one process calls it."""
    records, curve = read_metrics(folder / METRICS_FILE), folder / "loss.png"
    if draw_curve(records, curve, title):
        draw_course(records, folder / "course.png", title)
        say(f"loss curve: {curve}")
    else:
        say("loss curve: not drawn, matplotlib is not installed (extra 'train')")
