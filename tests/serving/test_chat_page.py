"""The chat page in a real browser."""

import shutil
import time

import pytest
from helpers.served import chat_model, chat_tokenizer, engine_of, scripted, served

from tessera import build_byte_tokenizer

pytest.importorskip("selenium")
from selenium import webdriver  # noqa: E402
from selenium.webdriver.common.by import By  # noqa: E402
from selenium.webdriver.common.keys import Keys  # noqa: E402
from selenium.webdriver.support.ui import WebDriverWait  # noqa: E402

pytestmark = pytest.mark.browser

ATTACK = '<img src=x onerror="document.title=1"><script>document.title=2</script>'
ANSWER = f"""<think>
Let me see.
</think>
# Tiles
A **bold** `word` and {ATTACK}

- one
- two

```
{ATTACK}
```"""


@pytest.fixture(scope="module")
def tokenizer():
    return chat_tokenizer()


@pytest.fixture
def browser():
    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium") or ""
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--window-size=1000,800"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options, webdriver.ChromeService(shutil.which("chromedriver")))
    yield driver
    driver.quit()


def until(browser, condition, seconds: float = 20):
    return WebDriverWait(browser, seconds, 0.05).until(lambda _: condition())


def send(browser, text: str) -> None:
    box = browser.find_element(By.ID, "message")
    box.send_keys(text)
    until(browser, lambda: browser.find_element(By.ID, "send").is_enabled())
    box.send_keys(Keys.ENTER)


def words(browser) -> list[str]:
    return [element.text for element in browser.find_elements(By.CSS_SELECTOR, ".turn .words")]


def answered(browser) -> bool:
    return browser.find_element(By.ID, "send").get_attribute("aria-label") == "Send"


def errors(browser) -> list[str]:
    return [entry["message"] for entry in browser.get_log("browser") if entry["level"] == "SEVERE"]


def test_it_sends_receives_and_renders_without_trusting_anything(browser, tokenizer):
    speaker = scripted(tokenizer(ANSWER)["input_ids"], seconds=0.002)
    with engine_of(speaker, tokenizer) as engine, served(engine, max_new_tokens=300) as url:
        browser.get(url)
        until(browser, lambda: browser.find_element(By.ID, "name").text == "tiny")
        send(browser, f"Hello {ATTACK}")
        until(browser, lambda: len(words(browser)) == 2 and "two" in words(browser)[1] and answered(browser))
        question, answer = words(browser)
        assert question == f"Hello {ATTACK}"
        assert answer.startswith("Tiles\nA bold word and " + ATTACK) and answer.endswith(ATTACK)
        found = {
            tag: [element.text for element in browser.find_elements(By.CSS_SELECTOR, f".assistant {tag}")]
            for tag in ("h3", "strong", "code", "li", "pre", "img", "script")
        }
        assert found == {
            "h3": ["Tiles"],
            "strong": ["bold"],
            "code": ["word", ATTACK],
            "li": ["one", "two"],
            "pre": [ATTACK],
            "img": [],
            "script": [],
        }
        assert browser.title == "tiny · Tessera"
        thoughts = browser.find_element(By.CSS_SELECTOR, "details.thoughts")
        assert thoughts.get_attribute("open") is None
        assert thoughts.find_element(By.TAG_NAME, "div").get_attribute("textContent") == "Let me see."
        assert "tokens/s" in browser.find_element(By.CSS_SELECTOR, ".meta").text
        requests = browser.execute_script("return performance.getEntries().map((entry) => entry.name)")
        requests = [name for name in requests if ":" in name]
        assert requests and all(name.startswith((url, "data:")) for name in requests), requests
        assert errors(browser) == []


def test_the_policy_stops_other_origins_and_other_scripts(browser, tokenizer):
    with engine_of(chat_model(), tokenizer) as engine, served(engine) as url, served(engine) as elsewhere:
        browser.get(url)
        until(browser, lambda: browser.find_element(By.ID, "name").text == "tiny")
        script = """
            const [elsewhere, done] = arguments;
            const element = document.createElement("script");
            element.textContent = "document.title = 'run'";
            document.body.append(element);
            const request = fetch(elsewhere + "/health", {mode: "no-cors"});
            request.then(() => done("reached"), () => done("stopped"));
        """
        assert browser.execute_async_script(script, elsewhere) == "stopped"
        assert browser.title == "tiny · Tessera"
        assert any("Content Security Policy" in message for message in errors(browser))


