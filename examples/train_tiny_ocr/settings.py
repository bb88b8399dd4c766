"""Sizes, vocabulary and prompts: everything the other files agree on."""

# Vocabulary: a token's id is its byte value, then come the special tokens of Qwen2.5-VL.
SPECIAL = [
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|object_ref_start|>",
    "<|object_ref_end|>",
    "<|box_start|>",
    "<|box_end|>",
    "<|quad_start|>",
    "<|quad_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
]
PLAIN_ADDED = [
    "<tool_call>",
    "</tool_call>",
    "<|fim_prefix|>",
    "<|fim_middle|>",
    "<|fim_suffix|>",
    "<|fim_pad|>",
    "<|repo_name|>",
    "<|file_sep|>",
]
TOKEN = {name: 256 + i for i, name in enumerate(SPECIAL + PLAIN_ADDED)}
VOCABULARY = 288  # 278 used, rounded up

PATCH = 14
CELL = 28  # 2x2 patches are merged into one image token
VISION_DEPTH = 5
VISION_SIZE = 192
VISION_INNER = 384
VISION_HEADS = 3
WINDOW = 112  # pixels
FULL_ATTENTION = (1, 3)  # the other blocks attend within a window

TEXT_DEPTH = 5
TEXT_SIZE = 256
TEXT_INNER = 512
TEXT_HEADS = 4
TEXT_KV_HEADS = 2
ROPE_THETA = 10000.0
# A published Qwen2.5-VL gives time/height/width 16/24/24 of 64 frequencies. With few, small
# positions the width would get only near-zero frequencies; these sections give every axis some that
# turn within a row of 16 cells, and leave many that hardly turn at all for matching by content.
MROPE_SECTION = (3, 4, 25)
CONTEXT = 4096

MIN_CELLS = 4
MAX_CELLS = 256
IMAGE_MEAN = [0.48145466, 0.4578275, 0.40821073]
IMAGE_STD = [0.26862954, 0.26130258, 0.27577711]
LUMA = [0.299, 0.587, 0.114]

# What the vision tower is taught to see: 2x4 slots in each cell, one character each.
CHARACTERS = [chr(c) for c in range(32, 127)] + ["£", "€"]
CHARACTER_CLASS = {c: i + 1 for i, c in enumerate(CHARACTERS)}  # class 0: nothing there
CLASSES = len(CHARACTERS) + 1
SLOT_ROWS = 2
SLOT_COLUMNS = 4
SLOTS = SLOT_ROWS * SLOT_COLUMNS

ROLM_PROMPT = (
    "Return the plain text representation of this document as if you were reading it naturally.\n"
)
DEFAULT_SYSTEM = "You are a helpful assistant."
SYSTEMS = [
    "You are an OCR engine.",
    "Read the document.",
    "You read text from images.",
    "Be brief.",
]
SHORT_PROMPTS = [
    "",
    "OCR:",
    "OCR",
    "Read the text.",
    "Read this.",
    "What does it say?",
    "What does this say?",
    "Text?",
    "read",
    "What is written here?",
    "Transcribe.",
    "Transcribe the image.",
    "Extract the text",
    "What's in this image?",
    "Read the receipt",
    "Hi",
    "Please read this image.",
]
LONG_PROMPTS = [
    ROLM_PROMPT,
    ROLM_PROMPT,
    ROLM_PROMPT,
    ROLM_PROMPT.strip(),
    "Transcribe all the text in this image.",
    "Please extract all text from the picture.",
    "Describe this image.",
    "What does the text in this image say? Answer with the text only.",
    "Convert the document to plain text.",
    "Return the text of the image, line by line.",
]
