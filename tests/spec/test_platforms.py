"""`PlatformOptions`: what may be said of a platform's devices."""

import re

import pytest

from xlarank.errors import ConfigError
from xlarank.spec import PlatformOptions


@pytest.mark.parametrize(
    ("text", "options"),
    [
        ("cuda", PlatformOptions(name="cuda")),
        ("cpu,devices=2,cost=0.1", PlatformOptions(name="cpu", devices=2, cost=0.1)),
        ("cpu,cost=3", PlatformOptions(name="cpu", cost=3.0)),
    ],
)
def test_a_platform_is_written_as_it_is_read(text, options):
    assert PlatformOptions.parse(text) == options
    assert str(options) == text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "platform: expected a name of [a-z][a-z0-9_]*, at most 128 characters, got ''"),
        ("cpu,2", "platform cpu,2: expected NAME,FIELD=VALUE,... of ['cost', 'devices'], got ['2']"),
        ("cpu,devices=two", "platform cpu,devices=two: devices: invalid literal for int()"),
        ("cpu,devices=0", "platform cpu: devices must be an integer >= 1; was 0"),
        ("cpu,cost=0", "platform cpu: cost must be > 0; was 0.0"),
        ("cpu,cost=nan", "platform cpu: cost must be a finite number; was nan"),
    ],
)
def test_what_is_no_platform_is_refused(text, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        PlatformOptions.parse(text)
