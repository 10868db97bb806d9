"""beyond/trace.html and the moving picture in a real browser: what keys do, what is shown, and that no request leaves."""
import json
import os
import shutil
import time

import pytest

from beyond.trace import write_trace
from conftest import traced

webdriver = pytest.importorskip("selenium.webdriver", reason="selenium drives the browser: pip install -r requirements-dev.txt")
FLAGS = ("--headless --no-sandbox --disable-dev-shm-usage --disable-gpu --disable-quic --no-first-run --disable-sync "
         "--disable-background-networking --disable-component-update --hide-scrollbars").split()
ARROW_LEFT, ARROW_RIGHT, HOME, END, TAB = "\ue012", "\ue014", "\ue011", "\ue010", "\ue004"
HOSTILE = ["</script><script>alert(1)</script>", "<img src=x onerror=alert(1)>", "<!--", "&lt;", "\u2028", "\x1b[m", "'\"`${x}"]
# Two models with drafts at 0, 0.02, 0.97, 1 and at 0, 0.5 seconds: five moments.
FIRST = traced([["q", "w", "e", "\n", None], ["a", "w", "e", "\n    ", None], ["a", "b", "\t", "\n    ", None],
                ["a", "b", "c", "\n    ", "d"]], 0.9, seconds=[0, 0.02, 0.97, 1], samples=("ab\n  c", *HOSTILE), name="out/one")
SECOND = traced([[None, None, None], ["·", *"∎é"]], seconds=[0, 0.5], sure=0.25, name="out/two")
STRANGE = traced([HOSTILE, HOSTILE[::-1]], samples=HOSTILE, name=HOSTILE[0])


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    paths = {name: shutil.which(name) for name in ("chromium", "chromedriver")}
    missing = [name for name, path in paths.items() if path is None]
    if missing:
        pytest.skip(f"{' and '.join(missing)} missing: apt-get install chromium chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = paths["chromium"]
    for flag in [*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('chromium')}"]:
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    service = webdriver.ChromeService(paths["chromedriver"], env={**os.environ, "NO_PROXY": "*"})
    driver = webdriver.Chrome(options, service)
    yield driver
    driver.quit()


@pytest.fixture
def visit(browser, tmp_path):
    """visit(*models, ending=".html", prompt=...) writes a trace, opens it and returns the browser."""
    def visit(*models, ending=".html", prompt="write it\n  like this"):
        path = tmp_path / f"trace{ending}"
        path.unlink(missing_ok=True)
        write_trace(str(path), prompt, list(models))
        browser.get(path.as_uri())
        return browser
    look(browser)
    browser.get("about:blank")
    browser.get_log("performance")  # what the browser's own first tab asked for is not of the page
    yield visit
    complaints, events = browser.get_log("browser"), browser.get_log("performance")
    browser.get("about:blank")
    sent = [event["params"] for event in (json.loads(line["message"])["message"] for line in events)
            if event["method"] == "Network.requestWillBeSent"]
    urls = [request["request"]["url"] for request in sent if not request["documentURL"].startswith("chrome")]  # its own tab
    assert urls and all(url.startswith((tmp_path.as_uri(), "data:")) for url in urls) and not complaints, (urls, complaints)


def look(browser, width=1000, height=700, **features):
    """Set the size of the window, and what a reader asked of every page: color_scheme, reduced_motion."""
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride",
                            dict(width=width, height=height, deviceScaleFactor=1, mobile=width < 500))
    features = dict(color_scheme="light", reduced_motion="no-preference") | features
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [
        {"name": f"prefers-{name.replace('_', '-')}", "value": value} for name, value in features.items()]})


def js(browser, code, *args):
    return browser.execute_script(f"return {code}", *args)


def press(browser, *keys):
    browser.switch_to.active_element.send_keys(*keys)


def step(browser):
    """Return the step of the slider, after a look at whether all that tells it says the same."""
    value, said, shown = js(browser, "[step.value, step.getAttribute('aria-valuetext'), now.textContent]")
    assert said == shown and said.startswith(f"moment {value} of {js(browser, 'step.max')}, ")
    return int(value)


def drafts(browser):
    """Return the texts of all drafts, as they are in the document."""
    return js(browser, "[...document.querySelectorAll('.draft')].map(draft => draft.textContent)")


def of_class(browser, name):
    return js(browser, "[...document.querySelectorAll('.draft .' + arguments[0])].map(span => span.textContent)", name)


def wait_for(condition, seconds=5):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it never happened"
        time.sleep(0.02)


