"""The secret on Label Studio's webhook: the backend puts it there itself, and demands it from then on.

Label Studio's webhook carries no login. With a token the backend finds the webhooks that lead to it and gives them a header with a
secret: WEBHOOK_SECRET, else one that it makes up and keeps in the journal. Events of that project are then taken with this header only.
A webhook that is made anew, with the model, lacks it until the next sweep; what is refused in between, that sweep finds.
"""

from __future__ import annotations

import logging
import secrets

from sqlalchemy.orm import Session

from backend.connect import SECRET_HEADER
from backend.services import Services
from backend.shown import our_models
from backend.tables import Fact

log = logging.getLogger(__name__)
_OWN = "webhook_secret"  # the fact that keeps the secret which was made up here


def made_up(services: Services) -> str:
    """The secret that was made up here, one for all projects; empty before there is one."""
    return str(services.journal.fact(_OWN).get("value", ""))


def signed(services: Services, project: str | None) -> bool:
    """Whether an event of this project must bring the secret, since its webhook has it."""
    return project is not None and bool(services.journal.fact(_signed(project)))


def sign(services: Services, project: str) -> None:
    """Put the secret on the project's webhooks that lead to this backend. Raises a KptError."""
    label_studio = services.label_studio
    ours = {str(model.get("url")).rstrip("/").lower() + "/webhook" for model in our_models(services, project)}
    hooks = [h for h in label_studio.webhooks(int(project)) if str(h.get("url")).rstrip("/").lower() in ours] if ours else []
    if not hooks:
        return
    secret = services.settings.webhook_secret or services.journal.write(_own_secret)
    for hook in hooks:
        headers = dict(hook.get("headers") or {})
        if headers.get(SECRET_HEADER) != secret:
            label_studio.update_webhook(hook["id"], headers=headers | {SECRET_HEADER: secret})
            log.info("project %s: Label Studio's webhook brings the secret from now on", project)
    services.journal.set_fact(_signed(project), {"signed": True})


def _own_secret(session: Session) -> str:
    known = session.get(Fact, _OWN)
    if known is None:
        known = Fact(name=_OWN, value={"value": secrets.token_urlsafe(32)})
        session.add(known)
    return str(known.value["value"])


def _signed(project: str) -> str:
    return f"webhook_signed:{project}"
