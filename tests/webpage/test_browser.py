"""The page in headless Chromium: what visitors type, click and see. Skipped where there is no Chromium."""

import json
from contextlib import ExitStack

import pytest
from support.browsing import CHROMIUM, DRIVER, Visitor, browser

import reftheads as rh
from reftheads.webpage import Session

pytest.importorskip("gradio", reason="needs the extra demo: Gradio")
pytest.importorskip("selenium", reason="needs the extra dev: selenium")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="needs Debian's packages chromium and chromium-driver"),
]
OWLS, TRAINS = "Tell me about owls.", "What are trains?"
NASTY = '<b>b</b> <img src=x onerror="document.title=1"> &lt;i&gt; **c** $x$ `d` <script>document.title=2</script>'
SWITCH = "#dials .node:nth-child({}) input[type=checkbox]"
RECORD = """
window.seen = []
new MutationObserver(() => {
    const said = [...document.querySelectorAll("#base .message-content")].map(e => e.innerText)
    const now = said.length == 2 ? said[1].trim() : ""
    if (now && now !== window.seen.at(-1)) window.seen.push(now)
}).observe(document.querySelector("#base"), {subtree: true, childList: true, characterData: true})
"""


@pytest.fixture(scope="module")
def learnt(new_model, words, demonstrations, tmp_path_factory) -> rh.InterventionModel:
    """A model that answers in emoji."""
    session = Session(new_model(), words, tmp_path_factory.mktemp("unused"), demonstrations, steps=80)
    assert list(session.retrain())
    return session.model


@pytest.fixture(scope="module")
def url(learnt, words, demonstrations, tmp_path_factory):
    page = rh.page(
        learnt, words, demonstrations=demonstrations, directory=tmp_path_factory.mktemp("adapters"), steps=40,
        prevent_thread_lock=True, quiet=True,
    )  # fmt: skip
    yield page.local_url
    page.close()


@pytest.fixture(scope="module")
def drivers(tmp_path_factory):
    """Two browsers, each with a profile of its own."""
    with ExitStack() as stack:
        yield [stack.enter_context(browser(tmp_path_factory.mktemp("profile"))) for _ in range(2)]


@pytest.fixture
def visitor(drivers, url) -> Visitor:
    return Visitor(drivers[0], url)


@pytest.fixture(scope="module")
def expected(learnt, words):
    """What base and edited model answer to a question."""

    def answers(question: str) -> tuple[str, str]:
        edited = rh.reply(learnt, words, [question], max_new_tokens=128)[0]
        with learnt.disable_adapter():
            return rh.reply(learnt, words, [question], max_new_tokens=128)[0], edited

    assert answers(OWLS)[0].isascii() and not any(letter.isascii() for letter in answers(OWLS)[1])
    return answers


def test_both_answers_come_word_by_word(visitor, expected):
    visitor.driver.execute_script(RECORD)
    assert visitor.ask(OWLS) == expected(OWLS)
    seen = visitor.driver.execute_script("return window.seen")
    assert len(seen) > 2 and all(new.startswith(old) for old, new in zip(seen, seen[1:], strict=False))
    assert seen[-1] == expected(OWLS)[0]
    assert visitor.texts("#question textarea") == [""]


def test_a_node_that_is_switched_off_no_longer_acts(visitor, expected):
    visitor.click(SWITCH.format(1))
    visitor.until(lambda: "emoji is off" in visitor.text("#acting"))
    visitor.click(SWITCH.format(2))
    visitor.until(lambda: "tone is off" in visitor.text("#acting"))
    assert visitor.ask(OWLS) == (expected(OWLS)[0],) * 2
    visitor.click("#anew")
    visitor.until(lambda: not visitor.said("base"))
    visitor.click(SWITCH.format(1))
    visitor.until(lambda: "emoji is on" in visitor.text("#acting"))
    assert visitor.ask(OWLS)[1] != expected(OWLS)[0]


def test_a_strength_that_is_typed_counts(visitor, learnt, words):
    visitor.type("#dials .node:nth-child(1) input[type=number]", "0.3")
    visitor.until(lambda: "emoji acts at 0.3" in visitor.text("#acting"))
    with learnt.at_strength({"emoji": 0.3}):
        assert visitor.ask(OWLS)[1] == rh.reply(learnt, words, [OWLS], max_new_tokens=128)[0]


