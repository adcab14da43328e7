"""The page in headless Chromium: uploads, slices, a dialogue with an expert, keys, accessibility."""

from __future__ import annotations

import hashlib
import shutil
import time

import nibabel
import numpy as np
import pytest

from tests.serving.conftest import KEY, serve
from tests.serving.test_page import calls_organs  # noqa: F401
from vilam3_jax.datasets import package_index
from vilam3_jax.datasets.package_index import Member
from vilam3_jax.datasets.samples import default_cache
from vilam3_jax.errors import UserError
from vilam3_jax.inference import agent
from vilam3_jax.serving import app, fetch_page
from vilam3_jax.serving.app import PAGE
from vilam3_jax.serving.samples import samples_of

sync_api = pytest.importorskip("playwright.sync_api", reason="needs playwright: pip install -e .[browser]")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium, such as Debian's package chromium"),
]
AXE_SHA256 = "39bed7d72308f6d620789c169d699bfd7e8da80f65b545821a6b2215c3e83107"
AXE = Member(
    "package/axe.min.js", "e9e5863c33a874f09bc01acd9234b7e3c871479f5eef8802fa582544465e6d01", 559_816
)
WIDE, PHONE = {"width": 1400, "height": 900}, {"width": 390, "height": 844}
# Every text that an answer had.
RECORDER = """
window.answers = [];
new MutationObserver(() => {
  const answer = [...document.querySelectorAll(".answer:not(.waiting)")].at(-1);
  if (answer && window.answers.at(-1) !== answer.textContent) window.answers.push(answer.textContent);
}).observe(document, { childList: true, subtree: true, characterData: true });
"""


@pytest.fixture(scope="module")
def browser():
    with sync_api.sync_playwright() as playwright:
        flags = ["--no-sandbox", "--use-gl=angle", "--use-angle=swiftshader", "--enable-unsafe-swiftshader"]
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=flags)
        yield browser
        browser.close()


@pytest.fixture
def open_page(browser, server):
    """Opens the page; at the end, nothing may have gone wrong in it."""
    wrong, contexts = [], []

    def opened(url=server.url, size=WIDE, script="", **options):
        context = browser.new_context(viewport=size, accept_downloads=True, **options)
        contexts.append(context)
        context.add_init_script(RECORDER)
        if script:
            context.add_init_script(script)
        page = context.new_page()
        page.set_default_timeout(60_000)
        page.on("console", lambda line: wrong.append(line.text) if line.type == "error" else None)
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.goto(f"{url}/page/")
        return page

    yield opened
    for context in contexts:
        context.close()
    # Chromium reports refusals of the server, too.
    assert not [text for text in wrong if "Failed to load resource" not in text], wrong


@pytest.fixture
def slow_expert(monkeypatch):
    """The expert takes a while, so that the page can be seen to wait."""
    plain = agent.AnnotationProvider.annotate

    def annotate(*args):
        time.sleep(1.0)
        return plain(*args)

    monkeypatch.setattr(agent.AnnotationProvider, "annotate", annotate)


def shown(page, text):
    page.wait_for_selector(f'#canvas[data-shown="{text}"]')


def upload(page, path, text):
    page.set_input_files("#file", path)
    shown(page, text)


def ask(page, question):
    page.get_by_label("Your question").fill(question)
    with page.expect_request("**/v1/chat/completions") as sent:
        page.keyboard.press("Enter")
    return sent.value.post_data_json


def done(page):
    page.wait_for_selector('#log[aria-busy="false"] .exchange:last-of-type .notes')


def colours(page):
    """Of the centre of the canvas and the number of its coloured pixels."""
    return page.evaluate(
        """() => {
          const canvas = document.getElementById("canvas");
          const data = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data;
          let coloured = 0;
          for (let at = 0; at < data.length; at += 4) coloured += data[at] > data[at + 1] + 20;
          return { coloured, all: data.length / 4 };
        }"""
    )


@pytest.fixture
def asked(open_page, world, calls_organs, slow_expert):  # noqa: F811
    """A page with a CT and an answer about it."""

    def asked(**options):
        page = open_page(**options)
        upload(page, world.volume, "axial slice 8")
        page.get_by_label("Modality").select_option("CT")
        body = ask(page, "Is the liver visible?")
        return page, body

    return asked


