"""The package's front door."""

from __future__ import annotations

import subprocess
import sys

import pytest

import lora_diffusion as ld


def test_importing_does_not_import_torch() -> None:
    """Command lines answer --help without waiting for torch, the config and the errors included."""
    code = "import sys, lora_diffusion as ld; ld.LoraConfig(r=4); ld.ConfigError; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "False\n"


@pytest.mark.parametrize("name", ld.__all__)
def test_every_public_name_exists_and_is_documented(name: str) -> None:
    assert getattr(ld, name).__doc__


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="merge_everything"):
        ld.merge_everything  # noqa: B018
