"""Everything that is said to users: each error, warning and reason under a code, with cause, place and remedy.

One file per group of codes, or per range of one; ``entry.py`` is the mechanism, ``page.py`` the page of all. May import
``errors`` and ``_compat``. The others take entries by name: ``raise messages.NO_GRAPH.error(kind=...)``.

- CM0xx ``packaging.py``: packages, compiled ahead of time; ``packaged.py``: read from files, and called;
  ``precompiling.py``: code put around a module
- CM1xx ``requests.py``: what was asked for: modes, overrides, options; ``sampling.py``: stochastic passes
- CM2xx ``binding.py``: binding and baking; ``tuning.py``: fine-tuning
- CM3xx ``exporting.py``: exporting both modes
- CM4xx ``compiling.py``: under torch.compile
- CM5xx ``files.py``: files
- CM6xx ``warming.py``: warming up
- CM7xx ``reasons.py``: why a site can't be put into a mode
- CM8xx ``remarks.py``: what may depend on mode and is no site
- CM9xx ``tools.py``: the command line and its tables; ``integrations.py``: trainers of other libraries

Codes stay what they are: a new entry takes the next free number of its group, and one that goes leaves a gap.
"""

from compile_modes.messages.binding import *  # noqa: F403
from compile_modes.messages.compiling import *  # noqa: F403
from compile_modes.messages.entry import CATALOGUE as CATALOGUE
from compile_modes.messages.entry import WARNED as WARNED
from compile_modes.messages.entry import Error as Error
from compile_modes.messages.entry import Message as Message
from compile_modes.messages.entry import Place as Place
from compile_modes.messages.entry import Reason as Reason
from compile_modes.messages.entry import Remark as Remark
from compile_modes.messages.entry import Warn as Warn
from compile_modes.messages.entry import parted as parted
from compile_modes.messages.entry import warn as warn
from compile_modes.messages.entry import warn_once as warn_once
from compile_modes.messages.exporting import *  # noqa: F403
from compile_modes.messages.files import *  # noqa: F403
from compile_modes.messages.integrations import *  # noqa: F403
from compile_modes.messages.packaged import *  # noqa: F403
from compile_modes.messages.packaging import *  # noqa: F403
from compile_modes.messages.precompiling import *  # noqa: F403
from compile_modes.messages.reasons import *  # noqa: F403
from compile_modes.messages.remarks import *  # noqa: F403
from compile_modes.messages.requests import *  # noqa: F403
from compile_modes.messages.sampling import *  # noqa: F403
from compile_modes.messages.tools import *  # noqa: F403
from compile_modes.messages.tuning import *  # noqa: F403
from compile_modes.messages.warming import *  # noqa: F403
