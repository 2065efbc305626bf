"""`report.html`: a run on one page that stands alone, made from what is in its directory.

What belongs here: from the files of a run to the page. It shows what the files say and nothing else, so it
can be written at any time, of a run that goes on, was stopped, or was killed.
"""

import html
import json
import math
import shlex
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

import yaml

from ..pretrain_arguments import PretrainArguments
from .charts import Line, line_chart
from .curves import COURSE, read_metrics
from .progress import compact, duration
from .run_log import EVENTS_FILE, METRICS_FILE, SAMPLES_FILE

REPORT_FILE = "report.html"
MOST_EVENTS = 200
MOST_SAMPLES = 20
# What an event is called on the page, and whether it is a bad sign.
ENDS = {"end": "finished", "stop": "stopped", "failure": "failed"}
BAD = ("skip", "rollback", "failure", "out_of_memory")

_STYLE = """
:root{color-scheme:light dark;--ink:#1c2430;--soft:#5d6878;--page:#f6f7f9;--card:#fff;--edge:#dfe3e9;
--a:#8aa4c4;--b:#1f5c99;--bad:#a8322a;--good:#1f7a4d}
@media(prefers-color-scheme:dark){:root{--ink:#e4e9f0;--soft:#98a3b3;--page:#12161c;--card:#1a2029;
--edge:#2c3440;--a:#4d6a8f;--b:#7fb7f0;--bad:#f0867d;--good:#6fcf9c}}
*{box-sizing:border-box}
body{margin:0 auto;max-width:66rem;padding:1.5rem 1rem 4rem;background:var(--page);color:var(--ink);
font:15px/1.5 system-ui,-apple-system,"Segoe UI",sans-serif}
h1{font-size:1.5rem;margin:0;overflow-wrap:anywhere}
h2{font-size:1.05rem;margin:2rem 0 .6rem}
h3{font-size:.85rem;margin:0;color:var(--soft);font-weight:600}
p{margin:.3rem 0}
.soft{color:var(--soft)}
.chip{display:inline-block;border:1px solid;border-radius:1rem;padding:0 .6rem;font-size:.8rem;
vertical-align:.2em}
.chip.good{color:var(--good)}.chip.bad{color:var(--bad)}.chip.soft{color:var(--soft)}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(9.5rem,1fr));gap:.6rem;margin-top:1rem}
.card{background:var(--card);border:1px solid var(--edge);border-radius:.5rem;padding:.7rem .9rem;min-width:0}
.tile b{display:block;font-size:1.3rem;line-height:1.3;font-variant-numeric:tabular-nums;
overflow-wrap:anywhere}
.charts{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(17rem,100%),1fr));gap:.6rem;
margin-top:.6rem}
.columns{columns:24rem 2;column-gap:.6rem}.columns .card{break-inside:avoid;margin-bottom:.6rem}
svg{display:block;width:100%;height:auto;font:12px system-ui,sans-serif}
svg text{fill:var(--soft)}svg .grid{stroke:var(--edge)}
svg polyline{fill:none;stroke-width:1.8;stroke-linejoin:round}
polyline.line-a{stroke:var(--a)}polyline.line-b{stroke:var(--b)}
circle.line-a{fill:var(--a)}circle.line-b{fill:var(--b)}
.key{font-size:.85rem;margin:.2rem 0}.key i{display:inline-block;width:1.2rem;height:3px;border-radius:2px;
margin:0 .4rem 0 0;vertical-align:.25em}.key i.line-a{background:var(--a)}.key i.line-b{background:var(--b)}
.key span{margin-right:1.2rem}
.small-only{display:none}
@media(max-width:40rem){.wide-only{display:none}.small-only{display:block}}
table{border-collapse:collapse;width:100%;font-size:.88rem}
td,th{padding:.25rem .6rem .25rem 0;border-top:1px solid var(--edge);text-align:left;vertical-align:top;
overflow-wrap:anywhere}
tr:first-child td,tr:first-child th{border-top:0}
th{font-weight:400;color:var(--soft);width:40%}.events th{width:auto}
td.bad{color:var(--bad)}
pre{margin:.4rem 0 0;white-space:pre-wrap;overflow-wrap:anywhere;
font:13px/1.5 ui-monospace,Menlo,Consolas,monospace}
details{margin-top:.5rem}summary{cursor:pointer;color:var(--soft)}
"""


