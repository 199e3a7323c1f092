"""Sphinx configuration: `python -m sphinx -W docs build/docs` builds the documentation without a warning."""

import logging
import sys
from collections.abc import Iterator
from pathlib import Path

from sphinx.application import Sphinx

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

import jaxtyping  # noqa: E402

from lightning_ntk import __version__  # noqa: E402
from lightning_ntk.utilities import shapes  # noqa: E402
from make_matrix import PLACEHOLDER, matrix_page  # noqa: E402

# Before the modules that are documented: their signatures show `Float[Tensor, "N K"]`, not its stand-in `Annotated`.
for shape in shapes.__all__:
    setattr(shapes, shape, getattr(jaxtyping, shape))

project = "lightning_ntk"
author = "The lightning_ntk developers"
copyright = author
release = version = __version__

extensions = [
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx.ext.intersphinx",
    "sphinxcontrib.katex",
    "sphinx_copybutton",
    "myst_nb",
]
# The navigation of index.md has these pages where they exist.
OPTIONAL_PAGES = {"sweep", "gallery", "gallery/index"}
exclude_patterns = ["build", "_setup.md"]

html_theme = "furo"
html_title = f"lightning_ntk {release}"
html_static_path = ["_static"]
html_css_files = ["wrap.css"]
html_theme_options = {"navigation_with_keys": True}

html_search_scorer = str(HERE / "_static" / "scorer.js")
html_show_sourcelink = False

# The tutorials run while the documentation is built, and a cell that raises ends the build. Their messages stay in the notebooks.
nb_execution_mode = "force"
nb_execution_in_temp = True
nb_execution_raise_on_error = True
nb_execution_timeout = 300
nb_output_stderr = "remove"

# KaTeX is part of the package, and MathML needs neither style sheets nor fonts of its own: formulas show without a network.
katex_css_path = "katex-math.css"
katex_options = "output: 'mathml'"

copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True

intersphinx_mapping = {
    "python": ("https://docs.python.org/3", None),
    "torch": ("https://docs.pytorch.org/docs/stable", None),
    "lightning": ("https://lightning.ai/docs/pytorch/stable", None),
    "torchmetrics": ("https://lightning.ai/docs/torchmetrics/stable", None),
    "matplotlib": ("https://matplotlib.org/stable", None),
}
intersphinx_timeout = 5


def reached(record: logging.LogRecord) -> bool:
    """Whether a message is another one than that an inventory cannot be reached: without a network names link nowhere."""
    return "failed to reach" not in str(record.msg)


logging.getLogger("sphinx.sphinx.ext.intersphinx").addFilter(reached)

myst_enable_extensions = ["dollarmath", "amsmath", "deflist"]
myst_heading_anchors = 3

# A name in single backticks is a reference where it is one, and code elsewhere.
default_role = "py:obj"
autodoc_typehints_format = "short"
autodoc_member_order = "bysource"
python_use_unqualified_type_hints = True
maximum_signature_line_length = 100
napoleon_numpy_docstring = False
napoleon_use_rtype = False
napoleon_use_ivar = True


def plain_text(lines: list[str]) -> Iterator[str]:
    """Escapes what reStructuredText would take for markup: norms |w| for substitutions, and `a/<b>` for a title with a target."""
    block: int | None = None  # indentation of the directive or example inside of which nothing is escaped
    for line in lines:
        indentation = len(line) - len(line.lstrip())
        if line.strip() and block is not None and indentation <= block:
            block = None
        if line.lstrip().startswith((".. math::", ".. code-block::", ">>>")):
            block = indentation if line.lstrip().startswith("..") else indentation - 1
        spans = line.split("`")
        for i, span in enumerate(spans):
            if i % 2 == 0:
                spans[i] = span.replace("|", r"\|")
            elif span.endswith(">"):
                spans[i] = f"`{span}`"
        yield line if block is not None else "`".join(spans)


def setup(app: Sphinx) -> None:
    """Escapes docstrings, leaves missing pages out of the navigation, and writes the matrix into its page."""

    def process(app: Sphinx, what: str, name: str, obj: object, options: object, lines: list[str]) -> None:
        # What Python says of the fields of a NamedTuple; their class describes them.
        lines[:] = [line for line in plain_text(lines) if not line.startswith("Alias for field number")]

    def read(app: Sphinx, docname: str, source: list[str]) -> None:
        if docname == "index":
            missing = OPTIONAL_PAGES - app.env.found_docs
            source[0] = "\n".join(line for line in source[0].splitlines() if line not in missing)
        if PLACEHOLDER in source[0]:
            source[0] = source[0].replace(PLACEHOLDER, matrix_page(HERE.parent / "tests"))

    app.connect("autodoc-process-docstring", process)
    app.connect("source-read", read)
