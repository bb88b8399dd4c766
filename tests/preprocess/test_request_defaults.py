"""RolmOCR answers with its own prompt, temperature and length if a request leaves them open."""

import json
import shutil
from pathlib import Path

import pytest

from common.checkpoint import open_checkpoint
from common.families.family import RequestDefaults
from common.families.qwen2_5_vl import PAGE_LOOPS
from common.messages import Prompt, Sampling, Stopping
from services.preprocess import families
from services.preprocess.preprocessor import Preprocessor
from services.preprocess.sandbox import child
from services.preprocess.sandbox.jobs import Setup
from tests.preprocess.builders import IMAGES, Preprocess, create_preprocessor, submit
from tests.preprocess.cases import checkpoint_path

INSTRUCTION = (
    "Return the plain text representation of this document as if you were reading it naturally.\n"
)
ROLMOCR = RequestDefaults(INSTRUCTION, 0.2, 4096, PAGE_LOOPS)
OLMOCR = RequestDefaults(repetition=PAGE_LOOPS)


def folder_of(path: Path, name_or_path: str | None = None) -> Path:
    shutil.copytree(checkpoint_path("a_image"), path)
    if name_or_path:
        config = json.loads((path / "config.json").read_text())
        (path / "config.json").write_text(json.dumps(config | {"_name_or_path": name_or_path}))
    return path


@pytest.mark.parametrize(
    ("folder", "said", "expected"),
    [
        ("RolmOCR", None, ROLMOCR),
        ("reducto_rolmocr-fp16", None, ROLMOCR),
        ("models--reducto--RolmOCR/snapshots/0123", None, ROLMOCR),
        ("ocr", "reducto/RolmOCR", ROLMOCR),
        ("olmOCR-2-7B-1025-FP8", None, OLMOCR),
        ("ocr", "Qwen/Qwen2.5-VL-7B-Instruct", RequestDefaults()),
        ("ocr", None, RequestDefaults()),
        ("RolmOCR/other", None, RequestDefaults()),
    ],
)
def test_it_is_recognised_by_its_name(
    tmp_path: Path, folder: str, said: str | None, expected: RequestDefaults
) -> None:
    checkpoint = open_checkpoint(folder_of(tmp_path / folder, said))
    assert create_preprocessor(checkpoint).defaults == expected


@pytest.mark.parametrize(
    ("folder", "known_as", "expected"),
    [
        ("weights", "reducto/RolmOCR", ROLMOCR),
        ("weights", "", RequestDefaults()),
        ("RolmOCR", "none", RequestDefaults()),
    ],
)
def test_a_deployment_may_say_the_name(
    tmp_path: Path,
    folder: str,
    known_as: str,
    expected: RequestDefaults,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In a container the directory is often mounted under another name."""
    model = folder_of(tmp_path / folder)
    rules = families.load(open_checkpoint(model))
    found = Preprocessor(open_checkpoint(model), rules, known_as=known_as)
    assert found.defaults == expected
    # This process is no sandbox, and goes on.
    monkeypatch.setattr(child, "limit_memory", lambda: None)
    monkeypatch.setattr(child.signal, "setitimer", lambda *_: None)
    setup = Setup(str(model), found.max_model_len, known_as=known_as)
    assert child.load(setup)._preprocessor.defaults == expected


@pytest.fixture
def rolmocr(tmp_path: Path) -> Preprocessor:
    return create_preprocessor(open_checkpoint(folder_of(tmp_path / "RolmOCR")))


def prompt_of(preprocessor: Preprocessor, text: str, *images: bytes, **given: object) -> Prompt:
    content = [{"type": "image"}] * len(images)
    messages = [{"role": "user", "content": [*content, {"type": "text", "text": text}]}]
    preprocess = Preprocess("vision-1", preprocessor=preprocessor)
    sent = preprocess.play(submit("r", *images, prompt=json.dumps(messages).encode(), **given))
    (prompt,) = (message for _, message in sent if isinstance(message, Prompt))
    return prompt


def text_of(preprocessor: Preprocessor, prompt: Prompt) -> str:
    ids = prompt.token_ids.numpy().tolist()
    return b"".join(preprocessor.vocabulary.token_bytes(id) for id in ids).decode()


def test_a_request_without_text_gets_all_of_it(rolmocr: Preprocessor) -> None:
    prompt = prompt_of(rolmocr, "", IMAGES[0])
    assert text_of(rolmocr, prompt).endswith(
        f"<|vision_end|>{INSTRUCTION}<|im_end|>\n<|im_start|>assistant\n"
    )
    left = rolmocr.max_model_len - len(prompt.token_ids.numpy())
    assert (prompt.sampling.temperature, prompt.stopping.max_tokens) == (0.2, min(4096, left))


def test_what_the_client_sends_wins(rolmocr: Preprocessor) -> None:
    sampling = Sampling(temperature=0.0)
    stopping = Stopping(max_tokens=7)
    prompt = prompt_of(rolmocr, "Read it.", IMAGES[0], sampling=sampling, stopping=stopping)
    assert "Return the plain text" not in text_of(rolmocr, prompt)
    assert (prompt.sampling.temperature, prompt.stopping.max_tokens) == (0.0, 7)


def test_another_model_has_no_prompt_of_its_own() -> None:
    preprocessor = create_preprocessor(open_checkpoint(checkpoint_path("a_image")))
    prompt = prompt_of(preprocessor, "", IMAGES[0])
    assert "Return the plain text" not in text_of(preprocessor, prompt)
    assert prompt.sampling.temperature != 0.2