def test_the_conversation_goes_on_stops_and_starts_anew(browser, tokenizer):
    with engine_of(scripted(b"word " * 60, 0.05), tokenizer) as engine:
        with served(engine, max_new_tokens=300) as url:
            browser.get(url)
            until(browser, lambda: browser.find_element(By.ID, "name").text == "tiny")
            box = browser.find_element(By.ID, "message")
            box.send_keys("one", Keys.SHIFT, Keys.ENTER, Keys.NULL, "two")
            assert words(browser) == [] and box.get_attribute("value") == "one\ntwo"
            box.send_keys(Keys.ENTER)
            until(browser, lambda: len(words(browser)) == 2 and "word word" in words(browser)[1])
            assert not answered(browser)
            browser.find_element(By.ID, "send").click()
            until(browser, lambda: answered(browser))
            assert "stopped" in browser.find_element(By.CSS_SELECTOR, ".meta").text
            deadline = time.monotonic() + 3
            while engine.load()["running"] and time.monotonic() < deadline:
                time.sleep(0.02)
            assert engine.load()["running"] == 0, "the engine went on"
            sent = []
            submit = engine.submit
            engine.submit = lambda requests, deliver: (sent.extend(requests), submit(requests, deliver))[1]
            browser.find_element(By.ID, "toggle").click()
            browser.find_element(By.ID, "system").send_keys("Be kind.")
            browser.find_element(By.ID, "tokens").send_keys("12")
            send(browser, "three")
            until(browser, lambda: len(words(browser)) == 4 and answered(browser) and words(browser)[3])
            prompt = tokenizer.decode(sent[0].prompt)
            assert prompt.startswith(
                "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\none\ntwo<|im_end|>"
            )
            assert "<|im_start|>assistant\nword word" in prompt and "user\nthree<|im_end|>" in prompt
            assert sent[0].max_tokens == 12 and sent[0].temperature == 0.7
            browser.find_element(By.ID, "new").click()
            assert words(browser) == []
            send(browser, "four")
            until(browser, lambda: len(sent) == 2)
            assert "three" not in tokenizer.decode(sent[1].prompt)


def test_errors_are_shown_and_the_question_comes_back(browser, tokenizer):
    with engine_of(chat_model(), tokenizer) as engine, served(engine) as url:
        browser.get(url)
        until(browser, lambda: browser.find_element(By.ID, "name").text == "tiny")
        browser.execute_script("document.getElementById('message').value = 'x'.repeat(600)")
        send(browser, "y")
        error = until(browser, lambda: browser.find_elements(By.CSS_SELECTOR, ".error"))[0]
        assert "the model's context is 512" in error.text
        assert browser.find_element(By.ID, "message").get_attribute("value") == "x" * 600 + "y"


def test_what_does_not_fit_the_context_loses_its_oldest_turns(browser, tokenizer):
    with engine_of(scripted(b"Fine."), tokenizer) as engine, served(engine) as url:
        browser.get(url)
        until(browser, lambda: browser.find_element(By.ID, "name").text == "tiny")
        sent = []
        submit = engine.submit
        engine.submit = lambda requests, deliver: (sent.extend(requests), submit(requests, deliver))[1]
        for i in range(4):
            send(browser, f"question {i} " + "x" * 140)
            until(browser, lambda i=i: words(browser)[2 * i + 1 :] == ["Fine."] and answered(browser))
        last = tokenizer.decode(sent[-1].prompt)
        assert [i for i in range(4) if f"question {i}" in last] == [2, 3]
        assert last.startswith("<|im_start|>user\nquestion 2") and last.count("Fine.") == 1


def test_it_asks_for_the_key(browser, tokenizer):
    with engine_of(scripted(b"Fine."), tokenizer) as engine, served(engine, api_key="sesame") as url:
        browser.get(url)
        key = browser.find_element(By.ID, "key")
        until(browser, key.is_displayed)
        key.send_keys("sesame", Keys.TAB)
        until(browser, lambda: browser.find_element(By.ID, "name").text == "tiny")
        until(browser, lambda: not key.is_displayed())
        send(browser, "Hello")
        until(browser, lambda: words(browser)[1:] == ["Fine."])


def test_a_model_without_a_chat_template_continues_texts(browser):
    tokenizer = build_byte_tokenizer()
    with engine_of(chat_model(), tokenizer) as engine, served(engine) as url:
        browser.get(url)
        about = browser.find_element(By.ID, "about")
        until(browser, lambda: "no chat template" in about.text)
        sent = []
        submit = engine.submit
        engine.submit = lambda requests, deliver: (sent.extend(requests), submit(requests, deliver))[1]
        send(browser, "Once upon")
        until(browser, lambda: len(words(browser)) == 2 and answered(browser))
        assert bytes(sent[0].prompt) == b"Once upon"
