"""The process that renders one page of a PDF to stdout, as a PNG file.

    python -m services.commands.evaluation.olmocr.render FILE.pdf PAGE LONGEST_SIDE > PAGE.png

It imports no other module of ours, so that it starts quickly.
"""

import resource
import sys

MAX_MEMORY = 2 << 30


def main(file: str, page: str, longest_side: str) -> None:
    """Write the page, counted from 1, to stdout; exit with the reason if that is impossible."""
    resource.setrlimit(resource.RLIMIT_AS, (MAX_MEMORY, MAX_MEMORY))
    import pypdfium2

    try:
        document = pypdfium2.PdfDocument(file)
        if int(page) > len(document):
            sys.exit(f"the file has only {len(document)} pages")
        found = document[int(page) - 1]
        scale = int(longest_side) / max(found.get_size())
        image = found.render(scale=scale).to_pil()
    except (pypdfium2.PdfiumError, OSError, MemoryError, ZeroDivisionError) as error:
        sys.exit(f"{type(error).__name__}: {error}")
    image.save(sys.stdout.buffer, "PNG")


if __name__ == "__main__":
    main(*sys.argv[1:])
