"""How good is it: bits per byte and perplexity of held-out text. After pretrain_small.py.

    python examples/score_model.py

The same on the command line: `tessera eval --model DIR --data DIR --metrics bpb,perplexity`.
"""

from prepare_data import TOKENS
from pretrain_small import BASE

from tessera.evaluation.report import EvaluationArguments, evaluate, format_table


def main() -> None:
    """Scores the base model."""
    report = evaluate(EvaluationArguments(model=str(BASE), data=str(TOKENS), metrics=("bpb", "perplexity")))
    print(format_table(report))


if __name__ == "__main__":
    main()