def test_a_ct_is_looked_at_and_asked_about(asked, server):
    page, body = asked()
    (message,) = body["messages"]
    part = message["content"][0]
    assert part["vilam3"] == {"axis": "axial", "slice": 8, "modality": "CT"}
    page.wait_for_selector(".steps .running >> text=ORGANS(organs) is running…")
    page.wait_for_selector(".steps .done >> text=liver, 7.7 ml")
    shown(page, "axial slice 8 mask")
    assert 0.05 < colours(page)["coloured"] / colours(page)["all"] < 0.5
    done(page)
    answer = page.locator(".answer").inner_text()
    texts = page.evaluate("window.answers")
    assert answer and texts[-1] == answer and len(texts) > 2, "it was streamed"
    assert page.locator("#legend").inner_text() == "liver, 7.7 ml"
    assert page.locator("figure img").first.evaluate("image => image.naturalWidth > 0")
    page.get_by_label("Show the mask").uncheck()
    shown(page, "axial slice 8")
    assert colours(page)["coloured"] == 0
    page.get_by_label("Show the mask").check()
    page.get_by_role("button", name="Go to its largest slice").click()
    shown(page, "axial slice 2 mask")
    assert "so far: axial slice 8" in page.locator("#attach-text").inner_text()
    assert not page.get_by_role("heading", name="Behind the scenes").is_visible()
    page.get_by_label("Behind the scenes").check()
    assert page.locator(".behind").inner_text().startswith("Behind the scenes")
    assert "<ORGANS(organs)>" in page.locator(".behind pre").nth(2).inner_text()

    assert body["store"] and "previous" not in body["vilam3"]
    follow = ask(page, "Are you sure?")
    assert follow["messages"] == [{"role": "user", "content": "Are you sure?"}]
    assert follow["vilam3"]["previous"].startswith("chatcmpl-")
    done(page)
    assert page.locator(".exchange").count() == 2
    known = page.locator(".exchange").nth(1).locator(".known")
    assert "Known from before: ORGANS(organs)" in known.inner_text() and "liver, 7.7 ml" in known.inner_text()
    known.get_by_role("button", name="Show this mask").click()
    shown(page, "axial slice 2 mask")
    assert follow["vilam3"]["previous"] not in server.service.dialogues, "only the last answer is kept"
    with page.expect_download() as download:
        page.get_by_role("button", name="Download transcript").click()
    text = download.value.path().read_text()
    assert "Not for clinical use" in text and "Question about axial slice 8: Is the liver visible?" in text
    assert "Expert ORGANS(organs): liver 7.7 ml" in text and "Question: Are you sure?" in text
    for button, name in (
        ("Download mask", "mask-organs-organs.nii.gz"),
        ("Download overlay", "overlay-axial-2.png"),
    ):
        with page.expect_download() as download:
            page.get_by_role("button", name=button).click()
        assert download.value.suggested_filename == name and download.value.path().stat().st_size > 100


def test_slices_by_keys_wheel_and_slider(open_page, world, monkeypatch):
    monkeypatch.setattr(app, "NIIVUE", "nowhere.js")
    page = open_page()
    upload(page, world.volume, "axial slice 8")
    assert "NiiVue is not installed" in page.locator("#facts").inner_text()
    assert not page.locator("#view").is_visible()
    assert not page.locator("#window").is_visible(), "windows are for CT"
    page.get_by_label("Modality").select_option("CT")
    page.locator("#window").select_option("lung")
    stage = page.locator("#stage")
    stage.focus()
    for key, index in (
        ("ArrowUp", 9),
        ("ArrowRight", 10),
        ("ArrowDown", 9),
        ("Home", 0),
        ("PageUp", 10),
        ("End", 15),
    ):
        page.keyboard.press(key)
        shown(page, f"axial slice {index}")
    page.keyboard.press("2")
    shown(page, "coronal slice 10")
    stage.hover()
    page.mouse.wheel(0, -60)
    shown(page, "coronal slice 11")
    page.mouse.wheel(0, 120)
    shown(page, "coronal slice 10")
    page.locator("#index").fill("3")
    shown(page, "coronal slice 3")
    page.get_by_role("radio", name="Sagittal").check(force=True)
    shown(page, "sagittal slice 12")
    page.get_by_label("Modality").select_option("MR")
    page.wait_for_selector("#window-field", state="hidden")
    for _ in range(30):
        stage.press("ArrowUp")
    shown(page, "sagittal slice 23")


