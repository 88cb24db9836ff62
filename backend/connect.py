"""`python -m backend connect`: attach a project of an existing Label Studio, each step checked and said in words.

Running it again repairs and duplicates nothing. The exit code is 0 only when every step passed.
"""

from __future__ import annotations

import argparse
import base64
import io
import ssl
import sys
import time
from typing import Any
from urllib.parse import urlsplit

import requests

from backend.label_studio import LabelStudio
from backend.settings import Settings
from backend.transport import Json, no_tls
from kptllm_core.errors import InvalidInput, KptError, NotFound, Unauthorized
from label_config.schema import LabelConfig, parse

TITLE = "KptLLM"  # of the model in Label Studio, until the backend names it after the version that serves (shown.py)
RENAMED = 3  # times that the title is read anew
SECRET_HEADER = "X-Webhook-Secret"  # noqa: S105 - the header's name, not the secret
_SETTINGS = (
    "Start Label Studio with ML_BLOCK_LOCAL_IP=false and SSRF_PROTECTION_ENABLED=false (environment variables of its "
    "server), or give this backend a public address. Do so only where nobody but you can attach backends and webhooks."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command. What is left out comes from the backend's environment variables."""
    parser.description = (
        "Attaches a project of a running Label Studio to this backend: adds or repairs the ML backend, its webhook and "
        "the project's settings for predictions, and says at each step what is wrong and how to fix it. Run it as often "
        "as you like."
    )
    add = parser.add_argument
    add("--url", metavar="URL", help="Label Studio's address as seen from here, https://host/path (LABEL_STUDIO_URL)")
    add(
        "--token", help="a personal access token, or a legacy token (LABEL_STUDIO_API_KEY, which no process list shows)"
    )
    add("--project", type=int, required=True, help="the project's number, as in /projects/7/")
    add(
        "--backend-url",
        metavar="URL",
        default="http://127.0.0.1:9090",
        help="this backend's address as Label Studio reaches it (default: %(default)s)",
    )
    add("--basic-user", help="user name of the backend's basic auth (BASIC_AUTH_USER)")
    add("--basic-pass", help="password of the backend's basic auth (BASIC_AUTH_PASS)")
    add("--webhook-secret", help="what webhooks must bring along (WEBHOOK_SECRET)")
    add(
        "--ca",
        metavar="FILE",
        help="PEM file of the private authority behind Label Studio's certificate (LABEL_STUDIO_CA)",
    )
    add(
        "--title",
        default=TITLE,
        help="name of the model in Label Studio. By default the backend names it after the version that serves, since the Data "
        "Manager tells, and sorts by, the prediction scores of that name only; a name of yours stays",
    )
    add(
        "--interactive",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="let the smart tools of the labelling page ask the model (default: yes)",
    )


def run(args: argparse.Namespace) -> int:
    """Carry out the steps; 0 when all passed, 1 otherwise. Raises InvalidInput for options that cannot be used."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal that has no ✓ gets a ?
    settings = Settings.from_env()
    user, password = args.basic_user or settings.basic_auth_user, args.basic_pass or settings.basic_auth_pass
    if bool(user) != bool(password):
        raise InvalidInput("--basic-user and --basic-pass go together; only one of them was given.")
    connection = Connection(
        LabelStudio(
            args.url or settings.label_studio_url,
            settings.label_studio_api_key if args.token is None else args.token,
            args.ca or settings.label_studio_ca,
            tries=2,
        ),
        args.project,
        args.backend_url,
        title=args.title,
        interactive=args.interactive,
        login=(user, password),
        webhook_secret=args.webhook_secret or settings.webhook_secret,
    )
    return 0 if connection.make() else 1


class Connection:
    """One project, one backend, and the steps that join them. Prints one line per step: ✓ passed, ✗ failed, – remark."""

    def __init__(
        self,
        studio: LabelStudio,
        project: int,
        backend_url: str,
        *,
        title: str = TITLE,
        interactive: bool = True,
        login: tuple[str, str] = ("", ""),
        webhook_secret: str = "",
    ) -> None:
        base, _, below = backend_url.strip().rstrip("/").partition("/projects/")
        parts = urlsplit(base)
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or "@" in parts.netloc:
            raise InvalidInput(f"--backend-url is {base[:100]!r}; expected the backend's address, as http://host:9090.")
        if below and below != str(project):
            raise InvalidInput(
                f"--backend-url ends with /projects/{below[:20]}, but --project is {project}. Leave it out."
            )
        self._studio, self._project, self._base = studio, project, base
        self._url = f"{base}/projects/{project}"
        self._title, self._interactive, self._login, self._secret = title, interactive, login, webhook_secret
        self._reached = ""  # why the backend is not reachable from here; empty if it is
        self._attached: Json = {}
        self._passed = True

    def make(self) -> bool:
        """Whether every step passed. A step that others build on ends the work when it fails."""
        steps = (
            self._label_studio,
            self._token,
            self._label_config,
            self._backend,
            self._attach,
            self._webhook,
            self._predictions_shown,
        )
        for number, step in enumerate(steps):
            try:
                step()
            except KptError as error:
                self._say("✗", error.message)
                self._passed = False
                if number < 5:  # without the model in place there is nothing for the later steps to build on
                    break
        if self._passed:
            self._say(
                "✓",
                f"Project {self._project} is connected: open a task, or Data Manager → Actions → Retrieve Predictions.",
            )
        else:
            self._say(" ", "Not connected yet. Mend what is marked ✗ and run this again.")
        return self._passed

    def _say(self, mark: str, text: str) -> None:
        print(f"{mark} {text}", flush=True)

    # ---- Label Studio -------------------------------------------------------------------------------------------
    def _label_studio(self) -> None:
        anonymous = LabelStudio(self._studio.url, "", self._studio.ca, tries=2, connect_timeout=5.0, timeout=10.0)
        try:
            version = anonymous.version()
        except KptError as error:
            if isinstance(error, (NotFound, Unauthorized)) and _is_backend(self._studio.url):
                raise InvalidInput(
                    f"What answers at {self._studio.url} is a backend like this one, not Label Studio. Give Label Studio's address with --url."
                ) from None
            _check_scheme(self._studio.url, "--url")
            raise
        self._say("✓", f"Label Studio {version} answers at {self._studio.url}.")

    def _token(self) -> None:
        self._say(
            "✓", f"The token works; it belongs to {self._studio.me().get('email') or 'a user without an address'}."
        )

    def _label_config(self) -> None:
        project = self._studio.project(self._project)
        self._say(
            "✓",
            f"Project {self._project} is there: {str(project.get('title'))[:80]!r}, {project.get('task_number')} tasks.",
        )
        try:
            config = parse(str(project.get("label_config") or ""))
        except KptError as error:
            raise InvalidInput(
                f"The label config cannot be used (Settings → Labeling Interface). {error.message}"
            ) from None
        self._say("✓", f"The label config has {_points(config)}.")
        for note in config.notes:
            self._say("–", note)

    # ---- the backend --------------------------------------------------------------------------------------------
    def _backend(self) -> None:
        """The backend as seen from here: its address is wrong if another answers there, or by another protocol. Whether nobody
        does from here does not matter: Label Studio's own view, in the next step, is the one that counts."""
        try:
            status, report = _health(self._url)
        except requests.RequestException as cause:
            _check_scheme(self._base, "--backend-url", cause)
            self._reached = f"the backend does not answer at {self._base} from here"
            return
        if "degraded" not in report:
            if _is_label_studio(self._base):
                raise InvalidInput(f"What answers at {self._base} is Label Studio, not this backend. Give this backend's address with --backend-url.")
            _check_scheme(self._base, "--backend-url")
            self._reached = f"{self._url}/health answers {status}, not as this backend does"
            return
        self._say("✓", f"The backend answers at {self._base}.")
        for part, why in (report.get("degraded") or {}).items():
            self._say("–", f"It says that something is missing ({part}): {why}")
        try:
            login = self._login if self._login[0] else None
            answer = requests.get(f"{self._url}/versions", timeout=(3, 5), auth=_Basic(login), allow_redirects=False)
        except requests.RequestException:
            return  # it has just answered; whatever this is, the next step meets it again
        if answer.status_code == 401:
            raise Unauthorized(
                "The backend wants basic auth, and "
                + ("this login is not the right one." if login else "none was given.")
                + " Give --basic-user and --basic-pass the values of its BASIC_AUTH_USER and BASIC_AUTH_PASS."
            )

    def _attach(self) -> None:
        known = self._studio.ml_backends(self._project)
        same = [entry for entry in known if _same(entry.get("url"), self._url)]
        same += [
            entry for entry in known if _same(entry.get("url"), self._base)
        ]  # attached by hand, without the project
        title = str(same[0].get("title") or self._title) if same else self._title
        user, password = self._login
        more: dict[str, Any] = {"interactive": self._interactive, "user": user, "password": password}
        try:
            if same:
                entry = self._studio.update_backend(same[0]["id"], self._project, self._url, title, **more)
            else:
                entry = self._add(title, more)
        except KptError as error:
            raise InvalidInput(self._why_not_attached(error)) from None
        self._attached = entry
        if entry.get("state") != "CO":
            said = entry.get("error_message") or entry.get("readable_state") or "no reason"
            raise InvalidInput(f"Label Studio has the model, but is not connected to it: {said}.")
        for extra in same[1:]:
            self._studio.detach_backend(extra["id"])
            self._say("–", f"The same backend was attached twice; the second entry ({extra.get('title')!r}) is gone.")
        done = "had the model already; it is up to date" if same else "has the model now"
        self._say("✓", f"Label Studio {done}: {title!r} at {self._url}, version {entry.get('model_version')}.")
        if self._reached:
            self._say("–", f"Just so you know: {self._reached}. Label Studio reaches it, and that is what counts.")

    def _add(self, title: str, more: dict[str, Any]) -> Json:
        try:
            return self._studio.attach_backend(self._project, self._url, title, **more)
        except Unauthorized:
            # When only its webhook is forbidden (SSRF_PROTECTION_ENABLED), Label Studio answers 403 and has it all the same.
            for entry in self._studio.ml_backends(self._project):
                if _same(entry.get("url"), self._url):
                    return self._studio.update_backend(entry["id"], self._project, self._url, title, **more)
            raise

    def _why_not_attached(self, error: KptError) -> str:
        said = str(error.details.get("label_studio_says") or "")
        if error.details.get("label_studio_status") == 403 and (
            "reserved network" in said or "local or private" in said
        ):
            return f"Label Studio refuses {self._url}, because it is a private address ({said}). {_SETTINGS}"
        if "authentication parameters" in said:
            return "Label Studio reaches the backend, but its login is wrong or missing. Give --basic-user and --basic-pass."
        if "health check failed" in said:
            here = f" And {self._reached}: is it running?" if self._reached else " From here it answers."
            return (
                f"Label Studio cannot reach the backend at {self._url}.{here} Give --backend-url the address that "
                f"Label Studio's machine sees: inside a container 127.0.0.1 is the container itself."
            )
        if "valid ML backend" in said:
            return f"Label Studio reaches {self._url}, but the first call (/setup) failed there: {said}"
        return error.message

    # ---- what hangs on it ---------------------------------------------------------------------------------------
    def _webhook(self) -> None:
        wanted = f"{self._url}/webhook"
        headers = self._webhook_headers()
        try:
            hooks = self._studio.webhooks(self._project)
            mine = [hook for hook in hooks if _same(hook.get("url"), wanted)]
            if mine:
                kept = {**(mine[0].get("headers") or {}), **headers}
                # The address is sent along unchanged, so that Label Studio checks whether it would deliver there at all.
                self._studio.update_webhook(
                    mine[0]["id"],
                    url=mine[0]["url"],
                    headers=kept,
                    is_active=True,
                    send_payload=True,
                    send_for_all_actions=True,
                )
            else:
                self._studio.create_webhook(self._project, wanted, headers)
        except KptError as error:
            said = str(error.details.get("label_studio_says") or "")
            if error.details.get("label_studio_status") == 403 and "reserved network" in said:
                raise InvalidInput(
                    f"Label Studio sends no webhooks to {self._base}, because it is a private address ({said}): "
                    f"corrections would arrive late, by the sweep alone. {_SETTINGS}"
                ) from None
            raise InvalidInput(f"The webhook cannot be set up: {error.message}") from None
        dead = [*mine[1:], *(hook for hook in hooks if hook not in mine and self._is_dead(hook))]
        for hook in dead:
            self._studio.delete_webhook(hook["id"])
        signed = f", signed with {' and '.join(sorted(headers))}" if headers else ""
        self._say("✓", f"Corrections come back through a webhook {'that was there' if mine else 'made now'}{signed}.")
        if dead:
            self._say(
                "–",
                f"{len(dead)} old webhook{'s' if len(dead) > 1 else ''} to this backend deleted, so that nothing comes twice.",
            )

    def _webhook_headers(self) -> dict[str, str]:
        """Label Studio's own webhook carries no login; these headers let the backend know where an event comes from."""
        if self._secret:
            return {SECRET_HEADER: self._secret}
        if self._login[0]:
            return {"Authorization": "Basic " + base64.b64encode(":".join(self._login).encode()).decode()}
        return {}

    def _is_dead(self, hook: Json) -> bool:
        """A webhook of ours that outlived its ML backend: it leads to this backend, or to this project on an older one."""
        url = str(hook.get("url") or "").rstrip("/")
        ours = _same(url, f"{self._base}/webhook") or urlsplit(url).path.endswith(f"/projects/{self._project}/webhook")
        if not ours:
            return False
        living = [f"{entry.get('url')}".rstrip("/") + "/webhook" for entry in self._studio.ml_backends(self._project)]
        return not any(_same(url, address) for address in living)

    def _predictions_shown(self) -> None:
        """The backend may give the model the name of its version at the same moment: then what is shown has another title by now."""
        for pause in range(RENAMED):
            try:
                self._show()
                return
            except InvalidInput:
                time.sleep(pause)
        self._show()

    def _show(self) -> None:
        own = [e for e in self._studio.ml_backends(self._project) if e.get("id") == self._attached.get("id")]
        project, title = self._studio.project(self._project), (own[0] if own else self._attached).get("title")
        changes: Json = {}
        if project.get("show_collab_predictions") is not True:
            changes["show_collab_predictions"] = True
        if project.get("model_version") != title:
            changes["model_version"] = title
        if project.get("evaluate_predictions_automatically"):
            changes["evaluate_predictions_automatically"] = False
        if not changes:
            self._say("✓", "Annotators see the predictions of this model, always of its present version.")
            return
        self._studio.update_project(self._project, **changes)
        before = str(project.get("model_version") or "")
        instead = f" instead of {before!r}" if before and before != title else ""
        self._say(
            "✓", f"Annotators see the predictions of this model from now on{instead}, always of its present version."
        )
        if "evaluate_predictions_automatically" in changes:
            self._say(
                "–",
                "Predicting whenever a list of tasks is opened is switched off: it makes every look at the project slow.",
            )


class _Basic(requests.auth.AuthBase):
    """A login, or none at all: not even one of ~/.netrc."""

    def __init__(self, login: tuple[str, str] | None) -> None:
        self._login = login

    def __call__(self, request: requests.PreparedRequest) -> requests.PreparedRequest:
        if self._login:
            word = base64.b64encode(":".join(self._login).encode()).decode()
            request.headers["Authorization"] = f"Basic {word}"
        return request


def _health(url: str) -> tuple[int, Json]:
    """The HTTP status of a server's /health, and the JSON object that it says; empty if it says none. requests.RequestException."""
    answer = requests.get(f"{url}/health", timeout=(3, 5), allow_redirects=False)
    try:
        said = answer.json() if answer.status_code == 200 else {}
    except ValueError:
        said = {}
    return answer.status_code, said if isinstance(said, dict) else {}


def _is_backend(url: str) -> bool:
    """Whether one of ours answers there; Label Studio says UP, too, at any address that ends with /health."""
    try:
        return "degraded" in _health(url)[1]
    except requests.RequestException:
        return False


def _is_label_studio(url: str) -> bool:
    try:
        return bool(LabelStudio(url, tries=1, connect_timeout=3.0, timeout=5.0).version())
    except KptError:
        return False


def _check_scheme(url: str, option: str, cause: requests.RequestException | None = None) -> None:
    """InvalidInput where https was asked of a server that speaks http, as the cause of the failure tells, or the other way round."""
    if cause is not None and no_tls(cause):
        raise InvalidInput(f"What answers at {url} speaks no https. Give its address with http:// ({option}).")
    parts = urlsplit(url)
    if parts.scheme == "http" and parts.hostname:
        try:
            ssl.get_server_certificate((parts.hostname, parts.port or 80), timeout=3.0)
        except (OSError, ValueError):
            return  # nobody there, or no TLS
        raise InvalidInput(f"What answers at {url} speaks https. Give its address with https:// ({option}).")


def _same(one: object, other: str) -> bool:
    return str(one or "").rstrip("/").lower() == other.rstrip("/").lower()


def _points(config: LabelConfig) -> str:
    names = [name for control in config.controls for name in control.schema.names]
    shown = ", ".join(names[:8]) + (" …" if len(names) > 8 else "")
    return f"{len(names)} keypoint{'s' if len(names) != 1 else ''}: {shown}"
