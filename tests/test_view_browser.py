"""The viewer's page in a real Chromium: it is driven by keys and mouse, and hostile output stays text.

Every test ends with nothing asked for but the page itself, and no error told. Skipped where no Chromium is installed.
"""

import json

import pytest

import browser
import view_run
from delib import view
from delib.records import Checks

pytestmark = pytest.mark.skipif(browser.available() is None, reason="no Chromium is installed")

HOSTILE = (
    "</script><script>window.hacked = 1</script><img src=x onerror='window.hacked = 2'>"
    "<a href='javascript:window.hacked = 3'>click</a><iframe src='https://example.org/'></iframe>"
    "<style>@import 'https://example.org/x.css'</style>{{7*7}}${7*7} \u202egnp.exe\u2066 \x00\x1b[31m\x07 \U000e0041"
)
SHOWN = ("<script>window.hacked = 1</script>", "[U+202E]gnp.exe[U+2066]", "\u2400\u241b[31m\u2407", "[U+E0041]")
LONG_LINE = "w" * 60_000
MANY = (9_000, 500)
"""Training and held-out prompts of the large run: with two arms 10,000 samples, and 9,500 rows."""


@pytest.fixture(scope="module")
def chromium():
    running = browser.Browser()
    yield running
    running.close()


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return view.write(view_run.small(tmp_path_factory.mktemp("view") / "run"))


@pytest.fixture
def page(chromium, made):
    """The small run's page, open; afterwards nothing was asked for but it."""
    chromium.size(1280, 800)
    chromium.errors.clear()
    chromium.open(made)
    yield chromium
    assert set(chromium.requests) == {made.resolve().as_uri()}
    assert chromium.errors == []


def texts(page, selector):
    return page.ask(f"[...document.querySelectorAll({json.dumps(selector)})].map(e => e.textContent)")


def listed(page):
    return page.until("document.getElementById('many')?.textContent")


def choose(page, name, value):
    page.ask(
        f"(() => {{ const e = document.querySelector('select[name={name}]'); e.value = {json.dumps(value)};"
        " e.dispatchEvent(new Event('change')); })()"
    )


def test_the_overview_answers_at_a_glance(page):
    assert texts(page, ".card .big")[0] == "Yes"
    page.until("document.querySelectorAll('.plot svg').length >= 4")
    assert texts(page, "svg .name") == ["base", "SFT", "SFT + RL"]
    assert any("Should decline" in t for t in texts(page, "figcaption"))
    told = page.ask("document.querySelector('main').innerText")
    assert "refusals of plain prompts rose" in told and "second judge, probe" in told
    page.click(".bar .part.seen-r")
    page.until("location.hash.startsWith('#/samples?')")
    assert listed(page).endswith("of 64 prompts")
    assert page.ask("document.querySelector('select[name=whose]').value") != ""


def test_search_finds_prompts_and_answers(page):
    page.press("/")
    page.until("document.activeElement.id === 'search'")
    page.write_text("payslip NUMBER")
    page.until("document.getElementById('many').textContent.startsWith('21 of 64')")
    assert all("payslip" in t.lower() for t in texts(page, ".row:not([hidden]) .words"))
    page.press("Escape")
    page.until("document.getElementById('many').textContent.startsWith('64 of 64')")
    page.until("document.getElementById('reading').textContent === ''")
    page.write_text("advisers colleague")  # only answers have these words
    page.until("document.getElementById('many').textContent.startsWith('11 of 64')")
    page.write_text(" nowhere")
    page.until("document.getElementById('many').textContent.startsWith('0 of 64')")
    assert page.ask("!document.querySelector('.list .empty').hidden")


def test_filters_narrow_and_stand_in_the_address(page):
    page.ask("location.hash = '#/samples'")
    assert listed(page) == "64 of 64 prompts"
    choose(page, "split", "heldout")
    choose(page, "required", "refuse")
    assert listed(page) == "12 of 64 prompts"
    choose(page, "whose", "base")
    choose(page, "verdict", "c")
    assert listed(page) == "12 of 64 prompts"
    choose(page, "verdict", "+")
    assert listed(page) == "0 of 64 prompts"
    page.ask("location.hash = '#/samples?dropped=low+score%3A+style'")
    page.until("document.getElementById('many').textContent === '4 of 64 prompts'")
    assert "dropped: low score: style" in texts(page, ".row .about")[0]
    page.ask("location.hash = '#/samples?changed=worse&from=base&to=sft'")
    page.until("document.getElementById('many').textContent === '18 of 64 prompts'")
    choose(page, "to", "rl")
    assert listed(page) == "1 of 64 prompts"
    assert page.ask("location.hash") == "#/samples?changed=worse"


