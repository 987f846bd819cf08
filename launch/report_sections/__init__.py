"""Sections of a run's report, one file each: a function from the run's record to a `Section`, or None.

`launch/report.py` lists them. A section gets rows of metrics and nothing else, so it works on any machine that has the
run folder.
"""
