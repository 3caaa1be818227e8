"""Self-contained pages about runs and evaluations: one HTML file each, no script, nothing loaded from elsewhere.

svg               small plots as text
parts             what every page is made of; all text is escaped there
disagreeing       a run's own training pairs: which stay wrong, cost most, disagree with the rest
one_run           the page of one run
one_evaluation    the page of one evaluation
table_file        tables for programs: CSV or JSON, means over seeds
side_rows         runs and evaluations as rows of a table
several           the page of several of either
write             the right page for a folder, into a file
model_card        the adapter's README and its curves
"""

from __future__ import annotations

from lora_dpo.evaluation.report.one_evaluation import evaluation_page, number_rows
from lora_dpo.evaluation.report.write import PAGE, report_of, write_report

__all__ = ["PAGE", "evaluation_page", "number_rows", "report_of", "write_report"]
