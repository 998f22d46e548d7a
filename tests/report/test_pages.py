"""The page: complete, self-contained, safe, and working in a browser."""

import base64
import hashlib
import io
import json
import re
import shutil
from html import escape
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from cxai_jax.data.records import Dataset, Records
from cxai_jax.report import page, pictures, scores, terminal, training_page
from cxai_jax.report import prediction_page as pages
from cxai_jax.report.page import NOTICE, Row
from cxai_jax.scoring import evaluate, explanations
from cxai_jax.voting import rules

NASTY = "<img src=x onerror=alert(1)>&\"'.png"


DOT = pictures.encode(np.full((40, 40), 90, np.uint8), "JPEG")


def holds(text, part):
    """`part in text`, which pytest would explain at length for a whole page."""
    return part in text


class Page(HTMLParser):
    """Collects the tags of a page as (name, attributes)."""

    def __init__(self, text):
        super().__init__()
        self.tags = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def all(self, name):
        return [attributes for tag, attributes in self.tags if tag == name]


@pytest.fixture(scope="module")
def finished():
    """A run's results, predictions and records, made from random numbers."""
    random = np.random.default_rng(1)
    number, k = 24, 4
    labels = np.arange(number) % 2
    positive = np.clip(random.normal(0.3 + 0.4 * labels, 0.2), 0.01, 0.99)
    positive = np.stack([positive, *(random.uniform(size=(k, number)))], axis=1)
    names = np.array([f"{i}.png" for i in range(number - 1)] + [NASTY])
    images = random.integers(0, 255, (number, 16, 16, 1)).astype(np.uint8)
    records = Records(
        images=images,
        labels=labels.astype(np.int32),
        sites=(np.arange(number) // 12).astype(np.int32),
        patients=np.array([f"p{i // 4 * 2 + i % 2}" for i in range(number)]),
        names=names,
    )
    dataset = Dataset(
        name="made",
        splits={"test": records},
        class_names=("healthy", "sick"),
        site_names=("north", "south"),
        positive=1,
        split_scheme="patient-disjoint",
        fingerprint="0",
        leakage={"verdict": "LEAKS: 2 of 24"},
    )
    probs = np.stack([1 - positive, positive], axis=2).astype(np.float32)
    predictions = {
        "names": names,
        "labels": records.labels,
        "sites": records.sites,
        "patients": records.patients,
        "probs": probs,
        "logits": np.log(probs[:, 0]),
        "class_maps": random.normal(size=(number, 2, 2, 2)).astype(np.float32),
    }
    from configs import common

    config = common.get_config()
    config.eval.bootstrap = 20
    config.tta.k = k
    results = {
        "metrics": evaluate.score(predictions, dataset, config),
        "calibration": {},
        "maps": {"scale": pictures.scale_of(predictions)},
        "selected": {"rule": "last"},
        "curve": [{"step": s, "val": {"accuracy": 0.5}} for s in (5, 6)],
        "data": {
            "name": "made",
            "class_names": ["healthy", "sick"],
            "positive": "sick",
            "site_names": ["north", "south"],
            "split_scheme": "patient-disjoint",
            "counts": {"test": number},
            "leakage": dataset.leakage,
        },
        "config": json.loads(config.to_json()),
        "versions": {},
        "device": {},
    }
    return results, predictions, records


@pytest.fixture(scope="module")
def run_page(finished):
    return training_page.run_report(
        *finished, [{"step": s, "loss": 1.0} for s in (5, 6)]
    )


def test_maps_lie_side_by_side_with_their_agreement(finished):
    results, predictions, records = finished
    random, rows = np.random.default_rng(2), [3, 23, 5]
    pattern = random.normal(size=(3, 2, 2))
    pattern[2] = -1.0  # No evidence anywhere.
    zoom = {"cam": 1, "occlusion": 1, "gradcam_lower": 2, "input_gradient": 8}
    found = {n: pattern.repeat(k, 1).repeat(k, 2) for n, k in zoom.items()}
    found["input_gradient"][1] *= -1
    found |= {name: np.zeros(3) for name in ("deletion", "insertion")}
    summary = explanations.summarise(explanations.measure(found))
    found |= {
        "names": records.names[rows],
        "labels": records.labels[rows],
        "probs": predictions["probs"][rows, 0],
    }
    page = training_page.run_report(
        results | {"explanations": summary}, predictions, records, [], found
    )
    section = page[page.index("Do the explanations agree?") :]
    section = section[: section.index("</section>")]
    captions = re.findall("<figcaption>(.*?)</figcaption>", section)
    assert [c.split(". ")[0] for c in captions] == [
        "agreement -0.33",  # One of three pairs is equal, two are opposite.
        "agreement +1.00",
        "no agreement defined: a map is flat",
    ]
    assert not holds(section, NASTY) and holds(captions[0], escape(NASTY))
    pictures = re.findall('image/jpeg;base64,([^"]*)', section)
    assert len(pictures) == 3
    panel = Image.open(io.BytesIO(base64.b64decode(pictures[0])))
    assert panel.width > 4 * panel.height  # The image and three maps.
    cells = re.findall('<th scope="row">CAM</th>(.*?)</tr>', section)[0]
    assert re.findall(">([\\d.]+)</td>", cells)[1] == "0.33"  # Empty.
    assert not holds(section, "lungs")


def test_sites_are_scored_after_voting_and_labels_have_no_ranking(finished, run_page):
    results, predictions, records = finished
    scored = results["metrics"]
    after = np.asarray(rules.vote(predictions["probs"], theta=0.2, k=4))
    for site, name in enumerate(("north", "south")):
        here = records.sites == site
        values, truth, called = (
            scored["voted_per_site"][name],
            records.labels[here] == 1,
            after[here] == 1,
        )
        assert values["number"] == 12
        assert values["accuracy"] == pytest.approx((truth == called).mean())
        assert values["precision"] == pytest.approx(
            (truth & called).sum() / called.sum()
        )
        assert values["recall"] == pytest.approx((truth & called).sum() / truth.sum())
    hard = [scored["voted"], *scored["voted_per_site"].values()]
    for values in hard:
        assert {"auc", "macro_auc", "ece", "brier"}.isdisjoint(values)
        assert "auc" not in values["intervals"] and "f1" in values["intervals"]
    assert {"auc", "ece", "brier"} <= scored["all"].keys()
    lines = terminal.summary(results).splitlines()
    (line,) = [x for x in lines if x.startswith("north, after voting")]
    assert line.count("(") == len(scores.HARD)  # No ranking.
    cells = re.findall('<th scope="row">south, after voting</th>(.*?)</tr>', run_page)
    assert len(re.findall(r"\d \(", cells[0])) == len(scores.HARD)


def prediction_page(rows=3, errors=(), flag="wider than every training image"):
    made = [
        Row(
            name=f"in/{i}-{NASTY}",
            probability=(i * 37 % 100) / 100,
            before="healthy",
            after="sick" if i == 1 else "healthy",
            opposing=i % 4,
            cast=4,
            flags=(flag,) if i == 2 else (),
            patient=f"p{i}",
            plain=DOT,
            mapped=DOT,
            decision="inconclusive" if i % 2 else "healthy",
            candidates=["healthy"] if i % 2 == 0 else [],
            link=f"overlays/{i}.png",
        )
        for i in range(rows)
    ]
    return pages.prediction_report(
        made,
        errors,
        class_names=["healthy", "sick"],
        positive=1,
        patients=[("p0", 1, 0.25, "healthy")],
        about={"tta": {"k": 5}, "decision": "calibrated"},
        legend=page.legend(2.0, "CAM", page.evidence(2.0)),
    )


def test_summary_names_every_group_and_the_verdict(finished):
    results = finished[0]
    text = terminal.summary(results)
    for word in ("north", "south", "per patient", "after voting", "LEAKS: 2 of 24"):
        assert word in text
    accuracy = 100 * results["metrics"]["all"]["accuracy"]
    low, high = (100 * v for v in results["metrics"]["all"]["intervals"]["accuracy"])
    assert f"{accuracy:.1f} ({low:.1f}-{high:.1f})" in text
    assert f"flipped by voting: {len(results['metrics']['flips'])}" in text


def test_a_run_page_has_its_parts(run_page, finished):
    page = Page(run_page)
    assert holds(run_page, NOTICE)
    assert run_page.index("LEAKS: 2 of 24") < run_page.index("<h2>Charts</h2>")
    labels = [svg["aria-label"] for svg in page.all("svg")]
    for chart in ("ROC", "Confusion", "Reliability", "training loss", "accuracy"):
        assert any(chart in label for label in labels), chart
    assert any(label.startswith("Score while") for label in labels)
    flips = finished[0]["metrics"]["flips"]
    listed = run_page.split(">Flipped image")[1].split("</table>")[0]
    assert flips and listed.count('<th scope="row">') == len(flips)
    gallery = run_page.split("<h2>Flipped by voting</h2>")[1].split("</section>")[0]
    shown = gallery.count("<figcaption>")
    assert shown == gallery.count(", after voting healthy</figcaption>") > 0
    rows = [row for row in page.all("tr") if "data-tags" in row]
    assert len(rows) == len(finished[1]["labels"])
    wrong = (finished[1]["probs"][:, 0].argmax(1) != finished[1]["labels"]).sum()
    assert wrong > 0 and holds(run_page, "Wrong, the most certain first")


@pytest.mark.parametrize("kind", ["run", "prediction"])
def test_a_page_needs_nothing_and_admits_nothing(kind, run_page):
    text = run_page if kind == "run" else prediction_page()
    page = Page(text)
    for image in page.all("img"):
        assert image["src"].startswith("data:image/jpeg;base64,")
        assert image["loading"] == "lazy" and image["alt"]
    links = [a["href"] for a in page.all("a")]
    assert all(link.startswith(("#", "overlays/")) for link in links)
    assert not page.all("iframe") and len(page.all("script")) == 1
    assert all("src" not in script for script in page.all("script"))
    addresses = set(re.findall(r"https?://[^\s\"'<)]+", text))
    assert all("w3.org" in a for a in addresses), addresses  # Names, never fetched.
    assert not holds(text, "<img src=x") and holds(text, "alert(1)&gt;")
    script = text[text.index("<script>") + 8 : text.index("</script>")]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = page.all("meta")[2]["content"]
    assert policy.startswith("default-src 'none'")
    assert f"script-src 'sha256-{digest}'" in policy


def test_the_overview_counts():
    text = prediction_page(rows=40)  # 40 rows of 4 votes each, of 5.
    assert holds(text, "160 votes were cast; the other 40 of 200 could not")
    for tile in ("<b>40</b> images", "<b>1</b> labels flipped", "<b>39</b> labelled h"):
        assert holds(text, tile), tile


def test_the_common_folder_is_named_once():
    rows = [Row(n, 0.5, "a", "a") for n in ("/x/y/1.png", "/x/y/2.png", "z.png")]
    options = {"class_names": ["a"], "positive": 0, "patients": [], "about": {}}
    assert holds(pages.prediction_report(rows[:2], [], **options), "Files are in /x/y/")
    assert not holds(pages.prediction_report(rows, [], **options), "Files are in")


def test_of_very_many_rows_the_least_certain_are_shown(monkeypatch):
    monkeypatch.setattr(page, "MAX_ROWS", 2)
    text = prediction_page(rows=4)  # 0, 37, 74 and 11 %.
    assert holds(text, "The 2 least certain of 4 images; predictions.csv has all.")
    assert holds(text, "<b>4</b> images predicted")
    shown = re.findall(r'data-v="(0\.\d+)"', text)
    assert shown == ["0.370000", "0.740000"]


def test_many_errors_are_folded_away():
    few = prediction_page(errors=[("a.png", "empty")] * pages.OPEN_ERRORS)
    many = prediction_page(errors=[("a.png", "empty")] * (pages.OPEN_ERRORS + 1))
    details = [Page(text).all("details")[0] for text in (few, many)]
    assert "open" in details[0] and "open" not in details[1]
    assert holds(many, "11 could not be predicted")


def test_errors_are_listed_and_a_page_without_rows_works():
    text = pages.prediction_report(
        [],
        [("a<b.dcm", "no pixels")],
        class_names=[],
        positive=0,
        patients=[],
        about={},
    )
    assert "a&lt;b.dcm" in text and "no pixels" in text and NOTICE in text
    assert "<h2>Images</h2>" not in text


@pytest.fixture(scope="module")
def browser():
    """Headless Chromium; the tests that need one are skipped where there is none."""
    path = shutil.which("chromium") or shutil.which("chromium-browser")
    if not path:
        pytest.skip("no chromium on this machine")
    playwright = pytest.importorskip("playwright.sync_api", reason="no playwright")
    with playwright.sync_playwright() as driver:
        found = driver.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield found
        found.close()


@pytest.fixture
def opened(browser, tmp_path):
    """Opens a page's text at a width; nothing may have been said on its console."""
    said, contexts = [], []

    def open_page(text, width=1280, **options):
        file = tmp_path / "report.html"
        file.write_text(text, encoding="utf-8")
        size = {"width": width, "height": 844}
        contexts.append(browser.new_context(viewport=size, **options))
        tab = contexts[-1].new_page()
        tab.on("console", lambda message: said.append(message.text))
        tab.on("pageerror", lambda error: said.append(str(error)))
        tab.goto(file.as_uri())
        return tab

    yield open_page
    for context in contexts:
        context.close()
    assert said == []


WIDE = "document.documentElement.scrollWidth - innerWidth"
SHOWN = """() => [...document.querySelectorAll('#images tbody tr')]
    .filter(row => row.offsetParent)
    .map(row => row.querySelector('[data-h^=Probability]').dataset.v)"""


@pytest.mark.parametrize("width", [1280, 390])
def test_sorting_and_filtering_in_a_browser(opened, width):
    tab = opened(prediction_page(rows=40), width)
    before = tab.evaluate(SHOWN)
    assert len(before) == 40 and before != sorted(before)
    button = tab.locator("#images th button", has_text="Probability")
    button.click()
    assert tab.evaluate(SHOWN) == sorted(before)
    assert tab.locator("#images th[aria-sort=ascending]").count() == 1
    button.focus()
    tab.keyboard.press("Enter")
    assert tab.evaluate(SHOWN) == sorted(before)[::-1]
    tab.evaluate("scrollTo(0, document.body.scrollHeight)")
    top = tab.evaluate(
        "document.querySelector('#images thead').getBoundingClientRect().top"
    )
    assert (top == 0) == (width == 1280)  # Stays in view.
    tab.locator("#show").select_option("flipped")
    assert tab.evaluate(SHOWN) == ["0.370000"]
    assert tab.locator("#count").inner_text() == "1 of 40 images"
    tab.locator("#show").select_option("inconclusive")
    assert len(tab.evaluate(SHOWN)) == 20
    tab.locator("#search").fill("nowhere to be found")
    assert tab.evaluate(SHOWN) == []
    assert tab.evaluate(WIDE) <= 0


@pytest.mark.parametrize("width", [1280, 390])
def test_a_picture_is_enlarged_by_click_and_by_key(opened, width):
    tab = opened(prediction_page(rows=3), width)
    picture = tab.locator("#images .pair").first
    small = picture.locator("img").first.bounding_box()["width"]
    picture.click()
    large = tab.locator("dialog[open] .pair img").first
    assert large.bounding_box()["width"] > 1.5 * small or width == 390
    assert NASTY in tab.locator("dialog p").inner_text()
    assert tab.locator("dialog a").get_attribute("href") == "overlays/0.png"
    tab.keyboard.press("Escape")
    assert tab.locator("dialog[open]").count() == 0
    picture.focus()
    tab.keyboard.press("Enter")
    assert tab.locator("dialog[open]").count() == 1
    tab.get_by_role("button", name="Close").click()
    assert tab.locator("dialog[open]").count() == 0


def test_the_slider_fades_every_map_to_its_image(opened):
    tab = opened(prediction_page(rows=3))
    opacity = "() => getComputedStyle(document.querySelector('.map')).opacity"
    assert tab.evaluate(opacity) == "1"
    tab.locator("#legend input").fill("30")
    assert tab.evaluate(opacity) == "0.3"
    base = tab.locator("#images .over .base").first
    plain = tab.locator("#images .pair > img").first
    assert base.get_attribute("src") == plain.get_attribute("src")
    tab.locator("#images .pair").first.click()
    assert tab.locator("dialog input").input_value() == "30"
    tab.locator("dialog input").fill("0")
    assert tab.evaluate(opacity) == "0"
    assert tab.locator("#legend input").input_value() == "0"


def test_a_page_is_readable_without_a_script_in_the_dark_and_printed(opened):
    text = prediction_page(rows=3)
    bare = opened(text, java_script_enabled=False)
    assert bare.locator("#images .map").first.is_visible()
    assert not bare.locator("#legend input").is_visible()
    dark = opened(text, color_scheme="dark")
    colour = "() => getComputedStyle(document.body).backgroundColor"
    assert dark.evaluate(colour) == "rgb(20, 23, 26)"
    assert dark.pdf(prefer_css_page_size=True).startswith(b"%PDF")
    dark.emulate_media(media="print")
    assert dark.evaluate(colour) == "rgb(255, 255, 255)"
    for control in ("#controls", "#fade"):
        assert not dark.locator(control).is_visible()


@pytest.mark.parametrize(
    "name", ["<b>bold</b>", "x" * 40, "\u0627\u0644\u062a\u0647\u0627\u0628"]
)
def test_odd_class_names_stay_text_and_in_bounds(opened, name):
    names = ["healthy", name, "other"]
    made = [
        Row(f"{i}.png", 0.2, name, name, probs=(0.3, 0.2, 0.5), decision=name)
        for i in range(3)
    ]
    about = {"class_names": names, "positive": 1, "patients": [], "about": {}}
    tab = opened(pages.prediction_report(made, [], **about), 390)
    assert name in tab.locator("#images tbody tr").first.inner_text()
    assert tab.locator("#images b", has_text="bold").count() <= 3  # Our own <b> only.
    assert tab.locator("b > b").count() == 0
    assert tab.locator(".stacked i").count() == 9
    assert tab.evaluate(WIDE) <= 0


def test_a_page_of_five_thousand_rows_sorts_and_filters(opened):
    tab = opened(prediction_page(rows=page.MAX_ROWS))
    tab.locator("#images th button", has_text="Probability").click()
    found = tab.evaluate("() => document.querySelectorAll('#images tbody tr').length")
    assert found == page.MAX_ROWS
    tab.locator("#show").select_option("flipped")
    assert tab.locator("#count").inner_text() == f"1 of {page.MAX_ROWS} images"


def test_a_batch_of_the_wrong_images_says_so_before_anything_else(opened):
    text = prediction_page(rows=3)  # One of three is flagged.
    assert text.index("These may be the wrong images") < text.index(">Overview<")
    assert holds(text, "1 of 3 are flagged as unlike its own")
    tab = opened(text)
    looks = "row => getComputedStyle(row).backgroundColor"
    rows = tab.locator("#images tbody tr")
    assert rows.nth(2).evaluate(looks) != rows.nth(0).evaluate(looks)
    assert not holds(prediction_page(rows=40), "wrong images")  # One of forty.


def test_images_that_were_trained_on_are_not_called_foreign():
    text = prediction_page(rows=3, flag="seen in training")
    assert holds(text, "<b>1 of 3 were seen in training:</b> there the answers show")
    assert not holds(text, "wrong images")
    assert not holds(prediction_page(rows=3), "were seen in training")


PRINTED = 1000  # Pixels of a landscape A4 page between its margins.


def test_print_breaks_no_word_and_leaves_no_tile_or_chart_alone(opened, run_page):
    tab = opened(prediction_page(rows=3), PRINTED)
    tab.emulate_media(media="print")
    heads = tab.locator("#images thead th").all()
    for head in heads:
        assert head.evaluate("one => one.scrollWidth - one.clientWidth") <= 1
    tops = "() => [...document.querySelectorAll('.tiles > *')].map(t => t.offsetTop)"
    assert len(set(tab.evaluate(tops))) == 1
    tab = opened(run_page, PRINTED)
    tab.emulate_media(media="print")
    place = "all => all.map(one => one.offsetTop)"
    for number in range(4, 8):
        tab.evaluate(
            """number => {
                const all = document.querySelector('.charts:not(.wide)');
                while (all.children.length < number)
                    all.append(all.children[0].cloneNode(true));
                while (all.children.length > number) all.lastChild.remove();
            }""",
            number,
        )
        chosen = tab.locator(".charts:not(.wide)").first.locator("> *")
        rows = chosen.evaluate_all(place)
        assert len(rows) == number and rows.count(max(rows)) > 1, rows


def test_the_card_comes_first_and_names_what_the_model_is(finished):
    results = finished[0]
    about = {"class_names": ["healthy", "sick"], "positive": 1, "patients": []}
    config = results["config"]
    config["data"]["fit"] = "test"
    text = pages.prediction_report(
        [], [], about={}, results=results, counts=None, **about
    )
    card = text[text.index('<dl class="card warn">') : text.index("</dl>")]
    scored = results["metrics"]["all"]
    for fact in (
        "made, 24 images",
        "LEAKS: 2 of 24",
        "24 test images",
        f"{100 * scored['accuracy']:.1f} (",
        "Sensitivity, of sick",
        "nothing: raw scores",
        f"seed {config['seed']}",
    ):
        assert holds(card, fact), fact
    assert text.index("</dl>") < text.index(">Overview<")
    assert holds(text, "Only 24 test images")


def test_three_classes_have_rows_curves_and_stacked_bars_of_their_own(finished):
    results, predictions, records = finished
    random = np.random.default_rng(3)
    number, names = len(records.labels), ["healthy", "sick", "other"]
    labels = np.arange(number, dtype=np.int32) % 3
    logits = random.normal(size=(number, 3)) + 2 * np.eye(3)[labels]
    probs = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    three = predictions | {
        "labels": labels,
        "probs": probs[:, None],
        "logits": logits,
        "class_maps": random.normal(size=(number, 2, 2, 3)),
    }
    dataset = Dataset(
        name="three",
        splits={"test": records},
        class_names=tuple(names),
        site_names=("north", "south"),
        positive=1,
        split_scheme="patient-disjoint",
        fingerprint="0",
        leakage={"verdict": "clean"},
    )
    from configs import common

    config = common.get_config()
    config.eval.bootstrap = 20
    scored = evaluate.score(three | {"patients": records.names}, dataset, config)
    data = results["data"] | {"class_names": names}
    made = results | {"metrics": scored, "data": data}
    text = training_page.run_report(made, three, records, [])
    assert holds(text, "ROC of each class against the rest")
    table = text[text.index("Each class against all others") :]
    table = table[: table.index("</table>")]
    assert re.findall('<th scope="row">(.*?)</th>', table) == [*names, "macro mean"]
    chosen = probs.argmax(1)
    for c, name in enumerate(names):
        cells = re.findall("<td[^>]*>(.*?)</td>", table.split(f">{name}</th>")[1])
        precision = (labels[chosen == c] == c).mean()
        recall = (chosen[labels == c] == c).mean()
        assert cells[0] == "8" and cells[1].startswith(f"{100 * precision:.1f} (")
        assert cells[2].startswith(f"{100 * recall:.1f} (")
    assert text.count('class="bar stacked"') == number
    assert holds(text, 'class="key"')
    printed = terminal.summary(made)
    assert "positive class: sick" in printed
    assert all(re.search(rf"^{name} +8 ", printed, re.M) for name in names)


def test_few_images_and_unattainable_points_are_said_not_computed(finished):
    results, predictions, records = finished
    fitted = {
        "temperature": 1.0,
        "held_out": 12,
        "ece_before": 0.1,
        "ece_after": 0.1,
        "operating_points": [
            {
                "specificity_wanted": 0.9,
                "threshold": None,
                "sensitivity": None,
                "specificity": None,
            }
        ],
        "conformal": [
            {
                "coverage_wanted": 0.9,
                "quantile": 0.1,
                "coverage": 0.82,
                "mean_set_size": 0.82,
                "single_class_share": 0.82,
                "empty_share": 0.18,
            }
        ],
    }
    made = results | {"calibration": fitted}
    text = training_page.run_report(
        made, predictions, records, [{"step": 1, "loss": 1}]
    )
    assert text.count("not attainable") == 2
    assert holds(text, "Only 12 validation images")
    assert holds(text, "90.0 % hold the true class of 82.0 % of the test images")
    assert holds(text, "18.0 %") and holds(text, "A prediction set holds")
    assert not holds(text, "Learning curve: training loss")  # One point.
    for bad in ("inf", "nan", "None"):
        assert not re.search(rf">{bad}\b", text), bad
    assert "Only 12 validation images" in terminal.summary(made)


@pytest.mark.parametrize(
    ("recall", "specificity", "never"),
    [(0, 1, ["sick"]), (1, 0, ["healthy"]), (0.5, 1, []), (0, None, [])],
)
def test_a_class_that_nothing_is_given_to_is_named(recall, specificity, never):
    scored = {"all": {"recall": recall, "specificity": specificity}}
    data = {"class_names": ["healthy", "sick"], "positive": "sick"}
    made = {"data": data, "metrics": scored}
    assert scores.never_predicted(made) == never
    made["data"] = data | {"class_names": ["a", "b", "c"]}
    scored["all"] |= {"recall_0": 0.0, "recall_1": 0.0, "recall_2": 1.0}
    specific = {"a": 1.0, "b": 0.9, "c": 0.1}
    scored["per_class"] = {n: {"specificity": s} for n, s in specific.items()}
    assert scores.never_predicted(made) == ["a"]


@pytest.mark.parametrize(
    ("score", "interval", "told"),
    [
        (
            0.58,
            [0.476, 0.68],
            "Balanced accuracy 58.0 (47.6-68.0): chance, 50.0, is within the interval, "
            "so the scores do not show that the network has learnt anything.",
        ),
        (
            0.463,
            [0.425, 0.499],
            "Balanced accuracy 46.3 (42.5-49.9): chance, 50.0, lies above the "
            "interval: what the network has learnt points the wrong way here. See "
            "whether the classes were exchanged.",
        ),
        (0.58, [0.501, 0.68], None),
    ],
)
def test_a_score_that_chance_would_reach_says_so(finished, score, interval, told):
    results = json.loads(json.dumps(finished[0]))
    every = results["metrics"]["all"]
    every["balanced_accuracy"] = score
    every["intervals"]["balanced_accuracy"] = interval
    found = [text for text in scores.warnings_of(results) if "chance" in text]
    assert found == ([told] if told else [])
