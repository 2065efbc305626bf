"""The same model as Llama, and as native shards for two ranks. After finetune_chat.py.

    python examples/convert_formats.py

The same on the command line: `tessera convert DIR TARGET --to llama`, `tessera convert DIR TARGET 0 2`.
"""

from finetune_chat import CHAT, FOLDER
from transformers import AutoModelForCausalLM

from tessera.conversion.convert import convert


def main() -> None:
    """Exports twice; each is kept only if its logits are those of the model."""
    llama = convert(CHAT, FOLDER / "llama", to="llama")
    print(f"Llama: logits differ by at most {llama.difference.largest:.2g}")
    print(type(AutoModelForCausalLM.from_pretrained(FOLDER / "llama")).__name__)
    convert(CHAT, FOLDER / "native", mp=2)
    print(*sorted(path.name for path in (FOLDER / "native").iterdir()))


if __name__ == "__main__":
    main()
