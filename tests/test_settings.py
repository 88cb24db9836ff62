"""Settings: every variable documented, every bad value answered with its name, no secret shown."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from backend.settings import Settings
from kptllm_core.errors import InvalidInput

CANARY = "canary-5c1e"


def test_defaults_from_an_empty_environment() -> None:
    settings = Settings.from_env({})
    assert settings == Settings()
    assert settings.label_studio_url == "http://127.0.0.1:8080"
    assert settings.image_hosts == ()
    assert settings.core_address == "http://127.0.0.1:9091"
    assert settings.journal_url == "sqlite:///.data/backend/journal.db"


def test_values_are_read(tmp_path: Path) -> None:
    ca = tmp_path / "ca.pem"
    ca.write_text("-")
    settings = Settings.from_env(
        {
            "LABEL_STUDIO_URL": " https://host/ls/ ",
            "LABEL_STUDIO_CA": str(ca),
            "CORE_URL": "http://gpu:9091/",
            "PORT": "9191",
            "PUBLIC_URL": "https://keypoints.example.org/",
            "ROUND_SECONDS": "2.5",
            "IMAGE_MAX_BYTES": "20 MB",
            "IMAGE_HOSTS": "Images.example.org, 10.0.0.5:8080,*.example.net,[::1]:81, images.example.org",
            "LOG_LEVEL": "debug",
            "DATA_DIR": str(tmp_path / "new"),
            "CORE_TOKEN": "",
            "UNRELATED": "x",
        }
    )
    assert settings.label_studio_url == "https://host/ls"
    assert settings.label_studio_ca == ca
    assert settings.core_address == "http://gpu:9091"
    assert (settings.port, settings.round_seconds, settings.image_max_bytes) == (9191, 2.5, 20_000_000)
    assert settings.public_url == "https://keypoints.example.org"
    assert settings.image_hosts == ("images.example.org", "10.0.0.5:8080", "*.example.net", "[::1]:81")
    assert settings.log_level == "DEBUG"
    assert settings.journal_url == f"sqlite:///{tmp_path}/new/journal.db"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("LABEL_STUDIO_URL", "localhost:8080"),
        ("LABEL_STUDIO_URL", "http://host:99999"),
        ("LABEL_STUDIO_URL", "http://[::1"),
        ("LABEL_STUDIO_URL", "ftp://host"),
        ("LABEL_STUDIO_URL", "http://host/?a=b"),
        ("LABEL_STUDIO_CA", "/no/such/file.pem"),
        ("CORE_URL", "gpu"),
        ("PORT", "80.5"),
        ("PORT", "0"),
        ("PORT", "٣"),
        ("ROUND_EVERY", "-1"),
        ("MIN_TRAIN", "many"),
        ("ROUND_SECONDS", "nan"),
        ("ROUND_SECONDS", "inf"),
        ("IMAGE_MAX_BYTES", "50 parsecs"),
        ("IMAGE_HOSTS", "http://images.example.org"),
        ("IMAGE_HOSTS", "a,b/c"),
        ("IMAGE_HOSTS", "host:"),
        ("IMAGE_HOSTS", "host:99999"),
        ("IMAGE_HOSTS", "[::zz]"),
        ("IMAGE_HOSTS", "*"),
        ("LOG_LEVEL", "loud"),
        ("DATA_DIR", __file__),
        ("DATABASE_URL", "mysql://x"),
        ("CORE_TOKEN", "two words"),
        ("LABEL_STUDIO_API_KEY", "a\nb"),
        ("HOST", "a\x00b"),
    ],
)
def test_a_bad_value_names_its_variable_and_the_way_out(name: str, value: str) -> None:
    with pytest.raises(InvalidInput) as caught:
        Settings.from_env({name: value})
    message = caught.value.message
    assert message.startswith(f"{name} holds ") and "expected" in message and f"Correct {name}" in message
    assert caught.value.details["variable"] == name


@pytest.mark.parametrize("name", ["BASIC_AUTH_USER", "BASIC_AUTH_PASS"])
def test_half_a_login_does_not_start(name: str) -> None:
    with pytest.raises(InvalidInput, match="does not start") as caught:
        Settings.from_env({name: CANARY})
    assert "BASIC_AUTH_USER" in caught.value.message and "BASIC_AUTH_PASS" in caught.value.message
    assert CANARY not in caught.value.message
    assert Settings.from_env({"BASIC_AUTH_USER": "u", "BASIC_AUTH_PASS": "p"}).basic_auth_user == "u"


def test_a_colon_in_the_user_name_is_refused() -> None:
    with pytest.raises(InvalidInput, match="BASIC_AUTH_USER"):
        Settings.from_env({"BASIC_AUTH_USER": "a:b", "BASIC_AUTH_PASS": "p"})


def test_no_secret_in_repr_or_error() -> None:
    secrets = {item.name for item in Settings.describe() if item.secret}
    assert secrets == {"LABEL_STUDIO_API_KEY", "CORE_TOKEN", "BASIC_AUTH_PASS", "DATABASE_URL", "WEBHOOK_SECRET"}
    environ = dict.fromkeys(secrets, CANARY) | {"BASIC_AUTH_USER": "u", "DATABASE_URL": f"postgresql://u:{CANARY}@h/n"}
    assert CANARY not in repr(Settings.from_env(environ)) + str(Settings.from_env(environ))
    for name, value in (
        ("LABEL_STUDIO_API_KEY", f"{CANARY} x"),
        ("DATABASE_URL", f"mysql://u:{CANARY}@h"),
        ("LABEL_STUDIO_URL", f"http://u:{CANARY}@h"),
    ):
        with pytest.raises(InvalidInput) as caught:
            Settings.from_env({name: value})
        assert CANARY not in str(caught.value.to_json()) and name in caught.value.message


def test_every_setting_is_documented() -> None:
    described = Settings.describe()
    assert [item.name.lower() for item in described] == [item.name for item in dataclasses.fields(Settings)]
    assert all(len(item.doc) > 10 and item.doc.endswith((".", ")")) and item.default for item in described)
    assert all(f"| `{item.name}` |" in Settings.table() for item in described)


def test_settings_are_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        Settings().port = 1  # type: ignore[misc]
