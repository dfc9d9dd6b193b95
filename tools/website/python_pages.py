"""The pages of the Python interface: which modules are on which page. Their text is the modules' docstrings."""

from __future__ import annotations

#: page below ``reference/python/`` -> title, what it is, modules
PAGES: dict[str, tuple[str, str, tuple[str, ...]]] = {
    "visibility": (
        "PHD: visibility and copies",
        "Which key a query sees, and what follows from it.",
        ("phd.kv_policy", "phd.copies", "phd.copy_positions"),
    ),
    "norms": ("Norm schemes", "The schemes as a table, and how one becomes layers.", ("norm.schemes", "norm.modules")),
    "configuration": (
        "Configuration",
        "What a run is, and how it is read, resolved and saved.",
        ("config.schema", "config.facts", "config.catalog", "config.load", "config.resolve", "config.serialize"),
    ),
    "planning": (
        "Planning",
        "What a run costs, by formula.",
        ("planning.run_plan", "planning.parameters", "planning.flops", "planning.memory", "planning.generation"),
    ),
    "data": (
        "Data",
        "Text into token files, and token files into samples.",
        ("data.preprocess", "data.tokenizers", "data.indexed", "data.packing", "data.datasets"),
    ),
    "training": (
        "Training",
        "From a command line to a run that trains, and what may watch it.",
        ("training.start", "training.pretrain", "training.averaging", "training.observers.observer"),
    ),
    "conversion": (
        "Conversion",
        "Export, import and generation.",
        (
            "huggingface.export",
            "huggingface.importing.checkpoint",
            "huggingface.to_megatron",
            "huggingface.family",
            "huggingface.generation",
        ),
    ),
    "sweeps": (
        "Sweeps",
        "Families of runs, and their statistics.",
        ("sweep.definition", "sweep.statistics", "sweep.scaling"),
    ),
    "errors": ("Errors", "The one exception that users see as a message.", ("errors",)),
}


def pages() -> dict[str, str]:
    """Markdown by page; mkdocstrings fills in the docstrings, read from the sources without importing them."""
    found = {}
    for name, (title, what, modules) in PAGES.items():
        parts = [f"# {title}", what, *(f"::: phd_megatron.{module}" for module in modules)]
        found[f"reference/python/{name}.md"] = "\n\n".join(parts) + "\n"
    return found