def write_report(folder: Path) -> Path:
    """Writes the page of a run, in the place of an earlier one.

    Args:
        folder: run directory. What it lacks is left out of the page.

    Returns:
        The page.
    """
    records, events = _records(folder / METRICS_FILE), _records(folder / EVENTS_FILE)
    recipe, config = _read_recipe(folder), _read_json(folder / "config.json")
    facts = _facts(events)
    sections = [
        _head(folder, recipe, events, facts),
        _tiles(records, facts),
        _charts(records),
        _samples(folder),
        _use(folder),
        '<h2>What was run</h2><div class="columns">'
        + _card("Result", _results(records, events))
        + _card("Model", _model(config, facts.get("model", {})))
        + _card("Data", facts.get("data", {}))
        + _recipe(recipe)
        + _card("Where it ran", facts.get("environment", {}))
        + "</div>",
        _events(events),
    ]
    title = html.escape(f"{folder.absolute().name}: a run of Tessera")
    page = (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{title}</title><style>{_STYLE}</style></head><body>\n"
        + "\n".join(section for section in sections if section)
        + "\n</body></html>\n"
    )
    path = folder / REPORT_FILE
    aside = folder / f".{REPORT_FILE}.partial"
    aside.write_text(page, encoding="utf-8", errors="replace")
    aside.replace(path)
    return path


# ---- what the files say ----


def _records(path: Path) -> list[dict]:
    if not path.is_file():
        return []
    return [record for record in read_metrics(path) if isinstance(record, dict)]


def _read_json(path: Path) -> dict:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return values if isinstance(values, dict) else {}


