"""Pages are whole, escape everything, load nothing, and say what the folders hold."""

import json
import math
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pytest

from lora_dpo.cli import main
from lora_dpo.errors import AdapterError, OutputError
from lora_dpo.report import evaluation_page, report_of, svg, write_report
from lora_dpo.report.compare import differences
from lora_dpo.report.stored import read_run

ROOT = Path(__file__).parent.parent
EVIL = "</td><script>alert(1)</script><img src=x onerror=alert(2)>\"'&"


def interval(value, low, high):
    return {"value": value, "low": low, "high": high, "n": 53}


def evaluation(text=EVIL):
    part = {
        "tokens": interval(37.5, 30, 45),
        "finished": interval(0.9, 0.8, 0.95),
        "repetition": interval(0.1, 0.05, 0.15),
        "refusals": interval(0.02, 0.0, 0.1),
    }
    return {
        "format": 1,
        "adapter": text,
        "base": text,
        "against": "base",
        "data": [text],
        "beta": 0.1,
        "called": "better",
        "verdict": f"Better than base: {text}",
        "numbers": {
            "accuracy": interval(0.95, 0.86, 0.98),
            "win-rate": interval(0.8, 0.67, 0.88),
            "win-rate-lc": interval(0.6, 0.4, 0.8),
            "margin": interval(1.2, None, None),
            "length": interval(37.5, 30, 45),
        },
        "pairs": {"pairs": 61, "log_ratios": {"chosen": [0.5, 1.5, 2.5], "rejected": [-9.0, -8.0, -1.0]}},
        "answers": {"adapter": part, "base": {**part, "tokens": interval(109, 90, 120)}},
        "contest": {"judge": text, "wins": 40, "ties": 5, "losses": 8, "contradicted": 1, "unjudged": 0},
        "text": {"tokens": 900, "base": 20.1, "adapter": 20.9},
        "rows": [{"prompt": text, "against": text, "adapter": text}],
        "seconds": 12.5,
        "cost": text,
    }


@pytest.fixture
def run(tiny_adapter, tmp_path):
    """An adapter folder with everything that training writes, and hostile text wherever there is text."""

    def make(name="mine", beta=0.1):
        folder = tmp_path / name
        shutil.copytree(tiny_adapter, folder)
        recipe = {"model": {"name": EVIL}, "data": {"train": "a.jsonl"}, "trainer": {"beta": beta}, "output": name}
        (folder / "recipe.yaml").write_text(json.dumps(recipe))
        rows = [
            {"step": step, "loss": 0.7 / step, "rewards/margins": 0.1 * step, "rewards/accuracies": 1.0,
             "rewards/chosen": 0.01 * step, "rewards/rejected": -0.05 * step}
            for step in range(1, 9)
        ]  # fmt: skip
        rows += [{"step": step, "health/answer_tokens": 30.0, "health/kl": 0.1, "answers": [EVIL]} for step in (4, 8)]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        answer = {"text": EVIL, "tokens": 9, "finished": True}
        alarm = {"name": "KL budget", "step": 8, "seen": EVIL, "cause": EVIL, "advice": EVIL, "severe": True}
        finding = {"check": "x", "severity": "error", "title": EVIL, "count": 2, "meaning": EVIL, "advice": EVIL}
        measured = {
            "format": 1,
            "answers": [{"prompt": EVIL, "before": answer, "after": answer}],
            "log_ratios": {"chosen": [0.1, 0.2], "rejected": [-1.0, -2.0]},
            "findings": [finding],
            "health": {"steps": 8, "kept": 4, "sentence": f"Stopped: {EVIL}", "alarms": [alarm]},
            "seconds": {"training": 3.0},
            "total_seconds": 9.0,
            "memory": {"process": 2**30},
        }
        (folder / "measured.json").write_text(json.dumps(measured))
        return folder

    return make


