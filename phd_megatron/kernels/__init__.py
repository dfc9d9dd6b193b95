"""Front door to the kernels, whose sources live in the top-level ``kernels/`` folder.

That folder has no ``__init__.py`` of its own: the name ``kernels`` belongs to a package on PyPI that transformers
imports when it finds it. In a wheel ``setup.py`` puts each ``kernels/<op>`` here; in a checkout or an editable
install this module extends its search path to the folder instead.
"""

from pathlib import Path

_checkout = Path(__file__).resolve().parents[2] / "kernels"
if _checkout.is_dir() and not (_checkout / "__init__.py").exists():
    __path__.append(str(_checkout))