def _read_recipe(folder: Path) -> dict:
    try:
        values = yaml.safe_load((folder / "recipe.yaml").read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    return values if isinstance(values, dict) else {}


def _facts(events: list[dict]) -> dict[str, dict]:
    """What the last start or resume told of model, data and machine."""
    found = {}
    for event in events:
        found.update({key: value for key, value in event.items() if isinstance(value, dict)})
    return found


def _last(records: list[dict], key: str) -> Any:
    return next((record[key] for record in reversed(records) if key in record), None)


def _values(records: list[dict], key: str) -> list:
    return [record[key] for record in records if key in record]


# ---- parts of the page ----


def _head(folder: Path, recipe: dict, events: list[dict], facts: dict) -> str:
    kinds = [event.get("event") for event in events]
    # A run that was killed says nothing; it looks like one that goes on.
    state = next((kind for kind in reversed(kinds) if kind in (*ENDS, "start", "resume")), None)
    mark = {"end": "good", "stop": "soft", "failure": "bad"}.get(state, "soft")
    chip = ENDS.get(state, "running, or killed" if state else "not started")
    model = facts.get("model", {})
    told = [
        str(recipe.get("config", "")),
        f"{model['parameters']} parameters" if "parameters" in model else "",
        facts.get("environment", {}).get("devices"),
    ]
    when = [event["time"] for event in events if isinstance(event.get("time"), str)]
    times = f"{_day(when[0])} to {_day(when[-1])} UTC" if when else ""
    return (
        f'<h1>{html.escape(folder.absolute().name)} <span class="chip {mark}">{chip}</span></h1>'
        f"<p>{html.escape(' · '.join(str(part) for part in told if part))}</p>"
        f'<p class="soft">{html.escape(times)}</p>'
    )


def _tiles(records: list[dict], facts: dict) -> str:
    bits, losses = _values(records, "val_bits_per_byte"), _values(records, "val_loss")
    tiles = []
    if bits and losses:
        before = f"from {bits[0]:.3f}; " if len(bits) > 1 else ""
        tiles.append(
            ("bits per byte, held out", f"{bits[-1]:.4f}", f"{before}{losses[-1]:.4f} nats per token")
        )
    if (loss := _last(records, "loss")) is not None:
        tiles.append(("training loss", f"{loss:.4f}", "nats per token, smoothed"))
    if records:
        last = records[-1]
        tiles.append(("tokens", compact(last.get("tokens", 0)), f"{last.get('step', 0):,} steps"))
        if seconds := last.get("seconds"):
            mean = f"{compact(last['tokens'] / seconds)} tokens/s on average"
            tiles.append(("time of training", duration(seconds), mean))
    if rate := _last(records, "tokens_per_second"):
        mfu = _last(records, "mfu")
        tiles.append(("tokens/s", compact(rate), f"MFU {100 * mfu:.1f} %" if mfu else "of late"))
    if memory := _last(records, "memory_gib"):
        tiles.append(("GPU memory", f"{memory:.1f} GiB", "the most that was held"))
    cards = "".join(
        f'<div class="card tile"><h3>{html.escape(name)}</h3><b>{html.escape(value)}</b>'
        f'<span class="soft">{html.escape(more)}</span></div>'
        for name, value, more in tiles
    )
    return f'<div class="tiles">{cards}</div>' if cards else ""


def _charts(records: list[dict]) -> str:
    points = {key: _points(records, key) for key in ("loss", "val_loss", *COURSE)}
    lines = [
        Line("training loss", points["loss"], "line-a"),
        Line("validation loss", points["val_loss"], "line-b", marked=True),
    ]
    lines = [line for line in lines if line.points]
    if not lines:
        return ""
    key = "".join(f'<span><i class="{line.style}"></i>{line.name}</span>' for line in lines)
    label = "loss in nats per token over tokens"
    large = line_chart(lines, label, 980, 330, robust=True)
    small = line_chart(lines, label, 340, 240, robust=True)
    rest = "".join(
        f'<div class="card"><h3>{html.escape(name)}</h3>'
        f"{line_chart([Line(name, points[measure], 'line-b')], f'{name} over tokens')}</div>"
        for measure, name in COURSE.items()
        if points[measure]
    )
    return (
        f'<h2>Loss in nats per token, over tokens</h2><div class="card"><p class="key">{key}</p>'
        f'<div class="wide-only">{large}</div><div class="small-only">{small}</div></div>'
        + (f'<div class="charts">{rest}</div>' if rest else "")
    )


def _points(records: list[dict], key: str) -> list[tuple[float, float]]:
    return [
        (record["tokens"], record[key])
        for record in records
        if isinstance(record.get(key), int | float)
        and isinstance(record.get("tokens"), int)
        and math.isfinite(record[key])
    ]


def _samples(folder: Path) -> str:
    final = folder / "sample.txt"
    text = final.read_text(encoding="utf-8", errors="replace") if final.is_file() else ""
    earlier = _records(folder / SAMPLES_FILE)
    if not text and not earlier:
        return ""
    parts = ["<h2>What it writes</h2>"]
    if text:
        parts.append(f'<div class="card"><h3>at the end</h3><pre>{html.escape(text)}</pre></div>')
    if earlier:
        shown = "".join(
            f"<h3>step {int(one.get('step', 0)):,}</h3><pre>{html.escape(str(one.get('text', '')))}</pre>"
            for one in earlier[-MOST_SAMPLES:]
        )
        parts.append(f"<details{'' if text else ' open'}><summary>on the way</summary>{shown}</details>")
    return "".join(parts)


def _use(folder: Path) -> str:
    whole = (folder / "final").is_dir()
    if not whole and not (folder / "checkpoints").is_dir():
        return ""
    run = str(folder)
    python = (
        "import tessera\nfrom transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        f"model = AutoModelForCausalLM.from_pretrained({str(folder / 'final')!r})\n"
        f"tokenizer = AutoTokenizer.from_pretrained({str(folder / 'final')!r})\n"
    )
    shell = "\n".join(
        f"tessera {command}"
        for command in (
            f"generate --ckpt-path {shlex.quote(run)} --interactive",
            f"serve --model {shlex.quote(run)}",
            *([] if whole else [f"pretrain --resume {shlex.quote(run)}"]),
        )
    )
    code = f"<pre>{html.escape(shell)}</pre>" + (f"<pre>{html.escape(python)}</pre>" if whole else "")
    return f'<h2>How to use it</h2><div class="card">{code}</div>'


def _results(records: list[dict], events: list[dict]) -> dict[str, str]:
    rows = {}
    for key, name in (
        ("val_loss", "validation, nats per token"),
        ("val_bits_per_byte", "validation, bits per byte"),
    ):
        if found := _values(records, key):
            rows[name] = f"{found[0]:.4f} before, {found[-1]:.4f} now; best {min(found):.4f}"
    of_each = "val_bits_per_byte/"
    for key in sorted({key for record in records for key in record if key.startswith(of_each)}):
        rows[f"bits per byte of {key.removeprefix(of_each)}"] = f"{_last(records, key):.4f} now"
    if not records:
        return rows
    last = records[-1]
    rows["steps"] = f"{last.get('step', 0):,}"
    rows["tokens"] = f"{last.get('tokens', 0):,}"
    if seconds := last.get("seconds"):
        rows["time of training"] = duration(seconds)
        rows["tokens/s on average"] = f"{last['tokens'] / seconds:,.0f}"
    if mfu := _values(records, "mfu"):
        rows["MFU, mean of the records"] = f"{100 * sum(mfu) / len(mfu):.1f} %"
    if memory := _values(records, "memory_gib"):
        rows["most GPU memory"] = f"{max(memory):.1f} GiB"
    saved = [event for event in events if event.get("event") == "checkpoint"]
    lost = sum(event.get("seconds", 0) for event in saved)
    if saved:
        rows["checkpoints"] = f"{len(saved):,}, for which training waited {lost:.1f} s"
    for kind, name in (("skip", "steps skipped"), ("rollback", "rollbacks"), ("resume", "times resumed")):
        if count := sum(event.get("event") == kind for event in events):
            rows[name] = f"{count:,}"
    return rows


def _model(config: dict, told: dict) -> dict[str, str]:
    names = {
        "num_hidden_layers": "layers",
        "hidden_size": "width",
        "num_attention_heads": "heads",
        "num_key_value_heads": "key and value heads",
        "intermediate_size": "feed-forward width",
        "n_routed_experts": "routed experts",
        "num_experts_per_tok": "experts a token",
        "attention_type": "attention",
        "vocab_size": "vocabulary",
        "max_position_embeddings": "context",
    }
    return told | {name: _shown(config[key]) for key, name in names.items() if config.get(key)}


def _recipe(recipe: dict) -> str:
    """What was asked for, and behind it what was not."""
    usual = {field.name: field.default for field in fields(PretrainArguments)}
    given, rest = {}, {}
    for key, value in recipe.items():
        if value is not None:
            (rest if usual.get(key, MISSING) == value else given)[key] = _shown(value)
    folded = f"<details><summary>as always</summary><table>{_rows(rest)}</table></details>" if rest else ""
    return _card("Recipe", given, folded)


def _events(events: list[dict]) -> str:
    rows = "".join(
        f"<tr><td>{html.escape(_day(str(event.get('time', ''))))}</td>"
        f"<td>{html.escape(_shown(event.get('step', '')))}</td>"
        f"<td{' class=bad' if event.get('event') in BAD else ''}>{html.escape(_told(event))}</td></tr>"
        for event in events[-MOST_EVENTS:]
        if event.get("event") != "track"
    )
    if not rows:
        return ""
    opened = " open" if len(events) <= 12 else ""
    return (
        f'<h2>What happened</h2><details{opened}><summary>{len(events):,} events</summary><div class="card">'
        f'<table class="events"><tr><th>UTC</th><th>step</th><th></th></tr>{rows}</table></div></details>'
    )


def _told(event: dict) -> str:
    rest = {
        key: value
        for key, value in event.items()
        if key not in ("time", "event", "step") and not isinstance(value, dict)
    }
    text = rest.pop("text", "")
    said = [str(text)] if text else []
    said += [
        f"{key} {value:.3g}" if isinstance(value, float) else f"{key} {value}" for key, value in rest.items()
    ]
    name = str(event.get("event", "")).replace("_", " ")
    return f"{name}: {', '.join(said)}" if said else name


def _card(title: str, rows: dict[str, Any], more: str = "") -> str:
    if not rows and not more:
        return ""
    return f'<div class="card"><h3>{html.escape(title)}</h3><table>{_rows(rows)}</table>{more}</div>'


def _rows(rows: dict[str, Any]) -> str:
    return "".join(
        f"<tr><th>{html.escape(str(name))}</th><td>{html.escape(str(value))}</td></tr>"
        for name, value in rows.items()
    )


def _shown(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(_shown, value))
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int) and abs(value) >= 10_000:
        return f"{value:,}"
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _day(time: str) -> str:
    return time.replace("T", " ").removesuffix("+00:00")
