"""What the parts of the backend share in one process: made once from Settings, handed to whoever needs it."""

from __future__ import annotations

from dataclasses import dataclass, field

from backend.core_client import CoreClient, image_hash
from backend.core_watch import CoreWatch
from backend.images import ImageFetcher
from backend.journal import Journal
from backend.label_studio import LabelStudio
from backend.lookalikes import Lookalikes, look_of, note_looks
from backend.settings import Settings
from backend.tables import Task
from kptllm_core.errors import KptError, Unauthorized, Unavailable
from kptllm_core.imaging import image_size

FIRST_SIGHT_SECONDS = 0.4  # /setup must answer within a second, /health too


@dataclass
class Services:
    settings: Settings
    journal: Journal
    core: CoreClient
    label_studio: LabelStudio
    images: ImageFetcher = field(repr=False)

    def __post_init__(self) -> None:
        self.core_watch = CoreWatch(self.core)
        self.looks = Lookalikes(self.journal)

    @classmethod
    def make(cls, settings: Settings) -> Services:
        """Opens the journal; calls nobody."""
        label_studio = LabelStudio(settings.label_studio_url, settings.label_studio_api_key, settings.label_studio_ca)
        return cls(
            settings,
            Journal(settings.journal_url),
            CoreClient(settings.core_address, settings.core_token),
            label_studio,
            ImageFetcher(settings, label_studio),
        )

    @property
    def has_token(self) -> bool:
        """Whether Label Studio's API may be called at all."""
        return bool(self.settings.label_studio_api_key)

    def base(self) -> str:
        """The core's base as last seen. Only before the first sight is the core asked, and not for long; a core that does
        not answer then lends its versions the model's name of the settings."""
        known = self.journal.base()
        if known is None:
            try:
                known = self.see_core(FIRST_SIGHT_SECONDS)
            except KptError:
                known = self.settings.model.rstrip("/").rsplit("/", 1)[-1]
        return known

    def see_core(self, seconds: float = 2.0) -> str:
        """Ask the core which base it runs, and remember it, or that it is down. Raises Unavailable."""
        try:
            base = str(self.core.health(seconds)["base"])
        except KptError as error:
            self.journal.set_fact("core", {"base": self.journal.base(), "up": False, "message": error.message})
            raise
        self.journal.set_fact("core", {"base": base, "up": True, "message": ""})
        return base

    def image(self, project: str, task: Task, url: str) -> tuple[str, bytes]:
        """(hash, bytes) of a task's image, checked on its header; the journal remembers both success and failure."""
        try:
            data = self.images.fetch(url, task.task)
            width, height = image_size(data)
        except KptError as error:
            if not is_passing(error):
                self.journal.note_file(project, task.task, url, {"error": error.message})
            raise
        sha = image_hash(data)
        self.journal.note_file(project, task.task, url, {"sha256": sha, "width": width, "height": height})
        if not self.looks.has(project, task.task) and (look := look_of(data)) is not None:
            self.journal.write(lambda session: note_looks(session, project, {task.task: look}))
        return sha, data


def is_passing(error: KptError) -> bool:
    """Whether the same image may be had, or the same request answered, later: a service is down, or refuses our token."""
    return isinstance(error, (Unavailable, Unauthorized))
