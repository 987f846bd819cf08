"""Sections of a report, one file each: a function from the records of one or several runs to a `Section`, or None.

A section gets what run folders say and nothing else, so it works on any machine that has them.
"""

from collections.abc import Callable, Sequence

from launch.report_sections._parts import Section
from launch.report_sections._record import RunRecord
from launch.report_sections.balance import balance
from launch.report_sections.config_diff import configuration
from launch.report_sections.domains import domains
from launch.report_sections.events import events
from launch.report_sections.machine import machine
from launch.report_sections.overview import overview
from launch.report_sections.reweighting import reweighting
from launch.report_sections.training import training

SectionOf = Callable[[Sequence[RunRecord]], Section | None]

SECTIONS: Sequence[SectionOf] = (
    overview, training, domains, balance, reweighting, machine, events, configuration,
)  # fmt: skip
"""In the order of the page. A section that has nothing to show is left out."""