def test_what_a_visitor_teaches_is_learnt_and_gone_after_a_reload(visitor, expected):
    visitor.type("#shown-question textarea", OWLS)
    visitor.type("#shown-answer textarea", "Hoo hoo.")
    visitor.click("#add")
    visitor.until(lambda: "Hoo hoo." in visitor.text("#demonstrations"))
    visitor.click("#retrain")
    visitor.until(lambda: "trained on 7 demonstrations" in visitor.text("#training"))
    base, taught = visitor.ask(OWLS)
    assert base == expected(OWLS)[0] and taught not in expected(OWLS)
    visitor.come()
    assert not visitor.said("base") and "Hoo hoo." not in visitor.text("#demonstrations")
    assert visitor.ask(OWLS) == expected(OWLS)


def test_two_visitors_at_once_do_not_see_each_other(visitor, drivers, url, expected):
    other = Visitor(drivers[1], url)
    visitor.click(SWITCH.format(1))
    visitor.until(lambda: "emoji is off" in visitor.text("#acting"))
    visitor.click(SWITCH.format(2))
    visitor.until(lambda: "tone is off" in visitor.text("#acting"))
    other.click("#retrain")
    for one, question in ((visitor, OWLS), (other, TRAINS)):
        one.type("#question textarea", question)
    other.until(lambda: "trained on" in other.text("#training"))
    for one in (visitor, other):
        one.click("#ask")
    for one in (visitor, other):
        one.until_answered(1)
    assert visitor.said("base") == visitor.said("edited") == [OWLS, expected(OWLS)[0]]
    assert other.said("base") == [TRAINS, expected(TRAINS)[0]]
    assert other.said("edited")[0] == TRAINS and other.said("edited")[1] != expected(TRAINS)[0]


def test_what_one_saves_another_combines(visitor, drivers, url):
    visitor.type("#name textarea", "mine")
    visitor.click("#save")
    visitor.until(lambda: "saved as mine" in visitor.text("#acting"))
    other = Visitor(drivers[1], url)
    assert other.texts("#adapters label") == ["default", "mine"]
    other.click("#adapters label:nth-child(2) input")
    other.until(lambda: "default and then mine acts" in other.text("#acting"))
    other.until(lambda: other.texts("#dials .node label span") and "mine/tone" in other.text("#dials"))
    other.click("#nodes > button")
    other.until(lambda: "mine\nnode" in other.text("#table textarea"))
    assert other.ask(OWLS)[1]


@pytest.mark.parametrize("name", ["../x", "/etc", "a/b", "..", ""])
def test_a_name_that_is_a_path_gets_a_message(visitor, name):
    visitor.type("#name textarea", name)
    visitor.click("#save")
    visitor.until(lambda: visitor.texts("#acting .bad"))
    assert "cannot be used" in visitor.text("#acting .bad")


def test_tags_are_shown_as_text_wherever_they_are_typed(visitor):
    visitor.ask(NASTY)
    assert visitor.said("base")[0] == visitor.said("edited")[0] == NASTY
    visitor.type("#shown-question textarea", NASTY)
    visitor.type("#shown-answer textarea", NASTY)
    visitor.click("#add")
    visitor.until(lambda: visitor.text("#demonstrations").count(NASTY) >= 2)
    visitor.type("#name textarea", NASTY)
    visitor.click("#save")
    visitor.until(lambda: "<b>b</b>" in visitor.text("#acting .bad"))
    assert not visitor.texts("#base img, #demonstrations img, #acting img")
    assert visitor.driver.title == "reftheads"


@pytest.mark.parametrize(
    ("question", "message"), [(" ", "is empty"), ("a" * 100_000, "100,000 letters"), ("a\x01b", "U+0001")],
    ids=["empty", "long", "control"],
)  # fmt: skip
def test_a_hostile_question_gets_a_message(visitor, question, message, expected):
    visitor.type("#question textarea", question)
    visitor.click("#ask")
    visitor.until(lambda: message in visitor.text("#notice .bad"))
    assert visitor.ask(OWLS) == expected(OWLS)


def test_nothing_is_loaded_from_elsewhere(drivers, url):
    drivers[0].get_log("performance")
    visitor = Visitor(drivers[0], url)
    visitor.ask(OWLS)
    events = [json.loads(entry["message"])["message"] for entry in drivers[0].get_log("performance")]
    asked = [event["params"]["request"]["url"] for event in events if event["method"] == "Network.requestWillBeSent"]
    assert len(asked) > 10 and all(place.startswith((url, "data:", "blob:")) for place in asked)
