"""Self-contained pages about runs and evaluations: one HTML file each, no script, nothing loaded from elsewhere.

svg               small plots as text
parts             what every page is made of; all text is escaped there
one_run           the page of one run
one_evaluation    the page of one evaluation
several           the page of several of either
write             the right page for a folder, into a file
model_card        the adapter's README and its curves
"""
