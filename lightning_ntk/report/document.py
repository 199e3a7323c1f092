"""The pieces of a self-contained HTML page, readable on a phone and in print."""

import html
import io
from collections.abc import Iterable, Sequence
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #222; max-width: 60rem; margin: 0 auto; padding: 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2rem; }
.verdict { border-left: 0.4rem solid #0072B2; padding: 0.5rem 1rem; background: #f4f7fa; font-size: 1.1rem; }
.verdict.rich { border-color: #D55E00; } .verdict.undecided, .verdict.sweep { border-color: #999; }
.scroll { overflow-x: auto; } table { border-collapse: collapse; font-size: 0.9rem; }
th, td { text-align: right; padding: 0.2rem 0.7rem; border-bottom: 1px solid #ddd; white-space: nowrap; }
th { white-space: normal; vertical-align: bottom; }
figure { margin: 1rem 0; overflow-x: auto; } figure svg { width: 100%; height: auto; min-width: 40rem; }
figure.narrow { max-width: 34rem; } figure.narrow svg { min-width: 0; }
.pair { display: flex; flex-wrap: wrap; gap: 1rem; } .pair figure { flex: 1 1 20rem; }
pre { background: #f6f6f6; padding: 0.7rem; overflow-x: auto; font-size: 0.8rem; } footer { color: #666; font-size: 0.85rem; }
@media print {
  body { max-width: none; } figure, table { break-inside: avoid; }
  .scroll { overflow: visible; } table { font-size: 0.7rem; } th, td { padding: 0.2rem 0.35rem; }
}
"""
_CITATION = """@software{lightning_ntk,
  title = {lightning_ntk: how far a network leaves its linearized (NTK) regime, during training},
  author = {{The lightning_ntk developers}},
  year = {2026}
}"""
# A wider figure would be too small on a phone: it is scrolled.
_NARROW_INCHES = 8


def document(title: str, parts: Iterable[str]) -> str:
    """Builds an HTML page from its title and parts.

    It ends with how to cite and when it was written.
    """
    body = [f"<h1>{html.escape(title)}</h1>", *parts, heading("How to cite"), f"<pre>{html.escape(_CITATION)}</pre>"]
    body.append(f"<footer>Written by lightning_ntk on {date.today():%Y-%m-%d}.</footer>")
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{html.escape(title)}</title><style>{_STYLE}</style></head><body>{''.join(body)}</body></html>\n"
    )


def write(path: str | Path, page: str) -> Path:
    """Writes a page to a file, whose folder is made."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page, encoding="utf-8")
    return path


def headline(kind: str, word: str, sentence: str, small: str) -> str:
    """The box at the top: a word, a sentence, and a smaller one."""
    return (
        f'<p class="verdict {kind}"><strong>{html.escape(word)}</strong> {html.escape(sentence)}<br>'
        f"<small>{html.escape(small)}</small></p>"
    )


def heading(text: str) -> str:
    """The heading of a section."""
    return f"<h2>{html.escape(text)}</h2>"


def paragraph(text: str) -> str:
    """A paragraph of plain text."""
    return f"<p>{html.escape(text)}</p>"


def listing(entries: Iterable[str]) -> str:
    """A list of sentences."""
    return f"<ul>{''.join(f'<li>{html.escape(entry)}</li>' for entry in entries)}</ul>"


def table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table that scrolls sideways where it is too wide."""
    head = "".join(f"<th>{html.escape(name)}</th>" for name in heads)
    body = "".join(f"<tr>{''.join(f'<td>{html.escape(cell)}</td>' for cell in row)}</tr>" for row in rows)
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def drawing(figure: "Figure") -> str:
    """A figure as inline SVG."""
    import matplotlib as mpl
    from matplotlib.backends.backend_svg import FigureCanvasSVG

    file, canvas = io.StringIO(), cast("Any", FigureCanvasSVG(figure))
    # No date and a fixed salt, so that equal runs have equal pages. `savefig` would draw everything twice.
    with mpl.rc_context({"svg.hashsalt": "lightning_ntk"}):
        canvas.print_svg(file, metadata={"Date": None})
    svg = file.getvalue()
    narrow = ' class="narrow"' if figure.get_figwidth() < _NARROW_INCHES else ""
    return f"<figure{narrow}>{svg[svg.index('<svg') :]}</figure>"