# ---- what is shown ----

def test_it_opens_with_the_answers_and_everything_about_them(visit):
    browser = visit(FIRST, SECOND)
    assert step(browser) == 4 and drafts(browser) == ["abc\n    d", "·∎é"]
    assert js(browser, "document.querySelector('h1').textContent") == "write it\n  like this"
    text = js(browser, "document.body.innerText")
    assert all(part in text for part in ("out/one", "out/two", "uniform, resample: n_steps 3; 1.000 s", "draft 3 of 3",
                                         "draft 1 of 1", "moment 4 of 4, 1.000 s", "8 samples and their scores in nats"))
    cells = "[...document.querySelectorAll('tr')].map(row => [row.className, ...[...row.cells].map(cell => cell.textContent)])"
    rows = js(browser, cells)
    assert rows == [["kept", "0.000", "kept", "ab\n  c"], *(["", f"{i}.000", "", text] for i, text in enumerate(HOSTILE, 1))]
    assert visit(FIRST, prompt="").find_element("id", "prompt").text == "(no prompt)"


def test_the_slider_shows_each_moment_of_the_one_clock(visit):
    browser, found = visit(FIRST, SECOND), []
    for k in range(5):
        js(browser, "(step.value = arguments[0], step.dispatchEvent(new Event('input')))", k)
        assert step(browser) == k
        found.append((*drafts(browser), of_class(browser, "new")))
    assert found == [("qwe\n·", "···", []), ("awe\n    ·", "···", ["a", "\n    "]),
                     ("awe\n    ·", "·∎é", ["a", "\n    ", "∎", "é"]), ("ab\t\n    ·", "·∎é", ["b", "\t", "∎", "é"]),
                     ("abc\n    d", "·∎é", ["c", "d", "∎", "é"])]
    times = [js(browser, "(step.value = arguments[0], stop(), now.textContent)", k).split(", ")[1] for k in range(5)]
    assert times == ["0.000 s", "0.020 s", "0.500 s", "0.970 s", "1.000 s"]


def test_colours_tell_how_sure_it_was_and_marks_are_no_text(visit):
    browser = visit(FIRST, SECOND)
    colours = js(browser, "[...document.querySelectorAll('.draft')].map(d => getComputedStyle(d.firstChild).backgroundColor)")
    assert len(set(colours)) == 2 and all(colour.startswith("rgba") for colour in colours)
    titles = js(browser, "[...document.querySelectorAll('.draft')].map(draft => draft.firstChild.title)")
    assert titles == ["90 % sure", "25 % sure"]
    press(browser, HOME)
    assert of_class(browser, "mark") == ["·"] * 4  # PAD, by its id
    assert js(browser, "document.querySelector('.draft span').title") == "not written by the model"
    press(browser, END)
    assert of_class(browser, "mark") == [] and drafts(browser)[1] == "·∎é"  # here they are text that a model wrote


def test_lines_and_indentation_are_kept(visit):
    browser = visit(FIRST)
    style = "getComputedStyle(document.querySelector(arguments[0])).whiteSpace"
    assert {js(browser, style, where) for where in ("h1", ".draft", "td:last-child")} == {"pre-wrap"}
    boxes = js(browser, "[...document.querySelectorAll('.draft span')].map(s => [...s.getClientRects()].map(r => [r.x, r.y]))")
    (a, *_), (d, *_) = boxes[0], boxes[4]
    assert d[1] > a[1] and d[0] - a[0] > 30  # a line lower, and 4 characters to the right
    browser.find_element("tag name", "summary").click()
    high = js(browser, "[...document.querySelectorAll('td:last-child')].map(td => td.getClientRects()[0].height)")
    assert high[0] > 1.5 * high[1]


# ---- keys ----

def test_arrows_home_and_end_move_from_anywhere_and_stay_within(visit):
    browser, found = visit(FIRST, SECOND), []
    for key in (HOME, ARROW_LEFT, ARROW_RIGHT, ARROW_RIGHT, ARROW_LEFT, END, ARROW_RIGHT, ARROW_LEFT):
        press(browser, key)
        found.append(step(browser))
    assert found == [0, 0, 1, 2, 1, 4, 4, 3]
    assert js(browser, "document.activeElement.id") == "step"


