"""The text of a user's file: plain text, Markdown or PDF."""

import re
from pathlib import Path

from hillinfer.errors import UsageError


def read_document(path: str | Path) -> str:
    """The text of a .pdf file, or of any other in UTF-8. UsageError if it cannot be read, or holds no text."""
    file = Path(path).expanduser()
    if not file.is_file():
        raise UsageError(f"there is no file {path}: name a .txt, .md or .pdf file")
    text = _pdf(file) if file.suffix.lower() == ".pdf" else _plain(file)
    if not text.strip():
        raise UsageError(f"{file.name} is empty; put the text in it")
    return text


def _plain(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise UsageError(f"{file.name} is no UTF-8 text: convert it, or name a .txt, .md or .pdf file") from None
    except OSError as error:
        raise UsageError(f"cannot read {file.name} ({error.strerror})") from None


def _pdf(file: Path) -> str:
    try:
        from pypdf import PdfReader
    except ImportError:
        raise UsageError("reading a PDF needs pypdf: pip install 'hillinfer[pdf]'") from None
    try:
        pages = [page.extract_text() for page in PdfReader(file).pages]
    except Exception as error:  # on a damaged file pypdf raises whatever comes
        raise UsageError(f"cannot read {file.name} ({str(error)[:100] or type(error).__name__})") from None
    text = re.sub(r"[ \t]+\n", "\n", "\n\n".join(pages)).strip()
    if not text:
        raise UsageError(f"{file.name} holds no text, only pictures: convert it with OCR first")
    return text
