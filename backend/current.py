"""What the running application is made of, for the routes that answer a request."""

from __future__ import annotations

from flask import current_app

from backend.reports import Reports
from backend.rounds import Rounds
from backend.services import Services


def services() -> Services:
    found: Services = current_app.extensions["services"]
    return found


def rounds() -> Rounds:
    found: Rounds = current_app.extensions["rounds"]
    return found


def reports() -> Reports:
    found: Reports = current_app.extensions["reports"]
    return found
