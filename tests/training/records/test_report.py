"""The page of a run: what it says, of runs in every state, and that it stands alone."""

import errno
import json
import os
import re
import signal
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pytest
from helpers.runs import tiny_run

from tessera.training.pretrain import Run
from tessera.training.records.charts import Line, line_chart
from tessera.training.records.curves import draw_course
from tessera.training.records.report import write_report
from tessera.training.records.run_log import RunLog

EVIL = "<script>alert('1')</script>&amp; \u2028\x00"


class Reader(HTMLParser):
    """Tags that were opened and not closed, all attributes, and the text."""

    def __init__(self, page: str):
        super().__init__()
        self.open, self.text, self.tags, self.values = [], [], [], []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.values += [(tag, *pair) for pair in attrs]
        if tag not in ("meta", "line", "circle", "polyline", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.values += [(tag, *pair) for pair in attrs]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def write_lines(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def test_a_finished_run_is_on_its_page(tmp_path):
    result = tiny_run(tmp_path, evaluations=2, log_steps=1, checkpoint_steps=3, sample_prompt="the quick")
    page = (result.folder / "report.html").read_text(encoding="utf-8")
    read = Reader(page)
    text = " ".join(read.text)
    assert not read.open
    assert "finished" in text and f"{result.after.bits_per_byte:.4f}" in text
    assert f"{result.before.nats:.4f} before, {result.after.nats:.4f} now" in text
    assert f"{result.tokens:,}" in text and result.sample in text
    assert "checkpoint: seconds" in text and "torch" in text and "batch_size" in text
    assert f"tessera serve --model {result.folder}" in text
    # Nothing is loaded from anywhere, and nothing runs.
    assert not re.search(r"(?:src|href)=|url\(|https?://(?!www\.w3\.org)|@import", page)
    assert "script" not in read.tags
    assert page.count("<svg") >= 5
    for svg in re.findall(r"<svg.*?</svg>", page, re.S):
        ElementTree.fromstring(svg)
    samples = [json.loads(line) for line in (result.folder / "samples.jsonl").read_text().splitlines()]
    assert [one["step"] for one in samples] == [2, 4]
    assert all(one["text"].startswith("the quick") for one in samples)
    assert (result.folder / "course.png").stat().st_size > 5_000


def test_what_somebody_wrote_stays_text(tmp_path):
    folder = tmp_path / "<b>run"
    folder.mkdir()
    (folder / "recipe.yaml").write_text(
        json.dumps({"config": "x", "sample_prompt": EVIL[:-1], EVIL[:-2]: [EVIL[:-1]]})
    )
    (folder / "sample.txt").write_text(EVIL)
    (folder / "config.json").write_text(json.dumps({"hidden_size": EVIL, "num_hidden_layers": [EVIL]}))
    write_lines(folder / "samples.jsonl", [{"step": 1, "text": EVIL}])
    write_lines(
        folder / "events.jsonl",
        [
            {"time": EVIL, "event": EVIL, "step": EVIL, EVIL: EVIL},
            {"event": "start", "step": 0, "model": {EVIL: EVIL}},
        ],
    )
    page = write_report(folder).read_text(encoding="utf-8")
    assert "<script" not in page and "<b>run" not in page
    assert not Reader(page).open
    assert "alert" in page


@pytest.mark.parametrize(
    "events,state",
    [
        ([], "not started"),
        (["start"], "running, or killed"),
        (["start", "checkpoint", "stop"], "stopped"),
        (["start", "stop", "resume", "checkpoint"], "running, or killed"),
        (["start", "stop", "resume", "end"], "finished"),
        (["start", "skip", "failure"], "failed"),
    ],
)
def test_the_state_of_a_run_is_that_of_its_last_event(events, state, tmp_path):
    if events:
        write_lines(tmp_path / "events.jsonl", [{"event": kind, "step": 1, "time": ""} for kind in events])
    page = write_report(tmp_path).read_text(encoding="utf-8")
    assert re.search(r'class="chip \w+">([^<]*)<', page)[1] == state


def test_a_page_is_written_of_damaged_files(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "tokens": 5, "loss": 1.5}\n{"step": 2, "tok')
    (tmp_path / "recipe.yaml").write_text("a: [1")
    (tmp_path / "config.json").write_text("[]")
    page = write_report(tmp_path).read_text(encoding="utf-8")
    assert "1.5000" in page and not Reader(page).open


def test_each_corpus_of_a_mixture_has_its_result(tmp_path):
    line = '{"step": 1, "tokens": 5, "val_bits_per_byte": 1.5, "val_bits_per_byte/b <i>": 1.25}\n'
    (tmp_path / "metrics.jsonl").write_text(line)
    page = write_report(tmp_path).read_text(encoding="utf-8")
    assert "<th>bits per byte of b &lt;i&gt;</th><td>1.2500 now</td>" in page


def test_a_stopped_and_resumed_run_tells_of_both(tmp_path, monkeypatch):
    given = {"log_steps": 1, "evaluations": 1}
    whole = Run._optimizer_step

    def interrupted_step(self, progress):
        if self.step == 1:
            os.kill(os.getpid(), signal.SIGINT)
        return whole(self, progress)

    monkeypatch.setattr(Run, "_optimizer_step", interrupted_step)
    with pytest.raises(KeyboardInterrupt):
        tiny_run(tmp_path, **given)
    page = (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    assert ">stopped<" in page and "pretrain --resume" in page
    monkeypatch.setattr(Run, "_optimizer_step", whole)
    result = tiny_run(tmp_path, resume=True, **given)
    page = (result.folder / "report.html").read_text(encoding="utf-8")
    assert ">finished<" in page and "times resumed" in page
    events = [json.loads(line) for line in (result.folder / "events.jsonl").read_text().splitlines()]
    kinds = [event["event"] for event in events if event["event"] != "checkpoint"]
    assert kinds == ["start", "stop", "resume", "end"]


def test_a_run_that_fails_says_so_on_its_page(tmp_path):
    given = {"optimizer": "adamw", "learning_rate": 1e30, "clip": 0, "warmup": 0, "steps": 20}
    with pytest.raises(FloatingPointError) as raised:
        tiny_run(tmp_path, **given)
    page = (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    text = " ".join(Reader(page).text)
    assert "failed" in text and "steps skipped" in text
    assert str(raised.value) in text


def test_a_log_that_cannot_be_written_costs_a_sentence(tmp_path, capsys, monkeypatch):
    whole = Path.open

    def full(self, mode="r", *given, **more):
        if self.suffix == ".jsonl" and "a" in mode:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self))
        return whole(self, mode, *given, **more)

    monkeypatch.setattr(Path, "open", full)
    log = RunLog(tmp_path, say=print)
    for step in (1, 2):
        log.record(step, 10, 1.0, loss=2.0)
        log.event("checkpoint", step)
    said = capsys.readouterr().out
    assert said.count("training goes on") == 1 and "No space left on device" in said


def test_metrics_have_rates_norms_and_speed(tmp_path):
    result = tiny_run(tmp_path, log_steps=2, peak_tflops=0.001)
    lines = [json.loads(line) for line in (result.folder / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "loss" in line]
    assert [line["step"] for line in steps] == [1, 3, 5, 6]
    for line in steps:
        assert line["learning_rate"] == line["learning_rate/matrices"]
        assert line["grad_norm/matrices"] > 0 and line["update_ratio/head"] >= 0
        assert 0 < line["mfu"] and line["tokens_per_second"] > 0
        # All gradients together, clipped to one, are those of the groups.
        norms = sum(line[key] ** 2 for key in line if key.startswith("grad_norm/")) ** 0.5
        assert norms == pytest.approx(min(line["grad_norm"], 1.0), rel=1e-3)


@pytest.mark.parametrize(
    "points",
    [[(0, 1.0)], [(0, 0.0), (10, 0.0)], [(5, -3.0), (5, 2.0)], [(i, 1 / (i + 1)) for i in range(5000)]],
)
def test_charts_stay_within_their_frame(points):
    svg = ElementTree.fromstring(line_chart([Line("a", points)], "a chart", 300, 200, robust=True))
    polyline = svg.find("polyline").attrib["points"]
    places = [tuple(map(float, pair.split(","))) for pair in polyline.split()]
    assert len(places) <= 401
    assert all(0 <= x <= 300 and 0 <= y <= 200 for x, y in places)
    across = [x for x, _ in places]
    assert across == sorted(across)


def test_there_is_no_picture_of_nothing(tmp_path):
    assert not draw_course([{"step": 1, "tokens": 1, "loss": 2.0}], tmp_path / "course.png", "title")
    assert not (tmp_path / "course.png").exists()
