"""Tokens to a base model, in a minute on a CPU. After prepare_data.py.

    python examples/pretrain_small.py

The same on the command line: `tessera pretrain --config llama-tiny --data DIR --minutes 1 --batch-size 8
--sequence-length 256 --save-path DIR`.
On several GPUs: `accelerate launch -m tessera.training.pretrain` with the same flags.
"""

from prepare_data import FOLDER, TOKENS

from tessera.training.pretrain import pretrain
from tessera.training.pretrain_arguments import PretrainArguments

BASE = FOLDER / "base"


def main() -> None:
    """Trains a Llama of half a million parameters on the stories."""
    args = PretrainArguments(
        config="llama-tiny",
        data_file=str(TOKENS),
        save_path=str(BASE),
        minutes=1,
        batch_size=8,
        sequence_length=256,
    )
    result = pretrain(args)
    print(f"bits per byte: {result.before.bits_per_byte:.2f} -> {result.after.bits_per_byte:.2f}")
    print(result.sample)


if __name__ == "__main__":
    main()