def test_the_page_can_be_walked_by_tab_and_the_samples_opened_by_space(visit):
    browser, found = visit(FIRST), []
    for _ in range(3):
        press(browser, TAB)
        found.append(js(browser, "document.activeElement.id || document.activeElement.tagName"))
    assert found == ["SUMMARY", "play", "step"]
    js(browser, "document.querySelector('summary').focus()")
    press(browser, " ")
    assert js(browser, "[document.querySelector('details').open, play.textContent]") == [True, "Play"]


@pytest.mark.parametrize("how", ["space", "button", "space on the button"])
def test_it_plays_and_pauses(visit, how):
    browser = visit(FIRST, SECOND)
    if how == "space on the button":
        js(browser, "play.focus()")
    toggle = (lambda: browser.find_element("id", "play").click()) if how == "button" else (lambda: press(browser, " "))
    toggle()  # from the end: it starts again
    assert js(browser, "play.textContent") == "Pause"
    wait_for(lambda: step(browser) == 1)  # at 0.02 s of 1: after 0.16 s of 8
    toggle()
    assert js(browser, "play.textContent") == "Play" and step(browser) == 1
    assert drafts(browser) == ["awe\n    ·", "···"]


def test_it_ends_with_the_answer_and_a_screen_reader_hears_where_it_stopped_only(visit):
    browser = visit(FIRST, SECOND)
    press(browser, HOME, ARROW_RIGHT, ARROW_RIGHT)
    js(browser, "(window.heard = [], new MutationObserver(() => heard.push(said.textContent))"
                ".observe(said, {childList: true, characterData: true, subtree: true}))")
    press(browser, ARROW_RIGHT)  # at 0.97 s; the last follows after 0.24 s of 8
    wait_for(lambda: len(js(browser, "heard")) == 1)
    press(browser, " ")
    wait_for(lambda: js(browser, "play.textContent") == "Play")
    assert step(browser) == 4
    assert js(browser, "heard") == ["out/one, draft 2 of 3: ab\t\n    . out/two, draft 1 of 1: ·∎é",
                                    "out/one, draft 3 of 3: abc\n    d. out/two, draft 1 of 1: ·∎é"]
    js(browser, "(heard.length = 0, step.value = 0, stop(), heard.length = 0, toggle())")
    wait_for(lambda: step(browser) == 1)
    assert not [text for text in js(browser, "heard") if "draft 1 of 3" in text]  # it passes by in silence
    press(browser, " ")
    live = js(browser, "[...document.querySelectorAll('[aria-live], output, [role=status]')].map(e => "
                       "[e.id, e.getAttribute('aria-live')])")
    assert live == [["now", "off"], ["said", None]]
    assert js(browser, "[step.ariaLabel, document.documentElement.lang, document.title]") == ["Moment", "en",
                                                                                             "How it was written"]
    named = "[...document.querySelectorAll('section')].map(s => window[s.getAttribute('aria-labelledby')].textContent)"
    assert js(browser, named) == ["out/one", "out/two"]


# ---- what must not happen ----

def test_hostile_text_stays_text(visit):
    usual = visit(traced([["x"] * 7] * 2, samples=["x"] * 7), prompt="x")
    elements = "[...document.querySelectorAll('*')].map(e => e.tagName).sort()"
    tags = js(usual, elements)
    for prompt in HOSTILE:
        browser = visit(STRANGE, prompt=prompt)
        assert js(browser, elements) == tags and js(browser, "document.querySelector('h1').textContent") == prompt
        assert drafts(browser) == ["".join(HOSTILE[::-1])]
        press(browser, HOME)
        assert drafts(browser) == ["".join(HOSTILE)]
        assert js(browser, "document.querySelector('h2').textContent") == HOSTILE[0]
        with pytest.raises(Exception, match="no such alert"):
            browser.switch_to.alert.text  # noqa: B018


def test_the_page_may_load_and_send_nothing(visit):
    browser = visit(STRANGE)
    policy = js(browser, "document.querySelector('meta[http-equiv=Content-Security-Policy]').content")
    assert policy.startswith("default-src 'none'")
    urls = js(browser, "performance.getEntriesByType('resource').map(entry => entry.name)")
    assert all(url.startswith("data:") for url in urls)


# ---- every reader ----

@pytest.mark.parametrize("models", [[FIRST, SECOND], [STRANGE], [traced([["x" * 300], ["m" * 300]], name="n" * 300)]])
def test_on_a_phone_nothing_is_wider_than_the_screen(visit, models):
    browser = visit(*models, prompt="w" * 200)
    look(browser, 360, 640)
    js(browser, "document.querySelectorAll('details').forEach(d => { d.open = true })")
    assert js(browser, "innerWidth") == 360 == js(browser, "document.documentElement.scrollWidth")
    wide = "[...document.querySelectorAll('main *')].filter(e => e.getBoundingClientRect().right > 360).map(e => e.outerHTML)"
    assert js(browser, wide) == []
    assert js(browser, "step.getBoundingClientRect().width") >= 150  # enough to be dragged


