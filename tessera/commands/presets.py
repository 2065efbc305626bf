"""`tessera presets`: what models there are, and what recipes train them."""

from dataclasses import replace

import typer


def presets() -> None:
    """List presets and their cost, and training recipes."""
    from tessera.configs.presets import preset_names
    from tessera.configs.recipes import recipe_names
    from tessera.modeling.accounting import count_costs
    from tessera.modeling.configuration_tessera import TesseraConfig
    from tessera.training.pretrain_arguments import gather_arguments
    from tessera.training.scaling import scale_arguments

    rows = [("preset", "parameters", "active", "embedding", "FLOPs/token", "cache B/token", "context")]
    for name in preset_names():
        config = TesseraConfig.from_preset(name)
        costs = count_costs(config)
        numbers = (costs.parameters, costs.active, costs.embedding, costs.training_flops)
        context = str(config.max_position_embeddings)
        rows.append((name, *map(_short, numbers), f"{costs.cache_bytes:,}", context))
    _print_table(rows)
    typer.echo(
        "\nFLOPs/token: forward and backward at the full context. cache B/token: bf16, over all layers.\n"
        "Any other depth by the same rule: nanochat-d16, or TesseraConfig.from_preset(name, depth=16).\n"
    )
    rows = [("recipe", "preset", "optimizer", "tokens/step", "window", "length")]
    for name in recipe_names():
        args = gather_arguments({"data_file": ""}, name)
        args = replace(args, optimizer=args.optimizer or "muon")
        args = scale_arguments(
            args, TesseraConfig.from_preset(args.config, depth=args.depth), args.sequence_length
        )
        batch = args.batch_size * args.sequence_length
        tokens = args.tokens or (args.steps or 0) * batch
        length = f"{_short(tokens)} tokens" if args.minutes is None else f"{args.minutes:g} minutes"
        rows.append((name, args.config, args.optimizer, _short(batch), str(args.sequence_length), length))
    _print_table(rows)
    typer.echo(
        "\nTrain one: tessera pretrain --recipe llama-100m --data DATA; any flag lies over the recipe."
    )


def _print_table(rows: list[tuple[str, ...]]) -> None:
    """The first column to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for name, *cells in rows:
        numbers = "  ".join(cell.rjust(width) for cell, width in zip(cells, widths[1:], strict=True))
        typer.echo(f"{name.ljust(widths[0])}  {numbers}")


def _short(number: int) -> str:
    for unit, size in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:.3g}{unit}"
    return str(number)