def test_keys_go_through_the_list_into_a_prompt_and_back(page):
    page.press("4")
    page.until("document.querySelector('.row')")
    for key in ("ArrowDown", "ArrowDown", "j", "ArrowUp"):
        page.press(key)
    picked = page.until("document.querySelector('.row[aria-selected=true] .about')?.textContent")
    assert picked.startswith("heldout-savings-2 ")
    page.press("Enter")
    page.until("document.title.endsWith('· heldout-savings-2') && location.hash === '#/prompt/heldout-savings-2'")
    page.press("ArrowRight")
    page.until("document.title.endsWith('· heldout-loan-3') && location.hash === '#/prompt/heldout-loan-3'")
    page.press("ArrowLeft")
    page.until("document.title.endsWith('· heldout-savings-2') && location.hash === '#/prompt/heldout-savings-2'")
    page.press("Escape")
    page.until("location.hash === '#/samples'")
    picked = page.until("document.querySelector('.row[aria-selected=true] .about')?.textContent")
    assert picked.startswith("heldout-savings-2 ")
    page.press("End")
    page.until("document.querySelector('.row[aria-selected=true] .about')?.textContent?.startsWith('train-')")
    page.press("?")
    assert page.until("document.getElementById('help').open")
    page.press("Escape")
    page.until("!document.getElementById('help').open")
    page.press("5")
    page.until("document.querySelectorAll('.clause').length === 6")
    page.ask("location.hash = '#/toString'")  # an address that is none
    page.until("document.querySelector('.cards')")


def test_a_prompts_life_and_its_arms_side_by_side(page):
    page.ask("location.hash = '#/prompt/heldout-pick-0'")
    page.until("document.querySelectorAll('.arm').length === 3")
    assert texts(page, ".arm .answer") == [view_run.SAYS[k] for k in ("comply", "refuse", "refuse")]
    lefts = page.ask("[...document.querySelectorAll('.arm')].map(e => Math.round(e.getBoundingClientRect().top))")
    assert len(set(lefts)) == 1  # in one row
    page.click(".toggles button[data-arm=sft]")
    page.until("document.querySelectorAll('.arm').length === 2")
    assert page.ask("[...document.querySelectorAll('.arm')].map(e => e.dataset.arm)") == ["base", "rl"]
    page.click(".arm .fold summary")
    page.until("document.querySelector('.fold[open] .text')?.textContent.includes('user: Which share')")
    page.ask("location.hash = '#/prompt/train-pick-0'")
    page.until("document.querySelector('.fate')")
    assert texts(page, "main h2") == ["Asked", "Written by the teacher", "Tried during RL"]
    assert texts(page, ".fate") == ["✕ Dropped by the filter: low score: style"]
    page.ask("location.hash = '#/prompt/train-share-1'")
    page.until("document.querySelector('.fate.good')")
    assert "Trained on" in texts(page, "h2")


def test_the_spec_tells_its_coverage(page):
    page.ask("location.hash = '#/spec/F1'")
    page.until("document.querySelector('.clause.picked')")
    card = page.ask("document.querySelector('#clause-F1').innerText")
    assert "5 training" in card and "6 held-out" in card
    rows = page.ask(
        "[...document.querySelectorAll('#clause-F1 tbody tr')].map(r => [...r.cells].map(c => c.textContent))"
    )
    assert rows[0][:3] == ["teacher", "–", "4 of 4"]
    assert rows[1][:3] == ["base", "0 of 6", "6 of 6"] and rows[3][:2] == ["SFT + RL", "6 of 6"]


def test_light_dark_and_narrow(page):
    back = "getComputedStyle(document.body).backgroundColor"
    assert page.ask(back) == "rgb(255, 255, 255)"
    page.size(1280, 800, dark=True)
    page.until(f"{back} === 'rgb(20, 24, 29)'")
    page.press("t")
    page.until(f"{back} === 'rgb(255, 255, 255)'")
    page.press("t")
    page.press("t")
    page.size(390, 800)
    for place in ("overview", "figures", "training", "samples", "spec", "prompt/heldout-pick-0"):
        page.ask(f"location.hash = '#/{place}'")
        page.until(f"location.hash === '#/{place}'")
        wide = page.ask("new Promise(r => setTimeout(() => r(document.documentElement.scrollWidth), 100))")
        assert wide <= 390, place


