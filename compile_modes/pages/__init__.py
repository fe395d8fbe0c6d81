"""Self-contained HTML: pages that need no network, and fragments of them for notebooks, drawn from plain data.

``explained`` draws what explain() shows, ``differing`` what diff() does; ``drawing`` has what both are made of, and
``tree`` the tree of modules; ``document`` makes a page of them, with ``style.css`` and ``script.js``. Whatever is shown
is escaped: names of modules are anybody's.
"""

from compile_modes.pages.differing import difference as difference
from compile_modes.pages.document import document as document
from compile_modes.pages.document import fragment as fragment
from compile_modes.pages.document import report as report
from compile_modes.pages.document import write as write
from compile_modes.pages.explained import explanation as explanation