def test_a_film_and_files_that_cannot_be_read(open_page, world, tmp_path):
    page = open_page()
    upload(page, world.film, "uploaded image")
    assert not page.locator("#slider").is_visible()
    bad = tmp_path / "notes.pdf"
    bad.write_bytes(b"%PDF-1.7 nothing")
    page.set_input_files("#file", bad)
    page.wait_for_selector("#problem >> text=PDF")
    drop = """([name, bytes]) => {
      const transfer = new DataTransfer();
      transfer.items.add(new File([new Uint8Array(bytes)], name));
      const event = new DragEvent("drop", { bubbles: true, dataTransfer: transfer });
      document.getElementById("drop").dispatchEvent(event);
    }"""
    page.evaluate(drop, ["scan.nii.gz", list(world.volume.read_bytes())])
    shown(page, "axial slice 8")
    assert not page.locator("#problem").is_visible()


def test_samples_and_sampling(open_page, assistant, world, tmp_path):
    for name, path in (("chest", world.film), ("liver", world.volume)):
        shutil.copy(path, tmp_path / (name + path.name.removeprefix(path.name.partition(".")[0])))
    with serve(assistant, model="tiny", max_new_tokens=8, samples=samples_of(str(tmp_path))) as running:
        page = open_page(url=running.url)
        samples = page.get_by_role("group", name="Samples:")
        samples.get_by_role("button", name="liver").click()
        shown(page, "axial slice 8")
        assert "liver: NIfTI volume" in page.locator("#upload").inner_text()
        samples.get_by_role("button", name="chest").click()
        shown(page, "uploaded image")
        eventually_one_file(running)
        page.locator("summary", has_text="Sampling").click()
        for label, value in (
            ("Temperature", "0.7"),
            ("Top p", "0.9"),
            ("Seed", "5"),
            ("Maximum tokens", "3"),
        ):
            page.get_by_label(label).fill(value)
        body = ask(page, "What is it?")
        assert (body["temperature"], body["top_p"], body["seed"], body["max_tokens"]) == (0.7, 0.9, 5, 3)
        done(page)
        page.get_by_label("Top p").fill("7")
        page.get_by_label("Your question").fill("And now?")
        page.keyboard.press("Enter")
        assert page.locator(".exchange").count() == 1, "values out of range are not sent"


def eventually_one_file(running):
    until = time.monotonic() + 20
    while len(running.service.store) != 1:
        assert time.monotonic() < until, "the page deletes what it no longer shows"
        time.sleep(0.05)


def test_sequences_of_one_head(open_page, world, tmp_path):
    page = open_page()
    paths = [tmp_path / f"case_{name}.nii.gz" for name in ("t1gd", "flair", "t2")]
    for path in paths:
        shutil.copy(world.volume, path)
    upload(page, paths[0], "axial slice 8")
    page.get_by_label("Modality").select_option("MR")
    page.locator("#index").fill("5")
    shown(page, "axial slice 5")
    assert not page.locator("#sequence-list").is_visible()
    for count, path in enumerate(paths[1:], start=2):
        page.set_input_files("#more", path)
        page.wait_for_selector(f"#sequence-list li:nth-child({count}):last-child")
    shown(page, "axial slice 5")
    rows = page.locator("#sequence-list li")
    assert [rows.nth(n).locator("select").input_value() for n in range(3)] == ["t1c", "flair", "t2"]
    rows.nth(2).locator("select").select_option("flair")
    assert [rows.nth(n).locator("select").input_value() for n in range(3)] == ["t1c", "t2", "flair"]
    rows.nth(0).get_by_role("button", name="case_t1gd.nii.gz", exact=True).click()
    page.wait_for_selector('#sequence-list li:nth-child(1) [aria-pressed="true"]')
    rows.nth(1).get_by_role("button", name="Remove").click()
    page.wait_for_selector("#sequence-list li:nth-child(2):last-child")
    body = ask(page, "Is there a brain tumor?")
    parts = [part["vilam3"] for part in body["messages"][0]["content"][:-1]]
    view = {"axis": "axial", "slice": 5, "modality": "MR"}
    assert parts == [{**view, "role": "t1c"}, {**view, "role": "flair"}]
    done(page)
    assert "of 2 sequences" in page.locator(".asked").inner_text()
    page.screenshot(path=tmp_path / "sequences.png", full_page=True)
    other = tmp_path / "other_t1.nii.gz"
    volume = nibabel.load(world.volume)
    nibabel.save(nibabel.Nifti1Image(np.asarray(volume.dataobj)[:, :, :8], volume.affine), other)
    page.set_input_files("#more", other)
    page.wait_for_selector("#problem >> text=24 × 20 × 16 voxels")
    assert rows.count() == 2


