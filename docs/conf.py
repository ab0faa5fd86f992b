"""Builds the documentation: `make docs`, into out/docs. Notebooks are executed; a warning is an error."""

import sys
from importlib.metadata import version as version_of
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))

import docstrings  # noqa: E402
import generate  # noqa: E402
import latex2mathml.converter  # noqa: E402
from docutils.nodes import SkipNode  # noqa: E402

project, author, copyright = "jaxvit", "the jaxvit authors", "the jaxvit authors, Apache-2.0"
release = version = version_of("jaxvit")

extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode", "sphinx_design"]
exclude_patterns = ["experiments/*"]  # parts of the pages in generated/experiments
suppress_warnings = ["myst.header"]  # a page may leave out a level of headings

myst_enable_extensions = ["dollarmath", "colon_fence", "attrs_block"]
myst_heading_anchors = 3

nb_execution_mode = "cache"  # a notebook whose cells did not change is not run again
nb_execution_cache_path = str(HERE.parent / "out" / "docs-cache")
nb_execution_raise_on_error = True
nb_execution_timeout = 600
nb_merge_streams = True

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_default_options = {"members": True, "undoc-members": False}
napoleon_google_docstring, napoleon_numpy_docstring = True, False
napoleon_custom_sections = [("Attributes", "params_style")]
default_role = "py:obj"  # `name` in a docstring links to what it names, where that is documented
python_use_unqualified_type_names = True
toc_object_entries = False

html_theme = "sphinx_book_theme"
html_title = f"jaxvit {release}"
html_static_path = ["_static"]
html_css_files = ["jaxvit.css"]
html_js_files = ["search-tables.js"]
html_extra_path = ["generated/download"]
html_theme_options = {"show_toc_level": 2, "home_page_in_toc": True, "use_download_button": False}


generate.everything(HERE)  # before Sphinx looks which files there are


def offer_notebook(app, name: str, source: list[str]) -> None:
    """Ends each notebook with a link to it as .ipynb."""
    folder, _, page = name.rpartition("/")
    if folder == generate.NOTEBOOKS and page != "index":
        source[0] += (
            f'\n\n```{{raw}} html\n<p><a href="{page}.ipynb" download>Download this page as a notebook</a></p>\n```\n'
        )


def formula(display: str):
    """Writes LaTeX as MathML, which browsers show without a script from elsewhere."""

    def visit(translator, node) -> None:
        translator.body.append(latex2mathml.converter.convert(node.astext(), display=display))
        raise SkipNode

    return visit, None


html_math_renderer = "mathml"


def setup(app):
    app.add_html_math_renderer("mathml", formula("inline"), formula("block"))
    app.connect("source-read", offer_notebook)
    app.connect("autodoc-process-docstring", docstrings.to_rst, priority=400)  # before napoleon reads them