def test_models_stand_side_by_side_where_there_is_room(visit):
    browser = visit(FIRST, SECOND)
    places = "[...document.querySelectorAll('section')].map(s => s.getBoundingClientRect().y)"
    assert len(set(js(browser, places))) == 1
    look(browser, 360)
    assert len(set(js(browser, places))) == 2


def brightness(colour):
    red, green, blue = (int(x) / 255 for x in colour[colour.index("(") + 1:-1].split(",")[:3])
    linear = [x / 12.92 if x <= 0.04045 else ((x + 0.055) / 1.055) ** 2.4 for x in (red, green, blue)]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_in_the_light_and_in_the_dark_text_can_be_read(visit, scheme):
    browser = visit(FIRST)
    look(browser, color_scheme=scheme)
    style = "getComputedStyle(document.querySelector(arguments[0]))"
    page = brightness(js(browser, style + ".backgroundColor", "body"))
    assert (page > 0.9) if scheme == "light" else (page < 0.1)
    for where in ("h1", "h2", ".soft", ".draft"):
        ink = brightness(js(browser, style + ".color", where))
        assert (max(ink, page) + 0.05) / (min(ink, page) + 0.05) >= 4.5, where  # what WCAG asks for


# ---- the picture ----

def frames(browser, seconds):
    """Return the texts that are to be seen at a time of the picture's own clock."""
    return js(browser, """(() => {
        const root = document.documentElement;
        root.pauseAnimations();
        root.setCurrentTime(arguments[0]);
        return [...document.querySelectorAll('g')].filter(g => getComputedStyle(g).visibility === 'visible')
            .map(g => [...g.querySelectorAll('text')].map(line => line.textContent));
    })()""", seconds)


def test_the_picture_moves_from_the_noise_to_the_answer_by_the_models_clocks(visit):
    browser = visit(FIRST, SECOND, ending=".svg")
    one, two = [["qwe", ""], ["awe", "    "], ["ab    ", "    "], ["abc", "    d"]], [[""], ["·∎é"]]
    two[0] = ["·"]  # nothing but PAD: one of them
    # The 9 seconds of a round are 1.25 of the slower model: drafts at 0, 0.144, 6.984, 7.2 and at 0, 3.6.
    for at, k, j in ((0, 0, 0), (0.1, 0, 0), (0.2, 1, 0), (3.5, 1, 0), (3.7, 1, 1), (7, 2, 1), (7.3, 3, 1), (8.9, 3, 1),
                     (9.05, 0, 0)):
        assert frames(browser, at) == [one[k], two[j]], at


@pytest.mark.parametrize("text", ["".join(HOSTILE), "\x00\ufffe]]>", "a" * 500])
def test_an_image_tag_shows_it_whatever_its_text(visit, browser, tmp_path, text):
    visit(traced([[text] * 2, ["b", text]], name=text), ending=".svg", prompt=text)
    assert js(browser, "document.documentElement.tagName") == "svg" and not browser.find_elements("tag name", "parsererror")
    assert not js(browser, "document.querySelectorAll('script, img').length")
    width = js(browser, "Math.max(...[...document.querySelectorAll('text')].map(t => t.getBBox().x + t.getBBox().width))")
    assert width <= 700
    (tmp_path / "readme.html").write_text("<img src=trace.svg>", encoding="utf-8")
    browser.get((tmp_path / "readme.html").as_uri())
    wait_for(lambda: js(browser, "document.images[0].complete"))
    assert js(browser, "document.images[0].naturalWidth") > 0


def test_the_picture_knows_dark_pages_and_stands_still_for_who_asked_for_it(visit):
    browser = visit(FIRST, ending=".svg")
    fills = "['rect', 'text', '.new', '.soft'].map(where => getComputedStyle(document.querySelector(where)).fill)"
    light = js(browser, fills)
    look(browser, color_scheme="dark")
    assert not set(light) & set(js(browser, fills))
    assert frames(browser, 0) == [["qwe", ""]]
    look(browser, reduced_motion="reduce")
    assert all(frames(browser, at) == [["abc", "    d"]] for at in (0, 4, 8.5))