def test_an_answer_is_cancelled(asked, server):
    page, _ = asked()
    page.wait_for_selector(".steps .running")
    page.get_by_role("button", name="Cancel").click()
    page.wait_for_selector(".exchange .problem >> text=Cancelled.")
    assert page.get_by_label("Your question").input_value() == "Is the liver visible?"
    ask(page, "And now?")
    done(page)
    assert server.service.load == 0


def test_the_key_is_asked_for(open_page, assistant):
    with serve(assistant, model="tiny", keys=(KEY,)) as running:
        page = open_page(url=running.url)
        page.get_by_label("API key").fill("wrong")
        page.keyboard.press("Enter")
        page.wait_for_selector("#problem >> text=does not know this key")
        page.get_by_label("API key").fill(KEY)
        page.get_by_role("button", name="Use this key").click()
        page.wait_for_selector("#model >> text=Model: tiny")
        assert not page.locator("#key-form").is_visible()
        assert (
            page.evaluate("localStorage.length + sessionStorage.length") == 0 and not page.context.cookies()
        )
        assert ask(page, "What is it?")["messages"]
        done(page)


@pytest.fixture(scope="module")
def axe():
    """The source of axe-core."""
    archive = default_cache() / "axe-core-4.11.0.tgz"
    archive.parent.mkdir(parents=True, exist_ok=True)
    if not archive.exists():
        try:
            fetch_page.pack("axe-core", "4.11.0", archive.parent)
        except UserError as error:
            pytest.skip(f"axe-core cannot be fetched: {error}")
    assert hashlib.sha256(archive.read_bytes()).hexdigest() == AXE_SHA256
    ((_, source),) = package_index.read_members(archive, [AXE])
    return source.decode()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", [WIDE, PHONE], ids=["wide", "phone"])
def test_accessibility(asked, axe, tmp_path, size, scheme):
    page, _ = asked(size=size, color_scheme=scheme, script=axe)
    done(page)
    page.get_by_label("Behind the scenes").check()
    page.locator("summary", has_text="Sampling").click()
    page.screenshot(path=tmp_path / f"page-{size['width']}-{scheme}.png", full_page=True)
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth"), "nothing is cut off"
    assert page.locator(".warning").is_visible()
    found = page.evaluate("axe.run()")
    serious = [
        (one["id"], [node["html"] for node in one["nodes"]])
        for one in found["violations"]
        if one["impact"] in ("serious", "critical")
    ]
    assert not serious and found["passes"]


@pytest.mark.skipif(not (PAGE / "vendor/niivue.js").is_file(), reason="NiiVue is not there: make page")
def test_niivue_shows_the_volume(asked, tmp_path):
    page, _ = asked()
    done(page)
    page.get_by_role("radio", name="3-D").check(force=True)
    page.wait_for_selector('#niivue[data-shown="volume mask"]')
    page.screenshot(path=tmp_path / "niivue.png")
    assert not page.locator("#problem").is_visible()
    page.get_by_role("radio", name="Slices").check(force=True)
    shown(page, "axial slice 8 mask")