class Checker(HTMLParser):
    """Collects what a page could run or load, and whether its tags are closed."""

    def __init__(self):
        super().__init__()
        self.open, self.loads, self.tags = [], [], set()

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        self.loads += [(tag, name) for name, value in attributes if name in ("src", "srcset") or name.startswith("on")]
        self.loads += [(tag, value) for name, value in attributes if name == "href" and value != "data:,"]
        if tag not in ("meta", "link"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def check(text):
    checker = Checker()
    checker.feed(text)
    assert checker.open == []
    assert checker.loads == []
    assert not checker.tags & {"script", "img", "iframe", "object", "embed", "form", "base"}
    assert "default-src 'none'" in text
    assert "@import" not in text
    assert "url(" not in text
    return text


def test_a_runs_page_escapes_everything(run):
    text = check(report_of([run()]))
    assert text.count("&lt;script&gt;") >= 10


def test_an_evaluations_page_escapes_everything():
    text = check(evaluation_page(evaluation()))
    assert text.count("&lt;script&gt;") >= 6
    assert "length taken out the win is no longer certain" in text


def test_a_comparison_escapes_everything_and_shows_what_differs(run, tmp_path):
    runs = [run("one", beta=0.1), run("two", beta=0.5)]
    folder = tmp_path / "evaluated"
    folder.mkdir()
    (folder / "eval.json").write_text(json.dumps(evaluation()))
    text = check(report_of([*runs, folder]))
    assert differences([read_run(one) for one in runs]) == [("trainer.beta", "0.1", "0.5")]
    assert "trainer.beta" in text
    assert text.count("<polyline") >= 10  # two runs in each of five plots


def test_the_words_of_a_run(run):
    text = report_of([run()])
    assert "Stopped: " in text
    assert "Time and memory" in text
    assert "1.00 GB" in text


def test_the_shipped_adapter_has_a_page():
    text = check(report_of([ROOT / "adapters" / "quickstart"]))
    assert "95%" in text
    assert "reward accuracy" in text


def test_report_writes_a_free_name_and_never_over_a_file(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = run()
    first, second = write_report([folder]), write_report([folder])
    assert (str(first), str(second)) == ("reports/mine.html", "reports/mine-2.html")
    assert write_report([folder, folder]).name == "comparison.html"
    with pytest.raises(OutputError, match="already exists"):
        write_report([folder], first)


def test_the_command(run, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["report", str(run()), "--output", "page.html"]) == 0
    assert "page.html" in capsys.readouterr().out
    assert Path("page.html").read_text(encoding="utf-8").startswith("<!doctype html>")


@pytest.mark.parametrize("name", ["nowhere", "."])
def test_what_is_no_run_is_refused_in_one_line(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["report", name]) == 1
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize("content", ["{", "[]", '{"format": 2}'])
def test_a_broken_evaluation_is_named(content, tmp_path):
    (tmp_path / "eval.json").write_text(content)
    with pytest.raises(AdapterError, match=r"eval\.json"):
        report_of([tmp_path])


# --- plots ----------------------------------------------------------------------------------------


def drawing(figure):
    return ElementTree.fromstring(re.search(r"<svg.*</svg>", figure)[0])


def test_lines_break_at_nan_and_stay_inside():
    figure = svg.lines([svg.Series("a", [1, 2, 3, 4, 5], [0.0, 1.0, math.nan, 3.0, 4.0])], title="t")
    lines = list(drawing(figure).iter("polyline"))
    assert len(lines) == 2
    places = [tuple(map(float, place.split(","))) for line in lines for place in line.get("points").split()]
    assert all(0 <= x <= svg.WIDTH and 0 <= y <= svg.HEIGHT for x, y in places)
    ys = [y for _, y in places]
    assert ys == sorted(ys, reverse=True)  # upward is up


@pytest.mark.parametrize("ys", [[], [math.nan, math.inf]])
def test_nothing_to_draw_is_no_figure(ys):
    assert svg.lines([svg.Series("a", list(range(len(ys))), ys)], title="t") == ""
    assert svg.histogram([("a", ys)], title="t", unit="x") == ""


@pytest.mark.parametrize("value", [0.0, -3.5, 1e9, 1e-9])
def test_a_single_value_can_be_drawn(value):
    drawing(svg.lines([svg.Series("a", [1], [value])], title="t"))
    drawing(svg.histogram([("a", [value])], title="t", unit="x"))
    drawing(svg.intervals([("a", value, value, value)], title="t"))


def test_a_histogram_counts_every_value_once():
    figure = svg.histogram([("a", [0.0, 0.1, 9.9, 10.0, 10.0])], title="t", unit="x", bins=10)
    bars = [float(one.get("height")) for one in drawing(figure).iter("rect")]
    assert len(bars) == 2
    assert max(bars) / min(bars) == pytest.approx(3 / 2, rel=0.01)


# --- a real browser -------------------------------------------------------------------------------

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium here: apt-get install chromium")
def test_a_page_opens_in_a_browser_without_errors_or_requests(run, tmp_path):
    playwright = pytest.importorskip("playwright.sync_api", reason="pip install playwright")
    pages = {"run.html": report_of([run()]), "eval.html": evaluation_page(evaluation())}
    pages["compare.html"] = report_of([run("one", beta=0.1), run("two", beta=0.5)])
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        for name, text in pages.items():
            (tmp_path / name).write_text(text, encoding="utf-8")
            page = browser.new_page(viewport={"width": 1280, "height": 800})
            errors, requests = [], []
            page.on("console", lambda message, errors=errors: errors.append(message.text))
            page.on("pageerror", lambda error, errors=errors: errors.append(str(error)))
            page.on("dialog", lambda dialog, errors=errors: (errors.append("a script ran"), dialog.dismiss()))
            page.on("request", lambda request, requests=requests: requests.append(request.url))
            page.goto((tmp_path / name).as_uri())
            assert errors == []
            assert [url for url in requests if not url.startswith(("file:", "data:"))] == []
            assert page.locator("figure svg").count() >= 2
            for width in (1280, 390):
                page.set_viewport_size({"width": width, "height": 800})
                wide = page.evaluate("document.documentElement.scrollWidth")
                assert wide <= width, f"{name} is wider than a window of {width}"
            page.close()
        browser.close()
