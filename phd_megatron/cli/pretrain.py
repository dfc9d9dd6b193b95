"""``phd-megatron pretrain``: train a model, alone or under torchrun."""

from __future__ import annotations

from pathlib import Path

from phd_megatron.config.serialize import read_yaml


def run(argv: list[str]) -> int:
    """Train; all that is printed is the run's own log."""
    from phd_megatron.training.start import pretrain

    pretrain(argv, asked_device(argv))
    return 0


def asked_device(argv: list[str]) -> str:
    """``device`` of the command line or the YAML file; needed before the configuration can be read in full."""
    asked = "auto"
    for index, word in enumerate(argv):
        name, _, value = word.partition("=")
        value = value or (argv[index + 1] if index + 1 < len(argv) else "")
        if name == "--config" and Path(value).is_file():
            section = read_yaml(value).get("parallel")
            asked = section.get("device", asked) if isinstance(section, dict) else asked
        elif name == "--device":
            return value
    return asked
