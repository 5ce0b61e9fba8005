"""One file with `build` is one objective; base.py has the contract.

Files of a folder `objectives/` anywhere on the Python path belong here too, so that an objective
may live outside this project.
"""

import pkgutil

__path__ = pkgutil.extend_path(__path__, __name__)
