"""The pages in a real browser: no errors, no network, search, filters and keys do what they say."""

import copy
import time

import pytest
import torch
from torch import nn

import compile_modes as cm
from compile_modes import pages
from nets import IMAGE, TOKENS, VECTORS, Attention, Auxiliary, ConvNet, Small
from pages.browsers import Opened, started

pytestmark = pytest.mark.filterwarnings("ignore::compile_modes.ModeWarning")


@pytest.fixture(scope="module")
def browser():
    with started() as browser:
        yield browser


@pytest.fixture
def page(browser):
    context = browser.new_context(viewport={"width": 1200, "height": 900})
    yield Opened(context.new_page())
    context.close()


def bound(model, *args, training=True):
    return cm.bind(torch.export.export(model.train(training), args))


def many(count=300):
    """A survey of as many sites; the last can't be switched, and one is in another mode than the others."""
    site = {
        "op": "aten.dropout.default", "family": "dropout", "mode": "train", "held_by": "flag", "inverted": False,
        "modeless": False, "literals": {"p": 0.1}, "limits": {}, "codes": {},
    }  # fmt: skip
    sites = [{**site, "owner": f"layers.{number // 10}.drop{number % 10}"} for number in range(count)]
    sites[count // 12] |= {"mode": "eval"}
    sites[-1] |= {"limits": {"train": "its p is lost"}, "codes": {"train": "CM713"}, "held_by": "literal"}
    return {"difference": None, "programs": [{"program": None, "sites": sites, "totals": {}, "remarks": []}]}


def written(survey, path):
    pages.write(pages.document("many", pages.explanation(survey)), path)
    return path


def test_pages_open_without_an_error_and_ask_for_nothing(page, tmp_path):
    module = bound(ConvNet(), IMAGE)
    other = copy.deepcopy(module)
    other.block1.eval()
    other.get_parameter("fc.bias").data += 1
    cm.explain(module, html=tmp_path / "modes.html")
    cm.explain(cm.export(Auxiliary(), (IMAGE,)), html=tmp_path / "two.html")
    cm.explain(bound(nn.Linear(4, 4), VECTORS), html=tmp_path / "none.html")
    cm.explain(bound(Attention(), TOKENS, training=False), html=tmp_path / "stuck.html")
    (tmp_path / "diff.html").write_text(cm.diff(module, other).html(), "utf-8")
    (tmp_path / "equal.html").write_text(cm.diff(module, module).html(), "utf-8")
    for name in ("modes", "two", "none", "stuck", "diff", "equal"):
        path = tmp_path / f"{name}.html"
        page.open(path)
        assert page.errors == []
        assert page.requests == [path.as_uri()]
    page.open(tmp_path / "modes.html")
    assert page.count == "7 of 7 sites"
    assert page.page.title() == "Modes: GraphModule"
    page.open(tmp_path / "equal.html")
    assert "Nothing differs" in page.page.locator(".equal").text_content()
    page.open(tmp_path / "diff.html")
    assert any("fc.bias" in text for text in page.shown())


def test_names_from_outside_are_text(page, tmp_path):
    name = "<script>document.title='ran'</script><img src=x onerror=\"document.title='ran'\">'&quot;"
    model = nn.Sequential()
    model.add_module("drop", nn.Dropout(0.5))
    module = bound(model, VECTORS)
    survey = many(3)
    survey["programs"][0]["sites"][0] |= {"owner": name, "op": name, "literals": {name: name}, "held_by": name}
    survey["programs"][0]["sites"][0] |= {"family": name, "limits": {name: name}, "codes": {}}
    survey["programs"][0]["remarks"] = [name]
    survey |= {"file": name, "writer": name, "mode": name, "overrides": {name: name}, "complaints": [name]}
    survey |= {"refused": [{"site": name, "code": name, "reason": name}], "graphs": {name: {name: name}}}
    report = cm.diff(module, module).to_json() | {"differ": True, "programs": name, "left_out": {name: name}}
    report["sites"] = [
        {
            "what": "changed",
            "program": name,
            "owner": name,
            "op": name,
            "changes": {name: [name, name], "mode": [name, 1]},
        },
        {"what": "lost", "program": name, "owner": name, "op": name, "changes": {name: [name, None]}},
    ]
    weight = {"what": "changed", "name": name, "before": name, "after": "x" + name, "largest": name, "elements": 2}
    report["weights"] = [weight, weight | {"what": "added", "before": None}]
    for title, body in (("a" + name, pages.explanation(survey)), ("b" + name, pages.difference(report))):
        path = tmp_path / "hostile.html"
        pages.write(pages.document(title, body), path)
        page.open(path)
        assert page.page.title() == title
        assert page.errors == []
        assert page.page.locator("img").count() == 0
        assert page.page.locator("script").count() == 1
        assert name in page.page.locator("body").text_content()


def test_a_script_that_slips_in_does_not_run(page, tmp_path):
    path = tmp_path / "slipped.html"
    pages.write(pages.document("as it was", "<script>document.title='ran'</script>"), path)
    page.open(path)
    assert page.page.title() == "as it was"
    assert any("Content Security Policy" in error for error in page.errors)


def test_what_matters_is_open_and_the_rest_is_closed(page, tmp_path):
    page.open(written(many(), tmp_path / "many.html"))
    assert page.visible() == 20  # the layer of the site in eval, and that of the one that can't be switched
    page.page.get_by_role("button", name="open all").click()
    assert page.visible() == 300
    page.page.get_by_role("button", name="close all").click()
    assert page.visible() == 0
    page.open(written(many(30), tmp_path / "few.html"))
    assert page.visible() == 30


def test_filters_and_search_narrow_what_is_shown_and_reset_shows_it_again(page, tmp_path):
    page.open(written(many(), tmp_path / "many.html"))
    chip = page.page.get_by_role("button", name="eval 1")
    chip.click()
    assert chip.get_attribute("aria-pressed") == "true"
    assert (page.count, page.visible()) == ("1 of 300 sites", 1)
    page.page.get_by_role("button", name="train 299").click()  # of one kind of fact, any of the values
    assert page.count == "300 of 300 sites"
    page.page.get_by_role("button", name="can't switch 1").click()  # of several, all of them
    assert (page.count, page.visible()) == ("1 of 300 sites", 1)
    page.page.get_by_role("button", name="show all").click()
    assert (page.count, page.visible()) == ("300 of 300 sites", 20)
    page.page.get_by_role("searchbox").fill("layers.7 DROP3")
    assert (page.count, page.visible()) == ("1 of 300 sites", 1)
    page.page.get_by_role("searchbox").fill("no such name")
    assert (page.count, page.visible()) == ("0 of 300 sites", 0)
    assert page.errors == []


def test_all_of_it_can_be_done_by_keys(page, tmp_path):
    page.open(written(many(), tmp_path / "many.html"))
    keys = page.page.keyboard
    keys.press("/")
    keys.type("drop5")
    assert page.count == "30 of 300 sites"
    keys.press("Escape")
    assert page.count == "300 of 300 sites"
    page.page.get_by_role("button", name="eval 1").focus()
    keys.press("Enter")
    assert page.count == "1 of 300 sites"
    keys.press("Escape")
    page.page.locator("summary").first.focus()
    keys.press("Enter")
    assert page.visible() == 0


def test_codes_lead_to_what_they_mean(page, tmp_path):
    page.open(written(many(), tmp_path / "many.html"))
    page.page.locator("a[href='#CM713']").click()
    entry = page.page.locator("#CM713")
    assert page.page.url.endswith("#CM713")
    assert "What to do: export in train mode" in entry.text_content()
    assert entry.is_visible()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_can_be_read_in_both_schemes(page, scheme, tmp_path):
    page.page.emulate_media(color_scheme=scheme)
    page.open(written(many(), tmp_path / "many.html"))
    pairs = page.page.evaluate(
        """() => ["body", ".pill.train", ".pill.eval", ".pill.stuck", ".chip", "a"].map(name => {
            const one = document.querySelector(name);
            let behind = one, back;
            do { back = getComputedStyle(behind).backgroundColor; behind = behind.parentElement; }
            while (behind && /, 0(\\.\\d+)?\\)$/.test(back));
            return [name, getComputedStyle(one).color, back];
        })"""
    )
    for name, fore, back in pairs:
        assert contrast(fore, back) >= 4.5, (name, fore, back)  # WCAG 2.2, level AA


def contrast(*colors):
    """The contrast ratio of two colours, WCAG 2.2: https://www.w3.org/TR/WCAG22/#dfn-contrast-ratio."""
    lights = []
    for color in colors:
        parts = [float(part) / 255 for part in color.partition("(")[2].rstrip(")").split(",")[:3]]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        lights.append(0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2])
    return (max(lights) + 0.05) / (min(lights) + 0.05)


def test_five_thousand_sites_are_no_trouble(page, tmp_path):
    path = written(many(5000), tmp_path / "large.html")
    assert path.stat().st_size < 4e6
    start = time.perf_counter()
    page.open(path)
    page.page.get_by_role("searchbox").fill("layers.44 drop7")
    assert page.count == "11 of 5000 sites"
    assert time.perf_counter() - start < 20


def test_fragments_for_notebooks_open_without_scripts(page, tmp_path):
    module = bound(Small(4), VECTORS)
    explained, differing = cm.explain(module), cm.diff(module, copy.deepcopy(module).eval())
    (tmp_path / "notebook.html").write_text(
        f"<!doctype html><meta charset=utf-8>{explained._repr_html_()}{differing._repr_html_()}", "utf-8"
    )
    page.open(tmp_path / "notebook.html")
    assert page.errors == []
    assert page.page.locator("script").count() == 0
    assert page.visible() == 4
    assert page.page.locator(".controls:visible").count() == 0
