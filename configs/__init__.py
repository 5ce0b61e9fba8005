"""One file is one recipe; base.py has what all share.

Files of a folder `configs/` anywhere on the Python path belong here too.
"""

import pkgutil

__path__ = pkgutil.extend_path(__path__, __name__)
