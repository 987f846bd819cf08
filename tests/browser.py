"""The Chromium that tests and figures drive: one on PATH, or what EVENKEEL_CHROMIUM names; None if there is none."""

import os
import shutil

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
CHROMIUM = os.environ.get("EVENKEEL_CHROMIUM") or next(filter(None, map(shutil.which, NAMES)), None)
ARGUMENTS = ("--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update")
