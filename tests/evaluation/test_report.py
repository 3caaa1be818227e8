"""Pages are whole, escape everything, load nothing, and say what the folders hold."""

import itertools
import json
import math
import re
import shutil
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pytest

from lora_dpo.adapters.loading import beta_of
from lora_dpo.adapters.stored_run import read_run
from lora_dpo.cli.commands import main
from lora_dpo.config.reading import check_recipe
from lora_dpo.errors import AdapterError, OutputError
from lora_dpo.evaluation.prequential import at_first_sight
from lora_dpo.evaluation.report import parts, svg
from lora_dpo.evaluation.report.several import differences
from lora_dpo.evaluation.report.write import evaluation_page, report_of, write_report
from lora_dpo.events import Progress, Stopped, StopSignal
from lora_dpo.training.run import train

ROOT = Path(__file__).resolve().parents[2]
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
            "reference_seconds": 1.5,
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
    assert re.search(r"of which the reference.{1,8}s log-probabilities</t[dh]>\s*<td>1\.5 s", text)
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


# --- other methods, and runs without an end --------------------------------------------------------


@pytest.fixture
def answers_recipe(recipe_dict, tmp_path, monkeypatch):
    """A run on single answers: forty pairs of which the longer answer is always good, a twin, and votes alone."""
    monkeypatch.chdir(tmp_path)

    def make(method, **changes):
        rows = [{"prompt": f"q{n}", "chosen": f"a much longer answer {n}", "rejected": f"no {n}"} for n in range(40)]
        rows += [rows[0], {"prompt": "v", "completion": "a vote alone", "label": True}]
        Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        return check_recipe(recipe_dict(method=method, data={"train": "rows.jsonl"}, **changes))

    return make


@pytest.mark.parametrize(("method", "rows", "finds"), [("sft", 42, 1), ("kto", 42, 2)])
def test_a_page_of_single_answers_says_what_was_trained_on(method, rows, finds, answers_recipe):
    folder = train(answers_recipe(method), name=method).folder
    text = check(report_of([folder]))
    number = 42 if method == "sft" else 83  # both answers of 41 pairs, and the vote
    assert "None" not in text
    assert f"{number} train answers, " in text
    assert f"rows.jsonl: {number} answers of 42 rows" in text
    assert "left out" not in text
    assert "ld_alpha" not in text
    assert "exact duplicates of an earlier row" in text
    assert ("length alone predicts the preference" in text) is (method == "kto")
    assert len(read_run(folder).measured["findings"]) >= finds


def test_margins_without_a_beta_are_marked_and_are_the_same_in_eval(answers_recipe):
    sft = train(answers_recipe("sft"), name="sft").folder
    dpo = train(answers_recipe("dpo"), name="dpo").folder
    assert (beta_of(sft), beta_of(dpo), read_run(sft).beta) == (1.0, 0.1, 1.0)
    assert "margin (nats: SFT has no β)" in report_of([sft])
    text = check(report_of([sft, dpo]))
    assert "at β 1<" in text
    assert "at β 0.1<" in text
    assert "None" not in text


def test_an_interrupted_run_has_a_page(answers_recipe, capsys):
    stop = StopSignal()

    def stop_after_three(event):
        if isinstance(event, Progress) and event.stage == "training" and event.done == 3:
            stop.requested = True

    with pytest.raises(Stopped):
        train(answers_recipe("dpo", trainer={"max_steps": 6}, output="cut"), on_event=stop_after_three, stop=stop)
    with Path("cut.partial/metrics.jsonl").open("a") as log:
        log.write('{"step": 4, "lo')  # as a kill leaves it
    text = check(report_of([Path("cut.partial")]))
    assert "Not finished: 3 of 6 steps. Continue with: lora-dpo train cut.partial/recipe.yaml --resume" in text
    assert "None" not in text
    assert "Answers on the way" in text
    assert text.count("<svg") >= 4
    assert main(["report", "cut.partial"]) == 0
    assert main(["report", "cut"]) == 1
    assert "An unfinished run is in cut.partial" in capsys.readouterr().err
    check(report_of([Path("cut.partial"), Path("cut.partial")]))