def test_hostile_output_stays_text(chromium, tmp_path):
    asked = view_run.prompt(0, "heldout", HOSTILE).model_copy(
        update={"checks": Checks(max_words=30, contains=["<img src=x onerror='window.hacked = 6'>"])}
    )
    long = view_run.prompt(1, "heldout", LONG_LINE)
    turned = view_run.prompt(2, "heldout", "\u05d0\u05d1 right to left \u202e")
    rows = [view_run.sample(p, "comply", "base", text=p.messages[0].content) for p in (asked, long, turned)]
    rows[0].verdicts[0] = rows[0].verdicts[0].model_copy(update={"reason": HOSTILE, "judge": HOSTILE})
    file = view.write(view_run.make(tmp_path / "run", [], [asked, long, turned], {"base": rows}))
    chromium.size(1280, 800)
    chromium.errors.clear()
    chromium.open(file)
    chromium.ask("location.hash = '#/samples'")
    chromium.until("document.querySelectorAll('.row').length >= 3")
    for prompt in (asked, long, turned):
        chromium.ask(f"location.hash = '#/prompt/{prompt.id}'")
        chromium.until(f"document.querySelector('h1')?.textContent === '{prompt.id}'")
        chromium.ask("document.querySelectorAll('main details').forEach(d => { d.open = true; })")
        if prompt is asked:
            seen = chromium.until("document.querySelector('.turn .text').textContent")
            facts = chromium.ask("document.querySelector('main').textContent")
            assert "by rule: max_words: 30" in facts and 'by rule: contains: "<img src=x' in facts
            assert all(part in seen for part in SHOWN) and "\u202e" not in seen and "\x1b" not in seen
        assert chromium.ask("document.documentElement.scrollWidth") <= 1280
    assert chromium.until("document.querySelector('.turn .text').getAttribute('dir')") == "auto"
    chromium.ask(f"location.hash = '#/prompt/{long.id}'")
    chromium.until(f"document.querySelector('h1')?.textContent === '{long.id}'")
    chromium.click(".turn .more")
    assert chromium.until("document.querySelector('.turn .text').textContent.length") == len(LONG_LINE)
    assert (
        chromium.ask("document.querySelectorAll('main img, main iframe, main a[href^=javascript], main script').length")
        == 0
    )
    assert chromium.ask("window.hacked") is None
    assert set(chromium.requests) == {file.resolve().as_uri()} and chromium.errors == []
    # The policy of the page holds too, should a text ever become markup.
    chromium.ask(
        "document.body.insertAdjacentHTML('beforeend', '<img src=https://example.org/x.png onerror=\"hacked = 4\">')"
    )
    chromium.ask(
        "document.body.append(Object.assign(document.createElement('script'), {textContent: 'window.hacked = 5'}))"
    )
    assert chromium.ask("fetch('https://example.org/').then(() => 'went', () => 'stopped')") == "stopped"
    assert chromium.ask("window.hacked") is None


SCROLL = """new Promise((resolve) => {
  const rows = document.getElementById('rows');
  let left = 30, far = 0, most = 0;
  const frame = () => {
    rows.scrollTop = far += 977;
    rows.dispatchEvent(new Event('scroll'));
    most = Math.max(most, document.querySelectorAll('*').length);
    if (left -= 1) requestAnimationFrame(frame);
    else resolve(most);
  };
  requestAnimationFrame(frame);
})"""

IN_SIGHT = """(() => {
  const list = document.getElementById('rows').getBoundingClientRect();
  return [...document.querySelectorAll('.row:not([hidden])')]
    .map((e) => [e.getBoundingClientRect(), e.querySelector('.about').textContent.split(' · ')[0]])
    .filter(([at]) => at.bottom > list.top + 1 && at.top < list.bottom - 1)
    .sort(([one], [two]) => one.top - two.top)
    .map(([, id]) => id);
})()"""


def jump(chromium, number):
    """The rows in sight, from the top, once the list is scrolled to a row by its number."""
    return chromium.ask(
        f"""new Promise((resolve) => {{
          const rows = document.getElementById('rows');
          rows.scrollTop = {number} * document.querySelector('.row').offsetHeight;
          requestAnimationFrame(() => requestAnimationFrame(() => resolve({IN_SIGHT})));
        }})"""
    )


def test_of_ten_thousand_samples_only_those_in_sight_are_on_the_page(chromium, tmp_path):
    """The elements stay as few however far the list is scrolled, and the rows in sight are those of that place."""
    train, held = MANY
    asked = [view_run.prompt(n, "heldout") for n in range(held)]
    learnt = [view_run.prompt(n, "train") for n in range(train)]
    answers = {arm: [view_run.sample(p, "refuse", arm) for p in asked] for arm in ("base", "sft")}
    file = view.write(view_run.make(tmp_path / "run", learnt, asked, answers))
    chromium.size(1280, 800)
    chromium.open(file, "#/samples")
    assert listed(chromium) == "9,500 of 9,500 prompts"
    assert chromium.ask(SCROLL) < 600
    ids = [p.id for p in [*asked, *learnt]]
    for number in (7000, 3, 9000, 499):
        seen = jump(chromium, number)
        assert len(seen) > 8 and seen == ids[number : number + len(seen)]
    assert chromium.ask("document.querySelectorAll('*').length") < 600
    chromium.until("document.getElementById('reading').textContent === ''")
    chromium.press("/")
    chromium.until("document.activeElement.id === 'search'")
    chromium.write_text("number 4242")
    chromium.until("document.getElementById('many').textContent.startsWith('1 of')")
    assert set(chromium.requests) == {file.resolve().as_uri()}


def test_without_a_mouse_a_category_opens_and_the_skip_link_keeps_the_view(page):
    page.until("document.querySelector('a.hit')")
    page.ask("document.querySelector('a.hit').focus()")
    page.press("Enter")
    page.until("location.hash.startsWith('#/samples?')")
    page.until("document.querySelector('select[name=category]')?.value")
    page.ask("document.querySelector('.skip').focus()")
    page.press("Enter")
    page.until("document.activeElement.id === 'main'")
    assert page.ask("location.hash").startswith("#/samples?")
