"""From a run directory to tables, figures, HTML and a model card. Never loads a model, never imports torch."""

from addlang.report.card import model_card, write_model_card
from addlang.report.html import report_html, write_report
from addlang.report.lab import lab_html, lab_table, write_lab_report
from addlang.report.table import render_table
from addlang.report.verdict import summary_rows, verdict

__all__ = [
    "lab_html",
    "lab_table",
    "model_card",
    "render_table",
    "report_html",
    "summary_rows",
    "verdict",
    "write_lab_report",
    "write_model_card",
    "write_report",
]
