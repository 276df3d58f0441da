"""Results as pictures: tables for a terminal, and HTML files that need nothing beside themselves."""

from .answers import Answer, AnswerTable
from .checks import CheckTable
from .code import python_text
from .lens import LensTable, lens_frame, lens_html

__all__ = ["Answer", "AnswerTable", "CheckTable", "LensTable", "lens_frame", "lens_html", "python_text"]