def test_an_untrained_adapter_is_called_that_and_nothing_else(run):
    folder = run()
    measured = json.loads((folder / "measured.json").read_text())
    measured["health"] |= {"kept": 0, "sentence": "Stopped; the adapter is the untrained one."}
    (folder / "measured.json").write_text(json.dumps(measured))
    passport = json.loads((folder / "passport.json").read_text())
    pairs = {"pairs": 20, "accuracy": 0.5, "margin": 0.0, "chosen_logratio": 0.0, "rejected_logratio": 0.0}
    passport["metrics"] = {"before": {"pairs": pairs}, "after": {"pairs": pairs}}
    (folder / "passport.json").write_text(json.dumps(passport))
    rows = [{"step": s, "loss": 0.1, "first_sight/right": 8.0, "first_sight/prompts": 8.0} for s in range(1, 9)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    text = report_of([folder])
    assert "untrained one" in text
    assert "likelier" not in text
    assert at_first_sight(folder) is None
    measured["health"] |= {"kept": 4}
    (folder / "measured.json").write_text(json.dumps(measured))
    assert "the chosen answers are as likely as before" in report_of([folder])
    assert at_first_sight(folder).n == 32


# --- side by side ---------------------------------------------------------------------------------


def stored_evaluation(folder, **changes):
    folder.mkdir(parents=True)
    (folder / "eval.json").write_text(json.dumps({**evaluation("x"), **changes}))
    return folder


def test_a_setting_that_one_recipe_leaves_out_has_its_value(run):
    runs = [read_run(run(name)) for name in ("one", "two")]
    settings = {"trainer": {"learning_rate": 2e-4, "beta": 0.3}}
    found = differences([replace(runs[0], recipe=settings), replace(runs[1], recipe={"trainer": {}})])
    assert found == [("trainer.learning_rate", "0.0002", "5e-05"), ("trainer.beta", "0.3", "0.1")]
    after = {"reference": "adapter:one", "method": "sft"}
    found = differences([replace(runs[0], recipe={"lora": {"rank": 4}, **settings}), replace(runs[1], recipe=after)])
    assert ("lora.rank", "4", "as the reference has it") in found
    assert ("trainer.beta", "0.3", "none") in found
    assert ("trainer.learning_rate", "0.0002", "0.0001") in found


def test_a_run_and_its_evaluation_have_names_of_their_own(run, tmp_path):
    text = report_of([run("mine"), stored_evaluation(tmp_path / "evaluations" / "mine")])
    assert "mine, mine (evaluation)" in text


def test_prompts_that_not_all_answered_are_shown_by_kind(run, tmp_path):
    rows = [{"prompt": "another", "against": "a", "adapter": "b"}]
    evaluations = [stored_evaluation(tmp_path / name, rows=rows, warnings=["beware"]) for name in ("e1", "e2")]
    text = check(report_of([run("one"), run("two"), *evaluations]))
    assert "e2: beware" in text
    assert text.count('class="answers') == 2
    assert "No prompt was answered by all of them." in text
    text = check(report_of([run("three"), evaluations[0]]))
    assert "The same prompts" in text
    text = report_of(evaluations)
    assert text.count('class="answers') == 1
    assert "No prompt was" not in text


def test_chance_is_a_matter_of_accuracies_and_win_rates():
    stored = evaluation("x")
    stored["numbers"] |= {"finished": interval(0.9, 0.8, 0.95), "refusals": interval(0.02, 0.0, 0.1)}
    text = evaluation_page(stored)
    assert "An accuracy or a win rate whose interval holds 0.5 is no better than chance" in text
    figures = [figure for figure in text.split("<figure>") if "95% intervals" in figure]
    assert ["chance" in figure for figure in figures] == [True, False]
    assert ["refusals" in figure for figure in figures] == [False, True]


# --- plots ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, svg.POINTS, svg.POINTS + 1, 6000, 50_000])
def test_a_line_has_few_points_and_keeps_what_stands_out(count):
    ys = [0.5 + step % 7 for step in range(count)]
    ys[count // 2] = 99.0
    ys[count // 3] = -99.0 if count > 3 else ys[0]
    plot = svg.lines([svg.Series("a", range(count), ys)], title="t", until=count - 1)
    kept = re.findall(r"[\d.]+,[\d.]+", re.search(r'points="([^"]*)"|$', plot)[1] or "")
    assert len(kept) <= svg.POINTS
    if count > 1:
        heights = [float(point.split(",")[1]) for point in kept]
        whole = [svg.TOP + (svg.HEIGHT - svg.TOP - svg.BOTTOM) * share for share in (0.06 / 1.12, 1.06 / 1.12)]
        assert (min(heights), max(heights)) == pytest.approx(whole, abs=0.1)
        edges = [float(kept[0].split(",")[0]), float(kept[-1].split(",")[0])]
        assert edges == pytest.approx([svg.LEFT, svg.WIDTH - svg.RIGHT], abs=0.1)


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
            page.set_viewport_size({"width": 1200, "height": 800})
            cut = "[...document.querySelectorAll('table')].filter(t => t.scrollWidth > t.parentElement.clientWidth)"
            assert page.evaluate(f"{cut}.map(t => t.innerText.slice(0, 60))") == [], name
            for width in (1280, 390):
                page.set_viewport_size({"width": width, "height": 800})
                wide = page.evaluate("document.documentElement.scrollWidth")
                assert wide <= width, f"{name} is wider than a window of {width}"
            page.close()
        browser.close()


def test_names_of_dots_that_lie_on_each_other_do_not():
    dots = [svg.Dot(name, 0.1 + 0.001 * number, 0.5, 0.4, 0.6) for number, name in enumerate("abcd")]
    drawn = svg.plane([*dots, svg.Dot("far", 0.3, 0.5, 0.4, 0.6)], title="t", unit="u")
    found = re.findall(r'<text class="tick" x="([\d.]+)" y="([\d.]+)"( text-anchor="end")?>(far|[a-d])<', drawn)
    middles = [(float(x) + (-4 if left else 4), float(y)) for x, y, left, _ in found]
    assert len(middles) == 5
    for one, other in itertools.combinations(middles, 2):
        assert abs(one[0] - other[0]) > 8 or abs(one[1] - other[1]) > 10


def test_words_in_a_table_of_numbers_are_not_at_the_right():
    drawn = parts.table(("run", "score", ""), [("1", "0.5", "ended early")])
    assert '<td class="n">0.5</td>' in drawn
    assert '<td class="w">ended early</td>' in drawn
