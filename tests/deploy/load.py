"""A client of the OpenAI HTTP API that needs only Pillow: `python load.py URL CLIENTS`.

It keeps CLIENTS requests in flight, each about a new picture, until stdin ends. Then it prints how
many had which outcome, as JSON. With `image` for CLIENTS it sends one request about the image on
stdin, and prints the text.
"""

import base64
import collections
import io
import json
import random
import sys
import threading
import urllib.error
import urllib.request

from PIL import Image

SIDE = 56
MAX_TOKENS = 4
TIMEOUT = 120


def picture() -> bytes:
    file = io.BytesIO()
    Image.frombytes("RGB", (SIDE, SIDE), random.randbytes(SIDE * SIDE * 3)).save(file, "PNG")
    return file.getvalue()


def ask(url: str, image: bytes, **body: object) -> dict:
    uri = "data:image/png;base64," + base64.b64encode(image).decode()
    content = [{"type": "image_url", "image_url": {"url": uri}}, {"type": "text", "text": "OCR:"}]
    whole = {
        "model": "tiny-ocr",
        "temperature": 0,
        "messages": [{"role": "user", "content": content}],
        **body,
    }
    request = urllib.request.Request(
        f"{url}/v1/chat/completions",
        json.dumps(whole).encode(),
        {"content-type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=TIMEOUT) as response:
        return json.load(response)


def outcome(url: str) -> str:
    try:
        answer = ask(url, picture(), max_tokens=MAX_TOKENS, ignore_eos=True)
        tokens = answer["usage"]["completion_tokens"]
        return "answered" if tokens == MAX_TOKENS else f"{tokens} tokens"
    except urllib.error.HTTPError as e:
        return f"{e.code}: {e.read().decode(errors='replace')[:200]}"
    except (OSError, ValueError, KeyError) as e:
        return f"{type(e).__name__}: {e}"


def keep_asking(url: str, clients: int) -> None:
    outcomes: collections.Counter[str] = collections.Counter()
    ended = threading.Event()
    answered = threading.Event()

    def work() -> None:
        while not ended.is_set():
            outcomes[outcome(url)] += 1
            answered.set()

    threads = [threading.Thread(target=work, daemon=True) for _ in range(clients)]
    for thread in threads:
        thread.start()
    answered.wait()
    print("first answers", flush=True)
    sys.stdin.read()
    ended.set()
    for thread in threads:
        thread.join()
    print(json.dumps(outcomes))


if __name__ == "__main__":
    if sys.argv[2] == "image":
        print(
            ask(sys.argv[1], sys.stdin.buffer.read(), max_tokens=512)["choices"][0]["message"][
                "content"
            ],
            end="",
        )
    else:
        keep_asking(sys.argv[1], int(sys.argv[2]))
